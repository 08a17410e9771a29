"""Decision Transformer against the paper's description, and against mistakes made elsewhere."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from recordings import Memory, recorded, store_at
from torch import Tensor

import zoo.decision_transformer.module
from datamodules import EnvDataModule, OfflineDataModule
from datamodules.errors import UserError
from datamodules.spec import ActionSpec, ArraySpec, Spec
from zoo.decision_transformer.module import SIZES, DecisionTransformer, schedule

BOX = ActionSpec("box", low=(-2.0, 0.0, -1.0), high=(2.0, 1.0, 1.0))
ACTIONS = {
    "box": BOX,
    "discrete": ActionSpec("discrete", nvec=(3,)),
    "multi_discrete": ActionSpec("multi_discrete", nvec=(2, 4)),
}
HOPPER = Spec(
    {"vector": ArraySpec((11,), "float32")}, ActionSpec("box", low=(-1.0,) * 3, high=(1.0,) * 3)
)
B, K = 3, 6


def spec(action: str = "box") -> Spec:
    return Spec({"vector": ArraySpec((5,), "float32")}, ACTIONS[action])


def images() -> Spec:
    return Spec({"image": ArraySpec((40, 40, 1), "uint8")}, ACTIONS["discrete"])


def build(spec: Spec, **options: Any) -> DecisionTransformer:
    """Small, without dropout, with weights that are far from their start."""
    torch.manual_seed(0)
    options = {"width": 16, "layers": 3, "heads": 2, "context": K, "dropout": 0.0, **options}
    model = DecisionTransformer(spec, max_timestep=60, return_scale=10.0, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    if model.tokens.vectors:
        model.tokens.obs_mean.uniform_(-1, 1)
        model.tokens.obs_std.uniform_(0.5, 2)
    return model


def contexts(spec: Spec, steps: int = K, seed: int = 1) -> dict[str, Any]:
    """Random contexts; the first row begins with two steps of padding."""
    generator = torch.Generator().manual_seed(seed)
    lead = (B, steps)
    obs = {}
    for key, array in spec.obs.items():
        if array.is_image:
            obs[key] = torch.randint(256, (*lead, *array.shape), generator=generator).byte()
        else:
            obs[key] = torch.randn(*lead, *array.shape, generator=generator)
    act = spec.action
    unit = torch.rand(*lead, act.shape[0] if act.shape else 1, generator=generator)
    if act.kind == "box":
        low, high = torch.tensor(act.low), torch.tensor(act.high)
        action = low + unit * (high - low)
    else:
        action = (unit * torch.tensor(act.nvec)).long()
        action = action if act.shape else action[..., 0]
    start = torch.tensor([0, 7, 30])[:, None]
    batch = {
        "obs": obs,
        "action": action,
        "reward": torch.randn(*lead, generator=generator),
        "return_to_go": 10 * torch.randn(*lead, generator=generator),
        "timestep": start + torch.arange(steps),
        "mask": torch.ones(lead, dtype=torch.bool),
    }
    batch["mask"][0, :2] = False
    batch["timestep"][0] = (torch.arange(steps) - 2).clamp(min=0)
    return batch


def predicted(model: DecisionTransformer, batch: dict[str, Any]) -> Tensor:
    """Means of box actions, or log-probabilities, (B, K, A)."""
    output: Any = model.predict(batch)
    return output.pred() if model.spec.action.kind == "box" else torch.cat(output.log_probs, -1)


# The paper's description, section 3 and appendix A, as plain formulas over one trajectory.


def reference(model: DecisionTransformer, batch: dict[str, Any], row: int) -> Tensor:
    """Raw outputs (n, A) for the n valid steps of a row, from the model's weights.

    Nothing is shared with the model but the numbers: tokens are put in order one by one, each
    attends to those before it in a loop, and padding simply is not there.
    """
    w = dict(model.state_dict())
    valid = batch["mask"][row]
    mean, std = w["tokens.obs_mean"], w["tokens.obs_std"]
    states = (batch["obs"]["vector"][row, valid] - mean) / (std + 1e-6)
    actions = model.actions.encode(batch["action"][row, valid])
    returns = batch["return_to_go"][row, valid, None] / model.return_scale
    time = w["time.step.weight"][batch["timestep"][row, valid]]
    sequence = []
    for r, s, a, t in zip(returns, states, actions, time, strict=True):
        sequence.append(r @ w["tokens.return_.weight"].T + w["tokens.return_.bias"] + t)
        sequence.append(s @ w["tokens.state.weight"].T + w["tokens.state.bias"] + t)
        sequence.append(a @ w["tokens.action.weight"].T + w["tokens.action.bias"] + t)
    x = norm(torch.stack(sequence), w, "time.norm")
    for layer in range(len(model.transformer.blocks)):
        name = f"transformer.blocks.{layer}"
        x = x + attention(norm(x, w, f"{name}.attention_norm"), w, name, model)
        hidden = norm(x, w, f"{name}.mlp_norm") @ w[f"{name}.up.weight"].T + w[f"{name}.up.bias"]
        x = x + hidden.clamp(min=0) @ w[f"{name}.down.weight"].T + w[f"{name}.down.bias"]
    x = norm(x, w, "transformer.norm")
    return x[1::3] @ w["head.weight"].T + w["head.bias"]


def norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    spread = (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return (x - x.mean(-1, keepdim=True)) / spread * w[f"{name}.weight"] + w[f"{name}.bias"]


def attention(x: Tensor, w: dict[str, Tensor], name: str, model: DecisionTransformer) -> Tensor:
    heads = model.transformer.blocks[0].heads
    q, k, v = (x @ w[f"{name}.qkv.weight"].T + w[f"{name}.qkv.bias"]).chunk(3, -1)
    seen = []
    for t in range(len(x)):
        parts = []
        for qh, kh, vh in zip(
            q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True
        ):
            logits = kh[: t + 1] @ qh[t] / math.sqrt(qh.shape[-1])
            parts.append(logits.softmax(0) @ vh[: t + 1])
        seen.append(torch.cat(parts))
    return torch.stack(seen) @ w[f"{name}.project.weight"].T + w[f"{name}.project.bias"]


@pytest.mark.parametrize("action", list(ACTIONS))
@pytest.mark.parametrize("heads", [1, 2])
@torch.no_grad()
def test_outputs_equal_the_papers_formulas(action: str, heads: int) -> None:
    model, batch = build(spec(action), heads=heads), contexts(spec(action))
    ours = predicted(model, batch)
    for row in range(B):
        raw = reference(model, batch, row)
        if action == "box":
            wanted = torch.tanh(raw)
        else:
            nvec = ACTIONS[action].nvec
            wanted = torch.cat([part.log_softmax(-1) for part in raw.split(nvec, -1)], -1)
        torch.testing.assert_close(ours[row, batch["mask"][row]], wanted, rtol=0, atol=1e-5)


def test_parameters_at_the_papers_hopper_size() -> None:
    width, layers, obs, actions, steps = 128, 3, 11, 3, 1000
    norm, linear = 2 * width, lambda a, b: (a + 1) * b
    block = 2 * norm + linear(width, 3 * width) + linear(width, width)
    block += linear(width, 4 * width) + linear(4 * width, width)
    tokens = linear(1, width) + linear(obs, width) + linear(actions, width) + steps * width + norm
    ours = tokens + layers * block + norm + linear(width, actions)
    model = DecisionTransformer(HOPPER)
    assert sum(p.numel() for p in model.parameters()) == ours == 726_019
    # The official code has heads for states and returns, and a word embedding, that learn nothing.
    assert ours + linear(width, obs) + linear(width, 1) + width == 727_695


def test_the_counts_of_the_readme() -> None:
    text = (Path(zoo.decision_transformer.module.__file__).parent / "README.md").read_text()
    for size in SIZES:
        (count,) = re.findall(rf"^\| `{size}`.*\| ([\d,]+) \|$", text, re.MULTILINE)
        model = DecisionTransformer(HOPPER, size=size)
        assert sum(p.numel() for p in model.parameters()) == int(count.replace(",", ""))


# Mistakes of other implementations


@torch.no_grad()
def test_modalities_are_interleaved() -> None:
    """A later step's return must not reach an earlier action, but the same step's does."""
    model, batch = build(spec()), contexts(spec())
    before = predicted(model, batch)
    for key in ("return_to_go", "obs"):
        changed = contexts(spec())
        target = changed[key] if key == "return_to_go" else changed[key]["vector"]
        target[:, 3] += 1.0
        moved = (predicted(model, changed) - before).abs().amax((0, 2)) > 1e-6
        assert moved.tolist() == [False] * 3 + [True] * 3, key


@torch.no_grad()
def test_an_action_is_not_seen_by_its_own_prediction() -> None:
    model, batch, changed = build(spec()), contexts(spec()), contexts(spec())
    changed["action"][:, 3] *= 0.5
    moved = (predicted(model, changed) - predicted(model, batch)).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [False] * 4 + [True] * 2


@pytest.mark.parametrize("action", list(ACTIONS))
def test_padding_is_not_seen_and_not_counted(action: str) -> None:
    model, batch, changed = build(spec(action)), contexts(spec(action)), contexts(spec(action))
    padding = ~batch["mask"]
    changed["obs"]["vector"][padding] = 50.0
    changed["return_to_go"][padding] = -7.0
    changed["timestep"][padding] = 11
    changed["action"][padding] = 1
    ours, theirs = model.training_step(batch, 0), model.training_step(changed, 0)
    torch.testing.assert_close(ours, theirs)
    cut = {k: v[:1, 2:] for k, v in batch.items() if k != "obs"}
    cut["obs"] = {"vector": batch["obs"]["vector"][:1, 2:]}
    alone = {k: v[:1] for k, v in batch.items() if k != "obs"}
    alone["obs"] = {"vector": batch["obs"]["vector"][:1]}
    torch.testing.assert_close(model.training_step(alone, 0), model.training_step(cut, 0))


def test_the_loss_is_the_mean_over_valid_steps_and_dimensions() -> None:
    model, batch = build(spec()), contexts(spec())
    target = model.actions.encode(batch["action"])
    error = (predicted(model, batch) - target).square()[batch["mask"]]
    assert len(error) == B * K - 2
    torch.testing.assert_close(model.training_step(batch, 0), error.mean())

    model, batch = build(spec("discrete")), contexts(spec("discrete"))
    log_probs = predicted(model, batch)[batch["mask"]]
    wanted = F.nll_loss(log_probs, batch["action"][batch["mask"]])
    torch.testing.assert_close(model.training_step(batch, 0), wanted)


@torch.no_grad()
def test_the_embedded_input_is_normalised() -> None:
    model, batch = build(spec()), contexts(spec())
    seen: list[Tensor] = []
    model.transformer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.time.norm.reset_parameters()
    model.predict(batch)
    (x,) = seen
    torch.testing.assert_close(x.mean(-1), torch.zeros(x.shape[:-1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        x.var(-1, unbiased=False), torch.ones(x.shape[:-1]), atol=1e-3, rtol=0
    )


@torch.no_grad()
def test_time_is_that_of_the_episode_and_added_to_all_tokens_of_the_step() -> None:
    model = build(spec())
    x = torch.zeros(1, 6, 16)
    timestep = torch.tensor([[4, 4, 4, 5, 5, 5]])
    model.time.norm.reset_parameters()
    embedded = model.time(x, timestep, torch.arange(6)[None])
    assert torch.equal(embedded[0, 0], embedded[0, 2])
    assert not torch.equal(embedded[0, 2], embedded[0, 3])
    torch.testing.assert_close(
        embedded[0, 0], F.layer_norm(model.time.step.weight[4], (16,)), rtol=1e-4, atol=1e-5
    )


# Acting


def play(
    model: DecisionTransformer, batch: dict[str, Any], explore: bool = False
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Acts on the observations and rewards of a batch: encoded actions, and states."""
    state, actions, states = model.initial_state(B), [], []
    for t in range(batch["reward"].shape[1]):
        if t:
            state = model.rewarded(state, batch["reward"][:, t])
        obs = {key: value[:, t] for key, value in batch["obs"].items()}
        _, state = model.act(obs, state, explore=explore)
        actions.append(state["action"])
        states.append(state)
    return actions, states


def window(
    model: DecisionTransformer, batch: dict[str, Any], actions: list[Tensor], t: int, steps: int
) -> dict[str, Any]:
    """The context of `steps` steps up to t of what `play` did; the action at t is not known yet."""
    target = model.target_return or 0.0
    earned = torch.cat([torch.zeros(B, 1), batch["reward"][:, 1:]], 1).cumsum(1)
    chosen = torch.stack(
        [model.actions.decode(a) for a in actions[:t]] + [torch.zeros_like(batch["action"][:, 0])],
        1,
    )
    part = slice(t + 1 - steps, t + 1)
    return {
        "obs": {key: value[:, part] for key, value in batch["obs"].items()},
        "action": chosen[:, part],
        "return_to_go": (target - earned)[:, part],
        "timestep": torch.arange(t + 1)[part].expand(B, -1),
        "mask": torch.ones(B, steps, dtype=torch.bool),
    }


CASES = [
    ("box", {}),
    ("discrete", {"condition_on_returns": False}),
    ("multi_discrete", {"variant": "atari"}),
    ("box", {"context_hop": 1}),
    ("discrete", {"context_hop": 5, "variant": "atari"}),
]


@pytest.mark.parametrize(("action", "options"), CASES)
@torch.no_grad()
def test_acting_with_the_cache_equals_reading_the_whole_context(
    action: str, options: dict[str, Any]
) -> None:
    model, batch = build(spec(action), **options).eval(), contexts(spec(action), steps=3 * K)
    if model.kinds == 3:
        model.target_return = 25.0
    actions, states = play(model, batch)
    length = 0
    for t, state in enumerate(states):
        length = length + 1 if length < K else K - model.hop + 1
        assert (state["length"] == length).all()
        assert length == min(t + 1, K) or K - model.hop < length <= K
        output: Any = model.predict(window(model, batch, actions, t, length))
        torch.testing.assert_close(output.pred()[:, -1], actions[t], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rows_at_different_times_do_not_disturb_each_other() -> None:
    model, batch = build(spec()).eval(), contexts(spec(), steps=2 * K)
    model.target_return = 25.0
    wanted, _ = play(model, batch)
    late = 4
    state = model.initial_state(B)
    fresh = model.initial_state(B)
    found = []
    for t in range(2 * K + late):
        if t == late:  # the last row begins anew
            state = {key: torch.cat([v[:2], fresh[key][2:]]) for key, v in state.items()}
        shift = torch.tensor([t, t, t - late if t >= late else t]).clamp(max=2 * K - 1)
        rows = torch.arange(B)
        reward = batch["reward"][rows, shift]
        state = model.rewarded(state, torch.where(shift == 0, 0.0, reward))
        _, state = model.act({"vector": batch["obs"]["vector"][rows, shift]}, state, explore=False)
        if t >= late:
            found.append(state["action"][2])
    torch.testing.assert_close(
        torch.stack(found), torch.stack([a[2] for a in wanted]), rtol=1e-4, atol=1e-5
    )


def test_the_return_to_go_falls_by_what_was_earned() -> None:
    model = build(spec())
    model.target_return = 25.0
    _, states = play(model, batch := contexts(spec()))
    earned = batch["reward"][:, 1:].cumsum(1)
    torch.testing.assert_close(states[0]["return_to_go"], torch.full((B,), 25.0))
    for t in range(1, K):
        torch.testing.assert_close(states[t]["return_to_go"], 25.0 - earned[:, t - 1])


@torch.no_grad()
def test_images_of_several_steps_are_stacked_alike_in_training_and_acting() -> None:
    model = build(images(), variant="atari", frame_stack=3).eval()
    batch = contexts(images())
    batch["mask"][:] = True
    actions, _ = play(model, batch)
    for t in range(K):
        output: Any = model.predict(window(model, batch, actions, t, t + 1))
        assert torch.equal(output.pred()[:, -1], actions[t])


@pytest.mark.parametrize("variant", ["gym", "atari"])
def test_steps_beyond_the_longest_episode_have_the_last_embedding(variant: str) -> None:
    model, obs = build(spec(), variant=variant), {"vector": torch.randn(B, 5)}
    found = []
    for timestep in (59, 1000):
        state = model.initial_state(B)
        state["timestep"] += timestep
        _, state = model.act(obs, state, explore=False)
        found.append(model.act(obs, state, explore=False)[0])
    torch.testing.assert_close(*found)


@torch.no_grad()
def test_discrete_actions_are_drawn_when_exploring_or_asked_to() -> None:
    for options, explore, drawn in (
        ({}, False, False),
        ({}, True, True),
        ({"sample_actions": True}, False, True),
    ):
        model = build(spec("discrete"), **options)
        model.head.weight.zero_()
        model.head.bias.zero_()
        state, obs = model.initial_state(200), {"vector": torch.randn(200, 5)}
        actions, _ = model.act(obs, state, explore=explore)
        assert (len(set(actions.tolist())) == 3) == drawn


# Options and data


def test_the_target_is_the_best_return_of_the_data_unless_one_is_given() -> None:
    model = build(spec())
    model.best_return.fill_(7.0)
    assert model.target_return == 7.0
    model.target_return = 3.5
    assert model.initial_state(2)["return_to_go"].tolist() == [3.5, 3.5]
    assert build(spec(), target_return=9.0).target_return == 9.0


def test_behaviour_cloning_has_no_returns() -> None:
    model, batch, changed = (build(spec(), condition_on_returns=False), *[contexts(spec())] * 2)
    changed = contexts(spec())
    changed["return_to_go"] += 5.0
    assert torch.equal(predicted(model, batch), predicted(model, changed))
    assert not any("return" in key for key, _ in model.named_parameters())
    assert model.target_return is None
    with pytest.raises(UserError, match=r"target return of 3.0 means nothing to behaviour cloning"):
        model.target_return = 3.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "huge"}, "no size 'huge'"),
        ({"variant": "rnn"}, "no variant 'rnn'"),
        ({"heads": 3}, "16 is not divisible by 3 heads"),
        ({"context": 1}, "context of at least 2, got 1"),
        ({"context_hop": K}, f"context_hop from 1 to {K - 1}, got {K}"),
        ({"frame_stack": 4}, "frame_stack=4 stacks images, and there are none"),
        ({"dropout": 1.5}, "dropout from 0 to 1, got 1.5"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(spec(), **options)


def test_small_images_are_refused() -> None:
    small = Spec({"image": ArraySpec((32, 32, 3), "uint8")}, ACTIONS["discrete"])
    with pytest.raises(UserError, match="images of 32x32 are too small"):
        build(small)


def fit(model: DecisionTransformer, data: Any, steps: int = 2, **options: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,
    )
    trainer.fit(model, datamodule=data)
    return trainer


Record = Callable[..., str]


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """Records random episodes that earn given rewards, into a store."""

    def at(spec: Spec, rewards: Sequence[Sequence[float]], scale: float = 1.0) -> str:
        episodes = []
        for episode, given in zip(recorded(spec, [len(r) for r in rewards]), rewards, strict=True):
            obs = {key: 3 + scale * value for key, value in episode.obs.items()}
            episodes.append(episode._replace(obs=obs, reward=np.array(given, np.float32)))
        return str(store_at(tmp_path_factory.mktemp("data") / "store", Memory(spec, episodes)))

    return at


@pytest.fixture(scope="module")
def source(record: Record) -> str:
    """Two episodes of 8 steps, which earn 1 and 2 each time."""
    return record(spec(), ([1.0] * 8, [2.0] * 8))


def test_statistics_of_the_data_are_kept_with_the_weights(record: Record) -> None:
    model = build(spec())
    data = OfflineDataModule(record(spec(), ([1.0] * 8, [2.0] * 8), 2.0), sequence_length=K)
    fit(model, data)
    mean, std = data.statistics["vector"]
    assert torch.equal(model.tokens.obs_mean, mean)
    assert torch.equal(model.tokens.obs_std, std)
    assert model.target_return == 16.0
    other = OfflineDataModule(record(spec(), ([3.0] * 8,), 9.0), sequence_length=K)
    fit(model, other)  # fine-tuned: the network goes on with its scale
    assert not torch.equal(other.statistics["vector"][1], std)
    assert torch.equal(model.tokens.obs_std, std)
    assert model.target_return == 24.0, "but asks for what the new data has"


def test_playing_a_recorded_episode_is_what_is_trained_on(record: Record) -> None:
    """Asked for what an episode got, acting hears of each reward where the data counts it off."""
    rewards = [1.0, 20.0, -3.0, 40.0], [5.0, 0.5, 70.0, 8.0, -9.0, 11.0]
    data = OfflineDataModule(record(spec(), rewards), sequence_length=K)
    model, batches = build(spec()), []

    class Keep(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, i: int) -> None:
            batches.append(batch)

    fit(model, data, steps=1, callbacks=[Keep()])
    obs, action = (torch.from_numpy(data.episodes.arrays[k]) for k in ("obs/vector", "action"))
    to_go, predicted = torch.zeros(len(obs)), torch.zeros(len(obs), 3)
    model.eval()
    for start, earned, target in zip(data.episodes.starts, rewards, data.returns, strict=False):
        model.target_return = float(target)
        state = model.initial_state(1)
        for row, reward in enumerate([0.0, *earned[:-1]], start):
            state = model.rewarded(state, torch.tensor([reward]))
            _, state = model.act({"vector": obs[row, None]}, state, explore=False)
            to_go[row], predicted[row] = state["return_to_go"], state["action"]
            state["action"] = model.actions.encode(action[row, None])

    (batch,) = batches
    whole = (batch["mask"] & (batch["timestep"] == 0)).any(1)  # acting has seen all from there on
    seen = {key: value[whole] for key, value in batch.pop("obs").items()}
    batch = {"obs": seen} | {key: value[whole] for key, value in batch.items()}
    valid, row_of = batch["mask"], {value: row for row, value in enumerate(obs[:, 0].tolist())}
    rows = [row_of[value] for value in batch["obs"]["vector"][valid][:, 0].tolist()]
    assert set(rows) == {0, 1, 2, 3, 5, 6, 7, 8, 9, 10}, "all but the last observations"
    torch.testing.assert_close(batch["return_to_go"][valid], to_go[rows])
    output: Any = model.predict(batch)
    torch.testing.assert_close(output.pred()[valid], predicted[rows], rtol=1e-4, atol=1e-5)
    error = predicted[rows] - model.actions.encode(action[rows])
    torch.testing.assert_close(model.training_step(batch, 0), error.square().mean())


def test_data_that_does_not_fit_is_refused(record: Record, source: str) -> None:
    wide = record(Spec({"vector": ArraySpec((7,), "float32")}, BOX), ([1.0] * 8,))
    with pytest.raises(UserError, match=r"has .*\[7\].* but the model has .*\[5\]"):
        fit(build(spec()), OfflineDataModule(wide, sequence_length=K))
    with pytest.raises(UserError, match=r"contexts of 6 steps and the model acts on 9: set --data"):
        fit(build(spec(), context=9), OfflineDataModule(source, sequence_length=K))
    long = OfflineDataModule(record(spec(), ([1.0] * 70,)), batch_size=400, sequence_length=K)
    with pytest.raises(UserError, match=r"has an episode of 70 steps, but max_timestep is 60"):
        fit(build(spec()), long)
    batch = contexts(spec(), steps=K)
    batch["timestep"] += 69
    with pytest.raises(UserError, match=r"a step \d+ \(from 0\), but max_timestep is 60"):
        build(spec()).on_before_batch_transfer(batch, 0)
    windows = OfflineDataModule(source, sequence_length=K, sampling="windows")
    with pytest.raises(
        UserError, match=r"the data has sampling=windows: leave --data\.sampling out"
    ):
        fit(build(spec()), windows)
    played = EnvDataModule("CartPole-v1")
    with pytest.raises(UserError, match="learns from recorded data, and a EnvDataModule has none"):
        fit(build(played.spec), played)
    with pytest.raises(UserError, match=r"contexts of 8 steps, the model of 6"):
        build(spec()).predict(contexts(spec(), steps=8))


# Optimizer


def test_schedules() -> None:
    assert [schedule(n, 4, 0) for n in (0, 1, 3, 4, 100)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    assert schedule(0, 0, 0) == 1.0
    assert schedule(6, 2, 10) == pytest.approx(0.5)
    assert schedule(10, 2, 10) == schedule(99, 2, 10) == 0.1


def test_the_learning_rate_warms_up_and_gradients_are_clipped(source: str) -> None:
    model = build(spec(), lr=0.5, warmup=4, weight_decay=0.0, clip=0.01)
    norms, rates = [], []

    class Watch(pl.Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            if grads:
                norms.append(torch.stack([g.norm() for g in grads]).norm().item())

        def on_train_batch_start(self, trainer: Any, *rest: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    data = OfflineDataModule(source, sequence_length=K)
    fit(model, data, steps=6, callbacks=[Watch()])
    assert rates == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.5])
    assert norms
    assert max(norms) <= 0.0101


def test_the_atari_version_decays_only_weights_of_linear_maps_and_convolutions() -> None:
    model = build(images(), variant="atari", weight_decay=0.1)
    decayed, others = model.configure_optimizers()["optimizer"].param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(others["params"]) == len(names)
    spared = {names[p] for p in others["params"]}
    assert {"tokens.action.weight", "time.slot.weight", "time.start.weight"} <= spared
    assert all(
        "bias" in n or "norm" in n or n.startswith(("time", "tokens.action")) for n in spared
    )
    (all_,) = build(spec()).configure_optimizers()["optimizer"].param_groups
    assert len(all_["params"]) == len(list(build(spec()).parameters()))


def test_parameters_of_the_atari_version() -> None:
    width, layers, frames, actions, steps = 128, 6, 4, 4, 100
    norm, linear = 2 * width, lambda a, b: (a + 1) * b
    block = 2 * norm + linear(width, 3 * width) + linear(width, width)
    block += linear(width, 4 * width) + linear(4 * width, width)
    cnn = linear(frames * 64, 32) + linear(32 * 16, 64) + linear(64 * 9, 64) + linear(3136, width)
    tokens = linear(1, width) + cnn + actions * width
    time = (3 * 30 + steps) * width
    breakout = Spec(
        {"image": ArraySpec((84, 84, 1), "uint8")}, ActionSpec("discrete", nvec=(actions,))
    )
    model = DecisionTransformer(
        breakout, size="atari", variant="atari", context=30, frame_stack=4, max_timestep=steps
    )
    wanted = tokens + time + layers * block + norm + width * actions
    assert sum(p.numel() for p in model.parameters()) == wanted
