"""The service: when it asks, that it never holds up the loop, and that no adviser ends a run."""

import contextlib
import json
import logging
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llm_servers import FakeLLM, Say, retry_info

import config
from basics import UserError
from lore_llm import backends
from lore_llm import service as services
from lore_llm.advice import ActionPrior, Advice, AdviceSpec, AdviserFault, Request, parse_reply
from lore_llm.backends import LLMAdapter, make_adviser
from lore_llm.service import AdviceService, Answered, Breaker

ROOT = Path(config.__file__).parent
SPEC = AdviceSpec(("left", "right", "do"), ("drink",), features=0, max_chars=20_000, max_skills=3)
KEY = "AIzaSecretOfTheTests123"
PRIOR = frozenset({"prior"})
NO_WAIT = 0.2  # seconds: less than any wait for an adviser, more than a busy machine takes per step


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for name in ("GEMINI_API_KEY", "GOOGLE_API_KEY", "GEMINI_MODEL", "GOOGLE_GEMINI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


class Captioner:
    """Says the number in the observation."""

    actions, subgoals, rules = SPEC.actions, SPEC.subgoals, None

    def __init__(self):
        self.made = 0

    def caption(self, obs) -> str:
        self.made += 1
        return f"at {obs['vector'][0]:g}"


def advice_on(request: Request) -> Advice:
    """Advice with the number of the caption, so that answers cannot be mixed up."""
    return Advice(action_prior=ActionPrior(logits=(float(request.caption[3:]), 0.0, 0.0)))


class Fake(LLMAdapter):
    """Answers after `delay` seconds, or does what `act` does, and records the requests."""

    identity = "fake"

    def __init__(
        self, act: Callable[[Sequence[Request]], Any] | None = None, delay=0.0, per_call=1, tokens=(0, 0)
    ):
        self.spec, self.act, self.delay, self.tokens = SPEC, act, delay, tokens
        self.questions_per_call = per_call
        self.calls: list[list[Request]] = []
        self.closed = False

    def answer(self, requests):
        reply = super().answer(requests)
        reply.tokens_in, reply.tokens_out = self.tokens
        return reply

    def advise(self, requests):
        self.calls.append(list(requests))
        time.sleep(self.delay)
        found = self.act(requests) if self.act else None
        return [advice_on(request) for request in requests] if found is None else found

    def close(self):
        self.closed = True

    @property
    def captions(self) -> list[list[str]]:
        return [[request.caption for request in call] for call in self.calls]


class Instant(LLMAdapter):
    """Answers instantly, as the rules do."""

    instant = True

    def __init__(self):
        self.spec, self.asked = SPEC, []

    def advise(self, requests):
        self.asked += requests
        return [advice_on(request) for request in requests]


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch):
    monkeypatch.setattr(backends, "BACKOFF_S", 0.01)


@contextlib.contextmanager
def made(
    path: Path, adviser: LLMAdapter, envs: int = 1, deterministic=False, captioner=None, **options
) -> Iterator[AdviceService]:
    options = {**config.load([]).llm, "min_gap_steps": 1, **options}
    service = AdviceService(
        adviser, captioner or Captioner(), options, cache_path=path / "cache.sqlite", n_envs=envs,
        deterministic=deterministic, wants=PRIOR,
    )  # fmt: skip
    try:
        yield service
    finally:
        service.close()


def see(*numbers: float, first: bool = False, last: bool = False) -> dict[str, np.ndarray]:
    """Observations in which the envs are at these numbers."""
    count = len(numbers)
    return {
        "vector": np.array(numbers, np.float32)[:, None],
        "image": np.zeros((count, 8, 8, 3), np.uint8),
        "log_secret": np.zeros(count, np.float32),
        "is_first": np.full(count, first),
        "is_last": np.full(count, last),
    }


def ask(
    service: AdviceService, *numbers: float, place: int = 0, uncertainty=None, skills=False, **flags
) -> list[Answered]:
    places = [place + env for env in range(len(numbers))]
    return service.ask(see(*numbers, **flags), places, uncertainty, step=place, skills=skills)


def receive(service: AdviceService, count: int = 1, seconds: float = 60.0) -> list[Answered]:
    """The next `count` late answers; nothing is asked meanwhile."""
    end, received = time.monotonic() + seconds, []
    while len(received) < count:
        assert time.monotonic() < end, f"only {len(received)} of {count} answers"
        obs = see(*[0.0] * len(service.gaps), last=True)
        received += service.ask(obs, [-1] * len(service.gaps), None, step=service.step)
        time.sleep(0.002)
    return received


def wait(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


def number(answered: Answered) -> float:
    return answered.advice.action_prior.logits[0]


def idle(service: AdviceService) -> bool:
    return not service._waiting


def metric(service: AdviceService, name: str) -> float:
    return service.metrics()[f"llm_adapter/{name}"]


def raises(error: BaseException):
    def act(requests):
        raise error

    return act


# --- When it asks -------------------------------------------------------------------------------------------


def test_new_captions_are_asked_about_after_the_smallest_gap(tmp_path):
    with made(tmp_path, Instant(), min_gap_steps=3, max_gap_steps=8) as service:
        asked = [step for step in range(10) if ask(service, step, first=step == 0)]
        assert asked == [0, 3, 6, 9]
        assert service.captioner.made == len(asked)  # captions are made only when they may be used


def test_known_captions_are_asked_about_after_the_largest_gap_or_when_uncertain(tmp_path):
    with made(tmp_path, Instant(), min_gap_steps=3, max_gap_steps=8, ask_uncertainty=0.7) as service:
        uncertainty = {12: 0.71, 13: 0.9, 16: 0.7, 21: np.nan}  # 13 is too soon, 0.7 is not above
        asked = []
        for step in range(24):
            if ask(service, 5, uncertainty=np.array([uncertainty.get(step, 0.0)], np.float32)):
                asked.append(step)
        assert asked == [0, 8, 12, 20]


def test_the_first_step_of_an_episode_may_ask_and_the_last_does_not(tmp_path):
    with made(tmp_path, Instant(), min_gap_steps=5, max_gap_steps=8) as service:
        assert ask(service, 1)
        assert not ask(service, 2)
        assert ask(service, 1, first=True)  # even with the caption of the last question
        for step in range(4):
            assert not ask(service, 10 + step)
        assert not ask(service, 20, last=True)
        assert ask(service, 21)


def test_each_env_has_its_own_gap_and_place(tmp_path):
    with made(tmp_path, Instant(), envs=3, min_gap_steps=4, max_gap_steps=100) as service:
        answered = ask(service, 1, 2, 3, place=70)
        assert [(a.env, a.place, number(a), a.caption, a.late) for a in answered] == [
            (0, 70, 1.0, "at 1", False), (1, 71, 2.0, "at 2", False), (2, 72, 3.0, "at 3", False)
        ]  # fmt: skip
        obs = see(4, 5, 6)
        obs["is_first"][1] = True
        assert [a.env for a in service.ask(obs, [0, 1, 2], None, step=0)] == [1]
        steps = [[a.env for a in ask(service, *[7 + i] * 3)] for i in range(4)]
        assert steps == [[], [], [0, 2], [1]]


def test_skills_are_requested_with_the_next_question(tmp_path):
    adviser = Instant()
    with made(tmp_path, adviser, envs=2, min_gap_steps=2) as service:
        ask(service, 1, 2)
        ask(service, 3, 4, skills=True)  # too soon: the request waits
        ask(service, 5, 6)
        ask(service, 7, 8)
        ask(service, 9, 10)
        assert [r.wants - PRIOR for r in adviser.asked] == [set(), set(), {"skills"}, set(), set(), set()]
        adviser.asked.clear()
        service.wants = frozenset()  # skills only
        for step in range(6):
            ask(service, 20 + step, 30 + step, skills=step == 3)
    assert [r.wants for r in adviser.asked] == [{"skills"}]


def test_the_adviser_receives_a_copy_of_one_observation_without_logs(tmp_path):
    adviser, obs = Fake(delay=0.05), see(4)
    with made(tmp_path, adviser) as service:
        service.ask(obs, [0], None, step=0)
        obs["vector"][:], obs["image"][:] = 9, 9  # envs reuse their memory
        receive(service)
    seen = adviser.calls[0][0].obs
    assert seen.keys() == {"vector", "image", "is_first", "is_last"}
    assert seen["vector"] == [4] and seen["image"].shape == (8, 8, 3) and not seen["image"].any()


# --- In the background --------------------------------------------------------------------------------------


def test_the_loop_does_not_wait_and_late_answers_belong_to_the_step_that_asked(tmp_path):
    times, late = [], []
    with made(tmp_path, Fake(delay=1.0), envs=2) as service:
        for step in range(100):
            obs = see(step, 1000 + step, first=step == 0)
            started = time.perf_counter()
            late += service.ask(obs, [2 * step, 2 * step + 1], None, step=step)
            times.append(time.perf_counter() - started)
            time.sleep(0.006)
        late += receive(service, max(1, 2 - len(late)))
    assert statistics.median(times) < NO_WAIT
    assert late and all(a.late for a in late)
    for a in late:
        assert a.place == 2 * (number(a) % 1000) + a.env and a.caption == f"at {number(a):g}"


def test_a_cached_answer_is_available_immediately(tmp_path):
    adviser = Fake()
    with made(tmp_path, adviser) as service:
        assert ask(service, 3, place=5) == []
        (late,) = receive(service)
        assert (late.place, late.late) == (5, True)
        (again,) = ask(service, 3, place=9, first=True)
        assert (again.place, again.late, again.advice) == (9, False, late.advice)
    with made(tmp_path, adviser) as service:  # the next run
        assert ask(service, 3, place=7)[0].advice == late.advice
    assert len(adviser.calls) == 1


def test_a_pending_question_is_not_asked_twice(tmp_path):
    asked = threading.Event()
    adviser = Fake(lambda requests: asked.wait(60) and None)
    with made(tmp_path, adviser, envs=2) as service:
        ask(service, 3, 3, place=10)
        ask(service, 3, 4, place=20, first=True)
        asked.set()
        received = receive(service, 4)
    assert sorted((a.env, a.place, number(a)) for a in received) == [
        (0, 10, 3), (0, 20, 3), (1, 11, 3), (1, 21, 4)
    ]  # fmt: skip
    assert sorted(adviser.captions) == [["at 3"], ["at 4"]]


def test_questions_of_several_envs_share_a_call(tmp_path):
    for most, batches in ((3, [3, 3, 1]), (100, [4, 3])):
        adviser = Fake(per_call=most)
        with made(tmp_path / str(most), adviser, envs=7, max_batch=4) as service:
            ask(service, *range(7))
            assert sorted(number(a) for a in receive(service, 7)) == list(range(7))
        assert [len(call) for call in adviser.calls] == batches
    with made(tmp_path / "skills", adviser := Fake(per_call=4), envs=3) as service:
        ask(service, 1, 2, 3, skills=True)  # questions with other wants need another call
        receive(service, 3)
    assert adviser.captions == [["at 1"], ["at 2", "at 3"]]


def test_questions_beyond_max_pending_are_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr(services, "MAX_PENDING", 3)
    asked = threading.Event()
    adviser = Fake(lambda requests: asked.wait(60) and None)
    with made(tmp_path, adviser, envs=10) as service:
        ask(service, *range(10))
        metrics = service.metrics()
        assert (metrics["llm_adapter/pending"], metrics["llm_adapter/dropped"]) == (3, 7)
        asked.set()
        assert sorted(number(a) for a in receive(service, 3)) == [0, 1, 2]
        assert len(adviser.calls) == 3


def test_deterministic_runs_await_their_answers(tmp_path):
    faults = iter([AdviserFault("http_5xx", retry=True), AdviserFault("timeout", retry=True)])

    def act(requests):
        if fault := next(faults, None):
            raise fault

    adviser = Fake(act, delay=0.02, per_call=2)
    with made(tmp_path, adviser, envs=3, deterministic=True) as service:
        answered = ask(service, 1, 2, 1, place=5)
        assert [(a.env, a.place, number(a), a.late) for a in answered] == [
            (0, 5, 1, False), (1, 6, 2, False), (2, 7, 1, False)
        ]  # fmt: skip
        assert adviser.captions == [["at 1", "at 2"]] * 3
        assert idle(service)


class ByEye(LLMAdapter):
    """Uses the observation, not the caption."""

    def infer(self, obs_np, num_actions):
        return {"prior_logits": [float(obs_np["vector"][0]), 0.0, 0.0]}


class Terse(Captioner):
    def caption(self, obs) -> str:
        return "the same"


def test_advisers_that_use_the_observation_are_not_cached_by_caption(tmp_path):
    adviser = ByEye(SPEC, config.load([]).llm)
    options = {"captioner": Terse(), "deterministic": True, "max_gap_steps": 1}
    with made(tmp_path, adviser, envs=2, **options) as service:
        for step in range(2):
            answered = ask(service, 1 + step, 5, first=step == 0)
            assert [number(each) for each in answered] == [1 + step, 5]


# --- Faults -------------------------------------------------------------------------------------------------

WRONG = {
    "number": (lambda requests: 7, "adapter"),
    "too many": (lambda requests: [None] * 3, "adapter"),
    "object": (lambda requests: [object()], "not_an_object"),
    "not allowed": (lambda requests: [Advice(plan=("fly",))], "plan_refused"),
    "error": (raises(ValueError(KEY)), "adapter"),
    "exit": (raises(SystemExit(KEY)), "adapter"),
    "strange fault": (raises(AdviserFault("../../\x1b[2J" + "x" * 1000)), "other"),
    "fault": (raises(AdviserFault("http_4xx", "\x1b[31mred\nnew line")), "http_4xx"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("deterministic", [False, True])
def test_whatever_an_adviser_does_is_a_counted_error(tmp_path, name, deterministic, caplog):
    act, kind = WRONG[name]
    adviser = Fake(act)
    options = dict(deterministic=deterministic, retries=0, breaker_failures=1000)
    with made(tmp_path, adviser, **options) as service:
        for step in range(3):
            assert ask(service, step) == []
            wait(lambda: idle(service))
        assert metric(service, f"errors/{kind}") == 3
        adviser.act = None
        answered = ask(service, 77) or receive(service)  # and it continues
        assert [number(a) for a in answered] == [77]
        lines = service.notes()
        assert len(lines) <= 1 and all(line.isprintable() and KEY not in line for line in lines)
    assert caplog.records == []


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_call_that_hangs_is_counted_and_nothing_is_asked_meanwhile(tmp_path, deterministic):
    release = threading.Event()
    adviser = Fake(lambda requests: release.wait(60) and None)
    with made(tmp_path, adviser, deterministic=deterministic, timeout_s=0.1) as service:
        assert ask(service, 1, place=1) == []
        wait(lambda: adviser.calls)
        time.sleep(0.15)
        for step in range(2, 6):
            assert ask(service, step, place=step) == []
        assert metric(service, "errors/timeout") == 1
        assert metric(service, "dropped") == 4
        release.set()
        (late,) = receive(service)
        assert (late.place, number(late), late.late) == (1, 1, True)
        wait(lambda: not service._hangs)
        assert [number(a) for a in ask(service, 9) or receive(service)] == [9]


def test_advice_beyond_the_spec_does_not_reach_the_agent(tmp_path):
    wrong = Advice(action_prior=ActionPrior(logits=(1.0,)), plan=("fly",), subgoal="drink")
    with made(tmp_path, Fake(lambda requests: [wrong]), deterministic=True) as service:
        (answered,) = ask(service, 1)
        assert answered.advice == Advice(subgoal="drink")
        assert metric(service, "breaker") == 0  # the adviser did answer


def test_a_failing_instant_adviser_or_captioner_is_counted_and_noted_once(tmp_path):
    class Failing(Instant):
        def advise(self, requests):
            raise ValueError(KEY)

    class Mute(Captioner):
        def caption(self, obs):
            raise KeyError(KEY)

    with made(tmp_path, Failing()) as service:
        assert [ask(service, step) for step in range(5)] == [[]] * 5
        assert metric(service, "errors/adapter") == 5
        (line,) = service.notes()
        assert "ValueError in test_service.py, line " in line and KEY not in line
    assert list(tmp_path.iterdir()) == []  # instant answers are not cached
    with made(tmp_path, Fake(), captioner=Mute(), min_gap_steps=2) as service:
        assert [ask(service, step) for step in range(6)] == [[]] * 6
        assert metric(service, "errors/caption") == 3
        (line,) = service.notes()
        assert line.startswith("Step 0: the captioner failed (KeyError in test_service.py, line ")


def test_faults_that_may_pass_are_retried_and_others_not(tmp_path):
    for retry, calls in ((True, 3), (False, 1)):
        adviser = Fake(raises(AdviserFault("http_429", retry=retry)))
        options = dict(retries=2, deterministic=True, breaker_failures=10)
        with made(tmp_path / str(retry), adviser, **options) as service:
            assert ask(service, 1) == []
            assert len(adviser.calls) == calls
            assert metric(service, "errors/http_429") == calls
            assert metric(service, "calls") == calls


def test_backoff_doubles_and_a_servers_hint_wins_within_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "BACKOFF_S", 0.5)
    with made(tmp_path, Fake()) as service:
        for retry in range(3):
            waits = [service._backoff(retry, None) for _ in range(50)]
            assert 0.25 * 2**retry <= min(waits) < max(waits) <= 0.5 * 2**retry
        assert service._backoff(40, None) == services.LONGEST_BACKOFF_S
        assert [service._backoff(0, hint) for hint in (0.0, 3.5, -1.0)] == [0.0, 3.5, 0.0]
        assert service._backoff(0, 1e9) == services.LONGEST_BACKOFF_S


def test_the_breaker_pauses_probes_and_closes():
    now = 100.0
    breaker = Breaker(3, 60.0, clock=lambda: now)
    breaker.failed()
    breaker.failed()
    assert not breaker.succeeded()  # a success resets the count
    assert [breaker.failed() for _ in range(3)] == [False, False, True]
    assert breaker.state == 1.0
    now += 60
    assert breaker.state == 0.5
    assert breaker.failed() and breaker.pause == 120
    now += 20
    copy = Breaker(3, 60.0, clock=lambda: now + 1000)  # another process
    copy.load_state_dict(json.loads(json.dumps(breaker.state_dict())))
    now += 99.9
    assert breaker.state == copy.state == 1.0
    now += 0.2
    for each in (breaker, copy):
        assert each.state == 0.5
        assert each.succeeded()
        assert each.state == 0.0 and not each.failed()
    for _ in range(20):
        while not breaker.failed():
            pass
        now += breaker.pause
    assert breaker.pause == services.LONGEST_PAUSE_S


def test_failures_in_a_row_cause_a_pause_and_then_a_probe(tmp_path):
    now = 1000.0
    adviser = Fake(raises(AdviserFault("http_5xx", retry=True)))
    with made(tmp_path, Fake(), deterministic=True) as service:
        assert ask(service, 3)  # is cached
    with made(tmp_path, adviser, breaker_failures=3, breaker_pause_s=60, retries=1, envs=8) as service:
        service.breaker.clock = lambda: now
        ask(service, *range(10, 18), place=200)
        wait(lambda: idle(service))
        assert len(adviser.calls) == 3
        assert metric(service, "breaker") == 1.0
        assert metric(service, "dropped") == 6
        times = []
        for step in range(20, 100):  # a pause costs the loop nothing
            started = time.perf_counter()
            assert ask(service, *[step] * 8) == []
            times.append(time.perf_counter() - started)
        assert statistics.median(times) < NO_WAIT
        assert [number(a) for a in ask(service, *[3] * 8)] == [3] * 8  # the cache still answers
        assert len(adviser.calls) == 3
        now += 60
        assert metric(service, "breaker") == 0.5
        ask(service, *range(30, 38), place=300)
        wait(lambda: idle(service))
        assert len(adviser.calls) == 4  # the probe, without a retry
        now += 120
        adviser.act = None
        ask(service, *range(40, 48), place=400)
        receive(service, 8)
        assert metric(service, "breaker") == 0.0
        assert service.notes() == [
            "Step 200: the adviser does not answer (http_5xx); pause of 60 s.",
            "Step 300: the adviser does not answer (http_5xx); pause of 120 s.",
            "Step 400: the adviser answers again.",
        ]


def test_the_budget_of_calls_includes_retries_and_is_resumed(tmp_path):
    adviser = Fake(raises(AdviserFault("http_5xx", retry=True)))
    options = dict(deterministic=True, retries=2, budget_calls=4, breaker_failures=100)
    with made(tmp_path, adviser, **options) as service:
        for step in range(5):
            ask(service, step, place=step)
        assert len(adviser.calls) == 4
        (line,) = service.notes()
        assert line.startswith("Step 1: the adviser's budget is used up (4 calls, 0 tokens)")
        assert metric(service, "dropped") == 3
        state = service.state_dict()
    with made(tmp_path, adviser, **options) as service:
        service.load_state_dict(state)
        ask(service, 9)
        assert len(adviser.calls) == 4


def test_the_budget_of_tokens(tmp_path):
    adviser = Fake(tokens=(70, 40))
    options = dict(deterministic=True, budget_tokens=200, price_input=2.0, price_output=10.0)
    with made(tmp_path, adviser, **options) as service:
        assert [bool(ask(service, step)) for step in range(5)] == [True, True, False, False, False]
        assert len(service.notes()) == 1
        assert ask(service, 0)  # the cache still answers
        metrics = service.metrics()
        assert metrics["llm_adapter/tokens"] == 220
        assert metrics["llm_adapter/cost"] == pytest.approx((140 * 2 + 80 * 10) / 1e6)


# --- Metrics, state, the end --------------------------------------------------------------------------------


def test_metrics_count_what_happened(tmp_path):
    names = "questions answers dropped calls tokens cost pending breaker cache_hit_rate".split()
    adviser = Fake(delay=0.02, tokens=(5, 2))
    with made(tmp_path, adviser, envs=2, deterministic=True) as service:
        assert service.metrics() == {f"llm_adapter/{name}": 0.0 for name in names[:-1]}
        ask(service, 1, 2)
        ask(service, 1, 3)
        metrics = service.metrics()
        assert metrics.pop("llm_adapter/latency_ms") >= 20
        assert metrics == dict(
            zip([f"llm_adapter/{n}" for n in names], [3, 3, 0, 3, 21, 0, 0, 0, 0], strict=True)
        )
        ask(service, 2, 1)
        metrics = service.metrics()
        assert metrics["llm_adapter/cache_hit_rate"] == 1.0 and "llm_adapter/latency_ms" not in metrics


def run(service: AdviceService, steps: Sequence[int]) -> list[tuple]:
    """The answers of two envs that see something new every third step, with their steps."""
    told = []
    for step in steps:
        if step == 6:
            service.metrics()
        answered = ask(
            service, step // 3, 500 + step // 3, place=2 * step, skills=step == 7, first=step % 11 == 0
        )
        told += [(step, a.env, a.place, number(a)) for a in answered]
    return told


def test_a_resumed_run_asks_at_the_same_steps(tmp_path):
    options = dict(envs=2, deterministic=True, min_gap_steps=4, max_gap_steps=9)
    with made(tmp_path / "whole", whole := Fake(), **options) as service:
        expected = run(service, range(40))
        end = service.state_dict()
        metrics = {k: v for k, v in service.metrics().items() if "latency" not in k}
    for cut in (1, 8, 13, 26):
        path = tmp_path / str(cut)
        with made(path, one := Fake(), **options) as service:
            told = run(service, range(cut))
            state = service.state_dict()
        assert json.loads(json.dumps(state)) == state  # plain values
        with made(path, other := Fake(), **options) as service:
            service.load_state_dict(state)
            told += run(service, range(cut, 40))
            assert service.state_dict() == end
            assert {k: v for k, v in service.metrics().items() if "latency" not in k} == metrics
        assert told == expected
        assert one.calls + other.calls and one.captions + other.captions == whole.captions
        wants = [[r.wants for r in call] for call in one.calls + other.calls]
        assert wants == [[r.wants for r in call] for call in whole.calls]
    with made(tmp_path, Instant(), envs=3, min_gap_steps=5) as service:
        service.load_state_dict(state)  # of two envs: each of the three may be asked about
        assert len(ask(service, 1, 2, 3)) == 3


def test_a_recorded_run_is_repeated_without_a_call(tmp_path):
    options = dict(envs=2, deterministic=True, min_gap_steps=4, max_gap_steps=9)
    with made(tmp_path, Fake(), **options) as service:
        expected = run(service, range(40))
    adviser = Fake(raises(AssertionError("called")))
    with made(tmp_path, adviser, replay=True, **options) as service:
        assert run(service, range(40)) == expected
        assert metric(service, "cache_hit_rate") == 1.0
        assert ask(service, -1, -2, first=True) == []  # not recorded
        assert metric(service, "cache_hit_rate") == 0.0
        assert metric(service, "dropped") == 2
        assert service._thread is None and adviser.calls == []
    with pytest.raises(UserError, match=r"llm\.replay"), made(tmp_path / "new", Fake(), replay=True):
        pass
    other = Fake()
    other.identity = "another model"
    with made(tmp_path, other, deterministic=True) as service:
        ask(service, 1)
        assert len(other.calls) == 1


def test_frames_are_part_of_the_question_only_if_they_are_sent(tmp_path):
    for send, calls in ((True, 2), (False, 1)):
        adviser = Fake()
        with made(tmp_path / str(send), adviser, deterministic=True, send_image=send) as service:
            for shade in (0, 1, 0):
                obs = see(1, first=True)
                obs["image"][:] = shade
                assert service.ask(obs, [0], None, step=0)
        assert len(adviser.calls) == calls


def test_close_ends_the_thread_and_closes_the_adviser(tmp_path):
    before = threading.active_count()
    with made(tmp_path, adviser := Fake(), deterministic=True) as service:
        ask(service, 1)
    assert adviser.closed and threading.active_count() == before
    with made(tmp_path, Instant()) as service:
        ask(service, 1)
        assert threading.active_count() == before


HANGS = """
import sys, time
sys.path.insert(0, "tests")
from test_service import *
with made(Path(sys.argv[1]), Fake(delay=3600)) as service:
    ask(service, 1)
    time.sleep(0.2)
print("the end")
"""


def test_a_call_that_hangs_does_not_keep_the_program_from_ending(tmp_path):
    command = [sys.executable, "-c", HANGS, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the end\n", "")


# --- Gemini against a server --------------------------------------------------------------------------------


@contextlib.contextmanager
def gemini(path: Path, server: FakeLLM, monkeypatch, **options) -> Iterator[AdviceService]:
    monkeypatch.setenv("GEMINI_API_KEY", KEY)
    options = {"backend": "gemini", "model": "fake-model", "base_url": server.url, **options}
    llm = {**config.load([]).llm, **options}
    adviser, _ = make_adviser(llm, SPEC, Captioner(), 0)
    with made(path, adviser, **options) as service:
        yield service


def test_a_server_that_dies_and_comes_back(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    options = dict(breaker_failures=3, breaker_pause_s=0.2, retries=1, timeout_s=20.0)
    with FakeLLM() as server, gemini(tmp_path, server, monkeypatch, **options) as service:
        ask(service, 1, place=1)
        (answered,) = receive(service)
        assert answered.advice.action_prior.logits == (1.0, 0.0, 0.0)
        server.stop()
        step, times = 10, []
        while metric(service, "breaker") == 0.0:
            started = time.perf_counter()
            assert ask(service, step, place=step) == []
            times.append(time.perf_counter() - started)
            time.sleep(0.01)
            step += 1
            assert step < 2000
        server.start()
        received = []
        while not received:
            received = ask(service, step, place=step)
            time.sleep(0.01)
            step += 1
            assert step < 2000
        assert statistics.median(times) < NO_WAIT
        assert received[0].caption == f"at {received[0].place}" and received[0].late
        lines = service.notes()
        assert "the adviser failed (network" in lines[0]
        assert "does not answer (network" in lines[1] and "pause of 0.2 s" in lines[1]
        assert lines[-1].endswith("the adviser answers again.")
        assert metric(service, "errors/network") >= 3
        state = service.state_dict()
    told = [json.dumps(state), *lines, caplog.text]
    told += [file.read_bytes().decode("latin1") for file in tmp_path.iterdir()]
    assert not [text for text in told if KEY in text]
    assert server.asked[0].headers["x-goog-api-key"] == KEY  # it could have been leaked


def test_hints_retries_slow_answers_and_bad_replies(tmp_path, monkeypatch):
    options = dict(timeout_s=4, retries=1, breaker_failures=100, deterministic=True)
    with FakeLLM() as server, gemini(tmp_path, server, monkeypatch, **options) as service:
        assert ask(service, 0) or ask(service, 0, first=True)  # the first call also creates the client
        server.script(Say(status=429, body=retry_info("0.5s")))
        started = time.monotonic()
        assert ask(service, 1)  # after the hint, by the service
        assert time.monotonic() - started > 0.45
        assert metric(service, "errors/http_429") == 1
        server.script(Say(status=503))
        assert ask(service, 2)  # by google-genai
        assert "llm_adapter/errors/http_5xx" not in service.metrics()
        asked = len(server.asked)
        server.script(Say(delay=60), Say(status=503))
        assert ask(service, 3) == []
        assert len(server.asked) == asked + 2 and metric(service, "errors/http_5xx") == 1
        server.script(Say(text='{"answers": [{"number": 1, "plan": ["fly"], "confidence": 7}]}'))
        assert ask(service, 4) == []
        server.script(Say(text='{"answers": [{"num'))
        assert ask(service, 5) == []
        server.script(Say(die="middle"))
        assert ask(service, 6) == []
        assert ask(service, 7)
        errors = {k[19:]: v for k, v in service.metrics().items() if "/errors/" in k}
        assert (errors["network"], errors["plan_refused"], errors["not_json"]) == (1, 1, 1)


def test_a_session_is_replayed_without_its_server(tmp_path, monkeypatch):
    options = dict(envs=2, deterministic=True, min_gap_steps=4, max_gap_steps=9, timeout_s=20.0)
    with FakeLLM() as server:
        with gemini(tmp_path, server, monkeypatch, **options) as service:
            expected = run(service, range(40))
            assert metric(service, "tokens") == 125 * len(server.asked)
        asked = len(server.asked)
        assert expected and max(len(each.prompt["situations"]) for each in server.asked) == 2
        server.stop()
        with gemini(tmp_path, server, monkeypatch, replay=True, **options) as service:
            assert run(service, range(40)) == expected
        assert len(server.asked) == asked


def test_cached_json_is_advice_to_the_last_bit():
    given = {"action_prior": {"logits": [0.1, -1 / 3, 1e-17]}, "confidence": 0.3, "plan": ["left"]}
    advice = parse_reply(given, SPEC).advice
    assert parse_reply(advice.model_dump_json(exclude_defaults=True), SPEC) == (advice, {})
