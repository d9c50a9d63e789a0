"""The embedded adviser: scripted experts for Crafter and MiniGrid that read captions, as a model does.

They know nothing but the caption and the recipes of the game, keep no memory from one question to the next,
and answer in the same form as a model, through the same parser. `llm.rules_quality` makes them worse on
purpose, for experiments. Say "scripted adviser" of whatever was measured with them.
"""

import random
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from basics import UserError, derive_seed
from lore_llm.advice import MAX_PLAN, AdviceSpec, Answer, Request, parse_reply
from lore_llm.backends import LLMAdapter
from lore_llm.captions import Captioner

VERSION = 1  # goes up with every change of what the rules say: cached answers are of one version

# Logits, from the best action down to what does harm.
BEST, GOOD, NEUTRAL, USELESS, HARMFUL = 4.0, 1.0, 0.0, -2.0, -4.0


@dataclass
class Verdict:
    """What an expert says of a caption."""

    best: str  # the action to do now
    scores: dict[str, float]  # of the other actions, by name; NEUTRAL where absent
    plan: list[str] = field(default_factory=list)  # actions from now on, the best one first
    subgoal: str | None = None
    confidence: float = 0.5


class Expert(Protocol):
    """Knows one kind of captions."""

    def judge(self, caption: str) -> Verdict: ...

    def skills(self, caption: str) -> list[dict[str, Any]]: ...


class Rules(LLMAdapter):
    """Answers at once, without network or key.

    The captioner says which expert knows its captions. What is random depends on seed and caption only.
    Raises UserError where no expert knows the captions.
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

    def advise(self, requests: Sequence[Request]) -> list[Answer]:
        return [Answer(*parse_reply(self._say(request), self.spec)) for request in requests]

    def _say(self, request: Request) -> dict[str, Any]:
        """The reply to one question, as a model would write it in JSON."""
        actions = self.spec.actions
        verdict = self._expert.judge(request.caption)
        scores = {name: verdict.scores.get(name, NEUTRAL) for name in actions} | {verdict.best: BEST}
        logits = [scores[name] for name in actions]
        plan = verdict.plan or [verdict.best]
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
    """What stands behind `start` in a caption's line; nothing if there is no such line."""
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
    """Fetches the key, opens the door, goes to the goal; else does what the mission says of one thing.

    Where nothing of use is seen it goes east, then along the walls clockwise: that comes round, and needs
    no memory.
    """

    def judge(self, caption: str) -> Verdict:
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
        """(things, action before them or None to step onto them, subgoal, confidence), by urgency."""
        mission = _line(caption, "Mission:")
        key_color = carried.removesuffix(" key") if carried.endswith(" key") else None
        wanted = None if "goal" in mission else WANTED.search(mission)
        if wanted:
            matching = [
                thing
                for thing in things
                if thing.kind == wanted["kind"] and wanted["color"] in (None, thing.color)
            ]
            if mission.startswith(("go to", "find")):
                yield matching, "done", "face_object", 0.6
            elif carried == "nothing" and wanted["kind"] != "door":
                yield matching, "pickup", f"pick_up_{wanted['kind']}", 0.8
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
        """What actions are worth whatever the aim is."""
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

    def _things(self, told: str) -> list[Thing]:
        """The list of what is seen, the nearest first."""
        things = []
        for words in told.split("; "):
            found = THING.match(words)
            if found:
                side = int(found["side"] or 0) * (-1 if found["hand"] == "left" else 1)
                place = side, int(found["ahead"] or 0)
                things.append(Thing(found["kind"], found["color"] or "", found["state"] or "", place))
        return things

    def _free(self, caption: str, things: list[Thing]) -> set[Place]:
        """Where one can stand, as far as it is seen."""
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
        """The shortest way until `target` is ahead, or until one stands there (`walk_in`); None: no way."""
        start = (0, 0), AHEAD  # where, and where one looks
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


EXPERTS: dict[str, type[Expert]] = {"minigrid": MiniGridRules}
