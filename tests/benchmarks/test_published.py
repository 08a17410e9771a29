import csv
import json

import numpy as np
import pytest

from benchmarks import statistics as stats
from benchmarks.published import Published, list_published, load_published
from benchmarks.report import write_report
from benchmarks.suite import load_suite
from benchmarks.summary import Summary
from benchmarks.tables import AGGREGATE_HEADER, aggregate_rows, published_rows

ATARI = load_suite("atari100k").tasks
ROWS = {row.label: row for row in load_published("atari100k")}


def normalized(label, **other):
    return [
        np.array([ATARI[task].normalize(value) for value in other.get(task[4:], scores)])
        for task, scores in ROWS[label].scores.items()
    ]


def test_every_reference_has_all_tasks_and_a_source():
    assert list_published() == ["atari100k"]
    for row in ROWS.values():
        assert row.scores.keys() == ATARI.keys()
        assert row.source
        assert bool(row.runs) != bool(row.means)
        assert {len(runs) for runs in row.runs.values()} <= {5}


def test_published_aggregates_of_diamond():
    # Table 1 of arXiv:2405.12399: mean 1.459, median 0.373, IQM 0.641, optimality gap 0.480, 11.
    tasks = normalized("DIAMOND")
    assert sum(map(len, tasks)) == 130
    assert stats.mean(tasks) == pytest.approx(1.4590, abs=5e-5)
    assert stats.median(tasks) == pytest.approx(0.3734, abs=5e-5)
    assert stats.iqm(tasks) == pytest.approx(0.6408, abs=5e-5)
    assert stats.optimality_gap(tasks) == pytest.approx(0.4802, abs=5e-5)
    assert stats.above_expert(tasks) == 11
    # Over the means of the games, which is wrong, it would be another number.
    means = [np.atleast_1d(task.mean()) for task in tasks]
    assert stats.iqm(means) == pytest.approx(0.757, abs=5e-4)


def test_a_tie_with_the_human_is_not_superhuman():
    # IRIS on Pong: 14.6 and 14.6. The paper counts it, and prints 10.
    tasks = normalized("IRIS")
    assert stats.mean(tasks) == pytest.approx(1.0459, abs=5e-5)
    assert stats.median(tasks) == pytest.approx(0.2888, abs=5e-5)
    assert stats.iqm(tasks) == pytest.approx(0.5012, abs=5e-5)
    assert stats.above_expert(tasks) == 9
    tie = dict(zip(ATARI, tasks, strict=True))["ale/Pong"]
    assert tie.mean() == pytest.approx(1, abs=1e-12)


def test_storm_with_and_without_freeway():
    repository = normalized("STORM (repository)")
    assert stats.mean(repository) == pytest.approx(1.2221, abs=5e-5)
    assert stats.iqm(repository) == pytest.approx(0.5611, abs=5e-5)
    substituted = normalized("STORM (repository)", Freeway=[33.5] * 5)
    assert stats.mean(substituted) == pytest.approx(1.2657, abs=5e-5)
    assert stats.iqm(substituted) == pytest.approx(0.6358, abs=5e-5)


@pytest.mark.parametrize(
    ("label", "mean", "superhuman"),
    [
        ("SimPLe", 0.332, 1),
        ("TWM", 0.956, 8),
        ("STORM", 1.266, 10),
        ("DreamerV3", 1.130, 9),  # the paper prints 1.097
        ("DreamerV3 (repository)", 1.238, 8),
        ("delta-IRIS", 1.383, 12),
    ],
)
def test_aggregates_of_the_other_rows(label, mean, superhuman):
    tasks = normalized(label)
    assert stats.mean(tasks) == pytest.approx(mean, abs=5e-4)
    assert stats.above_expert(tasks) == superhuman


def test_means_have_no_iqm():
    tasks = [np.array([2.0]), np.array([0.5])]
    known = Published("x", "s", means={"a": 2.0, "b": 0.5}).aggregates(tasks)
    assert known == {
        "median": (1.25, 1.25, 1.25),
        "mean": (1.25, 1.25, 1.25),
        "above_expert": (1, 1, 1),
    }
    assert list(Published("x", "s", runs={"a": [2.0]}).aggregates(tasks)) == list(stats.AGGREGATES)


def test_published_scores_stand_beside_ours_on_the_same_games(three_games):
    summary = write_report(three_games)
    (ours,) = aggregate_rows(summary)
    assert ours[:3] == ["dreamer-v3", "2 of 3", "6"]
    rows = {
        row[0]: dict(zip(AGGREGATE_HEADER, row, strict=True)) for row in published_rows(summary)
    }
    assert list(rows) == list(ROWS)
    assert (rows["DIAMOND"]["tasks"], rows["DIAMOND"]["runs"]) == ("3 of 3", "15")
    assert rows["DIAMOND"]["above expert"].startswith("3 [")
    assert "[" in rows["DIAMOND"]["IQM"]
    assert (rows["SimPLe"]["runs"], rows["SimPLe"]["IQM"]) == ("means only", "-")
    assert rows["SimPLe"]["mean"] == "0.72"  # 7.7 / 12, 16.7 / 29.6 and 33.5 / 35.3
    for name in ("report.md", "report.html"):
        text = (three_games / name).read_text()
        assert "DIAMOND: eloialonso/diamond@5bcd159" in text
        assert "Freeway is 0 in all five runs there" in text
        assert "last checkpoint" in text
    markdown = (three_games / "report.md").read_text()
    assert "IRIS, published | Dre" in markdown
    assert "| ale/Freeway | 0 | 29.6 |  | 16.7 | 24.3 |" in markdown
    # A shell takes the command as it stands.
    assert "'--data.env_kwargs={\"grey\": true}' --data.env=ale/Boxing" in markdown
    with (three_games / "summary.csv").open(newline="") as file:
        records = {line["model"]: line for line in csv.DictReader(file) if line["task"] == "(all)"}
    assert records["dreamer-v3"]["above_expert"] == "2.0"
    assert (records["TWM"]["preset"], records["TWM"]["normalized_iqm"]) == ("(published)", "")
    assert float(records["DIAMOND"]["normalized_iqm"]) > 1


def test_nothing_is_published_on_other_tasks(results):
    path = results / "suite.json"
    manifest = json.loads(path.read_text())
    manifest["suite"]["published"] = "atari100k"
    path.write_text(json.dumps(manifest))
    assert Summary(results).published == []
    write_report(results)
    assert "Published" not in (results / "report.md").read_text()
