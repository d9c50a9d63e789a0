"""The measures and runs of benchmarks/transfer.py."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_ablation import lines
from test_benchmarks import commands
from test_exploration_study import load

import config
from basics import UserError

ROOT = Path(__file__).parent.parent
study = load("transfer")
SLOW, FAST, NEVER = [0] * 8 + [1] * 8, [0.5] * 2 + [1] * 14, [0] * 16


def summary(**arms: list[list[float]]) -> dict:
    return study.summarise(
        {arm: dict(enumerate(study.measures(lines(each)) for each in runs)) for arm, runs in arms.items()}
    )


def test_a_run_that_never_learns_counts_with_all_its_steps():
    found = summary(scratch=[SLOW, NEVER], model=[FAST])
    assert found["scratch"]["learned"]["values"] == [1100, 1600] and found["scratch"]["missed"] == 1
    assert found["model"]["learned"]["values"] == [400] and found["model"]["missed"] == 0
    assert found["model"]["first"]["iqm"] == 0.5 and found["model"]["first"]["low"] is None
    rows = study.table(found)
    assert len({row.count("|") for row in rows}) == 1
    assert "1,350 (1,100 to 1,600), 1 never" in rows[2] and "never" not in rows[3]


@pytest.mark.parametrize("quick", [False, True])
def test_the_options_of_each_run_are_understood(tmp_path, quick):
    sources, targets = study.commands(tmp_path, list(study.ARMS), [7, 8], quick)
    assert [place.name for place in sources] == ["source_7", "source_8"] and len(targets) == 6
    for place, (python, script, *options) in {**sources, **targets}.items():
        assert (python, script) == ("python3", "dreamer.py")
        loaded = config.load(options)
        arm, seed = place.name.split("_")
        assert loaded.task == f"minigrid_DoorKey-{'5x5' if arm == 'source' else '6x6'}"
        assert loaded.seed == int(seed) and loaded.threads == 1 and loaded.logdir == str(place)
        assert loaded.transfer == list(study.ARMS.get(arm, ()))
        origin = str(tmp_path / f"source_{seed}" / "latest.pt") if loaded.transfer else None
        assert loaded.from_checkpoint == origin
    assert study.commands(tmp_path, ["scratch"], [7], quick)[0] == {}, "nothing is transferred"


def test_the_commands_of_the_page_are_understood():
    for script, *options in commands("transfer.md"):
        if script == "dreamer.py":
            config.load(options)
        else:
            assert script == "benchmarks/transfer.py"
            study.parse(options)


def test_what_is_transferred_is_trained_first_and_only_what_has_finished_is_summed_up(tmp_path, monkeypatch):
    started = []

    def run_all(commands, jobs):
        started.extend(place.name for place in commands)
        for place in commands:
            place.mkdir(parents=True)
            returns = FAST if "model" in place.name else SLOW
            text = "\n".join(json.dumps(line) for line in lines(returns))
            (place / "metrics.jsonl").write_text(text + "\n")
            yield place

    monkeypatch.setattr(study.runs, "run_all", run_all)
    monkeypatch.setattr(study, "draw", lambda result, out: out.touch())
    with pytest.raises(UserError, match="leave out --only"):
        study.run_study(tmp_path, ["scratch"], [0], 1, False, only_table=True)
    study.run_study(tmp_path, ["scratch", "model"], [0], 1, False)
    assert started == ["source_0", "scratch_0", "model_0"]
    result = study.run_study(tmp_path, list(study.ARMS), [0, 1], 1, False, only_table=True)
    assert list(result["runs"]) == ["scratch", "model"] and result["sources"] == {"source_0": 1.0}
    assert json.loads((tmp_path / "transfer.json").read_text()) == json.loads(json.dumps(result))
    assert "| encoder and RSSM | 1 | 0.500 | 400 |" in (tmp_path / "transfer.md").read_text()


@pytest.mark.slow
def test_quick_study_runs_from_the_command_line(tmp_path):
    words = shlex.split("benchmarks/transfer.py --quick --jobs 2 --json --out")
    done = subprocess.run([sys.executable, *words, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)["summary"]) == list(study.ARMS)
    assert (tmp_path / "quick" / "transfer.png").exists()
    assert "Transferred rssm: 27 of 27" in (tmp_path / "quick" / "model_100" / "train.log").read_text()
