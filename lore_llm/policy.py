"""The agent's side of advice: turns the actor's logits into the policy that trains and acts.

`AdvisedPolicy` joins the three paths: the policy prior (prior.py), plans whose states become starts of
imagination (synthetic.py), and options that the actor may choose (option_actor.py). It calls no adviser:
advice arrives with the replayed steps, as synthetic items and as options.
Letters: n envs, B batch, T time, N rows, H horizon, A actions, O option slots, C = O + A, F feat, M items,
L steps of a plan or an option at most.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import distributions as dists
import networks
from basics import UserError
from lore_llm import synthetic
from lore_llm.advice import MAX_PLAN
from lore_llm.captions import Captioner
from lore_llm.option_actor import NOTHING, PLAN, Execution, OptionActor, primitives
from lore_llm.options import OptionLibrary
from lore_llm.prior import Prior
from models import (
    Data,
    ImagBehavior,
    Imagined,
    Losses,
    Metrics,
    PlainPolicy,
    Starts,
    View,
    WorldModel,
    lambda_return,
)
from networks import Policy, State

DISAGREEMENT_SHARE = 0.95  # the percentile that counts as the largest disagreement
DISAGREEMENT_RATE = 0.01  # how fast its running value moves

Arrays = dict[str, np.ndarray]


class AdvisedView(NamedTuple):
    """The actor in feat [..., F], without and with the prior. Numbers are float32."""

    policy: Policy  # over the choices, with the prior's logits added
    plain: Policy  # without them
    beta: Tensor  # [...] weight of the prior
    uncertainty: Tensor  # [...] 0 to 1
    parts: dict[str, Tensor]  # [...] entropy, value_std and, with an ensemble, disagreement, 0 to 1
    prior: Tensor  # [..., A] the prior's logits, 0 without a prior


class ActingPolicy(PlainPolicy, nn.Module):
    """The policy of an agent without advice: the actor alone, in imagination and in the envs."""

    def param_groups(self, actor_lr: float | None, model_lr: float | None) -> list[dict[str, Any]]:
        """Its parameters for the optimiser, with their learning rates."""
        return []

    def learn(
        self, world_model: WorldModel, behavior: ImagBehavior, post: State, data: Data
    ) -> tuple[Losses, Metrics]:
        """Losses (scalars) of its networks from replayed steps: post and data [B, T, ...]."""
        return {}, {}

    def initial(self, obs_space: Mapping[str, Any], envs: int) -> State:
        """Its part of the acting state before the first step, [envs, ...]."""
        return {}

    def act(
        self, behavior: ImagBehavior, actor: networks.Actor, feat: Tensor, noise: networks.PolicyNoise,
        obs: Mapping[str, np.ndarray], state: State, plans: Mapping[int, Sequence[int]], advised: bool,
    ) -> tuple[Tensor, State, Arrays]:  # fmt: skip
        """Act in the envs as `actor` chooses in feat [n, F].

        With `advised` the task's actor acts with the prior. `plans` (env: actions) start now where nothing
        else is running. Returns actions [n, A], its part of the next acting state, and what is stored with
        the step.
        """
        return actor(feat).sample(noise), {}, {}

    def explain(
        self, behavior: ImagBehavior, feat: Tensor, state: State, advised: bool
    ) -> list[dict[str, Any]]:
        """Explain the decision of each env in feat [n, F] of an acting state.

        The actor's and the prior's (or None) probabilities of the primitive actions [A], those of the policy
        that was sampled from (`mix`), the prior's weight `beta`, and the running `option` or None.
        """
        probs = self.view(behavior, feat).policy.parts[0].probs.tolist()
        return [{"actor": p, "adviser": None, "mix": p, "beta": 0.0, "option": None} for p in probs]

    @property
    def has_weight(self) -> bool:
        """Whether there is a prior whose weight is not 0."""
        return False

    def option_names(self) -> list[list[str | None]]:
        """Name and subgoal of the option in each slot."""
        return []

    def set_option_names(self, names: Sequence[Sequence[str | None]]) -> None:
        """Restore what `option_names` returned."""


class AdvisedPolicy(ActingPolicy):
    """Uses advice along the paths that the config enables. `disagreement(feat, action)` is an ensemble's."""

    averages = ("largest",)  # buffers that are averaged over all learners

    def __init__(
        self, world_model: WorldModel, captioner: Captioner, config: Mapping,
        disagreement: Callable[[Tensor, Tensor], Tensor] | None, generators: Mapping[str, torch.Generator],
    ):  # fmt: skip
        super().__init__()
        self.config, self.captioner, self.rngs = config, captioner, generators
        self.ensemble = disagreement
        feat, self.actions = world_model.rssm.feat_size, world_model.actions.size
        self.prior = Prior(feat, self.actions, config) if config.prior.enabled else None
        self.options = OptionActor(feat, self.actions, config) if config.options.enabled else None
        self.subgoals: list[str | None] = [None] * config.options.max_options  # of the options, by slot
        self.names: list[str | None] = list(self.subgoals)
        self.executes = self.options is not None or config.synthetic.enabled
        self.disc = world_model.disc
        self.register_buffer("largest", torch.zeros(()))  # running percentile of the disagreement

    def param_groups(self, actor_lr: float | None, model_lr: float | None) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = []
        if self.options:
            groups.append({"params": list(self.options.out.parameters()), "lr": actor_lr})
            ends = [*self.options.end_mlp.parameters(), *self.options.end_out.parameters()]
            groups.append({"params": ends, "lr": model_lr})
        if self.prior:
            groups.append({"params": list(self.prior.parameters()), "lr": model_lr})
        return [{k: v for k, v in group.items() if v is not None} for group in groups]

    # --- The policy ------------------------------------------------------------------------------------

    def view(self, behavior: ImagBehavior, feat: Tensor, advised: bool = True) -> View | AdvisedView:
        if self.prior and advised:
            return self.advised_view(behavior, feat)
        return View(self._policy(behavior, *behavior.actor.logits(feat)))

    def advised_view(self, behavior: ImagBehavior, feat: Tensor, advised: bool = True) -> AdvisedView:
        """The actor in feat [..., F] with its uncertainty; the prior has no weight unless `advised`."""
        hidden, logits = behavior.actor.logits(feat)
        plain = self._policy(behavior, hidden, logits)
        with torch.no_grad():
            # A second distribution: `plain` would cache probabilities without gradients.
            detached = self._policy(behavior, hidden, logits)
            uncertainty, parts = self.uncertainty(behavior, feat, detached)
            prior = self.prior(feat) if self.prior else torch.zeros_like(logits)
            advised = advised and self.prior is not None
            beta = self.prior.beta(uncertainty) if advised else torch.zeros_like(uncertainty)
        mix = self._policy(behavior, hidden, logits + beta[..., None] * prior) if advised else plain
        return AdvisedView(mix, plain, beta, uncertainty, parts, prior)

    def _policy(self, behavior: ImagBehavior, hidden: Tensor, logits: Tensor) -> Policy:
        if self.options:
            return Policy([self.options.distribution(hidden, logits)], [self.options.slots + self.actions])
        return Policy([dists.OneHot(logits, behavior.actor.unimix)], [self.actions])

    def uncertainty(
        self, behavior: ImagBehavior, feat: Tensor, policy: Policy
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean [...] of its parts, each from 0 to 1, and these."""
        dist = policy.parts[0]
        choices = (dist.probs > 0).sum(-1)
        parts = {"entropy": dist.entropy() / choices.float().log().clamp(min=math.log(2))}
        parts["value_std"] = (behavior.critic(feat).spread / behavior.retnorm.scale).clamp(max=1)
        if self.ensemble:
            spread = self.ensemble(feat, primitives(policy, self.actions))
            parts["disagreement"] = (spread / self.largest.clamp(min=1e-8)).clamp(max=1)
        return sum(parts.values()) / len(parts), parts

    # --- Learning --------------------------------------------------------------------------------------

    def starts(self, behavior: ImagBehavior, world_model: WorldModel, start: State, items: Data) -> Starts:
        if not items:
            return Starts(start)
        rows, extra = len(start["deter"]), synthetic.rows(self.config)
        rollout = synthetic.roll_out(behavior, world_model, items, self.rngs["synthetic"])
        weight = rollout.weight.flatten()[:extra]
        states = {
            key: torch.cat([value, rollout.states[key].flatten(0, 1)[:extra]]) for key, value in start.items()
        }
        weight = torch.cat([weight.new_ones(rows), weight])
        weight = (weight * len(weight) / weight.sum())[:, None]  # the mean of losses is a weighted mean
        return Starts(states, weight, rollout)

    def imagine(
        self, behavior: ImagBehavior, rssm: networks.RSSM, start: State,
        generator: torch.Generator | None, advised: bool = True,
    ) -> Imagined:  # fmt: skip
        if self.options is None:
            return super().imagine(behavior, rssm, start, generator, advised)

        def policy(feat: Tensor) -> Policy:
            return self.view(behavior, feat, advised).policy

        # Options do not change the other draws of training, and `explain` draws nothing that training uses.
        ends = self.rngs["options"] if generator is self.rngs["train"] else generator
        return self.options.imagine(policy, behavior, rssm, start, generator, ends)

    def decided(self, data: Data) -> tuple[float | Tensor, float | Tensor]:
        if self.options is None:
            return 1.0, 1.0
        decided = data["decision"].float()
        return decided[:, :-1], decided[:, 1:]

    def loss(
        self, behavior: ImagBehavior, dream: Imagined, view: View | AdvisedView, starts: Starts,
        weight: float | Tensor,
    ) -> tuple[Losses, Metrics]:  # fmt: skip
        losses, metrics = {}, {}
        if self.prior:
            losses["advice_kl"], metrics = self._kl_loss(view, weight)
        if starts.rollout:
            bc, more = self._cloning_loss(behavior, starts.rollout, len(dream.feat))
            losses["advice_bc"] = self.config.synthetic.lambda_bc * bc
            metrics |= more
        if self.options:
            chosen = dream.choice[..., : self.options.slots].sum(-1)
            metrics["options/imagined_share"] = (chosen * dream.decided).sum() / dream.decided.sum()
        return losses, metrics

    def _kl_loss(self, view: AdvisedView, weight: float | Tensor) -> tuple[Tensor, Metrics]:
        """The loss [N, H] that pulls the actor towards the advised policy; adapts the prior's weight."""
        kl = view.policy.parts[0].detach().kl(view.plain.parts[0])  # [N, H]
        share = torch.ones_like(kl) * weight  # a number from the host would wait for the GPU
        mean = (kl.detach() * share).sum() / share.sum().clamp(min=1)
        self.prior.limit(mean)
        kl = torch.where(view.beta > 0, kl, 0.0)  # no rounding errors where the prior has no weight
        # Scaled by the entropy bonus: that is of the advised policy, and without this term it would teach the
        # actor to cancel the prior as long as there is nothing else to learn.
        pull = self.config.prior.lambda_kl * self.config.actor.entropy
        gate = {"beta": view.beta, **view.parts}
        metrics = {f"uncertainty_gate/{name}": value.mean() for name, value in gate.items()}
        metrics["uncertainty_gate/avg_kl"] = mean
        metrics["uncertainty_gate/dual"] = self.prior.dual.clone()
        metrics["uncertainty_gate/reliability"] = self.prior.trust
        return pull * kl * weight, metrics

    def _cloning_loss(
        self, behavior: ImagBehavior, rollout: synthetic.Rollout, starts: int
    ) -> tuple[Tensor, Metrics]:
        """Behaviour cloning of the plans that raise the return, a scalar; `starts` of imagination in all."""
        log_prob = self.view(behavior, rollout.feat[:, :-1], advised=False).policy.parts[0].log_probs
        log_prob = (log_prob[..., -self.actions :] * rollout.action).sum(-1)  # [M, L]
        steps = rollout.valid.sum().clamp(min=1)
        bc = -(rollout.clone_weight * log_prob).sum() / steps
        used = (rollout.weight > 0).flatten()[: synthetic.rows(self.config)].sum()
        starts = starts - synthetic.rows(self.config) + used
        metrics = {"synthetic/bc_loss": bc, "synthetic/ratio": used / starts}
        return bc, metrics | {"synthetic/advantage": rollout.advantage.sum() / steps}

    def learn(
        self, world_model: WorldModel, behavior: ImagBehavior, post: State, data: Data
    ) -> tuple[Losses, Metrics]:
        losses, metrics = {}, {}
        feat = world_model.rssm.feat(post)  # [B, T, F]
        if self.prior:
            mask = data["llm_mask"]
            # Not detached: the latents have to represent what the advice depends on.
            loss, agreement = self.prior.distill(feat, data["llm_logits"], mask)
            losses["advice_distill"] = self.config.prior.lambda_distill * loss
            metrics["uncertainty_gate/agreement"] = agreement
            metrics["uncertainty_gate/advised_share"] = mask.float().mean()
        feat = feat.detach()
        if self.options:
            losses["option_end"] = self.options.end_loss(feat, data)
        with torch.no_grad():
            if self.prior or self.ensemble:
                plain = self.view(behavior, feat, advised=False).policy
            if self.prior:
                self._update_reliability(world_model, behavior, feat, plain, data)
            if self.ensemble:
                spread = self.ensemble(feat, primitives(plain, self.actions)).float()
                high = torch.quantile(spread.flatten(), DISAGREEMENT_SHARE)
                rate = torch.where(self.largest > 0, DISAGREEMENT_RATE, 1.0)
                self.largest.copy_(torch.where(high.isfinite(), self.largest.lerp(high, rate), self.largest))
        return losses, metrics

    def _update_reliability(
        self, world_model: WorldModel, behavior: ImagBehavior, feat: Tensor, plain: Policy, data: Data
    ) -> None:
        """Measure along real steps what following the advice has gained."""
        value = behavior.critic(feat).mean  # [B, T]
        decided, decides_next = self.decided(data)
        lam = behavior.trace_decay(decides_next)
        ret = lambda_return(data["is_last"], data["is_terminal"], data["reward"], value, self.disc, lam)
        advantage = (ret - value[:, :-1]) / behavior.retnorm.scale
        action = world_model.actions.encode(data)[:, :-1]
        mask = (data["llm_mask"] & ~data["is_last"])[:, :-1]
        if self.options:
            mask = mask & data["decision"][:, :-1]  # elsewhere the actor did not choose
        coming = (data["reward"] != 0).float()
        last, term, nothing = data["is_last"], data["is_terminal"], torch.zeros_like(coming)
        rewarded = lambda_return(last, term, coming, nothing, 1.0, 1.0) > 0  # [B, T-1] later in the window
        probs = primitives(plain, self.actions)[:, :-1]
        self.prior.follow(data["llm_logits"][:, :-1], probs, action, advantage, mask, rewarded)

    # --- Acting ----------------------------------------------------------------------------------------

    def initial(self, obs_space: Mapping[str, Any], envs: int) -> State:
        state = {"uncertainty": torch.zeros(envs)}
        if self.executes:
            longest = max(MAX_PLAN, self.config.options.option_max_length)
            state |= Execution.initial(envs, longest, obs_space.get("symbolic"))
        return state

    def act(
        self, behavior: ImagBehavior, actor: networks.Actor, feat: Tensor, noise: networks.PolicyNoise,
        obs: Mapping[str, np.ndarray], state: State, plans: Mapping[int, Sequence[int]], advised: bool,
    ) -> tuple[Tensor, State, Arrays]:  # fmt: skip
        uncertainty = torch.zeros(len(feat))
        if actor is not behavior.actor:
            policy = actor(feat)
        elif advised:
            view = self.advised_view(behavior, feat)
            policy, uncertainty = view.policy, view.uncertainty.float().cpu()
        else:
            policy = self.view(behavior, feat, advised=False).policy
        choice = policy.sample(noise)
        if not self.executes:
            return choice, {"uncertainty": uncertainty}, {}
        action, running, stored = self.execute(behavior, feat, choice, obs, state, plans)
        return action, {"uncertainty": uncertainty, **running}, stored

    def execute(
        self, behavior: ImagBehavior, feat: Tensor, choice: Tensor, obs: Mapping[str, np.ndarray],
        state: State, plans: Mapping[int, Sequence[int]],
    ) -> tuple[Tensor, State, Arrays]:  # fmt: skip
        """A running option acts, else a plan, else the actor with its `choice` [n, C]. Returns as `act`."""
        value, scale = behavior.critic(feat).mean.float().cpu(), float(behavior.retnorm.scale)
        chosen, last = choice.argmax(-1).cpu(), torch.from_numpy(obs["is_last"])
        execution = Execution(state)
        reward = torch.from_numpy(obs["reward"]) * self.config.reward_scale
        running = execution.step(reward, self.disc, torch.from_numpy(obs["is_first"]))
        for env in torch.nonzero(running).flatten().tolist():
            reached, blocked = self.ended(env, execution, obs)
            if reached or blocked or last[env] or execution.timed_out(env):
                running[env] = False
                slot = self._slot(execution.uid[env])
                success = reached if slot is not None and self.subgoals[slot] else None
                execution.outcome(env, value, scale, bool(obs["is_terminal"][env]), success)
        execution.uid[~running] = NOTHING
        for env in torch.nonzero(~running & ~last).flatten().tolist():  # at the end no action has an effect
            slot = int(chosen[env])
            if env in plans:
                execution.start(env, PLAN, torch.tensor(list(plans[env])[:MAX_PLAN]), value, obs)
            elif self.options and slot < self.options.slots:
                script = self.options.script[slot, : int(self.options.timeouts[slot])].cpu()
                execution.start(env, int(self.options.uids[slot]), script, value, obs)
        slots = self.options.slots if self.options else 0
        # Where an option was chosen at an episode's end, any action will do.
        index = execution.action((chosen - slots).clamp(min=0), obs)
        action = torch.nn.functional.one_hot(index, self.actions).to(choice)
        stored: Arrays = {}
        if self.options:
            stored["decision"] = (~running | (execution.uid == PLAN)).numpy()
            stored["option"] = execution.uid.clamp(min=0).to(torch.int32).numpy()
        return action, execution.state, stored

    def _slot(self, uid: Tensor | int) -> int | None:
        """The slot of an option; None for a plan and an option that was removed meanwhile."""
        if int(uid) == PLAN:
            return None
        slots = torch.nonzero(self.options.uids == int(uid)).flatten().tolist()
        return slots[0] if slots else None

    def ended(self, env: int, execution: Execution, obs: Mapping[str, np.ndarray]) -> tuple[bool, bool]:
        """Whether an option has reached its subgoal, and whether its last action was blocked."""
        before = execution.observed(env)
        if execution.uid[env] == PLAN or before is None:
            return False, False
        now = {key: value[env] for key, value in obs.items()}
        slot = self._slot(execution.uid[env])
        subgoal = None if slot is None else self.subgoals[slot]
        try:
            reached = subgoal is not None and self.captioner.reached(subgoal, before.start, now)
            return bool(reached), bool(self.captioner.blocked(before.last, now, before.action))
        except Exception as error:  # of a user's captioner
            raise UserError(
                f"{type(self.captioner).__name__}.reached or .blocked (--llm.captioner) failed: "
                f"{type(error).__name__}: {error}"
            ) from error

    def explain(
        self, behavior: ImagBehavior, feat: Tensor, state: State, advised: bool
    ) -> list[dict[str, Any]]:
        view = self.advised_view(behavior, feat, advised)
        actor, mix = (primitives(policy, self.actions).tolist() for policy in (view.plain, view.policy))
        prior = torch.softmax(view.prior, -1).tolist() if self.prior else [None] * len(feat)
        return [
            {
                "actor": actor[env],
                "adviser": prior[env],
                "mix": mix[env],
                "beta": float(view.beta[env]),
                "option": self._running(state, env),
                "uncertainty": float(view.uncertainty[env]),
            }
            for env in range(len(feat))
        ]

    def _running(self, state: State, env: int) -> str | None:
        """The name of the option or plan that runs in an env."""
        uid = int(state["uid"][env]) if self.executes else NOTHING
        if uid in (PLAN, NOTHING):
            return "plan" if uid == PLAN else None
        slot = self._slot(uid)
        return (None if slot is None else self.names[slot]) or f"skill {uid}"

    # --- Set from outside ------------------------------------------------------------------------------

    @property
    def has_weight(self) -> bool:
        return self.prior is not None and bool(self.prior.share > 0)

    def set_prior_share(self, share: float) -> None:
        """How much of `beta_max` is left for the prior, from 1 to 0."""
        if self.prior:
            self.prior.share.fill_(share)

    def option_names(self) -> list[list[str | None]]:
        return [list(pair) for pair in zip(self.names, self.subgoals, strict=True)] if self.options else []

    def set_option_names(self, names: Sequence[Sequence[str | None]]) -> None:
        if self.options:
            self.names, self.subgoals = (list(column) for column in zip(*names, strict=True))

    def set_options(self, library: OptionLibrary, fresh: Sequence[int] = ()) -> None:
        """Take over the library's options; the actor's outputs of the `fresh` slots are initialised again."""
        self.options.set_table(library.table())
        self.subgoals = [option and option.spec.subgoal for option in library.slots]
        self.names = [option and option.spec.name for option in library.slots]
        for slot in fresh:
            self.options.reset_slot(slot, self.rngs["options"])
