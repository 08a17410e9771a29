"""The epochs, the practice in dreams that go on, acting and dreaming."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from datamodules.errors import UserError
from datamodules.spec import ActionSpec, ArraySpec, Spec
from zoo.diamond.denoiser import to_float
from zoo.diamond.lstm import Memory
from zoo.diamond.module import PARTS, Clock, Diamond
from zoo.diamond.practice import starts_of
from zoo.diamond.sampler import SAMPLERS, Sampler
from zoo.dream_env import DreamVectorEnv

DENOISER, REWARD_END, AGENT = PARTS


def test_the_epochs(model: Diamond) -> None:
    seen = []
    for model.updates in range(12):
        seen.append(model.clock)
    first = [(DENOISER, 0), (DENOISER, 1)] + [(REWARD_END, i) for i in range(3)] + [(AGENT, 0)]
    second = [(DENOISER, 2), (AGENT, 1), (AGENT, 2)]
    third = [(DENOISER, 3), (AGENT, 3), (AGENT, 4)]
    wanted = [Clock(0, *c) for c in first] + [Clock(1, *c) for c in second]
    assert seen == wanted + [Clock(2, *c) for c in third]


def test_the_papers_updates(spec: Spec) -> None:
    model = Diamond(spec)
    clocks = {}
    for model.updates in (0, 9_999, 10_000, 20_000, 24_999, 25_000, 25_400, 25_800, 26_200):
        clocks[model.updates] = model.clock
    assert clocks == {
        0: Clock(0, DENOISER, 0),
        9_999: Clock(0, DENOISER, 9_999),
        10_000: Clock(0, REWARD_END, 0),
        20_000: Clock(0, AGENT, 0),
        24_999: Clock(0, AGENT, 4_999),
        25_000: Clock(1, DENOISER, 10_000),
        25_400: Clock(1, REWARD_END, 10_000),
        25_800: Clock(1, AGENT, 5_000),
        26_200: Clock(2, DENOISER, 10_400),
    }


def test_updates_due_are_whole_epochs(model: Diamond) -> None:
    for blocks in range(4):
        model.updates = model.updates_due(blocks)
        assert model.clock.epoch == blocks + 1
        model.updates -= 1
        assert model.clock.epoch == blocks


def test_what_an_update_reads(model: Diamond) -> None:
    steps = {}
    for model.updates in (0, 2, 5):
        steps[model.clock.part] = model.prepare_batch(None).steps
    assert steps == {DENOISER: 6, REWARD_END: None, AGENT: 4}


@pytest.mark.parametrize(("updates", "part"), [(0, DENOISER), (2, REWARD_END), (5, AGENT)])
def test_an_update_moves_one_part(
    model: Diamond, batch: dict[str, Any], updates: int, part: str
) -> None:
    model.updates = updates
    optimizer = model.configure_optimizers()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.training_step(batch, 0).backward()
    model.on_before_optimizer_step(optimizer)
    optimizer.step()
    moved = {n.split(".")[0] for n, v in model.state_dict().items() if not v.equal(before[n])}
    assert moved == {part}
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-6)  # the warm-up's first of 100


def test_gradients_are_clipped(model: Diamond) -> None:
    optimizer = model.configure_optimizers()
    for limit, model.updates in ((1.0, 0), (100.0, 2), (100.0, 5)):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1e3)
        model.on_before_optimizer_step(optimizer)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert float(torch.stack([g.norm() for g in grads]).norm()) == pytest.approx(
            limit, rel=1e-4
        )


def test_only_weights_of_the_world_decay(model: Diamond) -> None:
    decays, stays, agent = model.configure_optimizers().param_groups
    decaying = {id(p) for p in decays["params"]}
    assert decays["weight_decay"] == 0.01
    assert stays["weight_decay"] == agent["weight_decay"] == 0
    for name, parameter in model.named_parameters():
        wanted = name.endswith(("weight", "weight_ih", "weight_hh")) and "norm" not in name
        wanted = wanted and not name.endswith("action.weight")
        assert (id(parameter) in decaying) == (wanted and not name.startswith(AGENT)), name


def endless(model: Diamond) -> None:
    """No dream ends by itself; every reward is 1."""
    head = model.reward_end_model.head[-1]
    hidden = model.reward_end_model.head[0]
    with torch.no_grad():
        hidden.weight.zero_()
        hidden.bias.fill_(10.0)
        head.weight.zero_()
        head.weight[2] = head.weight[3] = 1.0


def test_dreams_go_on_from_update_to_update(model: Diamond, batch: dict[str, Any]) -> None:
    torch.manual_seed(0)
    endless(model)
    model.updates = 5
    model.horizon = 4
    model.training_step(batch, 0)
    dreams = model._dreams
    assert dreams is not None
    assert dreams["age"].tolist() == [0] * 5  # all were cut in the last step and began anew
    dreams["age"] += torch.tensor([0, 1, 2, 3, 0])
    before = dreams["frames"].clone()
    # The starts are known by their frames; one dream that is not cut keeps its history.
    starts = starts_of(model.observe(batch), batch["is_last"])["frames"]
    assert all((frames == starts).flatten(1).all(1).any() for frames in before)
    model.horizon = 5
    model.training_step(batch, 0)
    assert model._dreams is not None
    assert model._dreams["age"].tolist() == [0, 1, 2, 3, 0]
    assert not any(value.requires_grad for value in model._dreams.values())


def test_an_ended_dream_begins_anew(model: Diamond, batch: dict[str, Any]) -> None:
    torch.manual_seed(0)
    endless(model)
    model.reward_end_model.head[-1].weight.data[4] = 2.0  # rather, all end at once
    model.updates = 5
    model.training_step(batch, 0)
    assert model._dreams is not None
    assert model._dreams["age"].tolist() == [0] * 5
    starts = starts_of(model.observe(batch), batch["is_last"])["frames"]
    assert all((f == starts).flatten(1).all(1).any() for f in model._dreams["frames"])


def test_practice_prefers_what_earns(spec: Spec, batch: dict[str, Any]) -> None:
    """A world that pays for action 1 only: the policy's gradient raises its logit."""
    torch.manual_seed(0)
    model = Diamond(spec, size="nano", first_updates=[0, 0, 1], dreams=64, horizon=3, entropy=0.0)

    def features(frame: Tensor, following: Tensor, action: Tensor) -> Tensor:
        return 20 * action

    model.reward_end_model.features = features  # type: ignore[method-assign, assignment]
    model.reward_end_model.lstm = Passing()  # type: ignore[assignment]
    head = torch.nn.Linear(3, 5, bias=False)
    model.reward_end_model.head = torch.nn.Sequential(head)
    with torch.no_grad():
        head.weight.zero_()
        head.weight[2, 1] = 1.0  # reward 1 for action 1
        head.weight[1, [0, 2]] = 1.0
        head.weight[3] = 1.0  # and on
    model.training_step(batch, 0).backward()
    grad = model.actor_critic.actor.bias.grad
    assert grad is not None
    assert grad[1] < -0.05
    assert (grad[[0, 2]] > 0).all()
    assert model.actor_critic.critic.bias.grad < 0  # values are to rise


class Passing(torch.nn.Module):
    """In place of an LSTM, without a memory."""

    def forward(self, x: Tensor, memory: Memory) -> Memory:
        return Memory(x, x)

    def steps(self, x: Tensor, first: Tensor) -> Memory:
        met = torch.nn.functional.pad(x, (0, 0, 1, 0))
        return Memory(met, met)


def test_histories_stop_at_the_beginning_of_the_episode(
    model: Diamond, batch: dict[str, Any]
) -> None:
    state = model.observe(batch)
    image = batch["obs"]["image"]
    assert state["frames"].shape == (3, 7, 4, 16, 20, 3)
    assert torch.equal(state["frames"][:, 5], image[:, 2:6])
    assert state["known"][0].int().tolist() == [
        [0, 0, 0, 1],
        [0, 0, 1, 1],
        [0, 1, 1, 1],
        [0, 0, 0, 1],
        [0, 0, 1, 1],
        [0, 1, 1, 1],
        [1, 1, 1, 1],
    ]
    actions = model.codec.encode(batch["action"])
    assert torch.equal(state["past_actions"][:, 5], actions[:, 2:5])
    for key in ("end_h", "agent_h"):
        assert (state[key][0, [0, 3]] == 0).all()
        assert (state[key][0, 4] != 0).any()
    torch.testing.assert_close(model.decode(state)["image"], image / 255)


def test_acting_and_burning_in_are_the_same(model: Diamond, batch: dict[str, Any]) -> None:
    state, memory = model.observe(batch), model.initial_state(3)
    for t in range(3):
        torch.testing.assert_close(memory["agent_h"], state["agent_h"][:, t])
        obs = {"image": batch["obs"]["image"][:, t]}
        _, memory = model.act(obs, memory, explore=False)


def test_the_value_is_of_the_newest_frame_after_what_the_agent_remembers(
    model: Diamond, batch: dict[str, Any]
) -> None:
    for parameter in model.actor_critic.parameters():  # the critic's output starts at 0
        nn.init.normal_(parameter, std=0.1)
    state = {key: value[:, -1] for key, value in model.observe(batch).items()}
    memory = Memory(state["agent_h"], state["agent_c"])
    newest = to_float(batch["obs"]["image"][:, -1])
    wanted = model.actor_critic(newest, memory)[1]
    assert wanted.abs().min() > 0
    torch.testing.assert_close(model.value(state), wanted)
    assert not torch.allclose(model.value({**state, "agent_h": state["agent_h"] + 1}), wanted)


def test_a_dreamed_step(model: Diamond, batch: dict[str, Any]) -> None:
    torch.manual_seed(0)
    start = {key: value[:, -1] for key, value in model.observe(batch).items()}
    given = batch["action"][:, :2]
    dream = model.imagine(start, given, 2)
    frames = dream.state["frames"]
    assert torch.equal(frames[:, 0, :3], start["frames"][:, 1:])
    assert torch.equal(frames[:, 1, :3], frames[:, 0, 1:])
    wanted = model.codec.encode(given)
    assert torch.equal(dream.state["past_actions"][:, 1, -2:], wanted)
    assert dream.state["known"][:, 1].all()
    assert (dream.reward.abs() <= 1).all()
    # What is not known is not seen.
    model.denoiser.network.requires_grad_(False)
    seen: list[Tensor] = []
    model.denoiser.network.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    hidden = {**start, "known": start["known"].clone()}
    hidden["known"][:, :2] = False
    model.imagine(hidden, given, 1)
    assert (seen[0][:, :6] == 0).all()
    torch.testing.assert_close(seen[0][:, 6:] / 2, to_float(start["frames"][:, 2:]).flatten(1, 2))


def test_dreams_as_environments(model: Diamond, batch: dict[str, Any]) -> None:
    envs = DreamVectorEnv(model, batch, 2, observations="decoded", horizon=3, context=1)
    obs, _ = envs.reset(seed=0)
    assert obs.shape == (2, 16, 20, 3)
    again = [envs.step(envs.action_space.sample() * 0)[0] for _ in range(3)]
    envs.reset(seed=0)
    for wanted in again:
        assert (envs.step(envs.action_space.sample() * 0)[0] == wanted).all()


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"first_updates": [1, 2]}, "first_updates"),
        ({"epoch_updates": [0, 0, 0]}, "epoch_updates"),
        ({"epoch_updates": [1, -1, 0]}, "epoch_updates"),
        ({"horizon": 0}, "horizon"),
        ({"past": 3}, "past that divides 64, got 3"),
        ({"size": "huge"}, "size"),
        ({"discount": 1.5}, "discount"),
        ({"first_updates": 5}, "first_updates"),
        ({"first_updates": [1.5, 1, 1]}, "three whole numbers"),
        ({"horizon": 15.0}, "whole horizon, got 15.0"),
        ({"autoregressive_steps": 0.5}, "whole autoregressive_steps"),
        ({"dreams": 2.5}, "whole dreams"),
        ({"sampler": "best"}, "no sampler 'best': choose one of published, faithful"),
        ({"sampler": {"steps": 0}}, "steps"),
        ({"sampler": {"steps": 1.5}}, "whole steps"),
        ({"sampler": {"levels": 3}}, "no 'levels': choose from steps, sigma_min"),
        ({"sampler": None}, "no sampler None: give one of published, faithful, or arguments"),
        ({"sampler": {"sigma_max": float("inf")}}, "sigma_max from 0.002 to"),
        ({"lr": float("nan")}, "lr > 0, got nan"),
        ({"sigma_loc": float("nan")}, "sigma_loc from -20"),
        ({"first_updates": [0, 0, 0], "epoch_updates": [0, 0, 4]}, "must learn, too"),
        ({"first_updates": [1, 0, 0], "epoch_updates": [1, 0, 4]}, "must learn, too"),
    ],
)
def test_refuses_arguments(spec: Spec, bad: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Diamond(spec, **{"size": "nano", **bad})


def test_refuses_other_observations(spec: Spec) -> None:
    vector = {"vector": ArraySpec((4,), "float32")}
    for obs in (vector, {**spec.obs, **vector}):
        with pytest.raises(UserError, match="one image"):
            Diamond(Spec(obs, ActionSpec("discrete", nvec=(2,))), size="nano")


def test_refuses_tiny_images() -> None:
    tiny = Spec({"image": ArraySpec((16, 6, 3), "uint8")}, ActionSpec("discrete", nvec=(2,)))
    with pytest.raises(UserError, match=r"16x6.*need 8"):
        Diamond(tiny, size="nano")


def test_a_world_model_alone(spec: Spec, batch: dict[str, Any]) -> None:
    model = Diamond(
        spec, size="nano", first_updates=[1, 0, 0], epoch_updates=[1, 0, 0], past_sigma=0.005
    )
    for model.updates in range(3):
        assert model.clock.part == DENOISER
    only = {key: batch[key] for key in ("obs", "action", "is_first")}
    model.training_step(only, 0).backward()
    assert model.last_losses.keys() == {"denoiser"}
    start = {key: value[:, -1] for key, value in model.observe(batch).items()}
    dream = model.imagine(start, batch["action"], 2)
    assert dream.state["frames"].shape[:2] == (3, 2)
    assert (dream.reward == 0).all()
    assert (dream.cont == 1).all()


def test_sequences_of_one_step_are_refused(model: Diamond, batch: dict[str, Any]) -> None:
    single = {key: batch[key][:, :1] for key in ("action", "is_first")}
    with pytest.raises(UserError, match="the batch has 1 step: set sequence_length to 6"):
        model.training_step({**single, "obs": {"image": batch["obs"]["image"][:, :1]}}, 0)


def test_samplers(spec: Spec) -> None:
    assert Diamond(spec, size="nano").sampler == SAMPLERS["published"] == Sampler()
    model = Diamond(spec, size="nano", sampler="faithful")
    assert model.sampler == Sampler(5, sigma_min=0.05, sigma_max=5.0, order=2, start_std=5.0)
    model = Diamond(spec, size="nano", sampler={"steps": 7, "sigma_min": 0.1})
    assert model.sampler == Sampler(7, sigma_min=0.1)
    assert model.hparams["sampler"] == {"steps": 7, "sigma_min": 0.1}


def test_other_numbers_of_dreams_begin_anew(spec: Spec, batch: dict[str, Any]) -> None:
    def make(dreams: int) -> Diamond:
        return Diamond(spec, size="nano", first_updates=[0, 0, 9], dreams=dreams, horizon=2)

    checkpoint: dict[str, Any] = {}
    model = make(5)
    model.training_step(batch, 0)
    model.on_save_checkpoint(checkpoint)
    for dreams in (3, 5):
        other = make(dreams)
        other.on_load_checkpoint(checkpoint)
        assert (other._dreams is None) == (dreams == 3)
        other.training_step(batch, 0)
        assert other._dreams is not None
        assert len(other._dreams["age"]) == dreams


def test_dreams_see_box_actions_as_the_environment_does(batch: dict[str, Any]) -> None:
    """Samples of a normal may leave the box."""
    torch.manual_seed(0)
    action = ActionSpec("box", low=(-2.0,), high=(2.0,))
    model = Diamond(Spec({"image": ArraySpec((16, 20, 3), "uint8")}, action), size="nano")
    states = model.observe({**batch, "action": torch.zeros(3, 7, 1)})
    start = {key: value[:, -1] for key, value in states.items()}
    sampled = torch.tensor([[3.0], [-1.5], [0.5]])
    following, _ = model.dream.step(start, sampled)
    assert following["past_actions"][:, -1, 0].tolist() == [1.0, -1.0, 0.5]
    seen: list[Tensor] = []
    model.reward_end_model.action.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.denoiser.network.action.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.dream.step(start, sampled)
    assert all(float(action.abs().max()) == 1.0 for action in seen)
    assert len(seen) == 2
