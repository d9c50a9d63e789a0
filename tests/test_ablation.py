"""The measures, bars and runs of benchmarks/ablation.py."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_benchmarks import commands
from test_exploration_study import load

import config
from basics import UserError

ROOT = Path(__file__).parent.parent
study = load("ablation")


def lines(returns: list[float], every: int = 100) -> list[dict]:
    """metrics.jsonl of a run that is evaluated as often as there are returns; training returns are half."""
    each = [
        {"step": every * i, "eval/episode_return": value, "env/episode_return": value / 2, "opt/updates": i}
        for i, value in enumerate(returns, start=1)
    ]
    return [{"step": every // 2, "loss/image": 1.0}, *each]


def run(returns: list[float]) -> dict:
    return study.measures(lines(returns))


def test_measures_of_a_run_are_of_evaluations():
    measured = run([0, 0, 0, 1, 0.5, 0.5, 0.8, 0.6])
    assert measured["final"] == pytest.approx(0.7)  # of steps 700 and 800
    assert measured["train"] == pytest.approx(0.35)
    assert measured["area"] == pytest.approx((0 / 2 + 0 + 0 + 1 + 0.5 + 0.5 + 0.8 + 0.6 / 2) / 7)
    assert (measured["steps"], measured["updates"]) == (800, 8)
    assert measured["curves"]["eval"]["steps"] == [100 * i for i in range(1, 9)]
    assert measured["curves"]["advised"] == {"steps": [], "values": []}


def test_steps_to_a_return_wait_for_three_evaluations():
    measured = run([0, 0.9, 0, 0.6, 0.6, 0.6, 0.9, 0.9])
    assert study.steps_to(measured, 0.3) == 300
    assert study.steps_to(measured, 0.6) == 600
    assert study.steps_to(measured, 0.8) == 800
    assert study.steps_to(measured, 0.85) is None


SLOW, FAST, NEVER = [0] * 8 + [1] * 8, [0] * 2 + [1] * 14, [0] * 16


def summary(**arms: list[list[float]]) -> dict:
    return study.summarise({arm: dict(enumerate(map(run, each))) for arm, each in arms.items()})


def test_arms_are_compared_with_the_baselines_final_return():
    found = summary(baseline=[SLOW] * 3, prior=[FAST, FAST, NEVER], random=[SLOW])
    assert found["baseline"]["final"]["iqm"] == 1
    assert found["baseline"]["to_final"]["values"] == [1100] * 3
    assert found["prior"]["to_final"]["values"] == [
        500,
        500,
        1600,
    ]  # one that never gets there counts in full
    assert found["prior"]["missed"] == {"to_final": 1, "to_nearly": 1}
    iqm = (0.25 * 500 + 500 + 0.25 * 1600) / 1.5
    assert found["prior"]["to_final"]["iqm"] == pytest.approx(iqm)
    assert found["prior"]["speed_final"]["iqm"] == pytest.approx(iqm / 1100)
    assert found["random"]["to_final"]["low"] is None, "one seed has no interval"
    rows = study.table(found)
    assert rows[0].count("|") == rows[1].count("|") == rows[2].count("|")
    assert "1 never" in rows[3] and "never" not in rows[2]


def test_bars_are_met_and_missed():
    good = study.bars(summary(baseline=[SLOW] * 3, prior=[FAST] * 3, adversarial=[SLOW] * 3))
    assert list(good.values()) == [True, True, True]
    late = [0] * 6 + [1] * 10
    bad = study.bars(summary(baseline=[SLOW] * 3, prior=[late] * 3, adversarial=[[0.5] * 16] * 3))
    assert list(bad.values()) == [False, False, True]
    assert not study.bars(summary(baseline=[SLOW] * 3, prior=[NEVER, NEVER, FAST]))[next(iter(bad))]
    unequal = {"baseline": {0: run(SLOW)}, "prior": {0: run(SLOW) | {"updates": 15}}}
    assert not list(study.bars(study.summarise(unequal)).values())[-1]


@pytest.mark.parametrize("name", study.STUDIES)
@pytest.mark.parametrize("arm", study.ARMS)
def test_the_options_of_each_run_are_understood(name, arm, tmp_path):
    for quick in (False, True):
        python, script, *options = study.command(name, arm, 7, tmp_path, quick)
        assert (python, script) == ("python3", "dreamer.py")
        loaded = config.load(options)
        assert loaded.seed == 7 and loaded.threads == 1 and loaded.steps < 1e5
        assert loaded.llm.enabled == (arm != "baseline")
        assert loaded.llm.rules_quality == (
            arm.split("_")[-1] if "adv" in arm or arm == "random" else "oracle"
        )
        assert loaded.prior.enabled == (arm not in ("baseline", "synth", "options"))
    assert loaded.crafter.area == ([64, 64] if name == "doorkey" else [32, 32])


def test_the_commands_of_the_page_are_understood():
    for script, *options in commands("ablation.md"):
        if script == "dreamer.py":
            config.load(options)
        else:
            assert script == "benchmarks/ablation.py" and not study.parse(options)[1]
            assert not study.parse(options)[1]


def test_only_what_has_finished_is_summed_up(tmp_path, monkeypatch):
    started = []

    def run_all(commands, jobs):
        started.extend(place.name for place in commands)
        for place in commands:
            place.mkdir(parents=True)
            text = "\n".join(json.dumps(line) for line in lines(SLOW))
            (place / "metrics.jsonl").write_text(text + "\n")
            yield place

    monkeypatch.setattr(study.runs, "run_all", run_all)
    monkeypatch.setattr(study, "draw", lambda result, out: out.touch())
    monkeypatch.setattr(study, "alone", lambda *_: 0.5)
    with pytest.raises(UserError, match="leave out --only"):
        study.run_study("doorkey", tmp_path, ["baseline"], [0], 1, False, [], only_table=True)
    study.run_study("doorkey", tmp_path, ["baseline"], [0, 1], 1, False, [])
    result = study.run_study(
        "doorkey", tmp_path, ["baseline", "prior"], [0, 1], 1, False, [], only_table=True
    )
    assert started == ["baseline_0", "baseline_1"]
    assert list(result["runs"]) == ["baseline"] and result["alone"]["iqm"] == 0.5
    assert json.loads((tmp_path / "doorkey.json").read_text()) == json.loads(json.dumps(result))
    told = (tmp_path / "doorkey.md").read_text()
    assert (
        "| baseline: DreamerV3 | 2 | 1.000 |" in told and "| the scripted adviser alone | 2 | 0.500 |" in told
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", study.STUDIES)
def test_quick_study_runs_from_the_command_line(name, tmp_path):
    arms = "baseline full" if name == "doorkey" else "baseline prior"
    words = shlex.split(f"benchmarks/ablation.py {name} --arms {arms} --quick --jobs 2 --json --out")
    done = subprocess.run([sys.executable, *words, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)["summary"]
    assert list(summary) == arms.split()
    assert all(np.isfinite(each["area"]["iqm"]) and each["updates"]["iqm"] > 0 for each in summary.values())
    assert (tmp_path / "quick" / f"{name}.png").exists()
