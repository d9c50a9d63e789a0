"""What does LoRe reach? The trainings of docs/results.md over seeds: curves and a table.

    python3 benchmarks/results.py --jobs 2

Each trained agent then plays 20 or 100 episodes in worlds that training never saw, and so does an agent with
random actions. `--arms` chooses tasks. Finished runs are not repeated and interrupted ones are resumed;
`--only table` summarises the finished runs. `--published FILE` adds DreamerV3's published curves to the
figure: FILE is scores/dmc_proprio-dreamerv3.json.gz of the repository danijar/dreamerv3. Other options are
passed to dreamer.py.
"""

import argparse
import functools
import gzip
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate
from benchmarks import runs
from benchmarks.runs import Measures, Results, Study, Summary
from reports import figures, logs

# --- The protocol: options of dreamer.py ---------------------------------------------------------------

COMMON = "--device cpu --threads 1 --precision float32 --eval_videos False --video_pred_log False"
GYM = "--configs gym cpu_vector --envs.amount 4 --eval_every 1000 --eval_episodes 10 --envs.eval_amount 10"
DMC = "--configs dmc_proprio cpu_vector --actor.entropy 1e-3 --eval_every 4000 --eval_episodes 4"


class Task(NamedTuple):
    """A task, which is an arm of the study."""

    title: str
    options: str
    episodes: int = 100  # of the evaluation at the end
    published: str = ""  # the task's name in --published


TASKS = {
    "cartpole": Task("CartPole-v1", f"{GYM} --task gym_CartPole-v1 --steps 15000 --train_ratio 32"),
    "pendulum": Task("Pendulum-v1", f"{GYM} --task gym_Pendulum-v1 --steps 8000"),
    "dmc_cartpole": Task(
        "DMC cartpole swingup",
        f"{DMC} --envs.eval_amount 4 --task dmc_cartpole_swingup --steps 40000 --prefill 2000",
        20,
        "dmc_cartpole_swingup",
    ),
    "dmc_walker": Task(
        "DMC walker walk",
        f"{DMC} --envs.eval_amount 4 --task dmc_walker_walk --steps 94000 --prefill 4000",
        20,
        "dmc_walker_walk",
    ),
    "doorkey": Task("MiniGrid DoorKey-5x5", "--configs doorkey --steps 40000"),
}
EVALUATION_SEED = 0
SMOOTHING = 5  # log lines over which a training curve is averaged
QUICK_EPISODES = 2


# --- Measures ------------------------------------------------------------------------------------------


def measure(logdir: Path, quick: bool) -> Measures:
    """The cost of a finished run, its curves, and evaluations at its end."""
    lines = logs.read_metrics(logdir)
    episodes = QUICK_EPISODES if quick else TASKS[logdir.name.rpartition("_")[0]].episodes
    play = functools.partial(evaluate.evaluate, logdir, episodes, seed=EVALUATION_SEED, device="cpu")
    played = {"agent": play(), "random": play(random=True)}
    kept = ("return_mean", "return_interval", "returns")
    return {
        "steps": lines[-1]["step"],
        "updates": max(line.get("opt/updates", 0) for line in lines),
        "minutes": 60 * logs.RunLog(logdir, lines, None).hours,
        "curves": {
            "eval": logs.curve(lines, logs.EVAL),
            "train": logs.curve(lines, logs.TRAIN, SMOOTHING),
        },
        **{policy: {key: result[key] for key in kept} for policy, result in played.items()},
    }


# --- Table and figure ----------------------------------------------------------------------------------

Curves = Mapping[str, tuple[np.ndarray, np.ndarray]]  # task -> env steps [n], returns [seeds, n]


def read_published(path: Path) -> Curves:
    """The curves in a file of the `scores` folder of danijar/dreamerv3."""
    curves: dict[str, list[dict]] = {}
    with gzip.open(path) as file:
        for run in json.load(file):
            curves.setdefault(run["task"], []).append(run)
    return {
        task: (np.array(each[0]["xs"], np.float64), np.array([run["ys"] for run in each], np.float64))
        for task, each in curves.items()
    }


def report(results: Results, curves: Curves) -> tuple[Summary, list[str]]:
    """The published returns at our number of steps, and a table with a row for each run."""
    titles = ("task", "seed", "env steps", "updates", "minutes", "return", "random actions")
    rows = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for name, seeds in results.items():
        for seed, run in seeds.items():
            cost = f"{run['steps']:,} | {run['updates']:,.0f} | {run['minutes']:.0f}"
            played = " | ".join(_played(run[policy]) for policy in ("agent", "random"))
            rows.append(f"| {TASKS[name].title} | {seed} | {cost} | {played} |")
    published = {}
    for name, seeds in results.items():
        steps = max(run["steps"] for run in seeds.values())
        at, values = curves.get(TASKS[name].published, ([math.inf], []))
        if at[0] <= steps <= at[-1]:
            published[name] = [float(np.interp(steps, at, each)) for each in values]
            mean, low, high = np.mean(published[name]), min(published[name]), max(published[name])
            rows += ["", f"Published for {TASKS[name].title} at {steps:,} env steps, {len(values)} seeds: "]
            rows[-1] += f"{mean:.4g} ({low:.4g} to {high:.4g})"
    return {"published": published}, rows


def _played(result: Mapping) -> str:
    interval = result["return_interval"]
    spread = f" ({interval[0]:.4g} to {interval[1]:.4g})" if interval else ""
    return f"{result['return_mean']:.4g}{spread}"


def draw(results: Results, summary: Summary, out: Path, curves: Curves) -> None:
    """Evaluation returns over env steps, one panel per task and one line per seed."""
    columns = min(3, len(results))
    rows = math.ceil(len(results) / columns)
    figure, axes = figures.pyplot().subplots(
        rows, columns, figsize=(4.6 * columns, 3.6 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(results) :]:
        axis.set_axis_off()
    for axis, (name, seeds) in zip(axes.flat, results.items(), strict=False):
        for seed, run in seeds.items():
            axis.plot(*run["curves"]["eval"], ".-", label=f"LoRe, seed {seed}", lw=1.2, ms=4)
        axis.axhline(run["random"]["return_mean"], color="0.4", ls=":", label="random actions")
        if TASKS[name].published in curves:
            at, values = curves[TASKS[name].published]
            shown = at <= max(run["steps"] for run in seeds.values())
            axis.plot(at[shown], values.mean(0)[shown], color="k", ls="--", label="published DreamerV3, mean")
            low, high = values.min(0)[shown], values.max(0)[shown]
            axis.fill_between(at[shown], low, high, color="k", alpha=0.1, lw=0)
        axis.set(title=TASKS[name].title, xlabel="env steps", ylabel="return")
        axis.locator_params(axis="x", nbins=6)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(out, dpi=80)


def study(curves: Curves) -> Study:
    arms = {name: task.options for name, task in TASKS.items()}
    return Study(
        COMMON, arms, range(3), measure,
        functools.partial(report, curves=curves), functools.partial(draw, curves=curves),
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--published", type=Path)
    args, rest = parser.parse_known_args()
    curves = read_published(args.published) if args.published else {}
    return runs.main({"results": study(curves)}, "logdir/results", __doc__, rest)


if __name__ == "__main__":
    sys.exit(main())
