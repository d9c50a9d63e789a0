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
import sys
import threading
import time
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import filelock
import safetensors
import torch
from safetensors.torch import save
from torch import Tensor, nn

from basics import UserError, atomic_write, first_line, sync_folder, temp_beside, write_error
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

LOCK = "run.lock"  # file in the logdir
BEAT = 10.0  # seconds between two signs of life
PATIENCE = 3 * BEAT  # seconds without one after which a run on another machine counts as gone
POLL = 0.5  # seconds between looks for one
MAX_BYTES = 1000  # of the file; a longer one is not ours
CANNOT_LOCK = {errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}

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


class Owner(NamedTuple):
    """Who holds a lock, or held it when it was killed."""

    host: str
    pid: int
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class RunLock:
    """Held from when it is made until `close`, by one run in a logdir. Missing folders are made.

    The lock is the operating system's and ends with its process, whatever ended that; then the file stays
    behind. Disks that several machines share may lock for each machine alone, or not at all. So who holds the
    lock touches the file every BEAT seconds, and who finds a file that another machine has left, or that
    cannot be locked, first looks for PATIENCE seconds whether anybody still touches it.

    `notes` are lines for the log. Raises UserError where another run lives, with its machine and process id,
    and where the file cannot be written.
    """

    def __init__(self, logdir: str | os.PathLike):
        self.path = Path(logdir) / LOCK
        self.notes: list[str] = []
        self._made = [folder for folder in self.path.parents if not folder.exists()]  # the innermost first
        self._closed = threading.Event()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._take()
        except OSError as error:
            raise write_error(self.path, error) from error
        threading.Thread(target=self._beat, name="run-lock", daemon=True).start()

    def _take(self) -> int:
        """Open, lock and sign the file; returns its descriptor."""
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                locked = _lock(file)
                if locked is False:
                    raise self._in_use(read_owner(self.path))
                if self._is_there(file):  # else its holder deleted it just before it was unlocked
                    self._replace(read_owner(self.path), bool(locked))
                    _sign(file)
                    return file
            except BaseException:
                os.close(file)
                raise
            os.close(file)

    def _is_there(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _in_use(self, owner: Owner | None) -> UserError:
        return UserError(
            f"{self.path.parent} is in use by another run ({owner or 'it is just starting'}). Stop that one "
            "first, or give another --logdir."
        )

    def _replace(self, owner: Owner | None, locked: bool) -> None:
        """Make sure that who signed the file is gone."""
        if owner is None:
            return
        if owner.host != socket.gethostname() or not locked:
            print(f"Looking for {PATIENCE:g} s whether a run is alive here: {owner}", file=sys.stderr)
            if self._is_touched():
                raise self._in_use(owner)
        self.notes.append(f"The last run here did not end by itself ({owner}): its lock is taken over")

    def _is_touched(self) -> bool:
        """Whether there is a sign of life. No clocks are compared: machines disagree on the time."""
        until, first = time.monotonic() + PATIENCE, self._touched()
        while time.monotonic() < until:
            time.sleep(POLL)
            if self._touched() != first:
                return True
        return False

    def _touched(self) -> int:
        with open(self.path, "rb") as file:  # opened anew, or a network disk would tell what it remembers
            return os.fstat(file.fileno()).st_mtime_ns

    def _beat(self) -> None:
        while not self._closed.wait(BEAT):
            try:
                os.utime(self.path)
            except FileNotFoundError:  # somebody deleted it
                return
            except OSError:  # a network disk that is away for a moment; others will look for signs of life
                continue

    def close(self) -> None:
        """Give the logdir free. The file goes, and with it the folders that were made and are empty."""
        self._closed.set()
        if os.name != "nt":  # first, or whoever locks the file next would lose it
            self._delete()
        os.close(self._file)
        if os.name == "nt":  # an open file cannot be deleted: not ours before, not who locked it since
            self._delete()
        with contextlib.suppress(OSError):  # not empty
            for folder in self._made:
                folder.rmdir()

    def _delete(self) -> None:
        with contextlib.suppress(OSError):  # a file that stays behind is taken over
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _lock(file: int) -> bool | None:
    """Whether the open file is locked by this process now; None where the disk knows no locks."""
    try:
        return filelock.lock_descriptor(file, blocking=False)
    except OSError as error:
        if error.errno in CANNOT_LOCK:
            return None
        raise


def _sign(file: int) -> None:
    """Write down whose lock it is. Windows shows nobody else the first byte, which is the locked one."""
    since = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    text = " " + json.dumps(Owner(socket.gethostname(), os.getpid(), since)._asdict())
    os.ftruncate(file, 0)
    os.write(file, text.encode())
    os.fsync(file)


def read_owner(path: str | os.PathLike) -> Owner | None:
    """Who signed a lock file; None if nobody has, or if it says nothing of the kind."""
    with open(path, "rb", buffering=0) as file:
        file.seek(1)
        text = file.read(MAX_BYTES)
    try:
        content = json.loads(text)
        owner = Owner(str(content["host"]), int(content["pid"]), str(content["since"]))
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return owner if str(owner).isprintable() else None


def look(logdir: str | os.PathLike) -> tuple[Owner | None, bool | None]:
    """Who signed the lock of a logdir, and whether it is held; None where that cannot be told from here.

    Changes nothing. Raises FileNotFoundError where there is no lock.
    """
    path = Path(logdir) / LOCK
    owner = read_owner(path)
    file = os.open(path, os.O_RDWR)
    try:
        free = _lock(file)
    finally:
        os.close(file)
    elsewhere = owner is not None and owner.host != socket.gethostname()
    return owner, True if free is False else None if elsewhere or free is None else False


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
