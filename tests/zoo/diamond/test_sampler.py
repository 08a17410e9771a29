"""The noise schedule, and the solver on a mixture of normals whose score is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from datamodules.envs.catch import DRIFT, Catch
from datamodules.errors import UserError
from zoo.diamond.denoiser import preconditioners, quantise, to_float
from zoo.diamond.sampler import SAMPLERS, Sampler, karras_sigmas

# Two normals on the line.
MEANS, WEIGHTS, STD = torch.tensor([-0.6, 0.5]), torch.tensor([0.3, 0.7]), 0.1
MEAN = float((WEIGHTS * MEANS).sum())
VARIANCE = float((WEIGHTS * (MEANS - MEAN).square()).sum()) + STD**2


def posterior_mean(x: Tensor, sigma: Tensor) -> Tensor:
    """E[clean | x] of the mixture under noise sigma: x + sigma^2 * score."""
    total = STD**2 + sigma[:, None] ** 2
    logits = WEIGHTS.log() - (x[:, None] - MEANS).square() / (2 * total)
    shrunk = MEANS + STD**2 / total * (x[:, None] - MEANS)
    return (logits.softmax(1) * shrunk).sum(1)


def moments_error(steps: int, order: int = 1) -> float:
    """Largest error of mean, standard deviation and share of the upper normal."""
    torch.manual_seed(0)
    sampler = Sampler(steps, sigma_max=20.0, order=order, start_std=20.0)  # type: ignore[arg-type]
    x = sampler(posterior_mean, sampler.start_noise((20_000,)))
    found = torch.stack([x.mean(), x.std(), (x > 0).float().mean()])
    return float((found - torch.tensor([MEAN, VARIANCE**0.5, 0.7])).abs().max())


def test_three_steps_of_the_paper() -> None:
    sigmas = karras_sigmas(3)
    assert [round(sigma, 3) for sigma in sigmas.tolist()] == [5.0, 0.283, 0.002, 0.0]
    assert karras_sigmas(1).tolist() == pytest.approx([5.0, 0.0])
    assert sigmas[0] == pytest.approx(5.0)
    # EDM's own: 80 to 0.002 with rho 7.
    edm = karras_sigmas(18, sigma_max=80.0)
    assert edm[:2].tolist() == pytest.approx([80.0, 57.586], rel=1e-4)
    assert (edm.diff() < 0).all()


def catch_frames() -> Tensor:
    """(32, 3, 1024): a new ball at each of its 31 places, and none."""
    env = Catch()
    env.reset(seed=0)
    images = []
    for x in (*range(31), None):
        env.ball = np.array([0, env.size] if x is None else [x, 0])
        images.append(torch.from_numpy(env.render()))
    return to_float(torch.stack(images)).flatten(2)


def exact(frames: Tensor, chances: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The best denoiser where each of the frames has its chance.

    The noise is that of training, of pixels (sigma) and of whole channels (0.3).
    """

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        level, pixels = float(sigma[0]), frames.shape[2]
        far = torch.cdist(x.flatten(1), frames.flatten(1)).square()
        common = (x.sum(2)[:, None] - frames.sum(2)).square().sum(2)
        far = (far - 0.09 * common / (level**2 + pixels * 0.09)) / level**2
        mean = (chances.log() - far / 2).softmax(1) @ frames.flatten(1)
        return quantise(mean.view_as(x))

    return denoise


def balls_with(chance: float) -> Tensor:
    """(32,): with this chance there is a new ball, all its places alike."""
    return torch.cat([torch.full((31,), chance / 31), torch.tensor([1 - chance])])


def new_balls(chance: float, sampler: Sampler, count: int = 400) -> Tensor:
    """Share of frames in which a new ball is seen at each column of its first row, (32,)."""
    torch.manual_seed(0)
    frames = catch_frames()
    denoise = exact(frames, balls_with(chance))
    found = sampler(denoise, sampler.start_noise((count, *frames.shape[1:])))
    return (found[:, 0, :32] > 0).float().mean(0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_surely_appears_does_so_everywhere(name: str) -> None:
    """As a new ball of Catch, which follows from the past; only its place is random."""
    shares = new_balls(1.0, SAMPLERS[name], 2000)
    assert float(shares.sum()) == pytest.approx(2, abs=0.002)  # two columns
    inner = shares[1:-1] * 31 / 2
    assert inner.min() > 0.7
    assert inner.max() < 1.3


@pytest.mark.parametrize(("chance", "share"), [(0.1, 0.07), (0.5, 0.38), (0.9, 0.81)])
def test_what_may_appear_does_so_only_with_the_faithful_sampler(
    chance: float, share: float
) -> None:
    assert float(new_balls(chance, SAMPLERS["published"]).sum()) == 0
    found = new_balls(chance, SAMPLERS["faithful"]).sum() / 2
    assert float(found) == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize(
    ("sampler", "straight"),
    [(SAMPLERS["published"], 0.95), (Sampler(start_std=5.0), 0.38), (SAMPLERS["faithful"], 0.28)],
)
def test_a_fresh_ball_falls_straight_in_published_dreams(sampler: Sampler, straight: float) -> None:
    """One frame does not tell its drift, of which there are three alike."""
    env = Catch()
    env.reset(seed=0)
    env.paddle[0] = 0
    images = []
    for drift in (-1, 0, 1):
        env.ball = np.array([16 + drift * DRIFT * env.scale, env.fall])
        images.append(torch.from_numpy(env.render()))
    frames = to_float(torch.stack(images)).flatten(2)
    torch.manual_seed(0)
    start = sampler.start_noise((600, *frames.shape[1:]))
    found = sampler(exact(frames, torch.full((3,), 1 / 3)), start)
    nearest = torch.cdist(found.flatten(1), frames.flatten(1)).argmin(1)
    assert float((nearest == 1).float().mean()) == pytest.approx(straight, abs=0.06)


def test_a_start_of_deviation_1_shows_the_network_what_it_never_saw() -> None:
    frames = catch_frames()
    denoise = exact(frames, balls_with(1.0))
    inputs: list[tuple[float, float]] = []

    def watch(x: Tensor, sigma: Tensor) -> Tensor:
        scaled = x * preconditioners(sigma, 0.5, 0.3).c_in[:, None, None]
        away = torch.cdist(x[:, :, :64].flatten(1), frames[:31, :, :64].flatten(1)).amin(1).mean()
        expected = float(sigma[0]) * (3 * 64) ** 0.5
        inputs.append((float(scaled.std()), float(away) / expected))
        return denoise(x, sigma)

    torch.manual_seed(0)
    for name, (deviation, distance) in {"published": (0.2, 1.65), "faithful": (1.0, 1.0)}.items():
        inputs.clear()
        sampler = SAMPLERS[name]
        sampler(watch, sampler.start_noise((100, *frames.shape[1:])))
        assert inputs[0][0] == pytest.approx(deviation, abs=0.03)
        second = inputs[1 if name == "published" else -2]
        assert second[1] == pytest.approx(distance, abs=0.15)


@pytest.mark.parametrize(("name", "calls"), [("published", 3), ("faithful", 9)])
def test_calls_of_the_denoiser(name: str, calls: int) -> None:
    levels: list[float] = []
    SAMPLERS[name](lambda x, sigma: levels.append(float(sigma[0])) or x, torch.zeros(1))  # type: ignore[func-returns-value]
    assert len(levels) == calls
    assert levels[0] == 5.0
    assert levels[-1] == pytest.approx(0.002 if name == "published" else 0.05)


def test_start_noise_is_not_scaled_by_the_first_level() -> None:
    torch.manual_seed(0)
    noise = Sampler().start_noise((64, 3, 32, 32))
    assert float(noise.std()) == pytest.approx(1.0, abs=0.01)
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.01)


def test_more_steps_recover_the_moments_and_then_no_longer_help() -> None:
    errors = {steps: moments_error(steps) for steps in (2, 4, 8, 32, 64)}
    assert errors[2] > errors[4] > errors[8] > errors[32]
    assert errors[2] > 0.1
    assert errors[32] < 0.03
    assert abs(errors[64] - errors[32]) < 0.02


@pytest.mark.parametrize(("order", "gain"), [(1, 2.0), (2, 4.0)])
def test_order_of_the_solver(order: Literal[1, 2], gain: float) -> None:
    """Of one normal x falls with (STD^2 + sigma^2)^(1/2); twice the steps are so much nearer."""

    def shrink(x: Tensor, sigma: Tensor) -> Tensor:
        return x * STD**2 / (STD**2 + sigma.square())

    def error(steps: int) -> float:
        start = torch.ones(1, dtype=torch.float64)
        found = Sampler(steps, sigma_min=0.01, order=order)(shrink, start)
        # From the last level to 0 there is a single step of Euler's, the same for all.
        end = shrink(((STD**2 + 1e-4) / (STD**2 + 25)) ** 0.5 * start, torch.tensor([0.01]))
        return float((found - end).abs())

    assert error(64) / error(128) == pytest.approx(gain, rel=0.1)


def test_one_step_of_euler_by_hand() -> None:
    calls: list[float] = []

    def halve(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(float(sigma[0]))
        return x / 2

    x = torch.tensor([2.0, -1.0])
    # x + (x - x / 2) / 5 * (0.002 - 5), halved at the last step.
    found = Sampler(2)(halve, x)
    torch.testing.assert_close(found, (x + x / 2 / 5 * (0.002 - 5)) / 2)
    assert calls == pytest.approx([5.0, 0.002])
    calls.clear()
    slopes = (x / 2 / 5, (x + x / 10 * (0.002 - 5)) / 2 / 0.002)
    found = Sampler(2, order=2)(halve, x)
    torch.testing.assert_close(found, (x + sum(slopes) / 2 * (0.002 - 5)) / 2)
    assert calls == pytest.approx([5.0, 0.002, 0.002])


def test_the_result_is_what_the_denoiser_said_last() -> None:
    levels = torch.arange(256) / 127.5 - 1
    found = Sampler(3)(lambda x, sigma: levels, torch.randn(256))
    assert torch.equal(found, levels)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"order": 3}, {"sigma_max": 1e-3}])
def test_refuses(bad: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        Sampler(**bad)  # type: ignore[arg-type]
