"""`zoo play` up to the moment when it would serve."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toy_dreams import Judging, Silent, make_walk, recorded

from datamodules.recorded_datamodule import HeldOut
from zoo.__main__ import main
from zoo.commands import play

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from zoo.play import server  # noqa: E402
from zoo.play.session import DreamSession  # noqa: E402

WITH_ENV = {"make_env": make_walk}


def some_episodes(count: int, max_steps: int) -> HeldOut:
    assert max_steps >= 14
    # The last two steps are padding.
    return HeldOut(recorded(*range(1, 15)), torch.tensor([12]), torch.tensor([False]))


RECORDED = {"some_episodes": some_episodes}


class Served(SimpleNamespace):
    """What the command would have served: the arguments of `create_app`, and uvicorn's."""

    def session(self) -> DreamSession:
        return self.make_session()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs `zoo play` on a toy model whose run has the given data."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    seen = Served()

    def create_app(make_session: Any, keys: Any, title: str, limits: Any, hosts: Any) -> None:
        vars(seen).update(
            make_session=make_session, keys=keys, title=title, limits=limits, hosts=hosts
        )

    def serve(*options: str, model: Any = None, data: dict[str, Any] = WITH_ENV) -> Served:
        made = Judging() if model is None else model
        made.name = "toy"
        monkeypatch.setattr(play, "load", lambda *_, **__: made)
        monkeypatch.setattr(play.Run, "datamodule", lambda *_, **__: SimpleNamespace(**data))
        monkeypatch.setattr(server, "create_app", create_app)
        monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: _note(seen, self, sockets))
        seen.code = main(["play", str(tmp_path), "--port", "0", *options])
        return seen

    return serve


def _note(seen: Served, serving: Any, sockets: list[socket.socket]) -> None:
    seen.address, seen.largest = sockets[0].getsockname(), serving.config.ws_max_size
    raise KeyboardInterrupt


def test_a_run_with_an_environment(serve: Any, capsys: Any) -> None:
    seen = serve("--fps", "10", "--visitors", "2", "--starts", "3")
    assert seen.code == 0
    host, port = seen.address
    assert host == "127.0.0.1"
    assert capsys.readouterr().out == f"play at http://127.0.0.1:{port}; Ctrl-C ends it\n"
    assert (seen.limits.fps, seen.limits.visitors) == (10, 2)
    assert seen.title.startswith("toy: ")
    assert "127.0.0.1" in seen.hosts and "*" not in seen.hosts
    assert [*seen.keys.bindings] == ["0", "ArrowLeft", "ArrowRight"]
    assert seen.largest <= 4096
    session = seen.session()
    assert len(session.starts) == 3 and session.step(0).reality is not None


@pytest.mark.parametrize("model", [Judging(), Silent()])
def test_a_run_on_recorded_data(serve: Any, capsys: Any, model: Any) -> None:
    seen = serve(model=model, data=RECORDED)
    assert seen.code == 0 and "(a dream alone)" in capsys.readouterr().out
    assert [*seen.keys.bindings] == ["0", "1", "2"]
    session = seen.session()
    assert session.step(0).reality is None
    places = [int(start.state["place"]) for start in session.starts]
    assert len(places) == 8 and places[0] == 1 and places[-1] == 12


def test_latent_actions_are_not_shown_beside_reality(serve: Any, capsys: Any) -> None:
    seen = serve(model=Silent())
    assert "(a dream alone)" in capsys.readouterr().out
    assert seen.session().step(0).reality is None


def test_an_open_address_is_told(serve: Any, capsys: Any) -> None:
    seen = serve("--host", "0.0.0.0")
    assert seen.address[0] == "0.0.0.0" and list(seen.hosts) == ["*"]
    assert "whoever reaches this address may play" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--starts", "0"], "--starts 0: at least 1"),
        (["--fps", "0"], "fps is 0"),
        (["--visitors", "0"], "visitors is 0"),
        (["--port", "70000"], "cannot listen on 127.0.0.1 port 70000"),
    ],
)
def test_bad_options(serve: Any, capsys: Any, options: list[str], sentence: str) -> None:
    assert serve(*options).code == 2
    assert sentence in capsys.readouterr().err


def test_a_port_that_is_taken(serve: Any, capsys: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert serve("--port", str(other.getsockname()[1])).code == 2
    assert "try --port 0" in capsys.readouterr().err


def test_a_model_that_does_not_dream(serve: Any, capsys: Any) -> None:
    assert serve(model=torch.nn.Linear(1, 1)).code == 2
    assert "a Linear is no Imaginer" in capsys.readouterr().err


def test_no_run(capsys: Any, tmp_path: Path) -> None:
    assert main(["play", str(tmp_path / "none")]) == 2
    assert "there is no run directory" in capsys.readouterr().err


def test_the_extra_is_named(serve: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "zoo.play.server")
    monkeypatch.delattr("zoo.play.server")
    assert main(["play", "."]) == 2
    assert "pip install 'world-model-zoo[play]'" in capsys.readouterr().err
