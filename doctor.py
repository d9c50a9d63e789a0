"""Check a machine: python3 doctor.py --configs crafter lore_full --logdir ./logdir

Takes the options of dreamer.py and checks what such a run needs. Each line is `ok`, `todo` (fix it before the
run) or `tip`; the last line is the verdict. It changes nothing, and starts without any package. Exit code 0,
1 if there is a todo, 2 for a mistake in the options.
"""

from __future__ import annotations  # an older Python can report that it is too old

import importlib.metadata
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from basics import UserError, first_line, free_disk

ROOT = Path(__file__).parent
OLDEST, NEWEST = (3, 11), (3, 13)  # Python versions
KEYS = ("GEMINI_API_KEY", "GOOGLE_API_KEY", "OPENAI_API_KEY", "WANDB_API_KEY")
FULL_SHARE = 0.9  # of the free disk
DRIVER_SECONDS = 5  # for nvidia-smi, which hangs with a broken driver
GIB = 2**30


class Line(NamedTuple):
    status: str  # ok, todo or tip
    name: str
    text: str


# Without any package


def check_python() -> Iterator[Line]:
    known = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
    if sys.version_info[:2] < OLDEST:
        yield Line("todo", "Python", f"{platform.python_version()} is too old: install {known}")
    else:
        status = "ok" if sys.version_info[:2] <= NEWEST else "tip"
        text = f"{platform.python_version()}; tested are {known}, dmc_* tasks need 3.11 or 3.12"
        yield Line(status, "Python", text)


def installed(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def check_packages(file: str = "requirements.txt") -> Iterator[Line]:
    missing = []
    for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
        if found := re.match(r'([\w.-]+)==[^;]+(?:; python_version < "(\d+)\.(\d+)")?', line):
            applies = not found[2] or sys.version_info[:2] < (int(found[2]), int(found[3]))
            missing += [found[1]] if applies and not installed(found[1]) else []
    if missing:
        yield Line("todo", "packages", f"{', '.join(missing)} not installed: pip install -r {file}")
    else:
        yield Line("ok", "packages", f"all of {file}")


def check_keys() -> Iterator[Line]:
    """Which keys are set. They are never printed."""
    for name in KEYS:
        value = os.environ.get(name, "")
        if value != value.strip():
            yield Line("todo", name, "has blanks or line ends around it: set it again")
        else:
            yield Line("ok", name, "set" if value else "not set")


# With packages


def has_gpu() -> bool:
    """Whether the NVIDIA driver finds a GPU."""
    try:
        done = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, timeout=DRIVER_SECONDS)
    except (OSError, subprocess.TimeoutExpired):  # no driver, or one that hangs
        return False
    return not done.returncode


def check_torch() -> Iterator[Line]:
    """PyTorch, and whether it computes on the GPU of this machine."""
    import torch

    yield Line("ok", "torch", torch.__version__)
    if not torch.cuda.is_available():  # it warns if the driver is too old
        if has_gpu():
            cure = (
                "install the CUDA build of PyTorch for your driver (pytorch.org), check CUDA_VISIBLE_DEVICES"
            )
            yield Line("todo", "CUDA", f"PyTorch cannot use the NVIDIA GPU: {cure}")
        else:
            yield Line("ok", "CUDA", "no GPU; runs use the CPU")
        return
    try:
        torch.zeros(1, device="cuda") + 1
    except RuntimeError as error:
        yield Line("todo", "CUDA", f"the GPU does not compute: {first_line(error)}")
        return
    free, total = torch.cuda.mem_get_info()
    precision = "" if torch.cuda.is_bf16_supported(including_emulation=False) else ", no bfloat16"
    gpu = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    yield Line("ok", "CUDA", f"{gpu}, {free / GIB:.1f} of {total / GIB:.1f} GiB free{precision}")


def check_device(config: Any) -> Iterator[Line]:
    """The device of the run, its precision, and the C compiler for torch.compile."""
    import distributed
    from dreamer import device_name
    from tools import choose_device, compiles, count_gpus, precision

    device = choose_device(distributed.local_device(config.device, config.parallel, count_gpus()))
    yield Line("ok", "device", f"{device_name(device)} in {precision(config, device)}")
    if compiles(config, device) and not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        cure = "apt install gcc libc6-dev, or --compile False"
        yield Line("todo", "compiler", f"torch.compile needs one: {cure}")


def check_gl(config: Any) -> Iterator[Line]:
    """OpenGL for tasks that MuJoCo renders. It is tried in another process."""
    from envs import rendering

    suite = config.task.partition("_")[0]
    if suite == "memorymaze" or (suite == "dmc" and config.obs != "native"):
        yield Line("ok", "OpenGL", f"MuJoCo draws with {rendering.find_backend(config.task)}")
    else:
        yield Line("ok", "OpenGL", f"not needed by {config.task}")


def check_task(config: Any, folder: Path) -> Iterator[Line]:
    """The environment, the adviser, and memory and disk for the replay."""
    from envs import make_env

    env = make_env(config, "train", 0)
    try:
        obs, act = dict(env.obs_space), dict(env.act_space)
    finally:
        getattr(env, "close", lambda: None)()
    flags = ("reward", "is_first", "is_last", "is_terminal", "symbolic")
    seen = (key for key in obs if key not in flags and not key.startswith("log_"))
    yield Line("ok", "task", f"{config.task} observes {', '.join(seen)}")
    yield from attempt("adviser", check_adviser, config, obs, act)
    yield from attempt("memory", check_room, config, folder, obs | act, act)


def check_adviser(config: Any, obs: dict, act: dict) -> Iterator[Line]:
    from lore_llm.advice import MAX_REPLY_CHARS, AdviceSpec
    from lore_llm.backends import make_adviser
    from lore_llm.captions import make_captioner

    if config.llm.enabled:
        captioner = make_captioner(config, obs, act)
        names = tuple(captioner.actions), tuple(captioner.subgoals)
        spec = AdviceSpec(*names, config.llm.features, MAX_REPLY_CHARS, config.options.max_options)
        yield Line("ok", "adviser", " ".join(make_adviser(config.llm, spec, captioner, config.seed)[1]))


def check_room(config: Any, folder: Path, spaces: dict, act: dict) -> Iterator[Line]:
    """Free memory for the replay, and free disk for the replay and the episodes."""
    import replay
    from lore_llm.hooks import advice_spaces

    spaces = spaces | advice_spaces(config, act)[0]
    layout = replay.ring_layout(spaces, config.rssm.deter, config.rssm.stoch, config.rssm.classes)
    plan = replay.plan(
        layout, config.envs.amount, config.batch_length + config.replay_context, config.replay.capacity,
        config.replay.backend, folder / "replay_ring", config.replay.sampler,
    )  # fmt: skip
    wanted = min(replay.MAX_CAPACITY, int(config.steps))
    if config.replay.capacity == "auto" and plan.capacity < wanted:
        cure = f"--replay.capacity {wanted} --replay.backend memmap uses the disk"
        yield Line("tip", "memory", f"{plan.line}. {cure}")
    else:
        yield Line("ok", "memory", plan.line)

    sizes = (math.prod(shape) * dtype.itemsize for shape, dtype in replay.step_layout(spaces).values())
    episodes = (config.replay.keep_steps or config.steps / config.action_repeat) * sum(sizes)
    ring, free = plan.nbytes * (plan.backend == "memmap"), free_disk(folder)
    text = f"{free / GIB:.1f} GiB free for {ring / GIB:.1f} GiB of replay, "
    text += f"less than {episodes / GIB:.1f} GiB of compressed episodes, and checkpoints"
    place = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(place, os.W_OK) or not place.is_dir():
        yield Line("todo", "disk", f"cannot write to {place}: change its permissions or --logdir")
    elif ring + GIB > FULL_SHARE * free:
        yield Line("todo", "disk", f"{text}: free some space, or lower --replay.capacity")
    elif ring + episodes > free:
        yield Line("tip", "disk", f"{text}. --replay.keep_steps {plan.capacity} deletes old episodes")
    else:
        yield Line("ok", "disk", text)


# All checks


def attempt(name: str, check: Callable[..., Iterator[Line]], *args: Any) -> Iterator[Line]:
    """The lines of a check; if it fails, a `todo` with the reason, so that the other checks follow."""
    try:
        yield from check(*args)
    except UserError as error:
        yield Line("todo", name, str(error))
    except Exception as error:  # broken packages raise anything
        yield Line("todo", name, f"{type(error).__name__}: {first_line(error)}")


def examine(argv: list[str]) -> Iterator[Line]:
    """The lines of all checks. Raises UserError for a mistake in the options."""
    basic = [*check_python(), *check_packages()]
    if not any(line.status == "todo" for line in basic):
        basic += attempt("torch", check_torch)
    if any(line.name == "torch" and line.status == "ok" for line in basic):
        from dreamer import read_command

        command = read_command(argv)
        config, folder = command.config, command.logdir.absolute()
        yield from basic
        yield from (Line("tip", "options", note) for note in command.notes)
        if config.envs.parallel == "ray":
            yield from check_packages("requirements/ray.txt")
        if config.wandb.enabled:
            yield from check_packages("requirements/wandb.txt")
        yield from attempt("device", check_device, config)
        yield from attempt("OpenGL", check_gl, config)
        yield from attempt("task", check_task, config, folder)
    else:
        yield from basic
    yield from check_keys()


def main(argv: list[str] | None = None) -> int:
    """Print all lines and the verdict. Returns the exit code: 0, 1 or 2."""
    argv = sys.argv[1:] if argv is None else argv
    if {"--help", "-h"} & set(argv):
        print(f"{__doc__}\nThe options are those of dreamer.py: python3 dreamer.py --help")
        return 0
    count = 0
    try:
        for line in examine(argv):
            print(f"{line.status:<5} {line.name:<14} {line.text}", flush=True)
            count += line.status == "todo"
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Not ready: {count} todo above." if count else "Ready.")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
