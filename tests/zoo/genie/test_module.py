"""Genie: sizes, stages, states of dreams, latent and real actions."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from small_genie import GAME, VIDEO, batch, build, video
from torch import Tensor, nn
from video_standin import MovingSquares

from datamodules import ActionSpec, ArraySpec, Spec, UserError
from zoo.commands import eval as eval_command
from zoo.genie.dynamics import hide
from zoo.genie.module import Genie
from zoo.genie.sizes import SIZES
from zoo.genie.stages import STAGES, Clock, Rate
from zoo.nets.st_transformer import Shape
from zoo.runs import load_weights


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
    model.stages.rates |= {"latent_actions": Rate(2.0, 1.0, 0), "dynamics": Rate(5.0, 3.0, 2)}
    optimizer = model.configure_optimizers()
    for model.updates, action, dynamics in ((2, 0.5, None), (4, 1.0, 2.5), (7, 1.0, 4.0)):
        model.on_before_optimizer_step(optimizer)
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        cosine = (1 + math.cos(math.pi * action)) / 2
        assert rates["latent_actions"] == pytest.approx(1 + cosine)
        if dynamics is not None and model.updates == 4:
            assert rates["dynamics"] == pytest.approx(dynamics)
    assert rates["dynamics"] == pytest.approx(3 + (1 + math.cos(math.pi / 4)))


def test_only_weights_of_linear_maps_and_convolutions_decay() -> None:
    model = build(copy_gate=True, relative_positions=True, code_vectors=True, read_changes=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decays = {
        names[id(parameter)]: bool(group["weight_decay"])
        for group in model.configure_optimizers().param_groups
        for parameter in group["params"]
    }
    assert len(decays) == len(names)
    for name, does in decays.items():
        still = name.endswith((".bias", ".space", ".time", ".table", "norm.weight"))
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


def test_stages_learn_from_as_many_clips_as_they_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build(action_updates=1, tokenizer_clips=3, world_clips=2)
    heard: list[int] = []
    for part in (model.tokenizer, model.latent_actions, model.dynamics.transformer):
        part.register_forward_hook(lambda _, clips, __: heard.append(len(clips[0])))
    clips = {"obs": {"image": video(clips=5)}}
    for model.updates, expected in ((0, [3]), (2, [5]), (3, [2, 2])):
        heard.clear()
        model.training_step(clips, 0)
        assert heard == expected


def test_with_whole_pasts_the_last_frame_of_clips_of_any_length_is_hidden() -> None:
    model = build(whole_past=True)
    model.updates = 2
    heard: list[Tensor] = []
    model.dynamics.register_forward_pre_hook(lambda _, tokens: heard.append(tokens[0]))
    for _ in range(30):
        model.training_step(batch(), 0)
    assert {seen.shape[1] for seen in heard} == {2, 3, 4}
    hidden = [(seen == model.dynamics.mask).any(-1) for seen in heard]
    assert all(some[:, -1].all() and not some[:, :-1].any() for some in hidden)


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
    model.eval()._losses(batch(7))
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
    with pytest.raises(UserError, match=r"got dynamics=\{'width': 0\}"):
        build(dynamics={"width": 0})
    with pytest.raises(UserError, match="dynamics has no number 'depth': choose one of layers"):
        build(dynamics={"depth": 2})
    with pytest.raises(UserError, match=r"by name, such as .*, got dynamics=\[1, 64\]"):
        build(dynamics=[1, 64])
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
        {"action_model": "convolutional", "action_encoder": {"layers": 2}},
        {"action_channels": 8},
    ):
        with pytest.raises(UserError, match=r"has no effect with tokenizer_quantizer="):
            build(**options)
    with pytest.raises(UserError, match="needs action_updates from 0 to 1, got 2"):
        build(action_updates=2)
    build(action_updates=2, world_updates=0)  # a policy from the weights of another training
    with pytest.raises(UserError, match=r"mask_rates of two numbers, got \[0.5\]"):
        build(mask_rates=[0.5])
    with pytest.raises(UserError, match="mask_rates > 0"):
        build(mask_rates=[0.0, 0.0])
    with pytest.raises(UserError, match=r"whole steps, got 2\.5"):
        build(steps=2.5)
    with pytest.raises(UserError, match="set policy_updates to 0"):
        build(action_quantizer="none", num_actions=6)
    with pytest.raises(UserError, match="weight_decay of at least 0, got -1"):
        build(weight_decay=-1.0)


def test_clips_of_one_frame_teach_nothing() -> None:
    with pytest.raises(UserError, match=r"clips of 1: set --data.clip_length 4"):
        build().validation_step(batch(1), 0)
    model = build(known_motion=True, read_changes=True)
    with pytest.raises(UserError, match=r"from 3 of them or more.*clips of 2"):
        model.validation_step(batch(2), 0)


def test_with_known_motion_no_action_has_to_tell_the_second_frame() -> None:
    model = build(known_motion=True, read_changes=True, residual=True).eval()
    frames = video().float() / 255
    with torch.no_grad():
        found = model.latent_actions(frames).frames
        losses, metrics, _ = model._action_losses(frames)
    torch.testing.assert_close(losses["next_frame"], (found[:, 1:] - frames[:, 2:]).square().mean())
    copied = (frames[:, 1:-1] - frames[:, 2:]).square().mean()
    assert float(metrics["copy_psnr"]) == pytest.approx(float(-10 * copied.log10()))
    with pytest.raises(UserError, match="set read_changes=True"):
        build(known_motion=True)
    with pytest.raises(UserError, match="frames is 2: set frames to 3 or more"):
        build(known_motion=True, read_changes=True, frames=2)


def test_labels_of_several_actions_for_a_frame_are_not_read() -> None:
    model = build(GAME, tokenizer_updates=0, world_updates=0)
    model._losses(batch(action=torch.zeros(2, 4, 2, dtype=torch.int64)))
    assert model.action_map.steps == 0


def test_weights_of_silent_video_fit_a_model_of_a_game(tmp_path: Path) -> None:
    silent, game = build(), build(GAME, tokenizer_updates=0, world_updates=0)
    for parameter in silent.parameters():
        nn.init.normal_(parameter)
    silent.save_pretrained(tmp_path)
    load_weights(game, tmp_path)
    for key, value in game.state_dict().items():
        assert torch.equal(value, silent.state_dict()[key]), key


def test_a_copy_reads_the_codebook_of_its_own_tokenizer() -> None:
    model = build(code_vectors=True)
    other = copy.deepcopy(model)
    tokens = torch.arange(model.num_codes)
    before = model.dynamics._tokens(tokens)
    codebook = other.tokenizer.quantizer.get_buffer("codebook")
    codebook.add_(torch.randn(codebook.shape))
    assert not other.dynamics._tokens(tokens).allclose(before)
    assert model.dynamics._tokens(tokens).equal(before)


def test_weights_of_a_part_are_taken_from_another_model() -> None:
    done, other = build(), build(world_updates=9)
    nn.init.normal_(done.tokenizer.embed.weight)
    frames = video().float() / 255
    other.tokenizer.load_state_dict(done.tokenizer.state_dict())
    assert torch.equal(done.eval().tokenizer.tokens(frames), other.eval().tokenizer.tokens(frames))
