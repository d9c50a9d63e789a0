"""Runs whose env workers are killed or hang: no finished step is lost, and training continues."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from run_helpers import ROOT, assert_same_run, log, signal_at, train
from test_parallel import make_failing_once, make_vec

import checkpoint as checkpoints
import config
from envs import make_env
from episodes import list_episodes, read_episode, step_layout
from evaluation import play_episodes

linux = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
COMMAND = (
    "dreamer.py --configs crafter debug --device cpu --envs.amount 2 --envs.parallel process --steps 400 "
    "--eval_every 0 --log_every 10 --train_ratio 4"
).split()


def start(logdir: Path, *options: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *COMMAND, "--logdir", str(logdir), *options],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def workers_of(process: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def run_and_signal(logdir: Path, signum: int, *options: str, at: str = "step 150") -> tuple[int, str]:
    """Run the command and signal the second env's worker at a step; returns exit code and stderr."""
    with start(logdir, *options) as process:
        for line in process.stdout:
            if line.startswith(at):
                os.kill(workers_of(process)[1], signum)
        errors = process.stderr.read()
    return process.returncode, errors


def steps_of(logdir: Path) -> list[dict[str, np.ndarray]]:
    """The episodes of a run, key -> [L, ...]: first the files, then the checkpoint's open ones."""
    state = checkpoints.load_checkpoint(logdir)[0]
    options = config.Config.load_saved(logdir / "config.yaml")
    env = make_env(options, "train", 0)
    layout = step_layout(env.obs_space | env.act_space)
    files = [read_episode(file.path, layout, file.length) for file in list_episodes(logdir / "train_eps")]
    opened = (logdir / "replay_state").glob(f"*{state['step']}/{state['replay']['moment']}/open-*.npz")
    return files + [dict(np.load(path)) for path in opened]


@linux
@pytest.mark.parametrize(
    "signum, reason",
    [
        (signal.SIGKILL, r"worker process of environment 1 died (killed by SIGKILL)"),
        # The new worker's start has the same timeout, and takes seconds on a busy machine.
        pytest.param(signal.SIGSTOP, "1 gave no answer for 30 seconds; it hangs", marks=pytest.mark.slow),
    ],
)
def test_killing_a_worker_in_a_real_run_loses_no_finished_step(tmp_path, signum, reason):
    code, errors = run_and_signal(tmp_path, signum, "--envs.timeout", "30")
    assert (code, errors) == (0, "")
    text = log(tmp_path)
    assert text.count("restarted") == 1 and reason in text
    state = checkpoints.load_checkpoint(tmp_path)[0]
    episodes = steps_of(tmp_path)
    assert state["step"] == state["progress"]["transitions"] >= 400
    stored = sum(len(rows["is_first"]) for rows in episodes)
    assert stored == state["progress"]["transitions"] + state["progress"]["episodes"]
    assert len(episodes) == state["progress"]["episodes"]
    cut = [rows for rows in episodes[:-2] if len(rows["is_first"]) < 61 and not rows["is_terminal"][-1]]
    assert len(cut) <= 1  # none if it was killed between two episodes
    assert all(rows["is_last"][-1] and not rows["is_last"][:-1].any() for rows in episodes[:-2])
    # Each is one complete piece of a different episode of the env, up to its last step.
    origins = [origin(tmp_path, rows) for rows in episodes]
    assert len(set(origins)) == len(origins)


def origin(logdir: Path, rows: dict[str, np.ndarray]) -> tuple[int, int]:
    """(env index, episode number) that give exactly these steps."""
    options = config.Config.load_saved(logdir / "config.yaml")
    for index in (0, 1):
        env = make_env(options, "train", index)
        for number in range(12):
            if not np.array_equal(env.reset(number)[0]["image"], rows["image"][0]):
                continue
            for t, action in enumerate(rows["action"][:-1], 1):
                obs = env.step({"action": action})[0]
                assert np.array_equal(obs["image"], rows["image"][t]) and obs["reward"] == rows["reward"][t]
            return index, number
    raise AssertionError("no env begins an episode like this")


@linux
@pytest.mark.slow
def test_too_many_restarts_stop_the_run_after_a_save(tmp_path):
    code, errors = run_and_signal(tmp_path, signal.SIGKILL, "--envs.max_restarts", "0")
    assert code == 2
    assert errors.count("\n") == 1 and errors.startswith("error: The worker process of environment 1 died")
    assert "envs.max_restarts allows 0 restarts in 10 minutes: the run stops" in errors
    stopped = checkpoints.load_checkpoint(tmp_path)[0]
    assert stopped["step"] >= 150 and "Saved" in log(tmp_path)
    with start(tmp_path) as process:
        assert process.wait(300) == 0
    assert f"Resumed at step {stopped['step']}" in log(tmp_path)
    origins = [origin(tmp_path, rows) for rows in steps_of(tmp_path)]
    assert len(set(origins)) == len(origins)


def test_resumed_run_with_workers_equals_uninterrupted_run_without(tmp_path):
    assert train(tmp_path / "none") == 0
    with signal_at(71):
        assert train(tmp_path / "process", "--envs.parallel", "process") == 143
    assert train(tmp_path / "process", "--envs.parallel", "process") == 0
    assert_same_run(tmp_path / "process", tmp_path / "none")


class Still:
    """An agent that always takes the same action."""

    def initial_state(self, envs: int) -> int:
        return envs

    def act(self, obs, envs: int, _):
        return {"action": np.zeros(envs, np.int32)}, envs, {}


def test_evaluation_episode_cut_by_a_fault_does_not_count(tmp_path):
    vec = make_vec(partial(make_failing_once, tmp_path / "mark", "raises"), 2, "process", max_restarts=1)
    done = list(play_episodes(Still(), vec, 2, None))
    vec.close()
    assert len(done) == 4
    for episode in done:
        assert episode.steps["is_first"].tolist() == [True] + [False] * 16 and episode.length == 16
