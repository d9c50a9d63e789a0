"""Small environments for tests, solved within minutes.

The cue is one of four colours and determines the rewarded action. Random actions get a quarter of the best
return.

    dummy_cue         image; each step shows a new cue
    dummy_memory      image; the cue is visible at the first step only, and rewarded at all later ones
    dummy_vector      as dummy_cue, without an image: the cue is a one-hot vector
    dummy_mixed       as dummy_cue, with image and vector
    dummy_continuous  as dummy_cue, with continuous actions: the cue determines a point in the plane
"""

import math
from typing import Any

import numpy as np
from gymnasium import spaces

import envs

COLORS = np.array([(230, 30, 30), (30, 200, 30), (40, 60, 240), (230, 220, 30)], np.uint8)
BACKGROUND = 60  # gray level; a blank image is all background
CUE_LENGTH = 16  # steps of an episode with a new cue at each step
MEMORY_LENGTH = 6  # steps of an episode with one cue, including the step that shows it
RADIUS = 0.6  # of the circle on which the continuous targets lie
WIDTH = 0.3  # distance from the target at which the reward has fallen to exp(-1/2)

TASKS: dict[str, dict[str, Any]] = {
    "cue": {},
    "memory": {"memory": True, "length": MEMORY_LENGTH},
    "vector": {"image": False, "vectors": ("vector",)},
    "mixed": {"vectors": ("vector",)},
    "continuous": {"continuous": True},
}


def make(name: str, config: Any) -> "Dummy":
    """The environment of task `dummy_{name}`, with images of `config.size`."""
    if name not in TASKS:
        raise envs.unknown_task("dummy", name, TASKS)
    return Dummy(size=config.size, **TASKS[name])


class Dummy:
    """Shows a cue and rewards the matching action.

    Args:
        size: height and width of the image.
        image: whether there is an image; the cue is a coloured square in its middle.
        vectors: names of vector keys with the one-hot cue, or zeros while it is hidden.
        memory: show the cue at the first step only, and reward only later steps.
        continuous: actions are points in [-1, 1]^2, rewarded by the distance to the cue's point.
        length: steps after which an episode terminates.

    `best_return` is the return of an episode of correct actions.
    """

    def __init__(
        self,
        size: tuple[int, int] = (64, 64),
        image: bool = True,
        vectors: tuple[str, ...] = (),
        memory: bool = False,
        continuous: bool = False,
        length: int = CUE_LENGTH,
    ):
        self._size = tuple(size)
        self._image = image
        self._vectors = vectors
        self._memory = memory
        self._continuous = continuous
        self._length = length
        self._random = np.random.default_rng()
        self.best_return = float(length - 1 if memory else length)
        one_hot = spaces.Box(0, 1, (len(COLORS),), np.float32)
        self.obs_space: dict[str, spaces.Space] = dict.fromkeys(vectors, one_hot)
        if image:
            self.obs_space["image"] = spaces.Box(0, 255, (*self._size, 3), np.uint8)
        self.act_space: spaces.Space = spaces.Discrete(len(COLORS))
        if continuous:
            self.act_space = spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, seed: int | None = None) -> tuple[dict, dict]:
        if seed is not None:
            self._random = np.random.default_rng(seed)
        self._step = 0
        self._new_cue()
        return self._obs(), {}

    def step(self, action: Any) -> tuple[dict, float, bool, bool, dict]:
        rewarded = self._step > 0 or not self._memory
        reward = self._score(action) if rewarded else 0.0
        self._step += 1
        if not self._memory:
            self._new_cue()
        return self._obs(), reward, self._step >= self._length, False, {}

    def _new_cue(self) -> None:
        self._cue = int(self._random.integers(len(COLORS)))

    def _score(self, action: Any) -> float:
        if not self._continuous:
            return float(action == self._cue)
        angle = 2 * math.pi * self._cue / len(COLORS)
        distance = math.dist(action, (RADIUS * math.cos(angle), RADIUS * math.sin(angle)))
        return math.exp(-0.5 * (distance / WIDTH) ** 2)

    def _obs(self) -> dict[str, np.ndarray]:
        visible = self._step == 0 or not self._memory
        one_hot = np.zeros(len(COLORS), np.float32)
        one_hot[self._cue] = float(visible)
        obs = {key: one_hot.copy() for key in self._vectors}
        if self._image:
            height, width = self._size
            image = np.full((height, width, 3), BACKGROUND, np.uint8)
            if visible:
                image[height // 4 : height - height // 4, width // 4 : width - width // 4] = COLORS[self._cue]
            obs["image"] = image
        return obs
