"""Runs whose environment fails late, after the first steps, which the adapter checks closely.

Nothing in the last checkpoint is lost. The run continues with a new worker, or ends with a one-line error.
"""

import os

import late_faults
import numpy as np
import pytest
import torch
from run_helpers import log, train, train_process

import checkpoint as checkpoints
import parallel
from episodes import list_episodes

STEPS = 2 * late_faults.STEPS + 20  # in total: each env fails before the end
# Random steps are fast, so there are many of them.
TASK = (
    "--task custom_late_faults:LateFaults --eval_every 0 --train_ratio 0.5 --prefill 400 --log_every 200"
).split()
slow = pytest.mark.slow


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """A function that makes the environment fail once."""
    path = os.pathsep.join(filter(None, [os.path.dirname(__file__), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)  # for processes
    return lambda fault: monkeypatch.setenv(late_faults.VARIABLE, f"{fault}:{tmp_path / 'mark'}")


def run(logdir, *options):
    return train(logdir, *TASK, "--steps", str(STEPS), *options)


def is_sound(logdir) -> dict:
    """The last checkpoint, whose counters, replay and weights agree."""
    state = checkpoints.load_checkpoint(logdir)[0]
    streams = state["replay"]["streams"]
    stored = sum(end - start for stream in streams for _, start, end in stream)
    assert (
        stored == state["progress"]["transitions"] + state["progress"]["episodes"]
        and state["step"] == state["progress"]["transitions"]
    )
    opened = set(state["replay"]["open"].values())
    known = {f"{name}-{end - start}.npz" for s in streams for name, start, end in s if name not in opened}
    assert known == {file.path.name for file in list_episodes(logdir / "train_eps")}
    for name in known:
        with np.load(logdir / "train_eps" / name) as rows:
            assert all(np.isfinite(rows[key]).all() for key in ("reward", "vector"))
    for part in ("world_model", "behavior", "explorer"):
        assert all(torch.isfinite(value).all() for value in state["agent"][part].values())
    return state


@pytest.fixture
def impatient(monkeypatch):
    """A worker counts as hanging after 10 seconds, except at its start, which is slow on a busy machine."""

    def bind(worker, block, original=parallel.ProcessWorker.bind):
        original(worker, block)
        worker.timeout = 10

    monkeypatch.setattr(parallel.ProcessWorker, "bind", bind)


@pytest.mark.parametrize(
    "fault, reason",
    [
        ("raises", "Environment {} failed in step: RuntimeError: the gripper is stuck. Its worker"),
        pytest.param(
            "dies", "The worker process of environment {} died (exit code 7). Its worker", marks=slow
        ),
        pytest.param(
            "hangs", "Environment {} gave no answer for 10 seconds; it hangs. Its worker", marks=slow
        ),
    ],
)
def test_run_continues_with_a_new_worker(tmp_path, plant, impatient, fault, reason):
    plant(fault)
    assert run(tmp_path, "--envs.parallel", "process") == 0
    text = log(tmp_path)
    assert any(reason.format(env) in text for env in (0, 1)), text
    assert text.count("is restarted (number 1;") == 1 and text.count("is restarted") == 1
    state = is_sound(tmp_path)
    # Each env has its episodes of 16 steps, and one more: the one that the fault cut.
    episodes = sum(env["episode"] + 1 for env in state["actor"]["envs"])
    assert state["step"] >= STEPS and state["progress"]["episodes"] == episodes


@pytest.mark.parametrize(
    "kind, fault, key, expected",
    [
        ("none", "reward huge", "'reward'", "a finite number, got 1e+39"),
        ("none", "vector nan", "'vector'", "finite values, got NaN or infinity"),
        pytest.param("none", "log_health lacks", "'log_health'", "the key, got no such key", marks=slow),
        pytest.param("process", "vector shape", "'vector'", "float32 (4,), got float32 (3,)", marks=slow),
    ],
)
def test_run_ends_with_one_line_and_resumes_when_the_env_is_fixed(
    tmp_path, plant, capfd, kind, fault, key, expected
):
    plant(fault)
    capfd.readouterr()
    assert run(tmp_path, "--envs.parallel", kind) == 2
    errors = capfd.readouterr().err
    assert errors.startswith("error: Environment ") and len(errors.splitlines()) == 1, errors
    assert f"{key}: expected {expected}" in errors and "(custom_late_faults:LateFaults, train)" in errors
    assert "python3 -m envs.check" in errors
    stopped = is_sound(tmp_path)
    # One env may have been a step ahead; the steps of both are there.
    assert 2 * (late_faults.STEPS - 1) - 40 < stopped["step"] < STEPS
    before = set(os.listdir(tmp_path / "train_eps"))
    assert run(tmp_path) == 0  # it fails once
    assert before < set(os.listdir(tmp_path / "train_eps")) and not (tmp_path / "train_eps/newer").exists()
    assert is_sound(tmp_path)["step"] >= STEPS
    assert "The open episodes end here" in log(tmp_path) and "refilled from episode files" not in log(
        tmp_path
    )


@slow
def test_env_that_ends_the_program_loses_only_steps_after_the_last_checkpoint(tmp_path, plant):
    plant("dies")
    options = (*TASK, "--steps", str(STEPS), "--save_every", "100")
    process = train_process(tmp_path, *options)
    assert process.communicate()[1] == "" and process.returncode == 7
    assert checkpoints.load_checkpoint(tmp_path)[0]["step"] == 400
    assert run(tmp_path) == 0
    assert "Resumed at step 400" in log(tmp_path)
    assert is_sound(tmp_path)["step"] >= STEPS


def test_env_that_raises_in_the_main_process_ends_the_run_after_a_save(tmp_path, plant, capfd):
    plant("raises")
    capfd.readouterr()
    assert run(tmp_path) == 2
    errors = capfd.readouterr().err
    assert len(errors.splitlines()) == 1 and "failed in step: RuntimeError: the gripper is stuck." in errors
    assert "Traceback" in log(tmp_path) and "in fail" in log(tmp_path)  # shows where the mistake is
    assert is_sound(tmp_path)["step"] > 2 * (late_faults.STEPS - 1) - 40
    assert run(tmp_path) == 0


@slow
def test_failing_env_of_another_learner_ends_the_run_with_one_line(tmp_path, plant):
    plant("raises")
    learners = ("--parallel", "2", "--train_ratio", "4", "--steps", str(STEPS))
    process = train_process(tmp_path, *TASK, *learners)
    errors = process.communicate()[1]
    assert process.returncode == 2 and errors.count("error: ") == 1
    assert "Environment 0 failed in step: RuntimeError: the gripper is stuck." in errors


@slow
def test_fault_in_an_evaluation_ends_the_run_after_a_save_and_it_is_repeated(tmp_path, plant, capfd):
    (tmp_path / "mark").touch()  # not yet
    plant("vector nan")
    assert train(tmp_path, *TASK, "--steps", "100", "--eval_every", "0") == 0
    steps = late_faults.STEPS // 16
    options = (*TASK, "--steps", "140", "--eval_every", "120", "--eval_episodes", str(2 * steps))
    (tmp_path / "mark").unlink()
    capfd.readouterr()
    assert train(tmp_path, *options) == 2
    errors = capfd.readouterr().err
    assert len(errors.splitlines()) == 1 and "(custom_late_faults:LateFaults, eval)" in errors
    assert is_sound(tmp_path)["step"] == 120 and not (tmp_path / "eval_eps").exists()
    assert train(tmp_path, *options) == 0
    assert len(list_episodes(tmp_path / "eval_eps")) == 2 * steps
    assert is_sound(tmp_path)["evaluation"] == {"count": 1}
