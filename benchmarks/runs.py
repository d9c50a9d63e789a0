"""Studies: runs of dreamer.py with several arms and seeds, their measures, a table and a figure.

A study is a `Study`, and `main` is the command line of all studies. Each run is a command of dreamer.py,
shown as it starts, with its own logdir in OUT/STUDY. A finished run is not repeated and an interrupted one is
resumed. Next to a logdir are its output, LOGDIR.log, and once it has finished its options and measures,
LOGDIR.json. OUT/STUDY.json holds the result, OUT/STUDY.md the table and OUT/STUDY.png the figure.
"""

import argparse
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from basics import UserError, atomic_write
from reports import figures
from stats import bootstrap_interval, interquartile_mean, ratio_interval

ROOT = Path(__file__).resolve().parent.parent
POLL = 0.2  # seconds between checks of the runs
QUICK_SEEDS = (100,)
QUICK = (  # options that test all of a run in seconds and learn nothing
    "--steps 200 --prefill 60 --log_every 20 --eval_every 40 --eval_episodes 1 --envs.eval_amount 1 "
    "--batch_size 4 --batch_length 8 --imag_horizon 3 --train_ratio 4 --time_limit 20"
)

Measures = dict[str, Any]  # of a run: numbers, and curves for the figure
Results = dict[str, dict[int, Measures]]  # arm -> seed -> measures
Summary = dict[str, Any]


class Study(NamedTuple):
    """Runs of dreamer.py: each arm with each seed."""

    options: str  # of all runs
    arms: Mapping[
        str, str
    ]  # name -> further options, in which {out} is the study's folder and {seed} the seed
    seeds: Sequence[int]
    measure: Callable[[Path, bool], Measures]  # of a finished run's logdir; True with --quick
    report: Callable[[Results], tuple[Summary, list[str]]]  # the summary for the JSON file, and Markdown
    draw: Callable[[Results, Summary, Path], None]
    quick: str = QUICK  # further options with --quick
    default: Sequence[str] = ()  # the arms without --arms; empty for all
    first: Sequence[str] = ()  # arms whose runs the other arms start from


def command(study: Study, arm: str, seed: int, folder: Path, quick: bool = False) -> list[str]:
    """The words of one run, from `python3` on."""
    options = f"{study.options} {study.arms[arm]} {study.quick if quick else ''}".split()
    words = [word.format(out=folder, seed=seed) for word in options]
    logdir = folder / f"{arm.replace(' ', '_')}_{seed}"
    return ["python3", "dreamer.py", *words, "--seed", str(seed), "--logdir", str(logdir)]


# --- Runs ----------------------------------------------------------------------------------------------


def finished(logdir: Path, words: Sequence[str]) -> bool:
    """Whether the run is done. Raises UserError if it had other options."""
    result = _result(logdir)
    if not result.exists():
        return False
    if json.loads(result.read_text(encoding="utf-8"))["options"] != list(words[2:]):
        raise UserError(
            f"{logdir} has a run with other options: use another --out, or delete {result} and it."
        )
    return True


def do(commands: Mapping[Path, Sequence[str]], jobs: int, measure: Callable[[Path], Measures]) -> None:
    """Do the unfinished runs, given by logdir, `jobs` at a time. Raises UserError if one fails."""
    todo = {logdir: words for logdir, words in commands.items() if not finished(logdir, words)}
    for logdir in run_all(todo, jobs):
        write_json(_result(logdir), {"options": commands[logdir][2:], "measures": measure(logdir)})


def run_all(commands: Mapping[Path, Sequence[str]], jobs: int) -> Iterable[Path]:
    """Run the commands, `jobs` at a time, and yield the logdir of each that has finished.

    On SIGINT, SIGTERM or an error all runs save and end. Raises UserError if a run fails.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    left, running = dict(commands), dict[Path, subprocess.Popen]()
    try:
        while left or running:
            while left and len(running) < jobs:
                logdir = next(iter(left))
                running[logdir] = _start(logdir, left.pop(logdir))
                progress = f"[{len(commands) - len(left)}/{len(commands)}]"
                print(progress, shlex.join(commands[logdir]), file=sys.stderr)
            for logdir, process in list(running.items()):
                if process.poll() is not None:
                    del running[logdir]
                    if process.returncode:
                        log = logdir.with_name(f"{logdir.name}.log")
                        last = log.read_text(encoding="utf-8").splitlines()[-1:]
                        raise UserError(f"The run in {logdir} failed: {' '.join(last)} (see {log})")
                    yield logdir
            time.sleep(POLL)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        signal.signal(signal.SIGTERM, before)


def _start(logdir: Path, words: Sequence[str]) -> subprocess.Popen:
    logdir.parent.mkdir(parents=True, exist_ok=True)
    with open(logdir.with_name(f"{logdir.name}.log"), "ab") as log:
        return subprocess.Popen(
            [sys.executable, str(ROOT / words[1]), *words[2:]],
            stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # we get Ctrl-C and stop the runs: a second signal would end them unsaved
        )  # fmt: skip


def _result(logdir: Path) -> Path:
    return logdir.with_name(f"{logdir.name}.json")


def write_json(path: Path, value: Any) -> None:
    """Write `value` to a file, atomically."""
    atomic_write(path, lambda file: file.write((json.dumps(value) + "\n").encode()))


# --- Summaries -----------------------------------------------------------------------------------------


def spread(values: Sequence[float], statistic: Callable[..., Any] = interquartile_mean) -> Summary:
    """A statistic over seeds and its 95 % bootstrap interval: value, low, high, values.

    A single seed has no interval: low and high are None.
    """
    low, high = bootstrap_interval(values, statistic=statistic)
    return {
        "value": float(statistic(values)),
        "low": _finite(low),
        "high": _finite(high),
        "values": list(values),
    }


def ratio(
    over: Sequence[float], under: Sequence[float], statistic: Callable[..., Any] = interquartile_mean
) -> Summary:
    """The ratio of the statistic of two arms and its interval: value, low, high; None if undefined."""
    divisor = statistic(under)
    value = statistic(over) / divisor if divisor else math.nan
    low, high = ratio_interval(over, under, statistic=statistic)
    return {"value": _finite(value), "low": _finite(low), "high": _finite(high)}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def cell(measure: Mapping | None, form: str = "{:.1f}") -> str:
    """`value (low to high)`, or what of it there is."""
    if measure is None or measure["value"] is None:
        return "-"
    value, low, high = measure["value"], measure["low"], measure["high"]
    text = form.format(value)
    return text if low is None or low == high else f"{text} ({form.format(low)} to {form.format(high)})"


def table(summary: Mapping[str, Mapping], columns: Mapping[str, tuple[str, str]]) -> list[str]:
    """A Markdown table with a row for each arm; `columns` gives the title and format of each measure."""
    titles = ["", *(title for title, _ in columns.values())]
    rows = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for arm, measures in summary.items():
        cells = [arm, *(cell(measures.get(name), form) for name, (_, form) in columns.items())]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def steps_to(curve: tuple[Sequence[float], Sequence[float]], mark: float, width: int) -> float | None:
    """Env steps until the mean of the last `width` points is at least `mark`; None if it never is."""
    steps, values = curve
    means = np.convolve(values, np.ones(width) / width, "valid")
    reached = np.flatnonzero(means >= mark)
    return float(steps[width - 1 + reached[0]]) if len(reached) else None


# --- The command ---------------------------------------------------------------------------------------


def parse(
    studies: Mapping[str, Study], out: str, doc: str, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and the options in it that are for dreamer.py."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    if len(studies) > 1:
        add("study", choices=studies)
    arms = dict.fromkeys(arm for study in studies.values() for arm in study.arms)
    add("--arms", nargs="+", choices=arms, help="default: those of the documented table")
    add("--seeds", nargs="+", type=int, help="default: those of the documented table")
    add("--out", type=Path, default=Path(out), help="default: %(default)s")
    add("--jobs", type=int, default=1, help="number of runs at a time, one thread each; default: 1")
    add("--only", choices=["table"], help="start no run and summarise the finished ones")
    add("--quick", action="store_true", help="a test of all steps in seconds, in OUT/quick")
    add("--json", action="store_true", help="print one JSON object instead of a table")
    parser.set_defaults(study=next(iter(studies)))
    return parser.parse_known_args(argv)


def run_study(study: Study, args: argparse.Namespace, more: Sequence[str]) -> tuple[Summary, list[str]]:
    """Do the runs that are not finished, and write JSON, table and figure.

    `more` are further options of dreamer.py. Returns the summary and the table. Raises UserError.
    """
    out = args.out / "quick" if args.quick else args.out
    folder = out / args.study
    seeds = args.seeds or (QUICK_SEEDS if args.quick else study.seeds)
    arms = args.arms or study.default or list(study.arms)
    commands = {
        (arm, seed): [*command(study, arm, seed, folder, args.quick), *more] for seed in seeds for arm in arms
    }
    logdirs = {run: Path(words[words.index("--logdir") + 1]) for run, words in commands.items()}
    if args.only:
        logdirs = {run: logdir for run, logdir in logdirs.items() if finished(logdir, commands[run])}
        if not logdirs:
            raise UserError(f"No run of these arms and seeds has finished in {folder}: leave out --only.")
    for stage in (True, False):
        now = {logdir: commands[run] for run, logdir in logdirs.items() if (run[0] in study.first) == stage}
        do(now, args.jobs, lambda logdir: study.measure(logdir, args.quick))
    results: Results = {}
    for (arm, seed), logdir in sorted(logdirs.items(), key=lambda item: arms.index(item[0][0])):
        measures = json.loads(_result(logdir).read_text(encoding="utf-8"))["measures"]
        results.setdefault(arm, {})[seed] = measures
    summary, lines = study.report(results)
    write_json(out / f"{args.study}.json", {"summary": summary, "runs": results})
    atomic_write(out / f"{args.study}.md", lambda file: file.write("\n".join(lines).encode() + b"\n"))
    study.draw(results, summary, out / f"{args.study}.png")
    return summary, lines


def main(studies: Mapping[str, Study], out: str, doc: str, argv: Sequence[str] | None = None) -> int:
    """The command of a study; returns the exit code."""
    args, more = parse(studies, out, doc, argv)
    try:
        figures.pyplot()  # a missing package is reported before the runs
        summary, lines = run_study(studies[args.study], args, more)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    print(json.dumps(summary) if args.json else "\n".join(lines))
    return 0
