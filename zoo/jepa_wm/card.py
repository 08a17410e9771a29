"""What the catalogue says about jepa-wm."""

from zoo.registry import ModelCard

CARD = ModelCard(
    name="jepa-wm",
    title="Action-conditioned JEPA",
    summary="Predicts latents, not pixels, of what actions lead to, and plans towards an image.",
    class_path="zoo.jepa_wm.module:JEPAWorldModel",
    paper="A Lightweight Library for Energy-Based Joint-Embedding Predictive Architectures",
    authors="Basile Terver, Randall Balestriero, Megi Dervishi, David Fan, Quentin Garrido, "
    "Tushar Nagarajan, Koustuv Sinha, Wancong Zhang, Mike Rabbat, Yann LeCun, Amir Bar",
    year=2026,
    url="https://arxiv.org/abs/2602.03604",
    data=("online", "offline"),
    can=("Policy", "GoalConditioned", "Encoder"),
    observations=("image",),
    actions=("discrete", "box", "multi_discrete"),
    sizes={"nano": "for one CPU core", "paper": "the paper's; the default"},
)
