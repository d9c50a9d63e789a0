"""MiniGrid and BabyAI (Chevalier-Boisvert et al. 2023), such as `minigrid_DoorKey-5x5`.

The name is the id without `MiniGrid-` and the version `-v0`, or the full id.
"""

import functools
import math
import re
from typing import Any

import gymnasium
import minigrid  # noqa: F401 (registers the ids)
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import FilterObservation, TransformObservation
from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX, STATE_TO_IDX
from minigrid.wrappers import DictObservationSpaceWrapper, RGBImgPartialObsWrapper

import envs
from envs import symbolic

MISSION_LENGTH = 50  # most words of a mission, as in minigrid's wrapper
# MiniGrid's list of words, and those that BabyAI's missions have in addition.
WORDS = [*DictObservationSpaceWrapper.get_minigrid_words()]
WORDS += ["next", "put", "in", "on", "your", "left", "right", "front", "behind", "after", "is", "drop"]
WORDS = {word: index for index, word in enumerate(dict.fromkeys(WORDS), start=1)}  # 0 is an unknown word
DOOR = OBJECT_TO_IDX["door"]
PLAIN = (OBJECT_TO_IDX["unseen"], OBJECT_TO_IDX["empty"])  # kinds without colour
KINDS = len(OBJECT_TO_IDX)
CELL = KINDS + len(COLOR_TO_IDX) + len(STATE_TO_IDX)  # numbers per cell


def make(name: str, config: Any) -> gymnasium.Env:
    """The environment of task `minigrid_{name}`.

    `image` is the rendered part of the grid that the agent sees. With `minigrid.grid` it is replaced by the
    vector `grid` (see `encode_grid`), and nothing is rendered. `minigrid.direction` adds the agent's
    direction, one-hot [4], and `minigrid.mission` the mission, one one-hot row per word.
    """
    ids = list_ids()
    # Of several versions, the last one is kept.
    short = {re.sub(r"^MiniGrid-|-v\d+$", "", each): each for each in sorted(ids)}
    if name not in short and name not in ids:
        raise envs.unknown_task("minigrid", name, short)
    env = gymnasium.make(short.get(name, name), disable_env_checker=True, render_mode="rgb_array")
    if config.llm.enabled:
        env = _with_symbolic(env)
    if config.minigrid.grid:
        own = env.observation_space
        cells = spaces.MultiBinary((*own["image"].shape[:2], CELL))
        env = TransformObservation(
            env,
            lambda obs: {**obs, "grid": encode_grid(obs["image"])},
            spaces.Dict({**own.spaces, "grid": cells}),
        )
    else:  # rendered slightly larger; `make_env` resizes it
        env = RGBImgPartialObsWrapper(env, math.ceil(max(config.size) / env.unwrapped.agent_view_size))
    first = "grid" if config.minigrid.grid else "image"
    keys = [first, *(key for key in ("direction", "mission") if config.minigrid[key])]
    keys += [symbolic.KEY] if config.llm.enabled else []
    env = FilterObservation(env, keys)
    if config.minigrid.mission:
        shown = {"mission": spaces.MultiBinary((MISSION_LENGTH, len(WORDS) + 1))}
        env = TransformObservation(
            env,
            lambda obs: {**obs, "mission": encode_mission(obs["mission"])},
            spaces.Dict({**env.observation_space.spaces, **shown}),
        )
    return env


def layout(view_size: int) -> symbolic.Layout:
    """Layout of the observation `symbolic`, with minigrid's numbers.

    `view` [X, Y, 3] is the visible grid: kind of object, colour, state. The agent is in the middle of the
    last row, where the view shows the object that it carries. `on` is the kind of object under it.
    `direction` is 0 right, 1 down, 2 left, 3 up. `mission` has each word's number in WORDS, len(WORDS) + 1
    for unknown words, and 0 after the end.
    """
    return symbolic.Layout(view=(view_size, view_size, 3), direction=(), on=(), mission=(MISSION_LENGTH,))


def _with_symbolic(env: gymnasium.Env) -> gymnasium.Env:
    """Add the observation `symbolic` to an environment that still has its compact grid."""
    inner = env.unwrapped
    parts = layout(inner.agent_view_size)

    @functools.lru_cache(maxsize=1)  # it is constant within an episode
    def numbers(mission: str) -> list[int]:
        words = [WORDS.get(word, len(WORDS) + 1) for word in _words(mission)][:MISSION_LENGTH]
        return words + [0] * (MISSION_LENGTH - len(words))

    def observe(obs: dict) -> dict:
        below = inner.grid.get(*inner.agent_pos)
        vector = parts.pack(
            view=obs["image"],
            direction=obs["direction"],
            on=OBJECT_TO_IDX[below.type if below else "empty"],
            mission=numbers(obs["mission"]),
        )
        return {**obs, symbolic.KEY: vector}

    return TransformObservation(
        env, observe, spaces.Dict({**env.observation_space.spaces, symbolic.KEY: parts.space})
    )


def list_ids() -> list[str]:
    """The ids of MiniGrid and BabyAI, without WFC, whose patterns are not in minigrid's wheel."""
    entries = {key: str(spec.entry_point) for key, spec in gymnasium.registry.items()}
    return [key for key, entry in entries.items() if entry.startswith("minigrid.") and ".wfc" not in entry]


def encode_grid(view: np.ndarray) -> np.ndarray:
    """The visible part of the grid, one-hot, int8 [X, Y, CELL].

    `view` is MiniGrid's: kind, colour and state of each cell, [X, Y, 3]. The agent is in the middle of the
    last row (Y) and looks up; its cell shows the object that it carries. Unseen and empty cells have no
    colour, and only doors have a state.
    """
    kind, colour, state = np.moveaxis(view, -1, 0)
    grid = np.zeros((*kind.shape, CELL), np.int8)
    x, y = np.indices(kind.shape)
    grid[x, y, kind] = 1
    grid[x, y, KINDS + colour] = ~np.isin(kind, PLAIN)
    grid[x, y, KINDS + len(COLOR_TO_IDX) + state] = kind == DOOR
    return grid


def encode_mission(mission: str) -> np.ndarray:
    """A mission with one one-hot row per word, int8 [MISSION_LENGTH, words + 1]; zeros after its end."""
    rows = np.zeros((MISSION_LENGTH, len(WORDS) + 1), np.int8)
    for row, word in zip(rows, _words(mission), strict=False):
        row[WORDS.get(word, 0)] = 1
    return rows


def _words(mission: str) -> list[str]:
    return re.findall(r"\w+|,", mission.lower())
