import base64
import csv
import json
import re
from html.parser import HTMLParser

import pytest

from benchmarks import figures
from benchmarks.cell import Cell
from benchmarks.report import write_report
from benchmarks.results import read_rows
from benchmarks.summary import Summary
from benchmarks.tables import aggregate_rows
from datamodules.errors import UserError

GIF = base64.b64decode("R0lGODlhAQABAIAAAAAAAP///ywAAAAAAQABAAACAUwAOw==")


class Page(HTMLParser):
    """Collects what a page would load, and whether its tags are balanced."""

    VOID = frozenset({"meta", "img"})

    def __init__(self, text):
        super().__init__()
        self.loads, self.open, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for key, value in attrs if key in ("src", "href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_results_csv_holds_every_row_of_every_cell(results):
    summary = write_report(results)
    rows = read_rows(results / "results.csv")
    assert rows == summary.rows
    assert len({(row.model, row.seed) for row in rows}) == 9
    curve = [row.env_steps for row in rows if (row.model, row.seed) == ("dreamer-v3", 1)]
    assert curve[:2] == [503, 1003]


def test_summary_csv(results):
    write_report(results)
    dreamer, dqn, chance, *overall = table(results / "summary.csv")
    assert (dreamer["model"], dreamer["task"], dreamer["runs"]) == (
        "dreamer-v3",
        "CartPole-v1",
        "3",
    )
    assert float(dreamer["score_iqm"]) == 495.0
    assert float(dreamer["score_mean"]) == 495.0
    assert (float(dreamer["score_min"]), float(dreamer["score_max"])) == (488.0, 500.0)
    assert float(dreamer["normalized_iqm"]) == pytest.approx((495 - 22.2) / (500 - 22.2))
    assert (dreamer["episodes"], dreamer["env_steps"]) == ("300", "10000")
    assert float(dreamer["wall_s"]) == 50.0
    assert float(dreamer["dream_reality_gap"]) == 1.03
    assert (chance["wall_s"], dqn["dream_reality_gap"]) == ("", "")
    assert [row["task"] for row in overall] == ["(all)"] * 3
    assert float(overall[2]["optimality_gap"]) == pytest.approx(1.0, abs=0.01)


def test_html_loads_nothing_and_is_well_formed(results):
    for step in (900, 10000):
        video = Cell("dreamer-v3", "cartpole", "CartPole-v1", 0).run(results) / "videos"
        video.mkdir(parents=True, exist_ok=True)
        (video / f"dream-open_loop-{step}.gif").write_bytes(GIF)
    write_report(results)
    text = (results / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert [load[:22] for load in page.loads] == ["data:image/gif;base64,"]  # the last dream only
    assert "dream-open_loop-10000" in text
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert not re.search(r"https?://|@import|url\(", text)
    assert page.tags.count("svg") == 5  # scores, two learning curves, open-loop error, profile
    assert "$" not in text
    assert "prefers-color-scheme: dark" in text


def test_documents_say_what_a_reader_needs(results):
    write_report(results)
    for name in ("report.md", "report.html"):
        text = re.sub(r"</?b>", "", (results / name).read_text())
        for words in (
            "495.0 [488.0, 500.0]",
            "dqn (n=3)" if name == "report.html" else "| dqn |",
            "300",
            "abc1234",
            "torch 2.13.0",
            "a laptop",
            "With as few as 3 runs",
            "0 is 22.2 (random), 1 is 500.0. Source: measured",
            "zoo bench made-up --out results",
            "zoo fit dreamer-v3/cartpole --run runs/dreamer-v3/cartpole/seed=0 --seed 0 "
            "--env-steps 10000",
        ):
            assert words in text, (name, words)
        assert "ithout a result" not in text


def test_markdown_pictures_exist_and_stand_alone(results):
    write_report(results)
    pictures = re.findall(r"\]\((.*?)\)", (results / "report.md").read_text())
    assert len(pictures) == 5
    for picture in pictures:
        text = (results / picture).read_text()
        assert text.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
        assert "--s0: #" in text
        assert "nan" not in text


def test_errors_of_dreams_are_drawn_relative_to_copying(results, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        figures.svg, "line_chart", lambda lines, title, *_: drawn.setdefault(title, lines) and ""
    )
    figures.draw_figures(Summary(results))
    dreamer, copying = drawn["Open-loop error on CartPole-v1"]  # the others do not dream
    assert (dreamer.label, copying.label) == ("dreamer-v3 (n=3)", "copying")
    assert (dreamer.x.tolist(), dreamer.y.tolist()) == ([1, 15], [0.25, 1.5])
    assert copying.y.tolist() == [1.0]


def test_what_was_measured_beside_the_score_stands_in_both_forms(results):
    write_report(results)
    markdown = (results / "report.md").read_text()
    assert "| CartPole-v1 | dreamer-v3 | dqn | random |" in markdown
    assert "| dream reality gap | 1.03 |  |  |" in markdown
    assert "<td>dream reality gap</td><td>1.03</td>" in (results / "report.html").read_text()


def test_failed_and_missing_cells_are_listed(incomplete):
    summary = write_report(incomplete)
    assert [cell.name for cell in summary.missing] == ["dqn/cartpole seed=1", "dqn/cartpole seed=2"]
    page = (incomplete / "report.html").read_text()
    assert "zoo: the disk is full" in page
    assert "starting &lt;b&gt;" in page  # a log is text, not markup
    assert "not run" in page
    markdown = (incomplete / "report.md").read_text()
    assert "**Without a result: 2 cells**" in markdown
    assert "- dqn/cartpole seed=1: zoo: the disk is full" in markdown
    assert "| dqn | 500.0 (one run) |" in markdown


def test_a_suite_without_any_result_still_reports(incomplete):
    for path in incomplete.glob("cells/*/*/*/result.json"):
        path.unlink()
    assert len(write_report(incomplete).missing) == 9
    assert "Without a result" in (incomplete / "report.html").read_text()


def test_results_csv_alone_is_enough(results, tmp_path):
    write_report(results)
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "results.csv").write_bytes((results / "results.csv").read_bytes())
    summary = write_report(copy)
    assert [score.interval for score in summary.scores] == [
        score.interval for score in Summary(results).scores
    ]
    assert (copy / "results.csv").read_bytes() == (results / "results.csv").read_bytes()


def test_two_presets_of_a_model_keep_apart(results):
    write_report(results)
    rows = (results / "results.csv").read_text().splitlines()
    doubled = [row.replace(",cartpole,", ",other,") for row in rows[1:] if ",dqn," in row]
    for folder in ("cells", "suite.json"):
        (results / folder).rename(results / f"old-{folder}")
    (results / "results.csv").write_text("\n".join([*rows, *doubled]) + "\n")
    assert Summary(results).labels == ["dreamer-v3", "dqn/cartpole", "random", "dqn/other"]


def test_curves_end_where_the_shortest_run_does(results):
    (dqn,) = (score for score in Summary(results).scores if score.model == "dqn")
    grid, band, runs = dqn.mean_curve("env_steps")
    assert (grid[0], grid[-1]) == (506, 30_000)
    assert len(runs) == 3
    assert (band.low <= band.value).all()
    assert (band.value <= band.high).all()
    (chance,) = (score for score in Summary(results).scores if score.model == "random")
    assert chance.mean_curve("env_steps") is None


def test_models_of_recorded_data_are_drawn_against_updates(results):
    for path in results.glob("cells/*/*/*/result.json"):
        cell = json.loads(path.read_text())
        cell["rows"] = [{**row, "env_steps": 0} for row in cell["rows"]]
        path.write_text(json.dumps(cell))
    write_report(results)
    names = {path.stem for path in (results / "figures").iterdir()}
    assert "cartpole-v1-updates" in names
    assert "cartpole-v1-env-steps" not in names
    assert "Return against updates" in (results / "report.html").read_text()


def test_an_empty_folder_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="holds no results"):
        write_report(tmp_path)


def test_several_tasks_are_aggregated_on_the_normalised_scale(two_tasks):
    summary = write_report(two_tasks)
    dreamer, dqn = aggregate_rows(summary)
    assert dreamer[:3] == ["dreamer-v3", "1 of 2", "3"]
    # Six runs of DQN, 1, .862 and .736 twice: the two middle pairs are kept.
    assert dqn[:3] == ["dqn", "2 of 2", "6"]
    assert dqn[3].startswith("0.86 [")
    # Compared on the one task that both have: 500 against 500, 431, 368 and so on.
    assert summary.improvement("dreamer-v3", "dqn").value == pytest.approx(6.5 / 9)
    assert Page((two_tasks / "report.html").read_text()).open == []
