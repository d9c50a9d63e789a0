"""What advice costs: real runs of Crafter in turns, some env steps of each after the other.

    python3 benchmarks/advice_cost.py --size cpu --device cpu
    python3 benchmarks/advice_cost.py --size cpu --device cpu --runs silent waiting dead --base silent

Each run is a process of its own, in which all that belongs to a run happens but evaluations: env steps,
updates, advice. `plain` has no adviser. `prior`, `synth`, `options` and `full` are asked about by the
embedded rules. The others have the prior, and somebody else to ask: `silent` nobody; `waiting` a server on
this machine that answers after a second; `dead` one that is not there. Times are medians in seconds for
`--steps` env steps; `ratio` is the median over the rounds of a run's time to that of `--base` in the same
round. Options of the program follow after `--`, for all runs: `-- --llm.min_gap_steps 1`.
"""

import contextlib
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from llm_servers import FakeLLM, Say
from turns import Program, compared, serve, take_turns
from update_speed import make_parser

import dreamer
import tools

DELAY_S = 1.0  # of the server's answers
PREFILL = 300  # env steps before the first update
NOBODY = "http://127.0.0.1:9"  # the discard port, where nothing listens
RUNS = {
    "plain": [],
    "prior": ["lore_prior", "--llm.backend", "rules"],
    "synth": ["lore_synth", "--llm.backend", "rules"],
    "options": ["lore_options", "--llm.backend", "rules"],
    "full": ["lore_full", "--llm.backend", "rules"],
    "silent": ["lore_prior", "--llm.backend", "none"],
    "waiting": ["lore_prior", "--llm.backend", "gemini"],
    "dead": ["lore_prior", "--llm.backend", "gemini", "--llm.base_url", NOBODY],
}


def serve_run(argv: list[str], steps: int) -> None:
    """Some env steps of a run for each line of the input; see turns.py."""
    with tempfile.TemporaryDirectory() as folder:
        command = dreamer.read_command([*argv, "--logdir", folder])
        with contextlib.ExitStack() as stack:
            run = dreamer.open_run(command, tools.choose_device(command.config.device), [], stack)
            progress = run["progress"]

            def advance(to: int) -> None:
                dreamer.loop(lambda: progress.step >= to, command.config, **run)

            advance(command.config.prefill)
            about = {"parameters": run["agent"].parameters()}
            serve(lambda: advance(progress.step + steps), about)


def main() -> None:
    parser = make_parser(__doc__)
    parser.set_defaults(size="cpu")
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--base", default="plain", choices=list(RUNS), help="what the ratios are against")
    parser.add_argument("--steps", type=int, default=64, help="env steps in a turn")
    parser.add_argument("--warmup", type=int, default=2, help="rounds that do not count")
    parser.add_argument("--repeats", type=int, default=10, help="rounds that are timed")
    parser.add_argument("--serve", choices=list(RUNS), help="be one of the runs")
    args = parser.parse_args()
    if args.serve:
        argv = ["--configs", "crafter", args.size, *RUNS[args.serve], "--device", args.device]
        argv += ["--precision", args.precision, "--threads", str(args.threads), "--prefill", str(PREFILL)]
        argv += ["--eval_every", "0", "--synthetic_warmup", "0", *args.override]
        serve_run(argv, args.steps)
        return
    command = [sys.executable, __file__, "--size", args.size, "--device", args.device]
    command += ["--precision", args.precision, "--threads", str(args.threads), "--steps", str(args.steps)]
    names = list(dict.fromkeys([args.base, *args.runs]))
    with FakeLLM(Say(delay=DELAY_S)) as server:
        slow = {"waiting": ["--llm.base_url", server.url]}
        programs = {
            name: Program(
                [*command, "--serve", name, "--", *slow.get(name, []), *args.override],
                {"GEMINI_API_KEY": "nobody"},
            )
            for name in names
        }
        take_turns(programs, args.warmup, args.repeats)
    result = compared(programs, args.base, "seconds")
    print(json.dumps(result) if args.json else "\n".join(f"{k}: {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
