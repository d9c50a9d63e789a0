"""A long run whose env workers are killed repeatedly: does its memory grow, does it leak file handles?

    python3 benchmarks/soak.py --hours 2 --kill_every 60 --out soak.json

A real run of Crafter with all features of `debug` and `lore_full`: evaluations, videos, checkpoints, advice.
While it trains, one of its workers gets SIGKILL now and then, and the main process is sampled. The time after
the warm-up is divided into ten parts. The run passes if

- the medians of the resident memory of all parts are within `--tolerance`, - the last part has no more
handles and threads than the first (the minimum of each part, because a restart takes
  some more for a moment) and no more child processes than any before (the maximum, because a killed
  evaluation worker is missing until the next evaluation),
- each kill led to one restart, and the run ended as it should.

The exit code is 1 otherwise. Options after `--` are passed to dreamer.py. Linux only.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUN = (
    "dreamer.py --configs crafter lore_full debug --device cpu --steps 1e12 --eval_every 1000 --log_every 500"
    " --save_every 500 --envs.amount 2 --envs.parallel process --envs.max_restarts 1000000"
).split()
WORKERS = ("train 0", "train 1", "eval 0")
PARTS = 10  # of the time after the warm-up
POLL = 0.5  # seconds between checks whether the run has begun or ended
COUNTS = {"handles": min, "threads": min, "children": max}  # must not grow, by this statistic of a part

Sample = dict[str, float]


def look_at(pid: int) -> Sample:
    """The resident bytes, handles, threads and children of a process, and the bytes of its largest child."""
    workers = [int(line.split()[1]) * 1024 for line in map(_resident, children(pid)) if line]
    return {
        "rss": int(_resident(pid).split()[1]) * 1024,
        "handles": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": len(os.listdir(f"/proc/{pid}/task")),
        "children": len(children(pid)),
        "worker_rss": max(workers, default=0),
    }


def _resident(pid: int) -> str:
    """The VmRSS line of a process, empty if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return next((line for line in lines if line.startswith("VmRSS")), "")


def children(pid: int) -> list[int]:
    """The children of all its threads, including zombies."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has just ended
            found += map(int, path.read_text().split())
    return sorted(found)


def workers_of(pid: int) -> list[int]:
    """The env workers among its children."""
    return [child for child in children(pid) if b"spawn_main" in _command(child)]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def watch(process: subprocess.Popen, args: argparse.Namespace, kills: list[int]) -> Iterator[Sample]:
    """Sample the run every `sample` seconds for `hours`, and kill a worker every `kill_every` seconds."""
    rng = random.Random(args.seed)
    start = time.monotonic()
    next_kill = args.kill_every
    while (now := time.monotonic() - start) < 3600 * args.hours:
        if process.poll() is not None:
            raise SystemExit(f"The run ended by itself after {now:.0f} s with exit code {process.returncode}")
        if now >= next_kill and (workers := workers_of(process.pid)):
            os.kill(rng.choice(workers), signal.SIGKILL)
            kills.append(round(now))
            next_kill = now + args.kill_every
        yield {"seconds": round(now, 1), **look_at(process.pid)}
        time.sleep(args.sample)


def wait_for_begin(process: subprocess.Popen, logdir: Path) -> None:
    """Wait until the run has saved and evaluated once, and so has all its workers."""
    while not ((logdir / "latest.pt").exists() and list(logdir.glob("eval_eps/*.npz"))):
        if process.poll() is not None:
            raise SystemExit(
                f"The run ended by itself with exit code {process.returncode}; see its last lines"
            )
        time.sleep(POLL)


def evaluate(samples: Sequence[Sample], warmup: float, tolerance: float) -> dict:
    """The figures of the parts after `warmup` seconds and whether they are flat: see the docstring above."""
    kept = [sample for sample in samples if sample["seconds"] >= warmup]
    if len(kept) < PARTS:
        raise SystemExit(
            f"{len(kept)} samples after the warm-up are too few: raise --hours or lower --sample"
        )
    parts = [kept[len(kept) * i // PARTS : len(kept) * (i + 1) // PARTS] for i in range(PARTS)]
    rss = [statistics.median(sample["rss"] for sample in part) for part in parts]
    spread = max(rss) / min(rss) - 1
    counts = {key: [of(sample[key] for sample in part) for part in parts] for key, of in COUNTS.items()}
    return {
        "rss_mib": [round(value / 2**20, 1) for value in rss],
        "rss_spread": round(spread, 4),
        "worker_rss_mib": [round(max(s["worker_rss"] for s in part) / 2**20, 1) for part in parts],
        **counts,
        "flat": spread <= tolerance
        and all(counts[key][-1] <= counts[key][0] for key in ("handles", "threads"))
        and counts["children"][-1] <= max(counts["children"][:-1]),
    }


def soak(args: argparse.Namespace, logdir: Path) -> dict:
    """Run, watch, stop and evaluate."""
    command = [sys.executable, *RUN, "--seed", str(args.seed), "--logdir", str(logdir), *args.override]
    kills: list[int] = []
    samples: list[Sample] = []
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        wait_for_begin(process, logdir)
        for sample in watch(process, args, kills):
            samples.append(sample)
            if args.out:
                args.out.write_text(json.dumps(samples))
    finally:
        process.terminate()
        code = process.wait()
    restarts = (logdir / "train.log").read_text(encoding="utf-8").count("Its worker is restarted")
    steps = json.loads((logdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])["step"]
    verdict = evaluate(samples, 60 * args.warmup, args.tolerance)
    # A worker is restarted at its next step, which may be late for that of the evaluation.
    restarted = 0 <= len(kills) - restarts <= len(WORKERS)
    return {
        "hours": args.hours,
        "steps": steps,
        "kills": len(kills),
        "restarts": restarts,
        "exit_code": code,
        **verdict,
        "passed": verdict["flat"] and restarted and code == 128 + signal.SIGTERM,
    }


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 if the run passed, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--hours", type=float, default=2.0, help="from the first checkpoint and evaluation on")
    add("--kill_every", type=float, default=60.0, help="seconds between kills of a worker")
    add("--sample", type=float, default=5.0, help="seconds between samples")
    add("--warmup", type=float, default=10.0, help="minutes that do not count: replay and caches fill")
    add("--tolerance", type=float, default=0.05, help="largest spread of the resident memory")
    add("--seed", type=int, default=0, help="of the run, and of which worker is killed")
    add("--out", type=Path, help="file for all samples, also written during the run")
    add("--json", action="store_true")
    add("override", nargs="*", help="options of dreamer.py, after --")
    args = parser.parse_args(argv)
    if not Path("/proc/self/task").exists():
        parser.error("needs /proc, which only Linux has")
    with tempfile.TemporaryDirectory(prefix="lore-soak-") as folder:
        result = soak(args, Path(folder) / "run")
    if args.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:>15}  {value}")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
