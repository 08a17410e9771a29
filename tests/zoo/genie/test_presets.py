"""The presets for games learn from what the commands of the README collect."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

import zoo
from callbacks.controllability import gather_steps
from datamodules import VideoDataModule
from zoo import registry
from zoo.__main__ import main

GAMES = {"minigrid": "minigrid", "pong": "ale_py", "breakout": "ale_py", "doom": "vizdoom"}
README = Path(zoo.__file__).parent / "genie" / "README.md"


def collecting() -> dict[str, list[str]]:
    """Commands of the README by the folder that they write to."""
    section = README.read_text().split("### Data\n")[1]
    lines = section.split("```bash\n")[1].split("```")[0].replace("\\\n", " ").splitlines()
    commands = [shlex.split(line)[1:] for line in lines]
    return {command[command.index("--out") + 1]: command for command in commands}


@pytest.mark.parametrize("name", GAMES)
def test_a_game_is_collected_and_learnt_from(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(GAMES[name])
    monkeypatch.chdir(tmp_path)
    settings = registry.preset_config(f"genie/{name}")
    data_settings = settings["data"]["init_args"]
    command = collecting()[data_settings["source"]]
    command[command.index("--episodes") + 1] = "4"
    assert main([*command, "--num-envs", "2", "--time-limit", "12"]) == 0

    data = VideoDataModule(**{**data_settings, "batch_size": 2, "validation": 0.25})
    model = zoo.create(f"genie/{name}", data.spec)
    (key,) = model.spec.images
    side = data.spec.obs[key].shape[0]
    for patches in (model.hparams["patch"], model.hparams["action_patch"]):
        assert side % patches == 0
    watching = {c["class_path"]: c["init_args"] for c in settings["trainer"]["callbacks"]}
    env = watching["callbacks.controllability.Controllability"].get("env")
    played = gather_steps(data, model, env, clips=1, length=3, seed=0)
    assert played.video.shape == (1, 3, *data.spec.obs[key].shape)

    optimizer = model.configure_optimizers()
    stages = model.hparams["tokenizer_updates"], model.hparams["action_updates"]
    for model.updates in (0, stages[0], sum(stages)):
        before = {part: next(getattr(model, part).parameters()).clone() for part in model.learning}
        optimizer.zero_grad()
        model.training_step(data.next_batch(), 0).backward()
        model.on_before_optimizer_step(optimizer)
        optimizer.step()
        for part, weight in before.items():
            assert not next(getattr(model, part).parameters()).equal(weight)
