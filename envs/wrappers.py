"""Wrappers around one environment. All but RenderVideo and Episode take gymnasium environments too.

What they draw at random comes from the seed of `reset`, so that an episode can be played again.
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

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # shares of red, green, blue in gray: ITU-R BT.601

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

    def __init__(self, env: Any, duration: int = 1000):
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

    def __init__(self, env: Any, repeat: int = 2):
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


class NormalizeActions(Wrapper):
    """Makes the range of every continuous action [-1, 1], in a Dict too.

    An action is clipped to it, then moved to the range that the environment has. Where that lacks a bound, it
    is taken 2 away from the other one; without any it is [-1, 1]. For actions of whole numbers it is rounded.
    """

    def __init__(self, env: Any):
        super().__init__(env)
        name = "act_space" if hasattr(env, "act_space") else "action_space"  # ours, or gymnasium's
        self._inner = getattr(env, name)
        setattr(self, name, _normalized(self._inner))

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        return self.env.step(_denormalize(action, self._inner))


def _normalized(space: Any) -> Any:
    if isinstance(space, Mapping):
        return type(space)({key: _normalized(value) for key, value in space.items()})
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
    # In this form a range of [-1, 1] changes no bit.
    value = (low / 2 + high / 2) + np.clip(action, -1, 1) * (high / 2 - low / 2)
    value = np.clip(value, low, high)
    return (np.rint(value) if space.dtype.kind in "iu" else value).astype(space.dtype)


class ClipReward(Wrapper):
    """Clips rewards to the range from `min_reward` to `max_reward`."""

    def __init__(self, env: Any, min_reward: float = -1, max_reward: float = 1):
        super().__init__(env)
        self._min, self._max = min_reward, max_reward

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, min(max(float(reward), self._min), self._max), terminated, truncated, info


class OneHot(spaces.Box):
    """One-hot vectors [n]. `discrete` tells whoever acts that it is a choice among n."""

    discrete = True

    def __init__(self, n: int):
        super().__init__(0, 1, (n,), np.float32)

    def sample(self, mask: Any = None, probability: Any = None) -> np.ndarray:
        return np.eye(*self.shape, dtype=np.float32)[self.np_random.integers(*self.shape)]


class OneHotAction(Wrapper):
    """Takes one-hot vectors [n] for an environment with n discrete actions. Others raise ValueError."""

    def __init__(self, env: Any):
        super().__init__(env)
        name, space = _action_space(env)
        if not isinstance(space, spaces.Discrete):
            raise UserError(f"OneHotAction needs one Discrete action; the environment has {space}.")
        self._start = int(space.start)
        setattr(self, name, OneHot(int(space.n)))

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        action = np.asarray(action)
        index = int(action.argmax())
        if action.sum() != 1 or action[index] != 1:
            raise ValueError(f"Not a one-hot action: {action}")
        return self.env.step(index + self._start)


class ObservationWrapper(Wrapper):
    """Base of wrappers that change some entries of an observation, or the only one of a gymnasium env.

    A subclass says which by `_chosen`, what space they have then by `_new_space`, and makes them by `_new`.
    The key is None for an observation without keys.
    """

    needs = "images (uint8 [H, W, C])"

    def __init__(self, env: Any):
        super().__init__(env)
        name, space = _observation_space(env)
        entries = dict(space) if isinstance(space, Mapping) else {None: space}
        self._keys = [key for key, entry in entries.items() if self._chosen(key, entry)]
        if not self._keys:
            raise UserError(f"{type(self).__name__} needs {self.needs}; the environment has {space}.")
        entries |= {key: self._new_space(entries[key]) for key in self._keys}
        if isinstance(space, spaces.Dict):
            entries = spaces.Dict(entries)
        setattr(self, name, entries if isinstance(space, Mapping) else entries[None])

    def reset(self, **kwargs) -> tuple[Any, dict]:
        obs, info = self.env.reset(**kwargs)
        return self._change(obs), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        obs, *rest = self.env.step(action)
        return self._change(obs), *rest

    def _change(self, obs: Any) -> Any:
        if not isinstance(obs, Mapping):
            return self._new(None, obs)
        return {**obs, **{key: self._new(key, obs[key]) for key in self._keys}}

    def _chosen(self, key: str | None, space: spaces.Space) -> bool:
        return is_image(space)

    def _new_space(self, space: spaces.Box) -> spaces.Box:
        raise NotImplementedError

    def _new(self, key: str | None, value: np.ndarray) -> np.ndarray:
        raise NotImplementedError


class Resize(ObservationWrapper):
    """Gives all images one size, (height, width); shrunken ones are averaged over areas."""

    def __init__(self, env: Any, size: tuple[int, int] = (64, 64)):
        self._size = tuple(size)
        super().__init__(env)

    def _new_space(self, space: spaces.Box) -> spaces.Box:
        return spaces.Box(0, 255, (*self._size, space.shape[2]), np.uint8)

    def _new(self, key: str | None, value: np.ndarray) -> np.ndarray:
        return resize(value, self._size)


class GrayScale(ObservationWrapper):
    """Turns colour images [H, W, 3] to shades of gray [H, W, 1]; those of one channel stay as they are."""

    CHANNELS = (1, 3)
    needs = "images of one or three channels (uint8 [H, W, C])"

    def _chosen(self, key: str | None, space: spaces.Space) -> bool:
        return is_image(space) and space.shape[2] in self.CHANNELS

    def _new_space(self, space: spaces.Box) -> spaces.Box:
        return spaces.Box(0, 255, (*space.shape[:2], 1), np.uint8)

    def _new(self, key: str | None, value: np.ndarray) -> np.ndarray:
        return value if value.shape[2] == 1 else gray(value)


class FrameStack(ObservationWrapper):
    """Shows the last `amount` images, the oldest first, stacked along their channels.

    At the start of an episode the first image stands for those that are not there yet.
    """

    def __init__(self, env: Any, amount: int = 4):
        self._amount = amount
        self._frames: dict[str | None, deque[np.ndarray]] = {}
        super().__init__(env)

    def reset(self, **kwargs) -> tuple[Any, dict]:
        self._frames = {}
        return super().reset(**kwargs)

    def _new_space(self, space: spaces.Box) -> spaces.Box:
        height, width, channels = space.shape
        return spaces.Box(0, 255, (height, width, channels * self._amount), np.uint8)

    def _new(self, key: str | None, value: np.ndarray) -> np.ndarray:
        value = value.copy()  # the environment may draw the next image into the same array
        frames = self._frames.setdefault(key, deque([value] * self._amount, self._amount))
        frames.append(value)
        return np.concatenate(frames, -1)


class NormalizeObservation(ObservationWrapper):
    """Gives float vectors mean 0 and standard deviation 1, as they were over `steps` random steps.

    These are played once, with a fixed seed, when the wrapper is made. Statistics that went on would show the
    same situation differently in training, in evaluation and after a resume.
    """

    needs = "float vectors"

    def __init__(self, env: Any, steps: int = 1000):
        super().__init__(env)
        action_space = _action_space(env)[1]
        action_space = spaces.Dict(action_space) if isinstance(action_space, Mapping) else action_space
        action_space.seed(0)
        obs, seen = env.reset(seed=0)[0], []
        for _ in range(steps):
            seen.append([np.asarray(obs[key] if isinstance(obs, Mapping) else obs) for key in self._keys])
            obs, _, terminated, truncated, _ = env.step(action_space.sample())
            if terminated or truncated:
                obs = env.reset()[0]
        self._stats = {}
        for key, values in zip(self._keys, zip(*seen, strict=True), strict=True):
            std = np.std(values, 0)
            self._stats[key] = np.mean(values, 0), np.where(std > 0, std, 1)

    def _chosen(self, key: str | None, space: spaces.Space) -> bool:
        return isinstance(space, spaces.Box) and space.dtype.kind == "f" and not str(key).startswith("log_")

    def _new_space(self, space: spaces.Box) -> spaces.Box:
        return spaces.Box(-np.inf, np.inf, space.shape, np.float32)

    def _new(self, key: str | None, value: np.ndarray) -> np.ndarray:
        mean, std = self._stats[key]
        return np.asarray((value - mean) / std, np.float32)


class NoisyTV(Wrapper):
    """A television that shows a random picture in the place of the images, to tempt the curious.

    With discrete actions there are `actions` more; each switches it on for one step. With continuous ones,
    from -1 to 1, it is on in the steps whose action has a component larger than `threshold` in size (the
    maximum norm), so that an agent can keep away from it and still solve the task. Either way the environment
    then does nothing: action number `noop`, or zeros, which is the middle of the range. The observation
    `log_tv` is 1 where it is on. A gymnasium env's observation without keys becomes the key `observation`.

    Args:
        noise: False is the control: the same actions do nothing, and no picture is shown.
        data: where CIFAR-10 is, the pictures to show; None generates some (`tv_pictures.pictures`). They are
            tiled over the frame, or cut off where it is smaller, in gray where it is gray.
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
        name, space = _observation_space(env)
        entries = dict(_keyed(space))
        self._images = [key for key, entry in entries.items() if is_image(entry)]
        if not self._images or any(entries[key].shape[2] not in GrayScale.CHANNELS for key in self._images):
            raise UserError(f"NoisyTV needs {GrayScale.needs}; the environment has {', '.join(entries)}.")
        entries[self.KEY] = spaces.Box(0, 1, (), np.float32)
        setattr(self, name, entries if name == "obs_space" else spaces.Dict(entries))

        name, space = _action_space(env)
        self._first_switch = None
        if isinstance(space, spaces.Discrete):
            if noop >= space.n:
                raise UserError(f"NoisyTV: there is no action {noop} to do nothing by; there are {space.n}.")
            self._noop = int(space.start) + noop
            self._first_switch = int(space.start + space.n)
            setattr(self, name, spaces.Discrete(int(space.n) + actions, start=int(space.start)))
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
        return self._watch(obs, on=False), info

    def step(self, action: Any) -> tuple[Obs, float, bool, bool, dict]:
        if self._first_switch is None:
            on = bool(np.abs(action).max() > self._threshold)
        else:
            on = bool(action >= self._first_switch)
        obs, *rest = self.env.step(self._noop if on else action)
        return self._watch(obs, on), *rest

    def _watch(self, obs: Any, on: bool) -> Obs:
        obs = {**_keyed(obs), self.KEY: np.asarray(on, np.float32)}
        if on and self._pictures is not None:
            picture = self._pictures[self._random.integers(len(self._pictures))]
            obs |= {key: _tiled(picture, obs[key].shape) for key in self._images}
        return obs


def _tiled(picture: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """A picture [h, w, 3] repeated over a frame of `shape` [H, W, 1 or 3], from its upper left corner on."""
    height, width, channels = shape
    if channels == 1:
        picture = gray(picture)
    times = (-(-height // picture.shape[0]), -(-width // picture.shape[1]), 1)
    return np.tile(picture, times)[:height, :width]


class AudioInject(Wrapper):
    """Adds an observation `audio` [audio_dim]: zeros plus Gaussian noise of `noise_std`.

    So whatever hears can be tried before there is anything to hear. An observation of a gymnasium env that
    has no keys becomes the key `observation`.
    """

    def __init__(self, env: Any, audio_dim: int = 16, noise_std: float = 0.0):
        super().__init__(env)
        self._dim, self._std = audio_dim, noise_std
        self._random = np.random.default_rng()
        name, space = _observation_space(env)
        entries = dict(_keyed(space))
        if "audio" in entries:
            raise UserError(f"AudioInject: the environment has audio of its own, {entries['audio']}.")
        entries["audio"] = spaces.Box(-np.inf, np.inf, (audio_dim,), np.float32)
        setattr(self, name, entries if name == "obs_space" else spaces.Dict(entries))

    def reset(self, *, seed: int | None = None, **kwargs) -> tuple[Any, dict]:
        if seed is not None:
            self._random = numpy_rng(seed, "audio_inject")
        obs, info = self.env.reset(seed=seed, **kwargs)
        return self._with_audio(obs), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        obs, *rest = self.env.step(action)
        return self._with_audio(obs), *rest

    def _with_audio(self, obs: Any) -> dict:
        noise = self._std * self._random.standard_normal(self._dim, np.float32)
        return {**_keyed(obs), "audio": np.asarray(noise, np.float32)}


class RenderVideo(Wrapper):
    """Adds what `render` shows as `log_image` of `size`, for videos of an environment without images."""

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
    """An image [H, W, C] in another size (height, width); shrunken ones are averaged over areas."""
    import cv2  # here, because workers whose images have their size already start faster without it

    if image.shape[:2] == tuple(size):
        return image
    resized = cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_AREA)
    return resized.reshape(*size, image.shape[2])  # a single channel gets lost in between


def gray(image: np.ndarray) -> np.ndarray:
    """The shades of gray [H, W, 1] of a colour image [H, W, 3]."""
    return (image @ LUMA + 0.5).astype(np.uint8)[..., None]


def _keyed(obs: Any) -> Mapping:
    """An observation, or a space, by key, also where a gymnasium environment has none."""
    return obs if isinstance(obs, Mapping) else {"observation": obs}


def _observation_space(env: Any) -> tuple[str, Any]:
    """The name under which an environment, ours or gymnasium's, has its observation space, and the space."""
    name = "obs_space" if hasattr(env, "obs_space") else "observation_space"
    return name, getattr(env, name)


def _action_space(env: Any) -> tuple[str, Any]:
    """As `_observation_space`, for actions."""
    name = "act_space" if hasattr(env, "act_space") else "action_space"
    return name, getattr(env, name)


class Episode(Wrapper):
    """The outermost wrapper: what the program sees of an environment.

    It gives every episode its own seed, adds reward and flags to the observation, checks each observation
    against the declared space, and remembers the open episode's actions, so that it can be restored.

    `seed_of(episode)` gives the seed of an episode by its number; error messages call the environment `name`.
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
            raise UserError(f"Environment {name} has {both[0]!r} as action and as observation: rename one.")
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
        obs = {key: np.asarray(value) for key, value in {**obs, **flags}.items()}
        with np.errstate(over="ignore"):
            obs["reward"] = np.asarray(reward, np.float32)
        if not math.isfinite(obs["reward"]):  # 1e39 is infinite in 32 bits, too
            raise self._error("reward", "a finite number", reward)
        if obs.keys() != self.obs_space.keys():
            key = min(obs.keys() ^ self.obs_space.keys())
            places = ("the key", "no such key") if key in self.obs_space else ("no such key", "the key")
            raise self._error(key, *places)
        for key, space in self.obs_space.items():
            obs[key] = self._check(key, space, obs[key])
        return obs

    def _check(self, key: str, space: spaces.Space, value: np.ndarray) -> np.ndarray:
        if value.shape != space.shape or value.dtype != space.dtype:
            if value.shape != space.shape or not np.can_cast(value.dtype, space.dtype, "same_kind"):
                raise self._error(key, f"{space.dtype} {space.shape}", f"{value.dtype} {value.shape}")
            value = value.astype(space.dtype)
        if value.dtype.kind == "f":
            # math is several times faster on scalars, and most float keys are.
            finite = math.isfinite(value) if value.ndim == 0 else np.isfinite(value).all()
            if not finite:
                raise self._error(key, "finite values", "NaN or infinity")
        return value

    def _error(self, key: str, expected: str, got: Any) -> UserError:
        step = len(self._actions)
        return UserError(
            f"Environment {self._name} breaks its contract at step {step} of episode {self._episode}: "
            f"{key!r}: expected {expected}, got {got}. Look for the cause in its own code; "
            "python3 -m envs.check TASK watches each step."
        )


def action_dtype(space: spaces.Space) -> np.dtype:
    """The dtype in which actions of a space are passed on and stored: int32 for indices."""
    return np.dtype(np.int32) if np.issubdtype(space.dtype, np.integer) else space.dtype
