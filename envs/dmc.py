"""DeepMind Control (Tunyasuvunakool et al. 2020), `dmc_{domain}_{task}`, such as `dmc_walker_walk`."""

from typing import Any

import numpy as np
from gymnasium import spaces

import envs
from envs import rendering

CAMERAS = {"quadruped": 2}  # the camera with the best view; 0 for other domains


def make(name: str, config: Any) -> "DMC":
    """The environment of task `dmc_{name}`."""
    images = config.obs != "native"
    with rendering.dm_control(f"dmc_{name}", draws=images):
        from dm_control import suite

        tasks = {f"{domain}_{task}": (domain, task) for domain, task in suite.ALL_TASKS}
        if name not in tasks:
            raise envs.unknown_task("dmc", name, tasks)
        domain, task = tasks[name]
        env = suite.load(domain, task, task_kwargs={"random": 0})
    camera = CAMERAS.get(domain, 0)
    return DMC(env, config.size if images else None, camera, config.action_repeat, config.obs != "pixels")


class DMC:
    """An environment of dm_control's suite.

    Args:
        env: from `suite.load`.
        size: height and width of the key `image`; None for no image, and then nothing is rendered.
        camera: number of the model's camera.
        repeat: env steps per action; only the last of them is rendered.
        vectors: whether to observe the suite's own observations, each as a vector.
    """

    repeats_actions = True

    def __init__(
        self,
        env: Any,
        size: tuple[int, int] | None = None,
        camera: int = 0,
        repeat: int = 1,
        vectors: bool = True,
    ):
        self._env, self._size, self._camera, self._repeat = env, size, camera, repeat
        self._vectors = sorted(env.observation_spec()) if vectors else []
        self.obs_space: dict[str, spaces.Space] = {}
        for key in self._vectors:
            shape = env.observation_spec()[key].shape or (1,)
            self.obs_space[key] = spaces.Box(-np.inf, np.inf, shape, np.float32)
        if size:
            self.obs_space["image"] = spaces.Box(0, 255, (*size, 3), np.uint8)
        spec = env.action_spec()
        self.act_space = spaces.Box(spec.minimum, spec.maximum, spec.shape, spec.dtype)

    def reset(self, seed: int | None = None) -> tuple[dict, dict]:
        if seed is not None:
            self._env.task._random = np.random.RandomState(np.random.MT19937(seed))  # there is no public way
        return self._obs(self._env.reset()), {}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        reward = 0.0
        for _ in range(self._repeat):
            step = self._env.step(action)
            reward += step.reward
            if step.last():
                break
        # A discount above 0 at the end means a time limit.
        terminated = step.last() and step.discount == 0
        return self._obs(step), reward, terminated, step.last() and not terminated, {}

    def close(self) -> None:
        self._env.close()

    def _obs(self, step: Any) -> dict[str, np.ndarray]:
        obs = {key: np.atleast_1d(step.observation[key]).astype(np.float32) for key in self._vectors}
        if self._size:
            height, width = self._size
            obs["image"] = self._env.physics.render(height, width, camera_id=self._camera)
        return obs
