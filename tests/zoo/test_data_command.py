"""`zoo data` and `zoo fit --source` as a user types them."""

import json
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

import zoo
from datamodules.sources.opening import open_source
from datamodules.sources.video_files import VideoWriter
from datamodules.sources.writing import write
from zoo.__main__ import main

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
      init_args: {every_env_steps: 2, episodes: 1}
"""


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 12 random episodes of CartPole; not to be changed."""
    path = tmp_path_factory.mktemp("recording") / "cartpole"
    options = ["--policy", "random", "--episodes", "12", "--out", str(path)]
    assert main(["data", "collect", "CartPole-v1", *options]) == 0
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "here"


@pytest.fixture
def videos(here: Path) -> Path:
    """A folder of three videos of moving stripes, 20 x 24 pixels."""
    folder = here / "videos"
    folder.mkdir()
    for n in range(3):
        writer = VideoWriter(folder / f"{n}.mp4", 10, lossless=True)
        t, y, x = np.mgrid[: 4 + n, :20, :24]
        writer.add(np.repeat((8 * (t + y + x))[..., None], 3, -1).astype(np.uint8))
        writer.close()
    return folder


def complaint(capsys, *arguments: object) -> str:
    """The one line that a mistake costs."""
    capsys.readouterr()
    assert main(["data", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    return line


class TestCollect:
    @pytest.mark.parametrize(
        ("out", "options", "kind"),
        [
            ("a", [], "store"),
            ("a.hdf5", [], "hdf5"),
            ("a-v1", ["--format", "minari"], "minari"),
            ("a", ["--to", "lerobot"], "lerobot"),
        ],
    )
    def test_into_every_format(self, out, options, kind, here: Path, capsys) -> None:
        if kind == "lerobot":
            pytest.importorskip("pyarrow", reason="LeRobot data sets need the extra arrow")
        amount = ["--steps", "50", "--num-envs", "2", "--time-limit", "9"]
        assert main(["data", "collect", "CartPole-v1", "--out", out, *amount, *options]) == 0
        assert out in capsys.readouterr().out
        assert main(["data", "inspect", out, "--json"]) == 0
        about = json.loads(capsys.readouterr().out)
        assert about["kind"] == kind
        assert 50 <= about["steps"] < 59
        assert about["length"]["max"] <= 9
        assert [p.name for p in here.iterdir()] == [out]

    def test_a_run_and_a_mixture(self, here: Path, capsys) -> None:
        Path("tiny.yaml").write_text(TINY)
        assert main(["fit", "tiny.yaml", "--run", "run", "--updates", "2"]) == 0
        mixture = ["--policy", "random", "run", "--mix", "1", "3", "--epsilon", "0", "0.2"]
        where = ["--episodes", "8", "--out", "mix"]
        assert main(["data", "collect", "CartPole-v1", *mixture, *where]) == 0
        capsys.readouterr()
        assert main(["data", "inspect", "mix"]) == 0
        text = capsys.readouterr().out
        assert "by random             2, return" in text
        assert "by run (epsilon 0.2)  6, return" in text
        assert main(["data", "inspect", "run", "--json"]) == 0
        about = json.loads(capsys.readouterr().out)
        assert list(about["policies"]) == ["model"]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--steps", "0", "--out", "a"], "--steps 0: at least 1"),
            (["--episodes", "2", "--steps", "2", "--out", "a"], "not allowed with"),
            (["--out", "a"], "--steps"),
            (["--episodes", "2"], "--out"),
            (["--episodes", "2", "--out", "a", "--mix", "1", "1"], "2 numbers for 1 policies"),
            (["--episodes", "2", "--out", "a", "--format", "gif"], "'a' would hold no actions"),
            (["--episodes", "2", "--out", "a.mp4"], "'a.mp4' would hold no actions"),
            (["--episodes", "2", "--out", "a", "--format", "csv"], "no format 'csv'"),
            (["--episodes", "2", "--out", "a", "--policy", "nobody"], "there is no 'nobody'"),
            (["--episodes", "2", "--out", "a", "--env-kwargs", "x"], "is not KEY=VALUE"),
            (["--episodes", "2", "--out", "a", "--num-envs", "0"], "--num-envs 0"),
        ],
    )
    def test_mistakes(self, options, message, here: Path, capsys) -> None:
        assert message in complaint(capsys, "collect", "CartPole-v1", *options)
        assert not list(here.iterdir())

    def test_an_unknown_environment(self, here: Path, capsys) -> None:
        line = complaint(capsys, "collect", "CartPole-v7", "--episodes", "1", "--out", "a")
        assert "CartPole-v1" in line


class TestInspect:
    def test_says_what_is_there(self, recording: Path, capsys) -> None:
        assert main(["data", "inspect", str(recording)]) == 0
        text = capsys.readouterr().out
        for part in ("CartPole-v1", "vector float32[4]", "12, of which", "all fit", "by random"):
            assert part in text
        counts = [line for line in text.splitlines() if " .. " in line]
        assert sum(int(line.split()[3]) for line in counts) == 12

    def test_json(self, recording: Path, capsys) -> None:
        assert main(["data", "inspect", str(recording), "--json"]) == 0
        about = json.loads(capsys.readouterr().out)
        source = open_source(recording)
        assert about["steps"] == source.num_actions
        assert about["return"]["mean"] == pytest.approx(source.lengths.mean())
        assert sum(about["histogram"]["counts"]) == about["episodes"] == 12
        assert about["checksums"] == "ok"
        assert about["problems"] == []
        assert 0 < about["bytes"] < 1e6

    def test_random_collections_of_world_models(self, here: Path, capsys) -> None:
        options = ["--env", "CartPole-v1", "--model.vision_updates", "1", "--updates", "1"]
        random = ["--data.policy", "random", "--data.episodes", "4", "--run", "run"]
        small = ["--data.sequence_length", "4", "--data.batch_size", "2", "--model.hidden", "8"]
        assert main(["fit", "world-models", *options, *random, *small]) == 0
        capsys.readouterr()
        assert main(["data", "inspect", "run/replay", "--json"]) == 0
        about = json.loads(capsys.readouterr().out)
        assert about["env"] == "CartPole-v1"
        assert about["policies"]["random"]["episodes"] == about["episodes"] >= 4

    def test_problems_are_listed_and_told_by_the_exit_code(
        self, recording: Path, here: Path, capsys
    ) -> None:
        write(open_source(recording), here / "a.hdf5", "hdf5")
        with h5py.File("a.hdf5", "a") as file:
            file["rewards"][0] = np.nan
        assert main(["data", "inspect", "a.hdf5"]) == 1
        text = capsys.readouterr().out
        assert "problem: a.hdf5, episode 0: NaN or infinity in 'reward' at step 0" in text
        assert main(["data", "inspect", "a.hdf5", "--json"]) == 1
        assert json.loads(capsys.readouterr().out)["checksums"] == "none"

    def test_a_damaged_store(self, here: Path, capsys) -> None:
        where = ["--episodes", "3", "--num-envs", "1", "--out", "a"]
        assert main(["data", "collect", "CartPole-v1", *where]) == 0
        (chunk,) = Path("a/chunks").iterdir()
        raw = bytearray(chunk.read_bytes())
        raw[0] ^= 1
        chunk.write_bytes(raw)
        assert "00000000.bin is damaged" in complaint(capsys, "inspect", "a")

    def test_a_preview(self, here: Path, capsys) -> None:
        options = ["--episodes", "2", "--num-envs", "1", "--time-limit", "5", "--out", "grid"]
        pytest.importorskip("minigrid")
        assert main(["data", "collect", "MiniGrid-Empty-5x5-v0", *options, "--size", "16"]) == 0
        assert main(["data", "inspect", "grid", "--preview", "grid.png"]) == 0
        assert "grid.png" in capsys.readouterr().out
        assert Image.open("grid.png").size == (8 * 16, 2 * 16)

    def test_without_images_there_is_no_preview(self, recording: Path, here: Path, capsys) -> None:
        line = complaint(capsys, "inspect", recording, "--preview", "a.png")
        assert "has no images" in line

    def test_nothing_there(self, here: Path, capsys) -> None:
        assert "no file or folder 'nowhere'" in complaint(capsys, "inspect", "nowhere")


class TestConvert:
    def test_there_and_back(self, recording: Path, here: Path, capsys) -> None:
        assert main(["data", "convert", str(recording), "a.hdf5"]) == 0
        assert main(["data", "convert", "a.hdf5", "b-v0", "--format", "minari"]) == 0
        assert main(["data", "convert", "b-v0", "c"]) == 0
        before, after = open_source(recording), open_source("c")
        assert after.spec == before.spec
        assert after.env == "CartPole-v1"
        for i in range(12):
            one, other = before.read(i), after.read(i)
            assert np.array_equal(one.obs["vector"], other.obs["vector"])
            assert np.array_equal(one.reward, other.reward)

    def test_several_are_joined(self, recording: Path, here: Path) -> None:
        assert main(["data", "convert", str(recording), str(recording), "both"]) == 0
        assert open_source("both").num_episodes == 24

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["a.mp4"], "has no images to show"),
            (["a", "--lossless"], "--lossless is for video and lerobot, not for store"),
            (["a", "--id", "b-v0"], "--id b-v0 is for Minari"),
            (["a", "--format", "minari", "--id", "no version"], "not the id of a Minari"),
            (["a", "--observations", "position"], "there is no observation ['position']"),
        ],
    )
    def test_mistakes(self, options, message, recording: Path, here: Path, capsys) -> None:
        assert message in complaint(capsys, "convert", recording, *options)
        assert not list(here.iterdir())


class TestVideo:
    def test_inspect(self, videos: Path, capsys) -> None:
        assert main(["data", "inspect", "videos", "--preview", "a.png"]) == 0
        text, progress = capsys.readouterr()
        for part in ("videos (video)", "no actions", "24 x 20 pixels, 3 channels", "10.00 +- 0"):
            assert part in text
        assert "returns" not in text
        assert progress.startswith("zoo: ingesting 3 of 'videos' into '")
        assert Image.open("a.png").size == (8 * 24, 3 * 20)
        (videos / "9.mp4").write_text("broken")
        options = ["--json", "--size", "8", "--crop", "--ingest", "store"]
        assert main(["data", "inspect", "videos", *options]) == 1
        about = json.loads(capsys.readouterr().out)
        assert about["images"] == {"image": [8, 8, 3]}
        assert "9.mp4' cannot be read" in about["problems"][0]
        assert open_source("store").num_episodes == 3

    def test_convert_to_a_store_and_back(self, videos: Path, capsys) -> None:
        (videos / "9.mp4").write_text("broken")
        assert main(["data", "convert", "videos", "a"]) == 2
        assert "9.mp4' cannot be read" in capsys.readouterr().err.splitlines()[-1]
        assert main(["data", "convert", "videos", "a", "--errors", "skip"]) == 0
        assert "1 of 4 recordings cannot be read" in capsys.readouterr().err
        assert main(["data", "convert", "a", "b", "--format", "video", "--lossless"]) == 0
        assert main(["data", "convert", "b", "c", "--to", "gif"]) == 0
        names = [f"episode_00000{n}.gif" for n in range(3)]
        assert sorted(p.name for p in Path("c").iterdir()) == names
        before, after = open_source("a"), open_source("b")
        assert after.lengths.tolist() == before.lengths.tolist() == [3, 4, 5]
        for i in range(3):
            assert np.array_equal(before.read(i).obs["image"], after.read(i).obs["image"])
        assert "name a folder" in complaint(capsys, "convert", "a", "d.mp4")

    def test_lerobot(self, videos: Path, capsys) -> None:
        pytest.importorskip("pyarrow", reason="LeRobot data sets need the extra arrow")
        assert main(["data", "convert", "videos", "a", "--to", "lerobot", "--lossless"]) == 0
        capsys.readouterr()
        assert main(["data", "inspect", "a", "--json"]) == 0
        about = json.loads(capsys.readouterr().out)
        assert (about["kind"], about["fps"]["mean"], about["steps"]) == ("lerobot", 10, 12)
        assert main(["data", "convert", "a", "b"]) == 0
        before, after = open_source("videos"), open_source("b")
        for i in range(3):
            assert np.array_equal(before.read(i).obs["image"], after.read(i).obs["image"])

    def test_what_an_agent_saw(self, here: Path, capsys) -> None:
        pytest.importorskip("minigrid")
        options = ["--episodes", "3", "--time-limit", "20", "--num-envs", "2", "--size", "16"]
        assert main(["data", "collect", "MiniGrid-Empty-5x5-v0", *options, "--out", "a"]) == 0
        source = open_source("a")
        rows = source.num_actions + source.num_episodes
        assert main(["data", "inspect", "a", "--json"]) == 0
        about = json.loads(capsys.readouterr().out.splitlines()[-1])
        pixels = rows * 16 * 16 * 3
        assert about["bytes"] < 1.1 * pixels + 65536, "a byte for each value of an image"
        assert main(["data", "convert", "a", "videos", "--to", "video", "--lossless"]) == 0
        assert "left out are the actions and rewards" in capsys.readouterr().err
        for i in range(3):
            shown = open_source("videos", ingest="store").read(i)
            assert shown.action is None
            assert np.array_equal(shown.obs["image"], source.read(i).obs["image"])


class TestFit:
    def test_on_recorded_data_alone(self, recording: Path, here: Path, capsys) -> None:
        source = ["--source", str(recording), "--updates", "4", "--run", "run"]
        small = ["--model.size", "nano", "--data.batch_size", "2", "--data.sequence_length", "4"]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert main(["fit", "dreamer-v3", *source, *small]) == 0
        told = [str(w.message) for w in caught if "measures nothing" in str(w.message)]
        assert sorted(text.split()[0] for text in told) == [
            *("DreamRealityGap", "DreamVideo", "Evaluation")
        ]
        model = zoo.load("run")
        assert (model.updates, model.env_steps) == (4, 0)
        assert not list(here.glob("run/replay"))
        capsys.readouterr()
        assert main(["eval", "run"]) == 2
        assert "knows no environment: add --env ID" in capsys.readouterr().err
        assert main(["eval", "run", "--env", "CartPole-v1", "--episodes", "2", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["return_mean"] >= 1

    def test_with_the_environment_of_a_preset_to_evaluate_in(
        self, recording: Path, here: Path
    ) -> None:
        Path("tiny.yaml").write_text(TINY)
        source = ["--source", str(recording), "--updates", "4", "--run", "run"]
        assert main(["fit", "tiny.yaml", *source]) == 0
        metrics = (here / "run" / "metrics.csv").read_text()
        found = [line.split(",")[0] for line in metrics.splitlines() if "eval/return_mean" in line]
        assert found == ["2", "4"], "updates count where there are no env steps"
        assert main(["eval", "run", "--episodes", "1"]) == 0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ([], "add --env-steps N, --updates N or --seconds S"),
            (["--env-steps", "5"], "recorded data has no env steps"),
            (["--updates", "5", "--env", "Acrobot-v1"], "the environment Acrobot-v1 has"),
        ],
    )
    def test_mistakes(self, options, message, recording: Path, here: Path, capsys) -> None:
        source = ["--source", str(recording), "--run", "run"]
        assert main(["fit", "dreamer-v3", *source, "--model.size", "nano", *options]) == 2
        assert message in capsys.readouterr().err
        assert not list(here.iterdir())

    def test_weights_of_another_task(self, recording: Path, here: Path, capsys) -> None:
        Path("tiny.yaml").write_text(TINY)
        acrobot = ["--env", "Acrobot-v1", "--run", "acrobot", "--updates", "1"]
        assert main(["fit", "tiny.yaml", *acrobot]) == 0
        source = ["--source", str(recording), "--updates", "4", "--run", "run"]
        assert main(["fit", "tiny.yaml", *source, "--from", "acrobot"]) == 2
        message = capsys.readouterr().err
        assert "were made for" in message or "do not fit" in message
