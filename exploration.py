"""Explorers: who acts before, or instead of, the task's actor."""

from collections.abc import Mapping

import gymnasium
import numpy as np

from networks import action_classes


class Random:
    """Uniformly random actions, for the prefill."""

    def __init__(self, act_space: Mapping[str, gymnasium.Space], rng: np.random.Generator):
        self.act_space = act_space
        self.rng = rng

    def act(self, amount: int) -> dict[str, np.ndarray]:
        """Actions [amount, ...] for `amount` envs: int32 indices, float32 values."""
        out = {}
        for key, space in self.act_space.items():
            if classes := action_classes(space):
                index = [self.rng.integers(n, size=amount, dtype=np.int32) for n in classes]
                index = np.stack(index, -1).reshape(amount, *space.shape)
                out[key] = (index + space.start).astype(np.int32)
            else:  # make_env has made its range [-1, 1]
                values = self.rng.uniform(space.low, space.high, (amount, *space.shape))
                out[key] = values.astype(np.float32)
        return out
