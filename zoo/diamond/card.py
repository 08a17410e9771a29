"""What the catalogue says about DIAMOND."""

from zoo.registry import ModelCard

CARD = ModelCard(
    name="diamond",
    title="DIAMOND",
    summary="Dreams the next frame by diffusion, details and all, and learns to act in the dream.",
    class_path="zoo.diamond.module:Diamond",
    paper="Diffusion for World Modeling: Visual Details Matter in Atari",
    authors=(
        "Eloi Alonso, Adam Jelley, Vincent Micheli, Anssi Kanervisto, Amos Storkey, Tim Pearce, "
        "François Fleuret"
    ),
    year=2024,
    url="https://arxiv.org/abs/2405.12399",
    data=("online", "offline"),
    can=("Policy", "Imaginer"),
    observations=("image",),
    actions=("discrete", "box", "multi_discrete"),
    sizes={
        "nano": "1.1 million parameters at 32x32, for CPUs",
        "atari": "13.5 million parameters at 64x64; the default",
    },
)
