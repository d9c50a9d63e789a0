"""Draw the curves of one or more runs: python3 plot.py ./logdir/crafter --out crafter.png

One line a run: training and evaluation returns, and where the env has achievements, their success rates at
the end. Needs matplotlib (pip install -r requirements/plot.txt). The ending of --out decides on PNG or SVG.
"""

import argparse
import json
import sys
from pathlib import Path
from types import ModuleType

from basics import UserError

CURVES = {"env/episode_return": "training return", "eval/episode_return": "evaluation return"}
RATES = "/success_rate/"
SMOOTHING = 5  # log lines that a training curve is averaged over


def read_metrics(logdir: Path) -> list[dict]:
    """The lines of metrics.jsonl. Raises UserError where there are none."""
    path = logdir / "metrics.jsonl"
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}. Give the logdir of a run.") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} holds a line that is not JSON: {error}.") from error


def curve(lines: list[dict], name: str, width: int = 1) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, each value the mean of the last `width`."""
    steps = [line["step"] for line in lines if name in line]
    values = [line[name] for line in lines if name in line]
    recent = [values[max(0, end - width) : end] for end in range(1, len(values) + 1)]
    return steps, [sum(window) / len(window) for window in recent]


def pyplot() -> ModuleType:
    """matplotlib.pyplot for figures in files. Raises UserError where matplotlib is missing."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise UserError("Figures need matplotlib: pip install -r requirements/plot.txt") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(logdirs: list[Path], out: Path) -> None:
    """Write the figure of all runs to `out`."""
    plt = pyplot()
    runs = {logdir.name: read_metrics(logdir) for logdir in logdirs}
    rates = sorted({key for lines in runs.values() for line in lines for key in line if RATES in key})
    columns = len(CURVES) + bool(rates)
    figure, axes = plt.subplots(1, columns, figsize=(5 * columns, 4), layout="constrained", squeeze=False)
    for axis, (name, title) in zip(axes[0], CURVES.items(), strict=False):
        for run, lines in runs.items():
            axis.plot(*curve(lines, name, SMOOTHING if name.startswith("env/") else 1), ".-", label=run)
        axis.set(title=title, xlabel="env steps")
        axis.grid(alpha=0.3)
        axis.legend()
    if rates:
        height = 0.8 / len(runs)
        for index, (run, lines) in enumerate(runs.items()):
            values = [lines[-1].get(key, 0.0) for key in rates]
            axes[0][-1].barh([y + index * height for y in range(len(rates))], values, height, label=run)
        axes[0][-1].set_yticks(range(len(rates)), [key.partition(RATES)[2] for key in rates], fontsize=7)
        axes[0][-1].set(title="success rate", xlabel="percent of all training episodes")
        axes[0][-1].invert_yaxis()
        axes[0][-1].legend()
    try:
        figure.savefig(out, dpi=100)
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot write {out}: {error}") from error
    plt.close(figure)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("logdirs", nargs="+", type=Path, metavar="LOGDIR")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="default: curves.png")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        draw(args.logdirs, args.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
