"""The room with the television, and the measures and runs of benchmarks/exploration.py."""

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_benchmarks import commands

import config
import envs
from basics import UserError
from envs import tv_room

ROOT = Path(__file__).parent.parent
UP, DOWN, LEFT, RIGHT, STAY = range(5)
TO_TV = [LEFT, LEFT, DOWN, DOWN]  # from the start


def load(name: str):
    """A script of benchmarks/ as a module; its name may be that of another module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


study = load("exploration")


def room(task: str, episode: int = 0):
    env = envs.make_env(config.load(["--task", task]), "train", 0)
    return env, env.reset(episode=episode)[0]


def walk(env, actions: list[int]) -> list[dict]:
    return [env.step({"action": action})[0] for action in actions]


# The room


def test_the_plan_is_closed_and_each_cell_can_be_reached_in_half_an_episode():
    reached, distance = {tv_room.START}, 0
    while len(reached) < tv_room.CELLS:
        more = {cell for place in reached for cell in tv_room.NEXT[place]}
        assert more > reached, "some cells cannot be reached"
        reached, distance = more, distance + 1
    assert distance <= tv_room.LENGTH // 2
    assert tv_room.CELLS > 100


def test_walls_stop_and_moves_move():
    env, obs = room("tvroom_still")
    assert obs["position"][tv_room.START] == 1 and obs["position"].sum() == 1
    row, column = tv_room.FREE[tv_room.START]
    cells = [tv_room.FREE[step["position"].argmax()] for step in walk(env, [UP, UP, DOWN, RIGHT, STAY, LEFT])]
    moved = [(-1, 0), (-1, 0), (0, 0), (0, 1), (0, 1), (0, 0)]  # the second step up is into the wall
    assert cells == [(row + y, column + x) for y, x in moved]


@pytest.mark.parametrize("task", ["tvroom_noise", "tvroom_still"])
def test_the_television_is_seen_from_the_alcove_only(task):
    env, obs = room(task)
    steps = walk(env, [*TO_TV, *[STAY] * 20, UP, STAY])
    assert [float(step["log_tv"]) for step in steps] == [0] * 3 + [1] * 21 + [0] * 2
    assert obs["log_tv"] == 0
    for step in [obs, *steps]:
        assert (np.abs(step["screen"]) == step["log_tv"]).all()
        assert step["reward"] == 0
    shown = {step["screen"].tobytes() for step in steps if step["log_tv"]}
    assert len(shown) == 1 if task == "tvroom_still" else len(shown) > 15


def test_noise_differs_between_episodes_and_is_repeated_by_a_seed():
    def seen(episode: int) -> list[bytes]:
        return [
            step["screen"].tobytes() for step in walk(room("tvroom_noise", episode)[0], TO_TV + [STAY] * 5)
        ]

    assert seen(0) == seen(0) != seen(1)


def test_an_episode_ends_by_truncation_and_is_drawn():
    env, _ = room("tvroom_noise")
    last = walk(env, [STAY] * tv_room.LENGTH)[-1]
    assert last["is_last"] and not last["is_terminal"]
    bare = tv_room.TVRoom(noise=True)
    bare.reset(seed=0)
    plain = bare.render()
    for action in TO_TV:
        bare.step(action)
    drawn = bare.render()
    assert plain.dtype == np.uint8 and plain.shape == drawn.shape
    tile = drawn.shape[0] // len(tv_room.PLAN)
    row, column = (tile * place for place in tv_room.FREE[tv_room.TV])
    assert (drawn[row : row + tile, column : column + tile] == tv_room.AGENT).all()
    set_below = (slice(row + tile, row + 2 * tile), slice(column, column + tile))
    assert (plain[set_below] == 0).all() and {0, 255} == set(drawn[set_below].ravel().tolist())


def test_unknown_room_names_the_nearest():
    with pytest.raises(UserError, match="Did you mean tvroom_noise"):
        room("tvroom_nose")


# Measures


def positions(*episodes: list[int]) -> list[np.ndarray]:
    return [np.eye(tv_room.CELLS, dtype=np.float32)[cells] for cells in episodes]


def test_room_measures_of_a_run_that_was_done_by_hand():
    start, tv = tv_room.START, tv_room.TV
    other, far = 0, 1
    assert len({start, tv, other, far}) == 4
    # Eight steps in two episodes; the prefill is the first. The reset is no step. The last step of each
    # episode finds a new cell.
    measured = study.room_measures(positions([start, tv, tv, tv, other], [start, tv, start, tv, far]), 1)
    assert measured["tv_share"] == pytest.approx(100 * 4 / 7)
    assert measured["tv_share_late"] == pytest.approx(100 * 2 / 4)
    assert (measured["cells_halfway"], measured["cells"]) == (3, 4)
    assert measured["curves"] == {"steps": [4, 8], "cells": [3, 4], "tv_share": [75, 50]}
    visits = measured["visits"]
    assert [visits[cell] for cell in (start, tv, other, far)] == [1, 5, 1, 1] and sum(visits) == 8


def test_pendulum_measures_are_of_the_last_quarter():
    lines = [
        {"step": 100 * i, "env/episode_return": -1000.0 + 100 * i, "env/tv_share": 0.1 * i} for i in range(9)
    ]
    lines[4]["eval/episode_return"], lines[8]["eval/episode_return"] = -900.0, -300.0
    measured = study.pendulum_measures(lines)
    assert measured["return"] == pytest.approx(-250)  # of steps 700 and 800
    assert measured["eval_return"] == -300
    assert measured["tv_share"] == pytest.approx(75)
    assert measured["curves"]["eval_return"] == {"steps": [400, 800], "values": [-900, -300]}
    without = study.pendulum_measures([{k: v for k, v in line.items() if "tv" not in k} for line in lines])
    assert "tv_share" not in without and without["curves"]["tv_share"] == {"steps": [], "values": []}


def test_crafter_measures_count_what_was_unlocked_at_all():
    rates = "crafter/success_rate/"
    lines = [
        {"step": 50},
        {"step": 100, "crafter/score": 1.0, f"{rates}wake_up": 50.0, f"{rates}eat_cow": 0.0},
        {"step": 200, "crafter/score": 2.0, f"{rates}wake_up": 40.0, f"{rates}eat_cow": 5.0},
    ]
    measured = study.crafter_measures(lines)
    assert measured["unlocked"] == 2 and measured["score"] == 2
    assert measured["rates"] == {"wake_up": 40, "eat_cow": 5}
    assert measured["curves"] == {"steps": [50, 100, 200], "unlocked": [0, 1, 2]}


def test_summary_has_means_with_intervals_and_none_for_one_seed():
    runs = {"lpm": {0: {"cells": 10, "curves": {}}, 1: {"cells": 20, "curves": {}}}, "one": {0: {"cells": 5}}}
    summary = study.summarise(runs)
    cells = summary["lpm"]["cells"]
    assert cells["mean"] == 15 and cells["values"] == [10, 20] and 10 <= cells["low"] < cells["high"] <= 20
    assert summary["one"] == {"cells": {"mean": 5, "low": None, "high": None, "values": [5]}}
    rows = study.table(summary, {"cells": "cells", "absent": "other"})
    assert rows[0] == "| | cells | other |" and rows[-1] == "| one | 5.0 | - |"


def test_the_bars_of_the_room():
    means = {
        "lpm noise": (4, 90),
        "lpm still": (9, 100),
        "surprise noise": (80, 30),
        "surprise still": (0, 60),
    }
    for spread, seeds in ((0, 1), (0, 3), (2, 2)):
        runs = {
            name: {seed: {"tv_share": tv, "cells": cells + spread * (2 * seed - 1)} for seed in range(seeds)}
            for name, (tv, cells) in means.items()
        }
        share, kept = study.room_bars(study.summarise(runs)).values()
        assert share[0] == pytest.approx(5) and kept[0] == pytest.approx(90)
        if seeds == 1:
            assert share[1:] == kept[1:] == [None, None]
        elif spread:
            assert kept[1] == pytest.approx(100 * 88 / 102) and kept[2] == pytest.approx(100 * 92 / 98)
        else:
            assert kept[1:] == pytest.approx([90, 90])
    assert study._bar(*kept) == "90.0 (86.3 to 93.9)" and study._bar(5.0, None, None) == "5.0"
    assert study.percentages([1.0, 2.0], [0.0, 0.0]) == [None, None, None]


# Runs


def test_each_study_has_a_command_in_the_docs_that_is_understood():
    studies = []
    for script, *options in commands("exploration.md"):
        if script == "dreamer.py":
            config.load(options)
            continue
        assert script == "benchmarks/exploration.py"
        args, more = study.parse(options)
        assert not more
        studies.append(args.study)
    assert set(studies) == {"digits", *study.STUDIES}


def test_every_option_and_task_that_the_page_names_exists():
    text = (ROOT / "docs" / "exploration.md").read_text(encoding="utf-8")
    named = re.findall(r"`(?:--)?((?:expl|disag|lpm|noisy_tv)[_.]\w+)`", text)
    assert named and set(named) <= set(config.read().options) | {"lpm_noisytv"}
    for task in re.findall(r"`(tvroom_\w+)`", text):
        room(task)


@pytest.mark.parametrize("name", study.STUDIES)
def test_the_options_of_each_run_are_understood(name, tmp_path):
    for condition in study.STUDIES[name].conditions:
        for quick in (False, True):
            python, script, *options = study.command(name, condition, 7, tmp_path, quick)
            assert (python, script) == ("python3", "dreamer.py")
            loaded = config.load(options)
            assert loaded.seed == 7 and loaded.threads == 1
            explorer = condition.split()[0]
            assert loaded.expl_behavior == explorer
            assert loaded.expl_extr_scale == (1 if name == "pendulum" else 0)


def test_a_finished_run_is_not_done_again_and_other_options_are_refused(tmp_path, monkeypatch):
    started = []

    def run_all(commands, jobs):
        started.extend(place.name for place in commands)
        yield from commands

    measures = {"cells": 3}
    fake = study.STUDIES["room"]._replace(
        conditions={"lpm noise": "--expl_behavior lpm"},
        measure=lambda logdir: measures,
        draw=lambda result, out: out.touch(),
        bars=lambda summary: {},
    )
    monkeypatch.setitem(study.STUDIES, "room", fake)
    monkeypatch.setattr(study.runs, "run_all", run_all)
    for seeds in ([0], [0, 1]):
        result = study.run_study("room", tmp_path, seeds, 1, False, [])
    assert started == ["lpm_noise_0", "lpm_noise_1"]
    assert json.loads((tmp_path / "room.json").read_text()) == json.loads(json.dumps(result))
    with pytest.raises(UserError, match="other options: give another --out"):
        study.run_study("room", tmp_path, [0], 1, False, ["--steps", "10"])
    (tmp_path / "room" / "lpm_noise_0.json").write_text("{")
    with pytest.raises(UserError, match="Delete it"):
        study.run_study("room", tmp_path, [0], 1, False, [])


TINY = (
    "--task tvroom_noise --configs debug --device cpu --eval_every 0 --steps 100000 --train_ratio 1".split()
)


def test_a_run_that_fails_names_its_log(tmp_path):
    words = ["python3", "dreamer.py", "--task", "tvroom_nose", "--logdir", str(tmp_path / "run")]
    with pytest.raises(UserError, match=r"run failed: .*Did you mean tvroom_noise.*run\.log"):
        list(study.runs.run_all({tmp_path / "run": words}, 2))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="terminate() kills there")
def test_stopping_the_study_lets_its_runs_save(tmp_path):
    script = (
        "import importlib.util, sys, pathlib\n"
        f"path = {str(ROOT / 'benchmarks' / 'exploration.py')!r}\n"
        "spec = importlib.util.spec_from_file_location('study', path)\n"
        "study = importlib.util.module_from_spec(spec); spec.loader.exec_module(study)\n"
        f"place = pathlib.Path({str(tmp_path / 'run')!r})\n"
        f"words = ['python3', 'dreamer.py', *{TINY!r}, '--logdir', str(place)]\n"
        "list(study.runs.run_all({place: words}, 1))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"})
    metrics = tmp_path / "run" / "metrics.jsonl"
    until = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) != 0
    assert "Stopped by SIGTERM" in (tmp_path / "run.log").read_text()
    assert (tmp_path / "run" / "latest.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", *study.STUDIES])
def test_quick_study_runs_from_the_command_line(name, tmp_path):
    if name == "digits":
        pytest.importorskip("sklearn")
    words = shlex.split(f"benchmarks/exploration.py {name} --quick --jobs 2 --json --out")
    done = subprocess.run([sys.executable, *words, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["seeds"] == [100]
    assert list((tmp_path / "quick").glob("*.png"))
