"""Wrappers around one environment with the contract of envs/__init__.py.

Their random numbers come from the seed of `reset`, so that an episode can be repeated.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from basics import UserError, numpy_rng
from envs import tv_pictures

Obs = dict[str, np.ndarray]

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # weights of red, green and blue in gray: ITU-R BT.601

# Keys that every observation has in addition to the environment's own.
EPISODE_SPACES = {
    "reward": spaces.Box(-np.inf, np.inf, (), np.float32),
    "is_first": spaces.Box(0, 1, (), np.bool_),
    "is_last": spaces.Box(0, 1, (), np.bool_),
    "is_terminal": spaces.Box(0, 1, (), np.bool_),
}


class Wrapper:
    """Forwards everything to the inner environment."""

    def __init__(self, env: Any):
        self.env = env

    def __getattr__(self, name: str) -> Any:
        if name == "env":  # not set yet: avoid infinite recursion
            raise AttributeError(name)
        return getattr(self.env, name)


class TimeLimit(Wrapper):
    """Truncates an episode after `duration` steps of the inner environment."""

    def __init__(self, env: Any, duration: int = 1000):
        super().__init__(env)
        self._duration = duration
        self._step = 0

    def reset(self, **kwargs) -> tuple[Obs, dict]:
        self._step = 0
        return self.env.reset(**kwargs)

    def step(self, action: Any) -> tuple[Obs, float, bool, bool, dict]:
        self._step += 1
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated, truncated or self._step >= self._duration, info


class ActionRepeat(Wrapper):
    """Repeats each action `repeat` times, or until the episode ends, and sums the rewards."""

    def __init__(self, env: Any, repeat: int = 2):
        super().__init__(env)
        self._repeat = repeat

    def step(self, action: Any) -> tuple[Obs, float, bool, bool, dict]:
        total = 0.0
        for _ in range(self._repeat):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += reward
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, info


class NormalizeActions(Wrapper):
    """Makes the range of every continuous action [-1, 1], also in a dict of actions.

    An action is clipped to that range, then mapped to the environment's own. A missing bound counts as 2 away
    from the other one; without any bounds the range is [-1, 1]. Actions of integer dtype are rounded.
    """

    def __init__(self, env: Any):
        super().__init__(env)
        self._inner = env.act_space
        self.act_space = _normalized(self._inner)

    def step(self, action: Any) -> tuple[Obs, float, bool, bool, dict]:
        return self.env.step(_denormalize(action, self._inner))


def _normalized(space: Any) -> Any:
    if isinstance(space, Mapping):
        return {key: _normalized(value) for key, value in space.items()}
    return spaces.Box(-1, 1, space.shape, np.float32) if isinstance(space, spaces.Box) else space


def _denormalize(action: Any, space: Any) -> Any:
    if isinstance(space, Mapping):
        return {key: _denormalize(action[key], value) for key, value in space.items()}
    if not isinstance(space, spaces.Box):
        return action
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    low, high = (
        np.where(np.isfinite(low), low, np.where(np.isfinite(high), high - 2, -1)),
        np.where(np.isfinite(high), high, np.where(np.isfinite(low), low + 2, 1)),
    )
    # In this form, a range of [-1, 1] is the identity to the bit.
    value = (low / 2 + high / 2) + np.clip(action, -1, 1) * (high / 2 - low / 2)
    value = np.clip(value, low, high)
    return (np.rint(value) if space.dtype.kind in "iu" else value).astype(space.dtype)


class ClipReward(Wrapper):
    """Clips rewards to the range from `min_reward` to `max_reward`."""

    def __init__(self, env: Any, min_reward: float = -1, max_reward: float = 1):
        super().__init__(env)
        self._min, self._max = min_reward, max_reward

    def step(self, action: Any) -> tuple[Obs, float, bool, bool, dict]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, min(max(float(reward), self._min), self._max), terminated, truncated, info


class ImageWrapper(Wrapper):
    """Base of wrappers that change all images. Subclasses define their space, and `_new`, the new image."""

    def __init__(self, env: Any):
        super().__init__(env)
        self._images = {key: space for key, space in env.obs_space.items() if is_image(space)}
        if not self._images:
            raise UserError(
                f"{type(self).__name__} needs images (uint8 [H, W, C]); the environment has "
                f"{', '.join(env.obs_space)}."
            )
        changed = {key: self._new_space(space) for key, space in self._images.items()}
        self.obs_space = {**env.obs_space, **changed}

    def reset(self, **kwargs) -> tuple[Obs, dict]:
        obs, info = self.env.reset(**kwargs)
        return self._change(obs), info

    def step(self, action: Any) -> tuple[Obs, float, bool, bool, dict]:
        obs, *rest = self.env.step(action)
        return self._change(obs), *rest

    def _change(self, obs: Obs) -> Obs:
        return {**obs, **{key: self._new(key, obs[key]) for key in self._images}}

    def _new_space(self, space: spaces.Box) -> spaces.Box:
        raise NotImplementedError

    def _new(self, key: str, value: np.ndarray) -> np.ndarray:
        raise NotImplementedError


class Resize(ImageWrapper):
    """Resizes all images to (height, width)."""

    def __init__(self, env: Any, size: tuple[int, int] = (64, 64)):
        self._size = tuple(size)
        super().__init__(env)

    def _new_space(self, space: spaces.Box) -> spaces.Box:
        return spaces.Box(0, 255, (*self._size, space.shape[2]), np.uint8)

    def _new(self, key: str, value: np.ndarray) -> np.ndarray:
        return resize(value, self._size)


class GrayScale(ImageWrapper):
    """Converts colour images [H, W, 3] to grayscale [H, W, 1]; other images stay as they are."""

    def _new_space(self, space: spaces.Box) -> spaces.Box:
        return spaces.Box(0, 255, (*space.shape[:2], 1), np.uint8) if space.shape[2] == 3 else space

    def _new(self, key: str, value: np.ndarray) -> np.ndarray:
        return gray(value) if value.shape[2] == 3 else value


class FrameStack(ImageWrapper):
    """Stacks the last `amount` images along their channels, the oldest first.

    At the start of an episode, the first image is repeated.
    """

    def __init__(self, env: Any, amount: int = 4):
        self._amount = amount
        self._frames: dict[str | None, deque[np.ndarray]] = {}
        super().__init__(env)

    def reset(self, **kwargs) -> tuple[Obs, dict]:
        self._frames = {}
        return super().reset(**kwargs)

    def _new_space(self, space: spaces.Box) -> spaces.Box:
        height, width, channels = space.shape
        return spaces.Box(0, 255, (height, width, channels * self._amount), np.uint8)

    def _new(self, key: str, value: np.ndarray) -> np.ndarray:
        value = value.copy()  # the environment may reuse the array
        frames = self._frames.setdefault(key, deque([value] * self._amount, self._amount))
        frames.append(value)
        return np.concatenate(frames, -1)


class NoisyTV(Wrapper):
    """Actions that show a random picture in place of the images, as a trap for curious agents.

    With discrete actions, `actions` more are added, each of which shows a picture for one step. Continuous
    actions (from -1 to 1) do so where a component exceeds `threshold` in absolute value, so that an agent can
    avoid it and still solve the task. The environment then takes action number `noop`, or zeros. The
    observation `log_tv` is 1 in these steps.

    Args:
        noise: False is the control: the same actions do nothing, and no picture is shown.
        data: path of CIFAR-10, whose pictures to show; None generates some (`tv_pictures.pictures`). They are
            tiled over the frame, or cropped where it is smaller, in gray where it is gray.
    """

    KEY = "log_tv"

    def __init__(
        self,
        env: Any,
        actions: int = 1,
        threshold: float = 0.9,
        noise: bool = True,
        noop: int = 0,
        data: str | None = None,
    ):
        super().__init__(env)
        self._threshold = threshold
        self._random = np.random.default_rng()
        images = {key: space.shape[2] for key, space in env.obs_space.items() if is_image(space)}
        if not images or set(images.values()) - {1, 3}:
            raise UserError(
                "NoisyTV needs images of one or three channels (uint8 [H, W, C]); the environment has "
                f"{', '.join(env.obs_space)}."
            )
        self._images = list(images)
        self.obs_space = {**env.obs_space, self.KEY: spaces.Box(0, 1, (), np.float32)}
        space = env.act_space
        self._first_switch = None
        if isinstance(space, spaces.Discrete):
            if noop >= space.n:
                raise UserError(f"NoisyTV: noop is action {noop}, but there are {space.n} actions.")
            self._noop = int(space.start) + noop
            self._first_switch = int(space.start + space.n)
            self.act_space = spaces.Discrete(int(space.n) + actions, start=int(space.start))
        elif isinstance(space, spaces.Box) and (space.low == -1).all() and (space.high == 1).all():
            self._noop = np.zeros(space.shape, space.dtype)
        else:
            raise UserError(
                "NoisyTV needs one Discrete action, or one Box from -1 to 1 (NormalizeActions makes it so); "
                f"the environment has {space}."
            )
        self._pictures = tv_pictures.pictures(data) if noise else None  # [N, 32, 32, 3]

    def reset(self, *, seed: int | None = None, **kwargs) -> tuple[Obs, dict]:
        if seed is not None:
            self._random = numpy_rng(seed, "noisy_tv")
        obs, info = self.env.reset(seed=seed, **kwargs)
        return self._show(obs, on=False), info

    def step(self, action: Any) -> tuple[Obs, float, bool, bool, dict]:
        if self._first_switch is None:
            on = bool(np.abs(action).max() > self._threshold)
        else:
            on = bool(action >= self._first_switch)
        obs, *rest = self.env.step(self._noop if on else action)
        return self._show(obs, on), *rest

    def _show(self, obs: Obs, on: bool) -> Obs:
        obs = {**obs, self.KEY: np.asarray(on, np.float32)}
        if on and self._pictures is not None:
            picture = self._pictures[self._random.integers(len(self._pictures))]
            obs |= {key: _tiled(picture, obs[key].shape) for key in self._images}
        return obs


def _tiled(picture: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """A picture [h, w, 3] tiled over a frame of `shape` [H, W, 1 or 3], from the upper left corner."""
    height, width, channels = shape
    if channels == 1:
        picture = gray(picture)
    times = (-(-height // picture.shape[0]), -(-width // picture.shape[1]), 1)
    return np.tile(picture, times)[:height, :width]


class AudioInject(Wrapper):
    """Adds an observation `audio` [audio_dim] of Gaussian noise, to try the audio path without sound."""

    def __init__(self, env: Any, audio_dim: int = 16, noise_std: float = 0.0):
        super().__init__(env)
        self._dim, self._std = audio_dim, noise_std
        self._random = np.random.default_rng()
        if "audio" in env.obs_space:
            raise UserError(f"AudioInject: the environment already has audio, {env.obs_space['audio']}.")
        self.obs_space = {**env.obs_space, "audio": spaces.Box(-np.inf, np.inf, (audio_dim,), np.float32)}

    def reset(self, *, seed: int | None = None, **kwargs) -> tuple[Obs, dict]:
        if seed is not None:
            self._random = numpy_rng(seed, "audio_inject")
        obs, info = self.env.reset(seed=seed, **kwargs)
        return self._with_audio(obs), info

    def step(self, action: Any) -> tuple[Obs, float, bool, bool, dict]:
        obs, *rest = self.env.step(action)
        return self._with_audio(obs), *rest

    def _with_audio(self, obs: Obs) -> Obs:
        noise = self._std * self._random.standard_normal(self._dim, np.float32)
        return {**obs, "audio": np.asarray(noise, np.float32)}


class RenderVideo(Wrapper):
    """Adds the rendered frame as `log_image` of `size`, for videos of an environment without images."""

    KEY = "log_image"

    def __init__(self, env: Any, size: tuple[int, int]):
        super().__init__(env)
        self._size = tuple(size)
        self.obs_space = {**env.obs_space, self.KEY: spaces.Box(0, 255, (*self._size, 3), np.uint8)}

    def reset(self, **kwargs) -> tuple[Obs, dict]:
        obs, info = self.env.reset(**kwargs)
        return {**obs, self.KEY: resize(self.env.render(), self._size)}, info

    def step(self, action: Any) -> tuple[Obs, float, bool, bool, dict]:
        obs, *rest = self.env.step(action)
        return {**obs, self.KEY: resize(self.env.render(), self._size)}, *rest


def is_image(space: spaces.Space) -> bool:
    """Whether observations of a space are images: uint8 [H, W, C]."""
    return isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) == 3


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize an image [H, W, C] to (height, width) with area interpolation."""
    import cv2  # imported here, since workers that never resize start faster without it

    if image.shape[:2] == tuple(size):
        return image
    resized = cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_AREA)
    return resized.reshape(*size, image.shape[2])  # cv2 drops a single channel


def gray(image: np.ndarray) -> np.ndarray:
    """Convert a colour image [H, W, 3] to grayscale [H, W, 1]."""
    return (image @ LUMA + 0.5).astype(np.uint8)[..., None]


class Episode(Wrapper):
    """The outermost wrapper, which the program uses.

    It seeds every episode, adds reward and flags to the observation, checks each observation against its
    space, and stores the open episode's actions, so that it can be restored.

    Args:
        seed_of: maps an episode's number to its seed.
        name: name of the environment in error messages.
    """

    def __init__(self, env: Any, seed_of: Callable[[int], int], name: str):
        super().__init__(env)
        self._seed_of = seed_of
        self._name = name
        own = env.act_space
        self._single = not isinstance(own, Mapping | spaces.Dict)
        self.act_space = {"action": own} if self._single else dict(own)
        self.obs_space = dict(env.obs_space) | EPISODE_SPACES
        if both := sorted(self.act_space.keys() & self.obs_space.keys()):
            raise UserError(
                f"Environment {name} has {both[0]!r} both as action and as observation: rename one."
            )
        self._episode = -1
        self._actions: list[dict[str, np.ndarray]] = []

    def reset(self, episode: int | None = None) -> tuple[Obs, dict]:
        """Start the next episode, or the one with the given number."""
        self._episode = self._episode + 1 if episode is None else episode
        self._actions = []
        obs, info = self.env.reset(seed=self._seed_of(self._episode))
        return self._complete(obs, 0.0, is_first=True, is_last=False, is_terminal=False), info

    def step(self, action: Mapping[str, Any]) -> tuple[Obs, float, bool, bool, dict]:
        """Take one step; `action` is a dict with the keys of `act_space`."""
        # Cast before use, so that the stored action is the one that is taken.
        action = {key: np.array(action[key], action_dtype(space)) for key, space in self.act_space.items()}
        self._actions.append(action)
        own = {key: value.item() if value.ndim == 0 else value for key, value in action.items()}
        obs, reward, terminated, truncated, info = self.env.step(own["action"] if self._single else own)
        is_last, is_terminal = bool(terminated or truncated), bool(terminated)
        obs = self._complete(obs, reward, is_first=False, is_last=is_last, is_terminal=is_terminal)
        return obs, reward, terminated, truncated, info

    def state(self) -> dict[str, Any]:
        """The open episode: its number and its actions as arrays [L, ...]."""
        actions = {}
        for key, space in self.act_space.items():
            steps = np.array([action[key] for action in self._actions], action_dtype(space))
            actions[key] = steps.reshape(len(self._actions), *space.shape)
        return {"episode": self._episode, "actions": actions}

    def restore(self, state: Mapping[str, Any]) -> tuple[Obs, dict]:
        """Replay an episode from its seed and actions; returns its last observation.

        An environment that is not deterministic may end in another state: compare the observation.
        """
        obs, info = self.reset(int(state["episode"]))
        actions = state["actions"]
        for index in range(len(next(iter(actions.values())))):
            obs, _, _, _, info = self.step({key: value[index] for key, value in actions.items()})
        return obs, info

    def _complete(self, obs: Mapping, reward: float, **flags: bool) -> Obs:
        obs = {key: np.asarray(value) for key, value in {**obs, **flags}.items()}
        with np.errstate(over="ignore"):
            obs["reward"] = np.asarray(reward, np.float32)
        if not math.isfinite(obs["reward"]):  # 1e39 is infinite in float32
            raise self._error("reward", "a finite number", reward)
        for key, space in self.obs_space.items():
            if key not in obs:
                raise self._error(key, "the key", "no such key")
            obs[key] = self._check(key, space, obs[key])
        return obs

    def _check(self, key: str, space: spaces.Space, value: np.ndarray) -> np.ndarray:
        if value.shape != space.shape or value.dtype != space.dtype:
            if value.shape != space.shape or not np.can_cast(value.dtype, space.dtype, "same_kind"):
                raise self._error(key, f"{space.dtype} {space.shape}", f"{value.dtype} {value.shape}")
            value = value.astype(space.dtype)
        if value.dtype.kind == "f":
            # math.isfinite is several times faster for scalars.
            finite = math.isfinite(value) if value.ndim == 0 else np.isfinite(value).all()
            if not finite:
                raise self._error(key, "finite values", "NaN or infinity")
        return value

    def _error(self, key: str, expected: str, got: Any) -> UserError:
        step = len(self._actions)
        return UserError(
            f"Environment {self._name} breaks its contract at step {step} of episode {self._episode}: "
            f"{key!r}: expected {expected}, got {got}. The cause is in the environment's code; "
            "python3 -m envs.check TASK checks each step."
        )


def action_dtype(space: spaces.Space) -> np.dtype:
    """The dtype in which actions of a space are sent and stored: int32 for indices."""
    return np.dtype(np.int32) if np.issubdtype(space.dtype, np.integer) else space.dtype
