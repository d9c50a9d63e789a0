"""What both READMEs say is true: their commands run, and the names in their tables exist."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from llm_servers import FakeLLM, Say
from run_helpers import train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import config
import doctor
import dreamer
import envs
import evaluate
import plot
import sweep
from basics import UserError

ROOT = Path(__file__).parent.parent
READMES = ("README.md", "README.ja.md")
ACTIVATE = ("source .venv/bin/activate", r".venv\Scripts\Activate.ps1")
MAKE_OPTIONS = ("PYTHON", "CONFIGS", "LOGDIR", "ARGS")
PYTHONS = ("python3", "python", "py")
TRAIN = "python3 dreamer.py --configs crafter lore_full debug --logdir ./logdir/debug"  # is really run
STEPS = 160  # past an evaluation


def text_of(readme: str) -> str:
    return (ROOT / readme).read_text(encoding="utf-8")


def commands(readme: str) -> list[str]:
    """The lines of all fenced blocks, in order."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text_of(readme), re.MULTILINE | re.DOTALL)
    assert {language for language, _ in blocks} == {"sh", "powershell"}
    return [line for _, block in blocks for line in block.splitlines()]


def table(readme: str, index: int) -> list[list[list[str]]]:
    """The `names` in each cell of each row of table number `index`."""
    tables = re.findall(r"(?:^\|.*\n)+", text_of(readme), re.MULTILINE)
    rows = [row.split("|")[1:-1] for row in tables[index].splitlines()[2:]]
    return [[re.findall(r"`([^`]+)`", cell) for cell in row] for row in rows]


def first_column(readme: str, index: int) -> list[str]:
    return [name for row in table(readme, index) for name in row[0]]


PRESETS, SUITES, OUTPUT, METRICS, FILES, MODULES, OPTIONS = range(7)  # the tables, in order


# Commands


def test_both_readmes_hold_the_same_commands():
    assert commands("README.md") == commands("README.ja.md")


@pytest.mark.parametrize(
    "page", ["README.ja.md", "CONTRIBUTING.ja.md", "docs/llm.ja.md", "docs/custom_env.ja.md"]
)
def test_the_japanese_pages_have_one_word_for_the_adviser(page):
    assert "助言者" in text_of(page) and "アドバイザー" not in text_of(page)


def test_they_open_with_the_two_commands():
    assert commands("README.md")[:2] == ["make crafter", "make test"]


@pytest.mark.parametrize("command", dict.fromkeys(commands("README.md")))
def test_command_is_understood(command, capsys):
    program, *args = shlex.split(command, posix="\\" not in command)
    if command in ACTIVATE:
        return
    if program == "make":
        understand_make(args)
    elif program in PYTHONS and args[0] == "-m":
        assert importlib.util.find_spec(args[1])
    elif program in PYTHONS:
        understand_script(args)
    elif command.startswith("pip install -r "):
        assert (ROOT / args[2]).is_file()
    elif program == "./start.sh":  # test_docker.py starts it beside a fake Docker
        assert not args or args[0] in PYTHONS
        if args:
            understand_script(args[1:])
    elif program == "docker":
        assert args == ["compose", "down"]
    else:
        assert program == "tensorboard"  # run below


def understand_make(args: list[str]) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    # Not as a part of the `make test` that may be running this, with its ARGS.
    env = {
        k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", *MAKE_OPTIONS)
    }
    command = ["make", "-n", *args]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    python, *rest = shlex.split(done.stdout.splitlines()[-1])
    assert Path(python).name == "python"
    if args[0] == "test":
        assert rest[:2] == ["-m", "pytest"]
    else:
        understand_script(rest)


def understand_script(args: list[str]) -> None:
    script, *options = args
    if script == "evaluate.py":
        evaluate.parse(options)
    elif script == "plot.py":
        plot.parse(options)
    elif script == "sweep.py":
        args, more = sweep.parse(options)
        assert sweep.plan(sweep.read_grid(args.grid), args.configs, more, args.logdir)
    elif script == "doctor.py":
        assert doctor.read_options(options)
    else:
        assert script == "dreamer.py"
        try:
            config.load(options)
        except SystemExit as done:
            assert done.code == 0 and {"--help", "--print_config"} & set(options)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """A folder in which the README's debug run was run; ./logdir/crafter is the same run."""
    folder = tmp_path_factory.mktemp("work")
    keys = ("GEMINI_API_KEY", "GOOGLE_API_KEY")  # with one, a language model would be asked
    env = {name: value for name, value in os.environ.items() if name not in keys}
    assert TRAIN in commands("README.md")
    _, script, *options = shlex.split(TRAIN)
    command = [sys.executable, ROOT / script, *options, "--steps", str(STEPS), "--llm.until", str(STEPS)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.copytree(folder / "logdir" / "debug", folder / "logdir" / "crafter")
    return folder


def of_script(script: str, word: str) -> list[str]:
    found = [line for line in commands("README.md") if line.startswith(f"python3 {script}") and word in line]
    assert found
    return list(dict.fromkeys(found))


EXPORTS = ("--export", "crafter.safetensors")  # what writes the weights, and what reads them


def test_exported_weights_are_evaluated(workdir, monkeypatch, capsys):
    monkeypatch.chdir(workdir)
    write, read = (shlex.split(command)[2:] for command in of_script("evaluate.py", EXPORTS[1]))
    assert EXPORTS[0] in write and evaluate.main(write) == 0
    assert evaluate.main([*read, "--episodes", "1"]) == 0
    assert "crafter_reward" in capsys.readouterr().out


PLAYS = [line for line in of_script("evaluate.py", "") if not any(word in line for word in EXPORTS)]


@pytest.mark.parametrize("command", PLAYS)
def test_evaluation_runs(command, workdir, monkeypatch, capsys):
    monkeypatch.chdir(workdir)
    assert evaluate.main([*shlex.split(command)[2:], "--episodes", "1", "--envs", "1"]) == 0
    out = capsys.readouterr().out
    assert "crafter_reward" in out and "collect_wood" in out
    if "--video" in command:
        assert (workdir / f"logdir/crafter/videos/evaluate_{STEPS}_0.mp4").is_file()


@pytest.mark.parametrize("command", of_script("plot.py", ""))
def test_the_curves_are_drawn(command, workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    words = shlex.split(command)
    assert plot.main(words[2:]) == 0
    assert (workdir / words[-1]).stat().st_size > 0


def test_the_same_command_again_resumes(workdir, monkeypatch, capsys):
    monkeypatch.chdir(workdir)
    command = "python3 dreamer.py --configs crafter lore_full --logdir ./logdir/crafter"
    assert commands("README.md").count(command) == 2  # it begins the run, and it resumes it
    assert dreamer.main([*shlex.split(command)[2:], "--configs", "debug", "--steps", str(STEPS)]) == 0
    assert f"Resumed at step {STEPS}" in capsys.readouterr().out


@pytest.mark.parametrize("command", of_script("dreamer.py", "--from_checkpoint"))
def test_a_checkpoint_is_gone_on_with(command, workdir, monkeypatch, capsys):
    monkeypatch.chdir(workdir)
    options = shlex.split(command)[2:]
    new = "--logdir" in options
    assert dreamer.main([*options, *(["--steps", "20"] if new else [])]) == 0
    assert (f"Resumed at step {STEPS}" in capsys.readouterr().out) != new
    assert not new or (workdir / options[options.index("--logdir") + 1] / "latest.pt").exists()


def test_tensorboard_shows_the_runs(workdir):
    (command,) = (line for line in commands("README.md") if line.startswith("tensorboard"))
    program = [sys.executable, "-m", "tensorboard.main", *shlex.split(command)[1:], "--inspect"]
    done = subprocess.run(program, cwd=workdir, capture_output=True, text=True)
    assert done.returncode == 0 and "loss/image" in done.stdout and "train_openl" in done.stdout


def test_the_grid_of_the_readme_is_printed(capsys):
    (command,) = of_script("sweep.py", "--dry_run")
    assert sweep.main(shlex.split(command)[2:]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if " dreamer.py " in line]
    assert len(printed) == 9
    for line in printed:
        understand_script(shlex.split(line)[1:])


# What checks the commands of each page: a new page needs a line here, and a test.
CHECKED = {
    "README.md": "test_readme.py",
    "CONTRIBUTING.md": "test_contributing.py",
    "INSTALL_WINDOWS.md": "test_windows.py",
    "docs/ablation.md": "test_ablation.py",
    "docs/audio.md": "test_audio.py",
    "docs/custom_env.md": "test_custom_env.py",
    "docs/exploration.md": "test_exploration_study.py",
    "docs/learners.md": "test_distributed.py",
    "docs/llm.md": "test_llm_docs.py",
    "docs/performance.md": "test_benchmarks.py",
    "docs/results.md": "test_results.py",
    "docs/scaling.md": "test_scaling.py",
    "docs/transfer.md": "test_transfer_study.py",
    "docs/workers.md": "test_benchmarks.py",
}
COMMAND = r"^ *(?:python3?|pip|make|torchrun|tensorboard) .+$"


def test_each_page_with_commands_has_a_test_that_reads_it():
    """The Japanese pages hold the same commands, which each of these tests checks for its page."""
    pages = [path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))]
    found = {page for page in pages if re.search(COMMAND, text_of(page), re.MULTILINE)}
    assert {page.replace(".ja.md", ".md") for page in found} == CHECKED.keys()
    for page, test in CHECKED.items():
        assert Path(page).name in (ROOT / "tests" / test).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", CHECKED)
def test_the_requirements_that_a_page_installs_exist(page):
    for line in re.findall(r"^ *(?:python -m )?pip install (.+)$", text_of(page), re.MULTILINE):
        words = line.split()
        assert words[::2] == ["-r"] * (len(words) // 2) and all(
            (ROOT / name).is_file() for name in words[1::2]
        )


# Tables


@pytest.mark.parametrize("readme", READMES)
def test_every_preset_is_listed(readme):
    presets = config.read().presets.values()
    assert sorted(first_column(readme, PRESETS)) == sorted(name for group in presets for name in group)


@pytest.mark.parametrize("readme", READMES)
def test_every_file_is_listed(readme):
    listed = first_column(readme, FILES)
    assert all((ROOT / name).exists() for name in listed)
    assert sorted(name for name in listed if name.endswith(".py")) == sorted(
        path.name for path in ROOT.glob("*.py")
    )


@pytest.mark.parametrize("readme", READMES)
def test_a_run_writes_what_is_listed(readme, workdir):
    logdir = workdir / "logdir" / "debug"
    patterns = [name.rstrip("/") for name in first_column(readme, OUTPUT)]
    patterns.remove("llm_cache.sqlite")  # of a language model: see test_llm_docs.py
    patterns.remove("run.lock")  # while it runs: see faults/test_lock.py
    for path in logdir.iterdir():
        assert any(fnmatchcase(path.name, pattern) for pattern in patterns), path
    for pattern in patterns:
        assert list(logdir.glob(pattern)), pattern


def metrics_of(logdir: Path) -> set[str]:
    lines = (logdir / "metrics.jsonl").read_text().splitlines()
    return {name for line in lines for name in json.loads(line)} - {"step"}


def videos_of(logdir: Path) -> set[str]:
    events = EventAccumulator(str(logdir))
    events.Reload()
    return set(events.Tags()["images"])


@pytest.mark.parametrize("readme", READMES)
def test_the_metrics_that_are_listed_exist(readme, workdir):
    logdir = workdir / "logdir" / "debug"
    known = metrics_of(logdir) | videos_of(logdir)
    for pattern in first_column(readme, METRICS):
        assert any(fnmatchcase(name, pattern) for name in known), pattern


def metrics_of_advice(folder: Path) -> set[str]:
    """Metrics of runs that a language model advises: one with all paths, one with an ensemble."""
    model = (
        "--llm.backend openai --llm.model fake --llm.min_gap_steps 1 --llm.until 200 --llm.base_url".split()
    )
    plans = "--synthetic_warmup 0 --synthetic_settled 1 --synthetic_execution_prob 1 --ask_uncertainty 0"
    explorer = "--expl_behavior plan2explore --expl_task_actor shared --eval_every 0 --steps 60"
    with FakeLLM() as server:
        model.append(server.openai_url)
        server.script(Say(text="not JSON"))
        assert train(folder / "full", "--configs", "lore_full", *model, *plans.split()) == 0
        assert train(folder / "prior", "--configs", "lore_prior", *model, *explorer.split()) == 0
    return metrics_of(folder / "full") | metrics_of(folder / "prior")


def test_docs_logs_explains_each_metric_and_no_other(workdir, tmp_path):
    patterns = first_column("docs/logs.md", 0)
    metrics = metrics_of(workdir / "logdir" / "debug")
    for name, actor in (("lpm", "separate"), ("plan2explore", "shared")):
        run = ("--expl_behavior", name, "--expl_task_actor", actor, "--steps", "60", "--eval_every", "0")
        assert train(tmp_path / name, *run) == 0
        metrics |= metrics_of(tmp_path / name)
    metrics |= metrics_of_advice(tmp_path)
    for name in metrics:
        assert any(fnmatchcase(name, pattern) for pattern in patterns), f"{name} is not explained"
    absents = ("loss/vector", "loss/audio", "env/tv", "env/tv_share", "eval/tv_share")
    for absent in absents:  # Crafter has none
        patterns.remove(absent)
    for pattern in patterns:
        assert any(fnmatchcase(name, pattern) for name in metrics), f"{pattern} is not logged"


@pytest.mark.parametrize("readme", READMES)
def test_old_options_are_told_their_successors(readme):
    for old, new in table(readme, OPTIONS):
        assert len(old) == len(new)
        for name, successor in zip(old, new, strict=True):
            with pytest.raises(UserError, match=rf"its successor is --{re.escape(successor)}\b"):
                config.load([f"--{name}", "1"])


@pytest.mark.parametrize("readme", READMES)
def test_what_replaces_dreamerv3_torch_exists(readme):
    for old, new in table(readme, MODULES):
        for name in new or old:  # no name: it is called the same
            module, _, attribute = name.partition(".")
            if attribute in ("py", ""):
                assert (ROOT / name).is_file()
            else:
                assert hasattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("readme", READMES)
def test_every_suite_is_listed_with_tasks_that_exist(readme):
    assert sorted(first_column(readme, SUITES)) == sorted(envs.REGISTRY)
    for (suite,), tasks, _ in table(readme, SUITES):
        tasks = [task for task in tasks if task.startswith(f"{suite}_") and task != "gym_module:id"]
        assert tasks
        if suite in ("memorymaze", "minecraft"):  # they are made in test_suites.py, where they can be
            continue
        if suite == "dmc" and sys.version_info >= (3, 13):
            continue
        for task in tasks:
            envs.make_env(config.load(["--task", task]), "train", 0)


PAGES = (
    "logs",
    "scaling",
    "learners",
    "workers",
    "audio",
    "exploration",
    "llm",
    "llm.ja",
    "ablation",
    "transfer",
)


@pytest.mark.parametrize("page", [*READMES, *(f"docs/{name}.md" for name in PAGES)])
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)]+)\)", text_of(page)):
        path = (ROOT / page).parent / target.partition("#")[0]
        assert target.startswith("https://") or path.exists(), target
