"""How fast environments run in worker processes: ours against gymnasium's AsyncVectorEnv, in one run.

    python3 benchmarks/env_speed.py --tasks crafter_reward dmc_walker_walk atari_pong --json

Random actions, resets included, in turns of some seconds each. The figures are medians of the turns: steps of
all envs per second of wall-clock time, and ratios within a turn, which other jobs disturb least. Both step
the same environments and get the same observations. The ideal is one environment in the main process, times
the workers or the processors, whichever are fewer.
"""

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import config
import envs
import parallel

WARM_UP = 20  # steps before a measurement: the first ones load what an environment loads late


class AsGymnasium(gymnasium.Env):
    """Environment `index` of `make`, for gymnasium's AsyncVectorEnv."""

    def __init__(self, make: Callable[[int], Any], index: int):
        self._env = make(index)
        self.observation_space = gymnasium.spaces.Dict(self._env.obs_space)
        self.action_space = self._env.act_space["action"]

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        return self._env.reset()[0], {}

    def step(self, action: Any) -> tuple[dict, float, bool, bool, dict]:
        return *self._env.step({"action": action})[:4], {}


class Ours:
    """`amount` environments in worker processes, or one in the main process."""

    def __init__(self, make: Callable[[int], Any], amount: int, kind: str = "process"):
        self._vec = parallel.make_vec(make, amount, kind, timeout=600, max_restarts=0)
        self._vec.reset()
        self.space = self._vec.act_space["action"]
        self.close = self._vec.close

    def step(self, action: np.ndarray) -> None:
        self._vec.step({"action": action})


class Theirs:
    """The same environments in an AsyncVectorEnv with its defaults."""

    def __init__(self, make: Callable[[int], Any], amount: int):
        # spawn: a fork of a process with threads may hang
        makers = [functools.partial(AsGymnasium, make, index) for index in range(amount)]
        self._vec = gymnasium.vector.AsyncVectorEnv(makers, context="spawn")
        self._vec.reset()
        self.space = self._vec.single_action_space
        self.close = self._vec.close

    def step(self, action: np.ndarray) -> None:
        self._vec.step(action)


def rate(vec: Ours | Theirs, amount: int, seconds: float, seed: int) -> float:
    """Steps of all environments per second, by random actions."""
    rng = np.random.default_rng(seed)
    space = vec.space

    def action() -> np.ndarray:
        if isinstance(space, gymnasium.spaces.Discrete):
            return rng.integers(space.n, size=amount, dtype=np.int32)
        return rng.uniform(space.low, space.high, (amount, *space.shape)).astype(space.dtype)

    for _ in range(WARM_UP):
        vec.step(action())
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        vec.step(action())
        steps += 1
    return amount * steps / (time.perf_counter() - start)


def measure(task: str, workers: list[int], seconds: float, turns: int, seed: int) -> dict:
    """The rates of a task: `single`, and by the amount of workers ours, theirs, and how they compare."""
    options = config.load(["--task", task, "--seed", str(seed)])
    make = functools.partial(envs.make_env, options, "train")
    vecs: dict[tuple[str, int], Ours | Theirs] = {("single", 1): Ours(make, 1, "none")}
    try:
        for amount in workers:
            vecs["ours", amount] = Ours(make, amount)
            vecs["theirs", amount] = Theirs(make, amount)
        rates = _turns(vecs, seconds, turns, seed)
    finally:
        for vec in vecs.values():
            vec.close()
    single = rates["single", 1]
    table = {}
    for amount in workers:
        ours, theirs = rates["ours", amount], rates["theirs", amount]
        table[amount] = {
            "ours": round(np.median(ours)),
            "gymnasium": round(np.median(theirs)),
            "ours / gymnasium": round(np.median(ours / theirs), 2),
            "share of the ideal": round(np.median(ours / single) / min(amount, processors()), 2),
        }
    return {"single": round(np.median(single)), "workers": table}


def _turns(vecs: dict, seconds: float, turns: int, seed: int) -> dict[tuple[str, int], np.ndarray]:
    rates: dict[tuple[str, int], list[float]] = {key: [] for key in vecs}
    for turn in range(turns):
        for (name, amount), vec in vecs.items():
            rates[name, amount].append(rate(vec, amount, seconds, seed + turn))
    return {key: np.array(values) for key, values in rates.items()}


def processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["crafter_reward"])
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--seconds", type=float, default=3.0, help="of each turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    numbers = (args.workers, args.seconds, args.turns, args.seed)
    result = {"processors": processors(), "tasks": {task: measure(task, *numbers) for task in args.tasks}}
    if args.json:
        print(json.dumps(result))
        return
    print(f"{result['processors']} processors; steps/s")
    for task, rates in result["tasks"].items():
        print(f"{task}: one env in the main process {rates['single']}")
        for amount, row in rates["workers"].items():
            print(f"  {amount} workers  " + "  ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
