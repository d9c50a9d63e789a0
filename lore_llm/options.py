"""The library of options that the actor may choose besides actions, and the two files about it.

An option is a sequence of actions, which users know as a skill. It ends after `timeout` steps; in the env
also when its subgoal is reached or an action is blocked. Options sit in numbered slots, one for each choice
of the actor. Proposals and files are validated here, and nothing of them is executed. Plain Python and NumPy.

- `skills.yaml` is the person's, and is only read: `skills` to add, names that are `pinned` (never removed for
  poor results) and names that are `banned` (not taken from an adviser). It may be edited while training runs.
  If it has a mistake, the log says so and the last valid state stays.
- `skills_learned.yaml` is LoRe's, and is only written: the options in use, with their statistics.

Actions, duration and subgoal identify an option: with others it is another one, without statistics.
"""

import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from basics import UserError, atomic_write
from config import parse_yaml
from lore_llm.advice import MAX_NAME, MAX_PLAN, OptionSpec

PERSON_FILE = "skills.yaml"
LEARNED_FILE = "skills_learned.yaml"

STATS_DECAY = 0.98  # of older executions at each new one: the last 100 or so count, because the agent changes
MAX_ADVANTAGE = 1e6  # larger ones are clipped, so that sums stay finite
PRUNE_SIGMAS = 3.0  # a poor mean advantage is so many standard errors below 0: many, for it is tested often
FULL_SIGMAS = 1.0  # enough for the worst one if proposals find no free slot,
FULL_TRIES = 2  # and it has been tried option_min_tries times this factor
FORGET_INTERVALS = 20  # option_generation_intervals after which a removed option may be proposed again
MAX_TAG = 40  # characters of an option's name in a metric

# Fields of a skill in skills.yaml -> those of an OptionSpec.
FIELDS = {
    "name": "name",
    "actions": "primitive_actions",
    "description": "description",
    "duration": "expected_duration",
    "confidence": "confidence",
    "subgoal": "subgoal",
}

HEAD = """\
# The skills in use and their statistics, as of the last change or checkpoint. LoRe only writes this file. To
# change something, create or edit skills.yaml in this folder; it is read every 100 env steps:
#
#   skills:
#   - name: fetch_wood              # of your choice; each name once
#     actions: [move_left, do, do]  # 1 to {max_actions}, repeated until the duration is over
#     description: what it is for   # this and the following fields are optional
#     duration: 6                   # steps, at most {max_length}; default: the number of actions
#     subgoal: null                 # ends the skill when it is reached
#   pinned: [fetch_wood]            # names that are never removed for poor results
#   banned: [chop]                  # names that are removed, and not taken from an adviser again
#
# At most {max_options} skills are in use; more wait for a free slot.
"""

Key = tuple[tuple[int, ...], int, str | None]  # actions, timeout and subgoal


@dataclass
class Stats:
    """Results of an option's real executions. Means decay by STATS_DECAY."""

    tries: int = 0
    weight: float = 0.0  # sum of the weights of the executions
    squares: float = 0.0  # sum of their squares
    advantage: float = 0.0
    spread: float = 0.0  # weighted sum of squared distances from the mean advantage
    success: float = 0.0
    length: float = 0.0

    def add(self, advantage: float, success: bool, length: int) -> None:
        self.tries += 1
        self.weight = STATS_DECAY * self.weight + 1
        self.squares = STATS_DECAY**2 * self.squares + 1
        advantage = min(max(advantage, -MAX_ADVANTAGE), MAX_ADVANTAGE)
        before = advantage - self.advantage
        self.advantage += before / self.weight
        self.spread = STATS_DECAY * self.spread + before * (advantage - self.advantage)
        self.success += (success - self.success) / self.weight
        self.length += (length - self.length) / self.weight

    @property
    def error(self) -> float:
        """Standard error of the mean advantage; infinite before the second execution."""
        if self.tries < 2:
            return math.inf
        variance = self.spread / (self.weight - self.squares / self.weight)
        return math.sqrt(max(variance, 0.0) * self.squares) / self.weight

    def __str__(self) -> str:
        if not self.tries:
            return "not tried yet"
        return (
            f"{self.tries} tries: success rate {self.success:.2f}, advantage {self.advantage:.3g}"
            f" ± {self.error:.2g}, length {self.length:.1f}"
        )


@dataclass
class Option:
    """An option in a slot. Its spec has the actions' indices, and the timeout as expected duration."""

    spec: OptionSpec
    uid: int
    by: str  # adviser or person
    stats: Stats = field(default_factory=Stats)

    @property
    def timeout(self) -> int:
        return self.spec.expected_duration

    @property
    def actions(self) -> tuple[int, ...]:
        return self.spec.primitive_actions

    @property
    def key(self) -> Key:
        return _key(self.spec)

    def action(self, position: int) -> int:
        """Index of the action at a position from 0 to timeout - 1."""
        return self.actions[position % len(self.actions)]


class Refused(UserError):
    """An option that is refused: the reason, by which it is counted, and the mistake in words."""

    def __init__(self, reason: str, text: str = ""):
        super().__init__(text)
        self.reason = reason


class OptionLibrary:
    """The options in their slots, with their statistics.

    Args:
        folder: of `skills.yaml` and `skills_learned.yaml`; None reads and writes no file.
        captioner: its `actions` and `subgoals` are the names that an option may use.
        options: the config's group `options`.
    """

    def __init__(self, folder: str | Path | None, captioner: Any, options: Mapping[str, Any]):
        self._folder = folder and Path(folder)
        self._action_names = tuple(captioner.actions)
        self._subgoals = tuple(captioner.subgoals)
        self._options = options
        self._max_length = options["option_max_length"]
        self._max_actions = min(self._max_length, MAX_PLAN)
        self.slots: list[Option | None] = [None] * options["max_options"]
        self._next_uid = 1
        self._step = 0  # of the last proposals
        self._removed: dict[Key, int] = {}  # for poor results -> step
        self._removals = 0
        self._refused: Counter[str] = Counter()
        self._edits: dict[str, Any] = {}  # the content of skills.yaml when it was last valid,
        self._added: list[OptionSpec] = []  # its skills,
        self._pinned: set[str] = set()  # its pinned names,
        self._banned: dict[str, tuple[int, ...] | None] = {}  # its banned names -> actions that were removed
        self._last_read: tuple[str, str] | None = None  # text of skills.yaml, and why it could not be read
        self._lines: list[str] = []  # for the log, returned by the next poll

    def options(self) -> list[Option]:
        """Those in slots, in their order."""
        return [option for option in self.slots if option]

    def table(self) -> dict[str, np.ndarray]:
        """The slots as int64 arrays: `uids` [O] and `timeouts` [O], 0 where empty, and `actions` [O, L].

        Actions are repeated up to the timeout and 0 from there to L = option_max_length.
        """
        count = len(self.slots)
        uids, timeouts = np.zeros(count, np.int64), np.zeros(count, np.int64)
        actions = np.zeros((count, self._max_length), np.int64)
        for slot, option in enumerate(self.slots):
            if option:
                uids[slot], timeouts[slot] = option.uid, option.timeout
                actions[slot, : option.timeout] = [option.action(i) for i in range(option.timeout)]
        return {"uids": uids, "actions": actions, "timeouts": timeouts}

    # --- Proposals and performance ---------------------------------------------------------------------

    def propose(self, specs: Sequence[OptionSpec], step: int) -> list[int]:
        """Put an adviser's proposals into empty slots, and count the reasons why others are refused.

        A proposal replaces no option: `prune` makes room. Returns the slots that now hold another option.
        """
        self._step = step
        oldest = step - FORGET_INTERVALS * self._options["option_generation_interval"]
        self._removed = {key: when for key, when in self._removed.items() if when >= oldest}
        changed = []
        for spec in specs:
            try:
                spec = self._accept(spec)
            except Refused as refusal:
                self._refused[refusal.reason] += 1
                continue
            changed.append(self._insert(spec, "adviser"))
        return changed

    def _accept(self, spec: OptionSpec) -> OptionSpec:
        """The proposal with indices of actions and a name that is not taken. Raises Refused."""
        if spec.subgoal is not None and spec.subgoal not in self._subgoals:
            self._refused["unknown_subgoal"] += 1  # it is taken without the subgoal
            spec = spec.model_copy(update={"subgoal": None})
        spec = self._checked(spec)
        actions, timeout, _ = _key(spec)
        there = [option.spec for option in self.options()] + self._waiting()
        if spec.confidence < self._options["skill_confidence_threshold"]:
            raise Refused("low_confidence")
        if any(_key(other)[:2] == (actions, timeout) for other in there):
            raise Refused("duplicate")
        if any(old[:2] == (actions, timeout) for old in self._removed):
            raise Refused("removed")
        if spec.name.casefold() in self._banned or actions in self._banned.values():
            raise Refused("banned")
        if None not in self.slots or self._waiting():
            raise Refused("no_room")
        taken = {other.name.casefold() for other in there}
        name, number = spec.name, 1
        while name.casefold() in taken:
            number += 1
            name = f"{spec.name[: MAX_NAME - 1 - len(str(number))]}_{number}"
        return spec.model_copy(update={"name": name})

    def _checked(self, spec: OptionSpec) -> OptionSpec:
        """The spec with indices of actions, and a duration within its bounds. Raises Refused."""
        actions, most = spec.primitive_actions, self._max_actions
        if len(actions) > most:
            text = f"{len(actions)} actions; it must be 1 to {most} (options.option_max_length)"
            raise Refused("too_long", text)
        duration = min(max(len(actions), spec.expected_duration), self._max_length)
        indices = tuple(self._index(action) for action in actions)
        return spec.model_copy(update={"primitive_actions": indices, "expected_duration": duration})

    def _index(self, action: str | int) -> int:
        names = self._action_names
        if isinstance(action, int):
            if action < len(names):
                return action
            text = f"there is no action {action}; they are numbered 0 to {len(names) - 1}"
            raise Refused("unknown_action", text)
        folded = [name.casefold() for name in names]
        if action in names:
            return names.index(action)
        if action.casefold() in folded:
            return folded.index(action.casefold())
        raise Refused("unknown_action", f"there is no action {action}{_nearest(action, names)}")

    def _insert(self, spec: OptionSpec, by: str) -> int:
        slot, uid = self.slots.index(None), self._next_uid
        self.slots[slot] = Option(spec.model_copy(update={"option_id": str(uid)}), uid, by)
        self._next_uid += 1
        return slot

    def record(self, uid: int, advantage: float, success: bool, length: int) -> None:
        """Count one real execution that ended: how much better it was than expected, and its steps.

        An option that was removed meanwhile, and an advantage that is not finite, are ignored.
        """
        for option in self.options():
            if option.uid == uid and math.isfinite(advantage):
                option.stats.add(float(advantage), bool(success), int(length))

    def prune(self) -> list[int]:
        """Empty the slots of options that do harm; returns these slots.

        An option is removed after `option_min_tries` if its mean advantage is below 0 by PRUNE_SIGMAS
        standard errors. If all slots are taken and none is, one is removed that is below 0 by FULL_SIGMAS
        after FULL_TRIES times the tries: that with the lowest upper bound. Pinned ones always stay.
        """
        tries = self._options["option_min_tries"]
        poor = self._below_zero(PRUNE_SIGMAS, tries)
        if not poor and None not in self.slots:
            poor = self._below_zero(FULL_SIGMAS, FULL_TRIES * tries)[:1]
        for slot in poor:
            option = self.slots[slot]
            self._lines.append(f"Skill {option.spec.name} removed after {option.stats}")
            self.slots[slot] = None
            self._removals += 1
            self._removed[option.key] = self._step
        return sorted(poor)

    def _below_zero(self, sigmas: float, tries: int) -> list[int]:
        """Slots of unpinned options whose upper bound of the mean advantage is below 0, the lowest first."""
        bounds = {
            slot: option.stats.advantage + sigmas * option.stats.error
            for slot, option in enumerate(self.slots)
            if option and not self.is_pinned(option.spec) and option.stats.tries >= tries
        }
        return sorted((slot for slot, bound in bounds.items() if bound < 0), key=bounds.__getitem__)

    def is_pinned(self, spec: OptionSpec) -> bool:
        return spec.name.casefold() in self._pinned

    def metrics(self) -> dict[str, float]:
        """How many options there are and what they achieve, for the logger."""
        options = self.options()
        metrics = {
            "options/count": float(len(options)),
            "options/removed": float(self._removals),
            "options/refused": float(sum(self._refused.values())),
        }
        metrics |= {f"options/refused/{reason}": float(count) for reason, count in self._refused.items()}
        if tried := [option.stats for option in options if option.stats.tries]:
            metrics["options/avg_success_rate"] = sum(stats.success for stats in tried) / len(tried)
            metrics["options/mean_length"] = sum(stats.length for stats in tried) / len(tried)
        for option in options:
            tag = re.sub(r"[^\w.-]+", "_", option.spec.name)[:MAX_TAG]
            if f"options/{tag}/tries" in metrics:
                tag = f"{tag}_{option.uid}"
            metrics[f"options/{tag}/tries"] = float(option.stats.tries)
            if option.stats.tries:
                metrics[f"options/{tag}/success_rate"] = option.stats.success
                metrics[f"options/{tag}/advantage"] = option.stats.advantage
        return metrics

    # --- Files -----------------------------------------------------------------------------------------

    def poll(self) -> tuple[list[int], list[str]]:
        """Read skills.yaml, and give empty slots to its skills that wait for one.

        Returns the slots that hold another option now, or none any more, and lines for the log.
        """
        before = [option and option.uid for option in self.slots]
        if self._folder:
            self._read()
        for spec in self._waiting():
            if None in self.slots:
                self._insert(spec, "person")
        changed = [i for i, option in enumerate(self.slots) if (option and option.uid) != before[i]]
        lines, self._lines = self._lines, []
        return changed, lines

    def _read(self) -> None:
        text, fault = "", ""
        try:
            text = (self._folder / PERSON_FILE).read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            pass
        except UnicodeDecodeError:
            fault = f"{PERSON_FILE}: not a text file in UTF-8"
        except OSError as error:
            fault = f"{PERSON_FILE}: cannot be read: {error.strerror or error}"
        if (text, fault) == self._last_read:
            return
        self._last_read = text, fault
        try:
            if fault:
                raise UserError(fault)
            edits = parse_yaml(text, PERSON_FILE) or {}
            added = self._parse(edits)
        except UserError as error:
            self._lines.append(f"{error}; the last valid state stays")
        else:
            if edits != self._edits:
                self._apply(edits, added)

    def _parse(self, edits: Any) -> list[OptionSpec]:
        """The skills of skills.yaml, with indices of actions. Raises UserError at the first mistake."""
        if not isinstance(edits, dict):
            raise UserError(f"{PERSON_FILE}: it must have the keys skills, pinned or banned")
        for key, value in edits.items():
            if key not in ("skills", "pinned", "banned"):
                known = _nearest(str(key), ("skills", "pinned", "banned"))
                raise UserError(f"{PERSON_FILE}: there is no key {_shown(key)}{known}")
            if not isinstance(value, list | None):
                raise UserError(f"{PERSON_FILE}: {key} must be a list")
            if key != "skills" and not all(isinstance(name, str) for name in value or []):
                raise UserError(f"{PERSON_FILE}: {key} must be a list of names")
        specs: list[OptionSpec] = []
        for number, entry in enumerate(edits.get("skills") or [], 1):
            try:
                spec = self._parse_entry(entry)
                if spec.name.casefold() in {other.name.casefold() for other in specs}:
                    raise UserError("another one has this name")
                if _key(spec) in map(_key, specs):
                    raise UserError("another one has the same actions, duration and subgoal")
            except UserError as error:
                name = entry.get("name", "") if isinstance(entry, dict) else ""
                title = f"skill {number} ({_shown(name)})" if name else f"skill {number}"
                raise UserError(f"{PERSON_FILE}: {title}: {error}") from None
            specs.append(spec)
        return specs

    def _parse_entry(self, entry: Any) -> OptionSpec:
        """Raises UserError that names the mistake and the nearest valid value."""
        if not isinstance(entry, dict):
            raise UserError("it must have fields such as name: and actions:")
        for name in entry:
            if name not in FIELDS:
                raise UserError(f"there is no field {_shown(name)}{_nearest(str(name), FIELDS)}")
        actions = entry.get("actions")
        values = {"confidence": 1.0, "duration": len(actions) if isinstance(actions, list) else 1}
        values |= {name: value for name, value in entry.items() if value is not None}
        try:
            spec = OptionSpec(**{FIELDS[name]: value for name, value in values.items()})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = next((short for short, long in FIELDS.items() if long == first["loc"][0]), "it")
            raise UserError(f"{name}: {first['msg'].removeprefix('Value error, ')}") from None
        if spec.expected_duration > self._max_length:
            raise UserError(f"duration: at most {self._max_length} (options.option_max_length)")
        if spec.subgoal is not None and spec.subgoal not in self._subgoals:
            near = _nearest(spec.subgoal, self._subgoals)
            raise UserError(f"there is no subgoal {spec.subgoal}{near}")
        return self._checked(spec)

    def _apply(self, edits: Mapping[str, Any], added: list[OptionSpec]) -> None:
        """Apply a valid skills.yaml to the library."""
        self._edits, self._added = dict(edits), added
        self._pinned = {name.casefold() for name in edits.get("pinned") or []}
        banned = [name.casefold() for name in edits.get("banned") or []]
        self._banned = {name: self._banned.get(name) for name in banned}
        specs = {_key(spec): spec for spec in added}
        for slot, option in enumerate(self.slots):
            if option is None:
                continue
            name = option.spec.name.casefold()
            if option.key in specs:
                changes = {"option_id": option.spec.option_id}
                option.spec, option.by = specs[option.key].model_copy(update=changes), "person"
            elif option.by == "person":
                self.slots[slot] = None
            elif name in self._banned:
                self.slots[slot], self._banned[name] = None, option.actions
        lists = {"skills": [spec.name for spec in added]}
        lists |= {key: edits.get(key) or [] for key in ("pinned", "banned")}
        found = [f"{key} {', '.join(map(_shown, names))}" for key, names in lists.items() if names]
        self._lines.append(f"{PERSON_FILE} was read: {'; '.join(found) or 'it is empty'}")

    def _waiting(self) -> list[OptionSpec]:
        """A person's skills that are in no slot, and were not removed for poor results."""
        there = {option.key for option in self.options()}
        return [
            spec
            for spec in self._added
            if _key(spec) not in there and (_key(spec) not in self._removed or self.is_pinned(spec))
        ]

    def save(self) -> None:
        """Write skills_learned.yaml, whole or not at all. Raises UserError."""
        if self._folder:
            text = self._to_yaml().encode()
            atomic_write(self._folder / LEARNED_FILE, lambda file: file.write(text))

    def _to_yaml(self) -> str:
        sizes = {"max_length": self._max_length, "max_actions": self._max_actions}
        text = HEAD.format(max_options=len(self.slots), **sizes)
        text += f"# Actions: {', '.join(self._action_names)}\n"
        text += f"# Subgoals: {', '.join(self._subgoals) or 'none'}\n\nskills:\n"
        for option in self.options():
            spec = option.spec
            pinned = ", pinned" if self.is_pinned(spec) else ""
            names = [self._action_names[index] for index in option.actions]
            values = spec.model_dump() | {"primitive_actions": names}
            # JSON is valid YAML, whatever text an adviser gives.
            lines = [f"{key}: {json.dumps(values[name], ensure_ascii=False)}" for key, name in FIELDS.items()]
            text += f"# By the {option.by}{pinned}; {option.stats}\n- " + "\n  ".join(lines) + "\n\n"
        for spec in self._waiting():
            text += f"# {spec.name} waits for a free slot.\n"
        return text

    # --- Checkpoints -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything as plain values, with the last valid content of skills.yaml."""
        return {
            "slots": [option and _pack(option) for option in self.slots],
            "next_uid": self._next_uid,
            "step": self._step,
            "removed": [[list(actions), *rest, step] for (actions, *rest), step in self._removed.items()],
            "removals": self._removals,
            "refused": dict(self._refused),
            "edits": self._edits,
            "banned": {name: actions and list(actions) for name, actions in self._banned.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`. The next `poll` brings in a skills.yaml that was edited since."""
        self.slots = [_unpack(packed) if packed else None for packed in state["slots"]]
        self._next_uid, self._step = state["next_uid"], state["step"]
        self._removed = {(tuple(actions), *rest): step for actions, *rest, step in state["removed"]}
        self._removals, self._refused = state["removals"], Counter(state["refused"])
        self._edits = state["edits"]
        self._added = self._parse(self._edits)
        self._pinned = {name.casefold() for name in self._edits.get("pinned") or []}
        self._banned = {name: actions and tuple(actions) for name, actions in state["banned"].items()}
        self._last_read, self._lines = None, []


def _key(spec: OptionSpec) -> Key:
    return spec.primitive_actions, spec.expected_duration, spec.subgoal


def _pack(option: Option) -> dict[str, Any]:
    spec = option.spec.model_dump() | {"primitive_actions": list(option.actions)}
    return {"spec": spec, "uid": option.uid, "by": option.by, "stats": asdict(option.stats)}


def _unpack(packed: Mapping[str, Any]) -> Option:
    return Option(**dict(packed) | {"spec": OptionSpec(**packed["spec"]), "stats": Stats(**packed["stats"])})


def _shown(value: Any) -> str:
    """A value of a file for the log: on one line, short and printable."""
    text = str(value)
    return (text if text.isprintable() else ascii(text))[:MAX_NAME]


def _nearest(word: str, valid: Any) -> str:
    """The nearest valid word, as the end of a message."""
    if not valid:
        return "; there is none here"
    folded = {name.casefold(): name for name in valid}
    near = difflib.get_close_matches(word[:MAX_NAME].casefold(), folded, n=1, cutoff=0.0)
    return f"; the nearest is {folded[near[0]]}"
