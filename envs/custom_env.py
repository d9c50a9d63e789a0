"""An example environment. Change it or add your own: docs/custom_env.md."""

import numpy as np
from gymnasium import spaces


class CustomEnv:
    """A dot walks in a square for 100 steps; the nearer it is to the middle, the larger the reward."""

    def __init__(self, task: str, size: tuple[int, int] = (64, 64)):
        self.size = size
        self.obs_space = {
            "image": spaces.Box(0, 255, (*size, 3), np.uint8),
            "position": spaces.Box(0, 1, (2,), np.float32),
        }
        self.act_space = spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, seed=None):
        self.steps = 0
        self.position = np.random.default_rng(seed).uniform(0, 1, 2).astype(np.float32)
        return {"image": self.render(), "position": self.position}, {}

    def step(self, action):
        self.steps += 1
        self.position = np.clip(self.position + 0.1 * action, 0, 1)
        reward = 1 - np.linalg.norm(self.position - 0.5)
        obs = {"image": self.render(), "position": self.position}
        return obs, float(reward), False, self.steps >= 100, {}  # never terminated, but truncated

    def render(self):
        image = np.zeros((*self.size, 3), np.uint8)
        row, column = (self.position * (np.array(self.size) - 4)).astype(int)
        image[row : row + 4, column : column + 4] = 255
        return image
