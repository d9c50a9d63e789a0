"""The library of options, skills.yaml and skills_learned.yaml."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from lore_llm import OptionSpec, options
from lore_llm.options import LEARNED_FILE, PERSON_FILE, OptionLibrary

ACTIONS = ("noop", "move_left", "move_right", "do", "place_stone")
CAPTIONER = SimpleNamespace(actions=ACTIONS, subgoals=("collect_wood", "drink"))
OPTIONS = {
    "max_options": 3,
    "option_generation_interval": 100,
    "skill_confidence_threshold": 0.5,
    "option_min_tries": 10,
    "option_max_length": 15,
}
MINE = "{name: mine, actions: [move_right, Do]}"


def _library(folder=None, **changes):
    return OptionLibrary(folder, CAPTIONER, OPTIONS | changes)


def _spec(name="chop", actions=("do",), duration=1, confidence=0.8, **fields):
    return OptionSpec(
        name=name, primitive_actions=actions, expected_duration=duration, confidence=confidence, **fields
    )


def _names(library):
    return [option and option.spec.name for option in library.slots]


def _start(folder):
    """A library with two proposals, chop and walk."""
    library = _library(folder)
    library.poll()
    library.propose([_spec("chop"), _spec("walk", ("move_left",), 5)], 100)
    return library


def _edit(folder, text):
    (folder / PERSON_FILE).write_text(text, encoding="utf-8")


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
    assert [option.timeout for option in library.options()] == [4, 15]


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
    assert [option.spec.subgoal for option in library.options()] == [None, "drink"]
    assert library.metrics()["options/refused/unknown_subgoal"] == 1


def test_proposals_replace_nothing():
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


def test_person_adds_a_skill_while_training_runs(tmp_path):
    library = _start(tmp_path)
    _edit(tmp_path, f"skills: [{MINE}]")
    assert library.poll() == ([2], ["skills.yaml was read: skills mine"])
    mine = library.slots[2]
    assert _names(library) == ["chop", "walk", "mine"]
    assert (mine.by, mine.spec.confidence, mine.timeout, mine.actions) == ("person", 1.0, 2, (2, 3))
    assert library.poll() == ([], [])
    _edit(tmp_path, f"skills: [{MINE}]  # a comment")
    assert library.poll() == ([], [])
    _edit(tmp_path, "")
    assert library.poll() == ([2], ["skills.yaml was read: it is empty"])
    assert _names(library) == ["chop", "walk", None]


def test_a_learned_skill_that_is_copied_to_the_file_keeps_its_statistics(tmp_path):
    library = _start(tmp_path)
    library.record(1, 0.5, True, 1)
    library.save()
    learned = (tmp_path / LEARNED_FILE).read_text(encoding="utf-8")
    _edit(tmp_path, learned.replace('name: "chop"', 'name: "hack"'))
    assert library.poll()[0] == []
    option = library.slots[0]
    assert (option.uid, option.spec.name, option.by, option.stats.tries) == (1, "hack", "person", 1)


@pytest.mark.parametrize("change", ["actions: [do, do]", "duration: 3", "subgoal: drink"])
def test_other_actions_duration_or_subgoal_make_another_skill(tmp_path, change):
    library = _library(tmp_path)
    _edit(tmp_path, "skills: [{name: mine, actions: [do]}]")
    library.poll()
    library.record(1, 0.5, True, 1)
    entry = {"actions": "actions: [do]", change.split(":")[0]: change}
    _edit(tmp_path, f"skills: [{{name: mine, {', '.join(entry.values())}}}]")
    assert library.poll()[0] == [0]
    assert (library.slots[0].uid, library.slots[0].stats.tries) == (2, 0)


def test_banned_skill_is_removed_and_not_taken_again_under_its_name_or_with_its_actions(tmp_path):
    library = _start(tmp_path)
    _edit(tmp_path, "banned: [Chop, later]")
    assert library.poll() == ([0], ["skills.yaml was read: banned Chop, later"])
    for spec in (_spec("chop", (0, 0)), _spec("other", duration=7), _spec("later", (4,))):
        assert library.propose([spec], 10**9) == []
    assert library.metrics()["options/refused/banned"] == 3
    _edit(tmp_path, "banned: []")
    library.poll()
    assert library.propose([_spec("chop")], 10**9) == [0]


def test_pinned_skill_is_never_removed(tmp_path):
    library = _start(tmp_path)
    _edit(tmp_path, "pinned: [CHOP]")
    library.poll()
    _use(library, 1, [-5.0] * 100)
    assert library.prune() == []
    _edit(tmp_path, "pinned: [walk]")
    library.poll()
    assert library.prune() == [0]


def test_more_skills_than_slots_wait_until_one_is_free(tmp_path):
    library = _start(tmp_path)
    _edit(tmp_path, f"skills: [{MINE}, {{name: second, actions: [noop]}}, {{name: third, actions: [4]}}]")
    assert library.poll()[0] == [2] and _names(library) == ["chop", "walk", "mine"]
    library.save()
    assert (tmp_path / LEARNED_FILE).read_text().count("waits for a free slot") == 2
    _use(library, 1, [-1.0] * 10)
    library.prune()
    assert library.propose([_spec("new", (1, 1))], 0) == []  # a person's skills are first
    changed, lines = library.poll()
    assert changed == [0] and _names(library) == ["second", "walk", "mine"]
    assert len(lines) == 1 and lines[0].startswith("Skill chop removed after 10 tries: ")


def test_a_persons_skill_that_was_removed_for_poor_results_comes_back_when_it_is_pinned(tmp_path):
    library = _library(tmp_path)
    _edit(tmp_path, f"skills: [{MINE}]")
    library.poll()
    _use(library, 1, [-1.0] * 10)
    assert library.prune() == [0] and library.poll()[0] == []
    _edit(tmp_path, f"skills: [{MINE}]\npinned: [mine]")
    assert library.poll()[0] == [0] and library.slots[0].stats.tries == 0


MISTAKES = {
    "there is no action move_lft; the nearest is move_left": "skills: [{name: x, actions: [do, move_lft]}]",
    "there is no action 5; they are numbered 0 to 4": "skills: [{name: x, actions: [5]}]",
    "actions: Input should be a valid string": "skills: [{name: x, actions: [true]}]",
    "actions: Tuple should have at most 15 items": "skills: [{name: x, actions: [" + "do, " * 16 + "]}]",
    "actions: Tuple should have at least 1 item": "skills: [{name: x, actions: []}]",
    "actions: Field required": "skills: [{name: x}]",
    "name: Field required": "skills: [{actions: [do]}]",
    "there is no field action; the nearest is actions": "skills: [{name: x, action: [do]}]",
    "duration: at most 15": "skills: [{name: x, actions: [do], duration: 99}]",
    "there is no subgoal dring; the nearest is drink": "skills: [{name: x, actions: [do], subgoal: dring}]",
    "skill 2 (X): another one has this name": (
        "skills: [{name: x, actions: [do]}, {name: X, actions: [noop]}]"
    ),
    "another one has the same actions": "skills: [{name: x, actions: [1]}, {name: y, actions: [1]}]",
    "it must have fields such as name": "skills: [just text]",
    r"('a\x1b[2J')": 'skills: [{name: "a\\e[2J", actions: [do]}]',
    "skills must be a list": "skills: {a: 1}",
    "banned must be a list of names": "banned: [5]",
    "there is no key pined; the nearest is pinned": "pined: [chop]",
    "it must have the keys skills, pinned or banned": "- name: a",
    "line 1: not valid YAML": "skills: [",
    "line 3: not valid YAML": "skills:\n- name: a\n  name: b\n",
    "could not determine a constructor": "skills: !!python/object/apply:os.system [ls]",
    "aliases (*) are refused": "a: &a [1]\nskills: [*a]",
}


@pytest.mark.parametrize(("message", "text"), MISTAKES.items())
def test_a_broken_file_gives_one_line_and_the_last_valid_state_stays(tmp_path, message, text):
    library = _start(tmp_path)
    _edit(tmp_path, f"skills: [{MINE}]\nbanned: [walk]")
    library.poll()
    state = library.state_dict()
    _edit(tmp_path, text)
    changed, (line,) = library.poll()
    assert changed == [] and message in line and line.isprintable()
    assert line.startswith("skills.yaml") and line.endswith("; the last valid state stays")
    assert library.state_dict() == state and library.poll() == ([], [])
    assert (tmp_path / PERSON_FILE).read_text() == text


def test_a_file_that_is_no_text_or_cannot_be_read_gives_one_line(tmp_path):
    library = _start(tmp_path)
    (tmp_path / PERSON_FILE).write_bytes("skills: [é]".encode("latin-1"))
    assert "not a text file in UTF-8" in library.poll()[1][0]
    (tmp_path / PERSON_FILE).unlink()
    (tmp_path / PERSON_FILE).mkdir()
    assert "cannot be read" in library.poll()[1][0] and library.poll() == ([], [])
    (tmp_path / PERSON_FILE).rmdir()
    windows = b"\xef\xbb\xbfskills:\r\n- {name: a, actions: [noop]}\r\n"
    (tmp_path / PERSON_FILE).write_bytes(windows)
    assert library.poll()[0] == [2]


# skills_learned.yaml


def test_learned_file_lists_the_skills_with_their_statistics(tmp_path):
    library = _library(tmp_path)
    library.propose([_spec("chop", ("do", 1), 6, description="a: b #c", subgoal="drink")], 100)
    library.record(1, 0.25, True, 4)
    library.save()
    text = (tmp_path / LEARNED_FILE).read_text(encoding="utf-8")
    assert "# By the adviser; 1 tries: success rate 1.00, advantage 0.25" in text
    assert "# Actions: noop, move_left" in text and "# Subgoals: collect_wood, drink" in text
    (entry,) = YAML(typ="safe", pure=True).load(text)["skills"]
    assert entry == {
        "name": "chop", "actions": ["do", "move_left"], "description": "a: b #c", "duration": 6,
        "confidence": 0.8, "subgoal": "drink",
    }  # fmt: skip


def test_library_without_a_folder_has_no_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    library = _library()
    library.propose([_spec()], 0)
    library.save()
    assert library.poll() == ([], []) and not list(tmp_path.iterdir())


@settings(max_examples=30, deadline=None)
@given(specs=st.lists(st.tuples(st.text(max_size=64), st.text(max_size=300), st.floats(0, 1)), max_size=3))
def test_any_text_of_an_adviser_survives_the_files(tmp_path_factory, specs):
    folder, made = tmp_path_factory.mktemp("skills"), []
    for index, (name, description, confidence) in enumerate(specs):
        try:
            made.append(_spec(name, (index,), index + 1, confidence, description=description))
        except ValueError:  # a name that OptionSpec refuses
            continue
    library = _library(folder, skill_confidence_threshold=0.0)
    library.propose(made, 0)
    library.save()
    (folder / LEARNED_FILE).rename(folder / PERSON_FILE)
    other = _library(folder)
    other.poll()
    assert [option.spec for option in other.options()] == [option.spec for option in library.options()]


# Resuming


def _resume(folder, state):
    """A library from the state as a checkpoint holds it."""
    torch.save(state, folder / "latest.pt")
    library = _library(folder)
    library.load_state_dict(torch.load(folder / "latest.pt", weights_only=True))
    return library


def test_resumed_library_is_the_checkpoints_whatever_the_run_did_later(tmp_path):
    library = _start(tmp_path)
    _edit(tmp_path, f"skills: [{MINE}]\nbanned: [walk]")
    library.poll()
    _use(library, 1, np.random.default_rng(0).normal(0.2, 1, 30))
    _use(library, 3, [-1.0] * 10)
    library.prune()
    state = library.state_dict()
    _use(library, 1, [-5.0] * 100)
    library.prune()
    library.propose([_spec("late", (0, 0))], 10**6)
    library.save()
    resumed = _resume(tmp_path, state)
    assert resumed.state_dict() == state and resumed.poll() == ([], []) and resumed.state_dict() == state
    assert _names(resumed) == ["chop", None, None]
    assert resumed.propose([_spec("walk again", ("move_left",), 3), _spec("same", (2, 3), 2)], 200) == []
    assert resumed.propose([_spec("new", (0,))], 200) == [1]
    assert [option.uid for option in resumed.options()] == [1, 4]  # none is used twice


def test_edits_count_on_resume_whether_made_while_stopped_or_after_the_checkpoint(tmp_path):
    library = _start(tmp_path)
    _edit(tmp_path, f"skills: [{MINE}]")
    library.poll()
    state = library.state_dict()
    _edit(tmp_path, "skills: [{name: other, actions: [noop]}]\nbanned: [chop]")
    resumed = _resume(tmp_path, state)
    assert resumed.poll()[0] == [0, 2] and _names(resumed) == ["other", "walk", None]
    (tmp_path / PERSON_FILE).unlink()
    resumed = _resume(tmp_path, state)
    assert resumed.poll()[0] == [2] and _names(resumed) == ["chop", "walk", None]
