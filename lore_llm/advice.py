"""What an adviser is asked and may answer, and the reader of replies, which trusts nothing.

A reply is data: its length, depth, names and numbers are bounded, and nothing in it is executed. What does
not fit is refused, clipped or ignored field by field, so that a bad plan does not lose good logits, and
counted by its reason, one of `PROBLEMS`.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from basics import UserError

MAX_PLAN = 15  # actions of a plan or a skill
MAX_NAME = 64  # characters of a name
MAX_TEXT = 300  # characters of a description
MAX_DURATION = 1000  # steps that a skill may be expected to take
MAX_ACTIONS = 4096  # logits
MAX_FEATURES = 256
MAX_SKILLS = 64
MAX_DEPTH = 8  # of brackets in a reply; the format needs 6
MAX_NUMBER = 1e4  # logits and features beyond plus and minus this are clipped
MAX_DIGITS = 18  # of an integer in a reply; longer ones are read as floats

WANTS = ("prior", "plan", "skills", "features")  # what a Request may ask for
FIELDS = ("action_prior", "confidence", "features", "plan", "subgoal", "skills")  # of a reply

PROBLEMS = {  # reason -> what was wrong with a reply
    "too_long": "longer than llm.max_reply_chars",
    "not_json": "no whole JSON object in it",
    "cut_off": "the model stopped at llm.max_output_tokens",
    "too_deep": f"brackets nested deeper than {MAX_DEPTH}",
    "not_an_object": "an answer that is no JSON object",
    "empty": "nothing usable in it",
    "no_answer": "one of several questions was not answered",
    "unknown_answer": "an answer to no question",
    "duplicate_key": "a key that stands twice in an object; neither counts",
    "unknown_key": "a key that the format does not know",
    "logits_refused": "action_prior.logits is not one finite number for each action",
    "logits_clipped": f"logits beyond {MAX_NUMBER:g}",
    "confidence_refused": "a confidence that is no finite number",
    "confidence_clipped": "a confidence outside of 0 to 1",
    "features_refused": "features that are not as many finite numbers as llm.features says",
    "features_clipped": f"features beyond {MAX_NUMBER:g}",
    "plan_refused": "a plan that is no list of action names",
    "plan_clipped": f"a plan of more than {MAX_PLAN} actions",
    "subgoal_refused": "a subgoal that is not in the environment's list",
    "skills_refused": "skills that are no list",
    "skills_clipped": "more skills than options.max_options",
    "skill_refused": "a skill with an unknown action, a bad name or a wrong type",
}


def _printable(text: str) -> str:
    if not text.isprintable():  # control characters, lone surrogates, marks that turn the direction of text
        raise ValueError("has characters that cannot be printed")
    return text


def _one_line(value: Any) -> Any:
    return " ".join(value.split()) if isinstance(value, str) else value


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Name = Annotated[
    str, Field(min_length=1, max_length=MAX_NAME), AfterValidator(_printable), BeforeValidator(_one_line)
]
Text = Annotated[str, Field(max_length=MAX_TEXT), AfterValidator(_printable), BeforeValidator(_one_line)]
Index = Annotated[int, Field(ge=0, lt=MAX_ACTIONS)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class OptionSpec(_Strict):
    """A skill: a sequence of primitive actions, by name or index, that the actor may choose as a whole.

    `expected_duration` is in steps; `subgoal`, of the environment's list, ends the skill when it is reached.
    """

    option_id: Name | None = None
    name: Name
    description: Text = ""
    primitive_actions: Annotated[
        tuple[Name | Index, ...], Field(min_length=1, max_length=MAX_PLAN), BeforeValidator(_as_tuple)
    ]
    expected_duration: Annotated[int, Field(ge=1, le=MAX_DURATION)]
    confidence: Share
    subgoal: Name | None = None


class ActionPrior(_Strict):
    """One number for each action, in the order of the action list: the higher, the better the action."""

    logits: Annotated[tuple[float, ...], Field(max_length=MAX_ACTIONS), BeforeValidator(_as_tuple)]


class Advice(_Strict):
    """What an adviser says of one situation. Absent parts are None or empty."""

    action_prior: ActionPrior | None = None
    confidence: Share = 0.5
    features: Annotated[tuple[float, ...], Field(max_length=MAX_FEATURES), BeforeValidator(_as_tuple)] = ()
    plan: Annotated[tuple[Name, ...], Field(max_length=MAX_PLAN), BeforeValidator(_as_tuple)] = ()
    subgoal: Name | None = None
    skills: Annotated[tuple[OptionSpec, ...], Field(max_length=MAX_SKILLS), BeforeValidator(_as_tuple)] = ()


@dataclass(frozen=True)
class AdviceSpec:
    """What a reply may say about an environment: everything else is refused."""

    actions: tuple[str, ...]
    subgoals: tuple[str, ...]
    features: int  # how many numbers
    max_chars: int  # of the reply to one question
    max_skills: int

    def __post_init__(self):
        for name in (*self.actions, *self.subgoals):
            if not 0 < len(name) <= MAX_NAME or not name.isprintable() or name != _one_line(name):
                raise UserError(
                    f"{ascii(name)} cannot name an action or a subgoal: it needs 1 to {MAX_NAME} characters "
                    "that can be printed, without spaces at its ends."
                )
        if not 0 < len(set(self.actions)) == len(self.actions) <= MAX_ACTIONS:
            raise UserError(f"An adviser needs 1 to {MAX_ACTIONS} actions, each with a name of its own.")
        if not 0 <= self.features <= MAX_FEATURES:
            raise UserError(f"--llm.features {self.features} is not from 0 to {MAX_FEATURES}.")

    @property
    def digest(self) -> str:
        """Names what the prompt says of the environment, for the key of the cache."""
        told = [self.actions, self.subgoals, self.features, self.max_skills]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Request:
    """A question about one environment: what is seen there, and which of `WANTS` the reply should hold."""

    caption: str
    wants: frozenset[str]
    obs: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # this env's, without batch axis


@dataclass(frozen=True)
class Answer:
    """What came back for one Request: advice, or None, and what was wrong with it by reason (`PROBLEMS`)."""

    advice: Advice | None
    problems: Counter[str] = dataclasses.field(default_factory=Counter)


class AdviserFault(Exception):
    """One call brought no answer.

    `kind` is one of timeout, network, auth, http_408, http_429, http_4xx, http_5xx, bad_reply, program,
    adapter; `retry` says whether the same call may succeed later, `after_s` how long the server asks to wait
    for that. The text never holds a key.
    """

    def __init__(self, kind: str, text: str = "", retry: bool = False, after_s: float | None = None):
        super().__init__(f"{kind}: {text}" if text else kind)
        self.kind = kind
        self.retry = retry
        self.after_s = after_s


def parse_reply(reply: str | bytes | Mapping, spec: AdviceSpec) -> tuple[Advice | None, Counter[str]]:
    """Read the reply to one question: its JSON text, also with other text around it, or what that says.

    Returns the advice, None where nothing in it is usable, and what was wrong by reason. Never raises.
    """
    problems: Counter[str] = Counter()
    found = _to_dict(reply, spec.max_chars, problems)
    advice = None if found is None else _read(found, spec, problems)
    return advice, +problems  # without zeros


def parse_replies(reply: str | bytes | Mapping, spec: AdviceSpec, count: int) -> list[Answer]:
    """Read the reply to `count` questions of one call: `{"answers": [{"number": 1, ...}, ...]}`.

    The reply to one question may also be the bare answer. Never raises.
    """
    shared: Counter[str] = Counter()  # problems of the reply as a whole are told with the first answer
    found = _to_dict(reply, spec.max_chars * count, shared)
    if found is None:
        return [Answer(None, shared if i == 0 else Counter(no_answer=1)) for i in range(count)]
    items = found.get("answers")
    if count == 1 and items is None:
        items = [found | {"number": 1}]
    answers: dict[int, Answer] = {}
    for item in items if isinstance(items, list | tuple) else []:
        number = item.get("number") if isinstance(item, dict) else None
        if type(number) is not int or not 1 <= number <= count or number in answers:
            shared["unknown_answer"] += 1
            continue
        said = {key: value for key, value in item.items() if key != "number"}
        answers[number] = Answer(*parse_reply(said, spec))
    replies = [answers.get(number) or Answer(None, Counter(no_answer=1)) for number in range(1, count + 1)]
    replies[0].problems.update(+shared)
    return replies


def reply_schema(spec: AdviceSpec, wants: frozenset[str]) -> dict[str, Any]:
    """The JSON schema of the answer to one question, for servers that can hold a model to it.

    Logits are asked for by the actions' names: models miscount bare lists. There are no bounds of lists and
    numbers in it: Gemini refuses schemas with many of them, and `parse_reply` sees to them anyway.
    """
    number = {"type": "number"}
    text = {"type": "string"}
    actions = {"type": "array", "items": {"type": "string", "enum": list(spec.actions)}}
    fields: dict[str, Any] = {}
    if "prior" in wants:
        fields["action_prior"] = _object(logits=_object(**dict.fromkeys(spec.actions, number)))
    fields["confidence"] = number
    if "features" in wants and spec.features:
        fields["features"] = {"type": "array", "items": number}
    if "plan" in wants:
        fields["plan"] = actions
        if spec.subgoals:
            fields["subgoal"] = {"type": "string", "enum": list(spec.subgoals)}
    if "skills" in wants and spec.max_skills:
        skill = _object(
            name=text,
            description=text,
            primitive_actions=actions,
            expected_duration={"type": "integer"},
            confidence=number,
        )
        fields["skills"] = {"type": "array", "items": skill}
    return _object(**fields)


def replies_schema(spec: AdviceSpec, wants: frozenset[str]) -> dict[str, Any]:
    """The JSON schema of the reply to the questions of one call, as `parse_replies` reads it."""
    answer = _object(number={"type": "integer"}, **reply_schema(spec, wants)["properties"])
    return _object(answers={"type": "array", "items": answer})


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _to_dict(reply: str | bytes | Mapping, max_chars: int, problems: Counter[str]) -> dict[str, Any] | None:
    if isinstance(reply, Mapping):
        try:
            return dict(reply)
        except Exception:  # of any kind: a mapping of a user's own code
            problems["not_an_object"] += 1
            return None
    if not isinstance(reply, str | bytes):
        problems["not_an_object"] += 1
        return None
    if len(reply) > max_chars * (4 if isinstance(reply, bytes) else 1):  # UTF-8 has up to 4 bytes a character
        problems["too_long"] += 1
        return None
    text = reply.decode("utf-8", "replace") if isinstance(reply, bytes) else reply
    if len(text) > max_chars:
        problems["too_long"] += 1
        return None
    return _first_object(text, problems)


# A whole string, whose brackets do not count; or a bracket; or the quote of a string that has no end.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*+"|[{}\[\]"]', re.DOTALL)


def _first_object(text: str, problems: Counter[str]) -> dict[str, Any] | None:
    """The first balanced {...} in a text that is JSON. No character is looked at more than a few times."""
    start = text.find("{")
    while start >= 0:
        depth = 0
        end = None
        for token in _TOKEN.finditer(text, start):
            mark = token.group()
            if mark == '"':
                break
            depth += (mark in "{[") - (mark in "}]")
            if depth > MAX_DEPTH:
                problems["too_deep"] += 1
                return None
            if depth == 0:
                end = token.end()
                break
        if end is None:  # cut off in the middle: what stands inside of it is not the reply
            break
        doubles: Counter[str] = Counter()
        try:
            found = json.loads(
                text[start:end],
                object_pairs_hook=lambda pairs, doubles=doubles: _unique(pairs, doubles),
                parse_int=lambda digits: int(digits) if len(digits) <= MAX_DIGITS else float(digits),
            )
        except ValueError:
            start = text.find("{", end)
            continue
        problems.update(doubles)
        return found
    problems["not_json"] += 1
    return None


def _unique(pairs: list[tuple[str, Any]], problems: Counter[str]) -> dict[str, Any]:
    counts = Counter(key for key, _ in pairs)
    problems["duplicate_key"] += len(pairs) - len(counts)
    return {key: value for key, value in pairs if counts[key] == 1}


def _read(found: Mapping[str, Any], spec: AdviceSpec, problems: Counter[str]) -> Advice | None:
    problems["unknown_key"] += sum(key not in FIELDS for key in found)
    prior = found.get("action_prior")
    logits = None
    if isinstance(prior, dict):
        problems["unknown_key"] += sum(key != "logits" for key in prior)
        logits = prior.get("logits")
        if isinstance(logits, dict) and set(logits) == set(spec.actions):  # by name, as the schema asks
            logits = [logits[name] for name in spec.actions]
        logits = _numbers(logits, len(spec.actions), "logits", problems)
    elif prior is not None:
        problems["logits_refused"] += 1
    features = found.get("features")
    if isinstance(features, list | tuple) and not features:  # as what was not asked for
        features = None
    features = _numbers(features, spec.features, "features", problems)
    plan = _plan(found.get("plan"), spec, problems)
    subgoal = _subgoal(found.get("subgoal"), spec, problems)
    skills = _skills(found.get("skills"), spec, problems)
    advice = None
    if logits or features or plan or subgoal or skills:
        advice = Advice(
            action_prior=ActionPrior(logits=logits) if logits else None,
            confidence=_confidence(found, problems),
            features=features or (),
            plan=plan,
            subgoal=subgoal,
            skills=skills,
        )
    else:
        problems["empty"] += 1
    return advice


def _number(value: Any) -> float | None:
    """A finite number, or None; True and False are none."""
    if not isinstance(value, int | float | np.integer | np.floating) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _numbers(value: Any, count: int, what: str, problems: Counter[str]) -> tuple[float, ...] | None:
    """Exactly `count` finite numbers, each clipped to plus and minus MAX_NUMBER, or None."""
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != count:
        problems[f"{what}_refused"] += 1
        return None
    numbers = [_number(each) for each in value]
    if None in numbers:
        problems[f"{what}_refused"] += 1
        return None
    clipped = tuple(min(max(number, -MAX_NUMBER), MAX_NUMBER) for number in numbers)
    problems[f"{what}_clipped"] += clipped != tuple(numbers)
    return clipped


def _confidence(found: Mapping[str, Any], problems: Counter[str]) -> float:
    default = Advice.model_fields["confidence"].default
    if found.get("confidence") is None:
        return default
    number = _number(found["confidence"])
    if number is None:
        problems["confidence_refused"] += 1
        return default
    problems["confidence_clipped"] += not 0 <= number <= 1
    return min(max(number, 0.0), 1.0)


def _subgoal(value: Any, spec: AdviceSpec, problems: Counter[str]) -> str | None:
    if value is None or (isinstance(value, str) and value in spec.subgoals):
        return value
    problems["subgoal_refused"] += 1
    return None


def _plan(value: Any, spec: AdviceSpec, problems: Counter[str]) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        problems["plan_refused"] += 1
        return ()
    plan = tuple(value[:MAX_PLAN])
    if not all(isinstance(name, str) and name in spec.actions for name in plan):
        problems["plan_refused"] += 1
        return ()
    problems["plan_clipped"] += len(value) > MAX_PLAN
    return plan


def _skills(value: Any, spec: AdviceSpec, problems: Counter[str]) -> tuple[OptionSpec, ...]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        problems["skills_refused"] += 1
        return ()
    allowed = min(spec.max_skills, MAX_SKILLS)
    problems["skills_clipped"] += len(value) > allowed
    skills = [_skill(each, spec, problems) for each in value[:allowed]]
    problems["skill_refused"] += skills.count(None)
    return tuple(skill for skill in skills if skill is not None)


def _skill(value: Any, spec: AdviceSpec, problems: Counter[str]) -> OptionSpec | None:
    if not isinstance(value, dict):
        return None
    fields = {key: value[key] for key in OptionSpec.model_fields if key in value}
    problems["unknown_key"] += len(value) - len(fields)
    actions = fields.get("primitive_actions")
    if isinstance(actions, list | tuple):
        fields.setdefault("expected_duration", min(max(len(actions), 1), MAX_DURATION))
    confidence = _number(fields.get("confidence", 0.5))
    if confidence is not None:
        fields["confidence"] = min(max(confidence, 0.0), 1.0)
        problems["confidence_clipped"] += fields["confidence"] != confidence
    fields["subgoal"] = _subgoal(fields.get("subgoal"), spec, problems)
    try:
        skill = OptionSpec(**fields)
    except (ValidationError, TypeError):
        return None
    known = (
        a in spec.actions if isinstance(a, str) else a < len(spec.actions) for a in skill.primitive_actions
    )
    return skill if all(known) else None
