"""Dreamer (Hafner et al., 2020); the LightningModule is `zoo.dreamer_v1.module.DreamerV1`."""
