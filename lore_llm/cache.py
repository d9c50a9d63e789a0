"""Answers that were given before: an SQLite file that several runs may read and write at once.

What is kept is validated advice under a hash of the question; neither captions nor keys. The file is not
trusted: what is read from it is validated again, and a broken file is set aside. A run never ends because of
its cache.
"""

import contextlib
import hashlib
import json
import os
import sqlite3
import threading
import time
import zlib
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from basics import UserError
from lore_llm.advice import Advice, AdviceSpec, parse_reply

MEMORY = 4096  # answers that are also kept in memory
LOCK_WAIT_S = 5.0  # for other runs that write
SHORT_WAIT_S = 0.1  # of a read in the loop
MAX_BROKEN = 3  # files that are set aside in one run; more, and it is the disk
MAX_CHARS = 1_000_000  # of an answer in the file; a longer one is not ours
TRIM = 20  # one of so many answers more than necessary goes when the file is full, so that it seldom is
APPLICATION_ID = 0x4C6F5265  # "LoRe", in the file's header
TABLE = "lore_answers"
# The ids grow without gaps, so the oldest answers are those with the smallest.
SCHEMA = (
    f"CREATE TABLE {TABLE} (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, "
    "advice TEXT NOT NULL, check_sum INTEGER NOT NULL, tokens INTEGER NOT NULL, time REAL NOT NULL)"
)
INSERT = (
    f"INSERT INTO {TABLE} (key, advice, check_sum, tokens, time) VALUES (?, ?, ?, ?, ?) "
    "ON CONFLICT (key) DO UPDATE SET advice = excluded.advice, check_sum = excluded.check_sum, "
    "tokens = excluded.tokens, time = excluded.time"
)
SELECT = f"SELECT advice, check_sum FROM {TABLE} WHERE key = ? AND length(advice) <= {MAX_CHARS}"
BROKEN = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


def question_key(
    identity: str, wants: Iterable[str], caption: str, seen: Mapping[str, np.ndarray] = MappingProxyType({})
) -> str:
    """Under what an answer is kept: a hash of who is asked, for what, and about what.

    `seen` is what the adviser sees of the observation beside the caption.
    """
    arrays = []
    for key in sorted(seen):
        array = np.ascontiguousarray(seen[key])
        arrays.append([key, str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).hexdigest()])
    question = json.dumps([identity, sorted(wants), caption, arrays])
    return hashlib.sha256(question.encode()).hexdigest()


class Cache:
    """Answers by `question_key`, in memory and in a file.

    `put` only notes down what `flush` writes, which any thread may call, so that the loop never waits for
    other runs that write.

    Args:
        path: The file; it and its folder are made if missing.
        spec: What advice may say; other advice in the file is not taken.
        size: Answers kept at most, the oldest go first. 0 keeps none and makes no file.
        record: False only reads the file.
        must_exist: Without the file nothing can be done (`llm.replay`).
        patient: Where the file is locked, which it hardly ever is for readers, `get` waits rather than find
            nothing.

    Raises UserError if the file is a database of something else, or is missing and must not.
    """

    def __init__(
        self,
        path: Path,
        spec: AdviceSpec,
        *,
        size: int,
        record: bool = True,
        must_exist: bool = False,
        patient: bool = False,
    ):
        self.path, self.spec, self.size = Path(path), spec, size
        self.read_wait = LOCK_WAIT_S if patient else SHORT_WAIT_S
        self.record = record and size > 0
        self._memory: OrderedDict[str, Advice] = OrderedDict()
        self._pending: deque[tuple[str, str, int, int, float]] = deque(maxlen=MEMORY)  # rows to be written
        self._notes: list[str] = []
        self._lock = threading.Lock()  # of the reader and all of the above
        self._io = threading.Lock()  # of the writer; taken before the other one, never after it
        self._reader: sqlite3.Connection | None = None
        self._writer: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None  # which file `path` was when it was opened
        self._broken = False  # the reader says so
        self._set_aside_count = 0
        if must_exist and not (size > 0 and self.path.is_file()):
            raise UserError(
                f"llm.replay takes answers from the cache alone, but there is none at {self.path}. Name "
                "one that was recorded with the same back end and model by --llm.cache, or leave out "
                "--llm.replay."
            )
        if size > 0:
            self._open_or_replace()

    # --- What is asked of it ---------------------------------------------------------------------------

    def get(self, key: str) -> Advice | None:
        """The answer that is kept, None if there is none."""
        with self._lock:
            if key in self._memory:
                self._memory.move_to_end(key)
                return self._memory[key]
            if self._reader is None or self._broken:
                return None
            try:
                row = self._reader.execute(SELECT, [key]).fetchone()
            except sqlite3.Error as error:
                # Whoever flushes next sees to it. A locked file is just not read.
                self._broken = _code(error) in BROKEN
                return None
        advice = self._read(key, *row) if row else None
        if advice is not None:
            self._remember(key, advice)
        return advice

    def _read(self, key: str, text: object, check_sum: object) -> Advice | None:
        """What a row says, None if anything is wrong with it."""
        if not isinstance(text, str) or check_sum != _check_sum(key, text):
            return None
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            return None
        return parse_reply(content, self.spec)[0] if isinstance(content, dict) else None

    def _remember(self, key: str, advice: Advice) -> None:
        with self._lock:
            self._memory[key] = advice
            self._memory.move_to_end(key)
            while len(self._memory) > min(self.size, MEMORY):
                self._memory.popitem(last=False)

    def put(self, key: str, advice: Advice, tokens: int = 0) -> None:
        """Keep an answer, which cost so many tokens. It takes the place of an earlier one."""
        self._remember(key, advice)
        if self.record:
            text = advice.model_dump_json(exclude_defaults=True)
            with self._lock:
                self._pending.append((key, text, _check_sum(key, text), tokens, time.time()))

    def flush(self) -> None:
        """Write what was put since the last time, as far as it is possible. Raises nothing."""
        with self._io:
            if self._broken:
                self._replace()
            with self._lock:
                rows = list(self._pending)
                self._pending.clear()
            if not rows or self._writer is None:
                return
            try:
                self._write(rows)
            except sqlite3.Error as error:
                if _code(error) in BROKEN:
                    self._replace()
                elif _code(error) not in BUSY:
                    self._close_writer()
                    self._note(f"Cannot write the cache {self.path} ({error}): new answers are not kept.")
                with self._lock:
                    self._pending.extendleft(reversed(rows))  # for the next time

    def _write(self, rows: list[tuple]) -> None:
        db = self._writer
        with _transaction(db):
            db.executemany(INSERT, rows)
            oldest, newest = db.execute(f"SELECT min(id), max(id) FROM {TABLE}").fetchone()
            if newest - oldest >= self.size:
                kept = self.size - self.size // TRIM
                db.execute(f"DELETE FROM {TABLE} WHERE id <= ?", [newest - kept])

    def notes(self) -> list[str]:
        """New lines for the log."""
        if self._broken and not self.record:
            self.flush()  # nothing else would see to it
        with self._lock:
            lines, self._notes = self._notes, []
        return lines

    def close(self) -> None:
        """Write what is left and give the file back."""
        self.flush()
        with self._io:
            self._close_reader()
            self._close_writer()  # as the last one it takes the journal away

    # --- The file --------------------------------------------------------------------------------------

    def _open_or_replace(self) -> None:
        """Open the file; a broken one is set aside first. What cannot be opened is done without."""
        try:
            self._open()
        except sqlite3.Error as error:
            if _code(error) in BROKEN:
                self._replace()
            else:
                self._give_up(str(error))
        except OSError as error:
            self._give_up(error.strerror or str(error))

    def _give_up(self, why: str) -> None:
        self._close_writer()
        self._close_reader()
        self._note(f"Cannot use the cache {self.path} ({why}): the run goes on without it.")

    def _open(self) -> None:
        """Connect a writer, where something may be written, and a reader."""
        if self.record:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._writer = self._connect("rwc", LOCK_WAIT_S)
                self._create(self._writer)
            except sqlite3.OperationalError as error:
                self._close_writer()
                if not self.path.is_file():
                    raise
                self._note(f"Cannot write the cache {self.path} ({error}): it is only read.")
        if not self.path.is_file():
            return
        try:
            reader = self._connect("ro", self.read_wait)
            self._check(reader)
        except sqlite3.OperationalError as error:
            if _code(error) not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
                raise
            # There is no room for its journal in a folder that nobody can write to.
            reader = self._connect("ro&immutable=1", self.read_wait)
            self._check(reader)
        status = self.path.stat()
        with self._lock:
            self._reader, self._file = reader, (status.st_dev, status.st_ino)

    def _connect(self, mode: str, wait_s: float) -> sqlite3.Connection:
        uri = f"{self.path.absolute().as_uri()}?mode={mode}"
        db = sqlite3.connect(uri, uri=True, timeout=wait_s, isolation_level=None, check_same_thread=False)
        db.text_factory = lambda raw: raw.decode(errors="replace")
        db.execute("PRAGMA trusted_schema = OFF")  # nothing that lies in the file is run
        db.execute("PRAGMA cell_size_check = ON")
        return db

    def _create(self, db: sqlite3.Connection) -> None:
        """Make a cache of an empty file; runs that start together take turns."""
        self._check(db)
        until = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                db.execute("PRAGMA journal_mode = WAL")  # readers and the writer do not wait for each other
                break
            except sqlite3.OperationalError as error:  # this change does not wait by itself
                if _code(error) not in BUSY or time.monotonic() > until:
                    raise
                time.sleep(0.01)
        db.execute("PRAGMA synchronous = NORMAL")
        with _transaction(db):
            if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                db.execute(SCHEMA)
                db.execute(f"PRAGMA application_id = {APPLICATION_ID}")

    def _check(self, db: sqlite3.Connection) -> None:
        """See that this is a cache, or empty. UserError: another program's file; DatabaseError: broken."""
        objects = db.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
        marked = db.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID
        if objects in ([], [(TABLE, SCHEMA)]):
            return
        if not marked and TABLE not in [name for name, _ in objects]:
            raise UserError(
                f"{self.path} is a database of another program, not a cache of answers. Name another file by "
                "--llm.cache, which need not exist."
            )
        error = sqlite3.DatabaseError("its tables are not as they should be")
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise error

    def _replace(self) -> None:
        """Set a broken file aside and begin a new one."""
        self._close_writer()
        self._close_reader()
        self._broken = False
        if not self.record or self._set_aside_count == MAX_BROKEN:
            self._give_up("it is broken")
            return
        try:
            status = self.path.stat()
            if self._file in (None, (status.st_dev, status.st_ino)):  # else another run has been faster
                aside = self._set_aside()
                self._note(f"The cache {self.path} is broken, so it is now {aside.name}; a new one begins.")
            self._open()
        except (OSError, sqlite3.Error, UserError) as error:
            self._give_up(getattr(error, "strerror", None) or str(error))

    def _set_aside(self) -> Path:
        self._set_aside_count += 1
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.broken-{number}")).exists():
            number += 1
        os.replace(self.path, aside)
        for suffix in ("-wal", "-shm"):  # other runs that have the old file open share these
            if (journal := Path(f"{self.path}{suffix}")).exists():
                os.replace(journal, f"{aside}{suffix}")
        return aside

    def _close_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _close_reader(self) -> None:
        with self._lock:
            if self._reader is not None:
                self._reader.close()
                self._reader = None

    def _note(self, line: str) -> None:
        with self._lock:
            self._notes.append(line)


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary error code; 0 where there is none."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _check_sum(key: str, text: str) -> int:
    """Finds flipped bits: a number that is wrong may still be valid."""
    return zlib.crc32((key + text).encode(errors="replace"))
