"""What does the scripted adviser reach alone? python3 benchmarks/rules.py [--quick]

It plays its highest-rated action at every step. Crafter: achievements unlocked per episode, over 20 episodes.
MiniGrid: return and share of solved episodes of DoorKey, over 100. The seeds are those of training envs.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import config as configs
import envs
from lore_llm.advice import MAX_REPLY_CHARS, AdviceSpec, Request
from lore_llm.captions import make_captioner
from lore_llm.rules import Rules

TASKS = {"crafter_reward": 20} | {f"minigrid_DoorKey-{size}x{size}": 100 for size in (5, 6, 8)}
QUICK = 2  # episodes of each task, of at most QUICK_STEPS
QUICK_STEPS = 300


def play(task: str, episodes: int, options: list[str]) -> dict[str, np.ndarray | float]:
    """Episodes played by the rules alone.

    Returns `length`, `return` and `unlocked`, the number of achievements, each [episodes]; `achievements`,
    the share of episodes for each (Crafter only); and `us`, microseconds for a caption and for its advice.
    """
    config = configs.load(["--configs", "lore_prior", "--task", task, *options], has_cuda=False)
    env = envs.make_env(config, "train", 0)
    captioner = make_captioner(config, env.obs_space, env.act_space)
    spec = AdviceSpec(captioner.actions, captioner.subgoals, 0, MAX_REPLY_CHARS, 8)
    rules = Rules(spec, config.llm, captioner, config.seed)
    wants = frozenset({"prior", "plan"})
    lengths, returns, unlocked, times = [], [], [], []
    for _ in range(episodes):
        obs, _ = env.reset()
        length, total, done = 0, 0.0, False
        while not done:
            start = time.perf_counter()
            caption = captioner.caption(obs)
            between = time.perf_counter()
            (answer,) = rules.answer([Request(caption, wants, obs)]).answers
            times.append((between - start, time.perf_counter() - between))
            action = int(np.argmax(answer.advice.action_prior.logits))
            obs, reward, terminated, truncated, _ = env.step({"action": action})
            length, total, done = length + 1, total + reward, terminated or truncated
        lengths.append(length)
        returns.append(total)
        unlocked.append(
            {key[16:]: float(value) for key, value in obs.items() if key[:16] == "log_achievement_"}
        )
    return {
        "length": np.array(lengths),
        "return": np.array(returns),
        "unlocked": np.array([sum(each.values()) for each in unlocked]),
        "achievements": {name: np.mean([each[name] for each in unlocked]) for name in unlocked[0]},
        "us": 1e6 * np.mean(times, 0),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="which tasks")
    parser.add_argument("--episodes", type=int, help=f"of each task; by default {TASKS}")
    parser.add_argument("--quick", action="store_true", help="few and short episodes, for tests")
    args, options = parser.parse_known_args(argv)
    if args.quick:
        options += ["--time_limit", str(QUICK_STEPS)]
    for task in args.tasks:
        episodes = QUICK if args.quick else args.episodes or TASKS.get(task, 100)
        result = play(task, episodes, options)
        text = f"length {result['length'].mean():.0f}"
        if result["achievements"]:
            unlocked = result["unlocked"]
            text += f", achievements {unlocked.mean():.2f} (standard deviation {unlocked.std(ddof=1):.2f})"
        else:
            text += f", solved {np.mean(result['return'] > 0):.0%}, return {result['return'].mean():.3f}"
        caption, advice = result["us"]
        print(f"{task}: {episodes} episodes, {text}; a caption {caption:.0f} us, its advice {advice:.0f} us")
        for name, share in sorted(result["achievements"].items(), key=lambda pair: -pair[1]):
            print(f"    {share:4.0%} {name}")


if __name__ == "__main__":
    main()
