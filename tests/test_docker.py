"""The container's files, as far as they can be tried without a Docker engine."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import doctor

ROOT = Path(doctor.__file__).parent
# What `docker` and `nvidia-smi` are in these tests: they write down how they were called.
FAKE = """#!/bin/sh
echo "$(basename "$0") $* | ${LORE_USER-} ${LORE_RUNTIME-}" >> "$CALLS"
case "$1 $2" in
  "compose version") exit ${COMPOSE-0} ;;
  "info --format") echo "$RUNTIMES"; exit ${ENGINE-0} ;;
  "--query-gpu=name "*) exit 0 ;;
esac
"""

needs_bash = pytest.mark.skipif(sys.platform == "win32", reason="needs bash; start.sh is for WSL there")


def instructions() -> list[tuple[str, str]]:
    """(word, rest) of each instruction of the Dockerfile, continued lines joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def of(word: str) -> list[str]:
    return [rest for found, rest in instructions() if found == word]


def ignored(path: str) -> bool:
    """Whether .dockerignore leaves a path out: its own patterns only, which name no file inside a folder."""
    patterns = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [pattern.removeprefix("**/") for pattern in patterns if pattern and pattern[0] != "#"]
    return any(part in patterns for part in Path(path).parts)


def test_the_base_image_is_pinned():
    (base,) = of("FROM")
    assert re.fullmatch(r"python:3\.(11|12)\.\d+-slim-\w+", base)


def test_what_is_copied_exists_and_is_not_ignored():
    for rest in of("COPY"):
        source, target = (word for word in rest.split() if not word.startswith("--"))
        assert (ROOT / source).exists() and not ignored(source), source
        assert target in (".", "./") or target == f"{source}/"
    needed = [*doctor.ROOT.glob("*.py"), ROOT / "configs.yaml", ROOT / "envs" / "tv_pictures.py"]
    assert not any(ignored(str(path.relative_to(ROOT))) for path in needed)
    for name in (".git", ".venv", "logdir", ".env", "envs/__pycache__"):
        assert ignored(name), name


@needs_bash
def test_commands_of_the_image_parse():
    assert len(of("RUN")) == 4
    for command in of("RUN"):
        done = subprocess.run(["sh", "-n", "-c", command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_extras_of_the_image_exist():
    values = dict(rest.split("=", 1) for rest in of("ARG"))
    extras = values["EXTRAS"].strip('"').split()
    assert extras and all((ROOT / "requirements" / f"{extra}.txt").is_file() for extra in extras)
    assert f"${{EXTRAS:-{' '.join(extras)}}}" in (ROOT / "docker-compose.yml").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("apt-cache") is None, reason="needs Debian or Ubuntu")
def test_debian_packages_of_the_image_exist():
    (command,) = (rest for rest in of("RUN") if "apt-get" in rest)
    words = shlex.split(command.partition("install")[2].partition("&&")[0])
    packages = [word for word in words if not word.startswith("-")]
    assert "libosmesa6" in packages
    if not list(Path("/var/lib/apt/lists").glob("*Packages*")):
        pytest.skip("apt-get update was not run here")
    for package in packages:
        done = subprocess.run(["apt-cache", "show", package], capture_output=True)
        assert done.returncode == 0, package


def test_the_image_does_not_run_as_root():
    assert of("USER") == ["1000"] and "--uid 1000" in " ".join(of("RUN"))
    words = [word for word, _ in instructions()]
    assert words.index("USER") > max(i for i, word in enumerate(words) if word in ("RUN", "COPY"))


# docker-compose.yml


@pytest.fixture
def compose() -> dict:
    return YAML(typ="safe").load(ROOT / "docker-compose.yml")["services"]


def test_two_services_share_the_logdir(compose):
    assert compose.keys() == {"lore", "tensorboard"}
    for name, service in compose.items():
        assert service["image"] == "lore" and service["user"] == "${LORE_USER:-1000:1000}"
        (volume,) = service["volumes"]
        assert volume.startswith("./logdir:/lore/logdir") and volume.endswith(":ro") == (
            name == "tensorboard"
        )
    assert of("WORKDIR") == ["/lore"]
    assert compose["lore"]["runtime"] == "${LORE_RUNTIME:-runc}"


def test_tensorboard_is_seen_from_this_machine_only(compose):
    service = compose["tensorboard"]
    assert service["ports"] == ["127.0.0.1:${TENSORBOARD_PORT:-6006}:6006"]
    assert shlex.split(service["command"])[:3] == ["tensorboard", "--logdir", "logdir"]
    assert "build" not in service and service["pull_policy"] == "never"


def test_keys_are_passed_on_and_not_written_down(compose):
    environment = compose["lore"]["environment"]
    assert {name for name, value in environment.items() if value is None} == set(doctor.KEYS)
    assert not any(key in rest for key in doctor.KEYS for _, rest in instructions())


def test_build_arguments_are_those_of_the_dockerfile(compose):
    assert compose["lore"]["build"]["args"].keys() == {rest.partition("=")[0] for rest in of("ARG")}


# start.sh


@pytest.fixture
def start(tmp_path):
    """A function that runs a copy of start.sh beside fakes: (exit code, output, calls)."""
    for name in ("start.sh", "docker-compose.yml"):
        shutil.copy(ROOT / name, tmp_path / name)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "basename", "dirname", "id", "mkdir", "sh"):
        (programs / name).symlink_to(shutil.which(name))

    def run(
        *argv: str, fakes: tuple[str, ...] = ("docker",), runtimes: str = '{"runc":{}}', **variables: str
    ):
        for name in fakes:
            (programs / name).write_text(FAKE)
            (programs / name).chmod(0o755)
        calls = tmp_path / "calls"
        env = {"PATH": str(programs), "CALLS": str(calls), "RUNTIMES": runtimes, **variables}
        command = [tmp_path / "start.sh", *argv]
        done = subprocess.run(command, cwd="/", env=env, capture_output=True, text=True)
        lines = calls.read_text().splitlines() if calls.exists() else []
        return done.returncode, done.stdout + done.stderr, lines

    return run


USER = f"{os.getuid()}:{os.getgid()}" if hasattr(os, "getuid") else ""


@needs_bash
def test_it_builds_starts_and_enters(start, tmp_path):
    code, out, calls = start()
    assert code == 0 and "http://127.0.0.1:6006" in out
    steps = [call for call in calls if not call.startswith(("docker info", "docker compose version"))]
    assert steps == [
        f"docker compose build | {USER} ",
        f"docker compose up --detach | {USER} ",
        f"docker compose exec --no-TTY lore bash | {USER} ",  # there is no terminal here
    ]
    assert (tmp_path / "logdir").is_dir()


@needs_bash
def test_a_command_runs_in_the_container(start):
    command = ["python3", "dreamer.py", "--configs", "crafter", "--noisy_tv", "{enabled: True}"]
    code, _, calls = start(*command, TENSORBOARD_PORT="7007")
    assert code == 0
    assert calls[-1] == f"docker compose exec --no-TTY lore {' '.join(command)} | {USER} "


@needs_bash
def test_a_gpu_is_used_where_docker_can(start):
    both = json.dumps({"nvidia": {"path": "nvidia-container-runtime"}, "runc": {}})
    _, _, calls = start(fakes=("docker", "nvidia-smi"), runtimes=both)
    assert calls[-1].endswith(f"| {USER} nvidia")


@needs_bash
def test_a_gpu_that_docker_cannot_use_is_told(start):
    code, out, calls = start(fakes=("docker", "nvidia-smi"))
    assert code == 0 and "NVIDIA Container Toolkit" in out and calls[-1].endswith(f"| {USER} ")


@needs_bash
def test_a_toolkit_without_a_gpu_is_not_used(start):
    _, _, calls = start(runtimes='{"nvidia":{},"runc":{}}')
    assert calls[-1].endswith(f"| {USER} ")


@needs_bash
@pytest.mark.parametrize(
    ("variables", "fakes", "text"),
    [
        ({}, (), "Docker is not installed"),
        ({"COMPOSE": "1"}, ("docker",), "Compose plugin"),
        ({"ENGINE": "1"}, ("docker",), "Docker does not answer"),
    ],
)
def test_what_is_missing_is_one_line(variables, fakes, text, start):
    code, out, calls = start(fakes=fakes, **variables)
    assert code == 2 and out.startswith("error: ") and text in out and len(out.splitlines()) == 1
    assert not any(" up " in call for call in calls)
