"""Six rooms with a television in an alcove near the start, and no reward: a test of curiosity.

tvroom_noise  the television shows a random picture at each step
tvroom_still  a control: it always shows the same picture
"""

import numpy as np
from gymnasium import spaces

import envs

# S is the start, T the alcove with the television, which is visible only from there.
PLAN = """
###################
#.....#.....#.....#
#..S..............#
#.....#.....#.....#
#T#.#####.#####.###
###.#####.#####.###
#.....#.....#.....#
#.................#
#.....#.....#.....#
###################
""".split()
# (row, column) of each index of `position`.
FREE = [(row, column) for row, cells in enumerate(PLAN) for column, cell in enumerate(cells) if cell != "#"]
CELLS = len(FREE)
START, TV = (next(i for i, (row, column) in enumerate(FREE) if PLAN[row][column] == sign) for sign in "ST")
MOVES = [(-1, 0), (1, 0), (0, -1), (0, 1), (0, 0)]  # up, down, left, right, stay
LENGTH = 100  # steps of an episode
SIDE = 4  # pixels of a picture's side
PICTURES = np.random.default_rng(0).choice(np.float32([-1, 1]), (1000, SIDE * SIDE))  # black and white

WALL, FLOOR, ALCOVE, AGENT = ((90, 90, 100), (235, 230, 220), (240, 190, 120), (40, 90, 220))


def make(name: str) -> "TVRoom":
    """The environment of task `tvroom_{name}`."""
    tasks = {"noise": True, "still": False}
    if name not in tasks:
        raise envs.unknown_task("tvroom", name, tasks)
    return TVRoom(noise=tasks[name])


def watched(position: np.ndarray) -> np.ndarray:
    """Whether `position` [..., CELLS] is in front of the television: bool [...]."""
    return position[..., TV] == 1


class TVRoom:
    """Move one cell up, down, left or right, or stay. Episodes are truncated after LENGTH steps.

    `position` is one-hot; `screen` is the picture, -1 or 1 per pixel, and 0 where it is not visible. `log_tv`
    is 1 in front of it.

    Args:
        noise: show a random one of PICTURES at each step, not always the first.
    """

    def __init__(self, noise: bool):
        self._noise = noise
        self._random = np.random.default_rng()
        self.obs_space = {
            "position": spaces.Box(0, 1, (CELLS,), np.float32),
            "screen": spaces.Box(-1, 1, (SIDE * SIDE,), np.float32),
            "log_tv": spaces.Box(0, 1, (), np.float32),
        }
        self.act_space = spaces.Discrete(len(MOVES))

    def reset(self, seed: int | None = None) -> tuple[dict, dict]:
        if seed is not None:
            self._random = np.random.default_rng(seed)
        self._cell, self._step = START, 0
        return self._obs(), {}

    def step(self, action: int) -> tuple[dict, float, bool, bool, dict]:
        self._cell, self._step = NEXT[self._cell][action], self._step + 1
        return self._obs(), 0.0, False, self._step >= LENGTH, {}

    def render(self) -> np.ndarray:
        """The rooms from above, with the picture below the alcove: uint8 [H, W, 3]."""
        tile = 2 * SIDE  # pixels of a cell's side
        image = np.array([[WALL if cell == "#" else FLOOR for cell in cells] for cells in PLAN], np.uint8)
        image[FREE[TV]] = ALCOVE
        image[FREE[self._cell]] = AGENT
        image = image.repeat(tile, 0).repeat(tile, 1)
        row, column = (tile * place for place in FREE[TV])
        picture = np.uint8(255 * (self._screen > 0)).reshape(SIDE, SIDE).repeat(2, 0).repeat(2, 1)
        image[row + tile : row + 2 * tile, column : column + tile] = picture[..., None]
        return image

    def _obs(self) -> dict[str, np.ndarray]:
        position = np.zeros(CELLS, np.float32)
        position[self._cell] = 1
        seen = self._cell == TV
        self._screen = PICTURES[self._random.integers(len(PICTURES)) if self._noise else 0] * seen
        return {"position": position, "screen": self._screen, "log_tv": np.float32(seen)}


def _next(cell: int, move: tuple[int, int]) -> int:
    """The cell after a move; walls block moves."""
    place = (FREE[cell][0] + move[0], FREE[cell][1] + move[1])
    return FREE.index(place) if place in FREE else cell


NEXT = [[_next(cell, move) for move in MOVES] for cell in range(CELLS)]
