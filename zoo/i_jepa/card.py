"""What the catalogue says about I-JEPA."""

from zoo.registry import ModelCard

CARD = ModelCard(
    name="i-jepa",
    title="I-JEPA",
    summary="Learns features of images by predicting those of hidden blocks from a visible one.",
    class_path="zoo.i_jepa.module:IJEPA",
    paper="Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture",
    authors=(
        "Mahmoud Assran, Quentin Duval, Ishan Misra, Piotr Bojanowski, Pascal Vincent, "
        "Michael Rabbat, Yann LeCun, Nicolas Ballas"
    ),
    year=2023,
    url="https://arxiv.org/abs/2301.08243",
    data=("offline", "video"),
    can=("Encoder",),
    observations=("image",),
    actions=(),
    sizes={
        "nano": "for one CPU core",
        "tiny": "ViT-Ti, 5.5 million parameters",
        "small": "ViT-S, 22 million",
        "base": "ViT-B, 86 million",
        "large": "ViT-L, 303 million",
        "huge": "ViT-H, 631 million; the paper's best, and the default",
    },
)
