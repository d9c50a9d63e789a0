"""Advisers: the base class, and the registry of those that `--llm.backend` names.

Users subclass `LLMAdapter`. The service (service.py) adds retries, the budget, the circuit breaker and the
cache.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
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
GEMINI_KEYS = ("GEMINI_API_KEY", "GOOGLE_API_KEY")  # environment variables; the first that is set is used
BACKOFF_S = 0.5  # before the first retry, doubled each time; a hint of the server wins
SLOW_START = 10.0  # seconds that the program gemini may need to answer


@dataclass
class Reply:
    """The result of one call: an answer to each request, in order, and the tokens it used."""

    answers: list[Answer]
    tokens_in: int = 0
    tokens_out: int = 0


class LLMAdapter:
    """Base class of advisers. Subclasses define `infer`, or `advise` for everything that advice can hold.

    `spec` defines what advice may contain, `config` holds the options of the group `llm`. Both are set after
    construction, so a subclass with its own `__init__` need not call this one.
    """

    instant = False  # True: answers immediately at no cost, so it is called in the training loop
    keeps_time = False  # True: `answer` returns within its own time limit
    questions_per_call = 1  # requests that one call can take
    spec: AdviceSpec
    config: Mapping[str, Any]

    def __init__(self, spec: AdviceSpec, config: Mapping[str, Any]):
        self.spec = spec
        self.config = config

    @property
    def identity(self) -> str:
        """Part of the cache key. Advisers that may answer a question differently need different ones."""
        return f"{type(self).__module__}:{type(self).__qualname__} {self.spec.digest}"

    @property
    def by_observation(self) -> bool:
        """Whether answers depend on the whole observation, as those of `infer` do, not on the caption only.

        If so, the observation is part of the cache key.
        """
        return type(self).advise is LLMAdapter.advise and type(self).answer is LLMAdapter.answer

    def infer(self, obs_np: Mapping[str, Any], num_actions: int) -> Mapping[str, Any]:
        """The simple form: a dict with `prior_logits` [num_actions], `confidence` 0..1 and `features` [K].

        `obs_np` is the observation of one environment, without batch axis: `image` uint8 [H, W, 3] and
        others. All keys are optional, and the other fields of `Advice` (`plan`, `subgoal`, `skills`) are
        accepted too.
        """
        raise NotImplementedError(f"{type(self).__name__} defines neither infer nor advise")

    def advise(self, requests: Sequence[Request]) -> Sequence[Advice | Mapping[str, Any] | None]:
        """The full form: advice for each request, in order. None: no advice."""
        return [self._infer_one(request) for request in requests]

    def _infer_one(self, request: Request) -> Any:
        found = self.infer(dict(request.obs), len(self.spec.actions))
        if not isinstance(found, Mapping):
            return found
        advice = {key: v.tolist() if hasattr(v, "tolist") else v for key, v in found.items()}
        if "prior_logits" in advice:
            advice["action_prior"] = {"logits": advice.pop("prior_logits")}
        return advice

    def answer(self, requests: Sequence[Request]) -> Reply:
        """The validated advice for each request. Raises AdviserFault, also for exceptions of `advise`."""
        try:
            advice = self.advise(requests)
            if len(advice) != len(requests):
                raise AdviserFault("adapter", f"{len(advice)} answers to {len(requests)} requests")
            return Reply([parse_reply(each, self.spec) for each in advice])
        except AdviserFault:
            raise
        except Exception as error:  # in a user's class
            raise AdviserFault("adapter", f"{type(self).__name__} raised {describe(error)}") from None

    def close(self) -> None:
        """Close connections. The adviser may be asked again."""


def describe(error: BaseException) -> str:
    """Type and place of an exception, for the log. Not its text, which may contain anything, even a key."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    where = f" in {Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno}" if trace else ""
    return f"{type(error).__name__}{where}"


class NoAdviser(LLMAdapter):
    """Gives no advice."""

    instant = True

    def advise(self, requests: Sequence[Request]) -> list[None]:
        return [None] * len(requests)


def make_adviser(
    config: Mapping[str, Any], spec: AdviceSpec, captioner: Any, seed: int
) -> tuple[LLMAdapter, list[str]]:
    """The adviser that `--llm.backend` names, and lines for the log.

    `config` is the group `llm` of the options. A user's class, `package.module:Class`, receives those of
    `spec`, `config`, `captioner` and `seed` that its constructor has parameters for. Raises UserError.
    """
    backend, why = config["backend"], ""
    if backend == "auto":
        if config["replay"]:
            raise UserError("--llm.replay True needs --llm.backend as it was recorded, not auto.")
        backend, why = _choose(captioner)
    known = {"spec": spec, "config": config, "captioner": captioner, "seed": seed}
    known["about"] = getattr(captioner, "about", "")
    made = call_with_known(_adviser_class(backend), f"--llm.backend {backend}", known)
    made.spec, made.config = spec, config  # a user's class need not set them
    notes = [f"Adviser: {backend}{why}" + (f", model {made.model}." if getattr(made, "model", None) else ".")]
    if config["send_image"] and backend != "gemini" and ":" not in backend:
        notes.append(f"--llm.send_image True has no effect: {backend} receives captions only.")
    if config["features"] and backend in ("rules", "none"):
        notes.append(f"--llm.features {config['features']} has no effect: {backend} gives none, they stay 0.")
    if config["rules_quality"] != "oracle" and backend != "rules":
        notes.append(
            f"--llm.rules_quality {config['rules_quality']} has no effect: the adviser is {backend}."
        )
    if config["replay"] and made.instant:
        notes.append(f"--llm.replay True has no effect: {backend} is never cached.")
    if backend == "gemini_cli" and config["timeout_s"] < SLOW_START:
        notes.append(
            f"The program gemini takes seconds to start: with --llm.timeout_s {config['timeout_s']:g} "
            "it may never answer in time. Try 30."
        )
    return made, notes


def _choose(captioner: Any) -> tuple[str, str]:
    """The back end that `auto` selects, and why."""
    for name in GEMINI_KEYS:
        if os.environ.get(name, "").strip():
            return "gemini", f" ({name} is set)"
    if captioner.rules is not None:
        return "rules", " (the embedded rules, since GEMINI_API_KEY is not set)"
    return "none", " (GEMINI_API_KEY is not set, and there are no embedded rules for this task)"


def _adviser_class(backend: str) -> type[LLMAdapter]:
    if backend in REGISTRY:
        return load_class(REGISTRY[backend])
    if ":" not in backend:
        if "." in backend:
            raise UserError(f"--llm.backend {backend} names no class: write {backend}:MyAdviser.")
        raise unknown_name("adviser (--llm.backend)", backend, list(BACKENDS))
    found = load_class(backend)
    if not isinstance(found, type) or not issubclass(found, LLMAdapter):
        raise UserError(f"--llm.backend {backend} is not a subclass of lore_llm.LLMAdapter.")
    if all(getattr(found, form) is getattr(LLMAdapter, form) for form in ("infer", "advise")):
        raise UserError(
            f"--llm.backend {backend} defines neither infer(self, obs_np, num_actions) nor "
            "advise(self, requests)."
        )
    return found
