"""Dreams that go on and begin anew, and what their steps were worth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo.base import State
from zoo.diamond.dream import Step
from zoo.diamond.lstm import Memory
from zoo.diamond.practice import Rollout, draw, practise, starts_of
from zoo.diamond.reward_end import Outcome
from zoo.nets.distributions import Categorical, Policy, PolicySteps


class Reader:
    """An agent that expects what the grey of a frame says; it counts the frames that it saw."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, frame: Tensor, memory: Memory) -> tuple[Policy, Tensor, Memory]:
        self.seen += len(frame)
        value = ((frame[:, 0, 0, 0] + 1) * 127.5).round()
        return Categorical(torch.zeros(len(frame), 2), (2,)), value, Memory(memory.h + 1, memory.c)


class Brighter:
    """A dream in which each frame is a grey brighter; it ends at 50."""

    def step(self, state: State, action: Tensor) -> Step:
        frames = state["frames"] + 1
        outcome = Outcome.nothing(len(frames), frames.device)
        ends = frames[:, -1, 0, 0, 0] == 50
        outcome.end[ends] = outcome.end[ends].flip(-1)
        return Step({"frames": frames}, outcome)


def states(greys: list[int], ages: list[int]) -> State:
    frames = torch.tensor(greys, dtype=torch.uint8).view(-1, 1, 1, 1, 1)
    memory = torch.zeros(len(greys), 1)
    return {"frames": frames, "agent_h": memory, "agent_c": memory, "age": torch.tensor(ages)}


def test_dreams_are_cut_or_end_and_begin_anew() -> None:
    agent = Reader()
    now = states([0, 10, 48], [0, 2, 0])
    rollout, after = practise(agent, Brighter(), now, states([100], [0]), 4)  # type: ignore[arg-type]
    assert rollout.value.tolist() == [[0, 1, 2, 3], [10, 11, 100, 101], [48, 49, 100, 101]]
    assert rollout.cut.int().tolist() == [[0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert rollout.end.int().tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
    assert rollout.arrival[:2].tolist() == [[1, 2, 3, 4], [11, 12, 101, 102]]
    assert rollout.arrival[2, [0, 2, 3]].tolist() == [49, 101, 102]
    assert after["frames"].flatten().tolist() == [100, 102, 102]
    assert after["age"].tolist() == [0, 2, 2]
    assert after["agent_h"].flatten().tolist() == [0, 2, 2]  # a new dream has its own memory
    assert agent.seen == 12 + 3 + 1  # on arriving only where no value is known already


def test_returns_with_ends_and_cuts_by_hand() -> None:
    """Two dreams of 4 steps: one ends after the second, one is cut after the first."""
    g, lam = 0.985, 0.95
    value = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    arrival = torch.tensor([[2.0, 3, 4, 9], [10, 7, 8, 11]])
    reward = torch.tensor([[0.0, 1, 0, 0], [1, 0, 0, -1]])
    end = torch.zeros(2, 4, dtype=torch.bool)
    end[0, 1] = True
    cut = torch.zeros(2, 4, dtype=torch.bool)
    cut[1, 0] = True
    rollout = Rollout(PolicySteps([]), value, value, arrival, reward, end, cut)
    last = g * torch.tensor([9.0, 11.0]) + torch.tensor([0.0, -1.0])
    third = g * ((1 - lam) * torch.tensor([4.0, 8.0]) + lam * last)
    second = torch.stack([torch.tensor(1.0), g * ((1 - lam) * 7 + lam * third[1])])
    first = torch.stack([g * ((1 - lam) * 2 + lam * second[0]), torch.tensor(1 + g * 10)])
    wanted = torch.stack([first, second, third, last], 1)
    torch.testing.assert_close(rollout.returns(g, lam), wanted)


@pytest.mark.parametrize("count", [3, 6])
def test_starts_are_different_ones(count: int) -> None:
    torch.manual_seed(0)
    starts = states([1, 2, 3, 4, 5, 6], [0] * 6)
    orders = set()
    for _ in range(10):
        drawn = draw(starts, count)["frames"].flatten().tolist()
        assert len(set(drawn)) == count
        orders.add(tuple(drawn))
    assert len(orders) > 1


def test_more_dreams_than_starts() -> None:
    torch.manual_seed(0)
    drawn = draw(states([1, 2, 3], [0] * 3), 60)["frames"].flatten()
    assert sorted(set(drawn.tolist())) == [1, 2, 3]
    assert len(drawn) == 60


def test_dreams_begin_where_episodes_go_on() -> None:
    grid = {"frames": torch.arange(6, dtype=torch.uint8).view(3, 2, 1, 1, 1, 1)}
    is_last = torch.tensor([[True, False], [False, True], [False, False]])
    starts = starts_of(grid, is_last)
    assert starts["frames"].flatten().tolist() == [1, 5]
    assert starts["age"].tolist() == [0, 0]
    assert starts_of(grid, torch.ones_like(is_last))["frames"].flatten().tolist() == [1, 3, 5]
