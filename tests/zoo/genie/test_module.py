"""Genie: sizes, stages, states of dreams, latent and real actions."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from video_standin import MovingSquares

from datamodules import ActionSpec, ArraySpec, Spec, UserError
from zoo.commands import eval as eval_command
from zoo.genie.dynamics import hide
from zoo.genie.module import SIZES, STAGES, Clock, Genie, Rate
from zoo.nets.st_transformer import Shape
from zoo.runs import load_weights

VIDEO = Spec({"image": ArraySpec((16, 16, 3), "uint8")})
GAME = Spec(VIDEO.obs, ActionSpec("discrete", nvec=(3,)))
TINY = (1, 16, 2, 8, 32)
PARTS = ("tokenizer_encoder", "tokenizer_decoder", "action_encoder", "action_decoder")


def build(spec: Spec = VIDEO, **options: Any) -> Genie:
    torch.manual_seed(0)
    sizes = dict.fromkeys([*PARTS, "dynamics", "policy"], TINY)
    stages = {"tokenizer_updates": 2, "world_updates": 2, "policy_updates": 2}
    small: dict[str, Any] = {"frames": 4, "codes": 16, "code_width": 4, "steps": 2}
    if options.get("action_quantizer") != "fsq":
        small["action_width"] = 4
    if options.get("action_model") != "convolutional":
        small["action_patch"] = 8
    return Genie(spec, **{"size": "nano", **sizes, **stages, **small, **options})


def video(frames: int = 4, clips: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randint(256, (clips, frames, 16, 16, 3), generator=generator).to(torch.uint8)


def batch(frames: int = 4, **more: Tensor) -> dict[str, Any]:
    return {"obs": {"image": video(frames)}, **more}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def transformer(shape: Shape, places: int, frames: int = 16) -> int:
    layers, width, heads, head, hidden = shape
    inner = heads * head
    attention = 2 * width + (width + 1) * 3 * inner + 2 * head + (inner + 1) * width
    mlp = 2 * width + (width + 1) * hidden + (hidden + 1) * width
    return layers * (2 * attention + mlp) + (places + frames) * width + 2 * width


@pytest.mark.parametrize(
    ("size", "image", "places", "cells"),
    [("coinrun", (64, 64, 3), 256, 16), ("platformers", (90, 160, 3), 23 * 40, 60)],
)
def test_parameters_follow_from_the_tables(
    size: str, image: tuple[int, ...], places: int, cells: int
) -> None:
    """Patches of 4 and 16 pixels, 1024 codes and 6 actions of length 32 (app. F, tables 5, 7)."""
    with torch.device("meta"):
        model = Genie(Spec({"image": ArraySpec(image, "uint8")}), size=size)
    shapes = SIZES[size]
    widths = {key: shape.width for key, shape in shapes.items()}
    small, patch = 4 * 4 * 3, 16 * 16 * 3

    def blocks(part: str, patches: int = places) -> int:
        return transformer(shapes[part], patches)

    first, second = widths["tokenizer_encoder"], widths["tokenizer_decoder"]
    tokenizer = (small + 1) * first + (first + 1) * 32 + 33 * second + (second + 1) * small
    tokenizer += blocks("tokenizer_encoder") + blocks("tokenizer_decoder")
    assert count(model.tokenizer) == tokenizer
    first, second = widths["action_encoder"], widths["action_decoder"]
    actions = (patch + 1) * first + (first + 1) * 32 + blocks("action_encoder", cells)
    actions += (patch + 1) * second + 33 * second + (second + 1) * patch
    actions += blocks("action_decoder", cells)
    assert count(model.latent_actions) == actions
    width = widths["dynamics"]
    dynamics = 1025 * width + 32 * width + (width + 1) * 1024 + blocks("dynamics")
    assert count(model.dynamics) == dynamics
    if size == "platformers":  # 200 million and 10.1 billion in the paper
        assert tokenizer == pytest.approx(200e6, rel=0.1)
        assert dynamics == pytest.approx(10.1e9, rel=0.03)


def test_codes_are_those_of_the_case_study() -> None:
    model = build(codes=1024, code_width=32, num_actions=6, action_width=32)
    tokens, actions = model.tokenizer.quantizer, model.latent_actions.quantizer
    assert (tokens.size, tokens.width) == (1024, 32)
    assert (actions.size, actions.width) == (6, 32)
    assert model.num_latent_actions == 6


# Stages


def test_the_clock_goes_through_the_stages_and_stays_at_the_last() -> None:
    model = build(tokenizer_updates=2, world_updates=3, policy_updates=0)
    found = []
    for model.updates in range(7):
        found.append(model.clock)
    names = ["tokenizer"] * 2 + ["world"] * 5
    steps, lengths = [0, 1, 0, 1, 2, 3, 4], [2] * 2 + [3] * 5
    assert found == [Clock(*row) for row in zip(names, steps, lengths, strict=True)]
    alone = build(tokenizer_updates=0, world_updates=0)
    assert alone.clock == Clock("policy", 0, 2)


def test_rates_rise_and_fall_within_a_stage() -> None:
    rate = Rate(2.0, 1.0, 4)
    assert [rate.at(u, 12) for u in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert rate.at(8, 12) == pytest.approx(1.5)
    assert rate.at(6, 12) == pytest.approx(1.5 + math.cos(math.pi / 4) / 2)
    assert rate.at(12, 12) == rate.at(50, 12) == pytest.approx(1.0)


class Watch(pl.Callback):
    """Which parts changed in each update, by their weights and by their codebooks."""

    def __init__(self) -> None:
        self.changed: list[set[str]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        self.before = {key: value.clone() for key, value in module.state_dict().items()}

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        after = module.state_dict()
        moved = {key for key, value in after.items() if not torch.equal(value, self.before[key])}
        self.changed.append({key.partition(".")[0] for key in moved})


def fit(model: Genie, updates: int, **options: Any) -> Watch:
    watch = Watch()
    pl.Trainer(
        max_steps=updates,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=[watch],
        **options,
    ).fit(model, MovingSquares(2, 4))
    return watch


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_each_stage_changes_its_own_parts_only(precision: str) -> None:
    model = build(MovingSquares.spec)
    expected = [set(parts) for parts in STAGES.values() for _ in range(2)]
    assert fit(model, 6, precision=precision).changed == expected
    alone = build(MovingSquares.spec, tokenizer_updates=0, policy_updates=0)
    assert fit(alone, 1).changed == [{"latent_actions", "dynamics"}]


def test_gradients_are_clipped_part_by_part() -> None:
    model = build(clip=0.5, tokenizer_updates=0, world_warmup=4)
    optimizer = model.configure_optimizers()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.on_before_optimizer_step(optimizer)
    for part in (model.latent_actions, model.dynamics):
        norm = torch.stack([p.grad.norm() for p in part.parameters() if p.grad is not None]).norm()
        assert norm.item() == pytest.approx(0.5, rel=1e-3)
    assert all(p.grad is None for part in (model.tokenizer, model.clone) for p in part.parameters())
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates["dynamics"] == rates["latent_actions"] == pytest.approx(3e-5 / 4)


def test_the_action_model_has_a_head_start_and_rates_of_its_own() -> None:
    model = build(MovingSquares.spec, tokenizer_updates=1, world_updates=4, action_updates=2)
    expected = [{"tokenizer"}, *[{"latent_actions"}] * 2, *[{"latent_actions", "dynamics"}] * 2]
    assert fit(model, 5).changed == expected
    model = build(tokenizer_updates=0, world_updates=10, action_updates=4)
    model.rates |= {"latent_actions": Rate(2.0, 1.0, 0), "dynamics": Rate(5.0, 3.0, 2)}
    optimizer = model.configure_optimizers()
    for model.updates, action, dynamics in ((2, 0.2, None), (4, 0.4, 2.5), (7, 0.7, 4.0)):
        model.on_before_optimizer_step(optimizer)
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        cosine = (1 + math.cos(math.pi * action)) / 2
        assert rates["latent_actions"] == pytest.approx(1 + cosine)
        if dynamics is not None and model.updates == 4:
            assert rates["dynamics"] == pytest.approx(dynamics)
    assert rates["dynamics"] == pytest.approx(3 + (1 + math.cos(math.pi / 4)))


def test_only_weights_of_linear_maps_and_convolutions_decay() -> None:
    model = build(copy_gate=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decays = {
        names[id(parameter)]: bool(group["weight_decay"])
        for group in model.configure_optimizers().param_groups
        for parameter in group["params"]
    }
    assert len(decays) == len(names)
    for name, does in decays.items():
        still = name.endswith((".bias", ".space", ".time", "norm.weight"))
        assert does != (still or name == "dynamics.embed.weight"), name


def test_commitment_is_in_units_of_the_pixels_variance() -> None:
    frames = video().float() / 255
    found = build().tokenizer(frames).quantized.commitment.detach()
    model = build()
    model.training_step(batch(), 0)
    torch.testing.assert_close(model.last_losses["commitment"], found * frames.var())
    model.updates = 2
    actions = model.latent_actions.eval().infer(frames).commitment.detach()
    model.eval().training_step(batch(), 0)
    change = (frames[:, 1:] - frames[:, :-1]).square().mean()
    torch.testing.assert_close(model.last_losses["action_commitment"], actions * change)


def test_losses_and_weights_of_the_stages() -> None:
    model = build(commitment=0.5)
    names = {
        "tokenizer": {"reconstruction", "commitment"},
        "world": {"next_frame", "action_commitment", "hidden_tokens"},
        "policy": {"cloning"},
    }
    for update, stage in zip((0, 2, 4), STAGES, strict=True):
        model.updates = update
        total = model.training_step(batch(), 0)
        assert model.last_losses.keys() == names[stage]
        weighted = sum(
            loss * (0.5 if "commitment" in name else 1) for name, loss in model.last_losses.items()
        )
        torch.testing.assert_close(total.detach(), weighted)


def test_the_dynamics_hear_the_actions_that_led_to_each_frame(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build()
    heard: dict[str, Tensor] = {}

    def listen(tokens: Tensor, actions: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        heard.update(tokens=tokens, actions=actions, seen=seen)
        return actions.sum() * 0, actions.sum() * 0

    monkeypatch.setattr(model.dynamics, "loss_and_scores", listen)
    model.updates = 2
    model.eval().training_step(batch(), 0)
    frames = video().float() / 255
    torch.testing.assert_close(heard["actions"][:, 1:], model.latent_actions.infer(frames).vectors)
    assert (heard["actions"][:, 0] == 0).all()
    assert torch.equal(heard["tokens"], model.tokenizer.tokens(frames))
    hidden = heard["seen"] == model.dynamics.mask
    assert torch.equal(heard["seen"][~hidden], heard["tokens"][~hidden])


def test_every_position_at_which_the_clone_acts_has_learnt() -> None:
    for frames in (2, 4, 7):
        model = build(GAME, frames=frames, tokenizer_updates=0, world_updates=0)
        assert model.clone.frames == min(4, frames - 1)
        before = model.clone.transformer.time.detach().clone()
        optimizer = model.configure_optimizers()
        model.training_step(batch(frames), 0).backward()
        model.on_before_optimizer_step(optimizer)
        optimizer.step()
        assert (model.clone.transformer.time != before).any(1).all()
        state = model.initial_state(2)
        assert state["video"].shape[1] == model.clone.frames


def test_the_clone_learns_the_action_after_each_frame_of_all_spans(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build(frames=7, tokenizer_updates=0, world_updates=0)
    heard = []

    def listen(clips: Tensor) -> Tensor:
        heard.append(clips)
        return torch.zeros(*clips.shape[:2], 6, requires_grad=True)

    monkeypatch.setattr(model.clone, "forward", listen)
    model.eval()._losses(batch(7), False)
    frames = video(7).float() / 255
    (seen,) = heard
    assert torch.equal(seen.view(2, 3, 4, 16, 16, 3)[:, 1], frames[:, 1:5])
    assert torch.equal(seen.view(2, 3, 4, 16, 16, 3)[:, 2], frames[:, 2:6])


def test_the_surprise_of_the_dynamics_does_not_move_the_action_model() -> None:
    model = build()
    frames = video().float() / 255
    actions = nn.functional.pad(model.latent_actions.infer(frames).vectors, (0, 0, 1, 0))
    tokens = model.tokenizer.tokens(frames)
    model.dynamics.loss(tokens, actions, hide(tokens, model.dynamics.mask)).backward()
    assert all(p.grad is None for p in model.latent_actions.parameters())
    assert all(p.grad is None for p in model.tokenizer.parameters())
    assert all(p.grad is not None for p in model.dynamics.parameters())


# Dreaming


def test_states_are_windows_of_the_past() -> None:
    model = build().eval()
    state, tokens = model.observe(batch()), model.tokenizer.tokens(video().float() / 255)
    assert state["tokens"].shape == (2, 4, 3, 16)
    assert torch.equal(state["tokens"][:, 3], tokens[:, 1:])
    assert torch.equal(state["tokens"][:, 1, 1:], tokens[:, :2])
    assert state["frames"].tolist() == [[1, 2, 3, 3]] * 2
    led = model.latent_actions.infer(video().float() / 255).vectors
    torch.testing.assert_close(state["actions"][:, 3], led)


def test_nothing_is_remembered_of_the_episode_before() -> None:
    first = torch.tensor([[True, False, False, False], [False, False, True, False]])
    state = build().eval().observe(batch(is_first=first))
    assert state["frames"].tolist() == [[1, 2, 3, 3], [1, 2, 1, 2]]


def test_nothing_is_seen_across_the_border_of_episodes() -> None:
    model = build().eval()
    first = torch.zeros(2, 9, dtype=torch.bool)
    first[0, 2] = first[0, 8] = True  # the second row is one episode
    state = model.observe({"obs": {"image": video(9)}, "is_first": first})
    alone = model.observe({"obs": {"image": video(9)[:1, 2:8]}})
    for key in ("tokens", "actions"):  # from the fourth on: those before have others in front
        assert torch.equal(state[key][:1, 5:8], alone[key][:, 3:])
    assert state["frames"][0].tolist() == [1, 2, 1, 2, 3, 3, 3, 3, 1]
    whole = model.observe({"obs": {"image": video(9)[1:]}})
    assert torch.equal(state["tokens"][1:], whole["tokens"])
    codes = model.infer_actions(video(9), first)
    assert codes.shape == (2, 8)
    assert torch.equal(codes[:1, 2:7], model.infer_actions(video(9)[:1, 2:8]))
    assert torch.equal(codes[1:], model.infer_actions(video(9)[1:]))
    assert codes[0, [1, 7]].tolist() == [0, 0]


def test_clips_that_do_not_suit_training_are_refused() -> None:
    model = build()
    with pytest.raises(UserError, match=r"frames=4 .* clips of 3: set --data.clip_length 4"):
        model.on_train_batch_start(batch(3), 0)
    first = torch.zeros(2, 4, dtype=torch.bool)
    model.on_train_batch_start(batch(4, is_first=first), 0)
    first[:, 0] = True
    model.on_train_batch_start(batch(4, is_first=first), 0)
    first[1, 2] = True
    with pytest.raises(UserError, match="go on into the next one"):
        model.on_train_batch_start(batch(4, is_first=first), 0)


def test_clips_of_any_length_are_observed() -> None:
    model = build().eval()
    long, end = video(7), model.observe({"obs": {"image": video(7)[:, 3:]}})
    state = model.observe({"obs": {"image": long}})
    assert state["tokens"].shape[:2] == (2, 7)
    assert torch.equal(state["tokens"][:, 6, -1], end["tokens"][:, 3, -1])
    assert model.infer_actions(long).shape == (2, 6)
    assert torch.equal(model.infer_actions(long)[:, -1], model.infer_actions(long[:, 3:])[:, -1])
    assert model.encode({"image": long}).shape == (2, 7, 16)


def test_a_dream_goes_on_from_its_own_frames() -> None:
    model = build(temperature=0.0).eval()
    start = {key: value[:, 1] for key, value in model.observe(batch()).items()}
    actions = torch.tensor([[0, 5, 2], [1, 1, 4]])
    dream = model.imagine(start, actions, 3)
    assert dream.state["frames"].tolist() == [[3, 3, 3]] * 2
    again = model.imagine({key: v[:, 0] for key, v in dream.state.items()}, actions[:, 1:], 2)
    for key, value in dream.state.items():
        assert torch.equal(value[:, 1:], again.state[key])
    assert torch.equal(dream.state["tokens"][:, 1, :2], dream.state["tokens"][:, 0, 1:])
    book = model.latent_actions.quantizer.lookup(actions)
    torch.testing.assert_close(dream.state["actions"][:, 2], book)
    assert (dream.reward == 0).all()
    assert (dream.cont == 1).all()
    assert model.decode(dream.state)["image"].shape == (2, 3, 16, 16, 3)


def test_states_that_follow_one_another_are_decoded_as_one_clip() -> None:
    model = build(frames=8).eval()
    state = model.observe({"obs": {"image": video(20)}})
    calls = []
    decode = model.tokenizer.decode
    model.tokenizer.decode = lambda *a: calls.append(a[0].shape) or decode(*a)  # type: ignore
    made = model.decode(state)["image"]
    assert made.shape == (2, 20, 16, 16, 3)
    assert sum(shape[1] for shape in calls) <= 40
    # Within one clip it is what each state says alone.
    for step in range(7):
        alone = model.decode({key: value[:, [step]] for key, value in state.items()})["image"]
        torch.testing.assert_close(made[:, [step]], alone, atol=1e-5, rtol=0)
    # States in any order are decoded each for itself.
    mixed = torch.tensor([5, 1, 15, 3])
    shuffled = model.decode({key: value[:, mixed] for key, value in state.items()})["image"]
    for place, step in enumerate(mixed.tolist()):
        alone = model.decode({key: value[:, [step]] for key, value in state.items()})["image"]
        torch.testing.assert_close(shuffled[:, [place]], alone, atol=1e-5, rtol=0)


def test_decoding_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build().eval()
    state = model.observe({"obs": {"image": video(6, clips=5)}})
    whole = model.decode(state)["image"]
    monkeypatch.setattr("zoo.genie.module.DECODED", 8)
    torch.testing.assert_close(model.decode(state)["image"], whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("actions", "text"),
    [
        (torch.tensor([[0], [6]]), "no latent action 6: this Genie has 6, from 0 to 5"),
        (torch.tensor([[-1], [0]]), "no latent action -1"),
        (torch.zeros(2, 1), r"are of shape \(2, 4\), got \(2,\): .* codes from 0 to 5"),
        (torch.zeros(2, 1, 3), r"are of shape \(2, 4\), got \(2, 3\)"),
        (torch.zeros(2, 1, 4, dtype=torch.int64), r"codes of shape \(2,\).*of shape \(2, 4\)"),
        (torch.zeros(1, 1, dtype=torch.int64), r"codes of shape \(2,\).*of shape \(1,\)"),
        (torch.zeros(2, 1, dtype=torch.bool), "got torch.bool"),
    ],
)
def test_latent_actions_that_there_are_not_are_refused(actions: Tensor, text: str) -> None:
    model = build().eval()
    start = {key: value[:, -1] for key, value in model.observe(batch()).items()}
    with pytest.raises(UserError, match=text):
        model.imagine(start, actions, 1)


def test_continuous_actions_are_given_as_vectors() -> None:
    model = build(action_quantizer="none").eval()
    start = {key: value[:, -1] for key, value in model.observe(batch()).items()}
    vectors = torch.randn(2, 3, 4)
    assert torch.equal(model.imagine(start, vectors, 3).action, vectors)
    with pytest.raises(UserError, match="have no codes"):
        model.imagine(start, torch.zeros(2, 3, dtype=torch.int64), 3)


# Acting


def test_labelled_steps_are_looked_at_once_there_is_something_to_label() -> None:
    model = build(GAME, labelled_steps=8)
    model.action_map.counts[0, 0] = 7  # of the weights that this began from
    with pytest.raises(UserError, match="has not cloned a policy"):
        build(GAME).require_policy()
    action = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])
    model.require_policy()
    for model.updates, steps in ((0, 7), (2, 0), (4, 6), (5, 8), (6, 8), (2, 0), (5, 6), (4, 6)):
        model.training_step(batch(action=action), 0)
        assert model.action_map.steps == steps
    fresh = build(GAME, labelled_steps=8).eval()
    fresh.map_actions(video(), action)
    latent = fresh.infer_actions(video())
    for code, real in zip(latent.flatten(), action[:, :-1].flatten(), strict=True):
        assert fresh.action_map.counts[code, real] > 0
    assert fresh.action_map.steps == 6


def test_a_policy_that_was_never_cloned_is_not_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stored:
        def __init__(self, path: Path) -> None:
            self.path = path

        def checkpoint(self, which: str | None) -> Path:
            return self.path / "last.ckpt"

        def datamodule(self, **_: Any) -> Any:
            return SimpleNamespace(make_env=lambda: pytest.fail("it was played"))

    monkeypatch.setattr(eval_command, "Run", Stored)
    monkeypatch.setattr(eval_command, "load", lambda *_, **__: build(GAME))
    with pytest.raises(UserError, match=r"has not cloned a policy.*policy_updates"):
        eval_command.main(["a-run"])


def test_acting_is_the_clone_and_the_dictionary() -> None:
    model = build(GAME).eval()
    model.action_map.counts[:, :3] = torch.eye(3).repeat(2, 1)
    state, clip = model.initial_state(2), video()
    for step in range(4):
        action, state = model.act({"image": clip[:, step]}, state, explore=False)
        with torch.no_grad():
            seen = clip[:, max(0, step - 2) : step + 1]  # the last three
            latent = model.clone(seen.float() / 255)[:, -1].argmax(-1)
        assert torch.equal(action, latent % 3)


def test_mistakes_are_named() -> None:
    two = Spec(dict.fromkeys(("a", "b"), VIDEO.obs["image"]))
    box = Spec(VIDEO.obs, ActionSpec("box", low=(-1.0,), high=(1.0,)))
    with pytest.raises(UserError, match="learns from one image"):
        build(two)
    model = build(box)
    with pytest.raises(UserError, match=r"discrete ones, and was made for .*box"):
        model.act({"image": video()[:, 0]}, model.initial_state(2), explore=False)
    with pytest.raises(UserError, match=r"clips of 5: set --data.clip_length or frames"):
        build().training_step(batch(5), 0)
    with pytest.raises(UserError, match="needs action_levels"):
        build(action_quantizer="fsq")
    with pytest.raises(UserError, match=r"got dynamics=\[1, 0, 2, 8, 32\]"):
        build(dynamics=(1, 0, 2, 8, 32))
    with pytest.raises(UserError, match="learns nothing"):
        build(tokenizer_updates=0, world_updates=0, policy_updates=0)
    with pytest.raises(UserError, match="needs codes of at least 2, got 1"):
        build(codes=1)
    with pytest.raises(UserError, match="needs num_actions of at least 2, got 1"):
        build(num_actions=1)
    fsq = {"tokenizer_quantizer": "fsq", "code_levels": [4, 4]}
    for options in (
        {**fsq, "codes": 16},
        {"codes": 1024, **fsq},
        {"code_levels": [4, 4]},
        {"action_levels": [2, 2]},
        {"action_quantizer": "none", "num_actions": 8},
        {"action_model": "convolutional", "action_patch": 8},
    ):
        with pytest.raises(UserError, match=r"has no effect with tokenizer_quantizer="):
            build(**options)
    with pytest.raises(UserError, match="needs action_updates from 0 to 1, got 2"):
        build(action_updates=2)


def test_weights_of_silent_video_fit_a_model_of_a_game(tmp_path: Path) -> None:
    silent, game = build(), build(GAME, tokenizer_updates=0, world_updates=0)
    for parameter in silent.parameters():
        nn.init.normal_(parameter)
    silent.save_pretrained(tmp_path)
    load_weights(game, tmp_path)
    for key, value in game.state_dict().items():
        assert torch.equal(value, silent.state_dict()[key]), key


def test_weights_of_a_part_are_taken_from_another_model() -> None:
    done, other = build(), build(world_updates=9)
    nn.init.normal_(done.tokenizer.embed.weight)
    frames = video().float() / 255
    other.tokenizer.load_state_dict(done.tokenizer.state_dict())
    assert torch.equal(done.eval().tokenizer.tokens(frames), other.eval().tokenizer.tokens(frames))
