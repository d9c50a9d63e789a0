"""The scripted adviser: what it achieves alone, what it says, and how `rules_quality` degrades it."""

import crafter
import numpy as np
import pytest
from test_captions import crafter_obs, load, make

from basics import UserError
from benchmarks import rules as benchmark
from lore_llm.advice import AdviceSpec, OptionSpec, Request
from lore_llm.captions import Captioner
from lore_llm.rules import BEST, Rules

CRAFTER, DOORKEY = "--task crafter_reward", "--task minigrid_DoorKey-6x6"
ALL = frozenset({"prior", "plan", "skills"})


def adviser(captioner, options="", seed=0):
    spec = AdviceSpec(captioner.actions, captioner.subgoals, 0, 20000, 8)
    return Rules(spec, load(f"--task dummy_cue {options}").llm, captioner, seed)


def advise(rules, caption, wants=ALL):
    """The one answer, which has nothing wrong in it."""
    (answer,) = rules.answer([Request(caption, wants)]).answers
    assert not answer.problems
    return answer.advice


@pytest.fixture(scope="module")
def captioners():
    return {"crafter": make(CRAFTER)[1], "minigrid": make(DOORKEY)[1]}


@pytest.fixture(scope="module")
def captions(captioners):
    """Captions of random play, by rules."""
    found = {}
    for line in (CRAFTER, DOORKEY):
        env, captioner = make(line)
        rng = np.random.default_rng(0)
        obs, _ = env.reset()
        texts = {}
        for _ in range(500):
            texts[captioner.caption(obs)] = None
            obs, _, terminated, truncated, _ = env.step({"action": rng.integers(len(captioner.actions))})
            if terminated or truncated:
                obs, _ = env.reset()
        found[captioner.rules] = list(texts)
    return found


# --- Alone -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [5, 6, 8])
def test_doorkey_is_solved(size):
    result = benchmark.play(f"minigrid_DoorKey-{size}x{size}", 20, ["--seed", "1"])
    assert np.mean(result["return"] > 0) >= 0.95
    assert result["length"].mean() < 4 * size


def test_crafter_episodes_unlock_the_first_achievements():
    result = benchmark.play("crafter_reward", 3, ["--time_limit", "200"])
    assert result["unlocked"].mean() >= 9
    assert all(result["achievements"][name] > 0.5 for name in ("collect_wood", "place_table", "eat_cow"))


# --- What it says ------------------------------------------------------------------------------------------


def test_every_caption_has_complete_advice(captioners, captions):
    for name, texts in captions.items():
        rules = adviser(captioners[name])
        assert rules.instant and len(texts) > 20
        for text in texts:
            advice = advise(rules, text)
            best = captioners[name].actions[int(np.argmax(advice.action_prior.logits))]
            assert advice.plan[0] == best and max(advice.action_prior.logits) == BEST
            assert 1 <= len(advice.plan) <= 15 and 0 < advice.confidence < 1
            assert 4 <= len(advice.skills) <= 8 and all(
                isinstance(each, OptionSpec) for each in advice.skills
            )


def test_advice_contains_only_what_was_requested(captioners, captions):
    advice = advise(adviser(captioners["minigrid"]), captions["minigrid"][0], frozenset({"prior"}))
    assert advice.action_prior and not advice.plan and not advice.skills and advice.subgoal is None


def test_doorkey_plans_reach_their_subgoals(captioners):
    """A plan is executed completely in the env, and ends where its subgoal is reached."""
    env, captioner = make(DOORKEY)
    rules = adviser(captioner)
    reached = []
    for episode in range(10):
        start, _ = env.reset(episode)
        done, steps = False, 0
        while not done and steps < 100:
            advice = advise(rules, captioner.caption(start))
            now = start
            for name in advice.plan:
                now, _, terminated, truncated, _ = env.step({"action": captioner.actions.index(name)})
                done, steps = terminated or truncated, steps + 1
                if advice.subgoal and captioner.reached(advice.subgoal, start, now):
                    reached.append(advice.subgoal)
                    break
            else:
                assert advice.subgoal is None  # it was looking around
            start = now
        assert done
    assert {"pick_up_key", "open_door", "reach_goal"} <= set(reached)


def test_without_visible_things_it_goes_east_and_along_the_walls(captioners):
    """Otherwise it would turn on the spot forever, having no memory."""

    def best(looks, row):
        seen = "You see: nothing but walls and floor"
        text = f"Mission: get to the goal\nYou look {looks}\nYou carry: nothing\n{seen}\nMap:\n.......\n{row}"
        return advise(adviser(captioners["minigrid"]), text).plan[0]

    assert best("east", "...^...") == "forward"
    assert [best(looks, "...^...") for looks in ("south", "west", "north")] == ["right"] * 3
    assert best("south", "..#^...") == "forward"


@pytest.mark.parametrize(
    ("parts", "best"),
    [
        ({"view": {(0, 1): "zombie"}}, "do"),
        ({"view": {(1, 0): "zombie"}, "items": {"drink": 1}}, "move_right"),  # turns to it
        ({"view": {(3, 0): "water"}, "items": {"drink": 2}}, "move_right"),
        ({"view": {(0, 1): "water"}, "items": {"drink": 2}}, "do"),
        ({"view": {(0, 1): "cow", (-1, 0): "tree"}, "items": {"food": 2}}, "do"),
        ({"items": {"energy": 2}}, "sleep"),
        ({"asleep": True}, "sleep"),
        ({"view": {(0, -1): "tree"}}, "move_up"),
        ({"items": {"wood": 5}}, "place_table"),
        ({"view": {(1, 1): "table"}, "items": {"wood": 1}}, "make_wood_pickaxe"),
        ({"view": {(1, 1): "table"}, "items": {"wood": 1, "wood_pickaxe": 1}}, "make_wood_sword"),
        ({"items": {"sapling": 1}}, "place_plant"),
        ({"items": {"stone": 1, "wood_pickaxe": 1}}, "place_stone"),
        ({"view": {(0, 1): "stone"}, "items": {"wood_pickaxe": 1}}, "do"),
        ({"view": {(0, 1): "iron"}, "items": {"wood_pickaxe": 1, "stone_pickaxe": 1}}, "do"),
        (
            {
                "view": {(1, 1): "table", (-1, 1): "furnace"},
                "items": {"wood": 1, "coal": 1, "iron": 1, "stone_pickaxe": 1, "wood_pickaxe": 1}
                | {"wood_sword": 1, "stone_sword": 1},
            },
            "make_iron_pickaxe",
        ),
    ],
)
def test_crafter_expert(captioners, parts, best):
    advice = advise(adviser(captioners["crafter"]), captioners["crafter"].caption(crafter_obs(**parts)))
    assert advice.plan[0] == best


def test_crafter_expert_avoids_lava(captioners):
    captioner = captioners["crafter"]
    view = dict.fromkeys(((1, 0), (-1, 0), (0, 1)), "lava") | {(3, 0): "water"}
    logits = advise(
        adviser(captioner), captioner.caption(crafter_obs(view=view, items={"drink": 1}))
    ).action_prior.logits
    worst = sorted(range(len(logits)), key=lambda index: logits[index])[:3]
    assert {captioner.actions[index] for index in worst} == {"move_right", "move_left", "move_down"}
    assert captioner.actions[int(np.argmax(logits))] == "move_up"


def test_recipes_are_read_from_the_installed_crafter(captioners, monkeypatch):
    captioner = captioners["crafter"]
    text = captioner.caption(crafter_obs(items={"wood": 5}))
    assert advise(adviser(captioner), text).plan[0] == "place_table"
    dear = crafter.constants.place | {"table": crafter.constants.place["table"] | {"uses": {"wood": 9}}}
    monkeypatch.setattr(crafter.constants, "place", dear)
    assert advise(adviser(captioner), text).plan[0] != "place_table"


def test_tasks_without_rules_are_refused():
    with pytest.raises(UserError, match="know tasks of crafter and minigrid only"):
        adviser(Captioner(["a", "b"], {}))


# --- rules_quality ------------------------------------------------------------------------------------------


def told(captioners, captions, quality, seed=0, wrong=0.3, name="crafter"):
    rules = adviser(captioners[name], f"--llm.rules_quality {quality} --llm.rules_wrong {wrong}", seed)
    return [advise(rules, text) for text in captions[name]]


@pytest.mark.parametrize("wrong", [0.0, 0.4, 1.0])
def test_p_wrong_is_wrong_in_that_share_of_situations(captioners, captions, wrong):
    right = told(captioners, captions, "oracle")
    spoiled = told(captioners, captions, "p-wrong", wrong=wrong)
    random = told(captioners, captions, "random")
    differ = [one != other for one, other in zip(right, spoiled, strict=True)]
    assert np.mean(differ) == pytest.approx(wrong, abs=0.1)
    agree = [
        one.action_prior.logits.index(BEST) == other.action_prior.logits.index(BEST)
        for one, other in zip(right, random, strict=True)
    ]
    assert np.mean(agree) < 0.2  # 1 of 17 actions by chance


@pytest.mark.parametrize("quality", ["p-wrong", "random"])
def test_random_advice_depends_on_seed_and_caption_only(captioners, captions, quality):
    one, again = (told(captioners, captions, quality, seed=3) for _ in range(2))
    assert one == again
    assert one != told(captioners, captions, quality, seed=4)


@pytest.mark.parametrize("name", ["crafter", "minigrid"])
def test_adversarial_advice_is_the_opposite_of_the_experts(captioners, captions, name):
    right = told(captioners, captions, "oracle", name=name)
    wrong = told(captioners, captions, "adversarial", name=name)
    for one, other in zip(right, wrong, strict=True):
        order = np.argsort(one.action_prior.logits, kind="stable")
        assert (np.diff(np.array(other.action_prior.logits)[order]) <= 0).all()
        best = captioners[name].actions[one.action_prior.logits.index(BEST)]
        assert best not in other.plan and len(other.plan) == len(one.plan) and other.subgoal is None
        assert other.confidence == one.confidence


def test_different_advisers_have_different_identities(captioners):
    options = ["", "--llm.rules_quality random", "--llm.rules_quality adversarial"]
    options += [f"--llm.rules_quality p-wrong --llm.rules_wrong {share}" for share in (0.1, 0.2)]
    names = [adviser(captioners["crafter"], each).identity for each in options]
    names += [adviser(captioners["crafter"], options[1], seed=1).identity]
    names += [adviser(captioners["minigrid"]).identity]
    assert len(set(names)) == len(names)
    assert adviser(captioners["crafter"], seed=1).identity == names[0]  # the oracle draws nothing
