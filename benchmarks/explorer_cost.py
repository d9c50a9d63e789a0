"""What an explorer adds to an update: greedy and each explorer in turns, one update of each after the other.

    python3 benchmarks/explorer_cost.py --size size12m --device cpu

Each is a process of its own with the weights of one size in memory, so several GiB are needed. Times are
medians in seconds; `ratio` is the median over the rounds of an explorer's time to greedy's in the same
round. Options of the program follow after `--`, for all but greedy: `-- --lpm.share 0.25`.
"""

import json
import sys
from pathlib import Path

from turns import Program, compared, take_turns
from update_speed import make_parser

EXPLORERS = ("surprise", "plan2explore", "lpm")
WARMUP = 18  # rounds that do not count: a FIFO of LPM is full after 16


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--explorers", nargs="+", default=EXPLORERS, choices=EXPLORERS)
    parser.add_argument("--actors", nargs="+", default=("shared", "separate"))
    parser.add_argument("--warmup", type=int, default=WARMUP, help="rounds that do not count")
    parser.add_argument("--repeats", type=int, default=10, help="rounds that are timed")
    args = parser.parse_args()
    script = str(Path(__file__).resolve().parent / "update_speed.py")
    serve = [sys.executable, script, "--serve", "--size", args.size, "--device", args.device]
    serve += ["--precision", args.precision, "--threads", str(args.threads), "--"]
    commands = {"greedy": serve}
    for explorer in args.explorers:
        for actor in args.actors:
            options = ["--expl_behavior", explorer, "--expl_task_actor", actor, *args.override]
            commands[f"{explorer} {actor}"] = serve + options
    programs = {name: Program(command) for name, command in commands.items()}
    take_turns(programs, args.warmup, args.repeats)
    result = compared(programs, "greedy", "update_s")
    print(json.dumps(result) if args.json else "\n".join(f"{k}: {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
