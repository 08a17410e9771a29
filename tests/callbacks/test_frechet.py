"""The Frechet video distance, by extractors that are a few lines."""

from __future__ import annotations

import pytest
import torch
from callback_standins import (
    Knows,
    PerfectDreamer,
    SpritesData,
    TinyData,
    TinyModel,
    rows,
    trainer,
    walk_spec,
)
from torch import Tensor, nn

from callbacks.budget import Budget
from callbacks.frechet import FrechetVideoDistance, dream, extract, frechet_distance
from datamodules.errors import UserError


class Means(nn.Module):
    """Means of the left half of each channel in each frame, of videos as I3D takes them."""

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        assert x.shape[1] == 3
        means = x[..., : x.shape[4] // 2].mean((3, 4)).flatten(1)
        return means if return_features else means[:, :, None]


class Roots(nn.Module):
    """Not of negative pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sqrt().mean((2, 3, 4))


class Blind(Knows):
    """Nothing moves in its dreams."""

    def imagine(self, state, actions, horizon):
        return super().imagine(state, torch.ones_like(actions), horizon)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "means.pt"
    torch.jit.script(Means()).save(str(path))
    return str(path)


def callback(path: str, **options) -> FrechetVideoDistance:
    settings = {"arguments": {"return_features": True}, "side": 32, "clips": 24, "horizon": 4}
    return FrechetVideoDistance(path, **{**settings, **options})


def measured(folder, model, data, metric: FrechetVideoDistance) -> float:
    metric.every_env_steps = 4
    trainer(folder, metric, Budget(env_steps=4)).fit(model, data)
    (found,) = [row for row in rows(folder) if row[2] == "eval/fvd"]
    return float(found[3])


def test_the_distance_of_normal_distributions_in_closed_form():
    """Of axes that are all but independent: (m - m')^2 + (s - s')^2 for each."""
    noise = torch.randn(50_000, 3, generator=torch.Generator().manual_seed(0))
    scale, shift = torch.tensor([2.0, 1.0, 0.5]), torch.tensor([1.0, 0.0, -3.0])
    expected = float(((scale - 1) ** 2 + shift**2).sum())
    assert frechet_distance(noise, noise * scale + shift) == pytest.approx(expected, rel=0.02)
    whole = noise @ torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]])
    assert frechet_distance(whole, 3 * whole) == pytest.approx(
        float(4 * whole.var(0).sum() + 4 * whole.mean(0).square().sum()), rel=1e-4
    )


def test_no_distance_of_equal_sets_and_more_the_farther():
    for count, width in ((40, 5), (4, 10)):  # also of fewer clips than features
        real = torch.randn(count, width, generator=torch.Generator().manual_seed(1))
        assert frechet_distance(real, real) == pytest.approx(0, abs=1e-5)
        assert frechet_distance(real + 1e4, real + 1e4) == pytest.approx(0, abs=1e-5)
        shifted = [frechet_distance(real, real + by) for by in (0.1, 1.0, 10.0)]
        assert shifted == pytest.approx([width * by**2 for by in (0.1, 1.0, 10.0)], rel=1e-3)


def test_a_perfect_dream_is_not_far_from_reality(tmp_path, weights):
    perfect = measured(tmp_path / "a", Knows(), SpritesData(), callback(weights))
    still = measured(tmp_path / "b", Blind(), SpritesData(), callback(weights))
    assert perfect == pytest.approx(0, abs=1e-6)
    assert still > 1e-4


def test_models_of_real_actions_dream_by_the_recorded_ones(tmp_path, weights):
    model, data = PerfectDreamer(walk_spec(image=True)), TinyData(image=True)
    metric = callback(weights, side=16, clips=4)
    assert measured(tmp_path, model, data, metric) == pytest.approx(0, abs=1e-6)
    batch = {
        "obs": {"image": 3 * torch.arange(6, dtype=torch.uint8).view(1, 6, 1, 1, 1)},
        "action": torch.tensor([[1, 1, 1, 0, 1, 0]]),
    }
    frames = dream(model, batch, 2)[0, :, 0, 0, 0]
    assert (frames * 255 / 3).round().tolist() == [2, 3, 2, 3]


def test_features_are_of_resized_video_between_minus_one_and_one():
    video = torch.zeros(2, 4, 4, 6, 1)
    video[0] = 0.25
    video[1, 2] = 1.0
    found = extract(Means(), video, 8, {"return_features": True}, "means.pt").view(2, 3, 4)
    assert found.dtype == torch.float64
    assert found[0].unique().tolist() == [-0.5]
    assert found[1].tolist() == [[-1, -1, 1, -1]] * 3


def test_mistaken_files_are_named(tmp_path, weights):
    data, model = SpritesData(), Knows()

    def fit(metric):
        trainer(tmp_path, metric, Budget(updates=1)).fit(model, data)

    missing, cut, other = (str(tmp_path / f"{name}.pt") for name in ("missing", "cut", "other"))
    with pytest.raises(UserError, match=r"no file '.*missing\.pt'"):
        fit(callback(missing))
    with open(weights, "rb") as whole, open(cut, "wb") as part:
        part.write(whole.read()[:-100])
    torch.save({"weights": torch.zeros(3)}, other)
    text = tmp_path / "text.pt"
    text.write_text("no weights")
    for path in (cut, other, str(text)):
        with pytest.raises(UserError, match="is no TorchScript file, or is cut off"):
            fit(callback(path))
    with pytest.raises(UserError, match=r"makes \(1, 12, 1\) of videos .* must be features"):
        fit(callback(weights, arguments={}))
    with pytest.raises(UserError, match=r"does not take videos .* \{'rescale': True\} \("):
        fit(callback(weights, arguments={"rescale": True}))
    torch.jit.script(Roots()).save(other)
    with pytest.raises(UserError, match="NaN or infinite: name another file"):
        fit(callback(other, arguments={}))


def test_too_few_clips_are_refused(tmp_path, weights):
    class HeldOut(TinyData):
        val_episodes = (0, 1, 2)

        def validation_episodes(self, count, max_steps):
            video = torch.zeros(3, 7, 32, 32, 3, dtype=torch.uint8)
            return {"obs": {"image": video}}, torch.tensor([7, 4, 7]), torch.zeros(3).bool()

    data, metric = HeldOut(), callback(weights, clips=3)
    del data.make_env
    metric.setup(None, Knows(), "fit")
    assert metric.lacks(data) == ""
    with pytest.raises(UserError, match=r"there are 2 clips of 7 frames .* clips is 3"):
        metric.measure(type("Trainer", (), {"datamodule": data}), Knows(), None)
    with pytest.raises(UserError, match=r"there are 3 clips of 7 frames .* clips is 4"):
        trainer(tmp_path, callback(weights, clips=4), Budget(updates=1)).fit(Knows(), data)
    with pytest.raises(UserError, match="clips is 1, must be at least 2"):
        callback(weights, clips=1)


def test_models_without_dreams_are_refused(weights):
    with pytest.raises(UserError, match="needs a model of Imaginer, which TinyModel"):
        callback(weights).setup(None, TinyModel(), "fit")
    with pytest.raises(UserError, match="needs dreams of one image"):
        callback(weights).setup(None, PerfectDreamer(), "fit")
