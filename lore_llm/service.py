"""Asks an adviser in the background: when, about which environments, and what happens to the answers.

The training loop calls `AdviceService.ask` once per step and receives the advice that is available. One
worker thread takes questions from a queue and makes the calls, with retries, a budget and a circuit breaker.
Faults of an adviser are counted and never end a run.
"""

import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lore_llm import backends
from lore_llm.advice import Advice, AdviserFault, Request
from lore_llm.backends import LLMAdapter, Reply, describe
from lore_llm.cache import Cache, question_key

MAX_PENDING = 64  # questions that wait for an answer; more are not asked
LONGEST_BACKOFF_S = 30.0  # between two tries of a call, even if the server asks for more
LONGEST_PAUSE_S = 3600.0  # of the breaker, unless its first pause is longer
CLOSE_S = 1.0  # that `close` waits for a running call


@dataclass(frozen=True)
class Answered:
    """Advice for the step stored at `place` of the replay. `late`: not the current step, an earlier one."""

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
    """Pauses all calls after `failures` failures in a row. Then one call probes whether the adviser is back.

    If it fails, the next pause is twice as long. A success closes the breaker.
    """

    def __init__(self, failures: int, pause_s: float, clock: Callable[[], float] = time.monotonic):
        self.failures, self.first_pause, self.clock = failures, pause_s, clock
        self.streak = 0  # failures in a row
        self.pause = pause_s  # length of the last pause
        self.until: float | None = None  # end of the pause; None: closed

    @property
    def state(self) -> float:
        """0 closed, 1 open (pause), 0.5 half open (the next call probes)."""
        if self.until is None:
            return 0.0
        return 1.0 if self.clock() < self.until else 0.5

    def succeeded(self) -> bool:
        """Count a success. True if it closes the breaker."""
        closes = self.until is not None
        self.streak, self.until = 0, None
        return closes

    def failed(self) -> bool:
        """Count a failure. True if a pause begins."""
        self.streak += 1
        if self.until is None:
            if self.streak < self.failures:
                return False
            self.pause = self.first_pause
        else:
            self.pause = min(2 * self.pause, max(LONGEST_PAUSE_S, self.first_pause))
        self.until = self.clock() + self.pause
        return True

    def state_dict(self) -> dict[str, float | None]:
        """The time is stored as seconds left, since clocks of two processes are unrelated."""
        left = None if self.until is None else max(0.0, self.until - self.clock())
        return {"streak": self.streak, "pause": self.pause, "left": left}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.streak, self.pause = state["streak"], state["pause"]
        self.until = None if state["left"] is None else self.clock() + state["left"]


class AdviceService:
    """Asks `adviser` about the environments of a run.

    Args:
        adviser: The adviser. If it is `instant`, it is called directly, without budget and cache.
        captioner: Describes an environment's observation in words.
        config_llm: The options of the group `llm`.
        cache_path: The cache file, unless `llm.cache` names one.
        n_envs: Number of environments.
        deterministic: `ask` waits for the answers, so that none is late.
        wants: What is asked for, of `advice.WANTS`, except skills.

    Raises UserError for a cache that cannot be used.
    """

    def __init__(
        self, adviser: LLMAdapter, captioner: Any, config_llm: Mapping[str, Any], *,
        cache_path: Path, n_envs: int, deterministic: bool, wants: frozenset[str],
    ):  # fmt: skip
        self.adviser, self.captioner, self.config = adviser, captioner, config_llm
        self.deterministic, self.wants = deterministic, frozenset(wants)
        self.identity = str(adviser.identity)
        c = self.config
        self.breaker = Breaker(c["breaker_failures"], c["breaker_pause_s"])
        # Environments that were just reset, or never asked about, may be asked about immediately.
        self.ready = max(c["min_gap_steps"], c["max_gap_steps"])
        self.gaps = [self.ready] * n_envs  # steps since the last question
        self.captions = [""] * n_envs  # of the last question
        self.skills_due = False  # the next question also asks for skills
        self.step = 0  # env step, for the log

        # Shared by the loop and the worker, under the lock, which is notified of every change.
        self._lock = threading.Condition()
        self._queue: deque[_Question] = deque()  # not sent yet
        self._waiting: dict[str, _Question] = {}  # not answered yet, sent or not
        self._arrived: list[tuple[tuple[int, int], Advice, str]] = []
        self._deadline: float | None = None  # of the running call, if the adviser does not keep time itself
        self._hangs = False  # a call exceeded it
        self._closed = False
        self._totals: Counter[str] = Counter()
        self._before: Counter[str] = Counter()  # the totals at the last call of metrics()
        self._latencies: list[float] = []  # seconds of the calls since then
        self._errors: Counter[str] = Counter()
        self._notes: list[str] = []
        self._noted: set[str] = set()

        self._jitter = random.Random()
        self._thread: threading.Thread | None = None
        self.cache: Cache | None = None
        if not adviser.instant:
            self.cache = Cache(
                Path(c["cache"] or cache_path), adviser.spec,
                record=c["record"] and not c["replay"], must_exist=c["replay"], note=self._note_once,
            )  # fmt: skip

    # --- In the training loop --------------------------------------------------------------------------

    def ask(
        self, obs: Mapping[str, np.ndarray], places: Sequence[int], uncertainty: np.ndarray | None, *,
        step: int, skills: bool = False,
    ) -> list[Answered]:  # fmt: skip
        """Ask about the environments that are due, and return the advice that is available now.

        This is advice for the current step (from the cache, an instant adviser, or awaited), followed by
        late answers to earlier steps.

        Args:
            obs: Observations [n, ...] of all environments, with `is_first` and `is_last`.
            places: The places of the current steps in the replay. [n]
            uncertainty: Uncertainty of the agent, 0 to 1. [n]
            step: Env step, for the log.
            skills: The next question, now or later, also asks for skills.
        """
        self.step = step
        self.skills_due |= skills
        answered: list[Answered] = []
        asked: list[_Question] = []
        for env, request in self._due(obs, uncertainty):
            place = int(places[env])
            key = "" if self.adviser.instant else self._key(request)
            if self.cache and (advice := self.cache.get(key)):
                answered.append(Answered(env, place, advice, request.caption, late=False))
            else:
                asked.append(_Question(key, request, [(env, place)]))
        found = len(answered)
        if self.adviser.instant:
            for question in asked:
                self._answer_instantly(question)
        else:
            self._submit(asked)
        with self._lock:
            arrived, self._arrived = self._arrived, []
        for (env, place), advice, caption in arrived:
            answered.append(Answered(env, place, advice, caption, late=place != int(places[env])))
        self._count(questions=found + len(asked), found=found, answers=len(answered))
        return sorted(answered, key=lambda one: (one.late, one.env))

    def _due(
        self, obs: Mapping[str, np.ndarray], uncertainty: np.ndarray | None
    ) -> Iterator[tuple[int, Request]]:
        """The environments to ask about now, with the requests."""
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
            except Exception as error:  # in a user's captioner
                self._error("caption", f"the captioner failed ({describe(error)})")
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

    def _answer_instantly(self, question: _Question) -> None:
        try:
            self._finish([question], self.adviser.answer([question.request]))
        except AdviserFault as fault:
            self._error(fault.kind, f"the adviser failed ({fault})")

    def _submit(self, questions: list[_Question]) -> None:
        """Put questions into the queue, unless calls are refused; if deterministic, await the answers."""
        with self._lock:
            self._watch()
            mine = []
            for question in questions:
                full = len(self._waiting) >= MAX_PENDING
                if same := self._waiting.get(question.key):
                    same.askers += question.askers
                elif self.config["replay"] or full or self._refuses():
                    self._totals["dropped"] += 1
                else:
                    # Copied, as the environments reuse the memory of their observations.
                    obs = {key: np.array(value) for key, value in question.request.obs.items()}
                    question.request = Request(question.request.caption, question.request.wants, obs)
                    self._waiting[question.key] = question
                    self._queue.append(question)
                    mine.append(question)
            if mine and self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True, name="adviser")
                self._thread.start()
            if mine:
                self._lock.notify_all()
            while self.deterministic and any(self._waiting.get(each.key) is each for each in mine):
                self._lock.wait(0.1)
                self._watch()
                if self._hangs or not self._thread.is_alive():
                    return

    def _watch(self) -> None:
        """Report a call that exceeds its time; nothing is asked while it hangs. Under the lock."""
        if self._deadline is not None and time.monotonic() > self._deadline:
            self._deadline, self._hangs = None, True
            self._failed(AdviserFault("timeout"))
            self._drop_queue()

    def _refuses(self) -> bool:
        """Whether no call may be made now: closed, hanging, a pause, or no budget left. Under the lock."""
        totals, c = self._totals, self.config
        tokens = totals["tokens_in"] + totals["tokens_out"]
        if totals["calls"] >= c["budget_calls"] or tokens >= c["budget_tokens"]:
            self._note_once(
                f"the adviser's budget is used up ({totals['calls']:,} calls, {tokens:,} tokens): from now "
                "on only the cache answers. More: --llm.budget_calls, --llm.budget_tokens"
            )
            return True
        return self._closed or self._hangs or self.breaker.state == 1.0

    # --- In the worker thread --------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                batch = self._take()
            try:
                if batch:
                    self._call(batch)
            finally:
                with self._lock:
                    self._hangs = False
                    self._drop(batch)

    def _take(self) -> list[_Question]:
        """The questions of the next call. Under the lock."""
        if self._refuses():
            self._drop_queue()
        size = max(1, min(self.adviser.questions_per_call, self.config["max_batch"]))
        batch: list[_Question] = []
        while self._queue and len(batch) < size:
            if batch and self._queue[0].request.wants != batch[0].request.wants:
                break
            batch.append(self._queue.popleft())
        return batch

    def _call(self, batch: list[_Question]) -> None:
        """Ask, and again after faults that may pass."""
        for retry in range(self.config["retries"] + 1):
            started = time.monotonic()
            with self._lock:
                if retry and self._refuses():
                    return
                self._totals["calls"] += 1
                self._deadline = None if self.adviser.keeps_time else started + self.config["timeout_s"]
            try:
                reply = self.adviser.answer([question.request for question in batch])
            except AdviserFault as error:
                fault = error
            except BaseException as error:  # SystemExit in a user's class would end the thread silently
                fault = AdviserFault("adapter", describe(error))
            else:
                self._succeeded(batch, reply, time.monotonic() - started)
                return
            with self._lock:
                self._deadline = None
                self._failed(fault)
                if not fault.retry or retry == self.config["retries"]:
                    return
                if self._lock.wait_for(lambda: self._closed, self._backoff(retry, fault.after_s)):
                    return

    def _succeeded(self, batch: list[_Question], reply: Reply, seconds: float) -> None:
        for question, answer in zip(batch, reply.answers, strict=True):
            if answer.advice is not None:
                self.cache.put(question.key, answer.advice)
        with self._lock:
            self._deadline = None
            self._count(tokens_in=reply.tokens_in, tokens_out=reply.tokens_out)
            self._latencies.append(seconds)
            if self.breaker.succeeded():
                self._note("the adviser answers again")
            self._finish(batch, reply)

    def _finish(self, batch: list[_Question], reply: Reply) -> None:
        """Deliver the answers to the steps that wait for them."""
        with self._lock:
            for question, answer in zip(batch, reply.answers, strict=True):
                self._errors.update(answer.problems)
                if answer.advice is not None:
                    caption = question.request.caption
                    self._arrived += [(asker, answer.advice, caption) for asker in question.askers]
            self._drop(batch)

    def _drop(self, batch: list[_Question]) -> None:
        """Remove questions, answered or not. Under the lock."""
        for question in batch:
            if self._waiting.get(question.key) is question:
                del self._waiting[question.key]
        self._lock.notify_all()

    def _drop_queue(self) -> None:
        self._totals["dropped"] += len(self._queue)
        self._drop(list(self._queue))
        self._queue.clear()

    def _failed(self, fault: AdviserFault) -> None:
        """Count a failed call. Under the lock."""
        self._error(fault.kind)
        if self.breaker.failed():
            self._note(f"the adviser does not answer ({fault}); pause of {self.breaker.pause:g} s")
        elif not fault.retry:
            self._note_once(f"the adviser failed ({fault})", fault.kind)

    def _backoff(self, retry: int, after_s: float | None) -> float:
        """Seconds before the next try: what the server asks for, else doubled each time, with jitter."""
        if after_s is None:
            after_s = backends.BACKOFF_S * 2**retry * self._jitter.uniform(0.5, 1.0)
        return min(max(after_s, 0.0), LONGEST_BACKOFF_S)

    # --- Metrics, log and state ------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """Scalars for the log (docs/logs.md): counts of the whole run, means since the last call."""
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
        return lines

    def _note(self, line: str) -> None:
        with self._lock:
            self._notes.append(f"Step {self.step:,}: {line}.")

    def _note_once(self, line: str, key: str = "") -> None:
        """Note only the first line of each key, by default the line itself."""
        with self._lock:
            if (key or line) not in self._noted:
                self._noted.add(key or line)
                self._note(line)

    def _count(self, **amounts: int) -> None:
        with self._lock:
            self._totals.update(amounts)

    def _error(self, kind: str, line: str = "") -> None:
        """Count an error by its kind, which becomes part of a metric's name; note `line` once."""
        with self._lock:
            self._errors[kind if kind.isidentifier() else "other"] += 1
            if line:
                self._note_once(line, kind)

    def state_dict(self) -> dict[str, Any]:
        """Budget, breaker, counters and gaps as plain values. Questions without answer are lost on resume."""
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
        """Resume from `state_dict`. With another number of environments each may be asked about."""
        with self._lock:
            self._totals, self._errors = Counter(state["totals"]), Counter(state["errors"])
            self._before = Counter(state["before"])
            self.breaker.load_state_dict(state["breaker"])
            self.skills_due = state["skills_due"]
            if len(state["gaps"]) == len(self.gaps):
                self.gaps, self.captions = list(state["gaps"]), list(state["captions"])

    def close(self) -> None:
        """End the worker and close the cache. A call that hangs is left behind in its daemon thread."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._lock.notify_all()
        if self._thread is not None:
            self._thread.join(CLOSE_S)
        try:
            self.adviser.close()
        except Exception as error:  # in a user's class
            self._error("adapter", f"the adviser failed ({describe(error)})")
        if self.cache:
            self.cache.close()
