"""Envs in the actors of a real local Ray."""

import os
import signal
import sys

import numpy as np
import pytest
from run_helpers import differences, log, metrics, moment, signal_at, train, train_process
from test_parallel import assert_equal, assert_same_trajectories, factory, make_vec, run

import parallel
from basics import UserError

ray = pytest.importorskip("ray", reason="pip install -r requirements/ray.txt")
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_ray_before_and_after():
    assert not ray.is_initialized()
    yield
    ray.shutdown()


@pytest.fixture
def close():
    """Registers vecs to close before Ray ends."""
    made = []
    yield lambda vec: made.append(vec) or vec
    for vec in made:
        vec.close()


def make_ray(amount: int, task: str = "dummy_continuous", max_restarts: int = 0, address: str | None = None):
    return parallel.VecEnv(
        factory(task), amount, "ray", timeout=300, max_restarts=max_restarts, ray_address=address
    )


def test_actors_give_the_trajectories_of_the_main_process(close):
    there, here = close(make_ray(2)), make_vec(factory("dummy_continuous"), 2, "none")
    assert_same_trajectories(here, there, 40)
    state = there.state()
    current = run(there, 5)[-1]
    here.restore(there.state())
    assert_equal([current], [here._current()])
    there.restore(state)
    here.restore(state)
    assert_equal(run(here, 20, seed=1), run(there, 20, seed=1))


def test_more_envs_than_processors_get_their_actors(close):
    ray.init("local", num_cpus=1, include_dashboard=False, logging_level="error")
    vec = close(make_ray(3, "dummy_cue"))
    assert vec.reset()["is_first"].all() and len(run(vec, 3)) == 3


def test_killed_actor_is_restarted_and_the_others_continue(close, caplog):
    vec = close(make_ray(2, "dummy_cue", max_restarts=1))
    vec.reset()
    run(vec, 3)
    ray.kill(vec._workers[1]._actor)
    steps = run(vec, 20)
    assert [step["is_first"][1] for step in steps[:3]].count(True) == 1
    assert not any(step["is_first"][0] for step in steps[:13])
    assert "The Ray actor of environment 1 died. Its worker is restarted" in caplog.text
    assert [state["episode"] for state in vec.state()] == [1, 2]


def test_cluster_receives_this_code(close, tmp_path, monkeypatch):
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        monkeypatch.chdir(tmp_path)  # so that the code is not found in the working directory
        vec = close(make_ray(2, "dummy_cue", address=cluster.address))
        assert vec.reset()["is_first"].all()
        assert run(vec, 20)[-1]["image"].any()
        vec.close()
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.parametrize(
    "address, reason",
    [("127.0.0.1:1", "no Ray at 127.0.0.1:1.*ray start --head"), ("here", "must be host:port")],
)
def test_wrong_address_is_a_user_error(address, reason):
    with pytest.raises(UserError, match=reason):
        make_ray(1, address=address)


def test_run_with_ray_equals_run_without_and_resumes(tmp_path):
    assert train(tmp_path / "none") == 0
    with signal_at(71):
        assert train(tmp_path / "ray", "--envs.parallel", "ray") == 143
    assert train(tmp_path / "ray", "--envs.parallel", "ray") == 0
    assert differences(metrics(tmp_path / "ray"), metrics(tmp_path / "none")) == []
    different = differences(moment(tmp_path / "ray"), moment(tmp_path / "none"))
    # Ray draws from Python's global generator; LoRe does not.
    assert [line for line in different if not line.startswith("/rng/python/")] == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no such signal to a process")
def test_ctrl_c_stops_a_run_with_ray_cleanly(tmp_path):
    process = train_process(tmp_path, "--steps", "1e6", "--envs.parallel", "ray", start_new_session=True)
    with process:
        for line in process.stdout:
            if line.startswith("step 40"):
                os.killpg(process.pid, signal.SIGINT)  # as a terminal does: Ray's processes receive it too
        errors = process.stderr.read()
    assert process.returncode == 130, errors
    assert "Stopped by SIGINT" in log(tmp_path)
    assert np.isfinite(moment(tmp_path)["step"])
