"""Output objects against closed forms worked out here."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from zoo.nets.distributions import (
    MSE,
    Binary,
    BoundedNormal,
    Categorical,
    OneHot,
    SymlogMSE,
    TwoHot,
    draw,
    softmax,
    symexp,
    symexp_bins,
    symlog,
    two_hot,
    unimix,
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def plain_unimix(logits: Tensor, fraction: float) -> Tensor:
    exp = logits.exp()
    return (1 - fraction) * exp / exp.sum(-1, keepdim=True) + fraction / logits.shape[-1]


def test_symlog_has_known_values_and_symexp_inverts_it() -> None:
    x = torch.tensor([0.0, math.e - 1, 1 - math.e, math.exp(3) - 1], dtype=torch.float64)
    torch.testing.assert_close(symlog(x), torch.tensor([0.0, 1.0, -1.0, 3.0]).double())
    far = torch.tensor([-1e6, -0.3, 0.0, 1e-8, 7.0, 1e6], dtype=torch.float64)
    torch.testing.assert_close(symexp(symlog(far)), far)


@pytest.mark.parametrize("classes", [2, 5, 15, 16, 40])
def test_softmax_equals_torch(classes: int) -> None:
    logits = torch.randn(7, classes) * 30
    torch.testing.assert_close(softmax(logits), torch.softmax(logits, -1))


@pytest.mark.parametrize("classes", [4, 20])
def test_unimix_probabilities_and_gradient(classes: int) -> None:
    logits = (torch.randn(3, 2, classes) * 3).requires_grad_()
    weight = torch.randn(3, 2, classes)
    probs = unimix(logits, 0.1)
    (grad,) = torch.autograd.grad((probs.log() * weight).sum(), logits)
    expected = plain_unimix(logits, 0.1)
    (expected_grad,) = torch.autograd.grad((expected.log() * weight).sum(), logits)
    torch.testing.assert_close(probs, expected)
    torch.testing.assert_close(grad, expected_grad)
    assert probs.min() >= 0.1 / classes


def test_unimix_computes_in_float32() -> None:
    assert unimix(torch.randn(2, 4).bfloat16(), 0.01).dtype == torch.float32


class TestDraw:
    def test_inverts_the_cumulative_distribution(self) -> None:
        probs = torch.tensor([0.2, 0.5, 0.3]).expand(5, 3)
        noise = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71]).unsqueeze(-1)
        assert draw(probs, noise).argmax(-1).tolist() == [0, 0, 1, 1, 2]

    def test_frequencies_match_the_probabilities(self) -> None:
        probs = torch.tensor([0.05, 0.6, 0.0, 0.35])
        count = 40_000
        noise = (torch.arange(count) + 0.5).div(count).unsqueeze(-1)
        frequencies = draw(probs.expand(count, 4), noise).mean(0)
        torch.testing.assert_close(frequencies, probs, atol=1e-4, rtol=0)

    def test_noise_at_the_edges_stays_inside(self) -> None:
        almost_one = torch.tensor([1 - 2**-24])
        # These add up to less than one in float32, so the noise can lie beyond the last.
        probs = torch.full((1, 3), 1 / 3) * (1 - 1e-6)
        assert draw(probs, almost_one.view(1, 1)).tolist() == [[0.0, 0.0, 1.0]]
        impossible_first = torch.tensor([[0.0, 1.0, 0.0]])
        assert draw(impossible_first, torch.zeros(1, 1)).tolist() == [[0.0, 1.0, 0.0]]
        assert draw(torch.tensor([[1.0, 0.0]]), almost_one.view(1, 1)).tolist() == [[1.0, 0.0]]


class TestOneHot:
    def test_sample_is_one_hot_with_the_gradient_of_the_probabilities(self) -> None:
        logits = torch.randn(6, 3, 4, requires_grad=True)
        weight = torch.randn(6, 3, 4)
        probs = unimix(logits, 0.01)
        sample = OneHot(probs).sample()
        torch.testing.assert_close(sample.sort(-1).values[..., -1], torch.ones(6, 3))
        torch.testing.assert_close(sample.sum(-1), torch.ones(6, 3))
        (grad,) = torch.autograd.grad((sample * weight).sum(), logits)
        (expected,) = torch.autograd.grad((plain_unimix(logits, 0.01) * weight).sum(), logits)
        torch.testing.assert_close(grad, expected)

    def test_entropy_and_kl_are_sums_over_the_latents(self) -> None:
        p = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
        q = torch.tensor([[0.25, 0.75], [0.9, 0.1]])
        entropy = math.log(2) - 0.9 * math.log(0.9) - 0.1 * math.log(0.1)
        assert OneHot(p).entropy().item() == pytest.approx(entropy, rel=1e-6)
        kl = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
        assert OneHot(p).kl(OneHot(q)).item() == pytest.approx(kl, rel=1e-6)


class TestCategorical:
    def test_log_prob_and_entropy_match_torch(self) -> None:
        logits = torch.randn(9, 5)
        ours, theirs = Categorical(logits, (5,)), torch.distributions.Categorical(logits=logits)
        action = ours.sample()
        torch.testing.assert_close(ours.log_prob(action), theirs.log_prob(action.argmax(-1)))
        torch.testing.assert_close(ours.entropy(), theirs.entropy())
        assert (ours.pred().argmax(-1) == logits.argmax(-1)).all()

    def test_several_choices_are_independent(self) -> None:
        logits = torch.randn(9, 6)
        parts = [torch.distributions.Categorical(logits=x) for x in logits.split([2, 4], -1)]
        ours = Categorical(logits, (2, 4))
        action = ours.sample()
        index = [x.argmax(-1) for x in action.split([2, 4], -1)]
        assert (action.sum(-1) == 2).all()
        expected = parts[0].log_prob(index[0]) + parts[1].log_prob(index[1])
        torch.testing.assert_close(ours.log_prob(action), expected)
        torch.testing.assert_close(ours.entropy(), parts[0].entropy() + parts[1].entropy())

    def test_samples_follow_the_probabilities(self) -> None:
        logits = torch.tensor([0.1, 0.2, 0.7]).log().expand(20_000, 3)
        frequencies = Categorical(logits, (3,)).sample().mean(0)
        torch.testing.assert_close(frequencies, torch.tensor([0.1, 0.2, 0.7]), atol=0.015, rtol=0)


class TestBoundedNormal:
    def test_matches_torch(self) -> None:
        mean, std = torch.randn(4, 3), torch.randn(4, 3)
        ours = BoundedNormal(mean, std)
        scale = 0.9 / (1 + (-(std + 2)).exp()) + 0.1
        theirs = torch.distributions.Normal(mean.tanh(), scale)
        action = ours.sample()
        torch.testing.assert_close(ours.pred(), mean.tanh())
        torch.testing.assert_close(ours.log_prob(action), theirs.log_prob(action).sum(-1))
        torch.testing.assert_close(ours.entropy(), theirs.entropy().sum(-1))

    def test_standard_deviation_keeps_its_bounds(self) -> None:
        ends = BoundedNormal(torch.zeros(2), torch.tensor([-50.0, 50.0])).std
        torch.testing.assert_close(ends, torch.tensor([0.1, 1.0]))


class TestTwoHot:
    def test_bins_are_symmetric_and_logarithmic(self) -> None:
        bins = symexp_bins(255)
        assert (bins == -bins.flip(0)).all()
        assert bins[127] == 0
        assert bins[-1].item() == pytest.approx(math.exp(20) - 1, rel=1e-6)
        assert bins[128].item() == pytest.approx(math.exp(20 / 127) - 1, rel=1e-5)
        with pytest.raises(ValueError, match="odd"):
            symexp_bins(254)

    @pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
    def test_equal_probabilities_predict_exactly_zero(self, precision: torch.dtype) -> None:
        logits = torch.full((3, 255), 0.7, dtype=precision)
        assert (TwoHot(logits, symexp_bins(255)).pred() == 0).all()

    def test_the_expectation_of_the_encoding_is_the_target(self) -> None:
        bins = symexp_bins(255)
        target = torch.tensor([-1e4, -3.3, -0.01, 0.0, 0.2, 1.0, 99.0])
        below, above, weight = two_hot(target, bins)
        assert (above == below + 1).all()
        assert ((weight >= 0) & (weight <= 1)).all()
        torch.testing.assert_close((1 - weight) * bins[below] + weight * bins[above], target)
        probs = torch.zeros(len(target), 255)
        probs.scatter_add_(1, below[:, None], (1 - weight)[:, None])
        probs.scatter_add_(1, above[:, None], weight[:, None])
        pred = TwoHot((probs + 1e-30).log(), bins).pred()
        torch.testing.assert_close(pred, target, rtol=1e-5, atol=1e-5)

    def test_targets_beyond_the_bins_are_clamped(self) -> None:
        bins = symexp_bins(5, 2.0)
        below, _, weight = two_hot(torch.tensor([-1e9, 1e9]), bins)
        assert below.tolist() == [0, 3]
        assert weight.tolist() == [0.0, 1.0]

    def test_loss_by_hand(self) -> None:
        bins = symexp_bins(5, 2.0)  # -6.389 -1.718 0 1.718 6.389
        one = math.e - 1
        logits = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
        normaliser = math.log(sum(math.exp(i) for i in range(5)))
        # A quarter of the way from bin 2 (zero) to bin 3.
        expected = -(0.75 * (2 - normaliser) + 0.25 * (3 - normaliser))
        assert TwoHot(logits, bins).loss(torch.tensor(one / 4)).item() == pytest.approx(expected)
        exact = TwoHot(logits, bins).loss(torch.tensor(0.0)).item()
        assert exact == pytest.approx(-(2 - normaliser))

    def test_loss_gives_no_gradient_to_its_target(self) -> None:
        target = torch.tensor([0.3], requires_grad=True)
        logits = torch.zeros(1, 5, requires_grad=True)
        TwoHot(logits, symexp_bins(5, 2.0)).loss(target).sum().backward()
        assert target.grad is None
        assert logits.grad is not None

    def test_pred_by_hand_and_indexing(self) -> None:
        bins = symexp_bins(3, 1.0)  # -1.718 0 1.718
        logits = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]]).log()
        both = TwoHot(logits, bins)
        expected = torch.tensor([0.3, -0.5]) * (math.e - 1)
        torch.testing.assert_close(both.pred(), expected)
        torch.testing.assert_close(both[1:].pred(), expected[1:])

    def test_stays_in_float32_under_autocast(self) -> None:
        logits, bins = torch.randn(50, 255) * 2, symexp_bins(255)
        expected = TwoHot(logits, bins).pred()
        with torch.autocast("cpu", torch.bfloat16):
            found = TwoHot(logits, bins).pred()
        torch.testing.assert_close(found, expected)


def test_binary_is_cross_entropy_with_a_soft_target() -> None:
    logit = torch.tensor([0.0, 2.0])
    p = 1 / (1 + math.exp(-2))
    torch.testing.assert_close(Binary(logit).pred(), torch.tensor([0.5, p]))
    expected = torch.tensor([math.log(2), -(0.997 * math.log(p) + 0.003 * math.log(1 - p))])
    torch.testing.assert_close(Binary(logit).loss(torch.tensor([1.0, 0.997])), expected)


def test_squared_errors_have_no_half_and_sum_over_the_data() -> None:
    mean = torch.zeros(2, 3, 4)
    assert MSE(mean, 1).loss(torch.full((2, 3, 4), 2.0)).tolist() == [[16.0] * 3] * 2
    assert MSE(mean, 2).loss(torch.full((2, 3, 4), 2.0)).tolist() == [48.0] * 2
    assert MSE(torch.tensor([1.0]), 0).loss(torch.tensor([3.0])).tolist() == [4.0]


def test_symlog_error_is_in_symlog_space_and_pred_in_units() -> None:
    output = SymlogMSE(torch.tensor([[0.0, 3.0]]), 1)
    target = torch.tensor([[math.e - 1, 0.0]])
    torch.testing.assert_close(output.loss(target), torch.tensor([1.0 + 9.0]))
    torch.testing.assert_close(output.pred(), torch.tensor([[0.0, math.exp(3) - 1]]))
