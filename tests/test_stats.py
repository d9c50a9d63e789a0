"""Episode statistics, the Crafter score and intervals, against cases computed by hand."""

import math

import numpy as np
import pytest
import torch

from stats import (
    EpisodeStats,
    SuccessRates,
    achievement_score,
    bootstrap_interval,
    interquartile_mean,
    ratio_interval,
)


def _steps(*rows):
    """Steps of one env from rows (reward, is_first, is_last, achievement so far)."""
    for reward, first, last, achieved in rows:
        yield {
            "reward": np.array([reward], np.float32),
            "is_first": np.array([first]),
            "is_last": np.array([last]),
            "log_achievement_eat": np.array([achieved], np.float32),
            "image": np.zeros((1, 2, 2, 3), np.uint8),
        }


EPISODE = list(_steps((0, True, False, 0), (1, False, False, 1), (0.5, False, True, 0)))


def _feed(stats, steps):
    return [episode for step in steps for episode in stats.add(step)]


def test_episode_has_return_length_and_the_maximum_of_log_keys():
    expected = {"return": 1.5, "length": 2.0, "log_achievement_eat": 1.0}
    assert _feed(EpisodeStats(1), EPISODE) == [expected]


def test_length_counts_env_steps_with_action_repeat():
    assert _feed(EpisodeStats(1, action_repeat=4), EPISODE)[0]["length"] == 8.0


def test_share_of_the_steps_at_which_a_log_key_was_above_0():
    def steps(*values):
        for index, value in enumerate(values):
            flags = {"is_first": np.array([index == 0]), "is_last": np.array([index == len(values) - 1])}
            yield {"reward": np.zeros(1), "log_tv": np.array([value], np.float32), **flags}

    stats = EpisodeStats(1, action_repeat=2)
    first, second = _feed(stats, [*steps(1, 0, 0.5, 0, 0), *steps(0, 1, 1)])  # the reset is no step
    assert (first["log_tv"], first["log_tv_share"]) == (1.0, 0.25)
    assert (second["log_tv"], second["log_tv_share"]) == (1.0, 1.0)
    open_episode = list(steps(0, 1, 0, 1))
    _feed(stats, open_episode[:2])
    resumed = EpisodeStats(1, action_repeat=2)
    resumed.load_state_dict(stats.state_dict())
    assert _feed(resumed, open_episode[2:])[0]["log_tv_share"] == pytest.approx(2 / 3)


def test_nothing_leaks_from_an_episode_into_the_next():
    second = list(_steps((0, True, False, 0), (0.25, False, True, 0)))
    episodes = _feed(EpisodeStats(1), EPISODE + second)
    assert episodes[1] == {"return": 0.25, "length": 1.0, "log_achievement_eat": 0.0}


def test_abandoned_and_half_seen_episodes_are_not_counted():
    assert _feed(EpisodeStats(1), EPISODE[1:]) == []
    assert len(_feed(EpisodeStats(1), EPISODE[:2] + EPISODE)) == 1
    assert _feed(EpisodeStats(1), EPISODE[:2] + EPISODE)[0]["return"] == 1.5


def test_envs_are_counted_separately():
    stats = EpisodeStats(2)
    flags = np.zeros(2, bool)
    stats.add({"reward": np.zeros(2), "is_first": ~flags, "is_last": flags})
    done = stats.add({"reward": np.array([1.0, 2.0]), "is_first": flags, "is_last": np.array([False, True])})
    assert done == [{"return": 2.0, "length": 1.0}]
    done = stats.add({"reward": np.array([3.0, 0.0]), "is_first": ~flags & [False, True], "is_last": ~flags})
    assert done == [{"return": 4.0, "length": 2.0}, {"return": 0.0, "length": 0.0}]


def test_open_episodes_survive_a_checkpoint(tmp_path):
    stats = EpisodeStats(1)
    _feed(stats, EPISODE[:2])
    torch.save(stats.state_dict(), tmp_path / "state.pt")
    restored = EpisodeStats(1)
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert _feed(restored, EPISODE[2:]) == _feed(stats, EPISODE[2:]) != []


def test_score_is_the_geometric_mean_of_one_plus_percent():
    assert achievement_score([0.0, 0.0]) == 0.0
    assert achievement_score([100.0, 100.0]) == pytest.approx(100.0)
    assert achievement_score([3.0, 0.0]) == pytest.approx(1.0)  # sqrt(4 * 1) - 1
    assert achievement_score([8.0, 0.0, 0.0]) == pytest.approx(9 ** (1 / 3) - 1)


def test_success_rate_is_the_share_of_all_episodes_so_far():
    rates = SuccessRates("crafter")
    assert rates.metrics() == {}
    for eaten in (1.0, 0.0, 0.0, 3.0):
        rates.add({"return": 1.0, "log_achievement_eat": eaten, "log_achievement_fly": 0.0})
    metrics = rates.metrics()
    assert metrics["crafter/success_rate/eat"] == 50.0
    assert metrics["crafter/success_rate/fly"] == 0.0
    assert metrics["crafter/score"] == pytest.approx(math.sqrt(51) - 1)
    assert len(metrics) == 3


def test_interval_of_two_values_follows_from_their_four_resamples():
    # The means of the resamples of [0, 1] are 0, 1/2, 1/2, 1 with equal chances.
    assert bootstrap_interval([0, 1], confidence=0.95) == (0.0, 1.0)
    assert bootstrap_interval([0, 1], confidence=0.6) == (0.0, 1.0)
    assert bootstrap_interval([0, 1], confidence=0.4) == (0.5, 0.5)


def test_interval_of_a_ratio():
    # The means of two resamples of [1, 3] and of [2, 2]: 1, 2, 2 or 3 over 2.
    assert ratio_interval([1, 3], [2, 2]) == (0.5, 1.5)
    rng = np.random.default_rng(1)
    low, high = ratio_interval(rng.normal(3, 1, 400), rng.normal(6, 1, 400))
    half = 1.96 * math.hypot(1 / 6, 3 / 36) / 20  # by the delta method
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.02) and high - low < 3 * half
    assert np.isnan(ratio_interval([1, 3], [2])).all() and np.isnan(ratio_interval([1, 3], [0, 2])).all()


def test_interquartile_mean_cuts_a_quarter_off_each_end():
    assert interquartile_mean([1000, 3, -1000, 1]) == 2
    assert interquartile_mean([0, 3, 90]) == pytest.approx((0.25 * 0 + 3 + 0.25 * 90) / 1.5)
    assert interquartile_mean([-900, 1, 2, 3, 70]) == pytest.approx((0.75 * 1 + 2 + 0.75 * 3) / 2.5)
    assert interquartile_mean([4, 5]) == 4.5 and interquartile_mean([7]) == 7


def test_single_value_has_no_interval():
    assert np.isnan(bootstrap_interval([3.0])).all()


def test_interval_of_curves_is_computed_per_point():
    curves = np.array([[0.0, 5.0], [1.0, 5.0], [7.0, 6.0], [3.0, 9.0]])
    low, high = bootstrap_interval(curves, statistic=interquartile_mean)
    for point, values in enumerate(curves.T):
        assert (low[point], high[point]) == bootstrap_interval(values, statistic=interquartile_mean)
    assert np.isnan(bootstrap_interval(curves[:1])).all() and np.shape(bootstrap_interval(curves[:1])) == (
        2,
        2,
    )
