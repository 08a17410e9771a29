"""Actions between the environment and the networks."""

from __future__ import annotations

import pytest
import torch

from datamodules.spec import ActionSpec
from zoo.nets.actions import ActionCodec, add_noise, random_like

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


class TestNoise:
    DISCRETE = ActionSpec("discrete", nvec=(4,))
    SEVERAL = ActionSpec("multi_discrete", nvec=(2, 5))

    @pytest.fixture(autouse=True)
    def seed(self) -> None:
        torch.manual_seed(0)

    @pytest.mark.parametrize("spec", [BOX, DISCRETE, SEVERAL], ids=lambda spec: spec.kind)
    def test_none_changes_nothing(self, spec: ActionSpec) -> None:
        encoded = torch.rand(3, spec.encoded_size)
        assert torch.equal(add_noise(encoded, 0.0, spec), encoded)

    def test_box_actions_get_normal_noise_in_units_of_half_the_box(self) -> None:
        start = torch.tensor([0.1, -0.2]).expand(20_000, 2)
        noise = add_noise(start, 0.2, BOX) - start
        torch.testing.assert_close(noise.mean(0), torch.zeros(2), atol=0.005, rtol=0)
        torch.testing.assert_close(noise.std(0), torch.full((2,), 0.2), atol=0.005, rtol=0)
        assert abs((noise[:, 0] * noise[:, 1]).mean()) < 0.001  # drawn for each dimension

    def test_box_actions_stay_in_the_box(self) -> None:
        noisy = add_noise(torch.tensor([[0.95, -1.0]]).expand(1000, 2), 0.3, BOX)
        assert noisy.min() == -1
        assert noisy.max() == 1
        assert noisy.unique().numel() > 500

    def test_discrete_actions_are_replaced_by_uniform_ones(self) -> None:
        start = torch.tensor([0.0, 0.0, 1.0, 0.0]).expand(20_000, 4)
        noisy = add_noise(start, 0.4, self.DISCRETE)
        assert set(noisy.unique().tolist()) == {0.0, 1.0}
        assert (noisy.sum(-1) == 1).all()
        # A uniform choice hits the old action, too.
        expected = torch.tensor([0.1, 0.1, 0.7, 0.1])
        torch.testing.assert_close(noisy.mean(0), expected, atol=0.015, rtol=0)

    def test_each_of_several_choices_is_replaced_by_itself(self) -> None:
        start = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]).expand(20_000, 7)
        noisy = add_noise(start, 0.5, self.SEVERAL)
        first, second = noisy.split([2, 5], -1)
        assert (first.sum(-1) == 1).all()
        assert (second.sum(-1) == 1).all()
        expected = torch.tensor([0.75, 0.25] + [0.6] + [0.1] * 4)
        torch.testing.assert_close(noisy.mean(0), expected, atol=0.015, rtol=0)
        both = ((first[:, 1] == 1) & (second[:, 0] == 0)).float().mean()
        assert both.item() == pytest.approx(0.25 * 0.4, abs=0.015)  # independently

    @pytest.mark.parametrize("spec", [BOX, DISCRETE, SEVERAL], ids=lambda spec: spec.kind)
    def test_random_actions_are_uniform(self, spec: ActionSpec) -> None:
        found = random_like(torch.zeros(10_000, 2, spec.encoded_size), spec)
        assert found.shape == (10_000, 2, spec.encoded_size)
        if spec.kind == "box":
            assert -1 <= found.min() < -0.999
            assert 0.999 < found.max() < 1
            torch.testing.assert_close(found.mean((0, 1)), torch.zeros(2), atol=0.02, rtol=0)
            return
        shares = torch.tensor([1 / n for n in spec.nvec for _ in range(n)])
        torch.testing.assert_close(found.mean((0, 1)), shares, atol=0.015, rtol=0)
        assert (found.sum(-1) == len(spec.nvec)).all()
        assert set(found.unique().tolist()) == {0.0, 1.0}

    def test_keeps_leading_axes(self) -> None:
        encoded = ActionCodec(self.SEVERAL).encode(torch.tensor([[[0, 3], [1, 1]]]))
        assert add_noise(encoded, 0.5, self.SEVERAL).shape == (1, 2, 7)
