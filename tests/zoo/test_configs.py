"""How the configuration of a training is put together."""

from pathlib import Path

import pytest
import yaml

from datamodules import UserError
from zoo import configs, registry
from zoo.runs import read_config


def _callbacks(config: configs.Config) -> dict[str, dict]:
    return {c["class_path"]: c.get("init_args", {}) for c in config["trainer"]["callbacks"]}


def test_merge_lays_sections_over_sections_and_changes_neither() -> None:
    base = {"a": {"x": 1, "y": [1, 2]}, "b": 1}
    over = {"a": {"y": [3]}, "c": {"z": None}}
    assert configs.merge(base, over) == {"a": {"x": 1, "y": [3]}, "b": 1, "c": {"z": None}}
    assert base == {"a": {"x": 1, "y": [1, 2]}, "b": 1}


def test_merge_replaces_a_class_by_another_as_a_whole() -> None:
    base = {"logger": {"class_path": "a.A", "init_args": {"x": 1}}}
    same = {"logger": {"class_path": "a.A", "init_args": {"y": 2}}}
    other = {"logger": {"class_path": "b.B"}}
    assert configs.merge(base, same)["logger"]["init_args"] == {"x": 1, "y": 2}
    assert configs.merge(base, other)["logger"] == {"class_path": "b.B"}


def test_merge_joins_lists_of_classes() -> None:
    base = {"callbacks": [{"class_path": "a.A", "init_args": {"x": 1}}, {"class_path": "b.B"}]}
    over = {"callbacks": [{"class_path": "c.C"}, {"class_path": "a.A", "init_args": {"x": 2}}]}
    merged = configs.merge(base, over)["callbacks"]
    assert [c["class_path"] for c in merged] == ["a.A", "b.B", "c.C"]
    assert merged[0]["init_args"] == {"x": 2}


def test_a_model_with_an_environment() -> None:
    config = configs.compose("dreamer-v3", env="dm_control/cartpole-balance-v0")
    assert config["model"]["class_path"] == "zoo.dreamer_v3.module.DreamerV3"
    assert config["data"]["init_args"]["env"] == "dm_control/cartpole-balance-v0"
    directory = configs.run_directory(config, 3)
    assert directory == Path("runs/dreamer-v3/dm_control-cartpole-balance-v0/seed=3")


@pytest.mark.parametrize(
    "name", [f"{m}/{p}" for m in registry.list_models() for p in registry.presets(m)]
)
def test_presets_are_complete_settings(name: str) -> None:
    config = configs.compose(name)
    assert config["model"]["class_path"] == registry.card(name).class_path.replace(":", ".")
    assert config["data"]["class_path"]
    assert any(configs.budget(config).values()), "a preset says how long to train"
    assert config["zoo"]["preset"] == name.partition("/")[2]
    expected = set(_callbacks(read_config(configs.DEFAULTS)))
    can = registry.card(name).can
    dreams = "Imaginer" in can and "LatentActions" not in can
    for wanted, useless in (
        (dreams, configs.DREAMS),
        ("Policy" in can and registry.card(name).data != ("video",), configs.PLAYS),
        ("LatentActions" in can, configs.CONTROLS),
    ):
        if not wanted:
            expected -= set(useless)
            assert not set(useless) & set(_callbacks(config))
    assert expected <= set(_callbacks(config))


def test_a_file_of_a_model_that_does_not_dream_has_no_callbacks_of_dreams(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    for name, dreams in (("decision-transformer", False), ("dreamer-v3", True)):
        class_path = registry.card(name).class_path.replace(":", ".")
        path.write_text(yaml.safe_dump({"model": {"class_path": class_path}}))
        found = set(configs.DREAMS) & set(_callbacks(configs.compose(str(path))))
        assert bool(found) == dreams


def test_models_of_video_alone_are_evaluated_where_that_is_asked_for(tmp_path: Path) -> None:
    (evaluation,) = configs.PLAYS
    assert evaluation not in _callbacks(configs.compose("genie/sprites"))
    assert evaluation not in _callbacks(configs.compose("genie", source="videos"))
    assert evaluation in _callbacks(configs.compose("decision-transformer", source="data"))
    asked = registry.preset_config("genie/sprites")
    asked["trainer"]["callbacks"].append({"class_path": evaluation})
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(asked))
    assert evaluation in _callbacks(configs.compose(str(path)))


def test_recorded_data_is_read_as_the_model_wants_it() -> None:
    for target, kind in (
        ("dreamer-v3/cartpole", configs.OFFLINE_DATA),
        ("v-jepa", configs.VIDEO_DATA),
        ("i-jepa/sprites", configs.VIDEO_DATA),
    ):
        data = configs.compose(target, source="my-data")["data"]
        assert data["class_path"] == kind
        assert data["init_args"]["source"] == "my-data"
    assert configs.compose("i-jepa/sprites", source="x")["data"]["init_args"]["clip_length"] == 1
    with pytest.raises(UserError, match="learns from offline or video data: it takes no --env"):
        configs.compose("v-jepa", env="CartPole-v1")


def test_other_data_is_not_measured_in_the_environment_of_the_presets() -> None:
    def envs(source: str) -> list[str]:
        entries = configs.compose("genie/sprites", source=source)["trainer"]["callbacks"]
        options = [entry.get("init_args") or {} for entry in entries]
        return [given["env"] for given in options if "env" in given]

    assert envs("data/sprites") == ["zoo/Sprites-v0"]
    assert envs("my-videos") == []


def test_a_model_alone_does_not_say_what_to_train_on() -> None:
    with pytest.raises(UserError, match="add --env ENVIRONMENT"):
        configs.compose("dreamer-v3")


def test_a_file_of_ones_own_is_a_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    settings = {
        "model": {"class_path": "zoo.dreamer_v3.module.DreamerV3"},
        "trainer": {"devices": 2},
    }
    file.write_text(yaml.safe_dump(settings))
    config = configs.compose(str(file))
    assert config["zoo"] == {"model": "dreamer-v3", "preset": "mine", "threads": 1}
    assert config["trainer"]["devices"] == 2
    assert configs.BUDGET in _callbacks(config)


def test_the_config_of_a_run_is_taken_as_it_is(tmp_path: Path) -> None:
    whole = {"zoo": {"model": "dreamer-v3", "preset": "p"}, "trainer": {"callbacks": []}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(whole))
    assert configs.compose(str(tmp_path)) == whole
    assert configs.compose(str(tmp_path / "config.yaml")) == whole


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not readable as yaml"),
        ("- 1", "does not hold a mapping"),
        ("trainer: {}", "needs model.class_path"),
    ],
)
def test_files_that_say_nothing(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        configs.compose(str(file))
    assert str(file) in str(caught.value)


def test_the_budget_is_found_or_made() -> None:
    config = configs.compose("dreamer-v3", env="CartPole-v1")
    configs.budget(config).update(env_steps=7)
    assert _callbacks(config)[configs.BUDGET] == {"env_steps": 7}
    empty: configs.Config = {"trainer": {"callbacks": None}}
    configs.budget(empty).update(updates=3)
    assert _callbacks(empty) == {configs.BUDGET: {"updates": 3}}
