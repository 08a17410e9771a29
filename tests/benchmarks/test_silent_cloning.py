"""Cloning from silent video: the expert, the films, and what the two policies are told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import silent_cloning
from benchmarks.silent_cloning import acting, clone, follow, main, play
from datamodules import ArraySpec, Spec
from zoo import registry


def small_model() -> Any:
    torch.manual_seed(0)
    spec = Spec({"image": ArraySpec((32, 32, 3), "uint8")})
    policy = {"layers": 1, "width": 32, "heads": 1, "head": 32, "hidden": 64}
    return registry.create("genie/catch-video", spec, policy=policy).eval()


def test_the_expert_catches_every_ball_and_chance_does_not() -> None:
    video, actions, returns = play(follow, 20, seed=0)
    assert video.shape == (20, 31, 32, 32, 3)
    assert actions.shape == (20, 30)
    assert (returns == 1).all()
    rng = np.random.default_rng(0)
    assert play(lambda _: int(rng.integers(3)), 20, seed=0)[2].mean() < 0.5


def test_a_clone_learns_what_it_is_told() -> None:
    """From films of one move only, which it makes whatever it sees."""
    video, actions, _ = play(lambda _: 2, 4, seed=0)
    film, truth = torch.from_numpy(video), torch.from_numpy(actions)
    policy = clone(small_model(), film, truth, 3, updates=40)
    act = acting(policy, lambda code: code)
    assert [act(video[0][: t + 1]) for t in range(30)] == [2] * 30
    assert acting(policy, lambda code: 2 - code)(video[0][:1]) == 0


def test_the_table_has_a_row_for_each_policy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(silent_cloning, "load", lambda _: small_model())
    monkeypatch.setattr(silent_cloning, "Run", lambda path: type("R", (), {"checkpoint": str})())
    main(["run", "--films", "4", "--updates", "2", "--episodes", "2", "--labelled", "40"])
    shown = capsys.readouterr().out
    for name in ("random", "expert", "silent video, 40 labelled steps", "all 120 actions known"):
        assert name in shown
