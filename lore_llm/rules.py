"""The embedded adviser: scripted experts for Crafter and MiniGrid that read captions, as a model does.

They use only the caption and the recipes of the game, have no memory, and answer in the same form as a model,
through the same parser. `llm.rules_quality` degrades them on purpose, for experiments. Call them "scripted
adviser" in reports of measurements.
"""

import itertools
import random
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from basics import UserError, derive_seed
from lore_llm.advice import MAX_PLAN, AdviceSpec, Request
from lore_llm.backends import LLMAdapter
from lore_llm.captions import Captioner

VERSION = 2  # part of the cache key: increment it with every change of the answers

# Logits, from the best action to harmful ones.
BEST, GOOD, NEUTRAL, USELESS, HARMFUL = 30.0, 10.0, 0.0, -5.0, -15.0


@dataclass
class Verdict:
    """An expert's advice about a caption."""

    best: str  # the best next action
    scores: dict[str, float]  # of other actions, by name; NEUTRAL if absent
    plan: list[str]  # the next actions, beginning with the best one
    subgoal: str | None
    confidence: float


class Rules(LLMAdapter):
    """Answers instantly, without network or key.

    The captioner names the expert: its `advise` returns a Verdict about a caption, its `skills` options for
    it. Random answers depend on seed and caption only. Raises UserError if there is no such expert.
    """

    instant = True

    def __init__(self, spec: AdviceSpec, config: Mapping[str, Any], captioner: Captioner, seed: int = 0):
        super().__init__(spec, config)
        if captioner.rules not in EXPERTS:
            raise UserError(
                "--llm.backend rules: the embedded rules know tasks of crafter and minigrid only. "
                "Use --llm.backend gemini, openai, none, or your own package.module:Class."
            )
        self._rules, self._seed = captioner.rules, seed
        self._expert = EXPERTS[captioner.rules]()
        self._quality, self._wrong = config["rules_quality"], config["rules_wrong"]

    @property
    def identity(self) -> str:
        dial = {"oracle": "", "p-wrong": f" {self._wrong:g} of {self._seed}", "random": f" of {self._seed}"}
        return (
            f"rules {self._rules} {VERSION} {self._quality}{dial.get(self._quality, '')} {self.spec.digest}"
        )

    def advise(self, requests: Sequence[Request]) -> list[dict[str, Any]]:
        return [self._advise_one(request) for request in requests]

    def _advise_one(self, request: Request) -> dict[str, Any]:
        actions = self.spec.actions
        verdict = self._expert.advise(request.caption)
        scores = {name: USELESS if name.startswith("tv_") else NEUTRAL for name in actions}
        scores |= verdict.scores | {verdict.best: BEST}
        logits = [scores[name] for name in actions]
        plan = list(itertools.takewhile(actions.__contains__, verdict.plan))
        subgoal = verdict.subgoal
        skills = self._expert.skills(request.caption) if "skills" in request.wants else []
        quality, draw = self._quality, random.Random(derive_seed(self._seed, "rules", request.caption))
        if quality == "p-wrong":
            quality = "random" if draw.random() < self._wrong else "oracle"
        if quality == "random":
            draw.shuffle(logits)
            plan = draw.choices(actions, k=len(plan))
            subgoal = draw.choice(self.spec.subgoals) if self.spec.subgoals else None
            for skill in skills:
                skill["primitive_actions"] = draw.choices(actions, k=len(skill["primitive_actions"]))
        elif quality == "adversarial":
            logits = [-logit for logit in logits]
            worst = actions[logits.index(max(logits))]
            plan, subgoal = [worst] * len(plan), None
            for skill in skills:
                skill["primitive_actions"] = [worst] * len(skill["primitive_actions"])
                skill["subgoal"] = None
        reply = {"confidence": verdict.confidence}
        if "prior" in request.wants:
            reply["action_prior"] = {"logits": logits}
        if "plan" in request.wants:
            reply |= {"plan": plan[:MAX_PLAN], "subgoal": subgoal}
        if "skills" in request.wants:
            reply["skills"] = skills[: self.spec.max_skills]
        return reply


def _skill(name: str, description: str, actions: list[str], confidence: float, subgoal: str | None = None):
    return {
        "name": name,
        "description": description,
        "primitive_actions": actions,
        "expected_duration": len(actions),
        "confidence": confidence,
        "subgoal": subgoal,
    }


def _line(caption: str, start: str) -> str:
    """The rest of the caption's line that begins with `start`; empty if there is none."""
    place = caption.find(start)
    return "" if place < 0 else caption[place + len(start) :].partition("\n")[0].strip()


# --- MiniGrid ----------------------------------------------------------------------------------------------

Place = tuple[int, int]  # steps to the right of the player, and ahead

AHEAD = (0, 1)
THING = re.compile(
    r"(?:(?P<state>open|closed|locked) )?(?:(?P<color>\w+) )?(?P<kind>door|key|ball|box|goal|lava)"
    r"(?: (?P<ahead>\d+) ahead)?(?: (?P<side>\d+) (?P<hand>left|right))?$"
)
WANTED = re.compile(
    r"(?:pick up|fetch|get|go to|find) (?:a|the) (?:(?P<color>\w+) )?(?P<kind>key|ball|box|door)\b"
)


@dataclass(frozen=True)
class Thing:
    kind: str
    color: str
    state: str  # of a door: open, closed, locked
    place: Place


class MiniGridRules:
    """Fetches the key, opens the door, goes to the goal; other missions name a thing to fetch or to go to.

    If nothing useful is visible, it goes east, then along the walls clockwise, which explores without memory.
    """

    def advise(self, caption: str) -> Verdict:
        things = self._things(_line(caption, "You see:"))
        carried = _line(caption, "You carry:")
        free = self._free(caption, things)
        front = next((thing for thing in things if thing.place == AHEAD), None)
        scores = self._scores(front, AHEAD in free, carried)
        for targets, last, subgoal, confidence in self._wishes(caption, things, carried):
            for thing in targets:
                path = self._path(free, thing.place, walk_in=last is None)
                if path is None:
                    continue
                plan = path + self._after(thing, last)
                if plan:
                    return Verdict(plan[0], scores, plan, subgoal, confidence)
        return self._explore(caption, free, scores)

    def skills(self, caption: str) -> list[dict[str, Any]]:
        return [
            _skill("walk ahead", "until something is in the way", ["forward"] * 4, 0.8),
            _skill("step left", "turn left and go", ["left", "forward"], 0.7),
            _skill("step right", "turn right and go", ["right", "forward"], 0.7),
            _skill("turn around", "look back", ["left", "left"], 0.7),
            _skill("fetch ahead", "go ahead and take a key", ["forward", "pickup"], 0.7, "pick_up_key"),
            _skill("open and pass", "open the door ahead, go through", ["toggle", "forward", "forward"], 0.8),
        ]

    def _wishes(self, caption: str, things: list[Thing], carried: str):
        """(things, action in front of them or None to step onto them, subgoal, confidence), by urgency."""
        mission = _line(caption, "Mission:")
        key_color = carried.removesuffix(" key") if carried.endswith(" key") else None
        wanted = None if "goal" in mission else WANTED.search(mission)
        if wanted:
            kind, color = wanted["kind"], wanted["color"]
            matching = [thing for thing in things if thing.kind == kind and color in (None, thing.color)]
            if mission.startswith(("go to", "find")):
                yield matching, "done", "face_object", 0.6
            elif carried == "nothing" and kind != "door":
                yield matching, "pickup", f"pick_up_{kind}", 0.8
        else:
            yield [thing for thing in things if thing.kind == "goal"], None, "reach_goal", 0.95
        doors = [thing for thing in things if thing.kind == "door"]
        openable = [
            door
            for door in doors
            if door.state == "closed" or (door.state == "locked" and door.color == key_color)
        ]
        yield openable, "toggle", "open_door", 0.95
        if carried == "nothing" and not wanted:
            yield [thing for thing in things if thing.kind == "key"], "pickup", "pick_up_key", 0.9
        if key_color or carried == "nothing":
            yield [door for door in doors if door.state == "open"], None, "enter_doorway", 0.8

    def _after(self, thing: Thing, last: str | None) -> list[str]:
        if last == "toggle":
            return ["toggle", "forward", "forward"]
        if last is None:
            return ["forward"] if thing.kind == "door" else []
        return [last]

    def _explore(self, caption: str, free: set[Place], scores: dict[str, float]) -> Verdict:
        east = _line(caption, "You look") == "east"
        if AHEAD in free and (east or (-1, 0) not in free):
            length = next(n for n in range(1, MAX_PLAN + 1) if (0, n + 1) not in free)
            return Verdict("forward", scores | {"right": GOOD}, ["forward"] * length, None, 0.3)
        return Verdict("right", scores | {"left": GOOD}, ["right"], None, 0.3)

    def _scores(self, front: Thing | None, is_free: bool, carried: str) -> dict[str, float]:
        """Scores of actions that do not depend on the goal."""
        scores = dict.fromkeys(("pickup", "drop", "toggle", "done"), USELESS)
        if carried != "nothing":
            scores["drop"] = HARMFUL
        if not is_free:
            scores["forward"] = USELESS
        if front and front.kind == "lava":
            scores["forward"] = HARMFUL
        if front and front.kind == "door" and front.state == "open":
            scores["toggle"] = HARMFUL  # it would close
        return scores

    def _things(self, line: str) -> list[Thing]:
        """The visible things, the nearest first."""
        things = []
        for words in line.split("; "):
            found = THING.match(words)
            if found:
                side = int(found["side"] or 0) * (-1 if found["hand"] == "left" else 1)
                place = side, int(found["ahead"] or 0)
                things.append(Thing(found["kind"], found["color"] or "", found["state"] or "", place))
        return things

    def _free(self, caption: str, things: list[Thing]) -> set[Place]:
        """The visible places that can be walked on."""
        rows = caption.partition("Map:\n")[2].split("\n")
        me = rows[-1].find("^")
        free = {
            (column - me, len(rows) - 1 - index)
            for index, row in enumerate(rows)
            for column, sign in enumerate(row)
            if sign in ".G^"
        }
        return free | {thing.place for thing in things if thing.state == "open"}

    def _path(self, free: set[Place], target: Place, walk_in: bool) -> list[str] | None:
        """The shortest path to the place before `target`, or onto it (`walk_in`). None: no path."""
        start = (0, 0), AHEAD  # position and direction
        came: dict[tuple[Place, Place], tuple[tuple[Place, Place], str] | None] = {start: None}
        queue = deque([start])
        while queue:
            state = queue.popleft()
            (x, y), (dx, dy) = state
            if (x, y) == target if walk_in else (x + dx, y + dy) == target:
                path = []
                while came[state] is not None:
                    state, action = came[state]
                    path.append(action)
                return path[::-1]
            steps = {
                "forward": ((x + dx, y + dy), (dx, dy)),
                "left": ((x, y), (-dy, dx)),
                "right": ((x, y), (dy, -dx)),
            }
            for action, new in steps.items():
                if new not in came and new[0] in free:
                    came[new] = state, action
                    queue.append(new)
        return None


# --- Crafter -----------------------------------------------------------------------------------------------

SIGHT = re.compile(
    r"(?P<kind>.+?) (?P<far>beside|near|far) (?P<where>[a-z-]+)(?:, (?:go (?P<go>\w+)|no way))?$"
)
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
TOOLS = ("pickaxe", "sword")
STEPS = {"beside": 0, "near": 2, "far": 4}  # moves towards something at this distance, about
OPEN_STEPS = {"open": 5, "short": 1, "deep": 0, "": 0}  # moves that are free in a direction, at least
BLOWS = 6  # that kill any creature, without a sword
DRINKS = 5
NAP = 15  # steps of sleep in a plan
WOOD = 5  # a table, two tools, and one to spare
# Materials by value: the field, the item, and how many are enough.
GATHERED = (("diamond", "diamond", 1), ("iron", "iron", 2), ("coal", "coal", 2), ("stone", "stone", 6))
GATHERED += (("tree", "wood", WOOD),)
USEFUL = ("water", "cow", "zombie", "skeleton", "ripe plant")  # targets of `do`, besides materials


@dataclass(frozen=True)
class Sight:
    """The nearest thing of a kind: distance, direction, and the first step to it, if there is a path."""

    far: str
    where: str
    go: str | None


@dataclass(frozen=True)
class Scene:
    """The content of a Crafter caption."""

    facing: str
    around: dict[str, tuple[str, str]]  # direction -> kind of the field; open, short, deep, or nothing
    seen: dict[str, Sight]
    reach: set[str]  # table and furnace, if they can be used
    have: dict[str, int]
    vitals: dict[str, str]
    dark: bool
    asleep: bool
    walled_in: bool
    achieved: set[str]

    @classmethod
    def read(cls, caption: str) -> "Scene":
        around = {}
        for words in _line(caption, "Around you:").split("; "):
            direction, _, rest = words.partition(" ")
            kind, _, space = rest.partition(", ")
            around[direction] = kind, space
        seen = {}
        for words in _line(caption, "You see:").split("; "):
            if found := SIGHT.match(words):
                seen[found["kind"]] = Sight(found["far"], found["where"], found["go"])
        have = {}
        for words in _line(caption, "You have:").split(", "):
            count, _, item = words.partition(" ")
            if item:
                have[item.replace(" ", "_")] = int(count.rstrip("+"))
        state = _line(caption, "It is ")
        return cls(
            facing=_line(caption, "Facing:"),
            around=around,
            seen=seen,
            reach=set(_line(caption, "Within reach to craft:").split(", ")),
            have=have,
            vitals=dict(words.split(" ") for words in _line(caption, "You are:").split(", ")),
            dark=state.startswith("night"),
            asleep="you are asleep" in state,
            walled_in="walled in" in state,
            achieved=set(_line(caption, "Achieved:").split(", ")),
        )

    @property
    def front(self) -> str:
        return self.around[self.facing][0]

    def is_free(self, way: str) -> bool:
        return self.around[way][1] in ("open", "short")


class CrafterRules:
    """Survives first (fight, drink, eat, sleep), then climbs the technology tree, else explores.

    Recipes are those of the installed Crafter.
    """

    def __init__(self):
        import crafter

        self._game = crafter.constants

    def advise(self, caption: str) -> Verdict:
        scene = Scene.read(caption)
        scores = self._scores(scene)
        for wish in (self._survive, self._craft, self._gather, self._roam):
            found = wish(scene, caption)
            if found:
                plan, subgoal, confidence = found
                return Verdict(plan[0], scores, plan, subgoal, confidence)
        return Verdict("noop", scores, ["noop"], None, 0.1)

    def skills(self, caption: str) -> list[dict[str, Any]]:
        scene = Scene.read(caption)
        tools = ["place_table", "make_wood_pickaxe", "make_wood_sword"]
        works = [
            _skill("chop", "collect the wood ahead", ["do"] * 5, 0.8, "collect_wood"),
            _skill("drink", "at the water ahead", ["do"] * DRINKS, 0.7),
            _skill("sleep", "until awake", ["sleep"] * NAP, 0.6, "wake_up"),
            _skill("wooden tools", "a table and what it serves for", tools, 0.7),
        ]
        if "wood_pickaxe" in scene.have:
            tools = ["place_table", "make_stone_pickaxe", "make_stone_sword"]
            works[0] = _skill("mine", "dig ahead", ["do", f"move_{scene.facing}"] * 3, 0.7)
            works[3] = _skill("stone tools", "at a table in reach", tools, 0.7)
        way = "until something is in the way"
        return [*works, *(_skill(f"walk {name}", way, [f"move_{name}"] * 6, 0.7) for name in OPPOSITE)]

    # --- What to do: each returns (plan, subgoal, confidence) or None --------------------------------------

    def _survive(self, scene: Scene, caption: str):
        if scene.asleep:
            return ["sleep"] * NAP, "wake_up", 0.8
        for enemy in ("zombie", "skeleton"):
            if scene.seen.get(enemy, FAR).far == "beside":
                return self._face(scene, enemy, BLOWS), f"defeat_{enemy}", 0.9
        if scene.dark and (plan := self._shelter(scene, caption)):
            return plan, None, 0.8
        hurry = "low" in (scene.vitals["drink"], scene.vitals["food"])
        for level in ("low", "middle"):
            if scene.vitals["drink"] == level and (plan := self._go(scene, "water", DRINKS)):
                return plan, "collect_drink", 0.9
            if scene.vitals["food"] == level:
                for food, subgoal in (("ripe plant", "eat_plant"), ("cow", "eat_cow")):
                    if plan := self._go(scene, food, BLOWS):
                        return plan, subgoal, 0.9
            calm = not (hurry or scene.dark) and not {"zombie", "skeleton", "arrow"} & scene.seen.keys()
            if scene.vitals["energy"] == level and (calm or level == "low"):
                return ["sleep"] * NAP, "wake_up", 0.8
        return None

    def _shelter(self, scene: Scene, caption: str) -> list[str] | None:
        """Build walls around, preferably in a tunnel closed by a stone; then sleep until day."""
        if scene.walled_in:
            return ["sleep"] * NAP
        can_dig = self._can_collect(scene, "stone")
        if not scene.have.get("stone", 0):
            return self._go(scene, "stone") if can_dig else None
        draw = derive_seed(0, "shelter", caption)  # chance breaks loops, as there is no memory
        ahead, back = scene.facing, OPPOSITE[scene.facing]
        front, space = scene.around[ahead]
        ways = [name for name in scene.around if scene.is_free(name)]
        if scene.is_free(ahead) and set(ways) <= {ahead, back}:  # in a tunnel: go in, or close it
            inwards = front == "path" and space == "short" and scene.around[back][1] == "open"
            return [f"move_{ahead}"] if inwards else ["place_stone"]
        if ways == [back]:  # at its end
            dig = ["do", f"move_{ahead}"] if front == "stone" and can_dig and draw % 2 else None
            return dig or [f"move_{back}", "place_stone"]
        if front == "path" and space == "short":
            return [f"move_{ahead}"]
        deep = [name for name in scene.around if scene.around[name][1] == "deep"]
        if deep and can_dig:
            if ahead in deep:
                return ["do", f"move_{ahead}", "do", f"move_{ahead}", f"move_{back}", "place_stone"]
            return [f"move_{deep[0]}", "do"]
        return None

    def _craft(self, scene: Scene, caption: str):
        """Make or place something for an achievement, now or close by."""
        for name, recipe in self._game.make.items():
            if name not in scene.have and self._affords(scene, recipe):
                if set(recipe["nearby"]) <= scene.reach:
                    return [f"make_{name}"], f"make_{name}", 0.95
        if "sapling" in scene.have and (plan := self._put(scene, "plant")):
            return plan, "place_plant", 0.9
        if "place_stone" not in scene.achieved and (plan := self._put(scene, "stone")):
            return plan, "place_stone", 0.9
        missing = self._missing(scene)
        if missing and scene.have.get("wood", 0) >= WOOD - 1 or self._waits_for_table(scene):
            way = scene.seen.get("table")
            if way and way.go:
                return self._walk(scene, way), None, 0.8
            if "table" not in scene.reach and (plan := self._put(scene, "table")):
                return [*plan, *(f"make_{name}" for name in missing)], "place_table", 0.9
        stones = scene.have.get("stone", 0)
        enough = stones >= self._game.place["furnace"]["uses"]["stone"] + ("place_stone" in scene.achieved)
        if enough and "furnace" not in scene.reach and not self._lacks(scene, "stone"):
            first = "place_furnace" not in scene.achieved
            if (first or self._waits_for_furnace(scene)) and (plan := self._put(scene, "furnace")):
                return plan, "place_furnace", 0.85
        return None

    def _gather(self, scene: Scene, caption: str):
        """Collect the next visible thing."""
        if plan := self._go(scene, "ripe plant"):
            return plan, "eat_plant", 0.9
        for kind, item, most in GATHERED:
            if scene.have.get(item, 0) < most and self._can_collect(scene, kind):
                if plan := self._go(scene, kind):
                    return plan, f"collect_{item}", 0.85
        if "collect_drink" not in scene.achieved and (plan := self._go(scene, "water")):
            return plan, "collect_drink", 0.8
        if "eat_cow" not in scene.achieved and (plan := self._go(scene, "cow", BLOWS)):
            return plan, "eat_cow", 0.8
        if not {"collect_sapling", "place_plant"} & scene.achieved:
            if plan := self._go(scene, "grass", BLOWS):
                return plan, "collect_sapling", 0.7
        for enemy in ("zombie", "skeleton"):
            if f"defeat_{enemy}" not in scene.achieved and scene.vitals["health"] == "high":
                if plan := self._go(scene, enemy, BLOWS):
                    return plan, f"defeat_{enemy}", 0.6
        return None

    def _roam(self, scene: Scene, caption: str):
        """Go straight on, also through stone; else turn, depending on the caption."""
        if scene.is_free(scene.facing):
            plan = [f"move_{scene.facing}"] * OPEN_STEPS[scene.around[scene.facing][1]]
            return plan, None, 0.3
        if self._can_collect(scene, scene.front):
            return ["do", f"move_{scene.facing}"], None, 0.3
        free = [name for name in scene.around if scene.is_free(name)]
        ways = [name for name in free if name != OPPOSITE[scene.facing]]
        ways = [name for name in ways if scene.around[name][1] == "open"] or ways
        if not ways:
            ways = [name for name, (kind, _) in scene.around.items() if self._can_collect(scene, kind)]
        ways = ways or free
        if not ways:
            return None
        way = ways[derive_seed(0, "roam", caption) % len(ways)]
        return [f"move_{way}"] * max(1, OPEN_STEPS[scene.around[way][1]]), None, 0.3

    # --- How to do it ---------------------------------------------------------------------------------------

    def _face(self, scene: Scene, kind: str, times: int = 1) -> list[str]:
        """Act on an adjacent thing."""
        if scene.front == kind:
            return ["do"] * times
        way = next(name for name, (each, _) in scene.around.items() if each == kind)
        return [f"move_{way}"] + ["do"] * times

    def _go(self, scene: Scene, kind: str, times: int = 1) -> list[str] | None:
        """Go to the nearest thing of a kind and act on it. None: no path."""
        if any(each == kind for each, _ in scene.around.values()):
            return self._face(scene, kind, times)
        sight = scene.seen.get(kind)
        if not sight or not sight.go:
            return None
        plan = self._walk(scene, sight)
        return plan + ["do"] * times if "-" not in sight.where else plan

    def _walk(self, scene: Scene, sight: Sight) -> list[str]:
        move = f"move_{sight.go}"
        kind, space = scene.around[sight.go]
        if not scene.is_free(sight.go):  # to be dug away
            return ["do", move] if scene.facing == sight.go else [move, "do", move]
        steps = STEPS[sight.far] if "-" not in sight.where else STEPS[sight.far] // 2
        return [move] * max(1, min(steps, OPEN_STEPS[space]))

    def _put(self, scene: Scene, name: str) -> list[str] | None:
        """Place something in front, if the ground allows it."""
        recipe = self._game.place[name]
        if not self._affords(scene, recipe):
            return None
        if scene.front in recipe["where"]:
            return [f"place_{name}"]
        ways = [way for way, (kind, _) in scene.around.items() if kind in recipe["where"] and kind != "lava"]
        return [f"move_{ways[0]}", f"place_{name}"] if ways else None

    # --- What there is --------------------------------------------------------------------------------------

    def _affords(self, scene: Scene, recipe: Mapping[str, Any]) -> bool:
        return all(scene.have.get(item, 0) >= amount for item, amount in recipe["uses"].items())

    def _can_collect(self, scene: Scene, kind: str) -> bool:
        """Whether a material can be removed with the available tools."""
        info = self._game.collect.get(kind)
        return bool(info) and info["leaves"] != kind and self._affords(scene, {"uses": info["require"]})

    def _missing(self, scene: Scene) -> list[str]:
        """Tools that the next stage of the technology tree needs."""
        for stage in ("wood", "stone"):
            names = [f"{stage}_{tool}" for tool in TOOLS if f"{stage}_{tool}" not in scene.have]
            if names:
                return names if stage == "wood" or scene.have.get("stone", 0) else []
        return []

    def _lacks(self, scene: Scene, stage: str) -> bool:
        return any(f"{stage}_{tool}" not in scene.have for tool in TOOLS)

    def _waits_for_table(self, scene: Scene) -> bool:
        """Whether a tool could be made with a table, and there is wood for one."""
        furnace = "furnace" in scene.reach or self._affords(scene, self._game.place["furnace"])
        return "table" not in scene.reach and any(
            name not in scene.have
            and self._affords(scene, recipe)
            and scene.have["wood"] >= recipe["uses"]["wood"] + self._game.place["table"]["uses"]["wood"]
            and (furnace or "furnace" not in recipe["nearby"])
            for name, recipe in self._game.make.items()
        )

    def _waits_for_furnace(self, scene: Scene) -> bool:
        return "table" in scene.reach and any(
            name not in scene.have and self._affords(scene, recipe)
            for name, recipe in self._game.make.items()
            if "furnace" in recipe["nearby"]
        )

    def _scores(self, scene: Scene) -> dict[str, float]:
        """Scores of actions that do not depend on the goal."""
        scores = {"noop": USELESS / 2, "sleep": USELESS if scene.vitals["energy"] == "high" else NEUTRAL}
        if {"zombie", "skeleton"} & scene.seen.keys():
            scores["sleep"] = HARMFUL
        for way, (kind, _) in scene.around.items():
            scores[f"move_{way}"] = GOOD / 2 if scene.is_free(way) else HARMFUL if kind == "lava" else NEUTRAL
        useful = self._can_collect(scene, scene.front) or scene.front in USEFUL
        scores["do"] = GOOD if useful else USELESS / 2
        for name, recipe in self._game.place.items():
            can = self._affords(scene, recipe) and scene.front in recipe["where"]
            scores[f"place_{name}"] = NEUTRAL if can and f"place_{name}" not in scene.achieved else USELESS
        for name, recipe in self._game.make.items():
            can = self._affords(scene, recipe) and set(recipe["nearby"]) <= scene.reach
            scores[f"make_{name}"] = (GOOD if name not in scene.have else USELESS / 2) if can else USELESS
        return scores


FAR = Sight("far", "", None)
EXPERTS = {"crafter": CrafterRules, "minigrid": MiniGridRules}
