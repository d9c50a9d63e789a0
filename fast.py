"""Fast CPU forms of normalisation, upsampling, pooling, scans and softmax, next to their plain forms.

On a GPU, and where it compiles, torch fuses such chains of operations. On a CPU it runs them one by one, and
each pass over memory costs time. The fast forms give the same results, forward and backward.
Letters of the shapes: N images, C, I, O channels, H height, W width, G blocks, D deter, E embed, K classes;
`...` are batch dimensions.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

RMS_EPS = 1e-4  # of the reference's normalisation
CHUNK = 1 << 18  # numbers (1 MiB) that stay in a CPU's cache from one operation to the next
FEW_CLASSES = 16  # with fewer, torch's vectorised softmax is slower than one along another dimension


def fused_by_torch(x: Tensor) -> bool:
    """Whether torch fuses chains of operations on `x`: on a GPU, or compiled."""
    return x.device.type != "cpu" or torch.compiler.is_compiling()


def chunks(rows: int, row_size: int) -> Iterator[slice]:
    """Slices that cover `rows`, each of about CHUNK numbers if a row has `row_size`."""
    step = max(1, CHUNK // row_size)
    return (slice(start, start + step) for start in range(0, rows, step))


def matmul_dtype(device: torch.device) -> torch.dtype:
    """The precision of matrix products: autocast's where it is on, else float32."""
    mixed = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if mixed else torch.float32


# --- Normalisation -------------------------------------------------------------------------------------


def rms_norm_silu(x: Tensor, weight: Tensor) -> Tensor:
    """Root-mean-square normalisation of [..., C] over the last dimension, then SiLU."""
    if fused_by_torch(x):
        return plain_rms_norm_silu(x, weight)
    return ChunkedNormSiLU.apply(x, weight, matmul_dtype(x.device))


def plain_rms_norm_silu(x: Tensor, weight: Tensor) -> Tensor:
    """The same in float32."""
    return F.silu(F.rms_norm(x.float(), weight.shape, weight, RMS_EPS))


class ChunkedNormSiLU(torch.autograd.Function):
    """`plain_rms_norm_silu` for CPUs: torch computes it in ten passes over memory and keeps five tensors.

    Here chunks that fit into the cache go through all steps, forward and backward, and only the input is
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


# --- Upsampling and convolution ------------------------------------------------------------------------

# How a 5x5 kernel over an image of doubled size meets the pixels of the small image: entry [p, a, k] is 1
# where output pixel 2i + p sees the small pixel i - 1 + a through tap k.
DOUBLED_BY_REPEAT = [
    [[1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]],
    [[1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1]],
]
DOUBLED_BY_ZEROS = [
    [[0, 1, 0, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]],
    [[1, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 1]],
]


def doubled_conv(x: Tensor, weight: Tensor, bias: Tensor, taps: Tensor) -> Tensor:
    """Double [N, I, H, W] in size, then convolve with `weight` [O, I, 5, 5]: [N, O, 2H, 2W].

    `taps` [2, 3, 5] is DOUBLED_BY_REPEAT or DOUBLED_BY_ZEROS. Three of four products of the plain form
    (`F.conv2d` of the doubled image) would be repetitions or zeros. So each of the four output phases is
    computed from the small image by a 3x3 kernel, the sum of the taps that meet the same small pixel.
    """
    outputs, inputs = weight.shape[:2]
    rows = torch.einsum("pak,oikl->poial", taps, weight)
    kernel = torch.einsum("qbl,poial->pqoiab", taps, rows).reshape(4 * outputs, inputs, 3, 3)
    phases = F.conv2d(x, kernel, bias.repeat(4), padding=1)  # [N, 2 * 2 * O, H, W]
    phases = phases.permute(0, 2, 3, 1).unflatten(-1, (2, 2, -1))  # [N, H, W, 2, 2, O]
    # With channels last, rows of 2 O numbers are copied: 6 times faster than pixel_shuffle.
    image = phases.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # [N, 2H, 2W, O]
    return image.permute(0, 3, 1, 2)


# --- Pooling -------------------------------------------------------------------------------------------


def max_pool(x: Tensor) -> Tensor:
    """Halve [N, C, H, W] by the maximum of 2x2 pixels."""
    if fused_by_torch(x):
        return F.max_pool2d(x, 2)
    return ChunkedMaxPool.apply(x)


class ChunkedMaxPool(torch.autograd.Function):
    """`F.max_pool2d(x, 2)` for CPUs with less memory: torch keeps the input and int64 indices.

    It takes a few images at a time, so that the int64 indices stay in the cache, and keeps int32 ones.
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
            # It reads only the shape of the input (the second argument).
            window = [2, 2], [2, 2], [0, 0], [1, 1], False
            backward(grad[part], out[part], *window, indices[part].long(), grad_input=out[part])
        return out


# --- Scans ---------------------------------------------------------------------------------------------


class SplitWeights(NamedTuple):
    """The weights of an RSSM's layers over concatenated inputs, split by input."""

    dyn_own: Tensor  # [G, D / G, D / G] the deter of a block -> the block
    dyn_state: Tensor  # [D, 2 hidden] features of deter and stoch -> all blocks
    dyn_action: Tensor  # [D, hidden] features of the action -> all blocks
    post_deter: Tensor  # [hidden, D]
    post_embed: Tensor  # [hidden, E]


def split_weights(dyn: Tensor, post: Tensor) -> SplitWeights:
    """Split the weights of the GRU's first layer and of the posterior's.

    dyn [G, D / G + 3 hidden, D / G] over a block's deter and the features of deter, stoch and action;
    post [hidden, D + E] over deter and the observation. The reference repeats the features for each block and
    concatenates them with the block's deter. All blocks see the same features, so their part is one dense
    product; and the parts of action and observation can be computed for all time steps at once.
    """
    blocks, inputs, own = dyn.shape
    size, hidden = blocks * own, (inputs - own) // 3
    shared = dyn[:, own:].transpose(1, 2).reshape(size, 3 * hidden)
    state, action = shared.split([2 * hidden, hidden], 1)
    deter, embed = post.split([size, post.shape[1] - size], 1)
    parts = [dyn[:, :own].contiguous(), state, action, deter, embed]
    if not torch.is_grad_enabled():  # else the gradients of all steps are summed in float32
        parts = [part.to(matmul_dtype(part.device)) for part in parts]
    return SplitWeights(*parts)


# --- Softmax -------------------------------------------------------------------------------------------


def softmax(logits: Tensor) -> Tensor:
    """Softmax over the last dimension [..., K].

    On a CPU torch vectorises along that dimension, which is of no use for a handful of classes: then it is
    8 times faster along another one.
    """
    if logits.shape[-1] >= FEW_CLASSES or logits.dim() < 2:
        return F.softmax(logits, -1)
    return F.softmax(logits.transpose(-1, -2).contiguous(), -2).transpose(-1, -2)
