"""A run resumes with damaged files: intact files are kept, and no damage is used silently.

Either the damage hit nothing that counts, and the resumed run equals that of the whole files to the last bit,
or the log, or the error with which the run ends, names the file.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from run_helpers import assert_same_run, log, metrics, signal_at, train
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from test_advice_run import DOORKEY, FULL

import checkpoint as checkpoints
from config import Config
from episodes import BrokenEpisode, read_episode

OPTIONS = ("--save_every", "20", "--log_every", "10", "--replay.sampler", "curious", "--steps", "84")
ADVISED = (
    *(*DOORKEY, *FULL, "--llm.backend", "advice_helpers:Remote", "--llm.until", "1000", "--steps", "84"),
    *("--eval_every", "0"),
)
AT = 72  # where the run was stopped; checkpoints are those of 40, 60 and 72
SEEDS = range(1)
MORE = range(1, 3)


def flipped(data: bytes, rng: np.random.Generator) -> bytes:
    place = int(rng.integers(len(data)))
    return data[:place] + bytes([data[place] ^ 1 << int(rng.integers(8))]) + data[place + 1 :]


def cut_off(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: int(rng.integers(len(data)))]


def blanked(data: bytes, rng: np.random.Generator) -> bytes:
    """With a hole of zeros, as a power cut leaves them."""
    start = int(rng.integers(len(data)))
    hole = data[start : start + 512]
    return data[:start] + bytes(len(hole)) + data[start + len(hole) :]


DAMAGE = (flipped, cut_off, blanked)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The logdir of a stopped run, and of the same run resumed."""
    logdir = tmp_path_factory.mktemp("damage") / "stopped"
    with signal_at(AT):
        assert train(logdir, *OPTIONS) == 143
    whole = shutil.copytree(logdir, logdir.with_name("whole"))
    assert train(whole, *OPTIONS) == 0
    return logdir, whole


def newest_moment(logdir: Path) -> Path:
    return next((logdir / "replay_state" / f"step-{AT:012d}").iterdir())


FILES = {
    "an episode": lambda logdir: sorted((logdir / "train_eps").iterdir())[1],
    "an open episode": lambda logdir: newest_moment(logdir) / "open-1.npz",
    "the priorities": lambda logdir: newest_moment(logdir) / "sampler.npz",
    "the latents": lambda logdir: newest_moment(logdir) / "latents.npz",
    "the checkpoint": lambda logdir: logdir / "latest.pt",
    "an older checkpoint": lambda logdir: logdir / "checkpoints" / f"step-{40:012d}.pt",
    "the config": lambda logdir: logdir / "config.yaml",
    "the metrics": lambda logdir: logdir / "metrics.jsonl",
    "the events": lambda logdir: next(logdir.glob("events.out.*")),
    "the log": lambda logdir: logdir / "train.log",
}


def damage(path: Path, seed: int) -> None:
    """Damage a file, and what is the same file under another name, in one of the DAMAGE ways."""
    rng = np.random.default_rng(seed)
    before = path.read_bytes()
    after = DAMAGE[seed % len(DAMAGE)](before, rng)
    twins = [path, *path.parent.glob("checkpoints/*")]
    for twin in [twin for twin in twins if twin.read_bytes() == before]:
        twin.write_bytes(after)


def intact(logdir: Path, damaged: Path) -> dict[str, bytes]:
    """The episodes by name that are as they were, wherever they lie below the folder of training."""
    files = (logdir / "train_eps").rglob("*.npz")
    return {path.name: path.read_bytes() for path in files if path.name != damaged.name}


def fast_and_slow(*names: str):
    fast = [(name, seed) for name in names for seed in SEEDS]
    more = [pytest.param(name, seed, marks=pytest.mark.slow) for name in names for seed in MORE]
    return pytest.mark.parametrize("name, seed", fast + more)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_no_flipped_bit_of_an_episode_is_learned_from(tmp_path, save):
    """For arrays of whole blocks of 4096 bytes, zipfile does not verify the checksum by itself."""
    layout = {"image": ((64, 64, 3), np.dtype(np.uint8)), "is_first": ((), np.dtype(bool))}
    rows = {"image": np.zeros((2, 64, 64, 3), np.uint8), "is_first": np.array([True, False])}
    path = tmp_path / "20200101T000000-0-2.npz"
    save(path, **rows)
    data, broken = path.read_bytes(), 0
    places = [place for place in range(len(data)) if place < 200 or place > len(data) - 400]
    for place in places:
        bit = 1 << place % 8
        path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
        try:
            found = read_episode(path, layout)
        except BrokenEpisode as error:
            assert len(str(error).splitlines()) == 1
            broken += 1
        else:
            assert all(np.array_equal(found[key], rows[key]) for key in rows)
    assert broken > len(places) / 2  # the rest hit dates and the like


def resume(logdir: Path, capfd, *options: str) -> tuple[int, str]:
    """Resume a damaged run; returns the exit code, and the log or the error."""
    capfd.readouterr()
    code = train(logdir, *options)
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    if code:
        assert code == 2 and errors.startswith("error: ") and len(errors.splitlines()) == 1
        return code, errors
    assert errors == "" and checkpoints.load_checkpoint(logdir)[0]["step"] >= 84
    return code, "".join(line for line in log(logdir).splitlines() if " Saved " not in line)


@fast_and_slow(*FILES)
def test_resumed_run_is_the_same_or_names_the_damaged_file(tmp_path, capfd, stopped, name, seed):
    source, whole = stopped
    logdir = shutil.copytree(source, tmp_path / "run")
    path = FILES[name](logdir)
    damage(path, seed)
    before = intact(logdir, path)
    code, told = resume(logdir, capfd, *OPTIONS)
    if name == "the metrics":
        lines = metrics(logdir)  # JSON, each of them
        assert lines[-1]["step"] == 80 and (len(lines) == 8 or path.name in told)
    elif code or path.name not in told:
        assert not code
        assert_same_run(logdir, whole)
    assert before.items() <= intact(logdir, path).items()
    if name in ("the config", "the events", "the log"):
        assert Config.load_saved(logdir / "config.yaml").steps == 84
        newest = max(logdir.glob("events.out.*"), key=lambda file: file.name)
        assert len(list(EventFileLoader(str(newest)).Load())) > 2


def test_run_without_a_readable_checkpoint_ends_with_a_line_and_changes_nothing(tmp_path, capfd, stopped):
    logdir = shutil.copytree(stopped[0], tmp_path / "run")
    for path in [logdir / "latest.pt", *(logdir / "checkpoints").iterdir()]:
        path.write_bytes(path.read_bytes()[:-100])
    before = {path: path.read_bytes() for path in logdir.rglob("*") if path.is_file()}
    code, told = resume(logdir, capfd, *OPTIONS)
    assert code == 2 and "No readable checkpoint" in told
    assert all(f"step-{step:012d}.pt" in told for step in (40, 60)) and "latest.pt" in told
    assert before == {path: path.read_bytes() for path in logdir.rglob("*") if path.is_file()}


def test_lost_open_episode_costs_no_other_episode(tmp_path, capfd, stopped):
    logdir = shutil.copytree(stopped[0], tmp_path / "run")
    stored = [sum(end - start for _, start, end in stream) for stream in streams(logdir)]
    _, start, end = streams(logdir)[1][-1]
    (newest_moment(logdir) / "open-1.npz").unlink()
    assert resume(logdir, capfd, *OPTIONS)[0] == 0
    assert f"Resumed at step 72 with {sum(stored) - (end - start)} steps" in log(logdir)


def streams(logdir: Path) -> list:
    return checkpoints.load_checkpoint(logdir)[0]["replay"]["streams"]


# ---- What advice leaves behind


@pytest.fixture(scope="module")
def advised(tmp_path_factory):
    """The logdir of an advised run that was stopped."""
    logdir = tmp_path_factory.mktemp("advised") / "stopped"
    with signal_at(AT):
        assert train(logdir, *ADVISED) == 143
    return logdir


@fast_and_slow("llm_cache.sqlite", "decisions.jsonl")
def test_advised_run_resumes_whatever_was_damaged(tmp_path, capfd, advised, name, seed):
    logdir = shutil.copytree(advised, tmp_path / "run")
    path = logdir / name
    whole = path.read_bytes()
    damage(path, seed)
    code, told = resume(logdir, capfd, *ADVISED)
    assert code == 0
    if name == "decisions.jsonl":
        lines = [json.loads(line) for line in path.read_text(errors="replace").splitlines()]
        kept = sum(json.loads(line)["step"] < AT for line in whole.splitlines())
        assert lines[-1]["step"] == 80 and (name in told or len(lines) >= kept)
