"""Preconditioning, noise, rounding and the loss of the denoiser."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.diamond.denoiser import (
    Denoiser,
    add_noise,
    draw_sigma,
    preconditioners,
    quantise,
    to_float,
    to_uint8,
)
from zoo.diamond.sampler import Sampler


class Recorder(nn.Module):
    """A network that says zero and keeps what it saw; as embedding it is given what there is."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self.embedded: tuple[Any, ...] = ()

    def embed_past(self, *args: Any) -> Any:
        self.embedded = args
        return args

    def forward(self, *args: Any) -> Tensor:
        self.calls.append(args)
        return torch.zeros_like(args[0])


@pytest.fixture
def network() -> Recorder:
    return Recorder()


@pytest.fixture
def denoiser(network: Recorder) -> Denoiser:
    return Denoiser(network, past=4)  # type: ignore[arg-type]


def test_preconditioners_by_hand() -> None:
    found = preconditioners(torch.tensor([0.4]), sigma_data=0.5, sigma_offset=0.3)
    # s^2 = 0.16 + 0.09 = 0.25, as large as the data's: half and half.
    assert found.c_in.item() == pytest.approx(2**0.5)
    assert found.c_skip.item() == pytest.approx(0.5)
    assert found.c_out.item() == pytest.approx(0.5 * 0.5 * 2**0.5)
    assert found.c_noise.item() == pytest.approx(math.log(0.5) / 4)


def test_the_input_and_the_target_of_the_network_have_variance_one() -> None:
    torch.manual_seed(0)
    frame = 0.5 * torch.randn(20_000, 3, 1, 1)
    for level in (0.01, 0.3, 5.0):
        sigma = torch.full((len(frame),), level)
        noisy = add_noise(frame, sigma, 0.3)
        p = preconditioners(sigma[:1], 0.5, 0.3)
        assert float((p.c_in * noisy.flatten(1)).std()) == pytest.approx(1, abs=0.02)
        target = (frame - p.c_skip * noisy) / p.c_out
        assert float(target.std()) == pytest.approx(1, abs=0.02)


def test_noise_of_pixels_and_of_whole_channels() -> None:
    torch.manual_seed(0)
    noise = add_noise(torch.zeros(4000, 3, 8, 8), torch.full((4000,), 0.5), 0.3)
    assert float(noise.std()) == pytest.approx((0.25 + 0.09) ** 0.5, abs=0.01)
    means = noise.mean((2, 3))  # the channel's, and a 64th of the pixels' variance
    assert float(means.std()) == pytest.approx((0.09 + 0.25 / 64) ** 0.5, abs=0.01)
    assert abs(float((means[:, 0] * means[:, 1]).mean())) < 0.01
    plain = add_noise(torch.zeros(4000, 3, 8, 8), torch.full((4000,), 0.5), 0.0)
    assert float(plain.mean((2, 3)).std()) == pytest.approx(0.5 / 8, abs=0.01)


def test_noise_levels_in_training() -> None:
    torch.manual_seed(0)
    sigma = draw_sigma(200_000, loc=-0.4, scale=1.2, low=2e-3, high=20.0)
    logs = sigma.log()
    assert float(logs.median()) == pytest.approx(-0.4, abs=0.02)
    assert float(logs.std()) == pytest.approx(1.2, abs=0.02)
    assert sigma.min() >= 2e-3
    assert sigma.max() == 20.0  # about one in 400 is clipped
    assert float((sigma == 20.0).float().mean()) == pytest.approx(0.0023, abs=0.001)


def test_outputs_are_clipped_and_rounded_down() -> None:
    step = 1 / 127.5
    x = torch.tensor([-3.0, -1.0, -1 + 0.9 * step, -1 + 1.1 * step, 0.0, 0.9999, 1.0, 2.0])
    levels = torch.tensor([0.0, 0, 0, 1, 127, 254, 255, 255])
    torch.testing.assert_close(quantise(x), levels * step - 1)


def test_images_and_frames_are_exact_inverses() -> None:
    image = torch.arange(256, dtype=torch.uint8).view(1, 8, 32, 1).repeat(1, 1, 1, 3)
    frame = to_float(image)
    assert frame.shape == (1, 3, 8, 32)
    assert frame.min() == -1
    assert frame.max() == 1
    assert torch.equal(to_uint8(frame), image)
    unknown = to_float(image, torch.tensor([False]))
    assert (unknown == 0).all()


def test_a_network_that_says_zero_gives_the_skip(denoiser: Denoiser, network: Recorder) -> None:
    noisy, past = torch.rand(2, 3, 4, 4) - 0.5, torch.rand(2, 4, 3, 4, 4)
    sigma = torch.tensor([0.4, 2.0])
    found = denoiser(noisy, sigma, denoiser.condition(past, torch.zeros(2, 4, 3)))
    p = preconditioners(sigma, 0.5, 0.3)
    torch.testing.assert_close(found, quantise(p.c_skip[:, None, None, None] * noisy))
    scaled, c_noise, history, (_, past_noise) = network.calls[0]
    torch.testing.assert_close(scaled, p.c_in[:, None, None, None] * noisy)
    torch.testing.assert_close(c_noise, p.c_noise)
    torch.testing.assert_close(history, past.flatten(1, 2) / 0.5)
    assert past_noise is None


def test_the_second_frame_is_predicted_from_the_first_prediction(
    denoiser: Denoiser, network: Recorder
) -> None:
    torch.manual_seed(0)
    frames = to_float(torch.randint(256, (2, 6, 4, 4, 3)).to(torch.uint8))
    action = torch.eye(3)[torch.randint(3, (2, 6))]
    first = torch.zeros(2, 6, dtype=torch.bool)
    first[1, 4] = True
    denoiser.loss(frames, action, first, targets=2)
    (noisy, c_noise, past, (before, _)), (_, _, later, (actions, _)) = network.calls
    torch.testing.assert_close(before[0], action[0, :4])
    torch.testing.assert_close(past[0] * 0.5, frames[0, :4].flatten(0, 1))
    torch.testing.assert_close(actions[0], action[0, 1:5])
    torch.testing.assert_close(later[0, :9] * 0.5, frames[0, 1:4].flatten(0, 1))
    # F said zero: the prediction is c_skip times the noisy frame, and no longer the real one.
    p = preconditioners((c_noise * 8).exp().sub(0.09).clamp(min=0).sqrt(), 0.5, 0.3)
    predicted = quantise((p.c_skip / p.c_in)[:, None, None, None] * noisy)
    torch.testing.assert_close(later[0, 9:] * 0.5, predicted[0], atol=0.01, rtol=0)
    # In the other row an episode begins at that frame: nothing before it counts, and it is real.
    assert (later[1, :9] == 0).all()
    assert (actions[1, :3] == 0).all()
    torch.testing.assert_close(later[1, 9:] * 0.5, frames[1, 4])


def test_first_frames_are_no_targets(denoiser: Denoiser) -> None:
    """A network that says zero has the loss 1 on data of the deviation that it expects."""
    torch.manual_seed(0)
    frames = 0.5 * torch.randn(256, 6, 3, 2, 2)
    action, first = torch.zeros(256, 6, 1), torch.zeros(256, 6, dtype=torch.bool)
    first[:, 5] = True
    frames[:, 5] = 1e6  # would show
    # Half of the two losses: the second has no target left.
    assert float(denoiser.loss(frames, action, first, 2)) == pytest.approx(0.5, abs=0.05)
    assert float(denoiser.loss(frames[:, :5], action, first, 1)) == pytest.approx(1.0, abs=0.1)


def test_short_histories_are_filled_with_zeros(denoiser: Denoiser, network: Recorder) -> None:
    frames = torch.ones(2, 3, 3, 4, 4)
    denoiser.loss(frames, torch.ones(2, 3, 2), torch.zeros(2, 3, dtype=torch.bool), 1)
    _, _, history, (actions, _) = network.calls[0]
    assert history.shape == (2, 12, 4, 4)
    assert (history[:, :6] == 0).all()
    assert (history[:, 6:] == 2).all()
    assert actions[:, :, 0].tolist() == [[0, 0, 1, 1]] * 2


def test_next_frames_are_quantised(denoiser: Denoiser, network: Recorder) -> None:
    torch.manual_seed(0)
    frame = denoiser.next_frame(torch.zeros(2, 4, 3, 4, 4), torch.zeros(2, 4, 1), Sampler(3))
    assert frame.shape == (2, 3, 4, 4)
    assert torch.equal(to_float(to_uint8(frame)), frame)
    assert len(network.calls) == 3
    assert float(network.calls[0][0].std()) == pytest.approx(1 / (25.34**0.5), rel=0.3)
    # The past is the same for all levels, and scaled and embedded once.
    (_, _, past, embedding), *others = network.calls
    assert all(other[2] is past and other[3] is embedding for other in others)


def test_the_last_prediction_is_not_needed(denoiser: Denoiser) -> None:
    calls = []
    combine = denoiser.combine
    denoiser.combine = lambda *args: calls.append(args) or combine(*args)  # type: ignore[func-returns-value, method-assign]
    first = torch.zeros(2, 6, dtype=torch.bool)
    for targets in (1, 2, 3):
        calls.clear()
        denoiser.loss(torch.zeros(2, 6, 3, 4, 4), torch.zeros(2, 6, 1), first, targets)
        assert len(calls) == targets - 1


def test_noised_histories(network: Recorder) -> None:
    """Sampled with little noise of pixels alone, trained with any level, and that of channels."""
    torch.manual_seed(0)
    denoiser = Denoiser(network, past=4, past_sigma=0.005)  # type: ignore[arg-type]
    denoiser.next_frame(torch.zeros(2, 4, 3, 16, 16), torch.zeros(2, 4, 1), Sampler(1))
    _, _, history, (_, past_noise) = network.calls[0]
    assert past_noise.tolist() == pytest.approx([math.log(0.005) / 4] * 2)
    assert float(history.std()) * 0.5 == pytest.approx(0.005, rel=0.05)
    network.calls.clear()
    frames, first = torch.zeros(64, 5, 3, 16, 16), torch.zeros(64, 5, dtype=torch.bool)
    denoiser.loss(frames, torch.zeros(64, 5, 1), first, 1)
    _, _, history, (_, past_noise) = network.calls[0]
    sigma = (past_noise * 4).exp()
    assert len(set(sigma.tolist())) == 64
    history = history * 0.5
    torch.testing.assert_close(history.std((2, 3)).mean(1), sigma, rtol=0.1, atol=0)
    channels = history[sigma < 0.5].mean((2, 3))  # of which pixels' noise has averaged out
    assert float(channels.std()) == pytest.approx(0.3, rel=0.1)
