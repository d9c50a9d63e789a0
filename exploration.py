"""Explorers: who acts before, or instead of, the task's actor."""

from collections.abc import Mapping

import gymnasium
import numpy as np

UNBOUNDED = 1.0  # the range that is explored of a continuous action without bounds: [-1, 1]


class Random:
    """Uniformly random actions, for the prefill."""

    def __init__(self, act_space: Mapping[str, gymnasium.Space], rng: np.random.Generator):
        self.act_space = act_space
        self.rng = rng

    def act(self, amount: int) -> dict[str, np.ndarray]:
        """Actions [amount, ...] for `amount` envs: int32 indices, float32 values."""
        out = {}
        for key, space in self.act_space.items():
            if isinstance(space, gymnasium.spaces.Discrete):
                out[key] = self.rng.integers(space.n, size=amount, dtype=np.int32)
            else:
                low = np.where(np.isfinite(space.low), space.low, -UNBOUNDED)
                high = np.where(np.isfinite(space.high), space.high, UNBOUNDED)
                out[key] = self.rng.uniform(low, high, (amount, *space.shape)).astype(np.float32)
        return out
