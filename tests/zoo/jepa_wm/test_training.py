"""Trainings of a dot: no collapse, two ranks as one, all data modules, resuming, evaluating."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from dots import SIDE, DotEnv, build, sequences, spec, truth

import zoo
from callbacks.collapse import CollapseMonitor
from callbacks.logger import RunLogger
from datamodules import EnvDataModule, EpisodeStore, OfflineDataModule
from datamodules.errors import UserError
from datamodules.sources.source import step_fields
from datamodules.spec import ArraySpec
from zoo.evaluate import evaluate
from zoo.jepa_wm.module import JEPAWorldModel

GOALS = {"goal": ArraySpec((SIDE, SIDE, 1), "uint8")}


def learn(updates: int, **options: Any) -> dict[str, float]:
    """Spread of the latents and ratio to copying of fresh dots, after a training."""
    model = build(latent=16, hidden=64, **options)
    found: dict[str, Any] = {}
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for update in range(updates):
        optimizer.zero_grad()
        model.training_step(sequences(24, 5, seed=update), 0).backward()
        optimizer.step()
        model.updates += 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JEPAWorldModel, "logs_now", True)
        patch.setattr(JEPAWorldModel, "log_metrics", lambda _, metrics: found.update(metrics))
        model.training_step(sequences(64, 5, seed=updates), 0)
    return {key: float(value) for key, value in found.items() if torch.is_tensor(value)}


@pytest.mark.parametrize("options", [{}, {"prevention": "sigreg"}], ids=["vicreg", "sigreg"])
def test_latents_do_not_collapse(options: dict[str, Any]) -> None:
    found = learn(120, **options)
    assert found["feature_std"] > 0.7
    assert found["copy_ratio"] < 0.6


def test_without_prevention_they_do() -> None:
    found = learn(120, prevention="none")
    assert found["feature_std"] < 0.15
    assert found["copy_ratio"] > 0.8


class Dots(pl.LightningDataModule):
    """Endless batches of fresh dots."""

    def train_dataloader(self) -> Iterator[dict[str, Any]]:
        return (sequences(24, 5, seed=update) for update in count())


def monitored(prevention: str, tmp_path: Path) -> dict[str, list[float]]:
    """What the monitor logs, and whether it warns."""
    model, logger = build(latent=16, hidden=64, prevention=prevention, lr=3e-3), RunLogger(tmp_path)
    trainer = pl.Trainer(
        max_steps=200,
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=logger,
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[CollapseMonitor(every_updates=40)],
    )
    trainer.fit(model, datamodule=Dots())
    found: dict[str, list[float]] = {}
    for line in (tmp_path / "metrics.csv").read_text().splitlines()[1:]:
        _, _, metric, value = line.split(",")
        found.setdefault(metric, []).append(float(value))
    return found


def test_the_monitor_names_a_collapse_and_its_remedy(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"have collapsed: .* of copying; set prevention to vic"):
        found = monitored("none", tmp_path)
    assert len(found["eval/relative_std"]) == 5
    assert found["eval/relative_std"][-1] < 0.1
    assert found["eval/relative_std"][-1] < found["eval/relative_std"][0]


def test_the_monitor_is_silent_where_nothing_collapses(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*have collapsed")
        found = monitored("vicreg", tmp_path)
    assert found["eval/relative_std"][-1] > 0.7
    assert found["eval/relative_std_before"][-1] > 0.5
    assert found["eval/covariance_rank"][-1] > 2
    assert found["eval/rank_me"][-1] > 4


def halves(rank: int | None) -> dict[str, Any]:
    """A batch or its half; the ends of episodes are all in the second."""
    batch = sequences(6, 5)
    batch["is_first"][4, 2] = batch["is_first"][5, 3] = True
    if rank is None:
        return batch
    rows = slice(3 * rank, 3 * rank + 3)
    obs = {key: value[rows] for key, value in batch.pop("obs").items()}
    return {"obs": obs} | {key: value[rows] for key, value in batch.items()}


def gradients(rank: int | None) -> dict[str, Any]:
    model = build(sigreg=2.0)
    model.training_step(halves(rank), 0).backward()
    grads = {key: p.grad for key, p in model.named_parameters()}
    return {"losses": model.last_losses, "grads": grads}


def as_rank(rank: int, folder: str) -> None:
    """Leaves what DDP would have on this rank."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", meeting, timedelta(minutes=10), rank=rank, world_size=2)
    try:
        found = gradients(rank)
        for part in found.values():
            for value in part.values():
                dist.all_reduce(value)
                value /= 2
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_ranks_learn_as_one_with_the_joined_batch(tmp_path: Path) -> None:
    expected = gradients(None)
    other = mp.get_context("spawn").Process(target=as_rank, args=(1, str(tmp_path)))
    other.start()
    as_rank(0, str(tmp_path))
    other.join()
    assert other.exitcode == 0
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found["losses"].keys() == expected["losses"].keys() > {"variance", "sigreg"}
        for part in ("losses", "grads"):
            for key, value in expected[part].items():
                torch.testing.assert_close(found[part][key], value, atol=1e-6, rtol=1e-4, msg=key)


def trainer(updates: int, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        max_steps=updates,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,
    )


@pytest.mark.parametrize("policy", ["random", "model"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_learns_from_an_environment_and_acts_in_it(
    policy: str, precision: Any, tmp_path: Path
) -> None:
    data = EnvDataModule(
        DotEnv,
        num_envs=2,
        batch_size=4,
        sequence_length=5,
        prefill=16,
        policy=policy,
        episodes=2,
        directory=tmp_path / "replay",
    )
    model = build(data.spec, prevention="ema", variance=1.0)
    before = model.encoder.linear.weight.clone()
    fitting = trainer(2, precision=precision)
    fitting.fit(model, datamodule=data)
    assert model.updates == 2
    assert not torch.equal(before, model.encoder.linear.weight)
    for name in ("loss", "prediction", "variance", "feature_std", "copy_ratio"):
        assert fitting.logged_metrics[f"train/{name}"].isfinite(), name
    assert len(evaluate(model, data.make_env, 3, 0).returns) == 3


def recorded(folder: Path) -> Path:
    """A store of four episodes of 9 frames, without goals."""
    batch = sequences(4, 9)
    with EpisodeStore.create(
        folder, step_fields(spec()), attributes={"spec": spec().to_dict()}
    ) as store:
        for row in range(4):
            for t in range(9):
                step = {
                    "obs/image": batch["obs"]["image"][row, t].numpy(),
                    "action": batch["action"][row, t].numpy() * (t < 8),
                    "reward": np.float32(0),
                    "is_first": np.bool_(t == 0),
                    "is_last": np.bool_(t == 8),
                    "is_terminal": np.bool_(False),
                }
                store.append(0, {key: np.asarray(value) for key, value in step.items()})
    return folder


@pytest.mark.parametrize("options", [{}, {"prevention": "sigreg", "predictor": "transformer"}])
def test_a_training_on_recorded_data_resumes_exactly(
    options: dict[str, Any], tmp_path: Path
) -> None:
    source = str(recorded(tmp_path / "data"))

    def run(updates: int, checkpoint: Path | None = None) -> JEPAWorldModel:
        model = build(**options, warmup=2, anneal=5)
        data = OfflineDataModule(source, batch_size=2, sequence_length=4)
        fitting = trainer(updates)
        fitting.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        fitting.save_checkpoint(tmp_path / f"{updates}.ckpt")
        return model

    run(2)
    resumed, whole = run(4, tmp_path / "2.ckpt"), run(4)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    loaded = zoo.load(tmp_path / "4.ckpt")
    assert loaded.loss_scales == whole.loss_scales  # type: ignore[attr-defined]


def test_a_model_of_data_without_goals_is_evaluated_where_there_are_goals() -> None:
    model = truth()
    assert "goal" not in model.spec.obs
    result = evaluate(model, DotEnv, 20, 0)
    assert result.return_mean > 0.8
    assert result.return_mean > evaluate(model, DotEnv, 20, 0, explore=True).return_mean + 0.4
    with_goals = truth(space=spec(**GOALS))
    assert evaluate(with_goals, DotEnv, 20, 0) == result


def test_an_environment_without_goals_is_named() -> None:
    class NoGoal(DotEnv):
        def _observe(self) -> dict[str, np.ndarray]:
            return {"image": super()._observe()["image"]}

    with pytest.raises(UserError, match="plans towards a goal image"):
        evaluate(truth(), NoGoal, 1, 0)
