"""What the tests of whole runs share: a tiny run, signals at a chosen step, comparing two runs."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint as checkpoints
import dreamer
from training import Progress

ROOT = Path(dreamer.__file__).parent
# 120 env steps and about 40 updates within a second; 2 envs, so episodes of 16 steps end every 32.
TINY = (
    "--configs debug dummy_cue --device cpu --deterministic True --threads 1 --envs.amount 2 --time_limit 0 "
    "--size 16 16 --encoder.cnn_mults 1 1 --video_pred_log False "
    "--rssm.deter 8 --rssm.hidden 8 --rssm.stoch 2 --rssm.blocks 2 --imag_horizon 2 --batch_size 2 "
    "--batch_length 4 --steps 120 --prefill 30 --train_ratio 3 --log_every 20 --eval_every 50 "
    "--save_every 1000"
).split()


def train(logdir: Path, *options: str) -> int:
    """Run the tiny command in this process; the exit code."""
    return main(*TINY, "--logdir", str(logdir), *options)


def main(*argv: str) -> int:
    """Run a command in this process and then switch torch back, for the tests that follow."""
    threads = torch.get_num_threads()
    try:
        return dreamer.main(list(argv))
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def signal_at(step: int, signum: int = signal.SIGTERM) -> Iterator[None]:
    """Within, a run gets a signal in its env step `step`."""
    with after_step(lambda before, now: before < step <= now and signal.raise_signal(signum)):
        yield


@contextlib.contextmanager
def after_step(act: Callable[[int, int], object]) -> Iterator[None]:
    """Within, call `act(step before, step now)` when a run has counted a step."""
    whole = Progress.count

    def count(progress: Progress, obs: dict) -> int:
        before = progress.step
        now = whole(progress, obs)
        act(before, now)
        return now

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "count", count)
        yield


def stop_and_resume(logdir: Path, *options: str, at: Sequence[int]) -> None:
    """Train with a stop at each of these env steps, and resume each time with the same command."""
    for step in at:
        with signal_at(step):
            assert train(logdir, *options) == 128 + signal.SIGTERM
    assert train(logdir, *options) == 0


def train_process(
    logdir: Path, *options: str, kill_at: int | None = None, start_new_session: bool = False
) -> subprocess.Popen:
    """Start the tiny command in a process, which SIGKILL ends at env step `kill_at`."""
    command = [*TINY, "--logdir", str(logdir), *options]
    script = "import sys, dreamer; sys.exit(dreamer.main(sys.argv[1:]))"
    if kill_at:
        script = (
            "import signal, sys; sys.path.insert(0, 'tests'); from run_helpers import dreamer, signal_at\n"
            f"with signal_at({kill_at}, signal.SIGKILL): sys.exit(dreamer.main(sys.argv[1:]))"
        )
    return subprocess.Popen(
        [sys.executable, "-c", script, *command],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=start_new_session,
    )  # fmt: skip


def metrics(logdir: Path) -> list[dict]:
    """The lines of metrics.jsonl without durations and speeds."""
    lines = [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]
    clocks = ("env/fps", "llm_adapter/latency_ms")
    return [{k: v for k, v in line.items() if k not in clocks and k[:5] != "time/"} for line in lines]


def log(logdir: Path) -> str:
    return (logdir / "train.log").read_text()


def moment(logdir: Path) -> dict:
    """The content of the last checkpoint without names of files, which differ between runs."""
    state = checkpoints.load_checkpoint(logdir)[0]
    del state["config"]
    replay = state["replay"]
    place = logdir / "replay_state" / f"step-{state['step']:012d}" / replay.pop("moment")
    del replay["tick"]
    replay["open"] = sorted(replay["open"])
    replay["streams"] = [[place[1:] for place in stream] for stream in replay["streams"]]
    for path in sorted(place.iterdir()):
        with np.load(path) as arrays:
            state[path.name] = {key: torch.from_numpy(arrays[key]) for key in arrays}
    return state


def differences(one, other, where: str = "") -> list[str]:
    """Where two nested structures of plain values and tensors differ, to the last bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        same = same and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
        return [] if same else [f"{where}: {one} and {other}"]
    if type(one) is not type(other):
        return [f"{where}: {one!r} and {other!r}"]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{where}: keys {sorted(map(str, one.keys() ^ other.keys()))}"]
        return [line for key in one for line in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [f"{where}: {len(one)} and {len(other)} entries"]
        return [
            line
            for index, (a, b) in enumerate(zip(one, other, strict=True))
            for line in differences(a, b, f"{where}/{index}")
        ]
    return [] if one == other else [f"{where}: {one!r} and {other!r}"]


def assert_same_run(one: Path, other: Path) -> None:
    """Two runs logged the same values and ended in the same state: weights, optimiser, replay, envs, all."""
    assert metrics(one), "nothing was logged"
    assert differences(metrics(one), metrics(other)) == []
    assert differences(moment(one), moment(other)) == []
