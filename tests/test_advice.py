"""Replies of advisers are untrusted data: the parser never raises, and its results are within bounds."""

import json
import math
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from basics import UserError
from lore_llm.advice import (
    MAX_NUMBER,
    MAX_PLAN,
    MAX_TEXT,
    PROBLEMS,
    Advice,
    AdviceSpec,
    OptionSpec,
    parse_replies,
    parse_reply,
    replies_schema,
    reply_schema,
)

SPEC = AdviceSpec(("noop", "left", "right"), ("drink", "eat"), features=2, max_chars=2000, max_skills=2)
GOOD = {
    "action_prior": {"logits": [0.0, 1.5, -2]},
    "confidence": 0.75,
    "features": [0.5, -1],
    "plan": ["left", "left", "noop"],
    "subgoal": "drink",
    "skills": [
        {
            "name": "go left",
            "description": "twice",
            "primitive_actions": ["left", 1],
            "expected_duration": 2,
            "confidence": 0.9,
        }
    ],
}


def parse(reply, **changes):
    return parse_reply(reply, AdviceSpec(**{**vars(SPEC), **changes}))


def with_(**changes) -> str:
    return json.dumps({**GOOD, **changes})


def assert_within_bounds(advice: Advice | None, spec: AdviceSpec = SPEC) -> None:
    if advice is None:
        return
    assert Advice.model_validate(advice.model_dump()) == advice
    if advice.action_prior is not None:
        assert len(advice.action_prior.logits) == len(spec.actions)
        assert all(math.isfinite(x) and abs(x) <= MAX_NUMBER for x in advice.action_prior.logits)
    assert 0 <= advice.confidence <= 1
    assert len(advice.features) in (0, spec.features)
    assert all(math.isfinite(x) and abs(x) <= MAX_NUMBER for x in advice.features)
    assert len(advice.plan) <= MAX_PLAN and set(advice.plan) <= set(spec.actions)
    assert advice.subgoal in (None, *spec.subgoals)
    assert len(advice.skills) <= spec.max_skills
    for skill in advice.skills:
        assert 1 <= len(skill.primitive_actions) <= MAX_PLAN
        for action in skill.primitive_actions:
            assert action in spec.actions if isinstance(action, str) else 0 <= action < len(spec.actions)
        assert skill.subgoal in (None, *spec.subgoals)
        for text in (skill.name, skill.description, skill.option_id or ""):
            assert text.isprintable() and len(text) <= MAX_TEXT


def test_a_good_reply_is_read_completely():
    advice, problems = parse(json.dumps(GOOD))
    assert problems == Counter()
    assert advice.action_prior.logits == (0.0, 1.5, -2.0)
    assert (advice.confidence, advice.features, advice.subgoal) == (0.75, (0.5, -1.0), "drink")
    assert advice.plan == ("left", "left", "noop")
    (skill,) = advice.skills
    assert skill == OptionSpec(
        name="go left",
        description="twice",
        primitive_actions=("left", 1),
        expected_duration=2,
        confidence=0.9,
    )


@pytest.mark.parametrize(
    "text",
    [
        "```json\n{}\n```",
        "Sure, {here} it is: {} And more {braces}.",
        "\ufeff{}",
        'She said: "well". {}',
        "{} {}",
    ],
)
def test_text_around_the_json_is_ignored(text):
    text = text.replace("{}", json.dumps(GOOD, indent=1))
    assert parse(text) == parse(json.dumps(GOOD))


def test_advice_is_the_same_after_json():
    advice, _ = parse(json.dumps(GOOD))
    assert parse(advice.model_dump_json()) == (advice, Counter())
    assert parse(advice.model_dump()) == (advice, Counter())


def test_logits_may_be_given_by_name():
    by_name = {"action_prior": {"logits": {"right": 3, "noop": 1, "left": 2}}}
    assert parse(json.dumps(by_name))[0].action_prior.logits == (1.0, 2.0, 3.0)
    by_name["action_prior"]["logits"].pop("left")
    assert parse(json.dumps(by_name)) == (None, Counter(logits_refused=1, empty=1))
    by_name["action_prior"]["logits"]["up"] = 2
    assert parse(json.dumps(by_name)) == (None, Counter(logits_refused=1, empty=1))


@pytest.mark.parametrize(
    "field, value, reason, kept",
    [
        ("action_prior", {"logits": [1, 2]}, "logits_refused", None),
        ("action_prior", {"logits": [1, 2, "3"]}, "logits_refused", None),
        ("action_prior", {"logits": [1, 2, True]}, "logits_refused", None),
        ("action_prior", {"logits": [1, 2, math.nan]}, "logits_refused", None),
        ("action_prior", {"logits": [1, 2, 10**400]}, "logits_refused", None),
        ("action_prior", {"logits": "123"}, "logits_refused", None),
        ("action_prior", {"logits": [1, 2, -1e300]}, "logits_clipped", {"logits": (1.0, 2.0, -MAX_NUMBER)}),
        ("confidence", 7, "confidence_clipped", 1.0),
        ("confidence", "high", "confidence_refused", 0.5),
        ("features", [1], "features_refused", ()),
        ("features", [1, 1e9], "features_clipped", (1.0, MAX_NUMBER)),
        ("plan", "left", "plan_refused", ()),
        ("plan", ["left", "up"], "plan_refused", ()),
        ("plan", ["left"] * 16, "plan_clipped", ("left",) * MAX_PLAN),
        ("subgoal", "win", "subgoal_refused", None),
        ("skills", "jump", "skills_refused", ()),
        ("skills", [None], "skill_refused", ()),
        ("skills", GOOD["skills"] * 3, "skills_clipped", parse(GOOD)[0].model_dump()["skills"] * 2),
        ("skills", [{**GOOD["skills"][0], "name": "a\x1b[31mred"}], "skill_refused", ()),
        ("skills", [{**GOOD["skills"][0], "name": "\ud800"}], "skill_refused", ()),
        ("skills", [{**GOOD["skills"][0], "name": "x" * 65}], "skill_refused", ()),
        ("skills", [{**GOOD["skills"][0], "description": "x" * 301}], "skill_refused", ()),
        ("skills", [{**GOOD["skills"][0], "primitive_actions": ["left"] * 16}], "skill_refused", ()),
        ("skills", [{**GOOD["skills"][0], "primitive_actions": ["up"]}], "skill_refused", ()),
        ("skills", [{**GOOD["skills"][0], "primitive_actions": [-1]}], "skill_refused", ()),
        ("skills", [{**GOOD["skills"][0], "primitive_actions": [True]}], "skill_refused", ()),
        ("skills", [{**GOOD["skills"][0], "expected_duration": 0}], "skill_refused", ()),
        ("skills", [{**GOOD["skills"][0], "confidence": "yes"}], "skill_refused", ()),
    ],
)
def test_a_bad_field_is_counted_and_loses_no_other(field, value, reason, kept):
    advice, problems = parse(with_(**{field: value}))
    assert problems == Counter({reason: 1})
    good = parse(GOOD)[0].model_dump()
    assert advice.model_dump() == {**good, field: kept}
    assert parse({**GOOD, field: value}) == (advice, problems)  # the same as a mapping, without JSON


def test_missing_fields_of_a_skill_get_defaults():
    (skill,) = parse(with_(skills=[{"name": " a\n b ", "primitive_actions": ["left", "noop", 2]}]))[0].skills
    assert (skill.name, skill.expected_duration, skill.confidence, skill.subgoal) == ("a b", 3, 0.5, None)
    bad_goal = [{**GOOD["skills"][0], "subgoal": "win", "confidence": 3, "code": "import os"}]
    advice, problems = parse(with_(skills=bad_goal))
    assert problems == Counter(subgoal_refused=1, confidence_clipped=1, unknown_key=1)
    assert (advice.skills[0].subgoal, advice.skills[0].confidence) == (None, 1.0)


@pytest.mark.parametrize(
    "reply, reason",
    [
        ("", "not_json"),
        ("no advice today", "not_json"),
        (json.dumps(GOOD)[:-1], "not_json"),
        (json.dumps(GOOD)[:-20], "not_json"),
        ("{'plan': ['left']}", "not_json"),
        (json.dumps([1, 2, 3]), "not_json"),
        ('{"a":' * 100_000, "too_deep"),
        ('{"confidence": ' + "9" * 5_000 + ', "plan": ["noop"]}', "not_json"),
        (" " * 2000 + json.dumps(GOOD), "too_long"),
        ("{}", "empty"),
        ('{"confidence": 1}', "empty"),
        ('{"plan": [], "skills": []}', "empty"),
        (7, "not_an_object"),
        ([GOOD], "not_an_object"),
    ],
)
def test_a_reply_of_another_form_is_refused(reply, reason):
    assert parse(reply, max_chars=500_000 if len(str(reply)) > 4000 else 2000) == (None, Counter({reason: 1}))


def test_unknown_keys_are_ignored_and_counted():
    advice, problems = parse(
        with_(__class__="os.system", code="rm", action_prior={"logits": [1, 2, 3], "x": 1})
    )
    assert problems == Counter(unknown_key=3)
    assert advice.action_prior.logits == (1.0, 2.0, 3.0)


def test_features_that_were_not_requested_are_refused():
    advice, problems = parse(json.dumps(GOOD), features=0)
    assert (advice.features, problems) == ((), Counter(features_refused=1))
    assert parse(with_(features=[]), features=0)[1] == Counter()


def test_a_mapping_may_hold_numbers_of_numpy():
    advice, problems = parse({"action_prior": {"logits": [np.float32(1), np.int64(2), 3.0]}})
    assert (advice.action_prior.logits, problems) == ((1.0, 2.0, 3.0), Counter())
    advice, problems = parse({"plan": np.array(["left"]), "subgoal": np.array(["eat", "eat"])})
    assert (advice, problems) == (None, Counter(plan_refused=1, subgoal_refused=1, empty=1))
    assert parse({"plan": [np.array(["left", "left"])]})[1] == Counter(plan_refused=1, empty=1)


def test_parsing_takes_time_linear_in_the_length():
    spec = AdviceSpec(("noop",), (), 0, max_chars=400_000, max_skills=1)
    hostile = ['{"' + '\\"' * 150_000, "{}" * 150_000, '{"a' * 100_000, '"{' * 150_000, "{" + "[]" * 150_000]
    for text in hostile:
        start = time.perf_counter()
        assert parse_reply(text, spec)[0] is None
        assert time.perf_counter() - start < 20  # quadratic: minutes


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([*SPEC.actions, *SPEC.subgoals, 10**400, -(10**400), "\x00", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=20)
        | st.dictionaries(
            st.sampled_from([*GOOD, *GOOD["skills"][0], "logits", "answers", "number", "x"]),
            inner,
            max_size=6,
        )
    ),
    max_leaves=25,
)
REPLIES = st.fixed_dictionaries(
    {},
    optional={
        "action_prior": JSON_VALUES | st.fixed_dictionaries({"logits": st.lists(st.floats() | JSON_VALUES)}),
        "confidence": JSON_VALUES,
        "features": JSON_VALUES | st.lists(st.floats(), min_size=2, max_size=2),
        "plan": JSON_VALUES | st.lists(st.sampled_from(SPEC.actions), max_size=20),
        "subgoal": JSON_VALUES | st.sampled_from(SPEC.subgoals),
        "skills": JSON_VALUES
        | st.lists(
            st.fixed_dictionaries(
                {},
                optional={
                    "name": JSON_VALUES | st.text(),
                    "description": JSON_VALUES | st.text(),
                    "primitive_actions": JSON_VALUES | st.lists(st.sampled_from([*SPEC.actions, 0, 2, 3])),
                    "expected_duration": JSON_VALUES,
                    "confidence": JSON_VALUES,
                    "subgoal": JSON_VALUES,
                    "option_id": JSON_VALUES,
                },
            ),
            max_size=4,
        ),
    },
)


def check_any(reply) -> None:
    advice, problems = parse_reply(reply, SPEC)
    assert_within_bounds(advice)
    assert set(problems) <= set(PROBLEMS) and all(count > 0 for count in problems.values())
    for count in (1, 3):
        answers = parse_replies(reply, SPEC, count)
        assert len(answers) == count
        for answer in answers:
            assert_within_bounds(answer.advice)
            assert set(answer.problems) <= set(PROBLEMS)


@given(REPLIES | JSON_VALUES)
def test_no_json_exceeds_the_bounds(value):
    check_any(value)
    check_any(json.dumps(value))
    check_any(json.dumps({"answers": [value, {"number": 2, "plan": value}]}))


@settings(max_examples=100)
@given(st.text() | st.text('{}[]":,\\0123456789.eE-+ntfals"plan'))
@example("{" * 10_000)
@example('{"plan": ' + "[" * 100_000)
@example('{"a": 1e999999, "plan": ["left"]}')
def test_no_text_exceeds_the_bounds(text):
    check_any(text)


def test_answers_find_their_questions_by_number():
    said = [{"number": 3, "plan": ["right"]}, {"number": 1, "plan": ["left"], "x": 1}, {"number": 1}, {}, 5]
    answers = parse_replies(json.dumps({"answers": said}), SPEC, 3)
    assert [answer.advice and answer.advice.plan for answer in answers] == [("left",), None, ("right",)]
    assert answers[0].problems == Counter(unknown_key=1, unknown_answer=3)
    assert answers[1].problems == Counter(no_answer=1)
    assert answers[2].problems == Counter()


def test_the_reply_to_one_question_may_be_the_answer_itself():
    (bare,) = parse_replies(json.dumps(GOOD), SPEC, 1)
    (listed,) = parse_replies(json.dumps({"answers": [{**GOOD, "number": 1}]}), SPEC, 1)
    assert bare == listed and bare.problems == Counter()


def test_a_reply_to_several_questions_may_be_longer():
    spec = AdviceSpec(("noop",), (), 0, max_chars=100, max_skills=1)
    answers = [{"number": i + 1, "plan": ["noop"] * 6} for i in range(3)]
    replies = parse_replies(json.dumps({"answers": answers}), spec, 3)
    assert all(reply.advice for reply in replies)
    assert parse_replies(" " * 301, spec, 3)[0].problems == Counter(too_long=1)


def test_the_schema_contains_what_is_wanted():
    assert list(reply_schema(SPEC, frozenset({"prior"}))["properties"]) == ["action_prior", "confidence"]
    schema = reply_schema(SPEC, frozenset({"prior", "plan", "skills", "features"}))
    assert set(schema["properties"]) == set(GOOD)
    skill = schema["properties"]["skills"]["items"]
    assert set(skill["properties"]) == set(GOOD["skills"][0])
    assert schema["properties"]["plan"]["items"]["enum"] == ["noop", "left", "right"]

    def walk(node):
        if isinstance(node, dict):
            if node.get("type") == "object":  # what OpenAI calls strict
                assert node["additionalProperties"] is False and node["required"] == list(node["properties"])
            assert not {"minItems", "maxItems", "minimum", "maximum"} & set(node)  # Gemini refuses many
            for value in node.values():
                walk(value)

    walk(replies_schema(SPEC, frozenset({"prior", "plan", "skills", "features"})))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"actions": ()}, "1 to 4096 actions"),
        ({"actions": ("a", "a")}, "different names"),
        ({"actions": ("a", "x" * 65)}, "1 to 64 printable"),
        ({"subgoals": ("eat\n",)}, r"'eat\\n' cannot name"),
    ],
)
def test_a_spec_with_bad_names_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        AdviceSpec(**{**vars(SPEC), **changes})


def test_the_digest_depends_on_what_the_prompt_says():
    assert SPEC.digest == AdviceSpec(**{**vars(SPEC), "max_chars": 1}).digest
    for changes in ({"actions": ("noop",)}, {"subgoals": ()}, {"features": 0}, {"max_skills": 0}):
        assert SPEC.digest != AdviceSpec(**{**vars(SPEC), **changes}).digest


def test_users_may_write_options_with_lists_and_indices():
    skill = OptionSpec(
        option_id="chop",
        name="chop wood",
        description="",
        primitive_actions=["left", 5],
        expected_duration=4,
        confidence=1,
    )
    assert skill.primitive_actions == ("left", 5)
    with pytest.raises(ValidationError):
        OptionSpec(name="x", primitive_actions=["left"], expected_duration=4, confidence=2)
    with pytest.raises(ValidationError):
        skill.name = "other"


def test_importing_the_package_costs_no_heavy_library():
    heavy = "{'torch', 'google.genai', 'httpx2', 'tensorboard'} & set(sys.modules)"
    code = f"import sys; from lore_llm import LLMAdapter, OptionSpec, Advice; assert not {heavy}, {heavy}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
