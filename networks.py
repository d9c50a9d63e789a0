"""The networks of DreamerV3: layers, encoder, decoder, RSSM, heads and actor. They know nothing of losses.

Letters of the shapes: B batch, T time, A action size, S latent variables, K classes, D deter, E embed,
F feat, G blocks; `...` are batch dimensions. A state is a dict of `deter` [..., D] and `stoch`, which is
one-hot [..., S, K], or [..., S] where the latents are Gaussian (`classes: 0`).
Initialisation and layout follow danijar/dreamerv3 at e3f0224; the golden values hold them to it.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distributions as dists
from basics import UserError

State = dict[str, Tensor]
RMS_EPS = 1e-4  # of the reference's normalisation
TRUNCATED_STD = 1.1368  # a unit normal cut at 2 sigma has a standard deviation of 1 / 1.1368
CHUNK = 1 << 18  # numbers (1 MiB) that stay in a CPU's cache from one operation to the next
BF16_HIDDEN = 128  # a CPU multiplies the few rows of a scan's step by fewer columns faster in float32
NO_LATENT = 255  # the class index that the replay stores for "no latents": the zero state


def init_(weight: Tensor, fan_in: int, scale: float = 1.0) -> Tensor:
    """Fill with a normal cut at 2 sigma whose variance after the cut is scale^2 / fan_in."""
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
    """G linear layers side by side: block g of the input leads to block g of the output."""

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


def fused_by_torch(x: Tensor) -> bool:
    """Whether torch fuses chains of operations on `x` by itself, or runs them one by one: CPU, uncompiled."""
    return x.device.type != "cpu" or torch.compiler.is_compiling()


def chunks(rows: int, row_size: int) -> Iterator[slice]:
    """Slices that cover `rows`, each of about CHUNK numbers if a row has `row_size`."""
    step = max(1, CHUNK // row_size)
    return (slice(start, start + step) for start in range(0, rows, step))


def matmul_dtype(device: torch.device) -> torch.dtype:
    """The precision of matrix products here: autocast's where it is on, else float32."""
    mixed = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if mixed else torch.float32


def rms_norm_silu(x: Tensor, weight: Tensor) -> Tensor:
    """Root-mean-square normalisation over the last dimension, then SiLU; in float32."""
    return F.silu(F.rms_norm(x.float(), weight.shape, weight, RMS_EPS))


class ChunkedNormSiLU(torch.autograd.Function):
    """`rms_norm_silu` for CPUs, where torch computes it in ten passes over memory and keeps five tensors.

    Here chunks that fit into the cache go through all of it, forward and backward, and only the input is
    kept: less than half of the time. The result is rounded to `dtype` (the next layer's, under autocast).
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = torch.empty_like(rows, dtype=dtype)
        scale = torch.empty(len(rows), 1)
        for part in chunks(len(rows), rows.shape[-1]):
            chunk = rows[part].float()
            norm = torch.linalg.vector_norm(chunk, dim=-1, keepdim=True)
            scale[part] = norm.square_().div_(rows.shape[-1]).add_(RMS_EPS).rsqrt_()
            out[part] = F.silu((chunk * scale[part]).mul_(weight), inplace=True)
        ctx.save_for_backward(x, weight, scale)
        return out.view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1])
        grads = grad.reshape(rows.shape)
        grad_rows, grad_weight = torch.empty_like(rows), torch.zeros_like(weight)
        for part in chunks(len(rows), rows.shape[-1]):
            normed = rows[part] * scale[part]
            # With n = normed and y = n * weight: dL/dx = scale * (dL/dn - n * mean(n * dL/dn)).
            grad_y = torch.ops.aten.silu_backward(grads[part].float(), normed * weight)
            grad_normed = grad_y * weight
            product = grad_y.mul_(normed)
            grad_weight += product.sum(0)
            mean = (product @ weight).div_(rows.shape[-1])[:, None]
            grad_rows[part] = grad_normed.sub_(normed.mul_(mean)).mul_(scale[part])
        return grad_rows.view(grad.shape), grad_weight, None


class RMSNormSiLU(nn.Module):
    """`rms_norm_silu` with a learned weight."""

    def __init__(self, units: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(units))

    def forward(self, x: Tensor) -> Tensor:
        if fused_by_torch(x):
            return rms_norm_silu(x, self.weight)
        return ChunkedNormSiLU.apply(x, self.weight, matmul_dtype(x.device))


class Dense(nn.Sequential):
    """Linear, normalisation, SiLU: the block from which all MLPs are made."""

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
        # The reference pads as XLA does: for stride 2 one pixel less at the low side.
        total = kernel - stride
        self.padding = (total // 2, total - total // 2) * 2
        init_(self.weight, inputs * kernel * kernel, scale)

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.padding[:2]
        if low == high:
            return F.conv2d(x, self.weight, self.bias, self.stride, low)
        return F.conv2d(F.pad(x, self.padding), self.weight, self.bias, self.stride)


# How a 5x5 kernel over an image that was doubled in size meets the pixels of the small image: entry
# [p, a, k] is 1 where output pixel 2i + p sees the small pixel i - 1 + a through tap k.
DOUBLED_BY_REPEAT = [
    [[1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]],
    [[1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1]],
]
DOUBLED_BY_ZEROS = [
    [[0, 1, 0, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]],
    [[1, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 1]],
]


class UpConv(nn.Module):
    """Doubles [N, C, H, W] in size, then a 5x5 convolution: [N, outputs, 2H, 2W].

    Doubling repeats pixels, or with `strided` puts zeros between them (a transposed convolution).
    Three of four products of that would be repetitions or zeros. So each of the four output phases is
    computed from the small image by a 3x3 kernel, the sum of the taps that meet the same small pixel.
    """

    def __init__(self, inputs: int, outputs: int, strided: bool = False, scale: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 5, 5))
        self.bias = nn.Parameter(torch.zeros(outputs))
        taps = DOUBLED_BY_ZEROS if strided else DOUBLED_BY_REPEAT
        self.register_buffer("taps", torch.tensor(taps, dtype=torch.float32), persistent=False)
        init_(self.weight, inputs * 25, scale)

    def phase_kernel(self) -> Tensor:
        """The 3x3 kernels of the four phases (p, q): [2 * 2 * outputs, inputs, 3, 3]."""
        outputs, inputs = self.weight.shape[:2]
        rows = torch.einsum("pak,oikl->poial", self.taps, self.weight)
        both = torch.einsum("qbl,poial->pqoiab", self.taps, rows)
        return both.reshape(4 * outputs, inputs, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        phases = F.conv2d(x, self.phase_kernel(), self.bias.repeat(4), padding=1)  # [N, 2*2*C, H, W]
        phases = phases.permute(0, 2, 3, 1).unflatten(-1, (2, 2, -1))  # [N, H, W, 2, 2, C]
        # With channels last, rows of 2 C numbers are copied: 6 times faster than pixel_shuffle.
        image = phases.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # [N, 2H, 2W, C]
        return image.permute(0, 3, 1, 2)


class ChunkedMaxPool(torch.autograd.Function):
    """`F.max_pool2d(x, 2)` for CPUs, without the memory: torch keeps the input and int64 indices.

    A few images at a time, so that the int64 indices do not leave the cache; int32 ones are kept.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        count, channels, height, width = x.shape
        shape = (count, channels, height // 2, width // 2)
        out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        indices = torch.empty(shape, dtype=torch.int32, memory_format=torch.channels_last)
        for part in chunks(count, math.prod(x.shape[1:])):
            out[part], indices[part] = F.max_pool2d_with_indices(x[part], 2)
        ctx.save_for_backward(indices)
        ctx.shape = x.shape
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (indices,) = ctx.saved_tensors
        backward = torch.ops.aten.max_pool2d_with_indices_backward.grad_input
        out = torch.empty(ctx.shape, dtype=grad.dtype, memory_format=torch.channels_last)
        for part in chunks(len(out), math.prod(ctx.shape[1:])):
            # Of the input (the second argument) it reads the shape only.
            window = [2, 2], [2, 2], [0, 0], [1, 1], False
            backward(grad[part], out[part], *window, indices[part].long(), grad_input=out[part])
        return out


def max_pool(x: Tensor) -> Tensor:
    """Halve [N, C, H, W] by the largest of 2x2 pixels."""
    if fused_by_torch(x):
        return F.max_pool2d(x, 2)
    return ChunkedMaxPool.apply(x)


def channel_norm_silu(norm: RMSNormSiLU, x: Tensor) -> Tensor:
    """Normalise [N, C, H, W] over its channels; a view, where channels are last in memory."""
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


# --- Observations --------------------------------------------------------------------------------------


class Keys(NamedTuple):
    """The observation keys that a network reads or writes, with their shapes, each kind in sorted order."""

    vectors: dict[str, tuple[int, ...]]
    images: dict[str, tuple[int, int, int]]
    audio: dict[str, tuple[int, ...]]


NOT_OBSERVED = ("reward", "is_first", "is_last", "is_terminal", "discount", "symbolic")


def route_keys(obs_space: Mapping[str, gymnasium.Space], config: Mapping) -> Keys:
    """Sort observation keys by shape and full-match regular expression: audio, then images, then vectors.

    Images are uint8 [H, W, C]. Audio is a vector [D] or spectra [..., F, N]; waveforms have become spectra
    before (`audio.Hearing`). `log_*` keys, flags and the reward are never routed.
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
    """Observation keys that a network with these `keys` passes over; `log_*`, flags and reward aside."""
    candidates = {key for key in obs_space if key not in NOT_OBSERVED and not key.startswith("log_")}
    return sorted(candidates.difference(*keys))


class ImageEncoder(nn.Module):
    """uint8 images [N, H, W, C] -> [N, E]: each convolution halves the resolution."""

    def __init__(
        self, shape: tuple[int, int, int], depth: int, mults: Sequence[int], kernel: int, strided: bool
    ):
        super().__init__()
        height, width, channels = shape
        depths = [depth * mult for mult in mults]
        self.convs = nn.ModuleList(
            Conv(i, o, kernel, 2 if strided else 1)
            for i, o in zip([channels, *depths[:-1]], depths, strict=True)
        )
        self.norms = nn.ModuleList(RMSNormSiLU(d) for d in depths)
        self.strided = strided
        factor = 2 ** len(depths)
        self.size = (height // factor) * (width // factor) * depths[-1]

    def forward(self, image: Tensor) -> Tensor:
        x = image.permute(0, 3, 1, 2).float() / 255 - 0.5  # [N, C, H, W], channels last in memory
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = conv(x)
            if not self.strided:
                x = max_pool(x)
            x = channel_norm_silu(norm, x)
        return x.permute(0, 2, 3, 1).flatten(1)  # [N, E], in the order height, width, channel


class MultiEncoder(nn.Module):
    """Observations -> embed [..., E]: vectors and audio through symlog and MLPs, images by convolutions."""

    def __init__(self, obs_space: Mapping[str, gymnasium.Space], config: Mapping):
        super().__init__()
        self.keys = route_keys(obs_space, config)
        self.squash = dists.symlog if config.symlog_inputs else (lambda x: x)
        self.size = 0
        if self.keys.vectors:
            inputs = sum(math.prod(shape) for shape in self.keys.vectors.values())
            self.mlp = mlp(inputs, config.mlp_layers, config.mlp_units)
            self.size += config.mlp_units
        if self.keys.images:
            shape = stacked_shape(self.keys.images)
            self.cnn = ImageEncoder(
                shape, config.cnn_depth, config.cnn_mults, config.cnn_kernel, config.strided
            )
            self.size += self.cnn.size
        if self.keys.audio:
            self.audio = AudioEncoder(self.keys.audio, config)
            self.size += self.audio.size

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        outs = []
        batch = obs["is_first"].shape
        if self.keys.vectors:
            parts = [obs[k].float().reshape(*batch, -1) for k in self.keys.vectors]
            outs.append(self.mlp(self.squash(torch.cat(parts, -1))))
        if self.keys.images:
            image = torch.cat([obs[k] for k in self.keys.images], -1)  # [..., H, W, C]
            outs.append(self.cnn(image.flatten(0, len(batch) - 1)).unflatten(0, batch))
        if self.keys.audio:
            outs.append(self.audio({k: self.squash(obs[k].float()) for k in self.keys.audio}))
        return torch.cat(outs, -1)  # [..., E]


def stacked_shape(images: Mapping[str, tuple[int, int, int]]) -> tuple[int, int, int]:
    """Shape of all images stacked along their channels; a ValueError where heights or widths differ."""
    sizes = {shape[:2] for shape in images.values()}
    if len(sizes) > 1:
        raise ValueError(f"images must have one height and width, but they are {dict(images)}")
    return (*sizes.pop(), sum(shape[2] for shape in images.values()))


class ImageDecoder(nn.Module):
    """State -> images in [0, 1], [N, H, W, C]: a small feature map, then layers that double it."""

    def __init__(self, shape: tuple[int, int, int], deter: int, stoch: int, config: Mapping):
        super().__init__()
        height, width, channels = shape
        depths = [config.cnn_depth * mult for mult in config.cnn_mults]
        factor = 2 ** len(depths)
        self.small = (height // factor, width // factor, depths[-1])
        size = math.prod(self.small)
        self.blocks = config.bspace
        self.from_deter = BlockLinear(deter, size, self.blocks)
        self.from_stoch = nn.Sequential(
            Dense(stoch, 2 * config.mlp_units), Linear(2 * config.mlp_units, size)
        )
        self.norm = RMSNormSiLU(depths[-1])
        widths = depths[::-1]  # from the smallest map to the largest
        self.convs = nn.ModuleList(
            UpConv(i, o, config.strided) for i, o in zip(widths[:-1], widths[1:], strict=True)
        )
        self.norms = nn.ModuleList(RMSNormSiLU(d) for d in widths[1:])
        self.out = UpConv(widths[-1], channels, config.strided, config.outscale)

    def forward(self, deter: Tensor, stoch: Tensor) -> Tensor:
        height, width, depth = self.small
        x = self.from_deter(deter).reshape(-1, self.blocks, height, width, depth // self.blocks)
        x = x.permute(0, 2, 3, 1, 4).flatten(3)  # [N, h, w, depth]: blocks lie side by side in the channels
        x = x + self.from_stoch(stoch).reshape(-1, height, width, depth)
        x = self.norm(x).permute(0, 3, 1, 2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = channel_norm_silu(norm, conv(x))
        return torch.sigmoid(self.out(x).float()).permute(0, 2, 3, 1)  # [N, H, W, C]


class MultiDecoder(nn.Module):
    """State -> a distribution for each reconstructed observation key."""

    def __init__(self, obs_space: Mapping[str, gymnasium.Space], deter: int, stoch: int, config: Mapping):
        super().__init__()
        self.keys = route_keys(obs_space, config)
        self.squash = config.vector_dist == "symlog_mse"
        if self.keys.vectors:
            outputs = sum(math.prod(shape) for shape in self.keys.vectors.values())
            self.mlp = mlp(stoch + deter, config.mlp_layers, config.mlp_units)
            self.vector = Linear(config.mlp_units, outputs, config.outscale)
        if self.keys.images:
            self.cnn = ImageDecoder(stacked_shape(self.keys.images), deter, stoch, config)
        if self.keys.audio:
            layers, units = audio_mlp_size(config)
            outputs = sum(math.prod(shape) for shape in self.keys.audio.values())
            self.audio = nn.Sequential(
                mlp(stoch + deter, layers, units), Linear(units, outputs, config.outscale)
            )

    def forward(self, deter: Tensor, stoch: Tensor) -> dict[str, dists.MSE]:
        """deter [..., D], flat stoch [..., S*K] -> {key: distribution}; vectors and audio are flat."""
        outs, batch = {}, deter.shape[:-1]
        if self.keys.vectors:
            x = self.vector(self.mlp(torch.cat([stoch, deter], -1)))
            sizes = [math.prod(shape) for shape in self.keys.vectors.values()]
            for key, part in zip(self.keys.vectors, x.split(sizes, -1), strict=True):
                outs[key] = dists.MSE(part, 1, self.squash)
        if self.keys.images:
            x = self.cnn(deter.flatten(0, -2), stoch.flatten(0, -2)).unflatten(0, batch)
            sizes = [shape[2] for shape in self.keys.images.values()]
            for key, part in zip(self.keys.images, x.split(sizes, -1), strict=True):
                outs[key] = dists.MSE(part, 3)
        if self.keys.audio:
            x = self.audio(torch.cat([stoch, deter], -1))
            sizes = [math.prod(shape) for shape in self.keys.audio.values()]
            for key, part in zip(self.keys.audio, x.split(sizes, -1), strict=True):
                outs[key] = dists.MSE(part, 1, self.squash)
        return outs


# --- Actions -------------------------------------------------------------------------------------------


def action_classes(space: gymnasium.Space) -> tuple[int, ...]:
    """How many choices each index of an action has: (n,) of Discrete, nvec of MultiDiscrete, () of Box."""
    if isinstance(space, gymnasium.spaces.Discrete):
        return (int(space.n),)
    if isinstance(space, gymnasium.spaces.MultiDiscrete):
        return tuple(int(n) for n in space.nvec.flat)
    return ()


class ActionVector:
    """The dict of actions as one float vector [..., A]: each index one-hot, continuous values as they are."""

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
        """[..., A] -> what the env takes: int32 indices, float32 values."""
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


class SplitWeights(NamedTuple):
    """Parts of the RSSM's weights by the input that they multiply."""

    dyn_own: Tensor  # [G, D / G, D / G] a block's own deter -> the block
    dyn_state: Tensor  # [D, 2 hidden] features of deter and stoch -> all blocks
    dyn_action: Tensor  # [D, hidden] features of the action -> all blocks
    post_deter: Tensor  # [hidden, D]
    post_embed: Tensor  # [hidden, E]


class RSSM(nn.Module):
    """The recurrent state-space model with a block-diagonal GRU (DreamerV3, Nature 2025, methods).

    `observe` follows data, `imagine` one step of its own prediction. Whatever does not depend on the
    recurrent state is computed for all time steps at once, outside the scan.
    """

    def __init__(self, embed: int, action: int, config: Mapping):
        super().__init__()
        self.deter, self.stoch, self.classes = config.deter, config.stoch, config.classes
        self.hidden, self.blocks = config.hidden, config.blocks
        self.unimix, self.min_std = config.unimix, config.min_std
        self.stoch_size = self.stoch * max(1, self.classes)  # flat
        self.feat_size = self.deter + self.stoch_size
        logits = self.stoch * (self.classes or 2)  # a mean and a standard deviation where Gaussian
        self.in_deter = Dense(self.deter, self.hidden)
        self.in_stoch = Dense(self.stoch_size, self.hidden)
        self.in_action = Dense(action, self.hidden)
        wide = self.deter + 3 * self.hidden * self.blocks
        self.dyn_first = BlockLinear(wide, self.deter, self.blocks)
        self.dyn_norm = RMSNormSiLU(self.deter)
        self.dyn_more = nn.Sequential()
        for _ in range(config.dyn_layers - 1):
            self.dyn_more.append(BlockLinear(self.deter, self.deter, self.blocks))
            self.dyn_more.append(RMSNormSiLU(self.deter))
        self.gru = BlockLinear(self.deter, 3 * self.deter, self.blocks)
        self.prior_net = nn.Sequential(
            mlp(self.deter, config.img_layers, self.hidden), Linear(self.hidden, logits)
        )
        self.post_first = Linear(self.deter + embed, self.hidden)
        self.post_norm = RMSNormSiLU(self.hidden)
        self._cut_key, self._cut = None, None  # see split_weights
        self.post_rest = nn.Sequential(
            mlp(self.hidden, config.obs_layers - 1, self.hidden), Linear(self.hidden, logits)
        )

    def initial(self, batch: int) -> State:
        """The zero state, from which every episode starts."""
        device = self.gru.bias.device
        shape = (batch, self.stoch, self.classes) if self.classes else (batch, self.stoch)
        return {
            "deter": torch.zeros(batch, self.deter, device=device),
            "stoch": torch.zeros(shape, device=device),
        }

    def noise(self, *batch: int, generator: torch.Generator | None) -> Tensor:
        """The random numbers that samples of `batch` shape take: uniform [..., S, 1], or normal [..., S]."""
        device = self.gru.bias.device
        if self.classes:
            return torch.rand(*batch, self.stoch, 1, device=device, generator=generator)
        return torch.randn(*batch, self.stoch, device=device, generator=generator)

    def dist(self, logit: Tensor) -> dists.OneHot | dists.Normal:
        """Distribution of the latents from `logit` [..., S, K], or [..., S, 2] where Gaussian."""
        if self.classes:
            return dists.OneHot(logit, self.unimix, dims=1)
        mean, raw_std = logit.float().unbind(-1)
        return dists.Normal(mean, 2 * torch.sigmoid(raw_std / 2) + self.min_std)

    def feat(self, state: State) -> Tensor:
        """What heads read: [..., F] = deter and flat stoch, in the precision of matrix products."""
        dtype = matmul_dtype(state["deter"].device)
        return torch.cat([state["deter"].to(dtype), self.flat(state["stoch"]).to(dtype)], -1)

    def flat(self, stoch: Tensor) -> Tensor:
        return stoch.flatten(-2) if self.classes else stoch  # [..., S*K]

    def split_weights(self) -> "SplitWeights":
        """The weights of layers over concatenated inputs, cut by input; once per scan, not at each step.

        A CPU that acts needs them at each step: there the last ones are kept as long as they are valid.
        """
        weights = self.dyn_first.weight, self.post_first.weight
        if torch.is_grad_enabled() or weights[0].device.type != "cpu":
            return self._cut_weights()
        # Each change in place raises a tensor's version.
        key = [(w.data_ptr(), w._version, matmul_dtype(w.device)) for w in weights]
        if key != self._cut_key:
            self._cut_key, self._cut = key, self._cut_weights()
        return self._cut

    def _cut_weights(self) -> "SplitWeights":
        own = self.deter // self.blocks
        # The reference repeats the (deter, stoch, action) features for each block and concatenates them to
        # the block's deter. As all blocks see the same features, their part is one dense product.
        shared = self.dyn_first.weight[:, own:].transpose(1, 2).reshape(self.deter, 3 * self.hidden)
        state, action = shared.split([2 * self.hidden, self.hidden], 1)
        deter, embed = self.post_first.weight.split([self.deter, self.post_first.in_features - self.deter], 1)
        parts = self.dyn_first.weight[:, :own].contiguous(), state, action, deter, embed
        if not torch.is_grad_enabled():  # with gradients, each step's is rounded and summed in float32
            parts = [part.to(matmul_dtype(part.device)) for part in parts]
        return SplitWeights(*parts)

    def action_input(self, action: Tensor, weights: "SplitWeights") -> Tensor:
        """What an action [..., A] adds to the GRU's first layer: [..., D]. Independent of the state."""
        action = action / action.detach().abs().clamp(min=1)
        return F.linear(self.in_action(action), weights.dyn_action)

    def core(self, state: State, action_input: Tensor, weights: "SplitWeights") -> Tensor:
        """The next deter [B, D] from a state and `action_input` of the action taken in it."""
        deter = state["deter"]
        features = torch.cat([self.in_deter(deter), self.in_stoch(self.flat(state["stoch"]))], -1)
        x = block_matmul(deter, weights.dyn_own) + F.linear(features, weights.dyn_state, self.dyn_first.bias)
        x = self.dyn_more(self.dyn_norm(x + action_input))
        gates = self.gru(x).float().unflatten(-1, (self.blocks, 3, -1))  # [B, G, 3, D/G]
        reset, cand, update = (gate.flatten(-2) for gate in gates.unbind(-2))
        cand = torch.tanh(torch.sigmoid(reset) * cand)
        update = torch.sigmoid(update - 1)
        return update * cand + (1 - update) * deter

    def prior(self, deter: Tensor) -> Tensor:
        """The logit [..., S, K] of the next latents, predicted from deter alone."""
        return self.prior_net(deter).float().unflatten(-1, (self.stoch, -1))

    def embed_input(self, embed: Tensor, weights: "SplitWeights") -> Tensor:
        """What an observation [..., E] adds to the posterior's first layer: [..., hidden]."""
        return F.linear(embed, weights.post_embed, self.post_first.bias)

    def posterior(self, deter: Tensor, embed_input: Tensor, weights: "SplitWeights") -> Tensor:
        """The logit [..., S, K] of the latents given the observation too."""
        x = F.linear(deter, weights.post_deter) + embed_input
        return self.post_rest(self.post_norm(x)).float().unflatten(-1, (self.stoch, -1))

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

        state: of the step before [B, ...]; embed [B, T, E]; prev_action [B, T, A], the action that led to
        each step; is_first [B, T], where state and action are zeroed first; noise as `noise(B, T)` gives.
        `forced` [B, T, S, K] takes the place of the samples. Returns deter, stoch, logit, each [B, T, ...].
        """
        if embed.device.type == "cpu" and self.hidden < BF16_HIDDEN:
            embed, scope = embed.float(), torch.autocast("cpu", enabled=False)
        else:
            scope = contextlib.nullcontext()
        with scope:
            return self._observe(state, embed, prev_action, is_first, noise, forced)

    def _observe(
        self, state: State, embed: Tensor, prev_action: Tensor, is_first: Tensor, noise: Tensor, forced
    ) -> State:
        live = ~is_first
        weights = self.split_weights()
        action_inputs = self.action_input(prev_action * live[..., None], weights).unbind(1)
        embed_inputs = self.embed_input(embed, weights).unbind(1)
        lives = live.float().unbind(1)
        deter, stoch = state["deter"], state["stoch"]
        deters, stochs, logits = [], [], []
        for t in range(is_first.shape[1]):
            deter, logit = self.observe_step(
                deter, stoch, lives[t], action_inputs[t], embed_inputs[t], weights
            )
            dist = self.dist(logit)
            stoch = dist.sample(noise[:, t]) if forced is None else dist.straight_through(forced[:, t])
            deters.append(deter)
            stochs.append(stoch)
            logits.append(logit)
        return {
            "deter": torch.stack(deters, 1),
            "stoch": torch.stack(stochs, 1),
            "logit": torch.stack(logits, 1),
        }

    def observe_step(
        self,
        deter: Tensor,
        stoch: Tensor,
        live: Tensor,
        action_input: Tensor,
        embed_input: Tensor,
        weights: "SplitWeights",
    ) -> tuple[Tensor, Tensor]:
        """One step of the scan: the new deter [B, D] and the posterior's logit; live [B] is 0 at is_first."""
        deter = deter * live[:, None]
        stoch = stoch * live.reshape(-1, *[1] * (stoch.dim() - 1))
        deter = self.core({"deter": deter, "stoch": stoch}, action_input, weights)
        return deter, self.posterior(deter, embed_input, weights)

    def imagine(self, state: State, action: Tensor, noise: Tensor, weights: "SplitWeights") -> State:
        """One step of the prior: state [B, ...], action [B, A] taken in it, noise as `noise(B)` gives."""
        deter = self.core(state, self.action_input(action, weights), weights)
        return {"deter": deter, "stoch": self.dist(self.prior(deter)).sample(noise)}

    def pack(self, state: State) -> tuple[Tensor, Tensor]:
        """State -> what the replay stores: deter float16 [..., D], stoch uint8 or float16 [..., S]."""
        stoch = state["stoch"]
        stoch = stoch.argmax(-1).to(torch.uint8) if self.classes else stoch.half()
        return state["deter"].half(), stoch

    def unpack(self, deter: Tensor, stoch: Tensor) -> State:
        """The inverse of pack; steps without latents (class NO_LATENT) become the zero state."""
        if self.classes:
            known = (stoch != NO_LATENT)[..., None]
            stoch = F.one_hot((stoch * known[..., 0]).long(), self.classes) * known
        return {"deter": deter.float(), "stoch": stoch.float()}


# --- Heads ---------------------------------------------------------------------------------------------


class TwoHotHead(nn.Module):
    """feat [..., F] -> a scalar's TwoHot distribution."""

    def __init__(self, inputs: int, config: Mapping):
        super().__init__()
        self.mlp = mlp(inputs, config.layers, config.units)
        self.out = Linear(config.units, config.bins, config.outscale)
        self.symlog_space = config.dist == "symlog_disc"
        bins = torch.linspace(-20, 20, config.bins) if self.symlog_space else dists.symexp_bins(config.bins)
        self.register_buffer("bins", bins, persistent=False)

    def forward(self, feat: Tensor) -> dists.TwoHot:
        return dists.TwoHot(self.out(self.mlp(feat)), self.bins, self.symlog_space)


class BinaryHead(nn.Module):
    """feat [..., F] -> a Binary distribution."""

    def __init__(self, inputs: int, config: Mapping):
        super().__init__()
        self.mlp = mlp(inputs, config.layers, config.units)
        self.out = Linear(config.units, 1, config.outscale)

    def forward(self, feat: Tensor) -> dists.Binary:
        return dists.Binary(self.out(self.mlp(feat)).squeeze(-1))


class Policy:
    """The joint distribution over the action vector [..., A], of independent parts: see `Actor.sizes`."""

    def __init__(self, parts: Sequence[dists.OneHot | dists.Normal], sizes: Sequence[int]):
        self.parts, self.sizes = list(parts), list(sizes)

    def sample(self, noise: "PolicyNoise") -> Tensor:
        return torch.cat([part.sample(n) for part, n in zip(self.parts, noise, strict=True)], -1)

    @property
    def mode(self) -> Tensor:
        return torch.cat([part.mode for part in self.parts], -1)

    def log_prob(self, action: Tensor) -> Tensor:
        pairs = zip(self.parts, action.split(self.sizes, -1), strict=True)
        return sum(part.log_prob(value) for part, value in pairs)

    def entropy(self) -> Tensor:
        return sum(part.entropy() for part in self.parts)


PolicyNoise = list[Tensor]


class Actor(nn.Module):
    """feat [..., F] -> Policy."""

    def __init__(self, inputs: int, actions: ActionVector, config: Mapping):
        super().__init__()
        self.mlp = mlp(inputs, config.layers, config.units)
        self.unimix, self.min_std, self.max_std = config.unimix, config.min_std, config.max_std
        self.classes = list(actions.classes.values())  # of each key, () where continuous
        sizes = list(actions.sizes.values())
        # The policy has one part for each index and one for the values of a continuous key.
        self.sizes = [part for own, size in zip(self.classes, sizes, strict=True) for part in own or (size,)]
        self.discrete = [bool(own) for own in self.classes for _ in own or (None,)]
        # A continuous action has two output layers, as in the reference: clipping is per tensor.
        self.outs = nn.ModuleList(Linear(config.units, size, config.outscale) for size in sizes)
        self.std_outs = nn.ModuleList(
            nn.Identity() if own else Linear(config.units, size, config.outscale)
            for own, size in zip(self.classes, sizes, strict=True)
        )

    def noise(self, *batch: int, generator: torch.Generator | None) -> PolicyNoise:
        """What a sample takes: for each part uniform [..., 1] where discrete, else normal [..., size]."""
        device = self.outs[0].bias.device
        draw: dict[bool, Callable] = {True: torch.rand, False: torch.randn}
        return [
            draw[discrete](*batch, 1 if discrete else size, device=device, generator=generator)
            for discrete, size in zip(self.discrete, self.sizes, strict=True)
        ]

    def forward(self, feat: Tensor) -> Policy:
        x = self.mlp(feat)
        parts: list[dists.OneHot | dists.Normal] = []
        for classes, out, std_out in zip(self.classes, self.outs, self.std_outs, strict=True):
            if classes:
                parts += [dists.OneHot(logits, self.unimix) for logits in out(x).split(classes, -1)]
            else:
                parts.append(dists.bounded_normal(out(x), std_out(x), self.min_std, self.max_std))
        return Policy(parts, self.sizes)


# --- Audio ---------------------------------------------------------------------------------------------


class AudioEncoder(nn.Module):
    """Audio keys [..., *shape] -> [..., E] through an MLP; with `audio_net: cnn` spectra by convolutions."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], config: Mapping):
        super().__init__()
        self.shapes = dict(shapes)
        self.spectra = [k for k, s in shapes.items() if config.audio_net == "cnn" and len(s) > 1]
        self.flat = [key for key in shapes if key not in self.spectra]
        self.size = 0
        if self.flat:
            inputs = sum(math.prod(shapes[key]) for key in self.flat)
            layers, units = audio_mlp_size(config)
            self.mlp = mlp(inputs, layers, units)
            self.size += units
        self.cnns = nn.ModuleList(SpectrumEncoder(key, shapes[key], config) for key in self.spectra)
        self.size += sum(cnn.size for cnn in self.cnns)

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        """obs holds squashed values."""
        outs = []
        if self.flat:
            parts = [obs[key].flatten(obs[key].dim() - len(self.shapes[key])) for key in self.flat]
            outs.append(self.mlp(torch.cat(parts, -1)))
        outs += [cnn(obs[key]) for key, cnn in zip(self.spectra, self.cnns, strict=True)]
        return torch.cat(outs, -1)  # [..., E]


def audio_mlp_size(config: Mapping) -> tuple[int, int]:
    """Layers and units of the audio MLP: those of the vectors' where the config gives none."""
    layers, units = config.audio_layers, config.audio_units
    return config.mlp_layers if layers is None else layers, config.mlp_units if units is None else units


class SpectrumEncoder(nn.Module):
    """Spectra [..., F, N] or [..., C, F, N] -> [..., E]: each strided convolution halves bands and frames."""

    def __init__(self, key: str, shape: tuple[int, ...], config: Mapping):
        super().__init__()
        channels, bands, frames = (1, *shape) if len(shape) == 2 else shape
        depths = [config.cnn_depth * mult for mult in config.audio_mults]
        factor = 2 ** len(depths)
        if min(bands, frames) < factor:
            raise UserError(
                f"encoder.audio_mults {config.audio_mults}: {len(depths)} halvings are too many for the "
                f"{bands} bands x {frames} frames of {key!r}; give fewer, or --encoder.audio_net mlp"
            )
        self.dims = len(shape)
        self.convs = nn.ModuleList(
            Conv(i, o, config.cnn_kernel, 2) for i, o in zip([channels, *depths[:-1]], depths, strict=True)
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
