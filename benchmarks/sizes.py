"""What a run of dreamer.py leaves on the disk and what its replay takes, in bytes.

    python3 benchmarks/sizes.py --size size12m --json

A short real run of Crafter with the `--size` preset and two updates, in a temporary folder: the size of a
checkpoint (weights, optimiser, all), the seconds that a save takes, the episode files' bytes per step and
steps per file (random actions, so short episodes), and the bytes that the replay announces per step.
"""

import argparse
import contextlib
import json
import math
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint as checkpoints
import dreamer
import episodes
import replay

UPDATES, CAPACITY = 2, 4000


def measure(size: str, steps: int, options: list[str]) -> dict:
    """Run it; the sizes by name."""
    with tempfile.TemporaryDirectory() as folder:
        argv = ["--configs", "crafter", size, "--device", "cpu", "--logdir", folder, "--eval_every", "0"]
        argv += ["--replay.capacity", str(CAPACITY), "--replay.backend", "tensor", "--train_ratio", "32"]
        # One update for each 32 steps with a batch of 16 x 64.
        argv += ["--prefill", str(steps), "--steps", str(steps + 32 * UPDATES), *options]
        command = dreamer.read_command(argv)
        with contextlib.ExitStack() as stack:
            run = dreamer.open_run(command, torch.device("cpu"), [], stack)
            dreamer.loop(lambda: False, command.config, **run)
            start = time.perf_counter()
            run["checkpoint"].save(run["progress"].step)
            seconds = time.perf_counter() - start
            rssm, envs = command.config.rssm, run["actor"].envs
            spaces = envs.obs_space | envs.act_space
            layout = replay.ring_layout(spaces, rssm.deter, rssm.stoch, rssm.classes)
        files = episodes.list_episodes(Path(folder) / "train_eps")
        stored = sum(file.length for file in files)
        return {
            "size": size,
            "checkpoint_bytes": (Path(folder) / checkpoints.LATEST).stat().st_size,
            "save_s": round(seconds, 3),
            "episode_bytes_per_step": round(sum(file.path.stat().st_size for file in files) / stored),
            "steps_per_episode": round(stored / len(files)),
            "replay_bytes_per_step": sum(dt.itemsize * math.prod(shape) for shape, dt in layout.values()),
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="size12m", help="a scale preset")
    parser.add_argument("--steps", type=int, default=2000, help="random env steps")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("override", nargs="*", help="more options of dreamer.py, after --")
    args = parser.parse_args()
    result = measure(args.size, args.steps, args.override)
    if args.json:
        print(json.dumps(result))
    else:
        print("\n".join(f"{key:>24}  {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
