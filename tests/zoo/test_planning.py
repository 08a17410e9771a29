"""Planners on toy dreams whose optimum is known or enumerated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules.errors import UserError
from datamodules.spec import ActionSpec
from zoo.base import Imagined, Imaginer, State
from zoo.nets.actions import ActionCodec
from zoo.planning import (
    CEM,
    MPPI,
    Plan,
    continued_return,
    last_reward,
    predicted_return,
    weighted_moments,
)

BOX = ActionCodec(ActionSpec("box", low=(-2.0, 0.0), high=(2.0, 10.0)))
UNIT = ActionCodec(ActionSpec("box", low=(-1.0,), high=(1.0,)))
Dream = Callable[[State, Tensor], tuple[Tensor, State]]


@dataclass
class Toy:
    """An imaginer whose rewards (N, H) and states follow from a function of given actions."""

    dream: Dream
    own: Tensor | None = None  # what its policy does (H, ...)
    calls: list[Tensor] = field(default_factory=list)

    def observe(self, batch: Any) -> State:
        raise AssertionError("a planner filters nothing")

    def decode(self, state: State) -> dict[str, Tensor]:
        raise AssertionError("a planner decodes nothing")

    def imagine(self, state: State, actions: Any, horizon: int) -> Imagined:
        assert not torch.is_grad_enabled()
        if actions is None:
            assert self.own is not None
            actions = self.own.repeat(len(next(iter(state.values()))), *(1,) * self.own.dim())
        else:
            self.calls.append(actions)
        assert actions.shape[1] == horizon
        reward, states = self.dream(state, actions)
        return Imagined(reward, torch.ones_like(reward), states, actions)


def walk(state: State, actions: Tensor) -> tuple[Tensor, State]:
    """x' = x + a with reward -|x' - goal|^2."""
    x = state["x"].unsqueeze(1) + actions.cumsum(1)
    return -(x - state["goal"].unsqueeze(1)).square().sum(-1), {"x": x}


def steps_to(target: Tensor) -> Dream:
    """Reward -|a - target|^2 for actions of any start."""
    return lambda state, actions: (-(actions - target).square().sum(-1), {})


def start(batch: int = 1) -> State:
    return {"x": torch.zeros(batch, 1)}


def manual(kind: str, seed: int = 0, **options: Any) -> CEM:
    torch.manual_seed(seed)
    return {"cem": CEM, "mppi": MPPI}[kind](**options)


def test_toys_are_imaginers() -> None:
    assert isinstance(Toy(walk), Imaginer)


@pytest.mark.parametrize("kind", ["cem", "mppi"])
def test_walks_to_the_goal_of_each_environment(kind: str) -> None:
    # Unconstrained optimum: jump to the goal, then stay. The last goal is out of reach of one step.
    goal = torch.tensor([[1.0, 4.0], [-1.5, 7.0], [0.3, 0.5], [5.0, 2.0]])
    state = {"x": torch.zeros(4, 2), "goal": goal}
    options = {"horizon": 4, "candidates": 1000, "iterations": 15, "elites": 50}
    if kind == "mppi":  # rewards are in the hundreds
        options |= {"temperature": 20.0, "min_std": 0.005}
    planner = manual(kind, **options)
    plan = planner.plan(Toy(walk), state, BOX)
    assert plan.action.shape == (4, 4, 2)
    expected = torch.zeros(4, 4, 2)
    expected[:, 0] = goal
    expected[3, :3, 0] = torch.tensor([2.0, 2.0, 1.0])
    # Wide, since the mean of clipped candidates reaches a bound slowly, and standing still is one.
    torch.testing.assert_close(plan.action, expected, atol=0.5, rtol=0)
    best = predicted_return(Imagined(walk(state, expected)[0], expected, {}, expected))
    torch.testing.assert_close(plan.value, best, atol=0.25, rtol=0)


def test_planning_together_finds_what_planning_alone_finds() -> None:
    goal = torch.tensor([[1.0, 4.0], [-1.5, 7.0], [0.3, 0.5]])
    state = {"x": torch.zeros(3, 2), "goal": goal}
    options = {"horizon": 3, "elites": 50, "iterations": 15}
    together = manual("cem", **options).plan(Toy(walk), state, BOX)
    for row in range(3):
        alone = manual("cem", seed=row + 1, **options).plan(
            Toy(walk), {key: value[row : row + 1] for key, value in state.items()}, BOX
        )
        torch.testing.assert_close(together.action[row], alone.action[0], atol=0.1, rtol=0)


def test_one_batch_for_an_iteration_with_the_rows_of_an_environment_together() -> None:
    seen = []

    def dream(state: State, actions: Tensor) -> tuple[Tensor, State]:
        seen.append(state["x"].flatten().tolist())
        return -actions.square().sum(-1), {}

    toy = Toy(dream)
    state = {"x": torch.tensor([[1.0], [2.0]])}
    manual("cem", horizon=5, candidates=3, elites=2, iterations=4).plan(toy, state, BOX)
    assert seen == [[1.0, 1.0, 1.0, 2.0, 2.0, 2.0]] * 4
    assert [tuple(call.shape) for call in toy.calls] == [(6, 5, 2)] * 4
    assert len(torch.cat(toy.calls).unique(dim=0)) == 24  # all drawn apart


def random_mdp(seed: int, nvec: tuple[int, ...]) -> Dream:
    """Random transitions and rewards of 6 states under (N, H) or (N, H, P) actions."""
    generator = torch.Generator().manual_seed(seed)
    following = torch.randint(6, (6, *nvec), generator=generator)
    table = torch.randn(6, *nvec, generator=generator)

    def dream(state: State, actions: Tensor) -> tuple[Tensor, State]:
        place, rewards = state["place"], []
        for action in actions.unbind(1):
            index = (place, *(action.unbind(-1) if len(nvec) > 1 else (action,)))
            rewards.append(table[index])
            place = following[index]
        return torch.stack(rewards, 1), {}

    return dream


def search(nvec: tuple[int, ...], horizon: int, seed: int, **options: Any) -> tuple[Tensor, ...]:
    """Returns (6,) from the 6 states of a random MDP: of the plan, the best and the mean ones."""
    dream, places = random_mdp(seed, nvec), torch.arange(6)
    codec = ActionCodec(ActionSpec("discrete" if len(nvec) == 1 else "multi_discrete", nvec=nvec))
    plan = manual("cem", horizon=horizon, **options).plan(Toy(dream), {"place": places}, codec)
    assert plan.action.dtype == torch.int64
    assert plan.action.shape == (6, horizon, *codec.spec.shape)
    steps = torch.cartesian_prod(*map(torch.arange, nvec)).view(-1, *codec.spec.shape)
    chosen = torch.cartesian_prod(*[torch.arange(len(steps))] * horizon)
    every = steps[chosen].repeat(6, *(1,) * (1 + len(codec.spec.shape)))
    starts = places.repeat_interleave(len(chosen))
    returns = dream({"place": starts}, every)[0].sum(1).view(6, -1)
    found = dream({"place": places}, plan.action)[0].sum(1)
    return found, returns.amax(1), returns.mean(1)


@pytest.mark.parametrize(("nvec", "horizon"), [((3,), 5), ((2, 3), 3)])
def test_equals_exhaustive_search(nvec: tuple[int, ...], horizon: int) -> None:
    # Enough candidates that all elites are the optimum at once.
    for seed in range(8):
        found, best, _ = search(nvec, horizon, seed, candidates=4000, elites=4)
        torch.testing.assert_close(found, best)


def test_comes_close_where_few_of_all_sequences_are_tried() -> None:
    # 2187 sequences, 500 candidates; independent steps can miss the optimum of a random task.
    gaps = []
    for seed in range(10):
        found, best, mean = search((3,), 7, seed, candidates=500, elites=10)
        gaps.append((best - found) / (best - mean))
    assert torch.cat(gaps).mean() < 0.05
    assert torch.cat(gaps).max() < 0.5


def test_the_belief_over_discrete_actions_is_what_the_elites_chose() -> None:
    # Only the first action counts: 0, 1 and 2 earn 0, 1 and 2, and 3 as much as 2.
    def dream(state: State, actions: Tensor) -> tuple[Tensor, State]:
        reward = torch.zeros(actions.shape)
        reward[:, 0] = actions[:, 0].clamp(max=2).float()
        return reward, {}

    codec = ActionCodec(ActionSpec("discrete", nvec=(4,)))
    toy = Toy(dream)
    options = {"horizon": 2, "candidates": 400, "elites": 100, "iterations": 1}
    plan = manual("cem", **options).plan(toy, start(), codec)
    torch.testing.assert_close(plan.mean.sum(-1), torch.ones(1, 2))
    assert (plan.mean[0, 0, :2] == 0).all() and (plan.mean[0, 0, 2:] > 0.3).all()
    assert plan.value.item() == 2.0
    counts = plan.mean * 100
    torch.testing.assert_close(counts, counts.round(), atol=1e-3, rtol=0)
    # What no elite chose is still drawn: 5% uniform, 1.25% of 0s and 1s each.
    toy.calls.clear()
    manual("cem", **{**options, "iterations": 2, "candidates": 4000}).plan(toy, start(), codec)
    share = (toy.calls[1][:, 0] < 2).float().mean().item()
    assert 0.015 < share < 0.035


class TestRefit:
    """One iteration, compared with the elites picked by hand."""

    target = torch.tensor([[0.4], [-0.6]])
    options: dict[str, Any] = {"horizon": 2, "candidates": 50, "elites": 5, "iterations": 1}  # noqa: RUF012

    def refit(self, planner: CEM) -> tuple[Plan, Tensor, Tensor]:
        """The plan, and the actions (K, H, A) and scores (K,) of the elites."""
        toy = Toy(steps_to(self.target))
        plan = planner.plan(toy, start(), UNIT)
        scores = -(toy.calls[0] - self.target).square().sum((1, 2))
        best = scores.argsort(descending=True)[: planner.elites]
        return plan, toy.calls[0][best], scores[best]

    def test_cem(self) -> None:
        plan, elites, scores = self.refit(manual("cem", **self.options))
        torch.testing.assert_close(plan.mean[0], elites.mean(0))
        std = (elites.var(0, unbiased=False) + 1e-6).sqrt()
        torch.testing.assert_close(plan.std[0], std)
        torch.testing.assert_close(plan.action, plan.mean)
        torch.testing.assert_close(plan.value[0], scores.mean())

    def test_cem_keeps_a_share_of_the_last_belief(self) -> None:
        plan, elites, _ = self.refit(manual("cem", **self.options, momentum=0.25))
        std = (elites.var(0, unbiased=False) + 1e-6).sqrt()
        torch.testing.assert_close(plan.mean[0], 0.75 * elites.mean(0))
        torch.testing.assert_close(plan.std[0], 0.75 * std + 0.25)

    def test_one_elite_leaves_the_smallest_std(self) -> None:
        plan, elites, _ = self.refit(manual("cem", **{**self.options, "elites": 1}))
        torch.testing.assert_close(plan.mean[0], elites[0])
        torch.testing.assert_close(plan.std, torch.full((1, 2, 1), 1e-3))

    @pytest.mark.parametrize("temperature", [0.01, 2.0])
    def test_mppi(self, temperature: float) -> None:
        plan, elites, scores = self.refit(manual("mppi", **self.options, temperature=temperature))
        weights = (scores / temperature).exp()
        weights = (weights / weights.sum()).view(-1, 1, 1)
        mean = (weights * elites).sum(0)
        std = (weights * (elites - mean) ** 2).sum(0).sqrt()
        torch.testing.assert_close(plan.mean[0], mean)
        torch.testing.assert_close(plan.std[0], std.clamp(0.05, 2.0))
        torch.testing.assert_close(plan.value[0], (weights.flatten() * scores).sum())

    def test_mppi_bounds_the_std(self) -> None:
        options = {**self.options, "elites": 50, "temperature": 100.0}
        low = self.refit(manual("mppi", **options, max_std=0.1, min_std=0.1))[0]
        assert low.std.tolist() == [[[pytest.approx(0.1)], [pytest.approx(0.1)]]]
        assert (self.refit(manual("mppi", **options))[0].std > 0.3).all()

    def test_weighted_moments(self) -> None:
        # 1, 3 and 100 with weights 1/4, 3/4 and 0: mean 2.5, variance (1.5^2 + 3 * 0.5^2) / 4
        mean, variance = weighted_moments(
            torch.tensor([[[1.0], [3.0], [100.0]]]), torch.tensor([[0.25, 0.75, 0.0]])
        )
        assert mean.tolist() == [[2.5]] and variance.tolist() == [[0.75]]


def test_starts_from_a_standard_normal_cut_at_the_bounds() -> None:
    toy = Toy(steps_to(torch.zeros(2)))
    manual("cem", candidates=5000, iterations=1).plan(toy, start(), BOX)
    encoded = BOX.encode(toy.calls[0])
    assert encoded.abs().max() == 1
    outside = (encoded.abs() == 1).float().mean().item()
    assert outside == pytest.approx(0.3173, abs=0.01)  # P(|N(0, 1)| > 1)
    assert encoded.mean().item() == pytest.approx(0, abs=0.01)


def test_starts_from_uniform_choices() -> None:
    toy = Toy(lambda state, actions: (torch.zeros(actions.shape[:2]), {}))
    codec = ActionCodec(ActionSpec("multi_discrete", nvec=(2, 5)))
    manual("cem", candidates=2000, iterations=1).plan(toy, start(), codec)
    for part, n in zip(toy.calls[0].unbind(-1), (2, 5), strict=True):
        shares = part.flatten().bincount(minlength=n) / part.numel()
        torch.testing.assert_close(shares, torch.full((n,), 1 / n), atol=0.02, rtol=0)


@pytest.mark.parametrize("kind", ["cem", "mppi"])
def test_stays_in_the_bounds_of_the_environment(kind: str) -> None:
    toy = Toy(steps_to(torch.tensor([100.0, -100.0])))
    warm = {"temperature": 100.0} if kind == "mppi" else {}
    planner = manual(kind, horizon=3, candidates=300, elites=10, **warm)
    plan = planner.plan(toy, start(2), BOX)
    for actions in (*toy.calls, plan.action):
        assert (actions[..., 0].abs() <= 2).all()
        assert ((actions[..., 1] >= 0) & (actions[..., 1] <= 10)).all()
    torch.testing.assert_close(plan.action[:, 0], torch.tensor([[2.0, 0.0]] * 2), atol=0.1, rtol=0)


class TestBlocks:
    def test_the_actions_of_a_block_are_the_same(self) -> None:
        targets = torch.tensor([[0.0], [0.2], [0.4], [-0.5], [-0.7], [-0.9]])
        toy = Toy(steps_to(targets))
        planner = manual("cem", horizon=6, block=3, candidates=400, elites=20, iterations=8)
        plan = planner.plan(toy, start(2), UNIT)
        assert plan.action.shape == plan.mean.shape == plan.std.shape == (2, 6, 1)
        for actions in (*toy.calls, plan.action, plan.mean, plan.std):
            blocks = actions.view(-1, 2, 3)
            assert torch.equal(blocks, blocks[..., :1].expand_as(blocks))
        expected = torch.tensor([[0.2], [-0.7]]).repeat_interleave(3, 0)
        torch.testing.assert_close(plan.action, expected.expand(2, 6, 1), atol=0.05, rtol=0)

    def test_of_choices(self) -> None:
        codec = ActionCodec(ActionSpec("multi_discrete", nvec=(2, 5)))
        toy = Toy(lambda state, actions: ((actions == torch.tensor([1, 3])).sum(-1).float(), {}))
        plan = manual("cem", horizon=4, block=2).plan(toy, start(), codec)
        assert plan.action.tolist() == [[[1, 3]] * 4]
        assert all(torch.equal(actions[:, ::2], actions[:, 1::2]) for actions in toy.calls)

    def test_a_warm_start_is_the_mean_of_what_was_planned_for_a_block(self) -> None:
        toy = Toy(steps_to(torch.zeros(1)))
        planner = manual("cem", horizon=4, block=2, elites=5, iterations=1, init_std=1e-4)
        previous = torch.tensor([[[0.1], [0.5], [-0.9], [0.4]]])
        planner.plan(toy, start(), UNIT, previous=previous)
        expected = torch.tensor([[-0.2, -0.2, 0.2, 0.2]])
        torch.testing.assert_close(toy.calls[0].mean(0).T, expected, atol=1e-3, rtol=0)

    def test_the_own_policys_proposals_are_held(self) -> None:
        toy = Toy(steps_to(torch.zeros(1)), own=torch.tensor([[0.3], [0.6], [-0.5], [0.9]]))
        planner = manual("cem", horizon=4, block=2, candidates=50, elites=5, policy_candidates=3)
        planner.plan(toy, start(), UNIT)
        expected = torch.tensor([0.3, 0.3, -0.5, -0.5]).expand(3, 4)
        torch.testing.assert_close(toy.calls[0][-3:, :, 0], expected)

    @pytest.mark.parametrize("block", [0, 5, 24])
    def test_must_divide_the_horizon(self, block: int) -> None:
        with pytest.raises(UserError, match=f"a divisor of the horizon 12, got {block}"):
            CEM(block=block)


class TestWarmStart:
    previous = torch.tensor([[[0.1], [0.5], [-0.9]], [[0.0], [0.0], [0.0]]])

    @pytest.mark.parametrize("kind", ["cem", "mppi"])
    def test_shifts_the_previous_plan_and_zeros_start_afresh(self, kind: str) -> None:
        toy = Toy(steps_to(torch.zeros(1)))
        planner = manual(kind, horizon=3, candidates=100, iterations=1, init_std=1e-4)
        planner.plan(toy, start(2), UNIT, previous=self.previous)
        drawn = toy.calls[0].view(2, 100, 3)
        expected = torch.tensor([[0.5, -0.9, 0.0], [0.0, 0.0, 0.0]])
        torch.testing.assert_close(drawn.mean(1), expected, atol=1e-3, rtol=0)
        assert self.previous[0, 0, 0] == pytest.approx(0.1)  # left as it was

    def test_of_discrete_actions_stays_half_uniform(self) -> None:
        toy = Toy(lambda state, actions: (torch.zeros(actions.shape), {}))
        codec = ActionCodec(ActionSpec("discrete", nvec=(2,)))
        previous = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
        planner = manual("cem", horizon=2, candidates=4000, iterations=1)
        planner.plan(toy, start(2), codec, previous=previous)
        ones = toy.calls[0].view(2, 4000, 2).float().mean(1)
        expected = torch.tensor([[0.95 * 0.75 + 0.05 * 0.5, 0.5], [0.5, 0.5]])
        torch.testing.assert_close(ones, expected, atol=0.03, rtol=0)

    def test_helps_where_a_fresh_search_is_too_short(self) -> None:
        state = {"x": torch.zeros(1, 2), "goal": torch.tensor([[9.0, 80.0]])}
        planner = manual("cem", horizon=12, candidates=100, elites=10, iterations=2)
        plan = planner.plan(Toy(walk), state, BOX)
        for _ in range(4):
            state["x"] = state["x"] + plan.action[:, 0]
            plan = planner.plan(Toy(walk), state, BOX, previous=plan.mean)
        fresh = planner.plan(Toy(walk), state, BOX)
        assert plan.value > 0.85 * fresh.value  # values are negative

    def test_a_plan_of_another_horizon_is_no_start(self) -> None:
        with pytest.raises(RuntimeError):
            CEM(horizon=5).plan(Toy(walk), start(2), UNIT, previous=self.previous)


def test_the_last_reward_alone() -> None:
    reward = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, -6.0]])
    imagined = Imagined(reward, torch.ones_like(reward), {}, reward)
    assert last_reward(imagined).tolist() == [3.0, -6.0]


@pytest.mark.parametrize("kind", ["cem", "mppi"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_never_become_elites(kind: str, bad: float) -> None:
    # Positive actions would be the best but give no number; more of them than there are elites.
    def dream(state: State, actions: Tensor) -> tuple[Tensor, State]:
        reward = actions.sum(-1)
        return torch.where(actions[..., 0] > -0.9, bad, reward), {}

    planner = manual(kind, horizon=1, candidates=200, elites=100, iterations=1)
    plan = planner.plan(Toy(dream), start(), UNIT)
    assert plan.mean.item() < -0.9
    assert -1 <= plan.value.item() < -0.9
    assert plan.std.isfinite().all()


@pytest.mark.parametrize("kind", ["cem", "mppi"])
def test_no_finite_score_is_an_error_that_names_the_environment(kind: str) -> None:
    def dream(state: State, actions: Tensor) -> tuple[Tensor, State]:
        return actions.sum(-1) + state["x"], {}

    state = {"x": torch.tensor([[0.0], [float("nan")]])}
    with pytest.raises(UserError, match=r"environment 1 .*diverged"):
        manual(kind).plan(Toy(dream), state, UNIT)


class TestScores:
    reward = torch.tensor([[1.0, 2.0, 4.0], [1.0, 1.0, 1.0]])
    cont = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 1.0]])
    imagined = Imagined(reward, cont, {}, reward)

    def test_predicted_return(self) -> None:
        assert predicted_return(self.imagined).tolist() == [7.0, 3.0]

    def test_a_reward_counts_as_far_as_the_task_gets_to_it(self) -> None:
        assert continued_return(self.imagined).tolist() == [1 + 0.5 * 2 + 0.25 * 4, 1.0]

    def test_a_cost_to_a_goal(self) -> None:
        goals = torch.tensor([[1.5, 3.0], [-1.0, 8.0]])

        def closeness(imagined: Imagined) -> Tensor:
            last = imagined.state["x"][:, -1].unflatten(0, (2, -1))
            return -(last - goals.unsqueeze(1)).abs().sum(-1).flatten()

        state = {"x": torch.zeros(2, 2), "goal": torch.full((2, 2), 1e3)}
        plan = manual("cem", horizon=2).plan(Toy(walk), state, BOX, score=closeness)
        torch.testing.assert_close(plan.action.sum(1), goals, atol=0.05, rtol=0)


class TestPolicyCandidates:
    def test_are_offered_in_every_iteration(self) -> None:
        own = torch.tensor([[1.5, 9.0], [-1.5, 1.0]])
        toy = Toy(steps_to(own), own=own)
        options = {"horizon": 2, "candidates": 20, "elites": 1, "policy_candidates": 3}
        plan = manual("mppi", **options, iterations=4).plan(toy, start(2), BOX)
        for actions in toy.calls:
            last = actions.view(2, 20, 2, 2)[:, -3:]
            torch.testing.assert_close(last, own.expand(2, 3, 2, 2))
        torch.testing.assert_close(plan.action, own.expand(2, 2, 2))

    def test_of_discrete_actions(self) -> None:
        own = torch.tensor([2, 0, 1])
        toy = Toy(lambda state, actions: ((actions == own).float(), {}), own=own)
        codec = ActionCodec(ActionSpec("discrete", nvec=(3,)))
        options = {"horizon": 3, "candidates": 4, "elites": 1, "policy_candidates": 2}
        plan = manual("cem", **options, iterations=1).plan(toy, start(2), codec)
        assert plan.action.tolist() == [[2, 0, 1]] * 2


@pytest.mark.parametrize("kind", ["cem", "mppi"])
def test_the_seed_decides(kind: str) -> None:
    def plan(seed: int) -> Plan:
        return manual(kind, seed=seed).plan(Toy(steps_to(torch.ones(2))), start(2), BOX)

    first, second, other = plan(3), plan(3), plan(4)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first.mean, other.mean)


def test_defaults_are_of_the_papers() -> None:
    cem, mppi = CEM(), MPPI()
    assert (cem.horizon, cem.iterations, cem.candidates, cem.elites) == (12, 10, 1000, 100)
    assert (cem.init_std, cem.momentum, cem.policy_candidates) == (1.0, 0.0, 0)
    assert (mppi.horizon, mppi.iterations, mppi.candidates, mppi.elites) == (3, 6, 512, 64)
    assert (mppi.min_std, mppi.max_std, mppi.init_std) == (0.05, 2.0, 2.0)
    assert 1 / mppi.temperature == 0.5


def test_mppi_refuses_discrete_actions() -> None:
    codec = ActionCodec(ActionSpec("discrete", nvec=(3,)))
    with pytest.raises(UserError, match="MPPI cannot plan discrete actions: use CEM"):
        MPPI().plan(Toy(walk), start(), codec)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (CEM, {"horizon": 0}, "horizon of CEM must be at least 1, got 0"),
        (CEM, {"iterations": 0}, "iterations of CEM must be at least 1, got 0"),
        (CEM, {"elites": 1001}, r"elites of CEM must be in \[1, 1000\], got 1001"),
        (CEM, {"elites": 0}, "elites"),
        (CEM, {"momentum": 1.0}, r"momentum of CEM must be in \[0, 1\), got 1.0"),
        (CEM, {"init_std": 0.0}, "init_std of CEM must be positive, got 0.0"),
        (MPPI, {"policy_candidates": 512}, "policy_candidates of MPPI must be"),
        (MPPI, {"temperature": 0.0}, "temperature of MPPI must be positive"),
        (MPPI, {"min_std": 3.0}, "min_std of MPPI must be in"),
    ],
)
def test_refuses_what_makes_no_sense(kind: type[CEM], options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        kind(**options)
