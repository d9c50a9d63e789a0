"""How fast Crafter runs: the installed package against ours, in one run.

    python3 benchmarks/crafter_speed.py --steps 4000 --json

Random actions, in turns of some episodes each. Times are CPU seconds of this process, so that a busy machine
changes little. The first reset stands apart, because ours prepares its noise in it, once in a process.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import crafter
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from envs.crafter import Crafter

TURNS = 10


class Clock:
    """An environment that plays random actions and notes what its resets and steps take.

    Args:
        reset: starts an episode.
        step: takes an action and says whether the episode is over.
        amount: of actions.
    """

    def __init__(self, reset: Callable[[], Any], step: Callable[[int], bool], amount: int, seed: int):
        self._reset, self._step, self._amount = reset, step, amount
        self._rng = np.random.default_rng(seed)
        self._over = True
        self.resets: list[float] = []  # seconds
        self.steps: list[float] = []

    def play(self, steps: int) -> None:
        """Take `steps` steps, and the resets between them."""
        for action in self._rng.integers(self._amount, size=steps).tolist():
            if self._over:
                start = time.process_time()
                self._reset()
                self.resets.append(time.process_time() - start)
            start = time.process_time()
            self._over = self._step(action)
            self.steps.append(time.process_time() - start)

    def summary(self) -> dict[str, float]:
        """Steps per second with and without resets, and milliseconds of a reset."""
        resets = self.resets[1:] or self.resets
        with_resets = np.mean(self.steps) + np.mean(resets) * len(self.resets) / len(self.steps)
        return {
            "steps_per_s_with_resets": round(1 / with_resets, 1),
            "steps_per_s_without": round(1 / np.mean(self.steps), 1),
            "reset_ms": round(1000 * float(np.median(resets)), 2),
            "first_reset_ms": round(1000 * self.resets[0], 2),
            "steps_per_reset": round(len(self.steps) / len(self.resets), 1),
        }


def make_clocks(seed: int) -> dict[str, Clock]:
    """The original and ours."""
    original, ours = crafter.Env(seed=seed), Crafter()
    ours._env._seed = seed
    amount = len(original.action_names)
    return {
        "original": Clock(original.reset, lambda action: original.step(action)[2], amount, seed),
        "ours": Clock(ours.reset, lambda action: any(ours.step(action)[2:4]), amount, seed),
    }


def measure(steps: int, seed: int) -> dict:
    """Play `steps` steps of each, in turns, and summarise."""
    clocks = make_clocks(seed)
    for _ in range(TURNS):
        for clock in clocks.values():
            clock.play(steps // TURNS)
    result = {name: clock.summary() for name, clock in clocks.items()}
    speed = {name: each["steps_per_s_with_resets"] for name, each in result.items()}
    return {"steps": steps, "seed": seed, **result, "speedup": round(speed["ours"] / speed["original"], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000, help="of each of the two")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.steps < TURNS:
        parser.error(f"--steps must be at least {TURNS}")
    result = measure(args.steps, args.seed)
    if args.json:
        print(json.dumps(result))
        return
    for name in ("original", "ours"):
        for key, value in result[name].items():
            print(f"{name:>9}  {key:<24} {value}")
    print(f"{'':>9}  {'speedup':<24} {result['speedup']}")


if __name__ == "__main__":
    main()
