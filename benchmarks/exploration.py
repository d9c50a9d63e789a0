"""What do the explorers do? Three studies; docs/exploration.md has their questions and results.

    python3 benchmarks/exploration.py room --jobs 2

room      an apartment with a television that shows noise, or always the same picture, and no reward
pendulum  Pendulum from pixels, with and without a noisy television: LPM against greedy
crafter   Crafter without its rewards: which achievements does curiosity unlock?

The fourth study of the page is benchmarks/noisy_digits.py. Numbers are means over seeds with 95 % bootstrap
intervals. Finished runs are not repeated and interrupted ones are resumed. Other options are passed to
dreamer.py.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import runs
from benchmarks.runs import Measures, Results, Study, Summary
from config import Config
from envs import tv_room
from episodes import list_episodes
from reports import figures, logs

# --- The protocol: options of dreamer.py ---------------------------------------------------------------

EXPLORERS = {
    "random": "--expl_behavior random --train_ratio 0",  # learning would change none of its actions
    "surprise": "--expl_behavior surprise",
    "plan2explore": "--expl_behavior plan2explore",
    "lpm": "--expl_behavior lpm",
}
ROOM = (
    "--device cpu --precision float32 --threads 1 --steps 4000 --prefill 200 --train_ratio 64 --eval_every 0 "
    "--log_every 100 --save_every 1000 --replay.capacity 10000 --expl_extr_scale 0 "
    # A tiny model and short sequences: only the agent's cell has to be remembered.
    "--batch_size 32 --batch_length 8 --imag_last 2 --imag_horizon 8 "
    "--rssm.deter 128 --rssm.hidden 64 --rssm.stoch 8 --rssm.classes 8 --rssm.blocks 4 "
    "--encoder.mlp_layers 1 --encoder.mlp_units 64 --decoder.mlp_layers 1 --decoder.mlp_units 64 "
    "--reward_head.units 64 --cont_head.units 64 "
    "--actor.layers 2 --actor.units 64 --critic.layers 2 --critic.units 64 "
    # Only 1 of 101 numbers shows the cell: with less weight it is not worth its nats.
    "--loss_scales.vector 100 --rssm.free_nats 0.1 "
    "--opt.lr 1e-3 --model_lr 3e-3 --opt.warmup 50 --actor.entropy 3e-2"
)
TELEVISION = {"noise": "--task tvroom_noise", "still": "--task tvroom_still"}
PENDULUM = (
    "--configs lpm_noisytv cpu --device cpu --precision bfloat16 --threads 1 --steps 10000 "
    "--train_ratio 128 --prefill 1000 --eval_every 2000 --eval_episodes 5 --log_every 400 "
    "--save_every 2000 --video_pred_log False "
    # Smaller than the cpu preset where most time is spent.
    "--size 32 32 --encoder.cnn_mults 2 3 4 "
    "--rssm.deter 256 --batch_size 16 --batch_length 16 --imag_last 8 "
    "--opt.lr 1e-3 --model_lr 1e-3 --actor_lr 3e-4"
)
CRAFTER = (
    "--configs crafter cpu --device cpu --precision bfloat16 --threads 1 --steps 20000 --prefill 1000 "
    "--train_ratio 32 --eval_every 0 --log_every 500 --save_every 2000 --expl_extr_scale 0"
)
# A test of all steps in seconds, which learns nothing.
QUICK = (
    "--steps 200 --prefill 100 --log_every 50 --time_limit 50 --batch_size 4 --batch_length 8 "
    "--imag_horizon 3 --train_ratio 8 --rssm.deter 32 --rssm.hidden 16 --rssm.stoch 4 --rssm.classes 4 "
    "--encoder.cnn_depth 2 --decoder.cnn_depth 2"
)


# --- Measures ------------------------------------------------------------------------------------------


def measure_room(logdir: Path, quick: bool) -> Measures:
    prefill = Config.load_saved(logdir / "config.yaml").prefill
    positions = []
    for file in list_episodes(logdir / "train_eps"):
        with np.load(file.path, allow_pickle=False) as episode:
            positions.append(episode["position"])
    return room_measures(positions, prefill)


def room_measures(positions: Sequence[np.ndarray], prefill: int) -> Measures:
    """The share of steps in which the television was watched, in percent, and the number of visited cells.

    Args:
        positions: the key `position` of each episode of a run, one-hot [L, CELLS]; the first is the reset.
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
            "cells": (ends.tolist(), visited[ends - 1].tolist()),
            "tv_share": (ends.tolist(), [float(part.mean()) for part in np.split(watched, ends[:-1])]),
        },
        "visits": np.bincount(cells, minlength=tv_room.CELLS).tolist(),
    }


def pendulum_measures(lines: list[dict]) -> Measures:
    """Returns, and the share of steps with the television on, in percent, in the last quarter of a run.

    `lines` are those of metrics.jsonl. A run without a television has no share.
    """
    late = [line for line in lines if line["step"] > 0.75 * lines[-1]["step"]]
    names = {"return": logs.TRAIN, "eval_return": logs.EVAL, "tv_share": "env/tv_share"}
    values = {key: [line[name] for line in late if name in line] for key, name in names.items()}
    measures = {key: float(np.mean(each)) for key, each in values.items() if each}
    if "tv_share" in measures:
        measures["tv_share"] *= 100
    return {**measures, "curves": {key: logs.curve(lines, name) for key, name in names.items()}}


def crafter_measures(lines: list[dict]) -> Measures:
    """The number of achievements unlocked in any training episode, and the success rates in percent.

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
        "curves": {"unlocked": ([line["step"] for line in lines], unlocked)},
    }


# --- Summaries -----------------------------------------------------------------------------------------


def report(results: Results, columns: Mapping[str, str]) -> tuple[Summary, list[str]]:
    """The `runs.spread` of each number over seeds by arm and measure, with the mean; and the table."""
    summary = {
        arm: {
            name: runs.spread([run[name] for run in seeds.values()], np.mean)
            for name in columns
            if name in each
        }
        for arm, seeds in results.items()
        for each in [next(iter(seeds.values()))]
    }
    return summary, runs.table(summary, {name: (title, "{:.1f}") for name, title in columns.items()})


def report_room(results: Results) -> tuple[Summary, list[str]]:
    """The same, and the two bars: LPM in front of the television, and its cells with and without noise."""
    columns = {
        "tv_share": "steps before the TV, %",
        "tv_share_late": "of the second half, %",
        "cells_halfway": "cells halfway",
        "cells": f"cells, of {tv_room.CELLS}",
    }
    summary, lines = report(results, columns)
    bars = {
        "LPM's share of steps before the noisy TV, as a share of surprise's (bar: at most 0.5)": (
            "tv_share", "lpm noise", "surprise noise"
        ),
        "LPM's cells with the noise, as a share of those without (bar: more than 0.9)": (
            "cells", "lpm noise", "lpm still"
        ),
    }  # fmt: skip
    for what, (name, over, under) in bars.items():
        if {over, under} <= summary.keys():
            measure = runs.ratio(summary[over][name]["values"], summary[under][name]["values"], np.mean)
            lines += ["", f"{what}: {runs.cell(measure, '{:.2f}')}"]
    return summary, lines


# --- Figures -------------------------------------------------------------------------------------------

COLORS = {
    "random": "0.5",
    "surprise": "tab:red",
    "plan2explore": "tab:blue",
    "lpm": "tab:green",
    "greedy": "tab:orange",
}


def _lines(axis: Any, seeds: Mapping[int, Measures], name: str, style: dict) -> None:
    """A thin line for each seed, and a thick one for their mean, as far as all of them reach."""
    each = [measures["curves"][name] for measures in seeds.values()]
    for steps, values in each:
        axis.plot(steps, values, lw=0.6, alpha=0.4, **{**style, "label": None})
    length = min(len(values) for _, values in each)
    axis.plot(each[0][0][:length], np.mean([values[:length] for _, values in each], 0), lw=1.8, **style)


def draw_room(results: Results, summary: Summary, out: Path) -> None:
    """Watched steps, visited cells, and the places of each explorer with the noisy television."""
    figure = figures.pyplot().figure(figsize=(13, 6), layout="constrained")
    grid = figure.add_gridspec(2, 12, height_ratios=(3, 2))
    watch, cells, bars = (figure.add_subplot(grid[0, 4 * i : 4 * i + 4]) for i in range(3))
    for index, name in enumerate(EXPLORERS):
        for tv, ls in zip(TELEVISION, ("-", ":"), strict=True):
            style = {"color": COLORS[name], "ls": ls, "label": f"{name}, {tv}"}
            seeds = results[f"{name} {tv}"]
            _lines(cells, seeds, "cells", style)
            if tv == "noise":
                _lines(watch, seeds, "tv_share", {**style, "label": name})
            shares = [measures["tv_share"] for measures in seeds.values()]
            place = index + (0.2 if tv == "still" else -0.2)
            bars.bar(place, np.mean(shares), 0.36, color=COLORS[name], alpha=0.6 if tv == "noise" else 0.25)
            bars.plot([place] * len(shares), shares, ".", color=COLORS[name])
        visits = np.mean([each["visits"] for each in results[f"{name} noise"].values()], 0)
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


def draw_pendulum(results: Results, summary: Summary, out: Path) -> None:
    """Returns in training and in evaluations, and how long the television was on."""
    figure, axes = figures.pyplot().subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    titles = {"return": "training return", "eval_return": "evaluation return", "tv_share": "television on"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for condition, seeds in results.items():
            agent, _, tv = condition.partition(" ")
            style = {"color": COLORS[agent], "ls": "-" if tv == "TV" else ":", "label": condition}
            seeds = {seed: each for seed, each in seeds.items() if each["curves"][name][0]}
            if seeds:
                _lines(axis, seeds, name, style)
        axis.set(title=title, xlabel="env steps")
        axis.grid(alpha=0.3)
    axes[0].legend()
    axes[2].set(ylabel="share of the steps")
    figure.savefig(out, dpi=80)


def draw_crafter(results: Results, summary: Summary, out: Path) -> None:
    """Achievements unlocked over the run, and success rates over all its episodes."""
    figure, (left, right) = figures.pyplot().subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    height = 0.8 / len(results)
    for index, (name, seeds) in enumerate(results.items()):
        style = {"color": COLORS[name], "label": name}
        _lines(left, seeds, "unlocked", style)
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


def measure_lines(measures: Callable[[list[dict]], Measures]) -> Callable[[Path, bool], Measures]:
    return lambda logdir, quick: measures(logs.read_metrics(logdir))


def report_columns(columns: Mapping[str, str]) -> Callable[[Results], tuple[Summary, list[str]]]:
    return lambda results: report(results, columns)


STUDIES = {
    "room": Study(
        ROOM, crossed(EXPLORERS, TELEVISION), range(5), measure_room, report_room, draw_room, QUICK
    ),
    "pendulum": Study(
        options=PENDULUM,
        arms=crossed(
            {"greedy": "--expl_behavior greedy", "lpm": "--expl_behavior lpm"},
            {"TV": "--noisy_tv.enabled True", "no TV": "--noisy_tv.enabled False"},
        ),
        seeds=range(2),
        measure=measure_lines(pendulum_measures),
        report=report_columns(
            {
                "return": "training return",
                "eval_return": "evaluation return",
                "tv_share": "steps with the TV on, %",
            }
        ),
        draw=draw_pendulum,
        quick=QUICK + " --eval_every 100 --eval_episodes 1",
    ),
    "crafter": Study(
        options=CRAFTER,
        arms={name: EXPLORERS[name] for name in ("random", "plan2explore", "lpm")},
        seeds=range(1),
        measure=measure_lines(crafter_measures),
        report=report_columns({"unlocked": "achievements unlocked, of 22", "score": "score, %"}),
        draw=draw_crafter,
        quick=QUICK,
    ),
}


if __name__ == "__main__":
    sys.exit(runs.main(STUDIES, "logdir/exploration", __doc__))
