"""What the catalogue says about Genie."""

from zoo.registry import ModelCard

CARD = ModelCard(
    name="genie",
    title="Genie",
    summary="Finds the controls of silent video and dreams on by them, frame by frame.",
    class_path="zoo.genie.module:Genie",
    paper="Genie: Generative Interactive Environments",
    authors=(
        "Jake Bruce, Michael Dennis, Ashley Edwards, Jack Parker-Holder, Yuge Shi, Edward Hughes, "
        "Matthew Lai, Aditi Mavalankar, Richie Steigerwald, Chris Apps, Yusuf Aytar, Sarah "
        "Bechtle, Feryal Behbahani, Stephanie Chan, Nicolas Heess, Lucy Gonzalez, Simon Osindero, "
        "Sherjil Ozair, Scott Reed, Jingwei Zhang, Konrad Zolna, Jeff Clune, Nando de Freitas, "
        "Satinder Singh, Tim Rocktäschel"
    ),
    year=2024,
    url="https://arxiv.org/abs/2402.15391",
    data=("video",),
    can=("Policy", "Imaginer", "Encoder", "LatentActions"),
    observations=("image",),
    actions=(),
    sizes={
        "nano": "for one CPU core",
        "coinrun": "the paper's case study; the default",
        "platformers": "the paper's, with dynamics of 48 layers of width 5120",
    },
)
