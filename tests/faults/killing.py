"""Runs in processes that die by SIGKILL at a chosen point, and what must be true afterwards."""

import io
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint as checkpoints
import dreamer
from episodes import list_episodes

TRAINED = 3 / 8  # updates for each step after the 30th, with the options of run_helpers.TINY
CHANGES = ("replace", "link", "fsync", "unlink", "rmdir", "mkdir")  # of the file system, in os

# A server that has imported all forks each process: importing torch again would take longer than the runs.
# Of its own threads, which a fork would lose, it has none.
servers = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
multiprocessing.set_forkserver_preload(["killing"])


def start(argv: list[str], die_at: int | None = None) -> multiprocessing.Process:
    """Start the program; with `die_at` it dies at that change of files or save of arrays, counted from 1."""
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
        for module, name, place in ((torch, "save", 1), (np, "savez", 0), (np, "savez_compressed", 0)):
            setattr(module, name, _deadly_save(getattr(module, name), place, left))
    sys.exit(dreamer.main(argv))


def _deadly(function, left):
    def call(*args, **kwargs):
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return call


def _deadly_save(save, place, left):
    """Where it is due, half of what `save` writes reaches the file, its argument number `place`."""

    def call(*args, **kwargs):
        if next(left, None) is None:
            whole = io.BytesIO()
            save(*args[:place], whole, *args[place + 1 :], **kwargs)
            args[place].write(whole.getvalue()[: whole.tell() // 2])
            args[place].flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(*args, **kwargs)

    return call


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def check_agreement(logdir) -> dict:
    """The last checkpoint is whole; its step counter, weights and the replay's files are of one moment."""
    state, path, notes = checkpoints.load_checkpoint(logdir)
    assert path.name == checkpoints.LATEST and notes == []
    agent, replay, step = state["agent"], state["replay"], state["step"]
    assert step == state["progress"]["transitions"]
    assert agent["updates"] == set(agent["optimizer"]["updates"]).pop() == max(0, int((step - 30) * TRAINED))
    place = logdir / "replay_state" / f"step-{step:012d}" / replay["moment"]
    files = {file.name: file for file in list_episodes(logdir / "train_eps")}
    first = 0
    for env, segments in enumerate(replay["streams"]):
        for name, begin, end in segments:
            opened = replay["open"].get(env) == name
            path = place / f"open-{env}.npz" if opened else files[name].path
            with np.load(path, allow_pickle=False) as rows:
                assert len(rows["is_first"]) == end - begin and rows["is_first"][0]
                assert rows["is_last"][-1] != opened
                first += int(rows["is_first"].sum())
    assert first == state["progress"]["episodes"]
    stored = sum(end - begin for segments in replay["streams"] for _, begin, end in segments)
    assert stored == state["progress"]["transitions"] + state["progress"]["episodes"]
    return state
