"""The studies of benchmarks/: their measures, bars and runs."""

import gzip
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from run_helpers import ROOT

import config
from basics import UserError
from benchmarks import ablation, audio, exploration, results, runs, transfer
from envs import tv_room

SCRIPTS = {
    "ablation": ablation.STUDIES,
    "exploration": exploration.STUDIES,
    "results": {"results": results.study({})},
    "transfer": transfer.STUDIES,
    "audio": audio.STUDIES,
}
STUDIES = {f"{script} {name}": study for script, each in SCRIPTS.items() for name, study in each.items()}


# --- Measures ------------------------------------------------------------------------------------------


def lines(returns: list[float], every: int = 100) -> list[dict]:
    """metrics.jsonl of a run with one evaluation per return; training returns are half of them."""
    each = [
        {"step": every * i, "eval/episode_return": value, "env/episode_return": value / 2, "opt/updates": i}
        for i, value in enumerate(returns, start=1)
    ]
    return [{"step": every // 2, "loss/image": 1.0}, *each]


def run(returns: list[float]) -> dict:
    return ablation.measures(lines(returns))


def arms(**returns: list[list[float]]) -> dict:
    return {arm: dict(enumerate(map(run, each))) for arm, each in returns.items()}


SLOW, FAST, NEVER = [0] * 8 + [1] * 8, [0] * 2 + [1] * 14, [0] * 16


def test_measures_of_a_run_come_from_evaluations():
    measured = run([0, 0, 0, 1, 0.5, 0.5, 0.8, 0.6])
    assert measured["final"] == pytest.approx(0.7)  # of steps 700 and 800
    assert measured["train"] == pytest.approx(0.35)
    assert measured["area"] == pytest.approx((0 / 2 + 0 + 0 + 1 + 0.5 + 0.5 + 0.8 + 0.6 / 2) / 7)
    assert (measured["steps"], measured["updates"], measured["first"]) == (800, 8, 0)
    assert measured["curves"]["eval"][0] == [100 * i for i in range(1, 9)]


def test_steps_to_a_return_need_three_evaluations():
    curve = run([0, 0.9, 0, 0.6, 0.6, 0.6, 0.9, 0.9])["curves"]["eval"]
    steps = [runs.steps_to(curve, mark, 3) for mark in (0.3, 0.6, 0.8, 0.85)]
    assert steps == [300, 600, 800, None]


def test_arms_are_compared_with_the_baselines_final_return():
    found = ablation.summarise(arms(baseline=[SLOW] * 3, prior=[FAST, FAST, NEVER], random=[SLOW]))
    assert found["baseline"]["final"]["value"] == 1
    assert found["baseline"]["to_final"]["values"] == [1100] * 3
    assert found["prior"]["to_final"]["values"] == [500, 500, 1600]  # NEVER counts with all its steps
    assert found["prior"]["missed"] == {"to_final": 1, "to_nearly": 1}
    iqm = (0.25 * 500 + 500 + 0.25 * 1600) / 1.5
    assert found["prior"]["to_final"]["value"] == pytest.approx(iqm)
    assert found["prior"]["speed_final"]["value"] == pytest.approx(iqm / 1100)
    assert found["random"]["to_final"]["low"] is None, "one seed has no interval"


def test_bars_of_the_ablation_are_met_and_missed():
    def bars(**returns: list[list[float]]) -> list[bool]:
        return list(ablation.bars(ablation.summarise(arms(**returns))).values())

    late = [0] * 6 + [1] * 10
    assert bars(baseline=[SLOW] * 3, prior=[FAST] * 3, adversarial=[SLOW] * 3) == [True, True, True]
    assert bars(baseline=[SLOW] * 3, prior=[late] * 3, adversarial=[[0.5] * 16] * 3) == [False, False, True]
    assert not bars(baseline=[SLOW] * 3, prior=[NEVER, NEVER, FAST])[0]
    unequal = {"baseline": {0: run(SLOW)}, "prior": {0: run(SLOW) | {"updates": 15}}}
    assert not list(ablation.bars(ablation.summarise(unequal)).values())[-1]


def test_a_transferred_run_that_never_learns_counts_with_all_its_steps():
    found, table = transfer.report(arms(source=[SLOW], scratch=[SLOW, NEVER], model=[FAST]))
    assert found["scratch"]["learned"]["values"] == [1100, 1600] and found["model"]["learned"]["value"] == 500
    assert "1,350 (1,100 to 1,600)" in table[2] and "- from scratch: 1 of 2 never learn the task" in table


def test_room_measures_equal_those_by_hand():
    start, tv, other, far = tv_room.START, tv_room.TV, 0, 1
    episodes = [[start, tv, tv, tv, other], [start, tv, start, tv, far]]  # the prefill is the first step
    one_hot = [np.eye(tv_room.CELLS, dtype=np.float32)[cells] for cells in episodes]
    measured = exploration.room_measures(one_hot, 1)
    assert measured["tv_share"] == pytest.approx(100 * 4 / 7)
    assert measured["tv_share_late"] == pytest.approx(100 * 2 / 4)
    assert (measured["cells_halfway"], measured["cells"]) == (3, 4)
    assert measured["curves"] == {"cells": ([4, 8], [3, 4]), "tv_share": ([4, 8], [75, 50])}
    visits = measured["visits"]
    assert [visits[cell] for cell in (start, tv, other, far)] == [1, 5, 1, 1] and sum(visits) == 8


def test_the_bars_of_the_room():
    shares = {"lpm noise": (4, 90), "lpm still": (9, 100), "surprise noise": (80, 30)}
    keys = ("tv_share", "tv_share_late", "cells_halfway", "cells")
    seeds = {
        name: {seed: dict.fromkeys(keys, tv) | {"cells": cells + 2 * (2 * seed - 1)} for seed in range(2)}
        for name, (tv, cells) in shares.items()
    }
    _, table = exploration.report_room(seeds)
    assert table[-3].endswith(": 0.05") and table[-1].endswith(": 0.90 (0.86 to 0.94)")


def test_minutes_are_those_between_the_lines():
    speeds = [{"step": 120, "env/fps": 2.0}, {"step": 150}, {"step": 180, "env/fps": 0.5}]
    assert results.minutes(speeds) == pytest.approx((120 / 2 + 60 / 0.5) / 60)


# --- Runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STUDIES)
def test_the_options_of_each_run_are_understood(name, tmp_path):
    study = STUDIES[name]
    for arm in study.arms:
        for quick in (False, True):
            python, script, *options = runs.command(study, arm, 7, tmp_path, quick)
            assert (python, script) == ("python3", "dreamer.py")
            loaded = config.load(options)
            assert loaded.seed == 7 and loaded.threads == 1 and loaded.steps < 1e5
            if loaded.transfer:
                assert loaded.from_checkpoint == str(tmp_path / "source_7" / "latest.pt")


def stub(monkeypatch) -> list[str]:
    """Let runs write SLOW's metrics and end at once; returns the names of their logdirs."""
    started = []

    def run_all(commands, jobs):
        for logdir in commands:
            started.append(logdir.name)
            logdir.mkdir(parents=True)
            text = "\n".join(json.dumps(line) for line in lines(SLOW))
            (logdir / "metrics.jsonl").write_text(text + "\n")
            yield logdir

    monkeypatch.setattr(runs, "run_all", run_all)
    return started


def study_main(study: runs.Study, *options: str, code: int = 0) -> None:
    assert runs.main({"study": study}, "nowhere", None, options) == code


def test_finished_runs_are_not_repeated_and_those_that_others_need_come_first(tmp_path, monkeypatch, capsys):
    started = stub(monkeypatch)
    study, out = transfer.STUDIES["transfer"], ("--out", str(tmp_path), "--seeds", "0")
    study_main(study, *out, "--only", "table", code=2)
    assert "leave out --only" in capsys.readouterr().err
    study_main(study, *out, "--arms", "scratch", "source")
    study_main(study, *out, "--arms", "scratch", "model", "source")
    assert started == ["source_0", "scratch_0", "model_0"]
    study_main(study, *out, "--only", "table", "--json")
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(summary) == ["source", "scratch", "model"]
    assert json.loads((tmp_path / "study.json").read_text())["summary"] == summary
    assert "| from scratch | 0.000 |" in (tmp_path / "study.md").read_text()
    assert (tmp_path / "study.png").stat().st_size > 0
    study_main(study, *out, "--opt.lr", "1", code=2)
    assert "other options: use another --out" in capsys.readouterr().err


def test_a_run_that_fails_names_its_log(tmp_path):
    words = ["python3", "dreamer.py", "--task", "tvroom_nose", "--logdir", str(tmp_path / "run")]
    with pytest.raises(UserError, match=r"run failed: .*Did you mean tvroom_noise.*run\.log"):
        list(runs.run_all({tmp_path / "run": words}, 2))


STOPPED = """
import pathlib, sys
from benchmarks import runs
logdir = pathlib.Path(sys.argv[1])
words = "python3 dreamer.py --task tvroom_noise --configs debug --device cpu --eval_every 0 --steps 1e5"
list(runs.run_all({logdir: [*words.split(), "--train_ratio", "1", "--logdir", str(logdir)]}, 1))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="terminate() kills there")
def test_runs_save_when_their_study_is_stopped(tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", STOPPED, tmp_path / "run"], cwd=ROOT, env=env)
    metrics = tmp_path / "run" / "metrics.jsonl"
    until = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) != 0
    assert "Stopped by SIGTERM" in (tmp_path / "run.log").read_text()
    assert (tmp_path / "run" / "latest.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "ablation.py doorkey --arms baseline full",
        "ablation.py crafter --arms baseline prior",
        "exploration.py room",
        "exploration.py pendulum --arms lpm_TV",
        "exploration.py crafter --arms lpm",
        "results.py --arms cartpole dmc_walker --published scores.json.gz",
        "transfer.py",
        "audio.py --arms without",
    ],
)
def test_quick_study_runs_from_the_command_line(command, tmp_path):
    scores = [{"task": "dmc_walker_walk", "xs": [0, 1000], "ys": [0, 20]}]
    (tmp_path / "scores.json.gz").write_bytes(gzip.compress(json.dumps(scores).encode()))
    script, *options = shlex.split(command.replace("lpm_TV", "'lpm TV'"))
    words = [ROOT / "benchmarks" / script, *options, "--quick", "--jobs", "2", "--json", "--out", "out"]
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary
    if script == "results.py":
        assert summary["published"]["dmc_walker"] == [pytest.approx(4, abs=0.5)]
    assert list((tmp_path / "out" / "quick").glob("*.png"))
