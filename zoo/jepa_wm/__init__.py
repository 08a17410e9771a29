"""Action-conditioned JEPA; the LightningModule is `zoo.jepa_wm.module.JEPAWorldModel`."""
