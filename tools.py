"""Small tools with torch: generators, clocks, the optimiser, devices. basics.py has those without torch."""

import contextlib
import ctypes
import os
import platform
import random
import sys
import traceback
from collections.abc import Iterator, Mapping
from fractions import Fraction

import numpy as np
import torch

from basics import UserError, derive_seed, first_line

CPU_FULL = "DefaultCPUAllocator"  # in torch's error
GPU_FULL = ("CUDA error: out of memory", "_STATUS_ALLOC_FAILED")  # in errors without their own class
LOWER = "--batch_size, --batch_length or --imag_last"  # options on which an update's memory depends
LOWER_ON_GPU = f"Lower {LOWER}, take --precision bfloat16 or, for a new run, a smaller preset as size1m."
LOWER_IN_RAM = (
    f"Lower {LOWER}, --replay.capacity or --envs.amount, put the replay into files with "
    "--replay.backend memmap or, for a new run, take a smaller preset as size1m."
)


@contextlib.contextmanager
def memory_explained(on_gpu: str = LOWER_ON_GPU, in_ram: str = LOWER_IN_RAM) -> Iterator[None]:
    """Within, running out of memory is a UserError that names the options to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in GPU_FULL):
            where, advice = "The GPU is full", on_gpu
        elif isinstance(error, MemoryError) or CPU_FULL in str(error):
            where, advice = "The RAM is full", in_ram
        else:
            raise
        reason = first_line(error).rstrip(".")
        traceback.clear_frames(error.__traceback__)  # saving needs the memory that the update held
        raise UserError(f"{where} ({reason}). {advice}") from error


def torch_rng(seed: int, *names: str | int, device: str | torch.device = "cpu") -> torch.Generator:
    """A torch generator for the given purpose, on `device`."""
    return torch.Generator(device).manual_seed(derive_seed(seed, *names))


class Every:
    """True when a step counter has passed another multiple of `every`; never for 0.

    It fires once, however many multiples were passed since the last call.
    """

    def __init__(self, every: float):
        self.every = every
        self.last = 0

    def __call__(self, step: int) -> bool:
        due = self.due(step)
        self.last = step
        return due

    def due(self, step: int) -> bool:
        """What a call would return, without changing the state."""
        return bool(self.every) and step // self.every > self.last // self.every

    def state_dict(self) -> dict:
        return {"last": self.last}

    def load_state_dict(self, state: dict) -> None:
        self.last = state["last"]


class Ratio:
    """The number of updates that are due, for `ratio` updates per transition in the long run.

    The first call sets the start: transitions before it owe no updates. Fractions are kept exactly, also when
    a run resumes.
    """

    def __init__(self, ratio: float | Fraction):
        self.ratio = Fraction(ratio)
        self.last: int | None = None
        self.owed = Fraction(0)

    def __call__(self, transitions: int) -> int:
        if self.last is not None:
            self.owed += self.ratio * (transitions - self.last)
        self.last = transitions
        due = int(self.owed)
        self.owed -= due
        return due

    def state_dict(self) -> dict:
        return {"last": self.last, "owed": str(self.owed)}

    def load_state_dict(self, state: dict) -> None:
        self.last, self.owed = state["last"], Fraction(state["owed"])


def rng_state() -> dict:
    """The state of the global generators of Python, NumPy and torch (with its GPUs), as plain types."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict) -> None:
    """Restore an `rng_state`. The states of missing GPUs are left out."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    for index, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda_state, index)


def keep_freed_memory() -> bool:
    """Keep freed memory in this process for its next allocation. Only glibc can; otherwise returns False.

    An update allocates gigabytes and frees them. Memory returned to the system costs a page fault and zeroing
    for every 4 KiB when it is allocated again, which can be half of the update's time.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # From malloc.h: no separate mapping for large blocks; and the heap never shrinks.
    options = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1)}
    return all(mallopt(*option) == 1 for option in options.values())


def seed_everything(seed: int, *names: str | int) -> None:
    """Seed the global generators of Python, NumPy and torch, which only other libraries use."""
    random.seed(derive_seed(seed, "python", *names))
    np.random.seed(derive_seed(seed, "numpy", *names) % 2**32)
    torch.manual_seed(derive_seed(seed, "torch", *names))


def enable_determinism() -> None:
    """Restrict torch to deterministic algorithms. Call it before CUDA is used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


class LaProp(torch.optim.Optimizer):
    """LaProp (arXiv 2002.04839) behind adaptive gradient clipping (arXiv 2102.06171), as DreamerV3 uses it.

    Clip each tensor's gradient, divide by its root mean square, then momentum, then the learning rate,
    which rises linearly from 0, so the first update changes no parameter. A parameter without a gradient
    counts as one with a zero gradient. Nothing here waits for the GPU.

    Args:
        params: parameters, or groups of them with their own options, such as `lr`.
        lr: learning rate after `warmup` updates.
        agc: largest ratio of a gradient's norm to its tensor's norm, which is taken as at least
            `agc_floor`; 0 is off.
        beta1, beta2: decay of the momentum and of the mean square.
        eps: added to the root mean square.
    """

    def __init__(
        self,
        params,
        lr: float = 4e-5,
        warmup: int = 1000,
        agc: float = 0.3,
        agc_floor: float = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-20,
    ):
        options = dict(warmup=warmup, agc=agc, agc_floor=agc_floor, beta1=beta1, beta2=beta2, eps=eps)
        super().__init__(params, dict(lr=lr, **options))
        device = self.param_groups[0]["params"][0].device
        # One counter a group; float64 for exact powers of beta2.
        self.updates = torch.zeros(len(self.param_groups), dtype=torch.float64, device=device)

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            self.state[param] = {"square": torch.zeros_like(param), "momentum": torch.zeros_like(param)}

    @torch.no_grad()
    def step(self) -> dict[str, torch.Tensor]:
        """One update from the `.grad` of the parameters.

        Returns `grad_norm` (over all parameters, before clipping) and `skipped`, both scalars on the
        device. If the norm is not finite, `skipped` is True, and parameters, moments and the counter of
        updates stay as they are.
        """
        grads = [
            [torch.zeros_like(param) if param.grad is None else param.grad for param in group["params"]]
            for group in self.param_groups
        ]
        norms = [torch.stack(torch._foreach_norm(group)) for group in grads]
        grad_norm = torch.cat(norms).norm()
        finite = grad_norm.isfinite()
        before = self.updates.clone()
        self.updates += finite
        counts = zip(before.unbind(), self.updates.unbind(), strict=True)
        for group, group_grads, group_norms, count in zip(
            self.param_groups, grads, norms, counts, strict=True
        ):
            self._update_group(group, group_grads, group_norms, finite, *count)
        return {"grad_norm": grad_norm, "skipped": ~finite}

    def _update_group(self, group, grads, grad_norms, finite, before, updates) -> None:
        """Update one group; where not `finite`, everything is multiplied by 1 or added to by 0.

        before and updates: the number of its updates, without and with this one.
        """
        params = group["params"]
        squares = [self.state[param]["square"] for param in params]
        momenta = [self.state[param]["momentum"] for param in params]
        beta1, beta2 = group["beta1"], group["beta2"]
        if group["agc"]:
            limits = group["agc"] * torch.stack(torch._foreach_norm(params)).clamp(min=group["agc_floor"])
            scales = 1 / (grad_norms / limits).clamp(min=1)  # [tensors]
            grads = torch._foreach_mul(grads, list(scales.unbind()))
        grads = [torch.where(finite, grad, 0.0) for grad in grads]

        updates = updates.clamp(min=1)  # 0 only if the very first gradient is skipped
        square_correction = (1 - beta2**updates).float()
        momentum_correction = 1 - beta1**updates
        warm = (before / group["warmup"]).clamp(max=1) if group["warmup"] else torch.ones_like(before)
        rate = torch.where(finite, -group["lr"] * warm / momentum_correction, 0.0).float()

        torch._foreach_mul_(squares, torch.where(finite, beta2, 1.0))
        torch._foreach_addcmul_(squares, grads, grads, value=1 - beta2)
        roots = torch._foreach_div(squares, square_correction)
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_div_(grads, roots)
        torch._foreach_mul_(momenta, torch.where(finite, beta1, 1.0))
        torch._foreach_add_(momenta, grads, alpha=1 - beta1)
        torch._foreach_add_(params, torch._foreach_mul(momenta, rate))

    def state_dict(self) -> dict:
        return {**super().state_dict(), "updates": self.updates.tolist()}

    def load_state_dict(self, state_dict: dict, groups: int | None = None) -> None:
        """Load moments and counters from `state_dict`, but keep the options of this optimiser.

        So an option that was changed on resume, such as the learning rate, takes effect. With `groups`, only
        the first so many groups are loaded; the others start from zero.
        """
        own = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        here, moments = super().state_dict(), state_dict["state"]
        counts = self.updates.new_tensor(state_dict["updates"])[:groups]
        if groups is not None:
            count = sum(len(group["params"]) for group in here["param_groups"][:groups])
            moments = here["state"] | {index: moments[index] for index in range(count)}
        saved = here["param_groups"] if groups is not None else state_dict["param_groups"]
        super().load_state_dict({"state": moments, "param_groups": saved})
        for param, state in self.state.items():
            for name in ("square", "momentum"):
                if state[name].shape != param.shape or not state[name].isfinite().all():
                    raise ValueError(f"a {name} of the optimiser has another shape or is not finite")
        for group, options in zip(self.param_groups, own, strict=True):
            group.update(options)
        self.updates[: len(counts)] = counts


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA if it works, else the CPU. Raises UserError for a device that does not work."""
    if name == "auto":
        return torch.device("cuda" if cuda_works() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # new streams and CUDA graphs are of the current device
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise UserError(
            f"--device {name} does not work here: {reason} --device auto finds one that does."
        ) from error
    return device


def count_gpus() -> int:
    """The number of CUDA GPUs that work."""
    return torch.cuda.device_count() if cuda_works() else 0


def cuda_works() -> bool:
    """Whether a CUDA GPU computes; with a driver too old for this torch it does not."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.zeros(1, device="cuda") + 1
    except torch.OutOfMemoryError:  # it works, but another process has its memory
        return True
    except RuntimeError:
        return False
    return True


def precision(config: Mapping, device: torch.device) -> str:
    """`precision: auto` is bfloat16 if the hardware multiplies in it, else float32."""
    if config.precision != "auto":
        return config.precision
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # torch before 2.12 has no such function.
        abilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        fast = abilities.get("avx512_bf16", False) or abilities.get("amx_bf16", False)
    return "bfloat16" if fast else "float32"


def compiles(config: Mapping, device: torch.device) -> bool:
    """`compile: auto` compiles on CUDA under Linux, where Triton is available."""
    if config.compile != "auto":
        return config.compile
    return device.type == "cuda" and sys.platform == "linux"
