"""Episodes as .npz files: the layout of a step, and writing, listing, checking and reading them."""

import contextlib
import datetime
import math
import os
import re
import secrets
import time
import zipfile
from collections import deque
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from gymnasium import spaces as kinds
from numpy.lib import format as npy

from basics import UserError, atomic_write, first_line, free_memory, replace

Layout = dict[str, tuple[tuple[int, ...], np.dtype]]  # key -> shape and dtype of one step
Rows = dict[str, np.ndarray]  # key -> [L, ...] the steps of one episode
Limits = dict[str, tuple[np.ndarray, np.ndarray]]  # key -> its lowest and highest valid index

NAME = re.compile(r"\d{8}T\d{6}-[0-9A-Za-z]+")  # {time}-{id}
FILE_NAME = re.compile(rf"({NAME.pattern})-(\d+)\.npz")  # {time}-{id}-{length}.npz
STAMP = "%Y%m%dT%H%M%S"  # the time in it, in UTC
MAX_PENDING = 4  # episodes that may wait for the disk before the loop waits
LARGE = 2**30  # bytes of a file's arrays above which the free memory is checked


class BrokenEpisode(Exception):
    """An episode file that was cut off, changed, or made for other spaces."""


class EpisodeFile(NamedTuple):
    path: Path
    name: str  # {time}-{id}; names sort by the start of their episodes
    length: int  # steps, the first observation included


def step_layout(spaces: Mapping) -> Layout:
    """Shape and stored dtype of each key: uint8, int16 and bool stay, other integers int32, floats float32.

    `spaces` maps keys to gymnasium spaces or (shape, dtype) pairs; `log_*` keys and `symbolic`, with which an
    environment describes itself, are left out. Raises UserError for a space that is not an array.
    """
    layout = {}
    for key, space in spaces.items():
        if key.startswith("log_") or key == "symbolic":
            continue
        shape, dtype = space if isinstance(space, tuple) else (space.shape, space.dtype)
        if shape is None or dtype is None or np.dtype(dtype).kind not in "buif":
            raise UserError(f"The replay cannot store {key!r}: {space} is not an array of numbers.")
        dtype = np.dtype(dtype)
        if dtype.kind == "f":
            dtype = np.dtype(np.float32)
        elif dtype not in (np.uint8, np.int16, np.bool_):
            dtype = np.dtype(np.int32)
        layout[key] = (tuple(shape), dtype)
    return layout


def step_limits(spaces: Mapping) -> Limits:
    """The valid indices of the keys with a Discrete or MultiDiscrete space."""
    limits = {}
    for key, space in spaces.items():
        if isinstance(space, kinds.Discrete | kinds.MultiDiscrete):
            sizes = np.asarray(space.n if isinstance(space, kinds.Discrete) else space.nvec)
            limits[key] = np.asarray(space.start), np.asarray(space.start) + sizes - 1
    return limits


def list_episodes(folder: str | os.PathLike) -> list[EpisodeFile]:
    """The episode files of a folder, the oldest first. Files with other names are ignored."""
    folder = Path(folder)
    names = os.listdir(folder) if folder.is_dir() else []
    matches = [match for name in sorted(names) if (match := FILE_NAME.fullmatch(name))]
    return [EpisodeFile(folder / match[0], match[1], int(match[2])) for match in matches]


def read_episode(
    path: Path,
    layout: Layout,
    length: int | None = None,
    defaults: Mapping[str, np.generic] | None = None,
    limits: Limits | None = None,
) -> Rows:
    """Read one file and check it against the layout. Keys that are not in the layout are left out.

    A key that the file lacks gets its value of `defaults` at each step. `length` is by default that in the
    file's name.

    Raises BrokenEpisode with the reason if the content is damaged or does not fit (keys, shapes, dtypes,
    `length` steps, finite numbers, indices within their `limits`, is_first at the start), UserError if the
    file cannot be opened.
    """
    length = int(FILE_NAME.fullmatch(path.name)[2]) if length is None else length
    rows = read_arrays(path, {k: ((length, *shape), t) for k, (shape, t) in layout.items()}, defaults or {})
    for key, value in (defaults or {}).items():
        if key not in rows:
            rows[key] = np.full((length, *layout[key][0]), value)
    for key, (low, high) in (limits or {}).items():
        if ((rows[key] < low) | (rows[key] > high)).any():
            raise BrokenEpisode(f"{key} holds an index outside its space")
    if not length or not rows["is_first"][0]:
        raise BrokenEpisode("it does not begin with is_first")
    return rows


def read_arrays(path: Path, layout: Layout, may_lack: Collection[str] = ()) -> Rows:
    """The arrays of the `layout`, key -> whole shape and dtype, from an .npz file.

    Only keys of `may_lack` may be missing. The file is not trusted: checksums are verified, sizes are checked
    before memory is allocated, and pickles are refused. Raises BrokenEpisode and UserError as `read_episode`.
    """
    need = sum(dtype.itemsize * math.prod(shape) for shape, dtype in layout.values())
    if need > LARGE and need > free_memory():
        raise BrokenEpisode(f"it would need {need / 2**30:.0f} GiB of memory, more than is free")
    try:
        file = open(path, "rb")
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    with file:
        try:
            return _read_archive(file, layout, may_lack)
        except BrokenEpisode:
            raise
        except Exception as error:  # zipfile and NumPy raise nearly anything for broken bytes
            raise BrokenEpisode(f"not a whole .npz file ({first_line(error)})") from error


def _read_archive(file: BinaryIO, layout: Layout, may_lack: Collection[str]) -> Rows:
    rows = {}
    with zipfile.ZipFile(file) as archive:
        keys = {name.removesuffix(".npy") for name in archive.namelist()}
        if missing := sorted(layout.keys() - set(may_lack) - keys):
            raise BrokenEpisode(f"lacks {', '.join(missing)}")
        for key in [key for key in layout if key in keys]:
            with archive.open(f"{key}.npy") as member:
                rows[key] = _read_array(member, key, *layout[key])
    return rows


def _read_array(member: BinaryIO, key: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    headers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    found_shape, fortran, found = headers[npy.read_magic(member)](member)
    if found_shape != shape or found != dtype:
        raise BrokenEpisode(f"{key} should be {dtype} {shape} but is {found} {found_shape}")
    size = dtype.itemsize * math.prod(shape)
    # zipfile verifies the checksum at the end of the data, so ask for more than there should be.
    data = bytearray(member.read(size + 1))
    if len(data) != size:
        raise BrokenEpisode(f"{key} does not have the length that its header states")
    value = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    if dtype.kind == "f" and not np.isfinite(value).all():
        raise BrokenEpisode(f"{key} holds numbers that are not finite")
    return value


def move_into(files: list[EpisodeFile], subfolder: str) -> None:
    """Move episode files into a subfolder, where they are no longer read but not lost."""
    for file in files:
        target = file.path.parent / subfolder / file.path.name
        try:
            target.parent.mkdir(exist_ok=True)
            replace(file.path, target)
        except OSError as error:
            raise UserError(f"Cannot move {file.path} to {target}: {error.strerror}.") from error


def stack(steps: list[Rows]) -> Rows:
    """Stack a list of steps to one array [L, ...] a key."""
    return {key: np.stack([step[key] for step in steps]) for key in steps[0]}


def save_arrays(path: Path, arrays: Rows) -> None:
    """Write an uncompressed .npz, whole or not at all."""
    atomic_write(path, lambda file: np.savez(file, **arrays))


class EpisodeWriter:
    """Collects the steps of each environment and writes each finished episode as a compressed file.

    A background thread compresses and writes; files appear whole or not at all. If writing fails (disk full),
    the next `add`, `flush` or `close` raises UserError and the one after it tries again: an episode is kept
    in memory until it is on the disk.

    Args:
        folder: of the files {time}-{id}-{length}.npz; time is the start of the episode in UTC.
        spaces: the spaces of the steps, as in `step_layout`.
        n_envs: number of environments.
        keep_steps: after each new file, the oldest files beyond this many steps are deleted; 0 keeps all.
            With fewer steps than the replay's capacity, a resumed run has a smaller replay.
    """

    def __init__(self, folder: str | os.PathLike, spaces: Mapping, n_envs: int, keep_steps: int = 0):
        self.folder = Path(folder)
        self.layout = step_layout(spaces)
        self.keep_steps = keep_steps
        self.open: list[list[Rows]] = [[] for _ in range(n_envs)]  # steps of the unfinished episodes
        self.names = [""] * n_envs  # {time}-{id} of each environment's current episode
        self.tick = 0  # microseconds of the latest name, here and in the folder
        self.pending: deque[tuple[Future, str, list[Rows]]] = deque()  # episodes that are being written
        self.failed: list[tuple[str, list[Rows]]] = []  # episodes that could not be written
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".*.npz.*.tmp"):  # from a kill during a write
                leftover.unlink()
        except OSError as error:
            raise UserError(f"Cannot write to {self.folder}: {error.strerror}.") from error
        for file in list_episodes(self.folder)[-1:]:  # its clock may have been ahead
            with contextlib.suppress(ValueError):  # not a date: the name is from another program
                second = datetime.datetime.strptime(f"{file.name[:15]}+0000", f"{STAMP}%z").timestamp()
                self.tick = (int(second) + 1) * 1_000_000
        self.thread = ThreadPoolExecutor(1, "episode-writer")

    def add(self, step: Mapping[str, np.ndarray]) -> None:
        """Take one step of every environment: key -> [n_envs, ...]. Latents and log_ keys are left out."""
        self._wait(MAX_PENDING)
        for env, steps in enumerate(self.open):
            if steps and step["is_first"][env]:  # abandoned: reset in the middle of an episode
                steps[-1]["is_last"] = np.array(True)  # truncated
                self.finish(env)
            if not self.open[env]:
                self.names[env] = self.new_name()
            # Copies, because the caller may reuse its arrays.
            self.open[env].append({key: np.array(step[key][env], t) for key, (_, t) in self.layout.items()})
            if step["is_last"][env]:
                self.finish(env)

    def finish(self, env: int) -> None:
        """Write the open episode of an environment, if there is one."""
        if self.open[env]:
            self._submit(self.names[env], self.open[env])
            self.open[env] = []

    def resume(self, env: int, name: str, rows: Rows) -> None:
        """Continue an open episode that has these rows."""
        self.names[env] = name
        self.open[env] = [
            {key: value[i] for key, value in rows.items()} for i in range(len(rows["is_first"]))
        ]

    def flush(self) -> None:
        """Wait until all finished episodes are on the disk."""
        self._wait(0)

    def close(self) -> None:
        """Write finished episodes and end the thread. Open episodes are dropped."""
        try:
            self.flush()
        finally:
            self.thread.shutdown()

    def new_name(self) -> str:
        """A name {time}-{id} that sorts after all others in the folder, even if the clock was set back."""
        self.tick = max(time.time_ns() // 1000, self.tick + 1)
        second, micro = divmod(self.tick, 1_000_000)
        stamp = time.strftime(STAMP, time.gmtime(second))
        return f"{stamp}-{micro:05x}{secrets.token_hex(2)}"  # random end, as other runs may use the folder

    def _submit(self, name: str, steps: list[Rows]) -> None:
        self.pending.append((self.thread.submit(self._write, name, steps), name, steps))

    def _wait(self, allowed: int) -> None:
        """Wait until at most `allowed` episodes are pending; raises errors of the background thread."""
        while self.failed:
            self._submit(*self.failed.pop())
        while self.pending and (len(self.pending) > allowed or self.pending[0][0].done()):
            future, name, steps = self.pending.popleft()
            try:
                future.result()
            except (UserError, MemoryError):
                self.failed.append((name, steps))
                raise

    def _write(self, name: str, steps: list[Rows]) -> None:
        rows = stack(steps)
        discount = 1 - rows["is_terminal"].astype(np.float32)
        path = self.folder / f"{name}-{len(discount)}.npz"
        atomic_write(path, lambda file: np.savez_compressed(file, discount=discount, **rows))
        if self.keep_steps:
            self._delete_old()

    def _delete_old(self) -> None:
        files = list_episodes(self.folder)
        total = sum(file.length for file in files)
        for file in files[:-1]:  # the newest always stays
            if total <= self.keep_steps:
                break
            file.path.unlink(missing_ok=True)
            total -= file.length
