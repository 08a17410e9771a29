"""Populations in dreams: one tensor does what one rollout after the other would."""

from __future__ import annotations

import pytest
import torch
from gymnasium.utils.env_checker import check_env
from latent_models import sequences, vectors
from torch import Tensor

from datamodules.spec import ActionSpec
from zoo.base import State
from zoo.dream_env import DreamEnv
from zoo.world_models.controller import Actions, Controller
from zoo.world_models.dreams import Dreamer, FixedMembers, LinearMembers, dream
from zoo.world_models.memory import Memory
from zoo.world_models.module import WorldModels

Z, H, P, R = 3, 8, 5, 4
ACTIONS = Actions(ActionSpec("discrete", nvec=(2,)))


def features(state: State) -> Tensor:
    return torch.cat([state["z"], state["h"]], -1)


def memory(**options: object) -> Memory:
    torch.manual_seed(0)
    return Memory(Z, 2, H, **options)  # type: ignore[arg-type]


def population() -> tuple[Controller, Tensor]:
    controller = Controller(Z + H, 2)
    return controller, torch.randn(P, controller.size, generator=torch.Generator().manual_seed(1))


def scores(m: Memory, flat: Tensor, horizon: int = 40, threshold: bool = False, seed: int = 3):
    controller, _ = population()
    members = LinearMembers(controller.population(flat), ACTIONS, features)
    start = torch.randn(R, Z, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(seed)
    return dream(Dreamer(m, 1.0, threshold), members, len(flat), start, horizon)


def test_recalls_as_the_memory_does() -> None:
    m = memory(restart=True)
    state = {"z": torch.randn(6, Z), "h": torch.randn(6, H), "c": torch.randn(6, H)}
    state["first"] = torch.tensor([True, False] * 3)
    action = torch.randn(6, 2)
    for ours, theirs in zip(Dreamer(m).recall(state, action), m.step(state, action), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("threshold", [False, True])
def test_all_members_at_once_are_each_alone(threshold: bool) -> None:
    m = memory()
    assert m.done_head is not None
    with torch.no_grad():
        m.done_head.out.weight.mul_(20)
        m.done_head.out.bias.fill_(-1.0)
    _, flat = population()
    together = scores(m, flat, threshold=threshold)
    assert len(together.length.unique()) > 1  # some end sooner: the masks matter
    for p in range(P):
        alone = scores(m, flat[p : p + 1], threshold=threshold)
        torch.testing.assert_close(alone.reward[0], together.reward[p])
        assert torch.equal(alone.length[0], together.length[p])


def test_nothing_is_earned_after_the_end() -> None:
    m = memory(step_reward=1.0)
    assert m.done_head is not None
    with torch.no_grad():
        m.done_head.out.weight.zero_()
        m.done_head.out.bias.fill_(100.0)
    found = scores(m, population()[1])
    assert torch.equal(found.reward, torch.ones(P, R))  # the step that ends it still counts
    assert torch.equal(found.length, torch.ones(P, R))


def test_horizon_and_one_a_step() -> None:
    m = memory(step_reward=1.0, predict_done=False)
    for horizon in (1, 8, 13):
        assert torch.equal(scores(m, population()[1], horizon).reward, torch.full((P, R), horizon))


def test_ends_come_as_often_as_the_head_says() -> None:
    """Of log-odds that the loss has raised by ln(done_weight)."""
    m = memory(step_reward=1.0, done_weight=10.0)
    assert m.done_head is not None
    with torch.no_grad():
        m.done_head.out.weight.zero_()
        m.done_head.out.bias.fill_(
            float(torch.logit(torch.tensor(0.2)) + torch.log(torch.tensor(10.0)))
        )
    members = FixedMembers([torch.eye(2)])
    torch.manual_seed(0)
    found = dream(Dreamer(m), members, 1, torch.zeros(4000, Z), 200)
    assert abs(float(found.length.mean()) - 5.0) < 0.3
    sharp = dream(Dreamer(m, threshold=True), members, 1, torch.zeros(4, Z), 200)
    assert float(sharp.length.mean()) == 1.0  # 0.2 became more likely than not


def test_halts_where_no_data_was() -> None:
    m = memory(step_reward=1.0, predict_done=False, halt_outside=0.5, mixtures=0, delta=True)
    m.low.fill_(-1.0)
    m.high.fill_(1.0)
    with torch.no_grad():
        m.out.weight.zero_()
        m.out.bias.fill_(0.3)  # z walks by 0.3 a step, from 0 to beyond 1 + half of 2
    found = dream(Dreamer(m), FixedMembers([torch.eye(2)]), 1, torch.zeros(2, Z), 50)
    assert torch.equal(found.length, torch.full((1, 2), 7.0))


def test_no_dream_earns_more_than_anybody_did() -> None:
    m = memory(predict_done=False)
    assert m.reward_head is not None
    with torch.no_grad():
        for parameter in m.reward_head.parameters():
            parameter.fill_(0.0)
        list(m.reward_head.parameters())[-1].fill_(5.0)
    members = FixedMembers([torch.eye(2)])
    assert (dream(Dreamer(m), members, 1, torch.zeros(2, Z), 3).reward == 15.0).all()
    m.rewards.copy_(torch.tensor([-1.0, 2.0]))
    assert (dream(Dreamer(m), members, 1, torch.zeros(2, Z), 3).reward == 6.0).all()


def test_fixed_members_draw_their_own_actions() -> None:
    choices = [torch.tensor([[1.0, 0.0]]), torch.eye(2)]
    drawn = FixedMembers(choices).act({"z": torch.zeros(2, 500, Z)})
    assert torch.equal(drawn[0], torch.tensor([1.0, 0.0]).expand(500, 2))
    assert 0.4 < float(drawn[1, :, 0].mean()) < 0.6
    kept = FixedMembers(choices).select(torch.tensor([1]))
    assert torch.equal(kept.choices[0], torch.eye(2))


def test_hotter_dreams_spread_more() -> None:
    m = memory(predict_done=False)
    spread = []
    for temperature in (0.1, 1.3):
        dreamer = Dreamer(m, temperature)
        state = {"z": torch.zeros(5000, Z), "h": torch.zeros(5000, H), "c": torch.zeros(5000, H)}
        state["first"] = torch.zeros(5000, dtype=torch.bool)
        spread.append(float(dreamer.step(state, torch.zeros(5000, 2)).z.std(0).mean()))
    assert spread[1] > 2 * spread[0]


@pytest.mark.filterwarnings("ignore:.*Box observation space")
@pytest.mark.parametrize("kind", ["discrete", "box", "multi_discrete"])
def test_is_an_environment_with_a_temperature(kind: str) -> None:
    spec = vectors(kind)
    torch.manual_seed(0)
    model = WorldModels(spec, size="nano", hidden=8)
    batch = sequences(spec)
    check_env(DreamEnv(model, batch, context=1), skip_render_check=True)
    states = model.observe(batch)
    state = {key: value[:1, 0].repeat_interleave(100, 0) for key, value in states.items()}
    spreads = []
    for temperature in (0.01, 1.0, 100.0):
        torch.manual_seed(1)
        spreads.append(model.imagine(state, None, 1, temperature).state["z"].std().item())
    assert spreads == sorted(spreads) and spreads[2] > 3 * spreads[0]
