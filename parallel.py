"""Several environments stepped at once. A worker that dies or hangs is restarted, and the others go on.

An environment whose last observation had `is_last` ignores the action it is given and starts a new episode
(next-step autoreset, as the reference does it): its observation then has `is_first` and reward 0.

The environment of a restarted worker starts a new episode, with the next number, so its seed is a fresh one.
Its observation has `is_first` though the old episode was open: that one ended with its last whole step,
truncated. An error that the environment raises restarts its worker too, for it may be fine next time. Two
things end the run instead: a UserError (a mistake in the environment or the options, which would come again),
and any error with parallel "none", where there is no worker: the mode to look for mistakes in.
"""

import atexit
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from basics import UserError
from envs.wrappers import action_dtype
from workers import WORKERS, Arrays, Block, Fault, Worker

RESTART_WINDOW = 600  # seconds in which `max_restarts` are allowed
CLOSE_TIMEOUT = 5  # seconds that the workers get to close their environments
IN_MAIN = "--envs.parallel none runs the environments in the main process, which may show more."

log = logging.getLogger("lore")


def make_vec(
    make_env: Callable[[int], Any],
    amount: int,
    parallel: str,
    *,
    timeout: float,
    max_restarts: int,
    ray_address: str | None = None,
) -> "VecEnv":
    """Make `amount` environments that are stepped together.

    Args:
        make_env: `make_env(index)` makes one, as `envs.make_env` does. It must be picklable for process and
            ray, and not be defined in the main program.
        parallel: none (in the main process, one after the other), thread, process or ray: a worker each.
        timeout: seconds without an answer after which a worker counts as hanging.
        max_restarts: more restarts than this within RESTART_WINDOW are an error.
        ray_address: of a Ray cluster; None starts Ray on this machine.
    """
    options = {"timeout": timeout} | ({"address": ray_address} if parallel == "ray" else {})
    return VecEnv(make_env, amount, WORKERS[parallel], options, max_restarts)


class VecEnv:
    """`len(vec)` environments as one. Every array has a leading dimension n, and is the caller's to keep.

    After an error (UserError: an environment breaks its contract, or the workers fail too often) everything
    is closed.
    """

    def __init__(
        self,
        make_env: Callable[[int], Any],
        amount: int,
        worker: type[Worker],
        worker_options: Mapping[str, Any],
        max_restarts: int,
    ):
        self._make_env, self._worker, self._worker_options = make_env, worker, worker_options
        self._max_restarts = max_restarts
        self._amount = amount
        self._episodes = [-1] * amount  # number of each environment's episode
        self._lost: dict[int, Fault] = {}  # workers that do not answer any more
        self._restarts: deque[float] = deque()  # when they were
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

    @property
    def next_episode(self) -> int:
        """The first number that no environment has had."""
        return max(self._episodes) + 1

    def reset(self, episode: int | None = None) -> Arrays:
        """Start the next episode in every environment, or the one with the given number."""
        self._episodes = [number + 1 if episode is None else episode for number in self._episodes]
        return self._advance([("reset", number) for number in self._episodes])

    def step(self, action: Mapping[str, np.ndarray]) -> Arrays:
        """Do one step in every environment; `action` holds arrays [n, ...] for the keys of `act_space`."""
        for key, rows in self._block.act.items():
            rows[:] = action[key]
        calls: list[tuple[str, int | None]] = [("step", None)] * len(self)
        for index in np.flatnonzero(self._block.obs["is_last"]):
            self._episodes[index] += 1
            calls[index] = "reset", self._episodes[index]
        return self._advance(calls)

    def state(self) -> list[dict[str, Any]] | None:
        """For each environment {"episode": number, "actions": arrays [L, ...]} of the open episode.

        None if a worker is lost, and its open episode with it. The next step restarts it.
        """
        states = self._exchange([("state", None)] * len(self))
        return None if self._lost else states

    def restore(self, states: Sequence[Mapping[str, Any]]) -> Arrays:
        """Play the episodes of `state` again; returns the observations where they stopped."""
        self._call_all("restore", states)
        self._episodes = [int(state["episode"]) for state in states]
        return self._current()

    def notes(self) -> list[str]:
        """Lines for the log that the environments have to say of themselves since the last call."""
        told = self._exchange(
            [("notes", None)] * len(self)
        )  # who is lost meanwhile is restarted at the next step
        return list(dict.fromkeys(line for lines in told for line in lines or ()))

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
        """Make the calls, restart the workers that are lost, and return the observations."""
        self._exchange(calls)
        while self._lost:
            self._restart(*self._lost.popitem())
        return self._current()

    def _call_all(self, method: str, values: Sequence[Any]) -> list[Any]:
        """Call a method of every environment. To lose a worker is an error: a new one could not stand in."""
        results = self._exchange([(method, value) for value in values])
        for fault in self._lost.values():
            self.close()
            raise self._error(fault)
        return results

    def _exchange(self, calls: Sequence[tuple[str, Any]]) -> list[Any]:
        """Send each worker its call, then wait for all; so they work at the same time. Notes who is lost."""
        results: list[Any] = [None] * len(self)
        try:
            for worker, (method, value) in zip(self._workers, calls, strict=True):
                if worker.index not in self._lost:
                    self._guard(worker, worker.send, method, value)
            for worker in self._workers:
                if worker.index not in self._lost:
                    results[worker.index] = self._guard(worker, worker.receive)
        except BaseException:
            # Some environments have done the step and others not: no later call could be trusted.
            self.close()
            raise
        return results

    def _guard(self, worker: Worker, function: Callable, *args: Any) -> Any:
        try:
            return function(*args)
        except Fault as fault:
            self._lost[worker.index] = fault
            return None

    def _restart(self, index: int, fault: Fault) -> None:
        """Put a new worker in the place of a lost one and start a new episode in it."""
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

    def _allow_restart(self, fault: Fault) -> None:
        """Show what happened, and raise UserError if it happened too often."""
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

    def _error(self, fault: Fault, why: str = "") -> UserError:
        if fault.trace:
            log.error("%s\n%s", fault, fault.trace)
        hint = IN_MAIN if self._worker.restarts else ""
        return UserError(" ".join(part for part in (f"{fault}.", why, hint) if part))

    def _current(self) -> Arrays:
        return {key: rows.copy() for key, rows in self._block.obs.items()}
