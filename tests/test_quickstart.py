"""The Colab notebook runs: its cells are executed one after the other, with fewer steps."""

import json
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
from run_helpers import ROOT
from test_readme import understand_script

NOTEBOOK = json.loads((ROOT / "quickstart.ipynb").read_text(encoding="utf-8"))
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
# What is changed to be quick: the training's steps, those of the run of step 2, and where LoRe comes from.
QUICK = {
    "STEPS = 34000": "STEPS = 400",
    "lore_full debug --logdir": "lore_full debug --steps 160 --logdir",
    "https://example.com/lore.git": f"file://{ROOT}",
    "--episodes 10": "--episodes 2",
}
# pip is asked for nothing: what it would install is looked at.
FAKE_PIP = '#!/bin/sh\nwhile [ "$#" -gt 0 ]; do [ "$1" != -r ] || cat "$2" >> "$INSTALLED"; shift; done\n'


def as_python(cell: str) -> str:
    """A cell with its shell lines and magics as calls, as IPython does it."""
    lines = []
    for line in cell.splitlines():
        indent, mark, rest = re.fullmatch(r"(\s*)([!%]?)(.*)", line).groups()
        lines.append(f"{indent}{ {'!': 'shell', '%': 'magic'}[mark] }({rest!r}, globals())" if mark else line)
    return "\n".join(lines)


def test_it_is_a_notebook_without_outputs():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert NOTEBOOK["metadata"]["kernelspec"]["name"] == "python3"
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    for cell in NOTEBOOK["cells"]:
        assert cell["cell_type"] in ("markdown", "code") and isinstance(cell["metadata"], dict)
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)
    for cell in CELLS:
        compile(as_python(cell), "cell", "exec")


def test_commands_of_the_notebook_are_understood():
    commands = re.findall(r"^!python (.+)$", "\n".join(CELLS), re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        understand_script(shlex.split(command.replace("{STEPS}", "100")))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Colab is Linux")
def test_all_cells_run(tmp_path, monkeypatch):
    installed, shown, magics = tmp_path / "installed", [], []
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in (("python", f'#!/bin/sh\nexec {sys.executable} "$@"\n'), ("pip", FAKE_PIP)):
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)
    keys = [name for name in os.environ if name.endswith("_API_KEY")]
    env = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "INSTALLED": str(installed)}
    env = {name: value for name, value in env.items() if name not in keys} | {"OMP_NUM_THREADS": "1"}

    def shell(command: str, names: dict) -> None:
        command = re.sub(r"\{(\w+)\}", lambda match: str(names[match[1]]), command)
        done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"

    def magic(command: str, names: dict) -> None:
        if command.startswith("cd "):
            os.chdir(command.removeprefix("cd "))
        else:
            magics.append(command)  # of Colab's own TensorBoard

    def video(path: str, embed: bool, width: int) -> str:
        assert Path(path).stat().st_size > 0
        return path

    display = types.SimpleNamespace(Video=video, display=shown.append)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.chdir(tmp_path)
    text = "\0".join(CELLS)
    for old, new in QUICK.items():
        assert old in text
        text = text.replace(old, new)
    names = {"shell": shell, "magic": magic}
    for cell in text.split("\0"):
        exec(as_python(cell), names)
    assert Path.cwd() == tmp_path / "lore"
    pins = installed.read_text()
    assert "crafter==" in pins and "minigrid==" in pins and "tensorboard==" in pins
    assert not re.search(r"^(torch|numpy)==", pins, re.MULTILINE)  # Colab's own stay
    assert magics == ["load_ext tensorboard", "tensorboard --logdir ./logdir"]
    assert len(shown) == 2 and all("evaluate_" in path for path in shown)
    assert list(Path("logdir/debug").glob("videos/eval_*.mp4"))
