from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from toy_dreams import Walk

from datamodules.envs.sprites import Sprites
from datamodules.errors import UserError
from datamodules.spec import ActionSpec
from zoo.play.keys import KeyMap, action_names

SEVERAL = ActionSpec("multi_discrete", nvec=(2, 3))
BOX = ActionSpec("box", low=(-2.0, 0.0, 0.5), high=(2.0, 1.0, 1.0))


def discrete(n: int) -> ActionSpec:
    return ActionSpec("discrete", nvec=(n,))


def test_unnamed_choices_have_digits_then_letters_and_the_last_pressed_counts() -> None:
    keys = KeyMap(discrete(12))
    assert [*keys.bindings] == [*"0123456789qw"]
    assert keys.action([]) == 0 and keys.action(["3"]) == 3 and keys.action(["3", "w"]) == 11
    assert keys.action(["w", "3"]).shape == ()
    assert keys.bindings["w"].label == "action 11"


def test_named_choices_have_arrows_where_they_are_directions() -> None:
    keys = KeyMap(discrete(6), ["up", "fire", "noop", "left", "upright", "fire"])
    assert [*keys.bindings] == ["ArrowUp", " ", "0", "ArrowLeft", "1", "2"]
    assert keys.action([]) == 2, "nothing is held: nothing is done"
    assert keys.action([" "]) == 1 and keys.action(["2"]) == 5
    assert keys.rest == "2"
    assert keys.bindings["ArrowUp"].label == "up"


def test_each_of_several_components_has_keys_and_they_are_held_together() -> None:
    keys = KeyMap(SEVERAL)
    assert [(b.key, b.component, b.value) for b in keys.bindings.values()] == [
        ("0", 0, 0.0),
        ("1", 0, 1.0),
        ("2", 1, 0.0),
        ("3", 1, 1.0),
        ("4", 1, 2.0),
    ]
    np.testing.assert_array_equal(keys.action([]), [0, 0])
    np.testing.assert_array_equal(keys.action(["1", "3", "4"]), [1, 2])
    assert keys.action(["1"]).dtype == np.int64


def test_continuous_components_go_to_their_bounds_and_rest_as_near_to_zero_as_they_can() -> None:
    keys = KeyMap(BOX)
    np.testing.assert_array_equal(keys.action([]), np.float32([0, 0, 0.5]))
    np.testing.assert_array_equal(keys.action(["ArrowLeft", "a"]), np.float32([-2, 0, 0.5]))
    np.testing.assert_array_equal(keys.action(["ArrowUp", "d"]), np.float32([0, 1, 1]))
    np.testing.assert_array_equal(keys.action(["ArrowLeft", "ArrowRight"]), np.float32([2, 0, 0.5]))
    assert keys.bindings["ArrowLeft"].label == "action 0: -2"


@pytest.mark.parametrize(
    "spec",
    [
        discrete(36),
        ActionSpec("multi_discrete", nvec=(9, 9)),
        ActionSpec("box", low=(0.0,) * 8, high=(1.0,) * 8),
    ],
)
def test_no_key_does_two_things(spec: ActionSpec) -> None:
    assert len(KeyMap(spec).bindings) == (16 if spec.kind == "box" else sum(spec.nvec))


def test_too_many_choices_are_refused() -> None:
    with pytest.raises(UserError, match=r"keys for 36 choices.*\[99\] have 99"):
        KeyMap(discrete(99))
    with pytest.raises(UserError, match=r"keys for 8 continuous actions.* 21"):
        KeyMap(ActionSpec("box", low=(0.0,) * 21, high=(1.0,) * 21))


def test_environments_that_name_their_actions() -> None:
    assert action_names(Walk()) == ["noop", "left", "right"]
    assert action_names(Sprites()) == ["stay", "left", "right", "up", "down"]
    assert action_names(gym.make("CartPole-v1")) is None


def test_minigrid_and_atari_name_theirs() -> None:
    pytest.importorskip("minigrid")
    pytest.importorskip("ale_py")
    from datamodules.envs.factory import make_env

    grid = action_names(make_env("MiniGrid-Empty-5x5-v0"))
    assert grid is not None and grid[:3] == ["left", "right", "forward"]
    pong = make_env("ale/Pong")
    names = action_names(pong)
    assert names is not None and "noop" in names and len(names) == pong.action_space.n
