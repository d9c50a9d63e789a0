"""Mistakes end the program with one or two lines and exit code 2; nothing is lost or half written."""

import copy
import functools
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from run_helpers import differences, log, metrics, signal_at, train

import checkpoint as checkpoints
import config as configs
import dreamer
import envs
import evaluate
import models
import tools
from agent import Dreamer
from envs.dummy import Dummy
from training import Batches


def refusal(capfd, logdir: Path, *options: str) -> str:
    """The message of the run that fails."""
    capfd.readouterr()
    assert train(logdir, *options) == 2
    errors = capfd.readouterr().err
    assert errors.startswith("error: ") and len(errors.splitlines()) <= 2, errors
    assert "Traceback" not in errors
    return errors


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stored_steps(logdir: Path) -> int:
    replay = checkpoints.load_checkpoint(logdir)[0]["replay"]
    return sum(end - start for stream in replay["streams"] for _, start, end in stream)


@pytest.fixture
def add_env(monkeypatch):
    """A function that makes the task `bad_env` of a class."""
    return lambda make: monkeypatch.setitem(envs.REGISTRY, "bad", lambda name, config: make(config.size))


# ---- The command


@pytest.mark.parametrize(
    "options, nearest",
    [
        ("--configs crafte", "crafter"),
        ("--btach_size 4", "batch_size"),
        ("--opt.lr fast", "opt.lr"),
        ("--task dummy_clue", "dummy_cue"),
        ("--task craft_reward", "crafter"),
        ("--device cuda:77", "auto"),
        ("--replay.capacity 5", "replay.capacity"),
        ("--replay.capacity 100000000000", "replay.capacity"),
        ("--configs debug dummy_cue lore_full --llm.backend rulez", "rules"),
        ("--configs debug dummy_cue lore_full --llm.backend gemini", "GEMINI_API_KEY"),
        (
            "--configs debug dummy_cue lore_full --llm.backend gemini --llm.model x --llm.replay True",
            "--llm.cache",
        ),
    ],
)
def test_wrong_option_is_refused_with_a_hint_and_writes_nothing(
    tmp_path, capfd, monkeypatch, options, nearest
):
    for name in ("GEMINI_API_KEY", "GOOGLE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert nearest in refusal(capfd, tmp_path / "run", *options.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", [None, "defaults: ["])
def test_missing_or_broken_configs_yaml_is_named(tmp_path, capfd, monkeypatch, text):
    path = tmp_path / "configs.yaml"
    monkeypatch.setattr(configs, "read", functools.partial(configs.read, path))
    if text:
        path.write_text(text)
    assert str(path) in refusal(capfd, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_logdir_that_cannot_be_written_is_named(tmp_path, capfd):
    (tmp_path / "file").write_text("in the way")
    assert str(tmp_path / "file") in refusal(capfd, tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.fixture
def unprivileged():
    """Run the test as a user without rights."""
    root = sys.platform != "win32" and os.geteuid() == 0
    if sys.platform == "win32":
        pytest.skip("permissions are POSIX")
    if root:
        tools.enable_determinism()  # imports what this user may not be allowed to
        os.seteuid(65534)
    yield
    if root:
        os.seteuid(0)


def test_path_that_is_too_long_is_named(capfd, tmp_path):
    """File systems limit a name to 255 bytes."""
    path = tmp_path / ("a" * 300)
    assert "too long" in refusal(capfd, path)
    assert "No checkpoint at" in refusal(capfd, tmp_path / "run", "--from_checkpoint", str(path))
    for argv in (["--logdir", str(path)], ["--from_checkpoint", f"{path}.safetensors"]):
        assert evaluate.main(argv) == 2
        assert capfd.readouterr().err.startswith("error: No checkpoint at")


def test_logdir_without_permission_is_named(capfd, unprivileged):
    folder = Path(tempfile.mkdtemp(prefix="lore-"))
    folder.chmod(0o400)
    try:
        assert str(folder) in refusal(capfd, folder / "run")
    finally:
        folder.rmdir()


# ---- The disk


def test_broken_episodes_are_moved_and_reported(tmp_path):
    assert train(tmp_path / "old") == 0
    whole = sorted((tmp_path / "old" / "train_eps").glob("*.npz"))
    folder = tmp_path / "run" / "train_eps"
    shutil.copytree(tmp_path / "old" / "train_eps", folder)
    (folder / whole[0].name).write_bytes(whole[0].read_bytes()[:-50])
    (folder / whole[2].name).write_bytes(b"")
    with signal_at(90):
        assert train(tmp_path / "run") == 143
    assert {path.name for path in (folder / "broken").iterdir()} == {whole[0].name, whole[2].name}
    text = log(tmp_path / "run")
    assert "2 broken episode files moved to" in text
    assert f"Loaded {17 * (len(whole) - 2)} steps" in text
    checkpoint = checkpoints.load_checkpoint(tmp_path / "run")[0]
    assert checkpoint["progress"]["transitions"] + checkpoint["progress"]["episodes"] == stored_steps(
        tmp_path / "run"
    )


# ---- Checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    logdir = tmp_path_factory.mktemp("trained")
    assert train(logdir, "--steps", "40", "--eval_every", "0") == 0
    return logdir


def test_checkpoint_of_another_shape_is_refused_with_the_parameter(tmp_path, capfd, trained):
    source = ("--from_checkpoint", str(trained / "latest.pt"))
    message = refusal(capfd, tmp_path / "run", *source, "--rssm.deter", "16")
    assert "world_model." in message and "in the checkpoint" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"no zip", None, {"weights": 1}])
def test_file_that_is_not_a_checkpoint_is_refused(tmp_path, capfd, content):
    path = tmp_path / "given.pt"
    if isinstance(content, dict):
        torch.save(content, path)
    elif content is not None:
        path.write_bytes(content)
    before = files(tmp_path)
    assert str(path) in refusal(capfd, tmp_path / "run", "--from_checkpoint", str(path))
    assert files(tmp_path) == before and not (tmp_path / "run").exists()


# ---- Envs


class Bad(Dummy):
    """Breaks its contract in its second episode."""

    resets = 0

    def reset(self, seed=None):
        self.resets += 1
        return super().reset(seed)

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        if self.resets == 2 and self._step == 5:
            obs, reward = self.spoil(obs, reward)
        return obs, reward, terminated, truncated, info


class OtherShape(Bad):
    expected = ("'image'", "uint8 (16, 16, 3)", "uint8 (16, 16, 1)")

    def spoil(self, obs, reward):
        return {"image": obs["image"][..., :1]}, reward


class NonFiniteReward(Bad):
    expected = ("'reward'", "finite", "nan")

    def spoil(self, obs, reward):
        return obs, math.nan


class Raises(Bad):
    expected = ("RuntimeError", "the game crashed")

    def spoil(self, obs, reward):
        raise RuntimeError("the game crashed")


@pytest.mark.parametrize("env", [OtherShape, Raises])
def test_env_that_breaks_its_contract_ends_the_run_after_a_save(tmp_path, capfd, add_env, env):
    add_env(env)
    message = refusal(capfd, tmp_path, "--task", "bad_env", "--eval_every", "0")
    assert all(part in message for part in env.expected)
    # Two envs with 17 steps in the first episode and five in the second.
    assert stored_steps(tmp_path) == 2 * (17 + 5)
    checkpoint = checkpoints.load_checkpoint(tmp_path)[0]
    assert checkpoint["step"] == checkpoint["progress"]["transitions"] == 2 * (16 + 4)


def test_run_whose_env_failed_resumes_with_new_episodes(tmp_path, capfd, add_env):
    add_env(NonFiniteReward)
    options = ("--task", "bad_env", "--eval_every", "0")
    refusal(capfd, tmp_path, *options)
    before = stored_steps(tmp_path)
    add_env(Dummy)
    with signal_at(60):
        assert train(tmp_path, *options) == 143
    text = log(tmp_path)
    assert "The open episodes end here" in text and f"with {before} steps in the replay" in text
    after = checkpoints.load_checkpoint(tmp_path)[0]
    assert stored_steps(tmp_path) == after["progress"]["transitions"] + after["progress"]["episodes"]
    assert min(state["episode"] for state in after["actor"]["envs"]) >= 2
    lengths = sorted(int(path.stem.rsplit("-", 1)[1]) for path in (tmp_path / "train_eps").glob("*.npz"))
    assert lengths[:2] == [5, 5]


# ---- Gradients


@pytest.fixture
def spoil_losses(monkeypatch):
    """A function that makes the loss NaN in chosen updates, numbered from 1."""

    def spoil(when):
        whole, calls = models.WorldModel.loss, []

        def loss(self, post, data):
            losses, info = whole(self, post, data)
            calls.append(None)
            if when(len(calls)):
                losses["reward"] = losses["reward"] * math.nan
            return losses, info

        monkeypatch.setattr(models.WorldModel, "loss", loss)

    return spoil


def test_update_with_a_non_finite_gradient_is_skipped_and_counted(tmp_path, spoil_losses):
    spoil_losses(lambda update: update % 2 == 0)
    assert train(tmp_path, "--eval_every", "0", "--log_every", "120") == 0
    assert metrics(tmp_path)[-1]["opt/skipped"] == pytest.approx(0.5, abs=0.05)
    agent = checkpoints.load_checkpoint(tmp_path)[0]["agent"]
    assert agent["updates"] == metrics(tmp_path)[-1]["opt/updates"] == 17
    for part in ("world_model", "behavior"):
        assert all(torch.isfinite(value).all() for value in agent[part].values())


def test_skipped_update_changes_neither_weights_nor_optimiser_nor_replay(tmp_path, monkeypatch, spoil_losses):
    spoil_losses(lambda update: update > 10)
    train_agent, update_replay, seen = Dreamer.train, Batches.update, []

    def state(agent):
        behavior = agent.behavior
        parts = (agent.world_model, behavior.actor, behavior.critic, behavior.slow_critic, agent.opt)
        return copy.deepcopy([part.state_dict() for part in parts])

    def train_compared(agent, *args):
        before = state(agent)
        metrics, kept = train_agent(agent, *args)
        if kept is None:
            seen.append(differences(before, state(agent)))
        return metrics, kept

    def update_compared(batches, batch, kept):
        before = batches.replay.ring["deter"].copy()
        update_replay(batches, batch, kept)
        if kept is None:
            seen.append(not np.array_equal(before, batches.replay.ring["deter"]))

    monkeypatch.setattr(Dreamer, "train", train_compared)
    monkeypatch.setattr(Batches, "update", update_compared)
    monkeypatch.setattr(dreamer, "MAX_NONFINITE", 1000)
    assert train(tmp_path, "--steps", "64", "--eval_every", "0") == 0
    assert seen and not any(seen)


def test_returns_that_are_not_finite_do_not_reach_the_normaliser():
    norm = models.ReturnNorm(0.5, 1.0, 5.0, 95.0)
    norm.update(torch.arange(100.0))
    before = norm.range.clone()
    norm.update(torch.tensor([1.0, math.nan, 2.0]))
    assert torch.equal(norm.range, before)


def test_streak_of_skipped_updates_stops_the_run_with_a_diagnosis(tmp_path, capfd, monkeypatch, spoil_losses):
    monkeypatch.setattr(dreamer, "MAX_NONFINITE", 5)
    spoil_losses(lambda update: update > 10)
    message = refusal(capfd, tmp_path, "--save_every", "40", "--eval_every", "0")
    assert "5 updates in a row" in message and "diagnosis.pt" in message
    checkpoint = checkpoints.load_checkpoint(tmp_path)[0]
    assert checkpoint["step"] == 40
    diagnosis = torch.load(tmp_path / "diagnosis.pt", weights_only=True)
    assert 56 < diagnosis["step"] < 80
    assert diagnosis["batch"]["image"].shape == (2, 5, 16, 16, 3)
    assert diagnosis["agent"].keys() == checkpoint["agent"].keys()


def test_only_skipped_updates_in_a_row_stop_the_run(tmp_path, monkeypatch, spoil_losses):
    monkeypatch.setattr(dreamer, "MAX_NONFINITE", 5)
    spoil_losses(lambda update: update % 5)
    assert train(tmp_path, "--eval_every", "0") == 0
