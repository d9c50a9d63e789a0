"""The service that asks an adviser: when, about which envs, and what becomes of the answers.

The loop calls `AdviceService.ask` once per step and gets what is there. Calls run in a thread of the service,
several at a time, with timeouts, retries, a budget and a circuit breaker. Whatever an adviser does,
or does not, ends as a counted error.
"""

import asyncio
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lore_llm.advice import MAX_NAME, Advice, AdviserFault, Answer, Request, parse_reply
from lore_llm.backends import LLMAdapter, Reply
from lore_llm.cache import Cache, question_key

MAX_CALLS = 4  # at a time
LONGEST_BACKOFF_S = 30.0  # between two tries of a call, also where the server asks for more
LONGEST_PAUSE_S = 3600.0  # of the breaker, unless its first one is longer
FLUSH_S = 1.0  # between writes to the cache
CLOSE_S = 1.0  # that an adviser has to let go of its connections
MAX_REASONS = 64  # kinds of errors that are counted apart
MAX_TOKENS = 10**9  # of a call
MAX_LINE = 200  # characters of a fault in the log


@dataclass(frozen=True)
class Answered:
    """Advice for the step that asked, which the replay holds at `place`. `late`: that was an earlier step."""

    env: int
    place: int
    advice: Advice
    caption: str
    late: bool


@dataclass
class _Question:
    key: str
    request: Request
    askers: list[tuple[int, int]]  # (env, place) of each step that waits for the answer


class Breaker:
    """A pause after `failures` calls failed in a row; then one call probes whether the adviser is back.

    If it is not, the next pause is twice as long. An answer ends all that.
    """

    def __init__(self, failures: int, pause_s: float, clock: Callable[[], float] = time.monotonic):
        self.failures, self.first_pause, self.clock = failures, pause_s, clock
        self.streak = 0  # calls failed in a row
        self.pause = pause_s  # length of the last one
        self.until: float | None = None  # end of the pause; None: closed
        self.probing = False

    @property
    def state(self) -> float:
        """0 closed (calls are made), 1 open (a pause), 0.5 half-open (a call may probe, or does)."""
        if self.until is None:
            return 0.0
        return 1.0 if self.clock() < self.until else 0.5

    @property
    def refuses(self) -> bool:
        """Whether a call cannot be made now."""
        return self.state == 1.0 or self.probing

    def start(self) -> None:
        """A call begins that is not refused."""
        self.probing = self.until is not None

    def succeeded(self) -> bool:
        """A call was answered. True if that ends the pauses."""
        ends = self.until is not None
        self.streak, self.until, self.probing = 0, None, False
        return ends

    def failed(self) -> bool:
        """A call was not answered. True if a pause begins."""
        self.streak += 1
        if self.until is None:
            if self.streak < self.failures:
                return False
            self.pause = self.first_pause
        elif self.probing:
            self.pause = min(2 * self.pause, max(LONGEST_PAUSE_S, self.first_pause))
        else:  # a call that began before the pause
            return False
        self.until, self.probing = self.clock() + self.pause, False
        return True

    def state_dict(self) -> dict[str, float | None]:
        """As seconds that are left: clocks of two runs have nothing in common."""
        left = None if self.until is None else max(0.0, self.until - self.clock())
        return {"streak": self.streak, "pause": self.pause, "left": left}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the pause."""
        self.streak, self.pause, self.probing = state["streak"], state["pause"], False
        self.until = None if state["left"] is None else self.clock() + state["left"]


class _Daemons(ThreadPoolExecutor):
    """Runs each call in a thread of its own that, unlike a pool's, does not keep the program from ending.

    A name server that does not answer, or an adviser that hangs, holds such a thread for good.
    """

    def submit(self, function: Callable, /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = function(*args, **kwargs)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        threading.Thread(target=run, daemon=True, name="adviser-call").start()
        return future


class AdviceService:
    """Asks `adviser` about the envs of a run and remembers what it said.

    Args:
        adviser: Who is asked. An `instant` one is called directly, costs no budget and needs no cache.
        captioner: Puts an env's observation into words.
        config_llm: The options of the group `llm`.
        cache_path: File of answers, unless `llm.cache` names one.
        n_envs: Envs that `ask` is called for.
        deterministic: `ask` waits for the answers, so that none is late.
        wants: What is asked for, of `advice.WANTS`, besides skills.

    Raises UserError for a cache that cannot be what it should.
    """

    def __init__(
        self,
        adviser: LLMAdapter,
        captioner: Any,
        config_llm: Mapping[str, Any],
        *,
        cache_path: Path,
        n_envs: int,
        deterministic: bool,
        wants: frozenset[str],
    ):
        self.adviser, self.captioner, self.config = adviser, captioner, config_llm
        self.deterministic, self.wants = deterministic, frozenset(wants)
        self.identity = str(adviser.identity)  # once: it is a user's code
        c = self.config
        self.cache: Cache | None = None
        if not adviser.instant:
            self.cache = Cache(
                Path(c["cache"] or cache_path), adviser.spec, size=c["cache_size"],
                record=c["record"] and not c["replay"], must_exist=c["replay"],
                patient=deterministic,
            )  # fmt: skip
        self.breaker = Breaker(c["breaker_failures"], c["breaker_pause_s"])
        # An env that was never asked about, or has just been reset, may be at once.
        self.ready = max(c["min_gap_steps"], c["max_gap_steps"])
        self.gaps = [self.ready] * n_envs  # steps since the last question
        self.captions = [""] * n_envs  # of the last question
        self.skills_due = False  # the next question asks for skills too
        self.step = 0  # env step of the last one

        # What the two threads share, under the lock.
        self._lock = threading.Condition()  # is notified when a question is done with
        self._queue: deque[_Question] = deque()  # not sent yet
        self._waiting: dict[str, _Question] = {}  # not answered yet, sent or not
        self._arrived: list[tuple[tuple[int, int], Advice, str]] = []
        self._totals: Counter[str] = Counter()
        self._before: Counter[str] = Counter()  # the totals at the last call of metrics()
        self._latencies: list[float] = []  # seconds of the calls since then
        self._errors: Counter[str] = Counter()
        self._notes: list[str] = []
        self._told: set[str] = set()  # lines that are not repeated

        self._jitter = random.Random(0 if deterministic else None)
        self._closed = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop
        self._wake: asyncio.Event  # there may be something in the queue
        self._stop: asyncio.Event
        if c["replay"] and adviser.instant:
            self._note("llm.replay changes nothing, as this adviser answers without a call")

    # --- In the loop -----------------------------------------------------------------------------------

    def ask(
        self,
        obs: Mapping[str, np.ndarray],
        places: Sequence[int],
        uncertainty: np.ndarray | None,
        *,
        step: int,
        skills: bool = False,
    ) -> list[Answered]:
        """Ask about the envs where it is time to, and return the advice that is there now.

        That is advice for this step (from the cache, of an instant adviser, or waited for), then what earlier
        steps asked for. Raises nothing, whatever the adviser does.

        Args:
            obs: Observations [n, ...] of all envs, with `is_first` and `is_last`.
            places: Where the replay holds the steps that ask. [n]
            uncertainty: Of the agent, from 0 to 1. [n]
            step: Env step, for the log.
            skills: The next question, now or later, also asks for skills.
        """
        self.step = step
        self.skills_due |= skills
        answered = self._arrivals(late=True)
        asked: list[_Question] = []
        for env, request in self._due(obs, uncertainty):
            place = int(places[env])
            key = "" if self.adviser.instant else self._key(request)
            if self.cache and (advice := self.cache.get(key)):
                answered.append(Answered(env, place, advice, request.caption, late=False))
            else:
                asked.append(_Question(key, request, [(env, place)]))
        found = sum(not one.late for one in answered)
        if self.adviser.instant:
            for question in asked:
                self._answer_at_once(question)
        else:
            self._submit(asked)
        if self.adviser.instant or self.deterministic:
            answered += self._arrivals(late=False)
        self._count(questions=found + len(asked), found=found, answers=len(answered))
        return sorted(answered, key=lambda one: (one.late, one.env))

    def _arrivals(self, late: bool) -> list[Answered]:
        """The answers that have arrived, each once."""
        with self._lock:
            arrived, self._arrived = self._arrived, []
        return [Answered(*asker, advice, caption, late) for asker, advice, caption in arrived]

    def _due(
        self, obs: Mapping[str, np.ndarray], uncertainty: np.ndarray | None
    ) -> Iterator[tuple[int, Request]]:
        """The envs that are asked about now, with what is asked."""
        c = self.config
        for env in range(len(self.gaps)):
            self.gaps[env] = self.ready if obs["is_first"][env] else self.gaps[env] + 1
            if self.gaps[env] < c["min_gap_steps"] or not (self.wants or self.skills_due):
                continue
            if obs["is_last"][env]:  # no action follows
                continue
            one = {key: value[env] for key, value in obs.items() if key[:4] != "log_"}
            try:
                caption = str(self.captioner.caption(one))
            except Exception as error:  # of a user's captioner
                self._count_error("caption", f"the captioner failed ({_place_of(error)})")
                self.gaps[env] = 0
                continue
            due = caption != self.captions[env] or self.gaps[env] >= c["max_gap_steps"]
            if not due and (uncertainty is None or not uncertainty[env] > c["ask_uncertainty"]):
                continue
            wants = self.wants | {"skills"} if self.skills_due else self.wants
            self.skills_due = False
            self.gaps[env], self.captions[env] = 0, caption
            yield env, Request(caption, wants, one)

    def _key(self, request: Request) -> str:
        seen = {}
        if self.adviser.by_observation:
            seen = request.obs
        elif self.config["send_image"] and "image" in request.obs:
            seen = {"image": request.obs["image"]}
        return question_key(self.identity, request.wants, request.caption, seen)

    def _answer_at_once(self, question: _Question) -> None:
        try:
            answers = self.adviser.answer([question.request]).answers
            self._finish([question], answers)
        except Exception as error:  # of a user's adviser
            self._count_error(_kind_of(error), f"the adviser failed ({_place_of(error)})")

    def _submit(self, questions: list[_Question]) -> None:
        """Hand questions to the background, as far as it takes any; if deterministic, await the answers."""
        mine = []
        with self._lock:
            for question in questions:
                if same := self._waiting.get(question.key):
                    same.askers += question.askers
                elif (
                    self.config["replay"]
                    or len(self._waiting) >= self.config["max_pending"]
                    or self._refuses()
                ):
                    self._count(dropped=1)
                else:
                    # The env writes its next observation into the same memory.
                    obs = {key: np.array(value) for key, value in question.request.obs.items()}
                    question.request = Request(question.request.caption, question.request.wants, obs)
                    self._waiting[question.key] = question
                    self._queue.append(question)
                    mine.append(question)
        if not mine:
            return
        self._start()
        self._loop.call_soon_threadsafe(self._wake.set)
        if self.deterministic:
            with self._lock:
                while any(self._waiting.get(each.key) is each for each in mine) and self._thread.is_alive():
                    self._lock.wait(1.0)

    def _refuses(self) -> bool:
        """Whether no call may be made now: a pause, no budget left, or the end. Under the lock."""
        if self._closed:
            return True
        totals, c = self._totals, self.config
        tokens = totals["tokens_in"] + totals["tokens_out"]
        if totals["calls"] >= c["budget_calls"] or tokens >= c["budget_tokens"]:
            self._note_once(
                f"the adviser's budget is used up ({totals['calls']:,} calls, {tokens:,} tokens): from now "
                "on only the cache answers. More: --llm.budget_calls, --llm.budget_tokens"
            )
            return True
        return self.breaker.refuses

    # --- In the background -----------------------------------------------------------------------------

    def _start(self) -> None:
        """Start the event loop, unless it runs."""
        if self._thread is None:
            ready = threading.Event()
            run = lambda: asyncio.run(self._serve(ready.set))  # noqa: E731
            self._thread = threading.Thread(target=run, daemon=True, name="adviser")
            self._thread.start()
            ready.wait()

    async def _serve(self, ready: Callable[[], None]) -> None:
        """All that happens on the event loop, until `close`; `ready` is told when it can be used."""
        self._loop = asyncio.get_running_loop()
        self._loop.set_default_executor(_Daemons())
        # asyncio would log what a library left behind with its text, which could hold anything.
        self._loop.set_exception_handler(lambda loop, context: self._count_error("background"))
        self._wake, self._stop = asyncio.Event(), asyncio.Event()
        ready()
        tasks = [asyncio.create_task(self._work()) for _ in range(MAX_CALLS)]
        if self.cache:
            tasks.append(asyncio.create_task(self._keep()))
        await self._stop.wait()
        for task in tasks:
            task.cancel()
        await asyncio.wait([*tasks, asyncio.create_task(self._let_go())], timeout=CLOSE_S)

    async def _let_go(self) -> None:
        try:
            await self.adviser.close()
        except Exception as error:  # of a user's code
            self._count_error(_kind_of(error))

    async def _keep(self) -> None:
        """Write new answers to the cache every now and then."""
        while True:
            await asyncio.sleep(FLUSH_S)
            await asyncio.to_thread(self.cache.flush)

    async def _work(self) -> None:
        """One call after the other, as long as there are questions."""
        while True:
            await self._wake.wait()
            if batch := self._take():
                try:
                    await self._call(batch)
                finally:
                    self._drop(batch)

    def _take(self) -> list[_Question]:
        """The questions of the next call. If none may be made, all are dropped."""
        size = max(1, min(self.adviser.questions_per_call, self.config["max_batch"]))
        with self._lock:
            if self._queue and self._refuses():
                self._count(dropped=len(self._queue))
                self._drop(list(self._queue))
                self._queue.clear()
            batch: list[_Question] = []
            while self._queue and len(batch) < size:
                if batch and self._queue[0].request.wants != batch[0].request.wants:
                    break
                batch.append(self._queue.popleft())
            if batch:
                self._begin()
            if not self._queue:
                self._wake.clear()
            return batch

    def _begin(self) -> None:
        self.breaker.start()
        self._count(calls=1)

    async def _call(self, batch: list[_Question]) -> None:
        """Ask, and ask again where that may help. The first call has been counted by `_take`."""
        requests = [question.request for question in batch]
        for retry in range(self.config["retries"] + 1):
            started = time.monotonic()
            result = await self._attempt(requests)
            if isinstance(result, Reply):
                self._succeeded(batch, result, time.monotonic() - started)
                return
            self._failed(result)
            if not result.retry or retry == self.config["retries"]:
                return
            await asyncio.sleep(self._backoff(retry, result.after_s))
            with self._lock:
                if self._refuses():
                    return
                self._begin()

    async def _attempt(self, requests: list[Request]) -> Reply | AdviserFault:
        """One call: a reply with an answer for each request, or why there is none."""

        async def call() -> Any:
            try:
                return await self.adviser.ask(requests)
            except (asyncio.CancelledError, GeneratorExit):
                raise
            except BaseException as error:  # SystemExit of a user's code would end the event loop
                return error

        # Not wait_for: that waits until a cancelled call is over, and some do not end then.
        task = asyncio.create_task(call())
        await asyncio.wait([task], timeout=self.config["timeout_s"])
        if not task.done():
            task.cancel()
            return AdviserFault("timeout", retry=True)
        result = AdviserFault("cancelled") if task.cancelled() else task.result()
        if isinstance(result, AdviserFault):
            return result
        if isinstance(result, BaseException):
            return AdviserFault(_kind_of(result), _place_of(result))
        try:
            answers = [self._checked(answer) for answer in result.answers]
            tokens = [min(max(0, int(n)), MAX_TOKENS) for n in (result.tokens_in, result.tokens_out)]
        except Exception:  # whatever it is, it is no Reply
            return AdviserFault("adapter", f"{type(self.adviser).__name__}.ask gives no Reply")
        if len(answers) != len(requests):
            return AdviserFault(
                "adapter", f"{type(self.adviser).__name__}.ask gives not one answer for each question"
            )
        return Reply(answers, *tokens)

    def _checked(self, answer: Answer) -> Answer:
        """An answer that says only what it may, whoever made it."""
        advice = answer.advice
        if advice is not None:
            advice, _ = parse_reply(advice.model_dump(exclude_defaults=True), self.adviser.spec)
        return Answer(advice, Counter({_name(reason): int(n) for reason, n in answer.problems.items()}))

    def _succeeded(self, batch: list[_Question], reply: Reply, seconds: float) -> None:
        with self._lock:
            self._count(tokens_in=reply.tokens_in, tokens_out=reply.tokens_out)
            self._latencies.append(seconds)
            if self.breaker.succeeded():
                self._note("the adviser answers again")
        share = (reply.tokens_in + reply.tokens_out) // len(batch)
        for question, answer in zip(batch, reply.answers, strict=True):
            if answer.advice is not None:
                self.cache.put(question.key, answer.advice, share)
        self._finish(batch, reply.answers)

    def _finish(self, batch: list[_Question], answers: Sequence[Answer]) -> None:
        """Hand the answers to those who wait for them."""
        with self._lock:
            for question, answer in zip(batch, answers, strict=True):
                for reason, count in answer.problems.items():
                    self._count_error(_name(reason), amount=int(count))
                if answer.advice is not None:
                    caption = question.request.caption
                    self._arrived += [(asker, answer.advice, caption) for asker in question.askers]
            self._drop(batch)

    def _drop(self, batch: list[_Question]) -> None:
        """Be done with questions, whether they were answered or not."""
        with self._lock:
            for question in batch:
                if self._waiting.get(question.key) is question:
                    del self._waiting[question.key]
            self._lock.notify_all()

    def _failed(self, fault: AdviserFault) -> None:
        why = _printable(str(fault))
        with self._lock:
            self._count_error(_kind_of(fault))
            if self.breaker.failed():
                self._note(f"the adviser does not answer ({why}); pause of {self.breaker.pause:g} s")
            elif not fault.retry:
                self._note_once(f"the adviser failed ({why})")

    def _backoff(self, retry: int, after_s: float | None) -> float:
        """Seconds before the next try: what the server asks for, else doubled each time, with jitter."""
        if after_s is None:
            after_s = self.config["backoff_s"] * 2**retry * self._jitter.uniform(0.5, 1.0)
        return min(max(after_s, 0.0), LONGEST_BACKOFF_S)

    # --- What it tells ---------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """Scalars for the log (docs/logs.md): counts of the whole run, means since the last call of this."""
        c = self.config
        with self._lock:
            totals, before = self._totals, self._before
            cost = totals["tokens_in"] * c["price_input"] + totals["tokens_out"] * c["price_output"]
            metrics = {
                "questions": totals["questions"],
                "answers": totals["answers"],
                "dropped": totals["dropped"],
                "calls": totals["calls"],
                "tokens": totals["tokens_in"] + totals["tokens_out"],
                "cost": cost / 1e6,
                "pending": len(self._waiting),
                "breaker": self.breaker.state,
                **{f"errors/{reason}": count for reason, count in sorted(self._errors.items())},
            }
            if self._latencies:
                metrics["latency_ms"] = 1000 * sum(self._latencies) / len(self._latencies)
            if self.cache and totals["questions"] > before["questions"]:
                looked_up = totals["questions"] - before["questions"]
                metrics["cache_hit_rate"] = (totals["found"] - before["found"]) / looked_up
            self._before, self._latencies = Counter(totals), []
        return {f"llm_adapter/{name}": float(value) for name, value in metrics.items()}

    def notes(self) -> list[str]:
        """New lines for the log."""
        with self._lock:
            lines, self._notes = self._notes, []
        return lines + (self.cache.notes() if self.cache else [])

    def _note(self, line: str) -> None:
        with self._lock:
            self._notes.append(f"Step {self.step:,}: {line}.")

    def _note_once(self, line: str) -> None:
        with self._lock:
            if line not in self._told and len(self._told) < MAX_REASONS:
                self._told.add(line)
                self._note(line)

    def _count(self, **amounts: int) -> None:
        with self._lock:
            self._totals.update(amounts)

    def _count_error(self, reason: str, line: str = "", amount: int = 1) -> None:
        """Count an error by its reason, and tell a line about the first like it."""
        with self._lock:
            if reason not in self._errors and len(self._errors) >= MAX_REASONS:
                reason = "other"
            self._errors[reason] += amount
            if line:
                self._note_once(line)

    def state_dict(self) -> dict[str, Any]:
        """Budget, breaker, counters and gaps as plain values. What waits for an answer is lost on resume."""
        if self.cache:
            self.cache.flush()
        with self._lock:
            return {
                "totals": dict(self._totals),
                "before": dict(self._before),
                "errors": dict(self._errors),
                "breaker": self.breaker.state_dict(),
                "gaps": list(self.gaps),
                "captions": list(self.captions),
                "skills_due": self.skills_due,
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the run that gave `state_dict`; with another number of envs, each may be asked about."""
        with self._lock:
            self._totals, self._errors = Counter(state["totals"]), Counter(state["errors"])
            self._before = Counter(state["before"])
            self.breaker.load_state_dict(state["breaker"])
            self.skills_due = state["skills_due"]
            if len(state["gaps"]) == len(self.gaps):
                self.gaps, self.captions = list(state["gaps"]), list(state["captions"])

    def close(self) -> None:
        """End all calls and the thread, within seconds even if a call hangs, and write the cache."""
        if self._closed:
            return
        self._start()  # also if nothing was asked: the adviser is told of the end
        with self._lock:
            self._closed = True
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(2 * CLOSE_S)
        if self.cache:
            self.cache.close()


def _name(reason: object) -> str:
    """How an error is counted, whatever a user's adviser calls it."""
    name = str(reason)
    return name if name.isascii() and name.isidentifier() and len(name) <= MAX_NAME else "other"


def _kind_of(error: BaseException) -> str:
    return _name(error.kind) if isinstance(error, AdviserFault) else "adapter"


def _place_of(error: BaseException) -> str:
    """Type and place of an error. Not its text, which could hold anything, keys too."""
    if isinstance(error, AdviserFault):
        return _printable(str(error))
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    where = f" in {Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno}" if trace else ""
    return f"{type(error).__name__}{where}"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:MAX_LINE])
