"""Logs of a run: TensorBoard, metrics.jsonl, train.log, the console, and videos.

All files are in `logdir`. A write that fails (disk full) raises a UserError that names the file. Other
modules log to `logging.getLogger("lore")`, which ends up in train.log and on the console.
"""

import contextlib
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
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from basics import UserError, atomic_write, write_error

log = logging.getLogger("lore")

EVENTS = "events.out.tfevents."  # a number follows
HEAT_SHARE = 16  # height of the frame / height of the heat strip below it
VIDEO_FPS = 15
MIN_VIDEO_PIXELS = 256  # shorter side of an mp4
CONSOLE_METRICS = {  # metrics on the console, and their labels
    "env/episode_return": "return",
    "eval/episode_return": "eval",
    "loss/image": "image",
    "loss/reward": "reward",
    "loss/dyn": "dyn",
    "loss/policy": "policy",
    "loss/value": "value",
}


class Logger:
    """Collects metrics between writes and writes them to files and console under the same names.

    Args:
        logdir: Folder of the run; created if missing.
        total_steps: Env steps of the whole run, for the progress.
        fps: Frames per second of `video`.
        resume_step: Env step at which the run resumes; lines of later steps are dropped. None drops all.
        console: Whether to print to the standard output.
        wandb: Gets the same scalars and videos.
    """

    def __init__(
        self,
        logdir: str | Path,
        *,
        total_steps: int,
        fps: float,
        resume_step: int | None,
        console: bool = True,
        wandb: "WandbRun | None" = None,
    ):
        self._reset()
        logdir = Path(logdir)
        self._wandb = wandb
        self._total_steps = total_steps
        self._fps = fps
        self._shown: dict[str, float] = {}  # the last value of each of CONSOLE_METRICS
        self._noted: set[str] = set()
        self._step = resume_step or 0
        self._time = time.perf_counter()

        next_step = 0 if resume_step is None else resume_step + 1
        metrics_path = logdir / "metrics.jsonl"
        with _writing(logdir):
            logdir.mkdir(parents=True, exist_ok=True)
        dropped = _cut_metrics(metrics_path, next_step)
        with _writing(metrics_path):
            self._metrics = open(metrics_path, "ab")
        self._events = EventFile(logdir, purge_step=next_step)
        self._handlers = [_FileHandler(logdir / "train.log"), *([_ConsoleHandler()] if console else [])]
        for handler in self._handlers:
            logging.getLogger().addHandler(handler)  # the root logger gets the warnings of libraries, too
        log.setLevel(logging.INFO)
        logging.captureWarnings(True)
        if dropped:
            self.print(dropped)

    def _reset(self) -> None:
        self._sums: dict[str, float | torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._values: dict[str, float] = {}

    def add(self, metrics: dict[str, float | np.ndarray | torch.Tensor]) -> None:
        """Add scalars to the means of the next `write`. A NaN makes its mean NaN.

        Tensors are summed on their device without synchronisation.
        """
        for name, value in metrics.items():
            if np.ndim(value):
                raise ValueError(f"Metric {name} has shape {tuple(value.shape)}, expected a scalar.")
            value = value.detach().double() if isinstance(value, torch.Tensor) else float(value)
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def set(self, name: str, value: float | np.ndarray | torch.Tensor) -> None:
        """Set a value of the next `write`; the last one wins."""
        self._values[name] = float(value)

    def write(self, step: int) -> None:
        """Write and forget the metrics since the last write, and the speed as `env/fps`."""
        now = time.perf_counter()
        rate = (step - self._step) / max(now - self._time, sys.float_info.epsilon)
        self._step, self._time = step, now
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        metrics = {**means, **self._values, "env/fps": rate}
        self._reset()

        with _writing(self._metrics.name):
            self._metrics.write(json.dumps({"step": int(step), **metrics}).encode() + b"\n")
            self._metrics.flush()
        self._events.add(step, [Summary.Value(tag=name, simple_value=v) for name, v in metrics.items()])
        if self._wandb:
            self._wandb.log(step, metrics)
        self._shown |= {name: metrics[name] for name in CONSOLE_METRICS if name in metrics}
        self.print(self._line(step, rate))

    def _line(self, step: int, rate: float) -> str:
        parts = [f"step {step:,}/{self._total_steps:,} ({step / max(self._total_steps, 1):.1%})"]
        if rate:
            left = round(max(self._total_steps - step, 0) / rate)
            parts += [f"{rate:.4g} steps/s", f"ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"]
        shown = [(label, self._shown[name]) for name, label in CONSOLE_METRICS.items() if name in self._shown]
        return " | ".join(parts + [f"{label} {value:.4g}" for label, value in shown])

    def print(self, text: str) -> None:
        """Print a line to train.log and the console."""
        log.info("%s", text)

    def note(self, *lines: str) -> None:
        """Print those of the lines that were not noted before."""
        for line in lines:
            if line not in self._noted:
                self._noted.add(line)
                self.print(line)

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
        """The metrics added since the last write, as plain numbers, and the id of the W&B run."""
        return {
            "wandb": self._wandb and self._wandb.id,
            "sums": {name: float(total) for name, total in self._sums.items()},
            "counts": dict(self._counts),
            "values": dict(self._values),
        }

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        """Restore the metrics of `state`."""
        self._sums, self._counts, self._values = (dict(state[key]) for key in ("sums", "counts", "values"))

    def close(self) -> None:
        """Close the files."""
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


class EventFile:
    """A TensorBoard event file.

    torch's SummaryWriter writes in a thread: on a full disk it prints a stack trace, and `close` reports no
    error. This class writes synchronously.
    """

    def __init__(self, logdir: Path, purge_step: int):
        # TensorBoard reads the files in the order of their names, also if the clock was set back.
        numbers = (path.name.removeprefix(EVENTS) for path in logdir.glob(f"{EVENTS}*"))
        latest = max((int(number) for number in numbers if number.isdecimal()), default=0)
        self._path = logdir / f"{EVENTS}{max(time.time_ns(), latest + 1)}"
        with _writing(self._path):
            self._file = open(self._path, "ab")
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        # TensorBoard drops the values of this step and later ones from older files.
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
    """A run at Weights & Biases, with its files in {logdir}/wandb.

    wandb's own settings decide on the account and the upload: `wandb login`, WANDB_MODE=offline.

    Args:
        logdir: Folder of the run; created if missing.
        project: W&B project.
        config: All options, as plain values.
        run_id: Id of the run to resume, None for a new one. Its values of later steps stay.

    Raises UserError if the package is missing, and if wandb fails.
    """

    def __init__(self, logdir: str | Path, project: str, config: dict, run_id: str | None = None):
        try:
            import wandb  # large and rarely used
        except ModuleNotFoundError as error:
            raise UserError(
                "--wandb.enabled True needs the Python package wandb, which is not installed: "
                "pip install -r requirements/wandb.txt"
            ) from error
        self._video = wandb.Video
        self._errors = (wandb.Error, OSError)  # OSError: wandb's process has ended
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
                settings=wandb.Settings(console="off"),  # leave the standard output alone
            )
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")  # the x-axis

    @property
    def id(self) -> str:
        return self._run.id

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Log scalars of an env step."""
        # Not log(step=...): W&B drops values of earlier steps, which a resumed run repeats.
        with self._working():
            self._run.log({"step": step, **metrics})

    def video(self, step: int, name: str, gif: bytes) -> None:
        """Log an animated GIF of an env step."""
        with self._working():
            self._run.log({"step": step, name: self._video(io.BytesIO(gif), format="gif")})

    def close(self) -> None:
        """Wait until everything is uploaded."""
        with self._working():
            self._run.finish()

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
            raise UserError(
                f"Weights & Biases: {reason}. WANDB_MODE=offline keeps the data on this "
                "machine, --wandb.enabled False turns it off."
            ) from error


class Timer:
    """Shares of wall-clock time: `with timer("env"): ...`. Sections must not be nested."""

    def __init__(self):
        self._seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, section: str) -> Iterator[None]:
        """Count the time of the `with` block for `section`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[section] = self._seconds.get(section, 0.0) + time.perf_counter() - start

    def shares(self) -> dict[str, float]:
        """`time/{section}`: the shares, 0 to 1, of the time since the last call. Resets the timer."""
        now = time.perf_counter()
        elapsed = max(now - self._since, sys.float_info.epsilon)
        shares = {f"time/{section}": seconds / elapsed for section, seconds in self._seconds.items()}
        self._seconds, self._since = {}, now
        return shares


def encode_gif(frames: np.ndarray, fps: float) -> bytes:
    """A looping animated GIF of frames, uint8 [T, H, W, 3]."""
    first, *rest = [Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    # GIF's unit is 10 ms; browsers slow down frames of less than 20 ms.
    milliseconds = max(20, 10 * round(100 / fps))
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=milliseconds, loop=0)
    return buffer.getvalue()


def write_wav(path: str | Path, sound: np.ndarray, rate: int) -> None:
    """Write `sound`, int16 [samples, channels] of `rate` Hz, as a wav file, atomically. Raises UserError."""

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
    """Write frames as an mp4 file, atomically. Raises UserError if that fails.

    Args:
        frames: uint8 [T, H, W, C], or an iterable of frames [H, W, 3], which are not kept in memory. Small
            frames are enlarged by an integer factor; odd sizes get a black row or column, as the codec needs
            even ones.
        fps: frames per second.
        sound: as for `write_wav`; only the first two channels are used.
        rate: of the sound, in Hz.
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
    # In its own process group, ffmpeg does not receive the Ctrl-C that stops a run after its step.
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
            open(errors, "wb") as output,
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=output, **group) as ffmpeg,
        ):
            for frame in itertools.chain([first], frames):
                try:
                    ffmpeg.stdin.write(np.ascontiguousarray(frame).data.cast("B"))
                except OSError:  # ffmpeg has ended with an error
                    break
            with contextlib.suppress(OSError):
                ffmpeg.stdin.close()
        if ffmpeg.returncode:
            reason = errors.read_text(errors="replace").strip() or f"exit code {ffmpeg.returncode}"
            raise UserError(f"Cannot write {path}: ffmpeg says: {reason}")
        atomic_write(path, lambda file: file.write(temp.read_bytes()))


def add_heat_strip(frames: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Frames [T, H, W, C] with a strip below that shows values [T] of the last W steps, [T, H + h, W, 3].

    The newest is at the right. The smallest value is black, then red, yellow and white for the largest.
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
    """The first three channels of frames [T, H, W, C], or the first one as grey: [T, H, W, 3]."""
    if frames.ndim != 4 or frames.dtype != np.uint8 or not frames.size:
        raise ValueError(f"A video needs uint8 frames [T, H, W, C], got {frames.dtype} {frames.shape}.")
    return frames[..., :3] if frames.shape[-1] >= 3 else frames[..., :1].repeat(3, -1)


def _cut_metrics(path: Path, next_step: int) -> str:
    """Drop broken lines and those of `next_step` and later. Returns a report, or '' if there are none."""
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
    """The step of a line of metrics.jsonl, None for a broken line (a crash can truncate the last one)."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


@contextlib.contextmanager
def _writing(path: str | Path) -> Iterator[None]:
    """Turns an OSError into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error


class _FileHandler(logging.FileHandler):
    """Writes train.log; an error is raised, not printed as a stack trace."""

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
    """Prints to the standard output. The run outlives its terminal, or the reader of its pipe."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            encoding = sys.stdout.encoding or "utf-8"  # old Windows consoles lack most characters
            text = self.format(record).encode(encoding, "backslashreplace").decode(encoding)
            print(text, flush=True)
        except OSError:
            # Python flushes the standard output once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
