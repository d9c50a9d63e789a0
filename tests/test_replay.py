"""The replay: ring, windows, sampling, capacity, episode files, save and load."""

import errno
import os

import gymnasium
import numpy as np
import pytest

import episodes
import replay as replay_module
from basics import UserError
from episodes import EpisodeWriter, list_episodes, read_episode, step_layout
from replay import NO_CLASS, Curious, Replay, SumTree, plan, ring_layout

SPACES = {
    "image": gymnasium.spaces.Box(0, 255, (4, 4, 3), np.uint8),
    "vector": gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float64),
    "reward": ((), np.float32),
    "is_first": ((), bool),
    "is_last": ((), bool),
    "is_terminal": ((), bool),
    "log_health": ((), np.float32),
    "action": gymnasium.spaces.Discrete(5),
}
LATENTS = dict(deter_size=6, stoch_size=2, classes=4)
LAYOUT = ring_layout(SPACES, **LATENTS)


class Source:
    """Steps of `n_envs` environments; `vector` is (stream, step of the stream, step of the episode)."""

    def __init__(self, n_envs=1, length=7, abandon=False):
        self.n_envs, self.length, self.abandon = n_envs, length, abandon
        self.count = 0

    def step(self, latents=True):
        envs = np.arange(self.n_envs)
        lengths = self.length + envs  # episodes of different lengths
        inside = self.count % lengths
        last = (inside == lengths - 1) & (not self.abandon)
        step = {
            "image": np.full((self.n_envs, 4, 4, 3), self.count % 256, np.uint8),
            "vector": np.stack([envs, np.full(self.n_envs, self.count), inside], 1).astype(np.float64),
            "reward": np.full(self.n_envs, self.count / 8, np.float32),
            "is_first": inside == 0,
            "is_last": last,
            "is_terminal": last & (envs % 2 == 0),
            "log_health": np.zeros(self.n_envs, np.float32),
            "action": np.full(self.n_envs, self.count % 5),
        }
        if latents:
            step["deter"] = np.full((self.n_envs, 6), self.count % 1000 / 8, np.float16)
            step["stoch"] = np.full((self.n_envs, 2), self.count % 4, np.uint8)
        self.count += 1
        return step

    def fill(self, replay, steps, latents=True):
        for _ in range(steps):
            replay.add(self.step(latents))
        return self


def make(n_envs=1, capacity=64, batch_length=4, context=1, seed=0, **options):
    options = {"online": False, **LATENTS, **options}
    return Replay(SPACES, n_envs, capacity, batch_length, context, seed, **options)


def counts(batch):
    return batch["vector"][..., 1].astype(int)  # [B, L] step of the stream


def equal(left, right):
    assert left.keys() == right.keys()
    for key in left:
        np.testing.assert_array_equal(left[key], right[key], err_msg=key)


# Ring and windows


def test_window_holds_the_added_steps_in_the_stored_dtypes():
    replay = make()
    source = Source().fill(replay, 30)
    batch = replay.sample(16)
    again = Source()
    added = episodes.stack([again.step() for _ in range(source.count)])
    for key, (shape, dtype) in LAYOUT.items():
        assert batch[key].dtype == dtype and batch[key].shape == (16, 5, *shape)
        if key not in ("is_first", "is_last"):
            np.testing.assert_array_equal(batch[key], added[key][:, 0][counts(batch)])
    assert "log_health" not in batch
    np.testing.assert_array_equal(batch["where"][:, 1], counts(batch)[:, 0])


def test_step_without_latents_gets_no_class_and_zero_deter():
    replay = make()
    Source().fill(replay, 10, latents=False)
    batch = replay.sample(4)
    assert (batch["stoch"] == NO_CLASS).all() and (batch["deter"] == 0).all()
    gaussian = make(classes=0)
    Source().fill(gaussian, 10, latents=False)
    assert gaussian.sample(4)["stoch"].dtype == np.float16 and (gaussian.sample(4)["stoch"] == 0).all()


def test_starts_are_uniform_over_all_streams():
    replay = make(n_envs=3, capacity=60, batch_length=4)
    Source(n_envs=3).fill(replay, 50)
    where = replay.draw(32_000)
    starts, drawn = np.unique(where, axis=0, return_counts=True)
    expected = [(env, start) for env in range(3) for start in range(30, 46)]
    assert [tuple(start) for start in starts] == expected
    share = 32_000 / len(expected)
    chi_square = ((drawn - share) ** 2 / share).sum()  # mean 47, standard deviation 9.7
    assert 15 < chi_square < 95


def test_windows_cross_resets_and_start_with_is_first():
    replay = make(batch_length=9)
    Source(length=7).fill(replay, 40)
    batch = replay.sample(64)
    assert batch["is_first"][:, 0].all()
    np.testing.assert_array_equal(batch["is_first"][:, 1:], counts(batch)[:, 1:] % 7 == 0)
    assert batch["is_first"][:, 1:].any(1).all()


def test_each_fresh_window_is_served_once_before_uniform_draws():
    replay = make(n_envs=2, capacity=100, batch_length=4, context=1, online=True)
    source = Source(n_envs=2).fill(replay, 4)
    served = []
    for _ in range(36):
        source.fill(replay, 1)
        served += [tuple(window) for window in replay.draw(len(replay.queue)).tolist()]
    assert served == [(env, start) for start in range(0, 40, 5) for env in range(2)]
    source.fill(replay, 5)
    assert replay.draw(4)[:2].tolist() == [[0, 40], [1, 40]]
    assert not replay.queue


def test_evicted_fresh_window_is_not_served():
    replay = make(capacity=16, online=True)
    Source().fill(replay, 44)
    assert [start for _, start in replay.queue] == [25, 30, 35]  # the window at 25 has lost three steps
    assert replay.draw(8)[:, 1].min() >= 28


def test_draws_depend_only_on_the_seed():
    first, again, other = make(seed=1), make(seed=1), make(seed=2)
    for replay in (first, again, other):
        Source().fill(replay, 50)
    where = first.draw(32)
    np.testing.assert_array_equal(where, again.draw(32))
    assert (where != other.draw(32)).any()


def test_sampling_before_the_first_window_names_the_option():
    replay = make()
    Source().fill(replay, 4)
    assert not replay.can_sample(1)
    with pytest.raises(UserError, match="prefill"):
        replay.sample(1)


def test_episode_without_is_first_is_refused():
    replay = make()
    with pytest.raises(UserError, match="Environment 0.*is_first is False"):
        replay.add({**Source().step(), "is_first": np.zeros(1, bool)})
    assert replay.size == 0


# Latents


def test_updated_latents_are_in_later_draws():
    replay = make(n_envs=2, capacity=40)
    Source(n_envs=2).fill(replay, 20)
    where = replay.draw(3)
    before = replay.gather(where)
    deter = np.random.default_rng(0).random((3, 4, 6)).astype(np.float16)
    stoch = np.full((3, 4, 2), 3, np.uint8)
    replay.update_latents(where[:1], deter[:1], stoch[:1])
    after = replay.gather(where[:1])
    np.testing.assert_array_equal(after["deter"][0, 1:], deter[0])
    np.testing.assert_array_equal(after["stoch"][0, 1:], stoch[0])
    np.testing.assert_array_equal(after["deter"][0, 0], before["deter"][0, 0])  # the context is unchanged


# Curious Replay


def test_sum_tree_finds_slots_by_weight_and_none_of_weight_zero():
    rng = np.random.default_rng(0)
    weights = rng.random(37) * (rng.random(37) < 0.5)
    tree = SumTree(37)
    tree.set(np.arange(37), rng.random(37))
    tree.set(rng.permutation(37), 0)
    tree.set(np.arange(37), weights)
    assert tree.nodes[1] == pytest.approx(weights.sum())
    drawn = np.bincount(tree.find(rng.random(200_000)), minlength=37) / 200_000
    np.testing.assert_allclose(drawn, weights / weights.sum(), atol=5e-3)
    assert (drawn[weights == 0] == 0).all()
    weights[20:] = 0
    tree.set(np.arange(37), weights)
    assert weights[tree.find(np.array([0.0, 1.0]))].all()  # 1 is a share that was rounded up


def test_curious_draws_are_proportional_to_the_priorities_of_valid_starts():
    replay = make(n_envs=2, capacity=40, sampler="curious")
    options = {"c": 2.0, "beta": 0.5, "alpha": 1.0, "eps": 0.5, "largest": np.float32(2.5)}
    vars(replay.sampler).update(options)
    source = Source(n_envs=2)
    rng = np.random.default_rng(0)
    priority = {}
    for _ in range(30):
        source.fill(replay, 1)
        for env in range(2):
            priority[env, source.count - 1] = replay.sampler.largest
        if replay.can_sample(1):
            where = replay.draw(2)
            loss = rng.random((2, 4)).astype(np.float32) * 9
            replay.update_priorities(where, loss)
    visits = replay.sampler.visits.reshape(2, 20)
    starts = [(env, start) for env in range(2) for start in range(10, 26)]
    # A window's priority is that of its first step after the context.
    expected = np.array([replay.sampler.priority.reshape(2, 20)[e, (s + 1) % 20] for e, s in starts])
    assert len(set(expected.tolist())) > 10 and visits.max() > 2
    drawn = replay.draw(100_000)
    found, amount = np.unique(drawn, axis=0, return_counts=True)
    assert [tuple(start) for start in found] == starts
    np.testing.assert_allclose(amount / 100_000, expected / expected.sum(), atol=5e-3)


def test_curious_priority_follows_the_papers_formula():
    sampler = Curious(1, 10, 3, 0, c=100.0, beta=0.7, alpha=0.5, eps=0.01)
    sampler.add(np.arange(10))
    np.testing.assert_allclose(sampler.priority, 100 + 0.1, rtol=1e-6)
    sampler.update(np.array([3, 4, 4, 5]), np.array([4.0, 1.0, 9.0, np.nan]))
    np.testing.assert_allclose(sampler.priority[3], 100 * 0.7 + 4.01**0.5, rtol=1e-6)
    np.testing.assert_allclose(sampler.priority[4], 100 * 0.7**2 + 9.01**0.5, rtol=1e-6)
    assert sampler.visits.tolist() == [0, 0, 0, 1, 2, 0, 0, 0, 0, 0]
    sampler.add(np.array([4]))  # a new step in the slot of an old one
    assert sampler.visits[4] == 0 and sampler.priority[4] == sampler.largest


# Memory and backends


def test_memmap_equals_tensor_and_leaves_no_file(tmp_path):
    ram = make(n_envs=2, capacity=40)
    disk = make(n_envs=2, capacity=40, backend="memmap", folder=tmp_path / "replay_ring")
    for replay in (ram, disk):
        Source(n_envs=2).fill(replay, 55)
        replay.update_latents(replay.draw(4), np.ones((4, 4, 6), np.float16), np.ones((4, 4, 2), np.uint8))
    assert os.listdir(tmp_path / "replay_ring")
    equal(ram.sample(32), disk.sample(32))
    disk.close()
    assert not (tmp_path / "replay_ring").exists()


def memory_of(monkeypatch, ram, disk):
    monkeypatch.setattr(replay_module, "free_memory", lambda: ram)
    monkeypatch.setattr(replay_module, "free_disk", lambda folder: disk)
    monkeypatch.delenv("LORE_REPLAY_BACKEND", raising=False)


def test_plan_announces_the_size_of_the_ring(monkeypatch):
    memory_of(monkeypatch, 2**30, 2**30)
    for sampler in ("uniform", "curious"):
        chosen = plan(LAYOUT, 3, 5, 1000, "tensor", sampler=sampler)
        replay = make(n_envs=3, capacity=chosen.capacity, sampler=sampler)
        arrays = list(replay.ring.values())
        if sampler == "curious":
            arrays += [replay.sampler.priority, replay.sampler.visits, replay.sampler.tree.nodes]
        used = sum(array.nbytes for array in arrays)
        assert chosen.nbytes == used if sampler == "uniform" else used <= chosen.nbytes < 2 * used
        assert chosen.capacity == 999 == 3 * replay.rows


def test_auto_capacity_is_half_of_the_free_ram_or_a_million_steps(monkeypatch):
    per_step = plan(LAYOUT, 1, 5, 100).nbytes / 100
    memory_of(monkeypatch, 1000 * per_step, 10**12)
    assert plan(LAYOUT, 1, 5)[:2] == (500, "tensor")
    assert plan(LAYOUT, 1, 5, backend="memmap", folder="/")[:2] == (1_000_000, "memmap")
    memory_of(monkeypatch, 10**12, 10**12)
    assert plan(LAYOUT, 4, 5)[:2] == (1_000_000, "tensor")


def test_auto_backend_is_memmap_where_ram_is_short(monkeypatch):
    per_step = plan(LAYOUT, 1, 5, 100).nbytes / 100
    memory_of(monkeypatch, 1000 * per_step, 4000 * per_step)
    assert plan(LAYOUT, 1, 5, 400).backend == "tensor"
    assert plan(LAYOUT, 1, 5, 700).backend == "memmap"
    assert "GiB" in plan(LAYOUT, 1, 5, 700, folder="ring").line
    memory_of(monkeypatch, 1000 * per_step, 10 * per_step)
    assert plan(LAYOUT, 1, 5, 700).backend == "tensor"


def test_impossible_capacity_names_what_to_set(monkeypatch):
    per_step = plan(LAYOUT, 1, 5, 100).nbytes / 100
    memory_of(monkeypatch, 1000 * per_step, 2000 * per_step)
    with pytest.raises(UserError, match="auto or to 1800 at most") as error:
        plan(LAYOUT, 1, 5, 5000)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="to 900 at most, or replay.backend to auto"):
        plan(LAYOUT, 1, 5, 1500, "tensor")
    with pytest.raises(UserError, match="need 20"):
        plan(LAYOUT, 4, 5, 12)


def test_environment_variable_overrides_the_backend(monkeypatch):
    monkeypatch.setenv("LORE_REPLAY_BACKEND", "memmap")
    assert plan(LAYOUT, 1, 5, 100, "tensor").backend == "memmap"
    monkeypatch.setenv("LORE_REPLAY_BACKEND", "disk")
    with pytest.raises(UserError, match="tensor or memmap"):
        plan(LAYOUT, 1, 5, 100)


# Episode files


def test_finished_episode_becomes_a_whole_file(tmp_path):
    writer = EpisodeWriter(tmp_path, SPACES, 2)
    source = Source(n_envs=2)
    for _ in range(20):
        writer.add(source.step())
    writer.close()
    files = list_episodes(tmp_path)
    assert sorted(file.length for file in files) == [7, 7, 8, 8]  # and two that are open
    assert [file.path.name for file in files] == sorted(os.listdir(tmp_path))
    rows = read_episode(files[0].path, step_layout(SPACES), files[0].length)
    env = int(rows["vector"][0, 0])
    np.testing.assert_array_equal(rows["vector"][:, 1], np.arange(7 + env))
    assert rows["action"].dtype == np.int32 and rows["image"].dtype == np.uint8
    with np.load(files[0].path) as raw:
        np.testing.assert_array_equal(raw["discount"], 1 - raw["is_terminal"].astype(np.float32))
        assert "deter" not in raw.files and "log_health" not in raw.files


def test_abandoned_episode_and_single_step_are_written(tmp_path):
    writer = EpisodeWriter(tmp_path, SPACES, 1)
    source = Source(length=4, abandon=True)
    for _ in range(5):
        writer.add(source.step())
    writer.add(Source().step())  # a reset at once
    writer.close()
    files = list_episodes(tmp_path)
    assert [file.length for file in files] == [4, 1]
    for file in files:
        rows = read_episode(file.path, step_layout(SPACES))
        assert rows["is_last"][-1] and not rows["is_last"][:-1].any() and not rows["is_terminal"].any()


def test_oldest_files_beyond_keep_steps_are_deleted(tmp_path):
    writer = EpisodeWriter(tmp_path, SPACES, 1, keep_steps=20)
    source = Source(length=7)
    for _ in range(70):
        writer.add(source.step())
    writer.close()
    files = list_episodes(tmp_path)
    assert [file.length for file in files] == [7, 7]
    assert read_episode(files[0].path, step_layout(SPACES))["vector"][0, 1] == 56


def test_names_sort_by_start_even_if_the_clock_goes_back(tmp_path, monkeypatch):
    writer = EpisodeWriter(tmp_path, SPACES, 1)
    names = [writer.new_name() for _ in range(3)]
    monkeypatch.setattr(episodes.time, "time_ns", lambda: 10**18)
    names += [writer.new_name() for _ in range(3)]
    assert names == sorted(names) and len(set(names)) == 6
    writer.close()


@pytest.mark.parametrize("fails", ["write", "replace"])
def test_full_disk_is_an_error_and_leaves_no_partial_file(tmp_path, monkeypatch, fails):
    def no_space(*args, **kwargs):
        if fails == "write":
            args[0].write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = EpisodeWriter(tmp_path, SPACES, 1)
    source = Source(length=4)
    with monkeypatch.context() as patch:
        patch.setattr(*((np, "savez_compressed") if fails == "write" else (os, "replace")), no_space)
        for _ in range(4):
            writer.add(source.step())
        with pytest.raises(UserError, match="disk full"):
            writer.flush()
    assert os.listdir(tmp_path) == []
    for _ in range(4):  # with free space again, nothing was lost
        writer.add(source.step())
    writer.close()
    assert [file.length for file in list_episodes(tmp_path)] == [4, 4]


def test_temporary_file_of_a_killed_run_is_removed(tmp_path):
    (tmp_path / ".20260101T000000-0-5.npz.abc.tmp").write_bytes(b"half")
    EpisodeWriter(tmp_path, SPACES, 1).close()
    assert os.listdir(tmp_path) == []


def record(folder, steps=70, length=7, n_envs=1):
    """Fill `folder` with episodes whose `vector` counts steps."""
    writer = EpisodeWriter(folder, SPACES, n_envs)
    source = Source(n_envs, length)
    for _ in range(steps):
        writer.add(source.step())
    writer.close()
    return list_episodes(folder)


def test_loading_takes_the_newest_episodes_in_order(tmp_path):
    record(tmp_path, steps=70)
    replay = make(capacity=30, writer=EpisodeWriter(tmp_path, SPACES, 1))
    loaded = replay.load_episodes()
    assert loaded.steps == replay.size == 30 and loaded.transitions == 30 - 4 and not loaded.lines
    batch = replay.sample(256)
    assert set(counts(batch).ravel()) == set(range(40, 70))
    assert (np.diff(counts(batch), axis=1) == 1).all()
    assert (batch["stoch"] == NO_CLASS).all()
    replay.close()


def test_loading_spreads_episodes_over_the_streams(tmp_path):
    record(tmp_path, steps=70)
    replay = make(n_envs=3, capacity=300, writer=EpisodeWriter(tmp_path, SPACES, 3), online=True)
    assert replay.load_episodes().steps == 70
    assert replay.heads.tolist() == [28, 21, 21]
    assert not replay.queue  # what was loaded is not fresh
    Source(n_envs=3).fill(replay, 6)
    assert replay.draw(4)[:3].tolist() == [[0, 28], [1, 21], [2, 21]]
    replay.close()


def spoil(path, how):
    with np.load(path) as archive:
        rows = dict(archive)
    if how == "cut off":
        path.write_bytes(path.read_bytes()[:-40])
        return
    if how == "flipped":
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 255
        path.write_bytes(data)
        return
    rows |= {
        "pickle": dict(action=np.array([{}] * len(rows["action"]), object)),
        "not finite": dict(reward=np.full_like(rows["reward"], np.inf)),
        "dtype": dict(image=rows["image"].astype(np.float32)),
        "short": {key: value[:-1] for key, value in rows.items()},
        "no start": dict(is_first=np.zeros_like(rows["is_first"])),
    }[how]
    with open(path, "wb") as file:
        np.savez(file, **rows)


@pytest.mark.parametrize("how", ["cut off", "flipped", "pickle", "not finite", "dtype", "short", "no start"])
def test_broken_file_is_moved_and_reported(tmp_path, how):
    files = record(tmp_path, steps=70)
    spoil(files[-1].path, how)
    replay = make(capacity=28, writer=EpisodeWriter(tmp_path, SPACES, 1))
    loaded = replay.load_episodes()
    assert len(loaded.lines) == 1 and files[-1].path.name in loaded.lines[0] and "\n" not in loaded.lines[0]
    assert os.listdir(tmp_path / "broken") == [files[-1].path.name]
    assert loaded.steps == 21
    assert set(counts(replay.sample(256)).ravel()) == set(range(42, 63))
    replay.close()


# Save and load. tests/faults/test_replay_machine.py tests them in full.


def build(tmp_path, n_envs=2, capacity=60, **options):
    writer = EpisodeWriter(tmp_path / "train_eps", SPACES, n_envs)
    return make(n_envs, capacity, writer=writer, **{"online": True, **options})


def test_missing_episode_file_is_reported_and_the_rest_is_loaded(tmp_path):
    replay = build(tmp_path)
    Source(2).fill(replay, 25)
    state = replay.save(tmp_path / "state", latents=True)
    replay.close()
    list_episodes(tmp_path / "train_eps")[0].path.unlink()
    resumed = build(tmp_path)
    loaded = resumed.load(state, tmp_path / "state")
    assert not loaded.exact and len(loaded.lines) == 1 and "refilled from episode files" in loaded.lines[0]
    assert loaded.steps == 50 - 7
    Source(2).fill(resumed, 10)  # both environments start new episodes
    inside = resumed.sample(64)["vector"][..., 2]
    assert ((np.diff(inside, axis=1) == 1) | (inside[:, 1:] == 0)).all()
    resumed.close()
