"""The library of skills that the actor may choose besides actions, and `skills.yaml`, where people edit it.

A skill is a sequence of actions. It ends after `timeout` steps; in the env also where its subgoal is reached
or an action is blocked. Skills sit in numbered slots, one for each choice that the actor has. What proposals,
files and checkpoints hold is checked and bounded here; nothing of it is executed. Plain Python and NumPy.

How `skills.yaml` and the library come together. The file says under `known` which skills LoRe had written
into it. So an edit is told from what the run did meanwhile, also where it was made in an editor that showed
an older state of the file, while the run was stopped, or after the checkpoint from which the run goes on:

- A skill that is known but no longer in the file was deleted by a person; it is never proposed again.
- A skill that is in the file but not known was added by a person. So was, where the checkpoint does not have
  it yet, what is pinned or `by: person`.
- Any other skill that is known but not in the library is the run's own, pruned meanwhile or proposed after
  the checkpoint: it is left out. So where nobody edited the file, a resumed library is the checkpoint's.
- Actions, duration and subgoal make the skill: with others it is another one, with a new uid and without
  statistics. Name, description, confidence and pinned may change.
- Where a file has mistakes, what is right in it counts, but nothing is deleted, and the file is left as it is
  until a person has corrected it. Nor is anything deleted by a file without `known`: it may be cut off.
"""

import difflib
import hashlib
import io
import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.representer import SafeRepresenter

from basics import UserError, atomic_write
from config import PlainComposer
from lore_llm.advice import MAX_NAME, MAX_PLAN, OptionSpec

STATS_DECAY = 0.98  # of older executions with each new one: about the last 100 count, for the agent changes
MAX_ADVANTAGE = 1e6  # larger ones are clipped, so that sums stay finite
PRUNE_SIGMAS = 3.0  # standard errors below 0 that a bad mean advantage is: many, for many looks are taken
FULL_SIGMAS = 1.0  # enough for the worst where proposals find no room,
FULL_TRIES = 2  # and it has had so many times option_min_tries
FORGET_INTERVALS = 20  # option_generation_intervals after which a removed skill may be proposed again
MAX_REMEMBERED = 64  # removed, and as many deleted, skills; the oldest go first

MAX_BYTES = 2**18  # of skills.yaml
MAX_ENTRIES = 256  # skills in it
MAX_DEPTH = 8  # of its brackets and lists
MAX_REASON = 200  # characters of what is wrong with it as YAML
MAX_LINES = 20  # for the log from one reading of it
SETTLE_SECONDS = 1.0  # an editor may still be writing a file that is younger
MAX_TAG = 40  # characters of a skill's name in a metric

ENTRY_FIELDS = {
    "name": "text",
    "description": "text",
    "actions": "a list of actions",
    "duration": "a whole number of steps",
    "confidence": "a number from 0 to 1",
    "subgoal": "a subgoal or null",
    "pinned": "true or false",
    "by": "adviser or person",
}
AUTHORS = ("adviser", "person")

HEAD = """\
# Skills that the agent may choose besides single actions. You may edit this file while training runs: save
# it, and it is read within seconds; train.log tells what came of it. Comments of your own are not kept.
#
#   - name: fetch_wood              # yours to choose; each name once
#     actions: [move_left, do, do]  # 1 to {max_actions} of those below, repeated until the duration is over
#     description: what it is for   # this and all that follows may be left out
#     duration: 6                   # steps, {max_length} at most; the number of actions where left out
#     subgoal: null                 # one of those below ends the skill when it is reached
#     pinned: true                  # is never removed for poor results
#     confidence: 1.0               # what its author thinks of it; told only
#
# With other actions, duration or subgoal it is another skill, which starts without statistics. What you
# delete is not proposed again. At most {max_options} are in use; more wait for a place.
#
"""
FOOT = """\
# By this LoRe tells your changes from its own: leave it as it is.
"""

Key = tuple[tuple[int, ...], int, str | None]  # actions, timeout and subgoal


@dataclass
class Stats:
    """What real executions of a skill brought. Means forget by STATS_DECAY."""

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


@dataclass
class Skill:
    """A skill in a slot. Its spec holds action indices, and the timeout as expected duration."""

    spec: OptionSpec
    uid: int
    pinned: bool = False
    by: str = "adviser"
    stats: Stats = field(default_factory=Stats)

    @property
    def timeout(self) -> int:
        return self.spec.expected_duration

    @property
    def actions(self) -> tuple[int, ...]:
        return self.spec.primitive_actions

    @property
    def key(self) -> Key:
        return self.actions, self.timeout, self.spec.subgoal

    def action(self, position: int) -> int:
        """Index of the action at a position from 0 to timeout - 1."""
        return self.actions[position % len(self.actions)]


class Refused(ValueError):
    """A skill that is not taken: the reason, by which it is counted, and what is wrong in words."""

    def __init__(self, reason: str, text: str):
        super().__init__(text)
        self.reason = reason


@dataclass
class _File:
    """What a skills.yaml says, and what is wrong with it."""

    skills: dict[Key, Skill] = field(default_factory=dict)  # without a uid
    known: dict[str, int] | None = None  # mark of what LoRe wrote into it -> uid
    deleted: list[Key] = field(default_factory=list)
    mistakes: list[str] = field(default_factory=list)


class OptionLibrary:
    """The skills in their slots, with what they brought.

    Args:
        path: `skills.yaml`; None neither reads nor writes one.
        captioner: its `actions` and `subgoals` are those that a skill may name.
        options: the config's group `options`.

    A `skills.yaml` that is there before anything was loaded is the first library: the first `poll` reads it.
    """

    def __init__(self, path: str | Path | None, captioner: Any, options: Mapping[str, Any]):
        self._path = path and Path(path)
        self._action_names = tuple(captioner.actions)
        self._subgoals = tuple(captioner.subgoals)
        self._options = options
        self._max_length = options["option_max_length"]
        self.slots: list[Skill | None] = [None] * options["max_options"]
        self._waiting: list[Skill] = []  # a person's, for which there is no slot yet
        self._next_uid = 1
        self._step = 0  # of the last proposals
        self._removed: dict[Key, int] = {}  # for poor results -> step
        self._removals = 0
        self._deleted: dict[Key, None] = {}  # by a person
        self._refused: Counter[str] = Counter()
        self._new = True  # nothing was loaded, read or written yet
        self._lines: list[str] = []  # for the log, told by the next poll
        self._signature: Any = "never looked"  # of the file when it was looked at last
        self._digest: str | None = None  # of what was read or written last
        self._applied: str | None = None  # digest of the last edit that was brought into the library
        self._hold = False  # the file has mistakes that a person has to correct before it is written again
        self._trouble = ""  # why the file could not be read or written the last time

    def skills(self) -> list[Skill]:
        """Those in slots, in their order."""
        return [skill for skill in self.slots if skill]

    def table(self) -> dict[str, np.ndarray]:
        """The slots as int64 arrays: `uids` [O] and `timeouts` [O], 0 where empty, and `actions` [O, L].

        Actions are repeated up to the timeout and 0 from there to L = option_max_length.
        """
        count = len(self.slots)
        uids, timeouts = np.zeros(count, np.int64), np.zeros(count, np.int64)
        actions = np.zeros((count, self._max_length), np.int64)
        for slot, skill in enumerate(self.slots):
            if skill:
                uids[slot], timeouts[slot] = skill.uid, skill.timeout
                actions[slot, : skill.timeout] = [skill.action(i) for i in range(skill.timeout)]
        return {"uids": uids, "actions": actions, "timeouts": timeouts}

    # Proposals and performance

    def propose(self, specs: Sequence[OptionSpec], step: int) -> list[int]:
        """Take an adviser's proposals into empty slots, and count why others are refused.

        Nobody is replaced: `prune` makes room. Returns the slots that now hold something new.
        """
        self._step = step
        oldest = step - FORGET_INTERVALS * self._options["option_generation_interval"]
        self._removed = {key: when for key, when in self._removed.items() if when >= oldest}
        changed = []
        for spec in specs:
            try:
                slot, skill = self._accept(spec)
            except Refused as refusal:
                self._refused[refusal.reason] += 1
                continue
            self.slots[slot] = skill
            changed.append(slot)
        return changed

    def _accept(self, spec: OptionSpec) -> tuple[int, Skill]:
        subgoal = spec.subgoal
        if subgoal is not None and subgoal not in self._subgoals:
            self._refused["unknown_subgoal"] += 1  # the skill is taken without it
            subgoal = None
        actions, timeout, _ = key = self._key(spec.primitive_actions, spec.expected_duration, subgoal)
        if spec.confidence < self._options["skill_confidence_threshold"]:
            raise Refused("low_confidence", "its confidence is too low")
        if any(other.key[:2] == key[:2] for other in (*self.skills(), *self._waiting)):
            raise Refused("duplicate", "there is one with the same actions and duration")
        if any(old[:2] == key[:2] for old in self._removed):
            raise Refused("removed", "it was removed for poor results")
        if any(old[0] == actions for old in self._deleted):
            raise Refused("deleted", "a person deleted it")
        if None not in self.slots or self._waiting:
            raise Refused("no_room", "all slots are taken")
        name = self._free_name(spec.name)
        changes = {
            "name": name,
            "primitive_actions": actions,
            "expected_duration": timeout,
            "subgoal": subgoal,
        }
        return self.slots.index(None), self._new_skill(spec.model_copy(update=changes))

    def _key(self, actions: Sequence[str | int], duration: int, subgoal: str | None) -> Key:
        """Raises Refused for actions that the env does not have, or too many."""
        if not 1 <= len(actions) <= min(self._max_length, MAX_PLAN):
            most = min(self._max_length, MAX_PLAN)
            raise Refused("too_long", f"{len(actions)} actions; it must be 1 to {most} (option_max_length)")
        indices = tuple(self._index(action) for action in actions)
        return indices, min(max(len(indices), duration), self._max_length), subgoal

    def _index(self, action: str | int) -> int:
        names = self._action_names
        if isinstance(action, int) and not isinstance(action, bool):
            if 0 <= action < len(names):
                return action
            text = f"there is no action {_show(action)}; they are numbered 0 to {len(names) - 1}"
            raise Refused("unknown_action", text)
        if action in names:
            return names.index(action)
        folded = [name.casefold() for name in names]
        if isinstance(action, str) and action.casefold() in folded:
            return folded.index(action.casefold())
        raise Refused("unknown_action", f"there is no action {_show(action)}{_nearest(action, names)}")

    def _free_name(self, name: str) -> str:
        taken = {skill.spec.name.casefold() for skill in (*self.skills(), *self._waiting)}
        free, number = name, 1
        while free.casefold() in taken:
            number += 1
            free = f"{name[: MAX_NAME - 1 - len(str(number))]}_{number}"
        return free

    def _new_skill(self, spec: OptionSpec, pinned: bool = False, by: str = "adviser") -> Skill:
        uid, self._next_uid = self._next_uid, self._next_uid + 1
        return Skill(spec.model_copy(update={"option_id": str(uid)}), uid, pinned, by)

    def record(self, uid: int, advantage: float, success: bool, length: int) -> None:
        """Count one real execution that ended: how much better it was than expected, and its steps.

        A skill that is gone meanwhile, and an advantage that is not finite, count for nothing.
        """
        for skill in self.skills():
            if skill.uid == uid and math.isfinite(advantage):
                skill.stats.add(float(advantage), bool(success), int(length))

    def prune(self) -> list[int]:
        """Empty the slots of skills that do harm; returns these slots.

        A skill goes after `option_min_tries` when its mean advantage is below 0 by PRUNE_SIGMAS standard
        errors. Where all slots are taken and none goes by that, one makes room that is below 0 by FULL_SIGMAS
        after FULL_TRIES times the tries: that with the lowest upper bound. A pinned one never goes.
        """
        tries = self._options["option_min_tries"]
        poor = self._below_zero(PRUNE_SIGMAS, tries)
        if not poor and None not in self.slots:
            poor = self._below_zero(FULL_SIGMAS, FULL_TRIES * tries)[:1]
        for slot in poor:
            skill = self.slots[slot]
            stats = skill.stats
            self._lines.append(
                f"Skill {_show(skill.spec.name)} removed after {stats.tries} tries: "
                f"advantage {stats.advantage:.3g} ± {stats.error:.2g}"
            )
            self.slots[slot] = None
            self._removals += 1
            _remember(self._removed, skill.key, self._step)
        return sorted(poor)

    def _below_zero(self, sigmas: float, tries: int) -> list[int]:
        """Slots of unpinned skills whose upper bound of the mean advantage is below 0, the lowest first."""
        bounds = {
            slot: skill.stats.advantage + sigmas * skill.stats.error
            for slot, skill in enumerate(self.slots)
            if skill and not skill.pinned and skill.stats.tries >= tries
        }
        return sorted((slot for slot, bound in bounds.items() if bound < 0), key=bounds.__getitem__)

    def metrics(self) -> dict[str, float]:
        """How many there are and what they bring, for the logger."""
        skills = self.skills()
        metrics = {
            "options/count": float(len(skills)),
            "options/removed": float(self._removals),
            "options/refused": float(sum(self._refused.values())),
        }
        metrics |= {f"options/refused/{reason}": float(count) for reason, count in self._refused.items()}
        if tried := [skill for skill in skills if skill.stats.tries]:
            metrics["options/avg_success_rate"] = sum(s.stats.success for s in tried) / len(tried)
            metrics["options/mean_length"] = sum(s.stats.length for s in tried) / len(tried)
        for skill in skills:
            tag = re.sub(r"[^\w.-]+", "_", skill.spec.name)[:MAX_TAG]
            if f"options/{tag}/tries" in metrics:
                tag = f"{tag}_{skill.uid}"
            metrics[f"options/{tag}/tries"] = float(skill.stats.tries)
            if skill.stats.tries:
                metrics[f"options/{tag}/success_rate"] = skill.stats.success
                metrics[f"options/{tag}/advantage"] = skill.stats.advantage
        return metrics

    # skills.yaml

    def poll(self) -> tuple[list[int], list[str]]:
        """Read skills.yaml if a person changed it, and give empty slots to skills that wait for one.

        Cheap where nothing changed. Returns the slots that hold another skill now, or none any longer, and
        lines for the log. A deleted file is written again. Raises nothing for what is in the file.
        """
        before = [skill and skill.uid for skill in self.slots]
        read = bool(self._path) and self._look()
        if read:
            self._read_file()
        self._fill()
        changed = [i for i, skill in enumerate(self.slots) if (skill and skill.uid) != before[i]]
        if read or changed:
            self.save()
        lines, self._lines = self._lines, []
        return changed, lines

    def _look(self) -> bool:
        """Whether there is a file to be read."""
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            if self._signature is not None:
                self._signature = None
                if self._digest:
                    self._lines.append(f"{self._path.name} was deleted: written again")
                self.save()
            return False
        except OSError as error:
            self._complain(f"Cannot read {self._path}: {error.strerror or error}")
            return False
        signature = _signature(stat)
        # At the start it is read at once: what is there then must not depend on the time.
        if signature == self._signature or (
            self._digest and 0 <= time.time() - stat.st_mtime < SETTLE_SECONDS
        ):
            return False
        self._signature = signature
        return True

    def _read_file(self) -> None:
        try:
            data = _read_bytes(self._path)
        except OSError as error:
            self._complain(f"Cannot read {self._path}: {error.strerror or error}")
            return
        if self._digest == _digest(data):
            return
        self._digest = _digest(data)
        file = self._parse(data)
        self._hold = bool(file.mistakes)
        done = self._apply(file) if self._digest != self._applied else []
        if done or file.mistakes:
            self._applied = self._digest
        self._lines += [f"{self._path.name}: {mistake}" for mistake in file.mistakes[:MAX_LINES]]
        if file.mistakes:
            more = len(file.mistakes) - MAX_LINES
            self._lines.append(
                f"{self._path.name}: {f'{more} more mistakes; ' if more > 0 else ''}"
                "nothing is deleted, and the file is not written, until this is corrected"
            )
        if done:
            self._lines.append(f"{self._path.name} was read: {'; '.join(done)}")

    def _apply(self, file: _File) -> list[str]:
        """Bring a person's edits into the library, as the head of this module says; returns what was done."""
        known = {} if self._new else (file.known or {})
        done = []
        members = {skill.key: skill for skill in (*self.skills(), *self._waiting)}
        if not file.mistakes:
            for key, skill in members.items():
                if key not in file.skills and (_mark(key) in known or key in file.deleted):
                    self._drop(skill)
                    _remember(self._deleted, key, None)
                    done.append(f"deleted {_show(skill.spec.name)}")
            for key in file.deleted:
                _remember(self._deleted, key, None)
        for key, entry in file.skills.items():
            skill = members.get(key)
            if skill and known.get(_mark(key), skill.uid) == skill.uid:
                spec = entry.spec.model_copy(update={"option_id": skill.spec.option_id})
                if (spec, entry.pinned) != (skill.spec, skill.pinned):
                    self._rename_others(spec.name, skill, file)
                    skill.spec, skill.pinned = spec, entry.pinned
                    done.append(f"changed {_show(skill.spec.name)}")
            elif not skill:
                added = entry.by == "person" and key not in self._removed
                if _mark(key) in known and not (entry.pinned or added):
                    continue
                self._rename_others(entry.spec.name, None, file)
                by = entry.by if _mark(key) in (file.known or {}) else "person"
                self._waiting.append(self._new_skill(entry.spec, entry.pinned, by))
                self._removed.pop(key, None)
                self._deleted.pop(key, None)
                done.append(f"added {_show(entry.spec.name)}")
        self._new = self._new and bool(file.mistakes)
        self._fill()
        if done and self._waiting:
            done.append(f"{len(self._waiting)} wait for a place (options.max_options {len(self.slots)})")
        return done

    def _rename_others(self, name: str, skill: Skill | None, file: _File) -> None:
        """A person's name wins over one that the adviser gave to another skill meanwhile."""
        for other in (*self.skills(), *self._waiting):
            if (
                other is not skill
                and other.key not in file.skills
                and other.spec.name.casefold() == name.casefold()
            ):
                other.spec = other.spec.model_copy(update={"name": self._free_name(name)})

    def _drop(self, skill: Skill) -> None:
        self.slots = [None if other is skill else other for other in self.slots]
        self._waiting = [other for other in self._waiting if other is not skill]

    def _fill(self) -> None:
        while self._waiting and None in self.slots:
            self.slots[self.slots.index(None)] = self._waiting.pop(0)

    def save(self) -> None:
        """Write skills.yaml, whole or not at all; never over an edit that `poll` has not read yet.

        Nor over mistakes that a person has to correct. A file that cannot be written stops nothing: the
        checkpoint holds the library too, and the next `poll` has a line for the log.
        """
        if not self._path:
            return
        data = self._to_yaml().encode()
        try:
            there = _read_bytes(self._path)
        except FileNotFoundError:
            there = None
        except OSError as error:
            self._complain(f"Cannot read {self._path}: {error.strerror or error}")
            return
        if there is not None:
            if _digest(there) != self._digest:
                self._signature = "changed"  # so that the next poll looks into it
                return
            if self._hold or there == data:
                return
        try:
            atomic_write(self._path, lambda file: file.write(data))
            self._signature = _signature(self._path.stat())
        except (UserError, OSError) as error:
            self._complain(str(error))
            return
        self._digest, self._hold, self._new, self._trouble = _digest(data), False, False, ""

    def _complain(self, line: str) -> None:
        if line != self._trouble:
            self._lines.append(line)
        self._trouble = line

    def _to_yaml(self) -> str:
        head = HEAD.format(
            max_actions=min(self._max_length, MAX_PLAN),
            max_length=self._max_length,
            max_options=len(self.slots),
        )
        parts = [
            head,
            _listed("actions", self._action_names),
            _listed("subgoals", self._subgoals),
            "skills:\n",
        ]
        for skill in (*self.skills(), *self._waiting):
            spec, stats = skill.spec, skill.stats
            entry = {
                "name": spec.name,
                "description": spec.description,
                "actions": [self._action_names[action] for action in skill.actions],
                "duration": skill.timeout,
                "confidence": spec.confidence,
                "subgoal": spec.subgoal,
                "pinned": skill.pinned,
                "by": skill.by,
            }
            note = (
                f"waits for a place: all {len(self.slots)} are taken"
                if skill in self._waiting
                else "not tried yet"
            )
            if stats.tries:
                note = (
                    f"{stats.tries} tries: success rate {stats.success:.2f}, advantage {stats.advantage:.3g}"
                    f" ± {stats.error:.2g}, length {stats.length:.1f}"
                )
            parts.append(f"# {note}\n{_dump([entry])}\n")
        parts.append(FOOT)
        members = (*self.skills(), *self._waiting)
        deleted = [[list(actions), timeout, subgoal] for actions, timeout, subgoal in self._deleted]
        parts.append(_dump({"known": [f"{s.uid}-{_mark(s.key)}" for s in members], "deleted": deleted}))
        return "".join(parts)

    def _parse(self, data: bytes) -> _File:
        file = _File()
        try:
            tree = _load_yaml(data)
        except ValueError as error:
            file.mistakes.append(str(error))
            return file
        entries = tree.get("skills", "absent") if isinstance(tree, dict) else "absent"
        if entries is None:
            entries = []
        if not isinstance(entries, list):
            file.mistakes.append("it must hold skills: and a list of them below")
            return file
        for name in tree:
            if name not in ("skills", "known", "deleted"):
                file.mistakes.append(f"{_show(name)} is not known here; skills stand in the list skills")
        names: set[str] = set()
        for number, entry in enumerate(entries[:MAX_ENTRIES], 1):
            name = entry.get("name") if isinstance(entry, dict) else None
            try:
                skill = self._read_entry(entry)
                if skill.key in file.skills:
                    raise Refused("duplicate", "another one has the same actions, duration and subgoal")
                if skill.spec.name.casefold() in names:
                    raise Refused("duplicate", "another one has this name")
                names.add(skill.spec.name.casefold())
                file.skills[skill.key] = skill
            except Refused as refusal:
                shown = f" ({_show(name)})" if isinstance(name, str) else ""
                file.mistakes.append(f"skill {number}{shown}: {refusal}")
        if len(entries) > MAX_ENTRIES:
            file.mistakes.append(f"more than {MAX_ENTRIES} skills: the others are not read")
        try:
            file.known, file.deleted = self._read_foot(tree)
        except ValueError:
            file.mistakes.append(
                "known and deleted at its end are not as LoRe wrote them: delete these lines"
            )
        return file

    def _read_entry(self, entry: Any) -> Skill:
        """Raises Refused, whose text says what is wrong and the nearest valid."""
        if not isinstance(entry, dict):
            raise Refused(
                "malformed", f"it must hold name, actions and so on, as name: value, not {_show(entry)}"
            )
        for name in entry:
            if name not in ENTRY_FIELDS:
                near = _nearest(name, ENTRY_FIELDS)
                raise Refused("malformed", f"there is no field {_show(name)}{near}")
        for name in ("name", "actions"):
            if name not in entry:
                raise Refused("malformed", f"it has no {name}")
        actions = entry["actions"]
        if not isinstance(actions, list):
            raise Refused(
                "malformed", f"actions must be a list such as [{self._action_names[0]}], not {_show(actions)}"
            )
        self._key(actions, 1, None)  # what is wrong with the actions, before the rest
        duration, pinned, by = entry.get("duration"), entry.get("pinned", False), entry.get("by", "person")
        duration = len(actions) if duration is None else duration
        if type(duration) is not int or not 1 <= duration <= self._max_length:
            near = min(max(duration, 1), self._max_length) if type(duration) is int else len(actions)
            wrong = f"duration must be a whole number from 1 to {self._max_length}, not {_show(duration)}"
            raise Refused("malformed", f"{wrong}; the nearest is {near}")
        if type(pinned) is not bool:
            raise Refused("malformed", f"pinned must be true or false, not {_show(pinned)}")
        if by not in AUTHORS:
            raise Refused(
                "malformed", f"by must be adviser or person, not {_show(by)}{_nearest(by, AUTHORS)}"
            )
        subgoal = entry.get("subgoal")
        if subgoal is not None and subgoal not in self._subgoals:
            raise Refused(
                "malformed", f"there is no subgoal {_show(subgoal)}{_nearest(subgoal, self._subgoals)}"
            )
        indices, timeout, _ = self._key(actions, duration, subgoal)
        try:
            spec = OptionSpec(
                name=entry["name"],
                description="" if entry.get("description") is None else entry["description"],
                primitive_actions=indices,
                expected_duration=timeout,
                confidence=entry.get("confidence", 1.0),
                subgoal=subgoal,
            )
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            what = str(first["loc"][0]) if first["loc"] else "it"
            message = first["msg"].removeprefix("Value error, ")
            wrong = f"{what} must be {ENTRY_FIELDS.get(what, 'different')}, not {_show(first['input'])}"
            raise Refused("malformed", f"{wrong}: {message}") from None
        return Skill(spec, 0, pinned, by)

    def _read_foot(self, tree: dict) -> tuple[dict[str, int] | None, list[Key]]:
        """Raises ValueError."""
        known, deleted = tree.get("known"), tree.get("deleted")
        deleted = [] if deleted is None else deleted
        if known is not None:
            if not isinstance(known, list) or not all(isinstance(item, str) for item in known):
                raise ValueError
            pairs = [item.partition("-") for item in known]
            known = {mark: int(uid) for uid, _, mark in pairs}
        if not isinstance(deleted, list):
            raise ValueError
        keys = []
        for item in deleted:
            actions, duration, subgoal = item if isinstance(item, list) else ()
            if (
                not isinstance(actions, list)
                or type(duration) is not int
                or not isinstance(subgoal, str | None)
            ):
                raise ValueError
            keys.append(self._key(actions, duration, subgoal))
        return known, keys

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Everything but the file, as plain values."""
        return {
            "slots": [skill and _pack(skill) for skill in self.slots],
            "waiting": [_pack(skill) for skill in self._waiting],
            "next_uid": self._next_uid,
            "step": self._step,
            "removed": [[list(actions), *rest, step] for (actions, *rest), step in self._removed.items()],
            "removals": self._removals,
            "deleted": [[list(actions), *rest] for actions, *rest in self._deleted],
            "refused": dict(self._refused),
            "new": self._new,
            "applied": self._applied,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`. The next `poll` brings in what people edited since; see the module's head.

        Raises UserError where the options do not fit it.
        """
        slots = [_unpack(packed) if packed else None for packed in state["slots"]]
        waiting = [_unpack(packed) for packed in state["waiting"]]
        if len(slots) != len(self.slots):
            raise UserError(f"options.max_options {len(self.slots)}: the checkpoint has {len(slots)}")
        longest = max((skill.timeout for skill in (*slots, *waiting) if skill), default=0)
        if longest > self._max_length:
            raise UserError(
                f"options.option_max_length {self._max_length}: the checkpoint has a skill of {longest} steps"
            )
        for skill in (*slots, *waiting):
            subgoal = skill and skill.spec.subgoal
            if subgoal not in (None, *self._subgoals):
                raise UserError(
                    f"llm.captioner: the checkpoint has a skill with the subgoal {_show(subgoal)}, which is "
                    "unknown to it"
                )
        self.slots, self._waiting = slots, waiting
        self._next_uid, self._step = state["next_uid"], state["step"]
        self._removed = {(tuple(actions), *rest): step for actions, *rest, step in state["removed"]}
        self._removals = state["removals"]
        self._deleted = {(tuple(actions), *rest): None for actions, *rest in state["deleted"]}
        self._refused = Counter(state["refused"])
        self._new, self._applied = state["new"], state["applied"]
        self._hold, self._lines, self._trouble = False, [], ""
        self._signature, self._digest = "never looked", None


def _pack(skill: Skill) -> dict[str, Any]:
    spec = skill.spec.model_dump() | {"primitive_actions": list(skill.actions)}
    return {
        "spec": spec,
        "uid": skill.uid,
        "pinned": skill.pinned,
        "by": skill.by,
        "stats": asdict(skill.stats),
    }


def _unpack(packed: Mapping[str, Any]) -> Skill:
    return Skill(**dict(packed) | {"spec": OptionSpec(**packed["spec"]), "stats": Stats(**packed["stats"])})


def _remember(memory: dict[Key, Any], key: Key, value: Any) -> None:
    """The newest stand last, and the oldest are forgotten."""
    memory.pop(key, None)
    memory[key] = value
    while len(memory) > MAX_REMEMBERED:
        del memory[next(iter(memory))]


def _mark(key: Key) -> str:
    """A short name for actions, timeout and subgoal."""
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _signature(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _read_bytes(path: Path) -> bytes:
    """The file, cut off where it is too long to be read."""
    with open(path, "rb") as file:
        return file.read(MAX_BYTES + 1)


def _show(value: Any, limit: int = MAX_NAME) -> str:
    """A value for the log: on one line, short, nothing that a terminal would obey."""
    if isinstance(value, str) and value.isprintable() and 0 < len(value) <= limit:
        return value
    try:
        shown = ascii(value)
    except ValueError:  # an integer of thousands of digits
        shown = "a number that is too long"
    return shown if len(shown) <= limit else shown[:limit] + "..."


def _nearest(word: Any, valid: Any) -> str:
    """What to say after a mistake: the nearest valid word, if there is any."""
    if not valid:
        return "; there is none here"
    folded = {name.casefold(): name for name in valid}
    near = difflib.get_close_matches(_show(word).casefold(), folded, n=1, cutoff=0.0)
    return f"; the nearest is {folded[near[0]]}"


def _listed(title: str, names: Sequence[str]) -> str:
    """The names in comment lines."""
    lines = [f"# The {title}:" if names else f"# There are no {title}."]
    for index, name in enumerate(names):
        word = f" {_show(name)}" + ("," if index + 1 < len(names) else "")
        if len(lines[-1]) + len(word) > 108:
            lines.append("#  ")
        lines[-1] += word
    return "\n".join(lines) + "\n"


class _Representer(SafeRepresenter):
    """Writes lists of plain values on one line."""


def _represent_list(representer: _Representer, data: list) -> Any:
    nested = any(isinstance(item, dict) for item in data)
    return representer.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=not nested)


_Representer.add_representer(list, _represent_list)


def _dump(tree: Any) -> str:
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    yaml.allow_unicode = True
    yaml.width = 2**16  # never break a value into lines
    stream = io.StringIO()
    yaml.dump(tree, stream)
    return stream.getvalue()


def _load_yaml(data: bytes) -> Any:
    """Raises ValueError with the line and the reason."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"not read: larger than {MAX_BYTES // 1024} KiB")
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = PlainComposer
    yaml.max_depth = MAX_DEPTH
    try:
        return yaml.load(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError("not valid YAML: not a text file in UTF-8") from None
    except Exception as error:  # of any kind: ruamel has others than YAMLError for some nonsense
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        reason = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ValueError(f"{line}not valid YAML: {_show(reason, MAX_REASON)}") from None
