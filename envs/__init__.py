"""Environments: one contract, a registry of suites, and `make_env`, which the program calls.

An environment is any class with

    obs_space                 dict of gymnasium spaces, one per key
    act_space                 one gymnasium space, or a dict of them
    reset(seed=None)       -> (obs, info)
    step(action)           -> (obs, reward, terminated, truncated, info)
    render()               -> uint8 [H, W, 3]; optional, for videos of envs without images

- `obs` is a dict of arrays with the keys, shapes and dtypes of `obs_space`. Images are uint8 [H, W, C].
- `is_first`, `is_last` and `is_terminal` are filled in from reset, terminated and truncated.
- `terminated` means that the task itself is over; a time limit is `truncated`.
- `log_*` keys are float32 scalars, logged and never learned from: the highest value of each episode as
  `env/*`, and the share of the steps at which it was above 0 as `env/*_share` (`eval/*_share` in
  evaluations). `log_achievement_*` become success rates instead.
- `symbolic` is for captions (lore_llm/captions.py): integers of a fixed shape that describe the situation.
  It is never learned from; our own environments have it only with `llm.enabled`.
- The same seed and actions give the same observations, so that a run can be resumed.
- Actions are Discrete, MultiDiscrete, Box, or a dict of these. A Box may have any range: `make_env` clips
  and scales actions to it.
- An environment that implements `config.action_repeat` itself, to render fewer frames, has the attribute
  `repeats_actions = True`.

`adapter.Adapter` adapts gymnasium environments and older classes to this contract, and checks the first
steps; `python3 -m envs.check TASK` checks more. `make_env` returns an environment inside `wrappers.Episode`:
then `obs_space` also has `reward`, `is_first`, `is_last` and `is_terminal`, and `act_space` is a dict
(`{"action": space}` for a single space).

A new suite is one line in `REGISTRY`: its name, and a function or class that makes the environment of task
`suite_name`. It may have any of the parameters `name`, `task` (the same), `config`, `size`, `seed` and
`render_mode`. Guide: docs/custom_env.md.
"""

import difflib
import functools
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from basics import UserError, derive_seed
from envs import wrappers
from envs.adapter import Adapter, render_fault

REPEATED_STEPS = 10  # steps of an evaluation env that test for determinism

# Suite name -> "module:function", imported on demand, or the function itself.
REGISTRY: dict[str, str | Callable[..., Any]] = {
    "atari": "envs.atari:make",
    "crafter": "envs.crafter:make",
    "custom": "envs.custom_env:CustomEnv",
    "dmc": "envs.dmc:make",
    "dummy": "envs.dummy:make",
    "gym": "envs.gymnasium_env:make",
    "memorymaze": "envs.memorymaze:make",
    "minigrid": "envs.minigrid:make",
    "soundsearch": "envs.sound_search:make",
    "tvroom": "envs.tv_room:make",
}

NOT_FOR_3_13 = ("dm_control", "labmaze", "memory_maze")
MAX_LISTED = 20  # names in an error; of more, only the nearest


def make_env(config: Any, mode: str, index: int, video: bool = False, first: int = 0) -> wrappers.Episode:
    """Make environment number `first + index` of `config.task`, with the wrappers of the options.

    `mode` is "train" or "eval". Each episode has its own seed, derived from `config.seed`, mode, index and
    episode number, so training and evaluation have different episodes. With `video`, an environment without
    images gets its rendered frame as `log_image`, which the agent does not see. For worker processes,
    `functools.partial(make_env, config, mode)` can be pickled.

    Raises UserError for a task that does not exist or a package that is not installed.
    """
    index += first
    seed_of = functools.partial(_seed_of, config, mode, index)
    env = Adapter(make_raw(config, seed_of("construction")), config.task)
    if mode == "eval" and index == 0:  # not in training, whose episodes it would change
        env.check_repeats(seed_of("repeats"), REPEATED_STEPS)
    env = wrappers.NormalizeActions(env)
    repeats = getattr(env, "repeats_actions", False)
    if config.time_limit:
        inner_steps = config.action_repeat if repeats else 1  # env steps in one step of `env`
        env = wrappers.TimeLimit(env, math.ceil(config.time_limit / inner_steps))
    if config.action_repeat > 1 and not repeats:
        env = wrappers.ActionRepeat(env, config.action_repeat)
    sizes = {space.shape[:2] for space in env.obs_space.values() if wrappers.is_image(space)}
    if sizes - {tuple(config.size)}:
        env.note(f"{config.task}: images of {_listed(sizes)} pixels are resized to {_listed([config.size])}.")
        env = wrappers.Resize(env, config.size)
    if config.noisy_tv.enabled:  # after resizing, before stacking
        if not sizes:
            raise UserError(
                f"--noisy_tv.enabled True needs images, which {config.task} does not show. "
                "Tasks of gym and dmc show them with --obs pixels."
            )
        env = wrappers.NoisyTV(env, **{k: v for k, v in config.noisy_tv.items() if k != "enabled"})
    if config.grayscale:
        env = wrappers.GrayScale(env)
    if config.frame_stack > 1:
        env = wrappers.FrameStack(env, config.frame_stack)
    if config.clip_reward:
        env = wrappers.ClipReward(env)
    if config.audio_dim and "audio" not in env.obs_space:
        env = wrappers.AudioInject(env, config.audio_dim, config.audio_noise_std)
    if video and not sizes:
        env = _with_video(env, config.size, seed_of("video"))
    return wrappers.Episode(env, seed_of, f"{index} ({config.task}, {mode})")


def _seed_of(config: Any, *names: str | int) -> int:
    """The seed for a purpose; 32 bits for custom environments, which may use np.random.RandomState."""
    seed = derive_seed(config.seed, *names)
    return seed % 2**32 if config.task.startswith("custom_") else seed


def make_raw(config: Any, seed: int) -> Any:
    """The environment of `config.task`, without adapter and wrappers; `seed` is passed to its constructor.

    Raises UserError for a task that does not exist or a package that is not installed.
    """
    suite, _, name = config.task.partition("_")
    known = {"name": name, "task": name, "config": config, "size": tuple(config.size)}
    known |= {"seed": seed, "render_mode": "rgb_array"}
    if suite == "custom" and ":" in name:
        return call_with_known(load_class(name), config.task, known)
    if suite == "custom" and "." in name:
        raise UserError(f"--task {config.task} names no class: write {config.task}:MyEnv.")
    if suite not in REGISTRY:
        raise unknown_name("environment suite", suite, list(REGISTRY))
    entry = REGISTRY[suite]
    try:
        if isinstance(entry, str):
            module, function = entry.split(":")
            entry = getattr(importlib.import_module(module), function)
        return call_with_known(entry, config.task, known)
    except ModuleNotFoundError as error:
        if suite == "custom":  # the user's own file: our requirements do not list its packages
            raise UserError(
                f"{config.task}: {module} needs the Python package {error.name}, which is not installed."
            ) from error
        older = " (Python 3.11 or 3.12 only)" if error.name in NOT_FOR_3_13 else ""
        raise UserError(
            f"Tasks of {suite} need the Python package {error.name}{older}, which is not installed: "
            f"pip install -r {_requirements(suite)}"
        ) from error


def call_with_known(make: Callable[..., Any], task: str, known: dict[str, Any]) -> Any:
    """Call a class or function with those `known` values that it has parameters for."""
    wanted = inspect.signature(make).parameters
    needed = [p for p in wanted.values() if p.default is p.empty]
    missing = [
        p.name for p in needed if p.name not in known and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if missing:
        raise UserError(
            f"{task}: {make.__name__} needs the unknown parameters {', '.join(missing)}: give them "
            f"defaults. Known are {', '.join(known)}."
        )
    return make(**{key: value for key, value in known.items() if key in wanted})


def _with_video(env: Any, size: tuple[int, int], seed: int) -> Any:
    """Add the rendered frame; a note says why if there is none."""
    try:
        env.reset(seed=seed)
        fault = render_fault(env.render())
        reason = fault and fault.what
    except Exception as error:  # any error of the environment's code: only the video is lost
        reason = f"{type(error).__name__}: {error}"
    if reason:
        env.note(f"No videos of the evaluation: {reason}")
        return env
    return wrappers.RenderVideo(env, size)


def _listed(sizes: Iterable[Iterable[int]]) -> str:
    return ", ".join("x".join(map(str, size)) for size in sizes)


def unknown_task(suite: str, name: str, names: Iterable[str]) -> UserError:
    """The error for a task that `suite` does not have; it names the nearest ones."""
    tasks = [f"{suite}_{other}" for other in names]
    return unknown_name("task", f"{suite}_{name}", tasks)


def load_class(path: str) -> Callable[..., Any]:
    """Import the class or function `package.module:Class`."""
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:  # `python3 somewhere/dreamer.py` only searches its own folder
        sys.path.append(os.getcwd())
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        where = f"a module in {os.getcwd()}" if module.startswith(str(error.name)) else "installed"
        raise UserError(f"Cannot import {module}: {error.name} is not {where}.") from error
    if not callable(getattr(found, name, None)):
        names = [each for each, value in vars(found).items() if inspect.isclass(value)] or [name]
        raise unknown_name(f"class of {module}", name, names)
    return getattr(found, name)


def _requirements(suite: str) -> str:
    extra = f"requirements/{suite}.txt"
    return extra if (Path(__file__).parent.parent / extra).exists() else "requirements.txt"


def unknown_name(what: str, name: str, names: list[str]) -> UserError:
    near = difflib.get_close_matches(name, names, n=len(names), cutoff=0)
    listed = names if len(names) <= MAX_LISTED else [*near[:MAX_LISTED], f"{len(names) - MAX_LISTED} more"]
    return UserError(f"Unknown {what} {name!r}. Did you mean {near[0]}? There are: {', '.join(listed)}.")
