"""Malicious or foreign files are refused or set aside with a line in the log.

Nothing in them is executed, and sizes are checked before memory is allocated.
"""

import io
import resource
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from run_helpers import log, main, train

import checkpoint as checkpoints
from envs.dummy import Dummy
from envs.wrappers import EPISODE_SPACES
from episodes import BrokenEpisode, list_episodes, read_episode, step_layout, step_limits

OPTIONS = ("--steps", "60", "--eval_every", "0", "--replay.sampler", "curious")
GIB = 2**30


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that ended well."""
    logdir = tmp_path_factory.mktemp("hostile") / "run"
    assert train(logdir, *OPTIONS) == 0
    return logdir


@pytest.fixture
def run(tmp_path, trained):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def little_memory():
    """Let this process take 4 GiB more than it has, so that a bomb fails and does not fill the machine."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * GIB, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


class Evil:
    """Its pickle makes a file when it is read."""

    def __reduce__(self):
        return (open, (str(Evil.mark), "w"))


@pytest.fixture(autouse=True)
def nothing_is_executed(tmp_path):
    Evil.mark = tmp_path / "executed"
    yield
    assert not Evil.mark.exists()


# ---- Episodes


def npy(array: np.ndarray, **header) -> bytes:
    """An array as .npy, whose header may lie."""
    file = io.BytesIO()
    true = np.lib.format.header_data_from_array_1_0(array)
    np.lib.format.write_array_header_1_0(file, {**true, **header})
    return file.getvalue() + (b"" if array.dtype == object else array.tobytes())


def rewrite(path: Path, **members: bytes | None) -> None:
    """Put other members into an episode's file; None takes one out."""
    with np.load(path) as archive:
        parts = {key: npy(archive[key]) for key in archive.files} | members
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, data in parts.items():
            if data is not None:
                archive.writestr(f"{key}.npy", data)


def bomb(path: Path) -> None:
    """A file of some kilobytes whose image would take 768 GiB, as its name and all headers say."""
    length = 2**30
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, value in dict(np.load(path.with_suffix(".whole"))).items():
            data = npy(value[:1], shape=(length, *value.shape[1:]))
            archive.writestr(f"{key}.npy", data + bytes(2**20))


ACTION = np.zeros(17, np.int32)
EPISODES = {
    "a pickle": (dict(action=npy(np.empty(17, object)) + b"\x80\x04N."), "action should be int32"),
    "a header that lies": (dict(action=npy(ACTION, shape=(2**40,))), r"action should be int32 \(17,\)"),
    "more than its header says": (dict(action=npy(ACTION) + bytes(2**24)), "does not have the length"),
    "another type": (dict(reward=npy(np.zeros(17, ">f4"))), "reward should be float32"),
    "numbers that are none": (dict(reward=npy(np.full(17, np.nan, np.float32))), "not finite"),
    "an action that there is not": (dict(action=npy(ACTION + 4)), "action holds an index outside"),
    "no reward": (dict(reward=None), "lacks reward"),
    "a path": ({"../../../evil": npy(ACTION), "reward": None}, "lacks reward"),
}


def test_hostile_episodes_are_set_aside_and_the_others_are_learned_from(tmp_path, trained, little_memory):
    folder = tmp_path / "run" / "train_eps"
    whole = sorted((trained / "train_eps").iterdir())
    shutil.copytree(trained / "train_eps", folder)
    env = Dummy((16, 16))
    layout = step_layout(env.obs_space | EPISODE_SPACES | {"action": env.act_space})
    limits = step_limits({"action": env.act_space})
    assert read_episode(whole[0], layout, limits=limits).keys() == layout.keys()
    for index, (members, reason) in enumerate(EPISODES.values()):
        path = shutil.copy(whole[0], folder / f"20200101T000000-{index}-17.npz")
        rewrite(path, **members)
        with pytest.raises(BrokenEpisode, match=reason):
            read_episode(path, layout, limits=limits)
    assert train(tmp_path / "run", *OPTIONS) == 0
    assert len(list((folder / "broken").iterdir())) == len(EPISODES)
    line = next(line for line in log(tmp_path / "run").splitlines() if "broken" in line)
    assert f"{len(EPISODES)} broken episode files moved to" in line and "20200101T000000-0-17.npz" in line
    assert f"Loaded {17 * len(whole)} steps" in log(tmp_path / "run")
    assert not list(tmp_path.rglob("evil*"))


def test_bomb_takes_no_memory(tmp_path, trained, little_memory):
    folder = shutil.copytree(trained / "train_eps", tmp_path / "run" / "train_eps")
    first = sorted(folder.iterdir())[0]
    path = first.with_name(first.name.replace("-17.npz", f"-{2**30}.npz"))
    first.rename(path.with_suffix(".whole"))
    bomb(path)
    assert train(tmp_path / "run", *OPTIONS) == 0
    assert "more than is free" in log(tmp_path / "run")
    assert [file.name for file in (folder / "broken").iterdir()] == [path.name]


def test_bomb_in_the_saved_replay_takes_no_memory(run, little_memory):
    for path in (run / "replay_state").rglob("*.npz"):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in names:
                archive.writestr(name, npy(np.zeros(1), shape=(2**40,)) + bytes(2**20))
    assert train(run, *OPTIONS, "--steps", "64") == 0
    text = log(run)
    assert "sampler.npz is ignored" in text or "open-0.npz: the open episode" in text
    assert len(list_episodes(run / "train_eps")) >= 2 and checkpoints.load_checkpoint(run)[0]["step"] == 64


# ---- Checkpoints


def changed(run: Path, change) -> Path:
    """The run's checkpoint with a change, under another name."""
    payload = torch.load(run / "latest.pt", weights_only=True)
    path = run / "given.pt"
    torch.save(change(payload) or payload, path)
    return path


def refusal(capfd, *argv) -> str:
    capfd.readouterr()
    assert main(*map(str, argv)) == 2
    errors = capfd.readouterr().err
    assert errors.startswith("error: ") and len(errors.splitlines()) == 1, errors
    assert errors.rstrip("\n").isprintable()
    return errors


def renamed(payload: dict, name: str) -> None:
    """With this name for the open episode of environment 0, for which a file is made in the end."""
    payload["replay"]["open"][0] = payload["replay"]["streams"][0][-1][0] = name


CHECKPOINTS = {
    "a pickle": lambda payload: payload.update(agent=Evil()),
    "a config that blows up": lambda payload: payload.update(
        config="".join(f"a{i}: &a{i} [{f'*a{i - 1},' * 9}]\n" for i in range(1, 12))
    ),
    "no weights": lambda payload: payload["agent"].pop("world_model") and None,
    "weights that are not finite": lambda payload: (
        payload["agent"]["world_model"]["rssm.in_deter.0.weight"].fill_(np.nan) is None
    ),
    "no replay": lambda payload: payload.pop("replay") and None,
    "an episode that lies elsewhere": lambda payload: renamed(payload, "../../../evil/20200101T000000-0"),
    "a moment that lies elsewhere": lambda payload: payload["replay"].update(moment="../step"),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_hostile_checkpoint_is_refused_with_an_error_that_names_it(run, capfd, case):
    path = changed(run, CHECKPOINTS[case])
    errors = refusal(capfd, "--from_checkpoint", path, "--steps", 80)
    assert path.name in errors or "The checkpoint does not fit this agent: world_model." in errors
    assert not list(run.parent.rglob("evil*"))


def test_checkpoint_that_grows_when_it_is_unpacked_is_refused(run, capfd, little_memory):
    path = run / "given.pt"
    with zipfile.ZipFile(run / "latest.pt") as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, bytes(2**26) if name.endswith("data/0") else old.read(name))
    assert path.stat().st_size < 2**20
    assert "its list of contents" in refusal(capfd, "--from_checkpoint", path)


def test_hostile_latest_is_skipped_for_an_older_checkpoint(run):
    assert train(run, *OPTIONS, "--steps", "80") == 0
    (run / "latest.pt").unlink()
    torch.save({"agent": Evil()}, run / "latest.pt")
    (run / "checkpoints" / f"step-{80:012d}.pt").unlink()
    assert train(run, *OPTIONS, "--steps", "70") == 0
    assert "latest.pt is damaged and skipped" in log(run) and "Resumed at step 60" in log(run)
