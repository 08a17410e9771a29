"""What the catalogue says about Dreamer V2."""

from zoo.registry import ModelCard

CARD = ModelCard(
    name="dreamer-v2",
    title="Dreamer V2",
    summary="Discrete latents with a balanced KL divergence; actors by REINFORCE or dynamics.",
    class_path="zoo.dreamer_v2.module:DreamerV2",
    paper="Mastering Atari with Discrete World Models",
    authors="Danijar Hafner, Timothy Lillicrap, Mohammad Norouzi, Jimmy Ba",
    year=2021,
    url="https://arxiv.org/abs/2010.02193",
    data=("online", "offline"),
    can=("Policy", "Imaginer", "Encoder", "ReplayLatents"),
    observations=("image", "vector"),
    actions=("discrete", "box", "multi_discrete"),
    sizes={
        "nano": "for one CPU core",
        "dmc": "the official one for the control suite",
        "atari": "the official one for Atari; the default",
        "crafter": "the official widths for Crafter",
    },
)
