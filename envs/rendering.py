"""Finds a working OpenGL for environments that MuJoCo renders."""

import contextlib
import functools
import importlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterator

from basics import UserError

BACKENDS = ("egl", "osmesa", "glfw")  # in the order of trial: GPU or software, software, window system
OFF = ("0", "false", "off", "disable", "disabled")  # values of MUJOCO_GL that turn rendering off
# Required libraries.
LIBRARIES = {
    "egl": "libEGL (Debian, Ubuntu: apt install libegl1 libgl1-mesa-dri; conda: conda-forge libegl mesalib)",
    "osmesa": "libOSMesa (Debian, Ubuntu: apt install libosmesa6; conda: conda-forge mesalib)",
    "glfw": "libGL and a display (Debian, Ubuntu: apt install libgl1; conda: conda-forge libgl)",
}
PROBE_TIMEOUT = 60  # seconds for a trial; the import of MuJoCo is slow on a busy machine
# Renders an image. Exits without clean-up, in which some drivers fail.
PROBE = """
import mujoco, os
renderer = mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 16, 16)
renderer.render()
os._exit(0)
"""


def find_backend(task: str) -> str:
    """The first backend that works, or that of MUJOCO_GL if set.

    Raises UserError, which names the missing library.
    """
    wanted = os.environ.get("MUJOCO_GL", "").lower()
    if wanted in OFF:
        raise UserError(f"{task} shows images, but MUJOCO_GL={wanted} turns rendering off: unset it.")
    backend = next((name for name in ([wanted] if wanted else BACKENDS) if _works(name)), None)
    if backend is None and wanted:
        library = LIBRARIES.get(wanted, f"it is none of {', '.join(BACKENDS)}")
        raise UserError(
            f"{task}: MUJOCO_GL={wanted} cannot render here: {library}. Unset it to try the others."
        )
    if backend is None:
        raise UserError(
            f"{task} shows images, but no OpenGL works here. Install {LIBRARIES['egl']}, "
            f"or {LIBRARIES['osmesa']}."
        )
    return backend


def choose_backend(task: str) -> None:
    """Set MUJOCO_GL to `find_backend`. Call it before an environment first renders."""
    backend = os.environ["MUJOCO_GL"] = find_backend(task)
    render = sys.modules.get("dm_control._render")
    if render and backend != render.BACKEND:
        importlib.reload(render)  # imported before by an environment that does not render


@contextlib.contextmanager
def dm_control(task: str, draws: bool) -> Iterator[None]:
    """Import dm_control and make its environments within: with OpenGL if it `draws`, else without."""
    own = os.environ.get("MUJOCO_GL")
    if draws:
        choose_backend(task)
    else:
        os.environ["MUJOCO_GL"] = "disabled"  # otherwise the import looks for an OpenGL, which may fail
    handlers = logging.root.handlers[:]
    try:
        yield
    finally:
        logging.root.handlers[:] = handlers  # absl adds one, which would duplicate each log line
        if not draws:
            del os.environ["MUJOCO_GL"]
            if own is not None:
                os.environ["MUJOCO_GL"] = own


@functools.cache
def _works(backend: str) -> bool:
    """Whether MuJoCo renders with it; tried in another process, since a failed trial breaks a process."""
    environ = {**os.environ, "MUJOCO_GL": backend}
    command = [sys.executable, "-c", PROBE]
    try:
        return not subprocess.run(command, env=environ, capture_output=True, timeout=PROBE_TIMEOUT).returncode
    except subprocess.TimeoutExpired:
        return False
