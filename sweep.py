"""Many runs of dreamer.py, on this machine or a cluster: the product of a grid of options.

    python3 sweep.py --configs crafter --grid seed=0,1,2 configs=lore_prior,lore_synth --logdir ./logdir/sweep

Each run is a process of its own in a Ray actor, with --cpus and --gpus for itself. It writes to LOGDIR/NAME,
and what it prints to LOGDIR/NAME.log; LOGDIR/summary.csv sums all up. A run that fails is tried again and
goes on from its checkpoint. The same command again skips the runs that have finished and goes on with the
others. All options that are not of this program are passed to dreamer.py.
"""

import argparse
import contextlib
import csv
import ctypes
import functools
import io
import itertools
import json
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

import config as configs
from basics import UserError, atomic_write, stop_signals
from config import Config
from parallel import start_ray

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

ROOT = Path(__file__).resolve().parent
POLL = 0.5  # seconds between looks at the runs
SUMMARY_SECONDS = 10  # between writes of the summary while nothing else happens
SUMMARY, SLURM = "summary.csv", "sweep.sbatch"  # in LOGDIR
NONE = "none"  # a value of `configs` in the grid: no preset
MAX_NAME = 200  # bytes in UTF-8; most file systems take 255, and checkpoints and logs need some
USER_ERROR = 2  # exit code of dreamer.py for what the user has to mend
PDEATHSIG = 1  # of Linux' prctl: the signal that a process gets when its parent dies
SLURM_GRACE = 300  # seconds before the end of a job's time at which the run is told to save

WAITING, RUNNING, FINISHED, FAILED, STOPPED = "waiting", "running", "finished", "failed", "stopped"
STYLES = {RUNNING: "cyan", FAILED: "bold red", STOPPED: "yellow", WAITING: "dim", FINISHED: "green"}
RETURNS = {"train_return": "env/episode_return", "eval_return": "eval/episode_return"}


# --- The runs ------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One cell of the grid: a run of dreamer.py and what has become of it."""

    name: str
    place: Path  # its logdir
    choice: dict[str, str]  # what the grid chose, by option
    options: list[str]  # of dreamer.py
    total_steps: int  # that it has to do
    status: str = WAITING
    tries: int = 0  # in all sweeps
    failures: int = 0  # in this one
    hours: float = 0.0  # of the tries that have ended
    since: float | None = None  # when the running try began, in seconds
    machine: str = ""
    problem: str = ""
    built: int = 0  # when a try had last got as far as to write config.yaml, before this one
    _seen: tuple = ()  # the state of metrics.jsonl when it was last read
    _measures: dict[str, float] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        """The file of what it prints: beside its folder, which it makes itself."""
        return self.place.with_name(f"{self.name}.log")

    def command(self) -> list[str]:
        """The words that do the run, here and in this folder."""
        program = ROOT / "dreamer.py"
        return [sys.executable, program.name if Path.cwd() == ROOT else str(program), *self.options]

    def finished(self) -> bool:
        """Whether its last checkpoint is of its last step."""
        return saved_step(self.place) >= self.total_steps

    def last_built(self) -> int:
        """When a try last wrote config.yaml, in nanoseconds: then its options and its env were found good."""
        path = self.place / "config.yaml"
        return path.stat().st_mtime_ns if path.exists() else 0

    def hours_so_far(self) -> float:
        return self.hours + (0 if self.since is None else (time.monotonic() - self.since) / 3600)

    def measures(self) -> dict[str, float]:
        """`step`, and of each of RETURNS the last and the `best_` one, as far as they are known."""
        path = self.place / "metrics.jsonl"
        try:
            stat = path.stat()
            seen = (stat.st_mtime_ns, stat.st_size)
            if seen != self._seen:
                self._measures, self._seen = measures(path.read_bytes().splitlines()), seen
        except OSError:  # nothing is there yet, or what is no run; dreamer.py tells what it is
            self._measures, self._seen = {}, ()
        step = max(self._measures.get("step", 0), saved_step(self.place))
        return {**self._measures, "step": step}


def saved_step(place: Path) -> int:
    """The env step of a run's last checkpoint, -1 where there is none."""
    last = (0, -1)  # the time counts: a run that went back to an earlier step writes smaller numbers later
    with contextlib.suppress(OSError):
        for entry in os.scandir(place / "checkpoints"):
            if match := re.fullmatch(r"step-(\d+)\.pt", entry.name):
                with contextlib.suppress(FileNotFoundError):  # the run has just deleted it
                    last = max(last, (entry.stat().st_mtime_ns, int(match[1])))
    return last[1]


def measures(lines: Iterable[bytes]) -> dict[str, float]:
    """What `Run.measures` tells, of the lines of metrics.jsonl; a half-written one is left out."""
    result: dict[str, float] = {}
    for line in lines:
        try:
            metrics = json.loads(line)
            result["step"] = int(metrics["step"])
            values = {name: float(metrics[key]) for name, key in RETURNS.items() if key in metrics}
        except (ValueError, KeyError, TypeError):
            continue
        for name, value in values.items():
            result[name] = value
            if math.isfinite(value):
                result[f"best_{name}"] = max(value, result.get(f"best_{name}", value))
    return result


def read_grid(items: Sequence[str]) -> dict[str, list[str]]:
    """The values by option of words like `seed=0,1,2`. Raises UserError."""
    grid: dict[str, list[str]] = {}
    for item in items:
        name, equals, text = item.partition("=")
        values = [value.strip() for value in text.split(",")]
        if not (name and equals) or not all(values):
            raise UserError(f"--grid {item}: write NAME=VALUE,VALUE, for example seed=0,1,2")
        if name in grid:
            raise UserError(f"--grid {name} stands twice: write all its values in one, {name}=VALUE,VALUE")
        if name in configs.RUN_PATHS:
            raise UserError(f"--grid {name}: each run has a folder of its own in --logdir, by its name")
        grid[name] = values
    return grid


def plan(
    grid: Mapping[str, Sequence[str]], presets: Sequence[str], options: Sequence[str], logdir: Path
) -> list[Run]:
    """The runs of all cells of the grid; their options are checked. Raises UserError.

    presets: of all runs; `configs` in the grid adds to them
    options: of dreamer.py for all runs; the grid's win
    """
    runs: dict[str, Run] = {}
    for values in itertools.product(*grid.values()):
        choice = dict(zip(grid, values, strict=True))
        name = (
            ",".join(re.sub(r"[^\w.+=-]+", "-", f"{key}={value}") for key, value in choice.items()) or "run"
        )
        if name in runs or len(name.encode()) > MAX_NAME:
            why = "two runs have the name" if name in runs else f"longer than {MAX_NAME} bytes is the name"
            raise UserError(f"--grid: {why} {name}; give other values")
        more = choice.get("configs", NONE)
        names = [*presets, *([] if more == NONE else more.split())]
        words = [*(["--configs", *names] if names else []), *options]
        for key, value in choice.items():
            words += [] if key == "configs" else [f"--{key}", *value.split()]
        place = logdir / name
        words += ["--logdir", str(place)]
        try:
            total = check_options(words, place).steps
        except UserError as error:
            raise UserError(f"run {name}: {error}" if grid else str(error)) from None
        runs[name] = Run(name, place, choice, words, total)
    return list(runs.values())


def check_options(words: list[str], place: Path) -> Config:
    """The config that a run will have, the run's own saved one in mind if it goes on. Raises UserError."""
    saved = Config.load_saved(place / "config.yaml") if saved_step(place) >= 0 else None
    config = configs.load(words, saved=saved)
    if config.from_checkpoint and "--configs" not in words:
        raise UserError(
            "--from_checkpoint in a sweep needs --configs: name the presets of the checkpoint's run"
        )
    if saved:
        configs.resume_changes(saved, config)
    return config


# --- The summary ---------------------------------------------------------------------------------------

OF_RESULTS = [kind + name for name in RETURNS for kind in ("", "best_")]
BEFORE = ("run",)  # then come the options of the grid
COLUMNS = ("status", "tries", "step", "total_steps", *OF_RESULTS, "hours", "machine", "problem", "command")


def write_summary(path: Path, runs: Sequence[Run]) -> None:
    """Write what has become of the runs, a line each. Raises UserError if the system refuses."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*BEFORE, *runs[0].choice, *COLUMNS], restval="")
    writer.writeheader()
    for run in runs:
        row = {"run": run.name, **run.choice, "status": run.status, "tries": run.tries, **run.measures()}
        row |= {"total_steps": run.total_steps, "hours": f"{run.hours_so_far():.4f}", "machine": run.machine}
        writer.writerow(row | {"problem": run.problem, "command": shlex.join(run.command())})
    atomic_write(path, lambda file: file.write(text.getvalue().encode()))


def recall(path: Path, runs: Sequence[Run]) -> None:
    """Take tries, hours and machines over from the summary of an earlier sweep. Raises UserError."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = {row["run"]: row for row in csv.DictReader(file)}
        for run in runs:
            if row := rows.get(run.name):
                run.tries, run.hours, run.machine = int(row["tries"]), float(row["hours"]), row["machine"]
                if not (run.tries >= 0 and 0 <= run.hours < math.inf):
                    raise ValueError(f"{run.tries} tries in {run.hours} hours")
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(
            f"{path} is not the summary of a sweep ({error}): delete it, and tries and hours count anew"
        ) from error


# --- One try, in a Ray actor ---------------------------------------------------------------------------


class Try:
    """A process of dreamer.py, on whatever machine Ray puts it. It needs nothing of LoRe's modules there.

    `run` waits for the process in one thread, while another takes the other calls.
    """

    def __init__(self):
        self._stop = False

    def machine(self) -> str:
        """The name of the machine: an answer means that the try has got its processors and begins."""
        return socket.gethostname()

    def run(self, options: Sequence[str], folder: str, log: str, threads: int) -> tuple[int, str]:
        """Do the run in the working directory `folder`. Returns (exit code, '').

        Or (2, what is wrong with this machine) where it has other files than the one that started the sweep.
        """
        machine, program = self.machine(), str(ROOT / "dreamer.py")
        if not os.path.exists(program):
            return 2, f"{machine} has no {program}: LoRe must lie at the same path on all machines"
        if not os.path.isdir(folder):
            return 2, f"{machine} has no folder {folder}, in which the sweep was started"
        try:
            handle = os.open(
                log, os.O_WRONLY | os.O_APPEND
            )  # made by who started the sweep: the disk is shared
        except OSError as error:
            why = "--logdir must be on a disk that all machines share"
            return 2, f"{machine} cannot open {log} ({error.strerror}): {why}"
        with open(handle, "ab") as file:
            # The process of an earlier try may still be saving, when only its worker was killed. It holds
            # the lock as long as it lives, for it has inherited the open file.
            while fcntl and not self._stop and not _locked(file):
                time.sleep(0.1)
            if self._stop:
                return 128 + signal.SIGTERM, ""
            # Should this worker be killed, the process saves and ends too (Linux).
            die = (
                functools.partial(ctypes.CDLL(None).prctl, PDEATHSIG, signal.SIGTERM)
                if sys.platform == "linux"
                else None
            )
            process = subprocess.Popen(
                [sys.executable, program, *options],
                cwd=folder, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, preexec_fn=die,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)}, start_new_session=True,
            )  # fmt: skip
            told = False
            while process.poll() is None:
                if self._stop and not told:
                    process.terminate()  # once: a second signal would not let it save
                    told = True
                time.sleep(0.1)
        return process.returncode, ""

    def stop(self) -> None:
        """Let the run save and end."""
        self._stop = True


def _locked(file: io.BufferedWriter) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a disk that knows no locks: dreamer.py has a way of its own
        return True
    return True


# --- The sweep -----------------------------------------------------------------------------------------


class Screen:
    """A live table in a terminal, plain lines where the output is none."""

    ORDER = (RUNNING, FAILED, STOPPED, WAITING, FINISHED)  # which rows are shown where not all have room
    BORDERS = 5  # lines that are no rows, and one for the prompt

    def __init__(self, runs: Sequence[Run], logdir: Path):
        self.runs, self.logdir = runs, logdir
        self.console = Console()
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None

    def __enter__(self) -> "Screen":
        if self.live:
            self.live.start()
        self.refresh()
        return self

    def __exit__(self, *_: object) -> None:
        self.refresh()
        if self.live:
            self.live.stop()

    def refresh(self) -> None:
        """Draw the table anew."""
        if self.live:
            self.live.update(self.table(), refresh=True)

    def event(self, line: str) -> None:
        """Tell what a table shows too."""
        if not self.live:
            self.tell(line)

    def tell(self, line: str) -> None:
        """Tell a line, above the table."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def counts(self) -> str:
        count = Counter(run.status for run in self.runs)
        return ", ".join(f"{count[status]} {status}" for status in self.ORDER if count[status])

    def table(self) -> Group:
        """The runs, as many as have room, those that run first."""
        several = len({run.machine for run in self.runs if run.machine}) > 1
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("run", overflow="fold")
        for name in ("status", "tries", "steps", "train", "best", "eval", "best", "hours"):
            table.add_column(name, justify="left" if name == "status" else "right", no_wrap=True)
        if several:
            table.add_column("machine", no_wrap=True)
        rows = max(1, self.console.height - self.BORDERS)
        chosen = sorted(self.runs, key=lambda run: self.ORDER.index(run.status))[:rows]
        for run in chosen:
            known = run.measures()
            steps = f"{known['step']:,} ({known['step'] / max(1, run.total_steps):.0%})"
            returns = [f"{known[name]:.4g}" if name in known else "-" for name in OF_RESULTS]
            cells = [run.name, run.status, str(run.tries), steps, *returns, f"{run.hours_so_far():.2f}"]
            table.add_row(*cells, *([run.machine] if several else []), style=STYLES[run.status])
        return Group(Text(f"{self.logdir}: {self.counts()}"), table)


class Handle(NamedTuple):
    """A try that Ray has: the actor, and its answers to come."""

    actor: Any
    machine: Any
    result: Any


class Sweep:
    """Keeps all runs going until each has finished or failed for good."""

    def __init__(
        self,
        runs: Sequence[Run],
        logdir: Path,
        ray: ModuleType,
        resources: Mapping,
        retries: int,
        screen: Screen,
    ):
        """`resources`: num_cpus and num_gpus of each run. A run that fails is tried again `retries` times."""
        self.runs, self.logdir, self.ray, self.retries, self.screen = runs, logdir, ray, retries, screen
        self.threads = max(1, int(resources["num_cpus"]))
        # Three threads of an actor: one waits for the process, two take calls.
        self.actor = ray.remote(**resources, max_concurrency=3, max_restarts=0)(Try)
        self.handles: dict[str, Handle] = {}
        self.stopping = False
        self.written = 0.0

    def run(self, stop: Sequence[int]) -> None:
        """Do all runs. When `stop` gets an entry, or anything fails here, those that run save and end."""
        try:
            self._summarize()  # first: it finds a logdir that cannot be written
            for run in self.runs:
                if run.status == WAITING:
                    self._start(run)
            while self.handles and not stop:
                self._look()
        finally:
            self._halt()
            self._summarize()

    def _start(self, run: Run) -> None:
        run.status, run.built = WAITING, run.last_built()
        run.log.parent.mkdir(parents=True, exist_ok=True)
        run.log.touch()  # an actor on a machine that does not see it does not share our disk
        actor = self.actor.remote()
        result = actor.run.remote(run.options, str(Path.cwd()), str(run.log.absolute()), self.threads)
        self.handles[run.name] = Handle(actor, actor.machine.remote(), result)

    def _look(self) -> None:
        """Wait a moment and see what has happened."""
        answers = [ref for handle in self.handles.values() for ref in (handle.machine, handle.result)]
        ready = set(self.ray.wait(answers, num_returns=len(answers), timeout=POLL)[0])
        changed = False
        for run in self.runs:
            handle = self.handles.get(run.name)
            if handle and run.status == WAITING and handle.machine in ready:
                changed |= self._began(run, handle)
            if handle and handle.result in ready:
                changed = True
                self._ended(run, handle)
        due = changed or time.monotonic() - self.written > SUMMARY_SECONDS
        if due and not self.stopping:  # then at the end: a full disk is not to keep the runs from saving
            self._summarize()
        self.screen.refresh()

    def _began(self, run: Run, handle: Handle) -> bool:
        try:
            run.machine = self.ray.get(handle.machine)
        except self.ray.exceptions.RayError:  # `result` tells of it
            return False
        run.status, run.since, run.problem = RUNNING, time.monotonic(), ""
        run.tries += 1
        self.screen.event(f"{run.name}: runs on {run.machine}, try {run.tries}")
        return True

    def _ended(self, run: Run, handle: Handle) -> None:
        wrong = ""
        try:
            code, wrong = self.ray.get(handle.result)
        except self.ray.exceptions.RayError as error:
            code, run.problem = None, f"its Ray worker died ({type(error).__name__})"
        self.ray.kill(handle.actor)
        del self.handles[run.name]
        run.hours, run.since = run.hours_so_far(), None
        if wrong and not self.stopping:
            raise UserError(wrong)
        if code == 0 or run.finished():  # a stop may come when all is done
            run.status, run.problem = FINISHED, ""
            self.screen.event(f"{run.name}: finished in try {run.tries}, {run.hours:.2f} hours")
            return
        if code is not None:
            run.problem = describe(code, run.log)
        if self.stopping:
            run.status, run.problem = STOPPED, ""
            self.screen.event(f"{run.name}: stopped at step {max(0, saved_step(run.place)):,}")
            return
        run.failures += 1
        mistake = code == USER_ERROR and run.last_built() == run.built  # it would be found again
        if mistake or run.failures > self.retries:
            run.status = FAILED
            self.screen.tell(f"{run.name}: failed: {run.problem} (see {run.log})")
        else:
            at = f"step {saved_step(run.place):,}" if saved_step(run.place) >= 0 else "the start"
            self.screen.tell(
                f"{run.name}: {run.problem}; it is tried again from {at} ({run.failures} of {self.retries})"
            )
            self._start(run)

    def _halt(self) -> None:
        """Let the runs that run save and end, and forget those that wait."""
        self.stopping = True
        for run in self.runs:
            if handle := self.handles.get(run.name):
                if run.status == WAITING:  # for a processor
                    self.ray.kill(handle.actor)
                    del self.handles[run.name]
                else:
                    handle.actor.stop.remote()
        if self.handles:
            self.screen.tell(f"Stopping: {len(self.handles)} runs save and end")
        while self.handles:
            self._look()

    def _summarize(self) -> None:
        self.written = time.monotonic()
        write_summary(self.logdir / SUMMARY, self.runs)


def describe(code: int, log: Path) -> str:
    """Why a process ended: the signal, or its last line."""
    if code < 0:
        names = {-signum: signum.name for signum in signal.Signals}
        return f"killed by {names.get(code, f'signal {-code}')}"
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
    return f"exit code {code}: {last}"


# --- Slurm ---------------------------------------------------------------------------------------------


def slurm_script(runs: Sequence[Run], logdir: Path, cpus: int, gpus: float | None) -> str:
    """An array script for sbatch with a run for each index.

    `exec` lets dreamer.py be the job: it gets Slurm's SIGTERM itself, saves and ends. A job that Slurm queues
    again, or that is submitted again, goes on from its checkpoint.
    """
    whole = logdir.absolute()
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name={re.sub(r'[^A-Za-z0-9_.-]+', '-', logdir.name) or 'sweep'}",
        f"#SBATCH --array=0-{len(runs) - 1}",
        f'#SBATCH --output="{whole}/slurm-%A_%a.log"',
        f"#SBATCH --cpus-per-task={cpus}",
        *([f"#SBATCH --gres=gpu:{gpus:g}"] if gpus else []),
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        f"#SBATCH --signal=B:TERM@{SLURM_GRACE}",
        "set -eu",
        f"cd {shlex.quote(str(Path.cwd()))}",
        f"export OMP_NUM_THREADS={cpus}",
        'case "$SLURM_ARRAY_TASK_ID" in',
        *(f"  {index}) exec {shlex.join(run.command())} ;;" for index, run in enumerate(runs)),
        "esac",
        'echo "There is no run $SLURM_ARRAY_TASK_ID." >&2',
        "exit 2",
    ]
    return "\n".join(lines) + "\n"


# --- The command ---------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the options")


def _number(kind: Callable[[str], float], low: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value < math.inf:
            whole = "whole " if kind is int else ""
            raise argparse.ArgumentTypeError(f"{text} is not a {whole}number from {low} on")
        return value

    return read


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command line: what is of this program, and the options for dreamer.py.

    Raises UserError for a mistake, SystemExit(0) after `--help`.
    """
    parser = _Parser(
        prog="sweep.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--configs", metavar="PRESET", nargs="+", default=[], help="presets of all runs")
    add(
        "--grid", metavar="NAME=V,V", nargs="+", default=[],
        help="options of dreamer.py with the values to try, each with each; lists as 'size=32 32,64 64'; "
        "configs=a,b adds a preset to --configs, configs=none,a also none",
    )  # fmt: skip
    add("--logdir", metavar="DIR", type=Path, required=True, help="where all runs write")
    add("--address", metavar="HOST:PORT", help="of a Ray cluster; without, Ray is started on this machine")
    add(
        "--cpus",
        metavar="N",
        type=_number(int, 1),
        default=1,
        help="processors and threads of a run; 1 by default",
    )
    add(
        "--gpus",
        metavar="N",
        type=_number(float, 0),
        help="GPUs of a run, 0.5 shares one; by default 1 where Ray has any",
    )
    add(
        "--retries",
        metavar="N",
        type=_number(int, 0),
        default=3,
        help="times that a run is tried again; 3 by default",
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--dry_run", action="store_true", help="print the commands and do nothing")
    only.add_argument(
        "--slurm", action="store_true", help=f"write LOGDIR/{SLURM}, an array script for sbatch"
    )
    only.add_argument("--summary", action="store_true", help=f"write LOGDIR/{SUMMARY} of what is there")
    args, options = parser.parse_known_args(argv)
    for word in ("--print_config", "--help"):
        if word in options:
            raise UserError(f"{word} is of one run: python3 dreamer.py {word}")
    if args.slurm and args.gpus and args.gpus != int(args.gpus):
        raise UserError(f"--gpus {args.gpus:g}: a job of Slurm has whole GPUs")
    return args, options


def sweep(args: argparse.Namespace, options: list[str], stop: Sequence[int]) -> int:
    """Do what the command line asks for. Returns the exit code; raises UserError."""
    runs = plan(read_grid(args.grid), args.configs, options, args.logdir)
    if args.dry_run:
        print("\n".join(shlex.join(run.command()) for run in runs))
        return 0
    if args.slurm:
        path = args.logdir / SLURM
        text = slurm_script(runs, args.logdir, args.cpus, args.gpus)
        atomic_write(path, lambda file: file.write(text.encode()))
        print(f"sbatch {shlex.quote(str(path))}")
        return 0
    path = args.logdir / SUMMARY
    recall(path, runs)
    for run in runs:
        run.status = FINISHED if run.finished() else WAITING
    if args.summary:
        for run in runs:
            if run.status == WAITING and saved_step(run.place) >= 0:
                run.status = STOPPED
    with Screen(runs, args.logdir) as screen:
        if not args.summary and any(run.status == WAITING for run in runs):
            ray = start_ray(args.address, "sweep.py", "--address", log_to_driver=False)
            try:
                gpus = (
                    args.gpus if args.gpus is not None else float(ray.cluster_resources().get("GPU", 0) > 0)
                )
                resources = {"num_cpus": args.cpus, "num_gpus": gpus}
                _check_room(ray, resources, args.address)
                Sweep(runs, args.logdir, ray, resources, args.retries, screen).run(stop)
            finally:
                ray.shutdown()
        else:
            write_summary(path, runs)
    screen.tell(f"Runs: {screen.counts()}. {path} sums them up.")
    if stop:
        screen.tell(f"Stopped by {signal.Signals(stop[0]).name}; the same command goes on.")
        return 128 + stop[0]
    return int(any(run.status == FAILED for run in runs))


def _check_room(ray: ModuleType, resources: Mapping[str, float], address: str | None) -> None:
    """Raises UserError if no machine is large enough for a run, for it would wait for ever."""
    names = {"num_cpus": ("CPU", "--cpus"), "num_gpus": ("GPU", "--gpus")}
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for key, (kind, option) in names.items():
        most = max(machine.get(kind, 0) for machine in machines)
        if resources[key] > most:
            where = f"the machines of {address} have" if address else "this machine has"
            raise UserError(f"{option} {resources[key]:g} is too many: {where} {most:g} at most")


def main(argv: list[str] | None = None) -> int:
    """Sweep as the command line says.

    Returns the exit code: 0, 1 if a run failed for good, 2 for the user's mistakes, 130, 143.
    """
    try:
        args, options = parse(sys.argv[1:] if argv is None else argv)
        with stop_signals() as stop:
            return sweep(args, options, stop)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
