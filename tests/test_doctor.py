"""doctor.py reports what a run needs, even without any package, and never prints a key."""

import subprocess
import sys
import types
from pathlib import Path

import pytest
from run_helpers import TINY

import doctor
import replay
from envs import rendering

ROOT = Path(doctor.__file__).parent
KEY = "secret-key-of-the-test"


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A machine without keys and GPU, with room, whatever the state of this one is."""
    for name in (*doctor.KEYS, "CUDA_VISIBLE_DEVICES", "MUJOCO_GL", "LORE_REPLAY_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(doctor, "has_gpu", lambda: False)
    monkeypatch.setattr(doctor, "free_disk", lambda folder: 10**12)
    monkeypatch.setattr(replay, "free_disk", lambda folder: 10**12)
    monkeypatch.setattr(replay, "free_memory", lambda: 10**12)
    monkeypatch.chdir(tmp_path)


def lines(capsys, *argv: str, code: int = 0) -> dict[str, tuple[str, str]]:
    """The lines of doctor.py as name: (status, text), without the verdict."""
    done = doctor.main([*TINY, *argv])
    out = capsys.readouterr().out
    assert done == code, out
    *found, verdict = out.splitlines()
    assert verdict.startswith("Not ready: " if code else "Ready.")
    parts = [line.split(maxsplit=2) for line in found]
    return {name: (status, text) for status, name, text in parts}


def test_complete_machine_is_ready(capsys, tmp_path):
    found = lines(capsys, "--logdir", "run")
    assert found["task"] == ("ok", "dummy_cue observes image")
    assert found["OpenGL"] == ("ok", "not needed by dummy_cue")
    assert found["device"][1].startswith("cpu") and found["memory"][1].startswith("Replay: ")
    assert list(tmp_path.iterdir()) == []


def test_mistake_in_the_options_is_one_line(capsys):
    assert doctor.main(["--configs", "craftr"]) == 2
    error = "error: --configs craftr: there is no such preset; the nearest is crafter\n"
    assert capsys.readouterr() == ("", error)


def test_bare_python_reports_what_to_install(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    python = tmp_path / "bare" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    done = subprocess.run([python, ROOT / "doctor.py", "--logdir", "run"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == ""
    (packages,) = (line for line in done.stdout.splitlines() if line.startswith("todo  packages"))
    assert packages.endswith("not installed: pip install -r requirements.txt")
    assert all(name in packages for name in ("torch", "ruamel.yaml", "crafter"))
    assert done.stdout.endswith("Not ready: 1 todo above.\n")


def test_extras_that_the_options_need_must_be_installed(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: name != "wandb")
    found = lines(capsys, "--wandb.enabled", "True", code=1)
    assert found["packages"] == ("todo", "wandb not installed: pip install -r requirements/wandb.txt")
    lines(capsys)


def fake_torch(available):
    """A PyTorch whose GPU does not compute."""

    def zeros(*args, **kwargs):
        raise RuntimeError("CUDA error: no kernel image is available\nmore")

    cuda = types.SimpleNamespace(is_available=available)
    return types.SimpleNamespace(__version__="2.13.0", cuda=cuda, zeros=zeros)


def test_gpu_that_does_not_compute(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", fake_torch(lambda: True))
    _, line = doctor.check_torch()
    assert line == ("todo", "CUDA", "the GPU does not compute: CUDA error: no kernel image is available")


def test_device_that_does_not_exist(capsys):
    found = lines(capsys, "--device", "cuda:7", code=1)
    assert found["device"][0] == "todo" and "cuda:7" in found["device"][1]


def test_tasks_that_mujoco_renders_need_opengl(capsys, monkeypatch):
    monkeypatch.setattr(rendering, "_works", lambda backend: False)
    found = lines(capsys, "--task", "dmc_walker_walk", "--obs", "pixels", code=1)
    assert found["OpenGL"][0] == found["task"][0] == "todo" and "libosmesa6" in found["OpenGL"][1]


def test_too_little_memory_for_the_replay(capsys, monkeypatch):
    monkeypatch.setattr(replay, "free_memory", lambda: 10**6)
    found = lines(capsys, "--replay.capacity", "100000", "--replay.backend", "tensor", code=1)
    assert found["memory"][0] == "todo" and "Set replay.capacity to auto" in found["memory"][1]
    found = lines(capsys, "--steps", "1e6", "--replay.capacity", "auto")
    assert found["memory"][0] == "tip" and "--replay.backend memmap" in found["memory"][1]


def test_too_little_disk(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "free_disk", lambda folder: 10**8)
    assert "lower --replay.capacity" in lines(capsys, code=1)["disk"][1]
    monkeypatch.setattr(doctor, "free_disk", lambda folder: 2 * 10**9)
    found = lines(capsys, "--steps", "1e7", "--replay.capacity", "1000")
    assert found["disk"][0] == "tip" and "--replay.keep_steps 1000" in found["disk"][1]


def test_keys_are_never_printed(capsys, monkeypatch):
    for name in doctor.KEYS:
        monkeypatch.setenv(name, KEY)
    assert doctor.main("--configs debug crafter lore_full --llm.backend gemini".split()) == 0
    shown = capsys.readouterr()
    assert KEY[:6] not in shown.out + shown.err
    assert all(name in shown.out for name in doctor.KEYS)
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
    found = lines(capsys, code=1)
    assert found["OPENAI_API_KEY"][0] == "todo" and KEY not in str(found)


def test_adviser_without_its_key(capsys):
    assert doctor.main("--configs crafter cpu lore_full --llm.backend gemini".split()) == 1
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("todo"))
    assert line.split()[1] == "adviser" and "GEMINI_API_KEY" in line
