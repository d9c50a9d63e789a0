"""LPM's reward vanishes where nothing is left to learn, and where nothing can be learned."""

import json

import numpy as np
import pytest
import torch

from basics import numpy_rng
from benchmarks import noisy_digits
from benchmarks.noisy_digits import BATCH, FIFO_BATCHES, KINDS, PICTURES, Digits, Progress, run, study
from tools import torch_rng

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


@noisy_digits.one_thread()
def rewards(capacity: int, falls: float, until: int, updates: int) -> np.ndarray:
    """Rewards in log space [updates, 2]: of a source whose log error falls until an update, and of noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lpm = Progress(2, torch_rng(0, "fifo"), capacity)
    noise, out = torch_rng(0, "noise"), []
    state = torch.eye(2).repeat_interleave(BATCH // 2, 0)  # [n, 2]
    for update in range(updates):
        level = torch.tensor([-falls * min(update, until), 0.0]).repeat_interleave(BATCH // 2)
        spread = torch.tensor([0.1, 0.5]).repeat_interleave(BATCH // 2)
        error = torch.exp(level + spread * torch.randn(BATCH, generator=noise))
        parts = [slice(0, BATCH // 2), slice(BATCH // 2, None)]
        out.append([lpm.measure(state[part], error[part])["lpm_log"] for part in parts])
        lpm.learn(state, error)
    return np.array(out)


def test_synthetic_learnable_and_unlearnable_source():
    """The mean of what the FIFO remembers is half its length old; the predictor lags a little more."""
    falls = 0.03
    reward = rewards(FIFO_BATCHES * BATCH, falls, until=150, updates=250)
    learnable, noise = reward[50:150].mean(0)
    assert 0.8 < learnable / (falls * (FIFO_BATCHES + 1) / 2) < 1.6
    assert abs(noise) < 0.1
    assert np.abs(reward[-50:].mean(0)).max() < 0.1


def test_what_the_fifo_remembers_makes_the_reward():
    """A model of an hour ago is beaten by more than one of a minute ago."""
    long, short = (rewards(n * BATCH, 0.03, until=150, updates=150)[50:, 0].mean() for n in (32, 8))
    assert long - short == pytest.approx(0.03 * (32 - 8) / 2, rel=0.3)


def test_settled_names_the_update_from_which_on_the_running_mean_is_small():
    curve = np.zeros(300)
    curve[FIFO_BATCHES:100] = 1.0
    assert noisy_digits.settled(curve, 0.1) == 145  # 5 of the 50 updates to 145 are ones: their mean is 0.1
    assert noisy_digits.settled(np.ones(300), 0.1) is None
    assert noisy_digits.settled(np.ones(40), 0.1) is None  # too short for a running mean
    assert noisy_digits.settled(np.zeros(300), 0.1) == FIFO_BATCHES + noisy_digits.WINDOW


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
