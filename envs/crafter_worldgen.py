"""Crafter's world generator: the same worlds in about a fiftieth of the time.

`crafter.worldgen` computes the noise of one cell after another in plain Python, which takes 0.8 s per world.
Here the noise of all cells is computed at once (`OpenSimplexGrid`), with the same float64 operations in the
same order. The decisions, whose random draws depend on each other, remain a loop over cells.
"""

import array
import functools
import types
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from crafter import constants, objects
from crafter.engine import World
from opensimplex import OpenSimplex, internals
from opensimplex.constants import GRADIENTS3, NORM_CONSTANT3

PERIOD = 256  # of the lattice, in each direction


class Field(NamedTuple):
    """One noise field of the original generator.

    Attributes:
        z: the plane of the 3D noise in which the field lies.
        octaves: weight of each octave by its size in cells.
        normalize: divide by the sum of the weights.
        at: where the field is evaluated for cell (x, y).
    """

    z: int
    octaves: dict[int, float]
    normalize: bool = True
    at: Callable[[int, int], tuple[float, float]] = lambda x, y: (x, y)


FIELDS = {
    "start": Field(8, {3: 1}),
    "water": Field(3, {15: 1, 5: 0.15}, normalize=False),
    "mountain": Field(0, {15: 1, 5: 0.3}),
    "cave": Field(6, {7: 1}),
    "horizontal_tunnel": Field(7, {3: 1}, at=lambda x, y: (2 * x, y / 5)),
    "vertical_tunnel": Field(7, {3: 1}, at=lambda x, y: (x / 5, 2 * y)),
    "coal": Field(1, {8: 1}),
    "iron": Field(2, {6: 1}),
    "lava": Field(6, {5: 1}),
    "sand": Field(4, {9: 1}),
    "tree": Field(5, {7: 1}),
}


class OpenSimplexGrid:
    """OpenSimplex noise at fixed points, for any seed.

    The noise at a point is a sum over nearby lattice points. These and their offsets from the point do not
    depend on the seed: the original function gives them once. The seed only selects the gradient at each
    lattice point, which is one lookup for all of them.

    Args:
        points: coordinates (x, y, z) of each point.
    """

    def __init__(self, points: list[tuple[float, float, float]]):
        self._amount = len(points)
        counts, lattice, self._offset = _lattice_terms(points)  # [points], [3, N], [3, N]
        self._point = np.repeat(np.arange(len(points)), counts)  # [N]
        self._lattice = (lattice % PERIOD).astype(np.uint8)
        dx, dy, dz = self._offset
        falloff = 2 - dx * dx - dy * dy - dz * dz
        falloff *= falloff
        self._falloff = falloff * falloff  # [N]

    def __call__(self, seed: int) -> np.ndarray:
        """The noise of `OpenSimplex(seed)` at each point."""
        simplex = OpenSimplex(seed)
        permutation = simplex._perm.astype(np.uint8)
        x, y, z = self._lattice
        dx, dy, dz = self._offset
        # Sums of uint8 wrap around, which is the original's `& 0xFF`.
        index = simplex._perm_grad_index3[permutation[permutation[x] + y] + z]
        gradients = GRADIENTS3.astype(np.float64)
        value = gradients[index] * dx + gradients[index + 1] * dy + gradients[index + 2] * dz
        # bincount adds in the order of the terms, as the original.
        return np.bincount(self._point, self._falloff * value, self._amount) / NORM_CONSTANT3


def _lattice_terms(points: list[tuple[float, float, float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The terms of the noise at each point, in order.

    A copy of the original `_noise3` runs with another `_extrapolate3`, which records its arguments.

    Returns:
        Number of terms of each point [points], their lattice positions [3, N] and offsets [3, N].
    """
    terms = array.array("d")

    def extrapolate(perm, perm_grad_index, *position_and_offset):
        terms.extend(position_and_offset)
        return 0.0

    # With numba installed, py_func is the plain function.
    noise3 = getattr(internals._noise3, "py_func", internals._noise3)
    noise3 = types.FunctionType(noise3.__code__, vars(internals) | {"_extrapolate3": extrapolate})
    ends = [0]
    for point in points:
        noise3(*point, None, None)
        ends.append(len(terms) // 6)
    position, offset = np.array(terms).reshape(-1, 2, 3).transpose(1, 2, 0).copy()
    return np.diff(ends), position, offset


def octave_points(area: tuple[int, int]) -> list[tuple[float, float, float]]:
    """The points at which the original evaluates each octave of each field, for all cells."""
    points = []
    for field in FIELDS.values():
        for size in field.octaves:
            for x, y in np.ndindex(area):
                u, v = field.at(x, y)
                points.append((u / size, v / size, field.z))
    return points


@functools.lru_cache
def _grid(area: tuple[int, int]) -> OpenSimplexGrid:
    """The noise at all octave points; preparing it takes half a second, so once per process."""
    return OpenSimplexGrid(octave_points(area))


def noise_fields(area: tuple[int, int], seed: int) -> dict[str, np.ndarray]:
    """Each of `FIELDS` at all cells [X, Y], equal to `crafter.worldgen._simplex` to the bit."""
    octaves = iter(_grid(area)(seed).reshape(-1, *area))
    result = {}
    for name, field in FIELDS.items():
        value = sum(weight * next(octaves) for weight in field.octaves.values())
        result[name] = value / sum(field.octaves.values()) if field.normalize else value
    return result


def generate_world(world: World, player: objects.Player) -> None:
    """Same as `crafter.worldgen.generate_world`: materials, objects, their order, and random draws."""
    noise = noise_fields(tuple(world.area), world.random.randint(0, 2**31 - 1))
    tunnels = _set_materials(world, player, noise)
    _set_objects(world, player, tunnels)


def _distances(world: World, player: objects.Player) -> np.ndarray:
    """Distance of each cell to the player [X, Y]."""
    x, y = np.ogrid[: world.area[0], : world.area[1]]
    return np.sqrt((x - player.pos[0]) ** 2 + (y - player.pos[1]) ** 2)


def _landscape(distance: np.ndarray, noise: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Start meadow, water and mountains at all cells [X, Y], from the player's distance and the noise."""
    start = 4 - distance
    start += 2 * noise["start"]
    start = 1 / (1 + np.exp(-start))
    water = noise["water"] + 0.1
    water -= 2 * start
    mountain = noise["mountain"] - (4 * start + 0.3 * water)
    return {"start": start, "water": water, "mountain": mountain}


def _set_materials(world: World, player: objects.Player, noise: dict[str, np.ndarray]) -> np.ndarray:
    """Set the material of all cells; return which cells are tunnels [X, Y]."""
    fields = noise | _landscape(_distances(world, player), noise)
    # Lists: Python reads and compares their floats several times faster than those of an array.
    columns = [fields[name].ravel().tolist() for name in FIELDS]
    uniform = world.random.random_sample  # the same number as uniform(), in a tenth of the time
    names = [_material(uniform, *cell) for cell in zip(*columns, strict=True)]
    ids = [world._mat_ids["path" if name == "tunnel" else name] for name in names]
    world._mat_map[:] = np.reshape(ids, world.area)
    return np.reshape([name == "tunnel" for name in names], world.area)


def _material(
    uniform: Callable[[], float],
    start: float,
    water: float,
    mountain: float,
    cave: float,
    horizontal_tunnel: float,
    vertical_tunnel: float,
    coal: float,
    iron: float,
    lava: float,
    sand: float,
    tree: float,
) -> str:
    """Material of a cell, or `tunnel`: a path where skeletons may spawn. Arguments as in `FIELDS`."""
    if start > 0.5:
        return "grass"
    if mountain > 0.15:
        if cave > 0.15 and mountain > 0.3:
            return "path"
        if horizontal_tunnel > 0.4 or vertical_tunnel > 0.4:
            return "tunnel"
        if coal > 0 and uniform() > 0.85:
            return "coal"
        if iron > 0.4 and uniform() > 0.75:
            return "iron"
        if mountain > 0.18 and uniform() > 0.994:
            return "diamond"
        if mountain > 0.3 and lava > 0.35:
            return "lava"
        return "stone"
    if 0.25 < water <= 0.35 and sand > -0.2:
        return "sand"
    if 0.3 < water:
        return "water"
    return "tree" if tree > 0 and uniform() > 0.8 else "grass"


def _set_objects(world: World, player: objects.Player, tunnels: np.ndarray) -> None:
    """Put creatures on walkable cells."""
    uniform = world.random.random_sample  # as above
    walkable = np.isin(world._mat_map, [world._mat_ids[name] for name in constants.walkable])
    grass = world._mat_map == world._mat_ids["grass"]
    places = np.argwhere(walkable).tolist()  # in the original's order
    cells = [each[walkable].tolist() for each in (_distances(world, player), grass, tunnels)]
    for pos, distance, on_grass, in_tunnel in zip(places, *cells, strict=True):
        if distance > 3 and on_grass and uniform() > 0.985:
            world.add(objects.Cow(world, tuple(pos)))
        elif distance > 10 and uniform() > 0.993:
            world.add(objects.Zombie(world, tuple(pos), player))
        elif in_tunnel and uniform() > 0.95:
            world.add(objects.Skeleton(world, tuple(pos), player))
