"""Statistics: returns and lengths of episodes, success rates, and bootstrap intervals."""

import math
from collections.abc import Callable, Sequence

import numpy as np

BOOTSTRAP_RESAMPLES = 10_000
ACHIEVEMENT = "log_achievement_"  # prefix of the keys of achievements


class EpisodeStats:
    """Accumulates the current episode of each env and returns the finished ones.

    An episode lasts from `is_first` to `is_last`; one that is abandoned in between is dropped.
    """

    def __init__(self, n_envs: int, action_repeat: int = 1):
        self._action_repeat = action_repeat
        self._started = np.zeros(n_envs, bool)
        self._return = np.zeros(n_envs)
        self._steps = np.zeros(n_envs, np.int64)
        self._max: dict[str, np.ndarray] = {}  # by log key, [n]
        self._above: dict[str, np.ndarray] = {}  # by log key, the steps at which it was above 0, [n]

    def add(self, step: dict[str, np.ndarray]) -> list[dict[str, float]]:
        """Add one step of all envs and return the episodes that it finished, in the order of the envs.

        Args:
            step: `reward`, `is_first`, `is_last` and any `log_*` scalars, each [n].

        Returns:
            A dict for each finished episode: `return`, `length` in env steps (including action repeat,
            without the reset), the maximum of each `log_*` key, and as `log_*_share` the share of the steps
            at which it was above 0 (not for achievements).
        """
        first = np.asarray(step["is_first"], bool)
        self._started |= first
        self._return = np.where(first, 0.0, self._return + np.asarray(step["reward"], np.float64))
        self._steps = np.where(first, 0, self._steps + 1)
        for key, value in step.items():
            if key.startswith("log_"):
                value = np.asarray(value, np.float64)
                self._max[key] = np.where(first, value, np.maximum(self._max.get(key, value), value))
                if not key.startswith(ACHIEVEMENT):
                    self._above[key] = np.where(first, 0, self._above.get(key, 0) + (value > 0))
        return [self._episode(index) for index in np.flatnonzero(self._started & step["is_last"])]

    def _episode(self, index: int) -> dict[str, float]:
        return {
            "return": float(self._return[index]),
            "length": float(self._steps[index] * self._action_repeat),
            **{key: float(value[index]) for key, value in self._max.items()},
            **{
                f"{key}_share": float(n[index] / max(1, self._steps[index])) for key, n in self._above.items()
            },
        }

    def state_dict(self) -> dict:
        """The current episodes, as plain lists."""
        return {
            "started": self._started.tolist(),
            "return": self._return.tolist(),
            "steps": self._steps.tolist(),
            "max": {key: value.tolist() for key, value in self._max.items()},
            "above": {key: value.tolist() for key, value in self._above.items()},
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore the current episodes of `state`, which has the same number of envs."""
        self._started = np.array(state["started"], bool)
        self._return = np.array(state["return"], np.float64)
        self._steps = np.array(state["steps"], np.int64)
        self._max = {key: np.array(value, np.float64) for key, value in state["max"].items()}
        self._above = {key: np.array(value, np.int64) for key, value in state["above"].items()}


class SuccessRates:
    """Success rates of `log_achievement_*` over all episodes so far: Crafter's official protocol.

    `add` takes the episodes of `EpisodeStats`. An achievement counts once for each episode in which it
    reached 1.
    """

    def __init__(self, suite: str):
        self._suite = suite
        self._episodes = 0
        self._successes: dict[str, int] = {}

    def add(self, episode: dict[str, float]) -> None:
        """Count one finished episode."""
        self._episodes += 1
        for key, value in episode.items():
            if key.startswith(ACHIEVEMENT):
                name = key.removeprefix(ACHIEVEMENT)
                self._successes[name] = self._successes.get(name, 0) + int(value >= 1)

    def metrics(self) -> dict[str, float]:
        """`{suite}/success_rate/{achievement}` in percent and `{suite}/score`; empty without achievements."""
        rates = {name: 100 * count / self._episodes for name, count in self._successes.items()}
        if not rates:
            return {}
        named = {f"{self._suite}/success_rate/{name}": rate for name, rate in sorted(rates.items())}
        return {f"{self._suite}/score": achievement_score(list(rates.values())), **named}

    def state_dict(self) -> dict:
        """The counts, as plain integers."""
        return {"episodes": self._episodes, "successes": dict(self._successes)}

    def load_state_dict(self, state: dict) -> None:
        """Restore the counts of `state`."""
        self._episodes = state["episodes"]
        self._successes = dict(state["successes"])


def achievement_score(rates: Sequence[float]) -> float:
    """Crafter's score: exp(mean ln(1 + s)) - 1 over success rates s in percent (arXiv 2109.06780)."""
    return math.expm1(float(np.mean(np.log1p(rates))))


def interquartile_mean(values: Sequence[float] | np.ndarray, axis: int = -1) -> np.ndarray | np.float64:
    """Mean of the middle half of the values, without the lowest and highest quarter (arXiv 2108.13264).

    If a quarter is not an integer, the outermost remaining values have a smaller weight: of three values, the
    middle one has four times the weight of the others.
    """
    values = np.sort(np.asarray(values, np.float64), axis)
    amount = values.shape[axis]
    ranks = np.arange(amount)
    inside = np.minimum(ranks + 1, 0.75 * amount) - np.maximum(ranks, 0.25 * amount)
    return np.average(values, axis, weights=np.maximum(inside, 0))


def bootstrap_interval(
    values: Sequence[float],
    confidence: float = 0.95,
    seed: int = 0,
    statistic: Callable[..., np.ndarray] = np.mean,
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of the mean, or another statistic, of independent values.

    `statistic` takes an array and an axis. For curves [n, points] whole curves are resampled, and low and
    high are [points]. The same values and seed give the same interval; a single value gives (nan, nan).
    """
    values = np.asarray(values, np.float64)
    if len(values) == 1:
        return (np.full(values.shape[1:], math.nan)[()],) * 2
    return _quantiles(_resampled(values, np.random.default_rng(seed), statistic), confidence)


def ratio_interval(
    over: Sequence[float],
    under: Sequence[float],
    confidence: float = 0.95,
    seed: int = 0,
    statistic: Callable[..., np.ndarray] = np.mean,
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of mean(over) / mean(under), or another statistic.

    Single values, and zeros in `under`, which a resample may consist of, give (nan, nan).
    """
    if min(len(over), len(under)) < 2 or not np.all(under):
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    over, under = (_resampled(np.asarray(values, np.float64), rng, statistic) for values in (over, under))
    return _quantiles(over / under, confidence)


def _resampled(
    values: np.ndarray, rng: np.random.Generator, statistic: Callable[..., np.ndarray]
) -> np.ndarray:
    shape = (BOOTSTRAP_RESAMPLES // 100, len(values))  # in parts to save memory
    return np.concatenate([statistic(rng.choice(values, shape), axis=1) for _ in range(100)])


def _quantiles(samples: np.ndarray, confidence: float) -> tuple:
    tail = (1 - confidence) / 2
    low, high = np.quantile(samples, [tail, 1 - tail], axis=0)
    return (low, high) if low.ndim else (float(low), float(high))
