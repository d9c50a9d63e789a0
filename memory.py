"""How much memory and disk is free."""

from __future__ import annotations  # doctor.py uses this file, and tells an older Python that it is too old

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

UNKNOWN_MEMORY = 4 * 2**30  # bytes of RAM taken as free where the system does not tell


def free_memory() -> int:
    """Bytes of RAM that can be taken now: 4 GiB where the system does not tell, half of all on macOS."""
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
        meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return min(int(meminfo["MemAvailable"].split()[0]) * 1024, _container_memory())
    except (OSError, ValueError, KeyError):
        return UNKNOWN_MEMORY


def _container_memory() -> int:
    """What a Linux container may still take; /proc/meminfo shows the host's memory there."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])
        return sys.maxsize if limit == "max" else max(0, int(limit) - used)
    except (OSError, ValueError, KeyError):
        return sys.maxsize  # no container, or none with a limit


def free_disk(folder: str | os.PathLike) -> int:
    """Free bytes of the disk that holds `folder`, or would hold it."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
