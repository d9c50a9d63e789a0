"""The cache of answers: what is read is what was written, whatever happens to the file."""

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
    """Advice with everything in it, told apart by a number."""
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
    return Cache(path, SPEC, **{"size": 1000, **options})


def filled(path: Path, count: int = 100) -> dict[str, Advice]:
    """What a new cache file was filled with."""
    known = {question_key("me", ["prior"], f"caption {i}"): advice(i) for i in range(count)}
    cache = opened(path)
    for key, value in known.items():
        cache.put(key, value, tokens=7)
    cache.close()
    assert cache.notes() == []
    return known


def rows(path: Path) -> int:
    db = sqlite3.connect(path)
    try:
        return db.execute(f"SELECT count(*) FROM {TABLE}").fetchone()[0]
    finally:
        db.close()


def test_what_was_put_is_got_by_this_run_and_the_next(tmp_path):
    cache = opened(tmp_path / "sub" / "cache.sqlite")
    assert cache.get("key") is None
    cache.put("key", advice())
    assert cache.get("key") == advice()
    cache.put("key", advice(1))
    assert cache.get("key") == advice(1)
    cache.close()
    assert opened(cache.path).get("key") == advice(1)
    assert rows(cache.path) == 1


def test_advice_that_says_little_stays_as_it_is(tmp_path):
    for number, little in enumerate((Advice(plan=("do",)), Advice(subgoal="drink", confidence=0.0))):
        cache = opened(tmp_path / str(number))
        cache.put("key", little)
        cache.close()
        assert opened(cache.path).get("key") == little


def test_keys_tell_questions_apart():
    image = np.zeros((2, 3, 3), np.uint8)
    questions = [
        ("me", {"prior"}, "seen", {}),
        ("you", {"prior"}, "seen", {}),
        ("me", {"plan"}, "seen", {}),
        ("me", {"prior", "plan"}, "seen", {}),
        ("me", {"prior"}, "seen\x00", {}),
        ("me", {"prior"}, "\ud800", {}),
        ("me", {"prior"}, "seen", {"image": image}),
        ("me", {"prior"}, "seen", {"frame": image}),
        ("me", {"prior"}, "seen", {"image": image + 1}),
        ("me", {"prior"}, "seen", {"image": image.reshape(3, 2, 3)}),
        ("me", {"prior"}, "seen", {"image": image, "vector": image}),
    ]
    assert len({question_key(*question) for question in questions}) == len(questions)
    assert question_key("me", ["b", "a"], "x") == question_key("me", ["a", "b"], "x")
    mirrored = {"image": image[:, ::-1]}
    assert question_key("me", (), "x", mirrored) == question_key(
        "me", (), "x", {"image": image[:, ::-1].copy()}
    )


def test_runs_that_are_open_at_once_see_what_the_others_wrote(tmp_path):
    one, other = opened(tmp_path / "cache"), opened(tmp_path / "cache")
    one.put("key", advice())
    assert other.get("key") is None
    one.flush()
    assert other.get("key") == advice()
    one.close()
    other.close()
    assert not Path(f"{one.path}-wal").exists()


def write_many(path: Path, process: int, count: int) -> None:
    cache = opened(path)
    for i in range(count):
        cache.put(question_key("me", (), f"{process} {i}"), advice(i))
        cache.put(question_key("me", (), f"shared {i}"), advice(i))
        if i % 5 == 0:
            cache.flush()
        assert cache.get(question_key("me", (), f"{process} {i}")) == advice(i)
    cache.close()
    assert cache.notes() == []


def test_processes_write_at_once(tmp_path):
    path, processes, count = tmp_path / "cache", 4, 50
    context = multiprocessing.get_context("spawn")
    jobs = [context.Process(target=write_many, args=(path, i, count)) for i in range(processes)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0] * processes
    assert rows(path) == (processes + 1) * count
    cache = opened(path)
    for name in ("shared", *range(processes)):
        for i in range(count):
            assert cache.get(question_key("me", (), f"{name} {i}")) == advice(i)


def test_the_oldest_go_first(tmp_path):
    cache = opened(tmp_path / "cache", size=40)
    for i in range(100):
        cache.put(str(i), advice(i))
        cache.flush()
        assert min(i + 1, 38) <= rows(cache.path) <= 40
    cache.close()
    again = opened(tmp_path / "cache", size=40)
    kept = [i for i in range(100) if again.get(str(i))]
    assert kept == list(range(100 - len(kept), 100))
    small = opened(tmp_path / "cache", size=3)
    small.put("new", advice())
    small.flush()
    assert rows(cache.path) == 3
    assert len(small._memory) <= 3


def test_what_memory_forgets_is_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(caches, "MEMORY", 5)
    cache = opened(tmp_path / "cache")
    for i in range(20):
        cache.put(str(i), advice(i))
        cache.flush()
    assert len(cache._memory) == 5
    assert [cache.get(str(i)) for i in range(20)] == [advice(i) for i in range(20)]


def test_size_0_makes_no_file(tmp_path):
    cache = opened(tmp_path / "cache", size=0)
    cache.put("key", advice())
    assert cache.get("key") is None
    cache.close()
    assert list(tmp_path.iterdir()) == []


def test_without_recording_the_file_is_only_read(tmp_path):
    known = filled(tmp_path / "cache")
    before = (tmp_path / "cache").read_bytes()
    cache = opened(tmp_path / "cache", record=False)
    cache.put("new", advice())
    cache.close()
    assert (tmp_path / "cache").read_bytes() == before
    again = opened(tmp_path / "cache", record=False)
    assert all(again.get(key) == value for key, value in known.items())
    assert again.get("new") is None
    absent = opened(tmp_path / "absent", record=False)
    absent.put("new", advice())
    absent.close()
    assert not (tmp_path / "absent").exists()


def test_a_file_that_is_only_read_stays_where_it_is_when_it_is_broken(tmp_path):
    path = tmp_path / "cache"
    known = filled(path, 500)
    cache = opened(path, record=False)
    path.write_bytes(content := path.read_bytes()[:4096] + b"\xff" * 200_000)
    assert cache.get(next(iter(known))) is None
    assert cache.notes() == [f"Cannot use the cache {path} (it is broken): the run goes on without it."]
    cache.close()
    assert path.read_bytes() == content and not (tmp_path / "cache.broken-1").exists()


@pytest.mark.parametrize("size", [0, 10])
def test_a_replay_needs_a_file(tmp_path, size):
    if not size:
        filled(tmp_path / "cache", 1)
    with pytest.raises(UserError, match=r"llm\.replay .*cache.*--llm\.cache"):
        opened(tmp_path / "cache", size=size, record=False, must_exist=True)


def test_a_broken_file_is_set_aside(tmp_path):
    path = tmp_path / "cache"
    for number, content in enumerate((b"no database " * 1000, b"SQLite format 3\0" + bytes(5000)), 1):
        path.write_bytes(content)
        cache = opened(path)
        cache.put("key", advice())
        cache.close()
        assert cache.notes() == [
            f"The cache {path} is broken, so it is now cache.broken-{number}; a new one begins."
        ]
        assert (tmp_path / f"cache.broken-{number}").read_bytes() == content
        assert opened(path).get("key") == advice()


def test_a_file_that_breaks_meanwhile_is_set_aside(tmp_path):
    path = tmp_path / "cache"
    known = filled(path, 500)
    cache = opened(path)
    path.write_bytes(path.read_bytes()[:4096] + b"\xff" * 200_000)
    assert [cache.get(key) for key in list(known)[:3]] == [None] * 3
    cache.put("key", advice())
    cache.flush()
    cache.close()
    (line,) = cache.notes()
    assert "broken-1" in line
    assert opened(path).get("key") == advice()


def test_another_run_that_set_the_file_aside_is_followed(tmp_path):
    path = tmp_path / "cache"
    known = filled(path, 500)
    one, other = opened(path), opened(path)
    path.write_bytes(path.read_bytes()[:4096] + b"\xff" * 200_000)
    for number, cache in enumerate((one, other)):
        assert cache.get(next(iter(known))) is None
        cache.put(f"key {number}", advice(number))
        cache.flush()
        cache.close()
    assert (tmp_path / "cache.broken-1").exists() and not (tmp_path / "cache.broken-2").exists()
    assert (tmp_path / "cache.broken-1-shm").exists()  # which the other run still had open
    assert len(one.notes() + other.notes()) == 1
    assert [opened(path).get(f"key {number}") for number in range(2)] == [advice(0), advice(1)]


def test_a_disk_that_breaks_each_file_is_given_up(tmp_path, monkeypatch):
    cache = opened(tmp_path / "cache")

    def broken(rows):
        error = sqlite3.DatabaseError("malformed")
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise error

    monkeypatch.setattr(cache, "_write", broken)
    for _ in range(10):
        cache.put("key", advice())
        cache.flush()
    assert len(cache.notes()) == caches.MAX_BROKEN + 1
    assert cache.get("key") == advice()
    cache.close()


@pytest.mark.parametrize("kind", ["flipped", "cut", "zeroed"])
def test_no_damage_ends_a_run_or_changes_an_answer(tmp_path, kind):
    path = tmp_path / "cache"
    known = filled(path)
    whole, rng, found = path.read_bytes(), random.Random(0), 0
    for _ in range(60):
        data, place = bytearray(whole), rng.randrange(len(whole))
        if kind == "flipped":
            for _ in range(rng.choice([1, 30])):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del data[place:]
        else:
            data[place : place + 500] = bytes(len(data[place : place + 500]))
        for old in tmp_path.iterdir():
            old.unlink()
        path.write_bytes(data)
        cache = opened(path)
        for key, value in known.items():
            got = cache.get(key)
            assert got in (None, value)
            found += got is not None
        cache.put("new", advice())
        cache.close()
        cache.notes()
    assert found > len(known) * 60 // 10 or kind == "cut"


def test_hostile_rows_are_no_answers(tmp_path):
    path = tmp_path / "cache"
    filled(path, 1)
    texts = {
        "number": 7,
        "blob": b"\xff\xfe",
        "no json": "{" * 1000,
        "deep": "[" * 100_000 + "]" * 100_000,
        "list": "[1, 2]",
        "digits": '{"confidence": ' + "9" * 5000 + "}",
        "logits": json.dumps({"action_prior": {"logits": [1.0, 2.0]}}),
        "name": json.dumps({"plan": ["left", "__import__"]}),
        "long": json.dumps({"plan": ["left"], "x": "x" * 2_000_000}),
        "bad sum": json.dumps({"plan": ["left"]}),
    }
    db = sqlite3.connect(path)
    for key, text in texts.items():
        check_sum = caches._check_sum(key, text) if isinstance(text, str) and key != "bad sum" else 1
        db.execute(caches.INSERT, (key, text, check_sum, 1, 1.0))
    db.commit()
    db.close()
    cache = opened(path)
    assert [cache.get(key) for key in texts] == [None] * len(texts)
    cache.put("bad sum", advice())
    cache.close()
    assert opened(path).get("bad sum") == advice()
    assert cache.notes() == []


def test_what_the_spec_does_not_allow_is_not_taken(tmp_path):
    known = filled(tmp_path / "cache", 1)
    other = AdviceSpec(("north", "south"), (), features=0, max_chars=2000, max_skills=0)
    assert Cache(tmp_path / "cache", other, size=10).get(next(iter(known))) is None


def test_a_database_of_something_else_is_left_alone(tmp_path):
    path = tmp_path / "precious"
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE savings (amount)")
    db.close()
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"precious is a database of another program.*--llm\.cache"):
        opened(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_trigger_in_the_file_is_not_run(tmp_path):
    path = tmp_path / "cache"
    filled(path)
    db = sqlite3.connect(path)
    db.execute(f"CREATE TRIGGER evil AFTER INSERT ON {TABLE} BEGIN DELETE FROM {TABLE}; END")
    db.commit()
    db.close()
    cache = opened(path)
    for i in range(2):
        cache.put(str(i), advice())
        cache.flush()
    cache.close()
    assert rows(path) == 2
    assert "broken-1" in cache.notes()[0]


@pytest.mark.parametrize("place", ["file/cache", ""])
def test_a_place_where_no_file_can_be_is_told_once(tmp_path, place):
    (tmp_path / "file").write_text("")
    cache = opened(tmp_path / place)
    cache.put("key", advice())
    cache.flush()
    assert cache.get("key") == advice()  # in memory
    cache.close()
    (line,) = cache.notes()
    assert str(tmp_path / place) in line and "goes on without it" in line


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, "tests")
from test_llm_cache import advice, opened
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
cache = opened(Path(sys.argv[1]))
cache.put("before", advice())
cache.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for i in range(2000):
    cache.put(str(i), advice(i))
    cache.flush()
    assert cache.get(str(i)) == advice(i)
assert cache.get("before") == advice()
cache.close()
print(cache.notes())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot limit the size of files")
def test_a_full_disk_is_told_once(tmp_path):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "cache")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Cannot write the cache") == 1
    assert opened(tmp_path / "cache").get("before") == advice()


def test_a_read_does_not_wait_for_a_writer(tmp_path):
    known = filled(tmp_path / "cache")
    cache = opened(tmp_path / "cache")
    db = sqlite3.connect(cache.path, isolation_level=None)
    db.execute("BEGIN EXCLUSIVE")
    db.execute(f"DELETE FROM {TABLE}")
    writer = threading.Thread(target=cache.flush)
    cache.put("new", advice())
    writer.start()
    started = time.perf_counter()
    assert all(cache.get(key) == value for key, value in known.items())
    assert time.perf_counter() - started < 0.5
    assert writer.is_alive()
    db.execute("ROLLBACK")
    db.close()
    writer.join(5)
    cache.close()
    assert rows(cache.path) == len(known) + 1


def test_what_could_not_be_written_is_written_later(tmp_path, monkeypatch):
    monkeypatch.setattr(caches, "LOCK_WAIT_S", 0.01)
    cache = opened(tmp_path / "cache")
    db = sqlite3.connect(cache.path, isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    cache.put("key", advice())
    cache.flush()
    assert rows(cache.path) == 0
    db.execute("ROLLBACK")
    db.close()
    cache.flush()
    assert rows(cache.path) == 1
    assert cache.notes() == []
    cache.close()
