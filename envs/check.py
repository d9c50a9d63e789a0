"""Check an environment: python3 -m envs.check custom_task_name

Takes some hundred random steps and reports each fault with its cure. Options of dreamer.py may follow the
task. Exit code: 0, 1 if a fault would stop a run, 2 for a mistake in the command.
"""

import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gymnasium import spaces

import config as configs
import envs
from basics import UserError, derive_seed
from envs import adapter
from envs.adapter import Adapter, Fault, action_sampler, render_fault
from envs.wrappers import is_image

STEPS = 300  # at least, unless an error ends them
MAX_STEPS = 3000  # while fewer than two episodes have ended
MAX_SECONDS = 10  # for the steps beyond STEPS
REPEATED_STEPS = 50  # taken twice with the same seed
LEVELS = {
    "error": "training would stop",
    "warning": "training runs, but worse",
    "note": "fine if intended",
}


class Report:
    """The findings of a check: `faults`, and `lines` that describe the environment."""

    def __init__(self, task: str):
        self.task = task
        self.faults: list[Fault] = []
        self.lines: list[str] = []

    @property
    def errors(self) -> int:
        return sum(fault.level == "error" for fault in self.faults)

    def __str__(self) -> str:
        faults = sorted(self.faults, key=lambda fault: list(LEVELS).index(fault.level))
        shown = [
            f"{each.level} ({LEVELS[each.level]}): {each.what}\n    cure: {each.cure}" for each in faults
        ]
        worse = sum(fault.level != "note" for fault in faults)
        return "\n".join([*self.lines, *shown, f"faults: {worse}" if worse else f"{self.task} is fine"])


def check(config: Any) -> Report:
    """Check the environment of `config.task`. Raises UserError if it cannot be made."""
    report = Report(config.task)
    seed = _seed(config.seed)
    raw = None
    try:
        raw = envs.make_raw(config, seed)
        env = Adapter(raw, config.task, strict=False)
        report.faults = env.faults
        _describe(env, report)
        _roll(env, seed, report)
        if not report.errors:
            env.check_repeats(seed, REPEATED_STEPS)
            _render(env, report)
    except UserError as error:
        if raw is None:
            raise
        report.faults.append(Fault("error", *_split(error)))
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {error}, in {_place(error)}"
        known = next((fault.cure for fault in report.faults if fault.level == "error"), None)
        report.faults.append(Fault("error", what, known or "the environment's code raised it"))
    finally:
        if callable(getattr(raw, "close", None)):
            raw.close()
    return report


def _place(error: Exception) -> str:
    """The innermost line of the environment's file that raised an error."""
    frames = traceback.extract_tb(error.__traceback__)
    files = [frame.filename for frame in frames]
    own_files = (__file__, adapter.__file__, envs.__file__)
    ours = max((index for index, name in enumerate(files) if name in own_files), default=0)
    own = files[min(ours + 1, len(files) - 1)]
    line = next(frame.lineno for frame in reversed(frames) if frame.filename == own)
    return f"{Path(own).name} line {line}"


def _describe(env: Adapter, report: Report) -> None:
    for name, space in (("observations", env.obs_space), ("actions", env.act_space)):
        entries = space.items() if isinstance(space, Mapping) else [("", space)]
        report.lines.append(f"{name}: " + ", ".join(f"{key} {_brief(each)}".strip() for key, each in entries))
    report.lines += env.notes()


def _brief(space: spaces.Space) -> str:
    return f"{space.dtype} {list(space.shape)}" if isinstance(space, spaces.Box) else str(space)


def _roll(env: Adapter, seed: int, report: Report) -> None:
    """Take random steps over some episodes and measure their speed."""
    sample = action_sampler(env.act_space, seed)
    returns, total, steps, resets, reset_seconds = [], 0.0, 0, 0, 0.0
    start = time.perf_counter()
    done = True
    while steps < STEPS or (
        len(env.ends) < 2 and steps < MAX_STEPS and time.perf_counter() - start < MAX_SECONDS
    ):
        if done:
            before = time.perf_counter()
            env.reset(seed=_seed(seed, resets))
            reset_seconds += time.perf_counter() - before
            resets, total = resets + 1, 0.0
        _, reward, terminated, truncated, _ = env.step(sample())
        steps, total, done = steps + 1, total + reward, terminated or truncated
        if done:
            returns.append(total)
    seconds = time.perf_counter() - start - reset_seconds
    env.check_ends()
    report.lines.append(
        f"speed: {steps / seconds:,.0f} steps per second (checks included); "
        f"a reset takes {1000 * reset_seconds / resets:,.1f} ms"
    )
    if returns:
        lengths = [length for length, _ in env.ends]
        report.lines.append(
            f"random actions: {len(returns)} episodes of {min(lengths)} to {max(lengths)} steps, "
            f"returns {min(returns):.4g} to {max(returns):.4g}"
        )
    else:
        what, cure = f"no episode ended within {steps} steps", "if none ever does, set --time_limit N"
        report.faults.append(Fault("note", what, f"{cure}; an evaluation waits for the end"))


def _render(env: Adapter, report: Report) -> None:
    shown = any(is_image(space) for space in env.obs_space.values())
    if callable(getattr(env.env, "render", None)):
        try:
            fault = render_fault(env.render())
        except Exception as error:  # as in training, where only the video is lost
            what = f"render() raised {type(error).__name__}: {error}, in {_place(error)}"
            fault = Fault("warning", what, "fix it: there will be no video of an env without images")
    elif not shown:
        what = "there is no image and no render(): evaluations have no videos"
        fault = Fault("note", what, "add a render() for videos")
    else:
        fault = None
    if fault:
        report.faults.append(fault._replace(level="note") if shown else fault)


def _seed(seed: int, *names: int) -> int:
    return derive_seed(seed, "check", *names) % 2**32  # 32 bits, which every generator accepts


def _split(error: UserError) -> tuple[str, str]:
    what, _, cure = str(error).partition(" Cure: ")
    return what, cure or "see above"


def main(argv: list[str] | None = None) -> int:
    """Check the task of the command line. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if not argv or argv[0].startswith("-"):
            raise UserError("which task? Usage: python3 -m envs.check custom_task_name")
        report = check(configs.load(["--task", *argv]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report)
    return 1 if report.errors else 0


if __name__ == "__main__":
    sys.exit(main())
