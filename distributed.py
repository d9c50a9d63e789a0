"""Data-parallel learners, under torch.distributed's names. With one learner, every function does nothing.

Each rank has its own envs, replay and share of the batch, and computes the gradient of that share. All ranks
step with the mean gradient, so their weights stay equal to the bit. Rank 0 logs, evaluates and saves.

`launch` starts the ranks of one machine (`--parallel N`); torchrun starts those of several machines.
"""

import contextlib
import datetime
import operator
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
from config import Config

SHARED = ("batch_size", "envs.amount")  # options whose totals are divided over the ranks
TIMEOUT = datetime.timedelta(days=1)  # ranks wait while rank 0 evaluates or saves
GRACE_SECONDS = 60  # for the other ranks to end after one is lost
POLL_SECONDS = 0.1
LAUNCHER = "LORE_LAUNCHER"  # environment variable: process id of the launcher
REPORTED = "LORE_REPORTED"  # environment variable: file created by the rank that reports an error
LOST = 75  # exit code of a rank that ended because another one did
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit codes after a clean stop


class LostRank(UserError):
    """Another learner has ended or cannot be reached."""


class Silent:
    """Replaces logger and checkpoint on every rank but the first: all its methods do nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    return rank() == 0


def local_world_size() -> int:
    """Number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def seed_names() -> tuple[str | int, ...]:
    """What a rank adds to the names from which the seeds of its generators are derived."""
    return ("rank", rank()) if rank() else ()


def all_reduce(tensors: Sequence[Tensor]) -> None:
    """Replace floating-point tensors by their means over the ranks."""
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    with _exchange():
        dist.all_reduce(flat)
    parts = (flat / world_size()).split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(list(tensors), [p.view_as(t) for p, t in zip(parts, tensors, strict=True)])


def all_gather(x: Tensor) -> Tensor:
    """Concatenate the x [N] of all ranks: [ranks * N]."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    with _exchange():
        dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def broadcast(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by those of rank 0."""
    if world_size() > 1:
        with _exchange():
            for tensor in tensors:
                dist.broadcast(tensor, 0)


def total(*counts: int) -> list[int]:
    """Sum of each count over the ranks."""
    if world_size() == 1:
        return list(counts)
    sums = torch.tensor(counts, dtype=torch.int64)
    with _exchange():
        dist.all_reduce(sums)
    return sums.tolist()


def any_rank(flag: Any) -> bool:
    """Whether the flag is true on at least one rank."""
    return total(int(bool(flag)))[0] > 0


def broadcast_object(value: Any) -> Any:
    """Rank 0's value, of plain types."""
    if world_size() == 1:
        return value
    values = [value]
    with _exchange():
        dist.broadcast_object_list(values, 0)
    return values[0]


def all_gather_object(value: Any) -> list[Any]:
    """The values of all ranks, of plain types, in the order of the ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with _exchange():
        dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until all ranks are here."""
    total(0)


@contextlib.contextmanager
def _exchange() -> Iterator[None]:
    """Within, the errors of gloo, NCCL and the store are a LostRank."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0]
        raise LostRank(
            f"Another learner has ended or cannot be reached ({reason}). "
            "The same command resumes from the last checkpoint."
        ) from error


def launched() -> bool:
    """Whether this process is one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Within, this process is one of the ranks, if there are several. Raises UserError."""
    if not launched():
        yield
        return
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(
            f"WORLD_SIZE is set for several learners, but {', '.join(missing)} is not set: start them with "
            "torchrun or --parallel, or unset WORLD_SIZE"
        )
    with _exchange():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def divisible(config: Config) -> tuple[Config, list[str]]:
    """The config with totals that all ranks can share, and lines about those that were raised."""
    size = int(os.environ.get("WORLD_SIZE", config.parallel))
    totals = {name: operator.attrgetter(name)(config) for name in SHARED}
    raised = {name: -(-total // size) * size for name, total in totals.items() if total % size}
    lines = [
        f"--{name} {totals[name]} is raised to {value}, a multiple of the {size} learners"
        for name, value in raised.items()
    ]
    return config.replace(raised) if raised else config, lines


def local_device(name: str, parallel: int, gpus: int) -> str:
    """The `--device` of this rank, or of rank 0 before the launch. Raises UserError.

    name: auto, cpu, cuda or one GPU. parallel: `--parallel`. gpus: number of GPUs on this machine.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if launched() and parallel not in (1, size):
        raise UserError(f"--parallel {parallel}, but {size} learners were started: take --parallel 1")
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", max(parallel, size)))
    if local_size == 1 or name == "cpu" or (name == "auto" and not gpus):
        return name
    if name not in ("auto", "cuda"):
        raise UserError(f"--device {name} is one GPU for {local_size} learners: take cuda, or cpu")
    if local_size > gpus:
        fewer = f"--parallel {gpus}, or " if gpus else ""
        raise UserError(
            f"{local_size} learners on this machine need {local_size} GPUs, and it has {gpus}: take {fewer}"
            "--device cpu"
        )
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"


def reports_errors() -> bool:
    """Whether this process prints its error: of the ranks that `launch` started, the first one to fail."""
    if REPORTED not in os.environ:
        return True
    try:
        Path(os.environ[REPORTED]).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def orphaned() -> bool:
    """Whether the launcher of this rank is gone."""
    launcher = os.environ.get(LAUNCHER)
    return launcher is not None and os.name != "nt" and os.getppid() != int(launcher)


def launch(amount: int, argv: Sequence[str]) -> int:
    """Run `dreamer.py argv` as `amount` ranks on this machine until all have ended; the exit code.

    Signals are forwarded to all ranks. If a rank is lost, the others end too.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": amount}
    common |= {"LOCAL_WORLD_SIZE": amount, LAUNCHER: os.getpid()}
    command = [sys.executable, str(Path(__file__).with_name("dreamer.py")), *argv]
    ranks: list[subprocess.Popen] = []
    forwarded: list[int] = []

    def forward(signum: int, _frame: object) -> None:
        forwarded.append(signum)
        for process in ranks:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signum)

    # The ranks get their own session, or Ctrl-C would reach them twice. Windows' console signals all itself.
    own_session = os.name != "nt"
    handler = forward if own_session else signal.SIG_IGN
    before = {sig: signal.signal(sig, handler) for sig in (signal.SIGINT, signal.SIGTERM)}
    try:
        with tempfile.TemporaryDirectory(prefix="lore-") as folder:
            common[REPORTED] = Path(folder) / "reported"
            for index in range(amount):
                own = {**common, "RANK": index, "LOCAL_RANK": index}
                env = {**os.environ, **{name: str(value) for name, value in own.items()}}
                ranks.append(subprocess.Popen(command, env=env, start_new_session=own_session))
            return _wait(ranks, forwarded)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
                process.wait()
        for sig, handler in before.items():
            signal.signal(sig, handler)


def _wait(ranks: Sequence[subprocess.Popen], forwarded: Sequence[int]) -> int:
    """The exit code of all ranks, or of the one that failed by itself. forwarded: signals sent to them."""
    deadline = None
    while any(process.poll() is None for process in ranks):
        failed = [process.returncode for process in ranks if process.returncode]
        # A clean stop may take long (a large replay, an upload); after a second signal it may not.
        if failed and not (len(forwarded) < 2 and set(failed) <= set(STOPPED)):
            deadline = deadline or time.monotonic() + GRACE_SECONDS
            if time.monotonic() > deadline:
                break
        time.sleep(POLL_SECONDS)
    codes = [process.returncode for process in ranks]
    for index, code in enumerate(codes):
        if code and code < 0 and -code not in forwarded:
            return _failed(f"Learner {index} was ended by {signal.Signals(-code).name}")
    for code in codes:
        if code and code != LOST:
            return code if code > 0 else 128 - code  # negative: a signal that came before the handler was set
    return _failed("The learners have lost each other") if any(codes) else 0


def _failed(what: str) -> int:
    print(f"error: {what}. The same command resumes from the last checkpoint.", file=sys.stderr)
    return 2
