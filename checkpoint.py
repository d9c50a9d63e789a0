"""Checkpoints: written atomically, found and checked; one run a logdir; weights to share as .safetensors.

A .safetensors file holds the weights that acting needs and the config, but no optimiser, no replay and no
paths of the machine that wrote it. `evaluate.py --export` writes it, and `--from_checkpoint` accepts it in
place of a checkpoint.
"""

import contextlib
import datetime
import errno
import hashlib
import json
import logging
import os
import shutil
import socket
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import filelock
import safetensors
import torch
from safetensors.torch import save
from torch import Tensor, nn

import distributed
import replay as replays
import tools
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
REPLAY_STATE = "replay_state"  # folder in the logdir, with one folder for each checkpoint
CHECKPOINT_FORMAT = 4  # increased when older checkpoints can no longer be read

LOCK = ".lock"  # file in the logdir, locked while a run uses it
HOLDER = "run.lock"  # file in the logdir that names the process of that run
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}

WEIGHTS = ".safetensors"  # suffix of a file of weights
WEIGHTS_FORMAT = "1"  # increased when older files of weights can no longer be read
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Parts of an agent that can be transferred: the module, and the prefixes of its weights' names.
PARTS = {
    "encoder": ("world_model", ("encoder.",)),
    "rssm": ("world_model", ("rssm.",)),
    "decoder": ("world_model", ("decoder.",)),
    "reward": ("world_model", ("reward_head.",)),
    "cont": ("world_model", ("cont_head.",)),
    "actor": ("behavior", ("actor.",)),
    "critic": ("behavior", ("critic.", "slow_critic.", "retnorm.")),
}
log = logging.getLogger("lore")

MODULES = ("world_model", "behavior", "explorer", "policy")
# Options that name a place on the machine that trained, or in its network.
PLACES = ("logdir", "from_checkpoint", "traindir", "llm.base_url", "llm.cache", "envs.ray_address")


# --- Files ---------------------------------------------------------------------------------------------


class BrokenCheckpoint(Exception):
    """A checkpoint file that was cut off or changed."""


def save_tensors(path: str | os.PathLike, payload: dict) -> None:
    """Write tensors and plain Python types atomically.

    Raises UserError if the disk refuses, TypeError for types that `torch.load(weights_only=True)` refuses.
    """

    def write(file: BinaryIO) -> None:
        try:
            torch.save(payload, file)
            file.flush()
        except RuntimeError as error:
            # If a write fails, torch raises an error about the file's position, which hides the reason.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(file.name):
            raise TypeError(
                f"A checkpoint cannot hold {', '.join(unsafe)}: use tensors or plain Python types"
            )

    atomic_write(path, write)


def load_tensors(path: Path) -> dict:
    """Read what `save_tensors` wrote, on the CPU. Raises BrokenCheckpoint."""
    # torch.load does not verify the checksums, so a flipped bit would reach the weights unnoticed.
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(info.file_size for info in archive.infolist())
            # torch does not compress; a file that grows when unpacked could take any amount of memory.
            damaged = archive.testzip() if unpacked <= path.stat().st_size else "its list of contents"
    except Exception as error:  # zipfile raises nearly anything for broken bytes
        raise BrokenCheckpoint(f"{type(error).__name__}: {first_line(error)}") from error
    if damaged:
        raise BrokenCheckpoint(f"the checksum of {damaged} is wrong")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # and so does torch
        raise BrokenCheckpoint(first_line(error)) from error


def checkpoint_path(logdir: str | os.PathLike, step: int) -> Path:
    """The file of the checkpoint of an env step."""
    return Path(logdir) / CHECKPOINTS / f"step-{step:012d}.pt"


def find_checkpoints(logdir: str | os.PathLike) -> list[Path]:
    """The checkpoints of a run: latest.pt, then the others, the last step first. Empty for a new run."""
    latest, folder = Path(logdir) / LATEST, Path(logdir) / CHECKPOINTS
    # glob raises for a name that is too long or a folder without permission; writing reports these.
    others = sorted(folder.glob("step-*.pt"), reverse=True) if os.path.isdir(folder) else []
    return [latest, *others] if os.path.exists(latest) else others


def save_checkpoint(logdir: str | os.PathLike, payload: dict, step: int, keep: int) -> Path:
    """Write the `checkpoint_path`, make `{logdir}/latest.pt` the same file, delete old checkpoints.

    The last `keep` >= 1 checkpoints stay, this one included. Those of later steps, which a run leaves behind
    when it resumes from an earlier one, are deleted. If the disk refuses, a UserError is raised and
    latest.pt stays as it was. Returns the path.
    """
    logdir = Path(logdir)
    path = checkpoint_path(logdir, step)
    for leftover in path.parent.glob(".step-*.tmp"):
        leftover.unlink()  # from a kill during an earlier save
    others = [other for other in find_checkpoints(logdir) if other.name not in (LATEST, path.name)]
    save_tensors(path, {**payload, "format": CHECKPOINT_FORMAT})
    _link_or_copy(path, logdir / LATEST)
    kept = [other for other in others if other.name < path.name][: keep - 1]
    for other in others:
        if other not in kept:
            other.unlink()
    return path


def _link_or_copy(source: Path, target: Path) -> None:
    temp = temp_beside(target)
    try:
        os.link(source, temp)
        os.replace(temp, target)
        sync_folder(target.parent)
    except OSError:
        # No hard links here (FAT, some network disks): the copy takes the space twice.
        with open(source, "rb") as file:
            atomic_write(target, lambda copy: shutil.copyfileobj(file, copy))
    finally:
        temp.unlink(missing_ok=True)


def load_checkpoint(path: str | os.PathLike) -> tuple[dict, Path, list[str]]:
    """Read a checkpoint, with all tensors on the CPU.

    `path` is the folder of a run or one file, which may be a file of weights. In a folder, or for a
    latest.pt, damaged checkpoints are skipped for the next older one. Returns the payload, the file that was
    read, and a line for each that was skipped.
    Raises UserError if none can be read, or if it is not a checkpoint of this version.
    """
    path = Path(path)
    candidates = [path]
    if os.path.isdir(path) or path.name == LATEST:
        candidates = find_checkpoints(path if os.path.isdir(path) else path.parent)
    if not any(map(os.path.exists, candidates)):
        raise UserError(f"No checkpoint at {path}. Give the folder of a run or one of its .pt files.")
    if is_weights(path):
        return read_weights(path), path, []
    notes: list[str] = []
    for candidate in candidates:
        try:
            payload = load_tensors(candidate)
        except BrokenCheckpoint as error:
            notes.append(f"Checkpoint {candidate} is damaged and skipped: {error}")
            continue
        if not isinstance(payload, dict) or payload.pop("format", None) != CHECKPOINT_FORMAT:
            raise UserError(
                f"{candidate} is not a checkpoint of this version of LoRe. Use the version that wrote it."
            )
        return payload, candidate, notes
    raise UserError(f"No readable checkpoint at {path}. {' '.join(notes)}")


def is_weights(path: str | os.PathLike) -> bool:
    """Whether a checkpoint is a file of weights, from which no run can resume."""
    return Path(path).suffix == WEIGHTS and not os.path.isdir(path)


def run_folder(path: Path) -> Path:
    """The logdir of the run to which a checkpoint file, or a folder, belongs."""
    if os.path.isdir(path):
        return path
    return path.parent.parent if path.parent.name == CHECKPOINTS else path.parent


class Checkpoint:
    """Saves and resumes a run: the agent, the replay, and a dict of named parts with their state dicts.

    Only rank 0 saves. On resume the other ranks refill their replay from the episode files, so resume is
    exact for one learner.
    """

    def __init__(self, config: Config, logdir: Path, agent: Any, replay: Any, parts: Mapping[str, Any]):
        self.config, self.logdir, self.agent, self.replay, self.parts = config, logdir, agent, replay, parts

    def save(self, step: int, *, clean: bool = False) -> None:
        """Write a checkpoint between two steps; if `clean`, with the latents, for an exact resume."""
        if not distributed.is_main():
            return
        place = self._replay_folder(step)
        replay, ranks = self.replay, distributed.world_size()
        capacity = replay.n_envs * replay.rows * ranks
        payload = {"config": self.config.to_yaml(), "step": step, "capacity": capacity}
        payload |= {"agent": self.agent.state_dict(), "replay": replay.save(place, latents=clean)}
        payload |= {name: part.state_dict() for name, part in self.parts.items()}
        payload["rng"] = tools.rng_state()
        save_checkpoint(self.logdir, payload, step, self.config.keep_checkpoints)
        for folder in place.parent.iterdir():
            if not (self.logdir / CHECKPOINTS / f"{folder.name}.pt").exists():
                shutil.rmtree(folder)
            elif folder != place:
                for latents in folder.rglob("latents.npz"):
                    latents.unlink()  # large, and only the last stop needs them
        replays.keep_moment(place, payload["replay"]["moment"])
        log.info("Saved %s at step %s", self.logdir / LATEST, f"{step:,}")

    def resume(self, saved: Mapping[str, Any]) -> None:
        """Load replay and parts. The agent is loaded earlier, before anything is written."""
        if distributed.is_main():
            loaded = self.replay.load(saved["replay"], self._replay_folder(saved["step"]))
        distributed.barrier()  # rank 0 has moved away the episodes that the checkpoint does not know
        if not distributed.is_main():
            loaded = self.replay.load_episodes(distributed.rank(), distributed.world_size())
        for line in loaded.lines:
            log.info("%s", line)
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        if distributed.is_main():
            tools.set_rng_state(saved["rng"])  # last: nothing may draw after it
        steps = distributed.total(loaded.steps)[0]
        log.info("Resumed at step %s with %s steps in the replay", f"{saved['step']:,}", f"{steps:,}")

    def _replay_folder(self, step: int) -> Path:
        return self.logdir / REPLAY_STATE / checkpoint_path(self.logdir, step).stem


@contextlib.contextmanager
def reading(path: str | os.PathLike | None) -> Iterator[None]:
    """Within, errors about the content of the checkpoint `path` become a UserError that names it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UserError(
            f"The content of {path} does not fit this version of LoRe ({type(error).__name__}: "
            f"{first_line(error)}). Name an older checkpoint with --from_checkpoint, or start a new run in "
            "another --logdir."
        ) from error


# --- One run a logdir ----------------------------------------------------------------------------------


@contextlib.contextmanager
def run_lock(logdir: str | os.PathLike) -> Iterator[list[str]]:
    """Hold a logdir for one run; missing folders are made. Yields lines for the log.

    The operating system releases the lock when the process ends, even if it is killed. If nothing was written
    in the meantime, the folders that were made are removed. Raises UserError if another run holds the
    logdir, or if it cannot be written.
    """
    folder = Path(logdir)
    lock = filelock.FileLock(folder / LOCK, fallback_to_soft=False, thread_local=False)
    made = [parent for parent in (folder, *folder.parents) if not os.path.exists(parent)]  # innermost first
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
        for leftover in folder.glob(".*.tmp"):  # from a kill during a write
            leftover.unlink()
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


# --- Weights to share ----------------------------------------------------------------------------------


def write_weights(
    path: str | os.PathLike,
    config: Config,
    step: int,
    agent: Mapping[str, Any],
    dtype: str = "float32",
    decoder: bool = True,
) -> int:
    """Write the weights of an agent to a .safetensors file, atomically; returns how many numbers it holds.

    Args:
        path: must end in .safetensors.
        config: of the training run; its `PLACES` are left out.
        step: env steps of training.
        agent: `Dreamer.state_dict()`. The optimiser, slow critics (they start as copies of the critics) and
            an explorer's FIFO are left out.
        dtype: of matrices and kernels. Vectors and scalars are few, and stay float32.
        decoder: False leaves the decoder out; training from the file then learns a new one.

    Raises UserError for a number that `dtype` cannot hold, and if the disk refuses.
    """
    if Path(path).suffix != WEIGHTS:
        raise UserError(f"--export {path} must end in {WEIGHTS}")
    tensors = {
        f"{module}.{name}": _convert(f"{module}.{name}", value, DTYPES[dtype])
        for module in MODULES
        for name, value in agent.get(module, {}).items()
        if not {"slow_critic", "fifo"} & set(name.split(".")) and (decoder or not name.startswith("decoder."))
    }
    about = {
        "lore_format": WEIGHTS_FORMAT,
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
    if not rounded.isfinite().all() and value.isfinite().all():
        raise UserError(
            f"--dtype {str(dtype).removeprefix('torch.')} cannot hold {name}, which contains "
            f"{value.abs().max():.3g}: use bfloat16 or float32"
        )
    return rounded.clone(memory_format=torch.contiguous_format)


def _digest(about: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the whole content."""
    digest = hashlib.sha256(json.dumps(sorted(about.items())).encode())
    for name, value in sorted(tensors.items()):
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def read_weights(path: str | os.PathLike) -> dict[str, Any]:
    """Read a file of weights as the payload of a checkpoint: `config`, `step`, and `agent` without optimiser.

    Raises UserError if the file is damaged or not one of LoRe's.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from error
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged or not a safetensors file: {error}") from error
    if about.get("lore_format") != WEIGHTS_FORMAT:
        raise UserError(
            f"{path} does not hold weights of this version of LoRe. Use the version that wrote it, and see "
            "evaluate.py --export."
        )
    if about.pop("sha256", None) != _digest(about, tensors):
        raise UserError(f"{path} is damaged: its checksum is wrong. Copy it once more.")
    with reading(path):
        agent = {module: {} for module in MODULES} | {"skills": json.loads(about["skills"])}
        for name, value in tensors.items():
            module, _, rest = name.partition(".")
            agent[module][rest] = value
            if "critic" in rest.split("."):
                agent[module][rest.replace("critic.", "slow_critic.", 1)] = value.clone()
        return {"config": about["config"], "step": int(about["step"]), "agent": agent}


def transfer(modules: Mapping[str, nn.Module], agent: Mapping[str, Any], parts: Sequence[str]) -> list[str]:
    """Copy the named `PARTS` of a checkpoint's agent to `modules`, each weight whose shape fits.

    Returns lines for the log: how many weights were copied, and which were not. Raises UserError if no
    weight fits, ValueError for weights that are not finite.
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
            fate = "starts untrained" if name in here else "is not used"
            lines.append("  {} {}: {} in the checkpoint, {} here".format(name, fate, *shapes))
    if not some:
        reason = next((line.strip() for line in lines if line.startswith("  ")), "they have no weights")
        raise UserError(f"Nothing of {', '.join(parts)} can be transferred, as no shape fits: {reason}")
    others = [part for part in PARTS if part not in parts]
    return [*lines, f"Not transferred: {', '.join([*others, 'the optimiser'])}"]
