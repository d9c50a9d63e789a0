"""The speed measurements run, with small numbers."""

import json

import pytest
from run_helpers import ROOT

from benchmarks import speed


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        f"update --sizes debug --precisions float32 --threads 1 --warmup 1 --repeats 2 --against {ROOT}",
        "policy --sizes debug --threads 1 --envs 1 2 --warmup 1 --repeats 2",
        "replay --steps 300 --deter 8 --image 8",
        "envs --tasks dummy_vector --workers 1 --seconds 0.1 --turns 1 --crafter",
        "advice --size debug --threads 1 --runs plain waiting --steps 16 --prefill 70 --repeats 1",
    ],
    ids=lambda command: command.split()[0],
)
def test_speed_is_measured(command, capsys):
    speed.main([*command.split(), "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert all(value >= 0 for each in figures.values() for value in each.values() if isinstance(value, float))
    if command.startswith("update"):
        here, there = figures.values()
        assert here["parameters"] == there["parameters"] and here["ratio"] == 1 and there["ratio"] > 0
