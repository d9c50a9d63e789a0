"""Play, measure and film full episodes of an agent, for training and evaluate.py."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import audio
import distributed
import tools
from agent import Dreamer
from config import Config
from episodes import EpisodeWriter
from logger import VIDEO_FPS, Logger, Timer, add_heat_strip, write_mp4, write_wav
from parallel import VecEnv
from stats import ACHIEVEMENT

Arrays = dict[str, np.ndarray]

VIDEO_FRAMES = 500  # of a video in TensorBoard; the mp4 files hold all


class AdvisedAgent:
    """The agent as it acts in training: with the prior added to its actor."""

    def __init__(self, agent: Dreamer):
        self.initial_state = agent.initial_state
        self.act = functools.partial(agent.act, advised=True)


@dataclass
class EvalEpisode:
    """One finished episode as arrays [L, ...] by key, actions included, from the reset on.

    `intrinsic` [L] is the reward that a curious agent expected at each step. `views` [L] explain each action,
    if `play_episodes` was asked for it.
    """

    steps: Arrays
    intrinsic: np.ndarray | None = None
    views: Sequence[dict] = ()

    @property
    def score(self) -> float:
        """The return: the sum of rewards."""
        return float(self.steps["reward"].astype(np.float64).sum())

    @property
    def length(self) -> int:
        """Policy steps."""
        return len(self.steps["reward"]) - 1

    @property
    def shares(self) -> dict[str, float]:
        """`log_*_share`: the share of steps at which a `log_*` scalar was above 0; not for achievements."""
        logged = {k: v for k, v in self.steps.items() if k.startswith("log_") and v.ndim == 1}
        return {f"{k}_share": float((v[1:] > 0).mean()) for k, v in logged.items() if ACHIEVEMENT not in k}

    @property
    def frames(self) -> np.ndarray | None:
        """The images, uint8 [L, H, W, C]: the key `image`, else the first key with images."""
        images = sorted(
            (k != "image", k) for k, v in self.steps.items() if v.dtype == np.uint8 and v.ndim == 4
        )
        return self.steps[images[0][1]] if images else None


def newest(frames: np.ndarray, stack: int) -> np.ndarray:
    """The newest of `stack` images that are stacked along the channels: [..., C] -> [..., C / stack]."""
    return frames[..., -(frames.shape[-1] // stack) :]


def shown(episode: EvalEpisode, stack: int) -> np.ndarray:
    """The newest of `stack` images of each step, above a strip of the intrinsic rewards if there are any."""
    frames = newest(episode.frames, stack)
    if episode.intrinsic is not None:
        frames = add_heat_strip(frames, episode.intrinsic)
    return frames


def write_video(path: Path, episode: EvalEpisode, config: Config, heard: Sequence[str]) -> list[Path]:
    """Write the images of an episode to `path`, an mp4, and its sound to a .wav file next to it.

    `heard` are the keys of waveforms; the first is used. The mp4 has the sound too, and then a step lasts as
    long as its waveform. Returns the files; an episode without images or sound lacks that file.
    """
    frames, fps, files = episode.frames, VIDEO_FPS, []
    sound, rate = None, config.audio.sample_rate
    if heard:
        sound = audio.track(episode.steps[heard[0]])
        fps = rate * (episode.length + 1) / len(sound)
        files.append(path.with_suffix(".wav"))
        write_wav(files[-1], sound, rate)
    if frames is not None:
        files.append(path)
        write_mp4(path, shown(episode, config.frame_stack), fps, sound, rate)
    return files


def play_episodes(
    agent: Dreamer,
    envs: VecEnv,
    share: int,
    generator: torch.Generator,
    first: int = 0,
    curiosity: Callable[[dict[str, Tensor]], np.ndarray | None] = lambda state: None,
    explain: Callable[[Arrays, dict[str, Tensor]], Sequence[dict]] = lambda obs, state: (),
) -> Iterator[EvalEpisode]:
    """Play `share` full episodes in each env, from episode number `first` on; yields them as they finish.

    Each env plays the same number, so that envs with short episodes do not count more. `agent` is anything
    with the agent's `initial_state` and `act`. `curiosity` returns the intrinsic rewards [n] of the state
    that `act` returned, and `explain` the views [n] of the observations and that state.
    """
    amount = len(envs)
    obs, state = envs.reset(first), agent.initial_state(amount)
    running: list[list[Arrays]] = [[] for _ in range(amount)]
    rewards: list[list[float]] = [[] for _ in range(amount)]  # intrinsic ones
    views: list[list[dict]] = [[] for _ in range(amount)]
    left = [share] * amount
    while any(left):
        action, state, _ = agent.act(obs, state, generator)
        intrinsic, seen = curiosity(state), explain(obs, state)
        for index, steps in enumerate(running):
            if not left[index]:
                continue
            if obs["is_first"][index]:
                steps.clear()  # the env's worker was restarted: the broken episode does not count
                rewards[index].clear()
                views[index].clear()
            steps.append({key: value[index] for key, value in {**obs, **action}.items()})
            if intrinsic is not None:
                rewards[index].append(intrinsic[index])
            views[index] += seen[index : index + 1]
            if obs["is_last"][index]:
                left[index] -= 1
                arrays = {k: np.stack([s[k] for s in steps]) for k in steps[0]}
                expected = np.array(rewards[index]) if rewards[index] else None
                yield EvalEpisode(arrays, expected, tuple(views[index]))
                steps.clear()
                rewards[index].clear()
                views[index].clear()
        if any(left):
            obs = envs.step(action)


class Evaluation:
    """Training's evaluation: full episodes of the task actor, with their returns, videos and files."""

    def __init__(
        self,
        config: Config,
        logdir: Path,
        agent: Dreamer,
        make_envs: Callable[[], VecEnv],
        logger: Logger,
        timer: Timer,
        signals: Sequence[int] = (),
    ):
        """`make_envs` makes the evaluation envs, at the first evaluation. `signals` are those received."""
        self.config, self.logdir, self.agent = config, logdir, agent
        self.logger, self.timer = logger, timer
        self.make_envs, self.signals = make_envs, signals
        self.envs: VecEnv | None = None
        self.count = 0  # finished evaluations

    def __call__(self, step: int, batch: Arrays | None) -> list[Arrays] | None:
        """Evaluate at env step `step`; returns the episodes, or None if a signal came meanwhile.

        An interrupted evaluation leaves no trace and is repeated by the resumed run. `batch` is the last
        training batch, for the open-loop videos. Of several learners only rank 0 evaluates.
        """
        episodes = self._evaluate(step, batch) if distributed.is_main() else []
        if distributed.any_rank(episodes is None):
            return None
        self.count += 1
        return episodes

    def _evaluate(self, step: int, batch: Arrays | None) -> list[Arrays] | None:
        if self.envs is None:
            self.envs = self.make_envs()
            self.logger.note(*self.envs.notes())
        with self.timer("eval"):
            played = self._play("eval", self.agent, self.agent.curiosity)
            advised = []
            if played is not None and self.agent.policy.has_weight:  # the same worlds, with the prior
                advised = self._play("eval_advised", AdvisedAgent(self.agent))
            if played is None or advised is None:
                return None
            self._write_episodes(played)
            if self.config.eval_videos:
                self._write_videos(played, step, batch)
        self._log("eval", played)
        self._log("eval_advised", advised)
        for episode in played:
            self.logger.add({f"eval/{key[4:]}": share for key, share in episode.shares.items()})
        return [episode.steps for episode in played]

    def _play(self, name: str, agent: Dreamer | AdvisedAgent, *curiosity):
        """The finished episodes, or None if a signal came. `name` seeds the actions."""
        config = self.config
        share = config.eval_episodes // config.envs.eval_amount
        rng = tools.torch_rng(config.seed, name, self.count, device=self.agent.device)
        first = self.count * share  # each evaluation has other episode numbers, and so other seeds
        episodes = []
        for episode in play_episodes(agent, self.envs, share, rng, first, *curiosity):
            if self.signals:
                return None
            episodes.append(episode)
        return episodes

    def _log(self, name: str, episodes: Sequence[EvalEpisode]) -> None:
        for episode in episodes:
            length = episode.length * self.config.action_repeat
            self.logger.add({f"{name}/episode_return": episode.score, f"{name}/episode_length": length})

    def _write_episodes(self, episodes: Sequence[EvalEpisode]) -> None:
        spaces = self.envs.obs_space | self.envs.act_space
        with contextlib.closing(EpisodeWriter(self.logdir / "eval_eps", spaces, 1)) as writer:
            for episode in episodes:
                for t in range(episode.length + 1):
                    writer.add({key: episode.steps[key][t : t + 1] for key in spaces})

    def _write_videos(self, episodes: Sequence[EvalEpisode], step: int, batch: Arrays | None) -> None:
        config = self.config
        heard = audio.waveform_keys(self.envs.obs_space, config)
        for index, episode in enumerate(episodes):
            write_video(self.logdir / "videos" / f"eval_{step}_{index}.mp4", episode, config, heard)
        if episodes[0].frames is not None:
            frames = shown(episodes[0], config.frame_stack)
            self.logger.video("eval_policy", frames[:VIDEO_FRAMES], step)
        if config.video_pred_log and batch is not None:
            for key, frames in self.agent.report(batch).items():
                name = "train_openl" if key == "image" else f"train_openl_{key}"
                self.logger.video(name, newest(frames, config.frame_stack), step)

    def state_dict(self) -> dict:
        return {"count": self.count}

    def load_state_dict(self, state: dict) -> None:
        self.count = int(state["count"])

    def close(self) -> None:
        if self.envs is not None:
            self.envs.close()
