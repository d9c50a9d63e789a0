"""The networks of DreamerV3: layers, encoder, decoder, RSSM, heads and actor. They know nothing of losses.

Letters of the shapes: B batch, T time, A action size, S latent variables, K classes, D deter, E embed,
F feat, G blocks; `...` are batch dimensions. A state is a dict of `deter` [..., D] and `stoch`, which is
one-hot [..., S, K], or [..., S] where the latents are Gaussian (`classes: 0`).
Initialisation and layout follow danijar/dreamerv3 at e3f0224; the golden values hold them to it.
"""

import contextlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distributions as dists
import fast
from basics import UserError
from fast import SplitWeights

State = dict[str, Tensor]
PolicyNoise = list[Tensor]
TRUNCATED_STD = 1.1368  # a unit normal truncated at 2 sigma has a standard deviation of 1 / 1.1368
BF16_HIDDEN = 128  # with fewer hidden units a scan on a CPU is faster in float32
# The reference's constants.
UNIMIX = 0.01  # share of the uniform distribution in the latents' classes
MIN_STD = 0.1  # smallest standard deviation of Gaussian latents
ACTION_STD = (0.1, 1.0)  # smallest and largest standard deviation of continuous actions
ACTOR_SCALE = 0.01  # of the initial weights of the actor's output layers
KERNEL = 5  # of convolutions; the phase form of upsampling is written for it
AUDIO_MULTS = (2, 4)  # channels of the convolutions over spectra, times cnn_depth
NO_LATENT = 255  # the class index that the replay stores for "no latents": the zero state


def init_(weight: Tensor, fan_in: int, scale: float = 1.0) -> Tensor:
    """Fill with a normal truncated at 2 sigma; its variance after that is scale^2 / fan_in."""
    std = TRUNCATED_STD / math.sqrt(fan_in)
    with torch.no_grad():
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
        return weight.mul_(scale)


class Linear(nn.Linear):
    """A linear layer with the reference's initialisation; `scale` multiplies the initial weights."""

    def __init__(self, inputs: int, units: int, scale: float = 1.0):
        super().__init__(inputs, units)
        init_(self.weight, inputs, scale)
        nn.init.zeros_(self.bias)


class BlockLinear(nn.Module):
    """G linear layers side by side: block g of the output depends on block g of the input."""

    def __init__(self, inputs: int, units: int, blocks: int, fan_in: int | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, inputs // blocks, units // blocks))
        self.bias = nn.Parameter(torch.zeros(units))
        init_(self.weight, fan_in or inputs)  # the reference counts the inputs of all blocks as fan-in

    def forward(self, x: Tensor) -> Tensor:
        return block_matmul(x, self.weight) + self.bias


def block_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """Block-diagonal product: x [..., I], weight [G, I / G, O / G] -> [..., O]."""
    blocks, inputs, outputs = weight.shape
    rows = x.reshape(-1, blocks, inputs).transpose(0, 1)  # [G, N, I / G]
    out = torch.bmm(rows, weight.to(rows.dtype) if not torch.is_autocast_enabled(x.device.type) else weight)
    return out.transpose(0, 1).reshape(*x.shape[:-1], blocks * outputs)


class RMSNormSiLU(nn.Module):
    """Root-mean-square normalisation with a learned weight, then SiLU."""

    def __init__(self, units: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(units))

    def forward(self, x: Tensor) -> Tensor:
        return fast.rms_norm_silu(x, self.weight)


class Dense(nn.Sequential):
    """Linear, normalisation, SiLU: the building block of all MLPs."""

    def __init__(self, inputs: int, units: int):
        super().__init__(Linear(inputs, units), RMSNormSiLU(units))


def mlp(inputs: int, layers: int, units: int) -> nn.Sequential:
    """`layers` Dense layers of `units`."""
    return nn.Sequential(*[Dense(inputs if i == 0 else units, units) for i in range(layers)])


class Conv(nn.Module):
    """Convolution with "same" padding over [N, C, H, W] (channels last in memory), stride 1 or 2."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, scale: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.stride = stride
        # The reference pads as XLA does: with stride 2, one pixel less on the low side.
        total = kernel - stride
        self.padding = (total // 2, total - total // 2) * 2
        init_(self.weight, inputs * kernel * kernel, scale)

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.padding[:2]
        if low == high:
            return F.conv2d(x, self.weight, self.bias, self.stride, low)
        return F.conv2d(F.pad(x, self.padding), self.weight, self.bias, self.stride)


class UpConv(nn.Module):
    """Doubles [N, C, H, W] in size by repetition, or if `strided` by zeros, then a 5x5 convolution."""

    def __init__(self, inputs: int, outputs: int, strided: bool = False, scale: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 5, 5))
        self.bias = nn.Parameter(torch.zeros(outputs))
        taps = fast.DOUBLED_BY_ZEROS if strided else fast.DOUBLED_BY_REPEAT
        self.register_buffer("taps", torch.tensor(taps, dtype=torch.float32), persistent=False)
        init_(self.weight, inputs * 25, scale)

    def forward(self, x: Tensor) -> Tensor:
        return fast.doubled_conv(x, self.weight, self.bias, self.taps)


def channel_norm_silu(norm: RMSNormSiLU, x: Tensor) -> Tensor:
    """Normalise [N, C, H, W] over its channels; without a copy if channels are last in memory."""
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


# --- Observations --------------------------------------------------------------------------------------


class Keys(NamedTuple):
    """The observation keys that a network reads or writes, with their shapes; each kind is sorted by key."""

    vectors: dict[str, tuple[int, ...]]
    images: dict[str, tuple[int, int, int]]
    audio: dict[str, tuple[int, ...]]


NOT_OBSERVED = ("reward", "is_first", "is_last", "is_terminal", "discount", "symbolic")


def route_keys(obs_space: Mapping[str, gymnasium.Space], config: Mapping) -> Keys:
    """Sort observation keys by shape and full-match regular expression: audio, then images, then vectors.

    Images are uint8 [H, W, C]. Audio is a vector [D] or spectra [..., F, N]; `audio.Hearing` has already
    turned waveforms into spectra. `log_*` keys, flags and the reward are never routed.
    """
    vectors, images, audio = {}, {}, {}
    for key, space in sorted(obs_space.items()):
        if key in NOT_OBSERVED or key.startswith("log_"):
            continue
        is_image = len(space.shape) == 3 and space.dtype == np.uint8
        if len(space.shape) in (1, 2, 3) and not is_image and re.fullmatch(config.audio_keys, key):
            audio[key] = tuple(space.shape)
        elif is_image:
            if re.fullmatch(config.cnn_keys, key):
                images[key] = tuple(space.shape)
        elif re.fullmatch(config.mlp_keys, key):
            vectors[key] = tuple(space.shape)
    return Keys(vectors, images, audio)


def unrouted(obs_space: Mapping[str, gymnasium.Space], keys: Keys) -> list[str]:
    """Observation keys that are not among `keys`, apart from `log_*`, flags and the reward."""
    candidates = {key for key in obs_space if key not in NOT_OBSERVED and not key.startswith("log_")}
    return sorted(candidates.difference(*keys))


class ImageEncoder(nn.Module):
    """uint8 images [N, H, W, C] -> [N, E]: each convolution halves the resolution."""

    def __init__(self, shape: tuple[int, int, int], config: Mapping):
        super().__init__()
        height, width, channels = shape
        depths = [config.cnn_depth * mult for mult in config.cnn_mults]
        self.strided = config.strided
        self.convs = nn.ModuleList(
            Conv(i, o, KERNEL, 2 if self.strided else 1)
            for i, o in zip([channels, *depths[:-1]], depths, strict=True)
        )
        self.norms = nn.ModuleList(RMSNormSiLU(d) for d in depths)
        factor = 2 ** len(depths)
        self.size = (height // factor) * (width // factor) * depths[-1]

    def forward(self, image: Tensor) -> Tensor:
        x = image.permute(0, 3, 1, 2).float() / 255 - 0.5  # [N, C, H, W], channels last in memory
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = conv(x) if self.strided else fast.max_pool(conv(x))
            x = channel_norm_silu(norm, x)
        return x.permute(0, 2, 3, 1).flatten(1)  # [N, E], in the order height, width, channel


class MultiEncoder(nn.Module):
    """Observations -> embed [..., E]: vectors and audio through symlog and MLPs, images by convolutions."""

    def __init__(self, obs_space: Mapping[str, gymnasium.Space], config: Mapping):
        super().__init__()
        self.keys = route_keys(obs_space, config)
        self.size = 0
        if self.keys.vectors:
            inputs = sum(math.prod(shape) for shape in self.keys.vectors.values())
            self.mlp = mlp(inputs, config.mlp_layers, config.mlp_units)
            self.size += config.mlp_units
        if self.keys.images:
            self.cnn = ImageEncoder(stacked_shape(self.keys.images), config)
            self.size += self.cnn.size
        if self.keys.audio:
            self.audio = AudioEncoder(self.keys.audio, config)
            self.size += self.audio.size

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        outs = []
        batch = obs["is_first"].shape
        if self.keys.vectors:
            parts = [obs[k].float().reshape(*batch, -1) for k in self.keys.vectors]
            outs.append(self.mlp(dists.symlog(torch.cat(parts, -1))))
        if self.keys.images:
            image = torch.cat([obs[k] for k in self.keys.images], -1)  # [..., H, W, C]
            outs.append(self.cnn(image.flatten(0, len(batch) - 1)).unflatten(0, batch))
        if self.keys.audio:
            outs.append(self.audio({k: dists.symlog(obs[k].float()) for k in self.keys.audio}))
        return torch.cat(outs, -1)  # [..., E]


def stacked_shape(images: Mapping[str, tuple[int, int, int]]) -> tuple[int, int, int]:
    """Shape of all images stacked along their channels. Raises ValueError if heights or widths differ."""
    sizes = {shape[:2] for shape in images.values()}
    if len(sizes) > 1:
        raise ValueError(f"images must have one height and width, but they are {dict(images)}")
    return (*sizes.pop(), sum(shape[2] for shape in images.values()))


class ImageDecoder(nn.Module):
    """State -> images in [0, 1], [N, H, W, C]: a small feature map, then layers that double it.

    The layers mirror the encoder's (`mults`, `strided`).
    """

    def __init__(
        self, shape: tuple[int, int, int], rssm: "RSSM", config: Mapping, mults: Sequence[int], strided: bool
    ):
        super().__init__()
        height, width, channels = shape
        depths = [config.cnn_depth * mult for mult in mults]
        factor = 2 ** len(depths)
        self.small = (height // factor, width // factor, depths[-1])
        size = math.prod(self.small)
        self.blocks = math.gcd(rssm.blocks, depths[-1])
        self.from_deter = BlockLinear(rssm.deter, size, self.blocks)
        units = 2 * config.mlp_units
        self.from_stoch = nn.Sequential(Dense(rssm.stoch_size, units), Linear(units, size))
        self.norm = RMSNormSiLU(depths[-1])
        widths = depths[::-1]  # from the smallest map to the largest
        self.convs = nn.ModuleList(
            UpConv(i, o, strided) for i, o in zip(widths[:-1], widths[1:], strict=True)
        )
        self.norms = nn.ModuleList(RMSNormSiLU(d) for d in widths[1:])
        self.out = UpConv(widths[-1], channels, strided)

    def forward(self, deter: Tensor, stoch: Tensor) -> Tensor:
        height, width, depth = self.small
        x = self.from_deter(deter).reshape(-1, self.blocks, height, width, depth // self.blocks)
        x = x.permute(0, 2, 3, 1, 4).flatten(3)  # [N, h, w, depth]: blocks side by side in the channels
        x = x + self.from_stoch(stoch).reshape(-1, height, width, depth)
        x = self.norm(x).permute(0, 3, 1, 2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = channel_norm_silu(norm, conv(x))
        return torch.sigmoid(self.out(x).float()).permute(0, 2, 3, 1)  # [N, H, W, C]


class MultiDecoder(nn.Module):
    """State -> a distribution for each reconstructed observation key.

    `config` and `encoder` are the options of both: convolutions mirror the encoder's.
    """

    def __init__(
        self, obs_space: Mapping[str, gymnasium.Space], rssm: "RSSM", config: Mapping, encoder: Mapping
    ):
        super().__init__()
        self.keys = route_keys(obs_space, config)
        inputs, units = rssm.stoch_size + rssm.deter, config.mlp_units
        if self.keys.vectors:
            outputs = sum(math.prod(shape) for shape in self.keys.vectors.values())
            self.mlp = mlp(inputs, config.mlp_layers, units)
            self.vector = Linear(units, outputs)
        if self.keys.images:
            shape = stacked_shape(self.keys.images)
            self.cnn = ImageDecoder(shape, rssm, config, encoder.cnn_mults, encoder.strided)
        if self.keys.audio:
            outputs = sum(math.prod(shape) for shape in self.keys.audio.values())
            self.audio = nn.Sequential(mlp(inputs, config.mlp_layers, units), Linear(units, outputs))

    def forward(self, deter: Tensor, stoch: Tensor) -> dict[str, dists.MSE]:
        """deter [..., D], flat stoch [..., S*K] -> {key: distribution}; vectors and audio are flat."""
        outs, batch = {}, deter.shape[:-1]

        def split(kind: Mapping[str, tuple[int, ...]], values: Tensor, dims: int) -> None:
            sizes = [math.prod(shape) if dims == 1 else shape[-1] for shape in kind.values()]
            for key, part in zip(kind, values.split(sizes, -1), strict=True):
                outs[key] = dists.MSE(part, dims, squash=dims == 1)

        if self.keys.vectors:
            split(self.keys.vectors, self.vector(self.mlp(torch.cat([stoch, deter], -1))), 1)
        if self.keys.images:
            images = self.cnn(deter.flatten(0, -2), stoch.flatten(0, -2)).unflatten(0, batch)
            split(self.keys.images, images, 3)
        if self.keys.audio:
            split(self.keys.audio, self.audio(torch.cat([stoch, deter], -1)), 1)
        return outs


# --- Actions -------------------------------------------------------------------------------------------


def action_classes(space: gymnasium.Space) -> tuple[int, ...]:
    """The number of choices of each index: (n,) for Discrete, nvec for MultiDiscrete, () for Box."""
    if isinstance(space, gymnasium.spaces.Discrete):
        return (int(space.n),)
    if isinstance(space, gymnasium.spaces.MultiDiscrete):
        return tuple(int(n) for n in space.nvec.flat)
    return ()


class ActionVector:
    """The dict of actions as one float vector [..., A]: indices as one-hot, continuous values unchanged."""

    def __init__(self, act_space: Mapping[str, gymnasium.Space]):
        self.space = dict(act_space)
        self.classes = {k: action_classes(s) for k, s in self.space.items()}  # () where continuous
        self.sizes = {k: sum(self.classes[k]) or math.prod(s.shape) for k, s in self.space.items()}
        self.size = sum(self.sizes.values())
        # Plain numbers, so that `encode` copies nothing to a GPU.
        self.starts = {k: np.ravel(s.start).tolist() for k, s in self.space.items() if self.classes[k]}

    def encode(self, action: Mapping[str, Tensor]) -> Tensor:
        """{key: indices or values [..., *shape]} -> [..., A]."""
        parts = []
        for key, space in self.space.items():
            value = action[key]
            value = value.reshape(*value.shape[: value.dim() - len(space.shape)], -1)  # [..., numbers of key]
            if not self.classes[key]:
                parts.append(value.float())
                continue
            columns = zip(value.long().unbind(-1), self.starts[key], self.classes[key], strict=True)
            parts += [F.one_hot(column - start, classes).float() for column, start, classes in columns]
        return torch.cat(parts, -1)

    def decode(self, vector: Tensor) -> dict[str, np.ndarray]:
        """[..., A] -> the env's actions: int32 indices, float32 values."""
        out = {}
        for key, part in zip(self.sizes, vector.cpu().split(list(self.sizes.values()), -1), strict=True):
            space = self.space[key]
            if self.classes[key]:
                index = [column.argmax(-1) for column in part.split(self.classes[key], -1)]
                index = torch.stack(index, -1).reshape(*part.shape[:-1], *space.shape)
                out[key] = (index + torch.as_tensor(space.start)).to(torch.int32).numpy()
            else:
                out[key] = part.reshape(*part.shape[:-1], *space.shape).float().numpy()
        return out


# --- RSSM ----------------------------------------------------------------------------------------------


class RSSM(nn.Module):
    """The recurrent state-space model with a block-diagonal GRU (DreamerV3, Nature 2025, methods).

    `observe` follows data; `imagine` predicts one step. Everything that does not depend on the recurrent
    state is computed for all time steps at once, outside the scan.
    """

    def __init__(self, embed: int, action: int, config: Mapping):
        super().__init__()
        self.deter, self.stoch, self.classes = config.deter, config.stoch, config.classes
        self.hidden, self.blocks = config.hidden, config.blocks
        self.stoch_size = self.stoch * max(1, self.classes)  # flat
        self.feat_size = self.deter + self.stoch_size
        logits = self.stoch * (self.classes or 2)  # a mean and a standard deviation where Gaussian
        self.in_deter = Dense(self.deter, self.hidden)
        self.in_stoch = Dense(self.stoch_size, self.hidden)
        self.in_action = Dense(action, self.hidden)
        wide = self.deter + 3 * self.hidden * self.blocks
        self.dyn_first = BlockLinear(wide, self.deter, self.blocks)
        self.dyn_norm = RMSNormSiLU(self.deter)
        self.gru = BlockLinear(self.deter, 3 * self.deter, self.blocks)
        self.prior_net = nn.Sequential(mlp(self.deter, 2, self.hidden), Linear(self.hidden, logits))
        self.post_first = Linear(self.deter + embed, self.hidden)
        self.post_norm = RMSNormSiLU(self.hidden)
        self._split_key, self._split = None, None  # see split_weights
        self.post_out = Linear(self.hidden, logits)

    def initial(self, batch: int) -> State:
        """The zero state, in which every episode starts."""
        device = self.gru.bias.device
        shape = (batch, self.stoch, self.classes) if self.classes else (batch, self.stoch)
        deter = torch.zeros(batch, self.deter, device=device)
        return {"deter": deter, "stoch": torch.zeros(shape, device=device)}

    def noise(self, *batch: int, generator: torch.Generator | None) -> Tensor:
        """Random numbers for samples of shape `batch`: uniform [..., S, 1], or normal [..., S]."""
        device = self.gru.bias.device
        if self.classes:
            return torch.rand(*batch, self.stoch, 1, device=device, generator=generator)
        return torch.randn(*batch, self.stoch, device=device, generator=generator)

    def dist(self, logit: Tensor) -> dists.OneHot | dists.Normal:
        """Distribution of the latents from `logit` [..., S, K], or [..., S, 2] where Gaussian."""
        if self.classes:
            return dists.OneHot(logit, UNIMIX, dims=1)
        mean, raw_std = logit.float().unbind(-1)
        return dists.Normal(mean, 2 * torch.sigmoid(raw_std / 2) + MIN_STD)

    def feat(self, state: State) -> Tensor:
        """The heads' input [..., F]: deter and flat stoch, in the precision of matrix products."""
        dtype = fast.matmul_dtype(state["deter"].device)
        return torch.cat([state["deter"].to(dtype), self.flat(state["stoch"]).to(dtype)], -1)

    def flat(self, stoch: Tensor) -> Tensor:
        return stoch.flatten(-2) if self.classes else stoch  # [..., S*K]

    def split_weights(self) -> SplitWeights:
        """The weights of layers over concatenated inputs, split by input; once per scan, not at each step.

        Acting on a CPU needs them at each step: without gradients they are cached until a weight changes.
        """
        weights = self.dyn_first.weight, self.post_first.weight
        if torch.is_grad_enabled() or weights[0].device.type != "cpu":
            return fast.split_weights(*weights)
        # Each change in place raises a tensor's version.
        key = [(w.data_ptr(), w._version, fast.matmul_dtype(w.device)) for w in weights]
        if key != self._split_key:
            self._split_key, self._split = key, fast.split_weights(*weights)
        return self._split

    def action_input(self, action: Tensor, weights: SplitWeights) -> Tensor:
        """The action's [..., A] contribution to the GRU's first layer: [..., D]. Independent of the state."""
        action = action / action.detach().abs().clamp(min=1)
        return F.linear(self.in_action(action), weights.dyn_action)

    def core(self, state: State, action_input: Tensor, weights: SplitWeights) -> Tensor:
        """The next deter [B, D] from a state and `action_input` of the action taken in it."""
        deter = state["deter"]
        features = torch.cat([self.in_deter(deter), self.in_stoch(self.flat(state["stoch"]))], -1)
        x = block_matmul(deter, weights.dyn_own) + F.linear(features, weights.dyn_state, self.dyn_first.bias)
        x = self.dyn_norm(x + action_input)
        gates = self.gru(x).float().unflatten(-1, (self.blocks, 3, -1))  # [B, G, 3, D/G]
        reset, cand, update = (gate.flatten(-2) for gate in gates.unbind(-2))
        cand = torch.tanh(torch.sigmoid(reset) * cand)
        update = torch.sigmoid(update - 1)
        return update * cand + (1 - update) * deter

    def prior(self, deter: Tensor) -> Tensor:
        """The logit [..., S, K] of the next latents, predicted from deter alone."""
        return self.prior_net(deter).float().unflatten(-1, (self.stoch, -1))

    def embed_input(self, embed: Tensor, weights: SplitWeights) -> Tensor:
        """The observation's [..., E] contribution to the posterior's first layer: [..., hidden]."""
        return F.linear(embed, weights.post_embed, self.post_first.bias)

    def posterior(self, deter: Tensor, embed_input: Tensor, weights: SplitWeights) -> Tensor:
        """The logit [..., S, K] of the latents, given the observation as well."""
        x = F.linear(deter, weights.post_deter) + embed_input
        return self.post_out(self.post_norm(x)).float().unflatten(-1, (self.stoch, -1))

    def observe(
        self,
        state: State,
        embed: Tensor,
        prev_action: Tensor,
        is_first: Tensor,
        noise: Tensor,
        forced: Tensor | None = None,
    ) -> State:
        """Posterior states along data.

        state: before the first step [B, ...]; embed [B, T, E]; prev_action [B, T, A], the action that led to
        each step; is_first [B, T], where state and action are reset to zero; noise as from `noise(B, T)`.
        `forced` [B, T, S, K] replaces the samples. Returns deter, stoch, logit, each [B, T, ...].
        """
        if embed.device.type == "cpu" and self.hidden < BF16_HIDDEN:
            embed, scope = embed.float(), torch.autocast("cpu", enabled=False)
        else:
            scope = contextlib.nullcontext()
        deter, stoch, live = state["deter"], state["stoch"], ~is_first
        steps: dict[str, list[Tensor]] = {"deter": [], "stoch": [], "logit": []}
        with scope:
            weights = self.split_weights()
            action_inputs = self.action_input(prev_action * live[..., None], weights).unbind(1)
            inputs = zip(
                live.float().unbind(1), action_inputs, self.embed_input(embed, weights).unbind(1), strict=True
            )
            for t, step_inputs in enumerate(inputs):
                deter, logit = self.observe_step(deter, stoch, *step_inputs, weights)
                dist = self.dist(logit)
                stoch = dist.sample(noise[:, t]) if forced is None else dist.straight_through(forced[:, t])
                for key, value in (("deter", deter), ("stoch", stoch), ("logit", logit)):
                    steps[key].append(value)
            return {key: torch.stack(values, 1) for key, values in steps.items()}

    def observe_step(
        self,
        deter: Tensor,
        stoch: Tensor,
        live: Tensor,
        action_input: Tensor,
        embed_input: Tensor,
        weights: SplitWeights,
    ) -> tuple[Tensor, Tensor]:
        """One step of the scan: the new deter [B, D] and the posterior's logit; live [B] is 0 at is_first."""
        deter = deter * live[:, None]
        stoch = stoch * live.reshape(-1, *[1] * (stoch.dim() - 1))
        deter = self.core({"deter": deter, "stoch": stoch}, action_input, weights)
        return deter, self.posterior(deter, embed_input, weights)

    def imagine(self, state: State, action: Tensor, noise: Tensor, weights: SplitWeights) -> State:
        """One step of the prior: state [B, ...], action [B, A] taken in it, noise as from `noise(B)`."""
        deter = self.core(state, self.action_input(action, weights), weights)
        return {"deter": deter, "stoch": self.dist(self.prior(deter)).sample(noise)}

    def pack(self, state: State) -> tuple[Tensor, Tensor]:
        """State -> its form in the replay: deter float16 [..., D], stoch uint8 or float16 [..., S]."""
        stoch = state["stoch"]
        stoch = stoch.argmax(-1).to(torch.uint8) if self.classes else stoch.half()
        return state["deter"].half(), stoch

    def unpack(self, deter: Tensor, stoch: Tensor) -> State:
        """The inverse of `pack`; steps without latents (class NO_LATENT) become the zero state."""
        if self.classes:
            known = (stoch != NO_LATENT)[..., None]
            stoch = F.one_hot((stoch * known[..., 0]).long(), self.classes) * known
        return {"deter": deter.float(), "stoch": stoch.float()}


# --- Heads ---------------------------------------------------------------------------------------------


class TwoHotHead(nn.Module):
    """feat [..., F] -> a scalar's TwoHot distribution, 0 at first."""

    def __init__(self, inputs: int, config: Mapping, layers: int = 1):
        super().__init__()
        self.mlp = mlp(inputs, layers, config.units)
        self.out = Linear(config.units, config.bins, scale=0.0)
        self.symlog_space = config.dist == "symlog_disc"
        bins = torch.linspace(-20, 20, config.bins) if self.symlog_space else dists.symexp_bins(config.bins)
        self.register_buffer("bins", bins, persistent=False)

    def forward(self, feat: Tensor) -> dists.TwoHot:
        return dists.TwoHot(self.out(self.mlp(feat)), self.bins, self.symlog_space)


class BinaryHead(nn.Module):
    """feat [..., F] -> a Binary distribution."""

    def __init__(self, inputs: int, units: int):
        super().__init__()
        self.mlp = mlp(inputs, 1, units)
        self.out = Linear(units, 1)

    def forward(self, feat: Tensor) -> dists.Binary:
        return dists.Binary(self.out(self.mlp(feat)).squeeze(-1))


class Policy:
    """The joint distribution over the action vector [..., A], with independent parts: see `Actor.sizes`."""

    def __init__(self, parts: Sequence[dists.OneHot | dists.Normal], sizes: Sequence[int]):
        self.parts, self.sizes = list(parts), list(sizes)

    def sample(self, noise: PolicyNoise) -> Tensor:
        return torch.cat([part.sample(n) for part, n in zip(self.parts, noise, strict=True)], -1)

    @property
    def mode(self) -> Tensor:
        return torch.cat([part.mode for part in self.parts], -1)

    def log_prob(self, action: Tensor) -> Tensor:
        pairs = zip(self.parts, action.split(self.sizes, -1), strict=True)
        return sum(part.log_prob(value) for part, value in pairs)

    def entropy(self) -> Tensor:
        return sum(part.entropy() for part in self.parts)


class Actor(nn.Module):
    """feat [..., F] -> Policy."""

    def __init__(self, inputs: int, actions: ActionVector, config: Mapping):
        super().__init__()
        self.mlp = mlp(inputs, config.layers, config.units)
        self.unimix = config.unimix
        self.classes = list(actions.classes.values())  # of each key, () where continuous
        sizes = list(actions.sizes.values())
        # The policy has one part for each index, and one for the values of a continuous key.
        self.sizes = [part for own, size in zip(self.classes, sizes, strict=True) for part in own or (size,)]
        self.discrete = [bool(own) for own in self.classes for _ in own or (None,)]
        # A continuous action has two output layers, as in the reference: gradients are clipped per tensor.
        self.outs = nn.ModuleList(Linear(config.units, size, ACTOR_SCALE) for size in sizes)
        self.std_outs = nn.ModuleList(
            nn.Identity() if own else Linear(config.units, size, ACTOR_SCALE)
            for own, size in zip(self.classes, sizes, strict=True)
        )

    def noise(self, *batch: int, generator: torch.Generator | None) -> PolicyNoise:
        """Random numbers for a sample: per part uniform [..., 1] if discrete, else normal [..., size]."""
        device = self.outs[0].bias.device
        draw: dict[bool, Callable] = {True: torch.rand, False: torch.randn}
        return [
            draw[discrete](*batch, 1 if discrete else size, device=device, generator=generator)
            for discrete, size in zip(self.discrete, self.sizes, strict=True)
        ]

    def logits(self, feat: Tensor) -> tuple[Tensor, Tensor]:
        """The last layer [..., units], and the logits [..., A] of the only, discrete action."""
        hidden = self.mlp(feat)
        return hidden, self.outs[0](hidden).float()

    def forward(self, feat: Tensor) -> Policy:
        x = self.mlp(feat)
        parts: list[dists.OneHot | dists.Normal] = []
        for classes, out, std_out in zip(self.classes, self.outs, self.std_outs, strict=True):
            if classes:
                parts += [dists.OneHot(logits, self.unimix) for logits in out(x).split(classes, -1)]
            else:
                parts.append(dists.bounded_normal(out(x), std_out(x), *ACTION_STD))
        return Policy(parts, self.sizes)


# --- Audio ---------------------------------------------------------------------------------------------


class AudioEncoder(nn.Module):
    """Audio keys [..., *shape] -> [..., E]: an MLP, or with `audio_net: cnn` convolutions over spectra."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], config: Mapping):
        super().__init__()
        self.shapes = dict(shapes)
        self.spectra = [k for k, s in shapes.items() if config.audio_net == "cnn" and len(s) > 1]
        self.flat = [key for key in shapes if key not in self.spectra]
        self.size = 0
        if self.flat:
            inputs = sum(math.prod(shapes[key]) for key in self.flat)
            self.mlp = mlp(inputs, config.mlp_layers, config.mlp_units)
            self.size += config.mlp_units
        self.cnns = nn.ModuleList(SpectrumEncoder(key, shapes[key], config) for key in self.spectra)
        self.size += sum(cnn.size for cnn in self.cnns)

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        """`obs` holds squashed values."""
        outs = []
        if self.flat:
            parts = [obs[key].flatten(obs[key].dim() - len(self.shapes[key])) for key in self.flat]
            outs.append(self.mlp(torch.cat(parts, -1)))
        outs += [cnn(obs[key]) for key, cnn in zip(self.spectra, self.cnns, strict=True)]
        return torch.cat(outs, -1)  # [..., E]


class SpectrumEncoder(nn.Module):
    """Spectra [..., F, N] or [..., C, F, N] -> [..., E]: each strided convolution halves bands and frames."""

    def __init__(self, key: str, shape: tuple[int, ...], config: Mapping):
        super().__init__()
        channels, bands, frames = (1, *shape) if len(shape) == 2 else shape
        depths = [config.cnn_depth * mult for mult in AUDIO_MULTS]
        factor = 2 ** len(depths)
        if min(bands, frames) < factor:
            raise UserError(
                f"encoder.audio_net cnn halves spectra {len(depths)} times, too often for the {bands} bands "
                f"x {frames} frames of {key!r}: use --encoder.audio_net mlp"
            )
        self.dims = len(shape)
        self.convs = nn.ModuleList(
            Conv(i, o, KERNEL, 2) for i, o in zip([channels, *depths[:-1]], depths, strict=True)
        )
        self.norms = nn.ModuleList(RMSNormSiLU(d) for d in depths)
        self.size = (bands // factor) * (frames // factor) * depths[-1]

    def forward(self, spectra: Tensor) -> Tensor:
        batch = spectra.shape[: spectra.dim() - self.dims]
        x = spectra if self.dims == 3 else spectra[..., None, :, :]
        x = x.flatten(0, len(batch) - 1)  # [N, C, F, frames]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = channel_norm_silu(norm, conv(x))
        return x.flatten(1).unflatten(0, batch)
