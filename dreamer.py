"""Train DreamerV3: python3 dreamer.py --configs crafter --logdir ./logdir/crafter

The entry: reads the config, makes envs, replay and agent, and runs the loop: act, store, train, log,
evaluate, save. `--help` lists presets and options. Running the same command again resumes.
"""

import contextlib
import functools
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import numpy as np
import torch
from torch import Tensor

import checkpoint as checkpoints
import config as configs
import distributed
import replay as replays
import tools
from agent import Dreamer
from basics import UserError, derive_seed, first_line, numpy_rng, stop_signals
from config import Config
from distributed import LostRank
from envs import make_env
from episodes import EpisodeWriter
from evaluation import Evaluation, NoEvaluation
from exploration import Random
from logger import VIDEO_FPS, Collector, Logger, Timer, WandbRun, merged_logs
from lore_llm.hooks import AdviceHooks, NoAdvice, advice_spaces, is_count, make_service
from lore_llm.service import AdviceService
from parallel import VecEnv, make_vec
from replay import Replay
from stats import EpisodeStats, SuccessRates, merged_successes

REPLAY_STATE = "replay_state"  # folder in the logdir, with one folder for each checkpoint
REPLAY_RING = "replay_ring"  # folder in the logdir for a ring on the disk
RANK_FOLDER = "rank-{}"  # in these two, what belongs to another learner than the first
OWN_STATE = "own.pt"  # file of what such a learner has of its own, beside what its replay saved
CPU_FULL = "DefaultCPUAllocator"  # in torch's error where there is no RAM
GPU_FULL = (
    "CUDA error: out of memory",
    "_STATUS_ALLOC_FAILED",
)  # without a class of their own: CUDA, cuBLAS, cuDNN
LOWER = "--batch_size, --batch_length or --imag_last"  # options of what an update takes
LOWER_ON_GPU = f"Lower {LOWER}, take --precision bfloat16 or, for a new run, a smaller preset as size1m."
LOWER_IN_RAM = (
    f"Lower {LOWER}, --replay.capacity or --envs.amount, put the replay into files with "
    "--replay.backend memmap or, for a new run, take a smaller preset as size1m."
)
MAX_NONFINITE = 10  # skipped updates in a row (gradient not finite) after which the run stops
ESTIMATE_UPDATES = 20  # updates after which the run's duration is estimated

Arrays = dict[str, np.ndarray]


# --- The run -------------------------------------------------------------------------------------------


class Diverged(UserError):
    """Too many updates in a row had a gradient that is not finite."""


@contextlib.contextmanager
def memory_explained(on_gpu: str = LOWER_ON_GPU, in_ram: str = LOWER_IN_RAM) -> Iterator[None]:
    """Within, memory that is not there is a UserError, which names the options that lower the need."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in GPU_FULL):
            where, advice = "The GPU is full", on_gpu
        elif isinstance(error, MemoryError) or CPU_FULL in str(error):
            where, advice = "The RAM is full", in_ram
        else:
            raise
        reason = first_line(error).rstrip(".")
        traceback.clear_frames(error.__traceback__)  # what an update held is needed for saving
        raise UserError(f"{where} ({reason}). {advice}") from error


class Run:
    """Everything that a run consists of, and the counters that tell where it is.

    `step` counts env steps (action repeat included), `transitions` stored steps that are not is_first. Of
    several learners each has a run with a share of envs, replay and batch; what they count is of all.
    """

    def __init__(
        self,
        config: Config,
        logdir: Path,
        checkpoint: dict | None = None,
        resume: bool = False,
        notes: Sequence[str] = (),
        source: Path | None = None,
    ):
        """`checkpoint` is gone on with if `resume`, else only its weights and optimiser are taken, or what
        `transfer` names.

        It was read from the file `source`. `notes` are lines that the log begins with. Raises UserError; what
        can be wrong with the command is found before anything is written.
        """
        self.config, self.logdir = config, logdir
        self.source = source
        if config.deterministic:
            tools.enable_determinism()
        if config.threads:
            torch.set_num_threads(config.threads)
        elif distributed.world_size() > 1:  # which share the cores of their machine
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // distributed.local_world_size()))
        tools.seed_everything(config.seed, *distributed.seed_names())
        self.device = tools.choose_device(
            distributed.local_device(config.device, config.parallel, tools.count_gpus())
        )
        self.batch_size = config.batch_size // distributed.world_size()
        self.step = self.transitions = self.episodes = 0
        self.streak = self.timed_updates = 0
        self._noted: set[str] = set()
        self.failure = ""  # what ends the run as soon as all learners are between two steps
        self.due = 0  # updates to do in this step
        self.sampler = ThreadPoolExecutor(1, "sampler")
        self.next_batch: Future | None = None
        self.last_batch: Arrays | None = None
        self.timer = Timer()
        self._parts = contextlib.ExitStack()  # what `close` has to close
        try:
            self._build(checkpoint, resume, notes)
        except BaseException:
            self.close()
            raise

    def _build(self, checkpoint: dict | None, resume: bool, notes: Sequence[str]) -> None:
        config, saved = self.config, checkpoint if resume else None
        wandb_id = logged = capacity = None
        if saved:
            with checkpoints.reading(self.source):
                wandb_id, logged = saved["logger"]["wandb"], int(saved["every"]["log"]["last"])
                capacity = int(saved["capacity"])
        self.envs = self._make_envs("train")
        act_space = self.envs.act_space
        advised, defaults = advice_spaces(config, act_space)
        obs_space = self.envs.obs_space
        self.agent = Dreamer(obs_space, act_space, config, self.device)
        if checkpoint:
            with checkpoints.reading(self.source):
                agent = checkpoint["agent"]
                if config.transfer and not resume:
                    notes = [*notes, *self.agent.transfer(agent, config.transfer)]
                else:
                    notes = [*notes, *self.agent.load_state_dict(agent, resume=resume)]
        stored = obs_space | act_space | advised
        plan = self._plan_replay(stored, capacity)
        if config.llm.enabled:
            captioner = self.agent.policy.captioner
            service, more = make_service(
                config, captioner, len(self.envs), self.logdir, distributed.world_size()
            )
            self._parts.callback(service.close)
            notes = [*notes, *more]
        self.prefill = Random(act_space, numpy_rng(config.seed, "prefill", *distributed.seed_names()))
        self.stats = EpisodeStats(len(self.envs), config.action_repeat)
        self.success = SuccessRates(config.task.partition("_")[0])
        self.hooks = NoAdvice()
        every = {"log": config.log_every, "eval": config.eval_every, "save": config.save_every}
        self.every = {name: tools.Every(steps) for name, steps in every.items()}
        self.ratio = tools.Ratio(config.train_ratio / (config.batch_size * config.batch_length))

        self.logger = self._make_logger(logged, wandb_id)
        self._parts.callback(self.logger.close)
        self.print = self.logger.print
        for line in [self._about(), *notes, plan.line]:
            self.print(line)
        if self.agent.unseen:
            self.print(
                f"Not encoded, so the agent does not see: {', '.join(self.agent.unseen)} "
                "(no pattern of --encoder.*_keys fits)"
            )
        self.replay = self._make_replay(stored, plan, defaults)
        if config.llm.enabled:
            parts = service, self.agent, self.replay, config, self.logdir, self.timer
            self.hooks = AdviceHooks(*parts)
            self._parts.callback(self._end_advice, service)  # before the logger is closed
        self.evaluation = NoEvaluation()
        if distributed.is_main():
            parts = config, self.logdir, self.agent, self._make_eval_envs, self.logger, self.timer
            self.evaluation = Evaluation(*parts)
        # Not earlier: the ring's memory is to be taken as it fills.
        if self.device.type == "cpu" and tools.keep_freed_memory():
            self.print("Freed memory is kept for the next update")
        if saved:
            with checkpoints.reading(self.source):
                self._resume(saved)
        else:
            self._start()
        self._print_notes(self.envs)
        if distributed.is_main():
            config.save(self.logdir / "config.yaml")

    def _make_logger(self, logged: int | None, wandb_id: str | None) -> Logger:
        """Who tells of the run: the first learner; what was told after the step `logged` is told again."""
        config = self.config
        if not distributed.is_main():
            return Collector()
        wandb = None
        if config.wandb.enabled:
            wandb = WandbRun(self.logdir, config.wandb.project, config.to_dict(), wandb_id)
        return Logger(self.logdir, total_steps=config.steps, fps=VIDEO_FPS, resume_step=logged, wandb=wandb)

    def _about(self) -> str:
        """What runs here, in a line."""
        config, learners = self.config, distributed.world_size()
        shared = f", shared by {learners} learners" if learners > 1 else ""
        return (
            f"{config.task} on {device_name(self.device)} in {tools.precision(config, self.device)}: "
            f"{self.agent.parameters():,} parameters{shared}; presets {', '.join(config.presets) or 'none'}"
        )

    def _make_envs(self, mode: str) -> VecEnv:
        options = self.config.envs
        video = mode == "eval" and self.config.eval_videos
        amount, first = options.eval_amount, 0
        if mode == "train":
            amount = options.amount // distributed.world_size()
            first = distributed.rank() * amount
        make = functools.partial(make_env, self.config, mode, video=video, first=first)
        envs = make_vec(
            make, amount, options.parallel,
            timeout=options.timeout, max_restarts=options.max_restarts, ray_address=options.ray_address,
        )  # fmt: skip
        self._parts.callback(envs.close)
        return envs

    def _make_eval_envs(self) -> VecEnv:
        envs = self._make_envs("eval")
        self._print_notes(envs)
        return envs

    def _end_advice(self, service: AdviceService) -> None:
        """Some of what the adviser has to say comes at its end, as what is wrong with the cache's file."""
        service.close()
        self._print_notes()

    def _print_notes(self, envs: VecEnv | None = None) -> None:
        """Tell what the hooks and the envs have to say of themselves, each line once."""
        for line in [*(envs.notes() if envs else []), *self.hooks.notes()]:
            self._note(line)

    def _note(self, line: str) -> None:
        """Tell a line, once, that perhaps only this learner has to tell."""
        if line not in self._noted:
            self._noted.add(line)
            self.logger.note(line)

    def _gather_notes(self) -> None:
        """Let the first learner tell what the others have to say, and it has not said itself."""
        for rank, lines in enumerate(distributed.all_gather_object(self.logger.take_notes())):
            for line in lines:
                if line not in self._noted:
                    self._noted.add(line)
                    self.print(f"Learner {rank}: {line}")

    def _plan_replay(self, spaces: Mapping[str, gymnasium.Space], chosen: int | None) -> replays.Plan:
        config, rssm = self.config, self.config.rssm
        layout = replays.ring_layout(spaces, rssm.deter, rssm.stoch, rssm.classes)
        window = config.batch_length + config.replay_context
        capacity = config.replay.capacity
        if chosen and capacity == "auto":  # what was chosen once stays: the free memory differs each time
            capacity = chosen
        backend, sampler = config.replay.backend, config.replay.sampler
        here = distributed.local_world_size()  # learners that share this machine's memory
        if capacity != "auto":
            capacity = int(capacity) * here // distributed.world_size()
        plan = replays.plan(
            layout,
            len(self.envs) * here,
            window,
            capacity,
            backend,
            self._own(self.logdir / REPLAY_RING),
            sampler,
        )
        return plan._replace(capacity=distributed.broadcast_object(plan.capacity // here))

    def _own(self, folder: Path) -> Path:
        """The folder itself for the first learner, and one in it for each other."""
        return folder if distributed.is_main() else folder / RANK_FOLDER.format(distributed.rank())

    def _make_replay(
        self, spaces: Mapping[str, gymnasium.Space], plan: replays.Plan, defaults: Mapping[str, float]
    ) -> Replay:
        config, rssm, c = self.config, self.config.rssm, self.config.replay
        folder = Path(config.traindir) if config.traindir else self.logdir / "train_eps"
        if not distributed.is_main():
            distributed.barrier()  # until rank 0 has cleared what a kill has left, of others too
        replay = Replay(
            spaces, len(self.envs), plan.capacity, config.batch_length, config.replay_context,
            derive_seed(config.seed, *distributed.seed_names()) if distributed.rank() else config.seed,
            deter_size=rssm.deter, stoch_size=rssm.stoch, classes=rssm.classes, backend=plan.backend,
            folder=self._own(self.logdir / REPLAY_RING), sampler=c.sampler, online=c.online,
            writer=EpisodeWriter(folder, spaces, len(self.envs), c.keep_steps), defaults=defaults,
        )  # fmt: skip
        self._parts.callback(replay.close)
        self._parts.callback(self.sampler.shutdown)  # before the replay that it reads is closed
        if distributed.is_main():
            distributed.barrier()
        distributed.barrier()  # until all have cleared what a kill has left, and before anybody writes
        return replay

    def _start(self) -> None:
        """Begin a new run; episodes that are already in the training folder are learned from and counted."""
        loaded = self.replay.load_episodes(distributed.rank(), distributed.world_size())
        for line in loaded.lines:
            self._note(line)
        steps, self.transitions = distributed.total(loaded.steps, loaded.transitions)
        if steps:
            self.print(f"Loaded {steps:,} steps from {self.replay.writer.folder}")
        self.step = self.transitions * self.config.action_repeat
        self.episodes = steps - self.transitions
        self._reset_envs(self.episodes)

    def _reset_envs(self, episode: int) -> None:
        """Begin a new episode in every env, with a number, and so a seed, that no env has had yet."""
        self.obs = self.envs.reset(episode)
        self.state = self.agent.initial_state(len(self.envs))

    def close(self) -> None:
        """Give everything back; the files stay."""
        self._parts.close()

    # --- Checkpoints -----------------------------------------------------------------------------------

    def save(self, *, clean: bool, failed: bool = False) -> None:
        """Write a checkpoint of this moment, between two steps; with `clean`, all that exact resume needs.

        If the envs have `failed`, their open episodes end here: a resumed run starts new ones.
        """
        if self.next_batch:
            wait([self.next_batch])  # of a step that failed: it reads the replay
        self._print_notes()  # the hooks' are in no checkpoint; the envs may be closed
        self._gather_notes()
        place = self._replay_state(self.step)
        replay = self.replay.save(self._own(place), latents=clean)
        own = self._own_state_dict(replay, None if failed else self.envs.state())
        state = self._state_dict(own)
        if distributed.is_main():
            checkpoints.save_checkpoint(self.logdir, state, self.step, self.config.keep_checkpoints)
            for folder in place.parent.iterdir():
                if not (self.logdir / checkpoints.CHECKPOINTS / f"{folder.name}.pt").exists():
                    shutil.rmtree(folder)
                elif folder != place:
                    for latents in folder.rglob("latents.npz"):
                        latents.unlink()  # large, and of use to the last stop only
        distributed.barrier()  # until the checkpoint is there
        replays.keep_moment(self._own(place), replay["moment"])
        self.print(f"Saved {self.logdir / 'latest.pt'} at step {self.step:,}")
        distributed.barrier()

    def _replay_state(self, step: int) -> Path:
        """Folder of what the replay keeps beside the checkpoint of an env step."""
        return self.logdir / REPLAY_STATE / checkpoints.checkpoint_path(self.logdir, step).stem

    def save_after_failure(self, *, failed: bool = True) -> None:
        """Keep what was collected when an env, the disk or the memory failed, of this learner or another."""
        try:
            with memory_explained():
                self.save(clean=True, failed=failed)
        except UserError as error:
            self.print(f"The steps since the last checkpoint could not be saved: {error}")

    def _own_state_dict(self, replay: dict, envs: list[dict] | None) -> dict:
        """What each learner has of its own."""
        return {
            "acting": {k: v.cpu() for k, v in self.state.items()},
            "obs": _tensors(self.obs),
            "envs": envs and [{**state, "actions": _tensors(state["actions"])} for state in envs],
            "prefill": self.prefill.rng.bit_generator.state,
            "replay": replay,
            "stats": self.stats.state_dict(),
            "hooks": self.hooks.state_dict(),
            "rng": tools.rng_state(),
        }

    def _state_dict(self, own: dict) -> dict:
        """The checkpoint. What the learners beside the first have of their own they write beside it."""
        replay = own["replay"]
        told = {name: getattr(self, name).state_dict() for name in ("logger", "success")}
        told |= {"moment": replay["moment"], "open": list(replay["open"].values())}
        told |= {"next_episode": self.envs.next_episode}
        told = distributed.all_gather_object(told)
        moments = [each["moment"] for each in told]
        if not distributed.is_main():
            path = self._own_path(distributed.rank(), moments)
            checkpoints.save_tensors(path, own | {"agent": self.agent.own_state_dict()})
        distributed.barrier()  # a checkpoint is there when all that belongs to it is there
        if distributed.world_size() > 1:
            replay |= {"newest": max(moments), "opened": [name for each in told for name in each["open"]]}
        return {
            "config": self.config.to_yaml(),
            "step": self.step,
            "transitions": self.transitions,
            "episodes": self.episodes,
            "evaluation": self.evaluation.state_dict(),
            "next_episode": max(each["next_episode"] for each in told),
            "moments": moments,
            "agent": self.agent.state_dict(),
            "capacity": self.replay.n_envs * self.replay.rows * distributed.world_size(),
            "logger": merged_logs([each["logger"] for each in told]),
            "success": merged_successes([each["success"] for each in told]),
            "every": {name: clock.state_dict() for name, clock in self.every.items()},
            "ratio": self.ratio.state_dict(),
            **own,
        }

    def _own_path(self, rank: int, moments: Sequence[str]) -> Path:
        """The file of a learner's own state, beside what its replay saved at its moment of `moments`."""
        return self._replay_state(self.step) / RANK_FOLDER.format(rank) / moments[rank] / OWN_STATE

    def _resume(self, saved: dict) -> None:
        """Go on from a checkpoint of this run, at the very moment at which it was written."""
        self.step, self.transitions = saved["step"], int(saved["transitions"])
        self.episodes = int(saved["episodes"])
        self.evaluation.load_state_dict(saved["evaluation"])
        for name, clock in self.every.items():
            clock.load_state_dict(saved["every"][name])
        self.ratio.load_state_dict(saved["ratio"])
        if distributed.is_main():  # what had been counted by all until then
            self.logger.load_state_dict(saved["logger"])
            self.success.load_state_dict(saved["success"])
        saved.setdefault("moments", [saved["replay"]["moment"]])  # from before there were several learners
        if len(saved["moments"]) == distributed.world_size():
            own = saved if distributed.is_main() else self._read_own(saved, distributed.rank())
            loaded = self._load_replay(own)
        else:
            own = saved if distributed.is_main() else None
            loaded = self._divide_replay(saved)
        for line in loaded.lines:
            self._note(line)
        if own:
            self.prefill.rng.bit_generator.state = own["prefill"]
            if own.get("hooks"):
                self.hooks.load_state_dict(own["hooks"], self.step, loaded.exact)
        if loaded.exact and self._restore_envs(own):
            self.stats.load_state_dict(own["stats"])
            self.state = self.agent.acting_state(own["acting"], len(self.envs))
        else:
            self._note("The open episodes end here, as they cannot be gone on with; the envs start new ones.")
            self._reset_envs(saved["next_episode"])
        if own:
            tools.set_rng_state(own["rng"])  # nothing may draw after it
        steps = distributed.total(loaded.steps)[0]
        self.print(f"Resumed at step {self.step:,} with {steps:,} steps in the replay")

    def _read_own(self, saved: dict, rank: int) -> dict | None:
        """What a learner beside the first wrote of its own with the checkpoint; None if it is not there."""
        try:
            return checkpoints.load_tensors(self._own_path(rank, saved["moments"]))
        except (OSError, checkpoints.BrokenCheckpoint):
            return None

    def _load_replay(self, own: dict | None) -> replays.Loaded:
        """This learner's replay as it was; the first sets aside what the checkpoint does not know."""
        if not distributed.is_main():
            distributed.barrier()
        if own:
            loaded = self.replay.load(
                own["replay"], self._own(self._replay_state(self.step)), distributed.is_main()
            )
            if not distributed.is_main():
                self.agent.load_own_state_dict(own["agent"])
        else:
            loaded = self.replay.load_episodes(distributed.rank(), distributed.world_size())
        if distributed.is_main():
            distributed.barrier()
        if distributed.world_size() > 1 and not distributed.any_rank(
            loaded.exact
        ):  # each has taken what is of all
            loaded = self._part_of_episodes(loaded.lines)
        return loaded

    def _part_of_episodes(self, lines: Sequence[str]) -> replays.Loaded:
        """The episodes that are this learner's, where all look at the same files."""
        loaded = self.replay.load_episodes(distributed.rank(), distributed.world_size())
        return loaded._replace(lines=[*lines, *loaded.lines])

    def _divide_replay(self, saved: dict) -> replays.Loaded:
        """The episodes of a run of another number of learners, divided over those of today."""
        lines = []
        if distributed.is_main():
            place = self._replay_state(self.step)
            now, before = distributed.world_size(), len(saved["moments"])
            lines = [f"The run had {before} learners and now has {now}: the replay is divided anew."]
            lines += self.replay.release(saved["replay"], place)
            for rank in range(1, before):
                if own := self._read_own(saved, rank):
                    self.replay.release(own["replay"], place / RANK_FOLDER.format(rank), tidy=False)
        distributed.barrier()
        return self._part_of_episodes(lines)

    def _restore_envs(self, saved: dict) -> bool:
        """Play the open episodes again. False if they are not what they were."""
        if not saved["envs"]:
            return False
        try:
            self.obs = self.envs.restore([{**s, "actions": _arrays(s["actions"])} for s in saved["envs"]])
        except UserError as error:  # an env that does not repeat itself may not take these actions
            self._note(str(error))
            self.envs = self._make_envs("train")
            return False
        before = _arrays(saved["obs"])
        return before.keys() == self.obs.keys() and all(
            np.array_equal(before[key], value) for key, value in self.obs.items()
        )

    # --- What happens in the loop ----------------------------------------------------------------------

    def interact(self) -> None:
        """One step in each training env: act, store, count, and see what comes of it."""
        until = self.config.expl_until
        self.agent.explore(not until or self.step < until)
        advice, plans = self.hooks.before(self.obs, self.state, self.step)
        obs = {**self.obs, **advice}
        if self.step < self.config.prefill:
            action, latents = self.prefill.act(len(self.envs)), {}
        else:
            with self.timer("policy"):
                rng = self.agent.rngs["act"]
                action, self.state, latents = self.agent.act(obs, self.state, rng, explore=True, plans=plans)
        with self.timer("replay"):
            self.replay.add({k: v for k, v in {**obs, **action, **latents}.items() if k[:4] != "log_"})
        self.hooks.after(obs, self.state, self.step)
        self._count(obs)
        self._plan_updates()
        with self.timer("env"), self._failing_together():
            self.obs = self.envs.step(action)

    @contextlib.contextmanager
    def _failing_together(self) -> Iterator[None]:
        """Within, what fails ends a run of several learners not before all are between two steps.

        Only there can all save the same moment. The learner that failed does its part in the updates first.
        """
        try:
            yield
        except UserError as error:
            if distributed.world_size() == 1:
                raise
            self.failure = f"Learner {distributed.rank()}: {error}"

    def _count(self, obs: Arrays) -> None:
        """Count what was stored, and log the episodes that it ends."""
        first = int(obs["is_first"].sum())
        first, moved = distributed.total(first, len(self.envs) - first)
        self.episodes += first
        self.transitions += moved
        self.step += moved * self.config.action_repeat
        for episode in self.stats.add(obs):
            self.success.add(episode)
            metrics = {f"env/episode_{name}": episode[name] for name in ("return", "length")}
            extra = {f"env/{k[4:]}": v for k, v in episode.items() if k.startswith("log_")}
            self.logger.add(metrics | {k: v for k, v in extra.items() if "achievement" not in k})

    def _plan_updates(self) -> None:
        """See how many updates `train_ratio` asks for; the first batch is drawn while the envs step."""
        self.due = 0
        if self.step < self.config.prefill:
            return
        due = self.ratio(self.transitions)
        if not distributed.any_rank(not self.replay.can_sample(self.batch_size)):  # else it is not owed later
            self.due = due
        if self.due:
            self._draw()

    def _draw(self) -> None:
        """Let the next batch be drawn and brought to the device, beside whatever happens meanwhile."""

        items = self.hooks.items()

        def draw() -> tuple[Arrays, Arrays, dict[str, Tensor], dict[str, Tensor]]:
            batch = self.replay.sample(self.batch_size)
            where = batch.pop("where")
            return batch, where, self.agent.upload(batch), self.agent.upload(items())

        self.next_batch = self.sampler.submit(draw)

    def learn(self) -> None:
        """The updates that are due."""
        for left in reversed(range(self.due)):
            with self.timer("replay"):
                batch, where, data, items = self.next_batch.result()
            if left:
                self._draw()
            with self.timer("train"):
                metrics, kept = self.agent.train(data, items)
            self.logger.add(metrics)
            self.last_batch = batch
            self._estimate()
            # The next batch is drawn before the latents of this one change, however long that takes.
            wait([self.next_batch])
            if kept is None:
                self._count_nonfinite(batch)
                continue
            self.streak = 0
            with self.timer("replay"):
                self.replay.update_latents(where, kept["deter"], kept["stoch"])
                self.replay.update_priorities(where, kept["loss"])

    def _estimate(self) -> None:
        """After the first updates, one line says how long the run will take."""
        self.timed_updates += 1
        if self.timed_updates == 1:
            self.first_update = time.perf_counter()
        elif self.timed_updates == ESTIMATE_UPDATES:
            since = self.first_update
            each = (time.perf_counter() - since) / (
                ESTIMATE_UPDATES - 1
            )  # its share of the env steps included
            per_step = float(self.ratio.ratio) / self.config.action_repeat
            hours = each * per_step * (self.config.steps - self.step) / 3600
            self.print(
                f"About {hours:.1f} hours to go at {each:.2f} seconds per update (evaluation not included)"
            )

    def _count_nonfinite(self, batch: Arrays) -> None:
        """A streak of skipped updates ends the run; the last good checkpoint stays as it is."""
        self.streak += 1
        if self.streak < MAX_NONFINITE:
            return
        path = self.logdir / "diagnosis.pt"
        diagnosis = {"step": self.step, "batch": _tensors(batch), "agent": self.agent.state_dict()}
        if distributed.is_main():
            checkpoints.save_tensors(path, diagnosis)
        raise Diverged(
            f"The gradient was not finite in {self.streak} updates in a row, so the run stops. The batch and "
            f"the weights are in {path}. Resume with a lower --opt.lr; the last checkpoint is untouched."
        )

    def evaluate(self, stop: Sequence[int] = ()) -> bool:
        """Evaluate on the first learner, while the others wait. False if it was stopped."""
        played = None
        with self._failing_together():
            played = self.evaluation(self.step, self.last_batch, stop)
        done = distributed.broadcast_object(played is not None)
        if done:
            self.hooks.evaluated(played)
        return done

    def log(self) -> None:
        """Write what was collected since the last time, by all learners."""
        size = distributed.total(self.replay.size)[0]
        self.logger.add({"replay/size": size, "opt/updates": self.agent.updates})
        advice = self.hooks.metrics()
        counted = {name: advice.pop(name) for name in list(advice) if is_count(name)}
        self.logger.add(advice | self.timer.shares())
        told = distributed.all_gather_object((self.logger.state_dict(), self.success.state_dict(), counted))
        logs, successes, counts = zip(*told, strict=True)
        if distributed.world_size() > 1:
            self.logger.load_state_dict(merged_logs(logs))
        for name in dict.fromkeys(name for each in counts for name in each):
            self.logger.add({name: sum(each.get(name, 0.0) for each in counts)})
        success = SuccessRates(self.config.task.partition("_")[0])
        success.load_state_dict(merged_successes(successes))
        self.logger.add(success.metrics())
        self.logger.write(self.step)
        self._print_notes(self.envs)
        self._gather_notes()


def train(run: Run, stop: Sequence[int] = ()) -> None:
    """The loop. Everything that happens in a run happens here, in this order.

    It ends between two steps when all are done, or soon after `stop` gets an entry or a learner fails. What
    is due then and not done is done first by the resumed run, so it sees the same numbers.
    """
    while not distributed.any_rank(stop or run.failure or distributed.orphaned()):
        if run.every["eval"].due(run.step) and not run.evaluate(stop):
            break
        run.every["eval"](run.step)
        if run.every["log"](run.step):
            run.log()
        if run.every["save"](run.step):
            run.save(clean=False)
        if run.step >= run.config.steps:
            break
        run.interact()
        run.learn()


@dataclass
class Command:
    """What the command line asks for: a new run, or to go on with one."""

    config: Config
    logdir: Path
    checkpoint: dict | None  # that it starts from
    resume: bool  # the checkpoint's run is gone on with
    notes: list[str]  # lines that the log begins with
    source: Path | None  # the file that it was read from


def read_command(argv: list[str]) -> Command:
    """Understand the command line. Raises UserError.

    A logdir with a checkpoint is resumed. `--from_checkpoint` without `--logdir`, or with its own run's,
    resumes the run that the checkpoint belongs to; with a new logdir it starts a new run from its weights
    and optimiser. A file of weights alone belongs to no run, and `--transfer` always begins a new one.
    """
    logdir, source, parts = configs.run_paths(argv)
    home = run_folder(Path(source)) if source and not checkpoints.is_weights(Path(source)) else None
    own = home and logdir and Path(logdir).resolve() == home.resolve()
    if parts and own:
        raise UserError(
            f"--transfer begins a new run, and {logdir} is the checkpoint's: name another --logdir"
        )
    if own or (home and logdir is None and not parts):
        logdir, resume, origin = home, True, source
    else:
        resume = logdir is not None and bool(checkpoints.find_checkpoints(logdir))
        origin = logdir if resume else source
    checkpoint, path, notes = checkpoints.load_checkpoint(origin) if origin else (None, None, [])
    saved = checkpoint and Config.from_yaml(checkpoint["config"], f"the config in {path}")
    config, raised = distributed.divisible(configs.load(argv, has_cuda=tools.cuda_works(), saved=saved))
    changes = configs.resume_changes(saved, config) if resume else []
    notes += [*config.notes, *raised, *(f"Changed since the run was saved: {line}" for line in changes)]
    folder = Path(logdir or Path("logdir") / config.task.replace(":", "_") / time.strftime("%Y%m%dT%H%M%S"))
    return Command(config, folder, checkpoint, resume, notes, path)


def run_folder(checkpoint: Path) -> Path:
    """The logdir of the run that a checkpoint file, or a folder, belongs to."""
    if os.path.isdir(checkpoint):
        return checkpoint
    return (
        checkpoint.parent.parent if checkpoint.parent.name == checkpoints.CHECKPOINTS else checkpoint.parent
    )


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


def _tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in arrays.items()}


def _arrays(tensors: Mapping[str, Tensor]) -> Arrays:
    return {k: v.numpy() for k, v in tensors.items()}


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says. Returns the exit code: 0, 2 for the user's mistakes, 130, 143."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        command = read_command(argv)
        if command.config.parallel > 1 and not distributed.launched():
            distributed.local_device(command.config.device, command.config.parallel, tools.count_gpus())
            return distributed.launch(command.config.parallel, [*argv, "--logdir", str(command.logdir)])
        with stop_signals() as stop, memory_explained(), join(command.config):
            command.logdir = Path(distributed.broadcast_object(str(command.logdir)))
            return run_command(command, stop)
    except LostRank as error:
        if distributed.LAUNCHER in os.environ:  # it says what happened
            return distributed.LOST
        print(f"error: {error}", file=sys.stderr)
        return 2
    except UserError as error:
        if distributed.reports_errors():  # the others mostly fail in the same way
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def join(config: Config) -> contextlib.AbstractContextManager:
    """Within, this process is one of the learners."""
    device = tools.choose_device(distributed.local_device(config.device, config.parallel, tools.count_gpus()))
    return distributed.joined(device)


def run_command(command: Command, stop: Sequence[int]) -> int:
    """Train, and save at the end; the exit code. UserError if another run lives in the logdir."""
    with contextlib.ExitStack() as parts:
        notes = command.notes
        if distributed.is_main():
            notes = [*parts.enter_context(checkpoints.run_lock(command.logdir)), *notes]
        distributed.barrier()
        own = command.config, command.logdir, command.checkpoint, command.resume, notes
        run = parts.enter_context(contextlib.closing(Run(*own, command.source)))
        try:
            with memory_explained():
                train(run, stop)
        except (Diverged, LostRank):
            raise
        except UserError:
            if distributed.world_size() == 1:  # else the others would have to save theirs of the same moment
                run.save_after_failure()
            raise
        if failures := [failure for failure in distributed.all_gather_object(run.failure) if failure]:
            run.save_after_failure(failed=bool(run.failure))
            raise UserError(failures[0])
        run.save(clean=True)
        if stop:
            run.print(f"Stopped by {signal.Signals(stop[0]).name}; the same command goes on")
    return 128 + stop[0] if stop else 0


if __name__ == "__main__":
    sys.exit(main())
