"""How long the replay takes to add a step, draw a batch and write latents back.

    python3 benchmarks/replay_speed.py --steps 50000 --deter 2048 --json

Medians in milliseconds of a ring filled with 64x64x3 images; `--files` writes episode files as well.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from episodes import EpisodeWriter
from replay import Replay

FLAG = ((), np.bool_)
REPEATS = 200
EPISODE = 500  # steps


def median_ms(function: Callable[[int], object], repeats: int = REPEATS) -> float:
    """Median milliseconds of `function(i)`."""
    times = []
    for i in range(repeats):
        start = time.perf_counter()
        function(i)
        times.append(time.perf_counter() - start)
    return round(1000 * float(np.median(times)), 4)


def spaces(size: int) -> dict:
    """A typical step: an image, flags, reward and a discrete action."""
    flags = dict.fromkeys(("is_first", "is_last", "is_terminal"), FLAG)
    image = ((size, size, 3), np.uint8)
    return {"image": image, "reward": ((), np.float32), **flags, "action": ((), np.int32)}


def make_step(envs: int, size: int, deter: int, stoch: int, index: int) -> dict[str, np.ndarray]:
    """One step of every environment."""
    flag = np.zeros(envs, bool)
    return {
        "image": np.random.default_rng(index).integers(0, 256, (envs, size, size, 3), np.uint8),
        "reward": np.zeros(envs, np.float32),
        "is_first": flag | (index % EPISODE == 0),
        "is_last": flag | (index % EPISODE == EPISODE - 1),
        "is_terminal": flag,
        "action": np.zeros(envs, np.int32),
        "deter": np.ones((envs, deter), np.float16),
        "stoch": np.ones((envs, stoch), np.uint8),
    }


def measure(args: argparse.Namespace) -> dict:
    """Fill a ring with `args.steps` steps and time what the loop does with it."""
    with tempfile.TemporaryDirectory() as folder:
        writer = EpisodeWriter(folder, spaces(args.size), args.envs) if args.files else None
        latents = dict(deter_size=args.deter, stoch_size=args.stoch, classes=16)
        options = dict(
            backend=args.backend, folder=Path(folder) / "ring", sampler=args.sampler, writer=writer
        )
        replay = Replay(spaces(args.size), args.envs, args.steps, args.length, 1, 0, **latents, **options)
        steps = [make_step(args.envs, args.size, args.deter, args.stoch, i) for i in range(EPISODE)]
        for i in range(args.steps // args.envs):
            replay.add(steps[i % EPISODE])
        filled = args.steps // args.envs
        replay.queue.clear()
        deter = np.ones((args.batch, args.length, args.deter), np.float16)
        stoch = np.ones((args.batch, args.length, args.stoch), np.uint8)
        loss = np.ones((args.batch, args.length), np.float32)
        add = median_ms(lambda i: replay.add(steps[(filled + i) % EPISODE]))
        replay.queue.clear()
        wheres = [replay.draw(args.batch) for _ in range(REPEATS)]
        result = {
            "add_per_env_ms": round(add / args.envs, 4),
            "sample_ms": median_ms(lambda i: replay.sample(args.batch)),
            "update_latents_ms": median_ms(lambda i: replay.update_latents(wheres[i], deter, stoch)),
            "update_priorities_ms": median_ms(lambda i: replay.update_priorities(wheres[i], loss)),
        }
        replay.close()
    return {**vars(args), **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=50_000, help="steps in the ring (its capacity)")
    parser.add_argument("--envs", type=int, default=1)
    parser.add_argument("--size", type=int, default=64, help="height and width of images")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64, help="steps of a window after the context of 1")
    parser.add_argument("--deter", type=int, default=2048)
    parser.add_argument("--stoch", type=int, default=32)
    parser.add_argument("--backend", choices=("tensor", "memmap"), default="tensor")
    parser.add_argument("--sampler", choices=("uniform", "curious"), default="uniform")
    parser.add_argument("--files", action="store_true", help="write episode files too")
    parser.add_argument("--json", action="store_true")
    result = measure(parser.parse_args())
    if result.pop("json"):
        print(json.dumps(result))
    else:
        print("\n".join(f"{key:>22}  {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
