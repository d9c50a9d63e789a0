"""Path B, the policy prior: logits of a network that is distilled from the advice are added to the actor's.

Letters: A actions, F feat, B batch, T time, N rows; `...` are batch dimensions.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import networks

LAYERS = 2  # of the network
RELIABILITY_RATE = 0.01  # of the running means of the gain of following the advice
CONFIDENCE_SIGMAS = 1.0  # standard errors by which the reliability is lowered as advice accumulates
DUAL_RATE = 0.05  # share by which an update lowers the weight if the divergence is twice its target
SMALLEST_TARGET = 1e-6  # nats
# In units of the scale of returns:
GAIN_FLOOR = 0.02  # smaller gains are not significant
SMALL_ADVANTAGE = 0.05  # the critic's noise: steps with smaller advantages are ignored


class Reliability(nn.Module):
    """The probability that following the advice helps, estimated from the measured gains.

    Running means of the gain g and of g^2 give t = sqrt(n) mean / sqrt(mean square + floor^2), where n is the
    number of updates in the running mean; the estimate is the normal distribution's CDF at t. It starts at
    0.5 and falls to 0 if following the advice does harm.
    """

    averages = ("moments",)  # buffers that are averaged over all learners

    def __init__(self, rate: float = RELIABILITY_RATE):
        super().__init__()
        self.rate = rate
        self.register_buffer("moments", torch.zeros(3))  # running means of 1, g and g^2

    @torch.no_grad()
    def update(self, gain: Tensor, seen: Tensor) -> None:
        """Add the mean gain of an update, a scalar, if there was any advice in it (`seen`, bool)."""
        new = torch.stack([torch.ones_like(gain), gain, gain.square()])
        new = torch.where(seen & new.isfinite().all(), new, self.moments)
        self.moments.lerp_(new, self.rate)

    @property
    def value(self) -> Tensor:
        """The estimate, a scalar."""
        return self.lowered(0.0)

    def lowered(self, errors: float | Tensor) -> Tensor:
        """The estimate for a mean gain that is lower by so many standard errors, a scalar."""
        weight, mean, square = self.moments.unbind()
        total = weight.clamp(min=1e-30)
        count = (2 / self.rate - 1) * total / (2 - total)  # (sum of weights)^2 / sum of their squares
        t = count.sqrt() * (mean / total) / (square / total + GAIN_FLOOR**2).sqrt()
        return 0.5 * (1 + torch.erf((t - errors) / math.sqrt(2)))


class Prior(nn.Module):
    """Predicts the adviser's logits [..., A] from feat [..., F]; computes their weight beta."""

    averages = ("advice_rate", "dual")

    def __init__(self, feat: int, actions: int, config: Mapping):
        super().__init__()
        self.config = config.prior
        self.mlp = networks.mlp(feat, LAYERS, config.actor.units)
        self.out = networks.Linear(config.actor.units, actions, 0.0)  # starts uniform
        self.reliability = Reliability()
        self.register_buffer("advice_rate", torch.zeros(()))  # 0 before any advice, then rises to 1
        self.register_buffer("dual", torch.zeros(()))
        self.register_buffer("share", torch.ones(()))  # of beta_max that llm.until leaves

    def forward(self, feat: Tensor) -> Tensor:
        """Log-probabilities [..., A], centred and clipped to plus and minus `logit_clip`."""
        logits = self.config.logit_clip * self.out(self.mlp(feat)).float()
        return bounded(logits, self.config.logit_clip)

    def beta(self, uncertainty: Tensor) -> Tensor:
        """The weight of the logits [...], given the agent's uncertainty [...] from 0 to 1."""
        c = self.config
        threshold = c.uncertainty_threshold
        gate = ((uncertainty - threshold) / (1 - threshold)).clamp(0, 1)
        trust = self.trust * (self.advice_rate > 0)
        return c.beta_max * self.share * trust * gate / (1 + self.dual)

    @property
    def trust(self) -> Tensor:
        """Lower confidence bound of the reliability, a scalar: lowered further as advice accumulates.

        If rewards are rare, it takes long to measure whether advice does harm. So advice without a measured
        gain loses the trust that it started with.
        """
        return self.reliability.lowered(CONFIDENCE_SIGMAS * self.advice_rate)

    def distill(self, feat: Tensor, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error to the advice `logits` [B, T, A], and how often the best actions agree.

        Scalars, means over the steps with advice (`mask` [B, T]); 0 without any. The error is in units of
        `logit_clip`. Cross-entropy would hardly distinguish logits that are all nearly certain.
        """
        predicted = self.out(self.mlp(feat)).float()
        loss = (predicted - logits / self.config.logit_clip).square().mean(-1)  # [B, T]
        same = predicted.argmax(-1) == logits.argmax(-1)
        count = mask.sum().clamp(min=1)
        return torch.where(mask, loss, 0.0).sum() / count, (mask & same).sum() / count

    @torch.no_grad()
    def follow(
        self, logits: Tensor, probs: Tensor, action: Tensor, advantage: Tensor, mask: Tensor,
        rewarded: Tensor | bool = True,
    ) -> None:  # fmt: skip
        """Measure in real steps whether following the advice raises the advantage.

        logits, probs (the actor's) and action (one-hot) [..., A]; advantage [...] in units of the scale of
        returns; `mask` [...] of steps with advice. The gain is the covariance of the advantage with how far
        the action followed the advice, compared to the actor's mean. The mean product would depend on the
        critic's bias: advice of any kind would look good or bad. Ignored are steps with a small advantage and
        steps without a later reward (`rewarded` [...]): with few rewards these are nearly all, and the
        critic's guesses about them, which favour frequent actions, would outweigh the facts.
        """
        followed = (F.softmax(logits, -1) * (action - probs)).sum(-1)
        advantage = advantage - torch.where(mask, advantage, 0.0).sum() / mask.sum().clamp(min=1)
        counted = mask & rewarded & (advantage.abs() > SMALL_ADVANTAGE)
        gain = torch.where(counted, followed * advantage, 0.0).sum() / counted.sum().clamp(min=1)
        self.reliability.update(gain, counted.any())
        target = torch.where(mask.any(), 1.0, self.advice_rate)
        self.advice_rate.lerp_(target, self.reliability.rate)

    @torch.no_grad()
    def limit(self, kl: Tensor) -> None:
        """Lower the weight if the mean KL(mix, actor) is above `delta_target`, else raise it again.

        By a share of itself, so that the time it takes depends neither on the target nor on the advice.
        """
        excess = (kl / max(self.config.delta_target, SMALLEST_TARGET) - 1).clamp(max=1)
        dual = ((1 + self.dual) * (DUAL_RATE * excess).exp() - 1).clamp(min=0)
        self.dual.copy_(torch.where(dual.isfinite(), dual, self.dual))


def bounded(logits: Tensor, clip: float) -> Tensor:
    """Logits [..., A] as log-probabilities, centred and clipped to plus and minus `clip`."""
    log_probs = F.log_softmax(logits, -1)
    return (log_probs - log_probs.mean(-1, keepdim=True)).clamp(-clip, clip)
