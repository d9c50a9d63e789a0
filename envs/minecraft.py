"""Minecraft through MineRL 0.4.4 (Guss et al. 2019): `minecraft_diamond` and others.

Tested only against a fake with MineRL's documented spaces, not against the real game. A seed gives the same
world, but the game is not deterministic: a resumed run starts new episodes.
"""

import re
import subprocess
from typing import Any

import numpy as np
from gymnasium import spaces

import envs
from basics import UserError
from envs.wrappers import resize

# MineRL's id and its time limit in steps.
TASKS = {
    "diamond": ("MineRLObtainDiamond-v0", 18000),
    "ironpickaxe": ("MineRLObtainIronPickaxe-v0", 6000),
    "treechop": ("MineRLTreechop-v0", 8000),
    "navigate": ("MineRLNavigate-v0", 6000),
}
NOTHING = "none"  # the value of a MineRL action that does nothing
TURN = 15  # degrees of a camera turn
PITCH_LIMIT = 60  # largest camera angle up or down, in degrees
ATTACK_STEPS = 30  # steps for which an attack is held, as in DreamerV3: fewer break no block
JUMP_STEPS = 10  # steps for which a jump is held


def make(name: str, config: Any) -> "Minecraft":
    """The environment of task `minecraft_{name}`."""
    if name not in TASKS:
        raise envs.unknown_task("minecraft", name, TASKS)
    env_id, length = TASKS[name]
    java = java_version()
    missing = [] if java == "8" else [f"Java 8 (but Java {java})" if java else "Java"]
    try:
        import gym
        import minerl  # noqa: F401 (registers the ids)
    except ImportError as error:
        missing.append(f"the Python package {error.name}")
    if missing:
        raise UserError(
            f"minecraft_{name} needs Java 8 and MineRL 0.4.4; not found: {', '.join(missing)}. "
            "Java: apt install openjdk-8-jdk (Debian, Ubuntu), conda install -c conda-forge openjdk=8. Then: "
            "pip install minerl==0.4.4. Without a display, start the run with xvfb-run -a."
        )
    return Minecraft(gym.make(env_id), config.size, length)


def java_version() -> str | None:
    """The major version of `java`, "8" for 1.8; None if it is missing."""
    try:
        told = subprocess.run(["java", "-version"], capture_output=True, text=True).stderr
    except OSError:
        return None
    version = re.search(r'version "(?:1\.)?(\d+)', told)
    return version and version[1]


class Minecraft:
    """A MineRL environment with one discrete action, as in DreamerV3.

    The actions: nothing, each button alone, a jump forward, four turns of the camera, and each item that can
    be crafted, smelted, placed or equipped. Observations are `image`, one vector for each other key of MineRL
    (item names are one-hot), and `inventory_max`, the largest number of each item in this episode.

    Args:
        env: from MineRL's `gym.make`.
        size: height and width of the image.
        length: MineRL's time limit in steps.
    """

    def __init__(self, env: Any, size: tuple[int, int], length: int):
        self._env, self._size, self._length = env, tuple(size), length
        self.actions = list_actions(env.action_space.spaces)
        self.act_space = spaces.Discrete(len(self.actions))
        self.obs_space: dict[str, spaces.Space] = {"image": spaces.Box(0, 255, (*self._size, 3), np.uint8)}
        self._vectors = {key: space for key, space in env.observation_space.spaces.items() if key != "pov"}
        for key, space in self._vectors.items():
            count = len(_numbers(space, space.sample()))
            self.obs_space[key] = spaces.Box(-np.inf, np.inf, (count,), np.float32)
        if "inventory" in self._vectors:
            self.obs_space["inventory_max"] = self.obs_space["inventory"]

    def reset(self, seed: int | None = None) -> tuple[dict, dict]:
        if seed is not None:
            self._env.seed(seed % 2**31)  # a Java int
        self._step = self._attack = self._jump = self._pitch = 0
        self._inventory_max = 0.0
        return self._obs(self._env.reset()), {}

    def step(self, action: int) -> tuple[dict, float, bool, bool, dict]:
        self._step += 1
        obs, reward, done, info = self._env.step(self._hold(self.actions[action]))
        truncated = done and self._step >= self._length
        return self._obs(obs), float(reward), done and not truncated, truncated, info

    def close(self) -> None:
        self._env.close()

    def _hold(self, chosen: dict[str, Any]) -> dict[str, Any]:
        """The complete MineRL action: buttons are held for some steps, the camera is limited."""
        action = {**self._env.action_space.no_op(), **chosen}
        self._attack = ATTACK_STEPS if chosen.get("attack") else self._attack
        self._jump = JUMP_STEPS if chosen.get("jump") else self._jump
        if self._attack:
            self._attack -= 1
            action |= {"attack": 1, "jump": 0}
        if self._jump:
            self._jump -= 1
            action |= {"jump": 1, "forward": 1}
        pitch, yaw = action["camera"]
        if abs(self._pitch + pitch) > PITCH_LIMIT:
            pitch = 0
        self._pitch += pitch
        action["camera"] = np.array([pitch, yaw], np.float32)
        return action

    def _obs(self, obs: dict[str, Any]) -> dict[str, np.ndarray]:
        out = {"image": resize(obs["pov"], self._size)}
        out |= {key: _numbers(space, obs[key]) for key, space in self._vectors.items()}
        if "inventory" in out:
            self._inventory_max = np.maximum(self._inventory_max, out["inventory"])
            out["inventory_max"] = self._inventory_max
        return out


def list_actions(space: dict[str, Any]) -> list[dict[str, Any]]:
    """The discrete actions for a Dict of MineRL actions, each as its difference from doing nothing."""
    actions: list[dict[str, Any]] = [{}]
    for key, part in sorted(space.items()):
        if key == "camera":
            actions += [{key: turn} for turn in ([TURN, 0], [-TURN, 0], [0, TURN], [0, -TURN])]
        elif hasattr(part, "values"):  # MineRL's Enum
            actions += [{key: str(value)} for value in part.values if value != NOTHING]
        else:
            actions.append({key: 1, "forward": 1} if key == "jump" else {key: 1})
    return actions


def _numbers(space: Any, value: Any) -> np.ndarray:
    """A value of a MineRL space as a float32 vector."""
    if hasattr(space, "spaces"):
        parts = [_numbers(part, value[key]) for key, part in sorted(space.spaces.items())]
        return np.concatenate(parts)
    if hasattr(space, "values"):  # MineRL's Enum
        return np.array([str(each) == str(value) for each in space.values], np.float32)
    return np.asarray(value, np.float32).reshape(-1)
