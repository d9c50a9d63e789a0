"""Train DreamerV3: python3 dreamer.py --configs crafter --logdir ./logdir/crafter

Command line, wiring and the loop: act, store, train, log, evaluate, save. `--help` lists presets and options.
The same command again resumes the run.
"""

import contextlib
import functools
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

import checkpoint as checkpoints
import config as configs
import distributed
import replay as replays
import tools
from agent import Dreamer
from basics import UserError, derive_seed, stop_signals
from checkpoint import Checkpoint
from config import Config
from distributed import LostRank, Silent
from episodes import EpisodeWriter
from evaluation import Evaluation
from logger import VIDEO_FPS, Logger, Timer, WandbRun
from lore_llm.hooks import AdviceHooks, NoAdvice, advice_spaces, make_service
from replay import Replay
from training import Actor, Batches, Diverged, Progress, diverged, make_envs

REPLAY_RING = "replay_ring"  # folder in the logdir for a ring on the disk; other ranks append their number

Arrays = dict[str, np.ndarray]

MAX_NONFINITE = 10  # skipped updates in a row (gradient not finite) after which the run stops

log = logging.getLogger("lore")


# --- The loop ------------------------------------------------------------------------------------------


def loop(
    stop: Callable[[], bool],
    config: Config,
    *,
    actor: Actor,
    agent: Dreamer,
    batches: Batches,
    checkpoint: Checkpoint,
    evaluation: Evaluation,
    every: Mapping[str, tools.Every],
    hooks: NoAdvice,
    logger: Logger,
    progress: Progress,
    ratio: tools.Ratio,
    replay: Replay,
    timer: Timer,
) -> None:
    """Train until `config.steps` or `stop()`. A resumed run does first what was due at the stop."""
    step, nonfinite = progress.step, 0
    while not stop():
        if every["eval"].due(step):
            episodes = evaluation(step, batches.last)
            if episodes is None:  # interrupted by a signal; the resumed run evaluates
                break
            hooks.evaluated(episodes)
        every["eval"](step)
        if every["log"](step):
            logger.add(progress.metrics() | hooks.metrics() | timer.shares() | {"opt/updates": agent.updates})
            logger.write(step)
            logger.note(*actor.envs.notes(), *hooks.notes())
        if every["save"](step):
            checkpoint.save(step)
        if step >= config.steps:
            break

        advice, plans = hooks.before(actor.obs, actor.state, step)
        obs = actor.obs | advice
        action, latents = actor.act(obs, plans, step)  # at random while prefilling
        with timer("replay"):
            replay.add(obs | action | latents)
        hooks.after(obs, actor.state, step)
        step = progress.count(obs)
        if step >= config.prefill:
            batches.request(ratio(progress.transitions))  # the first is drawn while the envs step
        actor.step(action)

        for batch in batches:
            with timer("train"):
                metrics, kept = agent.train(batch.data, batch.items)
            batches.update(batch, kept)  # after the next batch is drawn
            logger.add(metrics)
            progress.updated()
            nonfinite = nonfinite + 1 if kept is None else 0
            if nonfinite >= MAX_NONFINITE:
                raise diverged(checkpoint.logdir, nonfinite, step, batch, agent)


# --- Wiring --------------------------------------------------------------------------------------------


def open_run(
    command: "Command", device: torch.device, signals: Sequence[int], stack: contextlib.ExitStack
) -> dict[str, Any]:
    """The arguments of `loop` by name, closed by `stack`, for a new or a resumed run. Raises UserError."""
    set_up_torch(command.config)
    run, lines = build(command, device, signals, stack)
    start(command, device, run, lines)
    return run


def build(command: "Command", device: torch.device, signals: Sequence[int], stack: contextlib.ExitStack):
    """Make what `loop` needs, closed by `stack`: (its arguments by name, lines for the log).

    Raises UserError; mistakes in the command are found before anything is written.
    """
    config, logdir, size = command.config, command.logdir, distributed.world_size()
    saved = command.checkpoint if command.resume else None
    envs = make_envs(config, "train")
    stack.callback(envs.close)
    advised, defaults = advice_spaces(config, envs.act_space)
    spaces = envs.obs_space | envs.act_space | advised
    agent = Dreamer(envs.obs_space, envs.act_space, config, device)
    with checkpoints.reading(command.source):
        notes = load_agent(agent, command)
        capacity = int(saved["capacity"]) if saved else None
        logged = int(saved["every_log"]["last"]) if saved else None
        wandb_id = saved["logger"]["wandb"] if saved else None
    plan = plan_replay(config, logdir, spaces, len(envs), capacity)
    if config.llm.enabled:
        service, more = make_service(config, agent.policy.captioner, len(envs), logdir, size)
        stack.callback(service.close)
        notes += more

    logger = make_logger(config, logdir, logged, wandb_id)
    stack.callback(logger.close)
    replay = make_replay(config, logdir, spaces, len(envs), plan, defaults)
    stack.callback(replay.close)
    timer, hooks = Timer(), NoAdvice()
    if config.llm.enabled:
        hooks = AdviceHooks(service, agent, replay, config, logdir, timer)
        stack.callback(lambda: (service.close(), logger.note(*hooks.notes())))  # its end may be reported
    actor = Actor(config, agent, replay, envs, timer)
    stack.callback(actor.close)
    batches = Batches(config, agent, replay, hooks, timer)
    stack.callback(batches.close)
    make_eval_envs = functools.partial(make_envs, config, "eval")
    evaluation = Evaluation(config, logdir, agent, make_eval_envs, logger, timer, signals)
    stack.callback(evaluation.close)
    every = {name: tools.Every(config[f"{name}_every"]) for name in ("log", "eval", "save")}
    ratio = tools.Ratio(config.train_ratio / (config.batch_size * config.batch_length))
    progress = Progress(config, replay, logger)
    run = dict(actor=actor, agent=agent, batches=batches, evaluation=evaluation, every=every, hooks=hooks)
    run |= dict(logger=logger, progress=progress, ratio=ratio, replay=replay, timer=timer)
    parts = {name: run[name] for name in ("logger", "progress", "evaluation", "ratio", "hooks", "actor")}
    parts |= {f"every_{name}": clock for name, clock in every.items()}
    run["checkpoint"] = Checkpoint(config, logdir, agent, replay, parts)
    return run, [about(config, agent, device), *command.notes, *notes, plan.line, *unseen(agent)]


def start(command: "Command", device: torch.device, run: Mapping[str, Any], lines: Sequence[str]) -> None:
    """Resume the run, or start a new one with the episodes that are already in its training folder."""
    config, logger, replay, actor = command.config, run["logger"], run["replay"], run["actor"]
    for line in lines:
        logger.print(line)
    # Not earlier: the ring's memory should be taken as it fills.
    if device.type == "cpu" and tools.keep_freed_memory():
        logger.print("Freed memory is kept for the next update")
    episode = 0
    if command.resume:
        with checkpoints.reading(command.source):
            run["checkpoint"].resume(command.checkpoint)
        if not actor.obs:
            logger.note("The open episodes end here, as they cannot be resumed; the envs start new ones.")
            episode = run["progress"].episodes + 1
    else:
        loaded = replay.load_episodes(distributed.rank(), distributed.world_size())
        logger.note(*loaded.lines)
        steps, transitions = distributed.total(loaded.steps, loaded.transitions)
        if steps:
            logger.print(f"Loaded {steps:,} steps from {replay.writer.folder}")
        run["progress"].start(steps, transitions)
        episode = run["progress"].episodes
    if not actor.obs:
        actor.reset(episode)
    logger.note(*actor.envs.notes(), *run["hooks"].notes())
    if distributed.is_main():
        config.save(command.logdir / "config.yaml")


def load_agent(agent: Dreamer, command: "Command") -> list[str]:
    """Take what the command wants of its checkpoint; lines for the log."""
    if not command.checkpoint:
        return []
    state, parts = command.checkpoint["agent"], command.config.transfer
    if parts and not command.resume:
        return agent.transfer(state, parts)
    return agent.load_state_dict(state, resume=command.resume)


def about(config: Config, agent: Dreamer, device: torch.device) -> str:
    """The task, the device, the size and the presets, in a line."""
    learners = distributed.world_size()
    shared = f", shared by {learners} learners" if learners > 1 else ""
    return (
        f"{config.task} on {device_name(device)} in {tools.precision(config, device)}: "
        f"{agent.parameters():,} parameters{shared}; presets {', '.join(config.presets) or 'none'}"
    )


def unseen(agent: Dreamer) -> list[str]:
    names = ", ".join(agent.unseen)
    return [f"Not encoded, so the agent does not see: {names} (no pattern of --encoder.*_keys fits)"] * bool(
        names
    )


def make_logger(config: Config, logdir: Path, logged: int | None, wandb_id: str | None) -> Logger | Silent:
    """The logger of rank 0. After a resume, what was logged after the step `logged` is dropped."""
    if not distributed.is_main():
        return Silent()
    wandb = None
    if config.wandb.enabled:
        wandb = WandbRun(logdir, config.wandb.project, config.to_dict(), wandb_id)
    return Logger(logdir, total_steps=config.steps, fps=VIDEO_FPS, resume_step=logged, wandb=wandb)


def plan_replay(
    config: Config, logdir: Path, spaces: Mapping[str, gymnasium.Space], n_envs: int, chosen: int | None
) -> replays.Plan:
    """This rank's part of the replay. `chosen` is the capacity that `auto` gave before a resume."""
    rssm, capacity = config.rssm, config.replay.capacity
    if chosen and capacity == "auto":
        capacity = chosen
    here = distributed.local_world_size()  # ranks that share this machine's memory
    if capacity != "auto":
        capacity = int(capacity) * here // distributed.world_size()
    layout = replays.ring_layout(spaces, rssm.deter, rssm.stoch, rssm.classes)
    window = config.batch_length + config.replay_context
    backend, sampler = config.replay.backend, config.replay.sampler
    plan = replays.plan(layout, n_envs * here, window, capacity, backend, ring_folder(logdir), sampler)
    return plan._replace(capacity=distributed.broadcast_object(plan.capacity // here))


def make_replay(
    config: Config,
    logdir: Path,
    spaces: Mapping[str, gymnasium.Space],
    n_envs: int,
    plan: replays.Plan,
    defaults: Mapping[str, float],
) -> Replay:
    rssm, c = config.rssm, config.replay
    folder = Path(config.traindir) if config.traindir else logdir / "train_eps"
    names = distributed.seed_names()
    replay = Replay(
        spaces, n_envs, plan.capacity, config.batch_length, config.replay_context,
        derive_seed(config.seed, *names) if names else config.seed,
        deter_size=rssm.deter, stoch_size=rssm.stoch, classes=rssm.classes, backend=plan.backend,
        folder=ring_folder(logdir), sampler=c.sampler, online=c.online,
        writer=EpisodeWriter(folder, spaces, n_envs, c.keep_steps), defaults=defaults,
    )  # fmt: skip
    distributed.barrier()  # each rank has removed what a kill left in the shared folder, before any writes
    return replay


def ring_folder(logdir: Path) -> Path:
    rank = distributed.rank()
    return logdir / (f"{REPLAY_RING}-{rank}" if rank else REPLAY_RING)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


# --- Command line --------------------------------------------------------------------------------------


@dataclass
class Command:
    """What the command line asks for: a new run, or to resume one."""

    config: Config
    logdir: Path
    checkpoint: dict | None  # from which it starts
    resume: bool  # resume the checkpoint's run
    notes: list[str]  # first lines of the log
    source: Path | None  # file of the checkpoint


def read_command(argv: list[str]) -> Command:
    """Understand the command line. Raises UserError.

    A logdir with a checkpoint is resumed. `--from_checkpoint` without `--logdir`, or with its own run's,
    resumes the run that the checkpoint belongs to; with a new logdir it starts a new run from its weights
    and optimiser. A weights file belongs to no run, and `--transfer` always starts a new one.
    """
    logdir, source, parts = configs.run_paths(argv)
    alone = source and checkpoints.is_weights(Path(source))
    home = checkpoints.run_folder(Path(source)) if source and not alone else None
    own = home and logdir and Path(logdir).resolve() == home.resolve()
    if parts and own:
        raise UserError(
            f"--transfer starts a new run, and {logdir} is the checkpoint's: name another --logdir"
        )
    if own or (home and logdir is None and not parts):
        logdir, resume, origin = home, True, source
    else:
        resume = logdir is not None and bool(checkpoints.find_checkpoints(logdir))
        origin = logdir if resume else source
    checkpoint, path, notes = checkpoints.load_checkpoint(origin) if origin else (None, None, [])
    with checkpoints.reading(path):
        saved = Config.from_yaml(checkpoint["config"], f"the config in {path}") if origin else None
    config, raised = distributed.divisible(configs.load(argv, has_cuda=tools.cuda_works(), saved=saved))
    changes = configs.resume_changes(saved, config) if resume else []
    notes += [*config.notes, *raised, *(f"Changed since the run was saved: {line}" for line in changes)]
    folder = Path(logdir or Path("logdir") / config.task.replace(":", "_") / time.strftime("%Y%m%dT%H%M%S"))
    return Command(config, folder, checkpoint, resume, notes, path)


def train(command: Command, device: torch.device, signals: Sequence[int]) -> int:
    """Train, and save at the end; the exit code. Raises UserError, also if another run uses the logdir."""
    config, logdir = command.config, command.logdir
    with contextlib.ExitStack() as stack:
        if distributed.is_main():
            command.notes[:0] = stack.enter_context(checkpoints.run_lock(logdir))
            for ring in logdir.glob(f"{REPLAY_RING}*"):  # left by a kill
                shutil.rmtree(ring)
        distributed.barrier()
        run = open_run(command, device, signals, stack)

        def stop() -> bool:
            return distributed.any_rank(signals or distributed.orphaned())

        try:
            with tools.memory_explained():
                loop(stop, config, **run)
        except UserError as error:
            if distributed.world_size() == 1 and not isinstance(error, Diverged):
                save_after_failure(**run)
            raise
        run["checkpoint"].save(run["progress"].step, clean=True)
        run["logger"].note(*run["hooks"].notes())
        if signals:
            name = signal.Signals(signals[0]).name
            run["logger"].print(f"Stopped by {name}; the same command resumes")
    return 128 + signals[0] if signals else 0


def save_after_failure(
    *, actor: Actor, batches: Batches, checkpoint: Checkpoint, progress: Progress, **_: Any
) -> None:
    """Keep what was collected before an env, the disk or the memory failed."""
    actor.close(failed=True)
    batches.close()  # its thread reads the replay
    try:
        with tools.memory_explained():
            checkpoint.save(progress.step, clean=True)
    except UserError as error:
        log.info("The steps since the last checkpoint could not be saved: %s", error)


def set_up_torch(config: Config) -> None:
    """Determinism, threads and the seeds of the global generators."""
    if config.deterministic:
        tools.enable_determinism()
    if config.threads:
        torch.set_num_threads(config.threads)
    elif distributed.world_size() > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // distributed.local_world_size()))
    tools.seed_everything(config.seed, *distributed.seed_names())


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says. Returns the exit code: 0, 2 for the user's mistakes, 130, 143."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        command = read_command(argv)
        config = command.config
        place = distributed.local_device(config.device, config.parallel, tools.count_gpus())
        if config.parallel > 1 and not distributed.launched():
            return distributed.launch(config.parallel, [*argv, "--logdir", str(command.logdir)])
        with stop_signals() as signals, tools.memory_explained():
            device = tools.choose_device(place)
            with distributed.joined(device):
                command.logdir = Path(distributed.broadcast_object(str(command.logdir)))
                return train(command, device, signals)
    except LostRank as error:
        if distributed.LAUNCHER in os.environ:  # the launcher reports it
            return distributed.LOST
        print(f"error: {error}", file=sys.stderr)
        return 2
    except UserError as error:
        if distributed.reports_errors():  # the others mostly fail in the same way
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
