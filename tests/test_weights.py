"""Weights as .safetensors files: written by evaluate.py --export, and taken where a checkpoint is."""

import errno
import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from run_helpers import differences, log, main, train
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_evaluate import error, run

import checkpoint as checkpoints
import evaluate
from basics import UserError
from config import Config

PLAY = ("--episodes", 3)


@pytest.fixture(scope="module")
def logdir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert train(folder, "--eval_every", "0", "--opt.lr", "3e-3", "--opt.warmup", "0") == 0
    return folder


def export(capsys, checkpoint: Path, path: Path, *options: str) -> dict[str, torch.Tensor]:
    """The tensors of an exported file."""
    args = ["--from_checkpoint", str(checkpoint), "--export", str(path), *options]
    capsys.readouterr()
    assert evaluate.main(args) == 0
    assert capsys.readouterr().out.startswith(f"Wrote {path}: ")
    return load_file(path)


def about(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def copy_alone(path: Path, folder: Path, name: str) -> Path:
    folder.mkdir()
    return Path(shutil.copy(path, folder / name))


def result(capsys, path: Path, *options: object) -> dict:
    return run(capsys, "--from_checkpoint", path, *PLAY, *options)


def judged(result: dict) -> dict:
    return {k: v for k, v in result.items() if k not in ("checkpoint", "videos")}


# One file is enough


@pytest.mark.parametrize("name", ["latest.pt", "agent.pt", "agent.safetensors"])
def test_one_file_in_an_empty_folder_is_enough(logdir, tmp_path, capsys, monkeypatch, name):
    whole = result(capsys, logdir / "latest.pt")
    if name.endswith("pt"):
        path = copy_alone(logdir / "latest.pt", tmp_path / "alone", name)
    else:
        path = tmp_path / "alone" / name
        export(capsys, logdir / "latest.pt", path)
    monkeypatch.chdir(tmp_path)
    alone = result(capsys, path)
    assert judged(alone) == judged(whole), "to the last bit"
    assert [file.name for file in path.parent.iterdir()] == [name]
    videos = result(capsys, path, "--video")["videos"]
    assert videos == [str(path.parent / "videos" / f"evaluate_120_{i}.mp4") for i in range(3)]
    assert [file.name for file in tmp_path.iterdir()] == ["alone"]


def test_exported_weights_are_those_of_the_checkpoint(logdir, tmp_path, capsys):
    path = tmp_path / "agent.safetensors"
    tensors = export(capsys, logdir, path)
    agent = checkpoints.load_checkpoint(logdir)[0]["agent"]
    theirs = {f"{part}.{k}": v for part in ("world_model", "behavior") for k, v in agent[part].items()}
    kept = {name: value for name, value in theirs.items() if "slow_critic" not in name}
    assert (
        differences(tensors, {name: kept[name] for name in tensors}) == [] and tensors.keys() == kept.keys()
    )
    read = checkpoints.read_weights(path)
    critic = {k[7:]: v for k, v in read["agent"]["behavior"].items() if k.startswith("critic.")}
    slow = {k[12:]: v for k, v in read["agent"]["behavior"].items() if k.startswith("slow_critic.")}
    assert critic and differences(critic, slow) == []


def test_the_file_tells_of_itself_and_not_of_the_machine(logdir, tmp_path, capsys):
    path = tmp_path / "agent.safetensors"
    export(capsys, logdir, path)
    told = about(path)
    assert (told["task"], told["step"], told["torch"]) == ("dummy_cue", "120", torch.__version__)
    config = Config.from_yaml(told["config"], "the file")
    assert config.logdir is None and config.rssm.deter == 8
    assert str(logdir) not in path.read_bytes().decode("latin-1")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_matrices_may_be_rounded(logdir, tmp_path, capsys, dtype):
    whole = export(capsys, logdir, tmp_path / "whole.safetensors")
    path = tmp_path / "rounded.safetensors"
    rounded = export(capsys, logdir, path, "--dtype", dtype)
    for name, value in whole.items():
        assert rounded[name].dtype == (checkpoints.DTYPES[dtype] if value.dim() > 1 else torch.float32)
        torch.testing.assert_close(rounded[name].float(), value, rtol=2**-8, atol=1e-7)
    assert path.stat().st_size < 0.75 * (tmp_path / "whole.safetensors").stat().st_size
    assert len(result(capsys, path)["returns"]) == 3
    again = tmp_path / "again.safetensors"
    assert differences(export(capsys, path, again, "--dtype", dtype), rounded) == []
    assert about(again) == about(path)


def test_what_a_precision_cannot_hold_is_refused(logdir, tmp_path):
    payload = checkpoints.load_checkpoint(logdir)[0]
    config = Config.from_yaml(payload["config"], "here")
    payload["agent"]["behavior"]["actor.outs.0.weight"][0, 0] = 1e5
    path = tmp_path / "agent.safetensors"
    with pytest.raises(UserError, match="float16 cannot hold behavior.actor.outs.0.weight, which has 1e"):
        checkpoints.write_weights(path, config, 1, payload["agent"], "float16")
    assert list(tmp_path.iterdir()) == []
    checkpoints.write_weights(path, config, 1, payload["agent"], "bfloat16")


def test_the_decoder_may_stay_at_home(logdir, tmp_path, capsys):
    path = tmp_path / "agent.safetensors"
    tensors = export(capsys, logdir, path, "--without_decoder")
    assert not any("decoder" in name for name in tensors) and any("encoder" in name for name in tensors)
    assert judged(result(capsys, path)) == judged(result(capsys, logdir))


# A new run from weights


def test_a_run_starts_from_weights_with_a_new_optimiser_and_says_so(logdir, tmp_path, capsys):
    path = tmp_path / "agent.safetensors"
    export(capsys, logdir, path, "--without_decoder")
    new = tmp_path / "new"
    assert main("--from_checkpoint", str(path), "--logdir", str(new), "--steps", "60") == 0
    told = log(new)
    assert "weights alone, so the optimiser starts anew" in told and "no decoder, which starts anew" in told
    assert main("--from_checkpoint", str(path), "--logdir", str(new), "--steps", "80") == 0
    assert "Resumed at step 60" in log(new) and log(new).count("starts anew") == 2


def test_weights_belong_to_no_run(logdir, tmp_path, capsys, monkeypatch):
    path = tmp_path / "agent.safetensors"
    export(capsys, logdir, path)
    monkeypatch.chdir(tmp_path)
    assert main("--from_checkpoint", str(path), "--steps", "40") == 0
    (new,) = (tmp_path / "logdir" / "dummy_cue").iterdir()
    assert "optimiser starts anew" in log(new)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["agent.safetensors", "logdir"]


def test_weights_of_another_task_are_refused(logdir, tmp_path, capsys):
    path = tmp_path / "agent.safetensors"
    export(capsys, logdir, path)
    command = ["--from_checkpoint", str(path), "--logdir", str(tmp_path / "new"), "--task", "dummy_vector"]
    capsys.readouterr()
    assert main(*command) == 2
    assert "does not fit this agent" in capsys.readouterr().err


# An explorer, an adviser


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        "--expl_behavior lpm --expl_task_actor separate --lpm.fifo 40",
        "--configs lore_full --llm.backend advice_helpers:CueOracle --llm.min_gap_steps 1 --llm.until 1000",
    ],
    ids=["lpm", "lore_full"],
)
def test_explorers_and_advice_are_exported_too(tmp_path, capsys, options):
    assert train(tmp_path / "run", *options.split(), "--eval_every", "0") == 0
    path = tmp_path / "agent.safetensors"
    tensors = export(capsys, tmp_path / "run", path)
    assert any(name.startswith(("explorer.", "policy.")) for name in tensors)
    assert not any("fifo" in name or "slow_critic" in name for name in tensors)
    advised = ["--advised"] if "lore_full" in options else []
    one, other = (result(capsys, place, "--video", *advised) for place in (tmp_path / "run", path))
    assert judged(one) == judged(other)
    videos = [[Path(video).read_bytes() for video in each["videos"]] for each in (one, other)]
    assert videos[0] == videos[1], "what the agent is curious of is in the picture"
    assert main("--from_checkpoint", str(path), "--logdir", str(tmp_path / "new"), "--steps", "60") == 0


# Damage


@pytest.fixture
def exported(logdir, tmp_path, capsys) -> Path:
    path = tmp_path / "agent.safetensors"
    export(capsys, logdir, path)
    return path


def changed(path: Path, tensors: dict | None = None, **metadata: str | None) -> None:
    """Write the file anew with some of its metadata changed, or left out."""
    told = {name: value for name, value in {**about(path), **metadata}.items() if value is not None}
    save_file(tensors or load_file(path), path, metadata=told)


def refused(capsys, path: Path) -> str:
    """The one line of all programs that read it."""
    line = error(capsys, "--from_checkpoint", path)
    assert str(path) in line and len(line) < 1000
    assert main("--from_checkpoint", str(path), "--logdir", str(path.parent / "new")) == 2
    assert capsys.readouterr().err == line
    assert not (path.parent / "new").exists()
    return line


def test_a_file_that_was_cut_off_is_refused(exported, capsys):
    data = exported.read_bytes()
    for length in (0, 4, 8, 500, len(data) // 2, len(data) - 1):
        exported.write_bytes(data[:length])
        assert "damaged" in refused(capsys, exported)


def test_any_changed_bit_is_found(exported, capsys):
    data = exported.read_bytes()
    (header,) = struct.unpack("<Q", data[:8])
    config = data.index(b"train_ratio: 3")  # an option with a value that is as good as another
    for place in (config + len("train_ratio: "), header + 8, len(data) // 2, len(data) - 1):
        flipped = bytearray(data)
        flipped[place] ^= 1
        exported.write_bytes(flipped)
        assert "checksum is wrong" in refused(capsys, exported)


def test_a_header_without_bounds_is_not_read(exported, capsys):
    exported.write_bytes(struct.pack("<Q", 2**60) + exported.read_bytes()[8:])
    assert "its header says that it has 1,152,921,504,606,846,976 bytes" in refused(capsys, exported)


def test_other_safetensors_files_are_refused(exported, capsys):
    tensors = load_file(exported)
    save_file(tensors, exported)
    assert "holds no weights of this version of LoRe" in refused(capsys, exported)


def test_weights_of_a_later_format_are_refused(exported, capsys):
    changed(exported, lore_format="2")
    assert "Use the version that wrote it" in refused(capsys, exported)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("step", "-3", "step must be a number"),
        ("step", None, "KeyError: 'step'"),
        ("skills", "[[1, 2]]", "skills must be pairs"),
        ("skills", "[" * 100_000, "RecursionError"),
        ("skills", "{", "JSONDecodeError"),
        ("config", "task: [", "the config in"),
        ("config", "task: !!python/object/apply:os.system [id]", "the config in"),
        ("config", "rsm: {deter: 8}", "the nearest is rssm"),
        ("config", None, "KeyError: 'config'"),
    ],
)
def test_whoever_forged_the_checksum_too_is_refused(exported, capsys, name, value, told):
    tensors, claims = load_file(exported), about(exported)
    del claims["sha256"]
    claims = {k: v for k, v in {**claims, name: value}.items() if v is not None}
    changed(exported, **{name: value}, sha256=checkpoints._digest(claims, tensors))
    assert told in refused(capsys, exported)


def test_tensors_of_unknown_parts_or_shapes_are_refused(exported, capsys):
    for name, told in (
        ("critic.weight", "KeyError: 'critic'"),
        ("world_model.rssm.gru.weight", "world_model.rssm.gru.weight is (3,) in the checkpoint"),
    ):
        tensors, claims = {**load_file(exported), name: torch.zeros(3)}, about(exported)
        del claims["sha256"]
        forged = exported.with_name("forged.safetensors")
        save_file(tensors, forged, metadata={**claims, "sha256": checkpoints._digest(claims, tensors)})
        assert told in error(capsys, "--from_checkpoint", forged)


# The command line


def test_export_is_told_what_does_not_fit(logdir, tmp_path, capsys):
    path = tmp_path / "agent.safetensors"
    assert "must end in .safetensors" in error(capsys, "--logdir", logdir, "--export", tmp_path / "agent.pt")
    for option in ("--video", "--random", "--json", "--episodes=3"):
        name = option.partition("=")[0]
        assert f"so {name} has no use" in error(capsys, "--logdir", logdir, "--export", path, option)
    for option in ("--dtype=float16", "--without_decoder"):
        assert "name the file by --export" in error(capsys, "--logdir", logdir, option)
    assert "invalid choice: 'float64'" in error(
        capsys, "--logdir", logdir, "--export", path, "--dtype", "float64"
    )
    assert "No checkpoint at" in error(capsys, "--from_checkpoint", path)
    assert "Cannot write" in error(capsys, "--logdir", logdir, "--export", logdir / "latest.pt" / path.name)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_file_before(exported, logdir, capsys, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = exported.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    assert "disk full" in error(capsys, "--logdir", logdir, "--export", exported, "--dtype", "bfloat16")
    assert exported.read_bytes() == before and list(exported.parent.iterdir()) == [exported]


def test_metadata_can_be_read_by_any_reader(exported):
    """The header is JSON: eight bytes of length, then names, shapes and the metadata."""
    data = exported.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert header["__metadata__"]["task"] == "dummy_cue" and length < checkpoints.MAX_HEADER / 8
