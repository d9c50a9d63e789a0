"""The output distributions of heads and latents.

Each is built from a network's raw outputs and computes in float32, whatever the precision of the network.
Sampling takes its noise as an argument, so that the caller controls every random draw.
Letters: S latent variables, K classes, A action size; `...` are batch dimensions.
"""

import math
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

import fast


def symlog(x: Tensor) -> Tensor:
    """Squash to sign(x) ln(1 + |x|) (DreamerV3, eq. 9)."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x: Tensor) -> Tensor:
    """The inverse of symlog."""
    return torch.sign(x) * torch.expm1(torch.abs(x))


class OneHot:
    """Categorical over one-hot vectors [..., K], mixed with a share `unimix` of the uniform distribution.

    Samples have straight-through gradients to the mixed probabilities. With `dims=1` log-probability,
    entropy and KL are summed over the last batch dimension, as for the S latents of a state.
    """

    def __init__(self, logits: Tensor, unimix: float = 0.0, dims: int = 0):
        self.logits, self.unimix, self.dims = logits.float(), unimix, dims

    @cached_property
    def probs(self) -> Tensor:
        probs = fast.softmax(self.logits)  # [..., K]
        if not self.unimix:
            return probs
        return (1 - self.unimix) * probs + self.unimix / probs.shape[-1]

    @cached_property
    def log_probs(self) -> Tensor:
        return self.probs.log() if self.unimix else F.log_softmax(self.logits, -1)

    def _sum(self, x: Tensor) -> Tensor:
        return x.sum(-1) if self.dims else x

    def sample(self, noise: Tensor) -> Tensor:
        """One-hot sample [..., K] from uniform noise [..., 1] in [0, 1), by the cumulative sum."""
        # Only K - 1 boundaries: rounding of the last sum cannot exceed the last class.
        index = (self.probs.detach().cumsum(-1)[..., :-1] <= noise).sum(-1)
        return self.straight_through(F.one_hot(index, self.probs.shape[-1]).to(self.probs.dtype))

    def straight_through(self, value: Tensor) -> Tensor:
        """`value` forward, the gradient of the probabilities backward."""
        if not self.probs.requires_grad:
            return value
        return value + (self.probs - self.probs.detach())

    @property
    def expected(self) -> Tensor:
        return self.probs

    @property
    def mode(self) -> Tensor:
        return F.one_hot(self.probs.argmax(-1), self.probs.shape[-1]).to(self.probs.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        return self._sum((self.log_probs * value).sum(-1))

    def entropy(self) -> Tensor:
        return self._sum(-(self.probs * self.log_probs).sum(-1))

    def kl(self, other: "OneHot") -> Tensor:
        return self._sum((self.probs * (self.log_probs - other.log_probs)).sum(-1))

    def detach(self) -> "OneHot":
        copy = OneHot(self.logits.detach(), self.unimix, self.dims)
        # These are already computed; the properties would compute them again.
        copy.__dict__.update(probs=self.probs.detach(), log_probs=self.log_probs.detach())
        return copy


class MaskedOneHot(OneHot):
    """Categorical over the `available` classes (bool [..., K]); the others have probability 0.

    The last class must be available. The uniform share covers the available classes only.
    """

    def __init__(self, logits: Tensor, unimix: float, available: Tensor):
        super().__init__(logits.float().masked_fill(~available, -torch.inf), unimix)
        self.available = available

    @cached_property
    def probs(self) -> Tensor:
        uniform = self.available / self.available.sum(-1, keepdim=True)
        return (1 - self.unimix) * fast.softmax(self.logits) + self.unimix * uniform

    @cached_property
    def log_probs(self) -> Tensor:
        """0 for classes that are not available: they are never chosen and their probability is 0."""
        if not self.unimix:  # probabilities may underflow
            return torch.where(self.available, F.log_softmax(self.logits, -1), 0.0)
        return torch.where(self.available, self.probs, 1.0).log()

    def detach(self) -> "MaskedOneHot":
        return MaskedOneHot(self.logits.detach(), self.unimix, self.available)


class Normal:
    """Independent Gaussians [..., A]; log-probability, entropy and KL are summed over the last dimension."""

    def __init__(self, mean: Tensor, std: Tensor):
        self.mean, self.std = mean.float(), std.float()

    def sample(self, noise: Tensor) -> Tensor:
        """Sample from standard normal noise of the same shape; differentiable."""
        return self.mean + self.std * noise

    @property
    def expected(self) -> Tensor:
        return self.mean

    @property
    def mode(self) -> Tensor:
        return self.mean

    def log_prob(self, value: Tensor) -> Tensor:
        z = (value - self.mean) / self.std
        return (-0.5 * z.square() - self.std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        return (self.std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def kl(self, other: "Normal") -> Tensor:
        ratio = (self.std / other.std).square()
        shift = ((self.mean - other.mean) / other.std).square()
        return (0.5 * (ratio + shift - 1 - ratio.log())).sum(-1)

    def detach(self) -> "Normal":
        return Normal(self.mean.detach(), self.std.detach())


def bounded_normal(raw_mean: Tensor, raw_std: Tensor, min_std: float, max_std: float) -> Normal:
    """The policy over continuous actions: mean in (-1, 1), standard deviation in (min_std, max_std).

    The offset of 2 makes it start near max_std (danijar/dreamerv3, heads.py).
    """
    std = (max_std - min_std) * torch.sigmoid(raw_std.float() + 2.0) + min_std
    return Normal(torch.tanh(raw_mean.float()), std)


class Binary:
    """Bernoulli from a logit [...]; the target may be soft, like the discounted continuation."""

    def __init__(self, logit: Tensor):
        self.logit = logit.float()

    @property
    def prob(self) -> Tensor:
        return torch.sigmoid(self.logit)

    def loss(self, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(self.logit, target.float(), reduction="none")


def symexp_bins(count: int) -> Tensor:
    """`count` bins [count] at symexp of even steps in [-20, 20], exactly symmetric around 0."""
    steps = (count + 1) // 2 if count % 2 else count // 2
    # The reference's float32 arithmetic, step by step: at symexp(20) = 5e8 an extra rounding matters.
    share = torch.arange(steps, dtype=torch.float32) * torch.tensor(1 / (steps - 1), dtype=torch.float32)
    half = symexp(-20 * (1 - share))
    half[-1] = 0 if count % 2 else half[-1]
    return torch.cat([half, -half.flip(0)[1:] if count % 2 else -half.flip(0)])


class TwoHot:
    """A scalar as a categorical over bins [K]; targets are split between two neighbours (DreamerV3, eq. 10).

    `symlog_space` is the older form: bins are evenly spaced in symlog space and the mean is taken there.
    """

    def __init__(self, logits: Tensor, bins: Tensor, symlog_space: bool = False):
        self.logits, self.bins, self.symlog_space = logits.float(), bins, symlog_space

    def __getitem__(self, index) -> "TwoHot":
        """The distributions at `index` of the batch dimensions."""
        return TwoHot(self.logits[index], self.bins, self.symlog_space)

    @cached_property
    def mean(self) -> Tensor:
        """The expected value [...]; exactly 0 for uniform probabilities, as at the start of training.

        The bins are symmetric, so each term is first added to its mirror image, as in the reference: large
        terms cancel before they are summed.
        """
        terms, half = F.softmax(self.logits, -1) * self.bins, self.bins.shape[-1] // 2
        pairs = terms[..., :half].flip(-1) + terms[..., -half:]
        mean = terms[..., half:-half].sum(-1) + pairs.sum(-1)
        return symexp(mean) if self.symlog_space else mean

    @property
    def spread(self) -> Tensor:
        """The uncertainty of the value [...]: half the distance between its 16 % and 84 % quantiles.

        For a Gaussian that is the standard deviation. The standard deviation over the bins would be dominated
        by the outermost: a probability of 1e-6 at 5e8 makes it half a million.
        """
        cumulative = F.softmax(self.logits, -1).cumsum(-1)
        low, high = ((cumulative < share).sum(-1).clamp(max=len(self.bins) - 1) for share in (0.16, 0.84))
        bins = symexp(self.bins) if self.symlog_space else self.bins
        return (bins[high] - bins[low]) / 2

    @cached_property
    def _log_total(self) -> Tensor:
        return self.logits.logsumexp(-1)

    def loss(self, target: Tensor) -> Tensor:
        """Cross entropy [...] with the two-hot target; no gradient to the target."""
        target = target.detach().float()
        target = symlog(target) if self.symlog_space else target
        last = len(self.bins) - 1
        above = torch.searchsorted(self.bins, target.contiguous(), right=True)
        below = (above - 1).clamp(0, last)
        above = above.clamp(0, last)
        to_below = (self.bins[below] - target).abs()
        to_above = (self.bins[above] - target).abs()
        # Outside the bins both neighbours are the outermost bin, which gets all the mass. A NaN counts as
        # outside as well; adding it makes the loss NaN, so that the update is skipped.
        weight_above = torch.where(below == above, 0.5 + 0 * target, to_below / (to_below + to_above))
        neighbours = torch.stack([below, above], -1)  # [..., 2]
        weights = torch.stack([1 - weight_above, weight_above], -1)  # [..., 2]
        picked = (self.logits.gather(-1, neighbours) * weights).sum(-1)
        return self._log_total - picked


class MSE:
    """Squared error summed over the last `dims` dimensions; with `squash` the target is squashed first."""

    def __init__(self, mean: Tensor, dims: int, squash: bool = False):
        self.raw, self.dims, self.squash = mean.float(), dims, squash

    @property
    def mean(self) -> Tensor:
        return symexp(self.raw) if self.squash else self.raw

    def loss(self, target: Tensor) -> Tensor:
        target = target.detach().float()
        target = symlog(target) if self.squash else target
        return (self.raw - target).square().flatten(-self.dims).sum(-1)
