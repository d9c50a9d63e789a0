"""Who advises: the base class of all advisers, and those that come with LoRe.

`LLMAdapter` is what a user subclasses. `make_adviser` makes the one that `--llm.backend` names. One call of
`ask` is one call of the model: retries, budget, breaker and cache are the AdviceService's (service.py).
"""

import asyncio
import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from basics import UserError
from envs import call_with_known, load_class, unknown_name
from lore_llm.advice import Advice, AdviceSpec, AdviserFault, Answer, Request, parse_reply

# Name -> "module:Class", imported when it is chosen.
REGISTRY = {
    "gemini": "lore_llm.language_models:Gemini",
    "gemini_cli": "lore_llm.language_models:GeminiCLI",
    "openai": "lore_llm.language_models:OpenAI",
    "rules": "lore_llm.rules:Rules",
    "none": "lore_llm.backends:NoAdviser",
}
BACKENDS = ("auto", *REGISTRY)
GEMINI_KEYS = ("GEMINI_API_KEY", "GOOGLE_API_KEY")  # in the environment; the first that is set counts
SLOW_START = 10.0  # seconds that the program gemini may need until it answers


@dataclass
class Reply:
    """What one call brought: an answer for each request, in their order, and what it cost."""

    answers: list[Answer]
    tokens_in: int = 0
    tokens_out: int = 0


class LLMAdapter:
    """An adviser. Subclass it and define `infer`, or `advise` for all that an adviser can say.

    `spec` says what may be answered, and `config` holds the options of the group `llm`. A subclass that has
    an `__init__` of its own need not call this one.
    """

    instant = False  # True: answers at once and costs nothing, so it is called in the loop itself
    questions_per_call = 1  # requests that one call can take
    spec: AdviceSpec
    config: Mapping[str, Any]
    _busy: Future | None = None  # the last call in a thread

    def __init__(self, spec: AdviceSpec, config: Mapping[str, Any]):
        self.spec = spec
        self.config = config

    @property
    def identity(self) -> str:
        """Part of the cache's key: advisers that may answer the same question differently differ in it."""
        return f"{type(self).__module__}:{type(self).__qualname__} {self.spec.digest}"

    @property
    def by_observation(self) -> bool:
        """Whether an answer depends on the whole observation, as `infer`'s does, not on the caption alone.

        Then equal captions are no reason to take an earlier answer.
        """
        return type(self).advise is LLMAdapter.advise and type(self).ask is LLMAdapter.ask

    def infer(self, obs_np: Mapping[str, Any], num_actions: int) -> Mapping[str, Any]:
        """The simple form: a dict with `prior_logits` [num_actions], `confidence` 0..1 and `features` [K].

        `obs_np` is one environment's observation, without a batch axis: `image` uint8 [H, W, 3] and others.
        Absent keys say nothing; those of `Advice` (`plan`, `subgoal`, `skills`) may be there too.
        """
        raise NotImplementedError(f"{type(self).__name__} defines neither infer nor advise")

    def advise(self, requests: Sequence[Request]) -> list[Answer | Advice]:
        """The native form: an answer for each request, in their order."""
        return [self._infer_one(request) for request in requests]

    def _infer_one(self, request: Request) -> Answer:
        found = self.infer(dict(request.obs), len(self.spec.actions))
        if not isinstance(found, Mapping):
            return Answer(None, Counter(not_an_object=1))
        said = {key: _plain(value) for key, value in found.items()}
        if "prior_logits" in said:
            said["action_prior"] = {"logits": said.pop("prior_logits")}
        return Answer(*parse_reply(said, self.spec))

    def answer(self, requests: Sequence[Request]) -> Reply:
        """What `advise` says, checked. Raises AdviserFault, also for whatever the subclass's code raises."""
        try:
            said = self.advise(requests)
            if len(said) != len(requests):
                raise AdviserFault("adapter", f"{len(said)} answers to {len(requests)} requests")
            return Reply([_checked(each, self.spec) for each in said])
        except AdviserFault as error:
            fault = error
        except Exception as error:  # of a user's code. Its text is not told: it could hold a key
            fault = AdviserFault("adapter", f"{type(self).__name__} raised {type(error).__name__}")
        raise fault.with_traceback(None)  # here, where no other exception goes along with it

    async def ask(self, requests: Sequence[Request]) -> Reply:
        """Answer the requests within `llm.timeout_s` seconds, or raise AdviserFault.

        Here `answer` runs in a thread, one call at a time; a call that takes longer goes on in vain, and
        the next waits for it.
        """
        try:
            async with asyncio.timeout(self.config["timeout_s"]):
                while self._busy is not None and not self._busy.done():
                    await asyncio.wrap_future(self._busy)
                self._busy = _in_thread(self.answer, requests)
                said = await asyncio.wrap_future(self._busy)
        except TimeoutError:
            said = AdviserFault("timeout", retry=True)
        if isinstance(said, AdviserFault):
            raise said
        return said

    async def close(self) -> None:
        """Let go of connections. The adviser may be asked again."""


def _plain(value: Any) -> Any:
    """Arrays and tensors as lists and numbers."""
    return value.tolist() if hasattr(value, "tolist") else value


def _checked(said: Any, spec: AdviceSpec) -> Answer:
    """An adviser's word, as an Answer that holds only what `spec` allows."""
    problems: Counter[str] = Counter()
    if isinstance(said, Answer):
        problems, said = said.problems, said.advice
    if said is None:
        return Answer(None, problems)
    if isinstance(said, Advice):
        said = said.model_dump(exclude_defaults=True)
    advice, more = parse_reply(said, spec)
    return Answer(advice, problems + more)


def _in_thread(function: Callable[..., Reply], *args: Any) -> Future:
    """Call a function in a thread that does not keep the program from ending, unlike asyncio.to_thread.

    The future's result is what the function returns, or the AdviserFault that it raises.
    """
    future: Future = Future()
    future.set_running_or_notify_cancel()  # from here on nobody can cancel it

    def run() -> None:
        try:
            said = function(*args)
        except AdviserFault as fault:
            said = fault
        except BaseException as error:  # sys.exit in a user's code would leave the caller waiting
            said = AdviserFault("adapter", type(error).__name__)
        future.set_result(said)

    threading.Thread(target=run, daemon=True, name="adviser").start()
    return future


class NoAdviser(LLMAdapter):
    """Never says anything."""

    instant = True

    def advise(self, requests: Sequence[Request]) -> list[Answer]:
        return [Answer(None) for _ in requests]


def make_adviser(
    config: Mapping[str, Any], spec: AdviceSpec, captioner: Any, seed: int
) -> tuple[LLMAdapter, list[str]]:
    """The adviser that `--llm.backend` names, and lines for the log.

    `config` is the group `llm` of the options. A class of the user's own, `package.module:Class`, is given
    those of `spec`, `config`, `captioner` and `seed` that it has parameters for.
    Raises UserError for what cannot work.
    """
    backend, why = config["backend"], ""
    if backend == "auto":
        if config["replay"]:
            raise UserError("--llm.replay True needs --llm.backend as it was recorded, not auto.")
        backend, why = _choose(captioner)
    known = {"spec": spec, "config": config, "captioner": captioner, "seed": seed}
    known["about"] = getattr(captioner, "about", "")
    adviser = _adviser_class(backend)
    made = call_with_known(adviser, f"--llm.backend {backend}", known)
    made.spec, made.config = spec, config  # a user's class need not keep them itself
    notes = [f"Adviser: {backend}{why}" + (f", model {made.model}." if getattr(made, "model", None) else ".")]
    if config["send_image"] and backend != "gemini" and ":" not in backend:
        notes.append(f"--llm.send_image True: {backend} gets no frames, only captions.")
    if config["features"] and backend in ("rules", "none"):
        notes.append(f"--llm.features {config['features']}: {backend} gives none, so they stay 0.")
    if config["rules_quality"] != "oracle" and backend != "rules":
        notes.append(f"--llm.rules_quality {config['rules_quality']} changes nothing: {backend} advises.")
    if backend == "gemini_cli" and config["timeout_s"] < SLOW_START:
        notes.append(
            f"The program gemini takes seconds to start: with --llm.timeout_s {config['timeout_s']:g} "
            "it may never answer in time. Try 30."
        )
    return made, notes


def _choose(captioner: Any) -> tuple[str, str]:
    """What `auto` means here, and why."""
    for name in GEMINI_KEYS:
        if os.environ.get(name, "").strip():
            return "gemini", f" ({name} is set)"
    if captioner.rules is not None:
        return "rules", " (the embedded rules, since GEMINI_API_KEY is not set)"
    return "none", " (GEMINI_API_KEY is not set, and there are no embedded rules for this task)"


def _adviser_class(backend: str) -> Callable[..., LLMAdapter]:
    if backend in REGISTRY:
        return load_class(REGISTRY[backend])
    if ":" not in backend:
        if "." in backend:
            raise UserError(f"--llm.backend {backend} names no class: write {backend}:MyAdviser.")
        raise unknown_name("adviser (--llm.backend)", backend, list(BACKENDS))
    found = load_class(backend)
    if not isinstance(found, type) or not issubclass(found, LLMAdapter):
        raise UserError(f"--llm.backend {backend} is not a subclass of lore_llm.LLMAdapter.")
    forms = ("infer", "advise", "ask")
    if all(getattr(found, form) is getattr(LLMAdapter, form) for form in forms):
        raise UserError(
            f"--llm.backend {backend} defines neither infer(self, obs_np, num_actions) nor "
            "advise(self, requests)."
        )
    return found
