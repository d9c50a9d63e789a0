"""Does what was learned in a small world help in a larger one? The runs of docs/transfer.md.

    python3 benchmarks/transfer.py

An agent is trained on MiniGrid's DoorKey-5x5 for each seed; then others begin DoorKey-6x6 with parts of it
(`--transfer`), or from scratch. A run is one command of dreamer.py, which is shown as it starts, and has a
folder in --out. A run that has finished is not done again, and one that was interrupted goes on; `--only
table` sums up what has finished and starts nothing. OUT/transfer.json holds the result, OUT/transfer.md the
table and OUT/transfer.png the figure.
"""

import argparse
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # first: benchmarks/ has an exploration.py, too

import ablation
import runs
from ablation import cell, spread
from runs import Measures

from basics import UserError, atomic_write
from reports import figures, logs

# --- The protocol: options of dreamer.py ---------------------------------------------------------------

STUDY = "--configs doorkey --precision float32 --steps 40000"
SOURCE = "--task minigrid_DoorKey-5x5"
TARGET = "--task minigrid_DoorKey-6x6"
ARMS = {
    "scratch": (),
    "model": ("encoder", "rssm"),
    "all": ("encoder", "rssm", "decoder", "reward", "cont", "actor", "critic"),
}
TITLES = {"scratch": "from scratch", "model": "encoder and RSSM", "all": "all parts"}
COLORS = {"scratch": "0.4", "model": "tab:blue", "all": "tab:orange"}
SEEDS = range(3)
QUICK_SEEDS = (100,)
LEARNED = 0.8  # the return that counts as having learned the task; at best it is about 0.96


# --- Measures ------------------------------------------------------------------------------------------


def measures(lines: list[dict]) -> Measures:
    """What is measured of a run: that of ablation.py, and `first`, its first evaluation.

    Nothing has been learned by then but what was transferred: it comes before the first update.
    """
    _, returns = logs.curve(lines, "eval/episode_return")
    return {**ablation.measures(lines), "first": float(returns[0])}


def summarise(by_arm: Mapping[str, Mapping[int, Measures]]) -> dict[str, dict]:
    """Interquartile mean and interval over seeds of each number: arm -> measure -> iqm, low, high, values.

    `learned` are the env steps until the mean of three evaluations is at least `LEARNED`; a run that never
    gets there counts with all its steps, and `missed` says how many did not.
    """
    summary: dict[str, dict] = {}
    for arm, seeds in by_arm.items():
        each = list(seeds.values())
        reached = [ablation.steps_to(run, LEARNED) for run in each]
        values = {name: [run[name] for run in each] for name in ("first", "final", "area", "updates")}
        values["learned"] = [
            run["steps"] if step is None else step for run, step in zip(each, reached, strict=True)
        ]
        summary[arm] = {name: spread(numbers) for name, numbers in values.items()}
        summary[arm]["missed"] = sum(step is None for step in reached)
    return summary


COLUMNS = {
    "first": ("first evaluation", "{:.3f}".format),
    "learned": (f"steps to a return of {LEARNED}", "{:,.0f}".format),
    "final": ("final return", "{:.3f}".format),
    "area": ("mean return of the run", "{:.3f}".format),
    "updates": ("updates", "{:,.0f}".format),
}


def table(summary: Mapping[str, dict]) -> list[str]:
    """A Markdown table: a row an arm, each number as interquartile mean (low to high)."""
    titles = [title for title, _ in COLUMNS.values()]
    rows = ["| transferred | seeds | " + " | ".join(titles) + " |", "| --- " * (len(titles) + 2) + "|"]
    for arm, each in summary.items():
        cells = [cell(each[name], form) for name, (_, form) in COLUMNS.items()]
        if each["missed"]:
            cells[list(COLUMNS).index("learned")] += f", {each['missed']} never"
        rows.append(f"| {TITLES[arm]} | {len(each['first']['values'])} | {' | '.join(cells)} |")
    return rows


def draw(result: dict, out: Path) -> None:
    """Evaluation returns over env steps."""
    figure, axes = figures.pyplot().subplots(figsize=(8, 4.5), layout="constrained")
    for arm, seeds in result["runs"].items():
        curves = [run["curves"]["eval"] for run in seeds.values()]
        label = f"{TITLES[arm]}, {len(curves)} seed{'s' if len(curves) > 1 else ''}"
        pairs = [(curve["steps"], curve["values"]) for curve in curves]
        figures.draw_band(axes, pairs, label=label, color=COLORS[arm])
    axes.axhline(LEARNED, color="0.7", lw=0.8, ls=":")
    axes.set(title="DoorKey-6x6 after DoorKey-5x5", xlabel="env steps in 6x6", ylabel="evaluation return")
    axes.set_ylim(-0.02, 1)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(out, dpi=80)


# --- The study -----------------------------------------------------------------------------------------


def commands(
    out: Path, arms: Sequence[str], seeds: Sequence[int], quick: bool
) -> tuple[dict[Path, list[str]], dict[Path, list[str]]]:
    """The words of the runs that train what is transferred, and of those that take it, by their folders."""
    every = [*STUDY.split(), *ablation.COMMON.split(), *(ablation.QUICK.split() if quick else [])]

    def words(place: Path, seed: int, *options: str) -> list[str]:
        return ["python3", "dreamer.py", *every, *options, "--seed", str(seed), "--logdir", str(place)]

    sources, targets = {}, {}
    for seed in seeds:
        source = out / f"source_{seed}"
        if any(ARMS[arm] for arm in arms):
            sources[source] = words(source, seed, *SOURCE.split())
        for arm in arms:
            origin = ["--from_checkpoint", str(source / "latest.pt"), "--transfer", *ARMS[arm]]
            place = out / f"{arm}_{seed}"
            targets[place] = words(place, seed, *TARGET.split(), *(origin if ARMS[arm] else []))
    return sources, targets


def run_study(
    out: Path, arms: Sequence[str], seeds: Sequence[int], jobs: int, quick: bool, only_table: bool = False
) -> dict:
    """Do the runs that are not done yet, and write what came out to {out}/transfer.json, .md and .png.

    With `only_table` nothing is run: what has finished is summed up. Returns the result, as it stands in the
    file. Raises UserError.
    """
    sources, targets = commands(out, arms, seeds, quick)
    if only_table:
        sources, targets = (
            {place: words for place, words in each.items() if runs.finished(place, words)}
            for each in (sources, targets)
        )
        if not targets:
            raise UserError(f"No run of these arms and seeds has finished in {out}: leave out --only.")
    found = {
        place: measure
        for each in (sources, targets)
        for place, measure in runs.do(each, jobs, lambda logdir: measures(logs.read_metrics(logdir))).items()
    }
    by_arm = {
        arm: {seed: found[out / f"{arm}_{seed}"] for seed in seeds if out / f"{arm}_{seed}" in found}
        for arm in arms
    }
    by_arm = {arm: each for arm, each in by_arm.items() if each}
    learned = {place.name: found[place]["final"] for place in sources}
    result = {"summary": summarise(by_arm), "sources": learned, "runs": by_arm}
    runs.write_json(out / "transfer.json", result)
    text = "\n".join(report(result)) + "\n"
    atomic_write(out / "transfer.md", lambda file: file.write(text.encode()))
    draw(result, out / "transfer.png")
    return result


def report(result: dict) -> list[str]:
    """The table of a result as Markdown, and what the agents that were transferred from had learned."""
    told = ", ".join(f"{name} {value:.3f}" for name, value in result["sources"].items())
    return [*table(result["summary"]), "", f"Final return in 5x5 of what was transferred from: {told}"]


# --- The command ---------------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: %(default)s")
    runs.add_options(add, "logdir/transfer", "docs/transfer.md")
    add("--only", choices=["table"], help="start no run, and sum up those that have finished")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs} must be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    out = args.out / "quick" if args.quick else args.out
    seeds = args.seeds or (QUICK_SEEDS if args.quick else SEEDS)
    try:
        figures.pyplot()  # that it is missing is to be said before the runs
        result = run_study(out, args.arms, seeds, args.jobs, args.quick, args.only == "table")
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
