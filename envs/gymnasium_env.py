"""Any environment of gymnasium, `gym_{id}`, such as `gym_CartPole-v1`.

`gym_{module}:{id}` first imports a module that registers the id, such as `gym_ale_py:ALE/Pong-v5`.
"""

import importlib
import os
from typing import Any

import gymnasium
from gymnasium.envs.registration import load_env_creator
from gymnasium.wrappers import AddRenderObservation

import envs
from basics import UserError, first_line
from envs import rendering


def make(name: str, config: Any) -> gymnasium.Env:
    """The environment of task `gym_{name}`. Unless `obs` is native, `image` is the rendered frame."""
    task = f"gym_{name}"
    module, _, env_id = name.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        return _make(task, module, env_id, config.obs)
    except gymnasium.error.DependencyNotInstalled as error:
        reason = first_line(error)
        raise UserError(f"{task}: {reason} LoRe's own list: pip install -r requirements/gym.txt") from error
    except (gymnasium.error.Error, ImportError) as error:  # also ids that gymnasium has removed
        raise UserError(f"{task} cannot be made: {first_line(error)}") from error


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
    if hasattr(env.unwrapped, "mujoco_renderer"):
        env = ChooseOpenGL(env)
    if obs == "native":
        return env
    env.reset(seed=0)  # a camera may keep its position from the very first reset
    return AddRenderObservation(env, obs == "pixels", render_key="image", obs_key="vector")


class ChooseOpenGL(gymnasium.Wrapper):
    """Chooses an OpenGL for MuJoCo when the environment is rendered."""

    def render(self) -> Any:
        rendering.choose_backend(f"gym_{self.env.spec.id}")
        return self.env.render()
