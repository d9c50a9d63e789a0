"""doctor.py tells what a run needs, also where nearly everything is missing, and never shows a key."""

import ast
import json
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
from run_helpers import TINY, train

import doctor
import replay

ROOT = Path(doctor.__file__).parent
KEY = "secret-key-of-the-test"


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """No keys, no GPU, and a MuJoCo that draws without a trial, which would take seconds."""
    for name in (*doctor.KEYS, "CUDA_VISIBLE_DEVICES", "MUJOCO_GL", "LORE_REPLAY_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("envs.rendering._works", lambda backend: backend == "osmesa")
    monkeypatch.chdir(tmp_path)


def lines(capsys, *argv: str, code: int = 0) -> dict[str, tuple[str, str]]:
    """What doctor.py says, as name: (status, text); of several lines with a name the last."""
    assert doctor.main([*TINY, *argv]) == code, capsys.readouterr()
    out = capsys.readouterr().out
    parts = [line.split(maxsplit=2) for line in out.splitlines()]
    assert {status for status, *_ in parts} <= {"ok", "todo", "tip"}
    return {name: (status, text) for status, name, text in parts}


def status_of(made) -> tuple[str, str]:
    (line,) = made
    return line.status, line.text


def nvidia_smi(folder: Path, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


# A whole machine


def test_a_machine_that_has_everything_is_ok(capsys, tmp_path):
    told = lines(capsys, "--logdir", "run")
    assert told["task"] == ("ok", "dummy_cue observes image")
    assert told["OpenGL"] == ("ok", "MuJoCo draws with osmesa")
    assert told["device"][1].startswith("cpu") and told["memory"][1].startswith("Replay: ")
    assert told["logdir"] == ("ok", "run can be written, and will be made")
    assert list(tmp_path.iterdir()) == []  # nothing was changed


def test_the_command_of_the_documents(capsys):
    assert doctor.main(["--configs", "crafter", "lore_full", "--logdir", "./logdir"]) == 0
    out = capsys.readouterr().out
    assert "Preset cpu added" in out and "the embedded rules" in out


def test_a_mistake_in_the_command_is_one_line(capsys):
    assert doctor.main(["--configs", "craftr"]) == 2
    assert (
        capsys.readouterr().err
        == "error: --configs craftr: there is no such preset; the nearest is crafter\n"
    )


def test_help(capsys):
    assert doctor.main(["--help"]) == 0
    assert "python3 doctor.py --configs" in capsys.readouterr().out


def test_a_checkpoint_says_the_options(capsys, tmp_path):
    assert train(tmp_path / "run", "--steps", "30", "--eval_every", "0") == 0
    assert doctor.main(["--from_checkpoint", str(tmp_path / "run")]) == 0
    assert "dummy_cue observes" in capsys.readouterr().out


# What is missing or broken


def bare(tmp_path: Path, *argv: str) -> subprocess.CompletedProcess:
    """doctor.py in a Python without any package."""
    venv = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = venv / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    return subprocess.run([python, ROOT / "doctor.py", *argv], capture_output=True, text=True)


def test_a_bare_python_is_told_what_to_install(tmp_path):
    done = bare(tmp_path, "--configs", "crafter", "--logdir", "run")
    assert done.returncode == 1 and done.stderr == ""
    (packages,) = (line for line in done.stdout.splitlines() if line.startswith("todo  packages"))
    assert packages.endswith("not installed: pip install -r requirements.txt")
    assert all(name in packages for name in ("torch", "ruamel.yaml", "crafter"))
    assert "todo  torch          not installed" in done.stdout and "GiB of RAM" in done.stdout
    assert bare(tmp_path, "--help").returncode == 0


def test_an_older_python_can_read_it():
    for name in ("doctor.py", "basics.py"):
        source = (ROOT / name).read_text(encoding="utf-8")
        ast.parse(source, feature_version=(3, 8))
        assert "from __future__ import annotations" in source


@pytest.mark.parametrize(
    ("version", "status"), [((3, 10, 1), "todo"), ((3, 12, 1), "ok"), ((3, 13, 1), "ok"), ((3, 14, 1), "tip")]
)
def test_versions_of_python(version, status, monkeypatch):
    monkeypatch.setattr(doctor, "sys", types.SimpleNamespace(version_info=version))
    assert status_of(doctor.check_python())[0] == status


@pytest.mark.parametrize("module", ["torch", pytest.param("crafter", marks=pytest.mark.slow)])
def test_a_package_that_cannot_be_imported_hides_nothing_else(module, tmp_path):
    script = f"import sys; sys.modules[{module!r}] = None; import doctor; sys.exit(doctor.main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "--configs", "crafter", "--logdir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "MUJOCO_GL": "egl"}
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{module}" in " ".join(line for line in done.stdout.splitlines() if line.startswith("todo"))
    assert "can be written" in done.stdout and "WANDB_API_KEY" in done.stdout


def test_packages_of_another_version_are_told(monkeypatch):
    have = {"torch": "2.12.0+cpu", "numpy": None}
    monkeypatch.setattr(
        doctor, "installed", lambda name: have.get(name, doctor.read_pins(ROOT / "requirements.txt")[name])
    )
    assert status_of(doctor.check_packages()) == (
        "todo", "numpy not installed: pip install -r requirements.txt",
    )  # fmt: skip
    del have["numpy"]
    status, text = status_of(doctor.check_packages())
    assert status == "tip" and "torch 2.12.0+cpu (2.13.0 is pinned)" in text


def test_all_requirements_are_understood():
    files = [ROOT / "requirements.txt", *(ROOT / "requirements").glob("*.txt")]
    pins = {file.name: doctor.read_pins(file) for file in files}
    assert pins["requirements.txt"]["torch"] and pins["gym.txt"]["box2d"]
    assert ("mujoco" in pins["requirements.txt"]) == (sys.version_info < (3, 13))


def test_an_unreadable_requirement_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("# For nothing.\nnumpy>=1\n")
    with pytest.raises(ValueError, match="a.txt: numpy>=1"):
        doctor.read_pins(tmp_path / "a.txt")


def test_extras_that_the_options_need_have_to_be_installed(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: None if name == "wandb" else "1")
    told = lines(capsys, "--wandb.enabled", "True", code=1)
    assert told["extra"] == (
        "todo", "wandb not installed; for logging to Weights & Biases: pip install -r requirements/wandb.txt",
    )  # fmt: skip
    assert lines(capsys)["extra"][0] == "tip"


def test_a_task_that_cannot_be_made(capsys):
    told = lines(capsys, "--task", "crafter_rewart", code=1)
    assert told["task"][0] == "todo" and "Did you mean crafter_reward?" in told["task"][1]
    assert "memory" not in told


# GPU


def fake_torch(**cuda):
    """A PyTorch built for CUDA; `cuda` are parts of torch.cuda."""

    def broken(*args, **kwargs):
        raise RuntimeError("CUDA error: no kernel image is available\nmore")

    return types.SimpleNamespace(
        __version__="2.13.0",
        version=types.SimpleNamespace(cuda="13.0"),
        cuda=types.SimpleNamespace(**{"is_available": lambda: True, **cuda}),
        zeros=broken,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell script")
def test_a_cpu_build_beside_a_gpu(tmp_path, monkeypatch):
    nvidia_smi(tmp_path, "echo NVIDIA H200")
    fake = fake_torch()
    fake.__version__, fake.version.cuda = "2.13.0+cpu", None
    monkeypatch.setitem(sys.modules, "torch", fake)
    build, cuda = doctor.check_torch()
    assert build == ("ok", "torch", "2.13.0+cpu, without CUDA")
    assert cuda.status == "todo" and "NVIDIA H200: install the CUDA build of 2.13.0" in cuda.text


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell script")
def test_a_driver_that_fails(tmp_path):
    nvidia_smi(tmp_path, "echo has failed because it could not communicate; exit 9")
    _, cuda = doctor.check_torch()
    assert cuda.status in ("tip", "todo") and "could not communicate" in cuda.text


def test_a_gpu_that_does_not_compute():
    line = doctor.cuda_line(fake_torch(), ["Tesla K80"])
    assert line == ("todo", "CUDA", "Tesla K80 does not compute: CUDA error: no kernel image is available")


def test_a_gpu_that_is_hidden_or_whose_driver_is_old(monkeypatch):
    def too_old():
        warnings.warn("The NVIDIA driver on your system is too old", stacklevel=1)
        return False

    line = doctor.cuda_line(fake_torch(is_available=too_old), ["GTX"])
    assert line.status == "todo" and "too old" in line.text and "CUDA 13.0 or newer" in line.text
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    line = doctor.cuda_line(fake_torch(is_available=lambda: False), ["GTX"])
    assert line.status == "tip" and "hides GTX" in line.text


@pytest.mark.parametrize(("fast", "text"), [(True, "bfloat16"), (False, "no bfloat16: float32 is used")])
def test_a_gpu_that_works(fast, text):
    torch = fake_torch(
        device_count=lambda: 2,
        get_device_properties=lambda index: types.SimpleNamespace(name="H200", total_memory=140 * 2**30),
        is_bf16_supported=lambda including_emulation: fast,
        mem_get_info=lambda: (100 * 2**30, 140 * 2**30),
    )
    torch.zeros = lambda *shape, device: 0
    line = doctor.cuda_line(torch, ["H200", "H200"])
    assert line == ("ok", "CUDA", f"2 x H200, 100.0 of 140.0 GiB free, {text}")


def test_a_device_that_is_not_there(capsys):
    told = lines(capsys, "--device", "cuda:7", code=1)
    assert told["device"][0] == "todo" and "cuda:7" in told["device"][1]


@pytest.mark.skipif(sys.platform != "linux", reason="LoRe compiles under Linux only")
def test_torch_compile_needs_a_compiler(capsys, tmp_path):
    told = lines(capsys, "--compile", "True", code=1)
    assert told["compiler"][0] == "todo" and "apt install gcc" in told["compiler"][1]
    (tmp_path / "gcc").write_text("#!/bin/sh\n")
    (tmp_path / "gcc").chmod(0o755)
    assert lines(capsys, "--compile", "True")["compiler"] == ("ok", "gcc, for torch.compile")


# OpenGL, memory, disk, cores


def test_opengl_is_only_needed_by_what_is_drawn_with_it(capsys, monkeypatch):
    monkeypatch.setattr("envs.rendering._works", lambda backend: False)
    told = lines(capsys)
    assert told["OpenGL"][0] == "tip" and "not needed by dummy_cue" in told["OpenGL"][1]
    told = lines(capsys, "--task", "dmc_walker_walk", "--obs", "pixels", code=1)
    assert told["OpenGL"][0] == told["task"][0] == "todo" and "libosmesa6" in told["OpenGL"][1]


def test_too_little_memory_for_the_replay(capsys, monkeypatch):
    monkeypatch.setattr(replay, "free_memory", lambda: 10**6)
    told = lines(capsys, "--replay.capacity", "100000", "--replay.backend", "tensor", code=1)
    assert told["memory"][0] == "todo" and "Set replay.capacity to auto" in told["memory"][1]
    told = lines(capsys, "--steps", "1e6", "--replay.capacity", "auto")
    assert told["memory"][0] == "tip" and "--replay.backend memmap" in told["memory"][1]


def test_too_little_disk(capsys, monkeypatch):
    monkeypatch.setattr(doctor.basics, "free_disk", lambda folder: 10**5)
    told = lines(capsys, code=1)
    assert told["disk"][0] == "todo" and "--keep_checkpoints" in told["disk"][1]
    monkeypatch.setattr(doctor.basics, "free_disk", lambda folder: 10**8)
    told = lines(capsys, "--steps", "1e6", "--replay.capacity", "1000")
    assert told["disk"][0] == "tip" and "--replay.keep_steps 1000" in told["disk"][1]


def test_the_size_of_a_checkpoint_is_foreseen(tmp_path):
    size = ("--encoder.cnn_depth", "32", "--rssm.deter", "256", "--steps", "40", "--eval_every", "0")
    assert train(tmp_path / "run", *size) == 0
    config, spaces = doctor.read_options([*TINY, *size]).config, {}
    list(doctor.check_task(config, spaces))
    foreseen = doctor.BYTES_PER_PARAMETER * doctor.parameters(config, spaces)
    assert 0.8 < foreseen / (tmp_path / "run" / "latest.pt").stat().st_size < 1.1


def test_more_envs_or_threads_than_cores(capsys):
    told = lines(capsys, "--envs.amount", "512", "--envs.parallel", "process", "--replay.capacity", "auto")
    assert told["cores"][0] == "tip" and "--envs.amount 512" in told["cores"][1]
    assert "--threads 1000" in lines(capsys, "--threads", "1000")["cores"][1]


# Keys


def test_keys_are_never_shown(capsys, monkeypatch):
    for name in doctor.KEYS:
        monkeypatch.setenv(name, KEY)
    assert doctor.main("--configs debug crafter lore_full --llm.backend gemini".split()) == 0
    shown = capsys.readouterr()
    assert KEY not in shown.out + shown.err and KEY[:6] not in shown.out + shown.err
    assert all(f"{name}" in shown.out for name in doctor.KEYS) and shown.out.count(" set\n") == len(
        doctor.KEYS
    )


def test_a_key_with_a_line_end_is_told_without_showing_it(capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
    told = lines(capsys, code=1)
    assert told["OPENAI_API_KEY"][0] == "todo" and KEY not in json.dumps(told)


def test_an_adviser_without_its_key(capsys):
    assert doctor.main("--configs crafter cpu lore_full --llm.backend gemini".split()) == 1
    out = capsys.readouterr().out
    assert any(line.startswith("todo  adviser") and "GEMINI_API_KEY" in line for line in out.splitlines())


# The logdir


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder that not even root may write to")
def test_an_unwritable_logdir(capsys):
    told = lines(capsys, "--logdir", "/proc/run", code=1)
    assert told["logdir"][0] == "todo" and "cannot write to /proc" in told["logdir"][1]


def test_more_learners_than_the_batch_has_sequences(capsys):
    told = lines(capsys, "--parallel", "3", code=1)
    assert told["device"][0] == "todo" and "batch_size" in told["device"][1]


def test_a_logdir_that_is_a_file(capsys, tmp_path):
    (tmp_path / "run").write_text("")
    told = lines(capsys, "--logdir", "run", code=1)
    assert told["logdir"][0] == "todo" and "is a file" in told["logdir"][1]
