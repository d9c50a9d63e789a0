"""How long an update, a policy step and a replay sample take, and how much memory they need.

    python3 benchmarks/update_speed.py --size size12m --device cpu --precision float32 --json
    python3 benchmarks/update_speed.py --size size12m --device cpu --compare ../r2dreamer

`--size` takes any scale preset (`cpu` as well, with its own batch); Crafter's shapes, a replay full of
random steps. Times are medians in seconds. Peak memory is the process's on a CPU, torch's on a GPU.
Options of the program follow after `--`: `-- --batch_size 8 --compile False`.

`--compare` takes a checkout of r2dreamer (github.com/NM512/r2dreamer), which is updated in turns with ours,
in each precision; on a CPU without its compilation, and once more with freed memory kept as ours keeps it;
on a GPU with its compilation. It needs tensordict, omegaconf and tensorboard; `--python` names an
interpreter that has them, so that they need not be installed beside LoRe.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gymnasium
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from turns import Program, resident_peak, serve, take_turns

import config as configs
import cuda_graph
import dreamer
import tools
from agent import Dreamer
from replay import Replay
from tools import choose_device, compiles, keeps_memory, precision

ACTIONS = 17
REPLAY_STEPS = 2000
POLICY_STEPS = 50
OBS_SPACE = {
    "image": gymnasium.spaces.Box(0, 255, (64, 64, 3), np.uint8),
    "reward": gymnasium.spaces.Box(-np.inf, np.inf, (), np.float32),
    **{key: gymnasium.spaces.Box(0, 1, (), np.bool_) for key in ("is_first", "is_last", "is_terminal")},
}
ACT_SPACE = {"action": gymnasium.spaces.Discrete(ACTIONS)}


def make_step(rng: np.random.Generator, envs: int, first: bool) -> dict[str, np.ndarray]:
    """A random step of all envs."""
    flags = {"is_first": np.full(envs, first), "is_last": np.zeros(envs, bool)}
    return {
        "image": rng.integers(256, size=(envs, 64, 64, 3), dtype=np.uint8),
        "reward": rng.normal(size=envs).astype(np.float32),
        "action": rng.integers(ACTIONS, size=envs, dtype=np.int32),
        "is_terminal": np.zeros(envs, bool),
        **flags,
    }


def median_seconds(function: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median duration of a call; a GPU is waited for."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_memory(device: torch.device) -> float:
    """GiB at the worst moment so far."""
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else resident_peak()


def make_agent(args: argparse.Namespace) -> tuple[Dreamer, configs.Config, torch.device]:
    """An agent for Crafter's shapes, as the command line asks for."""
    argv = ["--configs", "crafter", args.size, "--device", args.device, "--precision", args.precision]
    config = configs.load(argv + args.override)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    if keeps_memory(config, device):
        tools.keep_freed_memory()
    return Dreamer(OBS_SPACE, ACT_SPACE, config, device), config, device


def make_replay(config: configs.Config) -> Replay:
    """A replay full of random steps."""
    rssm, rng = config.rssm, np.random.default_rng(0)
    replay = Replay(
        OBS_SPACE | ACT_SPACE, 1, REPLAY_STEPS, config.batch_length, config.replay_context, 0,
        deter_size=rssm.deter, stoch_size=rssm.stoch, classes=rssm.classes,
    )  # fmt: skip
    for index in range(REPLAY_STEPS):
        replay.add(make_step(rng, 1, index == 0))
    return replay


def make_batch(config: configs.Config) -> dict[str, np.ndarray]:
    """One batch of random steps."""
    batch = make_replay(config).sample(config.batch_size)
    batch.pop("where")
    return batch


def measure(args: argparse.Namespace) -> dict:
    """All figures for one setting."""
    agent, config, device = make_agent(args)
    replay = make_replay(config)
    batch = replay.sample(config.batch_size)
    batch.pop("where")
    start = time.perf_counter()
    agent.train(batch)
    first_update = time.perf_counter() - start
    update = median_seconds(lambda: agent.train(batch), args.repeats, device)

    obs, states = make_step(np.random.default_rng(0), args.envs, True), [agent.initial_state(args.envs)]

    def policy_step() -> None:
        _, states[0], _ = agent.act(obs, states[0], agent.rngs["act"])

    policy_step()
    return {
        "size": args.size,
        "device": dreamer.device_name(device),
        "precision": precision(config, device),
        "compile": compiles(config, device),
        "batch": [config.batch_size, config.batch_length],
        "parameters": agent.parameters(),
        "first_update_s": round(first_update, 4),
        "update_s": round(update, 4),
        "policy_step_s": round(median_seconds(policy_step, POLICY_STEPS, device), 5),
        "replay_sample_s": round(
            median_seconds(lambda: replay.sample(config.batch_size), POLICY_STEPS, device), 5
        ),
        "peak_memory_gib": round(peak_memory(device), 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def serve_updates(args: argparse.Namespace) -> None:
    """One update for each line of the input; see turns.py."""
    agent, config, device = make_agent(args)
    batch = make_batch(config)

    def update() -> None:
        agent.train(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()

    serve(update, {"parameters": agent.parameters()}, lambda: peak_memory(device))


# As tools.keep_freed_memory does from within: r2dreamer does not.
KEEP_MEMORY = {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=18446744073709551615"}
WARMUP = cuda_graph.WARMUP + 2  # rounds of a comparison that do not count: ours records its graph in them


def compare(args: argparse.Namespace) -> dict:
    """Updates of LoRe and of r2dreamer in turns; {program: figures} and the ratios of the better ones."""
    folder = Path(__file__).resolve().parent
    precisions = ["float32", "bfloat16"] if args.precision == "auto" else [args.precision]
    cuda = choose_device(args.device).type == "cuda"
    same = ["--size", args.size, "--device", "cuda" if cuda else "cpu", "--threads", str(args.threads)]
    figures = {}
    for dtype in precisions:
        options = [*same, "--precision", dtype]
        peer = [args.python, str(folder / "r2dreamer.py"), *options, "--repo", args.compare]
        lore = [sys.executable, str(folder / "update_speed.py"), *options, "--serve"]
        programs = {
            f"LoRe {dtype}": Program(lore),
            f"r2dreamer {dtype}": Program([*peer, *["--compile"] * cuda]),
        }
        if not cuda:
            programs[f"r2dreamer, memory kept, {dtype}"] = Program(peer, KEEP_MEMORY)
        take_turns(programs, WARMUP, args.repeats)
        for name, program in programs.items():
            low, _, high = statistics.quantiles(program.seconds, n=4)
            figures[name] = {
                "update_s": round(statistics.median(program.seconds), 3),
                "quartiles_s": [round(low, 3), round(high, 3)],
                "peak_gib": round(program.peak_gib, 2),
                "parameters": program.about["parameters"],
            }

    def best(start: str) -> float:
        return min(v["update_s"] for k, v in figures.items() if k.startswith(start))

    ours = best("LoRe")
    ratios = {"r2dreamer": round(best("r2dreamer ") / ours, 2)}
    if not cuda:
        ratios["r2dreamer, memory kept"] = round(best("r2dreamer, memory kept") / ours, 2)
    return {**figures, "times ours, the better precision of each": ratios}


def make_parser(description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks of an update share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="size12m", help="a scale preset: size1m … size400m, cpu, debug")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("override", nargs="*", help="options of the program, after --: -- --batch_size 8")
    return parser


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--envs", type=int, default=1, help="envs that the policy acts for at once")
    parser.add_argument("--repeats", type=int, default=10, help="updates that are timed")
    parser.add_argument("--compare", metavar="DIR", help="a checkout of r2dreamer to compare with")
    parser.add_argument("--python", default=sys.executable, help="the interpreter for r2dreamer")
    parser.add_argument("--serve", action="store_true", help="one update for each line of the input")
    args = parser.parse_args()
    if args.serve:
        serve_updates(args)
        return
    if args.compare and (args.override or args.repeats < 2):
        parser.error("--compare takes no options of the program, and --repeats of 2 or more")
    result = compare(args) if args.compare else measure(args)
    print(json.dumps(result) if args.json else "\n".join(f"{k}: {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
