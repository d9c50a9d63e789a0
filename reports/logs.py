"""Reads the options and metrics of runs, and groups runs that differ only in their seed.

docs/logs.md explains the metrics. Files may be truncated (a killed run) or come from other people, so their
content is checked.
"""

import itertools
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from basics import UserError
from config import Config, read
from stats import bootstrap_interval, interquartile_mean

METRICS = "metrics.jsonl"
TRAIN, EVAL = "env/episode_return", "eval/episode_return"
RATES, SCORE = "/success_rate/", "/score"
FINAL = 0.25  # share of a run, at its end, over which final returns are means
MAX_POINTS = 200  # of a curve over seeds
MAX_STEP = 2**53  # up to here floats count exactly
LARGEST = 1e38  # about the largest float32
LABEL_LENGTH = 60
PLACES = ("logdir", "traindir")  # options without influence on the results


# One run


def read_metrics(logdir: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl as dicts of numbers, in the order of their `step`.

    Broken lines are skipped: a killed run truncates its last one. Where steps go back, the run was resumed,
    and the later lines replace the earlier ones. Raises UserError if no line is left.
    """
    path = Path(logdir) / METRICS
    lines: list[dict[str, float]] = []
    try:
        with open(path, "rb") as file:
            for line in filter(None, map(_numbers, file)):
                while lines and lines[-1]["step"] >= line["step"]:
                    lines.pop()
                lines.append(line)
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}. Give the logdir of a run.") from error
    if not lines:
        raise UserError(f"{path} has no line of metrics yet.")
    return lines


def _numbers(line: bytes) -> dict[str, float] | None:
    """The numbers in a line of metrics.jsonl, None for a broken line."""
    try:
        values = json.loads(line.decode())
        # Interned, as every line repeats the names: this halves the memory.
        numbers = {sys.intern(k): float(v) for k, v in values.items() if type(v) in (int, float)}
        step = int(numbers["step"])
        return {**numbers, "step": step} if 0 <= step < MAX_STEP else None
    except (ValueError, KeyError, AttributeError, OverflowError, RecursionError):
        return None


def is_number(value: float) -> bool:
    """Whether a value can be drawn: finite in float32, the dtype of most metrics."""
    return abs(value) <= LARGEST


def curve(lines: list[dict], name: str, width: int = 1) -> tuple[list[int], list[float]]:
    """Steps and values of one metric where it is finite, each value the mean of the last `width`."""
    points = [(line["step"], line[name]) for line in lines if is_number(line.get(name, math.nan))]
    values = [value for _, value in points]
    recent = [values[max(0, end - width) : end] for end in range(1, len(values) + 1)]
    return [step for step, _ in points], [sum(window) / len(window) for window in recent]


@dataclass(frozen=True)
class RunLog:
    """The files of one run. `config` is None if this version of LoRe cannot read it."""

    logdir: Path
    lines: list[dict[str, float]]
    config: Config | None

    @property
    def name(self) -> str:
        return printable(self.logdir.resolve().name)

    @property
    def seed(self) -> int | None:
        return None if self.config is None else self.config.seed

    @property
    def steps(self) -> int:
        """Env steps so far."""
        return self.lines[-1]["step"]

    @property
    def hours(self) -> float:
        """Training time, without the pauses between a stop and a resume."""
        steps = [0, *(line["step"] for line in self.lines)]
        pairs = zip(itertools.pairwise(steps), self.lines, strict=True)
        return sum((b - a) / line["env/fps"] for (a, b), line in pairs if line.get("env/fps", 0) > 0) / 3600

    def final(self, name: str) -> float | None:
        """Mean of a metric over the last quarter of the run; its last value if that is older."""
        steps, values = curve(self.lines, name)
        late = [value for step, value in zip(steps, values, strict=True) if step > (1 - FINAL) * self.steps]
        return float(np.mean(late or values[-1:])) if values else None

    def last(self, ending: str) -> dict[str, float]:
        """The last value of each metric whose name contains `ending`, keyed by the rest of the name."""
        found = {}
        for line in self.lines:
            found |= {name.partition(ending)[2]: x for name, x in line.items() if ending in name}
        return {name: value for name, value in found.items() if is_number(value)}

    @property
    def rates(self) -> dict[str, float]:
        """Final success rates in percent, by achievement."""
        return self.last(RATES)

    @property
    def score(self) -> float | None:
        """The score over all training episodes in percent; None without achievements."""
        return self.last(SCORE).get("")


def read_runs(places: Sequence[Path]) -> tuple[list[RunLog], list[str]]:
    """The runs in these folders, and notes about unreadable files. Raises UserError if there is no run."""
    runs, notes = [], []
    for logdir in find_runs(places):
        try:
            lines = read_metrics(logdir)
        except UserError as error:  # has just begun, or is broken
            notes.append(str(error))
            continue
        try:
            config = Config.load_saved(logdir / "config.yaml")
        except UserError as error:
            config = None
            notes.append(f"{logdir} is labelled by its name: {error}")
        runs.append(RunLog(logdir, lines, config))
    if not runs:
        raise UserError(notes[0])
    return runs, notes


def find_runs(places: Sequence[Path]) -> list[Path]:
    """The folders with a metrics.jsonl in `places`. Raises UserError for a place without any."""
    found: dict[Path, Path] = {}
    for place in places:
        runs = sorted(_runs_in(place))
        if not runs:
            raise UserError(
                f"No {METRICS} in {place} or below: give the logdir of a run, or a folder of runs."
            )
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def _runs_in(place: Path) -> Iterator[Path]:
    seen = set()
    for folder, below, files in os.walk(place, followlinks=True):  # links may collect runs
        real = os.path.realpath(folder)
        if METRICS in files:
            yield Path(folder)
        if METRICS in files or real in seen:  # a run contains no other runs; links may form a cycle
            below.clear()
        seen.add(real)


# Runs that differ only in their seed


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed; `label` distinguishes them from the other groups."""

    label: str
    runs: list[RunLog]
    options: dict[str, Any]  # by full name, where they differ from the presets; the presets as "configs"

    @property
    def task(self) -> str:
        config = self.runs[0].config
        return "unknown task" if config is None else config.task

    @property
    def steps(self) -> int:
        """Env steps of the longest run."""
        return max(run.steps for run in self.runs)

    @property
    def seeds(self) -> str:
        """The number of seeds, or of runs if several share a seed."""
        amount = len(self.runs)
        known = {run.seed for run in self.runs} - {None}
        return f"{amount} {'seed' if len(known) == amount else 'run'}{'s' * (amount > 1)}"

    @property
    def legend(self) -> str:
        """The label with the numbers of seeds and env steps."""
        return f"{self.label} ({self.seeds}, {short(self.steps)} steps)"

    def curves(self, name: str, width: int = 1) -> list[tuple[list[int], list[float]]]:
        """The curve of a metric for each run that has it."""
        return [each for each in (curve(run.lines, name, width) for run in self.runs) if each[0]]

    def values(self, name: str) -> list[float]:
        """The final value of a metric for each run that has it."""
        return [value for value in (run.final(name) for run in self.runs) if value is not None]

    @property
    def scores(self) -> list[float]:
        """The score in percent of each run that has one."""
        return [run.score for run in self.runs if run.score is not None]

    def unlocked(self) -> list[tuple[list[int], list[float]]]:
        """Curves of the number of achievements unlocked so far."""
        counts = []
        for run in self.runs:
            rated = [line for line in run.lines if any(RATES in name for name in line)]
            unlocked = [float(sum(x > 0 for name, x in line.items() if RATES in name)) for line in rated]
            counts += [([line["step"] for line in rated], unlocked)] if rated else []
        return counts


def group_runs(runs: Sequence[RunLog]) -> list[Group]:
    """The groups, ordered by their first runs."""
    members: dict[str, list[RunLog]] = {}
    options: dict[str, dict[str, Any]] = {}
    for run in runs:
        chosen = _options(run)
        key = json.dumps([run.config is None and str(run.logdir), chosen], sort_keys=True)
        members.setdefault(key, []).append(run)
        options[key] = chosen
    labels: dict[str, str] = {}
    for task in {_task(alike[0]): None for alike in members.values()}:
        keys = [key for key, alike in members.items() if _task(alike[0]) == task]
        labels |= zip(keys, _labels([members[k][0] for k in keys], [options[k] for k in keys]), strict=True)
    return [Group(labels[key], members[key], options[key]) for key in members]


def _task(run: RunLog) -> str | None:
    return run.config and run.config.task


def _options(run: RunLog) -> dict[str, Any]:
    """The presets, and the options that differ from them, without seed and folders."""
    if run.config is None:
        return {}
    options = {name: x for name, x in run.config.overrides().items() if name not in (*PLACES, "seed")}
    source = options.pop("from_checkpoint", None)
    if source and run.logdir.resolve() not in Path(source).resolve().parents:  # else the run was resumed
        options["from_checkpoint"] = True  # each seed may have its own
    return {"configs": sorted(run.config.presets), **options}


def _labels(runs: Sequence[RunLog], options: Sequence[dict[str, Any]]) -> list[str]:
    """A name for each group: the presets that are not shared, then the options that differ between equals."""
    names = sorted(set().union(*options) - {"configs"})
    shared = set.intersection(*(set(each.get("configs", [])) for each in options))
    heads = []
    for run in runs:
        if run.config is None:
            heads.append(f"run {run.name}")  # a leading underscore would keep it out of a legend
        else:
            own = [preset for preset in run.config.presets if preset not in shared]
            heads.append(" ".join(own or run.config.presets) or run.config.task)
    if len(runs) > 1 and len(set(heads)) == 1:
        heads = [""] * len(runs)
    labels = []
    for run, head in zip(runs, heads, strict=True):
        alike = [other for other, name in zip(runs, heads, strict=True) if name == head]
        differ = [n for n in names if len({show_option(other.config, n) for other in alike}) > 1]
        shown = [f"{_leaf(name)}={show_option(run.config, name)}" for name in differ]
        labels.append(", ".join(filter(None, [head, *shown])))
    numbers = [labels[: index + 1].count(label) for index, label in enumerate(labels)]
    return [
        printable(f"{label}, no. {number}" if labels.count(label) > 1 else label)
        for label, number in zip(labels, numbers, strict=True)
    ]


def _leaf(name: str) -> str:
    """The last part of an option's name if it is unique, else the whole name."""
    leaf = name.rpartition(".")[2]
    return leaf if len(read().leaves(leaf)) == 1 else name


def show_option(config: Config | None, name: str) -> str:
    """The value of an option as text, `unknown` without a config."""
    if config is None:
        return "unknown"
    value: Any = config
    for part in name.split("."):
        value = value[part]
    if value is None:
        return "null"
    return "given" if name == "from_checkpoint" else str(value)


def printable(text: str) -> str:
    """The text as one line of printable characters, truncated to LABEL_LENGTH."""
    text = "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
    return text if len(text) <= LABEL_LENGTH else f"{text[: LABEL_LENGTH - 1]}…"


def short(steps: float) -> str:
    """A number of steps in short form: 34k, 1M."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if steps >= size:
            return f"{steps / size:.3g}{letter}"
    return f"{steps:.3g}"


# Over seeds


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Interquartile mean and its 95 % bootstrap interval (NaN for a single value): iqm, low, high."""
    return float(interquartile_mean(values)), *bootstrap_interval(values, statistic=interquartile_mean)


def band(curves: Sequence[tuple[Sequence[float], Sequence[float]]]) -> tuple[np.ndarray, ...]:
    """Interquartile mean of curves and its interval: steps, iqm, low, high, each [points].

    Covers the range that all curves share, at the steps of the first curve. Seeds are logged a few steps
    apart, so the others are interpolated, and the range is extended by half a gap between two points.
    """
    slack = np.median(np.diff(curves[0][0])) / 2 if len(curves[0][0]) > 1 else 0.0
    begin, end = max(steps[0] for steps, _ in curves), min(steps[-1] for steps, _ in curves)
    steps = np.array([step for step in curves[0][0] if begin - slack <= step <= end + slack])
    if len(steps) > MAX_POINTS:
        steps = steps[np.linspace(0, len(steps) - 1, MAX_POINTS).round().astype(int)]
    if not len(steps):
        return steps, steps, steps, steps
    values = np.array([np.interp(steps, *each) for each in curves])  # [seeds, points]
    return steps, interquartile_mean(values, 0), *bootstrap_interval(values, statistic=interquartile_mean)
