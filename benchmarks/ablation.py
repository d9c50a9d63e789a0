"""Does the advice help? The arms of docs/ablation.md, over seeds: curves and a table.

    python3 benchmarks/ablation.py doorkey --jobs 2

doorkey  MiniGrid's DoorKey-5x5 as a one-hot vector, by a tiny model: minutes a run
crafter  a Crafter of 32 x 32 cells from pixels, with the `cpu` preset

The adviser is scripted (`--llm.backend rules`), so no key and no network is needed. A run is one command of
dreamer.py, which is shown as it starts, and has a folder in --out. A run that has finished is not done again,
and one that was interrupted goes on; `--only table` sums up what has finished and starts nothing.
OUT/STUDY.json holds the result, OUT/STUDY.md the tables and OUT/STUDY.png the figure. Options that are not
listed here go to dreamer.py.
"""

import argparse
import json
import math
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # first: benchmarks/ has an exploration.py, too

import rules
import runs
from runs import Measures

from basics import UserError, atomic_write
from reports import figures, logs
from stats import interquartile_mean, ratio_interval

# --- The protocol: options of dreamer.py ---------------------------------------------------------------

# Rules answer at once and for nothing, so they are asked about each new situation.
SCRIPTED = "--llm.backend rules --llm.min_gap_steps 1 --llm.until 20000"
ARMS = {
    "baseline": "",
    "prior": f"--configs lore_prior {SCRIPTED}",
    "synth": f"--configs lore_synth {SCRIPTED}",
    "options": f"--configs lore_options {SCRIPTED}",
    "full": f"--configs lore_full {SCRIPTED}",
    "adversarial": f"--configs lore_prior {SCRIPTED} --llm.rules_quality adversarial",
    "random": f"--configs lore_prior {SCRIPTED} --llm.rules_quality random",
    "latents": f"--configs lore_prior {SCRIPTED} --prior.beta_max 0",
    "full_adversarial": f"--configs lore_full {SCRIPTED} --llm.rules_quality adversarial",
}
REQUIRED = ("baseline", "prior", "synth", "options", "full", "adversarial")
TITLES = {
    "baseline": "baseline: DreamerV3",
    "prior": "+B: policy prior",
    "synth": "+A: replay augmentation",
    "options": "+C: options",
    "full": "full: A, B and C",
    "adversarial": "+B, adversarial adviser",
    "random": "+B, random adviser",
    "latents": "+B without its weight in the policy",
    "full_adversarial": "full, adversarial adviser",
    "alone": "the scripted adviser alone",
}
COMMON = "--device cpu --threads 1 --eval_videos False --video_pred_log False"
FINAL = 0.25  # share of a run, at its end, whose evaluations are the final return
SMOOTHING = 3  # evaluations that a return is averaged over before it counts as reached
REACHED = 0.99  # of the baseline's final return counts as that return: evaluations scatter
NEARLY = 0.9  # of it: the second mark
MAX_STEPS_SHARE = 2 / 3  # the bar: of the baseline's steps


class Study(NamedTuple):
    """Runs of dreamer.py."""

    options: str  # of all runs
    quick: str  # further options for --quick: nothing is learned, only that all of it runs is tested
    seeds: Sequence[int]
    task: str
    world: str  # options of the task, for the adviser alone
    episodes: int  # that it plays for each seed


QUICK = "--steps 200 --prefill 60 --log_every 20 --eval_every 40 --eval_episodes 1 --envs.eval_amount 1 "
QUICK += "--batch_size 4 --batch_length 8 --imag_horizon 3 --train_ratio 4 --time_limit 20"
STUDIES = {
    "doorkey": Study(
        "--configs doorkey --precision float32", QUICK, range(3), "minigrid_DoorKey-5x5", "", 100
    ),
    "crafter": Study(
        "--configs crafter cpu --crafter.area 32 32 --precision bfloat16 --steps 30000 --prefill 2500 "
        "--train_ratio 32 --envs.amount 4 --envs.eval_amount 5 --eval_every 2500 --eval_episodes 10 "
        "--log_every 500",
        QUICK
        + " --envs.amount 1 --rssm.deter 32 --rssm.hidden 16 --encoder.cnn_depth 2 --decoder.cnn_depth 2",
        range(2),
        "crafter_reward",
        "--crafter.area 32 32",
        10,
    ),
}
QUICK_SEEDS = (100,)


# --- Measures ------------------------------------------------------------------------------------------


def measures(lines: list[dict]) -> Measures:
    """What is measured of a run; `lines` are those of its metrics.jsonl.

    The returns are those of evaluations without advice: of what the agent itself has learned. `final` is
    their mean in the last quarter, `area` their mean over the whole run (each counts for the steps between
    it and the next). `train` is the mean return of training episodes in the last quarter.
    """
    steps, returns = logs.curve(lines, "eval/episode_return")
    last = lines[-1]["step"]
    late = [line for line in lines if line["step"] > (1 - FINAL) * last]
    train = [line["env/episode_return"] for line in late if "env/episode_return" in line]
    final = [line["eval/episode_return"] for line in late if "eval/episode_return" in line]
    return {
        "final": float(np.mean(final)),
        "area": float(np.trapezoid(returns, steps) / (steps[-1] - steps[0])),
        "train": float(np.mean(train)) if train else None,
        "steps": last,
        "updates": max(line.get("opt/updates", 0) for line in lines),
        "curves": {
            name: dict(zip(("steps", "values"), logs.curve(lines, key), strict=True))
            for name, key in (
                ("eval", "eval/episode_return"),
                ("advised", "eval_advised/episode_return"),
                ("train", "env/episode_return"),
            )
        },
    }


def alone(study: Study, seed: int, quick: bool) -> float:
    """Mean return of the scripted adviser's best actions, without an agent."""
    options = [*study.world.split(), "--seed", str(seed), *(["--time_limit", "20"] if quick else [])]
    return float(rules.play(study.task, 2 if quick else study.episodes, options)["return"].mean())


def steps_to(run: Measures, mark: float) -> float | None:
    """Env steps until the mean of the last few evaluations is at least `mark`; None if it never is."""
    curve = run["curves"]["eval"]
    values = np.convolve(curve["values"], np.ones(SMOOTHING) / SMOOTHING, "valid")
    reached = np.flatnonzero(values >= mark)
    return float(curve["steps"][SMOOTHING - 1 + reached[0]]) if len(reached) else None


# --- Summaries -----------------------------------------------------------------------------------------


def summarise(by_arm: Mapping[str, Mapping[int, Measures]]) -> dict[str, dict]:
    """Interquartile mean and interval over seeds of each number: arm -> measure -> iqm, low, high, values.

    `to_final` and `to_nearly` are the steps to the baseline's final return (the interquartile mean over its
    seeds), and to nine tenths of it; a run that never gets there counts with all its steps, and `missed` says
    how many did not. `speed_final`, `speed_nearly` and `gain` are the arm's steps and its mean return over
    the run (`area`), divided by the baseline's.
    """
    base = by_arm.get("baseline", {})
    goal = interquartile_mean([run["final"] for run in base.values()]) if base else None
    summary: dict[str, dict] = {}
    for arm, seeds in by_arm.items():
        values = {
            name: [run[name] for run in seeds.values()] for name in ("final", "area", "train", "updates")
        }
        missed = {}
        if goal is not None:
            for name, mark in (("to_final", REACHED * goal), ("to_nearly", NEARLY * goal)):
                reached = [steps_to(run, mark) for run in seeds.values()]
                missed[name] = sum(each is None for each in reached)
                values[name] = [
                    run["steps"] if each is None else each
                    for run, each in zip(seeds.values(), reached, strict=True)
                ]
        summary[arm] = {name: spread(each) for name, each in values.items() if None not in each}
        summary[arm]["missed"] = missed
    for arm in summary if goal is not None else ():
        for name, of in (("speed_final", "to_final"), ("speed_nearly", "to_nearly"), ("gain", "area")):
            over, under = (summary[each][of]["values"] for each in (arm, "baseline"))
            summary[arm][name] = _ratio(over, under)
    return summary


def spread(values: Sequence[float]) -> dict:
    """Interquartile mean of values over seeds, and its interval: iqm, low, high, values."""
    iqm, low, high = logs.spread(values)
    return {"iqm": iqm, "low": _told(low), "high": _told(high), "values": values}


def _ratio(over: Sequence[float], under: Sequence[float]) -> dict:
    mean = interquartile_mean(under)
    ratio = interquartile_mean(over) / mean if mean else math.nan
    low, high = ratio_interval(over, under, statistic=interquartile_mean)
    return {"iqm": _told(ratio), "low": _told(low), "high": _told(high)}


def _told(value: float) -> float | None:
    return value if math.isfinite(value) else None


def bars(summary: Mapping[str, dict]) -> dict[str, bool]:
    """Whether the bars of docs/ablation.md are met, as far as the arms that they need are there."""
    met = {}
    if {"baseline", "prior"} <= summary.keys():
        share, missed = summary["prior"]["speed_final"]["iqm"], summary["prior"]["missed"]["to_final"]
        met["the policy prior reaches the baseline's final return in at most two thirds of its steps"] = bool(
            share is not None and share <= MAX_STEPS_SHARE and missed <= len(_values(summary, "prior")) // 2
        )
    if {"baseline", "adversarial"} <= summary.keys():
        low = summary["baseline"]["final"]["low"]
        met["with the adversarial adviser the final return is within the baseline's interval, or above"] = (
            low is not None and summary["adversarial"]["final"]["iqm"] >= low
        )
    updates = [value for each in summary.values() for value in each["updates"]["values"]]
    met["equal number of updates: no two runs differ by more than 1 %"] = bool(
        max(updates) - min(updates) <= 0.01 * max(updates)
    )
    return met


def _values(summary: Mapping[str, dict], arm: str) -> list[float]:
    return summary[arm]["final"]["values"]


COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "final": ("final return", "{:.3f}".format),
    "to_final": ("steps to the baseline's", "{:,.0f}".format),
    "speed_final": ("share of the baseline's steps", "{:.2f}".format),
    "to_nearly": ("steps to 0.9 of it", "{:,.0f}".format),
    "speed_nearly": ("share of the baseline's", "{:.2f}".format),
    "area": ("mean return of the run", "{:.3f}".format),
    "updates": ("updates", "{:,.0f}".format),
}


def table(summary: Mapping[str, dict]) -> list[str]:
    """A Markdown table: a row an arm, each number as interquartile mean (low to high)."""
    titles = [title for title, _ in COLUMNS.values()]
    rows = ["| | seeds | " + " | ".join(titles) + " |", "| --- " * (len(titles) + 2) + "|"]
    for arm, each in summary.items():
        cells = [cell(each.get(name), form) for name, (_, form) in COLUMNS.items()]
        for name in ("to_final", "to_nearly"):
            if each["missed"].get(name):
                cells[list(COLUMNS).index(name)] += f", {each['missed'][name]} never"
        rows.append(f"| {TITLES[arm]} | {len(_values(summary, arm))} | " + " | ".join(cells) + " |")
    return rows


def cell(measure: dict | None, form: Callable[[float], str]) -> str:
    if measure is None or measure["iqm"] is None:
        return "-"
    value, low, high = (measure[key] for key in ("iqm", "low", "high"))
    if low is None or low == high:
        return form(value)
    return f"{form(value)} ({form(low)} to {form(high)})"


# --- The figure ----------------------------------------------------------------------------------------

COLORS = {
    "baseline": "0.4",
    "prior": "tab:blue",
    "synth": "tab:green",
    "options": "tab:orange",
    "full": "tab:purple",
    "adversarial": "tab:red",
    "random": "tab:brown",
    "latents": "tab:cyan",
    "full_adversarial": "tab:pink",
    "alone": "k",
}


def draw(result: dict, out: Path) -> None:
    """Evaluation returns over env steps, and the steps to the baseline's final return."""
    figure, (left, right) = figures.pyplot().subplots(
        1, 2, figsize=(12, 4.5), width_ratios=(3, 2), layout="constrained"
    )
    for arm, seeds in result["runs"].items():
        style = {"color": COLORS[arm], "ls": "--" if "adversarial" in arm or arm == "random" else "-"}
        curves = [run["curves"]["eval"] for run in seeds.values()]
        pairs = [(curve["steps"], curve["values"]) for curve in curves]
        figures.draw_band(left, pairs, label=TITLES[arm], **style)
    left.set(title="evaluation without advice", xlabel="env steps", ylabel="return")
    left.grid(alpha=0.3)
    for place, (arm, each) in enumerate(result["summary"].items()):
        if "to_final" in each:
            measure = each["to_final"]
            right.barh(place, measure["iqm"], 0.6, color=COLORS[arm], alpha=0.5)
            right.plot(measure["values"], [place] * len(measure["values"]), ".", color=COLORS[arm])
    right.set_yticks(range(len(result["summary"])), [TITLES[arm] for arm in result["summary"]], fontsize=8)
    right.invert_yaxis()
    right.set(title="env steps to the baseline's final return")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(out, dpi=80)


# --- The study -----------------------------------------------------------------------------------------


def command(study: str, arm: str, seed: int, logdir: Path, quick: bool) -> list[str]:
    """The words of one run, from `python3` on."""
    words = f"{STUDIES[study].options} {ARMS[arm]} {COMMON} {STUDIES[study].quick if quick else ''}".split()
    return ["python3", "dreamer.py", *words, "--seed", str(seed), "--logdir", str(logdir)]


def run_study(
    name: str,
    out: Path,
    arms: Sequence[str],
    seeds: Sequence[int],
    jobs: int,
    quick: bool,
    more: Sequence[str],
    only_table: bool = False,
) -> dict:
    """Do the runs of a study that are not done yet, and write what came out to {out}/{name}.json, .md, .png.

    `more` are further options of dreamer.py. With `only_table` nothing is run: what has finished is summed
    up. Returns the result, as it stands in the file. Raises UserError.
    """
    places = {(arm, seed): out / name / f"{arm}_{seed}" for seed in seeds for arm in arms}
    commands = {place: [*command(name, *run, place, quick), *more] for run, place in places.items()}
    if only_table:
        commands = {place: words for place, words in commands.items() if runs.finished(place, words)}
        if not commands:
            raise UserError(f"No run of these arms and seeds has finished in {out / name}: leave out --only.")
    measured = runs.do(commands, jobs, lambda logdir: measures(logs.read_metrics(logdir)))
    by_arm: dict[str, dict[int, Measures]] = {}
    for arm in arms:
        seeds_of = {seed: measured[places[arm, seed]] for seed in seeds if places[arm, seed] in measured}
        if seeds_of:
            by_arm[arm] = seeds_of
    summary = summarise(by_arm)
    by_rules = spread([alone(STUDIES[name], seed, quick) for seed in seeds])
    result = {"study": name, "summary": summary, "alone": by_rules, "bars": bars(summary), "runs": by_arm}
    runs.write_json(out / f"{name}.json", result)
    atomic_write(out / f"{name}.md", lambda file: file.write("\n".join(report(result)).encode() + b"\n"))
    draw(result, out / f"{name}.png")
    return result


def report(result: dict) -> list[str]:
    """The table of a result, and which bars are met, as Markdown."""
    told = [f"- {what}: {'met' if met else 'missed'}" for what, met in result["bars"].items()]
    alone = cell(result["alone"], COLUMNS["final"][1])
    row = f"| {TITLES['alone']} | {len(result['alone']['values'])} | {alone} |" + " - |" * (len(COLUMNS) - 1)
    return [*table(result["summary"]), row, "", *told]


# --- The command ---------------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and the options in it that are for dreamer.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("study", choices=STUDIES)
    add("--arms", nargs="+", choices=ARMS, default=REQUIRED, help="default: %(default)s")
    runs.add_options(add, "logdir/ablation", "docs/ablation.md")
    add("--only", choices=["table"], help="start no run, and sum up those that have finished")
    args, more = parser.parse_known_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs} must be at least 1")
    return args, more


def main(argv: list[str] | None = None) -> int:
    args, more = parse(argv)
    out = args.out / "quick" if args.quick else args.out
    seeds = args.seeds or (QUICK_SEEDS if args.quick else STUDIES[args.study].seeds)
    try:
        figures.pyplot()  # that it is missing is to be said before the runs
        result = run_study(
            args.study, out, args.arms, seeds, args.jobs, args.quick, more, args.only == "table"
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    lines = report(result)
    del result["runs"]
    print(json.dumps(result) if args.json else "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
