"""Does transfer from a small world to a larger one help? The runs of docs/transfer.md.

    python3 benchmarks/transfer.py

For each seed an agent is trained on MiniGrid's DoorKey-5x5. Others then start DoorKey-6x6 with parts of it
(`--transfer`), or from scratch. Finished runs are not repeated and interrupted ones are resumed; `--only
table` summarises the finished runs. Other options are passed to dreamer.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import ablation, runs
from benchmarks.runs import Results, Study, Summary
from reports import figures

# --- The protocol: options of dreamer.py ---------------------------------------------------------------

TARGET = "--task minigrid_DoorKey-6x6"
SOURCE = f"{TARGET} --from_checkpoint {{out}}/source_{{seed}}/latest.pt --transfer"
ARMS = {
    "source": "--task minigrid_DoorKey-5x5",
    "scratch": TARGET,
    "model": f"{SOURCE} encoder rssm",
    "all": f"{SOURCE} encoder rssm decoder reward cont actor critic",
}
TITLES = {"scratch": "from scratch", "model": "encoder and RSSM", "all": "all parts"}
COLORS = {"scratch": "0.4", "model": "tab:blue", "all": "tab:orange"}
LEARNED = 0.8  # the return that counts as having learned the task; the best is about 0.96
COLUMNS = {
    "first": ("first evaluation", "{:.3f}"),  # before the first update: only from what was transferred
    "learned": (f"steps to a return of {LEARNED}", "{:,.0f}"),
    "final": ("final return", "{:.3f}"),
    "area": ("mean return of the run", "{:.3f}"),
    "updates": ("updates", "{:,.0f}"),
}


def report(results: Results) -> tuple[Summary, list[str]]:
    """Each number over seeds, `learned` in env steps as `ablation.reached` counts them; and the table."""
    summary: Summary = {}
    never = []
    for arm, seeds in results.items():
        names = ("first", "final", "area", "updates")
        values = {name: [run[name] for run in seeds.values()] for name in names}
        values["learned"], missed = ablation.reached(seeds, LEARNED)
        summary[arm] = {name: runs.spread(numbers) for name, numbers in values.items()} | {"missed": missed}
        if missed and arm in TITLES:
            never.append(f"- {TITLES[arm]}: {missed} of {len(seeds)} never learn the task")
    rows = {TITLES[arm]: each for arm, each in summary.items() if arm in TITLES}
    before = ", ".join(f"{run['final']:.3f}" for run in results.get("source", {}).values())
    return summary, [
        *runs.table(rows, COLUMNS),
        "",
        *never,
        f"- final return in 5x5 before the transfer: {before}",
    ]


def draw(results: Results, summary: Summary, out: Path) -> None:
    """Evaluation returns over env steps."""
    figure, axes = figures.pyplot().subplots(figsize=(8, 4.5), layout="constrained")
    for arm, title in TITLES.items():
        if curves := [run["curves"]["eval"] for run in results.get(arm, {}).values()]:
            label = f"{title}, {len(curves)} seed{'s' if len(curves) > 1 else ''}"
            figures.draw_band(axes, curves, label=label, color=COLORS[arm])
    axes.axhline(LEARNED, color="0.7", lw=0.8, ls=":")
    axes.set(title="DoorKey-6x6 after DoorKey-5x5", xlabel="env steps in 6x6", ylabel="evaluation return")
    axes.set_ylim(-0.02, 1)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(out, dpi=80)


OPTIONS = f"--configs doorkey --precision float32 --steps 40000 {ablation.COMMON}"
STUDIES = {
    "transfer": Study(OPTIONS, ARMS, range(3), ablation.measure, report, draw, first=("source",)),
}


if __name__ == "__main__":
    sys.exit(runs.main(STUDIES, "logdir/transfer", __doc__))
