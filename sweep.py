"""Run dreamer.py for every combination of a grid of options, on this machine or a cluster, with Ray Tune.

    python3 sweep.py --configs crafter --grid seed=0,1,2 configs=lore_prior,lore_synth --logdir ./logdir/sweep

Each run is a process with --cpus and --gpus. It writes to LOGDIR/NAME, its output to LOGDIR/NAME.log, and
LOGDIR/summary.csv lists the results. A run that fails is retried and resumes from its checkpoint. The same
command again resumes the runs that have not finished. All other options are passed to dreamer.py.
"""

import argparse
import contextlib
import csv
import ctypes
import functools
import hashlib
import io
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import config as configs
from basics import UserError, atomic_write
from parallel import start_ray
from reports.logs import read_metrics

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

ROOT = Path(__file__).resolve().parent
NONE = "none"  # a value of `configs` in the grid: no preset
MAX_NAME = 200  # bytes in UTF-8; most file systems take 255, and ".log" is appended
LINUX = sys.platform == "linux"
PDEATHSIG = 1  # of Linux' prctl: the signal that a process gets when its parent dies
REPORT = 2  # seconds between reports of a run
RETURNS = {"train_return": "env/episode_return", "eval_return": "eval/episode_return"}
ENVIRON = {
    "RAY_kill_child_processes_on_worker_exit": "0",  # Ray would kill the runs before they have saved
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a run has no return before its first episode ends
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the runs write their own TensorBoard files
}


class Run(NamedTuple):
    """One combination of the grid."""

    name: str
    logdir: Path
    choice: dict[str, str]  # values of the grid's options
    options: list[str]  # of dreamer.py
    steps: int

    def command(self) -> list[str]:
        """The words of a command line that works in the current folder."""
        program = ROOT / "dreamer.py"
        return [sys.executable, program.name if Path.cwd() == ROOT else str(program), *self.options]


# The grid


def read_grid(items: Sequence[str]) -> dict[str, list[str]]:
    """The values by option from items such as `seed=0,1,2`. Raises UserError."""
    grid: dict[str, list[str]] = {}
    for item in items:
        name, equals, text = item.partition("=")
        values = [value.strip() for value in text.split(",")]
        if not (name and equals) or not all(values):
            raise UserError(f"--grid {item}: write NAME=VALUE,VALUE, for example seed=0,1,2")
        if name in grid:
            raise UserError(f"--grid {name} is given twice: write {name}=VALUE,VALUE")
        if name in configs.RUN_PATHS:
            raise UserError(f"--grid {name}: each run has its own folder in --logdir")
        grid[name] = values
    return grid


def plan(
    grid: Mapping[str, Sequence[str]], presets: Sequence[str], options: Sequence[str], logdir: Path
) -> list[Run]:
    """The runs of all combinations of the grid, with checked options. Raises UserError.

    Args:
        presets: of all runs; `configs` in the grid adds to them.
        options: of dreamer.py for all runs; the grid takes precedence.
    """
    runs: dict[str, Run] = {}
    for values in itertools.product(*grid.values()):
        choice = dict(zip(grid, values, strict=True))
        name = ",".join(re.sub(r"[^\w.+=-]+", "-", "=".join(item)) for item in choice.items()) or "run"
        if name in runs:
            raise UserError(f"--grid: two runs have the name {name}; give other values")
        if len(name.encode()) > MAX_NAME:
            raise UserError(f"--grid: the name {name} is longer than {MAX_NAME} bytes; give other values")
        more = choice.get("configs", NONE)
        names = [*presets, *([] if more == NONE else more.split())]
        words = [*(["--configs", *names] if names else []), *options]
        for key, value in choice.items():
            words += [] if key == "configs" else [f"--{key}", *value.split()]
        words += ["--logdir", str(logdir / name)]
        try:
            steps = configs.load(words).steps
        except UserError as error:
            raise UserError(f"run {name}: {error}" if grid else str(error)) from None
        runs[name] = Run(name, logdir / name, choice, words, steps)
    return list(runs.values())


# Results


def measures(logdir: Path) -> dict[str, float]:
    """The last `step` in metrics.jsonl, 0 if there is none, and the last of each of RETURNS so far."""
    try:
        lines = read_metrics(logdir)
    except UserError:  # not written yet
        return {"step": 0}
    found = {"step": lines[-1]["step"]}
    for line in lines:
        found |= {name: line[key] for name, key in RETURNS.items() if key in line}
    return found


def write_summary(path: Path, runs: Sequence[Run], status: Mapping[str, str]) -> None:
    """Write the results as a table with one line per run. Raises UserError."""
    text = io.StringIO(newline="")
    columns = ["run", *runs[0].choice, "status", "step", *RETURNS, "command"]
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    for run in runs:
        row = {"run": run.name, **run.choice, "status": status[run.name], **measures(run.logdir)}
        writer.writerow(row | {"command": shlex.join(run.command())})
    atomic_write(path, lambda file: file.write(text.getvalue().encode()))


# Ray Tune


def make_trainable(runs: Sequence[Run], cpus: int) -> type:
    """The class of Ray Tune that starts the run with the name `config["run"]` and reports its progress."""
    from ray import tune

    by_name, folder, program = {run.name: run for run in runs}, str(Path.cwd()), str(ROOT / "dreamer.py")

    class Trial(tune.Trainable):
        def setup(self, config: dict[str, str]) -> None:
            self.run = by_name[config["run"]]
            self.log = Path(folder, f"{self.run.logdir}.log")
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with open(self.log, "ab") as log:
                if fcntl:  # the process of an earlier try holds this lock while it is still saving
                    fcntl.flock(log, fcntl.LOCK_EX)
                # Linux: if this worker ends or is killed, the process gets SIGTERM, saves and ends.
                die = functools.partial(ctypes.CDLL(None).prctl, PDEATHSIG, signal.SIGTERM) if LINUX else None
                self.process = subprocess.Popen(
                    [sys.executable, program, *self.run.options],
                    cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                    env={**os.environ, "OMP_NUM_THREADS": str(cpus)}, preexec_fn=die, start_new_session=True,
                )  # fmt: skip

        def step(self) -> dict[str, Any]:
            code = None
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self.process.wait(REPORT)
            if code:
                output = self.log.read_text(encoding="utf-8", errors="replace").strip()
                last = (output or "no output").splitlines()[-1]
                raise RuntimeError(f"{self.run.name}: exit code {code}: {last} (see {self.log})")
            return {**measures(Path(folder, self.run.logdir)), "done": code == 0}

        def cleanup(self) -> None:
            if not LINUX:
                self.process.terminate()
                self.process.wait()

    return Trial


def make_tuner(args: argparse.Namespace, runs: Sequence[Run], gpus: float) -> Any:
    """The Tuner of these runs: of the same command before if there was one, else a new one."""
    from ray import tune

    trainable = tune.with_resources(make_trainable(runs, args.cpus), {"cpu": args.cpus, "gpu": gpus})
    digest = hashlib.sha256(json.dumps([args.asha, *(run.options for run in runs)]).encode()).hexdigest()[:8]
    storage, name = args.logdir.absolute(), f"tune-{digest}"
    if tune.Tuner.can_restore(str(storage / name)):
        return tune.Tuner.restore(str(storage / name), trainable, restart_errored=True)
    scheduler, steps = None, max(run.steps for run in runs)
    if args.asha:
        scheduler = tune.schedulers.ASHAScheduler(
            "step", args.asha, "max", max_t=steps, grace_period=max(1, steps // 9), reduction_factor=3,
            stop_last_trials=False,
        )  # fmt: skip
    return tune.Tuner(
        trainable,
        param_space={"run": tune.grid_search([run.name for run in runs])},
        tune_config=tune.TuneConfig(
            scheduler=scheduler,
            trial_name_creator=lambda trial: trial.config["run"],
            trial_dirname_creator=lambda trial: trial.config["run"],
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=str(storage),
            failure_config=tune.FailureConfig(args.retries),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the runs save by themselves
            callbacks=[tune.logger.JsonLoggerCallback()],
        ),
    )


def sweep(args: argparse.Namespace, runs: Sequence[Run]) -> int:
    """Execute the runs. Returns the exit code; raises UserError."""
    os.environ |= ENVIRON
    try:
        from ray import tune  # noqa: F401
    except ImportError as error:
        raise UserError("sweep.py needs ray.tune: pip install -r requirements/ray.txt") from error
    signals = []

    def interrupt(signum: int, _frame: object) -> None:
        signals.append(signum)
        signal.raise_signal(signal.SIGINT)  # which Tune handles

    ray = start_ray(args.address, "sweep.py", "--address", {"env_vars": ENVIRON}, log_to_driver=False)
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        gpus = float(ray.cluster_resources().get("GPU", 0) > 0) if args.gpus is None else args.gpus
        results = make_tuner(args, runs, gpus).fit()
    finally:
        signal.signal(signal.SIGTERM, before)
        ray.shutdown()
    status = dict.fromkeys((run.name for run in runs), "waiting")
    for result in filter(lambda result: result.config, results):  # the others have not reported yet
        ended = "finished" if result.metrics.get("done") else "stopped"
        status[result.config["run"]] = "failed" if result.error else ended
    path = args.logdir / "summary.csv"
    write_summary(path, runs, status)
    print(", ".join(f"{name}: {each}" for name, each in status.items()), f"(see {path})")
    if {"stopped", "waiting"} & set(status.values()):
        print("Stopped; the same command resumes.")
        return 128 + (signals or [signal.SIGINT])[0]
    return int("failed" in status.values())


# The command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the options")


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of this program, and the others, which are for dreamer.py.

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
        help="options of dreamer.py with their values; lists as 'size=32 32,64 64'; "
        "configs=a,b adds a preset to --configs, configs=none,a also none",
    )  # fmt: skip
    add("--logdir", metavar="DIR", type=Path, required=True, help="folder of all runs")
    add("--address", metavar="HOST:PORT", help="of a Ray cluster; by default Ray is started on this machine")
    add("--cpus", metavar="N", type=int, default=1, help="CPUs and threads of a run; default: 1")
    add("--gpus", metavar="N", type=float, help="GPUs of a run, 0.5 shares one; default: 1 if Ray has any")
    add("--retries", metavar="N", type=int, default=3, help="retries of a run that fails; default: 3")
    add(
        "--asha", nargs="?", const="train_return", choices=list(RETURNS),
        help="stop weak runs early, by train_return or eval_return",
    )  # fmt: skip
    add("--dry_run", action="store_true", help="print the commands only")
    return parser.parse_known_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if a run failed, 2 for a mistake of the user, 130 or 143 if stopped."""
    try:
        args, options = parse(sys.argv[1:] if argv is None else argv)
        runs = plan(read_grid(args.grid), args.configs, options, args.logdir)
        if args.dry_run:
            print("\n".join(shlex.join(run.command()) for run in runs))
            return 0
        return sweep(args, runs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
