"""What worker processes use as well, and so without torch: the user's errors, whole files, seeds.

Importing torch would cost each worker a second and more than 100 MB.
"""

import errno
import hashlib
import json
import operator
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

DISK_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


class UserError(Exception):
    """A mistake or a lack on the user's side. The message tells what is wrong, where, and what to do."""


def write_error(path: str | os.PathLike, error: OSError) -> UserError:
    """What to tell the user when a file cannot be written."""
    if error.errno in DISK_FULL:
        return UserError(f"Cannot write {path}: disk full. Free some space, then start again.")
    return UserError(f"Cannot write {path}: {error.strerror or error}.")


def sync_folder(folder: Path) -> None:
    """Make a rename in a folder survive a power cut. Windows cannot open folders and does not need it."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temp_beside(path: Path) -> Path:
    """A hidden name of its own in the same folder, for a file that is not complete yet."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


def atomic_write(path: str | os.PathLike, write: Callable[[BinaryIO], None]) -> None:
    """Write a file so that it appears whole or not at all; missing folders are made.

    `write` gets an open binary file. If anything fails, the old file stays and no temporary file is left.
    Raises UserError when the system refuses (disk full, no permission); other errors of `write` pass through.
    """
    path = Path(path)
    temp = temp_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temp, "xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temp, path)
        finally:
            temp.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise write_error(path, error) from error


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed that depends on the seed and the names only, the same on every machine and Python."""
    plain = [name if isinstance(name, str) else operator.index(name) for name in (seed, *names)]
    digest = hashlib.sha256(json.dumps(plain).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def numpy_rng(seed: int, *names: str | int) -> np.random.Generator:
    """A NumPy generator of its own for the given purpose."""
    return np.random.default_rng(derive_seed(seed, *names))
