"""The studies of benchmarks/: their measures, bars and runs."""

import gzip
import json
import shlex
import subprocess
import sys

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


SLOW = [0] * 8 + [1] * 8


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


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "ablation.py doorkey --arms baseline full",
        "exploration.py room",
        "results.py --arms cartpole dmc_walker --published scores.json.gz",
        "transfer.py",
        "audio.py --arms without",
    ],
)
def test_quick_study_runs_from_the_command_line(command, tmp_path):
    scores = [{"task": "dmc_walker_walk", "xs": [0, 1000], "ys": [0, 20]}]
    (tmp_path / "scores.json.gz").write_bytes(gzip.compress(json.dumps(scores).encode()))
    script, *options = shlex.split(command)
    words = [ROOT / "benchmarks" / script, *options, "--quick", "--jobs", "2", "--json", "--out", "out"]
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary
    if script == "results.py":
        assert summary["published"]["dmc_walker"] == [pytest.approx(4, abs=0.5)]
    assert list((tmp_path / "out" / "quick").glob("*.png"))
