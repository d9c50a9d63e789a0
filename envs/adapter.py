"""Adapts any environment to the contract of envs/__init__.py, and checks its first steps.

`Adapter` takes environments that follow the contract, gymnasium environments, and classes with the old gym
API. It reports `Fault`s, each with its cure: `python3 -m envs.check` lists them all; a run stops at an error
and logs the rest.
"""

import copy
import inspect
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

from basics import UserError
from envs.wrappers import Wrapper, is_image

FILLED = ("is_first", "is_last", "is_terminal", "reward", "discount")  # not taken from observations
FOREIGN = ("pixels", "rgb", "observation")  # keys of other libraries, renamed to image or vector
GUARDED_STEPS = 200  # checked in full; later steps only by wrappers.Episode
SLOW = 2  # seconds after which a run skips the test for determinism
ENDS = 3  # episodes after which terminals are compared with time limits
COLORS = (1, 3, 4)  # channels of a likely image
MIN_SIDE = 16  # pixels of a likely image
BOX_ACTIONS = "a Box with finite bounds, such as spaces.Box(-1, 1, (2,), np.float32)"


class Fault(NamedTuple):
    """A finding about an environment. An `error` stops a run, a `note` is harmless."""

    level: str
    what: str
    cure: str


class Entry(NamedTuple):
    """One observation: its place and space in the environment, and its key and space here."""

    path: tuple  # nested keys and indices; () is the whole observation
    own: spaces.Space
    key: str
    space: spaces.Space


class Adapter(Wrapper):
    """Gives an environment the contract's `obs_space`, `act_space`, `reset(seed)` and `step`.

    - Observations without keys, and those named `pixels`, `rgb` or `observation`, become `image` or `vector`.
      Keys of nested ones are joined by `_`. Discrete ones become one-hot vectors, images [H, W] get a channel
      dimension, float64 becomes float32, and text is left out.
    - `reset` may take no seed and return no info. `step` may return 4 values, with `done`.
    - `render` may take a `mode`.

    `faults` lists the findings; with `strict`, an error raises UserError at once. `notes()` returns lines for
    the log. Messages contain `task`.
    """

    def __init__(self, env: Any, task: str = "", strict: bool = True):
        super().__init__(env)
        self._task = task or type(env).__name__
        self._strict = strict
        self.faults: list[Fault] = []
        self._notes: list[str] = []
        self._watched = 0  # resets and steps
        self._length = 0  # steps of the open episode
        self.ends: list[tuple[int, bool]] = []  # length, and whether terminated, of the first episodes
        for method in ("reset", "step"):
            if not callable(getattr(env, method, None)):
                raise self._error(f"it has no {method}()", "docs/custom_env.md shows what is needed")
        space = self._declared("obs_space", "observation_space")
        self._own_keys = set(space) if isinstance(space, Mapping) else set()
        self._entries = self._route(space)
        self.obs_space = {entry.key: entry.space for entry in self._entries}
        self.act_space = self._declared("act_space", "action_space")
        self._check_actions()
        self._seeded = _takes(env.reset, "seed")
        if not self._seeded:
            self._find(
                "warning",
                "reset() takes no seed, so that runs cannot be repeated, or resumed in mid-episode",
                "write reset(self, seed=None) and draw at random only from np.random.default_rng(seed)",
            )

    # --- Spaces ----------------------------------------------------------------------------------------

    def _declared(self, *names: str) -> Any:
        for name in names:
            space = getattr(self.env, name, None)
            space = space() if inspect.ismethod(space) else space
            if isinstance(space, Mapping | spaces.Space):
                return space
        cure = f"add {names[0]}: gymnasium spaces" + (", one per key" if "obs" in names[0] else "")
        raise self._error(f"it has no {' or '.join(names)}", cure)

    def _route(self, space: Any) -> list[Entry]:
        leaves = [(path, own) for path, own in _leaves(space) if not (path and path[-1] in FILLED)]
        names = {"_".join(map(str, path)) for path, _ in leaves}
        entries = []
        for path, own in leaves:
            name = key = "_".join(map(str, path))
            if name in FOREIGN or not path:
                key = "image" if is_image(own) or _is_gray(own) else "vector"
                if key in names:
                    key = name
                elif path:
                    self.note(f"{self._task}: {name!r} is renamed to {key!r}.")
            self._check_observation(key, own)
            if space := _own_space(key, own):
                entries.append(Entry(path, own, key, space))
            else:
                self._find("warning", f"{key!r} is {own}, which is not numeric", "it is left out")
        if all(entry.key.startswith("log_") for entry in entries):
            self._find("error", "there are no observations", "declare an image or a vector in obs_space")
        return entries

    def _check_observation(self, key: str, space: spaces.Space) -> None:
        shape = space.shape
        if key.startswith("log_"):
            if shape != ():
                self._find("error", f"{key!r} has shape {shape}", "log_* keys are float32 scalars")
            return
        if not isinstance(space, spaces.Box):
            return
        if 0 in shape:
            self._find("error", f"{key!r} has shape {shape}: it is empty", "leave it out of obs_space")
        is_byte = space.dtype == np.uint8
        likely = len(shape) == 3 and sorted(shape)[1] >= MIN_SIDE and {shape[0], shape[2]} & set(COLORS)
        level = "error" if key == "image" or is_byte else "warning"
        if likely and shape[2] not in COLORS:
            cure = "images are [H, W, C]: image.transpose(1, 2, 0), and the space accordingly"
            self._find(level, f"{key!r} looks like an image [C, H, W]: {shape}", cure)
        if (likely or key == "image") and not is_byte:
            cure = "images are uint8 from 0 to 255: np.uint8(255 * image), and the space accordingly"
            self._find(level, f"{key!r} looks like an image of {space.dtype}", cure)

    def _check_actions(self) -> None:
        parts = self.act_space.items() if isinstance(self.act_space, Mapping) else [("", self.act_space)]
        for key, space in parts:
            name = f"action {key!r}" if key else "the action"
            if isinstance(space, spaces.Box):
                if not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
                    what = f"{name} is unbounded, {space}: only values from -1 to 1 will be used"
                    self._find("warning", what, f"make it {BOX_ACTIONS}")
            elif not isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
                cure = f"the actor supports Discrete, MultiDiscrete, or {BOX_ACTIONS}"
                self._find("error", f"{name} is {space}", cure)

    # --- Reset, step, render ---------------------------------------------------------------------------

    def reset(self, seed: int | None = None) -> tuple[dict, dict]:
        if self._seeded:
            result = self.env.reset(seed=seed)
        else:
            if seed is not None and callable(getattr(self.env, "seed", None)):  # as in old gym
                self.env.seed(seed)
            result = self.env.reset()
        obs, info = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
        self._length = 0
        if self._watched < GUARDED_STEPS or not self._strict:
            self._watch(obs)
        return self._convert(obs), info

    def step(self, action: Any) -> tuple[dict, float, bool, bool, dict]:
        result = self.env.step(action)
        if not isinstance(result, tuple) or len(result) not in (4, 5):
            cure = "return obs, reward, terminated, truncated, info"
            raise self._error(f"step() returned {type(result).__name__}, not five values", cure)
        if len(result) == 5:
            obs, reward, terminated, truncated, info = result
        else:
            obs, reward, done, info = result
            terminated, truncated = self._read_done(obs, done, info)
        self._length += 1
        if self._watched < GUARDED_STEPS or not self._strict:
            self._watch(obs)
            self._check_reward(reward)
        if (terminated or truncated) and (len(self.ends) < ENDS or not self._strict):
            self.ends.append((self._length, bool(terminated)))
            if len(self.ends) == ENDS and self._strict:
                self.check_ends()
        return self._convert(obs), float(np.asarray(reward).item()), terminated, truncated, info

    def render(self) -> Any:
        """The environment's frame, which should be uint8 [H, W, 3]."""
        render = getattr(self.env, "render", None)
        if render is None:
            raise UserError(f"{self._task} has no render()")
        return render(mode="rgb_array") if _takes(render, "mode") else render()

    def notes(self) -> list[str]:
        """New lines for the log."""
        notes, self._notes = self._notes, []
        return notes

    def note(self, line: str) -> None:
        self._notes.append(line)

    def _read_done(self, obs: Any, done: bool, info: Mapping) -> tuple[bool, bool]:
        """(terminated, truncated) of a step that returned `done`."""
        self._find(
            "note",
            "step() returns four values: `done` counts as terminated, or as truncated according to "
            "info['TimeLimit.truncated'] or is_terminal",
            "return obs, reward, terminated, truncated, info",
        )
        survived = isinstance(obs, Mapping) and not obs.get("is_terminal", True)
        truncated = bool(done) and bool(info.get("TimeLimit.truncated", survived))
        return bool(done) and not truncated, truncated

    def _convert(self, obs: Any) -> dict:
        values = {}
        for path, own, key, space in self._entries:
            value = _at(obs, path)
            if value is None:
                continue
            if space is own:
                values[key] = value
            elif _is_gray(own):
                values[key] = np.asarray(value)[..., None]
            elif isinstance(own, spaces.Box):
                values[key] = np.asarray(value, space.dtype)
            else:
                values[key] = spaces.flatten(own, value).astype(space.dtype)
        return values

    # --- Checks ----------------------------------------------------------------------------------------

    def check_repeats(self, seed: int, steps: int) -> None:
        """Play the start of an episode twice: the same seed and actions must give the same observations.

        A run skips the second time if the first takes more than SLOW seconds.
        """
        start, ends = time.monotonic(), list(self.ends)
        one = self._play(seed, steps)
        if time.monotonic() - start > SLOW and self._strict:
            return
        other = self._play(seed, steps)
        self.ends = ends  # two equal episodes say nothing about time limits
        for step, (left, right) in enumerate(itertools.zip_longest(one, other, fillvalue={})):
            differing = [key for key in left | right if not _same(left.get(key), right.get(key))]
            if differing:
                self._find(
                    "warning",
                    f"the same seed and actions gave a different {differing[0]} at step {step}, "
                    "so that runs cannot be repeated, or resumed in mid-episode",
                    "draw at random only from a generator made in reset: np.random.default_rng(seed)",
                )
                return

    def _play(self, seed: int, steps: int) -> list[dict[str, np.ndarray]]:
        """Observations of random actions that depend on the seed, at most one episode."""
        sample = action_sampler(self.act_space, seed)
        obs, _ = self.reset(seed=seed)
        history = [_copied(obs)]
        for _ in range(steps):
            obs, reward, terminated, truncated, _ = self.step(sample())
            flags = {"is_terminal": terminated, "is_last": terminated or truncated}
            history.append(_copied({**obs, "reward": reward, **flags}))
            if terminated or truncated:
                break
        return history

    def check_ends(self) -> None:
        """Warn if terminals look like time limits."""
        lengths = {length for length, _ in self.ends}
        if len(self.ends) > 1 and len(lengths) == 1 and lengths != {1} and all(end[1] for end in self.ends):
            self._find(
                "warning",
                f"each of {len(self.ends)} episodes terminated after exactly {lengths.pop()} steps, "
                "which looks like a time limit",
                "a time limit is truncated, not terminated: the states after it still have a value",
            )

    def _watch(self, obs: Any) -> None:
        self._watched += 1
        if isinstance(obs, Mapping):
            for key in sorted(set(obs) - self._own_keys - set(FILLED)):
                cure = "declare it in obs_space, or leave it out (also log_* keys)"
                self._find("error", f"{key!r}: expected no such key, got the key", cure)
        for path, own, key, _ in self._entries:
            value = _at(obs, path)
            if value is None:
                cure = "return every key of obs_space at reset and at each step"
                self._find("error", f"{key!r}: expected the key, got no such key", cure)
            elif isinstance(own, spaces.Box):
                self._check_value(key, own, np.asarray(value))
            elif not own.contains(value):
                self._find(
                    "error", f"{key!r} is outside its space, {own}", f"it was {value!r} of {type(value)}"
                )

    def _check_value(self, key: str, space: spaces.Box, value: np.ndarray) -> None:
        what = f"{key!r}: expected {space.dtype} {space.shape}, got {value.dtype} {value.shape}"
        if value.shape != space.shape:
            cure = f"return that, or declare the shape {value.shape}"
            if value.ndim == 3 and (*value.shape[1:], value.shape[0]) == space.shape:
                cure = "images are [H, W, C]: return image.transpose(1, 2, 0)"
            self._find("error", what, cure)
        elif value.dtype != space.dtype:
            cure = f"return np.asarray(value, np.{space.dtype}), or declare np.{value.dtype}"
            if space.dtype == np.uint8 and value.dtype.kind == "f":
                cure = "images are uint8 from 0 to 255: return np.uint8(255 * image)"
            casts = np.can_cast(value.dtype, space.dtype, "same_kind")
            self._find("note" if casts else "error", what, cure)
            if casts:  # check the cast value too
                with np.errstate(over="ignore"):
                    self._check_value(key, space, value.astype(space.dtype))
        elif value.dtype.kind == "f" and not np.isfinite(value).all():
            cure = "look for a division by zero or a root of a negative number"
            self._find("error", f"{key!r}: expected finite values, got NaN or infinity", cure)
        elif (value < space.low).any() or (value > space.high).any():
            what = f"{key!r} is outside the bounds of its space, {space.low.min()} to {space.high.max()}"
            self._find("warning", what, "clip it, or declare wider bounds")

    def _check_reward(self, reward: Any) -> None:
        try:
            finite = np.isfinite(np.asarray(reward).item())
        except (TypeError, ValueError):
            raise self._error(f"'reward': expected a number, got {reward!r}", "return one number") from None
        if not finite:
            self._find("error", f"'reward': expected a finite number, got {reward}", "look for its cause")

    def _find(self, level: str, what: str, cure: str) -> None:
        if any(fault.what == what for fault in self.faults):
            return
        self.faults.append(Fault(level, what, cure))
        if not self._strict:
            return
        if level == "error":
            raise self._error(what, cure)
        self.note(f"{self._task}: {what}; {cure}.")

    def _error(self, what: str, cure: str) -> UserError:
        when = f" breaks its contract at step {self._length} of an episode:" if self._watched else ":"
        return UserError(f"Environment {self._task}{when} {what}. Cure: {cure}.")


def render_fault(frame: Any) -> Fault | None:
    """The fault of a rendered frame, if any."""
    if isinstance(frame, np.ndarray) and frame.ndim == 3 and frame.shape[2] == 3 and frame.dtype == np.uint8:
        return None
    got = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
    cure = "return an array [H, W, 3] of uint8 (gymnasium: make the env with render_mode='rgb_array')"
    return Fault("warning", f"render() returned {got}: there will be no video of an env without images", cure)


def action_sampler(space: Any, seed: int) -> Callable[[], Any]:
    """A function that draws random actions of a space or of a dict of spaces."""
    space = copy.deepcopy(spaces.Dict(dict(space)) if isinstance(space, Mapping) else space)
    space.seed(seed % 2**32)

    def sample() -> Any:
        action = space.sample()
        return action.item() if isinstance(action, np.generic) else action

    return sample


def _same(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    """Whether two observations are equal; NaN equals NaN, which is a separate fault."""
    if one is None or other is None:
        return one is other
    return np.array_equal(one, other, equal_nan=one.dtype.kind == other.dtype.kind == "f")


def _copied(obs: Mapping) -> dict[str, np.ndarray]:
    """A copy, since an environment may reuse its arrays."""
    return {key: np.array(value) for key, value in obs.items()}


def _own_space(key: str, own: spaces.Space) -> spaces.Space | None:
    """The space of an observation after `_convert`; None if it is not numeric."""
    if key.startswith("log_"):
        return own
    if isinstance(own, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        return spaces.Box(0, 1, (spaces.flatdim(own),), np.float32)
    if not isinstance(own, spaces.Box):
        return None
    if _is_gray(own):
        return spaces.Box(0, 255, (*own.shape, 1), np.uint8)
    return spaces.Box(-np.inf, np.inf, own.shape, np.float32) if own.dtype == np.float64 else own


def _is_gray(space: spaces.Space) -> bool:
    """Whether observations of a space are images without channels, uint8 [H, W]; a board is smaller."""
    shape = space.shape or ()
    return len(shape) == 2 and min(shape) >= MIN_SIDE and space.dtype == np.uint8


def _leaves(space: Any, path: tuple = ()) -> Iterator[tuple[tuple, spaces.Space]]:
    """(path, space) of all spaces in nested dicts and tuples."""
    if isinstance(space, Mapping | spaces.Tuple):
        items = space.items() if isinstance(space, Mapping) else enumerate(space.spaces)
        for key, inner in items:
            yield from _leaves(inner, (*path, key))
    else:
        yield path, space


def _at(obs: Any, path: tuple) -> Any:
    """The value at a path of an observation; None if it is missing."""
    for key in path:
        try:
            obs = obs[key]
        except (KeyError, IndexError, TypeError):
            return None
    return obs


def _takes(function: Any, name: str) -> bool:
    """Whether a function has the parameter, or **kwargs."""
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
