"""A resumed run equals an uninterrupted one; after a kill, nothing that was saved is lost."""

import re
import shutil
import signal
import struct
import sys
import zipfile

import pytest
import torch
from run_helpers import (
    assert_same_run,
    differences,
    log,
    main,
    metrics,
    moment,
    signal_at,
    stop_and_resume,
    train,
    train_process,
)

import checkpoint as checkpoints
import dreamer
import envs
import evaluation
import replay
from config import Config
from envs.dummy import Dummy
from evaluation import play_episodes

posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no such signal to a process")


CASES = {
    "cue": "",
    "memory": "--task dummy_memory",
    "continuous actions, vectors and an image": "--task dummy_continuous --rssm.classes 0",
    "curious sampling": "--replay.sampler curious",
    "curious sampling in a ring that wraps": "--sampler curious --capacity 44 --online False",
    "a ring on the disk that wraps": "--replay.capacity 44 --replay.backend memmap",
    "action repeat and two evaluation envs": "--action_repeat 2 --envs.eval_amount 2 --eval_episodes 2",
    "lpm": "--expl_behavior lpm --lpm.fifo 13 --lpm.share 0.5",
    "plan2explore, separate, for a while": "--expl_behavior plan2explore --expl_task_actor separate "
    "--expl_until 90",
    "random": "--expl_behavior random --expl_until 60",
}


@pytest.mark.parametrize("options", [pytest.param(text.split(), id=name) for name, text in CASES.items()])
def test_resumed_run_equals_uninterrupted_run(tmp_path, whole, options):
    stop_and_resume(tmp_path, *options, at=[21, 71])
    assert_same_run(tmp_path, whole(*options))


def test_run_may_be_stopped_at_any_step(tmp_path, whole):
    stop_and_resume(tmp_path, at=[1, 20, 33, 40, 50, 64, 66, 100, 120])
    assert_same_run(tmp_path, whole())


def test_run_with_checkpoints_in_between_is_the_same(tmp_path, whole):
    assert train(tmp_path, "--save_every", "10") == 0
    assert_same_run(tmp_path, whole())


def test_finished_run_continues_when_steps_are_raised(tmp_path, whole):
    assert train(tmp_path, "--steps", "70") == 0
    assert train(tmp_path) == 0
    assert_same_run(tmp_path, whole())
    assert "Changed since the run was saved: steps: 70 -> 120" in log(tmp_path)


def test_interrupted_evaluation_is_repeated_by_the_resumed_run(tmp_path, whole, monkeypatch):
    options = ("--eval_episodes", "3")
    play = play_episodes
    played = []

    def stopped_after_one(*args):
        for episode in play(*args):
            played.append(episode)
            if len(played) == 1:
                signal.raise_signal(signal.SIGTERM)
            yield episode

    monkeypatch.setattr(evaluation, "play_episodes", stopped_after_one)
    assert train(tmp_path, *options) == 143
    assert len(played) == 1 and not list((tmp_path / "eval_eps").glob("*"))
    assert train(tmp_path, *options) == 0
    assert len(played) == 1 + 2 * 3
    assert_same_run(tmp_path, whole(*options))


def test_resumed_crafter_equals_uninterrupted_crafter(tmp_path, whole):
    # A new world takes Crafter most of a second, so there are few.
    options = "--task crafter_reward --size 24 24 --envs.amount 1 --time_limit 30 --steps 40 --eval_every 0"
    options = options.split()
    stop_and_resume(tmp_path, *options, at=[25])
    assert_same_run(tmp_path, whole(*options))
    assert "crafter/success_rate/collect_wood" in metrics(tmp_path)[-1]


@posix
@pytest.mark.parametrize(
    "signum, code", [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_signal_to_the_process_stops_it_cleanly(tmp_path, whole, signum, code):
    process = train_process(tmp_path, "--steps", "1e6")
    with process:
        for line in process.stdout:
            if line.startswith("step 40"):
                process.send_signal(signum)
        errors = process.stderr.read()
    assert process.returncode == code
    assert errors == ""
    assert f"Stopped by {signal.Signals(signum).name}" in log(tmp_path)
    stopped_at = moment(tmp_path)["step"]
    assert 40 <= stopped_at < 1000
    if stopped_at < 120:
        assert train(tmp_path) == 0
        assert_same_run(tmp_path, whole())


# ---- Kill


@pytest.fixture(scope="module")
def killed_logdir(tmp_path_factory):
    """A run that was killed at step 90, with checkpoints of steps 40, 60 and 80."""
    logdir = tmp_path_factory.mktemp("killed")
    process = train_process(logdir, "--save_every", "20", "--log_every", "5", kill_at=90)
    out, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    assert metrics(logdir)[-1]["step"] >= 85
    return logdir


@pytest.fixture
def killed(killed_logdir, tmp_path):
    return shutil.copytree(killed_logdir, tmp_path / "run")


OPTIONS = ("--save_every", "20", "--log_every", "5")


def saved_steps(logdir):
    return sorted(int(path.stem[5:]) for path in (logdir / "checkpoints").iterdir())


@posix
def test_killed_run_resumes_from_its_last_checkpoint(killed):
    before = checkpoints.load_checkpoint(killed)[0]
    assert before["step"] == 80
    assert train(killed, *OPTIONS) == 0
    steps = [line["step"] for line in metrics(killed)]
    assert steps == sorted(set(steps)) and steps[-1] == 120
    after = checkpoints.load_checkpoint(killed)[0]
    stored = sum(end - start for stream in after["replay"]["streams"] for _, start, end in stream)
    assert after["step"] == after["progress"]["transitions"] == 120
    assert stored == after["progress"]["transitions"] + after["progress"]["episodes"]
    assert metrics(killed)[-1]["replay/size"] == stored
    assert "Resumed at step 80" in log(killed)


@posix
def test_episodes_younger_than_the_checkpoint_are_set_aside_and_not_counted(killed):
    known = checkpoints.load_checkpoint(killed / "checkpoints" / f"step-{60:012d}.pt")[0]
    (killed / "latest.pt").unlink()
    (killed / "checkpoints" / f"step-{80:012d}.pt").unlink()
    before = {path.name for path in (killed / "train_eps").iterdir()}
    with signal_at(61):
        assert train(killed, *OPTIONS) == 143
    newer = {path.name for path in (killed / "train_eps" / "newer").iterdir()}
    assert newer and newer <= before
    lines = [line for line in log(killed).splitlines() if "newer" in line]
    assert len(lines) == 1 and f"{len(newer)} episode files newer than the checkpoint" in lines[0]
    after = checkpoints.load_checkpoint(killed)[0]
    names = {name for stream in after["replay"]["streams"] for name, _, _ in stream}
    assert not names & {name.rsplit("-", 1)[0] for name in newer - before}
    assert after["progress"]["transitions"] == known["progress"]["transitions"] + 2


def middle_of_largest_member(path):
    """Where in a zip file the middle of its largest member's data lies: between members there is padding."""
    with zipfile.ZipFile(path) as archive:
        member = max(archive.infolist(), key=lambda member: member.file_size)
    with open(path, "rb") as file:
        file.seek(member.header_offset)
        name, extra = struct.unpack("<26xHH", file.read(30))  # lengths, at the end of the local header
    return member.header_offset + 30 + name + extra + member.compress_size // 2


@posix
def test_damaged_checkpoint_is_skipped_for_the_one_before(killed):
    data = (killed / "latest.pt").read_bytes()
    place = middle_of_largest_member(killed / "latest.pt")
    broken = data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]  # one bit
    for name in ("latest.pt", f"checkpoints/step-{80:012d}.pt"):  # one file, where it was not copied
        (killed / name).write_bytes(broken)
    with signal_at(61):
        assert train(killed, *OPTIONS) == 143
    text = log(killed)
    assert "latest.pt is damaged and skipped" in text and "Resumed at step 60" in text
    assert "refilled" not in text and "lost" not in text  # what the replay kept for step 60 is still there
    assert [line["step"] for line in metrics(killed)][-1] == 60


@posix
def test_replay_state_is_kept_for_each_kept_checkpoint_and_no_other(killed):
    def kept():
        return sorted(int(path.name[5:]) for path in (killed / "replay_state").iterdir())

    assert kept() == saved_steps(killed) == [40, 60, 80]
    assert train(killed, *OPTIONS, "--keep_checkpoints", "2") == 0
    assert kept() == saved_steps(killed) == [100, 120]
    older = killed / "checkpoints" / f"step-{100:012d}.pt"
    with signal_at(112):
        assert train(killed, *OPTIONS, "--from_checkpoint", str(older)) == 143
    assert train(killed, *OPTIONS) == 0
    assert "refilled" not in log(killed)
    assert len(list((killed / "replay_state").rglob("latents.npz"))) == 1  # they are large


def test_kill_while_a_checkpoint_is_written_loses_nothing_of_the_one_before(tmp_path, monkeypatch, whole):
    def killed(*_, **__):
        raise SystemExit(137)

    options = ("--keep_checkpoints", "1")
    with signal_at(64):
        assert train(tmp_path, *options) == 143
    with monkeypatch.context() as patch, signal_at(90):
        patch.setattr(checkpoints, "save_checkpoint", killed)
        with pytest.raises(SystemExit):
            train(tmp_path, *options)
    assert train(tmp_path, *options) == 0
    assert_same_run(tmp_path, whole())


# ---- Other ways to resume


def test_from_checkpoint_without_logdir_resumes_in_place(tmp_path, whole, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logdir = tmp_path / "run"
    with signal_at(71):
        train(logdir)
    assert main("--from_checkpoint", str(logdir / "latest.pt")) == 0
    assert_same_run(logdir, whole())
    assert not (tmp_path / "logdir").exists()


def test_older_checkpoint_of_the_same_logdir_is_resumed_in_place(tmp_path):
    assert train(tmp_path, "--save_every", "30") == 0
    assert saved_steps(tmp_path) == [60, 90, 120]
    older = tmp_path / "checkpoints" / f"step-{60:012d}.pt"
    with signal_at(80):
        assert main("--from_checkpoint", str(older), "--logdir", str(tmp_path)) == 143
    assert "Resumed at step 60" in log(tmp_path)
    assert checkpoints.load_checkpoint(tmp_path)[0]["step"] == 80
    assert [line["step"] for line in metrics(tmp_path)] == [20, 40, 60]


def test_from_checkpoint_with_a_new_logdir_starts_a_new_run_from_the_weights(tmp_path, whole, monkeypatch):
    source = whole()
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    taken = {}

    def loop(stop, config, *, agent, progress, **_):
        taken.update(agent.state_dict(), step=progress.step)

    monkeypatch.setattr(dreamer, "loop", loop)
    command = ["--from_checkpoint", str(source / "latest.pt"), "--logdir", str(tmp_path / "new")]
    assert main(*command) == 0
    theirs = checkpoints.load_checkpoint(source)[0]["agent"]
    for part in ("world_model", "behavior", "optimizer", "updates"):
        assert differences(taken[part], theirs[part]) == []
    assert taken["step"] == 0 and theirs["updates"] > 20
    assert not any(torch.equal(taken["rngs"][name], theirs["rngs"][name]) for name in ("act", "train"))
    assert before == {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}


def test_without_logdir_a_run_goes_to_logdir_task_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dreamer, "loop", lambda *args, **run: None)
    command = "--configs debug dummy_cue --device cpu".split()
    assert main(*command) == 0
    (logdir,) = (tmp_path / "logdir" / "dummy_cue").iterdir()
    assert re.fullmatch(r"\d{8}T\d{6}", logdir.name)
    assert (logdir / "config.yaml").exists()


def test_capacity_that_auto_chose_is_kept_on_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(replay, "free_memory", lambda: 3_000_000)
    options = ("--replay.capacity", "auto")
    with signal_at(71):
        assert train(tmp_path, *options) == 143
    chosen = checkpoints.load_checkpoint(tmp_path)[0]["capacity"]
    monkeypatch.setattr(replay, "free_memory", lambda: 6_000_000)
    assert train(tmp_path, *options) == 0
    assert checkpoints.load_checkpoint(tmp_path)[0]["capacity"] == chosen < 2000
    assert "refilled" not in log(tmp_path)


def test_changed_options_are_shown_and_saved(tmp_path):
    with signal_at(40):
        train(tmp_path)
    assert train(tmp_path, "--opt.lr", "0.01", "--train_ratio", "2") == 0
    assert "Changed since the run was saved: opt.lr: 4e-05 -> 0.01" in log(tmp_path)
    assert "Changed since the run was saved: train_ratio: 3.0 -> 2.0" in log(tmp_path)
    assert Config.load_saved(tmp_path / "config.yaml").opt.lr == 0.01


@pytest.mark.parametrize("option", ["--task dummy_memory", "--rssm.deter 16", "--no_such_option 1"])
def test_refused_resume_touches_nothing(tmp_path, whole, capfd, option):
    logdir = shutil.copytree(whole(), tmp_path / "run")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in logdir.rglob("*.*")}
    capfd.readouterr()
    assert train(logdir, *option.split()) == 2
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in logdir.rglob("*.*")}
    out, errors = capfd.readouterr()
    assert out == "" and errors.startswith("error: ") and len(errors.splitlines()) == 1


def test_resume_with_more_envs_is_reported_as_not_exact(tmp_path):
    with signal_at(71):
        train(tmp_path)
    before = checkpoints.load_checkpoint(tmp_path)[0]
    assert train(tmp_path, "--envs.amount", "3") == 0
    assert "refilled from episode files, not restored exactly: it had 2 streams" in log(tmp_path)
    assert "The open episodes end here" in log(tmp_path)
    after = checkpoints.load_checkpoint(tmp_path)[0]
    stored = [end - start for stream in after["replay"]["streams"] for _, start, end in stream]
    assert sum(stored) == after["progress"]["transitions"] + after["progress"]["episodes"]
    assert after["step"] == after["progress"]["transitions"] >= 120 > before["step"]


class Moody(Dummy):
    """A nondeterministic env: its cues and a pixel do not depend on the seed."""

    def reset(self, seed=None):
        return super().reset(None)

    def _obs(self):
        obs = super()._obs()
        obs["image"][0, 0] = self._random.integers(256, size=3)  # else two episodes may look the same
        return obs


class Refusing(Moody):
    """Its episodes also have random lengths, and it refuses steps after their end."""

    over = True

    def reset(self, seed=None):
        self.over, self._length = False, int(self._random.integers(2, 40))
        return super().reset(None)

    def step(self, action):
        if self.over:
            raise RuntimeError("the episode is over")
        result = super().step(action)
        self.over = result[2]
        return result


@pytest.mark.parametrize("env", [Moody, Refusing])
def test_nondeterministic_env_starts_new_episodes_and_a_line_says_so(tmp_path, monkeypatch, env):
    monkeypatch.setitem(envs.REGISTRY, "moody", lambda name, config: env(config.size))
    with signal_at(77):
        assert train(tmp_path, "--task", "moody_x") == 143
    before = checkpoints.load_checkpoint(tmp_path)[0]
    assert train(tmp_path, "--task", "moody_x") == 0
    assert "The open episodes end here" in log(tmp_path)
    after = checkpoints.load_checkpoint(tmp_path)[0]
    stored = sum(end - start for stream in after["replay"]["streams"] for _, start, end in stream)
    assert stored == after["progress"]["transitions"] + after["progress"]["episodes"]
    assert min(state["episode"] for state in after["actor"]["envs"]) >= before["progress"]["episodes"]


def test_train_ratio_is_kept_over_resumes_without_a_burst(tmp_path):
    def updates():
        return checkpoints.load_checkpoint(tmp_path)[0]["agent"]["updates"]

    most, before = 0, 0
    for step in range(36, 120, 14):
        with signal_at(step):
            train(tmp_path)
        most, before = max(most, updates() - before), updates()
    train(tmp_path)
    # From prefill (30) on, 3 / (2 * 4) updates a transition.
    assert updates() == int((120 - 30) * 3 / 8)
    assert most <= 14 * 3 / 8 + 2  # between two stops; the last step may be one of both envs


def test_new_run_in_a_folder_with_episodes_learns_from_them_and_plays_others(tmp_path, whole):
    shutil.copytree(whole() / "train_eps", tmp_path / "train_eps")
    with signal_at(120):
        assert train(tmp_path, "--steps", "500") == 143
    text = log(tmp_path)
    assert "Loaded 102 steps from" in text
    after = checkpoints.load_checkpoint(tmp_path)[0]
    assert after["step"] == 120 and after["agent"]["updates"] == int((120 - 96) * 3 / 8)
    assert min(state["episode"] for state in after["actor"]["envs"]) >= 6
