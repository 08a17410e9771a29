"""Genie (Bruce et al., 2024); the LightningModule is `zoo.genie.module.Genie`."""
