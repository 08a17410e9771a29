import pytest

from benchmarks import display
from benchmarks.cell import Cell
from benchmarks.pool import Progress, State


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.4, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (185, "3:05"), (3723, "1:02:03")],
)
def test_duration(seconds, text):
    assert display.duration(seconds) == text


def test_lines_are_few(monkeypatch, capsys):
    clock = iter([10.0, 20.0, 26.0, 27.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    lines = display.LineDisplay()
    progress = Progress(Cell("dqn", "p", "t", 0, env_steps=100), 10.0, env_steps=50, score=7.25)
    for _ in range(4):
        lines.update(State(total=1, jobs=1, running=[progress]))
    assert capsys.readouterr().out == (
        "0/1 cells  dqn/p seed=0: 50 env steps, return 7.25  ETA 10 s\n"
    )


def test_live_table_shows_the_running_cells():
    from rich.console import Console
    from rich.live import Live

    console = Console(record=True, width=120, force_terminal=True)
    progress = Progress(Cell("dqn", "p", "t", 0, env_steps=100), 10.0, env_steps=50, score=7.25)
    with Live(console=console, auto_refresh=False) as live:
        shown = display.LiveDisplay(live)
        shown.update(State(total=2, jobs=1, running=[progress], failed=[progress.cell]))
        shown.message("[done]")
        live.refresh()
    text = console.export_text()
    for words in ("dqn/p seed=0", "50", "7.2", "10 s", "0/2 cells, 1 failed", "[done]"):
        assert words in text
