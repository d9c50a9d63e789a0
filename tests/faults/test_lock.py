"""One run at a time uses a logdir, and the lock of a killed run does not block the next one."""

import errno
import os
import signal
import socket
import sys
import threading

import pytest
from filelock import FileLock
from run_helpers import log, metrics, train, train_process

from basics import UserError
from checkpoint import HOLDER, LOCK, run_lock

posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no such signal to a process")


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@posix
def test_second_run_is_refused_writes_nothing_and_names_the_first(tmp_path, capfd):
    logdir = tmp_path / "run"
    with train_process(logdir, "--steps", "1e6") as first:
        for line in first.stdout:
            if line.startswith("step 40"):
                break
        first.send_signal(signal.SIGSTOP)  # so that only the second run could change a file
        try:
            before = snapshot(logdir)
            assert train(logdir) == 2
            assert snapshot(logdir) == before
        finally:
            first.send_signal(signal.SIGCONT)
        errors = capfd.readouterr().err
        first.terminate()
        first.communicate()
        assert first.returncode == 143
    assert errors.startswith("error: ") and errors.count("\n") == 1 and str(logdir) in errors
    assert f"process {first.pid} on {socket.gethostname()}, since 20" in errors and "--logdir" in errors
    assert not (logdir / LOCK).exists() and not (logdir / HOLDER).exists()


def test_of_runs_that_start_at_the_same_time_one_gets_the_logdir(tmp_path):
    for _ in range(5):
        together, done, got, refused = threading.Barrier(8), threading.Event(), [], []

        def start(together=together, done=done, got=got, refused=refused):
            together.wait()
            try:
                with run_lock(tmp_path / "run"):
                    got.append(True)
                    done.wait()
            except UserError as error:
                refused.append(str(error))
                if len(refused) == 7:
                    done.set()

        threads = [threading.Thread(target=start) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 1 and all("is in use" in text for text in refused)
        assert list((tmp_path / "run").glob("*")) == []


@posix
def test_lock_of_a_killed_run_is_taken_over_with_a_line_in_the_log(tmp_path):
    process = train_process(tmp_path, "--save_every", "20", kill_at=50)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and (tmp_path / HOLDER).exists()
    assert train(tmp_path) == 0
    text = log(tmp_path)
    assert f"did not end cleanly (process {process.pid} on {socket.gethostname()}, since" in text
    assert metrics(tmp_path)[-1]["step"] == 120 and not (tmp_path / HOLDER).exists()


def test_disk_without_locks_is_used_with_a_warning(tmp_path, monkeypatch):
    def acquire(lock, **_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with run_lock(tmp_path) as notes:
        assert len(notes) == 1 and "no file locks" in notes[0]


def test_text_of_others_in_the_holder_file_cannot_control_the_terminal(tmp_path):
    (tmp_path / HOLDER).write_bytes(b"\x1b[2J\n\xff")
    with run_lock(tmp_path) as notes:
        assert notes[0].isprintable()


def test_leftovers_of_a_killed_write_are_removed(tmp_path):
    leftover = tmp_path / ".config.yaml.0123456789ab.tmp"
    leftover.write_bytes(b"half")
    with run_lock(tmp_path):
        assert not leftover.exists()
