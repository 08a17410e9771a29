"""What the catalogue says about DreamerV3."""

from zoo.registry import ModelCard

CARD = ModelCard(
    name="dreamer-v3",
    title="DreamerV3",
    summary="One set of settings for many domains: learns by imagining in a discrete latent space.",
    class_path="zoo.dreamer_v3.module:DreamerV3",
    paper="Mastering Diverse Domains through World Models",
    authors="Danijar Hafner, Jurgis Pasukonis, Jimmy Ba, Timothy Lillicrap",
    year=2023,
    url="https://arxiv.org/abs/2301.04104",
    data=("online", "offline"),
    can=("Policy", "Imaginer", "Encoder", "ReplayLatents"),
    observations=("image", "vector"),
    actions=("discrete", "box", "multi_discrete"),
    sizes={
        "nano": "for one CPU core",
        "1m": "0.6 million parameters on vectors",
        "12m": "9.7 million parameters on vectors; the default",
        "25m": "deterministic state of 3072",
        "50m": "deterministic state of 4096",
        "100m": "deterministic state of 6144",
        "200m": "deterministic state of 8192; the paper's",
        "400m": "deterministic state of 12288",
    },
)
