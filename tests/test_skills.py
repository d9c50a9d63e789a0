"""The library of skills and skills.yaml, which a person may edit while training runs."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from basics import UserError
from lore_llm import OptionSpec, options
from lore_llm.options import OptionLibrary

ACTIONS = ("noop", "move_left", "move_right", "do", "place_stone")
CAPTIONER = SimpleNamespace(actions=ACTIONS, subgoals=("collect_wood", "drink"))
OPTIONS = {
    "max_options": 3,
    "option_generation_interval": 100,
    "skill_confidence_threshold": 0.5,
    "option_min_tries": 10,
    "option_max_length": 15,
}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(options, "SETTLE_SECONDS", 0.0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "skills.yaml"


def _library(path=None, **changes):
    return OptionLibrary(path, CAPTIONER, OPTIONS | changes)


def _spec(name="chop", actions=("do",), duration=1, confidence=0.8, **fields):
    return OptionSpec(
        name=name, primitive_actions=actions, expected_duration=duration, confidence=confidence, **fields
    )


def _names(library):
    return [skill and skill.spec.name for skill in library.slots]


def _skill(library, name):
    return next(skill for skill in library.skills() if skill.spec.name == name)


def _edit(path, *changes, text=None):
    """Replace text in the file as an editor does; its time is later than before."""
    later = path.stat().st_mtime_ns + 10**9 if path.exists() else None
    text = path.read_text(encoding="utf-8") if text is None else text
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")
    if later:
        os.utime(path, ns=(later, later))


def _without(path, name):
    """The file's text without the skill of this name."""
    blocks = path.read_text().split("\n\n")
    kept = [block for block in blocks if f"- name: {name}\n" not in block]
    assert len(kept) == len(blocks) - 1
    head = "" if "skills:" in kept[0] else re.match(r"(?s).*skills:\n", blocks[0])[0]
    return head + "\n\n".join(kept)


ADDED = """\
- name: mine
  actions: [move_right, Do]

# By this"""


def _start(path, *specs):
    """A library whose proposals are written to the file."""
    library = _library(path)
    library.poll()
    library.propose(specs or [_spec("chop"), _spec("walk", ("move_left",), 5)], 100)
    library.save()
    return library


def _use(library, uid, advantages):
    for advantage in advantages:
        library.record(uid, advantage, advantage > 0, 2)


# Proposals


def test_skill_repeats_its_actions_until_its_timeout():
    library = _library()
    assert library.propose([_spec(actions=("Move_Left", 3), duration=5)], 0) == [0]
    skill = library.slots[0]
    assert [skill.action(i) for i in range(skill.timeout)] == [1, 3, 1, 3, 1]
    table = library.table()
    assert table["uids"].tolist() == [1, 0, 0] and table["timeouts"].tolist() == [5, 0, 0]
    assert table["actions"].tolist() == [[1, 3, 1, 3, 1] + [0] * 10, [0] * 15, [0] * 15]
    assert {array.dtype for array in table.values()} == {np.dtype(np.int64)}


def test_timeout_is_at_least_the_actions_and_at_most_the_longest():
    library = _library()
    library.propose([_spec("a", ("do",) * 4, 1), _spec("b", ("do",), 999)], 0)
    assert [skill.timeout for skill in library.skills()] == [4, 15]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (_spec(actions=("do", "fly")), "unknown_action"),
        (_spec(actions=(5,)), "unknown_action"),
        (_spec(actions=("do",) * 4), "too_long"),
        (_spec(confidence=0.49), "low_confidence"),
        (_spec("other name", ("move_left", "do"), 2), "duplicate"),
    ],
)
def test_refused_proposals_are_counted_by_reason(spec, reason):
    library = _library(option_max_length=3)
    library.propose([_spec("there", (1, "do"), 2)], 0)
    assert library.propose([spec], 0) == []
    assert library.metrics()[f"options/refused/{reason}"] == library.metrics()["options/refused"] == 1
    assert _names(library) == ["there", None, None]


def test_unknown_subgoal_is_left_out():
    library = _library()
    library.propose([_spec("a", subgoal="fly"), _spec("b", ("noop",), subgoal="drink")], 0)
    assert [skill.spec.subgoal for skill in library.skills()] == [None, "drink"]
    assert library.metrics()["options/refused/unknown_subgoal"] == 1


def test_proposals_replace_nobody():
    library = _library()
    specs = [_spec(f"s{i}", (i,)) for i in range(4)]
    assert library.propose(specs, 0) == [0, 1, 2]
    assert _names(library) == ["s0", "s1", "s2"]
    assert library.metrics()["options/refused/no_room"] == 1


def test_equal_names_get_numbers():
    library = _library()
    library.propose([_spec("x" * 64, (i,)) for i in range(3)], 0)
    assert _names(library) == ["x" * 64, "x" * 62 + "_2", "x" * 62 + "_3"]


# Performance


def test_statistics_forget_and_equal_the_weighted_formulas():
    library = _library()
    library.propose([_spec()], 0)
    rng = np.random.default_rng(0)
    values = rng.normal(0.3, 1.0, 150)
    _use(library, 1, values)
    weights = options.STATS_DECAY ** np.arange(150)[::-1]
    mean = np.average(values, weights=weights)
    total, squares = weights.sum(), (weights**2).sum()
    variance = (weights * (values - mean) ** 2).sum() / (total - squares / total)
    stats = library.slots[0].stats
    assert stats.tries == 150 and stats.advantage == pytest.approx(mean)
    assert stats.error == pytest.approx(np.sqrt(variance * squares) / total)
    assert stats.success == pytest.approx(np.average(values > 0, weights=weights))
    assert stats.length == pytest.approx(2)


def test_harmful_skill_is_removed_after_the_least_tries_and_not_proposed_again_soon():
    library = _library()
    library.propose([_spec("bad"), _spec("good", (1,))], 0)
    _use(library, 2, [0.1, 0.3] * 10)
    _use(library, 1, [-1.0, -0.5] * 4 + [-1.0])
    assert library.prune() == []  # nine tries
    _use(library, 1, [-0.5])
    assert library.prune() == [0] and _names(library) == [None, "good", None]
    assert library.metrics()["options/removed"] == 1
    assert library.propose([_spec("bad")], 2000) == []
    assert library.metrics()["options/refused/removed"] == 1
    assert library.propose([_spec("bad")], 2001) == [0]  # 20 intervals later
    assert library.slots[0].uid == 3 and library.slots[0].stats.tries == 0


def test_harmless_skills_stay():
    """Of 20 skills without an effect, looked at after each of 300 tries, few are taken for harmful."""
    removed = 0
    for seed in range(20):
        library = _library()
        library.propose([_spec()], 0)
        for advantage in np.random.default_rng(seed).normal(0, 1, 300):
            library.record(1, advantage, True, 1)
            removed += bool(library.prune())
    assert removed <= 2


def test_pinned_skill_is_never_removed():
    library = _library()
    library.propose([_spec()], 0)
    library.slots[0].pinned = True
    _use(library, 1, [-5.0] * 100)
    assert library.prune() == []


def test_where_all_slots_are_taken_the_worst_doubtful_one_makes_room():
    library = _library()
    library.propose([_spec(f"s{i}", (i,)) for i in range(2)], 0)
    doubtful = [-1.0, 1.0, -1.0, 0.0] * 5  # mean about -0.25, standard error 0.2
    _use(library, 1, doubtful)
    _use(library, 2, [value - 0.05 for value in doubtful])
    assert library.prune() == []  # there is room
    library.propose([_spec("s2", (2,))], 0)
    _use(library, 3, [-2.0] * 9)  # clearly bad, but hardly tried
    assert library.prune() == [1]
    assert library.prune() == []


def test_records_of_skills_that_are_gone_and_wild_numbers_count_for_nothing():
    library = _library()
    library.propose([_spec()], 0)
    library.record(7, 1.0, True, 1)
    for advantage in (float("nan"), float("inf")):
        library.record(1, advantage, True, 1)
    assert library.slots[0].stats.tries == 0
    _use(library, 1, [1e308, -1e308, 5.0])
    assert np.isfinite(list(library.metrics().values())).all() and np.isfinite(library.slots[0].stats.error)


def test_metrics_of_each_skill_have_short_names_of_their_own():
    library = _library()
    library.propose(
        [_spec("fetch wood/now!"), _spec("fetch wood:now!", (1,)), _spec("木を切る" * 15, (2,))], 0
    )
    library.record(1, 0.5, True, 3)
    metrics = library.metrics()
    assert metrics["options/count"] == 3 and metrics["options/avg_success_rate"] == 1
    assert metrics["options/mean_length"] == 3
    assert metrics["options/fetch_wood_now_/advantage"] == 0.5
    assert metrics["options/fetch_wood_now__2/tries"] == 0
    assert f"options/{('木を切る' * 15)[:40]}/tries" in metrics
    assert all(re.fullmatch(r"[\w./-]+", name) for name in metrics)


# skills.yaml


def test_written_file_says_all_and_reading_it_changes_nothing(path):
    library = _start(path, _spec("chop", ("do", 1), 6, 1 / 3 + 0.5, description="a: b #c", subgoal="drink"))
    library.record(1, 0.25, True, 4)
    library.save()
    text = path.read_text()
    assert "actions: [do, move_left]" in text and "duration: 6" in text and "by: adviser" in text
    assert "# 1 tries: success rate 1.00, advantage 0.25" in text
    assert "# The actions: noop, move_left," in text and "# The subgoals: collect_wood, drink" in text
    state = library.state_dict()
    _edit(path, ("# The actions", "# the actions"))
    assert library.poll() == ([], [])
    assert library.state_dict() == state


def test_nothing_is_read_or_written_where_nothing_changed(path, monkeypatch):
    library = _start(path)
    monkeypatch.setattr(options, "_read_bytes", None)
    monkeypatch.setattr(options, "atomic_write", None)
    assert library.poll() == ([], [])


def test_library_without_a_file_writes_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    library = _library()
    library.propose([_spec()], 0)
    library.save()
    assert library.poll() == ([], []) and not list(tmp_path.iterdir())


def test_person_adds_a_skill_while_training_runs(path):
    library = _start(path)
    _edit(path, ("# By this", ADDED))
    changed, lines = library.poll()
    assert changed == [2] and _names(library) == ["chop", "walk", "mine"]
    mine = library.slots[2]
    assert (mine.by, mine.spec.confidence, mine.timeout, mine.actions) == ("person", 1.0, 2, (2, 3))
    assert lines == ["skills.yaml was read: added mine"]
    assert "by: person" in path.read_text()
    assert library.poll() == ([], [])


def test_name_description_and_pinned_change_without_loss_of_statistics(path):
    library = _start(path)
    library.record(1, 0.5, True, 1)
    _edit(
        path,
        ("name: chop\n  description: ''", "name: hack\n  description: at trees"),
        ("pinned: false", "pinned: true"),
    )
    changed, lines = library.poll()
    skill = library.slots[0]
    assert changed == [] and lines == ["skills.yaml was read: changed hack; changed walk"]
    assert (skill.uid, skill.spec.name, skill.spec.description) == (1, "hack", "at trees")
    assert skill.pinned and skill.stats.tries == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("actions: [do]", "actions: [do, do]"),
        ("duration: 1\n", "duration: 3\n"),
        ("duration: 1\n  confidence: 0.8\n  subgoal: null", "confidence: 0.8\n  subgoal: drink"),
    ],
)
def test_other_actions_duration_or_subgoal_make_another_skill(path, old, new):
    library = _start(path)
    library.record(1, 0.5, True, 1)
    _edit(path, (old, new))
    changed, _ = library.poll()
    assert changed == [0] and _names(library)[:2] == ["chop", "walk"]
    assert (library.slots[0].uid, library.slots[0].by, library.slots[0].stats.tries) == (3, "person", 0)
    assert library.propose([_spec("again")], 0) == []  # the person did not want that


def test_deleted_skill_is_gone_and_not_proposed_again(path):
    library = _start(path)
    _edit(path, text=_without(path, "chop"))
    assert library.poll() == ([0], ["skills.yaml was read: deleted chop"])
    for duration in (1, 7):
        assert library.propose([_spec("chop", duration=duration)], 10**9) == []
    assert library.metrics()["options/refused/deleted"] == 2
    _edit(path, ("# By this", ADDED.replace("[move_right, Do]", "[do]")))  # but the person may
    assert library.poll()[0] == [0]
    assert _names(library) == ["mine", "walk", None] and not library.state_dict()["deleted"]


def test_more_skills_than_slots_wait_until_one_is_free(path):
    library = _start(path)
    _edit(path, ("# By this", ADDED))
    more = "- {name: second, actions: [noop]}\n- {name: third, actions: [4]}\n\n# By this"
    _edit(path, ("# By this", more))
    changed, lines = library.poll()
    assert changed == [2] and lines[0].endswith("added third; 2 wait for a place (options.max_options 3)")
    assert _names(library) == ["chop", "walk", "mine"]
    assert path.read_text().count("# waits for a place") == 2
    assert library.poll() == ([], [])
    _use(library, 1, [-1.0] * 10)
    library.prune()
    assert library.propose([_spec("new", (1, 1))], 0) == []  # the person's wait for it
    changed, lines = library.poll()
    assert changed == [0] and _names(library) == ["second", "walk", "mine"]
    assert lines == ["Skill chop removed after 10 tries: advantage -1 ± 0"]


MISTAKES = {
    "there is no action move_lft; the nearest is move_left": "{name: x, actions: [do, move_lft]}",
    "there is no action 5; they are numbered 0 to 4": "{name: x, actions: [5]}",
    "there is no action True": "{name: x, actions: [true]}",
    "16 actions; it must be 1 to 15": "{name: x, actions: [" + "do, " * 16 + "]}",
    "0 actions; it must be 1 to 15": "{name: x, actions: []}",
    "actions must be a list such as [noop], not do": "{name: x, actions: do}",
    "it has no actions": "{name: x}",
    "it has no name": "{actions: [do]}",
    "name must be text, not 5": "{name: 5, actions: [do]}",
    "there is no field action; the nearest is actions": "{name: x, action: [do]}",
    "duration must be a whole number from 1 to 15, not 99; the nearest is 15": (
        "{name: x, actions: [do], duration: 99}"
    ),
    "duration must be a whole number from 1 to 15, not 1.5": "{name: x, actions: [do], duration: 1.5}",
    "confidence must be a number from 0 to 1, not 2": "{name: x, actions: [do], confidence: 2}",
    "there is no subgoal dring; the nearest is drink": "{name: x, actions: [do], subgoal: dring}",
    "pinned must be true or false, not yes": "{name: x, actions: [do], pinned: yes}",
    "by must be adviser or person, not me": "{name: x, actions: [do], by: me}",
    "another one has this name": "{name: WALK, actions: [noop]}",
    "another one has the same actions": "{name: x, actions: [1], duration: 5}",
    "it must hold name, actions": "just text",
    r"name must be text, not 'a\x1b[2J'": '{name: "a\\e[2J", actions: [do]}',
}


@pytest.mark.parametrize(("message", "entry"), MISTAKES.items())
def test_each_mistake_is_reported_and_the_others_count(path, message, entry):
    library = _start(path)
    _edit(path, text=_without(path, "chop").replace("# By this", f"- {entry}\n{ADDED}"))
    edited = path.read_text()
    changed, lines = library.poll()
    assert changed == [2] and _names(library) == ["chop", "walk", "mine"]  # nothing is deleted meanwhile
    assert lines[0].startswith("skills.yaml: skill 2") and message in lines[0]
    assert "until this is corrected" in lines[1] and lines[2] == "skills.yaml was read: added mine"
    assert all(line.isprintable() for line in lines)
    library.save()
    assert path.read_text() == edited  # the person's text is not lost
    assert library.poll() == ([], [])
    _edit(path, (f"- {entry}\n", ""))
    assert library.poll() == ([0], ["skills.yaml was read: deleted chop"])
    assert path.read_text() != edited


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("skills: [", "line 1: not valid YAML"),
        ("skills:\n- name: a\n  name: b\n", "line 3: not valid YAML"),
        ("", "it must hold skills:"),
        ("- name: a\n", "it must hold skills:"),
        ("skills: {a: 1}", "it must hold skills:"),
        ("skills: !!python/object/apply:os.system [ls]", "tags (!name) are refused"),
        ("a: &a [1]\nskills: [*a]", "aliases (*name) are refused"),
        ("skills: " + "[" * 5000, "maximum depth"),
        ("skills:\n" + "- " * 5000, "maximum depth"),
        ("skills: [2024-99-99]", "not valid YAML"),
        ("skills: [" + "9" * 5000 + "]", "not valid YAML"),
        ("skills: [0x" + "f" * 5000 + "]", "a number that is too long"),
        ("skills: []\nother: 1", "other is not known here"),
        ("skills: []\nknown: 5", "known and deleted at its end"),
        ("skills: []\ndeleted: [[1]]", "known and deleted at its end"),
        ("skills: []\n# " + "x" * 2**18, "larger than 256 KiB"),
        ("skills: [\x00]", "not valid YAML"),
        ("%YAML 9.9\n---\nskills: []", "not valid YAML"),
    ],
)
def test_file_that_cannot_be_read_leaves_the_library_as_it_was(path, text, reason):
    library = _start(path)
    state = library.state_dict()
    _edit(path, text=text)
    changed, lines = library.poll()
    assert changed == [] and reason in lines[0] and "until this is corrected" in lines[1]
    assert library.state_dict() == state | {"applied": library.state_dict()["applied"]}
    library.save()
    assert path.read_text() == text
    assert library.poll() == ([], [])


def test_other_encodings_are_reported(path):
    library = _start(path)
    path.write_bytes("skills: [é]".encode("latin-1"))
    assert "not a text file in UTF-8" in library.poll()[1][0]
    path.write_bytes(b"\xef\xbb\xbfskills:\r\n- {name: a, actions: [noop]}\r\n")  # as Windows writes it
    assert _names(library)[2] is None and library.poll()[0] == [2]


def test_deleted_file_is_written_again(path):
    library = _start(path)
    text = path.read_text()
    path.unlink()
    assert library.poll() == ([], ["skills.yaml was deleted: written again"])
    assert path.read_text() == text and library.poll() == ([], [])


def test_save_waits_for_an_edit_that_was_not_read_yet(path):
    library = _start(path)
    library.propose([_spec("new", (0,))], 200)
    _edit(path, ("# By this", ADDED))
    edited = path.read_text()
    library.save()
    assert path.read_text() == edited
    changed, _ = library.poll()
    assert changed == [] and _names(library) == ["chop", "walk", "new"]  # mine waits
    assert "- name: new\n" in path.read_text() and "- name: mine\n" in path.read_text()


def test_editor_that_showed_an_older_state_deletes_and_revives_nothing(path):
    library = _start(path)
    shown = path.read_text()
    _use(library, 1, [-1.0] * 10)
    library.prune()
    library.propose([_spec("new", (0,))], 200)
    library.save()
    _edit(path, text=shown.replace("# By this", ADDED))
    assert library.poll() == (
        [2],
        ["Skill chop removed after 10 tries: advantage -1 ± 0"] + ["skills.yaml was read: added mine"],
    )
    assert _names(library) == ["new", "walk", "mine"]


def test_edit_elsewhere_does_not_revive_a_persons_skill_that_was_just_removed(path):
    library = _start(path)
    _edit(path, ("# By this", ADDED))
    library.poll()
    _use(library, 3, [-1.0] * 10)
    library.prune()
    _edit(path, ("name: chop", "name: hew"))
    changed, lines = library.poll()
    assert _names(library) == ["hew", "walk", None] and lines[-1].endswith("read: changed hew")


def test_persons_name_wins_over_one_that_the_adviser_gave_meanwhile(path):
    library = _start(path)
    shown = path.read_text()
    library.propose([_spec("Mine", (0,))], 200)
    library.save()
    _edit(path, text=shown.replace("name: walk", "name: mine"))
    library.poll()
    assert _names(library) == ["chop", "mine", "mine_2"]
    shown = _without(path, "mine_2")
    shown = shown.replace(re.search(r"known: \[.*\]", shown)[0], "known: []")
    _edit(path, text=shown.replace("# By this", "- {name: MINE_2, actions: [4]}\n\n# By this"))
    library.poll()
    assert _names(library)[2] == "MINE_2_2" and library._waiting[0].spec.name == "MINE_2"


def test_file_that_is_cut_off_deletes_nothing(path):
    library = _start(path)
    text = path.read_text()
    _edit(path, text=text[: text.index("- name: walk")])
    assert library.poll() == ([], []) and path.read_text() == text


def test_file_is_read_when_its_editor_is_done(path, monkeypatch):
    library = _start(path)
    monkeypatch.setattr(options, "SETTLE_SECONDS", 60.0)
    _edit(path, ("# By this", ADDED))
    os.utime(path)
    assert library.poll() == ([], [])
    os.utime(path, (1, 1))
    assert library.poll()[0] == [2]


def test_trouble_with_the_disk_stops_nothing_and_is_told_once(tmp_path):
    (tmp_path / "file").write_text("")
    library = _library(tmp_path / "file" / "skills.yaml")
    told = [library.poll()[1]]
    for step in range(3):
        library.propose([_spec(str(step), (step,))], step)
        library.save()
        told.append(library.poll()[1])
    assert [len(lines) for lines in told] == [1, 0, 0, 0] and "skills.yaml" in told[0][0]
    folder = tmp_path / "skills.yaml"
    folder.mkdir()
    library = _library(folder)
    assert "Cannot read" in library.poll()[1][0] and library.poll()[1] == []


def test_skills_of_another_run_are_taken_over_with_the_file(path, tmp_path):
    _start(path)
    other = tmp_path / "other.yaml"
    other.write_bytes(path.read_bytes())
    library = _library(other)
    library.save()  # not over what was not read yet
    changed, lines = library.poll()
    assert changed == [0, 1] and lines == ["other.yaml was read: added chop; added walk"]
    assert {skill.by for skill in library.skills()} == {"adviser"}


# Resuming


def _resume(path, state, tmp_path):
    """A library from the state as a checkpoint holds it."""
    torch.save(state, tmp_path / "latest.pt")
    library = _library(path)
    library.load_state_dict(torch.load(tmp_path / "latest.pt", weights_only=True))
    return library


def _busy(path, tmp_path):
    """A library in the middle of a run, and what its checkpoint holds."""
    library = _start(path)
    _edit(path, ("# By this", ADDED))
    library.poll()
    _use(library, 1, np.random.default_rng(0).normal(0.2, 1, 30))
    _use(library, 2, [-1.0] * 10)
    library.prune()
    library.save()
    library.poll()
    return library, library.state_dict()


def _later(library):
    """What the run did after its checkpoint: it goes on to prune and propose, also the same actions again."""
    _use(library, 1, [-5.0] * 100)
    library.prune()
    library.propose([_spec("late", (0, 0)), _spec("walk again", ("move_left",), 5)], 10**6)
    library.propose([_spec("chop", description="again")], 10**7)
    library.save()
    assert _names(library) == ["late", "walk again", "mine"]


def test_resumed_library_is_the_checkpoints_whatever_the_run_wrote_later(path, tmp_path):
    library, state = _busy(path, tmp_path)
    for _ in range(2):
        resumed = _resume(path, state, tmp_path)
        assert resumed.state_dict() == state
        assert resumed.poll() == ([], [])
        assert resumed.state_dict() == state
        _later(library)
    library.prune()
    resumed.save()
    assert "late" not in path.read_text() and "- name: chop\n" in path.read_text()


def test_same_actions_proposed_again_after_the_checkpoint_leave_the_old_skill_alone(path, tmp_path):
    library = _start(path, _spec("chop"))
    state = library.state_dict()
    _use(library, 1, [-5.0] * 10)
    library.prune()
    library.propose([_spec("hew", description="again", confidence=1.0)], 10**6)
    library.save()
    resumed = _resume(path, state, tmp_path)
    assert resumed.poll() == ([], []) and resumed.state_dict() == state


def test_edits_win_on_resume_whether_made_while_stopped_or_after_the_checkpoint(path, tmp_path):
    library, state = _busy(path, tmp_path)
    _later(library)
    _edit(path, text=_without(path, "mine"))
    library.poll()  # the run saw it, and wrote the file again
    _edit(path, ("# By this", ADDED.replace("mine", "mine too").replace("Do", "Do, Do")))
    library.poll()
    library.save()
    _edit(
        path, ("# By this", "- {name: stopped, actions: [place_stone]}\n\n# By this")
    )  # this one nobody saw
    resumed = _resume(path, state, tmp_path)
    changed, lines = resumed.poll()
    assert changed == [1, 2] and _names(resumed) == ["chop", "mine too", "stopped"]
    assert lines == ["skills.yaml was read: deleted mine; added mine too; added stopped"]
    assert [skill.uid for skill in resumed.skills()] == [1, 4, 5]
    assert resumed.slots[0].stats == options.Stats(**state["slots"][0]["stats"])


def test_resume_with_mistakes_in_the_file_is_exact_and_reports_them_again(path, tmp_path):
    library = _start(path)
    _edit(path, ("# By this", f"- oops\n{ADDED}"))
    library.poll()
    _use(library, 3, [-1.0] * 10)
    assert library.prune() == [2]
    library.poll()
    state = library.state_dict()
    resumed = _resume(path, state, tmp_path)
    changed, lines = resumed.poll()
    assert changed == [] and "skill 3" in lines[0] and resumed.state_dict() == state


def test_uids_are_not_used_again_after_a_resume(path, tmp_path):
    library = _start(path)
    _use(library, 2, [-1.0] * 10)
    library.prune()
    resumed = _resume(path, library.state_dict(), tmp_path)
    resumed.propose([_spec("new", (0,))], 200)
    assert [skill.uid for skill in resumed.skills()] == [1, 3]
    assert resumed.propose([_spec("walk", ("move_left",), 5)], 200) == []  # what was removed is remembered


def test_checkpoint_that_does_not_fit_the_options_is_refused(path):
    state = _start(path).state_dict()
    for change, message in [
        ({"max_options": 4}, "max_options 4"),
        ({"option_max_length": 4}, "max_length 4"),
    ]:
        with pytest.raises(UserError, match=message):
            _library(**change).load_state_dict(state)


def test_checkpoint_with_a_subgoal_of_another_captioner_is_refused():
    library = _library()
    library.propose([_spec(subgoal="drink")], 0)
    other = OptionLibrary(None, SimpleNamespace(actions=ACTIONS, subgoals=("eat",)), OPTIONS)
    with pytest.raises(UserError, match="llm.captioner.*subgoal drink"):
        other.load_state_dict(library.state_dict())


def test_library_needs_no_torch():
    code = "import sys, lore_llm.options; sys.exit('torch' in sys.modules)"
    root = Path(options.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


# Whatever is in the file


def _check(library):
    """What always holds of a library."""
    skills = library.skills()
    everyone = [*skills, *library._waiting]
    assert len(library.slots) == OPTIONS["max_options"]
    assert len({skill.uid for skill in everyone}) == len(everyone)
    assert len({skill.key for skill in everyone}) == len(everyone)
    assert len({skill.spec.name.casefold() for skill in everyone}) == len(everyone)
    for skill in everyone:
        assert 0 < skill.uid < library._next_uid and skill.by in options.AUTHORS
        assert len(skill.actions) <= skill.timeout <= OPTIONS["option_max_length"]
        assert all(type(action) is int and 0 <= action < len(ACTIONS) for action in skill.actions)
        assert OptionSpec(**skill.spec.model_dump()) == skill.spec
    assert len(library._removed) <= options.MAX_REMEMBERED and len(library._deleted) <= options.MAX_REMEMBERED
    copy = _library()
    copy.load_state_dict(library.state_dict())
    assert copy.state_dict() == library.state_dict()


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(ACTIONS),
    lambda each: st.lists(each, max_size=4) | st.dictionaries(st.text(max_size=4), each, max_size=3),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {
        "name": st.text(min_size=1, max_size=70) | st.sampled_from(["chop", "walk", "CHOP"]) | values,
        "actions": st.lists(st.sampled_from(ACTIONS) | st.integers(-1, 6), max_size=17) | values,
    },
    optional={
        "description": st.text(max_size=310) | values,
        "duration": st.integers(-1, 20) | values,
        "confidence": st.floats(0, 1) | values,
        "subgoal": st.sampled_from([None, "drink", "fly"]) | values,
        "pinned": st.booleans() | values,
        "by": st.sampled_from(options.AUTHORS) | values,
        "nonsense": values,
    },
)
trees = st.fixed_dictionaries(
    {"skills": st.lists(entries | values, max_size=5) | values},
    optional={"known": st.lists(st.text(max_size=20)) | values, "deleted": values, "more": values},
)
lines = st.sampled_from(
    [
        "skills:",
        "- name: a",
        "  actions: [do]",
        "  actions: [",
        "- &x a",
        "- *x",
        "<<: {a: 1}",
        "  pinned: yes",
    ]
    + [
        "? [a]",
        ": b",
        "--- x",
        "%YAML 9.9",
        "known: [1-x]",
        "deleted: [[[1], 2, null]]",
        "- {name: b",
        "!!set {a}",
    ]
)


class Edits(RuleBasedStateMachine):
    """Random proposals, executions, edits, mistakes and resumes, in any order."""

    folder = None

    def __init__(self):
        super().__init__()
        self.path = self.folder / "skills.yaml"
        self.path.unlink(missing_ok=True)
        self.library = _library(self.path)
        self.library.poll()
        self.state = self.library.state_dict()
        self.edited = False  # since the checkpoint
        self.time = 10**9

    def unread(self):
        return self.path.exists() and options._digest(self.path.read_bytes()) != self.library._digest

    def edit(self, text):
        self.edited = True
        self.path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        self.time += 10
        os.utime(self.path, (self.time, self.time))

    @rule(
        names=st.lists(st.text("abc", min_size=1, max_size=3), max_size=4),
        data=st.data(),
        step=st.integers(0, 9999),
    )
    def propose(self, names, data, step):
        actions = st.lists(st.integers(0, 5) | st.sampled_from(ACTIONS), min_size=1, max_size=3)
        specs = [_spec(name, tuple(data.draw(actions)), data.draw(st.integers(1, 30)), 0.9) for name in names]
        before = [skill and skill.uid for skill in self.library.slots]
        changed = self.library.propose(specs, step)
        assert all(before[slot] is None and self.library.slots[slot] for slot in changed)

    @rule(uid=st.integers(1, 12), values=st.lists(st.floats(), max_size=12), sign=st.sampled_from([-1, 1]))
    def record(self, uid, values, sign):
        for value in values:
            self.library.record(uid, sign * abs(value), value > 0, 3)

    @rule()
    def prune(self):
        pinned = {skill.uid for skill in self.library.skills() if skill.pinned}
        for slot in self.library.prune():
            assert self.library.slots[slot] is None
        assert pinned <= {skill.uid for skill in self.library.skills()}

    @rule(tree=trees)
    def edit_anything(self, tree):
        self.edit(options._dump(tree))

    @rule(parts=st.lists(lines | st.text(max_size=10), max_size=8))
    def edit_lines(self, parts):
        self.edit("\n".join(parts))

    @precondition(lambda self: self.path.exists())
    @rule(data=st.data())
    def edit_a_little(self, data):
        text = self.path.read_bytes()
        start = data.draw(st.integers(0, len(text)))
        self.edit(
            text[:start] + data.draw(st.binary(max_size=3)) + text[start + data.draw(st.integers(0, 60)) :]
        )

    @rule(data=st.data())
    def edit_well(self, data):
        """Delete, change, pin and add skills as a person who makes no mistakes."""
        try:
            tree = options._load_yaml(self.path.read_bytes())
            before = [entry for entry in tree["skills"] or [] if self.library._read_entry(entry)]
        except (OSError, ValueError, TypeError, KeyError):
            tree, before = {}, []
        tree["skills"] = []
        for entry in before[:6]:
            change = data.draw(
                st.sampled_from([{}, {}, None, {"pinned": True}, {"duration": 9}, {"name": "new"}])
            )
            if change is not None:
                tree["skills"].append(entry | change)
        for name in data.draw(st.lists(st.sampled_from("xyz"), unique=True, max_size=2)):
            actions = data.draw(st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=2))
            tree["skills"].append({"name": name, "actions": actions})
        self.edit(options._dump(tree))
        self.poll()

    @precondition(lambda self: self.path.exists())
    @rule()
    def delete_file(self):
        self.path.unlink()

    @rule()
    def poll(self):
        before = [skill and skill.uid for skill in self.library.slots]
        changed, told = self.library.poll()
        after = [skill and skill.uid for skill in self.library.slots]
        assert changed == [i for i in range(len(after)) if before[i] != after[i]]
        assert all(line.isprintable() and len(line) < 2000 for line in told)
        assert self.path.exists()
        again = self.library.state_dict()
        assert self.library.poll() == ([], []) and self.library.state_dict() == again

    @rule()
    def save(self):
        unread = self.unread()
        before = self.path.read_bytes() if self.path.exists() else None
        self.library.save()
        assert not unread or self.path.read_bytes() == before

    @rule()
    def checkpoint(self):
        self.state = self.library.state_dict()
        self.edited = self.unread()

    @rule()
    def resume(self):
        self.library = _library(self.path)
        self.library.load_state_dict(self.state)
        if not self.edited:
            alone = _library()
            alone.load_state_dict(self.state)
            assert self.library.poll()[0] == alone.poll()[0]
            assert self.library.state_dict() == alone.state_dict()

    @invariant()
    def holds(self):
        _check(self.library)


def test_random_edits_raise_nothing_and_break_no_bound(tmp_path):
    Edits.folder = tmp_path
    run_state_machine_as_test(
        Edits, settings=settings(max_examples=40, stateful_step_count=20, deadline=None)
    )


@given(
    specs=st.lists(
        st.tuples(st.text(min_size=1, max_size=64), st.text(max_size=300), st.floats(0, 1)), max_size=3
    )
)
def test_any_text_of_an_adviser_survives_the_file(tmp_path_factory, specs):
    path = tmp_path_factory.mktemp("skills") / "skills.yaml"
    made = []
    for index, (name, description, confidence) in enumerate(specs):
        try:
            made.append(_spec(name, (index,), index + 1, confidence, description=description))
        except ValueError:  # a name that OptionSpec refuses
            continue
    library = _library(path, skill_confidence_threshold=0.0)
    library.propose(made, 0)
    library.poll()
    copy = path.with_name("copy.yaml")
    copy.write_bytes(path.read_bytes())
    other = _library(copy)
    assert not any("correct" in line for line in other.poll()[1])
    assert [skill.spec for skill in other.skills()] == [skill.spec for skill in library.skills()]
