"""V-JEPA (Bardes et al., 2024); the LightningModule is `zoo.v_jepa.module.VJEPA`."""
