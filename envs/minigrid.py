"""MiniGrid and BabyAI (Chevalier-Boisvert et al. 2023), for example `minigrid_DoorKey-5x5`.

The name is the id without `MiniGrid-` and without the version `-v0`; whole ids are understood too.
"""

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
from envs.gymnasium_env import Gymnasium

MISSION_LENGTH = 50  # words of a mission that are shown, as in minigrid's own wrapper
# MiniGrid's own list of words, and what the missions of BabyAI have beside it.
WORDS = [*DictObservationSpaceWrapper.get_minigrid_words()]
WORDS += ["next", "put", "in", "on", "your", "left", "right", "front", "behind", "after", "is", "drop"]
WORDS = {word: index for index, word in enumerate(dict.fromkeys(WORDS), start=1)}  # 0 is any other word
DOOR = OBJECT_TO_IDX["door"]
PLAIN = (OBJECT_TO_IDX["unseen"], OBJECT_TO_IDX["empty"])  # what has no colour
KINDS = len(OBJECT_TO_IDX)
CELL = KINDS + len(COLOR_TO_IDX) + len(STATE_TO_IDX)  # numbers by which a cell is described


def make(name: str, config: Any) -> Gymnasium:
    """The environment of task `minigrid_{name}`.

    `image` is the part of the grid that the agent sees, drawn. With `minigrid.grid` it is the vector `grid`
    instead (see `encode_grid`), and nothing is drawn. With `minigrid.direction` there is also where it looks,
    one-hot [4], and with `minigrid.mission` what it is told, a one-hot row for each word.
    """
    ids = list_ids()
    short = {re.sub(r"^MiniGrid-|-v\d+$", "", each): each for each in sorted(ids)}  # the latest version wins
    if name not in short and name not in ids:
        raise envs.unknown_task("minigrid", name, short)
    env = gymnasium.make(short.get(name, name), disable_env_checker=True, render_mode="rgb_array")
    if config.minigrid.grid:
        own = env.observation_space
        cells = spaces.MultiBinary((*own["image"].shape[:2], CELL))
        env = TransformObservation(
            env,
            lambda obs: {**obs, "grid": encode_grid(obs["image"])},
            spaces.Dict({**own.spaces, "grid": cells}),
        )
    else:  # drawn a little too large and then shrunk to `size`
        env = RGBImgPartialObsWrapper(env, math.ceil(max(config.size) / env.unwrapped.agent_view_size))
    first = "grid" if config.minigrid.grid else "image"
    env = FilterObservation(env, [first, *(key for key in ("direction", "mission") if config.minigrid[key])])
    if config.minigrid.mission:
        shown = {"mission": spaces.MultiBinary((MISSION_LENGTH, len(WORDS) + 1))}
        env = TransformObservation(
            env,
            lambda obs: {**obs, "mission": encode_mission(obs["mission"])},
            spaces.Dict({**env.observation_space.spaces, **shown}),
        )
    return Gymnasium(env, config.size)


def list_ids() -> list[str]:
    """The ids of MiniGrid and BabyAI, but for those of WFC, whose patterns are not in minigrid's wheel."""
    entries = {key: str(spec.entry_point) for key, spec in gymnasium.registry.items()}
    return [key for key, entry in entries.items() if entry.startswith("minigrid.") and ".wfc" not in entry]


def encode_grid(view: np.ndarray) -> np.ndarray:
    """The part of the grid that the agent sees, one-hot, int8 [X, Y, CELL].

    `view` is MiniGrid's own: kind, colour and state of each cell, [X, Y, 3]. The agent is at the middle of
    the last row (Y) and looks up; in its cell is what it carries. A cell that it does not see, or that is
    empty, has no colour, and only a door has a state.
    """
    kind, colour, state = np.moveaxis(view, -1, 0)
    grid = np.zeros((*kind.shape, CELL), np.int8)
    x, y = np.indices(kind.shape)
    grid[x, y, kind] = 1
    grid[x, y, KINDS + colour] = ~np.isin(kind, PLAIN)
    grid[x, y, KINDS + len(COLOR_TO_IDX) + state] = kind == DOOR
    return grid


def encode_mission(mission: str) -> np.ndarray:
    """A mission as a one-hot row for each word, int8 [MISSION_LENGTH, words + 1]; zeros after its end."""
    rows = np.zeros((MISSION_LENGTH, len(WORDS) + 1), np.int8)
    for row, word in zip(rows, re.findall(r"\w+|,", mission.lower()), strict=False):
        row[WORDS.get(word, 0)] = 1
    return rows
