"""The commands as a user types them, on a model and a task of a second."""

import csv
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml

import zoo
from datamodules import UserError
from zoo.__main__ import commands, main

TINY = """\
# CartPole for tests
model:
  class_path: zoo.dreamer_v3.module.DreamerV3
  init_args: {size: nano, deter: 16, hidden: 8, stoch: 2, classes: 4, units: 8, imagine_length: 3}
data:
  class_path: datamodules.env_datamodule.EnvDataModule
  init_args: {env: CartPole-v1, num_envs: 2, batch_size: 2, sequence_length: 8, prefill: 40}
trainer:
  log_every_n_steps: 2
  callbacks:
    - class_path: callbacks.budget.Budget
      init_args: {env_steps: 50}
    - class_path: callbacks.evaluation.Evaluation
      init_args: {every_env_steps: 44, episodes: 2}
"""

STOPPER = """\
import os
import pytorch_lightning as pl


class Stopper(pl.Callback):
    def __init__(self, number: int) -> None:
        self.number = number

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        if model.updates == 3:
            os.kill(os.getpid(), self.number)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.yaml and a finished run of it; copy before changing it."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(TINY)
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["fit", "tiny.yaml"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a copy of the trained one."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


RUN = Path("runs/dreamer-v3/tiny/seed=0")


def _config(run: Path) -> dict:
    return yaml.safe_load((run / "config.yaml").read_text())


def _budget(run: Path) -> dict:
    callbacks = _config(run)["trainer"]["callbacks"]
    budget = next(c["init_args"] for c in callbacks if c["class_path"].endswith(".Budget"))
    return {name: value for name, value in budget.items() if name != "clock"}


def _metrics(run: Path) -> list[tuple[str, ...]]:
    with (run / "metrics.csv").open() as file:
        return [tuple(row) for row in csv.reader(file) if not row[2].startswith("time/")]


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def _equal(one: Path, other: Path) -> bool:
    a, b = _weights(one), _weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class TestCommand:
    def test_every_verb_is_there_and_says_what_it_is(self, capsys) -> None:
        assert main(["--help"]) == 0
        text = capsys.readouterr().out
        for verb in commands():
            assert f"\n  {verb} " in text
        assert "not available" not in text

    def test_version(self, capsys) -> None:
        assert main(["--version"]) == 0
        assert capsys.readouterr().out == f"zoo {zoo.__version__}\n"

    def test_a_mistake_is_one_sentence_and_code_2(self, capsys) -> None:
        assert main(["fti"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert (
            err == "zoo: unknown command 'fti' (did you mean 'fit'?); `zoo --help` explains them\n"
        )

    def test_debug_shows_the_traceback(self) -> None:
        with pytest.raises(UserError):
            main(["info", "nothing", "--debug"])

    def test_ctrl_c_is_130(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(pattern: str) -> list[str]:
            raise KeyboardInterrupt

        monkeypatch.setattr("zoo.registry.list_models", interrupted)
        assert main(["list"]) == 130

    @pytest.mark.parametrize("verb", ["eval", "export", "push", "fit"])
    def test_wrong_options_are_one_sentence(self, verb: str, capsys) -> None:
        assert main([verb, "a", "b", "--env-steps", "x"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


class TestListAndInfo:
    def test_list(self, capsys) -> None:
        assert main(["list", "dreamer*"]) == 0
        header, *rows = capsys.readouterr().out.splitlines()
        assert header.split() == ["model", "what", "it", "is", "presets"]
        assert any(row.startswith("dreamer-v3 ") for row in rows)

    def test_list_json(self, capsys) -> None:
        assert main(["list", "--json"]) == 0
        models = json.loads(capsys.readouterr().out)["models"]
        assert models["dreamer-v3"]["summary"] == zoo.card("dreamer-v3").summary
        assert isinstance(models["dreamer-v3"]["presets"], list)

    def test_list_without_a_match(self, capsys) -> None:
        assert main(["list", "nothing*"]) == 1
        assert "no model matches 'nothing*'" in capsys.readouterr().out

    def test_info_shows_abilities_sizes_and_paper(self, capsys) -> None:
        assert main(["info", "dreamer-v3"]) == 0
        text = capsys.readouterr().out
        for part in ("Policy", "Imaginer", "nano", "400m", "2301.04104", "discrete"):
            assert part in text

    def test_info_json(self, capsys) -> None:
        assert main(["info", "dreamer-v3", "--json"]) == 0
        card = json.loads(capsys.readouterr().out)
        assert card["year"] == 2023
        assert "Policy" in card["can"]

    def test_info_of_an_unknown_model(self, capsys) -> None:
        assert main(["info", "dreamerv3"]) == 2
        assert "did you mean 'dreamer-v3' or" in capsys.readouterr().err


class TestFit:
    def test_leaves_a_complete_run(self, here: Path) -> None:
        assert json.loads((RUN / "done.json").read_text())["env_steps"] >= 50
        assert (RUN / "checkpoints" / "best.ckpt").is_file()
        config = _config(RUN)
        assert config["zoo"] == {
            "model": "dreamer-v3",
            "preset": "tiny",
            "weights": None,
            "threads": 1,
        }
        assert config["seed_everything"] == config["data"]["init_args"]["seed"] == 0
        assert config["model"]["init_args"]["free_nats"] == 1.0, "defaults are written out"
        assert any(row[2] == "eval/return_mean" for row in _metrics(RUN))

    def test_the_config_alone_repeats_the_run(self, here: Path) -> None:
        (RUN / "config.yaml").rename("alone.yaml")
        assert main(["fit", "alone.yaml", "--run", "again"]) == 0
        assert _equal(RUN, Path("again"))
        assert _metrics(RUN) == _metrics(Path("again"))
        assert len(_metrics(RUN)) > 10

    def test_another_seed_is_another_run(self, here: Path) -> None:
        assert main(["fit", "tiny.yaml", "--seed", "1"]) == 0
        other = Path("runs/dreamer-v3/tiny/seed=1")
        assert _config(other)["seed_everything"] == _config(other)["data"]["init_args"]["seed"] == 1
        assert not _equal(RUN, other)

    def test_a_run_is_not_overwritten(self, here: Path, capsys) -> None:
        before = (RUN / "config.yaml").read_text()
        assert main(["fit", "tiny.yaml", "--env-steps", "60"]) == 2
        message = capsys.readouterr().err
        assert "already holds a run" in message
        assert "--resume" in message
        assert "--run" in message
        assert (RUN / "config.yaml").read_text() == before

    def test_a_finished_run_has_nothing_to_resume(self, here: Path, capsys) -> None:
        before = _metrics(RUN)
        assert main(["fit", "tiny.yaml", "--resume"]) == 0
        assert "is done" in capsys.readouterr().err
        assert _metrics(RUN) == before

    def test_a_larger_budget_equals_having_asked_for_it(self, here: Path) -> None:
        assert main(["fit", str(RUN), "--resume", "--env-steps", "70"]) == 0
        assert _budget(RUN) == {"env_steps": 70, "updates": None, "seconds": None}
        assert main(["fit", "tiny.yaml", "--run", "at-once", "--env-steps", "70"]) == 0
        assert _equal(RUN, Path("at-once"))
        assert _metrics(RUN) == _metrics(Path("at-once"))

    def test_seconds_are_a_budget_too(self, here: Path, capsys) -> None:
        command = ["fit", "tiny.yaml", "--run", "timed", "--seconds", "0.01"]
        assert main(command) == 0
        assert _budget(Path("timed")) == {"env_steps": None, "updates": None, "seconds": 0.01}
        assert main([*command, "--resume"]) == 0
        assert "is done (" in capsys.readouterr().err

    def test_updates_are_a_budget_too(self, here: Path) -> None:
        assert main(["fit", "tiny.yaml", "--run", "short", "--updates", "3"]) == 0
        assert json.loads(Path("short/done.json").read_text())["updates"] == 3
        assert _budget(Path("short")) == {"env_steps": None, "updates": 3, "seconds": None}

    def test_nothing_to_resume_starts_anew(self, here: Path, capsys) -> None:
        crashed = Path("crashed")  # before its first checkpoint
        shutil.copytree(RUN, crashed)
        shutil.rmtree(crashed / "checkpoints")
        (crashed / "keep.txt").touch()
        assert main(["fit", "tiny.yaml", "--run", "crashed", "--resume"]) == 0
        assert "starting anew" in capsys.readouterr().err
        assert _equal(RUN, crashed)
        assert _metrics(RUN) == _metrics(crashed)
        assert (crashed / "keep.txt").exists()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--seed", "1"], "has seed 0, not 1"),
            (["--env", "Acrobot-v1"], "holds a run of preset 'tiny', not 'Acrobot-v1'"),
        ],
    )
    def test_one_run_is_not_continued_as_another(
        self, here: Path, options: list[str], message: str, capsys
    ) -> None:
        assert main(["fit", "tiny.yaml", "--run", str(RUN), "--resume", *options]) == 2
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_saves_and_its_number_is_told(
        self, here: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Path("stopper.py").write_text(STOPPER)
        monkeypatch.syspath_prepend(here)
        stop = [
            "--trainer.callbacks+=stopper.Stopper",
            f"--trainer.callbacks.number={int(number)}",
        ]
        assert main(["fit", "tiny.yaml", "--run", "stopped", *stop]) == 128 + number
        checkpoint = torch.load("stopped/checkpoints/last.ckpt", weights_only=True)
        assert checkpoint["zoo"]["updates"] == 3
        assert not Path("stopped/done.json").exists()

    def test_fine_tuning_starts_from_the_weights(self, here: Path) -> None:
        tune = ["--from", str(RUN), "--model.lr", "0.0", "--updates", "1", "--run", "tuned"]
        assert main(["fit", "tiny.yaml", *tune]) == 0
        given = torch.load(RUN / "checkpoints/best.ckpt", weights_only=True)["state_dict"]
        learned = {k: v for k, v in _weights(Path("tuned")).items() if k.startswith("rssm")}
        assert learned
        assert all(torch.equal(given[k], v) for k, v in learned.items())
        assert _config(Path("tuned"))["zoo"]["weights"] == str(RUN)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--from", str(RUN), "--model.units", "16"], "differ in units (8, 16)"),
            (["--from", "nowhere"], "there is no 'nowhere'"),
            (["--model.sise", "nano"], "'sise' is not accepted: did you mean 'size'?"),
            (["--model.size", "nana"], "no size 'nana'"),
            (["--data.num_env", "3"], "did you mean 'num_envs'"),
            (["--trainer.max_steps", "x"], "trainer.max_steps"),
            (
                ["--trainer.accelerator", "cpu", "--trainer.devices", "0"],
                "the trainer's settings do not work here",
            ),
            (["--nonsense", "3"], "--nonsense"),
            (["--env", "CartPole-v7"], "CartPole-v1"),
            (["--env-steps", "3", "--updates", "3"], "not allowed with"),
        ],
    )
    def test_mistakes_cost_one_sentence_and_leave_nothing(
        self, here: Path, options: list[str], message: str, capsys
    ) -> None:
        assert main(["fit", "tiny.yaml", "--run", "wrong", *options]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
        assert not Path("wrong").exists()

    def test_without_a_budget_it_would_not_end(self, capsys) -> None:
        assert main(["fit", "dreamer-v3", "--env", "CartPole-v1"]) == 2
        assert "--env-steps" in capsys.readouterr().err

    def test_what_to_train_comes_first(self, capsys) -> None:
        assert main(["fit", "--seed", "1"]) == 2
        assert "MODEL/PRESET" in capsys.readouterr().err

    def test_print_config_writes_nothing(self, here: Path, capsys) -> None:
        with pytest.raises(SystemExit) as ended:
            main(["fit", "tiny.yaml", "--run", "printed", "--print_config"])
        assert ended.value.code == 0
        assert yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["units"] == 8
        assert not Path("printed").exists()


class TestEval:
    def test_json_has_what_the_benchmarks_read(self, here: Path, capsys) -> None:
        assert main(["eval", str(RUN), "--episodes", "3", "--seed", "5", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["episodes"] == len(report["returns"]) == 3
        assert report["return_mean"] == pytest.approx(sum(report["returns"]) / 3)
        assert report["env_steps"] == zoo.load(RUN).env_steps
        assert (report["seed"], report["checkpoint"]) == (5, "best")
        assert main(["eval", str(RUN), "--episodes", "3", "--seed", "5", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == report

    def test_the_checkpoint_can_be_chosen(self, here: Path, capsys) -> None:
        assert main(["eval", str(RUN), "--episodes", "1", "--checkpoint", "last"]) == 0
        assert "last.ckpt" in capsys.readouterr().out

    def test_mistakes(self, here: Path, capsys) -> None:
        assert main(["eval", "nowhere"]) == 2
        assert main(["eval", str(RUN), "--episodes", "0"]) == 2
        assert "--episodes 0" in capsys.readouterr().err
        assert main(["eval", str(RUN), "--target-return", "5"]) == 2
        assert "a dreamer-v3 cannot be asked for a return" in capsys.readouterr().err


class TestExportAndPush:
    def test_an_export_loads_and_its_card_says_what_it_is(self, here: Path, capsys) -> None:
        (RUN / "videos").mkdir(exist_ok=True)
        (RUN / "videos" / "zz.gif").write_bytes(b"GIF89a")
        assert main(["export", str(RUN), "shared"]) == 0
        assert Path("shared/dream.gif").read_bytes() == b"GIF89a"
        model, exported = zoo.load(RUN), zoo.load("shared")
        pairs = zip(model.state_dict().values(), exported.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert exported.env_steps == model.env_steps > 0
        card = Path("shared/README.md").read_text()
        _, front, text = card.split("---\n", 2)
        assert yaml.safe_load(front)["license"] == "apache-2.0"
        for part in (
            "DreamerV3, tiny",
            "CartPole-v1",
            f"{model.env_steps} env steps",
            "(dream.gif)",
        ):
            assert part in text

    def test_nothing_is_overwritten(self, here: Path, capsys) -> None:
        assert main(["export", str(RUN), str(RUN)]) == 2
        assert "not an empty folder" in capsys.readouterr().err

    def test_push_refuses_what_is_no_export(self, here: Path, capsys) -> None:
        assert main(["push", str(RUN), "me/model"]) == 2
        assert "zoo export" in capsys.readouterr().err
        assert main(["export", str(RUN), "shared"]) == 0
        assert main(["push", "shared", "model"]) == 2
        assert "not a hub id" in capsys.readouterr().err

    def test_push_uploads_the_folder(self, here: Path, monkeypatch, capsys) -> None:
        done: list[tuple] = []

        class Hub:
            def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> None:
                done.append((repo_id, private, exist_ok))

            def upload_folder(self, repo_id: str, folder_path: Path):
                done.append((repo_id, folder_path))
                return type("Commit", (), {"commit_url": "hub/commit"})

        monkeypatch.setattr("huggingface_hub.HfApi", Hub)
        assert main(["export", str(RUN), "shared"]) == 0
        assert main(["push", "shared", "me/model", "--private"]) == 0
        assert done == [("me/model", True, True), ("me/model", Path("shared"))]
        assert "hub/commit" in capsys.readouterr().out
