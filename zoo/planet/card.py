"""What the catalogue says about PlaNet."""

from zoo.registry import ModelCard

CARD = ModelCard(
    name="planet",
    title="PlaNet",
    summary="Learns latent dynamics and plans every action in them; no policy, no value.",
    class_path="zoo.planet.module:PlaNet",
    paper="Learning Latent Dynamics for Planning from Pixels",
    authors="Danijar Hafner, Timothy Lillicrap, Ian Fischer, Ruben Villegas, David Ha, "
    "Honglak Lee, James Davidson",
    year=2019,
    url="https://arxiv.org/abs/1811.04551",
    data=("online", "offline"),
    can=("Policy", "Imaginer", "Encoder"),
    observations=("image", "vector"),
    actions=("discrete", "box", "multi_discrete"),
    sizes={"nano": "for one CPU core", "paper": "the paper's; the default"},
)
