"""The run's side of advice: asks for it, and passes the answers to replay, imagination and options.

Each answer belongs to the step that was asked about: its logits are stored there, its plan becomes a
synthetic item that starts there, and its skills become options. Without advice the run gets a `NoAdvice`.
Several learners share one library of options: the first learner keeps it, with the executions of all.
"""

import json
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces

import distributed
from basics import atomic_write, numpy_rng, write_error
from logger import Timer
from lore_llm.advice import MAX_REPLY_CHARS, AdviceSpec
from lore_llm.backends import make_adviser
from lore_llm.captions import Captioner
from lore_llm.option_actor import PLAN, Outcome, outcomes
from lore_llm.options import OptionLibrary
from lore_llm.policy import AdvisedPolicy
from lore_llm.prior import Reliability, bounded
from lore_llm.service import AdviceService, Answered
from lore_llm.synthetic import Item, SyntheticItems, tensors
from replay import Replay

CACHE = "llm_cache.sqlite"  # files in the logdir
DECISIONS = "decisions.jsonl"
MAX_PROPOSALS = 8  # plans that are evaluated in one step; the newest
POLL_STEPS = 100  # env steps between two readings of skills.yaml
# Metrics that are summed over several learners, not averaged; so are errors.
COUNTS = ("questions", "answers", "dropped", "late", "pending", "calls", "tokens", "cost")

Arrays = dict[str, np.ndarray]


def is_count(name: str) -> bool:
    """Whether a metric is a count, which is summed over several learners."""
    group, _, kind = name.partition("/")
    return group == "llm_adapter" and (kind in COUNTS or kind.startswith("errors/"))


def advice_spaces(
    config: Mapping, act_space: Mapping[str, spaces.Space]
) -> tuple[dict[str, spaces.Space], dict[str, float]]:
    """Spaces of what advice stores with each step, and the defaults for steps without it."""
    found: dict[str, spaces.Space] = {}
    actions = sum(getattr(space, "n", 0) for space in act_space.values())
    flag = spaces.Box(0, 1, (), np.bool_)
    if config.prior.enabled:
        found["llm_logits"] = spaces.Box(-np.inf, np.inf, (actions,), np.float32)
    if config.llm.enabled and config.llm.features:
        found["llm_features"] = spaces.Box(-np.inf, np.inf, (config.llm.features,), np.float32)
    if found:
        found["llm_mask"] = flag
    if config.options.enabled:
        found |= {"decision": flag, "option": spaces.Box(0, 2**31 - 1, (), np.int32)}
    return found, {key: float(key == "decision") for key in found}


def make_service(
    config: Mapping, captioner: Captioner, n_envs: int, logdir: Path, learners: int = 1
) -> tuple[AdviceService, list[str]]:
    """The service that asks for advice about `n_envs` envs, and lines for the log. Raises UserError.

    Each of several learners has its own adviser and its share of the budget.
    """
    shares = {name: config.llm[name] // learners for name in ("budget_calls", "budget_tokens")}
    llm = config.replace({f"llm.{name}": value for name, value in shares.items()}).llm
    spec = AdviceSpec(
        tuple(captioner.actions), tuple(captioner.subgoals), llm.features, MAX_REPLY_CHARS,
        config.options.max_options,
    )  # fmt: skip
    adviser, notes = make_adviser(llm, spec, captioner, config.seed)
    wants = {"prior": config.prior.enabled, "plan": config.synthetic.enabled, "features": llm.features}
    service = AdviceService(
        adviser, captioner, llm, cache_path=logdir / CACHE, n_envs=n_envs,
        deterministic=config.deterministic, wants=frozenset(k for k, v in wants.items() if v),
    )  # fmt: skip
    return service, notes


class NoAdvice:
    """The hooks of a run without advice: they do nothing."""

    def before(
        self, obs: Arrays, state: Mapping[str, torch.Tensor], step: int
    ) -> tuple[Arrays, dict[int, Sequence[int]]]:
        """Called before the agent acts on observations [n, ...]; `state` is the last acting state.

        Returns entries to store with the step, and plans to execute (env: actions).
        """
        return {}, {}

    def after(self, obs: Arrays, state: Mapping[str, torch.Tensor], step: int) -> None:
        """Called when the step is in the replay, with the new acting state."""

    def items(self) -> Callable[[], Arrays]:
        """A function that returns the synthetic items of the next batch; any thread may call it."""
        return dict

    def evaluated(self, episodes: Sequence[Arrays]) -> None:
        """Called with evaluation episodes, each arrays [L, ...], on rank 0; the other ranks have none."""

    def metrics(self) -> dict[str, float]:
        return {}

    def notes(self) -> list[str]:
        """New lines for the log."""
        return []

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume. What belongs to places in the replay is dropped unless `replay.exact`."""


class Proposal(NamedTuple):
    """A plan to evaluate, from the state at a place of the replay."""

    env: int
    place: int
    plan: list[int]
    confidence: float


class AdviceHooks(NoAdvice):
    """Asks an adviser, and distributes its answers."""

    def __init__(
        self, service: AdviceService, agent: Any, replay: Replay, config: Mapping, logdir: Path, timer: Timer
    ):
        self.service, self.agent, self.replay = service, agent, replay
        self.config, self.logdir, self.timer = config, logdir, timer
        self.policy: AdvisedPolicy = agent.policy
        self.captioner = self.policy.captioner
        llm, self.n_envs = config.llm, replay.n_envs
        self.until = config.steps / 2 if llm.until is None else llm.until
        self.actions = {name: index for index, name in enumerate(self.captioner.actions)}
        self._notes: list[str] = []
        self.rng = numpy_rng(config.seed, "coach", *distributed.seed_names())
        entries, _ = advice_spaces(config, agent.actions.space)
        self.stored = {key: space for key, space in entries.items() if key.startswith("llm_")}
        rng = numpy_rng(config.seed, "synthetic", *distributed.seed_names())
        self.synthetic = SyntheticItems(config, rng)
        self.reliability = Reliability()  # of executed plans
        self.proposals: deque[Proposal] = deque(maxlen=max(MAX_PROPOSALS, self.n_envs))
        self.offered: dict[int, int] = {}  # env -> place where this step offered a plan for execution
        self.predicted: dict[int, float] = {}  # env -> predicted return of the plan that runs there
        self.model_losses: list[float] = []  # of the last two evaluations
        self.library: OptionLibrary | None = None
        self.next_options = self.next_poll = self.next_decision = 0
        if config.options.enabled:
            folder = logdir if distributed.is_main() else None
            self.library = OptionLibrary(folder, self.captioner, config.options)
            self.policy.set_options(self.library)
        self.keeps_library = self.library is not None and distributed.is_main()
        self.unshared = self.keeps_library  # the other learners do not have the library's last change
        self.counts: dict[str, list[float]] = {}

    # --- Around a step ---------------------------------------------------------------------------------

    def before(
        self, obs: Arrays, state: Mapping[str, torch.Tensor], step: int
    ) -> tuple[Arrays, dict[int, Sequence[int]]]:
        with self.timer("advice"):
            # The full weight for the first half, then linearly to 0: in the end the actor acts alone.
            left = 1 - step / self.until if self.until else 0.0
            self.policy.set_prior_share(min(1.0, max(0.0, 2 * left)))
            self.offered = {}
            if self.keeps_library and step >= self.next_poll:  # the person's edits come first
                self.next_poll = step + POLL_STEPS
                self._read_options()
            entries = {k: np.zeros((self.n_envs, *s.shape), s.dtype) for k, s in self.stored.items()}
            plans: dict[int, Sequence[int]] = {}
            if step < self.until:
                self._ask(obs, state["uncertainty"].numpy(), step, entries, plans)
            self._share_options()
        return entries, plans

    def _ask(
        self, obs: Arrays, uncertainty: np.ndarray, step: int, entries: Arrays,
        plans: dict[int, Sequence[int]],
    ) -> None:  # fmt: skip
        """Ask, and enter the answers into the step's `entries` and `plans`, or where they belong."""
        wants_options = self.keeps_library and step >= self.next_options
        if wants_options:
            self.next_options = step + self.config.options.option_generation_interval
        places = self.replay.heads.tolist()
        for answered in self.service.ask(obs, places, uncertainty, step=step, skills=wants_options):
            values = self._values(answered)
            if answered.late:
                self._count("late", 1.0)
                if values:
                    self.replay.amend(answered.env, answered.place, values)
            else:
                for key, value in values.items():
                    entries[key][answered.env] = value
            plan = [self.actions[name] for name in answered.advice.plan]
            if plan and self.config.synthetic.enabled:
                self._propose(answered, plan, plans)
            if self.keeps_library and answered.advice.skills:
                self._set_options(self.library.propose(answered.advice.skills, step))

    def _values(self, answered: Answered) -> dict[str, Any]:
        advice, values = answered.advice, {}
        if self.config.prior.enabled:
            if advice.action_prior is None:  # llm_mask stands for logits and features together
                return {}
            logits = torch.tensor(advice.action_prior.logits)
            values["llm_logits"] = bounded(logits, self.config.prior.logit_clip).numpy()
        if self.config.llm.features and advice.features:
            values["llm_features"] = np.array(advice.features, np.float32)
        return values | ({"llm_mask": True} if values else {})

    def _propose(self, answered: Answered, plan: list[int], plans: dict[int, Sequence[int]]) -> None:
        self.proposals.append(Proposal(answered.env, answered.place, plan, answered.advice.confidence))
        if answered.late:
            return
        # 1 until executed plans turn out to lower the return, then down to 0.
        trust = min(1.0, 2 * float(self.reliability.value))
        if self.rng.random() < self.config.synthetic.synthetic_execution_prob * trust:
            plans[answered.env] = plan
            self.offered[answered.env] = answered.place

    def after(self, obs: Arrays, state: Mapping[str, torch.Tensor], step: int) -> None:
        with self.timer("advice"):
            ended = outcomes(state)
            for outcome in ended:
                if outcome.uid == PLAN:
                    self._record_plan(outcome)
            executed = self._record_options([outcome for outcome in ended if outcome.uid != PLAN])
            if self.config.synthetic.enabled:
                self._evaluate_plans(state, step)
            if self.library is not None:
                if executed:
                    if self.keeps_library:
                        self._set_options(self.library.prune())
                    self._share_options()
                self._count("options/used_share", float((state["uid"] > 0).float().mean()))
            every = self.config.llm.log_decisions_every
            if every and distributed.is_main() and step >= max(self.next_decision, self.config.prefill):
                self.next_decision = step + every
                self._log_decisions(obs, state, step)

    def _record_plan(self, outcome: Outcome) -> None:
        self.reliability.update(torch.tensor(outcome.gain), torch.tensor(True))
        self._count("synthetic/execution_gain", outcome.gain)
        if outcome.env in self.predicted:
            error = (self.predicted.pop(outcome.env) - outcome.ret) / outcome.scale
            self._count("synthetic/execution_error", abs(error))

    def _record_options(self, ended: Sequence[Outcome]) -> bool:
        """Count this step's executions of options, of all learners; whether there are any."""
        if self.library is None:
            return False
        everywhere = distributed.all_gather_object(list(map(tuple, ended)))
        found = [Outcome(*each) for one in everywhere for each in one]
        if self.keeps_library:
            for outcome in found:
                self.library.record(outcome.uid, outcome.gain, outcome.success, outcome.length)
        return bool(found)

    def _evaluate_plans(self, state: Mapping[str, torch.Tensor], step: int) -> None:
        """Evaluate the newest proposals, and the plans that have just started; keep those with a gain."""
        waiting = [p for p in self.proposals if self.replay.holds(p.env, p.place)]
        self.proposals.clear()
        started = (state["uid"] == PLAN) & (state["position"] == 0)
        running = {(env, place) for env, place in self.offered.items() if started[env]}
        for env, _ in running:
            self.predicted.pop(env, None)
        ready = self._ready(step)
        if not ready:
            waiting = [p for p in waiting if p[:2] in running]
        if not waiting:
            return
        latents = self.replay.latents(*(np.array([p[axis] for p in waiting]) for axis in (0, 1)))
        known = latents["deter"].any(1)  # a late answer may be about a step of the prefill, without latents
        waiting = [proposal for proposal, has in zip(waiting, known, strict=True) if has]
        if not waiting:
            return
        latents = {key: value[known] for key, value in latents.items()}
        found = self.agent.evaluate_plans(tensors(latents, [p.plan for p in waiting]))
        gains = (found["plan"] - found["policy"]) / found["scale"]
        sure = found["disagreement"] <= np.maximum(float(self.policy.largest), 1e-8)
        for index, proposal in enumerate(waiting):
            if proposal[:2] in running and np.isfinite(found["plan"][index]):
                self.predicted[proposal.env] = float(found["plan"][index])
            if ready:
                accepted = bool(gains[index] > 0 and (sure[index] or not self.policy.ensemble))
                self._count("synthetic/return_gain", float(gains[index]))
                self._count("synthetic/accepted", float(accepted))
                if accepted:
                    self.synthetic.add(Item(*proposal, self.agent.updates))

    def _ready(self, step: int) -> bool:
        """Whether the world model is good enough to imagine plans with."""
        losses = self.model_losses
        settled = not self.config.eval_every
        if len(losses) == 2:
            settled = losses[1] > (1 - self.config.synthetic.synthetic_settled) * losses[0]
        return step >= max(self.config.synthetic.synthetic_warmup, self.config.prefill) and settled

    def items(self) -> Callable[[], Arrays]:
        if not (self.config.synthetic.enabled and self.synthetic.amount):
            return dict
        chosen = self.synthetic.choose(self.replay, self.agent.updates, float(self.reliability.value))
        return lambda: chosen(self.replay)

    def evaluated(self, episodes: Sequence[Arrays]) -> None:
        if episodes and self.config.synthetic.enabled:
            loss = self.agent.model_loss(self._sequences(episodes))
            self.model_losses = [*self.model_losses[-1:], loss]
            self._count("synthetic/eval_loss", loss)
        self.model_losses = distributed.broadcast_object(self.model_losses)

    def _sequences(self, episodes: Sequence[Arrays]) -> Arrays:
        """A batch of windows that are evenly spread over the concatenated episodes."""
        c = self.config
        window, rows = c.batch_length + c.replay_context, c.batch_size
        keys = [key for key in self.replay.layout if key not in ("deter", "stoch")]
        long = {}
        for key in keys:
            shape, dtype = self.replay.layout[key]
            blank = self.replay.defaults.get(key, 0)
            values = [np.asarray(e.get(key, np.full((len(e["is_first"]), *shape), blank))) for e in episodes]
            long[key] = np.concatenate(values).astype(dtype, copy=False)
        steps = len(long["is_first"])
        starts = np.linspace(0, max(0, steps - window), rows).astype(int)
        index = np.minimum(starts[:, None] + np.arange(window), steps - 1)
        batch = {key: value[index] for key, value in long.items()}
        batch["is_first"][:, 0] = True
        for key, blank in self.replay.no_latents.items():
            shape, dtype = self.replay.layout[key]
            batch[key] = np.full((rows, window, *shape), blank, dtype)
        return batch

    # --- Options ---------------------------------------------------------------------------------------

    def _read_options(self) -> None:
        """Apply the person's edits of skills.yaml."""
        slots, lines = self.library.poll()
        self._notes += lines
        self._set_options(slots, renamed=bool(lines))

    def _set_options(self, slots: Sequence[int], renamed: bool = False) -> None:
        """Give the actor the library, whose `slots` hold other options now; names may have changed too."""
        self.policy.set_options(self.library, fresh=slots)
        if slots or renamed:
            self.library.save()
            self.unshared = True

    def _share_options(self) -> None:
        """Copy the first learner's library, and its actor's outputs of the slots, to the other learners.

        All learners call this at the same points of a step, so their weights are equal afterwards.
        """
        if distributed.world_size() == 1 or self.library is None or not distributed.any_rank(self.unshared):
            return
        self.unshared = False
        state = distributed.broadcast_object(self.library.state_dict() if distributed.is_main() else None)
        if not distributed.is_main():
            self.library.load_state_dict(state)
            self.policy.set_options(self.library)
        distributed.broadcast(list(self.policy.options.out.state_dict().values()))

    # --- Logs and checkpoints --------------------------------------------------------------------------

    def _log_decisions(self, obs: Arrays, state: Mapping[str, torch.Tensor], step: int) -> None:
        lines = []
        for env, view in enumerate(self.agent.explain(state)):
            view = {key: _rounded(value) for key, value in view.items()}
            view["action"] = self.captioner.actions[view["action"]]
            lines.append(json.dumps({"step": step, "env": env, "caption": self._caption(obs, env), **view}))
        try:
            with open(self.logdir / DECISIONS, "a", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
        except OSError as error:
            raise write_error(self.logdir / DECISIONS, error) from error

    def _caption(self, obs: Arrays, env: int) -> str | None:
        try:
            return str(self.captioner.caption({key: value[env] for key, value in obs.items()}))
        except Exception:  # of a user's captioner: the service reports it
            return None

    def _count(self, name: str, value: float) -> None:
        self.counts.setdefault(name, []).append(value)

    def metrics(self) -> dict[str, float]:
        counts, self.counts = self.counts, {}
        found = {name: float(np.mean(values)) for name, values in counts.items()}
        found["llm_adapter/late"] = float(len(counts.get("late", [])))
        found.pop("late", None)
        if self.config.synthetic.enabled:
            found["synthetic/items"] = float(len(self.synthetic.items))
            found["synthetic/reliability"] = float(self.reliability.value)
        if self.keeps_library:
            found |= self.library.metrics()
        found |= self.service.metrics()
        counts: Counter[str] = Counter()  # of all learners
        for one in distributed.all_gather_object({k: v for k, v in found.items() if is_count(k)}):
            counts.update(one)
        return found | counts

    def notes(self) -> list[str]:
        lines, self._notes = [*self._notes, *self.service.notes()], []
        return lines

    def state_dict(self) -> dict[str, Any]:
        if self.keeps_library:
            self.library.save()  # with the statistics of this moment
        return {
            "service": self.service.state_dict(),
            "rng": self.rng.bit_generator.state,
            "synthetic": self.synthetic.state_dict(),
            "reliability": self.reliability.state_dict(),
            "proposals": [list(proposal) for proposal in self.proposals],
            "model_losses": self.model_losses,
            "library": self.library.state_dict() if self.keeps_library else {},
            "predicted": self.predicted,
            "next": [self.next_options, self.next_poll, self.next_decision],
            "counts": self.counts,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if not state:  # there was no advice
            return
        self.service.load_state_dict(state["service"])
        self.reliability.load_state_dict(state["reliability"])
        if distributed.is_main():  # the other learners draw other numbers
            self.rng.bit_generator.state = state["rng"]
            self.synthetic.load_state_dict(state["synthetic"])
        if self.replay.exact:
            self.proposals.extend(Proposal(*proposal) for proposal in state["proposals"])
            self.predicted = dict(state["predicted"])
        else:
            self.synthetic.items.clear()
        self.model_losses = list(state["model_losses"])
        self.next_options, self.next_poll, self.next_decision = state["next"]
        self.counts = {name: list(values) for name, values in state["counts"].items()}
        if self.keeps_library:  # the others receive it before the first step
            self.library.load_state_dict(state["library"])
            self.policy.set_options(self.library)
        if distributed.is_main():
            self._forget_decisions()

    def _forget_decisions(self) -> None:
        """Drop the lines of steps after the checkpoint, which the resumed run writes again."""
        path = self.logdir / DECISIONS
        if not path.exists():
            return
        kept, damaged = [], 0
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] < self.next_decision:
                    kept.append(line)
            except (ValueError, TypeError, KeyError):  # a kill cut it off
                damaged += 1
        if damaged:
            self._notes.append(f"{path}: {damaged} damaged lines are dropped")
        atomic_write(path, lambda file: file.write("".join(f"{line}\n" for line in kept).encode()))


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [round(each, 4) for each in value]
    return round(value, 4) if isinstance(value, float) else value
