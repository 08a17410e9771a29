"""What the README says is true: its table, its Python, its commands."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from zoo import registry
from zoo.__main__ import commands
from zoo.commands.list import markdown

README = (Path(__file__).parent.parent / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_table_of_models_is_the_registrys() -> None:
    table = README.split("<!-- `zoo list --markdown` -->\n")[1].split("\n<!-- end -->")[0]
    assert table == markdown(registry.list_models())


def test_no_placeholders_are_left() -> None:
    assert not re.search(r"@[A-Z]+@", README)


def test_the_python_example_runs(tmp_path: Path) -> None:
    code = PYTHON[0]
    run_python(shortened(code, "max_steps=1000", "max_steps=3"), tmp_path)
    assert (tmp_path / "cartpole.ckpt").is_file()


def test_the_example_of_training_in_a_dream_runs(tmp_path: Path) -> None:
    code = PYTHON[1]
    (fit,) = re.findall(r"# (zoo fit .*)", code)
    short = ["--env-steps", "200", "--data.prefill", "180", "--data.pretrain", "1"]
    train = f"from zoo.__main__ import main\nmain({shlex.split(fit)[1:] + short})\n"
    code = shortened(code, "as_sb3(dreams))", "as_sb3(dreams), n_steps=4, n_epochs=1)")
    code = shortened(code, "150_000", "128")
    run_python(train + code + "\nassert action in (0, 1)", tmp_path)


def test_the_example_of_playing_in_a_dream_runs(tmp_path: Path) -> None:
    acting = PYTHON[1].split("# zoo ")[1].split("\n")[0]
    short = ["--env-steps", "200", "--data.prefill", "180", "--data.pretrain", "1"]
    train = f"from zoo.__main__ import main\nmain({shlex.split(acting) + short})\n"
    run_python(train + PYTHON[2] + "\nassert frame.reality.reward == 1", tmp_path)


def test_the_commands_and_the_example_of_own_data_run(tmp_path: Path) -> None:
    section = README.split("## Your own data\n")[1].split("\n## ")[0]
    commands = re.findall(r"^zoo (.*?)(?: +#.*)?$", section, re.MULTILINE)
    assert [c.split()[0] for c in commands] == ["data", "data", "data", "fit", "fit"]
    acting = PYTHON[1].split("# zoo ")[1].split("\n")[0]
    lines = ["from zoo.__main__ import main"]
    short = ["--env-steps", "200", "--data.prefill", "180", "--data.pretrain", "1"]
    lines.append(f"assert main({shlex.split(acting) + short}) == 0")
    for command in commands:
        command = command.replace("--steps 20000", "--steps 600").replace("2000", "2")
        lines.append(f"assert main({shlex.split(command)}) == 0")
    run_python("\n".join(lines) + "\n" + PYTHON[3], tmp_path)


def shortened(code: str, long: str, short: str) -> str:
    assert code.count(long) == 1
    return code.replace(long, short)


def run_python(code: str, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_every_zoo_command_of_the_readme_exists() -> None:
    lines = re.findall(r"^zoo (.*?)(?: +#.*)?$", README, re.MULTILINE)
    assert len(lines) > 8
    for line in lines:
        verb, *rest = shlex.split(line)
        assert verb in commands(), line
        for word in rest:
            if re.fullmatch(r"dreamer-v3/\w+", word):
                assert word.split("/")[1] in registry.presets("dreamer-v3"), line


@pytest.mark.parametrize("target", ["demo", "test", "test-slow", "lint", "type", "bench-speed"])
def test_the_makefile_has_its_targets(target: str) -> None:
    done = subprocess.run(
        ["make", "--dry-run", target],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
