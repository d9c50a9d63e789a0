"""Path B, the policy prior: the actor is seen through a net that is distilled from the advice.

Letters: A actions, F feat, B batch, T time, N rows; `...` are batch dimensions.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import networks

LAYERS = 2  # of the net
RELIABILITY_RATE = 0.01  # of the running means of what following the advice brings
CAUTION = 1.0  # standard errors by which the reliability is lowered the longer there is advice
DUAL_RATE = 0.05  # share by which an update lowers the weight where the divergence is twice its target
SMALLEST_TARGET = 1e-6  # nats
# In units of the scale of returns:
GAIN_FLOOR = 0.02  # gains that are too small to tell anything
SMALL_ADVANTAGE = 0.05  # the critic's own noise: steps with less of an advantage tell nothing


class Reliability(nn.Module):
    """How probable it is that following the advice helps, from 0 to 1, by what following it has brought.

    Running means of the gain g and of g^2 give t = sqrt(n) mean / sqrt(mean square + floor^2), where n is how
    many updates they remember; the estimate is the normal distribution's value at t. It starts at 0.5 and
    falls to 0 where following does harm.
    """

    averages = ("moments",)  # buffers that are means over all learners

    def __init__(self, rate: float = RELIABILITY_RATE):
        super().__init__()
        self.rate = rate
        self.register_buffer("moments", torch.zeros(3))  # running means of 1, g and g^2

    @torch.no_grad()
    def update(self, gain: Tensor, seen: Tensor) -> None:
        """Take the mean gain of an update, a scalar, if anything of it was `seen` (bool)."""
        new = torch.stack([torch.ones_like(gain), gain, gain.square()])
        new = torch.where(seen & new.isfinite().all(), new, self.moments)
        self.moments.lerp_(new, self.rate)

    @property
    def value(self) -> Tensor:
        """The estimate, a scalar."""
        return self.lowered(0.0)

    def lowered(self, errors: float | Tensor) -> Tensor:
        """The estimate if the mean gain were less than measured by so many standard errors, a scalar."""
        weight, mean, square = self.moments.unbind()
        total = weight.clamp(min=1e-30)
        remembered = (2 / self.rate - 1) * total / (2 - total)  # (sum of weights)^2 / sum of their squares
        t = remembered.sqrt() * (mean / total) / (square / total + GAIN_FLOOR**2).sqrt()
        return 0.5 * (1 + torch.erf((t - errors) / math.sqrt(2)))


class Prior(nn.Module):
    """A net from feat [..., F] to the logits [..., A] that the adviser would give, and their weight."""

    averages = ("heard", "dual")

    def __init__(self, feat: int, actions: int, config: Mapping):
        super().__init__()
        c = config.prior
        self.config = c
        self.mlp = networks.mlp(feat, LAYERS, config.actor.units)
        self.out = networks.Linear(config.actor.units, actions, 0.0)  # without advice, all actions alike
        self.reliability = Reliability()
        self.register_buffer("heard", torch.zeros(()))  # running mean of whether there was advice: towards 1
        self.register_buffer("dual", torch.zeros(()))
        self.register_buffer("share", torch.ones(()))  # of beta_max that llm.until leaves

    def forward(self, feat: Tensor) -> Tensor:
        """Log-probabilities [..., A], centred and clipped to plus and minus `logit_clip`."""
        logits = self.config.logit_clip * self.out(self.mlp(feat)).float()
        return bounded(logits, self.config.logit_clip)

    def beta(self, uncertainty: Tensor) -> Tensor:
        """The weight of the logits [...] by the agent's uncertainty [...] from 0 to 1."""
        c = self.config
        threshold = c.uncertainty_threshold
        doubt = ((uncertainty - threshold) / (1 - threshold)).clamp(0, 1)
        trust = self.trust * (self.heard > 0)
        return c.beta_max * self.share * trust * doubt / (1 + self.dual)

    @property
    def trust(self) -> Tensor:
        """The reliability as it counts, a scalar: lowered the longer there is advice.

        Where rewards are rare, nothing tells for long whether an adviser harms: whoever cannot show that the
        advice helps loses the trust that it was given at first.
        """
        return self.reliability.lowered(CAUTION * self.heard)

    def distill(self, feat: Tensor, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error to the advice `logits` [B, T, A], and how often its best action is the same.

        Scalars, over the steps where `mask` [B, T]; 0 where none is. The error is in units of `logit_clip`.
        Cross entropy would take for ever to tell apart what is as good as certain.
        """
        said = self.out(self.mlp(feat)).float()
        loss = (said - logits / self.config.logit_clip).square().mean(-1)  # [B, T]
        same = said.argmax(-1) == logits.argmax(-1)
        count = mask.sum().clamp(min=1)
        return torch.where(mask, loss, 0.0).sum() / count, (mask & same).sum() / count

    @torch.no_grad()
    def follow(
        self,
        logits: Tensor,
        probs: Tensor,
        action: Tensor,
        advantage: Tensor,
        mask: Tensor,
        rewarded: Tensor | bool = True,
    ) -> None:
        """Learn from real steps whether following the advice raises the advantage.

        logits, probs (the actor's) and action (one-hot) [..., A]; advantage [...] in units of the scale of
        returns; `mask` [...] where there was advice. The gain is the covariance of what was followed, against
        what the actor would have on average, with the advantage. Not their mean product: where the critic
        expects too little or too much of everything, that would praise or blame any advice. Steps are left
        out whose advantage is small, and those after which no reward was seen (`rewarded` [...]): as long as
        there are few rewards, that is nearly all of them, and what the critic guesses about them, which tends
        to praise what is done often, would outweigh what is known.
        """
        followed = (F.softmax(logits, -1) * (action - probs)).sum(-1)
        advantage = advantage - torch.where(mask, advantage, 0.0).sum() / mask.sum().clamp(min=1)
        telling = mask & rewarded & (advantage.abs() > SMALL_ADVANTAGE)
        gain = torch.where(telling, followed * advantage, 0.0).sum() / telling.sum().clamp(min=1)
        self.reliability.update(gain, telling.any())
        self.heard.lerp_(torch.where(mask.any(), 1.0, self.heard), self.reliability.rate)

    @torch.no_grad()
    def limit(self, kl: Tensor) -> None:
        """Lower the weight where the mean KL(mix, actor) is above `delta_target`, else let it rise again.

        By a share of itself, so that it takes as long whatever the target and the strength of the advice.
        """
        excess = (kl / max(self.config.delta_target, SMALLEST_TARGET) - 1).clamp(max=1)
        dual = ((1 + self.dual) * (DUAL_RATE * excess).exp() - 1).clamp(min=0)
        self.dual.copy_(torch.where(dual.isfinite(), dual, self.dual))


def bounded(logits: Tensor, clip: float) -> Tensor:
    """Logits [..., A] as log-probabilities, centred and clipped to plus and minus `clip`."""
    log_probs = F.log_softmax(logits, -1)
    return (log_probs - log_probs.mean(-1, keepdim=True)).clamp(-clip, clip)
