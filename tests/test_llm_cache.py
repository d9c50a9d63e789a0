"""The cache of answers: what is read is what was written, and no damage of the file ends a run."""

import json
import multiprocessing
import random
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from basics import UserError
from lore_llm import cache as caches
from lore_llm.advice import ActionPrior, Advice, AdviceSpec, OptionSpec
from lore_llm.cache import TABLE, Cache, question_key

ROOT = Path(caches.__file__).parent.parent
SPEC = AdviceSpec(("left", "right", "do"), ("drink",), features=2, max_chars=2000, max_skills=3)


def advice(number: float = 0.0) -> Advice:
    """Advice with all fields, that differs by a number."""
    skill = OptionSpec(
        option_id="a", name="Über", description='"quoted"', primitive_actions=("left", 2),
        expected_duration=3, confidence=0.9, subgoal="drink",
    )  # fmt: skip
    return Advice(
        action_prior=ActionPrior(logits=(0.1, -1 / 3, float(number))),
        confidence=0.123456789,
        features=(1e-17, 2.0),
        plan=("left", "do"),
        subgoal="drink",
        skills=(skill,),
    )


def opened(path: Path, **options) -> Cache:
    """A cache, with its lines for the log in `lines`."""
    lines: list[str] = []
    cache = Cache(path, SPEC, **{"size": 1000, "note": lines.append, **options})
    cache.lines = lines
    return cache


def filled(path: Path, count: int = 100) -> dict[str, Advice]:
    """The content of a new cache file."""
    known = {question_key("me", ["prior"], f"caption {i}"): advice(i) for i in range(count)}
    cache = opened(path)
    for key, value in known.items():
        cache.put(key, value)
    cache.close()
    assert cache.lines == []
    return known


def rows(path: Path) -> int:
    db = sqlite3.connect(path)
    try:
        return db.execute(f"SELECT count(*) FROM {TABLE}").fetchone()[0]
    finally:
        db.close()


def test_answers_are_found_by_this_run_and_the_next(tmp_path):
    cache = opened(tmp_path / "sub" / "cache.sqlite")
    assert cache.get("key") is None
    for value in (advice(), advice(1), Advice(plan=("do",)), Advice(subgoal="drink", confidence=0.0)):
        cache.put("key", value)
        assert cache.get("key") == value
        assert opened(cache.path).get("key") == value
    cache.close()
    assert rows(cache.path) == 1
    other = AdviceSpec(("north", "south"), (), features=0, max_chars=2000, max_skills=0)
    assert Cache(cache.path, other, size=10).get("key") is None  # not allowed there


def test_different_questions_have_different_keys():
    image = np.zeros((2, 3, 3), np.uint8)
    questions = [
        ("me", {"prior"}, "seen", {}),
        ("you", {"prior"}, "seen", {}),
        ("me", {"plan"}, "seen", {}),
        ("me", {"prior", "plan"}, "seen", {}),
        ("me", {"prior"}, "seen\x00", {}),
        ("me", {"prior"}, "seen", {"image": image}),
        ("me", {"prior"}, "seen", {"frame": image}),
        ("me", {"prior"}, "seen", {"image": image + 1}),
        ("me", {"prior"}, "seen", {"image": image.reshape(3, 2, 3)}),
        ("me", {"prior"}, "seen", {"image": image, "vector": image}),
    ]
    assert len({question_key(*question) for question in questions}) == len(questions)
    assert question_key("me", ["b", "a"], "x") == question_key("me", ["a", "b"], "x")


def write_many(path: Path, process: int, count: int) -> None:
    cache = opened(path)
    for i in range(count):
        for name in (process, "shared"):
            cache.put(question_key("me", (), f"{name} {i}"), advice(i))
            assert cache.get(question_key("me", (), f"{name} {i}")) == advice(i)
    cache.close()
    assert cache.lines == []


def test_processes_read_and_write_at_once(tmp_path):
    path, processes, count = tmp_path / "cache", 4, 50
    reader = opened(path)
    context = multiprocessing.get_context("spawn")
    jobs = [context.Process(target=write_many, args=(path, i, count)) for i in range(processes)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(120)
    assert [job.exitcode for job in jobs] == [0] * processes
    assert rows(path) == (processes + 1) * count
    for name in ("shared", *range(processes)):
        for i in range(count):
            assert reader.get(question_key("me", (), f"{name} {i}")) == advice(i)
    reader.close()
    assert not Path(f"{path}-wal").exists()


def test_the_oldest_answers_are_deleted_first(tmp_path, monkeypatch):
    monkeypatch.setattr(caches, "MEMORY", 5)
    cache = opened(tmp_path / "cache", size=40)
    for i in range(100):
        cache.put(str(i), advice(i))
        assert rows(cache.path) == min(i + 1, 40)
    assert len(cache._memory) == 5
    assert [i for i in range(100) if cache.get(str(i)) == advice(i)] == list(range(60, 100))
    small = opened(tmp_path / "cache", size=3)
    small.put("new", advice())
    assert rows(cache.path) == 3


def test_without_recording_the_file_is_only_read(tmp_path):
    known = filled(tmp_path / "cache")
    before = (tmp_path / "cache").read_bytes()
    cache = opened(tmp_path / "cache", record=False)
    cache.put("new", advice())
    assert all(cache.get(key) == value for key, value in known.items())
    cache.close()
    assert (tmp_path / "cache").read_bytes() == before
    opened(tmp_path / "absent", record=False).put("new", advice())
    assert not (tmp_path / "absent").exists()


def test_a_replay_needs_a_file(tmp_path):
    with pytest.raises(UserError, match=r"llm\.replay .*cache.*--llm\.cache"):
        opened(tmp_path / "cache", record=False, must_exist=True)


def test_a_broken_file_is_renamed(tmp_path):
    path = tmp_path / "cache"
    for content in (b"no database " * 1000, b"SQLite format 3\0" + bytes(5000)):
        path.write_bytes(content)
        reader = opened(path, record=False)
        assert "the run continues without it" in reader.lines[0]
        cache = opened(path)
        cache.put("key", advice())
        cache.close()
        assert cache.lines == [f"The cache {path} was broken and is now cache.broken"]
        assert (tmp_path / "cache.broken").read_bytes() == content
        assert opened(path).get("key") == advice()


def test_no_damage_ends_a_run(tmp_path):
    path = tmp_path / "cache"
    known = filled(path)
    whole, rng, found = path.read_bytes(), random.Random(0), 0
    for kind in ("flipped", "cut", "zeroed", "broken while open") * 15:
        data, place = bytearray(whole), rng.randrange(len(whole))
        if kind == "flipped":
            for _ in range(30):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del data[place:]
        else:
            data[place : place + 500] = bytes(len(data[place : place + 500]))
        for old in tmp_path.iterdir():
            old.unlink()
        path.write_bytes(whole if kind == "broken while open" else data)
        cache = opened(path)
        if kind == "broken while open":
            path.write_bytes(data[:4096] + b"\xff" * 200_000)
        for key in known:
            found += cache.get(key) is not None
        cache.put("new", advice())
        assert cache.get("new") == advice()
        cache.close()
    assert found > len(known) * 15


def test_invalid_rows_are_no_answers(tmp_path):
    path = tmp_path / "cache"
    filled(path, 1)
    texts = {
        "number": 7,
        "blob": b"\xff\xfe",
        "null": None,
        "no json": "{" * 1000,
        "deep": '{"a":' * 100_000,
        "list": "[1, 2]",
        "logits": json.dumps({"action_prior": {"logits": [1.0, 2.0]}}),
        "name": json.dumps({"plan": ["left", "__import__"]}),
    }
    db = sqlite3.connect(path)
    for row in texts.items():
        db.execute(caches.INSERT, row)
    db.commit()
    db.close()
    cache = opened(path)
    assert [cache.get(key) for key in texts] == [None] * len(texts)
    cache.put("name", advice())
    assert opened(path).get("name") == advice()
    assert cache.lines == []


def test_the_database_of_another_program_is_not_touched(tmp_path):
    path = tmp_path / "precious"
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE savings (amount)")
    db.close()
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"precious is a database of another program.*--llm\.cache"):
        opened(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("place", ["file/cache", ""])
def test_a_path_that_cannot_be_a_file_is_noted(tmp_path, place):
    (tmp_path / "file").write_text("")
    cache = opened(tmp_path / place)
    cache.put("key", advice())
    assert cache.get("key") == advice()  # in memory
    (line,) = cache.lines
    assert str(tmp_path / place) in line and "continues without it" in line
    if place:
        with pytest.raises(UserError):
            opened(tmp_path / place, record=False, must_exist=True)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, "tests")
from test_llm_cache import advice, opened
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
cache = opened(Path(sys.argv[1]))
cache.put("before", advice())
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for i in range(1000):
    cache.put(str(i), advice(i))
    assert cache.get(str(i)) == advice(i)
assert cache.get("before") == advice()
cache.close()
print(set(cache.lines))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot limit the size of files")
def test_a_full_disk_is_noted(tmp_path):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "cache")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Cannot write the cache" in done.stdout
    assert opened(tmp_path / "cache").get("before") == advice()


def test_a_read_does_not_wait_for_a_writer(tmp_path, monkeypatch):
    monkeypatch.setattr(caches, "LOCK_WAIT_S", 60)
    known = filled(tmp_path / "cache")
    cache = opened(tmp_path / "cache")
    db = sqlite3.connect(cache.path, isolation_level=None)
    db.execute("BEGIN EXCLUSIVE")
    db.execute(f"DELETE FROM {TABLE}")
    writer = threading.Thread(target=cache.put, args=("new", advice()))
    writer.start()
    started = time.perf_counter()
    assert all(cache.get(key) == value for key, value in known.items())
    assert time.perf_counter() - started < 0.5 * caches.LOCK_WAIT_S
    assert writer.is_alive()
    db.execute("ROLLBACK")
    db.close()
    writer.join(60)
    cache.close()
    assert rows(cache.path) == len(known) + 1
