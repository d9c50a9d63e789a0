"""Where the time and the memory of an update go: by part of the algorithm, and by torch operation.

    python3 benchmarks/profile_update.py --size size12m --device cpu --precision bfloat16

The parts are timed as they are called forward; all gradients together are `backward`. A table of the
operations with the most time of their own follows. `--trace FILE` writes a timeline for Perfetto.
"""

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from update_speed import make_agent, make_batch, make_parser

from agent import Dreamer

WARMUP = 2  # updates before the profile
ROWS = 25  # operations in the table


def label(owner: object, name: str, text: str) -> None:
    """Let each call of `owner.name` be seen in the profile as `text`."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def labelled(*args: object, **kwargs: object) -> object:
        with record_function(text):
            return function(*args, **kwargs)

    setattr(owner, name, labelled)


def label_parts(agent: Dreamer) -> list[str]:
    """Label the parts of an update; returns their names."""
    world_model, behavior = agent.world_model, agent.behavior
    parts: list[tuple[object, str, str]] = [
        (world_model.encoder, "forward", "encoder"),
        (world_model.rssm, "observe", "posterior scan"),
        (world_model.decoder, "forward", "decoder"),
        (agent.policy, "imagine", "imagination"),
        (world_model, "loss", "world model losses (decoder within)"),
        (behavior, "loss", "behavior losses (imagination within)"),
        (agent.opt, "step", "optimizer"),
    ]
    for owner, name, text in parts:
        label(owner, name, text)
    label(torch.Tensor, "backward", "backward")
    return [text for _, _, text in parts] + ["backward"]


def profiled(
    function: Callable[[], object], device: torch.device, repeats: int, trace: str | None
) -> profile:
    """The profile of `repeats` calls; the timeline goes to the file `trace`."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    for _ in range(WARMUP):
        function()
    with profile(activities=activities) as result:
        for _ in range(repeats):
            function()
    if trace:
        result.export_chrome_trace(trace)
    return result


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=2, help="updates that are profiled")
    parser.add_argument("--trace", help="file for the timeline")
    args = parser.parse_args()
    agent, config, device = make_agent(args)
    batch = make_batch(config)
    names = label_parts(agent)
    result = profiled(lambda: agent.train(batch), device, args.repeats, args.trace)
    averages = result.key_averages()
    times = {event.key: event.cpu_time_total / args.repeats / 1e6 for event in averages}
    if args.json:
        print(json.dumps({name: times[name] for name in names}))
        return
    print("seconds per update, with the profiler's own cost:")
    for name in names:
        print(f"  {times[name]:8.4f}  {name}")
    column = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(averages.table(sort_by=column, row_limit=ROWS, max_name_column_width=50))


if __name__ == "__main__":
    main()
