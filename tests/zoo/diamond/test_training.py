"""Training on Catch: collecting in blocks, resuming, and in bfloat16."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F

import zoo
from datamodules import EnvDataModule, UserError
from datamodules.spec import ActionSpec, ArraySpec, Spec
from zoo import registry
from zoo.diamond.module import Diamond


def catch(directory: Path) -> EnvDataModule:
    return EnvDataModule(
        "zoo/Catch-v0",
        num_envs=2,
        batch_size=3,
        sequence_length=6,
        prefill=40,
        collect_steps=4,
        directory=directory / "replay",
    )


def fit(directory: Path, updates: int, resume: Path | None = None, **options: Any) -> Diamond:
    data = catch(directory)
    torch.manual_seed(0)
    model = Diamond(
        data.spec,
        size="nano",
        first_updates=[2, 2, 2],
        epoch_updates=[1, 1, 2],
        dreams=3,
        horizon=3,
    )
    trainer = pl.Trainer(
        max_steps=updates,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,
    )
    trainer.fit(model, data, ckpt_path=resume, weights_only=True)
    trainer.save_checkpoint(directory / "last.ckpt")
    return model


def test_resumed_in_the_middle_of_practice(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", 12)
    fit(tmp_path / "part", 9)  # after the first of two updates of the second epoch's practice
    torch.rand(5)
    resumed = fit(tmp_path / "part", 12, resume=tmp_path / "part" / "last.ckpt")
    assert whole.updates == resumed.updates == 12
    assert whole.env_steps == resumed.env_steps
    for key, value in whole.state_dict().items():
        assert value.isfinite().all(), key
        assert torch.equal(value, resumed.state_dict()[key]), key
    loaded = zoo.load(tmp_path / "whole" / "last.ckpt")
    assert (loaded.name, loaded.updates) == ("diamond", 12)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_fits_in_bfloat16(tmp_path: Path, precision: str) -> None:
    model = fit(tmp_path, 8, precision=precision)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert model.env_steps == 44  # the prefill, and one block of 4


def test_short_sequences_are_refused_at_once(tmp_path: Path) -> None:
    data = catch(tmp_path)
    data.sequence_length = 5
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(UserError, match="sequence_length is 5: raise it to 6"):
        trainer.fit(Diamond(data.spec, size="nano"), data)
    assert data.env_steps == 0


class Steps(pl.Callback):
    """Notes the steps collected before each batch."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        assert isinstance(pl_module, Diamond)
        self.seen.append(pl_module.env_steps)


def test_the_agent_collects_where_epochs_begin(tmp_path: Path) -> None:
    """6 updates in the first and 4 in each other epoch, however many batches each of them takes."""
    steps = Steps()
    fit(tmp_path, 11, accumulate_grad_batches=2, callbacks=[steps])
    assert steps.seen == [40] * 12 + [44] * 8 + [48] * 2


def test_the_papers_steps_and_epochs() -> None:
    """5,000 steps, then 100 before each of 950 epochs, then 50 epochs without."""
    config = registry.preset_config("diamond/atari-100k")
    data = config["data"]["init_args"]
    budget = config["trainer"]["callbacks"][0]["init_args"]["updates"]
    defaults = {k: p.default for k, p in inspect.signature(Diamond).parameters.items()}
    first, epoch = sum(defaults["first_updates"]), sum(defaults["epoch_updates"])
    assert data["prefill"] == 5_000 + data["collect_steps"]
    blocks = (data["collect_limit"] - data["prefill"]) / data["collect_steps"]
    assert 1 + blocks == 950
    assert (budget - first) / epoch == 1000 - 1
    assert (budget - first) / epoch - blocks == 50


@pytest.mark.parametrize("preset", ["atari-100k", "catch", "minigrid"])
def test_presets_read_dreams_and_histories(preset: str) -> None:
    data = registry.preset_config(f"diamond/{preset}")["data"]["init_args"]
    defaults = {k: p.default for k, p in inspect.signature(Diamond).parameters.items()}
    assert data["sequence_length"] == defaults["horizon"] + defaults["past"]
    assert data["collect_steps"] % data["num_envs"] == 0


@pytest.mark.slow
def test_the_world_learns_what_it_is_shown_again_and_again() -> None:
    """A square that the action moves: errors far below those of no change, and the reward."""
    torch.manual_seed(0)
    spec = Spec({"image": ArraySpec((16, 16, 1), "uint8")}, ActionSpec("discrete", nvec=(2,)))
    model = Diamond(spec, size="nano", lr=2e-3, warmup=10)
    action = torch.randint(2, (16, 6))
    column = 5 + F.pad((2 * action - 1).cumsum(1)[:, :-1], (1, 0))
    image = torch.zeros(16, 6, 16, 16, 1, dtype=torch.uint8)
    for offset in range(3):
        index = (column + offset)[:, :, None, None, None].expand(-1, -1, 16, 1, 1)
        image.scatter_(3, index, 255)
    reward = F.pad(2.0 * action[:, :-1] - 1, (1, 0))
    none = torch.zeros(16, 6, dtype=torch.bool)
    batch = {"obs": {"image": image}, "action": action, "reward": reward}
    batch |= {"is_first": none, "is_last": none, "is_terminal": none}
    optimizer = model.configure_optimizers()
    for part in (0, 10_000):
        for update in range(60):
            model.updates = part + update
            optimizer.zero_grad()
            model.training_step(batch, 0).backward()
            model.on_before_optimizer_step(optimizer)
            optimizer.step()
    assert model.last_losses["reward"] < 0.1
    assert model.last_losses["end"] < 0.05
    states = model.observe(batch)
    dream = model.imagine({k: v[:, 3] for k, v in states.items()}, action[:, 3:5], 2)
    shown = model.decode(dream.state)["image"]
    error = (shown - image[:, 4:] / 255).square().mean()
    unchanged = ((image[:, 3:4].float() - image[:, 4:].float()) / 255).square().mean()
    assert error < unchanged / 3
    assert (dream.reward.sign() == reward[:, 4:]).all()
