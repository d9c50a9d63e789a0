"""Writes a page about runs: figures, tables, commands and videos in one file that loads nothing.

page.html is its template. Names and numbers may come from other people's files: the template escapes all of
them, and the page forbids scripts and network access. Needs requirements/plot.txt.
"""

import base64
import datetime
import itertools
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from basics import UserError, atomic_write
from reports import figures
from reports.logs import EVAL, TRAIN, Group, RunLog, printable, show_option, spread
from stats import bootstrap_interval

TEMPLATE = Path(__file__).with_name("page.html")
KINDS = {"eval": "evaluation", "evaluate": "evaluate.py", "explain": "explained"}  # first part of mp4 names


def write(out: Path, groups: Sequence[Group], metrics: Sequence[str], videos: int, max_bytes: float) -> None:
    """Write the page atomically. Call it within `figures.look()`.

    Args:
        metrics: further metrics to draw.
        videos: number of the newest videos of each run, in addition to the open-loop prediction.
        max_bytes: of all videos together; the page says how many are left out.

    Raises UserError.
    """
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise UserError("--html needs jinja2: pip install -r requirements/plot.txt") from error
    template = jinja2.Template(
        TEMPLATE.read_text(encoding="utf-8"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    runs = [run for group in groups for run in group.runs]
    films, left_out = embed([pick_videos(run.logdir, videos) if videos else [] for run in runs], max_bytes)
    films = dict(zip((run.logdir for run in runs), films, strict=True))
    numbers = itertools.count()

    tasks = [
        {
            "name": printable(task),
            "steps": steps_of([run for group in alike for run in group.runs]),
            "groups": [about_group(index, group) for index, group in enumerate(alike)],
            "sections": {
                title: [{"title": panel.title, "svg": svg(panel, f"f{next(numbers)}-")} for panel in panels]
                for title, panels in figures.sections(alike, metrics).items()
            },
            "options": differences(alike),
            "is_benchmark": any(map(figures.is_benchmark, alike)),
            "runs": [
                about_run(i, run, films[run.logdir]) for i, each in enumerate(alike) for run in each.runs
            ],
        }
        for task, alike in figures.by_task(groups).items()
    ]
    text = template.render(
        tasks=tasks, colors=figures.COLORS, published=figures.PUBLISHED, left_out=left_out,
        max_mb=f"{max_bytes / 1e6:g}", date=datetime.date.today().isoformat(),
    )  # fmt: skip
    atomic_write(out, lambda file: file.write(text.encode()))


# Figures


def svg(panel: figures.Panel, prefix: str) -> str:
    """A panel as an SVG element in the colours of the page; `prefix` makes its ids unique."""
    picture, axis = figures.pyplot().subplots(figsize=(figures.WIDTH, panel.height), layout="constrained")
    panel.draw(axis)
    text = figures.rendered(picture, "svg", transparent=True, metadata={"Date": None}).decode()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r'(\bid="|"#|url\(#)', rf"\g<1>{prefix}", text)
    for index, color in enumerate(figures.COLORS):
        text = text.replace(color.lower(), f"var(--c{index})")
    return text.replace("#b0b0b0", "var(--grid)").replace("#000000", "currentColor")


# Tables


def about_group(index: int, group: Group) -> dict[str, Any]:
    return {
        **_look(index),
        "label": group.label,
        "seeds": group.seeds,
        "steps": steps_of(group.runs),
        "eval": summary(group.values(EVAL)),
        "train": summary(group.values(TRAIN)),
        "score": summary(group.scores, mean=True),
        "is_benchmark": figures.is_benchmark(group),
        "hours": summary([run.hours for run in group.runs], mean=True),
    }


def _look(index: int) -> dict[str, Any]:
    dashes = {"-": "", "--": "6 3", ":": "2 2", "-.": "6 2 2 2"}
    return {"color": f"var(--c{index % len(figures.COLORS)})", "dashes": dashes[figures.style(index)["ls"]]}


def steps_of(runs: Sequence[RunLog]) -> str:
    """The range of env steps of runs, for example `34,006` or `12,000 to 34,006`."""
    steps = [run.steps for run in runs]
    return " to ".join(dict.fromkeys((f"{min(steps):,}", f"{max(steps):,}")))


def summary(values: Sequence[float], mean: bool = False) -> dict[str, str]:
    """Interquartile mean (or mean) over seeds as `value`, and its `interval`, '' for a single seed."""
    if not values:
        return {"value": "-", "interval": ""}
    middle, low, high = (np.mean(values), *bootstrap_interval(values)) if mean else spread(values)
    interval = f"{number(low)} to {number(high)}" if len(values) > 1 else ""
    return {"value": number(middle), "interval": interval}


def number(value: float | None) -> str:
    """A number with about three digits."""
    if value is None:
        return "-"
    return f"{value:,.{3 if abs(value) < 1 else 2 if abs(value) < 100 else 0}f}"


def differences(groups: Sequence[Group]) -> dict[str, list[str]]:
    """The options that differ between groups, with the value of each group."""
    names = sorted({name for group in groups for name in group.options} - {"configs"})
    rows = {"presets": [" ".join(group.options.get("configs", ["unknown"])) for group in groups]}
    rows |= {name: [show_option(group.runs[0].config, name) for group in groups] for name in names}
    return {name: row for name, row in rows.items() if len(set(row)) > 1}


def about_run(index: int, run: RunLog, films: Sequence[dict]) -> dict[str, Any]:
    updates = run.last("opt/updates").get("")
    return {
        **_look(index),
        "name": run.name,
        "seed": "-" if run.seed is None else run.seed,
        "steps": f"{run.steps:,}",
        "planned": "" if run.config is None or run.steps >= run.config.steps else f"{run.config.steps:,.0f}",
        "updates": "-" if updates is None else f"{updates:,.0f}",
        "hours": number(run.hours),
        "eval": number(run.final(EVAL)),
        "train": number(run.final(TRAIN)),
        "score": number(run.score),
        "command": command(run),
        "films": films,
    }


def command(run: RunLog) -> str:
    """The command that repeats the run, '' if its options are unknown."""
    if run.config is None:
        return ""
    config = run.config.replace({"logdir": f"./logdir/{run.name}"})
    return shlex.join(["python3", "dreamer.py", *config.to_argv()])


# Videos


def pick_videos(logdir: Path, amount: int) -> list[Path | tuple[int, bytes]]:
    """The newest mp4 files of a run, with the newest open-loop prediction (step, GIF) in second place."""
    files = sorted((logdir / "videos").glob("*.mp4"), key=_newest_first)[:amount]
    prediction = open_loop(logdir)
    return [*files[:1], *([prediction] if prediction else []), *files[1:]]


def _newest_first(path: Path) -> tuple:
    parts = path.stem.split("_")
    step, episode = ([int(x) if x.isascii() and x.isdecimal() else -1 for x in parts[-2:]] + [-1, -1])[:2]
    return -step, episode, path.name


def open_loop(logdir: Path) -> tuple[int, bytes] | None:
    """Step and GIF of the newest `train_openl` video in the event files, None if there is none."""
    from google.protobuf.message import DecodeError
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    newest = None
    for path in sorted(logdir.glob("events.out.tfevents.*")):
        for record in RawEventFileLoader(str(path)).Load():
            try:
                event = Event.FromString(record)
            except DecodeError:
                break  # the rest is broken, too
            for value in event.summary.value:
                if value.tag == "train_openl" and value.image.encoded_image_string.startswith(b"GIF8"):
                    newest = event.step, value.image.encoded_image_string
    return newest


def embed(wanted: Sequence[Sequence], max_bytes: float) -> tuple[list[list[dict]], int]:
    """The videos of each run as data for the page, and the number left out for lack of space.

    All runs get their first video before any gets its second.
    """
    films: list[list[dict]] = [[] for _ in wanted]
    left_out = 0
    for index, film in (item for turn in itertools.zip_longest(*wanted) for item in enumerate(turn)):
        if film is None:
            continue
        if isinstance(film, Path):
            kind, title, data = "video/mp4", caption(film), film.read_bytes()
        else:
            kind, title, data = "image/gif", f"open-loop prediction, step {film[0]:,}", film[1]
        if len(data) > max_bytes:
            left_out += 1
            continue
        max_bytes -= len(data)
        films[index].append({"kind": kind, "title": title, "data": base64.b64encode(data).decode()})
    return films, left_out


def caption(path: Path) -> str:
    """A caption from the name of a video file."""
    kind, _, rest = path.stem.partition("_")
    step, _, episode = rest.partition("_")
    if kind in KINDS and step.isdecimal() and episode.isdecimal():
        return f"{KINDS[kind]}, step {int(step):,}, episode {int(episode)}"
    return printable(path.stem)
