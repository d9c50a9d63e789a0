"""Logging to Weights & Biases: offline runs, read from wandb's own files."""

import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_helpers import ROOT, differences, metrics, moment, train

from basics import UserError
from logger import Logger, WandbRun

ON = ["--wandb.enabled", "True", "--wandb.project", "tests"]
KEY = "0123456789abcdef" * 2 + "deadbeef"
BLOCK = 32768  # bytes of a block of wandb's files, which are logs of LevelDB with a header of 7 bytes


@pytest.fixture
def offline(monkeypatch):
    """The settings of a user who is logged in and works offline."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_SILENT", "true")


def records(path: Path):
    """The records in an offline run's file."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = path.read_bytes(), 7, b""
    while place < len(data):
        if BLOCK - place % BLOCK < 7:  # the rest of a block is padding
            place += BLOCK - place % BLOCK
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def history(logdir: Path) -> list[dict]:
    """The logged values in order, without those of wandb itself."""
    rows = []
    for path in sorted(logdir.glob("wandb/offline-run-*/*.wandb")):
        for record in records(path):
            if record.WhichOneof("record_type") == "history":
                items = {item.key or "/".join(item.nested_key): item for item in record.history.item}
                rows.append({k: json.loads(v.value_json) for k, v in items.items() if k[0] != "_"})
    return rows


def test_scalars_and_videos_are_logged_also_after_a_resume(offline, tmp_path):
    assert train(tmp_path, *ON, "--steps", "60", "--video_pred_log", "True") == 0
    time.sleep(1.1)  # wandb names folders by the second
    assert train(tmp_path, *ON, "--steps", "120", "--video_pred_log", "True") == 0
    rows = history(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    scalars = [row for row in rows if not any(name.endswith("/path") for name in row)]
    assert scalars == lines and len(lines) == 6
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and len({path.name.rpartition("-")[2] for path in folders}) == 1
    videos = [(row["step"], name, row[name]) for row in rows for name in row if name.endswith("/path")]
    names = ("eval_policy/path", "train_openl/path")
    assert [video[:2] for video in videos] == [(step, name) for step in (50, 100) for name in names]
    for _, _, path in videos:
        (gif,) = (tmp_path / "wandb").glob(f"offline-run-*/files/{path}")
        assert gif.read_bytes()[:3] == b"GIF"
    logged = [record for path in folders for record in records(next(path.glob("*.wandb")))]
    axes = {r.metric.glob_name: r.metric.step_metric for r in logged if r.HasField("metric")}
    assert axes["*"] == "step"
    runs = [record.run for record in logged if record.HasField("run")]
    assert {run.project for run in runs} == {"tests"} and {run.display_name for run in runs} == {
        tmp_path.name
    }
    options = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert options["rssm"]["deter"] == 8
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


@pytest.mark.slow
def test_wandb_changes_nothing_else(offline, tmp_path):
    assert train(tmp_path / "on", *ON) == train(tmp_path / "off") == 0
    assert metrics(tmp_path / "on") == metrics(tmp_path / "off") != []
    found = differences(moment(tmp_path / "on"), moment(tmp_path / "off"))
    assert [line.partition(":")[0] for line in found] == ["/logger/wandb"]


def test_missing_package_is_named_at_the_start(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert train(tmp_path / "run", *ON) == 2
    assert "pip install -r requirements/wandb.txt" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_missing_login_is_a_user_error(tmp_path):
    pytest.importorskip("wandb")
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    env |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    script = "import sys, logger; logger.WandbRun(sys.argv[1], 'tests', {})"
    command = [sys.executable, "-c", script, str(tmp_path)]
    options = {"cwd": ROOT, "env": env, "capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    done = subprocess.run(command, **options)
    last = done.stderr.splitlines()[-1]
    assert done.returncode and "UserError: Weights & Biases: " in last
    assert "wandb login" in last and "WANDB_MODE=offline" in last


def test_lost_connection_is_a_user_error(offline, tmp_path, monkeypatch):
    run = WandbRun(tmp_path, "tests", {})
    logger = Logger(tmp_path, total_steps=10, fps=5, resume_step=None, console=False, wandb=run)
    logger.write(1)

    def gone(*_):
        raise ConnectionResetError("Connection lost")  # as when its process was killed

    monkeypatch.setattr(run._run, "log", gone)
    with pytest.raises(UserError, match="Weights & Biases: Connection lost. WANDB_MODE=offline"):
        logger.write(2)
    logger.close()
