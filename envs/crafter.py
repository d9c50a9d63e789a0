"""Crafter (Hafner 2021, arXiv 2109.06780): `crafter_reward` and `crafter_noreward`."""

import collections
from typing import Any

import crafter
import numpy as np
from gymnasium import spaces

import envs
from basics import UserError
from envs.crafter_worldgen import generate_world
from envs.symbolic import Layout

TASKS = {"reward": True, "noreward": False}
DEFAULT_LENGTH = 10000  # env steps of an episode, Crafter's own choice
MIN_SIZE = 18  # pixels; 9 x 9 cells are drawn, and items need 2 pixels per cell
OUTSIDE = 127  # gray level beyond the world's edge

# The observation `symbolic`. `view` [X, Y] is the map around the player as indices into KINDS, from the upper
# left, with the player in the middle. `daylight` is in percent; `achievements` are counts in this episode.
VIEW = (9, 7)  # visible cells: 9 x 9 without the two rows of the inventory
CREATURES = ("player", "cow", "zombie", "skeleton", "arrow", "plant", "ripe_plant", "fence")
# Materials have the numbers of Crafter's maps.
KINDS = ("outside", *crafter.constants.materials, *CREATURES)
SYMBOLIC = Layout(
    view=VIEW,
    facing=(2,),
    asleep=(),
    daylight=(),
    inventory=(len(crafter.constants.items),),
    achievements=(len(crafter.constants.achievements),),
)


def make(name: str, config: Any) -> "Crafter":
    """The environment of task `crafter_{name}`."""
    if name not in TASKS:
        raise envs.unknown_task("crafter", name, TASKS)
    if min(config.size) < MIN_SIZE:
        raise UserError(
            f"Crafter draws images of at least {MIN_SIZE} x {MIN_SIZE} pixels; size is {config.size}."
        )
    length = config.time_limit or DEFAULT_LENGTH
    return Crafter(TASKS[name], config.size, length, config.llm.enabled, config.crafter.area)


class Crafter:
    """Crafter, reproducible for a given seed.

    `log_achievement_{name}` is 1 once the achievement is unlocked in this episode. Death is terminal; the end
    after `length` steps is a truncation.

    Args:
        reward: whether there is Crafter's reward; otherwise it is always 0.
        size: height and width of the image.
        length: env steps of an episode.
        symbolic: whether to observe `symbolic`, the image's content in the layout SYMBOLIC.
        area: width and height of the world in cells.
    """

    def __init__(
        self,
        reward: bool = True,
        size: tuple[int, int] = (64, 64),
        length: int = DEFAULT_LENGTH,
        symbolic: bool = False,
        area: tuple[int, int] = (64, 64),
    ):
        height, width = size
        # Each reset sets the seed; without one here, Crafter would use NumPy's global generator.
        self._env = _Env(tuple(area), size=(width, height), reward=reward, length=length, seed=0)
        self._achievements = {name: f"log_achievement_{name}" for name in crafter.constants.achievements}
        self.obs_space: dict[str, spaces.Space] = {"image": spaces.Box(0, 255, (height, width, 3), np.uint8)}
        self.obs_space |= {key: spaces.Box(0, 1, (), np.float32) for key in self._achievements.values()}
        self._symbolic = symbolic
        if symbolic:
            self.obs_space["symbolic"] = SYMBOLIC.space
        self.act_space = spaces.Discrete(len(self._env.action_names))

    def reset(self, seed: int | None = None) -> tuple[dict, dict]:
        """Start in the world of the first episode of `crafter.Env(seed=seed)`."""
        if seed is not None:
            self._env._seed, self._env._episode = seed, 0
        return self._obs(self._env.reset()), {}

    def step(self, action: int) -> tuple[dict, float, bool, bool, dict]:
        image, reward, done, info = self._env.step(int(action))
        terminated = info["discount"] == 0
        return self._obs(image), float(reward), terminated, done and not terminated, info

    def _obs(self, image: np.ndarray) -> dict[str, np.ndarray]:
        counts = self._env._player.achievements
        unlocked = {key: np.float32(counts[name] > 0) for name, key in self._achievements.items()}
        obs = {"image": image} | unlocked
        return obs | {"symbolic": self._env.symbolic()} if self._symbolic else obs


class _Env(crafter.Env):
    """The same game as `crafter.Env`, faster."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._world.__class__ = _World
        self._local_view = _LocalView(self._world, self._textures, self._local_view._grid)
        self._item_view = _ItemView(self._textures, self._item_view._grid)

    def reset(self) -> np.ndarray:
        """`crafter.Env.reset`, line by line, with another world generator."""
        center = (self._world.area[0] // 2, self._world.area[1] // 2)
        self._episode += 1
        self._step = 0
        self._world.reset(seed=hash((self._seed, self._episode)) % (2**31 - 1))
        self._update_time()
        self._player = crafter.objects.Player(self._world, center)
        self._last_health = self._player.health
        self._world.add(self._player)
        self._unlocked = set()
        generate_world(self._world, self._player)
        return self._obs()

    def symbolic(self) -> np.ndarray:
        """The image's content in the layout SYMBOLIC."""
        player = self._player
        return SYMBOLIC.pack(
            view=self._local_view.kinds(player),
            facing=player.facing,
            asleep=player.sleeping,
            daylight=round(100 * float(self._world.daylight)),
            inventory=list(player.inventory.values()),
            achievements=list(player.achievements.values()),
        )


class _World(crafter.engine.World):
    """Crafter's world with ordered objects.

    Crafter keeps the objects of a chunk in a set, whose order depends on memory addresses. The order decides
    which creature despawns, so the same seed and actions would give different games.
    """

    def reset(self, seed: int | None = None) -> None:
        super().reset(seed)
        self._chunks = collections.defaultdict(_OrderedSet)


class _OrderedSet(dict):
    """A set with the methods that Crafter uses, iterated in the order of insertion."""

    def add(self, item: Any) -> None:
        self[item] = None

    def remove(self, item: Any) -> None:
        del self[item]


class _LocalView(crafter.engine.LocalView):
    """The player's view. The original draws cell by cell; here one lookup draws the whole terrain."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._tiles: dict[tuple[int, int], np.ndarray] = {}  # by size, as `_draw_tiles` gives them

    def __call__(self, player: Any, unit: np.ndarray) -> np.ndarray:
        """Image of the cells around the player, each of `unit` pixels."""
        corner = player.pos - self._offset
        fields = self._around(self._world._mat_map, corner)  # [X, Y]
        size = tuple(unit.tolist())
        if size not in self._tiles:
            self._tiles[size] = self._draw_tiles(*size)
        # [X, Y, width, height, 3] -> [X * width, Y * height, 3]
        canvas = self._tiles[size][fields].swapaxes(1, 2).reshape(*self._grid * unit, 3)
        objects = self._around(self._world._obj_map, corner)  # at most one per cell, so in any order
        for place in np.argwhere(objects):
            texture = self._world._objects[objects[tuple(place)]].texture
            crafter.engine._draw_alpha(canvas, place * unit, self._textures.get(texture, unit))
        canvas = self._light(canvas, self._world.daylight)
        return self._sleep(canvas) if player.sleeping else canvas

    def kinds(self, player: Any) -> np.ndarray:
        """Content of each cell around the player, as indices into KINDS [X, Y]."""
        corner = player.pos - self._offset
        kinds = self._around(self._world._mat_map, corner).astype(np.int16)
        objects = self._around(self._world._obj_map, corner)
        for place in zip(*objects.nonzero(), strict=True):
            creature = self._world._objects[objects[place]]
            ripe = "ripe_" if getattr(creature, "ripe", False) else ""
            kinds[place] = KINDS.index(ripe + type(creature).__name__.lower())
        return kinds

    def _around(self, values: np.ndarray, corner: np.ndarray) -> np.ndarray:
        """The part of a map that starts at `corner`; 0 beyond the map's edges."""
        result = np.zeros(self._grid, values.dtype)
        low, high = np.maximum(corner, 0), np.minimum(corner + self._grid, self._area)
        (x0, y0), (x1, y1) = low - corner, high - corner
        result[x0:x1, y0:y1] = values[low[0] : high[0], low[1] : high[1]]
        return result

    def _draw_tiles(self, width: int, height: int) -> np.ndarray:
        """Texture of each material by number [materials, width, height, 3]; 0, the outside, is gray."""
        names = list(self._world._mat_names.values())[1:]
        textures = [self._textures.get(name, (width, height))[..., :3] for name in names]
        return np.stack([np.full((width, height, 3), OUTSIDE, np.uint8), *textures])


class _ItemView(crafter.engine.ItemView):
    """The inventory, only drawn again when it has changed."""

    _drawn: tuple | None = None

    def __call__(self, inventory: dict[str, int], unit: np.ndarray) -> np.ndarray:
        """Image of the items and their amounts; read only."""
        wanted = (*unit, *inventory.items())
        if wanted != self._drawn:
            self._image = super().__call__(inventory, unit)
            self._drawn = wanted
        return self._image
