"""The faster Crafter is the game of the installed package to the bit."""

import crafter
import numpy as np
import pytest
from crafter import constants, engine, objects, worldgen
from opensimplex import OpenSimplex, internals

import config
import envs
from envs import crafter_worldgen
from envs.crafter import Crafter, _World

AREA = (64, 64)


class ListSimplex(OpenSimplex):
    """The original noise with its tables as lists."""

    def __init__(self, seed: int):
        super().__init__(seed)
        self._perm, self._perm_grad_index3 = self._perm.tolist(), self._perm_grad_index3.tolist()


@pytest.fixture
def quick_original(monkeypatch):
    """The original generator with lists for arrays: the same worlds, several times faster."""
    monkeypatch.setattr(internals, "GRADIENTS3", internals.GRADIENTS3.tolist())
    monkeypatch.setattr(worldgen.opensimplex, "OpenSimplex", ListSimplex)


def make_world(generate_world, seed, area=AREA, center=(32, 32)):
    world = engine.World(area, constants.materials, (12, 12))
    world.reset(seed)
    player = objects.Player(world, center)
    world.add(player)
    generate_world(world, player)
    return world


def random_state(world):
    name, keys, *rest = world.random.get_state()
    return name, keys.tolist(), rest


def assert_same_world(ours, original):
    np.testing.assert_array_equal(ours._mat_map, original._mat_map)
    np.testing.assert_array_equal(ours._obj_map, original._obj_map)
    described = [
        [(type(each), each.pos.tolist(), each.inventory) for each in world.objects]
        for world in (ours, original)
    ]
    assert described[0] == described[1]
    assert [(key, len(each)) for key, each in ours.chunks.items()] == [
        (key, len(each)) for key, each in original.chunks.items()
    ]
    assert random_state(ours) == random_state(original)


def test_noise_at_any_point_is_the_originals_to_the_last_bit():
    points = np.random.default_rng(0).normal(0, 20, (4000, 3)).tolist()
    points += [(x, y, z) for x in (-1, 0, 2) for y in (0, 1) for z in (0, 5)]  # on the lattice, with ties
    points += [(x / 3, y / 3, x + y) for x in range(-9, 9) for y in range(9)]
    simplex = ListSimplex(7)
    original = np.float64([simplex.noise3(*point) for point in points])
    assert crafter_worldgen.OpenSimplexGrid(points)(7).tobytes() == original.tobytes()


@pytest.mark.parametrize("seed", range(4))
def test_world_is_the_originals(seed, quick_original):
    ours, original = (make_world(each.generate_world, seed) for each in (crafter_worldgen, worldgen))
    assert_same_world(ours, original)


def test_world_of_another_area_is_the_originals(quick_original):
    shape = dict(seed=3, area=(30, 47), center=(4, 40))
    assert_same_world(*(make_world(each.generate_world, **shape) for each in (crafter_worldgen, worldgen)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1000, 1001])
def test_world_is_the_untouched_originals(seed):
    ours, original = (make_world(each.generate_world, seed) for each in (crafter_worldgen, worldgen))
    assert_same_world(ours, original)


def make_pair(seed, **options):
    """Ours and the original, which gets ordered chunks: its own order depends on memory addresses."""
    size = options.get("size", (64, 64))
    ours, original = Crafter(**options), crafter.Env(seed=seed, **options | {"size": size[::-1]})
    original._world.__class__ = _World
    np.testing.assert_array_equal(ours.reset(seed)[0]["image"], original.reset())
    return ours, original


def assert_same_step(ours, original, action):
    obs, reward, terminated, truncated, info = ours.step(action)
    image, original_reward, done, original_info = original.step(action)
    np.testing.assert_array_equal(obs["image"], image)
    assert (reward, terminated or truncated) == (original_reward, done)
    assert info.keys() == original_info.keys()
    for key in info:
        np.testing.assert_array_equal(info[key], original_info[key])
    return done


# The player is kept alive through a night (dark around step 210).
def test_trajectory_is_the_originals(quick_original):
    pair, actions = make_pair(1), np.random.default_rng(1).integers(17, size=400).tolist()
    slept = False
    for action in actions:
        for player in (env._player for env in (pair[0]._env, pair[1])):
            player.inventory.update(health=9, food=9, drink=9)
        assert_same_step(*pair, action)
        slept |= pair[1]._player.sleeping
    assert slept
    assert_same_world(pair[0]._env._world, pair[1]._world)


def test_smaller_world_is_the_originals(quick_original):
    made = envs.make_raw(config.load(["--crafter.area", "20", "32"]), 0)
    assert made._env._world.area == (20, 32)
    ours, original = make_pair(3, length=80, area=(20, 32))
    for action in np.random.default_rng(3).integers(17, size=200).tolist():
        if assert_same_step(ours, original, action):
            np.testing.assert_array_equal(ours.reset()[0]["image"], original.reset())
    assert_same_world(ours._env._world, original._world)


@pytest.mark.parametrize("size", [(64, 64), (18, 20), (100, 75)])
def test_images_at_the_worlds_edges_are_the_originals(size, quick_original):
    ours, original = make_pair(0, size=size)
    for env in (ours._env, original):
        env._world._mat_map[:3] = 1 + np.arange(64) % 12  # every material
    for corner in [(0, 0), (63, 0), (0, 63), (63, 63), (2, 31), (30, 62)]:
        for daylight, sleeping in [(1.0, False), (0.2, True)]:
            for env in (ours._env, original):
                if env._world[corner][1] is None:
                    env._world.move(env._player, corner)
                env._world.daylight, env._player.sleeping = daylight, sleeping
            np.testing.assert_array_equal(ours._env.render(), original.render())


def test_inventory_is_redrawn_when_it_changes(quick_original):
    ours, original = make_pair(0)
    for change in (dict(wood=3), dict(wood=4), dict(wood=0, iron_sword=1), dict(wood=0), dict(health=2)):
        for env in (ours._env, original):
            env._player.inventory.update(change)
        np.testing.assert_array_equal(ours._env.render(), original.render())
        larger = (96, 80)
        np.testing.assert_array_equal(ours._env.render(larger), original.render(larger))


def test_installed_package_is_not_changed():
    assert crafter.env.worldgen.generate_world.__module__ == "crafter.worldgen"
    assert type(crafter.Env(seed=0)._local_view) is engine.LocalView
