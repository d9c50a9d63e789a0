"""Memory Maze (Pasukonis et al. 2022), `memorymaze_9x9` to `memorymaze_15x15`."""

import functools
import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium import spaces

import envs
from basics import UserError
from envs import rendering

TASKS = ("9x9", "11x11", "13x13", "15x15")
MIN_SIZE = 64  # pixels; in smaller images the border, which shows the target's colour, would cover everything


def make(name: str, config: Any) -> "MemoryMaze":
    """The environment of task `memorymaze_{name}`."""
    if name not in TASKS:
        raise envs.unknown_task("memorymaze", name, TASKS)
    height, width = config.size
    if height != width or height < MIN_SIZE:
        raise UserError(
            f"Memory Maze needs square images of at least {MIN_SIZE} x {MIN_SIZE}; size is {config.size}."
        )
    with rendering.dm_control(f"memorymaze_{name}", draws=True):
        task = getattr(_tasks(), f"memory_maze_{name}")
        return MemoryMaze(functools.partial(task, image_only_obs=True, camera_resolution=height))


def _tasks() -> Any:
    """The module `memory_maze.tasks`, without the package's __init__, which needs the old gym."""
    if "memory_maze" not in sys.modules:
        spec = importlib.util.find_spec("memory_maze")
        if spec is None:
            raise ModuleNotFoundError("No module named 'memory_maze'", name="memory_maze")
        sys.modules["memory_maze"] = importlib.util.module_from_spec(spec)
    logging.getLogger("absl").setLevel(logging.ERROR)  # each reset would print a warning
    return importlib.import_module("memory_maze.tasks")


class MemoryMaze:
    """A maze of coloured objects; the image's border has the colour of the next target.

    Args:
        load: makes a dm_env environment with a `seed`. Mazes can only be seeded when they are made, so each
            episode makes a new environment.
    """

    def __init__(self, load: Callable[..., Any]):
        self._load = load
        self._env = load(seed=0)
        spec = self._env.observation_spec()
        self.obs_space = {"image": spaces.Box(0, 255, spec.shape, np.uint8)}
        self.act_space = spaces.Discrete(self._env.action_spec().num_values)

    def reset(self, seed: int | None = None) -> tuple[dict, dict]:
        if seed is not None:
            self._env.close()
            self._env = self._load(seed=seed % 2**32)  # the range of RandomState
        return {"image": self._env.reset().observation}, {}

    def step(self, action: int) -> tuple[dict, float, bool, bool, dict]:
        step = self._env.step(action)
        terminated = step.last() and step.discount == 0  # else a time limit
        return {"image": step.observation}, float(step.reward), terminated, step.last() and not terminated, {}

    def close(self) -> None:
        self._env.close()
