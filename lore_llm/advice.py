"""What an adviser is asked and may answer, and the parser of replies.

A reply is untrusted data: its length, names and numbers are bounded, and nothing in it is executed. Each
field is validated separately: invalid ones are refused, clipped or ignored, and counted by their reason, one
of `PROBLEMS`, while the others are used.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from basics import UserError

MAX_PLAN = 15  # actions of a plan or an option
MAX_REPLY_CHARS = 20_000  # of the reply to one question
MAX_NAME = 64  # characters of a name
MAX_TEXT = 300  # characters of a description
MAX_DURATION = 1000  # steps of an option's expected duration
MAX_ACTIONS = 4096  # logits
MAX_FEATURES = 256
MAX_SKILLS = 64
MAX_NUMBER = 1e4  # logits and features are clipped to plus and minus this
MAX_FAULT = 300  # characters of a fault
MAX_STARTS = 20  # opening braces of a reply at which its JSON object may begin

WANTS = ("prior", "plan", "skills", "features")  # what a Request may ask for

PROBLEMS = {  # reason -> what was wrong with a reply
    "too_long": f"longer than {MAX_REPLY_CHARS} characters",
    "not_json": "no complete JSON object in it",
    "cut_off": "the model stopped at llm.max_output_tokens",
    "too_deep": "brackets nested too deep",
    "not_an_object": "an answer that is not a JSON object",
    "empty": "nothing usable in it",
    "no_answer": "one of several questions was not answered",
    "unknown_answer": "an answer to no question",
    "unknown_key": "a key that the format does not have",
    "logits_refused": "action_prior.logits is not one finite number for each action",
    "logits_clipped": f"logits beyond {MAX_NUMBER:g}",
    "confidence_refused": "a confidence that is not a finite number",
    "confidence_clipped": "a confidence outside of 0 to 1",
    "features_refused": "features that are not llm.features finite numbers",
    "features_clipped": f"features beyond {MAX_NUMBER:g}",
    "plan_refused": "a plan that is not a list of action names",
    "plan_clipped": f"a plan of more than {MAX_PLAN} actions",
    "subgoal_refused": "a subgoal that is not in the environment's list",
    "skills_refused": "skills that are not a list",
    "skills_clipped": "more skills than options.max_options",
    "skill_refused": "a skill with an unknown action, a bad name or a wrong type",
}


def _printable(text: str) -> str:
    if not text.isprintable():  # control characters, lone surrogates, marks that turn the direction of text
        raise ValueError("contains unprintable characters")
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
    """An option: a sequence of primitive actions, by name or index, that the actor may choose as a whole.

    `expected_duration` is in steps; `subgoal`, of the environment's list, ends the option when reached.
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
    """One number for each action, in the order of the action list. Higher is better."""

    logits: Annotated[tuple[float, ...], Field(max_length=MAX_ACTIONS), BeforeValidator(_as_tuple)]


class Advice(_Strict):
    """Advice about one situation. Absent fields are None or empty."""

    action_prior: ActionPrior | None = None
    confidence: Share = 0.5
    features: Annotated[tuple[float, ...], Field(max_length=MAX_FEATURES), BeforeValidator(_as_tuple)] = ()
    plan: Annotated[tuple[Name, ...], Field(max_length=MAX_PLAN), BeforeValidator(_as_tuple)] = ()
    subgoal: Name | None = None
    skills: Annotated[tuple[OptionSpec, ...], Field(max_length=MAX_SKILLS), BeforeValidator(_as_tuple)] = ()


@dataclass(frozen=True)
class AdviceSpec:
    """What advice about an environment may contain."""

    actions: tuple[str, ...]
    subgoals: tuple[str, ...]
    features: int  # number of features
    max_chars: int  # of the reply to one question
    max_skills: int

    def __post_init__(self):
        for name in (*self.actions, *self.subgoals):
            if not 0 < len(name) <= MAX_NAME or not name.isprintable() or name != _one_line(name):
                raise UserError(
                    f"{ascii(name)} cannot name an action or a subgoal: it needs 1 to {MAX_NAME} printable "
                    "characters, without spaces at its ends."
                )
        if not 0 < len(set(self.actions)) == len(self.actions) <= MAX_ACTIONS:
            raise UserError(f"An adviser needs 1 to {MAX_ACTIONS} actions with different names.")

    @property
    def digest(self) -> str:
        """A hash of what the prompt says about the environment, for the cache key."""
        parts = [self.actions, self.subgoals, self.features, self.max_skills]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Request:
    """A question about one environment: its caption, and which of `WANTS` the advice should contain."""

    caption: str
    wants: frozenset[str]
    obs: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # without batch axis


class Answer(NamedTuple):
    """The answer to one Request: advice or None, and what was wrong with the reply by reason (`PROBLEMS`)."""

    advice: Advice | None
    problems: Counter[str]


class AdviserFault(Exception):
    """One call brought no answer.

    `kind` is one of timeout, network, auth, http_408, http_429, http_4xx, http_5xx, bad_reply, program,
    adapter; `retry` says whether the same call may succeed later, `after_s` how long the server asks to wait
    before that. The text must not contain a key.
    """

    def __init__(self, kind: str, text: str = "", retry: bool = False, after_s: float | None = None):
        line = f"{kind}: {text}" if text else kind
        super().__init__("".join(c if c.isprintable() else "?" for c in line[:MAX_FAULT]))
        self.kind = kind
        self.retry = retry
        self.after_s = after_s


# --- Reading replies ---------------------------------------------------------------------------------------


def parse_reply(reply: str | Mapping | Advice | None, spec: AdviceSpec) -> Answer:
    """Read the reply to one question: JSON text, also with other text around it, or its content.

    Never raises.
    """
    problems: Counter[str] = Counter()
    if reply is None:
        return Answer(None, problems)
    if isinstance(reply, Advice):
        reply = reply.model_dump(exclude_defaults=True)
    found = _to_dict(reply, spec.max_chars, problems)
    advice = None if found is None else _read(found, spec, problems)
    return Answer(advice, +problems)  # without zeros


def parse_replies(reply: str | Mapping, spec: AdviceSpec, count: int) -> list[Answer]:
    """Read the reply to `count` questions of one call: `{"answers": [{"number": 1, ...}, ...]}`.

    The reply to one question may also be the answer itself. Never raises.
    """
    shared: Counter[str] = Counter()  # problems of the whole reply are counted with the first answer
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
        answers[number] = parse_reply({k: v for k, v in item.items() if k != "number"}, spec)
    replies = [answers.get(number) or Answer(None, Counter(no_answer=1)) for number in range(1, count + 1)]
    replies[0].problems.update(+shared)
    return replies


def _to_dict(reply: Any, max_chars: int, problems: Counter[str]) -> dict[str, Any] | None:
    if isinstance(reply, Mapping):
        return dict(reply)
    if not isinstance(reply, str):
        problems["not_an_object"] += 1
    elif len(reply) > max_chars:
        problems["too_long"] += 1
    else:
        return _first_object(reply, problems)
    return None


def _first_object(text: str, problems: Counter[str]) -> dict[str, Any] | None:
    """The first JSON object in a text."""
    for brace in itertools.islice(re.finditer("{", text), MAX_STARTS):
        try:
            return json.JSONDecoder().raw_decode(text, brace.start())[0]
        except RecursionError:
            problems["too_deep"] += 1
            return None
        except json.JSONDecodeError as error:
            if error.pos >= len(text) or error.msg.startswith("Unterminated"):
                break  # the reply was cut off: objects inside of it are not the reply
        except ValueError:  # an integer of thousands of digits
            break
    problems["not_json"] += 1
    return None


def _read(found: Mapping[str, Any], spec: AdviceSpec, problems: Counter[str]) -> Advice | None:
    """Read each field by itself; one that is not valid is counted and left out."""
    problems["unknown_key"] += sum(key not in READERS for key in found)
    fields = {}
    for name, (reason, read) in READERS.items():
        if found.get(name) is None:
            continue
        try:
            fields[name] = read(found[name], spec, problems)
        except (TypeError, ValueError, OverflowError):  # pydantic's errors are ValueErrors
            problems[reason] += 1
    fields = {name: value for name, value in fields.items() if name == "confidence" or value}
    if not fields.keys() - {"confidence"}:
        problems["empty"] += 1
        return None
    return Advice(**fields)


def _number(value: Any) -> float:
    """A finite number. Booleans and text are not numbers."""
    if not isinstance(value, int | float | np.integer | np.floating) or isinstance(value, bool):
        raise TypeError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _numbers(value: Any, count: int, clipped: str, problems: Counter[str]) -> tuple[float, ...]:
    """Exactly `count` finite numbers, each clipped to plus and minus MAX_NUMBER."""
    if not isinstance(value, list | tuple) or len(value) != count:
        raise TypeError
    numbers = tuple(_number(each) for each in value)
    bounded = tuple(min(max(number, -MAX_NUMBER), MAX_NUMBER) for number in numbers)
    problems[clipped] += bounded != numbers
    return bounded


def _prior(value: Any, spec: AdviceSpec, problems: Counter[str]) -> ActionPrior | None:
    if not isinstance(value, dict):
        raise TypeError
    problems["unknown_key"] += sum(key != "logits" for key in value)
    if (logits := value.get("logits")) is None:
        return None
    if isinstance(logits, dict) and set(logits) == set(spec.actions):  # by name, as the schema asks
        logits = [logits[name] for name in spec.actions]
    return ActionPrior(logits=_numbers(logits, len(spec.actions), "logits_clipped", problems))


def _features(value: Any, spec: AdviceSpec, problems: Counter[str]) -> tuple[float, ...]:
    if isinstance(value, list | tuple) and not value:  # models leave empty what was not asked for
        return ()
    return _numbers(value, spec.features, "features_clipped", problems)


def _confidence(value: Any, spec: AdviceSpec, problems: Counter[str]) -> float:
    number = _number(value)
    problems["confidence_clipped"] += not 0 <= number <= 1
    return min(max(number, 0.0), 1.0)


def _subgoal(value: Any, spec: AdviceSpec, problems: Counter[str]) -> str:
    if not isinstance(value, str) or value not in spec.subgoals:
        raise ValueError
    return value


def _plan(value: Any, spec: AdviceSpec, problems: Counter[str]) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise TypeError
    plan = tuple(value[:MAX_PLAN])
    if not all(isinstance(name, str) and name in spec.actions for name in plan):
        raise ValueError
    problems["plan_clipped"] += len(value) > MAX_PLAN
    return plan


def _skills(value: Any, spec: AdviceSpec, problems: Counter[str]) -> tuple[OptionSpec, ...]:
    if not isinstance(value, list | tuple):
        raise TypeError
    allowed = min(spec.max_skills, MAX_SKILLS)
    problems["skills_clipped"] += len(value) > allowed
    skills = []
    for each in value[:allowed]:
        try:
            skills.append(_skill(each, spec, problems))
        except (TypeError, ValueError, OverflowError):
            problems["skill_refused"] += 1
    return tuple(skills)


def _skill(value: Any, spec: AdviceSpec, problems: Counter[str]) -> OptionSpec:
    if not isinstance(value, dict):
        raise TypeError
    fields = {key: value[key] for key in OptionSpec.model_fields if key in value}
    problems["unknown_key"] += len(value) - len(fields)
    if isinstance(fields.get("primitive_actions"), list | tuple):
        fields.setdefault("expected_duration", len(fields["primitive_actions"]))
    fields["confidence"] = _confidence(fields.get("confidence", 0.5), spec, problems)
    if fields.get("subgoal") is not None and fields["subgoal"] not in spec.subgoals:
        del fields["subgoal"]
        problems["subgoal_refused"] += 1
    skill = OptionSpec(**fields)
    for action in skill.primitive_actions:
        if not (action in spec.actions if isinstance(action, str) else action < len(spec.actions)):
            raise ValueError
    return skill


READERS = {  # field of a reply -> the reason if it is refused, and its reader
    "action_prior": ("logits_refused", _prior),
    "confidence": ("confidence_refused", _confidence),
    "features": ("features_refused", _features),
    "plan": ("plan_refused", _plan),
    "subgoal": ("subgoal_refused", _subgoal),
    "skills": ("skills_refused", _skills),
}


# --- The schema of replies ---------------------------------------------------------------------------------


def reply_schema(spec: AdviceSpec, wants: frozenset[str]) -> dict[str, Any]:
    """The JSON schema of the answer to one question, for servers that support schemas.

    Logits are requested by action name, since models miscount plain lists. The schema has no bounds of lists
    and numbers: Gemini refuses schemas with many of them, and `parse_reply` checks them anyway.
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
        duration = {"type": "integer"}
        skill = _object(
            name=text, description=text, primitive_actions=actions, expected_duration=duration,
            confidence=number,
        )  # fmt: skip
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
