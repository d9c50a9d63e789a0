"""What a run tells: TensorBoard, metrics.jsonl, train.log, the console, and videos.

Everything is written to `logdir`. A write that fails (disk full) is a UserError that names the file.
Other modules report through `logging.getLogger("lore")`; it ends in train.log and on the console.
"""

import contextlib
import datetime
import io
import itertools
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import wave
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.live import Live
from rich.text import Text
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from basics import UserError, atomic_write, write_error

log = logging.getLogger("lore")

REFRESH_SECONDS = 0.25  # of the live line
LONGEST_SECONDS = 86_399_999_999_999  # that a timedelta can tell; a run may have no end in sight
EVENTS = "events.out.tfevents."  # a number follows
HEAT_SHARE = 16  # the heat strip under a video is so many times lower than the frame
MAX_NOTES = 20  # of a learner beside the first, between two logs
MAX_NOTE = 4000  # characters of one
VIDEO_FPS = 15
MIN_VIDEO_PIXELS = 256  # shorter side of an mp4
CONSOLE_METRICS = {  # what the console shows, and how it is called there
    "env/episode_return": "return",
    "eval/episode_return": "eval",
    "loss/image": "image",
    "loss/reward": "reward",
    "loss/dyn": "dyn",
    "loss/policy": "policy",
    "loss/value": "value",
}


class Logger:
    """Collects scalars between writes and tells them to files and console under the same names.

    Args:
        logdir: Folder of the run; made if missing.
        total_steps: Env steps of the whole run, for the progress.
        fps: Frames a second of `video`.
        resume_step: Env step from which the run goes on; what was logged for later steps is dropped. None
            starts from nothing and drops all.
        console: False is silent; a rich Console takes the place of the standard output.
        wandb: Is told the same scalars and videos.
    """

    def __init__(
        self,
        logdir: str | Path,
        *,
        total_steps: int,
        fps: float,
        resume_step: int | None,
        console: bool | Console = True,
        wandb: "WandbRun | None" = None,
    ):
        logdir = Path(logdir)
        self._wandb = wandb
        self._total_steps = total_steps
        self._fps = fps
        self._sums: dict[str, float | torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._values: dict[str, float] = {}
        self._shown: dict[str, float] = {}  # the newest value of each of CONSOLE_METRICS
        self._step = resume_step or 0
        self._time = time.perf_counter()
        self._rate = 0.0  # env steps a second
        self._refreshed = 0.0

        next_step = 0 if resume_step is None else resume_step + 1
        metrics_path = logdir / "metrics.jsonl"
        with _writing(logdir):
            logdir.mkdir(parents=True, exist_ok=True)
        dropped = _cut_metrics(metrics_path, next_step)
        with _writing(metrics_path):
            self._metrics = open(metrics_path, "ab")
        self._events = EventFile(logdir, purge_step=next_step)
        self._handlers: list[logging.Handler] = [_FileHandler(logdir / "train.log")]
        self._console: _ConsoleHandler | None = None
        if console:
            self._console = _ConsoleHandler(console if isinstance(console, Console) else _Console())
            self._handlers.append(self._console)
        for handler in self._handlers:
            logging.getLogger().addHandler(handler)  # the root: warnings of libraries belong there as well
        log.setLevel(logging.INFO)
        logging.captureWarnings(True)
        if dropped:
            self.print(dropped)

    def add(self, metrics: dict[str, float | np.ndarray | torch.Tensor]) -> None:
        """Take part of the means that the next `write` tells. A NaN makes its mean NaN.

        Tensors are summed where they are, so that a GPU is not waited for.
        """
        for name, value in metrics.items():
            if np.ndim(value):
                raise ValueError(f"Metric {name} has shape {tuple(value.shape)}, expected a scalar.")
            value = value.detach().double() if isinstance(value, torch.Tensor) else float(value)
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def set(self, name: str, value: float | np.ndarray | torch.Tensor) -> None:
        """Let the next `write` tell this value; the last one wins."""
        self._values[name] = float(value)

    def write(self, step: int) -> None:
        """Tell everything since the last write, and the speed as `env/fps`, then start anew."""
        now = time.perf_counter()
        self._rate = (step - self._step) / max(now - self._time, sys.float_info.epsilon)
        self._step, self._time = step, now
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        metrics = {**means, **self._values, "env/fps": self._rate}
        self._sums, self._counts, self._values = {}, {}, {}

        with _writing(self._metrics.name):
            self._metrics.write(json.dumps({"step": int(step), **metrics}).encode() + b"\n")
            self._metrics.flush()
        self._events.add(step, [Summary.Value(tag=name, simple_value=v) for name, v in metrics.items()])
        if self._wandb:
            self._wandb.log(step, metrics)
        self._shown |= {name: metrics[name] for name in CONSOLE_METRICS if name in metrics}
        log.info(self._line(step), extra={"progress": True})

    def progress(self, step: int) -> None:
        """Move the live line on. Cheap: call it each step."""
        now = time.perf_counter()
        if self._console and self._console.live and now - self._refreshed >= REFRESH_SECONDS:
            self._refreshed = now
            self._console.show(self._line(step))

    def _line(self, step: int) -> str:
        parts = [f"step {step:,}/{self._total_steps:,} ({step / max(self._total_steps, 1):.1%})"]
        if self._rate:
            left = min(max(self._total_steps - step, 0) / self._rate, LONGEST_SECONDS)
            parts += [f"{self._rate:.4g} steps/s", f"ETA {datetime.timedelta(seconds=round(left))}"]
        shown = [(label, self._shown[name]) for name, label in CONSOLE_METRICS.items() if name in self._shown]
        return " | ".join(parts + [f"{label} {value:.4g}" for label, value in shown])

    def print(self, text: str) -> None:
        """Tell a line to train.log and the console."""
        log.info("%s", text)

    def note(self, text: str) -> None:
        """Tell a line that only this learner has to tell."""
        self.print(text)

    def take_notes(self) -> list[str]:
        """The notes that were kept since the last call, for another learner's log."""
        return []

    def video(self, name: str, frames: np.ndarray, step: int) -> None:
        """Show frames, uint8 [T, H, W, C], in TensorBoard and Weights & Biases as an animated GIF."""
        frames = _to_rgb(frames)
        height, width = frames.shape[1:3]
        gif = encode_gif(frames, self._fps)
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
        self._events.add(step, [Summary.Value(tag=name, image=image)])
        if self._wandb:
            self._wandb.video(step, name, gif)

    def state_dict(self) -> dict[str, dict[str, float] | str | None]:
        """What was added since the last write, as plain numbers, and the id of the run at W&B."""
        return {
            "wandb": self._wandb and self._wandb.id,
            "sums": {name: float(total) for name, total in self._sums.items()},
            "counts": dict(self._counts),
            "values": dict(self._values),
        }

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        """Go on adding to `state`."""
        self._sums, self._counts, self._values = (dict(state[key]) for key in ("sums", "counts", "values"))

    def close(self) -> None:
        """Close the files and give the terminal back."""
        logging.captureWarnings(False)
        for handler in self._handlers:
            logging.getLogger().removeHandler(handler)
            handler.close()
        try:
            with _writing(self._metrics.name):
                self._metrics.close()
        finally:
            self._events.close()
            if self._wandb:
                self._wandb.close()


class Collector(Logger):
    """The Logger of a learner beside the first: it collects, and keeps its notes for the first one's log."""

    def __init__(self):
        self._notes: list[str] = []
        self._left_out = 0  # notes that were too many
        self._handler = _Keeper(self)
        log.addHandler(self._handler)
        self._wandb = None
        self._sums: dict[str, float | torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._values: dict[str, float] = {}

    def write(self, step: int) -> None:
        """Start anew: the first learner has told it."""
        self._sums, self._counts, self._values = {}, {}, {}

    def print(self, text: str) -> None:
        """The first learner tells the same."""

    def note(self, text: str) -> None:
        if len(self._notes) < MAX_NOTES:
            self._notes.append(text if len(text) <= MAX_NOTE else f"{text[:MAX_NOTE]}...")
        else:
            self._left_out += 1

    def take_notes(self) -> list[str]:
        notes, left_out = self._notes, self._left_out
        self._notes, self._left_out = [], 0
        return notes + ([f"{left_out:,} more notes"] if left_out else [])

    def progress(self, step: int) -> None:
        """Nobody sees it."""

    def close(self) -> None:
        """Keep no more notes."""
        log.removeHandler(self._handler)


class _Keeper(logging.Handler):
    """Brings a Collector what other modules report; the console shows it at once, as without a Logger."""

    def __init__(self, collector: Collector):
        super().__init__(logging.WARNING)
        self._collector = collector

    def emit(self, record: logging.LogRecord) -> None:
        logging.lastResort.handle(record)
        self._collector.note(record.getMessage())


def merged_logs(states: Sequence[dict]) -> dict:
    """The `Logger.state_dict` of all that several have collected: sums and counts are added up."""
    merged = dict(states[0])
    for key in ("sums", "counts"):
        names = {name: 0 for state in states for name in state[key]}
        merged[key] = {name: sum(state[key].get(name, 0) for state in states) for name in names}
    return merged


class EventFile:
    """A TensorBoard event file.

    SummaryWriter writes in a thread. On a full disk that thread prints a stack trace and the caller learns of
    it late or, in `close`, never. This one writes at once.
    """

    def __init__(self, logdir: Path, purge_step: int):
        # TensorBoard reads them in the order of their names, so the clock may not go back.
        numbers = (path.name.removeprefix(EVENTS) for path in logdir.glob(f"{EVENTS}*"))
        latest = max((int(number) for number in numbers if number.isdecimal()), default=0)
        self._path = logdir / f"{EVENTS}{max(time.time_ns(), latest + 1)}"
        with _writing(self._path):
            self._file = open(self._path, "ab")
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        # TensorBoard forgets what older files say of this step and later ones.
        self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, values: list[Summary.Value]) -> None:
        """Write values of one step."""
        self._write(Event(step=step, summary=Summary(value=values)))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        with _writing(self._path):
            self._records.write(event.SerializeToString())
            self._records.flush()

    def close(self) -> None:
        """Close the file."""
        with _writing(self._path):
            self._file.close()


class WandbRun:
    """A run at Weights & Biases, whose files go to {logdir}/wandb.

    Whether and as whom it uploads is up to wandb's own settings: `wandb login`, WANDB_MODE=offline.

    Args:
        logdir: Folder of the run; made if missing.
        project: Of W&B.
        config: All options, as plain values.
        run_id: Of the run that is gone on with, None for a new one. What was told of later steps stays there.

    Raises UserError where the package is missing, and where it cannot start or go on.
    """

    def __init__(self, logdir: str | Path, project: str, config: dict, run_id: str | None = None):
        try:
            import wandb  # here, for it is large and seldom asked for
        except ModuleNotFoundError as error:
            raise UserError(
                "--wandb.enabled True needs the Python package wandb, which is not installed: "
                "pip install -r requirements/wandb.txt"
            ) from error
        self._video = wandb.Video
        self._errors = (wandb.Error, OSError)  # OSError: its process, to which all is sent, is gone
        logdir = Path(logdir).absolute()
        with _writing(logdir):
            logdir.mkdir(parents=True, exist_ok=True)
        with self._working():
            self._run = wandb.init(
                project=project,
                name=logdir.name,
                dir=logdir,
                config=config,
                id=run_id,
                resume="allow" if run_id else None,
                settings=wandb.Settings(console="off"),  # the standard output stays ours
            )
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")  # the x-axis

    @property
    def id(self) -> str:
        return self._run.id

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Tell scalars of an env step."""
        # Not log(step=...): W&B drops what comes for an earlier step, as it does after a crash.
        with self._working():
            self._run.log({"step": step, **metrics})

    def video(self, step: int, name: str, gif: bytes) -> None:
        """Tell an animated GIF of an env step."""
        with self._working():
            self._run.log({"step": step, name: self._video(io.BytesIO(gif), format="gif")})

    def close(self) -> None:
        """Wait until everything is told."""
        with self._working():
            self._run.finish()

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
            raise UserError(
                f"Weights & Biases: {reason}. WANDB_MODE=offline keeps all on this "
                "machine, and --wandb.enabled False goes on without."
            ) from error


class Timer:
    """Shares of wall-clock time: `with timer("env"): ...`. Sections do not nest."""

    def __init__(self):
        self._seconds: dict[str, float] = {}
        self._since = time.perf_counter()
        self._section: str | None = None

    @contextlib.contextmanager
    def __call__(self, section: str) -> Iterator[None]:
        """Count the time of the `with` block for `section`."""
        if self._section:
            raise RuntimeError(f"Timer section {section} inside section {self._section}.")
        self._section = section
        start = time.perf_counter()
        try:
            yield
        finally:
            self._section = None
            self._seconds[section] = self._seconds.get(section, 0.0) + time.perf_counter() - start

    def shares(self) -> dict[str, float]:
        """`time/{section}`: the part, 0 to 1, of the time since the last call; then start anew."""
        if self._section:
            raise RuntimeError(f"Timer shares asked for inside section {self._section}.")
        now = time.perf_counter()
        elapsed = max(now - self._since, sys.float_info.epsilon)
        shares = {f"time/{section}": seconds / elapsed for section, seconds in self._seconds.items()}
        self._seconds, self._since = {}, now
        return shares


def encode_gif(frames: np.ndarray, fps: float) -> bytes:
    """An animated GIF, repeating for ever, of frames, uint8 [T, H, W, 3]."""
    first, *rest = [Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    # GIF counts in 10 ms, and browsers slow down what is shorter than 20.
    milliseconds = max(20, 10 * round(100 / fps))
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=milliseconds, loop=0)
    return buffer.getvalue()


def write_wav(path: str | Path, sound: np.ndarray, rate: int) -> None:
    """Write `sound`, int16 [samples, channels] of `rate` Hz, as a wav file that appears whole or not at all.

    Raises UserError when it cannot be written.
    """

    def write(file: BinaryIO) -> None:
        with wave.open(file, "wb") as wav:
            wav.setparams((sound.shape[1], 2, rate, len(sound), "NONE", ""))
            wav.writeframes(sound.astype("<i2").tobytes())

    with _writing(path):
        atomic_write(path, write)


def write_mp4(
    path: str | Path,
    frames: np.ndarray | Iterable[np.ndarray],
    fps: float,
    sound: np.ndarray | None = None,
    rate: int = 0,
) -> None:
    """Write frames, uint8 [T, H, W, C], as an mp4 file that appears whole or not at all.

    Or anything that gives frames [H, W, 3] of one size: they are taken one by one, so a long video needs no
    memory.

    Small frames are enlarged by a whole factor, and odd sizes get a black row or column: the codec needs even
    ones. `sound` and `rate` are those of `write_wav`; of more than two channels the first two are taken.
    Raises UserError when it cannot be written.
    """
    frames = iter(_to_rgb(frames) if isinstance(frames, np.ndarray) else frames)
    first = next(frames)
    height, width = first.shape[:2]
    scale = max(1, -(-MIN_VIDEO_PIXELS // min(height, width)))
    filters = f"scale=iw*{scale}:ih*{scale}:flags=neighbor,pad=ceil(iw/2)*2:ceil(ih/2)*2"
    try:
        ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise UserError(f"Cannot write {path}: {error}") from error
    # In a group of its own, ffmpeg does not see the Ctrl-C with which a run is asked to finish its step.
    group = {"start_new_session": True}
    if os.name == "nt":
        group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    with _writing(path), tempfile.TemporaryDirectory() as folder:
        temp = Path(folder) / "video.mp4"
        command = [ffmpeg, "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"]
        command += ["-s", f"{width}x{height}", "-r", str(fps), "-i", "-"]
        if sound is not None:
            write_wav(Path(folder) / "sound.wav", sound[:, :2], rate)
            command += ["-i", str(Path(folder) / "sound.wav"), "-c:a", "aac"]
        command += ["-vf", filters, "-pix_fmt", "yuv420p", str(temp)]
        errors = Path(folder) / "errors.txt"
        with (
            open(errors, "wb") as told,
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=told, stderr=told, **group) as ffmpeg,
        ):
            for frame in itertools.chain([first], frames):
                try:
                    ffmpeg.stdin.write(np.ascontiguousarray(frame).data.cast("B"))
                except OSError:  # it has ended, and says why
                    break
            with contextlib.suppress(OSError):
                ffmpeg.stdin.close()
        if ffmpeg.returncode:
            reason = errors.read_text(errors="replace").strip() or f"exit code {ffmpeg.returncode}"
            raise UserError(f"Cannot write {path}: ffmpeg says: {reason}")
        atomic_write(path, lambda file: file.write(temp.read_bytes()))


def add_heat_strip(frames: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Frames [T, H, W, C] with a strip below, [T, H + h, W, 3]: the values [T] of the last W steps as heat.

    The newest is at the right. From the smallest value of all to the largest it goes from black over red and
    yellow to white.
    """
    frames = _to_rgb(frames)
    steps, height, width = frames.shape[:3]
    values = np.asarray(values, np.float64)
    heat = (values - values.min()) / (np.ptp(values) or 1)
    colors = np.clip(3 * heat[:, None] - np.arange(3), 0, 1)  # [T, 3]
    padded = np.concatenate([np.zeros((width - 1, 3)), colors])
    windows = np.lib.stride_tricks.sliding_window_view(padded, width, axis=0)  # [T, 3, W]
    strip = (255 * windows).astype(np.uint8).transpose(0, 2, 1)[:, None]  # [T, 1, W, 3]
    rows = max(1, height // HEAT_SHARE)
    return np.concatenate([frames, np.broadcast_to(strip, (steps, rows, width, 3))], 1)


def _to_rgb(frames: np.ndarray) -> np.ndarray:
    """Frames [T, H, W, 3] of frames [T, H, W, C]: their first three channels, or the first one as grey."""
    if frames.ndim != 4 or frames.dtype != np.uint8 or not frames.size:
        raise ValueError(f"A video needs uint8 frames [T, H, W, C], got {frames.dtype} {frames.shape}.")
    return frames[..., :3] if frames.shape[-1] >= 3 else frames[..., :1].repeat(3, -1)


def _cut_metrics(path: Path, next_step: int) -> str:
    """Drop the lines of `next_step` and later, and broken ones. Returns what was done, or ''."""
    if not path.exists():
        return ""
    with _writing(path):
        old = path.read_bytes()
    lines = old.splitlines()
    steps = [_step_of(line) for line in lines]
    known = [(line, step) for line, step in zip(lines, steps, strict=True) if step is not None]
    kept = [line + b"\n" for line, step in known if step < next_step]
    if b"".join(kept) == old:
        return ""
    atomic_write(path, lambda file: file.writelines(kept))
    later, broken = len(known) - len(kept), len(lines) - len(known)
    return f"{path}: dropped {later} lines of step {next_step} and later, and {broken} broken ones."


def _step_of(line: bytes) -> int | None:
    """The step of a line of metrics.jsonl, None for a broken line (a crash can cut off the last one)."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


@contextlib.contextmanager
def _writing(path: str | Path) -> Iterator[None]:
    """Turns what the file system refuses into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error


class _FileHandler(logging.FileHandler):
    """Writes train.log; an error is raised, not printed with a stack trace as logging does."""

    def __init__(self, path: Path):
        with _writing(path):
            super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)
            return
        with _writing(self.baseFilename):
            raise

    def close(self) -> None:
        with _writing(self.baseFilename):
            super().close()


class _ConsoleHandler(logging.Handler):
    """Prints to the console, in a terminal with a live line of progress below."""

    def __init__(self, console: Console):
        super().__init__()
        self._console = console
        self.live: Live | None = None
        if console.is_interactive:
            self.live = Live(console=console, auto_refresh=False, redirect_stderr=sys.stderr.isatty())
            self.live.start()

    def emit(self, record: logging.LogRecord) -> None:
        if self.live and getattr(record, "progress", False):
            self.show(record.getMessage())
        else:
            with self._outliving():
                # soft_wrap leaves long lines whole, but would crop the live line.
                self._console.print(self._text(self.format(record)), soft_wrap=not self.live)

    def show(self, line: str) -> None:
        """Put `line` into the place of the live line."""
        with self._outliving():
            self.live.update(self._text(line), refresh=True)

    def _text(self, text: str) -> Text:
        # Old Windows consoles know few characters: show the others as escapes.
        encoding = self._console.encoding
        return Text(text.encode(encoding, "backslashreplace").decode(encoding))

    @contextlib.contextmanager
    def _outliving(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._console.quiet = True  # the terminal is gone; the run goes on and train.log has it all

    def close(self) -> None:
        if self.live:
            with self._outliving():
                self.live.stop()
        super().close()


class _Console(Console):
    """The standard output; when its reader goes away the run does not end, as it would with rich's own."""

    def __init__(self):
        # FORCE_COLOR would let rich draw a live line into a pipe.
        super().__init__(highlight=False, force_interactive=None if sys.stdout.isatty() else False)

    def on_broken_pipe(self) -> None:
        with contextlib.suppress(SystemExit):
            super().on_broken_pipe()
