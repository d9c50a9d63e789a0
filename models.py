"""What is learned, and from which losses: `WorldModel` and `ImagBehavior`.

Losses are pure functions of tensors; each names its source. Gradients: reconstruction, reward, cont, dyn
and rep reach encoder, RSSM and their head; the policy loss the actor only; the imagined value loss the
critic only; the replay value loss the critic, encoder and RSSM.
Letters: B batch, T time, H horizon, N = B * T imagined starts, A actions, F feat.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from types import MappingProxyType
from typing import Any, NamedTuple

import gymnasium
import torch
from torch import Tensor, nn

import audio
import distributed
import distributions as dists
import networks
from networks import Policy, State

Data = Mapping[str, Tensor]
Losses = dict[str, Tensor]
Metrics = dict[str, Tensor]
# (feat [N, H+1, F], action [N, H, A], reward [N, H+1]) -> the reward to seek, [N, H+1]
RewardSum = Callable[[Tensor, Tensor, Tensor], Tensor]


# --- Losses --------------------------------------------------------------------------------------------


def kl_losses(
    post: dists.OneHot | dists.Normal, prior: dists.OneHot | dists.Normal, free_nats: float
) -> Losses:
    """`dyn` = KL(sg(post), prior) and `rep` = KL(post, sg(prior)) (DreamerV3, eq. 5).

    Both [B, T], clipped below at `free_nats`.
    """
    return {
        "dyn": post.detach().kl(prior).clamp(min=free_nats),
        "rep": post.kl(prior.detach()).clamp(min=free_nats),
    }


def lambda_return(
    last: Tensor, term: Tensor, reward: Tensor, boot: Tensor, disc: float, lam: float | Tensor
) -> Tensor:
    """Lambda-returns [N, H] of steps 0 … H-1 from inputs [N, H+1] (DreamerV3, eq. 7).

    reward[t] and the flags arrive with state t. `boot` holds the values to bootstrap from: a share 1 - lam
    of them at each step, and all of it where `last` cuts the return. `term` (or 1 - continuation) ends it.
    `lam` is one number, or [N, H] that of the states 1 … H.
    """
    live = (1 - term.float())[:, 1:] * disc
    cont = (1 - last.float())[:, 1:] * lam
    interim = reward[:, 1:] + (1 - cont) * live * boot[:, 1:]
    decay = live * cont
    ret, rets = boot[:, -1], []
    for t in reversed(range(decay.shape[1])):
        ret = interim[:, t] + decay[:, t] * ret
        rets.append(ret)
    return torch.stack(rets[::-1], 1)  # [N, H]


def policy_loss(
    policy: Policy, action: Tensor, advantage: Tensor, weight: Tensor, entropy_scale: float,
    gradient: str = "reinforce", mix: float = 0.0,
) -> Tensor:  # fmt: skip
    """Policy loss [N, H] with entropy bonus, weighted by the probability to get there (DreamerV3, eq. 11).

    action [N, H, A], advantage and weight [N, H]. `gradient`: reinforce takes log-probability times
    advantage; dynamics the gradient of the advantage itself, through the world model; both their mixture.
    """
    objective = torch.zeros_like(weight)
    if gradient in ("reinforce", "both"):
        share = 1.0 if gradient == "reinforce" else mix
        objective = objective + share * policy.log_prob(action.detach()) * advantage.detach()
    if gradient in ("dynamics", "both"):
        share = 1.0 if gradient == "dynamics" else 1 - mix
        objective = objective + share * advantage
    return -weight * (objective + entropy_scale * policy.entropy())


def value_loss(value: dists.TwoHot, slow_value: dists.TwoHot, ret: Tensor, weight: Tensor) -> Tensor:
    """Critic loss [N, H]: towards the returns and the slow critic (DreamerV3, eq. 8)."""
    return weight * (value.loss(ret) + value.loss(slow_value.mean))


def imagination_losses(
    policy: Policy, action: Tensor, reward: Tensor, cont: Tensor, target: Tensor,
    value: dists.TwoHot, slow_value: dists.TwoHot, retnorm: "ReturnNorm",
    *, lam: float | Tensor, entropy_scale: float, gradient: str = "reinforce",
    mix: float = 0.0, weight: float | Tensor = 1.0, rows: int | None = None,
) -> tuple[Losses, Tensor, Tensor]:  # fmt: skip
    """Policy and value losses of imagined trajectories, returns and normalised advantages, all [N, H].

    policy and action [N, H, A]; reward, cont, target, value, slow_value [N, H+1]. cont holds the discount;
    target is what returns bootstrap from and advantages are measured against. `weight` (to [N, H]) multiplies
    the losses. Returns are normalised by those of the first `rows`, of all if None.
    """
    ret = lambda_return(torch.zeros_like(cont), 1 - cont, reward, target, 1.0, lam)
    retnorm.update(ret[:rows])
    weight = cont.detach().cumprod(1)[:, :-1] * weight
    advantage = (ret - target[:, :-1]) / retnorm.scale
    losses = {
        "policy": policy_loss(policy, action, advantage, weight, entropy_scale, gradient, mix),
        "value": value_loss(value[:, :-1], slow_value[:, :-1], ret, weight),
    }
    return losses, ret, advantage


def replay_value_loss(
    last: Tensor, term: Tensor, reward: Tensor, boot: Tensor,
    value: dists.TwoHot, slow_value: dists.TwoHot, disc: float, lam: float | Tensor,
    weight: float | Tensor = 1.0,
) -> Tensor:  # fmt: skip
    """Critic loss [B, K-1] along replayed rewards, times `weight`.

    last, term, reward, boot [B, K]; boot are the imagined returns; value and slow_value [B, K-1].
    """
    ret = lambda_return(last, term, reward, boot, disc, lam)
    return value_loss(value, slow_value, ret, (~last[:, :-1]).float() * weight)


class ReturnNorm(nn.Module):
    """Moving percentiles of returns; their range, at least `limit`, scales advantages (DreamerV3, eq. 12)."""

    def __init__(self, rate: float = 0.01, limit: float = 1.0, low: float = 5.0, high: float = 95.0):
        super().__init__()
        self.rate, self.limit = rate, limit
        self.register_buffer("quantiles", torch.tensor([low / 100, high / 100]), persistent=False)
        self.register_buffer("range", torch.zeros(2))  # low and high

    @torch.no_grad()
    def update(self, ret: Tensor) -> None:
        """Move towards the percentiles of `ret` (any shape)."""
        new = torch.quantile(distributed.all_gather(ret.float().flatten()), self.quantiles)
        # An update that is not finite is skipped as a whole; it must not stay here either.
        new = torch.where(new.isfinite(), new, self.range)
        self.range.lerp_(new, self.rate)

    @property
    def scale(self) -> Tensor:
        return (self.range[1] - self.range[0]).clamp(min=self.limit)


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Within, gradients flow through the modules but not to their parameters."""
    params = [p for module in modules for p in module.parameters() if p.requires_grad]
    for param in params:
        param.requires_grad_(False)
    try:
        yield
    finally:
        for param in params:
            param.requires_grad_(True)


# --- World model ---------------------------------------------------------------------------------------


class WorldModel(nn.Module):
    """Encoder, RSSM, decoder, reward and continuation heads."""

    def __init__(
        self, obs_space: Mapping[str, gymnasium.Space], actions: networks.ActionVector, config: Mapping
    ):
        super().__init__()
        self.actions = actions
        self.hearing = audio.Hearing(obs_space, config)
        obs_space = self.hearing.obs_space
        self.encoder = networks.MultiEncoder(obs_space, config.encoder)
        obs_space = {key: space for key, space in obs_space.items() if key != "llm_features"}
        self.rssm = networks.RSSM(self.encoder.size, actions.size, config.rssm)
        rssm = self.rssm
        self.decoder = networks.MultiDecoder(obs_space, rssm, config.decoder, config.encoder)
        self.reward_head = networks.TwoHotHead(rssm.feat_size, config.reward_head)
        self.cont_head = networks.BinaryHead(rssm.feat_size, config.cont_head.units)
        self.free_nats = config.rssm.free_nats
        self.disc = 1 - 1 / config.horizon
        self.context = config.replay_context

    def split_context(self, data: Data) -> tuple[State, Tensor, Data]:
        """A batch [B, C + T, ...] as start state [B, ...], previous actions [B, T, A] and data [B, T, ...].

        With a context of one step its stored latents are the start state; without, the sequence starts
        from zeros, and so does its first previous action.
        """
        action = self.actions.encode(data)  # [B, C + T, A]
        if not self.context:
            prev_action = torch.cat([torch.zeros_like(action[:, :1]), action[:, :-1]], 1)
            return self.rssm.initial(len(action)), prev_action, data
        state = self.rssm.unpack(data["deter"][:, 0], data["stoch"][:, 0])
        return state, action[:, :-1], {k: v[:, 1:] for k, v in data.items()}

    def observe(self, data: Data, generator: torch.Generator | None) -> tuple[State, Data]:
        """Posterior states and embed [B, T, ...] of a replayed batch, and the batch without its context.

        In the returned batch, waveforms have become spectra.
        """
        state, prev_action, data = self.split_context(data)
        data = self.hearing(data)
        embed = self.encoder(data)  # [B, T, E]
        noise = self.rssm.noise(*data["is_first"].shape, generator=generator)
        post = self.rssm.observe(state, embed, prev_action, data["is_first"], noise)
        return {**post, "embed": embed}, data

    def loss(self, post: State, data: Data) -> tuple[Losses, Metrics]:
        """The losses [B, T] of posterior states along data, and metrics."""
        rssm = self.rssm
        post_dist, prior_dist = rssm.dist(post["logit"]), rssm.dist(rssm.prior(post["deter"]))
        losses = kl_losses(post_dist, prior_dist, self.free_nats)
        for name, _, loss in self._recon_losses(post["deter"], post["stoch"], data):
            losses[name] = losses.get(name, 0.0) + loss
        losses["reward"] = self.reward_head(self.rssm.feat(post)).loss(data["reward"])
        cont = self.disc * (~data["is_terminal"]).float()
        losses["cont"] = self.cont_head(self.rssm.feat(post)).loss(cont)
        metrics = {"latent/post_entropy": post_dist.entropy().mean()}
        metrics["latent/prior_entropy"] = prior_dist.entropy().mean()
        return losses, {k: v.detach() for k, v in metrics.items()}

    def _recon_losses(self, deter: Tensor, stoch: Tensor, data: Data) -> Iterator[tuple[str, int, Tensor]]:
        """For each reconstructed key its kind, its size, and the sum [B, T] of its squared errors."""
        recons, routed = self.decoder(deter, self.rssm.flat(stoch)), self.decoder.keys
        for name, keys in (("image", routed.images), ("vector", routed.vectors), ("audio", routed.audio)):
            for key, shape in keys.items():
                target = data[key].float() / 255 if name == "image" else data[key].float()
                target = target if name == "image" else target.reshape(*data["is_first"].shape, -1)
                yield name, math.prod(shape), recons[key].loss(target)

    @torch.no_grad()
    def prior_error(self, post: State, data: Data, kind: str) -> Tensor:
        """How wrong the prior's prediction of each step from the step before was, [B, T].

        kind `image`: the squared error per dimension of the decoded observation, in the units in which it is
        reconstructed, averaged over its keys. `latent`: that of the latents' expected values, against the
        posterior. `kl`: KL(posterior, prior). The prior's mode is decoded, not a sample: the error
        should not depend on the draw.
        """
        rssm = self.rssm
        prior = rssm.dist(rssm.prior(post["deter"]))
        if kind == "image":
            losses = self._recon_losses(post["deter"], prior.mode, data)
            errors = [loss / size for _, size, loss in losses]
            return sum(errors) / len(errors)
        post_dist = rssm.dist(post["logit"])
        if kind == "kl":
            return post_dist.kl(prior)
        return (post_dist.expected - prior.expected).square().flatten(2).mean(-1)

    @torch.no_grad()
    def open_loop(self, data: Data, context: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Videos [T, B * H, 3 * W, C] uint8 per image key: truth, prediction, error side by side.

        For each audio key a video of one frame: the picture of its spectra.
        The model sees `context` frames and then predicts from the actions alone.
        """
        state, prev_action, data = self.split_context(data)
        data = self.hearing(data)
        is_first = data["is_first"]
        batch, length = is_first.shape
        noise = self.rssm.noise(batch, length, generator=generator)
        embed = self.encoder(data)
        post = self.rssm.observe(
            state, embed[:, :context], prev_action[:, :context], is_first[:, :context], noise[:, :context]
        )
        state, weights = {k: post[k][:, -1] for k in ("deter", "stoch")}, self.rssm.split_weights()
        states = {k: list(post[k].unbind(1)) for k in state}
        for t in range(context, length):
            state = self.rssm.imagine(state, prev_action[:, t], noise[:, t], weights)
            for key, value in state.items():
                states[key].append(value)
        deter, stoch = torch.stack(states["deter"], 1), torch.stack(states["stoch"], 1)
        recons = self.decoder(deter, self.rssm.flat(stoch))
        videos = {}
        for key in self.decoder.keys.images:
            truth, pred = data[key].float() / 255, recons[key].mean
            error = (pred - truth + 1) / 2
            video = torch.cat([truth, pred, error], 3)  # [B, T, H, 3 W, C]
            video = (video.clamp(0, 1) * 255).to(torch.uint8)
            videos[key] = video.transpose(0, 1).flatten(1, 2)  # [T, B * H, 3 W, C]
        for key in self.decoder.keys.audio:
            videos[key] = audio.picture(data[key], recons[key].mean.reshape(data[key].shape), context)[None]
        return videos


# --- Behaviour -----------------------------------------------------------------------------------------


def task_reward(feat: Tensor, action: Tensor, reward: Tensor) -> Tensor:
    """The RewardSum of an actor that seeks only the task's reward."""
    return reward


class Imagined(NamedTuple):
    """Trajectories of H steps from N start states."""

    feat: Tensor  # [N, H+1, F]
    action: Tensor  # [N, H, A] input of the world model
    choice: Tensor  # [N, H, C] the actor's choice: the action, unless it also chooses among options
    decided: float | Tensor = 1.0  # [N, H] 1 where the actor decided, 0 where an option was running
    decides_next: float | Tensor = 1.0  # [N, H] the same for the next state


class Starts(NamedTuple):
    """Where imagination starts."""

    state: State  # [N, ...] the replayed states, perhaps followed by others
    weight: float | Tensor = 1.0  # to [N, 1]
    rollout: Any = None  # imagined plans that led to the other states


class View(NamedTuple):
    """The actor in some states."""

    policy: Policy


class PlainPolicy:
    """The actor alone: it decides at every step, and imagination starts from replayed states only.

    `lore_llm.policy.AdvisedPolicy` offers the same methods for an agent with advice.
    """

    def view(self, behavior: "ImagBehavior", feat: Tensor, advised: bool = True) -> View:
        """The policy in feat [..., F]; `advised`: with the prior's logits added."""
        return View(behavior.actor(feat))

    def starts(self, behavior: "ImagBehavior", world_model: WorldModel, start: State, items: Data) -> Starts:
        """The start states of imagination: the replayed `start` [N, ...], and those that `items` add."""
        return Starts(start)

    def imagine(
        self, behavior: "ImagBehavior", rssm: networks.RSSM, start: State,
        generator: torch.Generator | None, advised: bool = True,
    ) -> Imagined:  # fmt: skip
        """Follow the policy from start states [N, ...]."""
        horizon, batch = behavior.config.imag_horizon, len(start["deter"])
        noise = rssm.noise(horizon, batch, generator=generator)
        policy_noise = behavior.actor.noise(horizon, batch, generator=generator)
        state, feats, actions = start, [rssm.feat(start)], []
        weights = rssm.split_weights()
        for t in range(horizon):
            policy = self.view(behavior, feats[-1].detach(), advised).policy
            action = policy.sample([n[t] for n in policy_noise])
            state = rssm.imagine(state, action, noise[t], weights)
            feats.append(rssm.feat(state))
            actions.append(action)
        action = torch.stack(actions, 1)
        return Imagined(torch.stack(feats, 1), action, action)

    def decided(self, data: Data) -> tuple[float | Tensor, float | Tensor]:
        """Whether the actor decided in replayed steps [B, K-1], and in the next ones [B, K-1]."""
        return 1.0, 1.0

    def loss(
        self, behavior: "ImagBehavior", dream: Imagined, view: View, starts: Starts, weight: float | Tensor
    ) -> tuple[Losses, Metrics]:
        """Additional losses of imagined trajectories.

        `view` is the policy in their first H states, `weight` (to [N, H]) multiplies the losses.
        """
        return {}, {}


PLAIN = PlainPolicy()


class ImagBehavior(nn.Module):
    """Actor and critic, learned in imagination from every replayed state."""

    def __init__(self, feat: int, actions: networks.ActionVector, config: Mapping):
        super().__init__()
        self.config = config
        self.actor = networks.Actor(feat, actions, config.actor)
        self.critic = networks.TwoHotHead(feat, config.critic, config.critic.layers)
        self.slow_critic = deepcopy(self.critic).requires_grad_(False)
        self.retnorm = ReturnNorm()
        self.disc = 1 - 1 / config.horizon
        self.lam = config.discount_lambda

    def trace_decay(self, decides: float | Tensor) -> float | Tensor:
        """Lambda where the actor decides, 1 where it does not: no value is learned of those states."""
        return self.lam * decides + (1 - decides)

    def loss(
        self, world_model: WorldModel, post: State, data: Data, generator: torch.Generator | None,
        reward_sum: RewardSum = task_reward, policy: PlainPolicy = PLAIN, items: Data = MappingProxyType({}),
    ) -> tuple[Losses, Metrics]:  # fmt: skip
        """Policy and value losses [N, H], the replay value loss [B, K-1], and metrics.

        Imagination starts from the last K states of each sequence (`imag_last`, or all T), and from the
        states that `policy` adds for `items`. `reward_sum` gives the reward in imagination; data["reward"]
        must hold the same reward for the replayed steps.
        """
        c = self.config
        last = c.imag_last or post["deter"].shape[1]
        recent = {k: post[k][:, -last:] for k in ("deter", "stoch")}  # [B, K, ...]
        start = {k: v.detach().flatten(0, 1) for k, v in recent.items()}  # [N, ...]
        rows = len(start["deter"])
        dynamics = c.imag_gradient != "reinforce"
        with torch.set_grad_enabled(dynamics), frozen(world_model, self.critic):
            starts = policy.starts(self, world_model, start, items)
            dream = policy.imagine(self, world_model.rssm, starts.state, generator)
            feat = dream.feat
            reward = reward_sum(feat, dream.action, world_model.reward_head(feat).mean)  # [N, H+1]
            cont = world_model.cont_head(feat).prob
            target = self.critic(feat).mean if dynamics else None
        feat = feat.detach()
        value, slow_value = self.critic(feat), self.slow_critic(feat)
        if c.slow_value_target:
            target = slow_value.mean
        elif not dynamics:
            target = value.mean.detach()
        view, weight = policy.view(self, feat[:, :-1]), starts.weight * dream.decided
        losses, ret, advantage = imagination_losses(
            view.policy, dream.choice, reward, cont, target, value, slow_value, self.retnorm,
            lam=self.trace_decay(dream.decides_next), entropy_scale=c.actor.entropy,
            gradient=c.imag_gradient, mix=c.imag_gradient_mix, weight=weight, rows=rows,
        )  # fmt: skip
        decided, decides_next = policy.decided({k: v[:, -last:] for k, v in data.items()})
        boot = ret[:rows, 0].detach().unflatten(0, (-1, last))  # [B, K]
        replayed = {k: data[k][:, -last:] for k in ("is_last", "is_terminal", "reward")}
        losses["repval"] = self._replay_loss(world_model.rssm, recent, replayed, boot, decided, decides_next)
        more, more_metrics = policy.loss(self, dream, view, starts, weight)
        losses |= more
        metrics = {
            "imag/return": ret.mean(),
            "imag/reward": reward.mean(),
            "imag/cont": cont.mean(),
            "imag/value": target.mean(),
            "imag/return_scale": self.retnorm.scale,
            "imag/advantage_mag": advantage.abs().mean(),
            "actor/entropy": view.policy.entropy().mean(),
            **more_metrics,
        }
        return losses, {k: v.detach() for k, v in metrics.items()}

    def _replay_loss(
        self, rssm: networks.RSSM, post: State, data: Data, boot: Tensor,
        decided: float | Tensor, decides_next: float | Tensor,
    ) -> Tensor:  # fmt: skip
        """The replay value loss [B, K-1] of posterior states and data [B, K, ...]; `boot` are returns."""
        value = self.critic(rssm.feat(post)[:, :-1])
        slow_value = self.slow_critic(rssm.feat({k: v.detach() for k, v in post.items()})[:, :-1])
        return replay_value_loss(
            data["is_last"], data["is_terminal"], data["reward"], boot, value, slow_value, self.disc,
            self.trace_decay(decides_next), decided,
        )  # fmt: skip

    @torch.no_grad()
    def update_slow_critic(self) -> None:
        """Move the slow critic towards the critic, after the optimiser's step as the reference does."""
        slow, fast = list(self.slow_critic.parameters()), list(self.critic.parameters())
        torch._foreach_lerp_(slow, fast, self.config.slow_target_fraction)
