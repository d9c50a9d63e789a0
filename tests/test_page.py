"""The page of plot.py is one file that is safe to open."""

import base64
import re
import shlex
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from test_plot import crafter_lines, some_lines, write_run

import config
import plot
from logger import Logger, write_mp4
from reports import figures, logs, page

VOID = {"meta", "br", "img"}  # elements without an end
EVIL = "<script>alert(1)<\x7fscript>\"'& {{ 7 * 7 }}"
FOLDER = EVIL if sys.platform != "win32" else "& {{ 7 * 7 }}"  # Windows has no such file names


class Parsed(HTMLParser):
    """Elements of a page as (tag, attributes); every start tag must have its end tag."""

    def __init__(self, text):
        super().__init__()
        self.found, self.text, self._open = [], "", []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


def film(path, size=32):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mp4(path, np.random.default_rng(0).integers(0, 255, (15, size, size, 3), np.uint8), 15)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds with videos, one run of another group, and one with hostile names."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in range(2):
        logdir = write_run(
            folder / f"a_{seed}", crafter_lines(50.0), f"--configs crafter debug --seed {seed}"
        )
        logger = Logger(logdir, total_steps=400, fps=15, resume_step=400, console=False)
        for step in (200, 400):
            logger.video("train_openl", np.full((5, 8, 24, 3), step // 2, np.uint8), step)
        logger.close()
    film(folder / "a_0" / "videos" / "eval_400_0.mp4")
    write_run(folder / "b_0", crafter_lines(30.0), "--configs crafter lore_prior debug")
    write_run(folder / FOLDER, [{**line, EVIL: 1.0} for line in some_lines()], None)
    return folder


@pytest.fixture(scope="module")
def text(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "page.html"
    assert plot.main([str(runs), "--html", str(out), "--metrics", EVIL]) == 0
    return out.read_text(encoding="utf-8")


def test_page_is_valid_html_and_shows_the_runs(text):
    seen = Parsed(text)
    ids = [attrs["id"] for _, attrs in seen.found if "id" in attrs]
    assert len(ids) == len(set(ids)), "figures keep their ids apart"
    for each in (
        "crafter_reward",
        "lore_prior",
        "2 seeds",
        "400 steps",
        "1.40",
        "DreamerV3, 200M parameters",
    ):
        assert each in seen.text
    assert sum(tag == "video" for tag, _ in seen.found) == 1
    assert "left out" not in seen.text


def test_names_from_files_are_escaped(text):
    seen = Parsed(text)
    assert not {"script", "iframe", "object"} & {tag for tag, _ in seen.found}
    assert not [name for _, attrs in seen.found for name in attrs if name.startswith("on")]
    name = logs.printable(f"run {FOLDER}")
    assert (
        name in seen.text
        and logs.printable(EVIL) in seen.text
        and "{{ 7 * 7 }}" in name
        and "49 " not in seen.text
    )
    (policy,) = [attrs for _, attrs in seen.found if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy["content"].startswith("default-src 'none'; ") and "script-src" not in policy["content"]


def test_page_loads_nothing(text):
    sources = {source["url"] for source in figures.PUBLISHED["sources"].values()}
    links = {attrs["href"] for tag, attrs in Parsed(text).found if tag == "a"}
    assert links == sources
    for tag, attrs in Parsed(text).found:
        if tag != "a":
            sources = [
                attrs.get(name) or "" for name in ("src", "href", "xlink:href", "srcset", "poster", "data")
            ]
            assert all(value.startswith(("data:", "#")) for value in sources if value), tag
    assert not re.search(r"@import|url\((?!#)", text)


def test_newest_prediction_is_on_the_page(runs, text):
    step, gif = page.open_loop(runs / "a_1")
    assert step == 400 and gif.startswith(b"GIF8")
    assert text.count(base64.b64encode(gif).decode()) == 2  # of both seeds, which have the same
    assert page.open_loop(runs / "b_0") is None


def test_all_runs_get_a_video_before_one_gets_two(tmp_path):
    videos = {name: tmp_path / f"{name}.mp4" for name in ("a", "b", "c", "huge")}
    for name, path in videos.items():
        path.write_bytes(b"\0\0\0\0ftyp" + bytes(992 if name != "huge" else 10**6))
    wanted = [[videos["a"], videos["b"]], [videos["huge"], videos["c"]], []]
    films, left_out = page.embed(wanted, 2500)
    assert [[film["title"] for film in each] for each in films] == [["a", "b"], [], []] and left_out == 2
    films, left_out = page.embed([wanted[0], [(7, b"GIF8" + bytes(996))]], 2000)
    assert [[film["title"] for film in each] for each in films] == [["a"], ["open-loop prediction, step 7"]]
    assert left_out == 1


def test_command_repeats_the_run(tmp_path):
    options = (
        "--configs crafter lore_full debug --seed 7 --encoder.cnn_mults 1 2 3 4 --llm.until 50 "
        "--traindir 'a b' --encoder.mlp_keys=--odd --crafter.area 32 32 --prior.enabled False"
    )
    logdir = tmp_path / "it's a run"
    saved = config.load([*shlex.split(options), "--logdir", str(logdir)])
    run = logs.RunLog(logdir, some_lines(), saved)
    python, script, *words = shlex.split(page.command(run))
    assert (python, script) == ("python3", "dreamer.py")
    again = config.load(words)
    assert again.to_dict() == saved.replace({"logdir": "./logdir/it's a run"}).to_dict()
    assert page.command(logs.RunLog(logdir, some_lines(), None)) == ""
