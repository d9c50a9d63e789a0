"""Runs of the program in processes that start at once, and that die by SIGKILL where they are told to."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest

import dreamer

CHANGES = ("replace", "link", "fsync", "unlink", "rmdir", "mkdir")  # of the file system, in os

# A server that has imported all forks each process: importing torch anew would take longer than the runs.
# Of its own threads, which a fork would lose, it has none.
servers = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
multiprocessing.set_forkserver_preload(["killing"])


def start(argv: list[str], die_at: int | None = None) -> multiprocessing.Process:
    """Start the program; with `die_at` it dies just before its so many-th change of the file system."""
    process = servers.Process(target=_run, args=(argv, die_at))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # by which the server finds what it imports
        process.start()
    return process


def _run(argv: list[str], die_at: int | None) -> None:
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, sys.stdout.fileno())
    if die_at:
        left = iter(range(die_at - 1))
        for name in CHANGES:
            setattr(os, name, _deadly(getattr(os, name), left))
    sys.exit(dreamer.main(argv))


def _deadly(function, left):
    def call(*args, **kwargs):
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return call


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
