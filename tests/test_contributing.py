"""CONTRIBUTING.md is followed to the letter, and what stands beside it is as it should be."""

import datetime
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from run_helpers import ROOT

import config as configs

GUIDES = ("CONTRIBUTING.md", "CONTRIBUTING.ja.md")
NOT_COPIED = (".git", ".venv", "logdir", "wandb", "__pycache__", ".*_cache", ".hypothesis")
TINY = "--steps 60 --eval_every 0 --prefill 30".split()


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(guide: str = GUIDES[0]) -> list[tuple[str, str]]:
    """(language, content) of each block, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", text_of(guide), re.MULTILINE | re.DOTALL)


def apply(folder: Path, language: str, block: str) -> None:
    """Do to a copy of LoRe what a block says."""
    first, _, rest = block.partition("\n")
    if language == "python":
        path = folder / first.removeprefix("# ")
        assert not path.exists()
        path.write_text(rest, encoding="utf-8")
        return
    path = folder / first.removeprefix("+++ ")
    lines = rest.splitlines(keepends=True)
    assert all(line[0] in " +-" or line == "\n" for line in lines)
    old = "".join(line[1:] or "\n" for line in lines if line[0] != "+")
    new = "".join(line[1:] or "\n" for line in lines if line[0] != "-")
    text = path.read_text(encoding="utf-8")
    assert f"\n{text}".count(f"\n{old}") == 1, f"{path.name}: {old}"
    path.write_text(f"\n{text}".replace(f"\n{old}", f"\n{new}")[1:], encoding="utf-8")


@pytest.fixture(scope="module")
def followed(tmp_path_factory) -> Path:
    """A copy of LoRe after all recipes."""
    folder = tmp_path_factory.mktemp("copy") / "lore"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_COPIED))
    for language, block in blocks():
        if language in ("python", "diff"):
            apply(folder, language, block)
    return folder


def test_both_guides_hold_the_same_blocks():
    assert blocks(GUIDES[0]) == blocks(GUIDES[1])
    assert {language for language, _ in blocks()} == {"sh", "python", "diff"}


def test_all_recipes_can_be_applied_and_stay_clean(followed):
    assert "rnd" in (followed / "configs.yaml").read_text(encoding="utf-8")
    for what in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *what, "--no-cache", "--quiet", "."]
        done = subprocess.run(command, cwd=followed, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


COMMANDS = [line for language, block in blocks() if language == "sh" for line in block.splitlines()]
RUNS = [command for command in COMMANDS if command.startswith("python3")]


def test_the_targets_of_make_exist():
    targets = re.findall(r"^([\w ]+):", text_of("Makefile"), re.MULTILINE)
    made = [command.split()[1] for command in COMMANDS if command.startswith("make")]
    assert made == ["setup", "test", "slow", "lint"] and set(made) <= {
        t for line in targets for t in line.split()
    }
    assert len(RUNS) + len(made) == len(COMMANDS)


def run(folder: Path, *argv: str) -> str:
    env = {k: v for k, v in os.environ.items() if not k.endswith("_API_KEY")}
    env |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *argv], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", RUNS)
def test_commands_of_the_recipes_run(command, followed):
    _, *argv = shlex.split(command)
    out = run(followed, *argv, *(TINY if argv[0] == "dreamer.py" else []))
    if argv[0] == "-m":
        assert "coin_flip is fine" in out
        return
    logged = (followed / argv[-1] / "metrics.jsonl").read_text()
    for name in {"rnd": ("expl/reward_mean", "loss/expl_model"), "metric": ("replay/episodes",)}.get(
        Path(argv[-1]).name, ("replay/size",)
    ):
        assert f'"{name}"' in logged


@pytest.mark.slow
def test_the_tests_that_watch_the_documents_pass_after_the_recipes(followed):
    chosen = "suite_is_listed or preset_is_listed or every_file or same_commands"
    run(followed, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_readme.py", "-k", chosen)
    run(followed, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_config.py")


@pytest.mark.slow
def test_the_mirrored_image_is_a_mirror(followed):
    script = """
import numpy as np, config
from envs import make_env
images = [make_env(config.load(["--task", "crafter_reward", *more]), "train", 0).reset()[0]["image"]
          for more in ([], ["--mirror", "True"])]
assert np.array_equal(images[0][:, ::-1], images[1]) and not np.array_equal(*images)
"""
    run(followed, "-c", script)


@pytest.mark.parametrize("page", [*GUIDES, "INSTALL_WINDOWS.md", "INSTALL_WINDOWS.ja.md", "CHANGELOG.md"])
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)]+)\)", text_of(page))
    assert links
    for target in links:
        path, _, part = target.partition("#")
        assert target.startswith("https://") or (ROOT / path).exists(), target
        if part and not target.startswith("https://"):
            heads = [
                line.lstrip("# ").lower().replace(" ", "-")
                for line in text_of(path).splitlines()
                if line[:1] == "#"
            ]
            assert part in heads, target


# Licence, citation, changes


def test_the_licence_is_mit():
    text = text_of("LICENSE")
    assert text.startswith("MIT License\n\nCopyright (c) 2026 LoRe contributors\n")
    assert 'THE SOFTWARE IS PROVIDED "AS IS"' in text and len(text.split()) == 169


def test_the_citation_is_of_the_citation_file_format():
    """What schema 1.2.0 asks for: the keys that must be there, and the form of those that are."""
    cff = YAML(typ="safe").load(text_of("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= cff.keys()
    known = {"abstract", "type", "license", "keywords", "references", "version", "date-released"}
    assert cff.keys() <= known | {"cff-version", "message", "title", "authors"}
    assert cff["cff-version"] == "1.2.0" and cff["type"] == "software" and cff["license"] == "MIT"
    assert cff["authors"] == [{"name": "LoRe contributors"}]
    (paper,) = cff["references"]
    assert {"authors", "title", "type"} <= paper.keys() and re.fullmatch(r"10\.\d{4,9}/\S+", paper["doi"])
    assert isinstance(paper["year"], int) and paper["year"] <= datetime.date.today().year
    assert all({"family-names", "given-names"} == person.keys() for person in paper["authors"])
    assert paper["doi"].rpartition("/")[2] in text_of("README.md")  # the paper that the README links


def test_the_changelog_keeps_its_form():
    text = text_of("CHANGELOG.md")
    assert text.startswith("# Changelog\n") and "\n## [Unreleased]\n" in text
    kinds = re.findall(r"^### (.+)$", text, re.MULTILINE)
    assert kinds and set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_names_that_the_guide_tells_exist():
    for name in ("FROZEN", "_problems"):
        assert hasattr(configs, name) and f"`{name}`" in text_of(GUIDES[0])
