"""Check a machine: python3 doctor.py --configs crafter lore_full --logdir ./logdir

Takes the options of dreamer.py, and tells of each thing that such a run needs: `ok`, `todo` with what has to
be done before it can run, or `tip` with what could be better. It changes nothing, and needs no package to
start. Exit code 0, 1 if there is something to do, 2 for a mistake in the command.
"""

from __future__ import annotations  # an older Python is to be told so, not to stumble over this file

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import basics

ROOT = Path(__file__).parent
PYTHONS = ((3, 11), (3, 12), (3, 13))
OLDEST_TORCH = (2, 11)
KEYS = ("GEMINI_API_KEY", "GOOGLE_API_KEY", "OPENAI_API_KEY", "WANDB_API_KEY")
# Extras without which a run with these options stops. An env's own are told when it is made.
NEEDED = {"ray": lambda config: config.envs.parallel == "ray", "wandb": lambda config: config.wandb.enabled}
NEVER_DRAWN = "native"  # value of `obs` with which the dmc_* tasks need no OpenGL
BYTES_PER_PARAMETER = 12  # of a checkpoint: weights and the optimiser's two means, in float32
CERTAIN_SHARE = 0.9  # of the free disk that may be taken by what is sure to be written
NVIDIA_SMI_TIMEOUT = 60  # seconds; it takes some where the driver is asleep
GIB = 2**30


class Line(NamedTuple):
    status: str  # ok, todo or tip
    name: str
    text: str


class Asked(NamedTuple):
    """The run that the options ask for."""

    config: Any
    logdir: Path
    capacity: int | str  # of the replay; a resumed run keeps what it chose once
    notes: Sequence[str]  # what the options led to


def ok(name: str, text: str) -> Line:
    return Line("ok", name, text)


def todo(name: str, text: str) -> Line:
    return Line("todo", name, text)


def tip(name: str, text: str) -> Line:
    return Line("tip", name, text)


# --- Without any package -------------------------------------------------------------------------------


def check_python() -> Iterator[Line]:
    version, known = platform.python_version(), ", ".join(f"{a}.{b}" for a, b in PYTHONS)
    if sys.version_info[:2] < PYTHONS[0]:
        yield todo("Python", f"{version} is too old: install one of {known}")
    elif sys.version_info[:2] > PYTHONS[-1]:
        yield tip("Python", f"{version} is newer than what LoRe is tested with: {known}")
    elif sys.version_info[:2] == PYTHONS[-1]:
        yield ok("Python", f"{version}, for which there is no dm-control: the dmc_* tasks need 3.11 or 3.12")
    else:
        yield ok("Python", version)


def read_pins(path: Path) -> dict[str, str]:
    """The packages that a requirements file pins for this Python: name -> version. Other files that it
    includes are left out. Raises ValueError for a line that it does not understand.
    """
    pins = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        line = line.partition("#")[0].strip()
        if not line or line.startswith("-r "):
            continue
        found = re.fullmatch(r'([\w.-]+)==([\w.+]+)(?:; python_version < "(\d+)\.(\d+)")?', line)
        if not found:
            raise ValueError(f"{path.name}: {line}")
        if not found[3] or sys.version_info[:2] < (int(found[3]), int(found[4])):
            pins[found[1]] = found[2]
    return pins


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def compare(pins: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """(packages that are missing, those of another version as `name 1.0 (2.0 is pinned)`)."""
    found = {name: installed(name) for name in pins}
    missing = [name for name, version in found.items() if version is None]
    other = [
        f"{name} {version} ({pins[name]} is pinned)"
        for name, version in found.items()
        if version is not None and version.partition("+")[0] != pins[name]  # 2.13.0+cpu is 2.13.0
    ]
    return missing, other


def check_packages() -> Iterator[Line]:
    """What all runs need, and for each extra whether it is there and what it is for."""
    install = "pip install -r requirements.txt"
    missing, other = compare(read_pins(ROOT / "requirements.txt"))
    if missing:
        yield todo("packages", f"{', '.join(missing)} not installed: {install}")
    elif other:
        yield tip("packages", f"tested with other versions, {', '.join(other)}: {install}")
    else:
        yield ok("packages", "all of requirements.txt, in the pinned versions")


def check_extras(config: Any = None) -> Iterator[Line]:
    """Each requirements/*.txt; its first line says what it is for."""
    for path in sorted((ROOT / "requirements").glob("*.txt")):
        file = f"requirements/{path.name}"
        purpose = path.read_text(encoding="utf-8").splitlines()[0].strip("# .").replace("For ", "for ", 1)
        missing, other = compare(read_pins(path))
        needed = config is not None and path.stem in NEEDED and NEEDED[path.stem](config)
        if missing:
            status = "todo" if needed else "tip"
            text = f"{', '.join(missing)} not installed; {purpose}: pip install -r {file}"
            yield Line(status, "extra", text if needed else f"{text} if you want it")
        elif other:
            yield tip("extra", f"tested with other versions, {', '.join(other)}: pip install -r {file}")
        else:
            yield ok("extra", f"{file}, {purpose}")


def gpus() -> tuple[list[str], str]:
    """(names of the NVIDIA GPUs as the driver tells them, why it does not), without torch."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return [], ""
    command = [program, "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi does not answer ({type(error).__name__})"
    if done.returncode:
        return [], f"nvidia-smi: {first_line(done.stdout or done.stderr)}"
    return done.stdout.split("\n")[:-1], ""


def first_line(text: object) -> str:
    return (str(text).strip().splitlines() or [""])[0]


def check_cores(config: Any = None) -> Iterator[Line]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if config is not None and config.envs.parallel in ("process", "ray") and config.envs.amount > cores:
        yield tip("cores", f"{cores}, fewer than --envs.amount {config.envs.amount}: they take turns")
    elif config is not None and config.threads > cores:
        yield tip("cores", f"{cores}, fewer than --threads {config.threads}, which makes it slower: use 0")
    else:
        yield ok("cores", str(cores))


def check_keys() -> Iterator[Line]:
    """Whether there are keys in the environment. They are never shown."""
    for name in KEYS:
        value = os.environ.get(name, "")
        if value != value.strip():
            yield todo(name, "set, but with spaces or line ends around it: set it again without")
        else:
            yield ok(name, "set" if value else "not set")


def check_logdir(folder: Path) -> Iterator[Line]:
    """Whether a run may write there; nothing is left behind."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        yield todo("logdir", f"{place} is a file: name another --logdir")
        return
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=place) as trial:
            old, new = Path(trial, "old"), Path(trial, "new")
            old.write_bytes(b"1")
            new.write_bytes(b"2")
            os.replace(new, old)  # as every file of a run appears
    except OSError as error:
        yield todo("logdir", f"cannot write to {place} ({error.strerror}): change its rights or --logdir")
        return
    yield ok("logdir", f"{folder} can be written" + ("" if folder.exists() else ", and will be made"))


# --- With torch ----------------------------------------------------------------------------------------


def check_torch() -> Iterator[Line]:
    """PyTorch, and whether it can use the GPU that is here."""
    cards, trouble = gpus()
    try:
        import torch
    except Exception as error:  # of any kind: a library that does not load raises what it likes
        reason = first_line(error) if installed("torch") else "not installed"
        beside = f"; for {cards[0]} take a CUDA build, see PyTorch's own page" if cards else ""
        yield todo("torch", f"{reason}: pip install -r requirements.txt{beside}")
        return
    build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        yield todo("torch", f"{torch.__version__} is older than {oldest}: pip install -r requirements.txt")
    else:
        yield ok("torch", f"{torch.__version__}, {build}")
    if not torch.version.cuda and cards:
        base = torch.__version__.partition("+")[0]
        cure = f"install the CUDA build of {base} as PyTorch's own page says"
        yield todo("CUDA", f"this PyTorch cannot use {cards[0]}: {cure}")
    elif trouble:
        yield tip("CUDA", f"{trouble}; if there is a GPU, install its driver anew. Runs use the CPU")
    elif not cards and not torch.version.cuda:
        yield ok("CUDA", "no GPU; runs use the CPU")
    else:
        yield cuda_line(torch, cards)


def cuda_line(torch: Any, cards: Sequence[str]) -> Line:
    """Whether a PyTorch that was built for CUDA computes on a GPU, and in which precision."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = torch.cuda.is_available()
    if not found:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if not cards:
            return ok("CUDA", "no GPU; runs use the CPU")
        if hidden is not None:
            return tip("CUDA", f"CUDA_VISIBLE_DEVICES is {hidden!r}, which hides {cards[0]}: unset it")
        reason = first_line(told[-1].message) if told else "no reason given"
        cure = f"install a driver for CUDA {torch.version.cuda} or newer"
        return todo("CUDA", f"{cards[0]} does not work ({reason}): {cure}")
    try:
        torch.zeros(1, device="cuda") + 1
    except RuntimeError as error:
        return todo("CUDA", f"{cards[0] if cards else 'the GPU'} does not compute: {first_line(error)}")
    count, own = torch.cuda.device_count(), torch.cuda.get_device_properties(0)
    bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    free = torch.cuda.mem_get_info()[0] / GIB
    text = f"{count} x {own.name}, {free:.1f} of {own.total_memory / GIB:.1f} GiB free, "
    return ok("CUDA", text + ("bfloat16" if bfloat16 else "no bfloat16: float32 is used"))


# --- With all packages ---------------------------------------------------------------------------------


def check_device(config: Any) -> Iterator[Line]:
    """Where the run would compute, in which precision, and what it compiles with."""
    import distributed
    from agent import choose_device, compiles, count_gpus, precision
    from dreamer import device_name

    device = choose_device(distributed.local_device(config.device, config.parallel, count_gpus()))
    yield ok("device", f"{device_name(device)} in {precision(config, device)}")
    if compiles(config, device) and sys.platform == "linux":
        compiler = next(filter(shutil.which, (os.environ.get("CC", "cc"), "cc", "gcc", "clang")), None)
        if compiler:
            yield ok("compiler", f"{compiler}, for torch.compile")
        else:
            cure = "apt install gcc libc6-dev, or give --compile False, which is slower"
            yield todo("compiler", f"torch.compile needs a C compiler: {cure}")


def check_gl(config: Any) -> Iterator[Line]:
    """The OpenGL with which MuJoCo draws; only some tasks need one."""
    from basics import UserError
    from envs import rendering

    suite = config.task.partition("_")[0]
    needed = suite == "memorymaze" or (suite == "dmc" and config.obs != NEVER_DRAWN)
    if importlib.util.find_spec("mujoco") is None:
        yield ok("OpenGL", "not looked at: MuJoCo, which draws with it, is not installed")
        return
    try:
        yield ok("OpenGL", f"MuJoCo draws with {rendering.find_backend(config.task)}")
    except UserError as error:
        if needed:
            raise
        yield tip("OpenGL", f"not needed by {config.task}, but MuJoCo cannot draw. {error}")


def check_task(config: Any, spaces: dict) -> Iterator[Line]:
    """Whether the environment can be made. `spaces` gets what it observes, and what acts in it."""
    from envs import make_env

    env = make_env(config, "train", 0)
    try:
        spaces |= {"obs": dict(env.obs_space), "act": dict(env.act_space)}
        flags = ("reward", "is_first", "is_last", "is_terminal", "symbolic")
        seen = (key for key in env.obs_space if key not in flags and key[:4] != "log_")
        yield ok("task", f"{config.task} observes {', '.join(seen)}")
    finally:
        if hasattr(env, "close"):
            env.close()


def check_adviser(config: Any, spaces: dict) -> Iterator[Line]:
    from lore_llm.advice import AdviceSpec
    from lore_llm.backends import make_adviser
    from lore_llm.captions import make_captioner

    if not config.llm.enabled:
        yield ok("adviser", "not asked for")
        return
    captioner = make_captioner(config, spaces["obs"], spaces["act"])
    names = tuple(captioner.actions), tuple(captioner.subgoals)
    spec = AdviceSpec(*names, config.llm.features, config.llm.max_reply_chars, config.options.max_options)
    yield ok("adviser", " ".join(make_adviser(config.llm, spec, captioner, config.seed)[1]))


def check_room(asked: Asked, spaces: dict) -> Iterator[Line]:
    """Free memory against the replay, and free disk against what the run would write."""
    import replay
    from lore_llm.hooks import advice_spaces

    config, folder = asked.config, asked.logdir
    stored = spaces["obs"] | spaces["act"] | advice_spaces(config, spaces["act"])[0]
    rssm, window = config.rssm, config.batch_length + config.replay_context
    layout = replay.ring_layout(stored, rssm.deter, rssm.stoch, rssm.classes)
    plan = replay.plan(
        layout, config.envs.amount, window, asked.capacity, config.replay.backend,
        folder / "replay_ring", config.replay.sampler,
    )  # fmt: skip
    wanted = min(replay.MAX_CAPACITY, int(config.steps))
    if plan.capacity < wanted and asked.capacity == "auto":
        need = plan.nbytes / plan.capacity * wanted / GIB
        cure = f"{wanted} would need {need:.1f} GiB: --replay.capacity {wanted} --replay.backend memmap"
        yield tip("memory", f"{plan.line}. {cure} takes the disk")
    else:
        yield ok("memory", plan.line)
    yield from disk_lines(config, folder, plan, layout, replay.step_layout(stored), spaces)


def disk_lines(
    config: Any, folder: Path, plan: Any, layout: Mapping, step_layout: Mapping, spaces: dict
) -> Iterator[Line]:
    """`plan` is the replay's, `layout` that of its ring, and `step_layout` that of the episodes' files."""

    def step_bytes(parts: Mapping) -> int:
        total = 0
        for shape, dtype in parts.values():
            size = dtype.itemsize
            for side in shape:
                size *= side
            total += size
        return total

    checkpoints = config.keep_checkpoints * BYTES_PER_PARAMETER * parameters(config, spaces)
    latents = plan.capacity * (step_bytes(layout) - step_bytes(step_layout))
    certain = checkpoints + latents + (plan.nbytes if plan.backend == "memmap" else 0)
    steps = config.replay.keep_steps or config.steps / config.action_repeat
    episodes = steps * step_bytes(step_layout)
    free = basics.free_disk(folder)
    text = (
        f"{free / GIB:.1f} GiB free; checkpoints and replay take {certain / GIB:.1f} GiB, "
        f"episodes less than {episodes / GIB:.1f} GiB: they are compressed"
    )
    if certain > CERTAIN_SHARE * free:
        yield todo("disk", f"{text}. Free some space, or set --keep_checkpoints or --replay.capacity lower")
    elif certain + episodes > free:
        yield tip("disk", f"{text}. --replay.keep_steps {plan.capacity} deletes the oldest")
    else:
        yield ok("disk", text)


def parameters(config: Any, spaces: dict) -> int:
    """How many parameters world model, actor and critic have, without taking memory for them."""
    import torch

    import models
    import networks

    with torch.device("meta"):
        actions = networks.ActionVector(spaces["act"])
        world_model = models.WorldModel(spaces["obs"], actions, config)
        behavior = models.ImagBehavior(world_model.rssm.feat_size, actions, config)
    return sum(p.numel() for part in (world_model, behavior) for p in part.parameters())


# --- All of it -----------------------------------------------------------------------------------------


def attempt(name: str, check: Callable[..., Iterator[Line]], *args: Any) -> Iterator[Line]:
    """The lines of a check; where it fails, a line that says why: the other checks go on."""
    try:
        yield from check(*args)
    except ModuleNotFoundError as error:
        yield todo(name, f"cannot be looked at before the package {error.name} is installed")
    except Exception as error:  # of any kind: what is broken here may raise whatever it likes
        told = type(error).__name__ == "UserError"  # whose text is made for users; basics.py may be missing
        yield todo(name, str(error) if told else f"{type(error).__name__}: {first_line(error)}")


def examine(asked: Asked | None) -> Iterator[Line]:
    """All lines. `asked` is None where the packages that read the options are missing."""
    config = asked and asked.config
    yield from check_python()
    yield from attempt("packages", check_packages)
    yield from attempt("torch", check_torch)
    yield from attempt("cores", check_cores, config)
    if asked is None:
        free = f"{basics.free_memory() / GIB:.1f} GiB of RAM and {basics.free_disk('.') / GIB:.1f} of disk"
        yield ok("memory", f"{free} are free; what a run needs is told when the packages are there")
    else:
        spaces: dict = {}
        yield from (tip("options", note) for note in asked.notes)
        yield from attempt("device", check_device, config)
        yield from attempt("OpenGL", check_gl, config)
        yield from attempt("task", check_task, config, spaces)
        if spaces:  # else the task's line says what to do first
            yield from attempt("adviser", check_adviser, config, spaces)
            yield from attempt("memory", check_room, asked, spaces)
        yield from attempt("logdir", check_logdir, asked.logdir)
    yield from attempt("extra", check_extras, config)
    yield from check_keys()


def read_options(argv: list[str]) -> Asked | None:
    """What dreamer.py would do, or None where packages to read that are missing."""
    try:
        import config as configs
    except ModuleNotFoundError:
        return None
    try:
        from dreamer import read_command
    except Exception:  # of any kind; the lines about packages and torch tell of it
        config = configs.load(argv)
        return Asked(config, Path(config.logdir or "logdir"), config.replay.capacity, config.notes)
    command, capacity = read_command(argv), "auto"
    if command.resume:
        capacity = command.checkpoint["capacity"]
    if command.config.replay.capacity != "auto":
        capacity = command.config.replay.capacity
    return Asked(command.config, command.logdir, capacity, command.notes)


def main(argv: list[str] | None = None) -> int:
    """Tell of all that a run with these options needs. Returns the exit code: 0, 1 or 2."""
    argv = sys.argv[1:] if argv is None else argv
    if {"--help", "-h"} & set(argv):
        print(f"{__doc__}\nThe options are those of dreamer.py: python3 dreamer.py --help")
        return 0
    try:
        asked = read_options(argv)
    except Exception as error:
        if type(error).__name__ != "UserError":
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    worst = 0
    try:
        for line in examine(asked):
            print(f"{line.status:<5} {line.name:<14} {line.text}", flush=True)
            worst |= line.status == "todo"
    except BrokenPipeError:  # `| head`: nobody reads the rest, and Python flushes once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return int(worst)


if __name__ == "__main__":
    sys.exit(main())
