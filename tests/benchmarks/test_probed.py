"""Suites in which features are probed: cells that learn nothing, and their report."""

import json
from dataclasses import asdict

import pytest

from benchmarks.cell import run_cell, write_json
from benchmarks.report import write_report
from benchmarks.suite import load_suite, parse_suite
from benchmarks.tables import notes, score_header
from datamodules.errors import UserError

TASK = "zoo/Sprites-v0"
PROBE = {"target": "position", "clips": 24, "clip_length": 2}
SUITE = {
    "name": "probes",
    "title": "Probes",
    "seeds": 2,
    "score": "probe_r2",
    "probe": PROBE,
    "entries": [
        {"model": "pixels", "preset": "sprites", "task": TASK},
        {
            "model": "untrained",
            "preset": "sprites",
            "variant": "jepa-wm",
            "task": TASK,
            "options": {"of": "jepa-wm/sprites"},
        },
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    suite, out = parse_suite(SUITE), tmp_path_factory.mktemp("probes")
    for cell in suite.cells():
        run_cell(out_dir=out, **asdict(cell))
    manifest = {"suite": suite.to_dict(), "seeds": 2, "command": "zoo bench probes"}
    write_json(out / "suite.json", manifest)
    return out


def test_a_cell_ends_with_its_score(folder):
    result = json.loads((folder / "cells/pixels/sprites/seed=0/result.json").read_text())
    *others, last = result["rows"]
    assert last["metric"] == "probe_r2"
    assert last["value"] <= 1
    assert last["n"] == PROBE["clips"]
    assert {row["metric"] for row in others} == {"peak_rss_mb", "probe_knn_r2", "params"}
    assert [row["value"] for row in others if row["metric"] == "params"] == [0]
    other = json.loads((folder / "cells/pixels/sprites/seed=1/result.json").read_text())
    assert other["rows"][-1]["value"] != last["value"]


def test_untrained_models_are_new_for_each_seed_and_the_same_again(folder, tmp_path):
    cell = parse_suite(SUITE).cells()[2]
    again = run_cell(out_dir=tmp_path, **asdict(cell))
    rows = json.loads(cell.result(folder).read_text())["rows"]
    assert again["rows"][-1]["value"] == rows[-1]["value"]
    with pytest.raises(UserError, match=r"which model\? options: \{of: MODEL/PRESET\}"):
        run_cell("untrained", "sprites", TASK, 0, tmp_path, score="probe_r2", probe=PROBE)


def test_the_report_compares_the_score(folder):
    summary = write_report(folder)
    assert score_header(summary)[1] == "IQM of probe R^2 [95% CI]"
    assert score_header(summary)[4] == "clips"
    assert any("probe R^2 on fresh clips" in note for note in notes(summary))
    assert not any("greedy" in note for note in notes(summary))
    assert "probe knn r2" in (folder / "report.md").read_text()
    assert "of returns" not in (folder / "report.md").read_text()


def test_unknown_scores_are_refused():
    with pytest.raises(UserError, match="has score 'probes'; there is achieved, act_latency_ms, "):
        parse_suite({**SUITE, "score": "probes"})
    assert load_suite("representation").score == "probe_r2"
    assert load_suite("quickstart").score == "return_mean"
