"""A run whose workers are killed keeps its memory and handles."""

import json
import os
import runpy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from run_helpers import ROOT

import config
from envs import make_env
from parallel import make_vec

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")


@pytest.fixture(scope="module")
def soak():
    return runpy.run_path(str(ROOT / "benchmarks" / "soak.py"))


@pytest.mark.slow
def test_short_soak_is_flat(soak, capsys):
    command = "--hours 0.012 --kill_every 5 --sample 0.25 --warmup 0.25 --json --"
    command += " --eval_every 50 --log_every 50 --save_every 50 --replay.capacity 200 --threads 1"
    assert soak["main"](command.split()) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["kills"] >= 5 and result["passed"] and result["steps"] > 50


def test_worker_restarts_leave_no_handles_behind(soak):
    def held() -> list[float]:
        return [soak["look_at"](os.getpid())[key] for key in soak["COUNTS"]]

    make = partial(make_env, config.load(["--task", "dummy_vector"]), "train")
    vec = make_vec(make, 2, "process", timeout=60, max_restarts=9)
    vec.reset()
    before, workers = held(), []  # tracebacks may hold workers until garbage collection
    for kill in range(3):
        workers.append(vec._workers[kill % 2])
        workers[-1].process.kill()
        workers[-1].process.join()
        assert vec.step({"action": np.zeros(2, np.int32)})["is_first"][kill % 2]
    assert held() == before
    vec.close()
