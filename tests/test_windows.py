"""What can be tried of Windows elsewhere: its rules about files and processes are imitated for whole runs."""

import os
import re
import shlex
import signal
import subprocess
import sys

import pytest
from run_helpers import ROOT, TINY

import basics
import config as configs
import episodes
import replay
from basics import UserError, atomic_write

GUIDES = ("INSTALL_WINDOWS.md", "INSTALL_WINDOWS.ja.md")

# Every Python that is started with this on its path has no Unix modules and signals, no fork and no hard
# links, and refuses to replace or delete a file that this process has open or mapped.
IMITATION = """
import os, select, shutil, signal, sys
import filelock  # which has the locks of Windows there
for name in ("fcntl", "resource", "grp", "pwd", "termios"):
    sys.modules[name] = None
for module, names in ((os, ("fork", "forkpty", "killpg", "posix_fallocate", "getuid", "sched_getaffinity")),
                      (signal, ("SIGUSR1", "SIGUSR2", "SIGALRM", "SIGHUP", "SIGQUIT")), (select, ("poll",))):
    for name in names:
        delattr(module, name)
shutil._use_fd_functions = False
whole = {name: getattr(os, name) for name in ("replace", "rename", "unlink", "remove")}

def busy(path):
    path = os.path.realpath(path)
    for number in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{number}") == path:
                return True
        except OSError:
            continue
    with open("/proc/self/maps", encoding="utf-8") as maps:
        return any(line.rstrip().endswith(path) for line in maps)

def refusing(name):
    def call(*paths, **options):
        for path in paths:
            if busy(path):
                raise PermissionError(13, "The process cannot access the file", str(path))
        return whole[name](*paths, **options)
    return call

for name in whole:
    setattr(os, name, refusing(name))

def link(source, target, **options):
    raise OSError(1, "Incorrect function")
os.link = link
"""
# A run that Ctrl-C stops at env step 60.
STOPPED = """
import signal, sys
sys.path.insert(0, "tests")
from run_helpers import dreamer, signal_at
with signal_at(60, signal.SIGINT):
    sys.exit(dreamer.main(sys.argv[1:]))
"""
WHOLE = "import dreamer, sys; sys.exit(dreamer.main(sys.argv[1:]))"


@pytest.fixture
def windows(tmp_path):
    """A function that runs a script in the imitation: (exit code, output)."""
    if sys.platform != "linux":
        pytest.skip("the imitation looks into /proc")
    (tmp_path / "imitation").mkdir()
    (tmp_path / "imitation" / "sitecustomize.py").write_text(IMITATION)

    def run(script: str, *argv: str, **variables: str) -> tuple[int, str]:
        env = {**os.environ, "PYTHONPATH": str(tmp_path / "imitation"), "OMP_NUM_THREADS": "1", **variables}
        env |= {"PYTHONWARNDEFAULTENCODING": "1", "PYTHONWARNINGS": "default::EncodingWarning"}
        done = subprocess.run(
            [sys.executable, "-c", script, *argv], cwd=ROOT, env=env, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr

    return run


def test_the_imitation_refuses_what_windows_does(windows, tmp_path):
    script = """
import os, select, signal, numpy as np, sys
from pathlib import Path
a, b = Path(sys.argv[1], "a"), Path(sys.argv[1], "b")
b.write_bytes(bytes(8))
with open(a, "wb"):
    for call in (a.unlink, lambda: os.replace(b, a), lambda: os.link(b, "c")):
        try:
            call()
        except OSError:
            print("refused")
mapped = np.memmap(b)
try:
    b.unlink()
except PermissionError:
    print("refused")
del mapped
b.unlink()
print(hasattr(select, "poll"), hasattr(signal, "SIGUSR1"), b.exists())
"""
    assert windows(script, str(tmp_path)) == (0, "refused\n" * 4 + "False False False\n")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensor", "memmap"])
def test_a_run_with_spawned_workers_stops_and_resumes(backend, windows, tmp_path):
    command = [
        *TINY,
        "--envs.parallel",
        "process",
        "--configs",
        "lore_full",
        "--logdir",
        str(tmp_path / "run"),
    ]
    code, out = windows(STOPPED, *command, LORE_REPLAY_BACKEND=backend)
    assert code == 128 + signal.SIGINT and "Stopped by SIGINT" in out, out
    assert (tmp_path / "run" / "latest.pt").exists() and not (tmp_path / "run" / "replay_ring").exists()
    code, more = windows(WHOLE, *command, LORE_REPLAY_BACKEND=backend)
    assert code == 0 and "Resumed at step 60" in more, more
    assert ("files in" in more) == (backend == "memmap")
    assert not list((tmp_path / "run").rglob("*.tmp"))
    # Text is UTF-8 whatever the machine's own code page is, such as 932 of a Japanese Windows.
    own = [line for line in (out + more).splitlines() if "EncodingWarning" in line and str(ROOT) in line]
    elsewhere = (".venv", "/tests/")
    assert [line for line in own if not any(part in line for part in elsewhere)] == []


def test_a_file_that_is_open_for_a_moment_is_replaced_later(tmp_path, monkeypatch):
    """As virus scanners and readers hold them."""
    monkeypatch.setattr(basics, "WINDOWS", True)
    naps = []
    monkeypatch.setattr(basics.time, "sleep", naps.append)
    replace, refusals = os.replace, [True] * 3

    def busy(source, target):
        if refusals:
            refusals.pop()
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", busy)
    atomic_write(tmp_path / "file", lambda file: file.write(b"new"))
    assert (tmp_path / "file").read_bytes() == b"new" and len(naps) == 3


def test_an_episode_that_is_open_for_a_moment_is_set_aside_later(tmp_path, monkeypatch):
    (tmp_path / "20200101T000000-0-2.npz").touch()
    monkeypatch.setattr(basics, "WINDOWS", True)
    monkeypatch.setattr(basics.time, "sleep", lambda seconds: None)
    whole, refusals = os.replace, [True] * 3

    def busy(source, target):
        if refusals:
            refusals.pop()
            raise PermissionError(13, "Permission denied")
        whole(source, target)

    monkeypatch.setattr(os, "replace", busy)
    episodes.move_into(episodes.list_episodes(tmp_path), "newer")
    assert [path.name for path in (tmp_path / "newer").iterdir()] == ["20200101T000000-0-2.npz"]


def test_a_file_that_stays_open_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(basics, "WINDOWS", True)
    monkeypatch.setattr(basics.time, "sleep", lambda seconds: None)

    def busy(source, target):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", busy)
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(UserError, match="Permission denied"):
        atomic_write(tmp_path / "file", lambda file: file.write(b"new"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_elsewhere_a_refusal_is_told_at_once(tmp_path, monkeypatch):
    tries = []

    def refused(source, target):
        tries.append(target)
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(basics, "WINDOWS", False)
    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(UserError):
        atomic_write(tmp_path / "file", lambda file: file.write(b"new"))
    assert len(tries) == 1


# The variable


def test_the_variable_is_told_where_it_decides(monkeypatch):
    layout = replay.ring_layout({"reward": ((), "float32")}, 4, 2, 2)
    assert "LORE_REPLAY_BACKEND" not in replay.plan(layout, 1, 5, 100, "tensor").line
    monkeypatch.setenv("LORE_REPLAY_BACKEND", "tensor")
    plan = replay.plan(layout, 1, 5, 100, "memmap")
    assert plan.backend == "tensor" and "LORE_REPLAY_BACKEND" in plan.line
    assert "LORE_REPLAY_BACKEND" in configs.read().options["replay.backend"].help


# The guides


def blocks(guide: str) -> list[str]:
    text = (ROOT / guide).read_text(encoding="utf-8")
    return re.findall(r"^```powershell\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_both_guides_hold_the_same_commands():
    assert blocks(GUIDES[0]) == blocks(GUIDES[1])


COMMANDS = [line for block in blocks(GUIDES[0]) for line in block.splitlines()]
# Of Windows itself: they cannot be run elsewhere.
POWERSHELL = ("Set-ExecutionPolicy", "New-ItemProperty", ".venv\\Scripts\\Activate.ps1", "py -3.12 -m venv")


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_guide_are_understood(command, monkeypatch):
    from test_readme import understand_script

    if command.startswith(POWERSHELL):
        return
    if match := re.fullmatch(r'\$env:(\w+) = "(.+)"', command):
        assert match.groups() in {("LORE_REPLAY_BACKEND", "tensor"), ("GEMINI_API_KEY", "...")}
        return
    program, *words = shlex.split(command)
    if words[:3] == ["-m", "pip", "install"]:
        assert words[3] == "-r" and (ROOT / words[4]).is_file()
    elif program == "tensorboard" or words[:3] == ["-m", "pip", "uninstall"] or words == ["-m", "pytest"]:
        return  # as in the README; pip's own words
    else:
        assert program == "python"
        understand_script(words)


def test_what_has_to_keep_its_line_ends_is_named():
    attributes = (ROOT / ".gitattributes").read_text(encoding="utf-8")
    for name in ("start.sh", "Dockerfile", "Makefile", ".ci/run"):
        assert f"{name} text eol=lf" in attributes
        assert b"\r" not in (ROOT / name).read_bytes()
