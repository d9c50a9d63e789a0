"""Finds an OpenGL that works here, for environments that MuJoCo draws."""

import contextlib
import functools
import importlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterator

from basics import UserError

BACKENDS = ("egl", "osmesa", "glfw")  # in the order of trial: a GPU or software, software, a window system
OFF = ("0", "false", "off", "disable", "disabled")  # values of MUJOCO_GL that turn drawing off
# What has to be installed for each.
LIBRARIES = {
    "egl": "libEGL (Debian, Ubuntu: apt install libegl1 libgl1-mesa-dri; conda: conda-forge libegl mesalib)",
    "osmesa": "libOSMesa (Debian, Ubuntu: apt install libosmesa6; conda: conda-forge mesalib)",
    "glfw": "libGL and a display (Debian, Ubuntu: apt install libgl1; conda: conda-forge libgl)",
}
PROBE_TIMEOUT = 60  # seconds for a trial, most of which is the import of MuJoCo on a busy machine
# Draws a picture. Ends without clean-up: some drivers complain when the interpreter closes.
PROBE = """
import mujoco, os
renderer = mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 16, 16)
renderer.render()
os._exit(0)
"""


def find_backend(task: str) -> str:
    """The first backend that works here, or that of MUJOCO_GL if it is set. Changes nothing.

    Raises UserError, which names the missing library.
    """
    wanted = os.environ.get("MUJOCO_GL", "").lower()
    if wanted in OFF:
        raise UserError(f"{task} shows images, but MUJOCO_GL={wanted} turns drawing off: unset it.")
    backend = next((name for name in ([wanted] if wanted else BACKENDS) if _works(name)), None)
    if backend is None and wanted:
        library = LIBRARIES.get(wanted, f"it is none of {', '.join(BACKENDS)}")
        raise UserError(
            f"{task}: MUJOCO_GL={wanted} cannot draw here: {library}. Unset it to try the others."
        )
    if backend is None:
        raise UserError(
            f"{task} shows images, and no OpenGL works here. Install {LIBRARIES['egl']}, "
            f"or {LIBRARIES['osmesa']}."
        )
    return backend


def choose_backend(task: str) -> None:
    """Set MUJOCO_GL to `find_backend`. Call it before an environment draws for the first time."""
    backend = os.environ["MUJOCO_GL"] = find_backend(task)
    render = sys.modules.get("dm_control._render")
    if render and backend != render.BACKEND:
        importlib.reload(render)  # it was imported by an environment that does not draw, and chose for itself


@contextlib.contextmanager
def dm_control(task: str, draws: bool) -> Iterator[None]:
    """Within, dm_control is imported and its environments are made: able to draw, or without any OpenGL."""
    own = os.environ.get("MUJOCO_GL")
    if draws:
        choose_backend(task)
    else:
        os.environ["MUJOCO_GL"] = "disabled"  # else the import looks for an OpenGL, which may warn or fail
    handlers = logging.root.handlers[:]
    try:
        yield
    finally:
        logging.root.handlers[:] = handlers  # absl adds one, which would show each line of the log twice
        if not draws:
            del os.environ["MUJOCO_GL"]
            if own is not None:
                os.environ["MUJOCO_GL"] = own


@functools.cache
def _works(backend: str) -> bool:
    """Whether MuJoCo can draw with it; tried in another process, as a failed trial spoils a process."""
    environ = {**os.environ, "MUJOCO_GL": backend}
    command = [sys.executable, "-c", PROBE]
    try:
        return (
            subprocess.run(command, env=environ, capture_output=True, timeout=PROBE_TIMEOUT).returncode == 0
        )
    except subprocess.TimeoutExpired:
        return False
