"""The cache of answers: one SQLite file in WAL mode, which several processes may read and write at once.

It holds validated advice under a hash of the question, neither captions nor keys. What is read is validated
again. A cache that cannot be used never ends a run.
"""

import contextlib
import hashlib
import json
import os
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from basics import UserError
from lore_llm.advice import Advice, AdviceSpec, parse_reply

MAX_ANSWERS = 100_000
MEMORY = 4096  # answers that are also kept in memory
LOCK_WAIT_S = 5.0  # how long a write waits for other processes
TABLE = "lore_advice"
CREATE = f"CREATE TABLE IF NOT EXISTS {TABLE} (id INTEGER PRIMARY KEY, key TEXT UNIQUE, advice TEXT)"
INSERT = (
    f"INSERT INTO {TABLE} (key, advice) VALUES (?, ?) "
    "ON CONFLICT (key) DO UPDATE SET advice = excluded.advice"
)
TRIM = f"DELETE FROM {TABLE} WHERE id <= (SELECT max(id) FROM {TABLE}) - ?"  # ids rise: the oldest rows
BROKEN = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


def question_key(
    identity: str, wants: Iterable[str], caption: str, seen: Mapping[str, np.ndarray] = MappingProxyType({})
) -> str:
    """The cache key: a hash of the adviser's identity, what is wanted, the caption and the arrays `seen`."""
    arrays = []
    for key in sorted(seen):
        array = np.ascontiguousarray(seen[key])
        arrays.append([key, str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).hexdigest()])
    question = json.dumps([identity, sorted(wants), caption, arrays])
    return hashlib.sha256(question.encode()).hexdigest()


class Cache:
    """Answers by `question_key`, in memory and in a file. `get` never waits for a writer.

    Args:
        path: The file. It and its folder are created if missing.
        spec: What advice may contain. Other advice in the file is ignored.
        size: Largest number of answers; the oldest are deleted first.
        record: False: the file is only read.
        must_exist: A missing file is an error (`llm.replay`).
        note: Receives lines for the log.

    Raises UserError if the file is the database of another program, or is missing and `must_exist`.
    """

    def __init__(
        self, path: Path, spec: AdviceSpec, *, size: int = MAX_ANSWERS, record: bool = True,
        must_exist: bool = False, note: Callable[[str], None] = print,
    ):  # fmt: skip
        self.path, self.spec, self.size, self.note = Path(path), spec, size, note
        self._memory: OrderedDict[str, Advice] = OrderedDict()
        self._lock = threading.Lock()  # of the memory and the reader
        self._reader: sqlite3.Connection | None = None
        self._writer: sqlite3.Connection | None = None
        if must_exist and not self.path.is_file():
            raise UserError(
                f"llm.replay takes answers from the cache alone, but there is none at {self.path}. Name "
                "one that was recorded with the same back end and model by --llm.cache, or leave out "
                "--llm.replay."
            )
        try:
            self._open_or_replace(record)
        except (sqlite3.Error, OSError) as error:
            self.close()
            if must_exist:
                raise UserError(f"llm.replay cannot use the cache {self.path} ({error}).") from error
            note(f"Cannot use the cache {self.path} ({error}): the run continues without it")

    def _open_or_replace(self, record: bool) -> None:
        try:
            self._open(record)
        except sqlite3.DatabaseError as error:
            if not record or error.sqlite_errorcode & 0xFF not in BROKEN:
                raise
            self.close()
            os.replace(self.path, f"{self.path}.broken")
            self.note(f"The cache {self.path} was broken and is now {self.path.name}.broken")
            self._open(record)

    def _open(self, record: bool) -> None:
        if record:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = db = self._connect("rwc")
            with contextlib.suppress(sqlite3.OperationalError):  # another process sets it at the same time
                db.execute("PRAGMA journal_mode = WAL")  # readers and the writer do not block each other
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute(CREATE)
        if self.path.is_file():
            self._reader = self._connect("ro")

    def _connect(self, mode: str) -> sqlite3.Connection:
        uri = f"{self.path.absolute().as_uri()}?mode={mode}"
        db = sqlite3.connect(
            uri, uri=True, timeout=LOCK_WAIT_S, isolation_level=None, check_same_thread=False
        )
        db.execute("PRAGMA trusted_schema = OFF")  # the file may come from others
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        if tables and TABLE not in tables:
            db.close()
            raise UserError(
                f"{self.path} is a database of another program, not a cache of answers. Name another file by "
                "--llm.cache, which need not exist."
            )
        return db

    def get(self, key: str) -> Advice | None:
        """The stored advice, or None."""
        with self._lock:
            if key in self._memory:
                self._memory.move_to_end(key)
                return self._memory[key]
            if self._reader is None:
                return None
            try:
                row = self._reader.execute(f"SELECT advice FROM {TABLE} WHERE key = ?", [key]).fetchone()
            except sqlite3.Error as error:
                self.note(f"Cannot read the cache {self.path} ({error}): answers may be asked for again")
                return None
        try:
            found = json.loads(row[0]) if row else None
        except (TypeError, ValueError, RecursionError):  # a damaged file
            return None
        advice = parse_reply(found, self.spec).advice
        if advice is not None:
            self._remember(key, advice)
        return advice

    def _remember(self, key: str, advice: Advice) -> None:
        with self._lock:
            self._memory[key] = advice
            self._memory.move_to_end(key)
            while len(self._memory) > min(self.size, MEMORY):
                self._memory.popitem(last=False)

    def put(self, key: str, advice: Advice) -> None:
        """Store advice, replacing an earlier one. May wait for other processes, but raises nothing."""
        self._remember(key, advice)
        if (db := self._writer) is None:
            return
        try:
            db.execute(INSERT, [key, advice.model_dump_json(exclude_defaults=True)])
            db.execute(TRIM, [self.size])
        except sqlite3.Error as error:
            self.note(f"Cannot write the cache {self.path} ({error}): new answers are not kept")

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            reader, writer, self._reader, self._writer = self._reader, self._writer, None, None
        for db in (reader, writer):  # the last connection deletes the journal, which a reader cannot
            if db is not None:
                db.close()
