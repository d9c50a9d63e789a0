"""The replay: a ring of steps from which windows are drawn, uniformly or by curiosity.

Each environment writes its own stream of `rows` steps with one write head. A position counts the steps of a
stream from its start and never decreases; its slot in the ring is position % rows. A window is
`context + batch_length` consecutive steps (L). It never crosses the head, but may cross a reset.

Letters: B batch, T batch_length, L window, N all slots of all streams, D deter, S stoch.
"""

import os
import re
import shutil
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

import episodes
from basics import UserError, free_disk, free_memory, numpy_rng
from episodes import BrokenEpisode, EpisodeWriter, Layout, Rows, step_layout, step_limits

MOMENT = re.compile(r"\d{8}T\d{6}-[0-9a-f]+")  # folders that `save` makes
NO_CLASS = 255  # stoch of a step without latents: no class is set, which the agent reads as a zero state
MAX_CAPACITY = 1_000_000  # largest capacity, in steps, that `auto` chooses
AUTO_SHARE = 0.5  # largest share of the free memory that `auto` uses
FULL_SHARE = 0.9  # largest share of the free memory that an explicit capacity may use
CURIOUS_BYTES = 40  # a step's priority, visits and nodes of the tree, at most
GIB = 2**30


class Plan(NamedTuple):
    capacity: int  # steps of all streams together
    backend: str  # tensor or memmap
    nbytes: int  # size of the full ring
    line: str  # summary for the user


class Loaded(NamedTuple):
    steps: int  # in the ring
    transitions: int  # of them not is_first
    exact: bool  # the ring is as saved, and open episodes may continue
    lines: list[str]  # messages for the user


def ring_layout(spaces: Mapping, deter_size: int, stoch_size: int, classes: int) -> Layout:
    """Shape and dtype of each stored key of a step, latents included. `classes` 0 means Gaussian latents."""
    latents: Layout = {
        "deter": ((deter_size,), np.dtype(np.float16)),
        "stoch": ((stoch_size,), np.dtype(np.uint8 if classes else np.float16)),
    }
    return {**step_layout(spaces), **latents}


def plan(
    layout: Layout,
    n_envs: int,
    window: int,
    capacity: int | str = "auto",
    backend: str = "auto",
    folder: str | os.PathLike = ".",
    sampler: str = "uniform",
) -> Plan:
    """Choose the ring's capacity and backend.

    Args:
        layout: from `ring_layout`.
        window: steps of a window (batch_length + context); each stream must hold one.
        capacity: in steps; auto is 1e6, or what fits into half of the free memory if that is less.
        backend: tensor, memmap, or auto: memmap where an explicit capacity needs more than half of the free
            RAM. The environment variable LORE_REPLAY_BACKEND takes precedence.
        folder: where memmap would put its files; it need not exist.

    Raises UserError if the capacity does not fit or is too small.
    """
    backend = os.environ.get("LORE_REPLAY_BACKEND") or backend
    if backend not in ("auto", "tensor", "memmap"):
        raise UserError(f"LORE_REPLAY_BACKEND is {backend!r}; use tensor or memmap.")
    free = {"tensor": free_memory(), "memmap": free_disk(folder)}
    if capacity == "auto":
        backend = "tensor" if backend == "auto" else backend
        room = AUTO_SHARE * free[backend]
        capacity = min(MAX_CAPACITY, int(MAX_CAPACITY * room / _ring_bytes(layout, MAX_CAPACITY, sampler)))
    capacity = int(capacity) // n_envs * n_envs
    if capacity < n_envs * window:
        raise UserError(
            f"replay.capacity is {capacity} steps, but {n_envs} environments with windows of {window} steps "
            f"need {n_envs * window}. Raise it, or set batch_length or envs.amount lower."
        )
    nbytes, chosen = _ring_bytes(layout, capacity, sampler), backend
    if backend == "auto":
        ram_is_short = nbytes > AUTO_SHARE * free["tensor"]
        chosen = "memmap" if ram_is_short and nbytes <= FULL_SHARE * free["memmap"] else "tensor"
    room = FULL_SHARE * (max(free.values()) if backend == "auto" else free[chosen])
    if nbytes > room:
        most = int(capacity * room / nbytes)
        raise UserError(
            f"replay.capacity {capacity} needs {nbytes / GIB:.2f} GiB, but {free['tensor'] / GIB:.2f} GiB of "
            f"RAM and {free['memmap'] / GIB:.2f} GiB of disk are free. Set replay.capacity to auto or to "
            f"{most} at most" + ("." if backend == "auto" else ", or replay.backend to auto.")
        )
    place = f"files in {folder}" if chosen == "memmap" else "RAM"
    size = f"{nbytes / GIB:.2f} GiB when full, {free[chosen] / GIB:.2f} GiB free"
    return Plan(capacity, chosen, nbytes, f"Replay: {capacity} steps in {place} ({size})")


def _ring_bytes(layout: Layout, steps: int, sampler: str) -> int:
    """Bytes of a full ring with its sampler."""
    per_step = sum(dtype.itemsize * int(np.prod(shape)) for shape, dtype in layout.values())
    return steps * (per_step + CURIOUS_BYTES * (sampler == "curious"))


# --- Sampling ------------------------------------------------------------------------------------------


def window_counts(heads: np.ndarray, rows: int, window: int) -> np.ndarray:
    """Windows that each stream holds, of `rows` steps before its head: int64 [n_envs]."""
    return np.maximum(np.minimum(heads, rows) - window + 1, 0)


class Uniform:
    """Draws all windows of all streams with equal probability."""

    def __init__(self, rows: int, window: int):
        self.rows, self.window = rows, window

    def draw(self, amount: int, heads: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(stream, start) of `amount` windows. int64 [amount, 2]"""
        ends = np.cumsum(window_counts(heads, self.rows, self.window))
        index = rng.integers(ends[-1], size=amount)
        env = np.searchsorted(ends, index, side="right")
        # Counted back from each stream's last window.
        start = heads[env] - self.window - (ends[env] - 1 - index)
        return np.stack([env, start], 1)

    def add(self, slots: np.ndarray) -> None:
        """Ignored."""

    def update(self, slots: np.ndarray, loss: np.ndarray) -> None:
        """Ignored."""

    def arrays(self) -> dict[str, np.ndarray]:
        """No state."""
        return {}

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        """No state."""


class Curious:
    """Curious Replay (arXiv 2306.15934): prefers steps that were seldom trained on or are predicted badly.

    The priority of a step that was trained on v times, last with loss l, is c * beta**v + (|l| + eps)**alpha.
    A new step gets the largest priority so far. A window has that of its first step after the context.

    Priorities are stored for every step. The tree holds only those of steps at which a window can begin, and
    is updated just before a draw: O(log N) per changed step.
    """

    def __init__(self, n_envs, rows, window, context, *, c=1e4, beta=0.7, alpha=0.7, eps=0.01):
        self.rows, self.window, self.context = rows, window, context
        self.c, self.beta, self.alpha, self.eps = c, beta, alpha, eps
        self.priority = np.zeros(n_envs * rows, np.float32)  # [N]
        self.visits = np.zeros(n_envs * rows, np.int32)  # [N]
        self.largest = np.float32(c + eps**alpha)
        self.tree = SumTree(n_envs * rows)
        self.offsets = np.arange(n_envs) * rows
        self.synced = np.zeros(n_envs, np.int64)  # heads at the last update of the tree
        self.changed: list[np.ndarray] = []  # slots with new priorities since then

    def add(self, slots: np.ndarray) -> None:
        """Give new steps the largest priority."""
        self.priority[slots] = self.largest
        self.visits[slots] = 0

    def update(self, slots: np.ndarray, loss: np.ndarray) -> None:
        """Count a visit to these steps and set their losses [n]. Losses that are not finite are skipped."""
        finite = np.isfinite(loss)
        slots, loss = slots[finite], loss[finite]
        np.add.at(self.visits, slots, 1)  # a step may be in several windows of a batch
        novelty = self.c * self.beta ** self.visits[slots].astype(np.float64)
        self.priority[slots] = novelty + (np.abs(loss) + self.eps) ** self.alpha
        self.largest = max(self.largest, self.priority[slots].max(initial=0))
        self.changed.append(slots)

    def draw(self, amount: int, heads: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(stream, start) of `amount` windows. int64 [amount, 2]"""
        self._sync(heads)
        slots = self.tree.find(rng.random(amount))
        env = slots // self.rows
        return np.stack([env, self._position(slots, heads) - self.context], 1)

    def _position(self, slots: np.ndarray, heads: np.ndarray) -> np.ndarray:
        """Position of the step in each slot; negative for empty slots."""
        last = heads[slots // self.rows] - 1
        return last - (last - slots) % self.rows  # stream offsets are multiples of rows

    def _sync(self, heads: np.ndarray) -> None:
        changed = self.changed
        for env in np.flatnonzero(heads != self.synced):
            # New steps complete windows that begin before them and evict those that begin after them.
            start = max(self.synced[env], heads[env] - self.rows) - self.window
            moved = np.arange(start, heads[env] + self.context)[-self.rows :]
            changed.append(moved % self.rows + self.offsets[env])
        if changed:
            slots = np.concatenate(changed)
            start = self._position(slots, heads) - self.context
            env = slots // self.rows
            valid = (start >= np.maximum(heads[env] - self.rows, 0)) & (start + self.window <= heads[env])
            self.tree.set(slots, np.where(valid, self.priority[slots], 0))
        self.changed = []
        self.synced = heads.copy()

    def arrays(self) -> dict[str, np.ndarray]:
        """State that a checkpoint keeps."""
        return {"priority": self.priority, "visits": self.visits, "largest": self.largest}

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        """Restore the state of `arrays`; without it, all steps count as new."""
        if arrays:
            self.priority[:], self.visits[:] = arrays["priority"], arrays["visits"]
            self.largest = arrays["largest"][()]
        self.synced[:] = 0


class SumTree:
    """Weights of `size` slots in a binary tree of sums. Node 1 is the root, 2i and 2i + 1 are below i."""

    def __init__(self, size: int):
        self.depth = max(1, (size - 1).bit_length())
        self.nodes = np.zeros(2 << self.depth)  # float64; the slots are the last half

    def set(self, slots: np.ndarray, weights: np.ndarray) -> None:
        """Set weights [n] and all sums above them."""
        nodes = slots + (1 << self.depth)
        self.nodes[nodes] = weights
        for _ in range(self.depth):
            nodes = nodes >> 1
            # Adjacent slots share parents; a parent that occurs again later gets the same sum.
            nodes = nodes[np.diff(nodes, prepend=0) != 0]
            self.nodes[nodes] = self.nodes[2 * nodes] + self.nodes[2 * nodes + 1]

    def find(self, shares: np.ndarray) -> np.ndarray:
        """The slots [n] at which the cumulative weight exceeds these shares (0 to 1) of the total."""
        rest = shares * self.nodes[1]
        node = np.ones(len(shares), np.int64)
        for _ in range(self.depth):
            left = self.nodes[2 * node]
            # Rounding must not lead into a branch of weight 0.
            right = (rest >= left) & (self.nodes[2 * node + 1] > 0)
            rest = np.where(right, rest - left, rest)
            node = 2 * node + right
        return node - (1 << self.depth)


# --- The ring ------------------------------------------------------------------------------------------


class Replay:
    """A ring of steps in preallocated arrays, and the episode files that it can be refilled from.

    Args:
        spaces: spaces (or (shape, dtype)) of all keys of a step except the latents.
        n_envs: number of streams.
        capacity: steps of all streams together.
        batch_length, context: a window has context + batch_length steps.
        seed: seed of the draws.
        deter_size, stoch_size, classes: sizes of the latents; classes 0 means Gaussian ones.
        backend: tensor (RAM) or memmap (files in `folder`, deleted by `close`).
        sampler: uniform or curious.
        online: serve each fresh window once before the sampler fills the batch.
        writer: receives every step too; needed to save and load. `close` closes it.
        defaults: values of keys that a step or a file may lack.
    """

    def __init__(
        self,
        spaces: Mapping,
        n_envs: int,
        capacity: int,
        batch_length: int,
        context: int,
        seed: int,
        *,
        deter_size: int,
        stoch_size: int,
        classes: int,
        backend: str = "tensor",
        folder: str | os.PathLike | None = None,
        sampler: str = "uniform",
        online: bool = True,
        writer: EpisodeWriter | None = None,
        defaults: Mapping[str, float] | None = None,
    ):
        self.layout = ring_layout(spaces, deter_size, stoch_size, classes)
        self.step_layout = step_layout(spaces)  # of added steps and files: no latents
        self.limits = step_limits(spaces)
        self.defaults = {key: self.step_layout[key][1].type(value) for key, value in (defaults or {}).items()}
        self.no_latents = {"deter": np.float16(0), "stoch": np.uint8(NO_CLASS) if classes else np.float16(0)}
        self.n_envs, self.rows = n_envs, capacity // n_envs
        self.context, self.window = context, context + batch_length
        self.writer = writer
        self.folder = Path(folder) if folder is not None else None
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)  # left by a killed run
        self.ring = {
            key: self._allocate(f"{index}.bin", (n_envs * self.rows, *shape), dtype, backend)
            for index, (key, (shape, dtype)) in enumerate(self.layout.items())
        }  # [N, ...]
        self.rng = numpy_rng(seed, "replay")
        self.online = online
        self.offsets = np.arange(n_envs) * self.rows  # slot 0 of each stream
        if sampler == "curious":
            self.make_sampler = lambda: Curious(n_envs, self.rows, self.window, context)
        else:
            self.make_sampler = lambda: Uniform(self.rows, self.window)
        self.exact = False  # whether `load` restored the ring as it was saved
        self.clear()

    def clear(self) -> None:
        """Remove all steps."""
        self.heads = np.zeros(self.n_envs, np.int64)  # next position that each stream writes
        self.fresh = np.zeros(self.n_envs, np.int64)  # steps since the last online window
        self.expect_first = np.ones(self.n_envs, bool)  # streams without an open episode
        self.queue: deque[tuple[int, int]] = deque()  # (stream, start) of windows not yet served
        self.segments: list[deque] = [deque() for _ in range(self.n_envs)]  # (episode, start) in the ring
        self.sampler = self.make_sampler()

    @property
    def oldest(self) -> np.ndarray:
        """Position of each stream's oldest step. [n_envs]"""
        return np.maximum(self.heads - self.rows, 0)

    @property
    def size(self) -> int:
        """Steps in the ring."""
        return int((self.heads - self.oldest).sum())

    def can_sample(self, batch_size: int) -> bool:
        """Whether there are at least `batch_size` different windows."""
        return int(window_counts(self.heads, self.rows, self.window).sum()) >= batch_size

    def add(self, step: Mapping[str, np.ndarray]) -> None:
        """Store one step of every environment: key -> [n_envs, ...]; `deter` and `stoch` may be absent.

        Raises UserError for an episode that does not begin with is_first.
        """
        shape = (self.n_envs,)
        blank = {k: np.full(shape + self.step_layout[k][0], value) for k, value in self.defaults.items()}
        step = {**blank, **step}
        first, last = step["is_first"], step["is_last"]
        if (self.expect_first & ~first).any():
            env = int(np.flatnonzero(self.expect_first & ~first)[0])
            raise UserError(f"Environment {env}: a new episode begins, but is_first is False.")
        if self.writer:
            self.writer.add(step)
        slots = self.heads % self.rows + self.offsets
        abandoned = first & ~self.expect_first
        if abandoned.any():  # truncated, as in the files
            before = (self.heads - 1) % self.rows + self.offsets
            self.ring["is_last"][before[abandoned]] = True
        for key, array in self.ring.items():
            array[slots] = step[key] if key in step else self.no_latents[key]
        self.sampler.add(slots)
        for env in np.flatnonzero(first):
            self._begin_segment(env, self.writer.names[env] if self.writer else "")
        self.expect_first[:] = last
        self.heads += 1
        if self.online:
            self._queue_fresh()

    def holds(self, env: int, position: int) -> bool:
        """Whether the step at a position of a stream is in the ring."""
        return self.heads[env] - self.rows <= position < self.heads[env]

    def latents(self, env: np.ndarray, position: np.ndarray) -> Rows:
        """deter [M, D] and stoch [M, S] of steps that the ring holds; env and position int64 [M]."""
        slots = position % self.rows + self.offsets[env]
        return {key: self.ring[key][slots] for key in self.no_latents}

    def amend(self, env: int, position: int, values: Mapping[str, np.ndarray]) -> bool:
        """Overwrite values of a stored step; returns False if it is no longer in the ring.

        The episode's file gets them too, unless it is already written.
        """
        if not self.holds(env, position):
            return False
        slot = position % self.rows + self.offsets[env]
        for key, value in values.items():
            self.ring[key][slot] = value
        name, start = self.segments[env][-1]
        rows = self.writer.open[env] if self.writer else []
        if rows and start <= position and name == self.writer.names[env]:
            rows[position - start].update({k: np.array(v, self.layout[k][1]) for k, v in values.items()})
        return True

    def _begin_segment(self, env: int, name: str) -> None:
        segments, oldest = self.segments[env], self.heads[env] - self.rows
        while len(segments) > 1 and segments[1][1] <= oldest:
            segments.popleft()
        segments.append((name, int(self.heads[env])))

    def _queue_fresh(self) -> None:
        self.fresh += 1
        done = self.fresh == self.window
        if done.any():
            self.fresh[done] = 0
            self.queue.extend((int(env), int(self.heads[env] - self.window)) for env in np.flatnonzero(done))
            while self.queue[0][1] < self.heads[self.queue[0][0]] - self.rows:
                self.queue.popleft()  # evicted

    def sample(self, batch_size: int) -> dict[str, np.ndarray]:
        """Draw a batch: key -> [B, L, ...], latents included, and `where` as in `draw`."""
        return self.gather(self.draw(batch_size))

    def draw(self, batch_size: int) -> np.ndarray:
        """Draw windows: int64 [B, 2] = (stream, position of the first step).

        Fresh windows come first, each once; the sampler fills the batch. Raises UserError if no stream holds
        a window.
        """
        if not self.can_sample(1):
            raise UserError(
                f"The replay has {self.size} steps in {self.n_envs} streams, but no stream has the "
                f"{self.window} steps of a window. Raise prefill or set batch_length lower."
            )
        oldest = self.oldest
        where = []
        while self.queue and len(where) < batch_size:
            env, start = self.queue.popleft()
            if start >= oldest[env]:
                where.append((env, start))
        where = np.array(where, np.int64).reshape(-1, 2)
        return np.concatenate([where, self.sampler.draw(batch_size - len(where), self.heads, self.rng)])

    def gather(self, where: np.ndarray) -> dict[str, np.ndarray]:
        """Copy windows out of the ring.

        As in the reference, `is_first` is True at each window's first step, and a step before a reset counts
        as `is_last`: an episode from a file may have been abandoned there.
        """
        slots = self._slots(where[:, 0], where[:, 1], np.arange(self.window))  # [B, L]
        # All slots are in range; mode="clip" saves the copy that the default mode makes.
        batch = {key: np.take(array, slots, axis=0, mode="clip") for key, array in self.ring.items()}
        batch["is_last"][:, :-1] |= batch["is_first"][:, 1:]
        batch["is_first"][:, 0] = True
        batch["where"] = where
        return batch

    def _slots(self, env: np.ndarray, start: np.ndarray, steps: np.ndarray) -> np.ndarray:
        return (start[:, None] + steps) % self.rows + self.offsets[env][:, None]

    def _trained(self, where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Slots of the steps after the context [B, T], and whether they still hold these steps [B, T]."""
        env, start = where.T
        steps = np.arange(self.context, self.window)
        return self._slots(env, start, steps), start[:, None] + steps >= self.oldest[env][:, None]

    def update_latents(self, where: np.ndarray, deter: np.ndarray, stoch: np.ndarray) -> None:
        """Store new latents [B, T, D], [B, T, S] of the steps after the context. Evicted steps are skipped.

        Pass float16 and uint8; NumPy converts other floats slowly.
        """
        slots, valid = self._trained(where)
        for key, value in (("deter", deter), ("stoch", stoch)):
            if valid.all():
                self.ring[key][slots] = value
            else:
                self.ring[key][slots[valid]] = value[valid]

    def update_priorities(self, where: np.ndarray, loss: np.ndarray) -> None:
        """Pass the model's loss [B, T] of the steps after the context to the sampler."""
        slots, valid = self._trained(where)
        self.sampler.update(slots[valid], loss[valid])

    def _put(self, env: int, name: str, start: int, rows: Rows) -> None:
        """Write a whole episode, without latents, at `start` of a stream and set the head after it."""
        length = len(rows["is_first"])
        kept = np.arange(max(0, length - self.rows), length)
        slots = (start + kept) % self.rows + self.offsets[env]
        for key in self.step_layout:
            self.ring[key][slots] = rows[key][kept]
        for key, value in self.no_latents.items():
            self.ring[key][slots] = value
        self.sampler.add(slots)
        self.heads[env] = start
        self._begin_segment(env, name)
        self.heads[env] = start + length
        self.expect_first[env] = True

    def _read(self, path: Path, length: int) -> Rows:
        return episodes.read_episode(path, self.step_layout, length, self.defaults, self.limits)

    def load_episodes(self, part: int = 0, parts: int = 1) -> Loaded:
        """Clear the ring and fill it with the newest episodes in the writer's folder.

        Of several replays that share the folder, each takes every `parts`-th file, starting at `part`.
        Episodes are put in the order of their starts, each into the stream with the fewest steps. Broken
        files are moved to the subfolder broken/. The environments must start new episodes.
        """
        folder, broken, lines = self.writer.folder, [], []
        self.clear()
        files = episodes.list_episodes(folder)[part::parts]
        lengths = np.array([file.length for file in files], np.int64)
        newer = lengths[::-1].cumsum()[::-1] - lengths  # steps of the files after each one
        for file in (files[i] for i in np.flatnonzero(newer < self.n_envs * self.rows)):
            try:
                rows = self._read(file.path, file.length)
            except BrokenEpisode as error:
                broken.append(file)
                lines = lines or [f"first {file.path.name}: {error}"]
                continue
            env = int(self.heads.argmin())
            self._put(env, file.name, int(self.heads[env]), rows)
        if broken:
            episodes.move_into(broken, "broken")
            lines = [f"{len(broken)} broken episode files moved to {folder / 'broken'} ({lines[0]})."]
        return self._loaded(False, lines)

    def save(self, folder: str | os.PathLike, latents: bool) -> dict:
        """Write what the episode files lack to `{folder}/{moment}/`; returns the state for the checkpoint.

        These are the open episodes, the priorities and, if `latents`, the latents. Call `keep_moment` once
        the checkpoint is written: until then, the previous one needs its files. The state has the place of
        each episode in the ring, and the moment, which separates known files from newer ones.
        """
        self.writer.flush()
        moment = self.writer.new_name()
        place = Path(folder) / moment
        opened = np.flatnonzero(~self.expect_first).tolist()
        for env in opened:
            episodes.save_arrays(place / f"open-{env}.npz", episodes.stack(self.writer.open[env]))
        episodes.save_arrays(place / "sampler.npz", self.sampler.arrays())
        if latents:
            episodes.save_arrays(place / "latents.npz", self._latents())
        streams = []
        for env, segments in enumerate(self.segments):
            ends = [start for _, start in list(segments)[1:]] + [int(self.heads[env])]
            kept = zip(segments, ends, strict=False)  # an empty stream has an end but no segment
            streams.append([[name, start, end] for (name, start), end in kept if end > self.oldest[env]])
        return {
            "moment": moment,
            "tick": self.writer.tick,
            "shape": [self.n_envs, self.rows],
            "window": self.window,
            "fresh": self.fresh.tolist(),
            "open": {env: self.writer.names[env] for env in opened},
            "streams": streams,
            "queue": [list(window) for window in self.queue],
            "rng": self.rng.bit_generator.state,
        }

    def _filled(self, key: str) -> list[np.ndarray]:
        """Views of the stored steps of each stream, in the order of slots."""
        counts = np.minimum(self.heads, self.rows)
        return [self.ring[key][i : i + n] for i, n in zip(self.offsets, counts, strict=True)]

    def _latents(self) -> Rows:
        return {f"{key}-{env}": x for key in self.no_latents for env, x in enumerate(self._filled(key))}

    def load(self, state: dict, folder: str | os.PathLike) -> Loaded:
        """Restore the ring that `save` saw: same positions, same draws and, if saved, the same latents.

        Newer episode files are moved to newer/. If `exact`, open episodes continue; a reset closes them. If
        not (missing or broken files, another capacity or number of environments), the ring is filled by
        `load_episodes`, open episodes are written to files, and the environments must start new ones.
        """
        self._check_names(state)
        lines = self._set_aside_newer(state)
        self.writer.tick = max(self.writer.tick, state["tick"])
        place = Path(folder) / state["moment"]
        opened = self._read_open(state, place, lines)
        if lost := self._restore(state, opened):
            lines.append(f"The replay is refilled from episode files, not restored exactly: {lost}.")
            for env, rows in opened.items():
                self.writer.resume(0, state["open"][env], rows)
                self.writer.finish(0)
            self.writer.flush()
            loaded = self.load_episodes()
            return loaded._replace(lines=lines + loaded.lines)
        for env, rows in opened.items():
            self.writer.resume(env, state["open"][env], rows)
            self.expect_first[env] = False
        self.rng.bit_generator.state = state["rng"]
        if self.online and state["window"] == self.window:
            self.fresh[:] = state["fresh"]
            self.queue.extend((env, start) for env, start in state["queue"])
        self.sampler.load(self._beside(place / "sampler.npz", self.sampler.arrays(), lines))
        if (place / "latents.npz").exists():  # only written by a clean stop
            saved = self._beside(place / "latents.npz", self._latents(), lines)
            for key, current in self._latents().items():
                current[:] = saved.get(key, current)
        return self._loaded(True, lines)

    def _check_names(self, state: dict) -> None:
        """Raise ValueError for names that point to files elsewhere."""
        names = [*state["open"].values(), *(name for stream in state["streams"] for name, *_ in stream)]
        wrong = [name for name in names if not episodes.NAME.fullmatch(name)]
        wrong += [] if MOMENT.fullmatch(state["moment"]) else [state["moment"]]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is not the name of an episode or of a moment")

    def _read_open(self, state: dict, place: Path, lines: list[str]) -> dict[int, Rows]:
        """The open episodes by environment; `lines` gets a message for each one that is lost."""
        opened = {}
        for env in state["open"]:
            _, start, end = state["streams"][env][-1]
            try:
                opened[env] = self._read(place / f"open-{env}.npz", end - start)
            except (BrokenEpisode, UserError) as error:
                lines.append(
                    f"{place}/open-{env}.npz: the open episode of environment {env} is lost: {error}"
                )
        return opened

    def _beside(self, path: Path, like: Rows, lines: list[str]) -> Rows:
        """The arrays of a file, with the shapes and dtypes of `like`; {} and a message if it is broken."""
        if not like:
            return {}
        layout = {key: (np.shape(value), np.asarray(value).dtype) for key, value in like.items()}
        try:
            return episodes.read_arrays(path, layout)
        except (BrokenEpisode, UserError) as error:
            lines.append(f"{path} is ignored, and its values are reset: {error}")
            return {}

    def _set_aside_newer(self, state: dict) -> list[str]:
        folder, opened = self.writer.folder, set(state["open"].values())
        files = episodes.list_episodes(folder)
        newer = [file for file in files if file.name > state["moment"] or file.name in opened]
        episodes.move_into(newer, "newer")
        moved = f"{len(newer)} episode files newer than the checkpoint ({sum(f.length for f in newer)} steps)"
        return [f"{moved} moved to {folder / 'newer'}."] if newer else []

    def _restore(self, state: dict, opened: dict[int, Rows]) -> str:
        """Put all segments back in place. Returns the reason why that is impossible, or an empty string."""
        if state["shape"] != [self.n_envs, self.rows]:
            return f"it had {state['shape'][0]} streams of {state['shape'][1]} steps"
        self.clear()
        for env, segments in enumerate(state["streams"]):
            for name, start, end in segments:
                path = self.writer.folder / f"{name}-{end - start}.npz"
                is_open = name == state["open"].get(env)
                if is_open and env not in opened:
                    return f"the open episode of environment {env} is missing"
                try:
                    rows = opened[env] if is_open else self._read(path, end - start)
                except (BrokenEpisode, UserError) as error:
                    return f"{path.name} is lost ({error})"
                self._put(env, name, start, rows)
        return ""

    def _loaded(self, exact: bool, lines: list[str]) -> Loaded:
        self.exact = exact
        first = sum(int(flags.sum()) for flags in self._filled("is_first"))
        return Loaded(self.size, self.size - first, exact, lines)

    def close(self) -> None:
        """Write finished episodes and delete the ring's files."""
        if self.writer:
            self.writer.close()
        self.ring.clear()  # Windows deletes no file that is still mapped
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _allocate(self, name: str, shape: tuple[int, ...], dtype: np.dtype, backend: str) -> np.ndarray:
        if backend == "tensor":
            return np.zeros(shape, dtype)
        path = self.folder / name
        nbytes = dtype.itemsize * int(np.prod(shape))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                if hasattr(os, "posix_fallocate"):
                    # Without it, a disk that fills up later kills the process with SIGBUS.
                    os.posix_fallocate(file.fileno(), 0, nbytes)
                else:
                    file.truncate(nbytes)
        except OSError as error:
            reason = f"Cannot reserve {nbytes / GIB:.2f} GiB in {path}: {error.strerror}"
            raise UserError(f"{reason}. Set replay.capacity lower.") from error
        return np.asarray(np.memmap(path, dtype, "r+", shape=shape))  # [N, ...]


def keep_moment(folder: str | os.PathLike, moment: str) -> None:
    """Delete what `save` wrote to a folder, except that of the checkpoint's moment."""
    for path in Path(folder).iterdir():
        if MOMENT.fullmatch(path.name) and path.name != moment:
            shutil.rmtree(path)
