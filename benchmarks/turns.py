"""Programs measured in turns, one update of each after the other, so that a busy machine slows all of them.

Each program is a process that does one update for each line of its input. This module imports only the
standard library, because the programs' modules may have the same names.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence


def resident_peak() -> float:
    """GiB of this process in memory at its peak."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def serve(update: Callable[[], object], about: Mapping, peak: Callable[[], float] = resident_peak) -> None:
    """In the child: report readiness and `about`, then do and time one update for each line."""
    print(json.dumps(dict(about)), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        update()
        print(json.dumps({"seconds": time.perf_counter() - start, "peak_gib": peak()}), flush=True)


class Program:
    """A child process that serves updates."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None):
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
        )
        self.about = self._read()
        self.seconds: list[float] = []
        self.peak_gib = 0.0

    def _read(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("{"):  # libraries may print, too
                return json.loads(line)
        raise SystemExit(f"{' '.join(self.process.args)} ended; its error is printed above")

    def update(self) -> float:
        """Let it do one update; returns its seconds."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = self._read()
        self.peak_gib = answer["peak_gib"]
        return answer["seconds"]


def take_turns(programs: Mapping[str, Program], warmup: int, repeats: int) -> dict[str, dict]:
    """`repeats` rounds with one update of each program, after `warmup` rounds; then all programs end.

    Returns figures of each program: median and quartiles of its seconds, and the median over the rounds of
    the ratio to the first program's seconds in the same round.
    """
    for turn in range(warmup + repeats):
        for program in programs.values():
            seconds = program.update()
            if turn >= warmup:
                program.seconds.append(seconds)
    for program in programs.values():
        program.process.stdin.close()
        program.process.wait()
    base = next(iter(programs.values())).seconds
    return {
        name: {
            "seconds": round(statistics.median(program.seconds), 4),
            "quartiles": [round(q, 4) for q in statistics.quantiles(program.seconds, n=4)[::2]],
            "ratio": round(statistics.median(s / b for s, b in zip(program.seconds, base, strict=True)), 3),
            "peak_gib": round(program.peak_gib, 2),
            **program.about,
        }
        for name, program in programs.items()
    }
