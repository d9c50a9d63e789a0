"""The machine's clock jumps, back and forth, by years: nothing that a run keeps is lost or disordered."""

import itertools
import time

import pytest
from run_helpers import log, metrics, signal_at, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import checkpoint as checkpoints
from episodes import EpisodeWriter, list_episodes
from logger import Logger

YEAR = 365 * 24 * 3600


class Clock:
    """A wall clock that is ahead by the next of `jumps`, in seconds, at each call."""

    _real = staticmethod(time.time_ns)

    def __init__(self, *jumps: float):
        self._jumps = itertools.cycle(jumps)

    def time_ns(self) -> int:
        return self._real() + int(next(self._jumps) * 1e9)

    def time(self) -> float:
        return self.time_ns() / 1e9


@pytest.fixture
def set_clock(monkeypatch):
    """A function that sets the wall clock so many seconds ahead, in turns if there are several."""

    def set_to(*ahead: float) -> None:
        clock = Clock(*ahead)
        monkeypatch.setattr(time, "time", clock.time)
        monkeypatch.setattr(time, "time_ns", clock.time_ns)

    return set_to


def test_after_a_jump_the_last_checkpoint_is_resumed_and_the_newest_ones_are_kept(tmp_path, set_clock):
    options = ("--save_every", "20", "--eval_every", "0")
    with signal_at(61):
        assert train(tmp_path, *options) == 143
    set_clock(-5 * YEAR)
    with signal_at(101):
        assert train(tmp_path, *options) == 143
    set_clock(0)
    kept = [path.name for path in checkpoints.find_checkpoints(tmp_path)]
    assert kept == ["latest.pt", *(f"step-{step:012d}.pt" for step in (102, 100, 80))]
    for path in checkpoints.find_checkpoints(tmp_path)[:2]:
        path.write_bytes(b"broken")
    assert train(tmp_path, *options) == 0
    text = log(tmp_path)
    assert "Resumed at step 100" in text and "refilled" not in text and "is lost" not in text
    steps = [line["step"] for line in metrics(tmp_path)]
    assert steps == sorted(set(steps)) and steps[-1] == 120
    starts = [file.name for file in list_episodes(tmp_path / "train_eps")]
    known = checkpoints.load_checkpoint(tmp_path)[0]["replay"]["streams"]
    assert starts == sorted(starts) and all(name in starts for stream in known for name, *_ in stream[:-1])


@pytest.mark.parametrize("name", ["20991231T235959-0", "99999999T999999-0"])
def test_new_episodes_sort_after_those_that_are_there_whatever_made_them(tmp_path, name):
    (tmp_path / f"{name}-3.npz").touch()
    writer = EpisodeWriter(tmp_path, {}, 1)
    later = writer.new_name()
    assert (later > name) == (name < "9999") and later[:2] == ("21" if name < "9999" else "20")
    writer.close()


def test_tensorboard_reads_a_resumed_run_last_though_the_clock_was_set_back(tmp_path, set_clock):
    for ahead, resume, steps in ((0, None, (10, 20, 30)), (-YEAR, 10, (20, 25))):
        set_clock(ahead)
        logger = Logger(tmp_path, total_steps=100, fps=10, resume_step=resume, console=False)
        for step in steps:
            logger.set("value", step + ahead)
            logger.write(step)
        logger.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("value")] == [10, 20, 25]
