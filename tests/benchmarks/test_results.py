import pytest

from benchmarks.results import COLUMNS, Row, read_rows, replacing, write_rows
from datamodules.errors import UserError

ROW = Row(
    "s", "m", "p", "t", 0, 10, 2, "return_mean", 1 / 3, 100, 1.5, "abc", 'python 3; "x, y"', "cpu"
)


def test_columns_are_those_of_the_contract():
    assert ",".join(COLUMNS) == (
        "suite,model,preset,task,seed,env_steps,updates,metric,value,n,wall_s,"
        "git_sha,versions,hardware"
    )


def test_rows_survive_a_round_trip_bit_for_bit(tmp_path):
    rows = [ROW, Row(*[*list(vars(ROW).values())[:10], None, "abc", "v", "h"])]
    write_rows(tmp_path / "results.csv", rows)
    assert read_rows(tmp_path / "results.csv") == rows
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "results.csv"
    write_rows(path, [ROW, ROW])
    path.write_text(path.read_text().replace("\ns,m,p,t,0,10,2", "\ns,m,p,t,0,ten,2", 2))
    with pytest.raises(UserError, match=r"results\.csv line 2 .*ten"):
        read_rows(path)


def test_another_table_is_refused(tmp_path):
    (tmp_path / "results.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="has the columns a, b"):
        read_rows(tmp_path / "results.csv")


def test_two_processes_may_write_the_same_file_at_once(tmp_path, monkeypatch):
    path = tmp_path / "suite.json"
    with replacing(path) as one:
        one.write("one")
        monkeypatch.setattr("os.getpid", lambda: -1)
        with replacing(path) as other:
            other.write("other")
        monkeypatch.undo()
    assert path.read_text() == "one"
    assert [file.name for file in tmp_path.iterdir()] == ["suite.json"]
