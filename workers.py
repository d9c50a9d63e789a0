"""Where one environment runs: in the main process, in a thread, in a process of its own, or in a Ray actor.

A worker gets calls, (method, value), and gives one reply to each. Observations and actions do not go with
them: they lie in a `Block`, of which each environment has a row. Only Ray, which may use other machines,
sends the rows. Worker processes import neither torch nor the program that started them.
"""

import contextlib
import faulthandler
import math
import multiprocessing
import os
import pickle
import queue
import select
import signal
import socket
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from basics import UserError

ALIGNMENT = 64  # bytes; each array of a Block starts at a multiple
CONNECT_TIME = 10  # seconds in which a Ray cluster has to be reached
TRACEBACK_TIME = 0.5  # seconds that a hanging process gets to write where it is

Arrays = dict[str, np.ndarray]
Layout = dict[str, tuple[tuple[int, ...], np.dtype]]  # key -> shape and dtype


class Fault(Exception):
    """An environment raised an error, or its worker died or hangs. `trace` is the traceback, if any."""

    def __init__(self, message: str, trace: str = ""):
        super().__init__(message)
        self.trace = trace


class Block:
    """Observations and actions of all environments as arrays [n, ...] in one piece of memory.

    `name` is that of the shared memory, by which another process finds it; None is memory of this process.
    """

    def __init__(self, obs: Layout, act: Layout, shared: bool = False, name: str | None = None):
        self.obs_layout, self.act_layout = obs, act
        size = sum(_slot_bytes(*array) for array in (*obs.values(), *act.values()))
        self._owner = shared and name is None
        self._memory = SharedMemory(name, create=self._owner, size=size) if shared else None
        self.name = self._memory and self._memory.name
        places = self._places(self._memory.buf if self._memory else np.zeros(size, np.uint8).data)
        self.obs: Arrays = {key: next(places) for key in obs}
        self.act: Arrays = {key: next(places) for key in act}

    def _places(self, memory: memoryview) -> Iterator[np.ndarray]:
        offset = 0
        for shape, dtype in (*self.obs_layout.values(), *self.act_layout.values()):
            yield np.ndarray(shape, dtype, memory, offset)
            offset += _slot_bytes(shape, dtype)

    def close(self) -> None:
        self.obs, self.act = {}, {}
        if self._memory:
            memory, self._memory = self._memory, None
            if self._owner:
                memory.unlink()
            # The frame of an error may still hold an array; the memory then goes with it.
            with contextlib.suppress(BufferError):
                memory.close()


def _slot_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return math.ceil(math.prod(shape) * dtype.itemsize / ALIGNMENT) * ALIGNMENT


# --- Beside the environment ----------------------------------------------------------------------------


class Slot:
    """One environment and its row of a Block: what a worker calls."""

    def __init__(self, index: int, row: int):
        self.index, self._row = index, row
        self._env: Any = None
        self._block: Block | None = None
        self._obs: Arrays = {}

    def start(self, make_env: Callable[[int], Any]) -> tuple[dict, dict]:
        """Make the environment; returns its spaces."""
        self._env = make_env(self.index)
        return self._env.obs_space, self._env.act_space

    def bind(self, block: Block) -> None:
        self._block, self._obs = block, block.obs

    def attach(self, place: tuple[Layout, Layout, str]) -> None:
        """Bind the Block that another process has made."""
        obs, act, name = place
        self.bind(Block(obs, act, shared=True, name=name))

    def detach(self) -> None:
        """Write nothing more."""
        self._obs = {}

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
        if hasattr(self._env, "close"):  # the contract does not ask for one
            self._env.close()

    def _write(self, obs: Arrays) -> None:
        for key, rows in self._obs.items():
            rows[self._row] = obs[key]


class Reply(NamedTuple):
    """The result of a call, or the message of an error; without traceback it is a UserError."""

    value: Any = None
    error: str = ""
    trace: str = ""


def call(slot: Slot, method: str, value: Any) -> Reply:
    """Call a method of a slot. Errors come back as text, for not all can be sent to another process."""
    try:
        return Reply(getattr(slot, method)(value))
    except UserError as error:
        return Reply(error=str(error))
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        return Reply(
            error=f"Environment {slot.index} failed in {method}: {reason}", trace=traceback.format_exc()
        )


# --- Beside the run ------------------------------------------------------------------------------------


class Worker:
    """One environment, wherever it runs. Each `send` is followed by a `receive`.

    Both raise Fault; then only `kill` makes sense. A UserError of the environment is raised as it is.
    `timeout` is in seconds; who does not answer in time has a Fault.
    """

    shared = False  # whether the Block has to be shared memory
    restarts = True  # whether another worker may take its place after a Fault

    def __init__(self, index: int, timeout: float):
        self.index, self.timeout = index, timeout

    def bind(self, block: Block) -> None:
        """Tell where the rows are."""
        raise NotImplementedError

    def send(self, method: str, value: Any) -> None:
        raise NotImplementedError

    def receive(self) -> Any:
        raise NotImplementedError

    def stop(self) -> None:
        """Ask it to close its environment and end, without waiting for it."""

    def kill(self, grace: float = 0) -> None:
        """End it in `grace` seconds at most."""

    def call(self, method: str, value: Any = None) -> Any:
        self.send(method, value)
        return self.receive()

    def _result(self, reply: Reply) -> Any:
        if reply.trace:
            raise Fault(reply.error, reply.trace)
        if reply.error:
            raise UserError(reply.error)
        return reply.value

    def _hangs(self, trace: str = "") -> Fault:
        return Fault(f"Environment {self.index} gave no answer for {self.timeout:g} seconds; it hangs", trace)


class InlineWorker(Worker):
    """In the main process: the environment runs while it is sent to. It has no timeout."""

    restarts = False

    def __init__(self, index: int, timeout: float):
        super().__init__(index, timeout)
        self._slot = Slot(index, index)

    def bind(self, block: Block) -> None:
        self._slot.bind(block)

    def send(self, method: str, value: Any) -> None:
        self._reply = call(self._slot, method, value)

    def receive(self) -> Any:
        return self._result(self._reply)

    def kill(self, grace: float = 0) -> None:
        self._slot.close()


class ThreadWorker(Worker):
    """In a thread. A thread cannot be ended: one that hangs is left alone, and no longer listened to."""

    def __init__(self, index: int, timeout: float):
        super().__init__(index, timeout)
        self._slot = Slot(index, index)
        self._calls: queue.SimpleQueue = queue.SimpleQueue()
        self._replies: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"env-{index}", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (message := self._calls.get()) is not None:
            self._replies.put(call(self._slot, *message))
        self._slot.close()

    def bind(self, block: Block) -> None:
        self._slot.bind(block)

    def send(self, method: str, value: Any) -> None:
        self._deadline = time.monotonic() + self.timeout
        self._calls.put((method, value))

    def receive(self) -> Any:
        try:
            reply = self._replies.get(timeout=max(0, self._deadline - time.monotonic()))
        except queue.Empty:
            frame = sys._current_frames().get(self._thread.ident)
            raise self._hangs("".join(traceback.format_stack(frame))) from None
        return self._result(reply)

    def stop(self) -> None:
        self._calls.put(None)

    def kill(self, grace: float = 0) -> None:
        self._slot.detach()
        self.stop()
        self._thread.join(grace)


class ProcessWorker(Worker):
    """In a process of its own, which imports the environment and little else."""

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
        theirs.close()  # so that a worker's death is seen here as the end of its pipe
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
            answered = self._wait(max(0, self._deadline - time.monotonic()))
            reply = self._pipe.recv() if answered else None
        except (EOFError, OSError):
            raise self._died() from None
        if reply is None:
            self._show_traceback()
            raise self._hangs()
        return self._result(reply)

    def _show_traceback(self) -> None:
        if hasattr(signal, "SIGUSR1"):
            os.kill(self.process.pid, signal.SIGUSR1)
            self.process.join(TRACEBACK_TIME)

    def _died(self) -> Fault:
        self.process.join(1)  # its pipe ends a moment before
        code = self.process.exitcode
        names = {-signum: signum.name for signum in signal.Signals}
        reason = f"killed by {names[code]}" if code in names else f"exit code {code}"
        return Fault(f"The worker process of environment {self.index} died ({reason})")

    def stop(self) -> None:
        self._pipe.close()  # a worker ends when its pipe does

    def kill(self, grace: float = 0) -> None:
        self.stop()
        process, self.process = self.process, None
        if process:  # else it is dead already
            process.join(grace)
            process.kill()  # does nothing to one that has ended
            process.join()
            process.close()  # or its pipes would stay until the garbage is collected


def _waiter(pipe: Connection) -> Callable[[float], bool]:
    """`pipe.poll`, which waits so many seconds for a message, but without a new selector each time."""
    if not hasattr(select, "poll"):  # Windows
        return pipe.poll
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    return lambda seconds: bool(poll.poll(1000 * seconds))


@contextlib.contextmanager
def _hidden_main() -> Iterator[None]:
    """Within, a process that is spawned does not import our main program again, which would import torch."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _work(index: int, pipe: Connection) -> None:
    """A worker process: answers calls until the pipe ends."""
    # Ctrl-C and a stop of the whole process group are the main process's to handle: it still has to save.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()  # a crash in C code writes its traceback to stderr
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1)  # and so does a worker that hangs, when it is asked
    slot = Slot(index, index)
    try:
        while True:
            pipe.send(call(slot, *pipe.recv()))
    except (EOFError, OSError):  # the main process closed the pipe, or is gone
        slot.close()


class RayWorker(Worker):
    """In a Ray actor, on this machine or on another one of a cluster. Rows go with the calls."""

    def __init__(self, index: int, timeout: float, address: str | None = None):
        super().__init__(index, timeout)
        # The other machines get this folder, with envs/; what .gitignore names stays here.
        code = {"working_dir": str(Path(__file__).parent)}
        self._ray = start_ray(address, "--envs.parallel ray", "envs.ray_address", code)
        self._rows: Block | None = None
        # One that waits for a processor would look as if it hung: an idle one needs none.
        actor = self._ray.remote(num_cpus=0, scheduling_strategy="SPREAD")(RaySlot)
        self._actor = actor.remote(index)

    def bind(self, block: Block) -> None:
        def one_row(layout: Layout) -> Layout:
            return {key: ((1, *shape[1:]), dtype) for key, (shape, dtype) in layout.items()}

        self.call("bind", (one_row(block.obs_layout), one_row(block.act_layout)))
        self._rows = block

    def send(self, method: str, value: Any) -> None:
        self._deadline = time.monotonic() + self.timeout
        act = {k: rows[self.index] for k, rows in self._rows.act.items()} if self._rows else {}
        self._answer = self._actor.call.remote(method, value, act)

    def receive(self) -> Any:
        errors = self._ray.exceptions
        try:
            answer = self._ray.get(self._answer, timeout=max(0, self._deadline - time.monotonic()))
        except errors.GetTimeoutError:
            raise self._hangs() from None
        except errors.RayError as error:
            raise Fault(f"The Ray actor of environment {self.index} died", str(error)) from None
        reply, obs = pickle.loads(answer)
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


class RaySlot:
    """The actor: a Slot with a Block of its own, of one row."""

    def __init__(self, index: int):
        self._slot = Slot(index, 0)
        self._block = Block({}, {})

    def call(self, method: str, value: Any, act: Arrays) -> bytes:
        """Returns (reply, observation after it), pickled here: arrays that Ray sends can only be read."""
        for key, row in act.items():
            self._block.act[key][0] = row
        reply = self._bind(*value) if method == "bind" else call(self._slot, method, value)
        return pickle.dumps((reply, {key: rows[0] for key, rows in self._block.obs.items()}))

    def _bind(self, obs: Layout, act: Layout) -> Reply:
        self._block = Block(obs, act)
        self._slot.bind(self._block)
        return Reply()

    def pid(self) -> int:
        return os.getpid()

    def close(self) -> None:
        self._slot.close()


def start_ray(
    address: str | None,
    asked_by: str,
    option: str,
    cluster_env: Mapping[str, Any] | None = None,
    log_to_driver: bool = True,
) -> types.ModuleType:
    """Start Ray on this machine or connect to a cluster, where that is not done yet. Returns the module.

    Errors name who needs Ray, `asked_by`, and the `option` that gave the address. `cluster_env` is the
    runtime_env of a cluster's workers. With `log_to_driver`, what workers print comes out here.
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
    """Ray itself would try for minutes, and could not be interrupted."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):
        raise UserError(f"{option} is {address}; it must be host:port, for example 10.0.0.1:6379.")
    try:
        socket.create_connection((host, int(port)), CONNECT_TIME).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"There is no Ray at {address}, which {option} names ({error}). Start it there: ray start --head"
        ) from error


WORKERS: dict[str, type[Worker]] = {
    "none": InlineWorker,
    "thread": ThreadWorker,
    "process": ProcessWorker,
    "ray": RayWorker,
}
