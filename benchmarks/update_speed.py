"""How long an update, a policy step and a replay sample take, and how much memory they need.

    python3 benchmarks/update_speed.py --size size12m --device cpu --precision float32 --json

`--size` takes any scale preset (`cpu` as well, with its own batch); Crafter's shapes, a replay full of
random steps. Times are medians in seconds. Peak memory is the process's on a CPU, torch's on a GPU.
"""

import argparse
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gymnasium
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import config as configs
import dreamer
from replay import Replay

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
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def measure(args: argparse.Namespace) -> dict:
    """All figures for one setting."""
    argv = ["--configs", "crafter", args.size, "--device", args.device, "--precision", args.precision]
    config = configs.load([*argv, "--compile", args.compile])
    if args.threads:
        torch.set_num_threads(args.threads)
    device = dreamer.choose_device(args.device)
    agent = dreamer.Dreamer(OBS_SPACE, ACT_SPACE, config, device)
    rssm, rng = config.rssm, np.random.default_rng(0)
    replay = Replay(
        OBS_SPACE | ACT_SPACE, 1, REPLAY_STEPS, config.batch_length, config.replay_context, 0,
        deter_size=rssm.deter, stoch_size=rssm.stoch, classes=rssm.classes,
    )  # fmt: skip
    for index in range(REPLAY_STEPS):
        replay.add(make_step(rng, 1, index == 0))
    batch = replay.sample(config.batch_size)
    batch.pop("where")
    start = time.perf_counter()
    agent.train(batch)
    first_update = time.perf_counter() - start
    update = median_seconds(lambda: agent.train(batch), args.repeats, device)

    obs, states = make_step(rng, args.envs, True), [agent.initial_state(args.envs)]

    def policy_step() -> None:
        _, states[0], _ = agent.act(obs, states[0], agent.rngs["act"])

    policy_step()
    return {
        "size": args.size,
        "device": dreamer.device_name(device),
        "precision": dreamer.precision(config, device),
        "compile": dreamer.compiles(config, device),
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="size12m", help="a scale preset: size1m … size400m, cpu, debug")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--compile", default="auto", choices=["auto", "True", "False"])
    parser.add_argument("--envs", type=int, default=1, help="envs that the policy acts for at once")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--repeats", type=int, default=10, help="updates that are timed")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    result = measure(parser.parse_args())
    lines = (
        json.dumps(result) if parser.parse_args().json else "\n".join(f"{k}: {v}" for k, v in result.items())
    )
    print(lines)


if __name__ == "__main__":
    main()
