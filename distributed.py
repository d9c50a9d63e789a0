"""Learners side by side: processes with envs, replay and batches of their own, and one agent in common.

Each rank computes the gradient of its share of the batch; all take their step with the mean over the ranks,
so their weights stay equal to the bit. They walk through the loop in step: what a run counts (env steps,
updates, a stop) is counted over all ranks. Rank 0 logs, evaluates and saves.

`launch` starts the ranks on this machine (`--parallel N`); on several machines torchrun does.
"""

import contextlib
import datetime
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from basics import UserError

PATIENCE = datetime.timedelta(days=1)  # the others wait while rank 0 evaluates or saves, however long
GRACE = 60  # seconds that the ranks get to end by themselves when one of them is lost
POLL_SECONDS = 0.1
LAUNCHER = "LORE_LAUNCHER"  # the variable by which ranks know the process id of who launched them
WORD = "LORE_LAUNCHER_WORD"  # and where the file is made by which one of them has the word
LOST = 75  # exit code that tells the launcher that a rank ended because another did
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit codes after a stop, in good order


class LostRank(UserError):
    """Another learner has ended or cannot be reached."""


class Ranks:
    """One learner alone: what it has is all there is."""

    rank = 0  # number among all
    local_size = 1  # learners on this machine

    def __init__(self, size: int = 1):
        self.size = size  # learners in all

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def share(self, total: int, name: str) -> int:
        """This rank's share of `total`, which all ranks have alike. Raises UserError if that cannot be."""
        if total % self.size:
            low, high = total // self.size * self.size, -(-total // self.size) * self.size
            nearest = f"{low} or {high}" if low else str(high)
            raise UserError(f"--{name} {total} cannot be divided over {self.size} learners: take {nearest}")
        return total // self.size

    def names(self) -> tuple[str | int, ...]:
        """What the seeds of this rank's generators are derived from besides their own names."""
        return ("rank", self.rank) if self.rank else ()

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace floating-point tensors by their means over the ranks."""

    def gather(self, x: Tensor) -> Tensor:
        """The x [N] of all ranks, one behind the other: [ranks * N]."""
        return x

    def copy(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by rank 0's."""

    def total(self, *counts: int) -> list[int]:
        """The sum over the ranks of each count."""
        return list(counts)

    def any(self, flag: Any) -> bool:
        """Whether the flag is set on one rank at least."""
        return self.total(int(bool(flag)))[0] > 0

    def tell(self, value: Any) -> Any:
        """Rank 0's value, of plain types."""
        return value

    def collect(self, value: Any) -> list[Any]:
        """The values of all ranks, of plain types, in their order."""
        return [value]

    def wait(self) -> None:
        """Go on when all ranks have come here."""

    def close(self) -> None:
        """Part from the others."""

    def orphaned(self) -> bool:
        """Whether the process that launched the ranks is gone."""
        return False


class JoinedRanks(Ranks):
    """One of several learners, as the variables say that torchrun and `launch` set."""

    def __init__(self, device: torch.device):
        if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise UserError(
                f"WORLD_SIZE tells of several learners, but {', '.join(missing)} is not set: start them with "
                "torchrun or --parallel, or unset WORLD_SIZE"
            )
        env = {name: int(os.environ[name]) for name in ("RANK", "WORLD_SIZE")}
        super().__init__(env["WORLD_SIZE"])
        self.rank = env["RANK"]
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        self._launcher = int(os.environ.get(LAUNCHER, 0))
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        with _together():
            dist.init_process_group(backend, timeout=PATIENCE)

    def average(self, tensors: Sequence[Tensor]) -> None:
        if not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with _together():
            dist.all_reduce(flat)
        parts = (flat / self.size).split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [p.view_as(t) for p, t in zip(parts, tensors, strict=True)])

    def gather(self, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(self.size)]
        with _together():
            dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    def copy(self, tensors: Sequence[Tensor]) -> None:
        with _together():
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def total(self, *counts: int) -> list[int]:
        sums = torch.tensor(counts, dtype=torch.int64)
        with _together():
            dist.all_reduce(sums)
        return sums.tolist()

    def tell(self, value: Any) -> Any:
        values = [value]
        with _together():
            dist.broadcast_object_list(values, 0)
        return values[0]

    def collect(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        with _together():
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        self.total(0)

    def close(self) -> None:
        dist.destroy_process_group()

    def orphaned(self) -> bool:
        return bool(self._launcher) and os.name != "nt" and os.getppid() != self._launcher


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Within, the ranks exchange something; raises LostRank where one of them is gone."""
    try:
        yield
    except RuntimeError as error:  # of gloo, NCCL and the store
        reason = str(error).strip().split("\n")[0]
        raise LostRank(
            f"Another learner has ended or cannot be reached ({reason}). "
            "The same command goes on from the last checkpoint."
        ) from error


def launched() -> bool:
    """Whether this process is one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def place(name: str, parallel: int, gpus: int) -> str:
    """The `--device` of this rank, or of rank 0 where none is launched yet. Raises UserError.

    name: auto, cpu, cuda or one GPU. parallel: `--parallel`. gpus: how many there are.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if launched() and parallel not in (1, size):
        raise UserError(f"--parallel {parallel}, but {size} learners were started: take --parallel 1")
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", max(parallel, size)))
    if local_size == 1 or name == "cpu" or (name == "auto" and not gpus):
        return name
    if name not in ("auto", "cuda"):
        raise UserError(f"--device {name} names one GPU for {local_size} learners: take cuda, or cpu")
    if local_size > gpus:
        fewer = f"--parallel {gpus}, or " if gpus else ""
        raise UserError(
            f"{local_size} learners on this machine need {local_size} GPUs, and it has {gpus}: take {fewer}"
            "--device cpu"
        )
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"


def has_the_word() -> bool:
    """Whether this process is to tell the user what failed: of ranks that `launch` made, the first to ask."""
    if WORD not in os.environ:
        return True
    try:
        Path(os.environ[WORD]).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def join(device: torch.device) -> Ranks:
    """This process among the ranks; alone, if there are no others."""
    return JoinedRanks(device) if launched() else Ranks()


def launch(amount: int, argv: Sequence[str]) -> int:
    """Run `dreamer.py argv` as `amount` ranks on this machine, and wait for them; the exit code.

    Signals are passed on to all. If a rank is lost, the others end too.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": amount}
    common |= {"LOCAL_WORLD_SIZE": amount, LAUNCHER: os.getpid()}
    command = [sys.executable, str(Path(__file__).with_name("dreamer.py")), *argv]
    ranks: list[subprocess.Popen] = []
    passed: list[int] = []

    def pass_on(signum: int, _frame: object) -> None:
        passed.append(signum)
        for process in ranks:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signum)

    # Windows' console tells all its processes of Ctrl-C by itself; elsewhere they would hear of it twice.
    apart = os.name != "nt"
    before = {
        sig: signal.signal(sig, pass_on if apart else signal.SIG_IGN)
        for sig in (signal.SIGINT, signal.SIGTERM)
    }
    folder = tempfile.TemporaryDirectory(prefix="lore-")
    common |= {WORD: Path(folder.name) / "word"}
    try:
        for rank in range(amount):
            own = {**common, "RANK": rank, "LOCAL_RANK": rank}
            env = {**os.environ, **{name: str(value) for name, value in own.items()}}
            ranks.append(subprocess.Popen(command, env=env, start_new_session=apart))
        return _wait(ranks, passed)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
                process.wait()
        folder.cleanup()
        for sig, handler in before.items():
            signal.signal(sig, handler)


def _wait(ranks: Sequence[subprocess.Popen], passed: Sequence[int]) -> int:
    """The exit code of all, or that of a rank that failed by itself. `passed` are the signals passed on."""
    while not any(process.poll() for process in ranks):
        if all(process.poll() == 0 for process in ranks):
            return 0
        time.sleep(POLL_SECONDS)
    deadline = time.monotonic() + GRACE
    while any(process.poll() is None for process in ranks):
        # After a stop all end in good order, however long the last upload takes; a second signal is a hurry.
        ordered = len(passed) < 2 and all(process.returncode in (None, 0, *STOPPED) for process in ranks)
        if not ordered and time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
    codes = [process.returncode for process in ranks]
    for index, code in enumerate(codes):
        if code and code < 0 and -code not in passed:
            name = signal.Signals(-code).name
            _tell(f"Learner {index} was ended by {name}")
            return 2
    for code in codes:
        if code and code != LOST:
            return code if code > 0 else 128 - code  # by a signal that came before it could stop in order
    _tell("The learners have lost each other")
    return 2


def _tell(what: str) -> None:
    print(f"error: {what}. The same command goes on from the last checkpoint.", file=sys.stderr)
