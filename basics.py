"""Small tools without torch, for worker processes too: errors, atomic files, seeds, signals, free memory.

Importing torch would cost each worker a second and more than 100 MB.
"""

from __future__ import annotations  # doctor.py must start on older Pythons

import contextlib
import ctypes
import errno
import hashlib
import json
import operator
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:  # doctor.py also runs without it
    import numpy as np

WINDOWS = os.name == "nt"
BUSY_TRIES = 20  # on Windows, to replace a file that another process has open
BUSY_PAUSE = 0.25  # seconds between them
UNKNOWN_MEMORY = 4 * 2**30  # bytes of RAM assumed free if the system does not report it
DISK_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}

MAX_REASON = 200  # characters of another program's message in one of ours
# Characters that control a terminal, and surrogates, which UTF-8 cannot encode.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(Exception):
    """An error that the user can fix. The message says what is wrong, where, and what to do.

    It is one printable line, whatever foreign text (a value, a file name) it contains.
    """

    def __init__(self, message: str):
        super().__init__(CONTROL.sub("?", message))


def first_line(error: BaseException) -> str:
    """The first line of an error of another library, shortened, for a message to the user."""
    line = (str(error).splitlines() or [""])[0] or type(error).__name__
    return line if len(line) <= MAX_REASON else f"{line[:MAX_REASON]}..."


def write_error(path: str | os.PathLike, error: OSError) -> UserError:
    """The error for a file that cannot be written."""
    if error.errno in DISK_FULL:
        return UserError(f"Cannot write {path}: disk full. Free some space, then start again.")
    return UserError(f"Cannot write {path}: {error.strerror or error}.")


def sync_folder(folder: Path) -> None:
    """Make a rename in a folder survive a power cut. Windows cannot open folders and does not need this."""
    if WINDOWS:
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temp_beside(path: Path) -> Path:
    """A hidden unique name in the same folder, for a file that is not complete yet."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


def replace(source: Path, target: Path) -> None:
    """`os.replace`, which Windows refuses while a virus scanner or a reader has the target open."""
    for left in reversed(range(BUSY_TRIES if WINDOWS else 1)):
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if not left:
                raise
        time.sleep(BUSY_PAUSE)


def atomic_write(path: str | os.PathLike, write: Callable[[BinaryIO], None]) -> None:
    """Write a file so that it appears whole or not at all. Missing folders are made.

    `write` gets an open binary file. If anything fails, the old file stays and no temporary file is left.
    Raises UserError if the system refuses (disk full, no permission); other errors of `write` pass through.
    """
    path = Path(path)
    temp = temp_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temp, "xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            replace(temp, path)
        finally:
            temp.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise write_error(path, error) from error


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed that depends on the seed and the names only, the same on every machine and Python."""
    plain = [name if isinstance(name, str) else operator.index(name) for name in (seed, *names)]
    digest = hashlib.sha256(json.dumps(plain).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def numpy_rng(seed: int, *names: str | int) -> np.random.Generator:
    """A NumPy generator for the given purpose."""
    import numpy as np

    return np.random.default_rng(derive_seed(seed, *names))


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Within, Ctrl-C and SIGTERM are added to the yielded list; a second one interrupts at once."""
    received: list[int] = []

    def note(signum: int, _frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(signum)

    before = {sig: signal.signal(sig, note) for sig in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)


def free_memory() -> int:
    """Bytes of RAM that can be allocated now; half of all on macOS, 4 GiB if the system reports none."""
    if sys.platform == "win32":

        class Status(ctypes.Structure):  # MEMORYSTATUSEX of the Windows API
            _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)]
            _fields_ += [(name, ctypes.c_ulonglong) for name in ("total", "free", "a", "b", "c", "d", "e")]

        status = Status(length=ctypes.sizeof(Status))
        ok = ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
        return int(status.free) if ok else UNKNOWN_MEMORY
    try:
        if sys.platform == "darwin":
            return int(subprocess.run(["sysctl", "-n", "hw.memsize"], capture_output=True).stdout) // 2
        meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text("utf-8").splitlines())
        return min(int(meminfo["MemAvailable"].split()[0]) * 1024, _container_memory())
    except (OSError, ValueError, KeyError):
        return UNKNOWN_MEMORY


def _container_memory() -> int:
    """Bytes that a Linux container may still allocate, where /proc/meminfo shows the memory of the host."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text("utf-8").strip()
        stat = dict(line.split() for line in (group / "memory.stat").read_text("utf-8").splitlines())
        used = int((group / "memory.current").read_text("utf-8")) - int(stat["inactive_file"])
        return sys.maxsize if limit == "max" else max(0, int(limit) - used)
    except (OSError, ValueError, KeyError):
        return sys.maxsize  # no container, or none with a limit


def free_disk(folder: str | os.PathLike) -> int:
    """Free bytes on the disk of `folder`, which need not exist yet."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
