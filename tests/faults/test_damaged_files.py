"""A run whose files were damaged is resumed: what is intact is kept, and no damage is used in silence.

Either nothing that counts was hit, and the resumed run is the one of the whole files to the last bit. Or the
log, or the line with which the run ends, names the file.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from run_helpers import assert_same_run, log, signal_at, train

import tools

OPTIONS = ("--save_every", "20", "--log_every", "10", "--replay.sampler", "curious", "--steps", "84")
ADVISED = (
    "--configs debug dummy_cue lore_full --llm.backend advice_helpers:Remote --llm.until 1000 --steps 84 "
    "--llm.log_decisions_every 5 --llm.call_every 4 --eval_every 0"
).split()
AT = 72  # where the run was stopped; checkpoints are those of 40, 60 and 72
SEEDS = range(3)
MORE = range(3, 15)


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
    """The logdir of a run that was stopped, and that of the same run as it goes on from there."""
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


@fast_and_slow(*FILES)
def test_resumed_run_is_the_same_or_names_the_damaged_file(tmp_path, capfd, stopped, name, seed):
    source, whole = stopped
    logdir = shutil.copytree(source, tmp_path / "run")
    path = FILES[name](logdir)
    damage(path, seed)
    before = intact(logdir, path)
    capfd.readouterr()
    code = train(logdir, *OPTIONS)
    errors = capfd.readouterr().err
    assert code in (0, 2) and "Traceback" not in errors
    if code:
        assert errors.startswith("error: ") and len(errors.splitlines()) == 1 and path.name in errors
    else:
        assert errors == ""
        told = path.name in "".join(line for line in log(logdir).splitlines() if "Saved" not in line)
        if name == "the metrics":
            lines = [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]
            assert lines[-1]["step"] == 80 and len(lines) >= (8 - 7 * told)
        elif not told:
            assert_same_run(logdir, whole)
        state = tools.load_checkpoint(logdir)[0]
        assert state["step"] == 84
    assert before.items() <= intact(logdir, path).items()
