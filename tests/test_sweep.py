"""sweep.py: the grid, the commands and the summary. test_sweep_ray.py runs sweeps."""

import csv
import re
import shlex
import sys
from pathlib import Path

import pytest
from run_helpers import TINY

import config
import sweep


def runs_of(logdir, *grid: str):
    return sweep.plan(sweep.read_grid(grid), ["debug", "dummy_cue"], ["--steps", "100"], logdir)


def main(logdir, *words: str) -> int:
    return sweep.main([*TINY, "--logdir", str(logdir), *words])


def test_grid_is_the_product_of_its_options(tmp_path):
    runs = runs_of(tmp_path, "seed=0,1,2", "configs=none,lore_prior")
    assert [run.choice for run in runs] == [
        {"seed": seed, "configs": preset} for seed in "012" for preset in ("none", "lore_prior")
    ]
    assert len({run.logdir for run in runs}) == 6
    for run in runs:
        loaded = config.load(run.options)
        assert loaded.seed == int(run.choice["seed"]) and loaded.logdir == str(run.logdir)
        assert loaded.prior.enabled == (run.choice["configs"] == "lore_prior")
        assert loaded.presets[:1] == ["dummy_cue"] and loaded.presets[-1] == "debug"
        assert run.steps == 100


def test_values_may_be_lists_and_several_presets(tmp_path):
    runs = runs_of(tmp_path, "size=48 48,64 64", "configs=lore_prior size1m")
    assert [config.load(run.options).size for run in runs] == [[48, 48], [64, 64]]
    assert config.load(runs[0].options).presets == ["dummy_cue", "lore_prior", "debug", "size1m"]
    assert [run.name for run in runs] == [f"size={n}-{n},configs=lore_prior-size1m" for n in (48, 64)]


def test_grid_overrides_the_options_of_all_runs(tmp_path):
    (run,) = runs_of(tmp_path, "steps=200")
    assert run.steps == config.load(run.options).steps == 200


def test_no_grid_means_one_run(tmp_path):
    (run,) = runs_of(tmp_path)
    assert run.name == "run" and run.choice == {}


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--grid", "seed"], r"seed: write NAME=VALUE,VALUE"),
        (["--grid", "seed=0,"], r"seed=0,: write NAME=VALUE,VALUE"),
        (["--grid", "seed=0", "seed=1"], "seed is given twice"),
        (["--grid", "seed=0,0"], "two runs have the name seed=0"),
        (["--grid", f"traindir=a,{'長' * 100}"], "longer than 200 bytes"),
        (["--grid", "logdir=a,b"], "own folder"),
        (["--grid", "seed=0,x"], r"run seed=x: --seed x: must be a whole number"),
        (["--grid", "configs=lore_prior,lore_prio"], "run configs=lore_prio: .*nearest is lore_prior"),
        (["--grid", "seed=0,1", "--stepps", "5"], r"--stepps is not an option; the nearest is --steps"),
        (["--cpus", "x"], "--cpus: invalid int value: 'x'"),
    ],
)
def test_mistake_in_one_run_ends_the_sweep_in_one_line(words, reason, tmp_path, capsys):
    assert main(tmp_path / "sweep", *words) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and re.search(reason, error), error
    assert not list(tmp_path.iterdir())


def test_dry_run_prints_one_command_per_line_and_does_nothing(tmp_path, capsys, monkeypatch):
    logdir = tmp_path / "with space"
    words = ["--grid", "seed=0,1", "size=16 16", "--encoder.mlp_keys", "a|b (c)", "--dry_run"]
    for folder in (sweep.ROOT, tmp_path):
        monkeypatch.chdir(folder)
        assert main(logdir, *words) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2 and not logdir.exists()
        for seed, line in enumerate(lines):
            python, program, *options = shlex.split(line)
            assert python == sys.executable and Path(program).samefile(sweep.ROOT / "dreamer.py")
            loaded = config.load(options)
            assert loaded.seed == seed and loaded.encoder.mlp_keys == "a|b (c)"
            assert loaded.logdir == str(logdir / f"seed={seed},size=16-16")


def test_summary_has_the_last_returns_of_each_run(tmp_path):
    runs = runs_of(tmp_path, "seed=0,1")
    runs[1].logdir.mkdir()
    (runs[1].logdir / "metrics.jsonl").write_text(
        '0.5, "cut": 1}\n{"step": 20, "env/episode_return": 3.0, "eval/episode_return": -2.0}\n'
        '{"step": 30, "env/episode_return": 2.0}\n{"step": 40, "env/ep'
    )
    sweep.write_summary(tmp_path / "summary.csv", runs, {"seed=0": "failed", "seed=1": "stopped"})
    with open(tmp_path / "summary.csv", newline="", encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert (first["run"], first["seed"], first["status"]) == ("seed=0", "0", "failed")
    assert (first["step"], first["train_return"]) == ("0", "")
    assert (second["step"], second["train_return"], second["eval_return"]) == ("30", "2.0", "-2.0")
    assert shlex.split(second["command"]) == runs[1].command()
