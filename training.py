"""What the loop of dreamer.py uses: the actor in the training envs, the counts, and the batches."""

import functools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import checkpoint as checkpoints
import distributed
from agent import Dreamer
from basics import UserError, numpy_rng
from config import Config
from envs import make_env
from exploration import Random
from logger import Logger, Timer
from lore_llm.hooks import NoAdvice
from parallel import VecEnv
from replay import Replay
from stats import EpisodeStats, SuccessRates

ESTIMATE_UPDATES = 20  # updates after which the duration of the run is estimated

Arrays = dict[str, np.ndarray]

log = logging.getLogger("lore")


def make_envs(config: Config, mode: str) -> VecEnv:
    """The envs of mode train, of which every rank has its share, or eval."""
    options, first = config.envs, 0
    amount = options.eval_amount
    if mode == "train":
        amount = options.amount // distributed.world_size()
        first = distributed.rank() * amount
    video = mode == "eval" and config.eval_videos
    return VecEnv(
        functools.partial(make_env, config, mode, video=video, first=first), amount, options.parallel,
        timeout=options.timeout, max_restarts=options.max_restarts, ray_address=options.ray_address,
    )  # fmt: skip


class Actor:
    """The agent in the training envs: their observations, its recurrent state, and the prefill's actions."""

    def __init__(self, config: Config, agent: Dreamer, replay: Replay, envs: VecEnv, timer: Timer):
        self.config, self.agent, self.replay, self.envs, self.timer = config, agent, replay, envs, timer
        self.random = Random(envs.act_space, numpy_rng(config.seed, "prefill", *distributed.seed_names()))
        self.obs: Arrays = {}  # [n, ...], the current observations
        self.state: dict[str, Tensor] = {}  # [n, ...], as `Dreamer.act` returns it
        self.failed = False

    def reset(self, episode: int) -> None:
        """Start an episode in every env. Its number, and so its seed, must be new to all envs."""
        self.obs = self.envs.reset(episode)
        self.state = self.agent.initial_state(len(self.envs))

    def act(self, obs: Arrays, plans: Mapping[int, Sequence[int]], step: int) -> tuple[Arrays, Arrays]:
        """Choose actions for observations [n, ...]: (action, what is stored with the step)."""
        until = self.config.expl_until
        self.agent.explore(not until or step < until)
        if step < self.config.prefill:
            return self.random.act(len(self.envs)), {}
        with self.timer("policy"):
            rng = self.agent.rngs["act"]
            action, self.state, latents = self.agent.act(obs, self.state, rng, explore=True, plans=plans)
        return action, latents

    def step(self, action: Arrays) -> None:
        with self.timer("env"):
            self.obs = self.envs.step(action)

    def close(self, failed: bool = False) -> None:
        """Close the envs. If they have `failed`, their open episodes end here for a resumed run, too."""
        self.failed = failed
        self.envs.close()

    def state_dict(self) -> dict:
        envs = None if self.failed else self.envs.state()
        return {
            "obs": tensors(self.obs),
            "state": {k: v.cpu() for k, v in self.state.items()},
            "envs": envs and [{**state, "actions": tensors(state["actions"])} for state in envs],
            "prefill": self.random.rng.bit_generator.state,
        }

    def load_state_dict(self, saved: dict) -> None:
        """Replay the open episodes up to the saved observations. `obs` stays empty if that fails."""
        if distributed.is_main():
            self.random.rng.bit_generator.state = saved["prefill"]
        if not (self.replay.exact and saved["envs"]):
            return
        try:
            obs = self.envs.restore([{**s, "actions": arrays(s["actions"])} for s in saved["envs"]])
        except UserError as error:  # an env that is not deterministic may refuse these actions
            log.info("%s", error)
            self.envs = make_envs(self.config, "train")
            return
        before = arrays(saved["obs"])
        if before.keys() == obs.keys() and all(np.array_equal(before[k], v) for k, v in obs.items()):
            self.obs, self.state = obs, self.agent.acting_state(saved["state"], len(self.envs))


class Progress:
    """Counts over all learners: env steps (action repeat included), transitions, episodes, successes.

    A transition is a stored step that does not have `is_first`.
    """

    def __init__(self, config: Config, replay: Replay, logger: Logger):
        self.config, self.replay, self.logger = config, replay, logger
        self.step = self.transitions = self.episodes = self.updates = 0
        self.stats = EpisodeStats(replay.n_envs, config.action_repeat)
        self.success = SuccessRates(config.task.partition("_")[0])

    def start(self, steps: int, transitions: int) -> None:
        """Count the stored steps with which a new run starts."""
        self.transitions, self.episodes = transitions, steps - transitions
        self.step = transitions * self.config.action_repeat

    def count(self, obs: Arrays) -> int:
        """Count one stored step of every env, and log the episodes that end with it; the new env step."""
        first, finished = int(obs["is_first"].sum()), self.stats.add(obs)
        counts = first, len(obs["is_first"]) - first, len(finished)
        first, moved, ended = distributed.total(*counts)
        self.episodes += first
        self.transitions += moved
        self.step += moved * self.config.action_repeat
        for episode in sum(distributed.all_gather_object(finished), []) if ended else ():
            self.success.add(episode)
            metrics = {f"env/episode_{name}": episode[name] for name in ("return", "length")}
            extra = {f"env/{k[4:]}": v for k, v in episode.items() if k.startswith("log_")}
            self.logger.add(metrics | {k: v for k, v in extra.items() if "achievement" not in k})
        return self.step

    def updated(self) -> None:
        """Count an update; after the first ones, log how long the run will take."""
        self.updates += 1
        if self.updates == 1:
            self.first_update = time.perf_counter()
        elif self.updates == ESTIMATE_UPDATES:
            c = self.config
            # Includes the share of the env steps.
            seconds = (time.perf_counter() - self.first_update) / (ESTIMATE_UPDATES - 1)
            per_step = c.train_ratio / (c.batch_size * c.batch_length) / c.action_repeat
            hours = seconds * per_step * (c.steps - self.step) / 3600
            log.info("About %.1f hours to go at %.2f seconds per update, without evaluation", hours, seconds)

    def metrics(self) -> dict[str, float]:
        return {"replay/size": distributed.total(self.replay.size)[0]} | self.success.metrics()

    def state_dict(self) -> dict:
        counts = {name: getattr(self, name) for name in ("step", "transitions", "episodes")}
        return {**counts, "stats": self.stats.state_dict(), "success": self.success.state_dict()}

    def load_state_dict(self, saved: dict) -> None:
        self.step, self.transitions = int(saved["step"]), int(saved["transitions"])
        self.episodes = int(saved["episodes"])
        self.success.load_state_dict(saved["success"])
        if self.replay.exact:
            self.stats.load_state_dict(saved["stats"])


class Batch(NamedTuple):
    arrays: Arrays  # [B, L, ...]
    where: np.ndarray  # [B, 2], see `Replay.draw`
    data: dict[str, Tensor]  # on the device
    items: dict[str, Tensor]  # synthetic items, on the device


class Batches:
    """The batches that are due. A thread draws the next one while the envs step or the agent trains."""

    def __init__(self, config: Config, agent: Dreamer, replay: Replay, hooks: NoAdvice, timer: Timer):
        self.agent, self.replay, self.hooks, self.timer = agent, replay, hooks, timer
        self.batch_size = config.batch_size // distributed.world_size()
        self.thread = ThreadPoolExecutor(1, "sampler")
        self.next: Future | None = None
        self.due, self.ready = 0, False
        self.last: Arrays | None = None

    def request(self, amount: int) -> None:
        """Let the next iteration give `amount` batches; none as long as a learner's replay is too small."""
        self.ready = self.ready or not distributed.any_rank(not self.replay.can_sample(self.batch_size))
        self.due = amount if self.ready else 0
        if self.due:
            self._draw()

    def __iter__(self) -> Iterator[Batch]:
        due, self.due = self.due, 0
        for left in reversed(range(due)):
            with self.timer("replay"):
                batch = self.next.result()
            if left:
                self._draw()
            self.last = batch.arrays
            yield batch

    def _draw(self) -> None:
        items = self.hooks.items()

        def draw() -> Batch:
            sample = self.replay.sample(self.batch_size)
            where = sample.pop("where")
            return Batch(sample, where, self.agent.upload(sample), self.agent.upload(items()))

        self.next = self.thread.submit(draw)

    def update(self, batch: Batch, kept: Arrays | None) -> None:
        """Store what an update kept for its steps; None keeps what the replay has.

        Waits until the next batch is drawn: that must not depend on timing.
        """
        wait([self.next])
        if kept is not None:
            with self.timer("replay"):
                self.replay.update_latents(batch.where, kept["deter"], kept["stoch"])
                self.replay.update_priorities(batch.where, kept["loss"])

    def close(self) -> None:
        self.thread.shutdown()


class Diverged(UserError):
    """Too many updates in a row had a gradient that is not finite."""


def diverged(logdir: Path, streak: int, step: int, batch: Batch, agent: Dreamer) -> Diverged:
    """Write the diagnosis; the error to raise. The last good checkpoint is not replaced."""
    path = logdir / "diagnosis.pt"
    if distributed.is_main():
        diagnosis = {"step": step, "batch": tensors(batch.arrays), "agent": agent.state_dict()}
        checkpoints.save_tensors(path, diagnosis)
    return Diverged(
        f"The gradient was not finite in {streak} updates in a row, so the run stops. The batch and "
        f"the weights are in {path}. Resume with a lower --opt.lr; the last checkpoint is untouched."
    )


def tensors(values: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in values.items()}


def arrays(values: Mapping[str, Tensor]) -> Arrays:
    return {k: v.numpy() for k, v in values.items()}
