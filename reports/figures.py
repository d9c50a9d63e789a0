"""Figures of runs over their seeds: chooses the panels and draws them."""

import functools
import io
import itertools
import math
import textwrap
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from ruamel.yaml import YAML

from basics import UserError, atomic_write
from reports.logs import EVAL, TRAIN, Group, band, printable, short, spread
from stats import bootstrap_interval

PUBLISHED = YAML(typ="safe").load(Path(__file__).with_name("published.yaml"))
ADVISED = "eval_advised/episode_return"
SMOOTHING = 5  # log lines over which a training curve is averaged
COLUMNS = 3  # panels in a row
WIDTH, HEIGHT = 4.2, 3.1  # of a panel in inches
# Okabe and Ito's colours for colour-blind readers, without the pale yellow.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
DASHES = ("-", "--", ":", "-.")  # change when the colours repeat
MARKERS = ("o", "s", "D")  # of published rates
JAPANESE = ("Noto Sans CJK JP", "Hiragino Sans", "Yu Gothic", "Meiryo", "IPAexGothic")  # fonts
GREY = "#808080"
RC = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.35,
    "legend.frameon": False,
    "savefig.dpi": 110,
    "svg.fonttype": "none",  # keep text as text
    "svg.hashsalt": "lore",  # reproducible files
    "text.parse_math": False,  # names may contain $
}


class Curves(NamedTuple):
    """A panel of metrics over env steps; the second metric is dashed."""

    title: str
    label: str  # of the y axis, with the unit
    metrics: Sequence[str]


RETURNS = (
    Curves("training", "return of an episode", [TRAIN]),
    Curves("evaluation", "return of an episode", [EVAL]),
)
EXPLORATION = (
    Curves("intrinsic reward", "per step, before scaling", ["expl/reward_mean"]),
    Curves("prediction error (dashed: expected)", "error", ["expl/error", "expl/error_pred"]),
    Curves("noisy TV on, training", "share of the steps", ["env/tv_share"]),
    Curves("noisy TV on, evaluation", "share of the steps", ["eval/tv_share"]),
)
ADVICE = (
    Curves("evaluation (dashed: with the advice)", "return of an episode", [EVAL, ADVISED]),
    Curves("weight of the advice (beta)", "weight of the prior's logits", ["uncertainty_gate/beta"]),
    Curves("reliability of the advice", "probability that it helps", ["uncertainty_gate/reliability"]),
    Curves("steps with advice", "share of the replayed steps", ["uncertainty_gate/advised_share"]),
    Curves("plans: used", "share of imagination's starts", ["synthetic/ratio"]),
    Curves("plans: accepted", "share of the evaluated plans", ["synthetic/accepted"]),
    Curves("skills: used", "share of the env steps", ["options/used_share"]),
    Curves("skills: success", "share of the executions", ["options/avg_success_rate"]),
)


# Drawing


def pyplot() -> ModuleType:
    """matplotlib.pyplot without a display. Raises UserError if matplotlib is missing."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise UserError("Figures need matplotlib: pip install -r requirements/plot.txt") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def look() -> AbstractContextManager:
    """A context with the style of the figures."""
    context = pyplot().rc_context
    from matplotlib.font_manager import fontManager

    known = {font.name for font in fontManager.ttflist}
    fonts = ["DejaVu Sans", *(name for name in JAPANESE if name in known)]
    return context(RC | {"font.family": fonts})


def style(index: int) -> dict[str, str]:
    """Colour and dashes of group number `index`."""
    return {"color": COLORS[index % len(COLORS)], "ls": DASHES[index // len(COLORS) % len(DASHES)]}


def draw_band(axis: Any, curves: Sequence[tuple[Sequence, Sequence]], **style: Any) -> None:
    """Draw the interquartile mean of curves (steps, values) with its interval as a shade.

    The mean ends where the shortest curve ends; the rest of the others is drawn as thin lines.
    """
    steps, iqm, low, high = band(curves)
    marker = {"marker": ".", "ms": 6 if len(steps) < 3 else 3} if len(steps) < 2 * SMOOTHING else {}
    axis.plot(steps, iqm, lw=1.8, **marker, **style)
    if len(curves) > 1:
        axis.fill_between(steps, low, high, color=style["color"], alpha=0.2, lw=0)
        for own_steps, values in curves:
            last = np.abs(np.asarray(own_steps) - steps[-1]).argmin() if len(steps) else 0
            axis.plot(own_steps[last:], values[last:], lw=0.7, alpha=0.7, color=style["color"])


class Panel(NamedTuple):
    """One plot: its title, and the function that draws it on a matplotlib axis."""

    title: str
    draw: Callable[[Any], None]
    height: float = HEIGHT


def sections(groups: Sequence[Group], metrics: Sequence[str] = ()) -> dict[str, list[Panel]]:
    """The panels for groups of one task, by subject; panels without data are left out.

    `metrics` are names of further metrics to draw.
    """
    found = {
        "Returns": [*_curves(groups, RETURNS), *_final_panel(groups)],
        "Achievements": _achievement_panels(groups),
        "Exploration": _curves(groups, EXPLORATION),
        "Advice": [],
        "Metrics": _curves(groups, [Curves(printable(name), "", [name]) for name in metrics]),
    }
    if any(_curves(groups, ADVICE[1:])):
        found["Advice"] = _curves(groups, ADVICE)
    return {title: panels for title, panels in found.items() if panels}


def _curves(groups: Sequence[Group], wanted: Sequence[Curves]) -> list[Panel]:
    """The panels for which at least one group has data."""
    panels = []
    for title, label, metrics in wanted:
        width = SMOOTHING if metrics[0].startswith("env/") else 1
        lines = [
            (curves, style(index) | ({"ls": "--"} if second else {}))
            for index, group in enumerate(groups)
            for second, name in enumerate(metrics)
            if (curves := group.curves(name, width))
        ]
        if lines:
            if width > 1:
                title = f"{title} (means of {width} log lines)"
            panels.append(Panel(title, functools.partial(_draw_curves, lines=lines, label=label)))
    return panels


def _draw_curves(axis: Any, lines: Sequence[tuple[list, dict]], label: str) -> None:
    for curves, look in lines:
        draw_band(axis, curves, **look)
    axis.set(xlabel="env steps", ylabel=label)
    axis.xaxis.set_major_formatter(lambda steps, _: short(steps))
    axis.locator_params(axis="x", nbins=5)


def _final_panel(groups: Sequence[Group]) -> list[Panel]:
    """Final evaluation returns, or training returns if there are none."""
    for name, kind in ((EVAL, "evaluations"), (TRAIN, "training")):
        values = [group.values(name) for group in groups]
        if any(values):
            draw = functools.partial(_draw_final, groups=groups, values=values)
            height = max(HEIGHT, 0.55 * len(groups) + 0.8)
            return [Panel(f"last quarter of the {kind} (circles: seeds)", draw, height)]
    return []


def _draw_final(axis: Any, groups: Sequence[Group], values: Sequence[Sequence[float]]) -> None:
    for place, each in enumerate(values):
        if each:
            iqm, low, high = spread(each)
            color = COLORS[place % len(COLORS)]
            axis.plot([low, high], [place, place], color=color, lw=6, alpha=0.35, solid_capstyle="butt")
            axis.plot(each, [place] * len(each), "o", ms=3.5, mfc="none", color=color)
            axis.plot(iqm, place, "|", ms=14, mew=2.5, color=color)
    labels = [textwrap.fill(group.label, 24, break_long_words=False) for group in groups]
    budgets = [f"{short(group.steps)} steps" for group in groups]
    names = ["\n".join(lines) for lines in zip(labels, budgets, strict=True)]
    axis.set_yticks(range(len(groups)), names, fontsize=8)
    axis.set(ylim=(len(groups) - 0.5, -0.5), xlabel="return of an episode")
    axis.grid(axis="y", visible=False)


# Achievements


def is_benchmark(group: Group) -> bool:
    """Whether a group's runs use the same Crafter world as the published results."""
    config = group.runs[0].config
    if config is None or config.task not in ("crafter_reward", "crafter_noreward"):
        return False
    return list(config.crafter.area) == [64, 64] and not config.noisy_tv.enabled


def _achievement_panels(groups: Sequence[Group]) -> list[Panel]:
    """Final success rates and unlocked achievements; for Crafter also the published results."""
    rates = [[run.rates for run in group.runs if run.rates] for group in groups]
    names = {name for runs in rates for run in runs for name in run}
    if not names:
        return []
    published = PUBLISHED["rates"] if any(map(is_benchmark, groups)) else {}
    ease = [each for runs in rates for each in runs], [*published.values()]
    order = sorted(names, key=lambda n: (*(-sum(each.get(n, 0) for each in known) for known in ease), n))
    height = len(order) * (0.09 * len(groups) + 0.1) + 1.1
    draw = functools.partial(_draw_rates, rates=rates, names=order)
    panels = [Panel(f"success rates after {_budget(groups)} env steps", draw, height)]
    if published:
        title = f"published, after {PUBLISHED['rates_budget']} env steps"
        panels.append(Panel(title, functools.partial(_draw_published, names=order), height))
        scores = [group.scores if is_benchmark(group) else [] for group in groups]
        if any(scores):
            title = "Crafter score (after env steps)"
            panels.append(Panel(title, functools.partial(_draw_scores, groups=groups, scores=scores), height))
    lines = [(curves, style(i)) for i, group in enumerate(groups) if (curves := group.unlocked())]
    draw = functools.partial(_draw_curves, lines=lines, label=f"achievements, of {len(names)}")
    return [*panels, Panel("achievements unlocked so far", draw)]


def _budget(groups: Sequence[Group]) -> str:
    """The env steps of the shortest and the longest run."""
    steps = [run.steps for group in groups for run in group.runs]
    return " to ".join(dict.fromkeys((short(min(steps)), short(max(steps)))))


def _draw_rates(axis: Any, rates: Sequence[Sequence[dict[str, float]]], names: Sequence[str]) -> None:
    """Means over the seeds of each group, as in the published protocol, with intervals."""
    thick = 0.84 / len(rates)
    for index, runs in enumerate(rates):
        if runs:
            places = np.arange(len(names)) + (index + 0.5) * thick - 0.42
            values = np.array([[run.get(name, 0.0) for name in names] for run in runs])  # [runs, names]
            axis.barh(places, values.mean(0), thick, color=COLORS[index % len(COLORS)])
            axis.hlines(places, *bootstrap_interval(values), color=GREY, lw=1)
    _rate_axis(axis, names)


def _draw_published(axis: Any, names: Sequence[str]) -> None:
    for (label, each), marker in zip(PUBLISHED["rates"].items(), MARKERS, strict=True):
        values = [each.get(name, 0.0) for name in names]
        axis.plot(values, range(len(names)), marker, ms=5, mfc="none", mec=GREY, label=label, clip_on=False)
    _rate_axis(axis, names)
    axis.legend(loc="lower right")


def _rate_axis(axis: Any, names: Sequence[str]) -> None:
    ticks = [0, 1, 3, 10, 30, 100]
    # The scale on which the score averages: it shows rare achievements.
    axis.set_xscale("function", functions=(np.log1p, np.expm1))
    axis.set_xticks(ticks, ticks)
    axis.set_yticks(range(len(names)), [printable(name.replace("_", " ")) for name in names], fontsize=8)
    axis.set(xlim=(0, 100), ylim=(len(names) - 0.5, -0.5), xlabel="percent of all training episodes")
    axis.grid(axis="y", visible=False)


def _draw_scores(axis: Any, groups: Sequence[Group], scores: Sequence[Sequence[float]]) -> None:
    """Scores of these runs above a line, published scores below it, each with its budget."""
    rows = [
        (textwrap.fill(f"{group.label}, {short(group.steps)}", 30), np.mean(each), color)
        for group, each, color in zip(groups, scores, itertools.cycle(COLORS), strict=False)
        if each
    ]
    axis.axhline(len(rows) - 0.5, color=GREY, lw=0.8)
    for row in PUBLISHED["results"]:
        rows.append((f"{row['name']}, {row['budget']}", float(row["score"].split()[0]), GREY))
    for place, (_, score, color) in enumerate(rows):
        axis.barh(place, score, 0.7, color=color, alpha=0.6 if color == GREY else 1)
        axis.text(score, place, f" {score:.1f}", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [name for name, *_ in rows], fontsize=8)
    axis.set(xlim=(0, 60), ylim=(len(rows) - 0.5, -0.5), xlabel="score in percent (grey: published)")
    axis.grid(axis="y", visible=False)


# Files


def by_task(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """The groups of each task: returns of different tasks are not comparable."""
    return {task: [g for g in groups if g.task == task] for task in dict.fromkeys(g.task for g in groups)}


def figure(groups: Sequence[Group], metrics: Sequence[str] = ()) -> Any:
    """A matplotlib figure of all panels, with a block of rows for each task and subject."""
    rows: list[tuple[str, list[Panel], list[Group]]] = []
    for task, alike in by_task(groups).items():
        for subject, panels in sections(alike, metrics).items():
            for begin in range(0, len(panels), COLUMNS):
                title = f"{printable(task)}: {subject.lower()}" if not begin else ""
                rows.append((title, panels[begin : begin + COLUMNS], alike))
    if not rows:
        raise UserError("These runs have not logged anything that can be drawn yet.")
    columns = max(len(panels) for _, panels, _ in rows)
    longest = max(len(group.legend) for group in groups)
    legend_columns = max(1, min(columns, int(WIDTH * columns / (0.5 + 0.07 * longest))))
    heights = [
        max(panel.height for panel in panels)
        + (0.4 + 0.18 * math.ceil(len(alike) / legend_columns)) * bool(title)
        for title, panels, alike in rows
    ]
    whole = pyplot().figure(figsize=(WIDTH * columns, sum(heights)), layout="constrained")
    parts = whole.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (title, panels, alike) in zip(parts, rows, strict=True):
        axes = part.subplots(1, columns, squeeze=False)[0]
        for axis, panel in itertools.zip_longest(axes, panels):
            if panel is None:
                axis.set_axis_off()
                continue
            panel.draw(axis)
            axis.set_title(panel.title)
        if title:
            part.legend(
                [pyplot().Line2D([], [], lw=2, **style(index)) for index in range(len(alike))],
                [group.legend for group in alike], loc="outside upper left", ncols=legend_columns,
                title=title, title_fontproperties={"size": 12, "weight": "bold"}, alignment="left",
            )  # fmt: skip
    return whole


def rendered(picture: Any, kind: str, **options: Any) -> bytes:
    """The figure as bytes of a file type such as png; closes the figure."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # shown as a box
        picture.savefig(buffer, format=kind, **options)
    pyplot().close(picture)
    return buffer.getvalue()


def save(picture: Any, out: Path) -> None:
    """Write a figure to a file atomically and close it. Raises UserError."""
    try:
        content = rendered(picture, out.suffix[1:])
    except ValueError as error:
        raise UserError(f"Cannot write {out}: {error}; end --out in .png or .svg") from error
    atomic_write(out, lambda file: file.write(content))
