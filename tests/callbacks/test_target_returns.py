"""What is asked for, what is achieved, and how the two are compared."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from callbacks.target_returns import TargetReturns
from datamodules.errors import UserError
from datamodules.spec import ActionSpec, ArraySpec, Spec


class Pays(gym.Env):
    """Pays the action and ends after three steps."""

    observation_space = gym.spaces.Dict({"vector": gym.spaces.Box(-1, 1, (1,))})
    action_space = gym.spaces.Discrete(100)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.t = 0
        return {"vector": np.zeros(1, np.float32)}, {}

    def step(self, action: Any) -> Any:
        self.t += 1
        return {"vector": np.zeros(1, np.float32)}, float(action), self.t == 3, False, {}


class Obeys(torch.nn.Module):
    """Gets at once what is asked for, up to a limit."""

    spec = Spec({"vector": ArraySpec((1,), "float32")}, ActionSpec("discrete", nvec=(100,)))
    device = torch.device("cpu")
    target_return: float | None = 11.0
    limit = 25.0
    contrary = False

    def initial_state(self, batch_size: int) -> dict[str, torch.Tensor]:
        target = min(self.target_return or 0.0, self.limit)
        return {"left": torch.full((batch_size,), 30 - target if self.contrary else target)}

    def rewarded(self, state: Any, reward: Any) -> Any:
        return {"left": state["left"] - reward}

    def act(self, obs: Any, state: Any, *, explore: bool) -> Any:
        return state["left"].clamp(min=0).long(), state


class Trainer:
    class datamodule:  # noqa: N801
        returns = torch.arange(21.0)
        make_env = Pays


def measure(model: Obeys, **options: Any) -> dict[str, float]:
    callback = TargetReturns(targets=5, episodes=3, **options)
    callback.setup(Trainer(), model, "fit")  # type: ignore[arg-type]
    return callback.measure(Trainer(), model, np.random.SeedSequence(0))


def test_asked_and_achieved() -> None:
    model = Obeys()
    metrics = measure(model)
    assert {k: v for k, v in metrics.items() if "achieved" in k} == {
        f"eval/achieved@{r}": float(r) for r in (0, 5, 10, 15, 20)
    }
    assert metrics["eval/target_spearman"] == pytest.approx(1.0)
    assert metrics["eval/best_target_return"] == 20.0
    assert metrics["eval/data_top10_return"] == 19.5
    assert metrics["eval/beyond_return"] == 25.0  # 30 were asked for
    assert model.target_return == 11.0


def test_a_policy_that_does_the_opposite_is_found_out() -> None:
    model = Obeys()
    model.contrary = True
    assert measure(model)["eval/target_spearman"] == pytest.approx(-1.0)


def test_models_that_cannot_be_asked_are_refused() -> None:
    with pytest.raises(UserError, match="this Linear cannot: leave the callback out"):
        TargetReturns().setup(Trainer(), torch.nn.Linear(1, 1), "fit")  # type: ignore[arg-type]
    model = Obeys()
    model.target_return = None
    assert measure(model) == {}
    with pytest.raises(UserError, match="targets is 1, must be at least 2"):
        TargetReturns(targets=1)
