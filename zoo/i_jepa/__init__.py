"""I-JEPA (Assran et al., 2023); the LightningModule is `zoo.i_jepa.module.IJEPA`."""
