"""A second signal to a run that is about to stop ends it at once; the last checkpoint stays whole."""

import signal

import pytest
from killing import check_agreement
from run_helpers import log, metrics, signal_at, train

import checkpoint as checkpoints
from checkpoint import Checkpoint
from replay import Replay

slow = pytest.mark.slow
OPTIONS = ("--save_every", "20", "--eval_every", "0")
# What a run does when the second signal comes: the first one has it save all that exact resume needs.
WORK = {
    "the replay is saved": (Replay, "_latents"),
    "the checkpoint is written": (checkpoints.torch, "save"),
    "it gets its second name": (checkpoints, "_link_or_copy"),
    "older ones are deleted": (checkpoints.shutil, "rmtree"),
}


SECOND = dict(zip(WORK, (signal.SIGINT, signal.SIGTERM) * 2, strict=True))  # an impatient person, or machine


@pytest.mark.parametrize(
    "work", [pytest.param(work, marks=[slow] * (number != 1)) for number, work in enumerate(WORK)]
)
def test_second_signal_ends_the_run_at_once_and_a_whole_checkpoint_is_resumed(
    tmp_path, capfd, monkeypatch, work
):
    owner, name = WORK[work]
    whole, steps = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        if steps:
            signal.raise_signal(SECOND[work])
        return whole(*args, **kwargs)

    def noted(checkpoint, step, *, clean=False, save=Checkpoint.save):
        if clean:
            steps.append(step)
        save(checkpoint, step, clean=clean)

    with monkeypatch.context() as patch, signal_at(70):
        patch.setattr(owner, name, interrupted)
        patch.setattr(Checkpoint, "save", noted)
        assert train(tmp_path, *OPTIONS) == 130
    assert steps == [70] and capfd.readouterr().err == ""
    assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "run.lock").exists()
    saved = check_agreement(tmp_path)["step"]
    assert saved == (70 if work == "older ones are deleted" else 60)
    assert train(tmp_path, *OPTIONS) == 0
    text = log(tmp_path)
    assert f"Resumed at step {saved}" in text and "refilled" not in text and "is lost" not in text
    assert [line["step"] for line in metrics(tmp_path)] == [20, 40, 60, 80, 100, 120]
    assert check_agreement(tmp_path)["step"] == 120
