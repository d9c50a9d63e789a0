"""The replay against a simple model: steps are added, drawn, evicted; it is saved, killed, loaded.

The model knows each step by a serial number, and of each stream which step stands at which position. After a
load it is what it was at the last save that a checkpoint knows, at whichever file operation the kill came.
"""

import contextlib
import copy
import os
import pickle
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from episodes import EpisodeWriter, list_episodes
from replay import NO_CLASS, Replay, keep_moment

SPACES = {
    "serial": ((), np.int32),
    "image": ((2, 2, 1), np.uint8),
    "reward": ((), np.float32),
    "is_first": ((), bool),
    "is_last": ((), bool),
    "is_terminal": ((), bool),
}
CONTEXT, LENGTH = 1, 3
WINDOW = CONTEXT + LENGTH
LARGE = 400  # rows that hold all that an example adds


class Killed(BaseException):
    """The process is dead."""


@contextlib.contextmanager
def killed_at(operation: int):
    """Within, the file operation of this number and all later ones do not happen any more."""
    done = []

    def dying(whole):
        def function(*args, **kwargs):
            done.append(whole)
            if len(done) > operation:
                raise Killed
            return whole(*args, **kwargs)

        return function

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        for owner, name in ((os, "fsync"), (os, "replace"), (Path, "unlink"), (shutil, "rmtree")):
            patch.setattr(owner, name, dying(getattr(owner, name)))
        yield


class Model:
    """What has to be in the replay."""

    def __init__(self, n_envs: int):
        self.streams: list[list[int | None]] = [[] for _ in range(n_envs)]  # serial by position
        self.flags: dict[int, dict[str, bool]] = {}  # by serial
        self.latents: dict[int, float] = {}  # by serial; none where there are none
        self.opened: list[list[int]] = [[] for _ in range(n_envs)]  # serials of the open episodes
        self.finished: list[list[int]] = []  # whole episodes, all that there are files of

    def add(self, env: int, serial: int, flags: dict[str, bool]) -> None:
        if flags["is_first"] and self.opened[env]:  # abandoned
            self.flags[self.opened[env][-1]]["is_last"] = True
            self.close(env)
        self.streams[env].append(serial)
        self.opened[env].append(serial)
        self.flags[serial] = dict(flags)
        if flags["is_last"]:
            self.close(env)

    def close(self, env: int) -> None:
        self.finished.append(self.opened[env])
        self.opened[env] = []


class Machine(RuleBasedStateMachine):
    """Random steps, draws, saves and deaths in any order."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="lore-"))
        self.serial = 0

    def teardown(self):
        if hasattr(self, "replay"):
            self.replay.writer.thread.shutdown()
        shutil.rmtree(self.folder)

    def make(self, n_envs: int, rows: int) -> Replay:
        writer = EpisodeWriter(self.folder / "train_eps", SPACES, n_envs)
        return Replay(
            SPACES, n_envs, n_envs * rows, LENGTH, CONTEXT, 0, deter_size=2, stoch_size=1, classes=4,
            sampler=self.sampler, online=self.online, writer=writer,
        )  # fmt: skip

    @initialize(
        n_envs=st.integers(1, 2),
        rows=st.sampled_from([WINDOW, WINDOW + 1, 9, LARGE]),
        sampler=st.sampled_from(["uniform", "curious"]),
        online=st.booleans(),
    )
    def begin(self, n_envs, rows, sampler, online):
        self.sampler, self.online = sampler, online
        self.model, self.replay = Model(n_envs), self.make(n_envs, rows)
        self.save(latents=False)

    @rule(
        data=st.data(),
        steps=st.integers(1, 12),
        amount=st.integers(0, 2),
        saved=st.sampled_from([None, True, False]),
    )
    def live(self, data, steps, amount, saved):
        """What a run does between two deaths."""
        for _ in range(steps):
            self.add(data)
            if amount:
                self.sample(amount, 1.5)
        if saved is not None:
            self.save(saved)

    def add(self, data):
        n_envs = self.replay.n_envs
        draws = data.draw(st.lists(st.integers(0, 9), min_size=n_envs, max_size=n_envs))
        begins = np.array([not self.model.opened[env] or draws[env] == 9 for env in range(n_envs)])
        ends = np.array([draw in (0, 1) for draw in draws])
        serials = np.arange(self.serial, self.serial + n_envs, dtype=np.int32)
        self.serial += n_envs
        flags = {"is_first": begins, "is_last": ends, "is_terminal": ends & (serials % 2 == 0)}
        step = {"serial": serials, "reward": serials / 8, **flags}
        step["image"] = np.broadcast_to(serials[:, None, None, None] % 256, (n_envs, 2, 2, 1))
        step["image"], step["reward"] = step["image"].astype(np.uint8), step["reward"].astype(np.float32)
        if draws[0] % 2:
            step["deter"] = np.repeat(serials[:, None] % 100, 2, 1).astype(np.float16)
            step["stoch"] = (serials[:, None] % 4).astype(np.uint8)
        self.replay.add(step)
        for env, serial in enumerate(serials.tolist()):
            self.model.add(env, serial, {key: bool(value[env]) for key, value in flags.items()})
            if "deter" in step:
                self.model.latents[serial] = serial % 100

    @rule(amount=st.integers(1, 3), loss=st.floats(0, 100, width=32))
    def sample(self, amount, loss):
        if not self.replay.can_sample(amount):
            return
        batch = self.replay.sample(amount)
        for env, start in batch["where"].tolist():
            length = len(self.model.streams[env])
            assert max(0, length - self.replay.rows) <= start <= length - WINDOW
        self.check_windows(batch)
        fresh = np.float16(self.serial % 90)
        shape = (amount, LENGTH)
        self.replay.update_latents(
            batch["where"], np.full((*shape, 2), fresh), np.full((*shape, 1), int(fresh) % 4, np.uint8)
        )
        self.replay.update_priorities(batch["where"], np.full(shape, loss, np.float32))
        for env, start in batch["where"].tolist():
            for serial in self.model.streams[env][start + CONTEXT : start + WINDOW]:
                self.model.latents[serial] = float(fresh)

    def check_windows(self, batch):
        for row, (env, start) in enumerate(batch["where"].tolist()):
            serials = self.model.streams[env][start : start + WINDOW]
            self.check({key: value[row] for key, value in batch.items() if key != "where"}, serials)

    def check(self, rows, serials):
        """A window, or a part of the ring, is these steps."""
        flags = self.model.flags
        assert rows["serial"].tolist() == serials
        assert rows["reward"].tolist() == [serial / 8 for serial in serials]
        assert (rows["image"] == (np.array(serials) % 256)[:, None, None, None]).all()
        first = [flags[serial]["is_first"] for serial in serials]
        assert rows["is_first"].tolist() == [True, *first[1:]][: len(serials)]
        cut = [*first[1:], False][: len(serials)]  # by what comes next
        last = [flags[serial]["is_last"] for serial in serials]
        assert rows["is_last"].tolist() == [one or other for one, other in zip(last, cut, strict=True)]
        assert rows["is_terminal"].tolist() == [flags[serial]["is_terminal"] for serial in serials]
        for index, serial in enumerate(serials):
            known = self.model.latents.get(serial)
            assert (rows["deter"][index] == (0 if known is None else known)).all()
            assert (rows["stoch"][index] == (NO_CLASS if known is None else int(known) % 4)).all()

    @rule(latents=st.booleans())
    def save(self, latents):
        state = self.replay.save(self.folder / "state", latents)
        self.checkpoint(state, latents)
        keep_moment(self.folder / "state", state["moment"])

    def checkpoint(self, state, latents):
        self.state = pickle.dumps(state)
        self.saved = copy.deepcopy(self.model)
        if not latents:
            self.saved.latents = {}
        replay = self.replay
        self.inner = copy.deepcopy([replay.queue, replay.rng.bit_generator.state, replay.sampler.arrays()])
        self.inner.append(replay.fresh.copy())

    @rule(latents=st.booleans(), operation=st.integers(0, 30))
    def kill_in_a_save(self, latents, operation):
        """It dies before the checkpoint is there, or while it tidies up after it."""
        with killed_at(operation):
            state = self.replay.save(self.folder / "state", latents)
            if operation % 2:
                raise Killed
            self.checkpoint(state, latents)
            keep_moment(self.folder / "state", state["moment"])
        self.die(True)

    @rule(written=st.booleans())
    def kill(self, written):
        self.die(written)

    def die(self, written: bool):
        """Of what is finished but not on the disk yet, all is `written` or nothing. Then it is loaded."""
        self.replay.writer.thread.shutdown(cancel_futures=not written)
        self.load()

    @rule(operation=st.integers(0, 9))
    def kill_in_a_load(self, operation):
        n_envs, rows = self.replay.n_envs, self.replay.rows
        self.replay.writer.thread.shutdown()
        with killed_at(operation):
            self.replay = self.make(n_envs, rows)
            self.replay.load(pickle.loads(self.state), self.folder / "state")
        self.die(True)

    def load(self):
        n_envs, rows = self.replay.n_envs, self.replay.rows
        self.replay = self.make(n_envs, rows)
        self.model = copy.deepcopy(self.saved)
        loaded = self.replay.load(pickle.loads(self.state), self.folder / "state")
        assert loaded.exact and all("newer than the checkpoint" in line for line in loaded.lines)
        kept = [serial for stream in self.model.streams for serial in stream[-rows:]]
        assert loaded.steps == self.replay.size == len(kept)
        first = sum(self.model.flags[serial]["is_first"] for serial in kept)
        assert loaded.transitions == len(kept) - first
        replay = self.replay
        found = [replay.queue, replay.rng.bit_generator.state, replay.sampler.arrays(), replay.fresh]
        for one, other in zip(found, self.inner, strict=True):
            np.testing.assert_equal(one, other)

    @rule(n_envs=st.integers(1, 3))
    def load_into_another_shape(self, n_envs):
        """All that there are files of comes back, and the open episodes end."""
        rows = LARGE + (self.replay.rows == LARGE)
        self.replay.writer.thread.shutdown()
        self.replay, self.model = self.make(n_envs, rows), copy.deepcopy(self.saved)
        loaded = self.replay.load(pickle.loads(self.state), self.folder / "state")
        assert not loaded.exact and any("refilled from episode files" in line for line in loaded.lines)
        for env, serials in enumerate(self.model.opened):
            if serials:
                self.model.close(env)
        streams = [self.in_ring(env)["serial"].tolist() for env in range(n_envs)]
        assert sorted(sum(streams, [])) == sorted(sum(self.model.finished, []))
        episodes = {tuple(episode) for episode in self.model.finished}
        for stream in streams:
            starts = [i for i, serial in enumerate(stream) if self.model.flags[serial]["is_first"]]
            ends = [*starts[1:], len(stream)][: len(starts)]
            assert {tuple(stream[i:j]) for i, j in zip(starts, ends, strict=True)} <= episodes
        self.model.streams, self.model.latents = streams, {}
        self.model.opened = [[] for _ in range(n_envs)]
        self.save(latents=True)

    def in_ring(self, env):
        """The steps of a stream in their order."""
        replay = self.replay
        slots = np.arange(replay.oldest[env], replay.heads[env]) % replay.rows + replay.offsets[env]
        return {key: value[slots] for key, value in replay.ring.items()}

    @invariant()
    def ring_is_the_model(self):
        if not hasattr(self, "model"):
            return
        for env, stream in enumerate(self.model.streams):
            serials = stream[-self.replay.rows :]
            assert self.replay.heads[env] == len(stream)
            rows = self.in_ring(env)
            rows["is_last"][:-1] |= rows["is_first"][1:]  # as in a window
            rows["is_first"][:1] = True
            self.check(rows, serials)
            oldest = max(0, len(stream) - self.replay.rows)
            starts = range(max(oldest, len(stream) - 3 * WINDOW), len(stream) - WINDOW + 1)
            where = np.array([(env, start) for start in starts], np.int64).reshape(-1, 2)
            self.check_windows(self.replay.gather(where))

    @invariant()
    def no_file_is_half_an_episode(self):
        for file in list_episodes(self.folder / "train_eps"):
            assert file.length > 0 and file.path.stat().st_size > 0


def run_machine(examples: int, steps: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)  # slow, and no power cut is played
        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=examples, stateful_step_count=steps, suppress_health_check=list(HealthCheck)
            ),
        )


def test_replay_is_what_the_last_save_knew_whatever_happens():
    run_machine(40, 25)


@pytest.mark.slow
def test_replay_is_what_the_last_save_knew_whatever_happens_for_long():
    run_machine(150, 40)
