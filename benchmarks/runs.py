"""Runs of dreamer.py for studies: several at a time, each in a folder of its own, and their measures.

A run that has finished is not done again, and one that was interrupted goes on. Beside the folder of a run
lie PLACE.log, what it printed, and PLACE.json once it has finished: its options and its measures.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from basics import UserError, atomic_write

ROOT = Path(__file__).resolve().parent.parent
POLL = 0.2  # seconds between looks at the runs

Measures = dict[str, Any]  # of a run: numbers, which are averaged over seeds, and curves for the figure


def do(
    commands: Mapping[Path, Sequence[str]], jobs: int, measure: Callable[[Path], Measures]
) -> dict[Path, Measures]:
    """Do the runs that are not done yet, `jobs` at a time, and return the measures of all, by folder.

    `commands` are the words of each run, by its folder; `measure` is of the folder of a run that has
    finished. Raises UserError.
    """
    todo = [place for place, words in commands.items() if not finished(place, words)]
    for place in run_all({place: commands[place] for place in todo}, jobs):
        write_json(_result(place), {"options": _options(commands[place]), "measures": measure(place)})
    return {place: _read_json(_result(place))["measures"] for place in commands}


def finished(place: Path, words: Sequence[str]) -> bool:
    """Whether the run in the folder `place` is done. Raises UserError if it was another one."""
    if not _result(place).exists():
        return False
    if _read_json(_result(place))["options"] != _options(words):
        raise UserError(
            f"{place} was run with other options: give another --out, or delete {_result(place)} and it."
        )
    return True


def run_all(commands: Mapping[Path, Sequence[str]], jobs: int) -> Iterable[Path]:
    """Run the commands of dreamer.py, `jobs` at a time, and yield the folder of each that has finished.

    If anything stops this, the runs save and end. Raises UserError if a run fails.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    left, running = dict(commands), dict[Path, subprocess.Popen]()
    try:
        while left or running:
            while left and len(running) < jobs:
                place = next(iter(left))
                running[place] = _start(place, left.pop(place))
                print(
                    f"[{len(commands) - len(left)}/{len(commands)}]",
                    shlex.join(commands[place]),
                    file=sys.stderr,
                )
            for place, process in list(running.items()):
                if process.poll() is not None:
                    del running[place]
                    if process.returncode:
                        last = _log(place).read_text(encoding="utf-8").splitlines()[-1:]
                        raise UserError(f"The run in {place} failed: {' '.join(last)} (see {_log(place)})")
                    yield place
            time.sleep(POLL)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        signal.signal(signal.SIGTERM, before)


def _start(place: Path, words: Sequence[str]) -> subprocess.Popen:
    place.parent.mkdir(parents=True, exist_ok=True)
    with open(_log(place), "ab") as log:
        return subprocess.Popen(
            [sys.executable, str(ROOT / words[1]), *words[2:]],
            stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for us, who stop it: a second signal would not let it save
        )  # fmt: skip


def _log(place: Path) -> Path:
    return place.with_name(f"{place.name}.log")


def _result(place: Path) -> Path:
    """The file that says that the run in the folder `place` has finished."""
    return place.with_name(f"{place.name}.json")


def _options(words: Sequence[str]) -> list[str]:
    """Those of a command that decide what comes out: not the folder."""
    where = words.index("--logdir")
    return [*words[2:where], *words[where + 2 :]]


def write_json(path: Path, value: dict) -> None:
    """Write `value` to a file, whole or not at all."""
    atomic_write(path, lambda file: file.write((json.dumps(value) + "\n").encode()))


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read {path}: {error}. Delete it, and the run is summed up again.") from error


# --- The command ---------------------------------------------------------------------------------------


def add_options(add: Callable[..., Any], out: str, page: str) -> None:
    """The options that all studies have. `add` is an argument parser's add_argument."""
    add("--out", type=Path, default=Path(out), help="default: %(default)s")
    add("--seeds", nargs="+", type=int, help=f"default: those of {page}")
    add("--jobs", type=int, default=1, help="runs at a time, each on one thread; default: 1")
    add("--quick", action="store_true", help="seconds a run, in OUT/quick: a test, nothing is learned")
    add("--json", action="store_true", help="one JSON object instead of a table")
