"""Whether the replay takes the memory that it announced, and stays flat.

    python3 benchmarks/replay_memory.py --steps 200000 --capacity 50000 --json

Writes steps of 64x64x3 images with latents and episode files through a ring, draws batches on the way, and
compares the growth of the resident memory with the plan's figure.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.replay_speed import EPISODE, make_step, spaces
from episodes import EpisodeWriter
from replay import Replay, plan, ring_layout

REPORTS = 8  # readings of the memory over the run


def resident() -> int:
    """Bytes of this process in RAM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmRSS.")


def measure(args: argparse.Namespace) -> dict:
    """Fill the ring several times over and read the resident memory now and then."""
    latents = dict(deter_size=args.deter, stoch_size=args.stoch, classes=16)
    with tempfile.TemporaryDirectory() as folder:
        ring = Path(folder) / "ring"
        chosen = plan(ring_layout(spaces(64), **latents), 1, 65, args.capacity, args.backend, ring)
        writer = EpisodeWriter(folder, spaces(64), 1, keep_steps=args.capacity) if args.files else None
        steps = [make_step(1, 64, args.deter, args.stoch, i) for i in range(EPISODE)]
        before = resident()
        options = dict(backend=chosen.backend, folder=ring, writer=writer)
        replay = Replay(spaces(64), 1, chosen.capacity, 64, 1, 0, **latents, **options)
        growth = []
        for i in range(args.steps):
            replay.add(steps[i % EPISODE])
            if i >= 1000 and i % 100 == 0:
                replay.sample(16)
            if (i + 1) % (args.steps // REPORTS) == 0:
                growth.append(resident() - before)
        replay.close()
    return {
        "line": chosen.line,
        "announced_mib": round(chosen.nbytes / 2**20, 1),
        "growth_mib": [round(value / 2**20, 1) for value in growth],
        "ratio": round(growth[-1] / chosen.nbytes, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--capacity", type=int, default=50_000)
    parser.add_argument("--deter", type=int, default=2048)
    parser.add_argument("--stoch", type=int, default=32)
    parser.add_argument("--backend", choices=("tensor", "memmap"), default="tensor")
    parser.add_argument("--files", action="store_true", help="write episode files too")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = measure(args)
    if args.json:
        print(json.dumps(result))
    else:
        print("\n".join(f"{key:>14}  {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
