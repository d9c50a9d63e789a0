"""The program on a disk that fills up: one line, exit code 2, and with more room the run resumes."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from llm_servers import FakeLLM
from run_helpers import assert_same_run, log, metrics, signal_at, train, train_process
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import checkpoint as checkpoints
import evaluation
from episodes import EpisodeWriter
from evaluation import Evaluation
from logger import EventFile, Logger
from lore_llm.hooks import AdviceHooks
from replay import Replay

slow = pytest.mark.slow
PAGE = 4096  # what is in one already finds room on a full tmpfs
BALLAST = "ballast"
# Where the disk is full: who writes, and what the error names.
WRITES = {
    "episode": (EpisodeWriter, "_write", r"train_eps/\d{8}T.*\.npz"),
    "checkpoint": (checkpoints, "save_tensors", r"checkpoints/step-\d+\.pt"),
    "the replay's state": (Replay, "save", r"replay_state/step-\d+/.*\.npz"),
    "metrics": (Logger, "write", r"metrics\.jsonl"),
    "TensorBoard": (EventFile, "add", r"events\.out\.tfevents\.\d+"),
    "log": (Logger, "print", r"train\.log"),
    "evaluation": (Evaluation, "_write_episodes", r"eval_eps/.*\.npz"),
    "video": (evaluation, "write_mp4", r"videos/eval_\d+_0\.mp4"),
    "decisions": (AdviceHooks, "_log_decisions", r"decisions\.jsonl"),
}
OFTEN = ("episode", "checkpoint", "TensorBoard")  # tested each time
OPTIONS = ("--save_every", "70", "--log_every", "10")  # the disk is full before that save, or just then
EVAL = ("--eval_every", "50")
LORE = (
    "--configs",
    "lore_prior",
    "--llm.backend",
    "none",
    "--log_decisions_every",
    "10",
    "--eval_every",
    "0",
)
MORE = {"decisions": LORE, "evaluation": EVAL, "video": EVAL}  # options; the others do not evaluate


class Disk:
    """A small disk, a tmpfs, at `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        self._mount("size=8m")

    def _mount(self, options: str) -> None:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "lore", self.folder], capture_output=True
        )
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.decode().strip()}")

    def resize(self, size: str) -> None:
        self._mount(f"remount,size={size}")

    def fill(self) -> None:
        """Take all room that is left."""
        with open(self.folder / BALLAST, "ab", buffering=0) as file:
            for size in (PAGE * 16, PAGE):
                try:
                    while file.write(bytes(size)) == size:
                        pass
                except OSError:
                    pass

    def free(self) -> None:
        (self.folder / BALLAST).unlink()


@pytest.fixture
def disk(tmp_path):
    if not shutil.which("mount"):
        pytest.skip("no program mount")
    small = Disk(tmp_path / "disk")
    yield small
    subprocess.run(["umount", "--lazy", small.folder], check=True)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A function that gives a run with some options which was stopped at step 40, with all that it wrote."""
    done = {}

    def run(*options):
        if options not in done:
            done[options] = tmp_path_factory.mktemp("stopped")
            with signal_at(40):
                assert train(done[options], *options) == 143
        return done[options]

    return run


def saved_files(logdir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (logdir / "checkpoints").iterdir()}


def complaint(errors: str) -> str:
    assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    assert "Traceback" not in errors and "disk full" in errors
    return errors


def assert_whole(logdir: Path) -> None:
    """What a run kept belongs together."""
    state = checkpoints.load_checkpoint(logdir)[0]
    stored = sum(end - start for stream in state["replay"]["streams"] for _, start, end in stream)
    assert state["step"] == state["progress"]["transitions"]
    assert stored == state["progress"]["transitions"] + state["progress"]["episodes"]
    steps = [line["step"] for line in metrics(logdir)]
    assert steps == sorted(set(steps))
    assert not list(logdir.rglob("*.tmp")) and "refilled" not in log(logdir)
    events = EventAccumulator(str(logdir))
    events.Reload()
    assert [event.step for event in events.Scalars("replay/size")] == steps


@pytest.mark.parametrize("write", [pytest.param(w, marks=[slow] * (w not in OFTEN)) for w in WRITES])
def test_disk_that_is_full_at_a_write_ends_the_run_with_its_name_and_loses_nothing(
    disk, stopped, whole, capfd, monkeypatch, write
):
    owner, name, expected = WRITES[write]
    options = (*OPTIONS, *MORE.get(write, ("--eval_every", "0")))
    logdir = disk.folder / "run"
    shutil.copytree(stopped(*options), logdir)
    before, real = saved_files(logdir), getattr(owner, name)

    def on_a_full_disk(*args, **kwargs):
        if isinstance(args[0], Logger) and name == "write":
            args[0].set("x" * PAGE, 1.0)  # what is written is more than what the last page has room for
        elif name == "print":
            args = args[0], args[1] + " " * PAGE
        elif name == "add":
            args[2][0].tag = "x" * PAGE
        elif name == "_log_decisions":
            monkeypatch.setattr(args[0], "_caption", lambda *_: "x" * PAGE)
        disk.fill()
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, on_a_full_disk)
        assert train(logdir, *options) == 2
    assert re.search(expected, complaint(capfd.readouterr().err))
    assert saved_files(logdir) == before
    assert not list(logdir.rglob("*.tmp"))
    disk.free()
    assert train(logdir, *options) == 0
    assert_whole(logdir)
    assert_same_run(logdir, whole(*options))


@slow
@pytest.mark.parametrize("size", ["300k", "1500k"])
def test_run_that_fills_its_disk_resumes_on_a_larger_one(disk, size):
    """Whatever meets the end of the disk first."""
    disk.resize(size)
    logdir = disk.folder / "run"
    options = (*OPTIONS, "--save_every", "30", "--steps", "1e6", "--eval_every", "40")
    with train_process(logdir, *options) as process:
        errors = process.communicate(timeout=300)[1]
    assert process.returncode == 2
    assert str(disk.folder) in complaint(errors)
    saved = checkpoints.load_checkpoint(logdir)[0]["step"] if checkpoints.find_checkpoints(logdir) else 0
    disk.resize("30m")
    with signal_at(saved + 60):
        assert train(logdir, *options) == 143
    assert (f"Resumed at step {saved:,} " in log(logdir)) == bool(saved)
    assert_whole(logdir)


def test_logdir_without_room_is_named_at_the_start(disk, capfd):
    disk.fill()
    assert train(disk.folder / "run") == 2
    assert str(disk.folder) in complaint(capfd.readouterr().err)


def test_ring_on_a_disk_without_room_is_refused_at_the_start(disk, capfd):
    disk.resize("600k")
    options = ("--replay.backend", "memmap", "--replay.capacity", "5000")
    assert train(disk.folder / "run", *options) == 2
    errors = capfd.readouterr().err
    assert "replay.capacity" in errors and errors.count("\n") == 1


@slow
@pytest.mark.parametrize("room", [24])
def test_run_continues_if_the_cache_of_answers_has_no_room_and_uses_it_again_later(tmp_path, disk, room):
    """`room` in KiB, for the database, its journal and their index: one of them meets the end."""
    cache = disk.folder / "llm_cache.sqlite"
    options = (
        "--configs lore_prior --llm.backend openai --llm.model fake --llm.min_gap_steps 1 --eval_every 0"
    )
    disk.fill()
    os.truncate(disk.folder / BALLAST, (disk.folder / BALLAST).stat().st_size - room * 1024)
    with FakeLLM() as server:
        options = [*options.split(), "--llm.base_url", server.openai_url, "--llm.cache", str(cache)]
        options += ["--task", "crafter_reward", "--size", "24", "24", "--log_every", "40"]
        assert train(tmp_path / "full", *options) == 0
        asked = len(server.asked)
        assert asked and metrics(tmp_path / "full")[-1]["step"] == 120
        told = [line for line in log(tmp_path / "full").splitlines() if str(cache) in line]
        assert 1 <= len(told) <= 2 and all("Cannot" in line for line in told), told
        disk.free()
        assert train(tmp_path / "free", *options) == 0
        assert str(cache) not in log(tmp_path / "free")
        before = len(server.asked)
        assert train(tmp_path / "again", *options) == 0
        assert len(server.asked) - before < (before - asked) / 2  # from the cache
