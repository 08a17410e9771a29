"""The page in a real browser: keys are pressed, and the sprite of the dream moves on the canvas."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from toy_dreams import WIDTH, Judging, session

from zoo.play.keys import KeyMap

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
client = pytest.importorskip("websockets.sync.client")

from zoo.play.server import Limits, create_app  # noqa: E402

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for path in map(shutil.which, NAMES) if path), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser here: none of {NAMES}")

# Where the white column stands in the dream, the left side of the canvas.
PLACE = f"""(() => {{
  const canvas = document.getElementById("canvas"), scale = canvas.width / {2 * WIDTH + 2};
  const context = canvas.getContext("2d");
  for (let x = 0; x < {WIDTH}; x++) {{
    if (context.getImageData((x + 0.5) * scale, canvas.height / 2, 1, 1).data[0] > 200) return x;
  }}
  return -1;
}})()"""


class Tab:
    """A tab of a browser, by its DevTools protocol."""

    def __init__(self, port: int) -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
            tabs = json.load(answer)
        url = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
        self.connection = client.connect(url, max_size=None)
        self.count = 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.count += 1
        said = {"id": self.count, "method": method, "params": parameters}
        self.connection.send(json.dumps(said))
        while True:
            answer = json.loads(self.connection.recv(timeout=30))
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def value(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def text(self, name: str) -> str:
        return self.value(f'document.getElementById("{name}").textContent')

    def click(self, name: str) -> None:
        self.value(f'document.getElementById("{name}").click()')

    def key(self, kind: str, key: str) -> None:
        self.call("Input.dispatchKeyEvent", type=kind, key=key)

    def wait(self, expression: str, wanted: Any) -> None:
        value = None
        for _ in range(200):
            value = self.value(expression)
            if value == wanted:
                return
            time.sleep(0.05)
        raise AssertionError(f"{expression} stays {value!r}, wanted {wanted!r}")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    keys = KeyMap(Judging.spec.action, ["noop", "left", "right"])
    app = create_app(session, keys, "a toy", Limits(fps=20))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    folder = tmp_path_factory.mktemp("browser")
    assert BROWSER is not None
    options = ["--headless=new", "--remote-debugging-port=0", f"--user-data-dir={folder}"]
    options += ["--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    if os.geteuid() == 0:
        options.append("--no-sandbox")  # with which it refuses to start as root
    process = subprocess.Popen(
        [BROWSER, *options, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield _port(folder / "DevToolsActivePort", process)
    finally:
        process.terminate()
        process.wait(10)


def _port(file: Path, process: subprocess.Popen[bytes]) -> int:
    for _ in range(600):
        if file.is_file() and file.read_text().count("\n"):
            return int(file.read_text().split()[0])
        if process.poll() is not None:
            pytest.skip(f"the browser {BROWSER} does not start here: exit {process.returncode}")
        time.sleep(0.05)
    pytest.skip(f"the browser {BROWSER} opened no port within 30 s")


@pytest.fixture
def tab(browser: int, address: str) -> Iterator[Tab]:
    tab = Tab(browser)
    for domain in ("Page", "Runtime", "Network", "Log"):
        tab.call(f"{domain}.enable")
    tab.call("Page.navigate", url=address)
    tab.wait('document.getElementById("step")?.textContent > 0', True)
    yield tab
    tab.connection.close()


def test_keys_move_the_sprite_of_the_dream(tab: Tab) -> None:
    begun = tab.value(PLACE)
    assert begun > 0
    for key, step in (("ArrowRight", 1), ("ArrowLeft", -1)):
        tab.key("keyDown", key)
        tab.wait(f"({PLACE} - {begun}) * {step} >= 2", True)
        tab.key("keyUp", key)
        time.sleep(0.2)
        stopped = tab.value(PLACE)
        time.sleep(0.2)
        assert tab.value(PLACE) == stopped, "no key is held"
    assert tab.text("error") == ""


def test_what_is_shown(tab: Tab) -> None:
    assert tab.text("title") == "a toy"
    assert [
        tab.value(f"[...document.querySelectorAll('kbd')][{i}].textContent") for i in range(4)
    ] == [
        "0",
        "ArrowLeft",
        "ArrowRight",
        "none",
    ]
    tab.click("pause")
    tab.wait('document.getElementById("pause").textContent', "go on")
    time.sleep(0.2)
    place = tab.value(PLACE)
    assert float(tab.text("value")) == 2 * place
    assert float(tab.text("dream-reward")) == pytest.approx(place / 10)
    assert tab.text("real-total") == tab.text("dream-total")
    assert tab.text("real-over") == "running"
    step = tab.text("step")
    time.sleep(0.2)
    assert tab.text("step") == step


def test_reset_start_and_recording(tab: Tab) -> None:
    tab.click("pause")
    tab.wait('document.getElementById("pause").textContent', "go on")
    tab.click("record")
    tab.value(
        'const slider = document.getElementById("start"); slider.value = 2;'
        'slider.dispatchEvent(new Event("input"))'
    )
    tab.wait('document.getElementById("step").textContent', "0")
    assert tab.text("chosen") == "2"
    begun = tab.value(PLACE)
    tab.click("pause")
    tab.wait('document.getElementById("step").textContent > 5', True)
    tab.click("record")
    tab.wait('document.getElementById("gif").hidden', False)
    gif = tab.value('document.getElementById("gif").href')
    assert gif.startswith("data:image/gif;base64,R0lGOD")
    tab.key("keyDown", "ArrowLeft")
    tab.wait(f"{PLACE} < {begun}", True)
    tab.key("keyUp", "ArrowLeft")
    tab.key("keyDown", "Enter")
    tab.wait(PLACE, begun)


def test_nothing_is_asked_of_others_and_nothing_goes_wrong(tab: Tab, address: str) -> None:
    tab.value("1")
    asked = [
        e["params"]["request"]["url"]
        for e in tab.events
        if e["method"] == "Network.requestWillBeSent"
    ]
    assert asked and all(url.startswith((address, "data:", "about:")) for url in asked)
    logged = [e["params"]["entry"] for e in tab.events if e["method"] == "Log.entryAdded"]
    assert not [entry for entry in logged if entry["level"] == "error"]
    assert not [e for e in tab.events if e["method"] == "Runtime.exceptionThrown"]
