"""The speed of Genie: that what is timed is what Genie does."""

from __future__ import annotations

import copy

import pytest
import torch

import zoo
from benchmarks import genie_speed
from benchmarks.genie_speed import build, clips, dream_rates, main, reread, update_parts, updates
from datamodules import ArraySpec, Spec, UserError
from zoo.genie.module import Genie

TINY = {"layers": 1, "width": 16, "heads": 2, "head": 8, "hidden": 32}
PARTS = ("tokenizer_decoder", "action_encoder", "action_decoder", "dynamics", "policy")


def tiny() -> Genie:
    torch.manual_seed(0)
    spec = Spec({"image": ArraySpec((16, 16, 3), "uint8")})
    model = zoo.create("genie/sprites", spec, **dict.fromkeys(PARTS, TINY))
    assert isinstance(model, Genie)
    return model


def test_frames_without_the_cache_are_the_same() -> None:
    model = tiny().eval()
    state = model.observe({"obs": {"image": clips(model, 2)}})
    tokens, actions = state["tokens"][:, -1], state["actions"][:, -1]
    past = tokens, actions, torch.ones(tokens.shape[:2]).bool(), actions[:, -1]
    found = model.dynamics.next_frame(*past, 3, 0.0)
    assert reread(model.dynamics, *past, 3, 0.0).equal(found)


def test_the_updates_are_those_of_training() -> None:
    model = tiny().train()
    with torch.no_grad():  # or it would copy, and no token matter
        assert model.dynamics.gate is not None
        model.dynamics.gate.bias.zero_()
    other = copy.deepcopy(model)
    video = clips(model, 4)
    torch.manual_seed(1)
    ours = model.configure_optimizers()
    assert len(list(updates(model, ours, video.float() / 255))) == 8
    torch.manual_seed(1)
    theirs = other.configure_optimizers()
    for count in (0, other.stages.lengths["tokenizer"] + other.stages.head_start):
        other.updates = count
        other.training_step({"obs": {"image": video}}, 0).backward()
        other.on_before_optimizer_step(theirs)
        theirs.step()
        theirs.zero_grad()
    before = tiny().state_dict()
    for key, value in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value)
    for part in ("tokenizer", "latent_actions", "dynamics"):
        moved = [k for k, v in model.state_dict().items() if not v.equal(before[k])]
        assert any(key.startswith(part) for key in moved)


def test_figures_are_of_each_number_of_steps_and_of_each_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(genie_speed, "STEPS", (1, 4))
    monkeypatch.setattr(genie_speed, "BATCHES", (1, 2))
    rates = dream_rates(tiny(), 2, repeats=2)
    assert len(rates) == 2
    assert all(rate > 1 for pair in rates for rate in pair)
    parts = update_parts(tiny(), 2, repeats=2)
    assert len(parts) == 8
    assert all(taken > 0 for taken in parts.values())
    threads = torch.get_num_threads()
    main(["--side", "16", "--batch", "2", "--repeats", "1"])
    torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    cells = [line.split() for line in lines[1:5]]
    assert [row[:2] for row in cells] == [["1", "1"], ["1", "4"], ["2", "1"], ["2", "4"]]
    assert all(float(rate) > 1 for row in cells for rate in row[2:])
    assert len(lines) == 1 + 4 + 3 + len(parts)
    with pytest.raises(UserError, match="'dreamer-v3/minigrid' is no preset of genie"):
        build("dreamer-v3/minigrid", 64)
