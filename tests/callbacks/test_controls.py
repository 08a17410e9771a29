"""Metrics and pictures of latent actions, by a model that knows all of `Sprites`."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from callback_standins import Knows, SpritesData, TinyData, TinyModel, rows, trainer
from PIL import Image

from callbacks.action_grid import ActionGrid, unroll
from callbacks.budget import Budget
from callbacks.controllability import Controllability, Steps, measure
from callbacks.controls import code_use, delta_t_psnr, mutual_information, psnr, purity, ssim
from callbacks.pictures import BORDER, MIN_HEIGHT, grid_frames
from datamodules.envs.sprites import MOVES
from datamodules.errors import UserError


def test_psnr_and_ssim():
    black = torch.zeros(2, 3, 16, 16, 3)
    assert psnr(black, black).tolist() == [[100.0] * 3] * 2
    assert psnr(black, black + 0.1)[0, 0].item() == pytest.approx(20)
    images = torch.rand(2, 3, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    assert ssim(images, images).item() == pytest.approx(1)
    assert ssim(images, 1 - images).item() < 0


def test_purity_and_mutual_information_of_tables():
    latent = torch.tensor([[0, 0, 1], [1, 2, 2]])
    assert purity(latent, latent) == purity(2 - latent, latent) == 1
    assert purity(torch.zeros_like(latent), latent) == pytest.approx(1 / 3)
    assert mutual_information(2 - latent, latent) == pytest.approx(math.log2(3))
    assert mutual_information(torch.zeros_like(latent), latent) == pytest.approx(0, abs=1e-9)
    mixed = torch.tensor([[0, 1, 1], [1, 0, 0]])  # each latent action is two in equal shares
    pairs = torch.tensor([[0, 0, 1], [1, 2, 2]])
    counts = torch.tensor([1, 1, 2, 2]) / 6  # of the pairs
    expected = 1 + math.log2(3) - float((counts * -counts.log2()).sum())
    assert mutual_information(mixed, pairs) == pytest.approx(expected)


def test_use_of_codes():
    assert code_use(torch.tensor([[0, 1], [2, 3]]), 8) == pytest.approx((0.5, 4.0))
    assert code_use(torch.zeros(5, dtype=torch.int64), 2) == pytest.approx((0.5, 1.0))


def test_moves_into_a_wall_are_no_fault_of_the_model():
    callback = Controllability(clips=40, context=3, horizon=4)
    steps = callback._gather(SpritesData(), Knows())
    assert steps.video.shape == (40, 7, 32, 32, 3)
    assert steps.action.shape == steps.effective.shape == (40, 6)
    torch.manual_seed(0)
    found = measure(Knows(), steps, 4)
    assert found["effective_action_purity"] == 1
    assert 0.8 < found["latent_action_purity"] < 1
    assert found["latent_action_purity"] == purity(steps.effective, steps.action)
    assert 1.5 < found["mutual_information"] < math.log2(5)
    assert found["tokenizer_psnr"] == pytest.approx(100)
    assert found["tokenizer_ssim"] == pytest.approx(1)
    assert found["delta_t_psnr"] > 50
    assert 4 < found["latent_action_perplexity"] < 5
    assert callback._gather(SpritesData(), Knows()).video.equal(steps.video)


def test_the_environment_has_arguments_of_its_own():
    few, many = (
        Controllability(env="zoo/Sprites-v0", env_kwargs={"distractors": n}, clips=4)
        ._gather(SpritesData(), Knows())
        .video.any(-1)
        .float()
        .mean()
        for n in (0, 6)
    )
    assert few == pytest.approx(25 / 1024)
    assert many > 3 * few
    with pytest.raises(UserError, match=r"env_kwargs=.* needs an env"):
        Controllability(env_kwargs={"distractors": 6})


def test_delta_t_psnr_is_of_the_frame_t_steps_on():
    model = Knows()
    start = torch.tensor([[14.0, 14.0]])
    truth = model.imagine({"place": start}, torch.tensor([[3, 3, 4]]), 3).state["place"]
    video = (model.decode({"place": torch.cat([start[:, None], truth], 1)})["image"] * 255).byte()
    taken = model.infer_actions(video)
    assert taken.tolist() == [[3, 3, 4]]
    delta = partial(delta_t_psnr, model, {"place": start}, video[:, -1] / 255, taken)
    assert delta(taken).item() == 0
    assert delta(taken.flip(1)).item() == 0  # leads to the same place
    wrong = delta(torch.tensor([[2, 2, 2]]))
    error = 10 * math.log10(2 * 25 / 32**2)
    assert wrong.item() == pytest.approx(100 + error, abs=0.01)


def test_recorded_steps_tell_no_effects():
    class HeldOut(TinyData):
        val_episodes = (0, 1)

        def validation_episodes(self, count, max_steps):
            video = torch.zeros(3, 7, 32, 32, 3, dtype=torch.uint8)
            batch = {"obs": {"image": video}, "action": torch.zeros(3, 7, dtype=torch.int64)}
            return batch, torch.tensor([7, 4, 7]), torch.zeros(3, dtype=torch.bool)

    data = HeldOut()
    del data.make_env
    steps = Controllability()._gather(data, Knows())
    assert isinstance(steps, Steps)
    assert steps.video.shape[:2] == (2, 7)
    assert steps.action.shape == (2, 6)
    assert steps.effective is None
    data.validation_episodes = lambda *_: (None, torch.tensor([4]), None)
    with pytest.raises(UserError, match="none of the held-out episodes has 7 frames"):
        Controllability()._gather(data, Knows())


def test_metrics_and_grids_are_written(tmp_path):
    class Clips(TinyData):
        """Batches in which the sprite is in the middle."""

        def next_batch(self):
            batch = super().next_batch()
            middle = torch.full((3, 4, 2), 15.5)
            image = (Knows().decode({"place": middle})["image"] * 255).byte()
            return {"obs": {"image": image}, "noise": batch}

    class Learns(Knows):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["noise"], batch_idx)

    data = Clips()
    data.make_env = SpritesData().make_env
    callbacks = (Controllability(every_env_steps=4, clips=8), ActionGrid(4, horizon=3))
    trainer(tmp_path, *callbacks, Budget(env_steps=8)).fit(Learns(), data)
    names = {row[2] for row in rows(tmp_path, but=("train/", "time/"))}
    assert names >= {"eval/latent_action_purity", "eval/delta_t_psnr", "eval/mutual_information"}
    files = sorted(p.name for p in (tmp_path / "videos").iterdir())
    assert files == ["actions-4.gif", "actions-8.gif"]
    gif = Image.open(tmp_path / "videos" / files[0])
    side = MIN_HEIGHT + 2 * BORDER
    assert (gif.n_frames, gif.size) == (4, (5 * side, 2 * side))


def test_a_grid_has_a_row_for_each_start_and_a_column_for_each_action():
    model = Knows()
    places = torch.tensor([[10.0, 10.0], [20.0, 16.0]])
    video = (model.decode({"place": places[:, None]})["image"] * 255).byte()
    frames = unroll(model, video, 2)
    assert frames.shape == (2, 5, 3, 32, 32, 3)
    seen = model.observe({"obs": {"image": frames.flatten(0, 1)}})["place"].view(2, 5, 3, 2)
    moved = (seen - places[:, None, None]).round()
    assert (moved[:, :, 0] == 0).all()
    steps = torch.from_numpy(3 * MOVES[(np.arange(5) - 1) % 5]).float()
    assert torch.equal(moved[:, :, 1], steps.expand(2, -1, -1))
    assert torch.equal(moved[:, :, 2], 2 * steps.expand(2, -1, -1))
    picture = np.zeros((2, 3, 4, 96, 96, 1))
    picture[1, 2, 3] = 1.0
    drawn = grid_frames(picture)
    assert drawn.shape == (4, 200, 300, 3)
    assert drawn[3, 150, 250].tolist() == [255] * 3
    drawn[3, 100:, 200:] = 0
    assert not drawn.any()


def test_models_without_latent_actions_are_refused(tmp_path):
    for callback in (Controllability(), ActionGrid()):
        with pytest.raises(UserError, match="needs a model of LatentActions, which TinyModel"):
            trainer(tmp_path, callback, Budget(updates=1)).fit(TinyModel(), TinyData())
