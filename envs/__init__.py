"""Environments: one contract, a registry of suites, and `make_env`, which the program calls.

An environment is any class with

    obs_space                 dict of gymnasium spaces, one a key
    act_space                 one gymnasium space, or a dict of them
    reset(seed=None)       -> (obs, info)
    step(action)           -> (obs, reward, terminated, truncated, info)
    render()               -> uint8 [H, W, 3]; optional, for videos of an env without images

- `obs` is a dict of arrays with the keys, shapes and dtypes of `obs_space`. Images are uint8 [H, W, C].
- `is_first`, `is_last` and `is_terminal` are filled in from reset, terminated and truncated.
- `terminated` says that the task itself is over; a time limit is `truncated`, and nothing else.
- `log_*` keys are float32 scalars. They are logged and never learned from: of each episode the highest value
  as `env/*`, and the share of the steps at which it was above 0 as `env/*_share` (of evaluations
  `eval/*_share`). `log_achievement_*` become success rates instead.
- `symbolic` is for the captions of an adviser (lore_llm/captions.py): numbers of a fixed shape that describe
  the situation. It is never learned from; our own environments observe it only with `llm.enabled`.
- The same seed and the same actions give the same observations, so that a run can be resumed.
- Actions are Discrete, MultiDiscrete, Box, or a dict of these. The range of a Box is the environment's own:
  `make_env` clips and scales to it.
- An environment that does `config.action_repeat` by itself, so that it draws no frame in vain, has the
  attribute `repeats_actions = True`.

`adapter.Adapter` brings gymnasium environments and older classes to this contract, and watches the first
steps; `python3 -m envs.check TASK` looks closer. `make_env` hands out an environment inside
`wrappers.Episode`: then `obs_space` also holds `reward`, `is_first`, `is_last` and `is_terminal`, and
`act_space` is a dict (`{"action": space}` for a single space).

A new suite is one line in `REGISTRY`: its name, and a function or class that makes the environment of the
task `suite_name`. It is given those of `name`, `task` (the same), `config`, `size`, `seed` and `render_mode`
that it has parameters for. docs/custom_env.md is the guide.
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

REPEATED_STEPS = 10  # of an evaluation env, by which is found out whether it repeats itself

# Suite name -> "module:function", imported when it is asked for, or the function itself.
REGISTRY: dict[str, str | Callable[..., Any]] = {
    "atari": "envs.atari:make",
    "crafter": "envs.crafter:make",
    "custom": "envs.custom_env:CustomEnv",
    "dmc": "envs.dmc:make",
    "dummy": "envs.dummy:make",
    "gym": "envs.gymnasium_env:make",
    "memorymaze": "envs.memorymaze:make",
    "minecraft": "envs.minecraft:make",
    "minigrid": "envs.minigrid:make",
    "soundsearch": "envs.sound_search:make",
    "tvroom": "envs.tv_room:make",
}

NOT_FOR_3_13 = ("dm_control", "labmaze", "memory_maze")
MAX_LISTED = 20  # names in an error; of more, the nearest are listed


def make_env(config: Any, mode: str, index: int, video: bool = False, first: int = 0) -> wrappers.Episode:
    """Make environment number `first + index` of `config.task`, with the wrappers that the options ask for.

    `mode` is "train" or "eval". Each episode has a seed of its own, made from `config.seed`, mode, index and
    the episode's number, so training and evaluation never see the same one. With `video`, an environment
    without images shows what it renders as `log_image`, which the agent does not see.
    `functools.partial(make_env, config, mode)` can be pickled, for worker processes.
    Raises UserError for a task that does not exist or a package that is not installed.
    """
    index += first
    seed_of = functools.partial(_seed_of, config, mode, index)
    env = Adapter(make_raw(config, seed_of("construction")), config.task)
    if mode == "eval" and index == 0:  # not in training: its seeds and steps are its own
        env.judge_repeats(seed_of("repeats"), REPEATED_STEPS)
    env = wrappers.NormalizeActions(env)
    repeats = getattr(env, "repeats_actions", False)
    if config.time_limit:
        inner_steps = config.action_repeat if repeats else 1  # env steps in one step of what env is here
        env = wrappers.TimeLimit(env, math.ceil(config.time_limit / inner_steps))
    if config.action_repeat > 1 and not repeats:
        env = wrappers.ActionRepeat(env, config.action_repeat)
    sizes = {space.shape[:2] for space in env.obs_space.values() if wrappers.is_image(space)}
    if sizes - {tuple(config.size)}:
        env.note(f"{config.task}: images of {_listed(sizes)} pixels are resized to {_listed([config.size])}.")
        env = wrappers.Resize(env, config.size)
    if config.noisy_tv.enabled:  # here, so that pictures are of the final size, and stacked as other frames
        if not sizes:
            raise UserError(
                f"--noisy_tv.enabled True needs images, which {config.task} does not show. "
                "Tasks of gym and dmc do so by --obs pixels."
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
    """The seed for a purpose. Custom environments may hand it to np.random.RandomState: it wants 32 bits."""
    seed = derive_seed(config.seed, *names)
    return seed % 2**32 if config.task.startswith("custom_") else seed


def make_raw(config: Any, seed: int) -> Any:
    """The environment of `config.task` as its class or function makes it; `seed` is for those that want one.

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
        if suite == "custom":  # the user's own file: no list of ours names what it needs
            raise UserError(
                f"{config.task}: {module} needs the Python package {error.name}, which is not installed."
            ) from error
        older = " (Python 3.11 or 3.12 only)" if error.name in NOT_FOR_3_13 else ""
        raise UserError(
            f"Tasks of {suite} need the Python package {error.name}{older}, which is not installed: "
            f"pip install -r {_requirements(suite)}"
        ) from error


def call_with_known(make: Callable[..., Any], task: str, known: dict[str, Any]) -> Any:
    """Call a class or function with those of the `known` values that it has parameters for."""
    wanted = inspect.signature(make).parameters
    needed = [p for p in wanted.values() if p.default is p.empty]
    missing = [
        p.name for p in needed if p.name not in known and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if missing:
        raise UserError(
            f"{task}: {make.__name__} needs {', '.join(missing)}, which nobody gives it: give a "
            f"default. It may ask for {', '.join(known)}."
        )
    return make(**{key: value for key, value in known.items() if key in wanted})


def _with_video(env: Any, size: tuple[int, int], seed: int) -> Any:
    """Adds what the environment renders; where it renders nothing, a note says why."""
    try:
        env.reset(seed=seed)
        fault = render_fault(env.render())
        reason = fault and fault.what
    except Exception as error:  # of any kind: it is the environment's own code, and no video is no harm
        reason = f"{type(error).__name__}: {error}"
    if reason:
        env.note(f"No videos of the evaluation: {reason}")
        return env
    return wrappers.RenderVideo(env, size)


def _listed(sizes: Iterable[Iterable[int]]) -> str:
    return ", ".join("x".join(map(str, size)) for size in sizes)


def unknown_task(suite: str, name: str, names: Iterable[str]) -> UserError:
    """The error for a task that `suite` does not have: it names the nearest one and all others."""
    tasks = [f"{suite}_{other}" for other in names]
    return unknown_name("task", f"{suite}_{name}", tasks)


def load_class(path: str) -> Callable[..., Any]:
    """The class or function that `package.module:Class` names."""
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:  # `python3 somewhere/dreamer.py` looks beside dreamer.py only
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
