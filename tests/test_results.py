"""The trainings of benchmarks/results.py, and what docs/results.md says of the checkpoints in the repo."""

import gzip
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_benchmarks import commands
from test_exploration_study import load
from test_suites import NO_DM_CONTROL

import config
import evaluate
from basics import UserError

ROOT = Path(__file__).parent.parent
CHECKPOINTS = ROOT / "checkpoints"
MAX_MIB = 5  # of a checkpoint in the repo
study = load("results")


# Checkpoints


def checkpoints() -> dict[str, dict[str, str]]:
    """The rows of the page's table of checkpoints, by file."""
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| checkpoint .*\n\| -.*\n((?:\|.*\n)+)", page, re.MULTILINE)
    names = ("file", "trained", "return", "random", "episodes", "least")
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()]
    return {row[0].strip("`"): dict(zip(names, row, strict=True)) for row in rows}


def test_every_checkpoint_is_small_and_on_the_page():
    files = {f"checkpoints/{path.name}": path for path in CHECKPOINTS.iterdir()}
    assert files.keys() == checkpoints().keys()
    assert all(path.stat().st_size <= MAX_MIB * 2**20 for path in files.values())


@pytest.mark.parametrize("file", checkpoints())
def test_checkpoint_reaches_its_stated_return(file):
    if Path(file).name.startswith("dmc_") and NO_DM_CONTROL:
        pytest.skip("DeepMind Control has no wheels for this Python")
    stated = checkpoints()[file]
    played = evaluate.evaluate(ROOT / file, int(stated["episodes"]), device="cpu")
    least, mean = float(stated["least"]), float(stated["return"].split()[0])
    assert float(stated["random"].split()[0]) < least <= mean
    assert played["return_mean"] >= least


# The study


@pytest.mark.parametrize("name", study.STUDIES)
def test_commands_of_the_runs_are_understood(name, tmp_path):
    for quick in (False, True):
        python, script, *options = study.command(name, 7, tmp_path, quick)
        assert (python, script) == ("python3", "dreamer.py")
        loaded = config.load(options)
        assert loaded.seed == 7 and loaded.threads == 1 and loaded.steps <= 1e5
        assert loaded.eval_every and loaded.eval_episodes % loaded.envs.eval_amount == 0


def test_the_commands_of_the_page_are_understood():
    page = commands("results.md")
    assert {script for script, *_ in page} >= {"dreamer.py", "evaluate.py", "benchmarks/results.py"}
    for script, *options in page:
        if script == "dreamer.py":
            config.load(options)
        elif script == "evaluate.py":
            evaluate.parse(options)
        else:
            assert script == "benchmarks/results.py" and not study.parse(options)[1]


def test_minutes_are_those_between_the_lines():
    lines = [{"step": 120, "env/fps": 2.0}, {"step": 150}, {"step": 180, "env/fps": 0.5}]
    assert study.minutes(lines) == pytest.approx((120 / 2 + 60 / 0.5) / 60)


def published(path: Path, seeds: list[list[float]], task: str = "dmc_walker_walk") -> Path:
    runs = [{"task": task, "method": "dreamerv3", "xs": [10, 20, 30], "ys": ys} for ys in seeds]
    path.write_bytes(gzip.compress(json.dumps(runs).encode()))
    return path


def test_published_curves_are_read_at_our_number_of_steps(tmp_path):
    curves = study.read_published(published(tmp_path / "scores.json.gz", [[0, 10, 20], [0, 20, 40]]))
    assert study.published_at(curves, "dmc_walker_walk", 25) == [15, 30]
    for task, steps in (("dmc_walker_walk", 9), ("dmc_walker_walk", 31), ("dmc_walker_run", 20), ("", 20)):
        assert study.published_at(curves, task, steps) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no gzip",
        gzip.compress(b"[]")[:10] + b"\xff" * 20,
        gzip.compress(b"[{}]"),
        gzip.compress(b"[1]"),
    ],
    ids=["empty", "no gzip", "damaged", "no run", "no list of runs"],
)
def test_another_file_than_published_curves_is_refused(content, tmp_path):
    (tmp_path / "scores.json.gz").write_bytes(content)
    with pytest.raises(UserError, match="holds no published curves"):
        study.read_published(tmp_path / "scores.json.gz")
    with pytest.raises(UserError, match="holds no published curves"):
        study.read_published(tmp_path / "missing")


def test_published_curves_of_unequal_length_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds no published curves"):
        study.read_published(published(tmp_path / "scores.json.gz", [[0, 10, 20], [0, 20]]))


def test_only_what_has_finished_is_summed_up(tmp_path, monkeypatch):
    def run_all(commands, jobs):
        for place in commands:
            place.mkdir(parents=True)
            yield place

    def played(mean: float) -> dict:
        return {"return_mean": mean, "return_interval": [mean - 1, mean + 1], "returns": [mean]}

    curve = ([10, 20], [1.0, 2.0])
    measured = {"steps": 20, "updates": 7.0, "minutes": 3.2, "curves": {"eval": curve, "train": curve}}
    measured |= {"agent": played(50.0), "random": played(5.0)}
    monkeypatch.setattr(study.runs, "run_all", run_all)
    monkeypatch.setattr(study, "measures", lambda *_: measured)
    curves = {"dmc_walker_walk": (np.array([10.0, 20, 30]), np.array([[1.0, 2, 3], [3, 4, 5]]))}
    names = ["cartpole", "dmc_walker"]
    with pytest.raises(UserError, match="leave out --only"):
        study.run_studies(names, tmp_path, None, 1, False, [], curves, only_table=True)
    study.run_studies(["dmc_walker"], tmp_path, [0, 1], 1, False, [], curves)
    result = study.run_studies(names, tmp_path, [0, 1], 1, False, [], curves, only_table=True)
    assert list(result["runs"]) == ["dmc_walker"] and list(result["runs"]["dmc_walker"]) == [0, 1]
    told = (tmp_path / "results.md").read_text()
    assert "| DMC walker walk | 1 | 20 | 7 | 3 | 50 (49 to 51) | 5 (4 to 6) |" in told
    assert "at 20 env steps, 2 seeds: 3 (2 to 4)" in told
    assert json.loads((tmp_path / "results.json").read_text())["published"] == {"dmc_walker": [2, 4]}
    assert (tmp_path / "results.png").stat().st_size > 0


@pytest.mark.slow
def test_quick_runs_from_the_command_line(tmp_path):
    scores = published(tmp_path / "scores.json.gz", [[0, 10, 20]])
    words = shlex.split("benchmarks/results.py cartpole dmc_walker doorkey --quick --jobs 2 --json --out")
    words += [str(tmp_path), "--published", str(scores)]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert list(result["runs"]) == ["cartpole", "dmc_walker", "doorkey"]
    for seeds in result["runs"].values():
        (run,) = seeds.values()
        assert run["updates"] > 0 and run["minutes"] > 0 and run["curves"]["eval"][0]
        assert np.isfinite(run["agent"]["return_mean"]) and np.isfinite(run["random"]["return_mean"])
    assert (tmp_path / "quick" / "results.png").exists()
