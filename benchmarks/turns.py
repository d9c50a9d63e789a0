"""Programs measured in turns: one update of the one, one of the other, so that a busy machine slows both.

Each program runs in a process of its own, which does one update for each line that it gets. It needs nothing
but the standard library here, because the programs' modules may have the same names.
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
    """GiB that this process had in memory at its worst moment."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def serve(update: Callable[[], object], about: Mapping, peak: Callable[[], float] = resident_peak) -> None:
    """In the child: say that it is ready and what it is, then do and time one update for each line."""
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
        raise SystemExit(f"{' '.join(self.process.args)} ended; its own message stands above")

    def update(self, count: bool = True) -> None:
        """Let it do one update; `count` False for warming up."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = self._read()
        self.peak_gib = answer["peak_gib"]
        if count:
            self.seconds.append(answer["seconds"])

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def take_turns(programs: Mapping[str, Program], warmup: int, repeats: int) -> None:
    """One update of each program after the other, `repeats` times after `warmup` rounds; then all end."""
    for turn in range(warmup + repeats):
        for program in programs.values():
            program.update(count=turn >= warmup)
    for program in programs.values():
        program.close()


def compared(programs: Mapping[str, Program], base: str, seconds: str) -> dict[str, dict]:
    """Of each program the median, called `seconds`, and the median ratio to `base` in the same round."""
    reference = programs[base].seconds
    return {
        name: {
            seconds: round(statistics.median(program.seconds), 4),
            "ratio": round(
                statistics.median(s / b for s, b in zip(program.seconds, reference, strict=True)), 3
            ),
            "peak_gib": round(program.peak_gib, 2),
            "parameters": program.about["parameters"],
        }
        for name, program in programs.items()
    }
