"""What the catalogue says about V-JEPA."""

from zoo.registry import ModelCard

CARD = ModelCard(
    name="v-jepa",
    title="V-JEPA",
    summary="Learns features of video by predicting those of hidden tubes from what is visible.",
    class_path="zoo.v_jepa.module:VJEPA",
    paper="Revisiting Feature Prediction for Learning Visual Representations from Video",
    authors=(
        "Adrien Bardes, Quentin Garrido, Jean Ponce, Xinlei Chen, Michael Rabbat, Yann LeCun, "
        "Mahmoud Assran, Nicolas Ballas"
    ),
    year=2024,
    url="https://arxiv.org/abs/2404.08471",
    data=("offline", "video"),
    can=("Encoder",),
    observations=("image",),
    actions=(),
    sizes={
        "nano": "for one CPU core",
        "tiny": "ViT-Ti, 5.6 million parameters",
        "small": "ViT-S, 22 million",
        "base": "ViT-B, 86 million",
        "large": "ViT-L, 304 million; the default",
        "huge": "ViT-H, 632 million",
    },
)
