"""Reads what the logger writes with the tools of users: TensorBoard, json, PIL, ffmpeg."""

import io
import json
import logging
import math
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from basics import UserError
from logger import Logger, Timer, write_mp4


@pytest.fixture
def make(tmp_path):
    """Creates loggers in one folder and closes them at the end."""
    made = []

    def make(resume_step=None, console=False, **options):
        options = {"total_steps": 1000, "fps": 10, **options}
        made.append(Logger(tmp_path / "run", resume_step=resume_step, console=console, **options))
        return made[-1]

    yield make
    for logger in made:
        logger.close()


def _lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]


def _tensorboard(tmp_path):
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    return events


def _moving_square(amount, height=16, width=24):
    frames = np.zeros((amount, height, width, 3), np.uint8)
    frames[..., 2] = 255
    for index in range(amount):
        frames[index, 4:8, 2 * index : 2 * index + 4] = [255, 0, 0]
    return frames


def test_write_has_the_means_since_the_last_write(make, tmp_path):
    logger = make()
    logger.add({"loss/a": 1.0, "loss/b": np.float32(5.0)})
    logger.add({"loss/a": torch.tensor(2.0, requires_grad=True)})
    logger.set("replay/size", 7)
    logger.set("replay/size", torch.tensor(8))
    logger.write(100)
    logger.write(200)
    first, second = _lines(tmp_path)
    first.pop("env/fps")
    assert first == {"step": 100, "loss/a": 1.5, "loss/b": 5.0, "replay/size": 8.0}
    assert set(second) == {"step", "env/fps"}


def test_nan_is_logged(make, tmp_path):
    logger = make()
    for value in (1.0, math.nan, 2.0):
        logger.add({"loss/a": value})
    logger.write(1)
    assert math.isnan(_lines(tmp_path)[0]["loss/a"])
    assert math.isnan(_tensorboard(tmp_path).Scalars("loss/a")[0].value)


def test_sums_are_exact_beyond_the_precision_of_float32(make, tmp_path):
    logger = make()
    logger.add({"loss/a": torch.tensor(2.0**24)})
    logger.add({"loss/a": torch.tensor(1.0)})
    logger.write(1)
    assert _lines(tmp_path)[0]["loss/a"] == (2**24 + 1) / 2


def test_tensorboard_and_jsonl_have_the_same_names_and_values(make, tmp_path):
    logger = make()
    for step in (10, 20):
        logger.add({"loss/image": step + 0.1, "crafter/success_rate/eat (raw) plant": 0.1, "huge": 1e20})
        logger.write(step)
    events = _tensorboard(tmp_path)
    for name in set().union(*_lines(tmp_path)) - {"step"}:
        written = [(line["step"], np.float32(line[name])) for line in _lines(tmp_path)]
        assert [(event.step, np.float32(event.value)) for event in events.Scalars(name)] == written
    assert set(events.Tags()["scalars"]) == set(_lines(tmp_path)[0]) - {"step"}


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves by: `clock[0] += seconds`."""
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    return clock


def test_fps_counts_env_steps_since_the_last_write(clock, make, tmp_path):
    logger = make(resume_step=1000)
    clock[0] += 10
    logger.write(1100)
    clock[0] += 2
    logger.write(1110)
    assert [line["env/fps"] for line in _lines(tmp_path)] == [10.0, 5.0]


def test_resumed_logger_writes_the_same_means(make, tmp_path):
    values = torch.rand(20, generator=torch.Generator().manual_seed(0))
    logger = make()
    for value in values[:7]:
        logger.add({"loss/a": value, "loss/b": float(value)})
    logger.set("replay/size", 3)
    torch.save(logger.state_dict(), tmp_path / "state.pt")
    resumed = make(resume_step=0)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for some in (logger, resumed):
        for value in values[7:]:
            some.add({"loss/a": value, "loss/b": float(value)})
        some.write(20)
    first, second = [{k: v for k, v in line.items() if k != "env/fps"} for line in _lines(tmp_path)]
    assert first == second
    assert first["replay/size"] == 3


def test_resume_drops_lines_of_later_steps(make, tmp_path):
    logger = make()
    for step in (10, 20, 21):
        logger.add({"loss/a": float(step)})
        logger.write(step)
    logger.close()
    resumed = make(resume_step=20)
    assert [line["step"] for line in _lines(tmp_path)] == [10, 20]
    resumed.add({"loss/a": -1.0})
    resumed.write(25)
    assert [line["step"] for line in _lines(tmp_path)] == [10, 20, 25]
    scalars = [(event.step, event.value) for event in _tensorboard(tmp_path).Scalars("loss/a")]
    assert scalars == [(10, 10.0), (20, 20.0), (25, -1.0)]
    assert "dropped 1 lines of step 21 and later" in (tmp_path / "run/train.log").read_text()


@pytest.mark.parametrize(
    "rest", [b'{"step": 3, "loss/a": 0.', b"\0\0\0\0", b"\xff\xfe\n", b"7\n", b'{"a": 1}']
)
def test_broken_line_is_dropped_and_reported(make, tmp_path, rest):
    path = tmp_path / "run/metrics.jsonl"
    path.parent.mkdir()
    path.write_bytes(b'{"step": 1, "loss/a": NaN}\n' + rest)
    make(resume_step=5).write(6)
    assert [line["step"] for line in _lines(tmp_path)] == [1, 6]
    assert "1 broken" in (tmp_path / "run/train.log").read_text()


def test_new_run_drops_old_metrics(make, tmp_path):
    make().write(10)
    make()
    assert _lines(tmp_path) == []


@pytest.fixture
def limit_files():
    """Limits the size of files, like a full disk."""
    resource = pytest.importorskip("resource", reason="needs limits of POSIX", exc_type=ImportError)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["metrics.jsonl", "train.log", "events"])
def test_file_that_cannot_grow_is_a_user_error_that_names_it(make, tmp_path, limit_files, name):
    logger = make(resume_step=0)
    (path,) = (tmp_path / "run").glob(f"{name}*")
    with open(path, "ab") as file:
        file.write(b" " * 100_000)
    limit_files(100_000)
    with pytest.raises(UserError, match=f"Cannot write .*{name}.*: File too large"):
        logger.write(1)


def test_printed_lines_and_warnings_are_on_the_console_and_in_train_log(make, tmp_path, capsys):
    before = list(logging.getLogger().handlers)
    logger = make(console=True)
    long = "C:\\[bold]runs[/bold] 100 % " + "x" * 100
    logger.print(long)
    logging.getLogger("some.library").warning("it %s", "broke")
    warnings.warn("old thing", DeprecationWarning, stacklevel=1)
    text, out = (tmp_path / "run/train.log").read_text(), capsys.readouterr().out
    assert long in out.splitlines()
    assert text.splitlines()[0].endswith(long) and text.startswith("20")
    for part in ("it broke", "old thing"):
        assert part in text and part in out
    logger.close()
    assert logging.getLogger().handlers == before


def test_each_write_is_one_line_with_the_last_returns(clock, make, tmp_path, capsys):
    logger = make(console=True)
    clock[0] += 10
    logger.add({"env/episode_return": 1.25, "eval/episode_return": 2.5, "loss/image": 123.0})
    logger.write(500)
    clock[0] += 1000
    logger.write(600)
    first, second = capsys.readouterr().out.splitlines()
    assert first == ("step 500/1,000 (50.0%) | 50 steps/s | ETA 0:00:10 | return 1.25 | eval 2.5 | image 123")
    assert "ETA 1:06:40 | return 1.25 | eval 2.5" in second
    assert (tmp_path / "run/train.log").read_text().endswith(second + "\n")


SCRIPT = """
import sys
from logger import Logger
logger = Logger(sys.argv[1], total_steps=10, fps=10, resume_step=None)
logger.print("日本")
for step in range(3):
    logger.print("x" * 100_000)
    logger.write(step)
logger.close()
"""


def test_run_outlives_the_reader_of_its_output(tmp_path):
    """And a console whose encoding lacks the characters."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "run")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    env = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], env=env, **pipes)
    assert process.stdout.readline().strip() == b"\\u65e5\\u672c"
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0
    assert len(_lines(tmp_path)) == 3


def test_video_is_a_gif_that_tensorboard_and_pil_can_read(make, tmp_path):
    frames = _moving_square(5)
    make(fps=10).video("eval_policy", frames, 70)
    (event,) = _tensorboard(tmp_path).Images("eval_policy")
    assert (event.step, event.width, event.height) == (70, 24, 16)
    gif = Image.open(io.BytesIO(event.encoded_image_string))
    assert (gif.format, gif.n_frames, gif.info["duration"], gif.info["loop"]) == ("GIF", 5, 100, 0)
    for index, frame in enumerate(frames):
        gif.seek(index)
        assert np.abs(np.asarray(gif.convert("RGB"), int) - frame).max() <= 8


@pytest.mark.parametrize(("channels", "shown"), [(1, [9, 9, 9]), (2, [9, 9, 9]), (4, [9, 10, 11])])
def test_video_shows_any_number_of_channels(make, tmp_path, channels, shown):
    frames = np.zeros((2, 8, 8, channels), np.uint8) + np.arange(9, 9 + channels, dtype=np.uint8)
    make().video("eval_policy", frames, 1)
    (event,) = _tensorboard(tmp_path).Images("eval_policy")
    gif = Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB")
    assert gif.getpixel((4, 4)) == tuple(shown)


def _decode(path):
    reader = imageio_ffmpeg.read_frames(path)
    info = next(reader)
    width, height = info["size"]
    return info, [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]


def test_mp4_shows_the_frames_large_enough_to_watch(tmp_path):
    frames = _moving_square(6)
    path = tmp_path / "videos/eval_1_0.mp4"
    write_mp4(path, frames, fps=12)
    info, decoded = _decode(path)
    assert (info["size"], info["fps"], len(decoded)) == ((24 * 16, 16 * 16), 12, 6)
    for frame, original in zip(decoded, frames, strict=True):
        enlarged = original.repeat(16, 0).repeat(16, 1)
        assert np.abs(frame.astype(int) - enlarged).mean() < 1  # blurred ones are at 1.5
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_mp4_of_odd_size_is_made_even(tmp_path):
    write_mp4(tmp_path / "odd.mp4", np.full((2, 257, 301, 3), 200, np.uint8), fps=10)
    info, decoded = _decode(tmp_path / "odd.mp4")
    assert info["size"] == (302, 258)
    assert abs(decoded[0][100, 100].astype(int) - 200).max() < 10


def test_failed_mp4_keeps_the_old_file(tmp_path):
    path = tmp_path / "video.mp4"
    path.write_bytes(b"old")
    with pytest.raises(UserError, match="video.mp4: ffmpeg says: "):
        write_mp4(path, _moving_square(2), fps=0)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


def test_timer_has_shares_of_the_time_since_the_last_call(clock):
    timer = Timer()
    for section, seconds in (("env", 2), ("train", 1), ("env", 2)):
        with timer(section):
            clock[0] += seconds
    clock[0] += 5
    assert timer.shares() == {"time/env": 0.4, "time/train": 0.1}
    with timer("env"):
        clock[0] += 1
    assert timer.shares() == {"time/env": 1.0}
