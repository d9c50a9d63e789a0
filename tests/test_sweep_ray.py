"""A sweep with a real local Ray: runs and workers are killed, and the sweep is stopped and resumed."""

import contextlib
import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_helpers import ROOT, TINY

pytest.importorskip("ray.tune", reason="pip install -r requirements/ray.txt", exc_type=ImportError)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes in /proc"),
]
PATIENCE = 500  # seconds: the machine may be busy
STEPS = 240


@contextlib.contextmanager
def started(logdir: Path, *words: str):
    options = ["--steps", str(STEPS), "--save_every", "40", "--grid", "seed=0,1,2", "--logdir", str(logdir)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "sweep.py", *TINY, *options, *words], cwd=ROOT, env=env
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def results(logdir: Path) -> dict[str, tuple[str, str]]:
    with open(logdir / "summary.csv", newline="", encoding="utf-8") as file:
        return {row["run"]: (row["status"], row["step"]) for row in csv.DictReader(file)}


def processes_of(place: Path) -> list[Path]:
    """The processes of dreamer.py that write to `place`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if str(place).encode() in words and any(word.endswith(b"dreamer.py") for word in words):
                found.append(folder)
    return found


def wait_for(condition):
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def when_saved(place: Path) -> Path:
    """The process of a run that has just written a checkpoint."""
    wait_for(lambda: list(place.glob("checkpoints/step-*.pt")))
    (process,) = processes_of(place)
    return process


def test_sweep_survives_a_killed_worker_and_a_killed_run(tmp_path):
    with started(tmp_path, "--retries", "1") as process:
        os.kill(int(when_saved(tmp_path / "seed=0").name), signal.SIGKILL)
        status = (when_saved(tmp_path / "seed=1") / "status").read_text()
        os.kill(next(int(x.split()[1]) for x in status.splitlines() if x.startswith("PPid")), signal.SIGKILL)
        assert process.wait(timeout=PATIENCE) == 0
    assert results(tmp_path) == {f"seed={seed}": ("finished", str(STEPS)) for seed in range(3)}
    for seed in range(3):
        log = tmp_path.joinpath(f"seed={seed}.log").read_text()
        assert log.count("Resumed at step") == (seed < 2), log
        assert not processes_of(tmp_path / f"seed={seed}")


def test_same_command_resumes_a_stopped_sweep(tmp_path):
    with started(tmp_path) as process:
        when_saved(tmp_path / "seed=0")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=PATIENCE) == 128 + signal.SIGTERM
    assert {status for status, _ in results(tmp_path).values()} & {"stopped", "waiting"}
    wait_for(lambda: not any(processes_of(tmp_path / f"seed={seed}") for seed in range(3)))
    with started(tmp_path) as process:
        assert process.wait(timeout=PATIENCE) == 0
    assert results(tmp_path) == {f"seed={seed}": ("finished", str(STEPS)) for seed in range(3)}
    assert "Resumed at step" in tmp_path.joinpath("seed=0.log").read_text()
