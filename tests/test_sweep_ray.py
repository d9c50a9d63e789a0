"""A sweep of four real runs on a real local Ray: workers and runs are killed, and it is stopped half-way."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_helpers import TINY

import sweep

pytest.importorskip("ray", reason="pip install -r requirements/ray.txt")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes in /proc"),
]
PATIENCE = 500  # seconds: these machines are shared
STEPS = 240


def start(logdir: Path, *words: str) -> subprocess.Popen:
    command = [
        sys.executable,
        "sweep.py",
        *TINY,
        "--steps",
        str(STEPS),
        "--save_every",
        "40",
        "--eval_every",
        "120",
    ]
    command += ["--grid", "seed=0,1", "actor.entropy=3e-3,3e-4", "--logdir", str(logdir), *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=sweep.ROOT, env=env, stdout=subprocess.PIPE, text=True)


def rows(logdir: Path) -> dict[str, dict]:
    with open(logdir / "summary.csv", newline="", encoding="utf-8") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def process_of(place: Path) -> int | None:
    """The process of dreamer.py that writes to `place`."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        if str(place).encode() in words and any(word.endswith(b"dreamer.py") for word in words):
            return int(folder.name)
    return None


def parent_of(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("PPid"))


def wait_for(what, why: str):
    deadline = time.monotonic() + PATIENCE
    while not (found := what()):
        assert time.monotonic() < deadline, f"no {why} in {PATIENCE} seconds"
        time.sleep(0.02)
    return found


def when_saved(place: Path) -> int:
    """The process of a run that has just written its first checkpoint, and has steps left to do."""
    wait_for(lambda: sweep.saved_step(place) > 0, "checkpoint")
    return process_of(place)


def test_a_sweep_survives_a_killed_worker_and_a_killed_run(tmp_path):
    with start(tmp_path, "--retries", "1") as process:
        places = [tmp_path / f"seed=0,actor.entropy={value}" for value in ("3e-3", "3e-4")]
        run = when_saved(places[0])
        os.kill(run, signal.SIGKILL)
        worker = parent_of(when_saved(places[1]))
        assert b"ray::Try" in Path(f"/proc/{worker}/cmdline").read_bytes()
        os.kill(worker, signal.SIGKILL)
        out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, out
    assert f"{places[0].name}: killed by SIGKILL; it is tried again from step" in out
    assert f"{places[1].name}: its Ray worker died (ActorDiedError); it is tried again from step" in out
    assert "Runs: 4 finished" in out
    table = rows(tmp_path)
    assert len(table) == 4
    for name, row in table.items():
        log = tmp_path.joinpath(f"{name}.log").read_text()
        killed = tmp_path / name in places
        assert (row["status"], row["tries"], row["step"]) == ("finished", str(1 + killed), str(STEPS)), log
        assert log.count("Resumed at step") == killed
        assert float(row["eval_return"]) <= float(row["best_eval_return"]) and float(row["hours"]) > 0
    assert not any(process_of(tmp_path / name) for name in table), "a process was left behind"


def with_status(logdir: Path, status: str) -> list[str]:
    """Names of the runs that the summary says this of."""
    if not (logdir / "summary.csv").exists():
        return []
    return [name for name, row in rows(logdir).items() if row["status"] == status]


def test_a_stopped_sweep_goes_on_by_the_same_command(tmp_path):
    with start(tmp_path) as process:
        # Ray begins them in any order.
        first = tmp_path / wait_for(lambda: with_status(tmp_path, "finished"), "finished run")[0]
        wait_for(lambda: with_status(tmp_path, "running"), "running run")
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGTERM, out
    assert "Stopped by SIGTERM; the same command goes on" in out
    before = rows(tmp_path)
    assert {"finished"} < {row["status"] for row in before.values()} <= {"finished", "stopped", "waiting"}
    saved = {name: sweep.saved_step(tmp_path / name) for name in before}
    assert not any(process_of(tmp_path / name) for name in before)
    stamp = (first / "latest.pt").stat().st_mtime_ns
    with start(tmp_path) as process:
        out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, out
    assert first.name not in out and (first / "latest.pt").stat().st_mtime_ns == stamp
    for name, row in rows(tmp_path).items():
        log = tmp_path.joinpath(f"{name}.log").read_text()
        assert (row["status"], row["step"]) == ("finished", str(STEPS)), log
        assert int(row["tries"]) == int(before[name]["tries"]) + (before[name]["status"] != "finished")
        assert float(row["hours"]) >= float(before[name]["hours"])
        assert log.count("Resumed at step") == (before[name]["status"] != "finished" and saved[name] > 0), log
