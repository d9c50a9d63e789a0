"""VecEnv: the same trajectories in one process and in many, clear errors, nothing left behind."""

import os
import signal
import subprocess
import sys
import time
import types
from functools import partial
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import numpy as np
import pytest

import config as configs
import envs
import parallel
from envs import dummy, wrappers
from parallel import make_vec
from tools import UserError

ROOT = Path(__file__).parent.parent


def factory(task: str, **options):
    config = dict(configs.load([])) | {"size": [18, 18], "task": task} | options
    return partial(envs.make_env, types.SimpleNamespace(**config), "train")


def run(vec, steps: int, seed: int = 0) -> list[dict]:
    """Do random actions that depend on the seed only."""
    rng = np.random.default_rng(seed)
    trajectory = []
    for _ in range(steps):
        action = {}
        for key, space in vec.act_space.items():
            shape = (len(vec), *space.shape)
            discrete = space.dtype.kind == "i"
            action[key] = rng.integers(space.n, size=shape) if discrete else rng.uniform(-1, 1, shape)
        trajectory.append(vec.step(action))
    return trajectory


def assert_equal(lhs: list[dict], rhs: list[dict]) -> None:
    for step, (left, right) in enumerate(zip(lhs, rhs, strict=True)):
        assert left.keys() == right.keys()
        for key in left:
            assert left[key].dtype == right[key].dtype
            np.testing.assert_array_equal(left[key], right[key], err_msg=f"{key} at step {step}")


@pytest.fixture
def vecs():
    """Makes VecEnvs that are closed after the test."""
    made = []

    def make(*args):
        made.append(make_vec(*args))
        return made[-1]

    yield make
    for vec in made:
        vec.close()


# A worker that fails; the functions are imported by the workers.


class Failing(dummy.Dummy):
    """A dummy env whose step does what `how` says."""

    def __init__(self, how: str):
        super().__init__(size=(8, 8))
        self._how = how

    def step(self, action):
        if self._how == "raises":
            raise ValueError("the sprocket is loose")
        if self._how == "user error":
            raise UserError("plug in the robot")
        if self._how == "dies":
            os._exit(7)
        if self._how == "hangs":
            time.sleep(1000)
        return super().step(action)


def make_failing(failures: list[str], index: int) -> wrappers.Episode:
    return wrappers.Episode(Failing(failures[index]), lambda episode: episode, "dummy_failing")


def make_other_spaces(index: int) -> wrappers.Episode:
    return wrappers.Episode(dummy.Dummy(size=(8 + index, 8)), lambda episode: episode, "dummy_other")


@pytest.fixture(scope="module")
def continuous():
    """{"none": vec, "process": vec} of the same envs, shared: workers start slowly."""
    vecs = {kind: make_vec(factory("dummy_continuous"), 2, kind) for kind in ("none", "process")}
    yield vecs
    for vec in vecs.values():
        vec.close()


def assert_same_trajectories(serial, process, steps: int) -> None:
    assert serial.obs_space == process.obs_space and serial.act_space == process.act_space
    assert_equal([serial.reset()], [process.reset()])
    assert_equal(run(serial, steps), run(process, steps))
    for left, right in zip(serial.state(), process.state(), strict=True):
        assert left["episode"] == right["episode"]
        assert_equal([left["actions"]], [right["actions"]])


def test_processes_give_the_trajectories_of_the_main_process(continuous):
    assert_same_trajectories(continuous["none"], continuous["process"], 40)


def test_processes_give_the_trajectories_of_the_main_process_in_crafter(vecs):
    serial, process = (vecs(factory("crafter_reward"), 2, kind) for kind in ("none", "process"))
    assert_same_trajectories(serial, process, 60)


@pytest.mark.parametrize("kind", ["none", "process"])
def test_restored_envs_continue_as_the_originals(vecs, continuous, kind):
    vec, other = continuous[kind], vecs(factory("dummy_continuous"), 2, "none")
    vec.reset()
    current = run(vec, 20)[-1]
    assert_equal([current], [other.restore(vec.state())])
    assert_equal(run(vec, 20, seed=1), run(other, 20, seed=1))


@pytest.mark.parametrize("kind", ["none", "process"])
def test_envs_go_back_to_a_state(continuous, kind):
    vec = continuous[kind]
    vec.reset()
    current, state = run(vec, 5)[-1], vec.state()
    after = run(vec, 20, seed=1)
    assert_equal([current], [vec.restore(state)])
    assert_equal(after, run(vec, 20, seed=1))


def test_an_env_restored_at_the_end_of_its_episode_resets_next(vecs):
    vec, other = vecs(factory("dummy_cue"), 2, "none"), vecs(factory("dummy_cue"), 2, "none")
    vec.reset()
    assert run(vec, 16)[-1]["is_last"].all()
    assert other.restore(vec.state())["is_last"].all()
    assert_equal(run(vec, 1), run(other, 1))


@pytest.mark.parametrize("kind", ["none", "process"])
def test_the_step_after_the_last_one_resets_and_ignores_the_action(continuous, kind):
    vec = continuous[kind]
    assert vec.reset(episode=3)["is_first"].all()
    steps = run(vec, 16 + 1 + 16)
    ends = [15, 32]  # 16 steps, one that resets, 16 steps
    assert [index for index, step in enumerate(steps) if step["is_last"].all()] == ends
    assert [index for index, step in enumerate(steps) if step["is_first"].any()] == [16]
    assert not steps[16]["reward"].any()
    for state in vec.state():
        assert state["episode"] == 4
        assert state["actions"]["action"].shape == (16, 2)


@pytest.mark.parametrize("kind", ["none", "process"])
def test_observations_are_the_callers_to_keep(continuous, kind):
    vec = continuous[kind]
    kept = vec.reset()
    image = kept["image"].copy()
    run(vec, 5)
    np.testing.assert_array_equal(kept["image"], image)


@pytest.mark.skipif(os.name == "nt", reason="there, the signal ends a process without asking it")
def test_workers_leave_stop_signals_to_the_main_process(continuous):
    vec = continuous["process"]
    vec.reset()
    for process in vec._processes:
        os.kill(process.pid, signal.SIGINT)
        os.kill(process.pid, signal.SIGTERM)
    run(vec, 5)


@pytest.mark.parametrize("kind", ["none", "process"])
def test_an_error_in_an_env_is_a_user_error_and_its_traceback_is_logged(vecs, kind, caplog):
    vec = vecs(partial(make_failing, ["works", "raises"]), 2, kind)
    vec.reset()
    with pytest.raises(UserError, match="Environment 1 failed in step: ValueError: the sprocket is loose"):
        run(vec, 1)
    assert "Traceback" in caplog.text and "in step" in caplog.text


def test_user_errors_of_a_worker_pass_as_they_are(vecs):
    vec = vecs(partial(make_failing, ["user error"]), 1, "process")
    vec.reset()
    with pytest.raises(UserError, match="^plug in the robot$"):
        run(vec, 1)


def test_a_dead_worker_is_named_and_the_rest_is_cleaned_up(vecs):
    vec = vecs(partial(make_failing, ["works", "dies"]), 2, "process")
    vec.reset()
    name, pids = vec._memory.name, [process.pid for process in vec._processes]
    with pytest.raises(UserError, match=r"environment 1 died \(exit code 7\)"):
        run(vec, 1)
    assert_gone(name, pids)


def test_a_hanging_worker_is_named_and_killed(vecs, monkeypatch):
    vec = vecs(partial(make_failing, ["hangs"]), 1, "process")
    vec.reset()
    name, pids = vec._memory.name, [process.pid for process in vec._processes]
    monkeypatch.setattr(parallel, "TIMEOUT", 0.5)
    monkeypatch.setattr(parallel, "CLOSE_TIMEOUT", 0.5)
    with pytest.raises(UserError, match="Environment 0 gave no answer"):
        run(vec, 1)
    assert_gone(name, pids)


def test_envs_with_different_spaces_are_refused():
    with pytest.raises(UserError, match="Environment 1 has other spaces"):
        make_vec(make_other_spaces, 2, "none")


def test_close_leaves_nothing_behind(vecs):
    vec = vecs(factory("dummy_cue"), 1, "process")
    vec.reset()
    name, pids = vec._memory.name, [process.pid for process in vec._processes]
    assert exists(name) and all(map(alive, pids))
    vec.close()
    assert_gone(name, pids)
    vec.close()


INTERRUPTED = """
from test_parallel import factory, run
from parallel import make_vec

if __name__ == "__main__":
    vec = make_vec(factory("dummy_cue"), 1, "process")
    vec.reset()
    print(vec._memory.name, *[process.pid for process in vec._processes], flush=True)
    while True:
        run(vec, 1)
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of process groups are POSIX")
@pytest.mark.parametrize("stop", ["SIGINT", "SIGKILL"])
def test_nothing_is_left_behind_when_the_program_is_stopped(stop, tmp_path):
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    process = subprocess.Popen(
        [sys.executable, script], env=environ, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    name, *pids = process.stdout.readline().split()
    stop = signal.Signals[stop]
    if stop == signal.SIGINT:
        os.killpg(process.pid, stop)  # as a terminal does: the workers get it as well
    else:
        os.kill(process.pid, stop)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -stop
    assert errors.count("Traceback") == (stop == signal.SIGINT), errors
    assert_gone(name, [int(pid) for pid in pids])


def assert_gone(memory: str, pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and (any(map(alive, pids)) or exists(memory)):
        time.sleep(0.05)
    assert not any(map(alive, pids))
    assert not exists(memory)


def alive(pid: int) -> bool:
    if os.name == "nt":  # kill would end the process there; its handle was waited for by close
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")  # without an init, an orphan that ended stays as a zombie
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


def exists(memory: str) -> bool:
    try:
        found = SharedMemory(name=memory)
    except FileNotFoundError:
        return False
    found.close()
    return True
