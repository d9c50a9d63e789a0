"""The commands in docs/performance.md and docs/results.md run: benchmarks for real, with small numbers."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

import config
import evaluate

ROOT = Path(__file__).resolve().parent.parent
QUICK = {
    "update_speed.py": "--size debug --device cpu --repeats 1 --json",
    "profile_update.py": "--size debug --device cpu --repeats 1 --json",
    "replay_speed.py": "--steps 300 --deter 8 --size 8 --json",
    "cost_table.py": "--size debug --device cpu --repeats 1",
    "replay_memory.py": "--steps 600 --capacity 300 --deter 8 --json",
    "crafter_speed.py": "--steps 20 --json",
}


def commands(page: str) -> list[list[str]]:
    lines = re.findall(
        r"^    python3 (.+)$", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.MULTILINE
    )
    assert lines
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize(("script", "options"), QUICK.items())
def test_benchmark_runs_and_prints_json(script, options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, *options.split()])
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as Python does for a script
    runpy.run_path(str(ROOT / "benchmarks" / script), run_name="__main__")
    assert json.loads(capsys.readouterr().out)


def test_documented_benchmarks_exist_and_take_their_options():
    documented = commands("performance.md")
    assert {Path(script).name for script, *_ in documented} == QUICK.keys()
    for script, *options in documented:
        source = (ROOT / script).read_text(encoding="utf-8")
        assert all(f'"{word}"' in source for word in options if word.startswith("--"))


def test_documented_runs_are_understood():
    for script, *options in commands("results.md"):
        if script == "dreamer.py":
            config.load(options)
        else:
            assert script == "evaluate.py"
            evaluate.parse(options)
