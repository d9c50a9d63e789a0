"""An environment that is sound until the watch over its first steps is over, and then does what it is told.

Worker processes import it as `custom_late_faults:LateFaults`. The variable LORE_TEST_FAULT names the fault
and, behind a colon, a file: who makes it first fails, and no other environment does. Of several learners
only the second's fail.
"""

import math
import os
import time

import numpy as np
from gymnasium import spaces

from envs.adapter import GUARDED_STEPS
from envs.dummy import Dummy

VARIABLE = "LORE_TEST_FAULT"
STEPS = GUARDED_STEPS + 20  # that it is sound for, resets included
VALUES = {"nan": math.nan, "inf": math.inf, "huge": 1e39, "none": None}


class LateFaults(Dummy):
    """A dummy env with an image, a vector and a log_ key."""

    def __init__(self, size=(16, 16)):
        super().__init__(size, vectors=("vector",))
        self.obs_space["log_health"] = spaces.Box(-np.inf, np.inf, (), np.float32)
        self.calls = 0

    def reset(self, seed=None):
        self.calls += 1
        obs, info = super().reset(seed)
        return {**obs, "log_health": np.float32(1)}, info

    def step(self, action):
        self.calls += 1
        obs, reward, *rest = super().step(action)
        obs["log_health"] = np.float32(1)
        if self.calls >= STEPS and (fault := self.fault()):
            obs, reward = self.fail(fault, obs, reward)
        return obs, reward, *rest

    def fault(self) -> str:
        if os.environ.get("RANK", "1") != "1":
            return ""
        fault, _, mark = os.environ.get(VARIABLE, "").partition(":")
        try:
            open(mark, "x").close()
        except FileExistsError:
            return ""
        return fault

    def fail(self, fault: str, obs: dict, reward: float) -> tuple[dict, float]:
        """The observation and the reward as the fault has them, where there are any."""
        if fault == "raises":
            raise RuntimeError("the gripper is stuck\nand hot")
        if fault == "hangs":
            time.sleep(600)
        if fault == "dies":
            os._exit(7)
        key, _, how = fault.partition(" ")
        if how == "lacks":
            del obs[key]
        elif how == "shape":
            obs[key] = obs[key][:-1]
        elif how == "dtype":
            obs[key] = obs[key].astype(complex)
        elif key == "reward":
            reward = VALUES[how]
        elif key:
            obs[key] = np.full_like(obs[key], VALUES[how])
        return obs, reward
