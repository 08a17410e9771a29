"""Collecting with a random policy, in rounds, and what staged models ask of the datamodule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from datamodules import EnvDataModule
from datamodules.collector import RandomPolicy, play
from datamodules.envs.factory import make_env
from datamodules.errors import UserError
from datamodules.replay import Portion
from datamodules.spec import ActionSpec, ArraySpec, Spec
from datamodules.workers import EnvPool

SPEC = Spec({"vector": ArraySpec((1,), "float32")}, ActionSpec("discrete", nvec=(5,)))


class Staged(pl.LightningModule):
    """Asks for a part of each batch, and in its second round acts itself."""

    def __init__(self, portion: Portion, begin_round: int = 10**9) -> None:
        super().__init__()
        self.portion, self.begin_round, self.updates = portion, begin_round, 0
        self.layer = torch.nn.Linear(4, 1)
        self.batches: list[dict[str, Any]] = []
        self.acted = 0

    @property
    def replay_round(self) -> int:
        return int(self.updates >= self.begin_round)

    def prepare_batch(self, data: EnvDataModule) -> Portion:
        return self.portion

    def initial_state(self, batch_size: int) -> dict[str, torch.Tensor]:
        return {"steps": torch.zeros(batch_size)}

    def act(self, obs: Any, state: Any, *, explore: bool) -> tuple[torch.Tensor, Any]:
        self.acted += 1
        rows = len(obs["vector"])
        return torch.zeros(rows, dtype=torch.int64), {"steps": state["steps"] + 1}

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.batches.append(batch)
        self.updates += 1
        return self.layer(torch.ones(1, 4)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(model: Staged, data: EnvDataModule, updates: int, look: Any = None) -> None:
    class Look(pl.Callback):
        def on_train_batch_end(self, *arguments: Any) -> None:
            if look is not None:
                look()

    pl.Trainer(
        max_steps=updates, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Look()],
    ).fit(model, datamodule=data)  # fmt: skip


def cartpole(folder: Path, **options: Any) -> EnvDataModule:
    settings = {"num_envs": 2, "batch_size": 3, "sequence_length": 5, "episodes": 4}
    return EnvDataModule(
        "CartPole-v1", policy="random", directory=folder, **{**settings, **options}
    )


def test_actions_are_held_for_one_to_hold_steps() -> None:
    policy = RandomPolicy(SPEC, np.random.default_rng(0), hold=4)
    state, taken, left = policy.initial_state(2), [], []
    for _ in range(4000):
        action, state = policy.act({"vector": torch.zeros(2, 1)}, state, explore=True)
        taken.append(action)
        left.append(state["left"])
    actions, remaining = torch.stack(taken), torch.stack(left)
    assert actions.dtype == torch.int64
    held = remaining[:-1] > 0
    assert (actions[1:] == actions[:-1])[held].all()
    renewed = remaining[1:][~held] + 1
    assert renewed.unique().tolist() == [1, 2, 3, 4]
    assert abs(float(renewed.float().mean()) - 2.5) < 0.1
    assert (torch.bincount(actions.flatten(), minlength=5) > 1200).all()


def test_without_holding_each_step_is_new() -> None:
    policy = RandomPolicy(SPEC, np.random.default_rng(0))
    assert policy.initial_state(3) == {}
    action, _ = policy.act({"vector": torch.zeros(500, 1)}, {}, explore=True)
    assert (torch.bincount(action, minlength=5) > 60).all()


def test_a_portion_of_a_batch(tmp_path: Path) -> None:
    model = Staged(Portion(rows=7, steps=2, observations=()))
    fit(model, cartpole(tmp_path), 1)
    batch = model.batches[0]
    assert batch["obs"] == {}
    assert batch["reward"].shape == batch["step_id"].shape == (7, 2)


def test_nothing_asked_is_everything(tmp_path: Path) -> None:
    model = Staged(Portion())
    fit(model, cartpole(tmp_path), 1)
    assert model.batches[0]["obs"]["vector"].shape == (3, 5, 4)


def test_sweep_and_first_steps(tmp_path: Path) -> None:
    data, model = cartpole(tmp_path), Staged(Portion())
    found: list[Any] = []

    def look() -> None:
        found.append(list(data.sweep(7)))
        found.append(data.first_steps(100))
        found.append(data.first_steps(2))
        assert data.replay is not None
        found.append(data.replay.num_steps)

    fit(model, data, 1, look)
    sweep, starts, two, held = found
    ids = torch.cat([batch["step_id"].flatten() for batch in sweep])
    assert len(ids) == len(ids.unique()) == held
    assert max(batch["reward"].shape[1] for batch in sweep) == 7
    first = torch.cat([batch["is_first"].flatten() for batch in sweep])
    assert set(starts["step_id"].flatten().tolist()) <= set(ids[first].tolist())
    assert starts["is_first"].all()
    assert len(starts["step_id"]) >= 4
    assert two["obs"]["vector"].shape == (2, 1, 4)
    assert two["step_id"][0] == starts["step_id"][0]
    assert two["step_id"][1] == starts["step_id"][-1]


def test_the_model_acts_from_the_second_round_on(tmp_path: Path) -> None:
    data, model = cartpole(tmp_path), Staged(Portion(), begin_round=2)
    episodes: list[int] = []

    def look() -> None:
        assert data.collector is not None
        episodes.append(data.collector.episodes)
        if model.updates < 3:
            assert model.acted == 0

    fit(model, data, 4, look)
    assert 4 <= episodes[0] == episodes[1] < 8 <= episodes[2] == episodes[3]
    assert model.acted > 0


def test_a_collection_is_saved_in_its_middle_and_goes_on(tmp_path: Path) -> None:
    """Bit for bit, with held actions and the first update not yet made."""
    ends = []
    for killed in (None, 23, 7):  # the replay can only be cut back
        data = cartpole(tmp_path / "replay", random_hold=3)
        model = Staged(Portion())
        trainer = pl.Trainer(
            max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        calls = 0

        def collecting(trainer: pl.Trainer = trainer) -> None:
            nonlocal calls
            calls += 1
            if calls in (7, 23):
                trainer.save_checkpoint(tmp_path / f"{calls}.ckpt")

        data.collecting = collecting if killed is None else None
        path = None if killed is None else tmp_path / f"{killed}.ckpt"
        trainer.fit(model, datamodule=data, ckpt_path=path, weights_only=True)
        assert trainer.global_step == 2
        state = data.state_dict()["ranks"][0]
        ends.append((state["collector"]["agent_steps"], state["random"], model.batches))
    for steps, random, batches in ends[1:]:
        assert (steps, random) == ends[0][:2]
        for batch, expected in zip(batches, ends[0][2], strict=True):
            assert torch.equal(batch["step_id"], expected["step_id"])
            assert torch.equal(batch["action"], expected["action"])
            assert torch.equal(batch["obs"]["vector"], expected["obs"]["vector"])


class Counting:
    """Plays CartPole: episode i always takes action i modulo 2."""

    def initial_state(self, batch_size: int) -> dict[str, torch.Tensor]:
        return {"steps": torch.zeros(batch_size, dtype=torch.int64)}

    def act(self, obs: Any, state: Any, episode: torch.Tensor) -> tuple[torch.Tensor, Any]:
        assert obs["vector"].shape == (len(episode), 4)
        return episode % 2, {"steps": state["steps"] + 1}


@pytest.mark.parametrize("num_envs", [1, 3])
def test_episodes_are_played_from_their_own_seeds(num_envs: int) -> None:
    seeds, expected = [5, 6, 7, 8, 9], []
    for i, seed in enumerate(seeds):
        env = make_env("CartPole-v1")
        env.reset(seed=seed)
        steps = 0
        while not env.step(i % 2)[2]:
            steps += 1
        expected.append(steps + 1)
    with EnvPool([lambda: make_env("CartPole-v1")] * num_envs) as pool:
        played = play(pool, Counting(), seeds)
        assert played.length.tolist() == played.reward.tolist() == expected
        cut = play(pool, Counting(), seeds, horizon=4)
        assert cut.length.tolist() == [4] * 5


def test_played_steps_count_and_are_not_recorded(tmp_path: Path) -> None:
    data, model = cartpole(tmp_path), Staged(Portion())
    found: list[int] = []

    def look() -> None:
        assert data.replay is not None
        before, held = data.env_steps, data.replay.num_steps
        played = data.play(Counting(), [1, 2, 3])
        found.extend([data.env_steps - before, int(played.length.sum())])
        assert data.replay.num_steps == held
        state = data.state_dict()
        assert state["ranks"][0]["played"] == found[0]

    fit(model, data, 1, look)
    assert found[0] == found[1] > 0


def test_hold_must_be_positive() -> None:
    with pytest.raises(UserError, match="random_hold > 0, got 0"):
        EnvDataModule("CartPole-v1", policy="random", episodes=1, random_hold=0)
