"""The agent's side of advice: turns the actor's logits into the policy that trains and acts.

`AdvisedPolicy` joins the three paths: the policy prior (prior.py), plans whose states become starts of
imagination (synthetic.py), and options that the actor may choose (option_actor.py). It knows no adviser:
advice reaches it with the replayed steps, as items and as options.
Letters: n envs, B batch, T time, N rows, H horizon, A actions, O option slots, C = O + A, F feat, M items,
L steps of a plan or an option at most.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import distributions as dists
import networks
from basics import UserError
from lore_llm import synthetic
from lore_llm.advice import MAX_PLAN
from lore_llm.captions import Captioner
from lore_llm.option_actor import OptionActor, primitives
from lore_llm.options import SkillLibrary
from lore_llm.prior import Prior
from models import Data, ImagBehavior, Imagined, Losses, Metrics, PlainPolicy, WorldModel, lambda_return
from networks import Policy, State

PLAN = -1  # what runs in an env: the uid of an option, PLAN, or NOTHING
NOTHING = 0
DISAGREEMENT_SHARE = 0.95  # the percentile that counts as the largest disagreement
DISAGREEMENT_RATE = 0.01  # how fast its running value moves

Arrays = dict[str, np.ndarray]


class Seen(NamedTuple):
    """What the actor says in feat [..., F], and what became of it. Numbers are float32."""

    policy: Policy  # over the choices, through the prior
    plain: Policy  # without it
    beta: Tensor  # [...] weight of the prior
    uncertainty: Tensor  # [...] 0 to 1
    parts: dict[str, Tensor]  # [...] entropy, value_std and, with an ensemble, disagreement, 0 to 1
    prior: Tensor  # [..., A] its logits, 0 without a prior


class Outcome(NamedTuple):
    """An execution in the env that ended: of the option `uid`, or of a PLAN."""

    env: int
    uid: int
    gain: float  # return minus what the critic expected, in units of the scale of returns
    error: float  # predicted minus real return, in the same units; of plans only
    success: bool
    length: int


class AdvisedPolicy(PlainPolicy):
    """Heeds advice along the paths that the config enables. `disagreement(feat, action)` is an ensemble's."""

    averages = ("largest",)  # buffers that are means over all learners

    def __init__(
        self,
        world_model: WorldModel,
        captioner: Captioner,
        config: Mapping,
        disagreement: Callable[[Tensor, Tensor], Tensor] | None,
        generators: Mapping[str, torch.Generator],
    ):
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
        self.items: dict[str, Tensor] = {}  # synthetic ones of this update
        self.rollout: synthetic.Rollout | None = None
        self.outcomes: list[Outcome] = []  # of training, until somebody takes them
        self.last_seen: Seen | None = None
        self.doubt: np.ndarray | None = None  # [n] uncertainty at the last step of training

    def param_groups(self, actor_lr: float | None, model_lr: float | None) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = []
        if self.options:
            groups.append({"params": list(self.options.out.parameters()), "lr": actor_lr})
            ends = [*self.options.end_mlp.parameters(), *self.options.end_out.parameters()]
            groups.append({"params": ends, "lr": model_lr})
        if self.prior:
            groups.append({"params": list(self.prior.parameters()), "lr": model_lr})
        return [{k: v for k, v in group.items() if v is not None} for group in groups]

    # --- What the actor says ---------------------------------------------------------------------------

    def seen(self, behavior: ImagBehavior, feat: Tensor, advised: bool = True) -> Seen:
        """The actor in feat [..., F], through the prior if `advised`."""
        hidden = behavior.actor.mlp(feat)
        logits = behavior.actor.outs[0](hidden).float()  # [..., A]
        plain = self._policy(behavior, hidden, logits)
        with torch.no_grad():
            # Not of `plain` itself: what a distribution has computed once it keeps, here without gradient.
            judged = self._policy(behavior, hidden, logits)
            uncertainty, parts = self.uncertainty(behavior, feat, judged)
            if self.prior is None:
                return Seen(plain, plain, torch.zeros_like(uncertainty), uncertainty, parts, logits * 0)
            prior, beta = self.prior(feat), self.prior.beta(uncertainty)
        if not advised:
            return Seen(plain, plain, torch.zeros_like(beta), uncertainty, parts, prior)
        mix = self._policy(behavior, hidden, logits + beta[..., None] * prior)
        return Seen(mix, plain, beta, uncertainty, parts, prior)

    def _policy(self, behavior: ImagBehavior, hidden: Tensor, logits: Tensor) -> Policy:
        if self.options:
            return Policy([self.options.distribution(hidden, logits)], [self.options.slots + self.actions])
        return Policy([dists.OneHot(logits, behavior.actor.unimix)], [self.actions])

    def distribution(self, behavior: ImagBehavior, feat: Tensor, advised: bool = True) -> Policy:
        if not (self.prior and advised):  # nobody asks for its uncertainty
            hidden = behavior.actor.mlp(feat)
            return self._policy(behavior, hidden, behavior.actor.outs[0](hidden).float())
        self.last_seen = self.seen(behavior, feat)
        return self.last_seen.policy

    def plain_actions(self, behavior: ImagBehavior, feat: Tensor) -> dists.OneHot:
        """The actor's distribution over primitive actions alone, without prior and options."""
        return dists.OneHot(behavior.actor.outs[0](behavior.actor.mlp(feat)), behavior.actor.unimix)

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

    def starts(
        self, behavior: ImagBehavior, world_model: WorldModel, start: State
    ) -> tuple[State, float | Tensor]:
        if not self.items:
            return start, 1.0
        rows, extra = len(start["deter"]), synthetic.rows(self.config)
        with torch.no_grad():
            rollout = synthetic.roll_out(behavior, world_model, self.items, self.rngs["synthetic"])
        self.rollout = rollout
        weight = rollout.weight.flatten()[:extra]
        starts = {
            key: torch.cat([value, rollout.states[key].flatten(0, 1)[:extra]]) for key, value in start.items()
        }
        weight = torch.cat([weight.new_ones(rows), weight])
        return starts, (weight * len(weight) / weight.sum())[:, None]  # so that a mean is the weighted one

    def imagine(
        self,
        behavior: ImagBehavior,
        rssm: networks.RSSM,
        start: State,
        generator: torch.Generator | None,
        advised: bool = True,
    ) -> Imagined:
        if self.options is None:
            return super().imagine(behavior, rssm, start, generator, advised)

        def policy(feat: Tensor) -> Policy:
            return self.distribution(behavior, feat, advised)

        # Training's other draws stay as they are without options, and views disturb no training.
        ends = self.rngs["options"] if generator is self.rngs["train"] else generator
        return self.options.imagine(policy, behavior, rssm, start, generator, ends)

    def replayed(self, data: Data) -> tuple[float | Tensor, float | Tensor]:
        if self.options is None:
            return 1.0, 1.0
        decided = data["decision"].float()
        return decided[:, :-1], decided[:, 1:]

    def loss(
        self, behavior: ImagBehavior, dream: Imagined, policy: Policy, weight: float | Tensor
    ) -> tuple[Losses, Metrics]:
        losses, metrics = {}, {}
        if self.prior:
            seen = self.last_seen  # of which `policy` is the mix
            kl = seen.policy.parts[0].detach().kl(seen.plain.parts[0])  # [N, H]
            share = torch.ones_like(kl) * weight  # a number from the host would wait for the GPU
            mean = (kl.detach() * share).sum() / share.sum().clamp(min=1)
            self.prior.limit(mean)
            kl = torch.where(seen.beta > 0, kl, 0.0)  # without rounding errors where nobody advises
            # In units of the entropy bonus: that is on the mix, and alone it would teach the actor to undo
            # the prior as long as there is nothing else to learn.
            pull = self.config.prior.lambda_kl * self.config.actor.entropy
            losses["advice_kl"] = pull * kl * weight
            gate = {"beta": seen.beta, **seen.parts}
            metrics |= {f"uncertainty_gate/{name}": value.mean() for name, value in gate.items()}
            metrics["uncertainty_gate/avg_kl"] = mean
            metrics["uncertainty_gate/dual"] = self.prior.dual.clone()
            metrics["uncertainty_gate/reliability"] = self.prior.trust
        if self.rollout:
            cloned = self.rollout
            log_prob = self.distribution(behavior, cloned.feat[:, :-1], advised=False).parts[0].log_probs
            log_prob = (log_prob[..., -self.actions :] * cloned.action).sum(-1)  # [M, L]
            bc = -(cloned.clone_weight * log_prob).sum() / cloned.valid.sum().clamp(min=1)
            losses["advice_bc"] = self.config.synthetic.lambda_bc * bc
            used = (cloned.weight > 0).flatten()[: synthetic.rows(self.config)].sum()
            starts = len(dream.feat) - synthetic.rows(self.config) + used
            metrics |= {"synthetic/bc_loss": bc, "synthetic/ratio": used / starts}
            metrics["synthetic/advantage"] = cloned.advantage.sum() / cloned.valid.sum().clamp(min=1)
            self.rollout = None
        if self.options:
            chosen = dream.choice[..., : self.options.slots].sum(-1)
            metrics["options/imagined_share"] = (chosen * dream.decided).sum() / dream.decided.sum()
        return losses, metrics

    def learn(
        self, world_model: WorldModel, behavior: ImagBehavior, post: State, data: Data
    ) -> tuple[Losses, Metrics]:
        """Losses of its own nets from real steps: post and data [B, T, ...]."""
        losses, metrics = {}, {}
        feat = world_model.rssm.feat(post)  # [B, T, F]
        if self.prior:
            mask = data["llm_mask"]
            # Not detached: what the advice depends on, the latents have to tell.
            loss, agreement = self.prior.distill(feat, data["llm_logits"], mask)
            losses["advice_distill"] = self.config.prior.lambda_distill * loss
            metrics["uncertainty_gate/agreement"] = agreement
            metrics["uncertainty_gate/advised_share"] = mask.float().mean()
        feat = feat.detach()
        if self.options:
            losses["option_end"] = self.options.end_loss(feat, data)
        with torch.no_grad():
            if self.prior or self.ensemble:
                plain = self.distribution(behavior, feat, advised=False)
            if self.prior:
                self._judge(world_model, behavior, feat, plain, data)
            if self.ensemble:
                spread = self.ensemble(feat, primitives(plain, self.actions)).float()
                high = torch.quantile(spread.flatten(), DISAGREEMENT_SHARE)
                rate = torch.where(self.largest > 0, DISAGREEMENT_RATE, 1.0)
                self.largest.copy_(torch.where(high.isfinite(), self.largest.lerp(high, rate), self.largest))
        return losses, metrics

    def _judge(self, world_model, behavior, feat, plain, data) -> None:
        """Measure what following the advice has brought along real steps."""
        value = behavior.critic(feat).mean  # [B, T]
        decided, decides_next = self.replayed(data)
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

    def act(self, behavior: ImagBehavior, feat: Tensor, advised: bool, training: bool) -> Policy:
        if not (advised or training):  # nobody asks for its uncertainty
            return self.distribution(behavior, feat, advised=False)
        seen = self.seen(behavior, feat, advised)
        if training:
            self.doubt = seen.uncertainty.float().cpu().numpy()
        return seen.policy

    def initial(self, obs_space: Mapping[str, Any], envs: int) -> dict[str, Tensor]:
        if not self.executes:
            return {}
        longest = max(MAX_PLAN, self.config.options.option_max_length)
        state = {name: torch.zeros(envs, dtype=torch.int64) for name in ("macro", "position", "steps")}
        state["script"] = torch.zeros(envs, longest, dtype=torch.int64)
        numbers = ("macro_return", "macro_discount", "macro_value", "macro_predicted")
        state |= {name: torch.zeros(envs) for name in numbers}
        if "symbolic" in obs_space:
            space = obs_space["symbolic"]
            blank = torch.from_numpy(np.zeros((envs, *space.shape), space.dtype))
            state |= {"macro_began": blank, "macro_before": blank.clone()}
        return state

    def execute(
        self,
        behavior: ImagBehavior,
        feat: Tensor,
        choice: Tensor,
        obs: Arrays,
        state: Mapping[str, Tensor],
        plans: Mapping[int, Sequence[int]],
        training: bool,
    ) -> tuple[Tensor, dict[str, Tensor], Arrays]:
        """Who acts: a running option, else a plan, else the actor, who chose `choice` [n, C] in feat [n, F].

        A plan of `plans` (env: actions) begins now. What ended is noted in `outcomes` if this is training.
        """
        if not self.executes:
            return choice, {}, {}
        value, scale = behavior.critic(feat).mean, float(behavior.retnorm.scale)
        own = {k: v.cpu().clone() for k, v in state.items() if k in self._names(state)}
        value, chosen = value.float().cpu(), choice.argmax(-1).cpu()
        first, last = torch.from_numpy(obs["is_first"]), torch.from_numpy(obs["is_last"])
        running = (own["macro"] != NOTHING) & ~first  # where a worker was restarted, nothing goes on
        reward = torch.from_numpy(obs["reward"]) * self.config.reward_scale
        own["macro_return"] += torch.where(running, own["macro_discount"] * reward, 0.0)
        own["macro_discount"] *= self.disc
        own["position"] += 1
        for env in torch.nonzero(running).flatten().tolist():
            reached, blocked = self._ended(env, own, obs)
            if not (reached or blocked or last[env] or own["position"][env] >= own["steps"][env]):
                continue
            running[env] = False
            if training:
                self._record(env, own, value, scale, obs, reached)
        slots = self.options.slots if self.options else 0
        decision = ~running
        for env in torch.nonzero(decision).flatten().tolist():
            own["macro"][env] = NOTHING
            if last[env]:  # the action here does nothing
                continue
            slot = int(chosen[env])
            if env in plans:
                script, own["macro"][env] = torch.tensor(list(plans[env])[:MAX_PLAN]), PLAN
            elif slot < slots:
                length = int(self.options.timeouts[slot])
                script, own["macro"][env] = self.options.script[slot, :length].cpu(), self.options.uids[slot]
            else:
                continue
            own["script"][env, : len(script)] = script
            own["steps"][env], own["position"][env] = len(script), 0
            own["macro_return"][env], own["macro_discount"][env] = 0, 1
            own["macro_value"][env], own["macro_predicted"][env] = value[env], torch.nan
            if "macro_began" in own:
                own["macro_began"][env] = torch.from_numpy(obs["symbolic"][env])
        if "macro_before" in own:
            own["macro_before"] = torch.from_numpy(obs["symbolic"].copy())
        acts = own["macro"] != NOTHING
        scripted = own["script"].gather(1, own["position"].clamp(0, own["script"].shape[1] - 1)[:, None])[
            :, 0
        ]
        # Where an option was chosen at an episode's end, any action will do.
        index = torch.where(acts, scripted, (chosen - slots).clamp(min=0))
        action = torch.nn.functional.one_hot(index, self.actions).to(choice)
        stored: Arrays = {}
        if self.options:
            stored["decision"] = (decision | (own["macro"] == PLAN)).numpy()
            stored["option"] = own["macro"].clamp(min=0).to(torch.int32).numpy()
        return action, own, stored

    def _names(self, state: Mapping[str, Tensor]) -> set[str]:
        return {k for k in state if k.startswith("macro")} | {"position", "steps", "script"}

    def _ended(self, env: int, own: Mapping[str, Tensor], obs: Arrays) -> tuple[bool, bool]:
        """Whether an option has reached its subgoal, and whether its last action was blocked."""
        uid = int(own["macro"][env])
        if uid == PLAN or "macro_began" not in own:
            return False, False
        now = {key: value[env] for key, value in obs.items()}
        began, before = ({"symbolic": own[key][env].numpy()} for key in ("macro_began", "macro_before"))
        slot = torch.nonzero(self.options.uids == uid).flatten().tolist()
        subgoal = self.subgoals[slot[0]] if slot else None
        action = int(own["script"][env, own["position"][env] - 1])
        try:
            reached = subgoal is not None and self.captioner.reached(subgoal, began, now)
            return bool(reached), bool(self.captioner.blocked(before, now, action))
        except Exception as error:  # of a user's captioner
            raise UserError(
                f"{type(self.captioner).__name__}.reached or .blocked (--llm.captioner) failed: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _record(self, env, own, value, scale, obs, reached) -> None:
        uid = int(own["macro"][env])
        rest = 0.0 if obs["is_terminal"][env] else float(own["macro_discount"][env] * value[env])
        real = float(own["macro_return"][env]) + rest
        gain = (real - float(own["macro_value"][env])) / scale
        error = (float(own["macro_predicted"][env]) - real) / scale
        slot = torch.nonzero(self.options.uids == uid).flatten().tolist() if uid != PLAN else []
        success = reached if slot and self.subgoals[slot[0]] else gain > 0
        self.outcomes.append(Outcome(env, uid, gain, error, success, int(own["position"][env])))

    def explain(
        self, behavior: ImagBehavior, feat: Tensor, state: State, advised: bool
    ) -> list[dict[str, Any]]:
        seen = self.seen(behavior, feat, advised)
        return [self._explain(seen, state, env) for env in range(len(feat))]

    def _explain(self, seen: Seen, state: State, env: int) -> dict[str, Any]:
        plain, mix = (primitives(policy, self.actions)[env].tolist() for policy in (seen.plain, seen.policy))
        prior = torch.softmax(seen.prior[env], -1).tolist() if self.prior else None
        view = {"actor": plain, "adviser": prior, "mix": mix, "beta": float(seen.beta[env]), "option": None}
        view["uncertainty"] = float(seen.uncertainty[env])
        uid = int(state["macro"][env]) if self.executes else NOTHING
        if uid == PLAN:
            view["option"] = "plan"
        elif uid != NOTHING:
            slot = torch.nonzero(self.options.uids == uid).flatten().tolist()
            view["option"] = (self.names[slot[0]] if slot else None) or f"skill {uid}"
        return view

    # --- Skills and views ------------------------------------------------------------------------------

    def skills(self) -> list[list[str | None]]:
        return [list(pair) for pair in zip(self.names, self.subgoals, strict=True)] if self.options else []

    def set_names(self, skills: Sequence[Sequence[str | None]]) -> None:
        if self.options:
            self.names, self.subgoals = (list(column) for column in zip(*skills, strict=True))

    def weighs(self) -> bool:
        return self.prior is not None and bool(self.prior.share > 0)

    def set_share(self, share: float) -> None:
        """How much of `beta_max` is left for the prior, from 1 to 0."""
        if self.prior:
            self.prior.share.fill_(share)

    def set_skills(self, library: SkillLibrary, fresh: Sequence[int] = ()) -> None:
        """Take the library's skills; the actor's outputs of the `fresh` slots begin anew."""
        self.options.set_table(library.table())
        self.subgoals = [skill and skill.spec.subgoal for skill in library.slots]
        self.names = [skill and skill.spec.name for skill in library.slots]
        for slot in fresh:
            self.options.reset_slot(slot, self.rngs["options"])
