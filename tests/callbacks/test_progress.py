import io
import time

import pytest
from callback_standins import TinyData, TinyModel, trainer
from rich.console import Console

from callbacks import progress
from callbacks.budget import Budget
from callbacks.evaluation import Evaluation
from callbacks.progress import RunProgress


def run(tmp_path, terminal, *callbacks, budget=None, updates=30, **options):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=200, no_color=True)
    t = trainer(
        tmp_path, *callbacks, budget or Budget(updates=updates), RunProgress(console=console)
    )
    t.fit(TinyModel(**options), TinyData())
    return out.getvalue()


def test_plain_lines_show_start_first_update_and_end(tmp_path):
    evaluation = Evaluation(every_env_steps=100, episodes=1)
    text = run(tmp_path, False, evaluation, budget=Budget(env_steps=600))
    assert "\x1b" not in text
    first, second, *_, last = text.splitlines()
    assert first.startswith("0/600 env steps (0%)")
    assert second.startswith("2/600 env steps (0%)  1 updates  return 1.0")
    assert last.startswith("600/600 env steps (100%)  300 updates  return 1.0  best eval")
    assert "updates/s" in last
    assert len(text.splitlines()) <= 4


def test_lines_come_periodically_and_tell_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.1)
    text = run(tmp_path, False, updates=30, sleep=0.02)
    lines = text.splitlines()
    assert 5 <= len(lines) <= 12
    assert all(" left" in line for line in lines[2:])
    assert lines[-1].startswith("30/30 updates (100%)  60 env steps")


def test_terminal_line_is_live_and_refreshed_at_most_five_times_a_second(tmp_path, monkeypatch):
    shown = []
    show = RunProgress._show
    monkeypatch.setattr(RunProgress, "_show", lambda s, now: (shown.append(now), show(s, now)))
    started = time.monotonic()
    text = run(tmp_path, True, updates=30, sleep=0.02)
    assert "\x1b" in text
    assert "30/30 updates" in text
    # start, first update and end are shown at once
    assert len(shown) <= 3 + 5 * (time.monotonic() - started)


def test_prefill_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    seen = []

    class Prefilled(TinyData):
        def next_batch(self):
            while self.env_steps < 10:
                self.env_steps += 2
                self.progress()
                seen.append(out.getvalue().splitlines()[-1])
            return super().next_batch()

    out = io.StringIO()
    bar = RunProgress(console=Console(file=out, force_terminal=False, width=200))
    trainer(tmp_path, Budget(env_steps=12), bar).fit(TinyModel(), Prefilled())
    assert [line.split("/")[0] for line in seen] == ["2", "4", "6", "8", "10"]
    assert "0 updates" in seen[-1]


def test_terminal_is_given_back_after_an_exception(tmp_path):
    bar = RunProgress(console=Console(file=io.StringIO(), force_terminal=True))
    t = trainer(tmp_path, bar)
    with pytest.raises(ValueError, match="nan"):
        t.fit(TinyModel(nan_at=3), TinyData())
    assert bar._live is None
