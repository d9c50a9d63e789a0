"""Any environment of gymnasium, `gym_{id}`, such as `gym_CartPole-v1`.

`gym_{module}:{id}` first imports a module that registers the id, such as `gym_ale_py:ALE/Pong-v5`.
"""

import importlib
import os
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import load_env_creator
from gymnasium.wrappers import AddRenderObservation

import envs
from basics import UserError
from envs import rendering, symbolic
from envs.wrappers import resize

Vector = spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary | spaces.Tuple | spaces.Dict


def make(name: str, config: Any) -> "Gymnasium":
    """The environment of task `gym_{name}`. Unless `obs` is native, `image` is the rendered frame."""
    task = f"gym_{name}"
    module, _, env_id = name.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        return Gymnasium(_make(task, module, env_id, config.obs), config.size)
    except gymnasium.error.DependencyNotInstalled as error:
        reason = _first_line(error)
        raise UserError(f"{task}: {reason} LoRe's own list: pip install -r requirements/gym.txt") from error
    except (gymnasium.error.Error, ImportError) as error:  # also ids that gymnasium has removed
        raise UserError(f"{task} cannot be made: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _make(task: str, module: str, env_id: str, obs: str) -> gymnasium.Env:
    if env_id not in gymnasium.registry:
        prefix = f"{module}:" if module else ""
        known = [prefix + each for each in sorted(gymnasium.registry)]
        raise envs.unknown_task("gym", prefix + env_id, known)
    creator = gymnasium.spec(env_id).entry_point
    creator = creator if callable(creator) else load_env_creator(creator)
    draws = "rgb_array" in getattr(creator, "metadata", {}).get("render_modes", ())
    if obs != "native" and not draws:
        raise UserError(f"{task} cannot render images: use --obs native.")
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame needs no window
    env = gymnasium.make(env_id, disable_env_checker=True, **({"render_mode": "rgb_array"} if draws else {}))
    if obs == "native":
        return env
    _choose_backend(env)
    env.reset(seed=0)  # a camera may keep its position from the very first reset
    return AddRenderObservation(env, obs == "pixels", render_key="image", obs_key="vector")


def _choose_backend(env: gymnasium.Env) -> None:
    """Choose an OpenGL before the first frame, which environments of MuJoCo need."""
    if hasattr(env.unwrapped, "mujoco_renderer"):
        rendering.choose_backend(f"gym_{env.spec.id}")


class Gymnasium:
    """A gymnasium environment with images and vectors as observations.

    The keys of a Dict stay; an observation without keys becomes `image` or `vector`. uint8 [H, W] and
    [H, W, C] are images, resized to `size`. Everything else becomes a float32 vector by gymnasium's
    `flatten`: Discrete is one-hot, and a Tuple or inner Dict is one vector.
    """

    def __init__(self, env: gymnasium.Env, size: tuple[int, int]):
        self._env, self._size = env, tuple(size)
        own = env.observation_space
        self._single = not isinstance(own, spaces.Dict)
        if self._single:
            own = {"image" if _is_image(own) else "vector": own}
        self._spaces = dict(own)
        self.obs_space = {key: self._space(key, space) for key, space in self._spaces.items()}
        self.act_space = env.action_space

    def reset(self, seed: int | None = None) -> tuple[dict, dict]:
        obs, info = self._env.reset(seed=seed)
        return self._obs(obs), info

    def step(self, action: Any) -> tuple[dict, float, bool, bool, dict]:
        obs, reward, terminated, truncated, info = self._env.step(action)
        return self._obs(obs), float(reward), terminated, truncated, info

    def render(self) -> np.ndarray | None:
        """The frame as uint8 [H, W, 3], or None if the environment renders none."""
        _choose_backend(self._env)
        return self._env.render()

    def close(self) -> None:
        self._env.close()

    def _space(self, key: str, space: spaces.Space) -> spaces.Box:
        if key == symbolic.KEY:
            return space
        if _is_image(space):
            return spaces.Box(0, 255, (*self._size, *(space.shape[2:] or (1,))), np.uint8)
        if not isinstance(space, Vector):
            raise UserError(f"Observation {key!r} is {space}, which is not numeric: leave it out.")
        return spaces.Box(-np.inf, np.inf, spaces.flatten_space(space).shape, np.float32)

    def _obs(self, obs: Any) -> dict[str, np.ndarray]:
        if self._single:
            obs = {next(iter(self._spaces)): obs}
        return {key: self._value(key, space, obs[key]) for key, space in self._spaces.items()}

    def _value(self, key: str, space: spaces.Space, value: Any) -> np.ndarray:
        if key == symbolic.KEY:
            return value
        if not _is_image(space):
            return spaces.flatten(space, value).astype(np.float32)
        value = np.asarray(value)
        return resize(value.reshape(*value.shape[:2], -1), self._size)


def _is_image(space: spaces.Space) -> bool:
    return isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) in (2, 3)
