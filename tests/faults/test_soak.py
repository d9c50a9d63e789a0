"""The soak of benchmarks/soak.py, shortened: a run whose workers are killed keeps memory and handles."""

import json
import os
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from run_helpers import ROOT

import config
from envs import make_env
from parallel import make_vec

linux = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks into /proc")


@pytest.fixture(scope="module")
def soak():
    return runpy.run_path(str(ROOT / "benchmarks" / "soak.py"))


@linux
@pytest.mark.slow
def test_a_short_soak_is_flat(soak, capsys):
    command = "--hours 0.012 --kill_every 5 --sample 0.25 --warmup 0.25 --json --"
    command += " --eval_every 50 --log_every 50 --save_every 50 --replay.capacity 200 --threads 1"
    assert soak["main"](command.split()) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["kills"] >= 5 and result["passed"] and result["steps"] > 50


@linux
def test_restarts_of_workers_leave_no_handles_behind(soak):
    def held() -> list[float]:
        return [soak["look_at"](os.getpid())[key] for key in soak["COUNTS"]]

    vec = make_vec(
        partial(make_env, config.load(["--task", "dummy_vector"]), "train"),
        2,
        "process",
        timeout=60,
        max_restarts=9,
    )
    actions = {"action": np.zeros(2, np.int32)}
    vec.reset()
    before, workers = held(), []  # of these somebody may know still: a traceback, until garbage is collected
    for kill in range(6):
        workers.append(vec._workers[kill % 2])
        workers[-1].process.kill()
        workers[-1].process.join()
        assert vec.step(actions)["is_first"][kill % 2]
    assert held() == before
    vec.close()


@linux
def test_threads_that_end_meanwhile_do_not_end_the_soak(soak, monkeypatch):
    whole = Path.glob

    def with_one_that_has_ended(path, pattern):
        yield from [path / "999999999" / "children", *whole(path, pattern)]

    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        monkeypatch.setattr(Path, "glob", with_one_that_has_ended)
        assert child.pid in soak["children"](os.getpid())
        child.communicate(b"\n")


def samples(**changes) -> list[dict]:
    """A flat run of 100 looks, one a second, where what is given is a function of the second."""
    flat = {"rss": 500e6, "handles": 20, "threads": 3, "children": 4, "worker_rss": 90e6}
    return [
        {"seconds": second, **flat, **{key: change(second) for key, change in changes.items()}}
        for second in range(100)
    ]


@pytest.mark.parametrize(
    "changes, flat",
    [
        ({}, True),
        ({"rss": lambda s: 500e6 * (1 + 0.03 * s / 100)}, True),
        ({"rss": lambda s: 500e6 * (1 + 0.1 * s / 100)}, False),
        ({"rss": lambda s: 500e6 * (1 - 0.1 * s / 100)}, False),
        ({"rss": lambda s: 100e6 if s < 10 else 500e6}, True),  # the warm-up
        ({"handles": lambda s: 20 + s % 3}, True),  # a restart takes some for a moment
        ({"handles": lambda s: 20 + s // 80}, False),
        ({"threads": lambda s: 3 + s // 90}, False),
        ({"children": lambda s: 2 if s < 50 and s % 10 == 3 else 4}, True),  # one is missing for a while
        ({"children": lambda s: 3 + s // 8}, False),  # ended, but nobody waited for them
    ],
)
def test_growth_is_found(soak, changes, flat):
    assert soak["judge"](samples(**changes), warmup=10, tolerance=0.05)["flat"] == flat


def test_too_few_samples_are_no_judgement(soak):
    with pytest.raises(SystemExit, match="raise --hours"):
        soak["judge"](samples(), warmup=95, tolerance=0.05)


@linux
def test_run_that_ends_by_itself_is_no_pass(soak, capsys):
    with pytest.raises(SystemExit, match="ended by itself with exit code 2"):
        soak["main"](["--", "--no_such_option", "1"])


@pytest.mark.skipif(sys.platform == "linux", reason="Linux has it")
def test_other_systems_are_told(soak, capsys):
    with pytest.raises(SystemExit):
        soak["main"]([])
    assert "only Linux" in capsys.readouterr().err
