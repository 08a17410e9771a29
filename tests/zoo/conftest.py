"""Makes `latent_models` importable by the tests of the recurrent state-space family."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
