"""What does LoRe reach? The trainings of docs/results.md, over seeds: curves and a table.

    python3 benchmarks/results.py cartpole pendulum dmc_cartpole dmc_walker doorkey

cartpole      CartPole-v1 of gymnasium, from its vector
pendulum      Pendulum-v1 of gymnasium, from its vector
dmc_cartpole  DeepMind Control's cartpole swingup, from its vectors
dmc_walker    DeepMind Control's walker walk, from its vectors
doorkey       MiniGrid's DoorKey-5x5 as a one-hot vector: the baseline of docs/ablation.md, a little longer

Each trained agent then plays 20 or 100 episodes in worlds that training never saw, and so does an agent with
random actions. A run is one command of dreamer.py, which is shown as it starts, and has a folder in --out. A
run that has finished is not done again, and one that was interrupted goes on; `--only table` sums up what has
finished and starts nothing. `--published FILE` draws DreamerV3's published curves beside ours: FILE is
scores/dmc_proprio-dreamerv3.json.gz of the repository danijar/dreamerv3. OUT/results.json holds the result,
OUT/results.md the table and OUT/results.png the figure. Options that are not listed here go to dreamer.py.
"""

import argparse
import gzip
import json
import math
import signal
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # first: it has an exploration.py, too

import runs
from runs import Measures

import evaluate
from basics import UserError, atomic_write
from reports import figures, logs

# --- The protocol: options of dreamer.py ---------------------------------------------------------------

COMMON = "--device cpu --threads 1 --precision float32 --eval_videos False --video_pred_log False"


class Study(NamedTuple):
    """Runs of dreamer.py on one task."""

    title: str
    options: str
    seeds: Sequence[int]
    episodes: int = 100  # of the evaluation at the end
    published: str = ""  # the task's name in --published


STUDIES = {
    "cartpole": Study(
        "CartPole-v1",
        "--configs gym cpu_vector --task gym_CartPole-v1 --steps 15000 --train_ratio 32 --envs.amount 4 "
        "--eval_every 1000 --eval_episodes 10 --envs.eval_amount 10",
        range(3),
    ),
    "pendulum": Study(
        "Pendulum-v1",
        "--configs gym cpu_vector --task gym_Pendulum-v1 --steps 8000 --envs.amount 4 "
        "--eval_every 1000 --eval_episodes 10 --envs.eval_amount 10",
        range(3),
    ),
    "dmc_cartpole": Study(
        "DMC cartpole swingup",
        "--configs dmc_proprio cpu_vector --task dmc_cartpole_swingup --steps 40000 --prefill 2000 "
        "--actor.entropy 1e-3 --eval_every 4000 --eval_episodes 4 --envs.eval_amount 4",
        range(3),
        20,
        "dmc_cartpole_swingup",
    ),
    "dmc_walker": Study(
        "DMC walker walk",
        "--configs dmc_proprio cpu_vector --task dmc_walker_walk --steps 94000 --prefill 4000 "
        "--actor.entropy 1e-3 --eval_every 4000 --eval_episodes 4 --envs.eval_amount 4",
        range(1),
        20,
        "dmc_walker_walk",
    ),
    "doorkey": Study("MiniGrid DoorKey-5x5", "--configs doorkey --steps 40000", range(3)),
}
EVALUATION_SEED = 0
SMOOTHING = 5  # log lines that a training curve is averaged over
QUICK = "--steps 200 --prefill 60 --log_every 20 --eval_every 40 --eval_episodes 1 --envs.eval_amount 1 "
QUICK += "--batch_size 4 --batch_length 8 --imag_horizon 3 --train_ratio 4 --time_limit 20"
QUICK_EPISODES = 2


def command(name: str, seed: int, logdir: Path, quick: bool) -> list[str]:
    """The words of one run, from `python3` on."""
    words = f"{STUDIES[name].options} {COMMON} {QUICK if quick else ''}".split()
    return ["python3", "dreamer.py", *words, "--seed", str(seed), "--logdir", str(logdir)]


# --- Measures ------------------------------------------------------------------------------------------


def measures(logdir: Path, episodes: int) -> Measures:
    """What is told of a run that has finished: what it cost, its curves, and evaluations at its end."""
    lines = logs.read_metrics(logdir)
    played = {
        policy: evaluate.evaluate(
            logdir, episodes, seed=EVALUATION_SEED, device="cpu", random=policy == "random"
        )
        for policy in ("agent", "random")
    }
    return {
        "steps": lines[-1]["step"],
        "updates": max(line.get("opt/updates", 0) for line in lines),
        "minutes": minutes(lines),
        "curves": {
            "eval": logs.curve(lines, "eval/episode_return"),
            "train": logs.curve(lines, "env/episode_return", SMOOTHING),
        },
        **{
            policy: {key: result[key] for key in ("return_mean", "return_interval", "returns")}
            for policy, result in played.items()
        },
    }


def minutes(lines: list[dict]) -> float:
    """Wall-clock time of a run, evaluations included: each line tells the speed since the one before."""
    told = [(line["step"], line["env/fps"]) for line in lines if line.get("env/fps")]
    before = [0, *(step for step, _ in told)]
    return sum((step - last) / speed for (step, speed), last in zip(told, before, strict=False)) / 60


# --- Published curves ----------------------------------------------------------------------------------

Curves = dict[str, tuple[np.ndarray, np.ndarray]]  # task -> env steps [n], returns [seeds, n]
MAX_BYTES = 50 * 2**20  # of a file of published curves, unpacked


def read_published(path: Path) -> Curves:
    """The curves of a file in the `scores` folder of danijar/dreamerv3. Raises UserError."""
    try:
        with gzip.open(path) as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} bytes")
        curves: dict[str, list[dict]] = {}
        for run in json.loads(text):
            curves.setdefault(run["task"], []).append(run)
        return {
            task: (np.array(each[0]["xs"], np.float64), np.array([run["ys"] for run in each], np.float64))
            for task, each in curves.items()
        }
    except (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} holds no published curves: {error}. See --help.") from error


def published_at(curves: Curves, task: str, steps: float) -> list[float] | None:
    """The returns of all published seeds after `steps` env steps, interpolated; None where there are none."""
    at, values = curves.get(task, (np.zeros(1), np.zeros((0, 1))))
    if not at[0] <= steps <= at[-1]:
        return None
    return [float(np.interp(steps, at, each)) for each in values]


# --- Table and figure ----------------------------------------------------------------------------------


def table(result: Mapping) -> list[str]:
    """A Markdown table with a row for each run."""
    titles = ("task", "seed", "env steps", "updates", "minutes", "return", "random actions")
    rows = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for name, seeds in result["runs"].items():
        for seed, run in seeds.items():
            cost = f"{run['steps']:,} | {run['updates']:,.0f} | {run['minutes']:.0f}"
            played = " | ".join(_played(run[policy]) for policy in ("agent", "random"))
            rows.append(f"| {STUDIES[name].title} | {seed} | {cost} | {played} |")
    for name, returns in result["published"].items():
        steps = max(run["steps"] for run in result["runs"][name].values())
        mean, low, high = np.mean(returns), min(returns), max(returns)
        rows += ["", f"Published for {STUDIES[name].title} at {steps:,} env steps, {len(returns)} seeds: "]
        rows[-1] += f"{mean:.4g} ({low:.4g} to {high:.4g})"
    return rows


def _played(result: Mapping) -> str:
    interval = result["return_interval"]
    spread = f" ({interval[0]:.4g} to {interval[1]:.4g})" if interval else ""
    return f"{result['return_mean']:.4g}{spread}"


def draw(result: Mapping, curves: Curves, out: Path) -> None:
    """Evaluation returns over env steps, one panel a task and one line a seed."""
    plt, by_name = figures.pyplot(), result["runs"]
    columns = min(3, len(by_name))
    rows = math.ceil(len(by_name) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.6 * columns, 3.6 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(by_name) :]:
        axis.set_axis_off()
    for axis, (name, seeds) in zip(axes.flat, by_name.items(), strict=False):
        for seed, run in seeds.items():
            axis.plot(*run["curves"]["eval"], ".-", label=f"LoRe, seed {seed}", lw=1.2, ms=4)
        axis.axhline(run["random"]["return_mean"], color="0.4", ls=":", label="random actions")
        if STUDIES[name].published in curves:
            at, values = curves[STUDIES[name].published]
            end = max(run["steps"] for run in seeds.values())
            shown = at <= end
            axis.plot(at[shown], values.mean(0)[shown], color="k", ls="--", label="published DreamerV3, mean")
            low, high = values.min(0)[shown], values.max(0)[shown]
            axis.fill_between(at[shown], low, high, color="k", alpha=0.1, lw=0)
        axis.set(title=STUDIES[name].title, xlabel="env steps", ylabel="return")
        axis.locator_params(axis="x", nbins=6)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(out, dpi=80)
    plt.close(figure)


# --- The command ---------------------------------------------------------------------------------------


def run_studies(
    names: Sequence[str],
    out: Path,
    seeds: Sequence[int] | None,
    jobs: int,
    quick: bool,
    more: Sequence[str],
    curves: Curves,
    only_table: bool = False,
) -> dict:
    """Do the runs that are not done yet, and write what came out to {out}/results.json, .md and .png.

    `more` are further options of dreamer.py. With `only_table` nothing is run: what has finished is summed
    up. Returns the result, as it stands in the file. Raises UserError.
    """
    places = {
        (name, seed): out / f"{name}_{seed}"
        for name in names
        for seed in ([0] if quick else seeds or STUDIES[name].seeds)
    }
    commands = {place: [*command(*run, place, quick), *more] for run, place in places.items()}
    if only_table:
        commands = {place: words for place, words in commands.items() if runs.finished(place, words)}
        if not commands:
            raise UserError(f"No run of these tasks and seeds has finished in {out}: leave out --only.")
    episodes = {
        place: QUICK_EPISODES if quick else STUDIES[name].episodes for (name, _), place in places.items()
    }
    measured = runs.do(commands, jobs, lambda logdir: measures(logdir, episodes[logdir]))
    by_name: dict[str, dict[int, Measures]] = {}
    for (name, seed), place in places.items():
        if place in measured:
            by_name.setdefault(name, {})[seed] = measured[place]
    beside = {}
    for name, each in by_name.items():
        returns = published_at(curves, STUDIES[name].published, max(run["steps"] for run in each.values()))
        if returns:
            beside[name] = returns
    result = {"runs": by_name, "published": beside}
    runs.write_json(out / "results.json", result)
    atomic_write(out / "results.md", lambda file: file.write("\n".join(table(result)).encode() + b"\n"))
    draw(result, curves, out / "results.png")
    return result


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and the options in it that are for dreamer.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("studies", nargs="+", choices=STUDIES)
    runs.add_options(add, "logdir/results", "docs/results.md")
    add("--published", type=Path, metavar="FILE", help="DreamerV3's published curves, see above")
    add("--only", choices=["table"], help="start no run, and sum up those that have finished")
    args, more = parser.parse_known_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs} must be at least 1")
    return args, more


def main(argv: list[str] | None = None) -> int:
    args, more = parse(argv)
    out = args.out / "quick" if args.quick else args.out
    try:
        figures.pyplot()  # that it is missing is to be said before the runs
        curves = read_published(args.published) if args.published else {}
        result = run_studies(
            args.studies, out, args.seeds, args.jobs, args.quick, more, curves, args.only == "table"
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    print(json.dumps(result) if args.json else "\n".join(table(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
