"""PlaNet (Hafner et al., 2019); the LightningModule is `zoo.planet.module.PlaNet`."""
