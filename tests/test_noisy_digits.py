"""LPM's reward vanishes where nothing is left to learn, and where nothing can be learned."""

import json

import numpy as np
import pytest

from basics import numpy_rng
from benchmarks import noisy_digits
from benchmarks.noisy_digits import FIFO_BATCHES, KINDS, PICTURES, Digits, run, study

UPDATES = 150
START, END = slice(FIFO_BATCHES, FIFO_BATCHES + 30), slice(-50, None)


@pytest.fixture(scope="module")
def curves():
    """Of the seen pictures: [kind][curve] -> [updates], the mean over two seeds."""
    seeds = [run(seed, UPDATES)["seen"] for seed in (100, 101)]
    return {k: {c: np.mean([seed[k][c] for seed in seeds], 0) for c in noisy_digits.CURVES} for k in KINDS}


def test_plain_error_stays_high_only_where_nothing_can_be_learned(curves):
    variance = Digits(numpy_rng(100, "digits")).variance()
    assert curves["stochastic"]["error"][END].mean() > 0.95 * variance
    assert curves["deterministic"]["error"][END].mean() < 0.25 * variance


@pytest.mark.parametrize(("space", "least"), [("lpm_log", 0.2), ("lpm_linear", 0.004)])
def test_progress_is_rewarded_while_there_is_some_and_vanishes_on_both_kinds(curves, space, least):
    assert curves["deterministic"][space][START].mean() > least
    for kind in KINDS:
        assert abs(curves[kind][space][END].mean()) < noisy_digits.BANDS[space]


def test_reward_in_log_space_follows_the_true_progress(curves):
    for kind in KINDS:
        reward, truth = curves[kind]["lpm_log"], curves[kind]["progress"]
        assert abs(reward[START].mean() - truth[START].mean()) < 0.1
        assert abs(reward[END].mean() - truth[END].mean()) < 0.1


def test_the_predicted_error_ends_at_the_error(curves):
    for kind in KINDS:
        error, predicted = (curves[kind][name][END].mean() for name in ("error", "predicted"))
        assert predicted == pytest.approx(error, rel=0.15), kind


def test_there_is_no_reward_until_the_fifo_is_full(curves):
    for kind in KINDS:
        for space in ("lpm_log", "lpm_linear"):
            assert not curves[kind][space][:FIFO_BATCHES].any()
            assert curves[kind][space][FIFO_BATCHES:].all()


def test_stochastic_pictures_change_and_unseen_ones_are_never_trained_on():
    digits = Digits(numpy_rng(0, "digits"))
    seen, unseen = ({tuple(x.tolist()) for x in digits.batch(p, np.full(2000, False))[0]} for p in PICTURES)
    assert len(seen) > 100 and len(unseen) > 30 and not seen & unseen
    now, after = digits.batch("seen", np.array([False, True] * 100))
    same = (now == after).all(-1)
    assert same[::2].all() and not same[1::2].any()


def test_study_writes_its_files_and_the_same_seed_gives_the_same(tmp_path):
    result = study([100], 20, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"noisy_digits.{e}" for e in ("json", "png", "svg")}
    written = json.loads((tmp_path / "noisy_digits.json").read_text())
    assert written.pop("curves")["100"] == run(100, 20)
    assert written == json.loads(json.dumps(result))
