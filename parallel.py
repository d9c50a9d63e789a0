"""Steps several environments at once: in the main process, in worker processes, or in Ray actors.

An environment whose last observation has `is_last` ignores its next action and starts a new episode
(next-step autoreset, as in the reference): the observation then has `is_first` and reward 0.

A worker that dies, hangs or raises an error is restarted; the other environments are not affected. Its new
environment starts the next episode, with a fresh seed. The observation has `is_first` although the old
episode was open: that one ends, truncated, at its last complete step. Two errors end the run instead: a
UserError (a mistake in the environment or the options, which would recur), and any error with parallel
"none", which has no worker to restart.

Observations and actions are in a `Block`, memory with one row per environment that worker processes share.
Only Ray, which may use other machines, sends the rows. Worker processes import neither torch nor the main
program.
"""

import atexit
import contextlib
import faulthandler
import logging
import math
import multiprocessing
import os
import select
import signal
import socket
import sys
import time
import traceback
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from basics import UserError
from envs.wrappers import action_dtype

RESTART_WINDOW = 600  # seconds in which `max_restarts` are allowed
CLOSE_TIMEOUT = 5  # seconds that the workers get to close their environments
CONNECT_TIMEOUT = 10  # seconds in which a Ray cluster must be reached
TRACEBACK_TIME = 0.5  # seconds that a hanging process gets to print its traceback
ALIGNMENT = 64  # bytes; each array of a Block starts at a multiple
IN_MAIN = "--envs.parallel none runs the environments in the main process, which may show more."

Arrays = dict[str, np.ndarray]
Layout = dict[str, tuple[tuple[int, ...], np.dtype]]  # key -> shape and dtype

log = logging.getLogger("lore")


class VecEnv:
    """`len(vec)` environments as one. All arrays have a leading dimension n and belong to the caller.

    An error (UserError: an environment breaks its contract, or workers fail too often) closes everything.

    Args:
        make_env: `make_env(index)` makes one environment, as `envs.make_env` does. For process and ray it
            must be picklable and not be defined in the main program.
        parallel: none (in the main process, one after the other), process or ray (one worker each).
        timeout: seconds without a reply after which a worker counts as hanging.
        max_restarts: restarts allowed within RESTART_WINDOW; one more raises an error.
        ray_address: address of a Ray cluster; None starts Ray on this machine.
    """

    def __init__(
        self,
        make_env: Callable[[int], Any],
        amount: int,
        parallel: str,
        *,
        timeout: float,
        max_restarts: int,
        ray_address: str | None = None,
    ):
        self._make_env, self._amount, self._max_restarts = make_env, amount, max_restarts
        self._worker = WORKERS[parallel]
        self._worker_options = {"timeout": timeout} | ({"address": ray_address} if parallel == "ray" else {})
        self._episodes = [-1] * amount  # current episode number of each environment
        self._lost: dict[int, Fault] = {}  # workers that no longer reply
        self._restarts: deque[float] = deque()  # times of the restarts
        self._workers: list[Worker] = []
        self._block = Block({}, {})
        atexit.register(self.close)
        try:
            self._start()
        except Fault as fault:
            self.close()
            raise self._error(fault) from None
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        for index in range(len(self)):
            self._workers.append(self._worker(index, **self._worker_options))
        spaces = self._call_all("start", [self._make_env] * len(self))
        self.obs_space, self.act_space = spaces[0]
        for index, other in enumerate(spaces):
            self._check_spaces(index, other)
        self._block = Block(
            {key: ((len(self), *space.shape), space.dtype) for key, space in self.obs_space.items()},
            {key: ((len(self), *space.shape), action_dtype(space)) for key, space in self.act_space.items()},
            shared=self._worker.shared,
        )
        for worker in self._workers:
            worker.bind(self._block)

    def _check_spaces(self, index: int, spaces: tuple[dict, dict]) -> None:
        if spaces != (self.obs_space, self.act_space):
            raise UserError(f"Environment {index} has other spaces than environment 0: {spaces}.")

    def __len__(self) -> int:
        return self._amount

    def reset(self, episode: int | None = None) -> Arrays:
        """Start the next episode in every environment, or the one with the given number."""
        self._episodes = [number + 1 if episode is None else episode for number in self._episodes]
        return self._advance([("reset", number) for number in self._episodes])

    def step(self, action: Mapping[str, np.ndarray]) -> Arrays:
        """Step every environment; `action` has an array [n, ...] for each key of `act_space`."""
        for key, rows in self._block.act.items():
            rows[:] = action[key]
        calls: list[tuple[str, int | None]] = [("step", None)] * len(self)
        for index in np.flatnonzero(self._block.obs["is_last"]):
            self._episodes[index] += 1
            calls[index] = "reset", self._episodes[index]
        return self._advance(calls)

    def state(self) -> list[dict[str, Any]] | None:
        """The open episode of each environment: {"episode": number, "actions": arrays [L, ...]}.

        None if a worker is lost, and its open episode with it. The next step restarts it.
        """
        states = self._exchange([("state", None)] * len(self))
        return None if self._lost else states

    def restore(self, states: Sequence[Mapping[str, Any]]) -> Arrays:
        """Replay the episodes of `state`; returns their last observations."""
        self._call_all("restore", states)
        self._episodes = [int(state["episode"]) for state in states]
        return self._current()

    def notes(self) -> list[str]:
        """New lines that the environments have for the log."""
        lines = self._exchange([("notes", None)] * len(self))  # the next step restarts workers lost here
        return list(dict.fromkeys(line for each in lines for line in each or ()))

    def close(self) -> None:
        """End all environments; may be called again."""
        atexit.unregister(self.close)
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.stop()
        deadline = time.monotonic() + CLOSE_TIMEOUT
        for worker in workers:
            worker.kill(max(0, deadline - time.monotonic()))
        self._block.close()

    def _advance(self, calls: Sequence[tuple[str, Any]]) -> Arrays:
        """Make the calls, restart lost workers, and return the observations."""
        self._exchange(calls)
        while self._lost:
            self._restart(*self._lost.popitem())
        return self._current()

    def _call_all(self, method: str, values: Sequence[Any]) -> list[Any]:
        """Call a method of every environment; here a lost worker is an error."""
        results = self._exchange([(method, value) for value in values])
        for fault in self._lost.values():
            self.close()
            raise self._error(fault)
        return results

    def _exchange(self, calls: Sequence[tuple[str, Any]]) -> list[Any]:
        """Send each worker its call, then wait for all: they run concurrently. Records lost workers."""
        results: list[Any] = [None] * len(self)
        try:
            for worker, (method, value) in zip(self._workers, calls, strict=True):
                if worker.index not in self._lost:
                    self._guard(worker, worker.send, method, value)
            for worker in self._workers:
                if worker.index not in self._lost:
                    results[worker.index] = self._guard(worker, worker.receive)
        except BaseException:
            self.close()  # some environments have done the step and others not
            raise
        return results

    def _guard(self, worker: "Worker", function: Callable, *args: Any) -> Any:
        try:
            return function(*args)
        except Fault as fault:
            self._lost[worker.index] = fault
            return None

    def _restart(self, index: int, fault: "Fault") -> None:
        """Replace a lost worker and start a new episode in it."""
        try:
            self._allow_restart(fault)
            self._workers[index].kill()
            self._episodes[index] += 1
            worker = self._workers[index] = self._worker(index, **self._worker_options)
            self._check_spaces(index, worker.call("start", self._make_env))
            worker.bind(self._block)
            worker.call("reset", self._episodes[index])
        except Fault as again:
            self._lost[index] = again
        except BaseException:
            self.close()
            raise

    def _allow_restart(self, fault: "Fault") -> None:
        """Log what happened; raise UserError if it happened too often."""
        if not self._worker.restarts:
            raise self._error(fault)
        now = time.monotonic()
        while self._restarts and self._restarts[0] < now - RESTART_WINDOW:
            self._restarts.popleft()
        limit = f"envs.max_restarts allows {self._max_restarts} restarts in {RESTART_WINDOW // 60} minutes"
        if len(self._restarts) >= self._max_restarts:
            raise self._error(fault, f"{limit}: the run stops.")
        self._restarts.append(now)
        log.error(
            "%s. Its worker is restarted (number %d; %s); an open episode ends here, truncated.\n%s",
            *(fault, len(self._restarts), limit, fault.trace),
        )

    def _error(self, fault: "Fault", why: str = "") -> UserError:
        if fault.trace:
            log.error("%s\n%s", fault, fault.trace)
        hint = IN_MAIN if self._worker.restarts else ""
        return UserError(" ".join(part for part in (f"{fault}.", why, hint) if part))

    def _current(self) -> Arrays:
        return {key: rows.copy() for key, rows in self._block.obs.items()}


# --- What main process and workers share ---------------------------------------------------------------


class Fault(Exception):
    """An environment raised an error, or its worker died or hangs. `trace` is the traceback, if any."""

    def __init__(self, message: str, trace: str = ""):
        super().__init__(message)
        self.trace = trace


class Block:
    """Observations and actions of all environments as arrays [n, ...] in one piece of memory.

    `name` opens shared memory that another process created; without it, `shared` creates some.
    """

    def __init__(self, obs: Layout, act: Layout, shared: bool = False, name: str | None = None):
        self.obs_layout, self.act_layout = obs, act
        size = sum(_padded_bytes(*array) for array in (*obs.values(), *act.values()))
        self._owner = shared and name is None
        self._memory = SharedMemory(name, create=self._owner, size=size) if shared else None
        self.name = self._memory and self._memory.name
        arrays = self._arrays(self._memory.buf if self._memory else np.zeros(size, np.uint8).data)
        self.obs: Arrays = {key: next(arrays) for key in obs}
        self.act: Arrays = {key: next(arrays) for key in act}

    def _arrays(self, memory: memoryview) -> Iterator[np.ndarray]:
        offset = 0
        for shape, dtype in (*self.obs_layout.values(), *self.act_layout.values()):
            yield np.ndarray(shape, dtype, memory, offset)
            offset += _padded_bytes(shape, dtype)

    def close(self) -> None:
        self.obs, self.act = {}, {}
        if self._memory:
            memory, self._memory = self._memory, None
            if self._owner:
                memory.unlink()
            with contextlib.suppress(BufferError):  # the frame of an error may still hold an array
                memory.close()


def _padded_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return math.ceil(math.prod(shape) * dtype.itemsize / ALIGNMENT) * ALIGNMENT


class Reply(NamedTuple):
    """The result of a call, or an error's message; an error without traceback is a UserError."""

    value: Any = None
    error: str = ""
    trace: str = ""


class Slot:
    """One environment and its row of a Block: the methods that a worker calls."""

    def __init__(self, index: int, row: int):
        self.index, self._row = index, row
        self._env: Any = None
        self._block = Block({}, {})

    def call(self, method: str, value: Any) -> Reply:
        """Call a method. Errors are returned as text, since not all exceptions can be pickled."""
        try:
            return Reply(getattr(self, method)(value))
        except UserError as error:
            return Reply(error=str(error))
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            message = f"Environment {self.index} failed in {method}: {reason}"
            return Reply(error=message, trace=traceback.format_exc())

    def start(self, make_env: Callable[[int], Any]) -> tuple[dict, dict]:
        """Make the environment; returns its spaces."""
        self._env = make_env(self.index)
        return self._env.obs_space, self._env.act_space

    def bind(self, block: Block) -> None:
        self._block = block

    def attach(self, place: tuple[Layout, Layout, str | None]) -> None:
        """Bind the Block that another process created under a name, or without one a new Block."""
        obs, act, name = place
        self.bind(Block(obs, act, shared=name is not None, name=name))

    def reset(self, episode: int) -> None:
        self._write(self._env.reset(episode)[0])

    def step(self, _: None) -> None:
        action = {key: rows[self._row] for key, rows in self._block.act.items()}
        self._write(self._env.step(action)[0])

    def state(self, _: None) -> dict[str, Any]:
        return self._env.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self._write(self._env.restore(state)[0])

    def notes(self, _: None) -> list[str]:
        return self._env.notes()

    def close(self) -> None:
        if hasattr(self._env, "close"):  # optional in the contract
            self._env.close()

    def _write(self, obs: Arrays) -> None:
        for key, rows in self._block.obs.items():
            rows[self._row] = obs[key]


# --- Workers -------------------------------------------------------------------------------------------


class Worker:
    """One environment, wherever it runs. Each `send` is followed by a `receive`.

    Both raise Fault, also when a reply takes longer than `timeout` seconds; then only `kill` may follow.
    A UserError of the environment is raised unchanged.
    """

    shared = False  # whether the Block must be shared memory
    restarts = True  # whether another worker may replace it after a Fault

    def __init__(self, index: int, timeout: float):
        self.index, self.timeout = index, timeout

    def bind(self, block: Block) -> None:
        """Set where observations and actions are."""
        raise NotImplementedError

    def send(self, method: str, value: Any) -> None:
        raise NotImplementedError

    def receive(self) -> Any:
        raise NotImplementedError

    def stop(self) -> None:
        """Ask it to close its environment and end; does not wait."""

    def kill(self, grace: float = 0) -> None:
        """End it within `grace` seconds."""

    def call(self, method: str, value: Any = None) -> Any:
        self.send(method, value)
        return self.receive()

    def _result(self, reply: Reply) -> Any:
        if reply.trace:
            raise Fault(reply.error, reply.trace)
        if reply.error:
            raise UserError(reply.error)
        return reply.value

    def _hangs(self) -> Fault:
        return Fault(f"Environment {self.index} gave no answer for {self.timeout:g} seconds; it hangs")


class InlineWorker(Worker):
    """Runs in the main process, within `send`. It has no timeout."""

    restarts = False

    def __init__(self, index: int, timeout: float):
        super().__init__(index, timeout)
        self._slot = Slot(index, index)

    def bind(self, block: Block) -> None:
        self._slot.bind(block)

    def send(self, method: str, value: Any) -> None:
        self._reply = self._slot.call(method, value)

    def receive(self) -> Any:
        return self._result(self._reply)

    def kill(self, grace: float = 0) -> None:
        self._slot.close()


class ProcessWorker(Worker):
    """Runs in a separate process, which imports the environment and little else."""

    shared = True

    def __init__(self, index: int, timeout: float):
        super().__init__(index, timeout)
        # Spawned, not forked: a fork of a process with threads may hang, and Windows has none.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(index, theirs), name=f"env-{index}", daemon=True)
        try:
            with _hidden_main():
                self.process.start()
        except OSError as error:
            raise Fault(f"The worker process of environment {index} does not start ({error})") from None
        theirs.close()  # so that the pipe ends when the worker dies
        self._wait = _waiter(self._pipe)

    def bind(self, block: Block) -> None:
        self.call("attach", (block.obs_layout, block.act_layout, block.name))

    def send(self, method: str, value: Any) -> None:
        self._deadline = time.monotonic() + self.timeout
        try:
            self._pipe.send((method, value))
        except OSError:
            raise self._died() from None

    def receive(self) -> Any:
        try:
            replied = self._wait(max(0, self._deadline - time.monotonic()))
            reply = self._pipe.recv() if replied else None
        except (EOFError, OSError):
            raise self._died() from None
        if reply is None:
            self._print_traceback()
            raise self._hangs()
        return self._result(reply)

    def _print_traceback(self) -> None:
        if hasattr(signal, "SIGUSR1"):
            os.kill(self.process.pid, signal.SIGUSR1)
            self.process.join(TRACEBACK_TIME)

    def _died(self) -> Fault:
        self.process.join(1)  # the pipe ends a moment before the process
        code = self.process.exitcode
        names = {-signum: signum.name for signum in signal.Signals}
        reason = f"killed by {names[code]}" if code in names else f"exit code {code}"
        return Fault(f"The worker process of environment {self.index} died ({reason})")

    def stop(self) -> None:
        self._pipe.close()  # which ends the worker

    def kill(self, grace: float = 0) -> None:
        self.stop()
        process, self.process = self.process, None
        if process:
            process.join(grace)
            process.kill()
            process.join()
            process.close()  # frees its handles now rather than at garbage collection


def _waiter(pipe: Connection) -> Callable[[float], bool]:
    """`pipe.poll(seconds)` without creating a selector each time."""
    if not hasattr(select, "poll"):  # Windows
        return pipe.poll
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    return lambda seconds: bool(poll.poll(1000 * seconds))


@contextlib.contextmanager
def _hidden_main() -> Iterator[None]:
    """Within, spawned processes do not import the main program, and so not torch."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _work(index: int, pipe: Connection) -> None:
    """A worker process: answers calls until the pipe ends."""
    # The main process handles Ctrl-C and SIGTERM of the process group: it must still save.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()  # a crash in C code prints its traceback to stderr
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1)  # prints where a worker hangs
    slot = Slot(index, index)
    try:
        while True:
            pipe.send(slot.call(*pipe.recv()))
    except (EOFError, OSError):  # the main process closed the pipe or is gone
        slot.close()


class RayWorker(Worker):
    """Runs in a Ray actor, on this machine or another one of a cluster. Calls carry the rows."""

    def __init__(self, index: int, timeout: float, address: str | None = None):
        super().__init__(index, timeout)
        # Other machines receive this folder, without the files that .gitignore names.
        code = {"working_dir": str(Path(__file__).parent)}
        self._ray = start_ray(address, "--envs.parallel ray", "envs.ray_address", code)
        self._rows: Block | None = None
        # num_cpus=0: an actor that waits for a free core would look as if it hung.
        actor = self._ray.remote(num_cpus=0, scheduling_strategy="SPREAD")(RaySlot)
        self._actor = actor.remote(index, 0)

    def bind(self, block: Block) -> None:
        def one_row(layout: Layout) -> Layout:
            return {key: ((1, *shape[1:]), dtype) for key, (shape, dtype) in layout.items()}

        self.call("attach", (one_row(block.obs_layout), one_row(block.act_layout), None))
        self._rows = block

    def send(self, method: str, value: Any) -> None:
        self._deadline = time.monotonic() + self.timeout
        act = {k: rows[self.index] for k, rows in self._rows.act.items()} if self._rows else {}
        self._reply = self._actor.call_with_rows.remote(method, value, act)

    def receive(self) -> Any:
        errors = self._ray.exceptions
        try:
            reply, obs = self._ray.get(self._reply, timeout=max(0, self._deadline - time.monotonic()))
        except errors.GetTimeoutError:
            raise self._hangs() from None
        except errors.RayError as error:
            raise Fault(f"The Ray actor of environment {self.index} died", str(error)) from None
        result = self._result(reply)
        if self._rows:
            for key, rows in self._rows.obs.items():
                rows[self.index] = obs[key]
        return result

    def stop(self) -> None:
        if self._ray.is_initialized():
            self._closed = self._actor.close.remote()

    def kill(self, grace: float = 0) -> None:
        if self._ray.is_initialized():
            if grace:
                self._ray.wait([self._closed], timeout=grace)
            self._ray.kill(self._actor)


class RaySlot(Slot):
    """The actor: a Slot with a Block of one row."""

    def call_with_rows(self, method: str, value: Any, act: Arrays) -> tuple[Reply, Arrays]:
        """Call a method with the action; returns the reply and the observation after it."""
        for key, row in act.items():
            self._block.act[key][0] = row
        reply = self.call(method, value)
        return reply, {key: rows[0] for key, rows in self._block.obs.items()}


def start_ray(
    address: str | None,
    asked_by: str,
    option: str,
    cluster_env: Mapping[str, Any] | None = None,
    log_to_driver: bool = True,
) -> types.ModuleType:
    """Start Ray on this machine or connect to a cluster, unless that is done. Returns the module.

    Errors name the feature that needs Ray, `asked_by`, and the `option` that gave the address. `cluster_env`
    is the runtime_env of a cluster's workers. `log_to_driver` prints here what they print.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise UserError(
            f"{asked_by} needs the Python package ray, which is not installed: "
            "pip install -r requirements/ray.txt"
        ) from error
    if ray.is_initialized():
        return ray
    if address:
        _check_reachable(address, option)
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(
            address or "local", include_dashboard=False, configure_logging=False,
            runtime_env=cluster_env if address else None, log_to_driver=log_to_driver,
        )  # fmt: skip
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"Ray does not start at {address or 'this machine'}: {reason}") from error
    finally:
        for signum, handler in handlers.items():  # Ray's own would end the run without a save
            signal.signal(signum, handler)
    return ray


def _check_reachable(address: str, option: str) -> None:
    """Ray itself would retry for minutes, and could not be interrupted."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):
        raise UserError(f"{option} is {address}; it must be host:port, for example 10.0.0.1:6379.")
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"There is no Ray at {address}, which {option} names ({error}). Start it there: ray start --head"
        ) from error


WORKERS: dict[str, type[Worker]] = {"none": InlineWorker, "process": ProcessWorker, "ray": RayWorker}
