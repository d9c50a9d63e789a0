"""Does the advice help? The arms of docs/ablation.md over seeds: curves and a table.

    python3 benchmarks/ablation.py doorkey --jobs 2

doorkey  MiniGrid's DoorKey-5x5 as a one-hot vector, with a tiny model: minutes per run
crafter  a Crafter of 32 x 32 cells from pixels, with the `cpu` preset

The adviser is scripted (`--llm.backend rules`), so neither a key nor a network is needed. Finished runs are
not repeated and interrupted ones are resumed; `--only table` summarises the finished runs. Other options are
passed to dreamer.py.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import runs
from benchmarks.runs import Measures, Results, Study, Summary
from reports import figures, logs
from stats import interquartile_mean

# --- The protocol: options of dreamer.py ---------------------------------------------------------------

# Rules answer at once and for free, so they are asked about each new situation.
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
}
COMMON = "--device cpu --threads 1 --eval_videos False --video_pred_log False"
FINAL = 0.25  # share of a run, at its end, over which the final return is a mean
SMOOTHING = 3  # evaluations over which a return is averaged before it counts as reached
REACHED = 0.99  # of the baseline's final return counts as that return: evaluations scatter
NEARLY = 0.9  # of it: the second mark
MAX_STEPS_SHARE = 2 / 3  # the bar: of the baseline's steps


# --- Measures ------------------------------------------------------------------------------------------


def measures(lines: list[dict]) -> Measures:
    """The measures of a run from the lines of its metrics.jsonl.

    Returns are those of evaluations without advice. `final` is their mean in the last quarter, `area` their
    mean over the whole run (each is weighted by the steps to the next). `train` is the mean return of
    training episodes in the last quarter, `first` the first evaluation.
    """
    steps, returns = logs.curve(lines, logs.EVAL)
    last = lines[-1]["step"]
    late = [line for line in lines if line["step"] > (1 - FINAL) * last]
    train = [line[logs.TRAIN] for line in late if logs.TRAIN in line]
    return {
        "first": float(returns[0]),
        "final": float(np.mean([line[logs.EVAL] for line in late if logs.EVAL in line])),
        "area": float(np.trapezoid(returns, steps) / (steps[-1] - steps[0])),
        "train": float(np.mean(train)) if train else None,
        "steps": last,
        "updates": max(line.get("opt/updates", 0) for line in lines),
        "curves": {
            "eval": (steps, returns),
            "advised": logs.curve(lines, "eval_advised/episode_return"),
            "train": logs.curve(lines, logs.TRAIN),
        },
    }


def reached(seeds: Mapping[int, Measures], mark: float) -> tuple[list[float], int]:
    """For each seed the env steps to an evaluation return of `mark`, and how many never reach it.

    A run that never reaches it counts with all its steps.
    """
    steps = [runs.steps_to(run["curves"]["eval"], mark, SMOOTHING) for run in seeds.values()]
    each = zip(seeds.values(), steps, strict=True)
    return [run["steps"] if step is None else step for run, step in each], steps.count(None)


# --- Summaries -----------------------------------------------------------------------------------------


def summarise(results: Results) -> dict[str, Summary]:
    """Interquartile mean and interval over seeds of each number: arm -> measure -> value, low, high, values.

    `to_final` and `to_nearly` are the steps to the baseline's final return (the interquartile mean over its
    seeds), and to 0.9 of it; `missed` counts the runs that never reach them. `speed_final`, `speed_nearly`
    and `gain` are the arm's steps and its mean return over the run (`area`), divided by the baseline's.
    """
    summary: dict[str, Summary] = {}
    base = results.get("baseline", {})
    for arm, seeds in results.items():
        values = {
            name: [run[name] for run in seeds.values()] for name in ("final", "area", "train", "updates")
        }
        missed = {}
        if base:
            goal = interquartile_mean([run["final"] for run in base.values()])
            values["to_final"], missed["to_final"] = reached(seeds, REACHED * goal)
            values["to_nearly"], missed["to_nearly"] = reached(seeds, NEARLY * goal)
        summary[arm] = {name: runs.spread(each) for name, each in values.items() if None not in each}
        summary[arm]["missed"] = missed
    for each in summary.values() if base else ():
        for name, of in (("speed_final", "to_final"), ("speed_nearly", "to_nearly"), ("gain", "area")):
            each[name] = runs.ratio(each[of]["values"], summary["baseline"][of]["values"])
    return summary


def bars(summary: Mapping[str, Summary]) -> dict[str, bool]:
    """Whether the bars of docs/ablation.md are met, as far as their arms are there."""
    met = {}
    if {"baseline", "prior"} <= summary.keys():
        prior = summary["prior"]
        share, missed = prior["speed_final"]["value"], prior["missed"]["to_final"]
        met["the policy prior reaches the baseline's final return in at most two thirds of its steps"] = bool(
            share is not None and share <= MAX_STEPS_SHARE and missed <= len(prior["final"]["values"]) // 2
        )
    if {"baseline", "adversarial"} <= summary.keys():
        low = summary["baseline"]["final"]["low"]
        met["with the adversarial adviser the final return is within the baseline's interval, or above"] = (
            low is not None and summary["adversarial"]["final"]["value"] >= low
        )
    updates = [value for each in summary.values() for value in each["updates"]["values"]]
    met["equal number of updates: no two runs differ by more than 1 %"] = bool(
        max(updates) - min(updates) <= 0.01 * max(updates)
    )
    return met


COLUMNS = {
    "final": ("final return", "{:.3f}"),
    "to_final": ("steps to the baseline's", "{:,.0f}"),
    "speed_final": ("share of the baseline's steps", "{:.2f}"),
    "to_nearly": ("steps to 0.9 of it", "{:,.0f}"),
    "speed_nearly": ("share of the baseline's", "{:.2f}"),
    "area": ("mean return of the run", "{:.3f}"),
    "updates": ("updates", "{:,.0f}"),
}


def report(results: Results) -> tuple[Summary, list[str]]:
    """The summary, and the table and the bars as Markdown."""
    summary = summarise(results)
    titles = {arm: f"{TITLES[arm]}, {len(results[arm])} seeds" for arm in summary}
    lines = runs.table({titles[arm]: each for arm, each in summary.items()}, COLUMNS)
    never = [
        f"- {TITLES[arm]}: {each['missed']['to_final']} never reach the baseline's final return"
        for arm, each in summary.items()
        if each["missed"].get("to_final")
    ]
    met = bars(summary)
    lines += ["", *never, *(f"- {what}: {'met' if each else 'missed'}" for what, each in met.items())]
    return {"arms": summary, "bars": met}, lines


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
}


def draw(results: Results, summary: Summary, out: Path) -> None:
    """Evaluation returns over env steps, and the steps to the baseline's final return."""
    figure, (left, right) = figures.pyplot().subplots(
        1, 2, figsize=(12, 4.5), width_ratios=(3, 2), layout="constrained"
    )
    for arm, seeds in results.items():
        style = {"color": COLORS[arm], "ls": "--" if "adversarial" in arm or arm == "random" else "-"}
        figures.draw_band(left, [run["curves"]["eval"] for run in seeds.values()], label=TITLES[arm], **style)
    left.set(title="evaluation without advice", xlabel="env steps", ylabel="return")
    left.grid(alpha=0.3)
    for place, (arm, each) in enumerate(summary["arms"].items()):
        if "to_final" in each:
            measure = each["to_final"]
            right.barh(place, measure["value"], 0.6, color=COLORS[arm], alpha=0.5)
            right.plot(measure["values"], [place] * len(measure["values"]), ".", color=COLORS[arm])
    right.set_yticks(range(len(results)), [TITLES[arm] for arm in results], fontsize=8)
    right.invert_yaxis()
    right.set(title="env steps to the baseline's final return")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(out, dpi=80)


# --- The studies ---------------------------------------------------------------------------------------


def measure(logdir: Path, quick: bool) -> Measures:
    return measures(logs.read_metrics(logdir))


def study(options: str, seeds: range, quick: str = "") -> Study:
    return Study(
        f"{options} {COMMON}", ARMS, seeds, measure, report, draw, f"{runs.QUICK} {quick}", default=REQUIRED
    )


STUDIES = {
    "doorkey": study("--configs doorkey --precision float32", range(3)),
    "crafter": study(
        "--configs crafter cpu --crafter.area 32 32 --precision bfloat16 --steps 30000 --prefill 2500 "
        "--train_ratio 32 --envs.amount 4 --envs.eval_amount 5 --eval_every 2500 --eval_episodes 10 "
        "--log_every 500",
        range(2),
        "--envs.amount 1 --rssm.deter 32 --rssm.hidden 16 --encoder.cnn_depth 2 --decoder.cnn_depth 2",
    ),
}


if __name__ == "__main__":
    sys.exit(runs.main(STUDIES, "logdir/ablation", __doc__))
