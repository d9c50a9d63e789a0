"""The room with the television."""

import numpy as np
import pytest

import config
import envs
from envs import tv_room

UP, DOWN, LEFT, RIGHT, STAY = range(5)
TO_TV = [LEFT, LEFT, DOWN, DOWN]  # from the start


def room(task: str, episode: int = 0):
    env = envs.make_env(config.load(["--task", task]), "train", 0)
    return env, env.reset(episode=episode)[0]


def walk(env, actions: list[int]) -> list[dict]:
    return [env.step({"action": action})[0] for action in actions]


def test_the_plan_is_closed_and_each_cell_can_be_reached_in_half_an_episode():
    reached, distance = {tv_room.START}, 0
    while len(reached) < tv_room.CELLS:
        more = {cell for place in reached for cell in tv_room.NEXT[place]}
        assert more > reached, "some cells cannot be reached"
        reached, distance = more, distance + 1
    assert distance <= tv_room.LENGTH // 2
    assert tv_room.CELLS > 100


def test_walls_stop_and_moves_move():
    env, obs = room("tvroom_still")
    assert obs["position"][tv_room.START] == 1 and obs["position"].sum() == 1
    row, column = tv_room.FREE[tv_room.START]
    cells = [tv_room.FREE[step["position"].argmax()] for step in walk(env, [UP, UP, DOWN, RIGHT, STAY, LEFT])]
    moved = [(-1, 0), (-1, 0), (0, 0), (0, 1), (0, 1), (0, 0)]  # the second step up is into the wall
    assert cells == [(row + y, column + x) for y, x in moved]


@pytest.mark.parametrize("task", ["tvroom_noise", "tvroom_still"])
def test_the_television_is_seen_from_the_alcove_only(task):
    env, obs = room(task)
    steps = walk(env, [*TO_TV, *[STAY] * 20, UP, STAY])
    assert [float(step["log_tv"]) for step in steps] == [0] * 3 + [1] * 21 + [0] * 2
    assert obs["log_tv"] == 0
    for step in [obs, *steps]:
        assert (np.abs(step["screen"]) == step["log_tv"]).all()
        assert step["reward"] == 0
    shown = {step["screen"].tobytes() for step in steps if step["log_tv"]}
    assert len(shown) == 1 if task == "tvroom_still" else len(shown) > 15


def test_noise_differs_between_episodes_and_is_repeated_by_a_seed():
    def seen(episode: int) -> list[bytes]:
        return [
            step["screen"].tobytes() for step in walk(room("tvroom_noise", episode)[0], TO_TV + [STAY] * 5)
        ]

    assert seen(0) == seen(0) != seen(1)


def test_an_episode_ends_by_truncation_and_is_drawn():
    env, _ = room("tvroom_noise")
    last = walk(env, [STAY] * tv_room.LENGTH)[-1]
    assert last["is_last"] and not last["is_terminal"]
    bare = tv_room.TVRoom(noise=True)
    bare.reset(seed=0)
    plain = bare.render()
    for action in TO_TV:
        bare.step(action)
    drawn = bare.render()
    assert plain.dtype == np.uint8 and plain.shape == drawn.shape
    tile = drawn.shape[0] // len(tv_room.PLAN)
    row, column = (tile * place for place in tv_room.FREE[tv_room.TV])
    assert (drawn[row : row + tile, column : column + tile] == tv_room.AGENT).all()
    set_below = (slice(row + tile, row + 2 * tile), slice(column, column + tile))
    assert (plain[set_below] == 0).all() and {0, 255} == set(drawn[set_below].ravel().tolist())
