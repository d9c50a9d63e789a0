"""Checkpoints appear whole or not at all, and damaged ones are never used."""

import errno
import importlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import basics
import checkpoint as checkpoints
from basics import UserError


def all_files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def payload_at(step: int) -> dict:
    return {
        "weights": torch.full((300,), float(step)),
        "step": step,
        "big": 2**100,  # as in the states of NumPy's generators
        "list": [(1, None, "x", b"y")],
    }


def save_steps(folder: Path, *steps: int, keep: int = 3) -> None:
    for step in steps:
        checkpoints.save_checkpoint(folder, payload_at(step), step, keep)


def assert_payload(payload: dict, step: int) -> None:
    expected = payload_at(step)
    assert torch.equal(payload.pop("weights"), expected.pop("weights"))
    assert payload == expected


def test_last_few_checkpoints_stay_and_latest_is_the_last(tmp_path):
    save_steps(tmp_path, 10, 20, 30, 40, keep=2)
    assert all_files(tmp_path) == {
        "latest.pt",
        "checkpoints/step-000000000030.pt",
        "checkpoints/step-000000000040.pt",
    }
    payload, path, notes = checkpoints.load_checkpoint(tmp_path)
    assert_payload(payload, 40)
    assert path == tmp_path / "latest.pt" and notes == []


def test_latest_is_a_copy_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    save_steps(tmp_path, 10, 20)
    (tmp_path / "checkpoints" / "step-000000000020.pt").write_bytes(b"broken")
    assert_payload(checkpoints.load_checkpoint(tmp_path)[0], 20)


def test_run_that_resumed_from_an_earlier_step_deletes_the_later_checkpoints(tmp_path):
    save_steps(tmp_path, 100, 200, 300)
    save_steps(tmp_path, 250)
    assert [path.stem[-3:] for path in checkpoints.find_checkpoints(tmp_path)[1:]] == ["250", "200", "100"]
    assert_payload(checkpoints.load_checkpoint(tmp_path)[0], 250)


def test_damaged_latest_is_skipped_for_an_older_checkpoint_with_a_line(tmp_path):
    save_steps(tmp_path, 10, 20, 30)
    latest = tmp_path / "latest.pt"
    with open(latest, "r+b") as file:  # step-30.pt is the same file
        file.truncate(latest.stat().st_size // 2)
    for given_path in (tmp_path, latest):
        payload, path, notes = checkpoints.load_checkpoint(given_path)
        assert_payload(payload, 20)
        assert path.name == "step-000000000020.pt"
        assert len(notes) == 2 and "latest.pt is damaged and skipped" in notes[0]


def test_no_flipped_bit_reaches_the_weights(tmp_path):
    save_steps(tmp_path, 10)
    file = tmp_path / "checkpoints" / "step-000000000010.pt"
    whole = file.read_bytes()

    @given(st.integers(0, len(whole) - 1), st.integers(0, 7))
    def flip(place, bit):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        try:
            payload = checkpoints.load_checkpoint(file)[0]
        except UserError:
            return
        assert_payload(payload, 10)  # the bit was in the padding

    flip()
    place = whole.index(torch.tensor(10.0).numpy().tobytes() * 2)
    file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(UserError, match="checksum"):
        checkpoints.load_checkpoint(file)


def test_folder_without_a_readable_checkpoint_is_a_user_error(tmp_path):
    assert checkpoints.find_checkpoints(tmp_path) == []
    for path in (tmp_path, tmp_path / "latest.pt", tmp_path / "step.pt", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="No checkpoint at"):
            checkpoints.load_checkpoint(path)
    (tmp_path / "latest.pt").write_bytes(b"")
    with pytest.raises(UserError, match="No readable checkpoint"):
        checkpoints.load_checkpoint(tmp_path)


@pytest.mark.parametrize("value", [np.float64(1), np.zeros(2), Path("a")])
def test_payload_that_could_not_be_loaded_is_refused_when_it_is_saved(tmp_path, value):
    with pytest.raises(TypeError, match="numpy|pathlib"):
        checkpoints.save_checkpoint(tmp_path, {"a": [value]}, step=1, keep=1)
    assert all_files(tmp_path) == set()


@pytest.mark.parametrize("room", [0, 2000])
def test_full_disk_while_saving_keeps_the_last_checkpoint(tmp_path, monkeypatch, room):
    save_steps(tmp_path, 10)
    before = all_files(tmp_path)

    class SmallDisk:
        def __init__(self, file):
            self.file, self.left = file, room

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.left -= len(data)
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data)

    monkeypatch.setattr(basics, "open", lambda *args: SmallDisk(open(*args)), raising=False)
    with pytest.raises(UserError, match="disk full"):
        checkpoints.save_checkpoint(tmp_path, payload_at(20), step=20, keep=3)
    monkeypatch.undo()
    assert all_files(tmp_path) == before
    assert_payload(checkpoints.load_checkpoint(tmp_path)[0], 10)


@pytest.mark.parametrize("program", ["dreamer", "evaluate"])
def test_checkpoint_without_a_config_is_a_user_error(program, tmp_path, capsys):
    path = tmp_path / "latest.pt"
    checkpoints.save_tensors(path, {"format": checkpoints.CHECKPOINT_FORMAT})
    assert importlib.import_module(program).main(["--from_checkpoint", str(path)]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: The content of {path}") and errors.count("\n") == 1
