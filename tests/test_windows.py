"""On Windows a file that another program has open cannot be replaced: LoRe waits for a moment."""

import os

import pytest

import basics
from basics import UserError, atomic_write


def test_a_file_that_is_open_for_a_moment_is_replaced_later(tmp_path, monkeypatch):
    """As virus scanners and readers hold them."""
    monkeypatch.setattr(basics, "WINDOWS", True)
    naps = []
    monkeypatch.setattr(basics.time, "sleep", naps.append)
    replace, refusals = os.replace, [True] * 3

    def busy(source, target):
        if refusals:
            refusals.pop()
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", busy)
    atomic_write(tmp_path / "file", lambda file: file.write(b"new"))
    assert (tmp_path / "file").read_bytes() == b"new" and len(naps) == 3


def test_a_file_that_stays_open_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(basics, "WINDOWS", True)
    monkeypatch.setattr(basics.time, "sleep", lambda seconds: None)

    def busy(source, target):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", busy)
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(UserError, match="Permission denied"):
        atomic_write(tmp_path / "file", lambda file: file.write(b"new"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"
