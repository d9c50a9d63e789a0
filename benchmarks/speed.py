"""How fast LoRe is, and how much memory it takes: python3 benchmarks/speed.py COMMAND --help

update  seconds of an update, of several sizes and options, against another checkout and against r2dreamer
policy  seconds of a policy step, by the number of envs replay  adding steps, drawing batches, writing latents
back; memory against the announced amount envs    steps per second of envs in workers against gymnasium's
AsyncVectorEnv, and of Crafter against the original advice  steps per second of real runs by advice path and
adviser

Whatever is compared takes turns in one run, so that other jobs on the machine disturb all alike. Figures are
medians. Each command prints Markdown, or with --json one JSON object.
"""

import argparse
import functools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.turns import Program, take_turns

ROOT = Path(__file__).resolve().parent.parent
Figures = dict[str, dict[str, Any]]  # row -> column -> value

# --- Updates and policy steps --------------------------------------------------------------------------

WARMUP = 5  # rounds that do not count: LoRe records its CUDA graph in them
# As tools.keep_freed_memory does from within.
KEEP_MEMORY = {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=18446744073709551615"}


def lore_program(args: argparse.Namespace, repo: Path, *options: str, envs: int = 0) -> Program:
    """A process that does updates, or policy steps of `envs`, of the checkout `repo`."""
    command = [sys.executable, str(ROOT / "benchmarks" / "lore.py"), "--repo", str(repo)]
    command += ["--threads", str(args.threads), "--envs", str(envs), "--", "--device", args.device]
    return Program([*command, *options])


def r2dreamer_programs(args: argparse.Namespace, size: str, dtype: str) -> dict[str, Program]:
    """r2dreamer with its compilation on a GPU; on a CPU without, and also with freed memory kept."""
    command = [args.python, str(ROOT / "benchmarks" / "r2dreamer.py"), "--repo", str(args.r2dreamer)]
    command += ["--size", size, "--precision", dtype, "--threads", str(args.threads)]
    if args.device != "cpu":
        return {f"{size} {dtype} r2dreamer": Program([*command, "--device", args.device, "--compile"])}
    return {
        f"{size} {dtype} r2dreamer": Program(command),
        f"{size} {dtype} r2dreamer, memory kept": Program(command, KEEP_MEMORY),
    }


def updates(args: argparse.Namespace) -> Figures:
    """Seconds of an update; ratios are to the first row of each size and precision."""
    figures: Figures = {}
    for size in args.sizes:
        for dtype in args.precisions:
            preset = ["--configs", size, "--precision", dtype]
            programs = {
                f"{size} {dtype} {options}".strip(): lore_program(args, ROOT, *preset, *shlex.split(options))
                for options in args.options
            }
            for repo in args.against:
                programs[f"{size} {dtype} of {repo}"] = lore_program(args, repo.resolve(), *preset)
            if args.r2dreamer:
                programs |= r2dreamer_programs(args, size, dtype)
            figures |= take_turns(programs, args.warmup, args.repeats)
    return figures


def policy_steps(args: argparse.Namespace) -> Figures:
    """Seconds of a policy step; ratios are to the first row of each size."""
    figures: Figures = {}
    for size in args.sizes:
        programs = {
            f"{size}, {envs} envs": lore_program(args, ROOT, "--configs", size, envs=envs)
            for envs in args.envs
        }
        figures |= take_turns(programs, args.warmup, args.repeats)
    return figures


# --- Replay --------------------------------------------------------------------------------------------

FLAG = ((), np.bool_)
EPISODE = 500  # steps
BATCH, LENGTH = 16, 64
CALLS = 200  # that are timed


def median_ms(function: Callable[[int], object]) -> float:
    """Median milliseconds of `function(i)`."""
    times = []
    for i in range(CALLS):
        start = time.perf_counter()
        function(i)
        times.append(time.perf_counter() - start)
    return round(1000 * statistics.median(times), 4)


def resident() -> int:
    """Bytes of this process in RAM (Linux)."""
    pages = Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def measure_replay(args: argparse.Namespace) -> Figures:
    """Fill the ring twice, then time its calls in the training loop."""
    import replay

    spaces = {"image": ((args.image, args.image, 3), np.uint8), "reward": ((), np.float32)}
    spaces |= dict.fromkeys(("is_first", "is_last", "is_terminal"), FLAG) | {"action": ((), np.int32)}
    latents = dict(deter_size=args.deter, stoch_size=32, classes=16)
    rng, flag = np.random.default_rng(0), np.zeros(1, bool)
    images = rng.integers(256, size=(EPISODE, 1, args.image, args.image, 3), dtype=np.uint8)
    rest = {"reward": np.zeros(1, np.float32), "is_terminal": flag, "action": np.zeros(1, np.int32)}
    rest |= {"deter": np.ones((1, args.deter), np.float16), "stoch": np.ones((1, 32), np.uint8)}

    def add(i: int) -> None:
        ends = {"is_first": flag | (i % EPISODE == 0), "is_last": flag | (i % EPISODE == EPISODE - 1)}
        ring.add({"image": images[i % EPISODE], **ends, **rest})

    with tempfile.TemporaryDirectory() as folder:
        layout = replay.ring_layout(spaces, **latents)
        plan = replay.plan(layout, 1, LENGTH + 1, args.steps, args.backend, Path(folder))
        before = resident()
        ring = replay.Replay(
            spaces, 1, plan.capacity, LENGTH, 1, 0, **latents,
            backend=plan.backend, folder=Path(folder), sampler=args.sampler,
        )  # fmt: skip
        for i in range(2 * args.steps):
            add(i)
        growth = resident() - before
        result: dict[str, Any] = {"add_ms": median_ms(lambda i: add(2 * args.steps + i))}
        ring.queue.clear()
        where = [ring.draw(BATCH) for _ in range(CALLS)]
        deter = np.ones((BATCH, LENGTH, args.deter), np.float16)
        stoch, loss = np.ones((BATCH, LENGTH, 32), np.uint8), np.ones((BATCH, LENGTH), np.float32)
        result["sample_ms"] = median_ms(lambda i: ring.sample(BATCH))
        result["update_latents_ms"] = median_ms(lambda i: ring.update_latents(where[i], deter, stoch))
        result["update_priorities_ms"] = median_ms(lambda i: ring.update_priorities(where[i], loss))
        ring.close()
    result |= {"announced_mib": round(plan.nbytes / 2**20, 1), "growth_mib": round(growth / 2**20, 1)}
    return {f"{args.steps:,} steps, {args.sampler}, {plan.backend}": result}


# --- Environments --------------------------------------------------------------------------------------

WARM_UP_STEPS = 20  # the first steps load what an environment loads late
CRAFTER_STEPS = 400  # of each turn of Crafter: some episodes


class AsGymnasium(gymnasium.Env):
    """Environment `index` of `make`, for gymnasium's AsyncVectorEnv."""

    def __init__(self, make: Callable[[int], Any], index: int):
        self._env = make(index)
        self.observation_space = gymnasium.spaces.Dict(self._env.obs_space)
        self.action_space = self._env.act_space["action"]

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        return self._env.reset()[0], {}

    def step(self, action: Any) -> tuple[dict, float, bool, bool, dict]:
        return *self._env.step({"action": action})[:4], {}


def rate(step: Callable[[np.ndarray], object], space: gymnasium.Space, amount: int, seconds: float) -> float:
    """Steps of `amount` environments per second, with random actions."""
    rng = np.random.default_rng(0)

    def action() -> np.ndarray:
        if isinstance(space, gymnasium.spaces.Discrete):
            return rng.integers(space.n, size=amount, dtype=np.int32)
        return rng.uniform(space.low, space.high, (amount, *space.shape)).astype(space.dtype)

    for _ in range(WARM_UP_STEPS):
        step(action())
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        step(action())
        steps += 1
    return amount * steps / (time.perf_counter() - start)


def measure_workers(args: argparse.Namespace, task: str) -> Figures:
    """Steps per second of one env in the main process, and of workers, ours and gymnasium's."""
    import config
    import envs
    import parallel

    make = functools.partial(envs.make_env, config.load(["--task", task]), "train")
    stacks, rates = {}, {}
    try:
        for amount in (0, *args.workers):
            kind = "process" if amount else "none"
            ours = parallel.VecEnv(make, max(1, amount), kind, timeout=600, max_restarts=0)
            stacks[f"{task}, {amount} workers" if amount else f"{task}, main process"] = ours
            if amount:  # spawn: a fork of a process with threads may hang
                makers = [functools.partial(AsGymnasium, make, index) for index in range(amount)]
                theirs = gymnasium.vector.AsyncVectorEnv(makers, context="spawn")
                stacks[f"{task}, {amount} workers of gymnasium"] = theirs
        for vec in stacks.values():
            vec.reset()
        space = ours.act_space["action"]
        for _ in range(args.turns):
            for name, vec in stacks.items():
                words = name.split(", ")[1].split()
                amount = int(words[0]) if words[0].isdigit() else 1
                step = vec.step if "gymnasium" in words else lambda a, vec=vec: vec.step({"action": a})
                rates.setdefault(name, []).append(rate(step, space, amount, args.seconds))
    finally:
        for vec in stacks.values():
            vec.close()
    return {name: {"steps_per_s": round(statistics.median(values))} for name, values in rates.items()}


def measure_crafter(turns: int) -> Figures:
    """Steps per second of CPU time of Crafter, resets included: the installed package and ours."""
    import crafter

    from envs.crafter import Crafter

    original, ours = crafter.Env(seed=0), Crafter()
    ours._env._seed = 0
    games = {
        "Crafter, original": (original.reset, lambda action: original.step(action)[2]),
        "Crafter, ours": (ours.reset, lambda action: any(ours.step(action)[2:4])),
    }
    seconds = dict.fromkeys(games, 0.0)
    rngs = {name: np.random.default_rng(0) for name in games}
    for turn in range(turns + 1):
        for name, (reset, step) in games.items():
            start = time.process_time()
            reset()
            for action in rngs[name].integers(len(original.action_names), size=CRAFTER_STEPS).tolist():
                if step(action):
                    reset()
            if turn:  # the first reset of ours prepares its noise, once in a process
                seconds[name] += time.process_time() - start
    return {name: {"steps_per_s": round(turns * CRAFTER_STEPS / value)} for name, value in seconds.items()}


def measure_envs(args: argparse.Namespace) -> Figures:
    figures: Figures = {}
    for task in args.tasks:
        figures |= measure_workers(args, task)
    return figures | (measure_crafter(args.turns) if args.crafter else {})


# --- Advice --------------------------------------------------------------------------------------------

DELAY_S = 1.0  # of the answers of the server in `waiting`
UNREACHABLE = "http://127.0.0.1:9"  # the discard port, on which nothing listens
RUNS = {
    "plain": [],
    "prior": ["lore_prior", "--llm.backend", "rules"],
    "synth": ["lore_synth", "--llm.backend", "rules"],
    "options": ["lore_options", "--llm.backend", "rules"],
    "full": ["lore_full", "--llm.backend", "rules"],
    "silent": ["lore_prior", "--llm.backend", "none"],
    "waiting": ["lore_prior", "--llm.backend", "gemini"],  # a server on this machine answers after DELAY_S
    "dead": ["lore_prior", "--llm.backend", "gemini", "--llm.base_url", UNREACHABLE],
}


def measure_advice(args: argparse.Namespace) -> Figures:
    """Env steps per second of real runs of Crafter after the prefill; ratios of time to the first run."""
    sys.path.insert(0, str(ROOT / "tests"))
    from llm_servers import FakeLLM, Say

    speeds: dict[str, list[float]] = {name: [] for name in args.runs}
    with FakeLLM(Say(delay=DELAY_S)) as server:
        for _ in range(args.repeats):
            for name, found in speeds.items():
                url = ["--llm.base_url", server.url] if name == "waiting" else []
                found.append(run_speed(args, [*RUNS[name], *url]))
    base = speeds[args.runs[0]]
    return {
        name: {
            "steps_per_s": round(statistics.median(each), 2),
            "ratio": round(statistics.median(b / s for s, b in zip(each, base, strict=True)), 3),
        }
        for name, each in speeds.items()
    }


def run_speed(args: argparse.Namespace, options: Sequence[str]) -> float:
    """Env steps per second after the prefill of one run."""
    prefill, half = args.prefill, args.steps // 2
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "dreamer.py"), "--configs", "crafter", args.size, *options]
        command += ["--device", args.device, "--threads", str(args.threads), "--prefill", str(prefill)]
        command += ["--steps", str(prefill + args.steps), "--log_every", str(half), "--eval_every", "0"]
        command += ["--synthetic_warmup", "0", "--logdir", folder]
        env = {**os.environ, "GEMINI_API_KEY": "none"}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    late = [line for line in map(json.loads, lines) if line["step"] >= prefill + half]
    return statistics.median(line["env/fps"] for line in late if "env/fps" in line)


# --- The command ---------------------------------------------------------------------------------------


def markdown(figures: Mapping[str, Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for each in figures.values() for key in each))
    rows = [["", *columns], ["---"] * (1 + len(columns))]
    rows += [[name, *(str(each.get(key, "-")) for key in columns)] for name, each in figures.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, measure: Callable, *, turns: str = "") -> Callable:
        add = commands.add_parser(name, help=measure.__doc__, description=measure.__doc__).add_argument
        add("--json", action="store_true", help="print one JSON object")
        if turns:
            add("--device", default="cpu", help="default: %(default)s")
            add("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
            add("--repeats", type=int, default=10, help=f"{turns} that are timed")
        functions[name] = measure
        return add

    functions: dict[str, Callable[[argparse.Namespace], Figures]] = {}
    for name, measure in (("update", updates), ("policy", policy_steps)):
        add = command(name, measure, turns="rounds")
        add("--sizes", nargs="+", default=["size12m"], help="scale presets: size1m … size400m, cpu, debug")
        add("--warmup", type=int, default=WARMUP, help="rounds that do not count (LPM's FIFO needs 17)")
        if name == "policy":
            add("--envs", nargs="+", type=int, default=[1, 4, 16])
            continue
        add("--precisions", nargs="+", default=["auto"], help="auto, float32, bfloat16")
        add("--options", nargs="+", default=[""], help='variants, for example "" "--expl_behavior lpm"')
        add("--against", nargs="+", type=Path, default=[], metavar="DIR", help="other checkouts of LoRe")
        add("--r2dreamer", type=Path, metavar="DIR", help="a checkout of github.com/NM512/r2dreamer")
        add("--python", default=sys.executable, help="an interpreter with the packages of r2dreamer.py")
    add = command("replay", measure_replay)
    add("--steps", type=int, default=50_000, help="capacity of the ring")
    add("--image", type=int, default=64, help="height and width of images")
    add("--deter", type=int, default=2048)
    add("--backend", choices=("tensor", "memmap"), default="tensor")
    add("--sampler", choices=("uniform", "curious"), default="uniform")
    add = command("envs", measure_envs)
    add("--tasks", nargs="*", default=["crafter_reward"])
    add("--workers", nargs="+", type=int, default=[1, 2, 4, 8])
    add("--seconds", type=float, default=3.0, help="of each turn")
    add("--turns", type=int, default=5)
    add("--crafter", action="store_true", help="Crafter's original and ours, too")
    add = command("advice", measure_advice, turns="rounds")
    add("--size", default="cpu", help="a scale preset")
    add("--runs", nargs="+", default=list(RUNS), choices=RUNS)
    add("--steps", type=int, default=256, help="env steps after the prefill")
    add("--prefill", type=int, default=300)
    parser.set_defaults(functions=functions)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    figures = args.functions[args.command](args)
    print(json.dumps(figures) if args.json else markdown(figures))


if __name__ == "__main__":
    main()
