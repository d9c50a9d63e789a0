"""Wrappers around one environment. All but Episode take gymnasium environments too."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from basics import UserError

Obs = dict[str, np.ndarray]

# Every observation carries these, beside the environment's own keys.
EPISODE_SPACES = {
    "reward": spaces.Box(-np.inf, np.inf, (), np.float32),
    "is_first": spaces.Box(0, 1, (), np.bool_),
    "is_last": spaces.Box(0, 1, (), np.bool_),
    "is_terminal": spaces.Box(0, 1, (), np.bool_),
}


class Wrapper:
    """Passes everything on to the environment inside."""

    def __init__(self, env: Any):
        self.env = env

    def __getattr__(self, name: str) -> Any:
        if name == "env":  # not set yet: do not look for it inside itself
            raise AttributeError(name)
        return getattr(self.env, name)


class TimeLimit(Wrapper):
    """Truncates an episode after `duration` steps of the environment inside."""

    def __init__(self, env: Any, duration: int):
        super().__init__(env)
        self._duration = duration
        self._step = 0

    def reset(self, **kwargs) -> tuple[Any, dict]:
        self._step = 0
        return self.env.reset(**kwargs)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self._step += 1
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated, truncated or self._step >= self._duration, info


class ActionRepeat(Wrapper):
    """Does each action `repeat` times, or until the episode ends, and sums the rewards."""

    def __init__(self, env: Any, repeat: int):
        super().__init__(env)
        self._repeat = repeat

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        total = 0.0
        for _ in range(self._repeat):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += reward
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, info


class Episode(Wrapper):
    """The outermost wrapper: what the program sees of an environment.

    It gives every episode its own seed, adds reward and flags to the observation, checks each observation
    against the declared space, and remembers the open episode's actions, so that it can be restored.

    `seed_of(episode)` gives the seed of an episode by its number; `name` is the task's, for error messages.
    """

    def __init__(self, env: Any, seed_of: Callable[[int], int], name: str):
        super().__init__(env)
        self._seed_of = seed_of
        self._name = name
        own = env.act_space
        self._single = not isinstance(own, Mapping | spaces.Dict)
        self.act_space = {"action": own} if self._single else dict(own)
        self.obs_space = dict(env.obs_space) | EPISODE_SPACES
        self._episode = -1
        self._actions: list[dict[str, np.ndarray]] = []

    def reset(self, episode: int | None = None) -> tuple[Obs, dict]:
        """Start the next episode, or the one with the given number."""
        self._episode = self._episode + 1 if episode is None else episode
        self._actions = []
        obs, info = self.env.reset(seed=self._seed_of(self._episode))
        return self._complete(obs, 0.0, is_first=True, is_last=False, is_terminal=False), info

    def step(self, action: Mapping[str, Any]) -> tuple[Obs, float, bool, bool, dict]:
        """Do one step; `action` is a dict with the keys of `act_space`."""
        # Rounded once, before use: what is remembered is exactly what was done.
        action = {key: np.array(action[key], action_dtype(space)) for key, space in self.act_space.items()}
        self._actions.append(action)
        own = {key: value.item() if value.ndim == 0 else value for key, value in action.items()}
        obs, reward, terminated, truncated, info = self.env.step(own["action"] if self._single else own)
        is_last, is_terminal = bool(terminated or truncated), bool(terminated)
        obs = self._complete(obs, reward, is_first=False, is_last=is_last, is_terminal=is_terminal)
        return obs, reward, terminated, truncated, info

    def state(self) -> dict[str, Any]:
        """What `restore` needs: the episode's number, and its actions so far as arrays [L, ...]."""
        actions = {}
        for key, space in self.act_space.items():
            steps = np.array([action[key] for action in self._actions], action_dtype(space))
            actions[key] = steps.reshape(len(self._actions), *space.shape)
        return {"episode": self._episode, "actions": actions}

    def restore(self, state: Mapping[str, Any]) -> tuple[Obs, dict]:
        """Play an episode again from its seed and actions; returns the observation it ends with.

        An environment that is not deterministic may end up elsewhere: compare the observation with the one
        that was seen.
        """
        obs, info = self.reset(int(state["episode"]))
        actions = state["actions"]
        for index in range(len(next(iter(actions.values())))):
            obs, _, _, _, info = self.step({key: value[index] for key, value in actions.items()})
        return obs, info

    def _complete(self, obs: Mapping, reward: float, **flags: bool) -> Obs:
        if not math.isfinite(reward):
            raise self._error("reward", "a finite number", reward)
        obs = {key: np.asarray(value) for key, value in {**obs, **flags}.items()}
        obs["reward"] = np.asarray(reward, np.float32)
        if obs.keys() != self.obs_space.keys():
            key = min(obs.keys() ^ self.obs_space.keys())
            places = ("the key", "no such key") if key in self.obs_space else ("no such key", "the key")
            raise self._error(key, *places)
        for key, space in self.obs_space.items():
            self._check(key, space, obs[key])
        return obs

    def _check(self, key: str, space: spaces.Space, value: np.ndarray) -> None:
        if value.shape != space.shape or value.dtype != space.dtype:
            raise self._error(key, f"{space.dtype} {space.shape}", f"{value.dtype} {value.shape}")
        if value.dtype.kind == "f":
            # math is several times faster on scalars, and most float keys are.
            finite = math.isfinite(value) if value.ndim == 0 else np.isfinite(value).all()
            if not finite:
                raise self._error(key, "finite values", "NaN or infinity")

    def _error(self, key: str, expected: str, got: Any) -> UserError:
        step = len(self._actions)
        return UserError(
            f"Environment {self._name} breaks its contract at step {step} of episode {self._episode}: "
            f"{key!r}: expected {expected}, got {got}."
        )


def action_dtype(space: spaces.Space) -> np.dtype:
    """The dtype in which actions of a space are passed on and stored: int32 for indices."""
    return np.dtype(np.int32) if np.issubdtype(space.dtype, np.integer) else space.dtype
