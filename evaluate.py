"""Evaluate a trained agent: python3 evaluate.py --logdir ./logdir/crafter --episodes 100

Plays full episodes with the weights and the config of a checkpoint, in worlds that training never saw, and
prints the mean return with a confidence interval. `--random` plays the same worlds with random actions.
`--explain` writes videos that show how each action was chosen.
The result goes to standard output, progress to standard error.
"""

import argparse
import contextlib
import difflib
import functools
import json
import math
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import gymnasium
import numpy as np
import torch

import audio
import checkpoint as checkpoints
import tools
from agent import Dreamer
from basics import UserError, numpy_rng
from config import Config
from envs import make_env
from evaluation import AdvisedAgent, Arrays, EvalEpisode, newest, play_episodes, write_video
from exploration import Random
from logger import VIDEO_FPS, write_mp4
from lore_llm.captions import Captioner, make_captioner
from lore_llm.panel import decision_panel
from parallel import VecEnv
from stats import SuccessRates, bootstrap_interval

CONFIDENCE = 0.95  # of the interval
PANEL_PIXELS = 420  # width of the panel that --explain draws next to each frame
LOWER_ON_GPU = "Another program, such as a training run, fills it: use --device cpu, or another GPU (cuda:1)."
LOWER_IN_RAM = "Use fewer --envs, or stop other programs."
SEEDS = "evaluate"  # seeds these episodes, apart from those of training and its evaluations


class RandomAgent:
    """Uniformly random actions behind the interface of the agent: the baseline."""

    def __init__(self, act_space: Mapping[str, gymnasium.Space], seed: int):
        self._random = Random(act_space, numpy_rng(seed, SEEDS, "random"))

    def initial_state(self, envs: int) -> dict:
        return {}

    def act(self, obs: Arrays, state: dict, generator: torch.Generator) -> tuple[Arrays, dict, Arrays]:
        return self._random.act(len(obs["is_first"])), state, {}

    def curiosity(self, state: dict) -> None:
        return None


def evaluate(
    checkpoint: str | Path,
    episodes: int = 10,
    *,
    envs: int = 1,
    seed: int = 0,
    device: str = "auto",
    random: bool = False,
    advised: bool = False,
    video_folder: Path | None = None,
    explain_folder: Path | None = None,
) -> dict:
    """Play full episodes with the agent of a checkpoint, or with random actions, and summarise them.

    Args:
        checkpoint: the folder of a run, one of its .pt files, or a .safetensors file.
        episodes: number of episodes, a multiple of `envs`: each env plays the same number.
        envs: played in parallel; more than one run in their own processes.
        seed: of worlds and actions. With the same `envs`, every agent plays the same worlds.
        advised: act as in training, with the learned prior added to the actor.
        video_folder: for an mp4 (and a wav) of each episode; None writes none.
        explain_folder: for an mp4 of each episode that also shows how each action was chosen.

    Returns:
        Plain values for JSON: see `summarize`. Raises UserError.
    """
    if episodes % envs:
        nearest = max(1, round(episodes / envs)) * envs
        raise UserError(f"--episodes {episodes} must be a multiple of --envs {envs}: use {nearest}")
    payload, path, config = read_checkpoint(checkpoint)
    config = config.replace({"seed": seed, "compile": False})  # compiling takes longer than most evaluations
    if advised and not config.prior.enabled:
        raise UserError("--advised needs a run with prior.enabled True; this one has no prior")
    label = "random" if random else payload["step"]
    chosen = tools.choose_device(device)
    generator = tools.torch_rng(seed, SEEDS, device=chosen)
    done, videos = [], []
    with contextlib.closing(open_envs(config, envs, video_folder, explain_folder)) as vec:
        agent = RandomAgent(vec.act_space, seed) if random else load_agent(payload, path, vec, config, chosen)
        watch = {"curiosity": agent.curiosity}
        if explain_folder:
            captioner = make_captioner(config, vec.obs_space, vec.act_space)
            watch["explain"] = functools.partial(explained, agent, captioner, advised)
        player = AdvisedAgent(agent) if advised else agent
        if advised and not agent.policy.has_weight:
            print("The prior has no weight after llm.until, so --advised has no effect", file=sys.stderr)
        played = play_episodes(player, vec, episodes // envs, generator, **watch)
        for index, episode in enumerate(played):
            done.append(outcome(episode, config.action_repeat))
            print(f"episode {index + 1}/{episodes}: return {episode.score:.4g}", file=sys.stderr, flush=True)
            if video_folder:
                file = video_folder / f"evaluate_{label}_{index}.mp4"
                videos += write_video(file, episode, config, audio.waveform_keys(vec.obs_space, config))
            if explain_folder:
                videos.append(explain_folder / f"explain_{label}_{index}.mp4")
                write_explained(videos[-1], episode, config)
    policy = "random" if random else "advised" if advised else "agent"
    about = {"task": config.task, "policy": policy, "checkpoint": str(path)}
    about |= {"step": payload["step"], "seed": seed, "episodes": episodes, "envs": envs}
    return {**about, **summarize(done, config.task), "videos": [str(video) for video in videos]}


def read_checkpoint(checkpoint: str | Path) -> tuple[dict, Path, Config]:
    """The payload of a checkpoint, its file and its config. Raises UserError."""
    payload, path, notes = checkpoints.load_checkpoint(checkpoint)
    for note in notes:
        print(note, file=sys.stderr)
    with checkpoints.reading(path):
        return payload, path, Config.from_yaml(payload["config"], f"the config in {path}")


def open_envs(config: Config, amount: int, video: Path | None, explain: Path | None) -> VecEnv:
    """The envs to play in. Raises UserError if they cannot show what --video or --explain needs."""
    make = functools.partial(make_env, config, SEEDS, video=bool(video or explain))
    options = config.envs
    parallel = "process" if amount > 1 else "none"
    envs = VecEnv(make, amount, parallel, timeout=options.timeout, max_restarts=options.max_restarts)
    try:
        images = any(len(s.shape) == 3 and s.dtype == np.uint8 for s in envs.obs_space.values())
        if (explain or video and not audio.waveform_keys(envs.obs_space, config)) and not images:
            option = "--explain" if explain else "--video"
            raise UserError(f"{config.task} shows no images, so there is nothing for {option}")
        kinds = list(envs.act_space.values())
        if explain and (len(kinds) != 1 or not isinstance(kinds[0], gymnasium.spaces.Discrete)):
            raise UserError(f"--explain needs one Discrete action; {config.task} has {dict(envs.act_space)}")
        for note in envs.notes():
            print(note, file=sys.stderr)
    except BaseException:
        envs.close()
        raise
    return envs


def load_agent(payload: dict, path: Path, envs: VecEnv, config: Config, device: torch.device) -> Dreamer:
    """The agent of a checkpoint. Raises UserError if it does not fit the envs."""
    if config.threads:
        torch.set_num_threads(config.threads)
    agent = Dreamer(envs.obs_space, envs.act_space, config, device)
    with checkpoints.reading(path):
        agent.load_state_dict(payload["agent"], resume=False)
    return agent


def export(checkpoint: str | Path, path: Path, dtype: str, decoder: bool) -> str:
    """Write the weights of a checkpoint to a .safetensors file; returns a line about it. Raises UserError."""
    payload, source, config = read_checkpoint(checkpoint)
    numbers = checkpoints.write_weights(path, config, payload["step"], payload["agent"], dtype, decoder)
    size = path.stat().st_size / 1e6
    return f"Wrote {path}: {numbers:,} numbers of {source}, {size:.2f} MB ({dtype})"


def explained(agent: Dreamer, captioner: Captioner, advised: bool, obs: Arrays, state: dict) -> list[dict]:
    """What `decision_panel` shows for each env, after the agent acted on `obs` [n, ...]."""
    actions = list(captioner.actions)
    views = agent.explain(state, advised)
    for env, view in enumerate(views):
        view["caption"] = captioner.caption({key: value[env] for key, value in obs.items()})
        view |= {"actions": actions, "choice": actions[view["action"]]}
    return views


def write_explained(path: Path, episode: EvalEpisode, config: Config) -> None:
    """Write an episode as an mp4 with the views next to the frames."""
    frames = newest(episode.frames, config.frame_stack)  # [L, H, W, C]
    frames = frames if frames.shape[-1] == 3 else frames[..., :1].repeat(3, -1)
    views = zip(frames, episode.views, strict=True)
    write_mp4(path, (decision_panel(frame, view, PANEL_PIXELS) for frame, view in views), VIDEO_FPS)


def outcome(episode: EvalEpisode, action_repeat: int) -> dict[str, float]:
    """Return, length in env steps, and for each `log_*` key its maximum and the share of steps above 0."""
    steps = episode.steps.items()
    logged = {key: float(value.max()) for key, value in steps if key.startswith("log_") and value.ndim == 1}
    return {"return": episode.score, "length": episode.length * action_repeat, **logged, **episode.shares}


def summarize(episodes: list[dict[str, float]], task: str) -> dict:
    """Summarise finished episodes, each with `return`, `length`, `log_achievement_*` and `log_*_share`.

    `return_interval` [low, high] is the bootstrap interval of the mean, None for a single episode.
    `success_rates` by achievement and `score` are in percent; {} and None if the env has none. `shares` are
    means over the episodes, for example of the steps at which the noisy TV was on (`tv`).
    """
    returns, lengths = ([episode[name] for episode in episodes] for name in ("return", "length"))
    interval = bootstrap_interval(returns, CONFIDENCE)
    suite = task.partition("_")[0]
    success = SuccessRates(suite)
    for episode in episodes:
        success.add(episode)
    metrics = success.metrics()
    prefix = f"{suite}/success_rate/"
    shares = [key for key in episodes[0] if key.startswith("log_") and key.endswith("_share")]
    return {
        "return_mean": float(np.mean(returns)),
        "return_interval": None if math.isnan(interval[0]) else list(interval),
        "confidence": CONFIDENCE,
        "length_mean": float(np.mean(lengths)),
        "score": metrics.get(f"{suite}/score"),
        "success_rates": {k.removeprefix(prefix): v for k, v in metrics.items() if k.startswith(prefix)},
        "shares": {key[4:-6]: float(np.mean([episode[key] for episode in episodes])) for key in shares},
        "returns": returns,
        "lengths": lengths,
    }


def report(result: Mapping) -> str:
    """The result as text."""
    who = "random actions" if result["policy"] == "random" else f"the agent at step {result['step']:,}"
    who += ", with the prior" if result["policy"] == "advised" else ""
    returns, lengths, interval = result["returns"], result["lengths"], result["return_interval"]
    spread = f"{min(returns):.4g} to {max(returns):.4g}"
    if interval:
        spread = f"{result['confidence']:.0%} interval {interval[0]:.4g} to {interval[1]:.4g}; all {spread}"
    lines = [
        f"{result['task']}, {who}, {result['episodes']} episodes, seed {result['seed']}",
        f"checkpoint  {result['checkpoint']}",
        f"return      {result['return_mean']:.4g}  ({spread})",
        f"length      {result['length_mean']:.4g}  ({min(lengths):.4g} to {max(lengths):.4g})",
    ]
    if result["success_rates"]:
        lines.append(f"score       {result['score']:.2f} %")
        rates = sorted(result["success_rates"].items(), key=lambda item: (-item[1], item[0]))
        lines += [f"  {rate:5.1f} %  {name}" for name, rate in rates]
    lines += [f"{name:<11} {share:.1%} of the steps" for name, share in result["shares"].items()]
    if result["videos"]:
        lines += [f"video       {video}" for video in result["videos"]]
    return "\n".join(lines)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the options")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return int(text)


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line. Raises UserError for a mistake, SystemExit(0) after `--help`."""
    parser = _Parser(prog="evaluate.py", description=__doc__.split("\n\n")[1], allow_abbrev=False)
    add, flag = parser.add_argument, functools.partial(parser.add_argument, action="store_true")
    add("--logdir", metavar="DIR", help="the run: its latest checkpoint is evaluated, videos go there")
    add("--from_checkpoint", metavar="F", help="another checkpoint, or a file of weights")
    add("--episodes", metavar="N", type=_positive, default=10, help="episodes to play (default: 10)")
    add("--envs", metavar="N", type=_positive, default=1, help="envs played in parallel (default: 1)")
    add("--seed", metavar="S", type=int, default=0, help="of worlds and actions (default: 0)")
    add("--device", metavar="D", default="auto", help="auto (default), cpu, cuda, or one GPU: cuda:1")
    flag("--random", help="random actions instead of the agent's: the baseline")
    flag("--advised", help="act as in training, with the prior learned from advice")
    flag("--video", help="write {logdir}/videos/evaluate_{step}_{episode}.mp4 (and .wav)")
    shows = "caption, probabilities of actor and adviser, choice, value and predicted return of each frame"
    flag("--explain", help="write {logdir}/videos/explain_{step}_{episode}.mp4 with " + shows)
    flag("--json", help="print the result as one JSON object")
    add("--export", metavar="F", type=Path, help="play nothing; write weights and config to F.safetensors")
    add("--dtype", choices=checkpoints.DTYPES, default="float32", help="of the matrices in that file")
    flag("--without_decoder", help="leave the decoder out of that file: acting does not need it")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        names = [f"--{name}" for name in (*vars(args), "help")]
        nearest = difflib.get_close_matches(unknown[0].partition("=")[0], names, n=1, cutoff=0)[0]
        raise UserError(f"{unknown[0]} is not an option; the nearest is {nearest}")
    if not (args.logdir or args.from_checkpoint):
        raise UserError("Give the run with --logdir DIR, or a checkpoint file with --from_checkpoint F")
    for name in ("advised", "explain"):
        if args.random and getattr(args, name):
            raise UserError(f"--{name} needs the agent, and --random plays without it: leave one out")
    given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    of_export, of_both = {"dtype", "without_decoder"}, {"export", "logdir", "from_checkpoint"}
    for name in given:
        if args.export and name not in of_export | of_both:
            raise UserError(f"--export plays no episodes, so --{name} has no effect: leave one out")
        if not args.export and name in of_export:
            raise UserError(f"--{name} needs --export F.safetensors, the file to write")
    return args


def run(args: argparse.Namespace) -> str:
    """Do what the command line asks for; returns the text to print. Raises UserError."""
    checkpoint = args.from_checkpoint or args.logdir
    if args.export:
        return export(checkpoint, args.export, args.dtype, not args.without_decoder)
    folder = Path(args.logdir) if args.logdir else checkpoints.run_folder(Path(checkpoint))
    result = evaluate(
        checkpoint,
        args.episodes,
        envs=args.envs,
        seed=args.seed,
        device=args.device,
        random=args.random,
        advised=args.advised,
        video_folder=folder / "videos" if args.video else None,
        explain_folder=folder / "videos" if args.explain else None,
    )
    return json.dumps(result, allow_nan=False) if args.json else report(result)


def main(argv: list[str] | None = None) -> int:
    """Evaluate as the command line says. Returns the exit code: 0, 2 for user errors, 130."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        with tools.memory_explained(LOWER_ON_GPU, LOWER_IN_RAM):
            text = run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
