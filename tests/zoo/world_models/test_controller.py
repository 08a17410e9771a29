"""C: the paper's sizes and action maps, and populations."""

from __future__ import annotations

import pytest
import torch

from datamodules.errors import UserError
from datamodules.spec import ActionSpec
from zoo.world_models.controller import Actions, Controller

CAR = ActionSpec("box", low=(-1.0, 0.0, 0.0), high=(1.0, 1.0, 1.0))
THREE = ActionSpec("discrete", nvec=(3,))


def test_sizes_of_the_paper() -> None:
    assert Controller(32 + 256, 3).size == 867
    assert Controller(64 + 512 + 512, 1, bias=False).size == 1088


def test_car_racing() -> None:
    """Steering tanh, gas (tanh + 1) / 2, brake tanh clipped to [0, 1]."""
    actions = Actions(CAR, "car-racing")
    raw = torch.tensor([[0.5, 0.5, 0.5], [-2.0, -2.0, -2.0]])
    x = torch.tanh(raw)
    expected = torch.stack([x[:, 0], (x[:, 1] + 1) / 2, x[:, 2].clamp(0, 1)], -1)
    torch.testing.assert_close(actions.decode(actions.choose(raw)), expected)


def test_take_cover() -> None:
    """Thirds of (-1, 1) are left, nothing and right."""
    actions = Actions(THREE, "line", (2, 0, 1))
    raw = torch.atanh(torch.tensor([[-0.9], [-0.34], [-0.33], [0.0], [0.33], [0.34], [0.9]]))
    encoded = actions.choose(raw)
    assert encoded.flatten().tolist() == [-1, -1, 0, 0, 0, 1, 1]
    assert actions.decode(encoded).tolist() == [2, 2, 0, 0, 0, 1, 1]
    assert actions.encode(torch.tensor([2, 0, 1])).flatten().tolist() == [-1, 0, 1]


def test_two_choices_on_a_line() -> None:
    actions = Actions(ActionSpec("discrete", nvec=(2,)), "line")
    assert actions.decode(actions.choose(torch.tensor([[-0.01], [0.01]]))).tolist() == [0, 1]


def test_general_maps() -> None:
    several = Actions(ActionSpec("multi_discrete", nvec=(2, 3)))
    raw = torch.tensor([[0.1, 0.2, 3.0, 1.0, 2.0]])
    assert several.decode(several.choose(raw)).tolist() == [[1, 0]]
    box = Actions(ActionSpec("box", low=(-2.0,), high=(4.0,)))
    torch.testing.assert_close(
        box.decode(box.choose(torch.tensor([[0.7]]))), torch.tanh(torch.tensor([[0.7]])) * 3 + 1
    )
    three = Actions(THREE)
    assert three.decode(three.choose(torch.tensor([[0.1, 0.3, 0.2]]))).tolist() == [1]


@pytest.mark.parametrize("spec", [THREE, CAR, ActionSpec("multi_discrete", nvec=(2, 4))])
def test_encode_is_the_inverse_of_decode(spec: ActionSpec) -> None:
    actions = Actions(spec)
    encoded = actions.choose(torch.randn(20, actions.raw_size))
    torch.testing.assert_close(actions.encode(actions.decode(encoded)), encoded)


def test_a_population_is_its_members() -> None:
    controller = Controller(5, 3)
    flat = torch.randn(4, controller.size)
    features = torch.randn(4, 6, 5)
    raw = controller.population(flat).raw(features)
    for p in range(4):
        controller.load(flat[p])
        assert torch.equal(controller.flat, flat[p])
        torch.testing.assert_close(raw[p], controller(features[p]))
    chosen = controller.population(flat).select(torch.tensor([2, 2, 0]))
    torch.testing.assert_close(chosen.raw(features[[2, 2, 0]]), raw[[2, 2, 0]])


def test_a_population_without_bias() -> None:
    controller = Controller(5, 1, bias=False)
    flat = torch.randn(2, 5)
    raw = controller.population(flat).raw(torch.ones(2, 1, 5))
    torch.testing.assert_close(raw.flatten(), flat.sum(1))


@pytest.mark.parametrize(
    ("spec", "kind", "order", "message"),
    [
        (THREE, "wheel", None, "no action_map 'wheel'"),
        (THREE, "car-racing", None, "box of 3"),
        (CAR, "line", None, "discrete"),
        (THREE, "line", (0, 1, 1), "each of the 3 actions once"),
    ],
)
def test_mistakes(spec: ActionSpec, kind: str, order: tuple[int, ...] | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Actions(spec, kind, order)
