"""`make_env`: every environment the zoo can use, by one name or a callable.

Whatever it makes has a Dict observation space of float32 arrays and uint8 images, described exactly
by `Spec.from_spaces(env.observation_space, env.action_space)`.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from typing import Any

import gymnasium as gym

from datamodules.envs.wrappers import ActionRepeat, DictObservation, Resize, env_name
from datamodules.errors import MissingExtra, UserError

IMAGE_SIZE = 64  # side of the images of every method's paper here
# Families of gymnasium ids that another module registers: prefix -> (module, extra).
REGISTERED_BY = {
    "ALE/": ("ale_py", "atari"),
    "Vizdoom": ("vizdoom.gymnasium_wrapper", "vizdoom"),
    "MiniGrid-": ("minigrid", "minigrid"),
    "BabyAI-": ("minigrid", "minigrid"),
    "zoo/KeyCorridor": ("datamodules.envs.corridor", ""),
    "zoo/TwoRooms": ("datamodules.envs.two_rooms", ""),
    "zoo/Sprites": ("datamodules.envs.sprites", ""),
    "zoo/Catch": ("datamodules.envs.catch", ""),
}
# They draw images of any of their sizes themselves.
DRAWN_TO_SIZE = ("zoo/TwoRooms", "zoo/Sprites", "zoo/Catch")


def make_env(
    env: str | Callable[..., gym.Env],
    *,
    action_repeat: int = 1,
    size: int | None = None,
    time_limit: int | None = None,
    **kwargs: Any,
) -> gym.Env:
    """Builds an environment whose observations and actions match its `Spec`.

    | env | observations | own keyword arguments (in `datamodules.envs`) |
    |---|---|---|
    | any gymnasium id, `module:Name-v0` | as registered | those of `gymnasium.make` |
    | `dm_control/<domain>-<task>-v0` | the task's keys, or 64x64 RGB | `dm_control.DMControl` |
    | `ale/<Game>` | 64x64 RGB, Atari-100k preprocessing | `atari.Atari` |
    | `Vizdoom...` | 64x64 RGB | `games.Doom`, and ViZDoom's |
    | `zoo/KeyCorridor...` | a vector of 10 numbers | `corridor.KeyCorridor` |
    | `zoo/TwoRooms-v0` | 33x33 or 65x65, a dot and walls | `two_rooms.TwoRooms` |
    | `zoo/Sprites-v0` | 32x32 or 64x64 RGB | `sprites.Sprites` |
    | `zoo/Catch-v0` | 32x32 or 64x64 RGB | `catch.Catch` |
    | `MiniGrid-...`, `BabyAI-...` | 64x64 RGB, no mission | `games.GridImage`, and MiniGrid's |
    | a callable | as returned | the callable's |

    Args:
        env: an id, or a callable that returns an environment.
        action_repeat: environment steps per agent step; rewards are summed. It multiplies a
            family's own frame skip: `ale/` skips 4 frames already.
        size: side of every image in pixels; by default 64 where the table says so, and otherwise
            as the environment draws it.
        time_limit: agent steps after which an episode is truncated, in place of the limit that a
            gymnasium id is registered with. The limits inside a game or a dm_control task stay.
        **kwargs: see the table.

    Raises:
        UserError: unknown id (with the nearest ones), bad argument, or unsupported space.
        MissingExtra: the environment's package is not installed.

    Example:
        >>> env = make_env("CartPole-v1", action_repeat=2)
        >>> obs, info = env.reset(seed=0)
        >>> obs["vector"].shape, obs["vector"].dtype
        ((4,), dtype('float32'))
    """
    for argument, number in {
        "action_repeat": action_repeat,
        "size": size,
        "time_limit": time_limit,
    }.items():
        if number is not None and number < 1:
            raise UserError(f"{argument}={number} must be at least 1")
    if not isinstance(env, str):
        made = _call(env, kwargs)
        name = env_name(made)
    elif env.startswith("dm_control/"):
        from datamodules.envs.dm_control import DMControl

        name = env
        made = _construct(lambda: DMControl(name, size=size or IMAGE_SIZE, **kwargs), name)
    elif env.startswith("ale/"):
        from datamodules.envs.atari import Atari

        name = env
        made = _construct(lambda: Atari(name, size=size or IMAGE_SIZE, **kwargs), name)
    else:
        name = env
        made, size = _registered(env, size, time_limit, kwargs)
    if isinstance(made, DictObservation) and action_repeat == 1 and size is time_limit is None:
        return made
    if action_repeat != 1:
        made = _repeated(made, action_repeat)
    if size is not None:
        made = Resize(made, size)
    if time_limit is not None:
        made = gym.wrappers.TimeLimit(made, time_limit)
    return DictObservation(made, name)


def _repeated(env: gym.Env, repeat: int) -> gym.Env:
    if type(env.unwrapped).__name__ == "CarRacing" and env.render_mode != "human":
        from datamodules.envs.games import CarRacing

        return CarRacing(env, repeat)
    return ActionRepeat(env, repeat)


def _call(function: Callable[..., gym.Env], kwargs: dict[str, Any]) -> gym.Env:
    made = function(**kwargs)
    if not isinstance(made, gym.Env):
        name = getattr(function, "__name__", type(function).__name__)
        raise UserError(
            f"the callable {name} returned {type(made).__name__}, not a gymnasium.Env: wrap it, or "
            "return the environment"
        )
    return made


def _registered(
    name: str, size: int | None, time_limit: int | None, kwargs: dict[str, Any]
) -> tuple[gym.Env, int | None]:
    """An environment of Gymnasium's registry, and the size its images are to have."""
    extra = None
    for prefix, (module, needed) in REGISTERED_BY.items():
        if name.startswith(prefix):
            extra = needed
            _import_extra(module, name, needed)
    own: dict[str, Any] = {}
    if extra == "vizdoom":
        own = {k: kwargs[k] for k in ("variables", "screen_rows") if k in kwargs}
    elif extra == "minigrid":
        own = {k: kwargs[k] for k in ("view",) if k in kwargs}
    rest = {key: value for key, value in kwargs.items() if key not in own}
    if size is not None and name.startswith(DRAWN_TO_SIZE):
        rest["size"], size = size, None
    if time_limit is not None:
        rest["max_episode_steps"] = -1  # no limit: ours replaces it
    env = _construct(lambda: _gymnasium(name, rest), name)
    if extra not in ("vizdoom", "minigrid"):
        return env, size
    from datamodules.envs.games import Doom, GridImage

    wrapped = Doom(env, **own) if extra == "vizdoom" else GridImage(env, **own)
    return wrapped, size or IMAGE_SIZE


def _gymnasium(name: str, kwargs: dict[str, Any]) -> gym.Env:
    try:
        # `EnvPool` checks every observation, at less cost than Gymnasium's checker.
        return gym.make(name, disable_env_checker=True, **kwargs)
    except gym.error.DependencyNotInstalled as error:
        if "box2d" in str(gym.spec(name).entry_point):
            raise MissingExtra(f"environment {name}", "box2d") from None
        raise UserError(f"environment {name} needs an optional dependency: {error}") from error
    except (gym.error.UnregisteredEnv, gym.error.DeprecatedEnv) as error:
        raise UserError(f"unknown environment {name!r}: {_nearest(name, error)}") from None
    except gym.error.Error as error:
        raise UserError(f"environment {name!r}: {error}") from error
    except ImportError as error:
        raise UserError(f"environment {name!r} cannot be imported: {error}") from error


def _nearest(name: str, error: Exception) -> str:
    ids = [*gym.registry, *("dm_control/cartpole-balance-v0", "ale/Breakout")]
    nearest = difflib.get_close_matches(name, ids, n=3)
    if nearest:
        return f"did you mean {', '.join(nearest)}?"
    return f"{error}".rstrip(".") + "; `module:Name-v0` imports the module that registers it"


def _construct(build: Callable[[], gym.Env], name: str) -> gym.Env:
    """Calls a constructor, and turns an unexpected keyword argument into a sentence."""
    try:
        return build()
    except TypeError as error:
        if "keyword argument" not in str(error):
            raise
        raise UserError(f"environment {name}: {error}") from error


def _import_extra(module: str, name: str, extra: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(f"environment {name}", extra) from error
