"""Dreamer V2 (Hafner et al., 2021); the LightningModule is `zoo.dreamer_v2.module.DreamerV2`."""
