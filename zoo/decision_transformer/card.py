"""What the catalogue says about Decision Transformer."""

from zoo.registry import ModelCard

CARD = ModelCard(
    name="decision-transformer",
    title="Decision Transformer",
    summary="Learns actions from what came before and the return to come, then acts for a return.",
    class_path="zoo.decision_transformer.module:DecisionTransformer",
    paper="Decision Transformer: Reinforcement Learning via Sequence Modeling",
    authors=(
        "Lili Chen, Kevin Lu, Aravind Rajeswaran, Kimin Lee, Aditya Grover, Michael Laskin, "
        "Pieter Abbeel, Aravind Srinivas, Igor Mordatch"
    ),
    year=2021,
    url="https://arxiv.org/abs/2106.01345",
    data=("offline",),
    can=("Policy", "ReturnConditioned"),
    observations=("image", "vector"),
    actions=("discrete", "box", "multi_discrete"),
    sizes={
        "nano": "for one CPU core",
        "gym": "the paper's for MuJoCo; the default",
        "atari": "the paper's for Atari",
    },
)
