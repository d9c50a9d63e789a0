"""The checkpoints in the repository reach the returns that docs/results.md states."""

import re
from pathlib import Path

import pytest
from run_helpers import ROOT
from test_suites import NO_DM_CONTROL

import evaluate

CHECKPOINTS = ROOT / "checkpoints"
MAX_MIB = 5  # of a checkpoint


def checkpoints() -> dict[str, dict[str, str]]:
    """The rows of the page's table of checkpoints, by file."""
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| checkpoint .*\n\| -.*\n((?:\|.*\n)+)", page, re.MULTILINE)
    names = ("file", "trained", "return", "random", "episodes", "least")
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()]
    return {row[0].strip("`"): dict(zip(names, row, strict=True)) for row in rows}


def test_every_checkpoint_is_small_and_on_the_page():
    files = {f"checkpoints/{path.name}": path for path in CHECKPOINTS.iterdir()}
    assert files.keys() == checkpoints().keys()
    assert all(path.stat().st_size <= MAX_MIB * 2**20 for path in files.values())


@pytest.mark.slow
@pytest.mark.parametrize("file", checkpoints())
def test_checkpoint_reaches_its_stated_return(file):
    if Path(file).name.startswith("dmc_") and NO_DM_CONTROL:
        pytest.skip("DeepMind Control has no wheels for this Python")
    stated = checkpoints()[file]
    played = evaluate.evaluate(ROOT / file, int(stated["episodes"]), device="cpu")
    least, mean = float(stated["least"]), float(stated["return"].split()[0])
    assert float(stated["random"].split()[0]) < least <= mean
    assert played["return_mean"] >= least
