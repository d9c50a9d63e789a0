"""One run at a time in a logdir: the file `run.lock` there is locked while a run lives, and tells who."""

import contextlib
import datetime
import errno
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import filelock

from basics import UserError, write_error

LOCK = "run.lock"  # file in the logdir
BEAT = 10.0  # seconds between two signs of life
PATIENCE = 3 * BEAT  # seconds without one after which a run on another machine counts as gone
POLL = 0.5  # seconds between looks for one
MAX_BYTES = 1000  # of the file; a longer one is not ours
CANNOT_LOCK = {errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}


class Owner(NamedTuple):
    """Who holds a lock, or held it when it was killed."""

    host: str
    pid: int
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class RunLock:
    """Held from when it is made until `close`, by one run in a logdir. Missing folders are made.

    The lock is the operating system's and ends with its process, whatever ended that; then the file stays
    behind. Disks that several machines share may lock for each machine alone, or not at all. So who holds the
    lock touches the file every BEAT seconds, and who finds a file that another machine has left, or that
    cannot be locked, first looks for PATIENCE seconds whether anybody still touches it.

    `notes` are lines for the log. Raises UserError where another run lives, with its machine and process id,
    and where the file cannot be written.
    """

    def __init__(self, logdir: str | os.PathLike):
        self.path = Path(logdir) / LOCK
        self.notes: list[str] = []
        self._made = [folder for folder in self.path.parents if not folder.exists()]  # the innermost first
        self._closed = threading.Event()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._take()
        except OSError as error:
            raise write_error(self.path, error) from error
        threading.Thread(target=self._beat, name="run-lock", daemon=True).start()

    def _take(self) -> int:
        """Open, lock and sign the file; returns its descriptor."""
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                locked = _lock(file)
                if locked is False:
                    raise self._in_use(read_owner(self.path))
                if self._is_there(file):  # else its holder deleted it just before it was unlocked
                    self._replace(read_owner(self.path), bool(locked))
                    _sign(file)
                    return file
            except BaseException:
                os.close(file)
                raise
            os.close(file)

    def _is_there(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _in_use(self, owner: Owner | None) -> UserError:
        return UserError(
            f"{self.path.parent} is in use by another run ({owner or 'it is just starting'}). Stop that one "
            "first, or give another --logdir."
        )

    def _replace(self, owner: Owner | None, locked: bool) -> None:
        """Make sure that who signed the file is gone."""
        if owner is None:
            return
        if owner.host != socket.gethostname() or not locked:
            print(f"Looking for {PATIENCE:g} s whether a run is alive here: {owner}", file=sys.stderr)
            if self._is_touched():
                raise self._in_use(owner)
        self.notes.append(f"The last run here did not end by itself ({owner}): its lock is taken over")

    def _is_touched(self) -> bool:
        """Whether there is a sign of life. No clocks are compared: machines disagree on the time."""
        until, first = time.monotonic() + PATIENCE, self._touched()
        while time.monotonic() < until:
            time.sleep(POLL)
            if self._touched() != first:
                return True
        return False

    def _touched(self) -> int:
        with open(self.path, "rb") as file:  # opened anew, or a network disk would tell what it remembers
            return os.fstat(file.fileno()).st_mtime_ns

    def _beat(self) -> None:
        while not self._closed.wait(BEAT):
            try:
                os.utime(self.path)
            except FileNotFoundError:  # somebody deleted it
                return
            except OSError:  # a network disk that is away for a moment; others will look for signs of life
                continue

    def close(self) -> None:
        """Give the logdir free. The file goes, and with it the folders that were made and are empty."""
        self._closed.set()
        if os.name != "nt":  # first, or whoever locks the file next would lose it
            self._delete()
        os.close(self._file)
        if os.name == "nt":  # an open file cannot be deleted: not ours before, not who locked it since
            self._delete()
        with contextlib.suppress(OSError):  # not empty
            for folder in self._made:
                folder.rmdir()

    def _delete(self) -> None:
        with contextlib.suppress(OSError):  # a file that stays behind is taken over
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _lock(file: int) -> bool | None:
    """Whether the open file is locked by this process now; None where the disk knows no locks."""
    try:
        return filelock.lock_descriptor(file, blocking=False)
    except OSError as error:
        if error.errno in CANNOT_LOCK:
            return None
        raise


def _sign(file: int) -> None:
    """Write down whose lock it is. Windows shows nobody else the first byte, which is the locked one."""
    since = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    text = " " + json.dumps(Owner(socket.gethostname(), os.getpid(), since)._asdict())
    os.ftruncate(file, 0)
    os.write(file, text.encode())
    os.fsync(file)


def read_owner(path: str | os.PathLike) -> Owner | None:
    """Who signed a lock file; None if nobody has, or if it says nothing of the kind."""
    with open(path, "rb", buffering=0) as file:
        file.seek(1)
        text = file.read(MAX_BYTES)
    try:
        content = json.loads(text)
        owner = Owner(str(content["host"]), int(content["pid"]), str(content["since"]))
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return owner if str(owner).isprintable() else None


def look(logdir: str | os.PathLike) -> tuple[Owner | None, bool | None]:
    """Who signed the lock of a logdir, and whether it is held; None where that cannot be told from here.

    Changes nothing. Raises FileNotFoundError where there is no lock.
    """
    path = Path(logdir) / LOCK
    owner = read_owner(path)
    file = os.open(path, os.O_RDWR)
    try:
        free = _lock(file)
    finally:
        os.close(file)
    elsewhere = owner is not None and owner.host != socket.gethostname()
    return owner, True if free is False else None if elsewhere or free is None else False
