"""plot.py reads metrics of runs, groups them over seeds and draws them."""

import json
import math
from pathlib import Path

import pytest
from PIL import Image

import config
import plot
from basics import UserError
from reports import figures, logs
from stats import achievement_score

TRAIN, EVAL = logs.TRAIN, logs.EVAL


def write_run(logdir, lines, options="", torn=b""):
    """Write a run with these lines of metrics, and the config of a command line unless `options` is None."""
    logdir.mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (logdir / "metrics.jsonl").write_bytes(text.encode() + torn)
    if options is not None:
        config.load([*options.split(), "--logdir", str(logdir)]).save(logdir / "config.yaml")
    return logdir


def run_of(logdir):
    (run,), notes = logs.read_runs([logdir])
    assert not notes
    return run


def some_lines(level=1.0, steps=(100, 200, 300, 400)):
    return [{"step": step, TRAIN: level, EVAL: level + step / 1000, "env/fps": 10.0} for step in steps]


# Reading


def test_curve_has_the_steps_at_which_the_metric_is_finite():
    lines = [{"step": 1, "a": 1.0}, {"step": 2, "b": 5.0}, {"step": 3, "a": math.nan}, {"step": 4, "a": 3.0}]
    lines += [{"step": 5, "a": math.inf}, {"step": 6, "a": -1e300}]
    assert logs.curve(lines, "a") == ([1, 4], [1.0, 3.0])
    assert logs.curve(lines, "a", 2) == ([1, 4], [1.0, 2.0])
    assert logs.curve(lines, "c") == ([], [])


BROKEN = [b'{"step": 900, "a": 1', b"\xff\xfe", b"[1, 2]", b"[" * 100_000, b'{"a": 1.0}', b'{"step": 1e999}']


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_lines_are_left_out(broken, tmp_path):
    logdir = write_run(tmp_path / "run", [{"step": 10, "a": 1, "note": "text", "on": True}], torn=broken)
    assert logs.read_metrics(logdir) == [{"step": 10, "a": 1.0}]


def test_lines_of_a_resumed_run_replace_later_ones(tmp_path):
    written = [(100, 1.0), (200, 2.0), (300, 3.0), (200, 20.0), (250, 25.0), (250, 26.0)]
    logdir = write_run(tmp_path / "run", [{"step": step, "a": value} for step, value in written])
    assert logs.curve(logs.read_metrics(logdir), "a") == ([100, 200, 250], [1.0, 20.0, 26.0])


def test_final_values_are_means_of_the_last_quarter(tmp_path):
    lines = some_lines()
    lines[0]["old"], lines[1]["old"] = 7.0, 8.0
    run = run_of(write_run(tmp_path / "run", [*lines, {"step": 401, EVAL: 2.4, "old": math.nan}]))
    assert run.final(EVAL) == pytest.approx((1.4 + 2.4) / 2)
    assert run.final("old") == 8.0, "the last value, as the last quarter has none"
    assert run.final("never") is None
    assert run.hours == pytest.approx(400 / 10 / 3600)


def test_runs_are_found_in_folders(tmp_path):
    first = write_run(tmp_path / "b" / "run_1", some_lines())
    second = write_run(tmp_path / "a" / "deep" / "run_0", some_lines())
    write_run(second / "train_eps", some_lines())  # not looked into
    assert logs.find_runs([tmp_path]) == [second, first]
    assert logs.find_runs([first, tmp_path, first]) == [first, second]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"No metrics\.jsonl in .*empty"):
        logs.find_runs([first, tmp_path / "empty"])


# Groups


def groups_of(tmp_path, *options):
    runs = [run_of(write_run(tmp_path / f"run_{i}", some_lines(i), each)) for i, each in enumerate(options)]
    return logs.group_runs(runs)


def test_runs_that_differ_only_in_their_seed_are_a_group(tmp_path):
    seeds = [f"--configs doorkey --traindir {tmp_path / str(seed)} --seed {seed}" for seed in range(3)]
    (group,) = groups_of(tmp_path, *seeds)
    assert [run.seed for run in group.runs] == [0, 1, 2]
    assert (group.label, group.legend) == ("doorkey", "doorkey (3 seeds, 400 steps)")
    assert group.values(EVAL) == [0.4, 1.4, 2.4]


def test_labels_show_the_options_that_differ(tmp_path):
    prior = "--configs doorkey lore_prior --llm.backend rules"
    found = groups_of(
        tmp_path,
        "--configs doorkey --seed 1",
        prior,
        f"{prior} --seed 1",
        f"{prior} --llm.rules_quality adversarial",
        "--configs doorkey lore_full --encoder.mlp_units 32",
    )
    assert [group.label for group in found] == [
        "doorkey", "lore_prior, rules_quality=oracle", "lore_prior, rules_quality=adversarial", "lore_full"
    ]  # fmt: skip
    assert [len(group.runs) for group in found] == [1, 2, 1, 1]
    assert found[3].options["encoder.mlp_units"] == 32
    assert [group.seeds for group in found[:2]] == ["1 seed", "2 seeds"]


def test_run_from_a_checkpoint_is_another_group_but_a_resumed_run_is_not(tmp_path):
    found = groups_of(
        tmp_path,
        "--configs doorkey",
        f"--configs doorkey --seed 1 --from_checkpoint {tmp_path / 'other_1' / 'latest.pt'}",
        f"--configs doorkey --seed 2 --from_checkpoint {tmp_path / 'other_2' / 'latest.pt'}",
        f"--configs doorkey --seed 3 --from_checkpoint {tmp_path / 'run_3' / 'checkpoints' / '10.pt'}",
    )
    assert [[run.seed for run in group.runs] for group in found] == [[0, 3], [1, 2]]
    assert [group.label for group in found] == ["from_checkpoint=null", "from_checkpoint=given"]


def test_runs_without_a_config_are_not_grouped(tmp_path):
    for name in ("a/_run", "b/_run", "c"):
        write_run(tmp_path / name, some_lines(), None)
    (tmp_path / "c" / "config.yaml").write_text("steps: [")
    runs, notes = logs.read_runs([tmp_path])
    assert len(notes) == 3 and all("labelled by its name" in note for note in notes)
    labels = [group.label for group in logs.group_runs(runs)]
    assert labels == ["run _run, no. 1", "run _run, no. 2", "run c"]


# Statistics


def test_band_is_the_interquartile_mean_and_its_interval():
    jittered = [([100, 203, 300], [0, 1, 2]), ([104, 200, 297], [1, 2, 3])]
    assert logs.band(jittered)[0].tolist() == [100, 203, 300]  # a few steps apart: no point is lost
    steps, iqm, low, high = logs.band([([0, 100, 200], [0, 1, 2]), ([0, 50, 200], [0, 1, 4])])
    assert steps.tolist() == [0, 100, 200]
    assert iqm == pytest.approx([0, 1.5, 3]) and low == pytest.approx([0, 1, 2])
    assert high == pytest.approx([0, 2, 4])


def test_band_covers_the_range_that_all_curves_share():
    curves = [([100, 200, 300, 400], [1, 2, 3, 4]), ([200, 300], [5, 7]), ([150, 350], [0, 0])]
    steps, iqm, *_ = logs.band(curves)
    assert steps.tolist() == [200, 300]
    assert iqm == pytest.approx([(0.25 * 0 + 2 + 0.25 * 5) / 1.5, (0.25 * 0 + 3 + 0.25 * 7) / 1.5])
    assert len(logs.band([([1, 2], [0, 0]), ([3, 4], [0, 0])])[0]) == 0
    assert len(logs.band([(list(range(999)), [0.0] * 999)])[0]) == logs.MAX_POINTS


def test_published_rates_fit_the_published_scores():
    scores = {
        row["name"]: [float(part) for part in row["score"].split(" ± ")]
        for row in figures.PUBLISHED["results"]
    }
    for name, rates in figures.PUBLISHED["rates"].items():
        assert len(rates) == 22
        assert achievement_score(list(rates.values())) == pytest.approx(
            scores[name][0], abs=scores[name][1] + 0.1
        )


# Figures


def crafter_lines(rate):
    rates = {
        "crafter/success_rate/wake_up": rate,
        "crafter/success_rate/eat_cow": 0.0,
        "crafter/score": rate / 9,
    }
    advice = {"uncertainty_gate/beta": 0.1, "eval_advised/episode_return": 2.0, "expl/reward_mean": math.nan}
    return [{**line, **rates, **advice} for line in some_lines()]


@pytest.fixture
def crafter(tmp_path):
    folder = tmp_path / "runs"
    for seed in range(2):
        lines = crafter_lines(50.0 + 9 * seed)
        write_run(folder / f"a_{seed}", lines, f"--configs crafter debug --seed {seed}")
    write_run(folder / "b_0", crafter_lines(30.0), "--configs crafter lore_prior debug")
    return folder


def panels_of(*places):
    groups = logs.group_runs(logs.read_runs(places)[0])
    return {title: [p.title for p in panels] for title, panels in figures.sections(groups).items()}


def test_only_panels_with_data_are_drawn(crafter, tmp_path):
    found = panels_of(crafter)
    training = "training (means of 5 log lines)"  # they are smoothed, and say so
    assert found["Returns"] == [training, "evaluation", "last quarter of the evaluations (circles: seeds)"]
    assert found["Achievements"] == [
        "success rates after 400 env steps",
        "published, after 1M env steps",
        "Crafter score (after env steps)",
        "achievements unlocked so far",
    ]
    assert found["Advice"] == ["evaluation (dashed: with the advice)", "weight of the advice (beta)"]
    assert "Exploration" not in found, "there is nothing but NaN"
    plain = write_run(tmp_path / "plain", [{"step": 5, TRAIN: 1.0}], "--configs doorkey")
    assert panels_of(plain) == {"Returns": [training, "last quarter of the training (circles: seeds)"]}


def test_other_worlds_are_not_compared_to_published_results(tmp_path):
    for name, option in (("small", "--crafter.area 32 32"), ("tv", "--noisy_tv.enabled True")):
        write_run(tmp_path / name, crafter_lines(50.0), f"--configs crafter debug {option}")
    assert len(panels_of(tmp_path)["Achievements"]) == 2


def test_figure_is_written(crafter, tmp_path):
    out = tmp_path / "out" / "curves.png"
    assert plot.main([str(crafter), "--out", str(out), "--metrics", "env/fps"]) == 0
    with Image.open(out) as image:
        assert image.width > 1200 and len(image.convert("RGB").getcolors(1 << 24)) > 100


def test_run_without_metrics_does_not_hide_the_others(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "a", [{"step": 5, TRAIN: 1.0}], "--configs doorkey")
    write_run(tmp_path / "b", [])
    monkeypatch.chdir(tmp_path)
    assert plot.main(["a", "b"]) == 0
    assert (tmp_path / "curves.png").is_file()
    assert f"{Path('b') / 'metrics.jsonl'} has no line" in capsys.readouterr().err


def test_mistakes_are_reported_in_one_line(tmp_path, capsys):
    run = write_run(tmp_path / "run", some_lines(), "--configs doorkey")
    bare = write_run(tmp_path / "bare", [{"step": 5}], "--configs doorkey")
    odd = write_run(tmp_path / "odd", [{"step": 5, "a\nb": 1.0}], "--configs doorkey")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "metrics.jsonl").write_text("")
    for words, message in (
        ([tmp_path / "nowhere"], "No metrics.jsonl in"),
        ([tmp_path / "new"], "has no line of metrics yet"),
        ([run, "--metrics", TRAIN, "env/fp"], "the nearest is env/fps"),
        ([bare, "--metrics", "env/fps"], "--metrics env/fps: no run has logged it; nothing is logged yet"),
        ([odd, "--metrics", "b"], "the nearest is a\ufffdb"),
        ([run, "--videos", "-1"], "--videos -1 must be at least 0"),
        ([run, "--max_mb", "nan"], "--max_mb nan must be at least 0"),
        ([run, "--out", tmp_path / "a.xyz"], "end --out in .png or .svg"),
        ([run, "--out", tmp_path / "a"], "end --out in .png or .svg"),
        ([run, "--out", run / "metrics.jsonl" / "a.png"], "Cannot write"),
    ):
        assert plot.main([*map(str, words)]) == 2, message
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
    assert not list(tmp_path.glob("a*.*"))
