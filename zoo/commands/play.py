"""`zoo play`: a web page on which a person plays inside the dream of a trained model."""

from __future__ import annotations

import socket
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.errors import MissingExtra, UserError
from zoo.commands.options import Parser
from zoo.runs import Run, load

if TYPE_CHECKING:
    from zoo.base import Batch
    from zoo.play.keys import KeyMap
    from zoo.play.starts import MakeEnv, Start

HELP = "play inside the dream of a trained model, on a web page"

LOCAL = ("127.0.0.1", "localhost")
LONGEST = 64  # actions of recorded episodes among which starts are chosen


def main(argv: list[str]) -> int:
    """Serves the page until Ctrl-C."""
    parser = Parser(prog="zoo play", description=HELP)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--env", metavar="ID", help="environment (that of the run)")
    parser.add_argument("--checkpoint", choices=("best", "last"), help="(best, if there is one)")
    parser.add_argument("--fps", type=float, default=20.0, help="steps per second (20)")
    parser.add_argument("--starts", type=int, default=8, help="start frames to choose from (8)")
    parser.add_argument("--seed", type=int, default=0, help="of the starts and the noise (0)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="(8000; 0 for any that is free)")
    parser.add_argument("--visitors", type=int, default=4, help="most that play at a time (4)")
    options = parser.parse_args(argv)
    if options.starts < 1:
        raise UserError(f"--starts {options.starts}: at least 1")

    import torch

    try:
        import uvicorn

        from zoo.play.server import Limits, create_app
    except ImportError as error:
        raise MissingExtra("zoo play", "play") from error
    from zoo.play.session import DreamSession, played_actions

    limits = Limits(fps=options.fps, visitors=options.visitors)
    run = Run(options.run)
    checkpoint = run.checkpoint(options.checkpoint)
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = load(checkpoint, map_location=device)
    played_actions(model)
    data = run.datamodule(**({} if options.env is None else {"env": options.env}))
    starts, keys, make_env = _prepare(model, data, options.starts, options.seed)
    with _listen(options.host, options.port) as listener:
        app = create_app(
            lambda: DreamSession(model, starts, make_env, options.seed),
            keys,
            f"{model.name}: {run.path}",
            limits,
            LOCAL if options.host in LOCAL else ("*",),
        )
        _say(options.host, listener.getsockname()[1], make_env is not None)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws_max_size=4096))
        with suppress(KeyboardInterrupt):  # how it ends
            server.run(sockets=[listener])
    return 0


def _prepare(
    model: Any, data: Any, count: int, seed: int
) -> tuple[list[Start], KeyMap, MakeEnv | None]:
    """Where dreams begin, what the keys do, and the environment if the dreams can be led in one."""
    from zoo.base import LatentActions
    from zoo.evaluate import require_spaces
    from zoo.play.keys import KeyMap, action_names
    from zoo.play.session import played_actions
    from zoo.play.starts import from_batch, from_env

    actions, make_env = played_actions(model), getattr(data, "make_env", None)
    if make_env is None:
        return from_batch(model, _recorded(data, count), count), KeyMap(actions), None
    if isinstance(model, LatentActions):
        return from_env(model, make_env, count, seed=seed), KeyMap(actions), None
    with closing(make_env()) as env:
        require_spaces(model, env)
        names = action_names(env)
    return from_env(model, make_env, count, seed=seed), KeyMap(actions, names), make_env


def _recorded(data: Any, count: int) -> Batch:
    """The beginnings of recorded episodes, held-out ones if there are some."""
    import torch

    batch, length, _ = data.some_episodes(count, LONGEST)
    steps = batch["is_first"].shape[1]
    return {**batch, "mask": torch.arange(steps)[None] < length[:, None]}


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host} port {port}: {error}; try --port 0") from error


def _say(host: str, port: int, reality: bool) -> None:
    shown = f"[{host}]" if ":" in host else host
    print(f"play at http://{shown}:{port}{'' if reality else ' (a dream alone)'}; Ctrl-C ends it")
    if host not in LOCAL:
        print("whoever reaches this address may play: there is no password")
