"""What do the explorers do? Four studies; docs/exploration.md says what they ask and what came out.

    python3 benchmarks/exploration.py room --jobs 2

digits    the paper's noisy digits: the formulas of LPM alone, without an agent
room      a flat with a television that shows noise, or always the same picture, and no reward
pendulum  Pendulum from pixels, with a noisy television and without: LPM against greedy
crafter   Crafter without its rewards: which achievements does curiosity unlock?

A run is one command of dreamer.py, which is shown as it starts, and has a folder in --out. A run that has
finished is not done again, and one that was interrupted goes on. OUT/STUDY.json holds the result, with means
over seeds and their 95 % bootstrap intervals, and OUT/STUDY.png the figure. Options that are not listed here
go to dreamer.py.
"""

import argparse
import json
import math
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # first: it has an exploration.py, too

import runs
from runs import Measures

from basics import UserError
from config import Config
from envs import tv_room
from episodes import list_episodes
from reports import figures, logs
from stats import bootstrap_interval, ratio_interval

# --- The protocol: options of dreamer.py ---------------------------------------------------------------

EXPLORERS = {
    "random": "--expl_behavior random --train_ratio 0",  # what it learned would change none of its actions
    "surprise": "--expl_behavior surprise",
    "plan2explore": "--expl_behavior plan2explore",
    "lpm": "--expl_behavior lpm",
}
ROOM = (
    "--device cpu --precision float32 --threads 1 --steps 4000 --prefill 200 --train_ratio 64 --eval_every 0 "
    "--log_every 100 --save_every 1000 --replay.capacity 10000 --expl_extr_scale 0 "
    # A tiny model, and short sequences: the agent's cell is all that there is to know.
    "--batch_size 32 --batch_length 8 --imag_last 2 --imag_horizon 8 "
    "--rssm.deter 128 --rssm.hidden 64 --rssm.stoch 8 --rssm.classes 8 --rssm.blocks 4 "
    "--encoder.mlp_layers 1 --encoder.mlp_units 64 --decoder.mlp_layers 1 --decoder.mlp_units 64 "
    "--reward_head.units 64 --cont_head.units 64 "
    "--actor.layers 2 --actor.units 64 --critic.layers 2 --critic.units 64 "
    # Only 1 of 101 numbers tells the cell: with less weight it is not worth the nats that it costs.
    "--loss_scales.vector 100 --rssm.free_nats 0.1 "
    "--opt.lr 1e-3 --model_lr 3e-3 --opt.warmup 50 --actor.entropy 3e-2"
)
TELEVISION = {"noise": "--task tvroom_noise", "still": "--task tvroom_still"}
PENDULUM = (
    "--configs lpm_noisytv cpu --device cpu --precision bfloat16 --threads 1 --steps 10000 "
    "--train_ratio 128 --prefill 1000 --eval_every 2000 --eval_episodes 5 --log_every 400 "
    "--save_every 2000 --video_pred_log False "
    # Smaller than the cpu preset in what costs most time.
    "--size 32 32 --encoder.cnn_mults 2 3 4 "
    "--rssm.deter 256 --batch_size 16 --batch_length 16 --imag_last 8 "
    "--opt.lr 1e-3 --model_lr 1e-3 --actor_lr 3e-4"
)
CRAFTER = (
    "--configs crafter cpu --device cpu --precision bfloat16 --threads 1 --steps 20000 --prefill 1000 "
    "--train_ratio 32 --eval_every 0 --log_every 500 --save_every 2000 --expl_extr_scale 0"
)
# Nothing is learned in these seconds; only that all of it runs is tested.
QUICK = (
    "--steps 200 --prefill 100 --log_every 50 --time_limit 50 --batch_size 4 --batch_length 8 "
    "--imag_horizon 3 --train_ratio 8 --rssm.deter 32 --rssm.hidden 16 --rssm.stoch 4 --rssm.classes 4 "
    "--encoder.cnn_depth 2 --decoder.cnn_depth 2"
)
QUICK_SEEDS = (100,)
DIGITS_SEEDS, DIGITS_UPDATES, DIGITS_QUICK_UPDATES = range(10), 600, 60


class Study(NamedTuple):
    """Runs of dreamer.py, and what is made of them."""

    options: str  # of all runs
    conditions: Mapping[str, str]  # name -> further options
    quick: str  # further options for --quick
    seeds: Sequence[int]
    measure: Callable[[Path], Measures]  # of the folder of a run that has finished
    columns: Mapping[str, str]  # measure -> its title in the table
    draw: Callable[[dict, Path], None]
    bars: Callable[[dict], dict[str, list]]  # what was to be shown -> percent, and its interval's ends


# --- Measures ------------------------------------------------------------------------------------------


def measure_room(logdir: Path) -> Measures:
    config = logdir / "config.yaml"
    prefill = Config.from_yaml(config.read_text(encoding="utf-8"), str(config)).prefill
    positions = []
    for file in list_episodes(logdir / "train_eps"):
        with np.load(file.path, allow_pickle=False) as episode:
            positions.append(episode["position"])
    return room_measures(positions, int(prefill))


def room_measures(positions: Sequence[np.ndarray], prefill: int) -> Measures:
    """How often the television was watched, in percent of the steps, and how many cells were visited.

    Args:
        positions: the key `position` of each episode of a run, one-hot [L, CELLS]; the reset is no step.
        prefill: steps at the start whose actions were random.
    """
    cells = np.concatenate([episode[1:].argmax(-1) for episode in positions])  # [steps]
    new = np.unique([tv_room.START, *cells], return_index=True)[1]  # the steps in which a cell is new
    visited = np.searchsorted(np.sort(new), np.arange(1, len(cells) + 1), side="right")  # [steps]
    ends = np.cumsum([len(episode) - 1 for episode in positions])
    watched = 100.0 * (cells == tv_room.TV)  # [steps]
    return {
        "tv_share": float(watched[prefill:].mean()),
        "tv_share_late": float(watched[len(cells) // 2 :].mean()),
        "cells_halfway": int(visited[len(cells) // 2 - 1]),
        "cells": int(visited[-1]),
        "curves": {
            "steps": ends.tolist(),
            "cells": visited[ends - 1].tolist(),
            "tv_share": [float(part.mean()) for part in np.split(watched, ends[:-1])],
        },
        "visits": np.bincount(cells, minlength=tv_room.CELLS).tolist(),
    }


def pendulum_measures(lines: list[dict]) -> Measures:
    """Returns, and the share of the steps with the television on, in percent, in the last quarter of a run.

    `lines` are those of metrics.jsonl. A run without a television has no share.
    """
    late = [line for line in lines if line["step"] > 0.75 * lines[-1]["step"]]
    names = {"return": "env/episode_return", "eval_return": "eval/episode_return", "tv_share": "env/tv_share"}
    values = {key: [line[name] for line in late if name in line] for key, name in names.items()}
    measures = {key: float(np.mean(each)) for key, each in values.items() if each}
    if "tv_share" in measures:
        measures["tv_share"] *= 100
    curves = {
        key: dict(zip(("steps", "values"), logs.curve(lines, name), strict=True))
        for key, name in names.items()
    }
    return {**measures, "curves": curves}


def crafter_measures(lines: list[dict]) -> Measures:
    """Achievements unlocked in any training episode, and in how many percent of them each was.

    `lines` are those of metrics.jsonl, whose success rates are over all training episodes so far.
    """
    rates = [
        {key.partition(logs.RATES)[2]: value for key, value in line.items() if logs.RATES in key}
        for line in lines
    ]
    unlocked = [sum(rate > 0 for rate in each.values()) for each in rates]
    return {
        "unlocked": unlocked[-1],
        "score": lines[-1]["crafter/score"],
        "rates": rates[-1],
        "curves": {"steps": [line["step"] for line in lines], "unlocked": unlocked},
    }


# --- Summaries -----------------------------------------------------------------------------------------


def summarise(runs: Mapping[str, Mapping[int, Measures]]) -> dict[str, dict[str, dict]]:
    """Mean and interval over seeds of each number: condition -> measure -> mean, low, high, values.

    `runs` are the measures by condition and seed. With one seed there is no interval: low and high are None.
    """
    summary: dict[str, dict[str, dict]] = {}
    for condition, seeds in runs.items():
        each = list(seeds.values())
        summary[condition] = {}
        for name in (key for key, value in each[0].items() if isinstance(value, int | float)):
            values = [measures[name] for measures in each]
            interval = [None if math.isnan(end) else end for end in bootstrap_interval(values)]
            summary[condition][name] = dict(
                zip(
                    ("mean", "low", "high", "values"),
                    (float(np.mean(values)), *interval, values),
                    strict=True,
                )
            )
    return summary


def room_bars(summary: dict) -> dict[str, list[float]]:
    """The two bars of the issue: LPM before the television, and its cells with noise against without."""
    share = {name: summary[f"{name} noise"]["tv_share"]["values"] for name in ("lpm", "surprise")}
    cells = {tv: summary[f"lpm {tv}"]["cells"]["values"] for tv in TELEVISION}
    return {
        "LPM's share of steps before the noisy TV, in percent of surprise's (bar: at most 50)": percentages(
            share["lpm"], share["surprise"]
        ),
        "LPM's cells with the noise, in percent of those without (bar: more than 90)": percentages(
            cells["noise"], cells["still"]
        ),
    }


def percentages(over: Sequence[float], under: Sequence[float]) -> list[float | None]:
    """mean(over) / mean(under) and the ends of its interval, in percent; None where it cannot be told."""
    ratio = float(np.mean(over)) / float(np.mean(under)) if np.any(under) else math.inf
    return [100 * x if math.isfinite(x) else None for x in (ratio, *ratio_interval(over, under))]


def table(summary: dict, columns: Mapping[str, str]) -> list[str]:
    """A Markdown table: a row a condition, each number as mean (low to high)."""
    rows = ["| | " + " | ".join(columns.values()) + " |", "| --- " * (len(columns) + 1) + "|"]
    for condition, measures in summary.items():
        cells = [_cell(measures.get(name)) for name in columns]
        rows.append(f"| {condition} | " + " | ".join(cells) + " |")
    return rows


def _bar(value: float | None, low: float | None, high: float | None) -> str:
    told = "-" if value is None else f"{value:.1f}"
    return told if low is None or high is None else f"{told} ({low:.1f} to {high:.1f})"


def _cell(measure: dict | None, digits: int = 1) -> str:
    if measure is None:
        return "-"
    mean, low, high = (measure[key] for key in ("mean", "low", "high"))
    return f"{mean:.{digits}f}" + ("" if low is None else f" ({low:.{digits}f} to {high:.{digits}f})")


# --- Figures -------------------------------------------------------------------------------------------

COLORS = {
    "random": "0.5",
    "surprise": "tab:red",
    "plan2explore": "tab:blue",
    "lpm": "tab:green",
    "greedy": "tab:orange",
}


def _lines(axis: Any, seeds: Mapping[int, Measures], curve: Callable[[dict], tuple], style: dict) -> None:
    """A thin line a seed, and a thick one for their mean, up to where all have come."""
    each = [curve(measures["curves"]) for measures in seeds.values()]
    for steps, values in each:
        axis.plot(steps, values, lw=0.6, alpha=0.4, **{**style, "label": None})
    length = min(len(values) for _, values in each)
    axis.plot(each[0][0][:length], np.mean([values[:length] for _, values in each], 0), lw=1.8, **style)


def _pair(curves: Mapping, name: str) -> tuple[list, list]:
    return curves["steps"], curves[name]


def draw_room(result: dict, out: Path) -> None:
    """Who watches, how many cells are visited, and where each explorer was while the television was noisy."""
    figure = figures.pyplot().figure(figsize=(13, 6), layout="constrained")
    grid = figure.add_gridspec(2, 12, height_ratios=(3, 2))
    watch, cells, bars = (figure.add_subplot(grid[0, 4 * i : 4 * i + 4]) for i in range(3))
    for index, name in enumerate(EXPLORERS):
        for tv, ls in zip(TELEVISION, ("-", ":"), strict=True):
            style = {"color": COLORS[name], "ls": ls, "label": f"{name}, {tv}"}
            seeds = result["runs"][f"{name} {tv}"]
            _lines(cells, seeds, lambda curves: _pair(curves, "cells"), style)
            if tv == "noise":
                _lines(watch, seeds, lambda curves: _pair(curves, "tv_share"), {**style, "label": name})
            shares = [measures["tv_share"] for measures in seeds.values()]
            place = index + (0.2 if tv == "still" else -0.2)
            bars.bar(place, np.mean(shares), 0.36, color=COLORS[name], alpha=0.6 if tv == "noise" else 0.25)
            bars.plot([place] * len(shares), shares, ".", color=COLORS[name])
        visits = np.mean([each["visits"] for each in result["runs"][f"{name} noise"].values()], 0)
        plan = np.full((len(tv_room.PLAN), len(tv_room.PLAN[0])), np.nan)
        plan[tuple(np.transpose(tv_room.FREE))] = np.log10(1 + visits)
        axis = figure.add_subplot(grid[1, 3 * index : 3 * index + 3])
        axis.set_facecolor("0.3")
        drawn = axis.imshow(plan, cmap="magma", vmin=0, vmax=3)
        axis.set(title=f"{name}, noise", xticks=[], yticks=[])
    figure.colorbar(drawn, ax=axis, label="log10(1 + visits)", shrink=0.7)
    watch.set(title="before the noisy television", ylabel="percent of an episode's steps", xlabel="env steps")
    cells.set(title="cells visited (dotted: still picture)", ylabel=f"of {tv_room.CELLS}", xlabel="env steps")
    bars.set(title="before the television, after the prefill", ylabel="percent (pale: still picture)")
    bars.set_xticks(range(len(EXPLORERS)), EXPLORERS)
    watch.legend()
    figure.savefig(out, dpi=80)


def draw_pendulum(result: dict, out: Path) -> None:
    """Returns while training and in evaluations, and how long the television was on."""
    figure, axes = figures.pyplot().subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    titles = {"return": "training return", "eval_return": "evaluation return", "tv_share": "television on"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for condition, seeds in result["runs"].items():
            agent, _, tv = condition.partition(" ")
            style = {"color": COLORS[agent], "ls": "-" if tv == "TV" else ":", "label": condition}
            seeds = {seed: each for seed, each in seeds.items() if each["curves"][name]["steps"]}
            if seeds:
                _lines(axis, seeds, lambda curves, name=name: _pair(curves[name], "values"), style)
        axis.set(title=title, xlabel="env steps")
        axis.grid(alpha=0.3)
    axes[0].legend()
    axes[2].set(ylabel="share of the steps")
    figure.savefig(out, dpi=80)


def draw_crafter(result: dict, out: Path) -> None:
    """Achievements unlocked while the run goes on, and success rates over all its episodes."""
    figure, (left, right) = figures.pyplot().subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    height = 0.8 / len(result["runs"])
    for index, (name, seeds) in enumerate(result["runs"].items()):
        style = {"color": COLORS[name], "label": name}
        _lines(left, seeds, lambda curves: _pair(curves, "unlocked"), style)
        names = sorted(next(iter(seeds.values()))["rates"])
        rates = [np.mean([measures["rates"][each] for measures in seeds.values()]) for each in names]
        right.barh([y + index * height for y in range(len(names))], rates, height, **style)
    right.set_yticks(range(len(names)), names, fontsize=7)
    right.invert_yaxis()
    right.set(title="success rate", xlabel="percent of all training episodes")
    left.set(title="achievements unlocked so far", xlabel="env steps", ylabel="of 22")
    left.yaxis.get_major_locator().set_params(integer=True)
    left.legend()
    figure.savefig(out, dpi=80)


# --- The studies ---------------------------------------------------------------------------------------


def crossed(first: Mapping[str, str], second: Mapping[str, str]) -> dict[str, str]:
    """Each of the first with each of the second: `name other` -> the options of both."""
    return {f"{a} {b}": f"{x} {y}" for a, x in first.items() for b, y in second.items()}


STUDIES = {
    "room": Study(
        options=ROOM,
        conditions=crossed(EXPLORERS, TELEVISION),
        quick=QUICK,
        seeds=range(5),
        measure=measure_room,
        columns={
            "tv_share": "steps before the TV, %",
            "tv_share_late": "of the second half, %",
            "cells_halfway": "cells halfway",
            "cells": f"cells, of {tv_room.CELLS}",
        },
        draw=draw_room,
        bars=room_bars,
    ),
    "pendulum": Study(
        options=PENDULUM,
        conditions=crossed(
            {"greedy": "--expl_behavior greedy", "lpm": "--expl_behavior lpm"},
            {"TV": "--noisy_tv.enabled True", "no TV": "--noisy_tv.enabled False"},
        ),
        quick=QUICK + " --eval_every 100 --eval_episodes 1",
        seeds=range(2),
        measure=lambda logdir: pendulum_measures(logs.read_metrics(logdir)),
        columns={
            "return": "training return",
            "eval_return": "evaluation return",
            "tv_share": "steps with the TV on, %",
        },
        draw=draw_pendulum,
        bars=lambda summary: {},
    ),
    "crafter": Study(
        options=CRAFTER,
        conditions={name: EXPLORERS[name] for name in ("random", "plan2explore", "lpm")},
        quick=QUICK,
        seeds=range(1),
        measure=lambda logdir: crafter_measures(logs.read_metrics(logdir)),
        columns={"unlocked": "achievements unlocked, of 22", "score": "score, %"},
        draw=draw_crafter,
        bars=lambda summary: {},
    ),
}


def command(study: str, condition: str, seed: int, logdir: Path, quick: bool) -> list[str]:
    """The words of one run, from `python3` on."""
    options = f"{STUDIES[study].options} {STUDIES[study].conditions[condition]}"
    words = [*options.split(), *(STUDIES[study].quick.split() if quick else [])]
    return ["python3", "dreamer.py", *words, "--seed", str(seed), "--logdir", str(logdir)]


def run_study(
    name: str, out: Path, seeds: Sequence[int], jobs: int, quick: bool, more: Sequence[str]
) -> dict:
    """Do the runs of a study that are not done yet, and write what came out to {out}/{name}.json and .png.

    `more` are further options of dreamer.py. Returns the result, as it stands in the file. Raises UserError.
    """
    study = STUDIES[name]
    places = {
        (condition, seed): out / name / f"{condition.replace(' ', '_')}_{seed}"
        for seed in seeds
        for condition in study.conditions
    }
    commands = {place: [*command(name, *run, place, quick), *more] for run, place in places.items()}
    measured = runs.do(commands, jobs, study.measure)
    by_seed: dict[str, dict[int, Measures]] = {condition: {} for condition in study.conditions}
    for (condition, seed), place in places.items():
        by_seed[condition][seed] = measured[place]
    summary = summarise(by_seed)
    result = {
        "study": name,
        "seeds": list(seeds),
        "summary": summary,
        "bars": study.bars(summary),
        "runs": by_seed,
    }
    runs.write_json(out / f"{name}.json", result)
    study.draw(result, out / f"{name}.png")
    return result


# --- The command ---------------------------------------------------------------------------------------


def digits_table(result: dict) -> list[str]:
    """What noisy_digits.study found, on pictures that are trained on: start and end of each curve."""
    rows = ["| | start | end |", "| --- | --- | --- |"]
    for kind, curves in result["summary"]["seen"].items():
        for curve, measures in curves.items():
            cells = " | ".join(_cell(measures[moment], 4) for moment in ("start", "end"))
            rows.append(f"| {kind} {curve} | {cells} |")
    return rows


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and the options in it that are for dreamer.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("study", choices=["digits", *STUDIES])
    runs.add_options(add, "logdir/exploration", "docs/exploration.md")
    args, more = parser.parse_known_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs} must be at least 1")
    if args.study == "digits" and more:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    return args, more


def main(argv: list[str] | None = None) -> int:
    args, more = parse(argv)
    out = args.out / "quick" if args.quick else args.out
    try:
        figures.pyplot()  # that it is missing is to be said before the runs
        if args.study == "digits":
            import noisy_digits

            seeds = args.seeds or (QUICK_SEEDS if args.quick else DIGITS_SEEDS)
            result = noisy_digits.study(seeds, DIGITS_QUICK_UPDATES if args.quick else DIGITS_UPDATES, out)
            lines = digits_table(result)
        else:
            study = STUDIES[args.study]
            seeds = args.seeds or (QUICK_SEEDS if args.quick else study.seeds)
            result = run_study(args.study, out, seeds, args.jobs, args.quick, more)
            bars = [f"{what}: {_bar(*values)}" for what, values in result["bars"].items()]
            lines = [*table(result["summary"], study.columns), *bars]
            del result["runs"]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    print(json.dumps(result) if args.json else "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
