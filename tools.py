"""Small things of the training program: generators, clocks, checkpoints, the optimizer; more in basics.py."""

import contextlib
import ctypes
import os
import platform
import random
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

import weights
from basics import UserError, atomic_write, derive_seed, first_line, sync_folder, temp_beside

CHECKPOINTS = "checkpoints"  # folder in the logdir
LATEST = "latest.pt"
CHECKPOINT_FORMAT = 2  # goes up when the program can no longer read what it wrote before
CHECKPOINT_KEYS = {
    "config": str,
    "step": int,
    "agent": dict,
    "capacity": int,
}  # what is looked at before a run is built


def torch_rng(seed: int, *names: str | int, device: str | torch.device = "cpu") -> torch.Generator:
    """A torch generator of its own for the given purpose, on `device`."""
    return torch.Generator(device).manual_seed(derive_seed(seed, *names))


class Every:
    """Tells when a step counter has passed another multiple of `every`; 0 never does.

    It fires once, however many multiples were passed since the last call, so that a counter that
    was resumed or that jumps makes no burst.
    """

    def __init__(self, every: float):
        self.every = every
        self.last = 0

    def __call__(self, step: int) -> bool:
        due = self.due(step)
        self.last = step
        return due

    def due(self, step: int) -> bool:
        """Whether a call would tell so now; changes nothing."""
        return bool(self.every) and step // self.every > self.last // self.every

    def state_dict(self) -> dict:
        return {"last": self.last}

    def load_state_dict(self, state: dict) -> None:
        self.last = state["last"]


class Ratio:
    """How many updates are due now, for `ratio` updates per transition on the long run.

    The first call only sets the start, so what was collected before it owes nothing. Fractions are
    kept exactly, over resumes too. To collect without owing updates, call it and drop the result.
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
    """Put back what `rng_state` gave. States of GPUs that are not here are left out."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    for index, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda_state, index)


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for its next allocation. Only glibc can: else False.

    An update takes gigabytes and frees them again. What is given back to the system costs a page fault and
    zeroing for every 4 KiB when it is taken anew, which can be half of the update's time.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # From malloc.h: no block of its own from the system, however large; and the heap never shrinks.
    options = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1)}
    return all(mallopt(*option) == 1 for option in options.values())


def seed_everything(seed: int, *names: str | int) -> None:
    """Seed the global generators of Python, NumPy and torch. Our own code draws from its own ones."""
    random.seed(derive_seed(seed, "python", *names))
    np.random.seed(derive_seed(seed, "numpy", *names) % 2**32)
    torch.manual_seed(derive_seed(seed, "torch", *names))


def enable_determinism() -> None:
    """Let torch use algorithms only that give the same bits each time. Call it before CUDA is used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def _check_plain(value, where: str) -> None:
    """Raise TypeError for what `torch.load(weights_only=True)` would refuse, before it is too late."""
    if isinstance(value, torch.Tensor) or value is None or type(value) in (bool, int, float, str, bytes):
        return
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    else:
        raise TypeError(f"{where} is a {type(value).__name__}; make it a tensor or a plain Python type.")


def save_tensors(path: str | os.PathLike, payload: dict) -> None:
    """Write tensors and plain Python types, whole or not at all. Raises UserError if the disk refuses."""

    def write(file: BinaryIO) -> None:
        try:
            torch.save(payload, file)
        except RuntimeError as error:
            # When a write fails, torch's own complaint about the file's position hides the reason.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    atomic_write(path, write)


def checkpoint_path(logdir: str | os.PathLike, step: int) -> Path:
    """Where the checkpoint of an env step is."""
    return Path(logdir) / CHECKPOINTS / f"step-{step:012d}.pt"


def save_checkpoint(logdir: str | os.PathLike, payload: dict, step: int, keep: int) -> Path:
    """Write the `checkpoint_path`, make `{logdir}/latest.pt` the same file, delete old ones.

    `payload` holds tensors and plain Python types only (TypeError otherwise). The last `keep` >= 1
    checkpoints stay, latest.pt's included. If the disk refuses, a UserError is raised and latest.pt is
    still the one before. Returns the path of the step's file.
    """
    _check_plain(payload, "payload")
    logdir = Path(logdir)
    path = checkpoint_path(logdir, step)
    for leftover in [*path.parent.glob(".step-*.tmp"), *logdir.glob(".latest.pt.*.tmp")]:
        leftover.unlink()  # a kill in the middle of an earlier save
    older = [other for other in find_checkpoints(logdir) if other.name not in (LATEST, path.name)]
    save_tensors(path, {**payload, "format": CHECKPOINT_FORMAT})
    if older and path.stat().st_mtime_ns <= (last := older[0].stat().st_mtime_ns):
        os.utime(path, ns=(last + 1, last + 1))  # the clock was set back; the order is by time
    _link_or_copy(path, logdir / LATEST)
    for other in older[keep - 1 :]:
        other.unlink()
    return path


def _link_or_copy(source: Path, target: Path) -> None:
    temp = temp_beside(target)
    try:
        os.link(source, temp)
        os.replace(temp, target)
        sync_folder(target.parent)
    except OSError:
        # No hard links here (FAT, some network disks), so it takes the space twice.
        with open(source, "rb") as file:
            atomic_write(target, lambda copy: shutil.copyfileobj(file, copy))
    finally:
        temp.unlink(missing_ok=True)


def find_checkpoints(logdir: str | os.PathLike) -> list[Path]:
    """The run's checkpoints: latest.pt, then the others, the last written first. Empty for a new run.

    Raises UserError if the folder cannot be looked into.
    """
    logdir = Path(logdir)
    try:
        others = []
        for path in (logdir / CHECKPOINTS).glob("step-*.pt"):
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile by the run
                others.append((path.stat().st_mtime_ns, path.name, path))
        # By time, because a run that went back to an earlier step writes smaller numbers later.
        others = [path for *_, path in sorted(others, reverse=True)]
        latest = logdir / LATEST
        return [latest, *others] if latest.exists() else others
    except OSError as error:
        raise UserError(f"Cannot read {logdir}: {error.strerror}.") from error


def load_checkpoint(path: str | os.PathLike) -> tuple[dict, Path, list[str]]:
    """Read a checkpoint, with all tensors on the CPU.

    `path` is a run's folder or one file, which may be one of weights alone (see weights.py). For a folder or
    a latest.pt, broken checkpoints are passed over for the next older one. Returns the payload, the file it
    came from, and a line for each broken one.
    Raises UserError if none can be read, or if it is no checkpoint of this program.
    """
    path = Path(path)
    # os.path says no where Path raises: of a name that is too long, for example.
    folder = path if os.path.isdir(path) else path.parent
    candidates = find_checkpoints(folder) if folder == path or path.name == LATEST else [path]
    if not any(map(os.path.exists, candidates)):
        raise UserError(f"No checkpoint at {path}. Give a run's folder or one of its .pt files.")
    if holds_weights_alone(path):
        return weights.read(path), path, []
    notes: list[str] = []
    broken: list[Path] = []
    for candidate in candidates:
        if any(candidate.samefile(other) for other in broken):
            continue  # latest.pt under its other name
        try:
            return _read_checkpoint(candidate), candidate, notes
        except BrokenCheckpoint as error:
            notes.append(f"Checkpoint {candidate} cannot be read and is passed over: {error}")
            broken.append(candidate)
    raise UserError(f"No readable checkpoint at {path}. {' '.join(notes)}")


def holds_weights_alone(path: Path) -> bool:
    """Whether a checkpoint is a file of weights: no run can be gone on with from it."""
    return path.suffix == weights.SUFFIX and not os.path.isdir(path)


class BrokenCheckpoint(Exception):
    """A checkpoint file that was cut off or changed."""


def load_tensors(path: Path) -> dict:
    """Read what `save_tensors` wrote, on the CPU. Raises BrokenCheckpoint, or OSError if it is not there."""
    # torch.load does not look at the checksums, so a flipped bit would go into the weights unnoticed.
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(info.file_size for info in archive.infolist())
            # torch stores as it is; what would grow could take any amount of memory.
            damaged = archive.testzip() if unpacked <= path.stat().st_size else "its list of contents"
    except Exception as error:  # broken bytes make zipfile raise nearly anything
        raise BrokenCheckpoint(f"{type(error).__name__}: {first_line(error)}") from error
    if damaged:
        raise BrokenCheckpoint(f"the checksum of {damaged} is wrong")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # and so do they torch
        raise BrokenCheckpoint(first_line(error)) from error


def _read_checkpoint(path: Path) -> dict:
    payload = load_tensors(path)
    if not isinstance(payload, dict) or payload.pop("format", None) != CHECKPOINT_FORMAT:
        raise UserError(f"{path} is not a checkpoint of this version of LoRe. Use the version that wrote it.")
    for key, kind in CHECKPOINT_KEYS.items():
        if not isinstance(payload.get(key), kind):
            raise UserError(f"{path} is not a whole checkpoint of LoRe: it has no {key}.")
    return payload


@contextlib.contextmanager
def content_of(path: str | os.PathLike | None) -> Iterator[None]:
    """Within, what a checkpoint does not hold as it should is a UserError that names its file."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UserError(
            f"{path} does not hold what a checkpoint of this version of LoRe does "
            f"({type(error).__name__}: {first_line(error)}). Name an older one by --from_checkpoint, or "
            "start anew in another --logdir."
        ) from error


class LaProp(torch.optim.Optimizer):
    """LaProp (arXiv 2002.04839) behind adaptive gradient clipping (arXiv 2102.06171), as DreamerV3 uses it.

    Clip each tensor's gradient, divide by its root mean square, then momentum, then the learning rate,
    which rises linearly from 0, so the first update changes no parameter. A parameter without a gradient
    counts as one with a zero gradient. Nothing here waits for the GPU.

    Args:
        params: parameters, or groups of them that may have options of their own, as a `lr`.
        lr: learning rate after `warmup` updates.
        agc: largest ratio of a gradient's norm to its tensor's norm, which counts as at least
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
        # Of each group; float64 for exact powers of beta2.
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

        before and updates: how many updates it has had, without this one and with it.
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
        """Take moments and counters from `state_dict`, but keep this optimizer's own options.

        So an option that was changed on resume (a learning rate) has its effect. With `groups`, only the
        first so many groups are taken: what comes behind them may be something else, and starts anew.
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
                    raise ValueError(f"a {name} of the optimizer is not what was saved")
        for group, options in zip(self.param_groups, own, strict=True):
            group.update(options)
        self.updates[: len(counts)] = counts
