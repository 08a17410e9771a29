"""What dreams of a small ball are worth: the measures, copying, and a suite's report."""

import json
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

from benchmarks.cell import fit_command, run_cell, write_json
from benchmarks.report import write_report
from benchmarks.suite import load_suite, parse_suite
from benchmarks.video import (
    CopyLastFrame,
    Decoded,
    PixelDecoder,
    draw_strips,
    dream,
    find_ball,
    fit_decoder,
    measure,
    record_clips,
    speed,
)
from datamodules.envs.catch import MOVES, PACE, PADDLE_COLOUR, PADDLE_WIDTH
from datamodules.errors import UserError
from datamodules.spec import ActionSpec, ArraySpec, Spec
from zoo.base import Imagined

TASK = "zoo/Catch-v0"
OPTIONS = {"clips": 6, "clip_length": 31, "context": 3, "horizon": 5, "env": {"fall": 1}}
SUITE = {
    "name": "dreams",
    "title": "Dreams",
    "seeds": 1,
    "seconds": 60,
    "score": "ball_found",
    "video": OPTIONS,
    "entries": [{"model": "copy-last-frame", "preset": "catch-video", "task": TASK}],
}


def images(side=32):
    return Spec({"image": ArraySpec((side, side, 3), "uint8")}, ActionSpec("discrete", (3,)))


class PerfectDreamer:
    """Knows the game: reads ball, drift and paddle off the frames and goes on by its rules."""

    def __init__(self, side=32):
        self.spec, self.side = images(side), side

    def observe(self, batch):
        small = batch["obs"]["image"][:, :, :: self.side // 32, :: self.side // 32].float() / 255
        ball = (find_ball(small)[0] - 0.5).round()
        drift = torch.cat([torch.zeros_like(ball[:, :1]), ball[:, 1:] - ball[:, :-1]], 1)
        colour = torch.tensor(PADDLE_COLOUR) / 255
        # in the lowest row the ball may hide a part of the paddle
        seen = (small[:, :, -1] - colour).abs().sum(-1) < 1e-3
        return {"ball": ball, "drift": drift, "paddle": seen.float().argmax(-1)}

    def imagine(self, state, actions, horizon):
        ball, drift, paddle = (state[key].clone() for key in ("ball", "drift", "paddle"))
        states = []
        for t in range(horizon):
            paddle = (paddle + PACE * torch.tensor(MOVES)[actions[:, t]]).clamp(
                0, 32 - PADDLE_WIDTH
            )
            ball = ball + drift
            out = (ball[:, 0] < 0) | (ball[:, 0] > 30)
            ball[:, 0] = torch.where(ball[:, 0] < 0, -ball[:, 0], ball[:, 0])
            ball[:, 0] = torch.where(ball[:, 0] > 30, 60 - ball[:, 0], ball[:, 0])
            drift = torch.where(out[:, None] & torch.tensor([True, False]), -drift, drift)
            states.append({"ball": ball, "paddle": paddle})
        reward = torch.zeros(actions.shape)
        together = {key: torch.stack([s[key] for s in states], 1) for key in states[0]}
        return Imagined(reward, reward + 1, together, actions)

    def decode(self, state):
        pixel = torch.arange(32)
        x, y = state["ball"][..., 0, None], state["ball"][..., 1, None]
        left = state["paddle"][..., None]
        columns, rows = (pixel >= x) & (pixel < x + 2), (pixel >= y) & (pixel < y + 2)
        ball = (rows[..., None] & columns[..., None, :])[..., None]
        paddle = (pixel >= left) & (pixel < left + PADDLE_WIDTH)
        below = (pixel >= 30)[:, None] & paddle[..., None, :]
        image = below[..., None] * (torch.tensor(PADDLE_COLOUR) / 255)
        image = torch.where(ball, 1.0, image)
        factor = self.side // 32
        return {"image": image.repeat_interleave(factor, 2).repeat_interleave(factor, 3)}


@pytest.fixture(scope="module")
def clips():
    return record_clips(TASK, OPTIONS, seed=0)


def test_the_truth_is_where_the_pictures_show_it(clips):
    middle, seen = find_ball(clips.batch["obs"]["image"].float() / 255)
    assert seen.all()
    assert torch.equal(middle, clips.place)
    assert clips.place[:, 0, 1].eq(0.5).all()  # whole episodes: the ball begins in the first rows
    assert clips.start.tolist() == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("side", [32, 64])
def test_a_perfect_dream(clips, side):
    found = measure(dream(PerfectDreamer(side), clips, 5), clips)
    assert found["ball_found"] == 1
    assert found["ball_lost"] == 0
    for k in range(6):
        assert found[f"ball_error@{k}"] == pytest.approx(0, abs=1e-4)
        assert found[f"psnr@{k}"] == pytest.approx(100, abs=1e-3)
        assert found[f"ssim@{k}"] == pytest.approx(1, abs=1e-4)


def test_a_copy_errs_by_what_the_ball_moved(clips):
    found = measure(dream(CopyLastFrame(), clips, 5), clips)
    row = torch.arange(len(clips.start))
    for k in range(6):
        moved = clips.place[row, clips.start + k] - clips.place[row, clips.start]
        assert found[f"ball_error@{k}"] == pytest.approx(float(moved.norm(dim=-1).mean()), abs=1e-4)
    assert found["psnr@0"] == pytest.approx(100)
    assert found["psnr@5"] < 40
    assert found["ball_error@5"] >= 5  # it falls a pixel a step
    assert found["ball_found"] < 0.5


def test_a_frame_without_a_ball_errs_by_the_side_of_the_image(clips):
    frames = torch.full((6, 6, 32, 32, 3), 0.4)
    found = measure(frames, clips)
    assert found["ball_error@1"] == 32
    assert (found["ball_lost"], found["ball_found"]) == (1, 0)


def test_the_ball_is_read_by_a_fixed_rule():
    frames = torch.zeros(3, 8, 8, 3)
    frames[0, 2:4, 5:7] = 0.8
    frames[0, 7] = torch.tensor(PADDLE_COLOUR) / 255
    frames[1, 2, 5] = 0.4
    frames[2, 1, 1] = frames[2, 1, 5] = 1
    middle, seen = find_ball(frames)
    assert seen.tolist() == [True, False, True]
    assert middle.tolist() == [[5.5, 2.5], [0, 0], [3, 1]]


def test_clips_need_room(clips):
    with pytest.raises(UserError, match="clip_length must be at least 34"):
        record_clips(TASK, {**OPTIONS, "horizon": 31}, seed=0)
    odd = PerfectDreamer()
    odd.spec = images(48)
    with pytest.raises(UserError, match="side 48, no multiple of the clips' 32"):
        dream(odd, clips, 5)


def test_speed_is_in_frames_per_second(clips):
    assert speed(CopyLastFrame(), clips, 5) > 10


class Rotated:
    """Latents that are the pixels, rotated."""

    spec = images(8)
    basis = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))[0]

    def encode(self, obs):
        return obs["image"][..., 0].flatten(2).float() / 255 @ self.basis * 8


def test_a_decoder_learns_to_draw_latents():
    torch.manual_seed(0)
    frames = F.one_hot(torch.arange(64), 64).mul(255).byte().view(64, 8, 8, 1)
    frames = frames.expand(-1, -1, -1, 3)
    model = Rotated()
    decoder = fit_decoder(model, frames, updates=400)
    model.observe = model.imagine = None  # nothing is dreamed here
    latents = model.encode({"image": frames[:, None]})
    drawn = Decoded(model, decoder).decode({"latents": latents[:, :, None]})["image"]
    assert drawn.shape == (64, 1, 8, 8, 3)
    middle, seen = find_ball(drawn[:, 0])
    assert seen.all()
    assert torch.equal(middle, find_ball(frames.float() / 255)[0])
    with pytest.raises(UserError, match="side 33 cannot be decoded"):
        PixelDecoder(2, 33)


def test_the_picture_has_truth_above_dream(clips, tmp_path):
    from PIL import Image

    frames = dream(CopyLastFrame(), clips, 5)
    path = tmp_path / "videos" / "strip-0.gif"
    draw_strips(frames, clips, path)
    assert Image.open(path).size == (6 * 33 * 2, 4 * 2 * 33 * 2)


def test_a_suite_of_dreams_and_its_report(tmp_path):
    suite = parse_suite(SUITE)
    for cell in suite.cells():
        run_cell(out_dir=tmp_path, **asdict(cell))
    result = json.loads((suite.cells()[0].result(tmp_path)).read_text())
    assert result["rows"][-1]["metric"] == "ball_found"
    values = {row["metric"]: row["value"] for row in result["rows"]}
    assert values["params"] == 0
    assert values["ball_error@5"] > values["ball_error@1"] > 0
    manifest = {"suite": suite.to_dict(), "seeds": 1, "command": "zoo bench dreams"}
    write_json(tmp_path / "suite.json", manifest)
    write_report(tmp_path)
    assert (tmp_path / "figures" / "zoo-catch-v0-ball-error.svg").exists()
    page = (tmp_path / "report.html").read_text()
    assert "truth-above-dream-0" in page
    assert "ball found" in page


def test_seconds_are_the_budget_of_all_models():
    suite = load_suite("video")
    assert {cell.seconds for cell in suite.cells()} == {1800}
    command = fit_command(suite.cells(1)[0], "run")
    assert command[-2:] == ["--seconds", "1800"]
    entry = {"model": "diamond", "preset": "catch-video", "task": TASK, "env_steps": 5}
    with pytest.raises(UserError, match="entries cannot have env_steps"):
        parse_suite({**SUITE, "entries": [entry]})
