"""Several environments stepped at once, in the main process or in one worker process each.

An environment whose last observation had `is_last` ignores the action it is given and starts a new episode
(next-step autoreset, as the reference does it): its observation then has `is_first` and reward 0.
"""

import atexit
import contextlib
import logging
import math
import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np

from envs.wrappers import action_dtype
from tools import UserError

TIMEOUT = 600  # seconds without an answer after which an environment is given up; some start very slowly
CLOSE_TIMEOUT = 5  # seconds that the workers get to close their environments
ALIGNMENT = 64  # bytes; each array in the shared memory starts at a multiple

Arrays = dict[str, np.ndarray]
Layout = dict[str, tuple[tuple[int, ...], np.dtype]]  # key -> shape and dtype

log = logging.getLogger(__name__)


def make_vec(make_env: Callable[[int], Any], amount: int, parallel: str) -> "VecEnv":
    """Make `amount` environments that are stepped together.

    `make_env(index)` makes one, as `envs.make_env` does. `parallel` is "none" (they run in the main process,
    one after the other) or "process" (one worker process each; `make_env` must be picklable).
    """
    return {"none": SerialVec, "process": ProcessVec}[parallel](make_env, amount)


class VecEnv:
    """`len(vec)` environments as one. Every array has a leading dimension n, and is the caller's to keep.

    After an error (UserError: an environment failed, or its worker died) everything is closed.
    """

    def __init__(self, make_env: Callable[[int], Any], amount: int):
        self._amount = amount
        self._obs: Arrays = {}  # [n, ...]; each environment writes its row
        self._act: Arrays = {}  # [n, ...]; each environment reads its row
        try:
            self._open()
            self._start(make_env)
        except BaseException:
            self.close()
            raise

    def _start(self, make_env: Callable[[int], Any]) -> None:
        spaces = self._call("start", [make_env] * len(self))
        for index, other in enumerate(spaces):
            if other != spaces[0]:
                raise UserError(f"Environment {index} has other spaces than environment 0: {other}.")
        self.obs_space, self.act_space = spaces[0]
        self._bind(
            {key: ((len(self), *space.shape), space.dtype) for key, space in self.obs_space.items()},
            {key: ((len(self), *space.shape), action_dtype(space)) for key, space in self.act_space.items()},
        )

    def __len__(self) -> int:
        return self._amount

    def reset(self, episode: int | None = None) -> Arrays:
        """Start the next episode in every environment, or the one with the given number."""
        self._call("reset", [episode] * len(self))
        return self._current()

    def step(self, action: Mapping[str, np.ndarray]) -> Arrays:
        """Do one step in every environment; `action` holds arrays [n, ...] for the keys of `act_space`."""
        self._set(action)
        self._call("step", [None] * len(self))
        return self._current()

    def state(self) -> list[dict[str, Any]]:
        """For each environment {"episode": number, "actions": arrays [L, ...]} of the open episode."""
        return self._call("state", [None] * len(self))

    def restore(self, states: Sequence[Mapping[str, Any]]) -> Arrays:
        """Play the episodes of `state` again; returns the observations where they stopped."""
        self._call("restore", states)
        return self._current()

    def notes(self) -> list[str]:
        """Lines for the log that the environments have to say of themselves since the last call."""
        told = self._call("notes", [None] * len(self))
        return list(dict.fromkeys(line for lines in told for line in lines))

    def close(self) -> None:
        """End all environments; may be called again."""
        raise NotImplementedError

    def _open(self) -> None:
        raise NotImplementedError

    def _bind(self, obs: Layout, act: Layout) -> None:
        """Make the arrays and hand them to the environments."""
        raise NotImplementedError

    def _answers(self, method: str, arguments: Sequence[Any]) -> list[Any]:
        """Call a method of every environment's _Slot with its argument."""
        raise NotImplementedError

    def _call(self, method: str, arguments: Sequence[Any]) -> list[Any]:
        try:
            return self._answers(method, arguments)
        except BaseException:
            # Some environments have done the step and others not: no later call could be trusted.
            self.close()
            raise

    def _set(self, action: Mapping[str, np.ndarray]) -> None:
        for key, rows in self._act.items():
            rows[:] = action[key]

    def _current(self) -> Arrays:
        return {key: rows.copy() for key, rows in self._obs.items()}


class SerialVec(VecEnv):
    """Environments in the main process."""

    def _open(self) -> None:
        self._slots = [_Slot(index) for index in range(len(self))]

    def _bind(self, obs: Layout, act: Layout) -> None:
        self._obs, self._act = ({key: np.zeros(*each) for key, each in group.items()} for group in (obs, act))
        for slot in self._slots:
            slot.bind(self._obs, self._act)

    def _answers(self, method: str, arguments: Sequence[Any]) -> list[Any]:
        calls = zip(self._slots, arguments, strict=True)
        return [_result(slot.index, _reply(slot, method, value)) for slot, value in calls]

    def close(self) -> None:
        slots, self._slots = self._slots, []
        for slot in slots:
            slot.close()


class ProcessVec(VecEnv):
    """Environments in one worker process each.

    Observations and actions lie in one block of shared memory. A step sends one short message to each worker,
    then waits for all of them, so the environments step at the same time.
    """

    def _open(self) -> None:
        self._memory: SharedMemory | None = None
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        atexit.register(self.close)
        # Spawned, not forked: a fork of a process with threads may hang, and Windows has none.
        context = multiprocessing.get_context("spawn")
        for index in range(len(self)):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(index, theirs), name=f"env-{index}", daemon=True)
            process.start()
            theirs.close()  # so that a worker's death is seen here as the end of its pipe
            self._processes.append(process)
            self._pipes.append(ours)

    def _bind(self, obs: Layout, act: Layout) -> None:
        self._memory = SharedMemory(create=True, size=_nbytes(obs) + _nbytes(act))
        self._obs, self._act = _views(self._memory, obs, act)
        self._call("attach", [(self._memory.name, obs, act)] * len(self))

    def _answers(self, method: str, arguments: Sequence[Any]) -> list[Any]:
        for index, (pipe, value) in enumerate(zip(self._pipes, arguments, strict=True)):
            try:
                pipe.send((method, value))
            except OSError as error:
                raise self._died(index) from error
        deadline = time.monotonic() + TIMEOUT
        return [_result(index, self._receive(index, deadline)) for index in range(len(self))]

    def _receive(self, index: int, deadline: float) -> tuple:
        pipe = self._pipes[index]
        try:
            if pipe.poll(max(0, deadline - time.monotonic())):
                return pipe.recv()
        except (EOFError, OSError) as error:
            raise self._died(index) from error
        raise UserError(f"Environment {index} gave no answer for {TIMEOUT} seconds; it seems to hang.")

    def _died(self, index: int) -> UserError:
        process = self._processes[index]
        process.join(CLOSE_TIMEOUT)
        return UserError(
            f"The worker process of environment {index} died (exit code {process.exitcode}). "
            "--envs.parallel none runs the environments in the main process, which may show why."
        )

    def close(self) -> None:
        atexit.unregister(self.close)
        for pipe in self._pipes:
            pipe.close()  # a worker ends when its pipe does
        deadline = time.monotonic() + CLOSE_TIMEOUT
        for process in self._processes:
            process.join(max(0, deadline - time.monotonic()))
            process.kill()  # does nothing to one that has ended
            process.join()
            process.close()
        self._pipes, self._processes = [], []
        self._obs, self._act = {}, {}
        if self._memory:
            memory, self._memory = self._memory, None
            memory.unlink()
            # The frame of an error may still hold an array; the memory then goes with it.
            with contextlib.suppress(BufferError):
                memory.close()


class _Slot:
    """One environment and its row of the arrays."""

    def __init__(self, index: int):
        self.index = index
        self._env: Any = None
        self._obs: Arrays = {}
        self._act: Arrays = {}

    def start(self, make_env: Callable[[int], Any]) -> tuple[dict, dict]:
        self._env = make_env(self.index)
        return self._env.obs_space, self._env.act_space

    def bind(self, obs: Arrays, act: Arrays) -> None:
        self._obs, self._act = obs, act

    def reset(self, episode: int | None = None) -> None:
        self._write(self._env.reset(episode)[0])

    def step(self, _: None) -> None:
        if self._obs["is_last"][self.index]:
            self.reset()
        else:
            action = {key: rows[self.index] for key, rows in self._act.items()}
            self._write(self._env.step(action)[0])

    def state(self, _: None) -> dict[str, Any]:
        return self._env.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self._write(self._env.restore(state)[0])

    def notes(self, _: None) -> list[str]:
        return self._env.notes()

    def close(self) -> None:
        if hasattr(self._env, "close"):  # the contract does not ask for one
            self._env.close()

    def _write(self, obs: Arrays) -> None:
        for key, rows in self._obs.items():
            rows[self.index] = obs[key]


class _WorkerSlot(_Slot):
    """A _Slot whose arrays lie in shared memory."""

    _memory: SharedMemory | None = None

    def attach(self, place: tuple[str, Layout, Layout]) -> None:
        name, obs, act = place
        self._memory = SharedMemory(name=name)
        self.bind(*_views(self._memory, obs, act))

    def close(self) -> None:
        super().close()
        self.bind({}, {})
        if self._memory:
            self._memory.close()


def _work(index: int, pipe: Connection) -> None:
    """A worker process: answers calls until the pipe ends."""
    # Ctrl-C and a stop of the whole process group are the main process's to handle: it still has to save.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    slot = _WorkerSlot(index)
    try:
        while True:
            method, value = pipe.recv()
            pipe.send(_reply(slot, method, value))
    except (EOFError, OSError):  # the main process closed the pipe, or is gone
        slot.close()


def _reply(slot: _Slot, method: str, value: Any) -> tuple[str | None, str | None, Any]:
    """Call a method; returns (error message, traceback, result), one of the first or the last None."""
    try:
        return None, None, getattr(slot, method)(value)
    except UserError as error:
        return str(error), None, None
    except Exception as error:
        message = f"Environment {slot.index} failed in {method}: {type(error).__name__}: {error}"
        return message, traceback.format_exc(), None


def _result(index: int, reply: tuple[str | None, str | None, Any]) -> Any:
    error, trace, value = reply
    if trace:
        log.error("Environment %d failed:\n%s", index, trace)
    if error:
        raise UserError(error)
    return value


def _nbytes(layout: Layout) -> int:
    return sum(_slot_bytes(shape, dtype) for shape, dtype in layout.values())


def _slot_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return math.ceil(math.prod(shape) * dtype.itemsize / ALIGNMENT) * ALIGNMENT


def _views(memory: SharedMemory, *layouts: Layout) -> list[Arrays]:
    """Lay arrays over the memory, one after the other; returns a dict of them for each layout."""
    offset, groups = 0, []
    for layout in layouts:
        group = {}
        for key, (shape, dtype) in layout.items():
            group[key] = np.ndarray(shape, dtype, memory.buf, offset)
            offset += _slot_bytes(shape, dtype)
        groups.append(group)
    return groups
