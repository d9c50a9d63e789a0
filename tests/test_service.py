"""The service that asks: when it does, that it never holds up the loop, and that no adviser ends a run."""

import asyncio
import contextlib
import gc
import json
import logging
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llm_servers import FakeLLM, Say, retry_info

import config
from basics import UserError
from lore_llm import service as services
from lore_llm.advice import ActionPrior, Advice, AdviceSpec, AdviserFault, Answer, Request, parse_reply
from lore_llm.backends import LLMAdapter, Reply, make_adviser
from lore_llm.service import AdviceService, Answered, Breaker

ROOT = Path(config.__file__).parent
SPEC = AdviceSpec(("left", "right", "do"), ("drink",), features=0, max_chars=20_000, max_skills=3)
KEY = "AIzaSecretOfTheTests123"
PRIOR = frozenset({"prior"})
AT_ONCE = 0.05  # seconds that no wait for an adviser fits into; what a busy machine takes away does
SOON = 15  # seconds that the same machine may take to end what else takes twice as long, or for ever


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for name in ("GEMINI_API_KEY", "GOOGLE_API_KEY", "GEMINI_MODEL", "GOOGLE_GEMINI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


class Captioner:
    """Tells the number that stands in the observation."""

    actions, subgoals, rules = SPEC.actions, SPEC.subgoals, None

    def __init__(self):
        self.made = 0

    def caption(self, obs) -> str:
        self.made += 1
        return f"at {obs['vector'][0]:g}"


def advice_on(request: Request) -> Advice:
    """What the fake advisers say: the caption's number, so that answers cannot be mixed up."""
    return Advice(action_prior=ActionPrior(logits=(float(request.caption[3:]), 0.0, 0.0)))


class Fake(LLMAdapter):
    """Answers after `delay` seconds, or does what `say` does, and remembers what it was asked."""

    identity = "fake"

    def __init__(
        self, say: Callable[[Sequence[Request]], Any] | None = None, delay=0.0, per_call=1, tokens=(0, 0)
    ):
        self.spec, self.say, self.delay, self.tokens = SPEC, say, delay, tokens
        self.questions_per_call = per_call
        self.calls: list[list[Request]] = []
        self.running = self.most = 0
        self.closed = False

    async def ask(self, requests):
        self.calls.append(list(requests))
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(self.delay)
            said = self.say(requests) if self.say else None
            if said is not None:
                return await said if asyncio.iscoroutine(said) else said
        finally:
            self.running -= 1
        return Reply([Answer(advice_on(request)) for request in requests], *self.tokens)

    async def close(self):
        self.closed = True

    @property
    def captions(self) -> list[list[str]]:
        return [[request.caption for request in call] for call in self.calls]


class Instant(LLMAdapter):
    """Answers at once, as the rules do."""

    instant = True

    def __init__(self):
        self.spec, self.asked = SPEC, []

    def advise(self, requests):
        self.asked += requests
        return [advice_on(request) for request in requests]


@contextlib.contextmanager
def made(
    path: Path, adviser: LLMAdapter, envs: int = 1, deterministic=False, captioner=None, **options
) -> Iterator[AdviceService]:
    options = {**config.load([]).llm, "min_gap_steps": 1, "backoff_s": 0.01, **options}
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


def hear(service: AdviceService, count: int = 1, seconds: float = 5.0) -> list[Answered]:
    """What comes in until there are so many answers; nothing new is asked meanwhile."""
    end, heard = time.monotonic() + seconds, []
    while len(heard) < count:
        assert time.monotonic() < end, f"only {len(heard)} of {count} answers"
        heard += ask(service, *[0.0] * len(service.gaps), place=service.step, last=True)
        time.sleep(0.002)
    return heard


def wait(condition: Callable[[], bool], seconds: float = 5.0) -> None:
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


class ByEye(LLMAdapter):
    """Looks at the observation and never reads the caption."""

    def infer(self, obs_np, num_actions):
        return {"prior_logits": [float(obs_np["vector"][0]), 0.0, 0.0]}


class Terse(Captioner):
    def caption(self, obs) -> str:
        return "the same"


@pytest.mark.parametrize("size", [0, 100])
def test_who_looks_at_the_observation_is_not_cached_by_caption(tmp_path, size):
    adviser = ByEye(SPEC, config.load([]).llm)
    options = {"captioner": Terse(), "deterministic": True, "max_gap_steps": 1, "cache_size": size}
    with made(tmp_path, adviser, envs=2, **options) as service:
        for step in range(2):
            heard = ask(service, 1 + step, 5, first=step == 0)
            assert [number(answered) for answered in heard] == [1 + step, 5]


# --- When it asks -------------------------------------------------------------------------------------------


def test_a_new_caption_is_asked_about_after_the_least_gap(tmp_path):
    with made(tmp_path, Instant(), min_gap_steps=3, max_gap_steps=8) as service:
        asked = [step for step in range(10) if ask(service, step, first=step == 0)]
        assert asked == [0, 3, 6, 9]
        assert service.captioner.made == len(asked)  # text is made when it may be asked about


def test_an_old_caption_is_asked_about_after_the_longest_gap_or_in_doubt(tmp_path):
    with made(tmp_path, Instant(), min_gap_steps=3, max_gap_steps=8, ask_uncertainty=0.7) as service:
        doubt = {12: 0.71, 13: 0.9, 16: 0.7, 21: np.nan}  # 13 is too soon, 0.7 is not enough
        asked = []
        for step in range(24):
            if ask(service, 5, uncertainty=np.array([doubt.get(step, 0.0)], np.float32)):
                asked.append(step)
        assert asked == [0, 8, 12, 20]


def test_the_first_step_of_an_episode_may_ask_and_the_last_does_not(tmp_path):
    with made(tmp_path, Instant(), min_gap_steps=5, max_gap_steps=8) as service:
        assert ask(service, 1)
        assert not ask(service, 2)
        assert ask(service, 1, first=True)  # also if it looks as the last question did
        for step in range(4):
            assert not ask(service, 10 + step)
        assert not ask(service, 20, last=True)
        assert ask(service, 21)


def test_each_env_has_gaps_and_places_of_its_own(tmp_path):
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


def test_skills_are_asked_for_by_the_next_question(tmp_path):
    adviser = Instant()
    with made(tmp_path, adviser, envs=2, min_gap_steps=2) as service:
        ask(service, 1, 2)
        ask(service, 3, 4, skills=True)  # too soon: the wish stays
        ask(service, 5, 6)
        ask(service, 7, 8)
        ask(service, 9, 10)
    assert [r.wants - PRIOR for r in adviser.asked] == [set(), set(), {"skills"}, set(), set(), set()]


def test_who_wants_skills_alone_asks_for_nothing_else(tmp_path):
    adviser = Instant()
    with made(tmp_path, adviser, envs=2) as service:
        service.wants = frozenset()
        for step in range(6):
            ask(service, step, 10 + step, skills=step == 3)
    assert [(r.caption, r.wants) for r in adviser.asked] == [("at 3", {"skills"})]


def test_the_adviser_sees_one_env_as_it_was_and_no_logs(tmp_path):
    adviser, obs = Fake(delay=0.05), see(4)
    with made(tmp_path, adviser) as service:
        service.ask(obs, [0], None, step=0)
        obs["vector"][:], obs["image"][:] = 9, 9  # the env writes its next step into the same memory
        hear(service)
    seen = adviser.calls[0][0].obs
    assert seen.keys() == {"vector", "image", "is_first", "is_last"}
    assert seen["vector"] == [4] and seen["image"].shape == (8, 8, 3) and not seen["image"].any()


# --- That it does not hold up the loop ----------------------------------------------------------------------


def test_the_loop_does_not_wait_for_answers_that_take_a_second(tmp_path):
    adviser = Fake(delay=1.0)
    times, late = [], []
    with made(tmp_path, adviser, envs=2) as service:
        for step in range(200):
            obs = see(step, 1000 + step, first=step == 0)
            started = time.perf_counter()
            late += service.ask(obs, [2 * step, 2 * step + 1], None, step=step)
            times.append(time.perf_counter() - started)
            time.sleep(0.006)
        late += hear(service, services.MAX_CALLS - len(late))
    assert statistics.median(times) < AT_ONCE
    assert late and all(a.late for a in late)
    for a in late:  # an answer belongs to the step that asked
        assert a.place == 2 * (number(a) % 1000) + a.env and a.caption == f"at {number(a):g}"


def test_an_answer_from_the_cache_is_there_at_once(tmp_path):
    adviser = Fake()
    with made(tmp_path, adviser) as service:
        assert ask(service, 3, place=5) == []
        (late,) = hear(service)
        assert (late.place, late.late) == (5, True)
        (again,) = ask(service, 3, place=9, first=True)
        assert (again.place, again.late, again.advice) == (9, False, late.advice)
    with made(tmp_path, adviser) as service:  # the next run
        assert ask(service, 3, place=7)[0].advice == late.advice
    assert len(adviser.calls) == 1


def test_a_question_that_waits_for_its_answer_is_not_asked_twice(tmp_path):
    adviser = Fake(delay=0.1)
    with made(tmp_path, adviser, envs=2) as service:
        ask(service, 3, 3, place=10)
        ask(service, 3, 4, place=20, first=True)
        heard = hear(service, 4)
    assert sorted((a.env, a.place, number(a)) for a in heard) == [
        (0, 10, 3),
        (0, 20, 3),
        (1, 11, 3),
        (1, 21, 4),
    ]
    assert sorted(adviser.captions) == [["at 3"], ["at 4"]]


def test_questions_of_several_envs_go_into_one_call(tmp_path):
    for most, batches in ((3, [3, 3, 1]), (100, [4, 3])):
        adviser = Fake(per_call=most)
        with made(tmp_path / str(most), adviser, envs=7, max_batch=4) as service:
            ask(service, *range(7))
            assert sorted(number(a) for a in hear(service, 7)) == list(range(7))
        assert [len(call) for call in adviser.calls] == batches
    with made(tmp_path / "skills", adviser := Fake(per_call=4), envs=3) as service:
        ask(service, 1, 2, 3, skills=True)  # other wants, another call
        hear(service, 3)
    assert adviser.captions == [["at 1"], ["at 2", "at 3"]]


def test_few_calls_run_at_once_and_those_that_wait_are_sent_together(tmp_path):
    adviser = Fake(delay=0.05, per_call=2)
    with made(tmp_path, adviser, envs=16) as service:
        ask(service, *range(16))
        assert len(hear(service, 16)) == 16
    assert adviser.most == services.MAX_CALLS
    assert [len(call) for call in adviser.calls] == [2] * 8


def test_more_questions_than_may_wait_are_dropped(tmp_path):
    adviser = Fake(delay=0.05)
    with made(tmp_path, adviser, envs=10, max_pending=3) as service:
        ask(service, *range(10))
        metrics = service.metrics()
        assert (metrics["llm_adapter/pending"], metrics["llm_adapter/dropped"]) == (3, 7)
        assert sorted(number(a) for a in hear(service, 3)) == [0, 1, 2]
        assert len(adviser.calls) == 3


def test_deterministic_runs_wait_for_their_answers(tmp_path):
    faults = iter([AdviserFault("http_5xx", retry=True), AdviserFault("timeout", retry=True)])

    def say(requests):
        if fault := next(faults, None):
            raise fault

    adviser = Fake(say, delay=0.02, per_call=2)
    with made(tmp_path, adviser, envs=3, deterministic=True) as service:
        answered = ask(service, 1, 2, 1, place=5)
        assert [(a.env, a.place, number(a), a.late) for a in answered] == [
            (0, 5, 1, False), (1, 6, 2, False), (2, 7, 1, False)
        ]  # fmt: skip
        assert adviser.captions == [["at 1", "at 2"]] * 3
        assert idle(service)


# --- When it is not answered --------------------------------------------------------------------------------


class Hostile(BaseException):
    """No Exception."""


async def swallow(requests):
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)


def raises(error: BaseException):
    def say(requests):
        raise error

    return say


WRONG = {
    "nothing": (lambda requests: 7, "adapter"),
    "no answers": (lambda requests: Reply([]), "adapter"),
    "too many": (lambda requests: Reply([Answer(None)] * 3), "adapter"),
    "no list": (lambda requests: Reply(7), "adapter"),
    "no answer": (lambda requests: Reply(["yes"]), "adapter"),
    "no advice": (lambda requests: Reply([Answer("yes")]), "adapter"),
    "tokens": (lambda requests: Reply([Answer(None)], "many", 1), "adapter"),
    "endless tokens": (lambda requests: Reply([Answer(None)], float("inf"), 1), "adapter"),
    "problems": (lambda requests: Reply([Answer(None, {"a": "b"})]), "adapter"),
    "value error": (raises(ValueError(KEY)), "adapter"),
    "exit": (raises(SystemExit(3)), "adapter"),
    "interrupt": (raises(KeyboardInterrupt()), "adapter"),
    "cancelled": (raises(asyncio.CancelledError()), "cancelled"),
    "base": (raises(Hostile(KEY)), "adapter"),
    "hostile kind": (raises(AdviserFault("../../\x1b[2J" + "x" * 1000)), "other"),
    "no kind": (raises(AdviserFault(None)), "None"),
    "hangs": (lambda requests: asyncio.sleep(60), "timeout"),
    "hangs for good": (swallow, "timeout"),
    "bad reply": (raises(AdviserFault("bad_reply", "\x1b[31mred\nnew line")), "bad_reply"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("deterministic", [False, True])
def test_whatever_an_adviser_does_is_a_counted_error(tmp_path, name, deterministic, caplog):
    say, kind = WRONG[name]
    bad = True

    def now_and_then(requests):
        return say(requests) if bad else None

    adviser = Fake(now_and_then)
    options = dict(deterministic=deterministic, timeout_s=0.05, retries=0, breaker_failures=1000)
    with made(tmp_path, adviser, **options) as service:
        for step in range(services.MAX_CALLS + 1):
            assert ask(service, step) == []
            wait(lambda: idle(service))
        metrics = service.metrics()
        assert metrics[f"llm_adapter/errors/{kind}"] == services.MAX_CALLS + 1
        bad = False
        heard = ask(service, 77)  # and it goes on
        assert [number(a) for a in heard or hear(service)] == [77]
        lines = service.notes()
        assert len(lines) <= 1 and all(line.isprintable() and KEY not in line for line in lines)
        started = time.monotonic()
    assert time.monotonic() - started < SOON
    assert caplog.records == []


def test_what_an_adviser_leaves_behind_is_not_logged(tmp_path, caplog):
    async def fail():
        raise ValueError(KEY)

    async def say(requests):
        tasks = [asyncio.create_task(fail())]
        await asyncio.sleep(0.01)
        tasks.clear()
        gc.collect()  # asyncio would now log the error of a task that nobody asked

    with made(tmp_path, Fake(say), deterministic=True) as service:
        ask(service, 1)
        assert metric(service, "errors/background") == 1
    assert caplog.records == []


def test_what_advice_must_not_say_does_not_reach_the_agent(tmp_path):
    wrong = Advice(action_prior=ActionPrior(logits=(1.0,)), plan=("fly",), subgoal="drink")
    with made(tmp_path, Fake(lambda requests: Reply([Answer(wrong)])), deterministic=True) as service:
        (answered,) = ask(service, 1)
        assert answered.advice == Advice(subgoal="drink")


def test_problems_of_replies_are_counted_by_their_reason(tmp_path):
    def say(requests):
        return Reply([Answer(None, Counter({"not_json": 2, "bad name!": 1}))], 3, 4)

    with made(tmp_path, Fake(say), deterministic=True) as service:
        for step in range(8):
            assert ask(service, step) == []
        metrics = service.metrics()
        assert metrics["llm_adapter/errors/not_json"] == 16
        assert metrics["llm_adapter/errors/other"] == 8
        assert metrics["llm_adapter/tokens"] == 56
        assert metrics["llm_adapter/breaker"] == 0  # the server is there, whatever it says
        assert not service.cache._memory


def test_an_endless_number_of_reasons_is_not_remembered(tmp_path):
    reasons = iter(range(1000))
    say = lambda requests: Reply([Answer(None, Counter({f"r{next(reasons)}": 1}))])  # noqa: E731
    with made(tmp_path, Fake(say), deterministic=True) as service:
        for step in range(200):
            ask(service, step)
        errors = {k: v for k, v in service.metrics().items() if "/errors/" in k}
        assert len(errors) <= services.MAX_REASONS + 1
        assert sum(errors.values()) == 200


def test_an_instant_adviser_that_fails_is_counted_and_told_once(tmp_path):
    class Failing(Instant):
        def advise(self, requests):
            raise ValueError(KEY)

    with made(tmp_path, Failing()) as service:
        assert [ask(service, step) for step in range(5)] == [[]] * 5
        assert metric(service, "errors/adapter") == 5
        (line,) = service.notes()
        assert "ValueError" in line and KEY not in line
        assert service.notes() == []
    assert list(tmp_path.iterdir()) == []  # its answers need no file


def test_a_captioner_that_fails_is_counted_and_told_once(tmp_path):
    class Failing(Captioner):
        def caption(self, obs):
            raise KeyError(KEY)

    with made(tmp_path, Fake(), captioner=Failing(), min_gap_steps=2) as service:
        assert [ask(service, step) for step in range(6)] == [[]] * 6
        assert metric(service, "errors/caption") == 3
        (line,) = service.notes()
        assert line.startswith("Step 0: the captioner failed (KeyError in test_service.py, line ")


def test_faults_that_may_pass_are_tried_again_and_others_not(tmp_path):
    for retry, calls in ((True, 3), (False, 1)):
        adviser = Fake(raises(AdviserFault("http_429", retry=retry)))
        with made(
            tmp_path / str(retry), adviser, retries=2, deterministic=True, breaker_failures=10
        ) as service:
            assert ask(service, 1) == []
            assert len(adviser.calls) == calls
            assert metric(service, "errors/http_429") == calls
            assert metric(service, "calls") == calls


def test_waits_grow_and_a_servers_hint_wins_within_bounds(tmp_path):
    with made(tmp_path, Fake(), backoff_s=0.5) as service:
        for retry in range(3):
            waits = [service._backoff(retry, None) for _ in range(50)]
            assert 0.25 * 2**retry <= min(waits) < max(waits) <= 0.5 * 2**retry
        assert service._backoff(40, None) == services.LONGEST_BACKOFF_S
        assert [service._backoff(0, hint) for hint in (0.0, 3.5, -1.0)] == [0.0, 3.5, 0.0]
        assert service._backoff(0, 1e9) == services.LONGEST_BACKOFF_S
    waits = []
    for name in "ab":
        with made(tmp_path / name, Fake(), deterministic=True) as service:
            waits.append([service._backoff(retry, None) for retry in range(3)])
    assert waits[0] == waits[1]


def test_the_breaker_pauses_probes_and_closes():
    now = 100.0
    breaker = Breaker(3, 60.0, clock=lambda: now)
    breaker.failed()
    breaker.failed()
    assert not breaker.succeeded()  # a success begins the count anew
    assert [breaker.failed() for _ in range(3)] == [False, False, True]
    assert breaker.state == 1.0 and breaker.refuses
    assert not breaker.failed()  # a call that began before the pause
    now += 59.9
    assert breaker.refuses
    now += 0.1
    assert breaker.state == 0.5 and not breaker.refuses
    breaker.start()
    assert breaker.refuses  # one call probes
    assert breaker.failed()
    now += 119.9
    assert breaker.refuses
    now += 0.1
    copy = Breaker(3, 60.0, clock=lambda: now)
    copy.load_state_dict(breaker.state_dict())
    for each in (breaker, copy):
        each.start()
        assert each.succeeded()
        assert each.state == 0.0 and not each.refuses and not each.failed()
    for _ in range(20):
        while not breaker.failed():
            breaker.start()
        now += breaker.pause
    assert breaker.pause == services.LONGEST_PAUSE_S


def test_the_breaker_of_a_resumed_run_goes_on_with_its_pause():
    now = 100.0
    breaker = Breaker(1, 60.0, clock=lambda: now)
    breaker.failed()
    now += 20
    later = Breaker(1, 60.0, clock=lambda: 5.0)
    later.load_state_dict(breaker.state_dict())
    assert later.until == 45.0
    assert json.loads(json.dumps(breaker.state_dict())) == breaker.state_dict()


def test_after_failures_in_a_row_there_is_a_pause_and_then_a_probe(tmp_path):
    down, now = True, 1000.0

    def say(requests):
        if down:
            raise AdviserFault("http_5xx", retry=True)

    adviser = Fake(say)
    with made(tmp_path, adviser, breaker_failures=3, breaker_pause_s=60, retries=1, envs=8) as service:
        service.breaker.clock = lambda: now
        ask(service, *[1] * 8, place=100)  # one question
        wait(lambda: idle(service))
        ask(service, *range(10, 18), place=200)
        wait(lambda: idle(service))
        calls = len(adviser.calls)
        assert 3 <= calls <= 2 + services.MAX_CALLS
        assert metric(service, "breaker") == 1.0
        assert ask(service, *range(20, 28)) == []
        assert metric(service, "dropped") >= 8 and len(adviser.calls) == calls
        now += 60
        assert metric(service, "breaker") == 0.5
        ask(service, *range(30, 38), place=300)
        wait(lambda: idle(service))
        assert len(adviser.calls) == calls + 1  # the probe, and not again at once
        assert metric(service, "breaker") == 1.0
        now += 120
        down = False
        ask(service, *range(40, 48), place=400)
        hear(service)
        assert metric(service, "breaker") == 0.0
        assert service.notes() == [
            "Step 200: the adviser does not answer (http_5xx); pause of 60 s.",
            "Step 300: the adviser does not answer (http_5xx); pause of 120 s.",
            "Step 400: the adviser answers again.",
        ]
        ask(service, *range(50, 58))
        hear(service, 8)


def test_a_pause_costs_the_loop_nothing_and_the_cache_still_answers(tmp_path):
    with made(tmp_path, Fake(), deterministic=True) as service:
        assert ask(service, 3)
    with made(tmp_path, Fake(raises(AdviserFault("network"))), breaker_failures=1) as service:
        ask(service, 1)
        wait(lambda: idle(service))
        times = []
        for step in range(10, 210):
            obs = see(step)
            started = time.perf_counter()
            service.ask(obs, [0], None, step=0)
            times.append(time.perf_counter() - started)
        assert statistics.median(times) < AT_ONCE
        assert [number(a) for a in ask(service, 3)] == [3]
        assert len(service.adviser.calls) == 1


def test_the_budget_of_calls_counts_retries_and_is_kept_on_resume(tmp_path):
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
        heard = [bool(ask(service, step)) for step in range(5)]
        assert heard == [True, True, False, False, False]
        assert len(service.notes()) == 1
        assert ask(service, 0)  # the cache still answers
        metrics = service.metrics()
        assert metrics["llm_adapter/tokens"] == 220
        assert metrics["llm_adapter/cost"] == pytest.approx((140 * 2 + 80 * 10) / 1e6)


def test_no_budget_makes_no_call(tmp_path):
    with made(tmp_path, Fake(), deterministic=True, budget_calls=0) as service:
        assert ask(service, 1) == []
        assert service.adviser.calls == []


# --- Metrics, state, the end --------------------------------------------------------------------------------


def test_metrics_tell_what_happened(tmp_path):
    adviser = Fake(delay=0.02, tokens=(5, 2))
    with made(tmp_path, adviser, envs=2, deterministic=True) as service:
        assert service.metrics() == {
            f"llm_adapter/{name}": 0.0
            for name in ("questions", "answers", "dropped", "calls", "tokens", "cost", "pending", "breaker")
        }
        ask(service, 1, 2)
        ask(service, 1, 3)
        metrics = service.metrics()
        assert metrics.pop("llm_adapter/latency_ms") == pytest.approx(30, abs=10)
        expected = dict(
            questions=3,
            answers=3,
            dropped=0,
            calls=3,
            tokens=21,
            cost=0,
            pending=0,
            breaker=0,
            cache_hit_rate=0,
        )
        assert metrics == {f"llm_adapter/{name}": value for name, value in expected.items()}
        ask(service, 2, 1)
        metrics = service.metrics()
        assert metrics["llm_adapter/cache_hit_rate"] == 1.0 and "llm_adapter/latency_ms" not in metrics


def run(service: AdviceService, steps: Sequence[int]) -> list[tuple]:
    """What two envs that see something new every third step are told, and when."""
    told = []
    for step in steps:
        if step == 6:
            service.metrics()
        heard = ask(
            service, step // 3, 500 + step // 3, place=2 * step, skills=step == 7, first=step % 11 == 0
        )
        told += [(step, a.env, a.place, number(a)) for a in heard]
    return told


def test_a_resumed_run_asks_at_the_same_moments(tmp_path):
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


def test_a_state_of_other_envs_lets_each_be_asked_about(tmp_path):
    with made(tmp_path, Instant(), envs=2, min_gap_steps=5) as service:
        ask(service, 1, 2)
        state = service.state_dict()
    with made(tmp_path, Instant(), envs=3, min_gap_steps=5) as service:
        service.load_state_dict(state)
        assert len(ask(service, 1, 2, 3)) == 3


def test_a_recorded_run_is_repeated_without_a_call(tmp_path):
    options = dict(envs=2, deterministic=True, min_gap_steps=4, max_gap_steps=9)
    with made(tmp_path, Fake(), **options) as service:
        expected = run(service, range(40))
        service.state_dict()  # what a checkpoint does writes the cache
        copy = tmp_path / "copy.sqlite"
        copy.write_bytes((tmp_path / "cache.sqlite").read_bytes())
        journal = tmp_path / "cache.sqlite-wal"
        Path(f"{copy}-wal").write_bytes(journal.read_bytes())
    for cache in (None, str(copy)):
        adviser = Fake(raises(AssertionError("called")))
        with made(tmp_path, adviser, replay=True, cache=cache, **options) as service:
            assert run(service, range(40)) == expected
            assert metric(service, "cache_hit_rate") == 1.0
            assert ask(service, -1, -2, first=True) == []  # nobody knows, and nobody is asked
            assert metric(service, "cache_hit_rate") == 0.0
            assert metric(service, "dropped") == 2
            assert service._thread is None
        assert adviser.calls == []
    with pytest.raises(UserError, match=r"llm\.replay"), made(tmp_path / "new", Fake(), replay=True):
        pass


def test_a_cache_of_another_model_is_not_taken(tmp_path):
    with made(tmp_path, Fake(), deterministic=True) as service:
        ask(service, 1)
    other = Fake()
    other.identity = "another"
    with made(tmp_path, other, deterministic=True) as service:
        ask(service, 1)
        assert len(other.calls) == 1


def test_frames_are_part_of_the_question_only_where_they_are_sent(tmp_path):
    for send, calls in ((True, 2), (False, 1)):
        adviser = Fake()
        with made(tmp_path / str(send), adviser, deterministic=True, send_image=send) as service:
            for shade in (0, 1, 0):
                obs = see(1, first=True)
                obs["image"][:] = shade
                assert service.ask(obs, [0], None, step=0)
        assert len(adviser.calls) == calls


@pytest.mark.parametrize("deterministic", [False, True])
def test_close_ends_calls_that_hang_and_tells_the_adviser(tmp_path, deterministic):
    class Blocking(Fake):
        ask = LLMAdapter.ask
        config = {"timeout_s": 0.1}

        def advise(self, requests):
            time.sleep(30)

    for adviser in (Blocking(), Fake(swallow), Fake(lambda requests: asyncio.sleep(60)), Fake()):
        with made(tmp_path, adviser, deterministic=deterministic, timeout_s=0.1, retries=0) as service:
            ask(service, 1)
            thread = service._thread
            started = time.monotonic()
        assert time.monotonic() - started < SOON
        assert adviser.closed
        assert not thread.is_alive() or adviser.say is swallow
        assert all(a.caption == "at 1" for a in ask(service, 5))  # and nothing breaks
        service.close()


HANGS = """
import sys, time
sys.path.insert(0, "tests")
from test_service import *
class Blocking(Fake):
    ask = LLMAdapter.ask
    config = {"timeout_s": 60}
    def advise(self, requests):
        time.sleep(60)
class Offload(Fake):
    async def ask(self, requests):
        await asyncio.to_thread(time.sleep, 60)
with made(Path(sys.argv[1]), {"advise": Blocking, "to_thread": Offload}[sys.argv[2]]()) as service:
    ask(service, 1)
    time.sleep(0.2)
print("the end")
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["advise", "to_thread"])
def test_a_thread_that_hangs_does_not_keep_the_program_from_ending(tmp_path, how):
    started = time.monotonic()
    command = [sys.executable, "-c", HANGS, str(tmp_path), how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=40)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the end\n", "")
    assert time.monotonic() - started < 2 * SOON


def test_no_thread_is_left_and_none_is_made_for_an_instant_adviser(tmp_path):
    before = threading.active_count()
    with made(tmp_path, Instant()) as service:
        ask(service, 1)
        assert threading.active_count() == before
    with made(tmp_path, Fake(), deterministic=True) as service:
        ask(service, 1)
    assert threading.active_count() == before


# --- The real thing against a server ------------------------------------------------------------------------


@contextlib.contextmanager
def gemini(path: Path, server: FakeLLM, monkeypatch, **options) -> Iterator[AdviceService]:
    monkeypatch.setenv("GEMINI_API_KEY", KEY)
    options = {"backend": "gemini", "model": "fake-model", "base_url": server.url, **options}
    adviser, _ = make_adviser({**config.load([]).llm, **options}, SPEC, Captioner(), 0)
    with made(path, adviser, **options) as service:
        yield service


def test_a_server_that_dies_and_comes_back(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    options = dict(breaker_failures=3, breaker_pause_s=0.2, retries=1)
    with FakeLLM() as server, gemini(tmp_path, server, monkeypatch, **options) as service:
        ask(service, 1, place=1)
        (answered,) = hear(service, seconds=20)
        assert answered.advice.action_prior.logits == (1.0, 0.0, 0.0)
        server.stop()
        step, times = 10, []
        while metric(service, "breaker") == 0.0:
            started = time.perf_counter()
            assert ask(service, step, place=step) == []
            times.append(time.perf_counter() - started)
            time.sleep(0.01)
            step += 1
            assert step < 1000
        server.start()
        heard = []
        while not heard:
            heard = ask(service, step, place=step)
            time.sleep(0.01)
            step += 1
            assert step < 1000
        assert statistics.median(times) < AT_ONCE
        assert heard[0].caption == f"at {heard[0].place}" and heard[0].late
        lines = service.notes()
        assert "does not answer (network" in lines[0] and "pause of 0.2 s" in lines[0]
        assert lines[-1].endswith("the adviser answers again.")
        errors = service.metrics()
        assert errors["llm_adapter/errors/network"] >= 3
        state = service.state_dict()
    told = [
        json.dumps(state),
        *lines,
        caplog.text,
        *(file.read_bytes().decode("latin1") for file in tmp_path.iterdir()),
    ]
    assert not [text for text in told if KEY in text]
    assert server.asked[0].headers["x-goog-api-key"] == KEY  # it was there to be leaked


def test_a_server_with_hints_slow_answers_and_nonsense(tmp_path, monkeypatch):
    options = dict(timeout_s=0.3, retries=1, breaker_failures=100, deterministic=True)
    with FakeLLM() as server, gemini(tmp_path, server, monkeypatch, **options) as service:
        assert ask(service, 0) or ask(service, 0, first=True)  # the first call also makes the client
        server.script(Say(status=429, body=retry_info("0.5s")))
        started = time.monotonic()
        assert ask(service, 1)
        assert time.monotonic() - started > 0.45
        assert metric(service, "errors/http_429") == 1
        server.script(Say(delay=1.0), Say(status=503))
        assert ask(service, 2) == []
        server.script(Say(text='{"answers": [{"number": 1, "plan": ["fly"], "confidence": 7}]}'))
        assert ask(service, 3) == []
        server.script(Say(text='{"answers": [{"num'), Say(die="middle"))
        assert ask(service, 4) == []
        assert ask(service, 5)
        errors = {k[19:]: v for k, v in service.metrics().items() if "/errors/" in k}
        assert errors["http_5xx"] == 1 and errors["timeout"] >= 1
        assert errors["plan_refused"] == 1 and errors["not_json"] == 1


def test_several_envs_share_a_call_to_the_server(tmp_path, monkeypatch):
    options = dict(deterministic=True, envs=5, timeout_s=10.0)
    with FakeLLM() as server, gemini(tmp_path, server, monkeypatch, **options) as service:
        assert [a.env for a in ask(service, 1, 2, 3, 4, 1, skills=True)] == [0, 1, 2, 3, 4]
        told = [[each["caption"] for each in asked.prompt["situations"]] for asked in server.asked]
        assert sorted(told) == [["at 1", "at 2", "at 3", "at 4"]] or len(told) == 2
        assert metric(service, "tokens") == 125 * len(told)


def test_a_session_is_replayed_without_its_server(tmp_path, monkeypatch):
    options = dict(envs=2, deterministic=True, min_gap_steps=4, max_gap_steps=9, timeout_s=10.0)
    with FakeLLM() as server:
        with gemini(tmp_path, server, monkeypatch, **options) as service:
            expected = run(service, range(40))
        asked = len(server.asked)
        assert expected and asked
        server.stop()
        with gemini(tmp_path, server, monkeypatch, replay=True, **options) as service:
            assert run(service, range(40)) == expected
        assert len(server.asked) == asked


def test_cached_json_is_advice_to_the_last_bit():
    said = {"action_prior": {"logits": [0.1, -1 / 3, 1e-17]}, "confidence": 0.3, "plan": ["left"]}
    advice, _ = parse_reply(said, SPEC)
    assert parse_reply(json.loads(advice.model_dump_json(exclude_defaults=True)), SPEC) == (advice, Counter())
