"""A logdir belongs to one run at a time; what a kill leaves behind is recognised."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import filelock
import pytest
from run_helpers import log, metrics, signal_at, train, train_process

import checkpoint as checkpoints
import dreamer
from basics import UserError
from checkpoint import LOCK, RunLock, read_owner

posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no such signal to a process")


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(checkpoints, "BEAT", 0.05)
    monkeypatch.setattr(checkpoints, "PATIENCE", 0.5)
    monkeypatch.setattr(checkpoints, "POLL", 0.02)


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != LOCK}


def left_behind(folder, host: str) -> None:
    """A lock as a killed run leaves it."""
    (folder / LOCK).write_text(" " + json.dumps({"host": host, "pid": 4321, "since": "yesterday"}))


# ---- Two runs


@posix
def test_second_run_is_refused_with_the_first_ones_machine_and_process_and_writes_nothing(tmp_path, capfd):
    logdir = tmp_path / "run"
    with train_process(logdir, "--steps", "1e6") as first:
        for line in first.stdout:
            if line.startswith("step 40"):
                break
        first.send_signal(signal.SIGSTOP)  # so that nothing changes that is not the second one's doing
        try:
            before = snapshot(logdir)
            assert train(logdir) == 2
            errors = capfd.readouterr().err
            assert snapshot(logdir) == before
        finally:
            first.send_signal(signal.SIGCONT)
        first.terminate()
        first.communicate()
        assert first.returncode == 143
    assert errors.startswith("error: ") and errors.count("\n") == 1 and str(logdir) in errors
    assert f"process {first.pid} on {socket.gethostname()}, since 20" in errors and "--logdir" in errors
    assert not (logdir / LOCK).exists()
    stopped = checkpoints.load_checkpoint(logdir)[0]["step"]
    with signal_at(stopped + 20):
        assert train(logdir, "--steps", "1e6") == 143
    assert f"Resumed at step {stopped}" in log(logdir) and "did not end by itself" not in log(logdir)


def test_two_that_start_at_the_same_time_cannot_both_have_it(tmp_path):
    for _ in range(20):
        barrier, got, refused = threading.Barrier(8), [], []

        def start(barrier=barrier, got=got, refused=refused):
            barrier.wait()
            try:
                got.append(RunLock(tmp_path / "run"))
            except UserError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=start) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 1 and len(refused) == 7
        got[0].close()
        assert list(tmp_path.rglob(LOCK)) == []


def test_who_waits_for_a_file_that_is_then_deleted_locks_the_new_one(tmp_path, monkeypatch):
    first, whole = RunLock(tmp_path), checkpoints._lock

    def late(file):
        first.close()  # just between open and lock
        return whole(file)

    monkeypatch.setattr(checkpoints, "_lock", late)
    monkeypatch.setattr(first, "close", lambda done=[], close=first.close: done or done.append(close()))
    second = RunLock(tmp_path)
    monkeypatch.setattr(checkpoints, "_lock", whole)
    with pytest.raises(UserError, match="is in use"):
        RunLock(tmp_path)
    second.close()


@pytest.mark.parametrize("options", ["--rssm.deter 7", "--device cuda:77", "--no_such_option 1"])
def test_run_that_is_refused_gives_the_logdir_free(tmp_path, options):
    assert train(tmp_path / "run", *options.split()) == 2
    assert list(tmp_path.iterdir()) == []
    RunLock(tmp_path / "run").close()
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_that_another_run_wrote_meanwhile_is_not_gone_behind(tmp_path, capfd, monkeypatch):
    assert train(tmp_path, "--steps", "40") == 0
    load = checkpoints.load_checkpoint

    def overtaken(path):
        loaded = load(path)
        if len(loads) == 0:
            loads.append(True)
            assert train(tmp_path, "--steps", "60") == 0  # starts, saves and ends in between
        return loaded

    loads = []
    monkeypatch.setattr(checkpoints, "load_checkpoint", overtaken)
    assert train(tmp_path) == 2
    assert "has just saved and ended. Start again" in capfd.readouterr().err
    assert train(tmp_path) == 0
    assert "Resumed at step 60" in log(tmp_path) and "younger than the checkpoint" not in log(tmp_path)


# ---- What a kill leaves


@posix
def test_lock_of_a_killed_run_is_taken_over_and_the_log_says_so(tmp_path):
    process = train_process(tmp_path, "--save_every", "20", kill_at=50)
    process.communicate()
    owner = read_owner(tmp_path / LOCK)
    assert process.returncode == -signal.SIGKILL and owner.pid == process.pid
    assert train(tmp_path) == 0
    text = log(tmp_path)
    assert f"did not end by itself (process {process.pid} on {socket.gethostname()}, since" in text
    assert metrics(tmp_path)[-1]["step"] == 120 and not (tmp_path / LOCK).exists()


def test_process_that_now_has_the_id_of_a_killed_run_is_not_mistaken_for_it(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        text = json.dumps({"host": socket.gethostname(), "pid": other.pid, "since": "yesterday"})
        (tmp_path / LOCK).write_text(f" {text}")
        with RunLock(tmp_path) as taken:
            assert read_owner(taken.path).pid == os.getpid()
        assert f"process {other.pid}" in taken.notes[0]
        other.communicate(b"\n")


def test_lock_that_another_machine_left_is_taken_over_after_a_while(tmp_path, capsys):
    left_behind(tmp_path, "elsewhere")
    with RunLock(tmp_path) as taken:
        assert "process 4321 on elsewhere" in taken.notes[0]
    assert "process 4321 on elsewhere" in capsys.readouterr().err  # one knows what it waits for


def test_run_that_lives_on_another_machine_is_respected_though_its_lock_is_not_seen(tmp_path, monkeypatch):
    with RunLock(tmp_path) as first:
        # A disk that locks for each machine alone.
        monkeypatch.setattr(checkpoints, "_lock", lambda file: True)
        monkeypatch.setattr(socket, "gethostname", lambda: "here")
        monkeypatch.setattr(checkpoints, "PATIENCE", 60)  # it ends at the first sign of life
        with pytest.raises(UserError, match=f"process {os.getpid()} on"):
            RunLock(tmp_path)
        assert first.path.exists()
    with RunLock(tmp_path) as second:
        assert second.notes == []


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_disk_that_cannot_lock_is_watched_for_signs_of_life(tmp_path, monkeypatch, code):
    def cannot(file, blocking):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(filelock, "lock_descriptor", cannot)
    with RunLock(tmp_path), monkeypatch.context() as patch:
        patch.setattr(checkpoints, "PATIENCE", 60)  # it ends at the first sign of life
        with pytest.raises(UserError, match="is in use"):
            RunLock(tmp_path)
    left_behind(tmp_path, socket.gethostname())
    with RunLock(tmp_path) as second:
        assert "process 4321" in second.notes[0]


@pytest.mark.parametrize(
    "content",
    [b"", b" ", b" {", b" [1]", b' {"host": 1}', b" \xff\xfe", b' {"host": "\\u001b[2J", "pid": 1}'],
)
def test_file_that_no_run_has_signed_stops_nobody(tmp_path, content):
    (tmp_path / LOCK).write_bytes(content)
    with RunLock(tmp_path) as taken:
        assert taken.notes == []


def test_deleted_or_lost_file_ends_no_run(tmp_path):
    with RunLock(tmp_path) as held:
        held.path.unlink()
        [beat] = [thread for thread in threading.enumerate() if thread.name == "run-lock"]
        beat.join(5)
        assert not beat.is_alive()
    assert not [thread for thread in threading.enumerate() if thread.name == "run-lock"]


def test_disk_that_is_away_for_a_moment_is_touched_when_it_is_back(tmp_path, monkeypatch):
    whole, refusals, touched = os.utime, [True] * 2, threading.Event()

    def shaky(path):
        if refusals:
            raise OSError(errno.EIO if refusals.pop() else errno.ESTALE, "away")
        whole(path)
        touched.set()

    monkeypatch.setattr(os, "utime", shaky)
    with RunLock(tmp_path):
        assert touched.wait(60)


def test_logdir_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="file"):
        RunLock(tmp_path / "file")


def test_evaluation_and_help_need_no_lock(tmp_path, capfd):
    assert train(tmp_path, "--steps", "40", "--eval_every", "0") == 0
    import evaluate

    with RunLock(tmp_path):
        assert evaluate.main(["--logdir", str(tmp_path), "--episodes", "1", "--device", "cpu"]) == 0
        with pytest.raises(SystemExit) as done:
            dreamer.main(["--logdir", str(tmp_path), "--print_config"])
        assert done.value.code == 0
