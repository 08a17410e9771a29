"""Actions between the environment and the networks."""

from __future__ import annotations

import torch

from datamodules.spec import ActionSpec
from zoo.nets.actions import ActionCodec

BOX = ActionSpec("box", low=(-2.0, 0.0), high=(2.0, 10.0))


def test_discrete_actions_are_one_hot() -> None:
    codec = ActionCodec(ActionSpec("discrete", nvec=(3,)))
    action = torch.tensor([[0, 2]])
    assert codec.encode(action).tolist() == [[[1, 0, 0], [0, 0, 1]]]
    assert torch.equal(codec.decode(codec.encode(action)), action)


def test_multi_discrete_actions_are_concatenated() -> None:
    codec = ActionCodec(ActionSpec("multi_discrete", nvec=(2, 3)))
    action = torch.tensor([[1, 2], [0, 1]])
    assert codec.encode(action).tolist() == [[0, 1, 0, 0, 1], [1, 0, 0, 1, 0]]
    assert torch.equal(codec.decode(codec.encode(action)), action)


def test_box_actions_are_scaled_to_one() -> None:
    codec = ActionCodec(BOX)
    action = torch.tensor([[-2.0, 10.0], [0.0, 2.5]])
    assert codec.encode(action).tolist() == [[-1.0, 1.0], [0.0, -0.5]]
    torch.testing.assert_close(codec.decode(codec.encode(action)), action)


def test_box_actions_beyond_the_bounds_are_clipped() -> None:
    decoded = ActionCodec(BOX).decode(torch.tensor([[-3.0, 1.5]]))
    assert decoded.tolist() == [[-2.0, 10.0]]


def test_bounds_are_no_part_of_the_weights() -> None:
    assert not ActionCodec(BOX).state_dict()
