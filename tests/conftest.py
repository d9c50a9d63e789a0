"""Fixtures that the tests share."""

import os
from pathlib import Path

import hypothesis
import pytest
import torch

# Tests run on small shared machines: no time limit for an example, and the same examples each time.
hypothesis.settings.register_profile("lore", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("lore")

# More threads than this only slow down nets as tiny as the tests'.
torch.set_num_threads(min(2, os.cpu_count() or 1, torch.get_num_threads()))


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder with the reference's values; LORE_GOLDEN_DIR names another one."""
    return Path(os.environ.get("LORE_GOLDEN_DIR") or Path(__file__).parent / "data" / "golden")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A function that gives the logdir of the uninterrupted run with some options; each is run once."""
    from run_helpers import train  # imports the program, which few tests need

    done = {}

    def run(*options):
        if options not in done:
            done[options] = tmp_path_factory.mktemp("whole")
            assert train(done[options], *options) == 0
        return done[options]

    return run
