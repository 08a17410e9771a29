"""Decision Transformer (Chen et al., 2021); the LightningModule is in `module.py`."""
