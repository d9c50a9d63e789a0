"""A run that is killed again and again, at any moment: what the last checkpoint knows is never lost."""

import random
import signal
import sys
import time

import numpy as np
import pytest
from killing import check_agreement, lines_of, start
from run_helpers import TINY, log, metrics

from episodes import list_episodes, read_episode

posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no such signal to a process")
KILLS = 20
OPTIONS = [*TINY, "--log_every", "10", "--save_every", "10", "--eval_every", "40"]


@posix
@pytest.mark.slow
def test_run_that_is_killed_twenty_times_loses_nothing_that_was_saved(tmp_path):
    rng = random.Random(7)
    saved, endless = 0, [*OPTIONS, "--logdir", str(tmp_path), "--steps", "1e6"]
    for kill in range(KILLS):
        if kill % 2:  # in the middle of a start, or of a checkpoint that is written
            process = start(endless, die_at=rng.randrange(1, 80))
        else:
            process = start(endless)
            # A start logs about five lines; then every ten steps log two, one of them for the checkpoint.
            lines = 15 if kill == 0 else lines_of(tmp_path / "train.log") + rng.randrange(15)
            while process.is_alive() and lines_of(tmp_path / "train.log") < lines:
                time.sleep(0.002)
            time.sleep(rng.random() / 20)
            process.kill()
        process.join(600)
        assert process.exitcode == -signal.SIGKILL
        step = check_agreement(tmp_path)["step"]
        assert step >= saved
        saved = step
    assert saved > 100
    process = start([*OPTIONS, "--logdir", str(tmp_path), "--steps", str(saved + 60)])
    process.join(600)
    assert process.exitcode == 0
    assert check_agreement(tmp_path)["step"] == saved + 60
    text = log(tmp_path)
    for failure in ("refilled", "is lost", "skipped", "Traceback"):
        assert failure not in text
    assert [line["step"] for line in metrics(tmp_path)] == list(range(10, saved + 61, 10))
    assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "run.lock").exists()
    layout = {"is_first": ((), np.dtype(bool)), "reward": ((), np.dtype(np.float32))}
    for file in list_episodes(tmp_path / "train_eps"):
        read_episode(file.path, layout, file.length)
