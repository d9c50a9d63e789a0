"""Crafter (Hafner 2021, arXiv 2109.06780): `crafter_reward` and `crafter_noreward`."""

import collections
from typing import Any

import crafter
import numpy as np
from gymnasium import spaces

import envs
from tools import UserError

TASKS = {"reward": True, "noreward": False}
DEFAULT_LENGTH = 10000  # env steps of an episode, Crafter's own choice
MIN_SIZE = 18  # pixels; 9 x 9 fields are drawn, and below 2 pixels a field the items have none


def make(name: str, config: Any) -> "Crafter":
    """The environment of task `crafter_{name}`."""
    if name not in TASKS:
        raise envs.unknown_task("crafter", name, TASKS)
    if min(config.size) < MIN_SIZE:
        raise UserError(
            f"Crafter draws images of at least {MIN_SIZE} x {MIN_SIZE} pixels; size is {config.size}."
        )
    return Crafter(TASKS[name], config.size, config.time_limit or DEFAULT_LENGTH)


class Crafter:
    """Crafter, reproducible under a seed.

    Each observation says of every achievement whether it was unlocked in this episode so far, as
    `log_achievement_{name}` (0 or 1). Death is terminal; the end after `length` steps is a truncation.

    Args:
        reward: give Crafter's reward; else it is always 0.
        size: height and width of the image.
        length: env steps of an episode.
    """

    def __init__(self, reward: bool = True, size: tuple[int, int] = (64, 64), length: int = DEFAULT_LENGTH):
        height, width = size
        # The seed is set at each reset. Without one here, Crafter would draw from NumPy's global generator.
        self._env = crafter.Env(size=(width, height), reward=reward, length=length, seed=0)
        self._env._world.__class__ = _World
        self._achievements = {name: f"log_achievement_{name}" for name in crafter.constants.achievements}
        self.obs_space: dict[str, spaces.Space] = {"image": spaces.Box(0, 255, (height, width, 3), np.uint8)}
        self.obs_space |= {key: spaces.Box(0, 1, (), np.float32) for key in self._achievements.values()}
        self.act_space = spaces.Discrete(len(self._env.action_names))

    def reset(self, seed: int | None = None) -> tuple[dict, dict]:
        """The world is that of the first episode of `crafter.Env(seed=seed)`."""
        if seed is not None:
            self._env._seed, self._env._episode = seed, 0
        return self._obs(self._env.reset()), {}

    def step(self, action: int) -> tuple[dict, float, bool, bool, dict]:
        image, reward, done, info = self._env.step(int(action))
        terminated = info["discount"] == 0
        return self._obs(image), float(reward), terminated, done and not terminated, info

    def _obs(self, image: np.ndarray) -> dict[str, np.ndarray]:
        counts = self._env._player.achievements
        unlocked = {key: np.float32(counts[name] > 0) for name, key in self._achievements.items()}
        return {"image": image} | unlocked


class _World(crafter.engine.World):
    """Crafter's world with its objects in order.

    Crafter keeps the objects of a chunk in a set, whose order is that of their memory addresses. It decides
    which creature vanishes, so the same seed and actions would give different games.
    """

    def reset(self, seed: int | None = None) -> None:
        super().reset(seed)
        self._chunks = collections.defaultdict(_OrderedSet)


class _OrderedSet(dict):
    """The part of a set that Crafter uses; iterates in the order of insertion."""

    def add(self, item: Any) -> None:
        self[item] = None

    def remove(self, item: Any) -> None:
        del self[item]
