"""VecEnv: same trajectories in all worker kinds, restarts of lost workers, nothing left after close."""

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
from gymnasium import spaces

import config as configs
import envs
import parallel
from basics import UserError
from envs import dummy, wrappers

ROOT = Path(__file__).parent.parent
KINDS = ["none", "process"]


def make_vec(make_env, amount: int, kind: str, timeout: float = 120, max_restarts: int = 0):
    return parallel.VecEnv(make_env, amount, kind, timeout=timeout, max_restarts=max_restarts)


def factory(task: str, **options):
    config = dict(configs.load([])) | {"size": [18, 18], "task": task} | options
    return partial(envs.make_env, types.SimpleNamespace(**config), "train")


def run(vec, steps: int, seed: int = 0) -> list[dict]:
    """Take random actions that depend only on the seed."""
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

    def make(*args, **options):
        made.append(make_vec(*args, **options))
        return made[-1]

    yield make
    for vec in made:
        vec.close()


# Environments that fail; workers import these functions.


class Failing(dummy.Dummy):
    """A dummy env that fails in its third step as `how` says, or in every reset except the first."""

    def __init__(self, how: str):
        super().__init__(size=(8, 8))
        self._how, self._resets, self._steps = how, 0, 0

    def reset(self, seed=None):
        self._resets += 1
        if self._how == "raises in reset" and self._resets > 1:
            raise ValueError("the sprocket is lost")
        return super().reset(seed)

    def step(self, action):
        self._steps += 1
        if self._steps == 3:
            self._fail()
        return super().step(action)

    def _fail(self) -> None:
        if self._how == "raises":
            raise ValueError("the sprocket is loose\nand fell off")
        if self._how == "exits":
            sys.exit("enough")
        if self._how == "user error":
            raise UserError("plug in the robot")
        if self._how == "dies":
            os._exit(7)
        if self._how == "hangs":
            hang()


def hang() -> None:
    time.sleep(60)


def make_failing(failures: list[str], index: int) -> wrappers.Episode:
    return wrappers.Episode(Failing(failures[index]), lambda episode: episode, "dummy_failing")


def make_failing_once(mark: Path, how: str, index: int) -> wrappers.Episode:
    """The first env with index 1 fails; its replacements do not."""
    if index == 1 and not mark.exists():
        mark.touch()
        return make_failing(["works", how], index)
    return make_failing(["works", "works"], index)


def make_broken_later(mark: Path, index: int) -> wrappers.Episode:
    """The first env dies, and no other can be made after it."""
    if mark.exists():
        raise ValueError("the robot does not boot")
    mark.touch()
    return make_failing(["dies"], index)


def make_other_spaces(index: int) -> wrappers.Episode:
    return wrappers.Episode(dummy.Dummy(size=(8 + index, 8)), lambda episode: episode, "dummy_other")


@pytest.fixture(scope="module")
def continuous():
    """A vec of the same envs for each kind, shared since workers start slowly."""
    vecs = {kind: make_vec(factory("dummy_continuous"), 2, kind) for kind in KINDS}
    yield vecs
    for vec in vecs.values():
        vec.close()


def assert_same_trajectories(one, other, steps: int) -> None:
    assert one.obs_space == other.obs_space and one.act_space == other.act_space
    assert_equal([one.reset(0)], [other.reset(0)])
    assert_equal(run(one, steps), run(other, steps))
    for left, right in zip(one.state(), other.state(), strict=True):
        assert left["episode"] == right["episode"]
        assert_equal([left["actions"]], [right["actions"]])


def test_worker_processes_give_the_trajectories_of_the_main_process(continuous):
    assert_same_trajectories(continuous["none"], continuous["process"], 40)


@pytest.mark.parametrize("kind", KINDS)
def test_restored_envs_continue_like_the_originals(vecs, continuous, kind):
    vec, other = continuous[kind], vecs(factory("dummy_continuous"), 2, "none")
    vec.reset()
    current, state = run(vec, 20)[-1], vec.state()
    assert_equal([current], [other.restore(state)])
    after = run(vec, 20, seed=1)
    assert_equal(after, run(other, 20, seed=1))
    assert_equal([current], [vec.restore(state)])
    assert_equal(after, run(vec, 20, seed=1))


def test_env_restored_at_the_end_of_its_episode_resets_next(vecs):
    vec, other = vecs(factory("dummy_cue"), 2, "none"), vecs(factory("dummy_cue"), 2, "none")
    vec.reset()
    assert run(vec, 16)[-1]["is_last"].all()
    assert other.restore(vec.state())["is_last"].all()
    assert_equal(run(vec, 1), run(other, 1))


@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.parametrize("kind", KINDS)
def test_observations_are_copies(continuous, kind):
    vec = continuous[kind]
    kept = vec.reset()
    image = kept["image"].copy()
    run(vec, 5)
    np.testing.assert_array_equal(kept["image"], image)


def pids_of(vec) -> list[int]:
    return [worker.process.pid for worker in vec._workers]


# ---- Faults


@pytest.mark.parametrize("how", ["raises", "exits", "hangs", "dies"])
def test_lost_worker_is_restarted_and_the_others_continue(vecs, tmp_path, caplog, capfd, how):
    vec = vecs(partial(make_failing_once, tmp_path / "mark", how), 2, "process", max_restarts=1)
    if how == "hangs":
        vec._workers[1].timeout = 5  # from here on: a start may take longer on a busy machine
    well = vecs(partial(make_failing, ["works", "works"]), 2, "none")
    assert_equal([vec.reset()], [well.reset()])
    steps, expected = run(vec, 20), run(well, 20)
    assert_equal([{k: v[:1] for k, v in step.items()} for step in steps],
                 [{k: v[:1] for k, v in step.items()} for step in expected])  # fmt: skip
    assert_equal(steps[:2], expected[:2])
    # The third step was lost; the next episode starts there, with its own seed.
    assert [step["is_first"][1] for step in steps[:4]] == [False, False, True, False]
    assert steps[2]["reward"][1] == 0 and not steps[2]["is_last"][1]
    fresh = well.reset(1)
    assert_equal([{k: v[1] for k, v in steps[2].items()}], [{k: v[1] for k, v in fresh.items()}])
    # That episode is complete, and the one after it has the next number.
    assert [index for index, step in enumerate(steps) if step["is_last"][1]] == [2 + 16]
    assert [state["episode"] for state in vec.state()] == [1, 2]
    assert "Its worker is restarted (number 1; envs.max_restarts allows 1 restarts" in caplog.text
    reason = {"exits": "SystemExit: enough", "dies": "exit code 7", "hangs": "no answer for 5 seconds"}
    assert reason.get(how, "ValueError: the sprocket is loose") in caplog.text
    if how in ("raises", "exits"):
        assert "Traceback" in caplog.text and "in step" in caplog.text
    if how == "hangs" and os.name != "nt":
        assert "in hang" in capfd.readouterr().err


def test_worker_that_fails_in_reset_gets_another_episode(vecs):
    vec = vecs(partial(make_failing, ["works", "raises in reset"]), 2, "process", max_restarts=1)
    assert vec.reset()["is_first"].all()
    assert run(vec, 17)[-1]["is_first"].all()
    assert [state["episode"] for state in vec.state()] == [1, 2]  # number 1 was lost


@pytest.mark.skipif(os.name == "nt", reason="no such signal")
def test_worker_that_is_killed_between_steps_is_restarted(vecs, caplog):
    vec = vecs(factory("dummy_cue"), 2, "process", max_restarts=3)
    vec.reset()
    run(vec, 3)
    kill(vec, 0)
    assert vec.state() is None  # its open episode is lost
    obs = run(vec, 1)[0]
    assert obs["is_first"].tolist() == [True, False]
    assert "worker process of environment 0 died (killed by SIGKILL)" in caplog.text
    assert [state["episode"] for state in vec.state()] == [1, 0]
    kill(vec, 0)
    kill(vec, 1)
    assert run(vec, 1)[0]["is_first"].all()
    assert len(run(vec, 20)) == 20


def kill(vec, index: int) -> None:
    process = vec._workers[index].process
    os.kill(process.pid, signal.SIGKILL)
    process.join()


@pytest.mark.parametrize("kind", KINDS)
def test_without_restarts_an_error_in_an_env_is_a_user_error(vecs, kind, caplog):
    vec = vecs(partial(make_failing, ["works", "raises"]), 2, kind)
    vec.reset()
    with pytest.raises(
        UserError, match="^Environment 1 failed in step: ValueError: the sprocket is loose"
    ) as e:
        run(vec, 3)
    assert "\n" not in str(e.value)
    for hint in ("envs.max_restarts allows 0 restarts", "--envs.parallel none"):
        assert (hint in str(e.value)) == (kind != "none")
    assert caplog.text.count("Traceback") == 1 and "in step" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_user_error_of_an_env_is_raised_unchanged_without_restart(vecs, kind):
    vec = vecs(partial(make_failing, ["user error"]), 1, kind, max_restarts=5)
    vec.reset()
    with pytest.raises(UserError, match="^plug in the robot$"):
        run(vec, 3)


def test_too_many_restarts_within_the_window_are_an_error_that_closes_all(vecs, monkeypatch):
    vec = vecs(partial(make_failing, ["works", "dies"]), 2, "process", max_restarts=1)
    vec.reset()
    name, pids = vec._block.name, pids_of(vec)
    with pytest.raises(
        UserError, match=r"1 died \(exit code 7\).*allows 1 restarts in 10 minutes: the run s"
    ):
        run(vec, 40)
    assert_gone(name, pids)
    monkeypatch.setattr(parallel, "RESTART_WINDOW", 0)
    vec = vecs(partial(make_failing, ["works", "raises"]), 2, "process", max_restarts=1)
    vec.reset()
    run(vec, 8)


def test_failed_restarts_count(vecs, tmp_path, caplog):
    vec = vecs(partial(make_broken_later, tmp_path / "mark"), 1, "process", max_restarts=2)
    vec.reset()
    with pytest.raises(UserError, match="failed in start: ValueError: the robot does not boot.*allows 2"):
        run(vec, 3)
    assert caplog.text.count("Its worker is restarted") == 2


def test_env_that_cannot_be_made_is_not_retried(tmp_path, caplog):
    (tmp_path / "mark").touch()
    with pytest.raises(UserError, match="failed in start: ValueError: the robot does not boot"):
        make_vec(partial(make_broken_later, tmp_path / "mark"), 1, "process", max_restarts=5)
    assert "restarted" not in caplog.text


WORKER_IMPORTS = """
import sys
from functools import partial

import dreamer
import config
import envs
import parallel
from envs import dummy, wrappers


if __name__ == "__main__":
    import test_parallel

    options = config.load(["--task", "dummy_cue"])
    make = partial(test_parallel.make_reporting, options)
    vec = test_parallel.make_vec(make, 1, "process")
    print("torch" in sys.modules, vec.obs_space["image"].low.max())
"""


def make_reporting(options, index: int) -> wrappers.Episode:
    """An env whose space shows whether its process has imported torch."""
    env = envs.make_env(options, "train", index)
    env.obs_space = env.obs_space | {
        "image": spaces.Box(int("torch" in sys.modules), 255, (64, 64, 3), np.uint8)
    }
    return env


def test_worker_processes_import_neither_torch_nor_the_main_program(tmp_path):
    done = run_script(tmp_path, WORKER_IMPORTS)
    assert done.stdout.split() == ["True", "0"], done.stderr


def run_script(folder: Path, source: str) -> subprocess.CompletedProcess:
    script = folder / "script.py"
    script.write_text(source)
    return subprocess.run(
        [sys.executable, script], env=environ(), capture_output=True, text=True, timeout=300
    )


def environ() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}


# ---- The end


def test_envs_with_different_spaces_are_refused():
    with pytest.raises(UserError, match="Environment 1 has other spaces"):
        make_vec(make_other_spaces, 2, "none")


def test_close_ends_processes_and_frees_shared_memory(vecs):
    vec = vecs(factory("dummy_cue"), 1, "process")
    vec.reset()
    name, pids = vec._block.name, pids_of(vec)
    assert exists(name) and all(map(alive, pids))
    vec.close()
    assert_gone(name, pids)
    vec.close()


INTERRUPTED = """
import signal
from test_parallel import factory, make_vec, pids_of, run

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    vec = make_vec(factory("dummy_cue"), 1, "process")
    vec.reset()
    print(vec._block.name, *pids_of(vec), flush=True)
    while True:
        run(vec, 1)
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of process groups are POSIX")
@pytest.mark.parametrize("stop", ["SIGINT", "SIGKILL"])
def test_stopped_program_leaves_no_processes_or_memory(stop, tmp_path):
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    process = subprocess.Popen(
        [sys.executable, script], env=environ(), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    name, *pids = process.stdout.readline().split()
    stop = signal.Signals[stop]
    if stop == signal.SIGINT:
        os.killpg(process.pid, stop)  # as a terminal does: workers receive it too
    else:
        os.kill(process.pid, stop)
    try:
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == -stop
    assert errors.count("Traceback") == (stop == signal.SIGINT), errors
    assert_gone(name, [int(pid) for pid in pids])


def assert_gone(memory: str, pids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (any(map(alive, pids)) or exists(memory)):
        time.sleep(0.05)
    assert not any(map(alive, pids))
    assert not exists(memory)


def alive(pid: int) -> bool:
    if os.name == "nt":  # os.kill would end the process; close has waited for it
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")  # without init, an ended orphan stays a zombie
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


def exists(memory: str) -> bool:
    try:
        found = SharedMemory(name=memory)
    except FileNotFoundError:
        return False
    found.close()
    return True
