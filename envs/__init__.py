"""Environments: one contract, a registry of suites, and `make_env`, which the program calls.

An environment is any class with

    obs_space                 dict of gymnasium spaces, one a key
    act_space                 one gymnasium space, or a dict of them
    reset(seed=None)       -> (obs, info)
    step(action)           -> (obs, reward, terminated, truncated, info)

- `obs` is a dict of arrays with the keys, shapes and dtypes of `obs_space`. Images are uint8 [H, W, C].
- `is_first`, `is_last` and `is_terminal` are filled in from reset, terminated and truncated.
- `terminated` says that the task itself is over; a time limit is `truncated`, and nothing else.
- `log_*` keys are float32 scalars. They are logged and never learned from.
- The same seed and the same actions give the same observations, so that a run can be resumed.

`make_env` hands out such an environment inside `wrappers.Episode`: then `obs_space` also holds `reward`,
`is_first`, `is_last` and `is_terminal`, and `act_space` is a dict (`{"action": space}` for a single space).

A new suite is one line in `REGISTRY`: its name, and a function `make(name, config)` that returns the
environment for the task `suite_name`.
"""

import difflib
import functools
import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from envs import wrappers
from tools import UserError, derive_seed

# Suite name -> "module:function", imported when it is asked for, or the function itself.
REGISTRY: dict[str, str | Callable[[str, Any], Any]] = {
    "crafter": "envs.crafter:make",
    "dummy": "envs.dummy:make",
    "soundsearch": "envs.sound_search:make",
}


def make_env(config: Any, mode: str, index: int) -> wrappers.Episode:
    """Make environment number `index` of `config.task`.

    `mode` is "train" or "eval". Each episode has a seed of its own, made from `config.seed`, mode, index and
    the episode's number, so training and evaluation never see the same one.
    `functools.partial(make_env, config, mode)` can be pickled, for worker processes.
    Raises UserError for a task that does not exist or a package that is not installed.
    """
    suite, _, name = config.task.partition("_")
    env = _find(suite)(name, config)
    if config.time_limit:
        env = wrappers.TimeLimit(env, config.time_limit)
    if config.action_repeat > 1:
        env = wrappers.ActionRepeat(env, config.action_repeat)
    return wrappers.Episode(env, functools.partial(derive_seed, config.seed, mode, index), config.task)


def unknown_task(suite: str, name: str, names: Iterable[str]) -> UserError:
    """The error for a task that `suite` does not have: it names the nearest one and all others."""
    tasks = [f"{suite}_{other}" for other in names]
    return _unknown("task", f"{suite}_{name}", tasks)


def _find(suite: str) -> Callable[[str, Any], Any]:
    if suite not in REGISTRY:
        raise _unknown("environment suite", suite, list(REGISTRY))
    entry = REGISTRY[suite]
    if not isinstance(entry, str):
        return entry
    module, function = entry.split(":")
    try:
        return getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        raise UserError(
            f"Tasks of {suite} need the Python package {error.name}, which is not installed: "
            f"pip install -r {_requirements(suite)}"
        ) from error


def _requirements(suite: str) -> str:
    extra = f"requirements/{suite}.txt"
    return extra if (Path(__file__).parent.parent / extra).exists() else "requirements.txt"


def _unknown(what: str, name: str, names: list[str]) -> UserError:
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0)[0]
    return UserError(f"Unknown {what} {name!r}. Did you mean {nearest}? There are: {', '.join(names)}.")
