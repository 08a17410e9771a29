import itertools
from pathlib import Path

import pytest
import yaml

from benchmarks.cell import fit_command
from benchmarks.pool import shard
from benchmarks.suite import list_suites, load_suite, parse_suite
from datamodules.errors import UserError
from zoo.__main__ import main
from zoo.configs import budget

ENTRY = {"model": "random", "preset": "cartpole", "task": "CartPole-v1"}


@pytest.mark.parametrize("name", list_suites())
def test_every_suite_of_the_package_loads(name):
    suite = load_suite(name)
    assert suite.name == name
    if suite.kind == "scores":
        cells = suite.cells()
        assert len({cell.name for cell in cells}) == len(cells) == suite.seeds * len(suite.entries)
        # Every task is normalised, with a source that says where the numbers come from.
        assert {cell.task for cell in cells} <= set(suite.tasks)
        assert all(reference.source for reference in suite.tasks.values())


def test_quickstart_compares_its_models_with_three_seeds():
    cells = load_suite("quickstart").cells()
    assert [(cell.model, cell.seed) for cell in cells] == [
        (model, seed)
        for model in ("dreamer-v3", "dqn", "world-models", "random")
        for seed in range(3)
    ]


def test_entries_override_and_seeds_can_be_chosen():
    suite = parse_suite(
        {"name": "s", "title": "S", "eval_every": 700, "entries": [{**ENTRY, "env_steps": 50}]}
    )
    (cell,) = suite.cells(seeds=1)
    assert (cell.env_steps, cell.eval_every, cell.suite) == (50, 700, "s")
    assert parse_suite(suite.to_dict()) == suite


def test_normalised_scores():
    task = {"random": 20.0, "expert": 500.0, "source": "measured"}
    suite = parse_suite({"name": "s", "title": "S", "tasks": {"t": task}, "entries": [ENTRY]})
    assert [suite.tasks["t"].normalize(value) for value in (20, 260, 980)] == [0.0, 0.5, 2.0]


def test_a_file_is_a_suite(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "title: Mine\nentries:\n  - {model: dqn, preset: cartpole, task: CartPole-v1}\n"
    )
    assert load_suite(str(path)).name == "mine"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"entries": [{**ENTRY, "env_stpes": 5}]}, r"entry 1.*env_stpes.*env_steps"),
        ({"entries": [{"model": "dqn", "preset": "cartpole"}]}, r"entry 1 lacks the key 'task'"),
        ({"entries": []}, "no entries"),
        ({"entries": [ENTRY, ENTRY]}, "random/cartpole twice"),
        ({"entries": [ENTRY], "kind": "sped"}, "kinds are scores, speed"),
        ({"entries": [ENTRY], "tasks": {"t": {"random": 0.0, "expert": 1.0}}}, "task t.*source"),
        ({"entries": ["dqn"]}, "should be a mapping"),
        ({"entries": [ENTRY], "checkpoint": "first"}, "'first'; it is best or last"),
        ({"entries": [ENTRY], "published": "atari"}, "'atari'; there is atari100k"),
    ],
)
def test_mistakes_are_named(content, words):
    with pytest.raises(UserError, match=words):
        parse_suite({"name": "s", "title": "S", **content})


def test_unknown_suites_suggest_the_nearest():
    with pytest.raises(UserError, match="'quickstrat'; did you mean quickstart"):
        load_suite("quickstrat")
    with pytest.raises(UserError, match="quickstart, representation, smoke, speed"):
        load_suite("xyz")
    with pytest.raises(UserError, match=r"no suite file nowhere\.yaml"):
        load_suite("nowhere.yaml")


def test_no_seeds_is_a_mistake():
    with pytest.raises(UserError, match="at least one seed, not 0"):
        load_suite("smoke").cells(0)


def test_a_variant_is_a_preset_with_options():
    options = {"model.lam": 0.0, "model.loss_scales": {"reward": 2.0}, "model.latent": "gaussian"}
    variant = {**ENTRY, "model": "dreamer-v3", "variant": "lambda-0", "options": options}
    suite = parse_suite({"name": "s", "title": "S", "entries": [ENTRY, variant]})
    _, cell = suite.cells(seeds=1)
    assert cell.name == "dreamer-v3/lambda-0 seed=0"
    command = fit_command(cell, Path("here"))
    assert command[0] == "dreamer-v3/cartpole"
    assert "--model.lam=0.0" in command
    assert "--model.latent=gaussian" in command
    assert '--model.loss_scales={"reward": 2.0}' in command
    assert parse_suite(suite.to_dict()) == suite
    with pytest.raises(UserError, match="has options but no variant"):
        parse_suite({"name": "s", "title": "S", "entries": [{**ENTRY, "options": options}]})


def test_an_entry_for_every_task_is_one_for_each():
    task = {"random": 0.0, "expert": 1.0, "source": "measured"}
    tasks = {"CartPole-v1": task, "ale/MsPacman": task}
    entry = {**ENTRY, "model": "dreamer-v3", "task": "*", "options": {"model.lam": 0.0}}
    suite = parse_suite({"name": "s", "title": "S", "tasks": tasks, "entries": [ENTRY, entry]})
    assert [(entry.task, entry.variant) for entry in suite.entries] == [
        ("CartPole-v1", ""),
        ("CartPole-v1", "cartpole-cartpole-v1"),
        ("ale/MsPacman", "cartpole-mspacman"),
    ]
    command = fit_command(suite.cells(1)[2], Path("here"))
    assert command[0] == "dreamer-v3/cartpole"
    assert {"--model.lam=0.0", "--data.env=ale/MsPacman"} <= set(command)
    assert parse_suite(suite.to_dict()) == suite
    with pytest.raises(UserError, match="no entries"):
        parse_suite({"name": "s", "title": "S", "entries": [entry]})


def test_atari_100k_is_the_protocol_for_every_model_with_atari_settings():
    suite = load_suite("atari100k")
    assert (len(suite.tasks), suite.seeds, suite.episodes) == (26, 5, 100)
    cells = suite.cells()
    assert {cell.checkpoint for cell in cells} == {"last"}
    for model in ("diamond", "dreamer-v1", "dreamer-v2", "dreamer-v3", "random"):
        ours = [cell for cell in cells if cell.model == model]
        assert len({(cell.task, cell.seed) for cell in ours}) == len(ours) == 26 * 5
        counts_frames = model.startswith("dreamer")  # diamond's preset counts updates
        assert {cell.env_steps for cell in ours} == {400_000 if counts_frames else None}
    parts = [shard(cells, f"{part}/65") for part in range(1, 66)]
    assert sorted(map(cells.index, itertools.chain(*parts))) == list(range(len(cells)))
    assert {len(part) for part in parts} == {10}


@pytest.mark.parametrize("model", ["diamond", "dreamer-v1", "dreamer-v2", "dreamer-v3"])
def test_zoo_fit_takes_the_games_of_atari_100k(model, tmp_path, capsys):
    cells = load_suite("atari100k").cells(seeds=1)
    (cell,) = (c for c in cells if (c.model, c.task) == (model, "ale/BankHeist"))
    with pytest.raises(SystemExit) as printed:
        main(["fit", *fit_command(cell, tmp_path / "run"), "--print_config"])
    assert printed.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    data = config["data"]["init_args"]
    assert data["env"] == "ale/BankHeist"
    # The protocol has neither sticky actions nor those that a game does not use.
    assert not {"sticky", "full_actions"} & set(data["env_kwargs"] or ())
    if model == "diamond":  # counts updates, and its datamodule the agent's steps
        assert data["collect_limit"] == 100_000
    else:
        assert budget(config)["env_steps"] == 400_000


def test_zoo_fit_takes_the_options_of_a_variant(tmp_path, capsys):
    suite = load_suite("ablations")
    (cell,) = (c for c in suite.cells(seeds=1) if c.preset == "gaussian-latents")
    with pytest.raises(SystemExit) as printed:
        main(["fit", *fit_command(cell, tmp_path / "run"), "--print_config"])
    assert printed.value.code == 0
    assert "latent: gaussian" in capsys.readouterr().out
