"""The commands in the docs run: benchmarks for real, with small numbers."""

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
    "explorer_cost.py": "--size debug --device cpu --threads 1 --warmup 1 --repeats 1 --explorers lpm --json",
    "advice_cost.py": "--size debug --device cpu --steps 8 --warmup 0 --repeats 1 --runs full --json",
    "crafter_speed.py": "--steps 20 --json",
    "env_speed.py": "--tasks dummy_vector --workers 1 --seconds 0.1 --turns 1 --json",
}
ELSEWHERE = {"soak.py"}  # run by faults/test_soak.py


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
    documented = [line for line in commands("performance.md") if line[0] != "dreamer.py"]
    assert {Path(script).name for script, *_ in documented} == QUICK.keys() | ELSEWHERE
    for script, *options in documented:
        source = (ROOT / script).read_text(encoding="utf-8")
        if "make_parser(" in source:
            source += (ROOT / "benchmarks" / "update_speed.py").read_text(encoding="utf-8")
        assert all(f'"{word}"' in source for word in options if word.startswith("--"))


@pytest.mark.parametrize("page", ["workers.md", "performance.md"])
def test_documented_runs_are_understood(page):
    for script, *options in commands(page):
        if script == "dreamer.py":
            config.load(options)
        elif page != "performance.md":
            assert script == "evaluate.py"
            evaluate.parse(options)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell script")
def test_comparison_takes_turns_and_says_how_many_times_faster_we_are(tmp_path, monkeypatch, capsys):
    """A script that serves our own updates stands for the interpreter that would run r2dreamer."""
    peer = tmp_path / "python"
    serve = f"{ROOT / 'benchmarks' / 'update_speed.py'} --size debug --device cpu --serve"
    peer.write_text(f"#!/bin/sh\necho a library prints too\nexec {sys.executable} {serve}\n")
    peer.chmod(0o755)
    options = f"--size debug --device cpu --precision float32 --compare . --python {peer} --repeats 2 --json"
    monkeypatch.setattr(sys, "argv", ["update_speed.py", *options.split()])
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    runpy.run_path(str(ROOT / "benchmarks" / "update_speed.py"), run_name="__main__")
    result = json.loads(capsys.readouterr().out)
    ratio = result.pop("times ours, the better precision of each")
    assert result.keys() == {"LoRe float32", "r2dreamer float32", "r2dreamer, memory kept, float32"}
    seconds = {name: figures["update_s"] for name, figures in result.items()}
    expected = seconds["r2dreamer float32"] / seconds["LoRe float32"]
    assert ratio["r2dreamer"] == pytest.approx(expected, abs=0.01)
    assert len({figures["parameters"] for figures in result.values()}) == 1
