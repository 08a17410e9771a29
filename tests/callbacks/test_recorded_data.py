"""What the callbacks do where the data is recorded: no env steps, and maybe no environment."""

import warnings

import pytest
import torch
from callback_standins import EPISODE, PerfectDreamer, Walk, rows, trainer

from callbacks.budget import Budget
from callbacks.dream_gap import DreamRealityGap
from callbacks.dream_video import DreamVideo
from callbacks.evaluation import Evaluation
from callbacks.model_error import ModelError
from callbacks.progress import RunProgress
from callbacks.run_metrics import RunMetrics
from datamodules import OfflineDataModule, UserError
from datamodules.envs.wrappers import DictObservation
from zoo.collecting import Amount, Part, collect


class Reader(PerfectDreamer):
    """Knows `Walk`, and learns whatever the batch is."""

    replay_sampling = "contexts"

    def training_step(self, batch, batch_idx):
        assert set(batch) >= {"mask", "return_to_go"}
        return super().training_step(torch.ones(3, 4), batch_idx)


@pytest.fixture(scope="module")
def walks(tmp_path_factory):
    """A store of 8 random walks."""
    path = tmp_path_factory.mktemp("walks") / "data"
    collect(lambda: DictObservation(Walk()), "Walk", [Part("random")], Amount("episodes", 8), path)
    return str(path)


def fit(folder, data, *callbacks):
    """What was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(folder, *callbacks, limit_val_batches=0).fit(Reader(), data)
    return [str(w.message) for w in caught if "measures nothing" in str(w.message)]


def everything():
    return (
        Evaluation(every_env_steps=4, episodes=1),
        DreamRealityGap(every_env_steps=4, episodes=2, starts=8),
        DreamVideo(every_env_steps=4, context=3, horizon=9, episodes=2),
        ModelError(every_env_steps=4, horizon=10),
        RunMetrics(),
        RunProgress(),
        Budget(updates=8),
    )


def test_without_an_environment_each_says_once_that_it_measures_nothing(tmp_path, walks):
    told = fit(tmp_path, OfflineDataModule(walks), *everything())
    names = ["Evaluation", "DreamRealityGap", "DreamVideo", "ModelError"]
    assert sorted(text.split()[0] for text in told) == sorted(names)
    assert all("OfflineDataModule has not got an environment" in text for text in told)
    assert not [row for row in rows(tmp_path) if row[2].startswith("eval/")]
    assert not (tmp_path / "videos").exists()


def test_held_out_episodes_serve_what_can_use_them(tmp_path, walks):
    told = fit(tmp_path, OfflineDataModule(walks, validation=0.5), *everything())
    assert sorted(text.split()[0] for text in told) == ["DreamRealityGap", "Evaluation"]
    videos = sorted(path.name for path in (tmp_path / "videos").glob("dream-*"))
    assert videos == ["dream-vector-4.gif", "dream-vector-8.gif"]
    errors = {row[2]: float(row[3]) for row in rows(tmp_path) if row[0] == "8"}
    assert errors["eval/model_error_obs@5"] < 1e-10 < errors["eval/copy_error_obs@5"]
    assert errors["eval/model_error_reward@5"] < 1e-6


def test_one_held_out_episode_is_too_few_to_measure_errors(tmp_path, walks):
    told = fit(tmp_path, OfflineDataModule(walks, validation=0.125), *everything())
    assert "ModelError" in {text.split()[0] for text in told}
    assert "DreamVideo" not in {text.split()[0] for text in told}


def test_an_environment_that_is_named_is_played_in(tmp_path, walks):
    told = fit(tmp_path, OfflineDataModule(walks, env=Walk), *everything())
    assert told == []
    returns = [(int(r[0]), float(r[3])) for r in rows(tmp_path) if r[2] == "eval/return_mean"]
    best = EPISODE * (EPISODE + 1) / 2
    assert returns == [(4, best), (8, best)], "each update counts like an env step"


def test_another_environment_is_refused_before_anything_is_learnt(tmp_path, walks):
    learner, data = Reader(), OfflineDataModule(walks, env="CartPole-v1")
    message = r"made for .*vector float32\[2\].*, but the environment CartPole-v1 has .*\[4\]"
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, Evaluation(every_env_steps=4), Budget(updates=8)).fit(learner, data)
    assert learner.updates == 0
    fit(tmp_path / "only", data, Budget(updates=8))


def test_a_budget_of_env_steps_would_not_end(tmp_path, walks):
    with pytest.raises(UserError, match="recorded data has none"):
        fit(tmp_path, OfflineDataModule(walks), Budget(env_steps=10))
