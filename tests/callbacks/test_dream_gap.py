import pytest
import torch
from callback_standins import EPISODE, PerfectDreamer, TinyData, TinyModel, rows, trainer, walk_spec

from callbacks.budget import Budget
from callbacks.dream_gap import DreamRealityGap
from callbacks.episodes import Recording
from datamodules.errors import UserError


def measured(tmp_path, model, data=None, **options):
    gap = DreamRealityGap(every_env_steps=4, episodes=2, **options)
    trainer(tmp_path, gap, Budget(env_steps=4)).fit(model, data or TinyData())
    return {name: float(value) for _, _, name, value in rows(tmp_path) if name.startswith("eval/")}


def test_perfect_dreamer_has_no_gap(tmp_path):
    metrics = measured(tmp_path, PerfectDreamer())
    # the reward at step t is t; starts reach to the terminal step, where dreams must stop earning
    assert metrics["eval/dream_return"] == pytest.approx(metrics["eval/real_return"])
    assert metrics["eval/dream_reality_gap"] == pytest.approx(1.0)
    for k in (1, 5, 15):
        assert metrics[f"eval/open_loop_mse@{k}"] == pytest.approx(0.0)
        assert metrics[f"eval/copy_last_mse@{k}"] == pytest.approx(k**2)
        assert metrics[f"eval/reward_mae@{k}"] == pytest.approx(0.0)
    assert not any("psnr" in name for name in metrics)


def test_real_return_is_that_of_the_recorded_steps(tmp_path):
    horizon = EPISODE - 4
    metrics = measured(tmp_path, PerfectDreamer(), TinyData(terminates=False), horizon=horizon)
    # truncated: only the start at step 4 has a whole horizon on record
    assert metrics["eval/real_return"] == sum(range(5, EPISODE + 1))


def test_greedy_dreamer_shows_its_gap(tmp_path):
    metrics = measured(tmp_path, PerfectDreamer(greed=2.0))
    assert metrics["eval/dream_reality_gap"] == pytest.approx(2.0)
    assert metrics["eval/reward_mae@1"] > 1
    assert metrics["eval/open_loop_mse@15"] == pytest.approx(0.0)


def test_images_have_psnr(tmp_path):
    metrics = measured(tmp_path, PerfectDreamer(walk_spec(image=True)), TinyData(image=True))
    assert metrics["eval/open_loop_psnr@5"] == pytest.approx(100.0)
    assert metrics["eval/copy_last_mse@5"] == pytest.approx((15 / 255) ** 2)


def test_starts_are_where_enough_was_recorded():
    recording = Recording(
        {}, length=torch.tensor([10, 10, 3]), terminal=torch.tensor([True, False, True])
    )
    row, step = recording.starts(context=4, count=100, follow=5)
    places = list(zip(row.tolist(), step.tolist(), strict=True))
    # the first ends terminally: up to its last but one step; the second is cut: 5 must follow
    assert places == [(0, t) for t in range(3, 9)] + [(1, t) for t in range(3, 5)]
    row, step = recording.starts(context=4, count=3, follow=5)
    assert list(zip(row.tolist(), step.tolist(), strict=True)) == [(0, 3), (0, 6), (1, 4)]
    assert len(recording.starts(context=20, count=3, follow=5)[0]) == 0


def test_models_that_do_not_dream_are_refused(tmp_path):
    with pytest.raises(UserError, match="Imaginer, which TinyModel is not"):
        measured(tmp_path, TinyModel())
    with pytest.raises(UserError, match="max_steps is 10"):
        DreamRealityGap(max_steps=10)
