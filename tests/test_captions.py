"""Captions: the content of `symbolic`, the text that is made of it, and that nothing else changes."""

import types

import crafter
import numpy as np
import pytest
from gymnasium import spaces

import config as configs
import envs
from basics import UserError
from envs.crafter import KINDS, SYMBOLIC, VIEW
from lore_llm.captions import Captioner, _rounded, about_crafter, make_captioner

CRAFTER, DOORKEY = "--task crafter_reward", "--task minigrid_DoorKey-6x6"


def load(line):
    return configs.load(line.split(), has_cuda=False)


def make(line, enabled=True):
    """An environment, and its captioner."""
    config = load(f"{line} --llm.enabled {enabled} --prior.enabled {enabled}")
    env = envs.make_env(config, "train", 0)
    return env, make_captioner(config, env.obs_space, env.act_space)


def play(env, steps, seed=0, actions=None):
    """(observation, action, next observation) of random steps that end no episode."""
    rng = np.random.default_rng(seed)
    obs, _ = env.reset()
    for _ in range(steps):
        action = rng.choice(actions) if actions else rng.integers(env.act_space["action"].n)
        new, _, terminated, truncated, _ = env.step({"action": action})
        yield obs, action, new
        obs = env.reset()[0] if terminated or truncated else new


def crafter_obs(**parts):
    """A meadow in Crafter, but for these `parts`; `view` maps places relative to the player to kinds."""
    view = np.full(VIEW, KINDS.index("grass"))
    x, y = VIEW[0] // 2, VIEW[1] // 2
    view[x, y] = KINDS.index("player")
    for (dx, dy), kind in parts.pop("view", {}).items():
        view[x + dx, y + dy] = KINDS.index(kind)
    items = {
        name: 9 if name in ("health", "food", "drink", "energy") else 0 for name in crafter.constants.items
    }
    items |= parts.pop("items", {})
    counts = dict.fromkeys(crafter.constants.achievements, 0) | parts.pop("achievements", {})
    values = {"facing": (0, 1), "asleep": False, "daylight": 100} | parts
    values |= {"inventory": list(items.values()), "achievements": list(counts.values())}
    return {"symbolic": SYMBOLIC.pack(view=view, **values)}


@pytest.fixture(scope="module")
def crafter_captioner():
    return make(CRAFTER)[1]


# --- The observation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", [CRAFTER, DOORKEY])
def test_symbolic_exists_only_with_llm_and_changes_nothing_else(line):
    with_it, without = make(line)[0], make(line, enabled=False)[0]
    assert set(with_it.obs_space) - set(without.obs_space) == {"symbolic"}
    for (obs, _, new), (plain, _, plain_new) in zip(play(with_it, 20), play(without, 20), strict=True):
        for one, other in ((obs, plain), (new, plain_new)):
            symbolic = one.pop("symbolic")
            assert symbolic.dtype == np.int16 and symbolic.shape == with_it.obs_space["symbolic"].shape
            assert one.keys() == other.keys()
            assert all(one[key].tobytes() == other[key].tobytes() for key in one)
            one["symbolic"] = symbolic  # the next step compares it again


@pytest.mark.parametrize("line", [CRAFTER, DOORKEY])
def test_wrappers_leave_symbolic_alone(line):
    plain = make(line)[0]
    wrapped = make(f"{line} --frame_stack 3 --grayscale True --noisy_tv.enabled True --size 48 48")[0]
    actions = range(plain.act_space["action"].n)
    for (_, _, one), (_, _, other) in zip(
        play(plain, 10, 1, actions), play(wrapped, 10, 1, actions), strict=True
    ):
        assert one["image"].shape != other["image"].shape
        assert one["symbolic"].tobytes() == other["symbolic"].tobytes()


def test_crafter_view_is_the_part_of_the_semantic_map_that_is_drawn():
    env, _ = make(CRAFTER)
    inner = env.env.env.env._env  # below Episode, NormalizeActions and Adapter
    world = inner._world
    numbers = {number: name for name, number in world._mat_ids.items()}
    numbers |= {number: cls.__name__.lower() for cls, number in inner._sem_view._obj_ids.items()}
    env.reset()
    seen = set()
    for _, _, obs in play(env, 300, actions=[1, 1, 1, 3, 3, 4, 2]):
        player, parts = inner._player, SYMBOLIC.unpack(obs["symbolic"])
        semantic = np.pad(inner._sem_view(), 9)  # 0 outside
        x, y = player.pos + 9
        crop = semantic[x - 4 : x + 5, y - 3 : y + 4]
        assert crop.shape == VIEW
        names = [[numbers[number] or "outside" for number in column] for column in crop.tolist()]
        assert [[KINDS[kind].removeprefix("ripe_") for kind in column] for column in parts["view"]] == names
        assert tuple(parts["facing"]) == player.facing and parts["asleep"] == player.sleeping
        assert parts["inventory"].tolist() == list(player.inventory.values())
        assert parts["achievements"].tolist() == list(player.achievements.values())
        seen |= set(sum(names, []))
    assert len(seen) > 4


# --- Crafter -----------------------------------------------------------------------------------------------


def test_crafter_caption_describes_what_the_image_shows(crafter_captioner):
    view = {(0, 1): "tree", (3, 0): "water", (-4, -3): "zombie", (-1, -1): "table", (1, 0): "stone"}
    text = crafter_captioner.caption(
        crafter_obs(view=view, items={"food": 3, "drink": 5, "wood": 2}, achievements={"collect_wood": 4})
    )
    assert text.splitlines() == [
        "Facing: down",
        "Around you: left grass, open; right stone; up grass, open; down tree",
        "You see: water near right, go up; stone beside right; tree beside down; table near up-left, "
        "go left; zombie far up-left, go left",
        "Within reach to craft: table",
        "You have: 2 wood",
        "You are: health high, food low, drink middle, energy high",
        "It is day; you are awake",
        "Achieved: collect_wood",
    ]


def test_crafter_paths_avoid_obstacles_and_dig_where_possible(crafter_captioner):
    wall = {(1, y): "stone" for y in range(-3, 4)} | {(3, 0): "coal"}
    assert "coal near right, no way" in crafter_captioner.caption(crafter_obs(view=wall))
    dug = crafter_captioner.caption(crafter_obs(view=wall, items={"wood_pickaxe": 1}))
    assert "coal near right, go right" in dug
    del wall[1, -3]
    assert "coal near right, go up" in crafter_captioner.caption(crafter_obs(view=wall))
    lava = {(1, 0): "lava", (2, 0): "water"}
    assert "water near right, go right" not in crafter_captioner.caption(crafter_obs(view=lava))


def test_equal_situations_give_equal_text(crafter_captioner):
    """Exact vitals, the daylight's percent, amounts beyond all recipes and far distances do not matter."""
    one = crafter_obs(view={(4, 0): "cow"}, items={"food": 8, "sapling": 1}, daylight=90)
    other = crafter_obs(view={(4, 0): "cow"}, items={"food": 9, "sapling": 4, "energy": 8}, daylight=70)
    assert crafter_captioner.caption(one) == crafter_captioner.caption(other)
    assert crafter_captioner.caption(one) != crafter_captioner.caption(
        crafter_obs(view={(4, 0): "cow"}, items={"food": 2, "sapling": 1})
    )


def test_recipes_are_those_of_the_installed_crafter():
    game = crafter.constants
    wood, stone = game.place["table"]["uses"]["wood"], game.place["furnace"]["uses"]["stone"]
    assert f"- place_table: uses {wood} wood;" in about_crafter(game)
    assert f"- place_furnace: uses {stone} stone;" in about_crafter(game)
    place = game.place | {"table": {"uses": {"wood": 7}, "where": ["sand"]}}
    other = types.SimpleNamespace(place=place, make=game.make, collect=game.collect, items=game.items)
    assert "- place_table: uses 7 wood; onto sand in front of you" in about_crafter(other)


def test_crafter_blocked_moves_are_those_that_change_nothing():
    env, captioner = make(CRAFTER)
    inner = env.env.env.env._env
    env.reset()
    blocked = 0
    rng = np.random.default_rng(0)
    obs, _ = env.reset()
    for _ in range(400):
        action = int(rng.choice([1, 1, 2, 3, 3, 3, 4]))
        before = (*inner._player.pos, *inner._player.facing)
        new, _, terminated, truncated, _ = env.step({"action": action})
        after = (*inner._player.pos, *inner._player.facing)
        assert captioner.blocked(obs, new, action) == (before == after)
        blocked += before == after
        obs = env.reset()[0] if terminated or truncated else new
    assert blocked > 10


@pytest.mark.parametrize(
    ("action", "change", "blocked"),
    [
        ("noop", {}, False),
        ("sleep", {}, True),
        ("sleep", {"asleep": True}, False),
        ("place_table", {}, True),
        ("place_table", {"achievements": {"place_table": 1}}, False),
        ("do", {"view": {(0, 1): "stone"}}, True),  # without a pickaxe
        ("do", {"view": {(0, 1): "zombie"}}, False),  # a blow does not show
        ("do", {}, False),  # grass seldom gives a sapling
        ("do", {"view": {(0, 1): "water"}, "achievements": {"collect_drink": 1}}, False),
    ],
)
def test_crafter_blocked_actions(crafter_captioner, action, change, blocked):
    before = crafter_obs(**{key: value for key, value in change.items() if key == "view"})
    now = crafter_obs(**change)
    assert crafter_captioner.blocked(before, now, crafter_captioner.actions.index(action)) is blocked


def test_crafter_subgoals_are_achievements_whose_count_rises(crafter_captioner):
    assert crafter_captioner.subgoals == tuple(crafter.constants.achievements)
    before, now = (crafter_obs(achievements={"collect_wood": count}) for count in (2, 3))
    assert crafter_captioner.reached("collect_wood", before, now)
    assert not crafter_captioner.reached("collect_wood", now, now)
    assert not crafter_captioner.reached("collect_coal", before, now)


# --- MiniGrid ----------------------------------------------------------------------------------------------


def test_minigrid_caption_and_subgoals_of_a_solved_episode():
    """DoorKey-5x5 by hand: the caption is right, and each subgoal is reached in its step."""
    env, captioner = make("--task minigrid_DoorKey-5x5")
    names = captioner.actions
    assert names == ("left", "right", "forward", "pickup", "drop", "toggle", "done")
    obs, _ = env.reset(0)
    inner = env.unwrapped
    assert "Mission: use the key to open the door and then get to the goal" in captioner.caption(obs)
    inner.agent_pos, inner.agent_dir = (1, 1), 1
    inner.grid.set(1, 2, None)
    inner.grid.set(1, 3, None)
    door = next(thing for thing in inner.grid.grid if thing and thing.type == "door")
    inner.grid.set(*door.cur_pos, None)
    from minigrid.core.world_object import Key, Wall

    for row in (1, 2, 3):
        inner.grid.set(2, row, Wall())
    inner.grid.set(2, 2, door)
    inner.grid.set(1, 3, Key("yellow"))
    obs, *_ = env.step({"action": names.index("done")})
    text = captioner.caption(obs)
    assert "You look south\nYou carry: nothing\nYou stand on: nothing\n" in text
    assert "You see: locked yellow door 1 ahead 1 left; yellow key 2 ahead\n" in text
    assert text.endswith("Map:\n??###??\n??#K#??\n??D.#??\n??#^#??")
    steps = [
        ("forward", "face_object", "yellow key 1 ahead"),
        ("pickup", "pick_up_key", "You carry: yellow key"),
        ("left", None, "locked yellow door 1 ahead"),
        ("toggle", "open_door", "open yellow door 1 ahead"),
        ("forward", "enter_doorway", "You stand on: door"),
        ("forward", None, "You stand on: nothing"),
        ("right", None, "goal 1 ahead"),
        ("drop", None, "goal 1 ahead"),
        ("forward", "reach_goal", "You stand on: goal"),
    ]
    for action, subgoal, told in steps:
        new, _, terminated, _, _ = env.step({"action": names.index(action)})
        assert told in captioner.caption(new)
        assert [each for each in captioner.subgoals if captioner.reached(each, obs, new)] == (
            [subgoal] if subgoal else []
        )
        assert captioner.blocked(obs, new, names.index(action)) == (action == "drop")
        obs = new
    assert terminated


def test_approaching_an_open_door_is_not_opening_it():
    from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX, STATE_TO_IDX

    from envs.minigrid import layout

    captioner = make(DOORKEY)[1]

    def sees_door(ahead, state):
        view = np.full((7, 7, 3), (OBJECT_TO_IDX["empty"], 0, 0))
        view[3, 6 - ahead] = OBJECT_TO_IDX["door"], COLOR_TO_IDX["red"], STATE_TO_IDX[state]
        parts = {"direction": 0, "on": OBJECT_TO_IDX["empty"], "mission": np.zeros(50)}
        return {"symbolic": layout(7).pack(view=view, **parts)}

    assert captioner.reached("open_door", sees_door(2, "closed"), sees_door(1, "open"))
    assert not captioner.reached("open_door", sees_door(2, "open"), sees_door(1, "open"))
    assert not captioner.reached("open_door", sees_door(2, "closed"), sees_door(1, "closed"))


def test_minigrid_blocked_actions_are_those_that_change_nothing():
    env, captioner = make("--task minigrid_DoorKey-6x6")
    inner = env.unwrapped
    seen = {True: 0, False: 0}
    obs, _ = env.reset()
    rng = np.random.default_rng(0)
    for _ in range(600):
        action = int(rng.choice([0, 1, 2, 2, 2, 3, 5]))
        before = inner.agent_pos, inner.agent_dir, inner.carrying, inner.grid.encode().tobytes()
        new, _, terminated, truncated, _ = env.step({"action": action})
        same = before == (inner.agent_pos, inner.agent_dir, inner.carrying, inner.grid.encode().tobytes())
        assert captioner.blocked(obs, new, action) == same
        seen[same] += 1
        obs = env.reset()[0] if terminated or truncated else new
    assert min(seen.values()) > 50


# --- Other environments ------------------------------------------------------------------------------------


def test_without_symbolic_vectors_are_summarised():
    env, captioner = make("--task gym_CartPole-v1")
    assert (
        captioner.rules is None and captioner.subgoals == () and captioner.actions == ("action_0", "action_1")
    )
    obs, _ = env.reset()
    obs["vector"] = np.array([0.04, -0.11, 2.6, 5000], np.float32)
    assert captioner.caption(obs) == "vector: 0 -0.1 3 1000"
    assert not captioner.blocked(obs, obs, 0) and not captioner.reached("anything", obs, obs)


def test_summaries_are_short_and_images_are_only_mentioned():
    space = {
        "image": spaces.Box(0, 255, (64, 64, 3), np.uint8),
        "sound": spaces.Box(-1, 1, (500,), np.float32),
        "room": spaces.Box(0, 1, (4,), np.float32),
        "log_steps": spaces.Box(0, 1, (), np.float32),
    }
    captioner = Captioner(["a"], space)
    obs = {key: np.zeros(each.shape, each.dtype) for key, each in space.items()}
    obs["room"][2] = 1
    text = captioner.caption(obs)
    assert text.splitlines()[:2] == ["image: an image is seen", "room: number 2 of 4"]
    assert text.endswith("and 452 more") and len(text) < 300 and "log_steps" not in text


@pytest.mark.parametrize(
    ("number", "told"),
    [(0.0, "0"), (float("nan"), "0"), (float("inf"), "1000"), (-0.2, "-0.3"), (17, "20"), (-3.3, "-3")],
)
def test_numbers_are_rounded_to_half_decades(number, told):
    assert _rounded(number) == told.replace("20", "10")


@pytest.mark.parametrize(
    "space",
    [
        {"action": spaces.Box(-1, 1, (1,))},
        {"action": spaces.MultiDiscrete([2, 3])},
        {"arm": spaces.Discrete(2), "leg": spaces.Discrete(3)},
    ],
)
def test_other_actions_than_one_discrete_are_refused(space):
    with pytest.raises(UserError, match="advice needs one Discrete action; gym_Pendulum-v1 has"):
        make_captioner(load("--task gym_Pendulum-v1"), {}, space)


class Shouting(Captioner):
    def caption(self, obs):
        return "HELLO"


class Wrong(Captioner):
    def __init__(self, actions, obs_space):
        super().__init__(["just_one"], obs_space)


def test_a_user_captioner():
    config = load(f"--task gym_CartPole-v1 --llm.captioner {__name__}:Shouting")
    space = {"action": spaces.Discrete(2)}
    captioner = make_captioner(config, {}, space)
    assert captioner.caption({}) == "HELLO" and captioner.actions == ("action_0", "action_1")


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("words", "write auto, or package.module:Class"),
        ("no_such_module:Words", "Cannot import no_such_module"),
        (f"{__name__}:Shoutin", "Did you mean Shouting?"),
        ("lore_llm.captions:_summary", "not a subclass"),
        (f"{__name__}:Wrong", "names 1 actions; gym_CartPole-v1 has 2"),
    ],
)
def test_mistakes_in_the_captioner_option_are_explained(path, told):
    config = load(f"--task gym_CartPole-v1 --llm.captioner {path}")
    with pytest.raises(UserError) as error:
        make_captioner(config, {}, {"action": spaces.Discrete(2)})
    assert told in str(error.value)
