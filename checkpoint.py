"""Checkpoints: atomic files, the newest whole one, one run a logdir, and weights as one .safetensors file.

A weights file holds what acting needs and the config, and nothing that could be executed: no optimiser, no
replay, no paths of the machine that wrote it. `evaluate.py --export` writes it, and `--from_checkpoint` takes
it like a checkpoint.
"""

import contextlib
import datetime
import errno
import hashlib
import json
import os
import shutil
import socket
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import filelock
import safetensors
import torch
from safetensors.torch import save
from torch import Tensor, nn

from basics import (
    CONTROL,
    MAX_REASON,
    UserError,
    atomic_write,
    first_line,
    sync_folder,
    temp_beside,
    write_error,
)
from config import Config

CHECKPOINTS = "checkpoints"  # folder in the logdir
LATEST = "latest.pt"
CHECKPOINT_FORMAT = 2  # goes up when the program can no longer read what it wrote before
CHECKPOINT_KEYS = {
    "config": str,
    "step": int,
    "agent": dict,
    "capacity": int,
}  # what is looked at before a run is built

LOCK = ".lock"  # file in the logdir, locked while a run uses it
HOLDER = "run.lock"  # file in the logdir that names the process of that run
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}

SUFFIX = ".safetensors"
FORMAT = "1"  # goes up when the program can no longer read what it wrote before
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_HEADER = 2**20  # bytes of names, shapes and the config; those of the largest agents are 40,000
# What a part is called in an agent: its module, and how the names of its weights begin there.
PARTS = {
    "encoder": ("world_model", ("encoder.",)),
    "rssm": ("world_model", ("rssm.",)),
    "decoder": ("world_model", ("decoder.",)),
    "reward": ("world_model", ("reward_head.",)),
    "cont": ("world_model", ("cont_head.",)),
    "actor": ("behavior", ("actor.",)),
    "critic": ("behavior", ("critic.", "slow_critic.", "retnorm.")),
}
MODULES = ("world_model", "behavior", "explorer", "policy")
# Options that say where something is on the machine that trained, or in its network.
PLACES = ("logdir", "from_checkpoint", "traindir", "llm.base_url", "llm.cache", "envs.ray_address")


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

    `path` is a run's folder or one file, which may be one of weights alone. For a folder or
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
        return read_weights(path), path, []
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
    return path.suffix == SUFFIX and not os.path.isdir(path)


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


# --- One run a logdir --------------------------------------------------------------------------------------


@contextlib.contextmanager
def run_lock(logdir: str | os.PathLike) -> Iterator[list[str]]:
    """Hold a logdir for one run; missing folders are made. Yields lines for the log.

    The operating system releases the lock when the process ends, even if it is killed. If nothing was written
    in the meantime, the folders that were made are removed. Raises UserError if another run holds the
    logdir, or if it cannot be written.
    """
    folder = Path(logdir)
    lock = filelock.FileLock(folder / LOCK, fallback_to_soft=False, thread_local=False)
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]  # the innermost first
    notes = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise UserError(
            f"{folder} is in use by another run ({_holder(folder) or 'which is starting'}). Stop that run "
            "or give another --logdir."
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise write_error(folder / LOCK, error) from error
        notes.append(f"The disk of {folder} has no file locks, so a second run there would not be noticed")
    try:
        if left := _holder(folder):
            notes.append(
                f"The last run here did not end cleanly ({left}). If it still runs, stop one of the two"
            )
        since = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        text = f"process {os.getpid()} on {socket.gethostname()}, since {since}"
        atomic_write(folder / HOLDER, lambda file: file.write(text.encode()))
        yield notes
    finally:
        for name in (HOLDER, LOCK):
            with contextlib.suppress(OSError):  # Windows deletes LOCK when it is released
                (folder / name).unlink()
        lock.release()
        with contextlib.suppress(OSError):  # not empty
            for parent in made:
                parent.rmdir()


def _holder(folder: Path) -> str:
    """The process that holds a logdir, or did not release it; empty if there is none."""
    try:
        return CONTROL.sub("?", (folder / HOLDER).read_text("utf-8", errors="replace"))[:MAX_REASON]
    except OSError:
        return ""


# --- Weights alone -----------------------------------------------------------------------------------------


def write_weights(
    path: str | os.PathLike,
    config: Config,
    step: int,
    agent: Mapping[str, Any],
    dtype: str = "float32",
    decoder: bool = True,
) -> int:
    """Write an agent to a file, whole or not at all; how many numbers it holds.

    Args:
        path: ends in .safetensors.
        config: that it was trained with; the `PLACES` in it are left out.
        step: env steps that it was trained for.
        agent: a checkpoint's, as `Dreamer.state_dict` gives it. Optimiser, slow critics (they start as the
            critics) and an explorer's past are left out.
        dtype: of matrices and kernels. Vectors and scalars are few, and stay float32.
        decoder: without it the file is smaller, and who trains on from it learns to reconstruct anew.

    Raises UserError for a number that `dtype` cannot hold, and if the disk refuses.
    """
    if Path(path).suffix != SUFFIX:
        raise UserError(f"--export {path} must end in {SUFFIX}")
    tensors = {
        f"{module}.{name}": _convert(f"{module}.{name}", value, DTYPES[dtype])
        for module in MODULES
        for name, value in agent.get(module, {}).items()
        if not {"slow_critic", "fifo"} & set(name.split(".")) and (decoder or not name.startswith("decoder."))
    }
    about = {
        "lore_format": FORMAT,
        "task": config.task,
        "step": str(step),
        "config": config.replace({**dict.fromkeys(PLACES), "transfer": []}).to_yaml(),
        "skills": json.dumps(agent.get("skills", [])),
        "torch": torch.__version__,
    }
    about["sha256"] = _digest(about, tensors)
    data = save(tensors, metadata=about)
    atomic_write(path, lambda file: file.write(data))
    return sum(value.numel() for value in tensors.values())


def _convert(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of a weight for the file."""
    rounded = value.to(dtype) if value.is_floating_point() and value.dim() > 1 else value
    if rounded.dtype != value.dtype and not rounded.isfinite().all() and value.isfinite().all():
        largest = value.abs().max()
        raise UserError(
            f"--dtype {str(dtype).removeprefix('torch.')} cannot hold {name}, which has {largest:.3g} in it: "
            "take bfloat16 or float32"
        )
    return rounded.clone(memory_format=torch.contiguous_format)


def _digest(about: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over everything that the file says."""
    digest = hashlib.sha256(json.dumps(sorted(about.items())).encode())
    for name, value in sorted(tensors.items()):
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def read_weights(path: str | os.PathLike) -> dict[str, Any]:
    """What `write_weights` wrote, as a checkpoint payload: `config`, `step`, `agent` (no optimiser).

    Raises UserError for what is no such file, or is damaged.
    """
    try:
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > MAX_HEADER:
            raise UserError(
                f"{path} is not a file of LoRe's weights: its header says that it has {header:,} bytes."
            )
        with safetensors.safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from error
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} cannot be read, it is damaged or no safetensors file: {error}") from error
    if about.get("lore_format") != FORMAT:
        raise UserError(
            f"{path} holds no weights of this version of LoRe. Use the version that wrote it, and see "
            "evaluate.py --export."
        )
    if about.pop("sha256", None) != _digest(about, tensors):
        raise UserError(f"{path} is damaged: its checksum is wrong. Copy it once more.")
    try:
        if not about["step"].isdecimal():
            raise ValueError("step must be a number")
        payload = {"config": about["config"], "step": int(about["step"])}
        agent = {module: {} for module in MODULES} | {"skills": _skills(about["skills"])}
        for name, value in tensors.items():
            module, _, rest = name.partition(".")
            agent[module][rest] = value
            if "critic" in rest.split("."):
                agent[module][rest.replace("critic.", "slow_critic.", 1)] = value.clone()
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} holds no weights of LoRe: {type(error).__name__}: {error}") from error
    return {**payload, "agent": agent}


def _skills(text: str) -> list[list[str | None]]:
    """Name and subgoal of each skill, as `write_weights` wrote them. Raises ValueError."""
    skills = json.loads(text)
    if not isinstance(skills, list) or not all(
        isinstance(skill, list)
        and len(skill) == 2
        and all(part is None or isinstance(part, str) for part in skill)
        for skill in skills
    ):
        raise ValueError("skills must be pairs of a name and a subgoal")
    return skills


def transfer(modules: Mapping[str, nn.Module], agent: Mapping[str, Any], parts: Sequence[str]) -> list[str]:
    """Copy the `PARTS` that are named from a checkpoint's agent to `modules`, each weight whose shape fits.

    Returns lines that say what was taken, what was not and why. Raises UserError if nothing fits, ValueError
    for weights that are not finite.
    """
    lines, some = [], False
    for part in parts:
        module, prefixes = PARTS[part]
        here, there = (
            {name: value for name, value in weights.items() if name.startswith(prefixes)}
            for weights in (modules[module].state_dict(), agent[module])
        )
        taken = {k: v for k, v in there.items() if k in here and v.shape == here[k].shape}
        if broken := [name for name, value in taken.items() if not value.isfinite().all()]:
            raise ValueError(f"{module}.{broken[0]} holds numbers that are not finite")
        modules[module].load_state_dict(taken, strict=False)
        some |= bool(taken)
        lines.append(f"Transferred {part}: {len(taken)} of {len(here)} tensors")
        for name in sorted((here.keys() | there.keys()) - taken.keys()):
            shapes = (tuple(each[name].shape) if name in each else "nothing" for each in (there, here))
            fate = "begins anew" if name in here else "is left behind"
            lines.append("  {} {}: {} in the checkpoint, {} here".format(name, fate, *shapes))
    if not some:
        reason = next((line.strip() for line in lines if line.startswith("  ")), "they have no weights")
        raise UserError(f"Nothing of {', '.join(parts)} can be transferred, as no shape fits: {reason}")
    others = [part for part in PARTS if part not in parts]
    return [*lines, f"Begins anew: {', '.join([*others, 'the optimiser'])}"]
