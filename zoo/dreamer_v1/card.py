"""What the catalogue says about Dreamer V1."""

from zoo.registry import ModelCard

CARD = ModelCard(
    name="dreamer-v1",
    title="Dreamer V1",
    summary="Learns behaviour by back-propagating values through imagined dynamics.",
    class_path="zoo.dreamer_v1.module:DreamerV1",
    paper="Dream to Control: Learning Behaviors by Latent Imagination",
    authors="Danijar Hafner, Timothy Lillicrap, Jimmy Ba, Mohammad Norouzi",
    year=2020,
    url="https://arxiv.org/abs/1912.01603",
    data=("online", "offline"),
    can=("Policy", "Imaginer", "Encoder"),
    observations=("image", "vector"),
    actions=("discrete", "box", "multi_discrete"),
    sizes={"nano": "for one CPU core", "paper": "the paper's; the default"},
)
