"""The page and its websocket, over the test client; and a visitor without any web."""

from __future__ import annotations

import base64
import io
import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from toy_dreams import WIDTH, Judging, place, session

from datamodules.errors import UserError
from zoo.play.keys import KeyMap
from zoo.play.messages import Keys, Pause, Record, Reset

pytest.importorskip("fastapi")
try:
    from starlette import testclient
except RuntimeError as error:  # it does not raise an ImportError
    pytest.skip(f"no test client: {error}", allow_module_level=True)
from starlette.websockets import WebSocketDisconnect

from zoo.play.server import Allowance, Limits, Visitor, create_app

NAMES = ["noop", "left", "right"]
KEYS = KeyMap(Judging.spec.action, NAMES)


def client(make_session: Callable[[], Any] = session, **limits: Any) -> Any:
    app = create_app(make_session, KEYS, "a toy", Limits(**limits))
    return testclient.TestClient(app, base_url="http://127.0.0.1")


def connect(page: Any, **headers: str) -> Any:
    return page.websocket_connect("ws://127.0.0.1/play", headers=headers)


def say(socket: Any, kind: str, **content: Any) -> None:
    socket.send_text(json.dumps({"type": kind, **content}))


def next_of(socket: Any, kind: str) -> dict[str, Any]:
    """The next message of a kind; others are passed over."""
    for _ in range(1000):
        message = json.loads(socket.receive_text())
        if message["type"] == kind:
            return message
    raise AssertionError(f"no {kind} came")


def frames(socket: Any) -> Iterator[dict[str, Any]]:
    while True:
        yield next_of(socket, "frame")


def seen(frame: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(frame["picture"]))))


class TestThePage:
    def test_it_needs_nothing_from_elsewhere(self) -> None:
        answer = client().get("/")
        assert answer.status_code == 200
        assert not re.search(
            r"(?:src|href)\s*=\s*[\"'](?!data:)|https?://|@import|url\(", answer.text
        )
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "connect-src 'self'" in policy
        assert answer.text.count("<canvas") == 1

    def test_other_names_do_not_lead_here(self) -> None:
        assert client().get("/", headers={"host": "elsewhere.example"}).status_code == 400
        assert client().get("/", headers={"host": "localhost:8000"}).status_code == 200

    def test_there_is_nothing_else(self) -> None:
        for path in ("/docs", "/openapi.json", "/page.html"):
            assert client().get(path).status_code == 404


class TestPlaying:
    def test_it_says_what_the_keys_do(self) -> None:
        with connect(client()) as socket:
            hello = json.loads(socket.receive_text())
        assert hello["type"] == "hello" and hello["title"] == "a toy" and hello["starts"] == 3
        assert hello["keys"] == [
            {"key": "0", "label": "noop"},
            {"key": "ArrowLeft", "label": "left"},
            {"key": "ArrowRight", "label": "right"},
        ]
        assert hello["rest"] == "0"

    def test_keys_move_the_dream_while_they_are_held(self) -> None:
        with connect(client(fps=50)) as socket:
            begun = place(seen(next_of(socket, "frame")))
            say(socket, "keys", held=["ArrowLeft"])
            coming = frames(socket)
            last = next(frame for frame in coming if place(seen(frame)) == begun - 2)
            assert last["dream"]["reward"] == pytest.approx((begun - 2) / 10)
            assert last["reality"] == {k: pytest.approx(v) for k, v in last["dream"].items()}
            assert last["value"] == 2 * (begun - 2) and last["goes_on"] == 1
            say(socket, "keys", held=[])
            time.sleep(0.1)
            say(socket, "reset", start=0)
            next(frame for frame in coming if frame["step"] == 0)
            assert place(seen(next(coming))) == begun, "no key is held"

    def test_both_sides_are_in_one_picture(self) -> None:
        with connect(client()) as socket:
            assert seen(next_of(socket, "frame")).shape == (4, 2 * WIDTH + 2, 3)

    def test_the_clock_keeps_its_rate_and_pauses(self) -> None:
        with connect(client(fps=20)) as socket:
            coming = frames(socket)
            next(coming)
            began = time.monotonic()
            for _ in range(8):
                next(coming)
            assert 0.35 < time.monotonic() - began < 2
            say(socket, "pause", on=True)
            time.sleep(0.3)
            say(socket, "reset", start=1)
            stood = next(frame for frame in coming if frame["step"] == 0)
            time.sleep(0.2)
            say(socket, "pause", on=False)
            assert next(coming)["step"] == 1, f"it went on from {stood}"

    def test_a_recording_comes_back_as_a_gif(self) -> None:
        with connect(client(fps=50)) as socket:
            say(socket, "record", on=True)
            say(socket, "keys", held=["ArrowLeft"])
            coming = frames(socket)
            next(frame for frame in coming if frame["step"] == 6)
            say(socket, "record", on=False)
            gif = next_of(socket, "gif")
        image = Image.open(io.BytesIO(base64.b64decode(gif["data"])))
        assert image.format == "GIF" and image.n_frames >= 4 and gif["frames"] >= 5
        assert image.height == 192 and image.width == 48 * (2 * WIDTH + 2)

    def test_bad_messages_are_refused_and_the_dream_goes_on(self) -> None:
        with connect(client(fps=50)) as socket:
            for bad in ("nonsense", '{"type": "keys", "held": ["F1"]}', '{"type": "reset"}'):
                socket.send_text(bad)
                assert next_of(socket, "error")["message"]
            socket.send_bytes(b"\x00")
            assert "text" in next_of(socket, "error")["message"]
            step = next_of(socket, "frame")["step"]
            assert next_of(socket, "frame")["step"] == step + 1

    def test_a_dream_that_is_over_waits_for_a_reset(self) -> None:
        with connect(client(fps=60)) as socket:
            say(socket, "keys", held=["ArrowRight"])
            coming = frames(socket)
            last = next(frame for frame in coming if frame["dream"]["over"])
            time.sleep(0.1)
            say(socket, "reset", start=0)
            following = next(coming)
            assert following["step"] == 0 < last["step"]


class TestLimits:
    def test_every_visitor_has_a_dream_and_no_more_than_the_limit_get_one(self) -> None:
        page = client(visitors=2, fps=50)
        with connect(page) as one, connect(page) as two:
            begun = place(seen(next_of(one, "frame")))
            say(one, "keys", held=["ArrowLeft"])
            next(frame for frame in frames(one) if place(seen(frame)) < begun)
            assert place(seen(next_of(two, "frame"))) == begun
            with connect(page) as three:
                assert "all 2 places are taken" in next_of(three, "error")["message"]
                with pytest.raises(WebSocketDisconnect) as closed:
                    three.receive_text()
                assert closed.value.code == 1013
        with connect(page) as again:
            assert next_of(again, "hello")

    def test_pages_from_elsewhere_get_no_dream(self) -> None:
        page = client()
        with pytest.raises(WebSocketDisconnect), connect(page, origin="http://elsewhere.example"):
            pass
        with connect(page, origin="http://127.0.0.1") as socket:
            assert next_of(socket, "hello")

    def test_who_talks_too_much_is_sent_away(self) -> None:
        with connect(client(messages=5)) as socket:
            for _ in range(30):
                say(socket, "keys", held=[])
            assert "more than 5 messages in a second" in next_of(socket, "error")["message"]
            with pytest.raises(WebSocketDisconnect):
                next_of(socket, "never")

    def test_who_falls_asleep_is_sent_away(self) -> None:
        with connect(client(idle=0.3)) as socket:
            assert "nothing was pressed for 0.3 seconds" in next_of(socket, "error")["message"]
            with pytest.raises(WebSocketDisconnect):
                next_of(socket, "never")

    def test_dreams_are_closed_when_their_visitors_leave(self) -> None:
        closed: list[int] = []

        def make_session() -> Any:
            made = session()
            made.close = lambda: closed.append(1)  # type: ignore[method-assign]
            return made

        with client(make_session) as page:
            with connect(page) as socket:
                next_of(socket, "frame")
            for _ in range(100):
                if closed:
                    break
                time.sleep(0.02)
        assert closed == [1]

    def test_a_dream_that_cannot_begin_is_a_sentence(self) -> None:
        def make_session() -> Any:
            raise UserError("no such luck")

        with connect(client(make_session)) as socket:
            assert next_of(socket, "error")["message"] == "no such luck"

    @pytest.mark.parametrize("limit", [{"fps": 0}, {"fps": 61}, {"visitors": 0}, {"idle": -1}])
    def test_limits_that_are_none_are_refused(self, limit: dict[str, Any]) -> None:
        with pytest.raises(UserError, match=next(iter(limit))):
            Limits(**limit)

    def test_an_allowance_fills_up_again(self) -> None:
        now = [0.0]
        allowance = Allowance(2, lambda: now[0])
        assert [allowance.take() for _ in range(3)] == [True, True, False]
        now[0] = 0.5
        assert [allowance.take() for _ in range(2)] == [True, False]
        now[0] = 100
        assert [allowance.take() for _ in range(3)] == [True, True, False]


class TestVisitor:
    def visitor(self, **limits: Any) -> Visitor:
        visitor = Visitor(session(), KEYS, Limits(**limits))
        (first,) = visitor.tick()
        assert first["step"] == 0
        return visitor

    def test_a_key_that_was_only_tapped_between_two_ticks_counts_once(self) -> None:
        visitor = self.visitor()
        visitor.obey(Keys(("ArrowRight",)))
        visitor.obey(Keys(()))
        places = [place(seen(visitor.tick()[0])) for _ in range(3)]
        assert places[0] == places[1] == places[2]
        visitor.obey(Reset(0))
        assert place(seen(visitor.tick()[0])) == places[0] - 1

    def test_a_key_that_is_held_counts_more_than_one_that_was_tapped(self) -> None:
        visitor = self.visitor()
        visitor.obey(Keys(("ArrowLeft",)))
        visitor.obey(Keys(("ArrowLeft", "ArrowRight")))
        visitor.obey(Keys(("ArrowLeft",)))
        first, second = (place(seen(visitor.tick()[0])) for _ in range(2))
        assert second == first - 1
        visitor.obey(Reset(0))
        assert place(seen(visitor.tick()[0])) == first + 1

    def test_a_pause_stops_it_but_not_a_reset(self) -> None:
        visitor = self.visitor()
        visitor.obey(Pause(True))
        assert visitor.tick() == []
        visitor.obey(Reset(2))
        assert visitor.tick()[0]["step"] == 0
        assert visitor.tick() == []

    def test_a_recording_ends_by_itself_when_it_is_full(self) -> None:
        visitor = self.visitor(recording=3)
        visitor.obey(Record(True))
        taken = []
        for _ in range(4):
            visitor.tick()
            taken.append(len(visitor.take_recording()))
        assert taken == [0, 0, 3, 0]

    def test_frames_of_a_recording_have_one_size(self) -> None:
        visitor = self.visitor()
        visitor.obey(Record(True))
        visitor.tick()
        visitor.session._env = visitor.session._reality = None
        visitor.tick()
        visitor.obey(Record(False))
        assert len(visitor.take_recording()) == 1

    def test_an_environment_that_fails_pauses_it_with_a_sentence(self) -> None:
        visitor = self.visitor()
        assert visitor.session._env is not None
        del visitor.session._env.unwrapped.place  # type: ignore[attr-defined]
        (trouble,) = visitor.tick()
        assert trouble["type"] == "error" and "environment failed" in trouble["message"]
        assert trouble["paused"] and visitor.tick() == []
