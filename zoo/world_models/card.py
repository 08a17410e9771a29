"""What the catalogue says about World Models."""

from zoo.registry import ModelCard

CARD = ModelCard(
    name="world-models",
    title="World Models",
    summary="Sees (V), remembers (M), then evolves a tiny controller (C) inside of its own dream.",
    class_path="zoo.world_models.module:WorldModels",
    paper="Recurrent World Models Facilitate Policy Evolution",
    authors="David Ha, Jürgen Schmidhuber",
    year=2018,
    url="https://arxiv.org/abs/1803.10122",
    data=("online", "offline"),
    can=("Policy", "Imaginer", "Encoder", "ReplayLatents"),
    observations=("image", "vector"),
    actions=("discrete", "box", "multi_discrete"),
    sizes={
        "nano": "for one CPU core",
        "car-racing": "z 32, LSTM 256; the default",
        "take-cover": "z 64, LSTM 512",
    },
)
