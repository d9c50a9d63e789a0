"""How long an all-reduce between processes of this machine takes, by gloo, as data-parallel learners do it.

    python3 benchmarks/allreduce.py --processes 2 --json

Of each count of numbers, for example of the parameters of a model: the best and the median of one all-reduce
of a flat float32 tensor, and from the best of the largest the rate at which a process sends and gets them. A
few numbers show what a message costs by itself. The processes have one thread each, and need a core each: on
a busy machine the median tells of the others.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

FEW, SIZE1M, SIZE12M = 8, 687_875, 10_498_259  # a step's counters; parameters of size1m and of size12m


def serve(rank: int, processes: int, store: str, counts: list[int], repeats: int, out: str) -> None:
    """One process: all-reduce each tensor; the first one writes its times."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    result = {}
    for count in counts:
        tensor, times = torch.ones(count), []
        for turn in range(repeats + 2):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(tensor)
            if turn >= 2:  # the first ones make connections and buffers
                times.append(time.perf_counter() - start)
        best, median = round(min(times), 6), round(statistics.median(times), 6)
        result[count] = {"best_s": best, "median_s": median, "bytes": 4 * count}
    if rank == 0:
        Path(out).write_text(json.dumps(result))
    dist.destroy_process_group()


def measure(processes: int, counts: list[int], repeats: int) -> dict:
    """Seconds by count of numbers, and the bytes a second of the largest."""
    with tempfile.TemporaryDirectory() as folder:
        store, out = f"{folder}/store", f"{folder}/out"
        multiprocessing.spawn(serve, (processes, store, counts, repeats, out), processes)
        result = json.loads(Path(out).read_text())
    largest = result[str(max(counts))]
    # A ring: each process sends, and gets, 2 (N - 1) / N times the tensor.
    sent = 2 * (processes - 1) / processes * largest["bytes"]
    return {**result, "processes": processes, "bytes_per_s": round(sent / largest["best_s"])}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--counts", type=int, nargs="+", default=[FEW, SIZE1M, SIZE12M])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = measure(args.processes, args.counts, args.repeats)
    if args.json:
        print(json.dumps(result))
    else:
        print("\n".join(f"{key:>12}  {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
