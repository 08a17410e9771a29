import csv

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from callback_standins import EPISODE, PerfectDreamer, TinyData, TinyModel, rows, trainer, walk_spec
from PIL import Image

from callbacks.budget import Budget
from callbacks.episodes import Recording, record
from callbacks.logger import RunLogger
from callbacks.model_error import LinearModel, ModelError, error_curves, summary
from callbacks.pictures import PANEL_SIZE, Panel, line_panels
from datamodules.env_datamodule import EnvDataModule
from datamodules.errors import UserError
from zoo.base import Imagined
from zoo.dreamer_v3.module import DreamerV3

VARIANCE = ((EPISODE + 1) ** 2 - 1) / 12  # of 0, ..., EPISODE


class RandomWalker(PerfectDreamer):
    """Knows `Walk` and goes left or right at random."""

    def act(self, obs, state, *, explore):
        return torch.randint(2, (len(state["steps"]),)), state


class Standstill(PerfectDreamer):
    """Dreams that nothing ever changes."""

    def imagine(self, state, actions, horizon):
        x = state["x"][:, None].expand(-1, horizon, -1)
        return Imagined(x[..., 0], torch.ones(x.shape[:2]), {"x": x}, actions)


class Noisy(PerfectDreamer):
    """Believes in a latent without memory and dreams its mean, or another sample."""

    def __init__(self, sampled):
        super().__init__()
        self.sampled = sampled

    def observe(self, batch):
        shape = batch["reward"].shape
        noise = torch.randn(*shape, 4, 8, generator=torch.Generator().manual_seed(0))
        state = {"noise": 3 * noise + 5, "index": torch.zeros(shape, dtype=torch.int64)}
        return super().observe(batch) | state

    def imagine(self, state, actions, horizon):
        dream = super().imagine(state, actions, horizon)
        noise = 3 * self.sampled * torch.randn(len(state["x"]), horizon, 4, 8) + 5
        index = torch.zeros(noise.shape[:2], dtype=torch.int64)
        return dream._replace(state=dream.state | {"noise": noise, "index": index})


def recorded(model, image=False):
    torch.manual_seed(0)
    options = {"episodes": 4, "max_steps": 200, "seed": np.random.SeedSequence(0)}
    return record(model, TinyData(image=image).make_env, explore=True, **options)


def curves_of(model, image=False, starts=64, horizon=50, context=5):
    curves = error_curves(model, recorded(model, image), starts, horizon, context)
    return {(c.space, c.key, c.predictor): c for c in curves}


def test_perfect_model_makes_no_error():
    curves = curves_of(RandomWalker())
    for name in (("obs", "vector"), ("latent", "x"), ("reward", "reward")):
        assert np.array_equal(curves[(*name, "model")].value, np.zeros(EPISODE - 4))
    assert curves["obs", "vector", "copy"].value.min() > 0
    horizon = summary(list(curves.values()))["eval/model_error_horizon"]
    assert horizon == EPISODE - 4


def test_copying_a_constant_velocity_errs_by_its_square():
    curves = curves_of(PerfectDreamer())
    k = np.arange(1, EPISODE - 3)
    assert curves["obs", "vector", "copy"].value == pytest.approx(k**2 / VARIANCE)
    assert curves["reward", "reward", "copy"].value == pytest.approx(k)


def test_linear_model_learns_linear_dynamics():
    curves = curves_of(RandomWalker())
    assert curves["obs", "vector", "linear"].value.max() < 1e-6
    assert curves["reward", "reward", "linear"].value.max() < 1e-3
    assert curves["reward", "reward", "copy"].value.min() > 0.5


def test_linear_model_of_images_is_one_of_their_components():
    curves = curves_of(PerfectDreamer(walk_spec(image=True)), image=True)
    k = np.arange(1, EPISODE - 3)
    assert curves["obs", "image", "copy"].value == pytest.approx((3 * k / 255) ** 2)
    assert curves["obs", "image", "model"].value == pytest.approx(0, abs=1e-12)
    assert curves["obs", "image", "linear"].value == pytest.approx(0, abs=1e-8)


def test_linear_model_of_large_images_changes_pooled_pixels():
    images = torch.randint(100, 150, (2, 9, 64, 48, 3), dtype=torch.uint8)
    batch = {
        "obs": {"image": images},
        "action": torch.randint(2, (2, 9)),
        "reward": torch.zeros(2, 9),
    }
    recording = Recording(batch, torch.tensor([9, 4]), torch.tensor([False, False]))
    linear = LinearModel(recording, walk_spec().action)
    obs, reward = linear.rollout({"image": images[:, 0]}, batch["action"][:, :1])
    assert obs["image"].shape == (2, 1, 64, 48, 3)
    assert reward.shape == (2, 1)
    change = obs["image"][:, 0] - images[:, 0] / 255
    assert change.abs().max() > 0.01
    # 64 rows were pooled to 32, so each pair changes together
    assert torch.allclose(change[:, 0::2], change[:, 1::2], atol=1e-6)
    assert not torch.allclose(change[:, 0:-2:2], change[:, 2::2], atol=1e-2)


def test_padding_does_not_matter():
    recording = recorded(RandomWalker())
    longer = {k: torch.cat([v, v * 0], 1) for k, v in recording.batch.items() if k != "obs"}
    longer["obs"] = {k: torch.cat([v, v * 0], 1) for k, v in recording.batch["obs"].items()}
    padded = Recording(longer, recording.length, recording.terminal)
    ours, theirs = (error_curves(Standstill(), r, 64, 100, 5) for r in (recording, padded))
    for one, other in zip(ours, theirs, strict=True):
        assert np.array_equal(one.n, other.n)
        assert one.value == pytest.approx(other.value)


def test_standstill_is_copying():
    curves = curves_of(Standstill())
    for name in (("obs", "vector"), ("reward", "reward")):
        assert np.array_equal(curves[(*name, "model")].value, curves[(*name, "copy")].value)
    assert summary(list(curves.values()))["eval/model_error_horizon"] == 0


def test_starts_count_while_their_episode_lasts():
    everywhere = curves_of(Standstill(), starts=1000, horizon=100)
    k = np.arange(1, EPISODE - 3)
    # two episodes are measured; each has a start at steps 4, ..., EPISODE - 1
    for curve in everywhere.values():
        assert np.array_equal(curve.n, 2 * (EPISODE - 3 - k))
    assert everywhere["obs", "vector", "model"].value == pytest.approx(k**2 / VARIANCE)
    few = curves_of(Standstill(), starts=3, horizon=7)
    # of steps 4 ... 39 of two episodes: the first, the last of the first episode, the last
    assert few["obs", "vector", "copy"].n.tolist() == [3, 1, 1, 1, 1, 1, 1]
    assert curves_of(Standstill(), context=EPISODE + 1) == {}


def test_latent_error_is_in_units_of_the_variance():
    guessed = curves_of(Noisy(sampled=False), starts=1000, horizon=5)
    assert guessed["latent", "noise", "model"].value == pytest.approx(1.0, rel=0.1)
    sampled = curves_of(Noisy(sampled=True), starts=1000, horizon=5)
    assert sampled["latent", "noise", "model"].value == pytest.approx(2.0, rel=0.1)
    assert ("latent", "index", "model") not in sampled
    still = curves_of(Standstill())["latent", "x", "model"].value
    assert still == pytest.approx(np.arange(1, EPISODE - 3) ** 2 / VARIANCE)


def test_better_is_counted_up_to_the_first_defeat():
    class LateError(PerfectDreamer):
        def decode(self, state):
            late = (torch.arange(state["x"].shape[1]) == 6).float()[:, None]
            return {"vector": state["x"] + 100 * late}

    metrics = summary(list(curves_of(LateError()).values()))
    assert metrics["eval/model_error_horizon"] == 6


def test_metrics_and_files(tmp_path):
    callback = ModelError(every_env_steps=4, episodes=2, horizon=20)
    trainer(tmp_path, callback, Budget(env_steps=8)).fit(PerfectDreamer(), TinyData())
    logged = [row for row in rows(tmp_path) if row[2].startswith("eval/")]
    names = {
        f"{p}_error_{s}@{k}"
        for p, s in [
            ("model", "obs"),
            ("model", "latent"),
            ("model", "reward"),
            ("copy", "obs"),
            ("linear", "obs"),
        ]
        for k in (1, 5, 15)
    }
    assert {row[2] for row in logged} == {f"eval/{n}" for n in names | {"model_error_horizon"}}
    files = sorted(p.name for p in (tmp_path / "model_error").iterdir())
    assert files == ["4.csv", "4.png", "8.csv", "8.png"]
    with (tmp_path / "model_error" / "4.csv").open() as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["horizon", "space", "key", "predictor", "value", "n"]
    assert len(table) == 20 * (3 + 1 + 3)
    copied = {r["horizon"]: r for r in table if (r["space"], r["predictor"]) == ("obs", "copy")}
    (metric,) = (r[3] for r in logged if r[1:3] == ["4", "eval/copy_error_obs@15"])
    assert copied["15"]["value"] == metric
    picture = Image.open(tmp_path / "model_error" / "4.png")
    assert picture.size == (3 * PANEL_SIZE[1], PANEL_SIZE[0])
    assert (tmp_path / "videos" / "model_error-8.gif").exists()


def test_training_is_undisturbed_and_measuring_repeats_itself(tmp_path):
    class Walker(RandomWalker):
        act = TinyModel.act

    for name in "abc":
        callbacks = [] if name == "a" else [ModelError(every_env_steps=6, episodes=2)]
        trainer(tmp_path / name, Budget(updates=9), *callbacks).fit(Walker(), TinyData())
    assert rows(tmp_path / "a") == rows(tmp_path / "b", but=("eval/", "time/"))
    assert rows(tmp_path / "b") == rows(tmp_path / "c")
    first, second = (tmp_path / "b" / "model_error" / f"{n}.csv" for n in (6, 12))
    again = tmp_path / "c" / "model_error" / "6.csv"
    assert first.read_bytes() == again.read_bytes() != second.read_bytes()


def test_curves_that_explode_leave_their_panel():
    line = np.array([1.0, 2.0, np.inf, np.nan])
    picture = line_panels([Panel("a", {"model": line, "copy": np.ones(4)}, top=3.0)] * 2)
    assert picture.shape == (PANEL_SIZE[0], 2 * PANEL_SIZE[1], 3)
    assert np.array_equal(picture[:, : PANEL_SIZE[1]], picture[:, PANEL_SIZE[1] :])
    tame = line_panels([Panel("a", {"model": line[:2], "copy": np.ones(4)}, top=3.0)])
    assert not np.array_equal(picture[:, : PANEL_SIZE[1]], tame)
    assert line_panels([Panel("none", {}, top=1.0)]).shape == (*PANEL_SIZE, 3)


def test_dreamer_learns_beside_it(tmp_path):
    data = EnvDataModule(
        "CartPole-v1", num_envs=2, batch_size=2, sequence_length=4, prefill=16, seed=1
    )
    callback = ModelError(
        every_env_steps=10**6, episodes=4, horizon=5, context=2, max_steps=20, at_start=True
    )
    model = DreamerV3(data.spec, size="nano")
    trainer(tmp_path, callback, Budget(updates=2), logger=RunLogger(tmp_path)).fit(model, data)
    assert model.updates == 2
    metrics = {row[2]: float(row[3]) for row in rows(tmp_path)}
    for name in ("model_error_obs", "model_error_latent", "model_error_reward", "linear_error_obs"):
        assert np.isfinite(metrics[f"eval/{name}@5"])
    (path,) = (tmp_path / "model_error").glob("*.csv")
    with path.open() as file:
        latents = {row["key"] for row in csv.DictReader(file) if row["space"] == "latent"}
    assert latents == {"deter", "stoch"}


def test_what_cannot_be_measured_is_refused(tmp_path):
    with pytest.raises(UserError, match="Imaginer, which TinyModel is not"):
        trainer(tmp_path, ModelError()).fit(TinyModel(), TinyData())
    with pytest.raises(UserError, match="needs a RunLogger"):
        pl.Trainer(default_root_dir=tmp_path, logger=False, callbacks=[ModelError()]).fit(
            PerfectDreamer(), TinyData()
        )
    with pytest.raises(UserError, match="episodes is 1"):
        ModelError(episodes=1)
    with pytest.raises(UserError, match="max_steps is 30"):
        ModelError(max_steps=30)
    with pytest.raises(UserError, match="horizon is 0"):
        ModelError(horizon=0)
