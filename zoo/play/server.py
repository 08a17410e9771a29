"""The web around a dream: one page, and one websocket for each visitor.

The server has the clock: at a fixed rate it takes the keys that are held, dreams one step, and
sends what is to be seen. All visitors dream in one thread, one after the other.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import numpy as np
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from fastapi.responses import HTMLResponse
from PIL import Image
from starlette.middleware.trustedhost import TrustedHostMiddleware

from datamodules.errors import UserError
from datamodules.sources.video_files import write_gif
from zoo.play.keys import KeyMap
from zoo.play.messages import Keys, Message, Pause, Record, parse
from zoo.play.session import DreamSession, Frame, Moment

PAGE = Path(__file__).with_name("page.html")
# Nothing from elsewhere, and no talking to others.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; frame-ancestors 'none'"
)
GIF_HEIGHT = 192  # pixels that smaller pictures are enlarged to, at least
REFUSED, TOO_MANY = 1008, 1013  # codes with which websockets are closed

Answer = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """What visitors may ask for.

    Args:
        fps: steps of a dream per second.
        visitors: most that play at a time.
        messages: most of one visitor per second, on average; so many at once.
        recording: frames after which a recording ends by itself.
        idle: seconds without a message after which a visitor is sent away.
    """

    fps: float = 20.0
    visitors: int = 4
    messages: int = 60
    recording: int = 600
    idle: float = 600.0

    def __post_init__(self) -> None:
        if not 0 < self.fps <= 60:
            raise UserError(f"fps is {self.fps:g}: it must be above 0 and at most 60")
        for name in ("visitors", "messages", "recording", "idle"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)}: it must be above 0")


class Visitor:
    """One player: the dream, the keys that are held, and what was recorded.

    `obey` may be called from another thread than `tick`.
    """

    def __init__(self, session: DreamSession, keys: KeyMap, limits: Limits) -> None:
        self.session, self.keys, self.limits = session, keys, limits
        self.paused = False
        self._held: tuple[str, ...] = ()
        self._tapped: tuple[str, ...] = ()  # went down since the last step, and may be up again
        self._reset: int | None = 0
        self._wants_recording = False
        self._recorded: list[np.ndarray] = []
        self._over = False

    def obey(self, message: Message) -> None:
        """Takes a message to heart; it shows at the next tick."""
        if isinstance(message, Keys):
            self._tapped += tuple(k for k in message.held if k not in self._tapped)
            self._held = message.held
        elif isinstance(message, Pause):
            self.paused = message.on
        elif isinstance(message, Record):
            self._wants_recording = message.on
        else:
            self._reset = message.start

    def tick(self) -> list[Answer]:
        """One beat of the clock: what is to be sent."""
        try:
            return self._advance()
        except UserError as error:
            self.paused = True
            return [{"type": "error", "message": str(error), "paused": True}]

    def take_recording(self) -> list[np.ndarray]:
        """The frames of a recording that has ended or is full, once; else none."""
        full = len(self._recorded) >= self.limits.recording
        if self._wants_recording and not full:
            return []
        frames, self._recorded, self._wants_recording = self._recorded, [], False
        return frames

    def _advance(self) -> list[Answer]:
        start, self._reset = self._reset, None
        tapped, self._tapped = self._tapped, ()
        began = time.perf_counter()
        if start is not None:
            frame = self.session.reset(start)
        elif self.paused or self._over:
            return []
        else:
            held = self._held
            taps = [key for key in tapped if key not in held]
            frame = self.session.step(self.keys.action([*taps, *held]))
        self._over = frame.dream.over
        # After a reset there may be no reality any more; frames of a GIF have one size.
        if self._wants_recording and _fits(frame.picture, self._recorded):
            self._recorded.append(frame.picture)
        return [_frame(frame, time.perf_counter() - began)]


class Allowance:
    """A bucket of tokens that fills at a rate: so many messages at once, so many per second."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._clock = rate, clock
        self._left, self._seen = rate, clock()

    def take(self) -> bool:
        """Uses up one token, if there is one."""
        now = self._clock()
        self._left = min(self._rate, self._left + (now - self._seen) * self._rate)
        self._seen = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


def create_app(
    make_session: Callable[[], DreamSession],
    keys: KeyMap,
    title: str,
    limits: Limits | None = None,
    hosts: Sequence[str] = ("127.0.0.1", "localhost"),
) -> FastAPI:
    """The web application.

    Args:
        make_session: a new dream for each visitor, called in the thread that dreams.
        keys: what the keys do.
        title: what is played.
        limits: the defaults of `Limits` if not given.
        hosts: names by which browsers may call it, "*" for any; with others a page from elsewhere
            could get in by a name that it made to lead here.
    """
    allowed = limits or Limits()
    app = FastAPI(title=title, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    worker = ThreadPoolExecutor(1, "dream")
    places = asyncio.Semaphore(allowed.visitors)

    @app.get("/")
    def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(), headers={"Content-Security-Policy": POLICY})

    @app.websocket("/play")
    async def play(socket: WebSocket) -> None:
        if not _from_here(socket):
            await socket.close(REFUSED)
            return
        await socket.accept()
        with suppress(WebSocketDisconnect):
            if places.locked():
                await _send_away(socket, _full(allowed), TOO_MANY)
                return
            async with places:
                await _welcome(socket)

    async def _welcome(socket: WebSocket) -> None:
        loop = asyncio.get_running_loop()
        try:
            session = await loop.run_in_executor(worker, make_session)
        except UserError as error:
            await _send_away(socket, str(error), REFUSED)
            return
        visitor = Visitor(session, keys, allowed)
        try:
            await _send(socket, [_hello(session, keys, title, allowed)])
            reason = await _play(socket, visitor, worker)
            if reason:
                await _send_away(socket, reason, REFUSED)
        finally:
            await asyncio.shield(loop.run_in_executor(worker, session.close))

    return app


async def _play(socket: WebSocket, visitor: Visitor, worker: ThreadPoolExecutor) -> str:
    """Listens while the clock runs, until the visitor leaves, or the reason why it has to."""
    listening = asyncio.ensure_future(_listen(socket, visitor))
    ticking = asyncio.ensure_future(_clock(socket, visitor, worker))
    tasks = (listening, ticking)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return listening.result() if listening.done() else ticking.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _listen(socket: WebSocket, visitor: Visitor) -> str:
    """Takes messages until the visitor leaves, or the reason why it has to."""
    limits, starts = visitor.limits, len(visitor.session.starts)
    allowance = Allowance(limits.messages)
    while True:
        try:
            came = await asyncio.wait_for(socket.receive(), limits.idle)
        except asyncio.TimeoutError:
            return f"nothing was pressed for {limits.idle:g} seconds: load the page to play on"
        if came["type"] == "websocket.disconnect":
            return ""
        if not allowance.take():
            return f"more than {limits.messages} messages in a second: load the page to play on"
        try:
            visitor.obey(parse(came.get("text"), visitor.keys.bindings, starts))
        except UserError as error:
            await _send(socket, [{"type": "error", "message": str(error)}])


async def _clock(socket: WebSocket, visitor: Visitor, worker: ThreadPoolExecutor) -> NoReturn:
    """Ticks at a fixed rate; what comes late is not made up for."""
    loop, rate = asyncio.get_running_loop(), visitor.limits.fps
    due = loop.time()
    while True:
        await _send(socket, await loop.run_in_executor(worker, visitor.tick))
        frames = visitor.take_recording()
        if frames:  # takes seconds: elsewhere, so that the others dream on
            await _send(socket, [await loop.run_in_executor(None, _gif, frames, rate)])
        due = max(due + 1 / rate, loop.time())
        await asyncio.sleep(due - loop.time())


async def _send(socket: WebSocket, answers: Iterable[Answer]) -> None:
    for answer in answers:
        await socket.send_text(json.dumps(answer))


async def _send_away(socket: WebSocket, reason: str, code: int) -> None:
    await _send(socket, [{"type": "error", "message": reason}])
    await socket.close(code)


def _full(limits: Limits) -> str:
    return f"all {limits.visitors} places are taken: try again when somebody has left"


def _from_here(socket: WebSocket) -> bool:
    """Whether the page that asks is ours; programs that are no browsers do not say."""
    origin = socket.headers.get("origin")
    return origin is None or urlsplit(origin).netloc == socket.headers.get("host")


def _hello(session: DreamSession, keys: KeyMap, title: str, limits: Limits) -> Answer:
    return {
        "type": "hello",
        "title": title,
        "fps": limits.fps,
        "starts": len(session.starts),
        "keys": [{"key": b.key, "label": b.label} for b in keys.bindings.values()],
        "rest": keys.rest,
        "repeats": session.repeats,
    }


def _frame(frame: Frame, seconds: float) -> Answer:
    reality = frame.reality
    return {
        "type": "frame",
        "step": frame.step,
        "picture": _png(frame.picture),
        "dream": _told(frame.dream),
        "reality": None if reality is None else _told(reality),
        "value": frame.value,
        "goes_on": frame.goes_on,
        "ms": 1000 * seconds,
    }


def _fits(picture: np.ndarray, others: Sequence[np.ndarray]) -> bool:
    return not others or picture.shape == others[0].shape


def _told(moment: Moment) -> Answer:
    return {"reward": moment.reward, "total": moment.total, "over": moment.over}


def _gif(frames: Sequence[np.ndarray], fps: float) -> Answer:
    pixels = np.stack(frames)
    scale = -(-GIF_HEIGHT // pixels.shape[1])
    file = io.BytesIO()
    write_gif(file, pixels.repeat(scale, 1).repeat(scale, 2), fps)
    return {"type": "gif", "data": _base64(file.getvalue()), "frames": len(frames)}


def _png(picture: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", compress_level=1)
    return _base64(file.getvalue())


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
