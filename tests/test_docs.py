"""The documents are true: their commands parse or run, and the names in their tables exist."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from run_helpers import ROOT, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import config
import envs
from basics import UserError

PAGES = sorted(p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
ENGLISH = [page for page in PAGES if not page.endswith(".ja.md")]
JAPANESE = [page for page in PAGES if page.endswith(".ja.md")]
STEPS = 160  # of the README's debug run: past an evaluation


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, content) of each fenced block, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[str]:
    return [c for language, b in blocks(page) if language in ("sh", "powershell") for c in b.splitlines()]


def tables(page: str) -> list[tuple[str, list[list[list[str]]]]]:
    """(heading of the first column, the `names` in each cell of each row) of each table."""
    found = []
    for table in re.findall(r"(?:^\|.*\n)+", text_of(page), re.MULTILINE):
        rows = [row.split("|")[1:-1] for row in table.splitlines()]
        found.append((rows[0][0].strip(), [[re.findall(r"`([^`]+)`", c) for c in row] for row in rows[2:]]))
    return found


def first_column(page: str, heading: str) -> list[str]:
    rows = [row for head, rows in tables(page) if head == heading for row in rows]
    assert rows, f"{page} has no table {heading!r}"
    return [name for row in rows for name in row[0]]


# --- Commands ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", JAPANESE)
def test_the_japanese_page_holds_the_same_blocks(page):
    assert blocks(page) == blocks(page.replace(".ja.md", ".md"))


SCRIPT = re.compile(r"(?:.*\s)?(?:python3?|py)(?:\.exe)? ((?:[\w/]+\.py|-m envs\.check) ?.*)")
COMMANDS = {
    match[1]: page
    for page in ENGLISH
    if page != "CONTRIBUTING.md"  # of which the commands are run, after its changes
    for command in commands(page)
    if (match := SCRIPT.fullmatch(command))
}


@pytest.mark.parametrize("command", COMMANDS)
def test_command_of_the_documents_parses(command, monkeypatch):
    monkeypatch.setenv("GEMINI_API_KEY", "")
    words = shlex.split(re.sub(r" [#|>&].*", "", command))
    if words[0] == "dreamer.py":
        try:
            config.load(words[1:])
        except SystemExit as done:
            assert done.code == 0
        return
    script = ROOT / (words[0] if words[0] != "-m" else f"{words[1].replace('.', '/')}.py")
    assert script.is_file()
    module = importlib.import_module(".".join(script.relative_to(ROOT).with_suffix("").parts))
    if hasattr(module, "parse"):
        module.parse(words[1:])


@pytest.mark.parametrize("page", ENGLISH)
def test_the_requirements_that_a_page_installs_exist(page):
    for name in re.findall(r"install (?:--?\w+ )*-r (\S+\.txt)", text_of(page)):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"^```diff\n.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\((?!https:)([^)]+)\)", text):
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            names = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]
            assert anchor in names, target


# --- The README's run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def logdir(tmp_path_factory) -> Path:
    """The logdir of the README's debug run."""
    command = "python3 dreamer.py --configs crafter lore_full debug --logdir ./logdir/debug"
    assert command in commands("README.md")
    folder = tmp_path_factory.mktemp("work")
    env = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}
    run = [sys.executable, ROOT / "dreamer.py", *shlex.split(command)[2:]]
    run += ["--steps", str(STEPS), "--llm.until", str(STEPS)]
    done = subprocess.run(run, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "logdir" / "debug"


def metrics_of(logdir: Path) -> set[str]:
    lines = (logdir / "metrics.jsonl").read_text().splitlines()
    return {name for line in lines for name in json.loads(line)} - {"step"}


def test_a_run_writes_what_docs_usage_lists(logdir):
    patterns = [name.rstrip("/") for name in first_column("docs/usage.md", "in the logdir")]
    for path in logdir.iterdir():
        assert any(fnmatchcase(path.name, pattern) for pattern in patterns), path


def test_the_metrics_that_docs_usage_lists_exist(logdir):
    events = EventAccumulator(str(logdir))
    events.Reload()
    known = metrics_of(logdir) | set(events.Tags()["images"])
    for pattern in first_column("docs/usage.md", "metric"):
        assert any(fnmatchcase(name, pattern) for name in known), pattern


@pytest.mark.slow
def test_docs_logs_explains_each_metric(logdir, tmp_path):
    patterns = first_column("docs/logs.md", "metric")
    metrics = metrics_of(logdir)
    for name, actor in (("lpm", "separate"), ("plan2explore", "shared")):
        run = ("--expl_behavior", name, "--expl_task_actor", actor, "--steps", "60", "--eval_every", "0")
        assert train(tmp_path / name, *run) == 0
        metrics |= metrics_of(tmp_path / name)
    for name in metrics:
        assert any(fnmatchcase(name, pattern) for pattern in patterns), f"{name} is not explained"


# --- Tables --------------------------------------------------------------------------------------------


def test_docs_usage_lists_every_preset():
    assert sorted(first_column("docs/usage.md", "preset")) == sorted(config.read().presets)


def test_docs_usage_lists_every_suite_with_tasks_that_exist():
    assert sorted(first_column("docs/usage.md", "suite")) == sorted(envs.REGISTRY)
    rows = next(rows for head, rows in tables("docs/usage.md") if head == "suite")
    for (suite,), tasks, *_ in rows:
        tasks = [task for task in tasks if task.startswith(f"{suite}_") and task != "gym_module:id"]
        assert tasks
        if suite == "memorymaze" or (suite == "dmc" and sys.version_info >= (3, 13)):
            continue  # made in test_suites.py, where they can be
        for task in tasks:
            envs.make_env(config.load(["--task", task]), "train", 0)


def test_every_module_is_in_the_table_of_files():
    listed = first_column("CONTRIBUTING.md", "file")
    assert all((ROOT / name).exists() for name in listed)
    assert {path.name for path in ROOT.glob("*.py")} <= set(listed)


def test_old_option_names_raise_an_error_that_names_the_new_one():
    rows = [row for page in ENGLISH for head, rows in tables(page) if head == "old option" for row in rows]
    assert rows
    for old, new in rows:
        for name, successor in zip(old, new, strict=True):
            with pytest.raises(UserError, match=rf"--{re.escape(successor)}\b"):
                config.load([f"--{name}", "1"])


# --- The recipes of CONTRIBUTING.md --------------------------------------------------------------------


def apply(folder: Path, language: str, block: str) -> None:
    """Apply a block to a copy of LoRe: a whole new file (`python`) or a change of one (`diff`)."""
    first, _, rest = block.partition("\n")
    if language == "python":
        (folder / first.removeprefix("# ")).write_text(rest, encoding="utf-8")
        return
    path = folder / first.removeprefix("+++ ")
    lines = rest.splitlines(keepends=True)
    old = "".join(line[1:] or "\n" for line in lines if line[0] != "+")
    new = "".join(line[1:] or "\n" for line in lines if line[0] != "-")
    text = path.read_text(encoding="utf-8")
    assert f"\n{text}".count(f"\n{old}") == 1, f"{path.name}: {old}"
    path.write_text(f"\n{text}".replace(f"\n{old}", f"\n{new}")[1:], encoding="utf-8")


@pytest.fixture(scope="module")
def followed(tmp_path_factory) -> Path:
    """A copy of LoRe after all recipes."""
    folder = tmp_path_factory.mktemp("copy") / "lore"
    skipped = (".git", ".venv", "logdir", "wandb", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*skipped))
    for language, block in blocks("CONTRIBUTING.md"):
        if language in ("python", "diff"):
            apply(folder, language, block)
    return folder


def test_the_recipes_apply_and_pass_the_linter(followed):
    for what in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *what, "--no-cache", "--quiet", "."]
        done = subprocess.run(command, cwd=followed, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_commands_of_the_recipes_run(followed):
    env = {k: v for k, v in os.environ.items() if not k.endswith("_API_KEY")} | {"OMP_NUM_THREADS": "1"}
    runs = [c for c in commands("CONTRIBUTING.md") if c.startswith("python3 ") and "pytest" not in c]
    assert len(runs) >= 5
    for command in runs:
        argv = shlex.split(command)[1:]
        if argv[0] == "dreamer.py":
            argv += ["--steps", "60", "--eval_every", "0", "--prefill", "30"]
        done = subprocess.run([sys.executable, *argv], cwd=followed, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


# --- The notebook --------------------------------------------------------------------------------------

CELLS = [
    "".join(cell["source"])
    for cell in json.loads(text_of("quickstart.ipynb"))["cells"]
    if cell["cell_type"] == "code"
]
# What is changed to be quick: the training's steps, those of the run of step 2, and where LoRe comes from.
QUICK = {
    "STEPS = 34000": "STEPS = 400",
    "lore_full debug --logdir": "lore_full debug --steps 160 --logdir",
    "https://example.com/lore.git": f"file://{ROOT}",
    "--episodes 10": "--episodes 2",
}


def as_python(cell: str) -> str:
    """A cell with its shell lines and magics as calls, as IPython does it."""
    lines = []
    for line in cell.splitlines():
        indent, mark, rest = re.fullmatch(r"(\s*)([!%]?)(.*)", line).groups()
        lines.append(f"{indent}{ {'!': 'shell', '%': 'magic'}[mark] }({rest!r}, globals())" if mark else line)
    return "\n".join(lines)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Colab is Linux")
def test_all_cells_of_the_notebook_run(tmp_path, monkeypatch):
    shown, programs = [], tmp_path / "bin"
    programs.mkdir()
    for name, script in (("python", f'exec {sys.executable} "$@"'), ("pip", "exit 0")):
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    env = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}
    env |= {"PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

    def shell(command: str, names: dict) -> None:
        command = re.sub(r"\{(\w+)\}", lambda match: str(names[match[1]]), command)
        done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"

    def magic(command: str, names: dict) -> None:
        if command.startswith("cd "):
            os.chdir(command.removeprefix("cd "))

    def video(path: str, embed: bool, width: int) -> str:
        assert Path(path).stat().st_size > 0
        return path

    display = types.SimpleNamespace(Video=video, display=shown.append)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.chdir(tmp_path)
    text = "\0".join(CELLS)
    for old, new in QUICK.items():
        assert old in text
        text = text.replace(old, new)
    names = {"shell": shell, "magic": magic}
    for cell in text.split("\0"):
        exec(as_python(cell), names)
    assert len(shown) == 2
