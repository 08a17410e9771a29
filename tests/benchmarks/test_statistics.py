import itertools

import numpy as np
import pytest

from benchmarks import statistics as stats


def test_iqm_cuts_a_quarter_of_the_runs_at_each_end():
    # Eight runs: 0, 1 and 8, 100 go; (2 + 3 + 4 + 5) / 4.
    assert stats.iqm([np.array([100.0, 0, 1, 2]), np.array([3.0, 4, 5, 8])]) == 3.5


@pytest.mark.parametrize(("runs", "expected"), [(1, 1.0), (2, 1.5), (3, 2.0), (4, 2.5), (5, 3.0)])
def test_iqm_of_few_runs(runs, expected):
    assert stats.iqm([np.arange(1.0, runs + 1)]) == expected


def test_iqm_of_five_drops_the_outliers_only():
    assert stats.iqm([np.array([-1000.0, 1, 2, 6, 1000])]) == 3.0


def test_mean_and_median_are_over_task_means():
    tasks = [np.array([0.0, 2.0]), np.array([3.0]), np.array([10.0, 10.0, 40.0])]  # means 1, 3, 20
    assert stats.mean(tasks) == 8.0
    assert stats.median(tasks) == 3.0


def test_optimality_gap_ignores_what_exceeds_gamma():
    assert stats.optimality_gap([np.array([0.5, 3.0]), np.array([1.0, 0.0])]) == 0.375
    assert stats.optimality_gap([np.array([0.5, 3.0])], gamma=2.0) == 0.75


def test_tasks_above_the_expert_are_counted_by_their_means_without_ties():
    # Above; a tie; a tie that rounding puts above; below, though most of its runs are above.
    tie = np.array([0.7, 0.9, 1.4, 1.3, 0.7])
    assert tie.mean() == 1.0
    above = np.nextafter(np.ones(3), 2)
    tasks = [np.array([0.5, 1.6]), tie, above, np.array([1.1, 1.1, -3.0])]
    assert stats.above_expert(tasks) == 1
    # One count for each resample.
    assert stats.above_expert(
        [np.array([[2.0, 2.0], [0.0, 1.0]]), np.full((2, 3), 5.0)]
    ).tolist() == [2, 1]


def test_bootstrap_resamples_within_tasks():
    # Constant tasks leave nothing to resample, however far apart they are.
    assert stats.bootstrap([[1.0] * 4, [9.0] * 4], stats.mean) == (5.0, 5.0, 5.0)


def test_bootstrap_matches_all_resamples():
    scores = np.array([0.0, 1.0, 5.0])
    every = [stats.iqm([np.array(draw)]) for draw in itertools.product(scores, repeat=3)]
    low, high = np.percentile(every, [2.5, 97.5], method="inverted_cdf")
    interval = stats.bootstrap([scores])
    assert interval == pytest.approx((2.0, low, high), abs=0.02)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        runs = rng.normal(size=(2, 15))
        interval = stats.bootstrap(list(runs), stats.mean, replications=500, seed=seed)
        hits += interval.low <= 0 <= interval.high
    assert 0.88 <= hits / 200 <= 0.98


def test_bootstrap_is_seeded():
    scores = [np.random.default_rng(1).normal(size=6)]
    first = stats.bootstrap(scores, replications=3000, seed=5)
    assert stats.bootstrap(scores, replications=3000, seed=5) == first
    assert stats.bootstrap(scores, replications=3000, seed=6) != first


@pytest.mark.parametrize("bad", [[[1.0, np.nan]], [[1.0], []], []])
def test_scores_that_are_not_numbers_are_refused(bad):
    with pytest.raises(ValueError, match=r"finite|no runs|at least one"):
        stats.bootstrap(bad)


def test_performance_profile_is_the_share_above():
    profile = stats.performance_profile([[0.1, 0.5], [0.5, 0.9]], [0.0, 0.1, 0.5, 0.89, 2.0])
    assert profile.value.tolist() == [1.0, 0.75, 0.25, 0.25, 0.0]
    assert (profile.low <= profile.value).all()
    assert (profile.value <= profile.high).all()
    # At 0.1 only the first task varies: 0, 1 or 2 of its draws are above.
    assert (profile.low[1], profile.high[1]) == (0.5, 1.0)


def test_probability_of_improvement_counts_pairs():
    # Pairs: 1>0, 1=1 (half), 3>0, 3>1: 3.5 of 4; second task 0 of 1; mean over tasks.
    x, y = [[1.0, 3.0], [2.0]], [[0.0, 1.0], [5.0]]
    assert stats.probability_of_improvement(x, y).value == pytest.approx((3.5 / 4 + 0) / 2)
    assert stats.probability_of_improvement(y, x).value == pytest.approx(1 - (3.5 / 4 + 0) / 2)


def test_probability_of_improvement_interval_matches_all_resamples():
    x, y = np.array([1.0, 2.0, 4.0]), np.array([0.0, 3.0])
    every = [
        np.mean([float(a > b) for a in draw_x for b in draw_y])
        for draw_x in itertools.product(x, repeat=3)
        for draw_y in itertools.product(y, repeat=2)
    ]
    interval = stats.probability_of_improvement([x], [y], replications=20_000)
    low, high = np.percentile(every, [2.5, 97.5], method="inverted_cdf")
    assert interval[1:] == pytest.approx((low, high), abs=0.02)


def test_probability_of_improvement_needs_the_same_tasks():
    with pytest.raises(ValueError, match="X has 1 tasks, Y has 2"):
        stats.probability_of_improvement([[1.0]], [[1.0], [2.0]])


def test_curve_band_is_the_bootstrap_at_every_point():
    curves = np.random.default_rng(2).normal(size=(5, 3))
    band = stats.curve_band(curves, replications=40_000)
    for point in range(3):
        interval = stats.bootstrap([curves[:, point]])
        assert band.value[point] == interval.value
        assert (band.low[point], band.high[point]) == pytest.approx(interval[1:], abs=0.03)
