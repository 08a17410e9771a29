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
    CenteredImage,
    DiagonalNormal,
    OneHot,
    PolicySteps,
    SymlogMSE,
    TanhNormal,
    TruncatedNormal,
    TwoHot,
    UnitNormal,
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

    def test_detached_and_stacked(self) -> None:
        probs = torch.rand(3, 2, 4, requires_grad=True)
        assert not OneHot(probs).detach().probs.requires_grad
        both = OneHot.stack([OneHot(probs), OneHot(2 * probs)])
        assert both.probs.shape == (3, 2, 2, 4)  # time comes second
        assert torch.equal(both.probs[:, 1], 2 * probs)


class TestDiagonalNormal:
    def pair(self) -> tuple[DiagonalNormal, DiagonalNormal]:
        def one() -> DiagonalNormal:
            mean = torch.randn(4, 3, 1, requires_grad=True)
            return DiagonalNormal(mean, (torch.rand(4, 3, 1) + 0.1).requires_grad_())

        return one(), one()

    def theirs(self, ours: DiagonalNormal) -> torch.distributions.Normal:
        return torch.distributions.Normal(ours.mean, ours.std)

    def test_kl_and_entropy_match_torch_summed_over_the_variables(self) -> None:
        p, q = self.pair()
        kl = torch.distributions.kl_divergence(self.theirs(p), self.theirs(q)).sum((-2, -1))
        assert p.kl(q).shape == (4,)
        torch.testing.assert_close(p.kl(q), kl)
        torch.testing.assert_close(p.entropy(), self.theirs(p).entropy().sum((-2, -1)))
        torch.testing.assert_close(p.kl(p), torch.zeros(4))

    def test_kl_has_the_gradients_of_torch(self) -> None:
        p, q = self.pair()
        wrt = (p.mean, p.std, q.mean, q.std)
        ours = torch.autograd.grad(p.kl(q).sum(), wrt)
        kl = torch.distributions.kl_divergence(self.theirs(p), self.theirs(q))
        torch.testing.assert_close(ours, torch.autograd.grad(kl.sum(), wrt))

    def test_samples_are_reparameterised(self) -> None:
        p, _ = self.pair()
        noise = torch.randn(4, 3, 1)
        sample = p.sample(noise)
        torch.testing.assert_close(sample, p.mean + p.std * noise)
        to_mean, to_std = torch.autograd.grad(sample.sum(), (p.mean, p.std))
        torch.testing.assert_close(to_mean, torch.ones(4, 3, 1))
        torch.testing.assert_close(to_std, noise)
        assert p.mode() is p.mean

    def test_samples_draw_their_own_noise(self) -> None:
        shape = (20_000, 2, 1)
        p = DiagonalNormal(torch.full(shape, 0.5), torch.full(shape, 2.0))
        sample = p.sample()
        torch.testing.assert_close(sample.mean(0), torch.full((2, 1), 0.5), atol=0.06, rtol=0)
        torch.testing.assert_close(sample.std(0), torch.full((2, 1), 2.0), atol=0.06, rtol=0)

    def test_detached_and_stacked(self) -> None:
        p, q = self.pair()
        fixed = p.detach()
        assert not fixed.mean.requires_grad
        assert not fixed.std.requires_grad
        assert torch.equal(fixed.mean, p.mean)
        assert torch.equal(fixed.std, p.std)
        both = DiagonalNormal.stack([p, q])
        assert both.mean.shape == both.std.shape == (4, 2, 3, 1)  # time comes second
        assert torch.equal(both.mean[:, 1], q.mean)
        assert torch.equal(both.std[:, 0], p.std)


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

    def test_samples_have_the_gradient_of_the_probabilities(self) -> None:
        logits = torch.randn(6, 6, requires_grad=True)
        weight = torch.randn(6, 6)
        (grad,) = torch.autograd.grad((Categorical(logits, (2, 4)).sample() * weight).sum(), logits)
        probs = torch.cat([part.softmax(-1) for part in logits.split([2, 4], -1)], -1)
        (expected,) = torch.autograd.grad((probs * weight).sum(), logits)
        torch.testing.assert_close(grad, expected)


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


class TestTanhNormal:
    def pair(self, raw_std: float) -> tuple[TanhNormal, torch.distributions.Distribution]:
        mean, std = torch.randn(4, 2) * 2, raw_std + 0.3 * torch.randn(4, 2)
        scale = (1 + (std + math.log(math.exp(5) - 1)).exp()).log() + 1e-4
        normal = torch.distributions.Normal(5 * torch.tanh(mean / 5), scale)
        squash = torch.distributions.TanhTransform()
        theirs = torch.distributions.TransformedDistribution(normal, [squash])
        return TanhNormal(mean, std), torch.distributions.Independent(theirs, 1)

    @pytest.mark.parametrize("raw_std", [-5.0, 0.0], ids=["narrow", "as it starts"])
    def test_log_prob_matches_torch(self, raw_std: float) -> None:
        ours, theirs = self.pair(raw_std)
        for action in (torch.zeros(4, 2), torch.linspace(-0.95, 0.95, 8).view(4, 2)):
            expected = theirs.log_prob(action)
            assert expected.shape == (4,)
            torch.testing.assert_close(ours.log_prob(action), expected, atol=1e-4, rtol=1e-4)

    def test_log_prob_is_finite_at_the_edges(self) -> None:
        action = torch.tensor([[-1.0, 1.0]], requires_grad=True)
        log_prob = TanhNormal(torch.zeros(1, 2), torch.zeros(1, 2)).log_prob(action)
        assert log_prob.isfinite().all()

    def test_starts_with_a_standard_deviation_of_five(self) -> None:
        start = TanhNormal(torch.zeros(1), torch.zeros(1))
        assert start.std.item() == pytest.approx(5.0001)
        far = TanhNormal(torch.tensor([-1e3, 1e3]), torch.full((2,), -1e3))
        torch.testing.assert_close(far.mean, torch.tensor([-5.0, 5.0]))
        torch.testing.assert_close(far.std, torch.full((2,), 1e-4))

    def test_samples_stay_in_the_box_and_follow_the_distribution(self) -> None:
        mean, std = torch.tensor([0.3, -1.0]), torch.tensor([-5.0, -4.0])
        ours = TanhNormal(mean.expand(20_000, 2), std.expand(20_000, 2))
        sample = ours.sample()
        assert sample.shape == (20_000, 2)
        assert sample.abs().max() <= 1
        before = ours.mean[0] + ours.std[0] * torch.randn(200_000, 2)
        torch.testing.assert_close(sample.mean(0), before.tanh().mean(0), atol=0.015, rtol=0)
        torch.testing.assert_close(sample.std(0), before.tanh().std(0), atol=0.015, rtol=0)

    def test_samples_are_reparameterised(self) -> None:
        mean, std = torch.randn(5, 2), torch.randn(5, 2) - 5
        actions = []
        for shift in (0.0, 1e-2):
            torch.manual_seed(1)
            actions.append(TanhNormal(mean + shift, std).sample())
        torch.manual_seed(1)
        wanted = mean.clone().requires_grad_()
        (grad,) = torch.autograd.grad(TanhNormal(wanted, std).sample().sum(), wanted)
        torch.testing.assert_close(grad, (actions[1] - actions[0]) / 1e-2, atol=2e-2, rtol=2e-2)

    def test_the_mode_is_likely(self) -> None:
        ours, theirs = self.pair(-5.4)
        mode = ours.pred()
        assert mode.shape == (4, 2)
        others = theirs.log_prob(theirs.sample((2000,)))
        rank = (others < ours.log_prob(mode)).float().mean(0)
        assert rank.min() > 0.9  # the best of 100

    def test_entropy_matches_numerical_integration(self) -> None:
        mean, std = torch.tensor([0.5, -2.0]), torch.tensor([-5.0, -4.0])
        single = TanhNormal(mean[:, None], std[:, None])
        # Over u before the tanh: H = -integral of N(u) (log N(u) - log(1 - tanh(u)^2)) du.
        u = single.mean + single.std * torch.linspace(-8, 8, 4001)
        normal = torch.distributions.Normal(single.mean, single.std)
        density = normal.log_prob(u) - torch.log1p(-u.double().tanh().square()).float()
        expected = -torch.trapezoid(normal.log_prob(u).exp() * density, u).sum()
        many = TanhNormal(mean.expand(500, 2), std.expand(500, 2)).entropy()
        assert many.shape == (500,)
        assert many.mean().item() == pytest.approx(expected.item(), abs=0.03)


class TestTruncatedNormal:
    GRID = torch.linspace(-1, 1, 40_001)
    # Raw means and deviations: narrow, wide, at an edge.
    RAW = ((0.3, -3.0), (0.0, 0.0), (-1.0, 3.0), (4.0, -6.0), (-4.0, 1.0))

    def on_grid(self, mean: float, std: float) -> tuple[TruncatedNormal, Tensor]:
        """The distribution over one number, and its density on the grid."""
        ours = TruncatedNormal(torch.tensor([mean]), torch.tensor([std]))
        return ours, ours.log_prob(self.GRID[:, None]).double()

    def mean(self, raw: Tensor) -> Tensor:
        """The mean of the cut distribution in float64, by integration."""
        x = self.GRID.double()
        scale = 2 / (1 + (-raw[1] / 2).exp()) + 0.1
        density = torch.exp(-0.5 * ((x - raw[0].tanh()) / scale) ** 2)
        return torch.trapezoid(density * x, x) / torch.trapezoid(density, x)

    @pytest.mark.parametrize(("mean", "std"), RAW)
    def test_density_integrates_to_one(self, mean: float, std: float) -> None:
        ours, log_prob = self.on_grid(mean, std)
        total = torch.trapezoid(log_prob.exp(), self.GRID.double())
        assert total.item() == pytest.approx(1.0, abs=1e-4)
        expected = 2 / (1 + math.exp(-std / 2)) + 0.1
        assert ours.std.item() == pytest.approx(expected, rel=1e-5)
        assert ours.pred().item() == pytest.approx(math.tanh(mean), rel=1e-5)
        best = self.GRID[log_prob.argmax()]
        assert best.item() == pytest.approx(math.tanh(mean), abs=1e-3)

    @pytest.mark.parametrize(("mean", "std"), RAW)
    def test_entropy_matches_numerical_integration(self, mean: float, std: float) -> None:
        ours, log_prob = self.on_grid(mean, std)
        expected = -torch.trapezoid(log_prob.exp() * log_prob, self.GRID.double())
        assert ours.entropy().item() == pytest.approx(expected.item(), abs=2e-4)

    def test_log_prob_and_entropy_are_sums_over_the_dimensions(self) -> None:
        raw = torch.tensor(self.RAW).T
        joint = TruncatedNormal(*raw)
        apart = TruncatedNormal(*raw.unsqueeze(-1))
        action = torch.linspace(-0.9, 0.9, raw.shape[1])
        torch.testing.assert_close(joint.log_prob(action), apart.log_prob(action[:, None]).sum())
        torch.testing.assert_close(joint.entropy(), apart.entropy().sum())

    @pytest.mark.parametrize(("mean", "std"), RAW)
    def test_samples_have_the_mean_and_its_gradient(
        self, mean: float, std: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        count = 20_000
        levels = (torch.arange(count) + 0.5) / count  # instead of random numbers
        monkeypatch.setattr(torch, "rand_like", lambda x: levels[:, None].expand_as(x))
        raw = torch.tensor([mean, std], requires_grad=True)
        sample = TruncatedNormal(*raw[:, None, None].expand(2, count, 1)).sample()
        assert sample.abs().max() < 1
        wide = torch.tensor([mean, std], dtype=torch.float64)
        assert sample.mean().item() == pytest.approx(self.mean(wide).item(), abs=1e-4)
        (grad,) = torch.autograd.grad(sample.mean(), raw)
        step = 1e-4 * torch.eye(2, dtype=torch.float64)
        expected = [(self.mean(wide + s) - self.mean(wide - s)) / 2e-4 for s in step]
        torch.testing.assert_close(grad.double(), torch.stack(expected), atol=1e-3, rtol=1e-2)

    def test_samples_are_random(self) -> None:
        raw = torch.zeros(20_000, 1)
        sample = TruncatedNormal(raw, raw).sample()
        # Standard deviation 1.1 between -1 and 1.
        x = self.GRID.double()
        density = torch.exp(-0.5 * (x / 1.1) ** 2)
        variance = torch.trapezoid(density * x**2, x) / torch.trapezoid(density, x)
        assert sample.std().item() == pytest.approx(variance.sqrt().item(), abs=0.01)


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

    def test_noise_in_the_logits_of_far_bins_is_no_reward(self) -> None:
        noise = torch.randn(100, 255, generator=torch.Generator().manual_seed(0))
        pred = TwoHot(1e-8 * noise, symexp_bins(255)).pred()
        assert pred.abs().max() < 1e-3

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


def test_unit_normal_is_half_the_squared_error() -> None:
    mean, target = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    ours = UnitNormal(mean, 1)
    normal = torch.distributions.Normal(mean, 1.0)
    constant = 4 * 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(ours.loss(target), -normal.log_prob(target).sum(-1) - constant)
    assert torch.equal(ours.pred(), mean)
    assert UnitNormal(torch.tensor([1.0]), 0).loss(torch.tensor([3.0])).tolist() == [2.0]


def test_squared_errors_can_be_indexed() -> None:
    values = UnitNormal(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 0)[:, :-1]
    assert isinstance(values, UnitNormal)
    assert values.pred().tolist() == [[1.0], [3.0]]
    assert values.loss(torch.zeros(2, 1)).tolist() == [[0.5], [4.5]]


def test_centered_images_are_compared_around_zero_and_shown_in_0_to_1() -> None:
    mean = torch.tensor([-0.7, -0.5, 0.25, 0.6]).view(1, 2, 2, 1)
    ours = CenteredImage(mean, 3)
    assert ours.pred().flatten().tolist() == [0.0, 0.0, 0.75, 1.0]
    target = torch.tensor([0.0, 0.5, 0.75, 1.0]).view(1, 2, 2, 1)
    # Errors -0.2, -0.5, 0 and 0.1: the loss sees what the picture clips.
    torch.testing.assert_close(ours.loss(target), torch.tensor([0.5 * (0.04 + 0.25 + 0.01)]))


def test_symlog_error_is_in_symlog_space_and_pred_in_units() -> None:
    output = SymlogMSE(torch.tensor([[0.0, 3.0]]), 1)
    target = torch.tensor([[math.e - 1, 0.0]])
    torch.testing.assert_close(output.loss(target), torch.tensor([1.0 + 9.0]))
    torch.testing.assert_close(output.pred(), torch.tensor([[0.0, math.exp(3) - 1]]))


def test_policies_of_steps_equal_one_policy_over_all_steps() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 3, 4)
    whole = Categorical(logits, (4,))
    steps = PolicySteps([Categorical(x, (4,)) for x in logits.unbind(1)])
    action = steps.sample()
    assert action.shape == (5, 3, 4)
    torch.testing.assert_close(steps.log_prob(action), whole.log_prob(action))
    torch.testing.assert_close(steps.entropy(), whole.entropy())
    torch.testing.assert_close(steps.pred(), whole.pred())
