"""DreamerV3 (Hafner et al., 2023); the LightningModule is `zoo.dreamer_v3.module.DreamerV3`."""
