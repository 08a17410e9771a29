"""Makes `latent_models`, and the `recordings` of the datamodules' tests, importable here."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "datamodules")]
