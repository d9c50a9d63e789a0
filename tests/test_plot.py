"""plot.py draws what metrics.jsonl holds, and says what is wrong with what it cannot draw."""

import json

import pytest
from PIL import Image

import plot


@pytest.fixture
def logdir(tmp_path):
    lines = [
        {"step": step, "env/episode_return": step / 100, "crafter/success_rate/wake_up": 50.0}
        for step in (100, 200, 300)
    ]
    lines[1]["eval/episode_return"] = 3.0
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def test_a_curve_has_the_steps_at_which_the_metric_was_logged(logdir):
    lines = plot.read_metrics(logdir)
    assert plot.curve(lines, "env/episode_return") == ([100, 200, 300], [1.0, 2.0, 3.0])
    assert plot.curve(lines, "eval/episode_return") == ([200], [3.0])


def test_smoothing_is_the_mean_of_the_last_lines(logdir):
    assert plot.curve(plot.read_metrics(logdir), "env/episode_return", 2) == (
        [100, 200, 300],
        [1.0, 1.5, 2.5],
    )


def test_the_picture_is_written(logdir, tmp_path):
    out = tmp_path / "curves.png"
    assert plot.main([str(logdir), str(logdir), "--out", str(out)]) == 0
    with Image.open(out) as image:
        assert image.width == 1500 and len(image.convert("L").getcolors()) > 2


@pytest.mark.parametrize("content", [None, "{not json\n"])
def test_a_run_without_metrics_is_one_line(content, tmp_path, capsys):
    if content:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert plot.main([str(tmp_path), "--out", str(tmp_path / "a.png")]) == 2
    error = capsys.readouterr().err
    assert "metrics.jsonl" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "a.png").exists()
