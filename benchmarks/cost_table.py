"""How the cost of an update grows with batch size, batch length, model size and the number of envs.

    python3 benchmarks/cost_table.py --base size1m --device cpu

Each line of the table is a process of its own: medians in seconds, the resident peak (on a GPU, torch's own
peak), and the share of the rate that a large matrix product reaches here in the same precision. Everything
that is no matrix product or convolution counts as time lost.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from update_speed import make_agent, make_batch, measure

MATRIX = 2048  # rows and columns of the product that sets the rate
BATCH_SIZES, BATCH_LENGTHS, SIZES, ENVS = (4, 8, 16, 32), (16, 32, 64, 128), ("size1m", "size12m"), (1, 4, 16)
COLUMNS = ("size", "batch", "envs", "update_s", "gflop", "matmul_share", "policy_step_s", "peak_memory_gib")


def matmul_rate(device: torch.device, precision: str) -> float:
    """Floating-point operations a second of a large matrix product; the best of five."""
    x = torch.randn(MATRIX, MATRIX, device=device, dtype=getattr(torch, precision))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        x @ x
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * MATRIX**3 / min(times)


def count_flops(args: argparse.Namespace) -> float:
    """Floating-point operations in matrix products and convolutions of an update, forward and backward."""
    agent, config, _ = make_agent(args)
    counter = FlopCounterMode(display=False)
    with counter:
        agent.train(make_batch(config))
    return counter.get_total_flops()


def one_line(args: argparse.Namespace) -> dict:
    """The figures of one setting."""
    result = measure(args)
    flops = count_flops(args)
    rate = matmul_rate(torch.device(args.device), result["precision"])
    share = flops / result["update_s"] / rate
    extra = {"envs": args.envs, "gflop": round(flops / 1e9), "matmul_share": round(share, 2)}
    return result | extra | {"matmul_gflops": round(rate / 1e9)}


def settings(base: str, sizes: list[str]) -> list[list[str]]:
    """The command line of each line: the base, then what differs from it in one thing."""
    lines = [["--size", size] for size in dict.fromkeys([base, *sizes])]
    lines += [["--size", base, "--", "--batch_size", str(b)] for b in BATCH_SIZES if b != 16]
    lines += [["--size", base, "--", "--batch_length", str(t)] for t in BATCH_LENGTHS if t != 64]
    lines += [["--size", base, "--envs", str(n)] for n in ENVS if n != 1]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="size1m", help="the size that the batch is varied for")
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), help="the sizes that are compared")
    parser.add_argument("--size", help="one line for this size, as JSON")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--envs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("override", nargs="*")
    args = parser.parse_args()
    if args.size:
        print(json.dumps(one_line(args)))
        return
    print("| " + " | ".join(COLUMNS) + " |\n" + "| --- " * len(COLUMNS) + "|")
    same = ["--device", args.device, "--precision", args.precision]
    same += ["--threads", str(args.threads), "--repeats", str(args.repeats)]
    for setting in settings(args.base, args.sizes):
        command = [sys.executable, __file__, *same, *setting]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        result = json.loads(output.splitlines()[-1])
        result["batch"] = "x".join(map(str, result["batch"]))
        print("| " + " | ".join(str(result[column]) for column in COLUMNS) + " |", flush=True)
    print(f"\nA matrix product reaches {result['matmul_gflops']} GFLOP/s in {result['precision']} here.")


if __name__ == "__main__":
    main()
