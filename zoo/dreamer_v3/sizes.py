"""The sizes of DreamerV3."""

# Official widths; `nano` is ours, for CPUs. The number of layers is the same for all.
SIZES: dict[str, dict[str, int]] = {
    "nano": {"deter": 64, "hidden": 64, "stoch": 32, "classes": 4, "depth": 4, "units": 64},
    "1m": {"deter": 512, "hidden": 64, "stoch": 32, "classes": 4, "depth": 4, "units": 64},
    "12m": {"deter": 2048, "hidden": 256, "stoch": 32, "classes": 16, "depth": 16, "units": 256},
    "25m": {"deter": 3072, "hidden": 384, "stoch": 32, "classes": 24, "depth": 24, "units": 384},
    "50m": {"deter": 4096, "hidden": 512, "stoch": 32, "classes": 32, "depth": 32, "units": 512},
    "100m": {"deter": 6144, "hidden": 768, "stoch": 32, "classes": 48, "depth": 48, "units": 768},
    "200m": {"deter": 8192, "hidden": 1024, "stoch": 32, "classes": 64, "depth": 64, "units": 1024},
    "400m": {
        "deter": 12288,
        "hidden": 1536,
        "stoch": 32,
        "classes": 96,
        "depth": 96,
        "units": 1536,
    },
}
