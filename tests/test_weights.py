"""Weights to share (evaluate.py --export), and parts of an agent for another task or size (--transfer)."""

import shutil
import struct
from pathlib import Path

import pytest
import torch
from run_helpers import TINY, differences, log, main, train
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_evaluate import error, run

import checkpoint as checkpoints
import config as configs
import dreamer
import evaluate
from basics import UserError
from config import Config


@pytest.fixture(scope="module")
def logdir(tmp_path_factory) -> Path:
    """A run whose weights have moved away from their initial values."""
    folder = tmp_path_factory.mktemp("run")
    assert train(folder, "--eval_every", "0", "--opt.lr", "3e-3", "--opt.warmup", "0") == 0
    return folder


@pytest.fixture(scope="module")
def trained(logdir) -> dict:
    return checkpoints.load_checkpoint(logdir)[0]["agent"]


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


def result(capsys, path: Path, *options: object) -> dict:
    """What evaluate.py prints, without the names of files."""
    printed = run(capsys, "--from_checkpoint", path, "--episodes", 3, *options)
    return {key: value for key, value in printed.items() if key not in ("checkpoint", "videos")}


# --- Export


@pytest.mark.parametrize("name", ["agent.pt", "agent.safetensors"])
def test_one_file_in_an_empty_folder_evaluates_as_the_run_does(logdir, tmp_path, capsys, monkeypatch, name):
    path = tmp_path / "alone" / name
    path.parent.mkdir()
    if name == "agent.pt":
        shutil.copy(logdir / "latest.pt", path)
    else:
        export(capsys, logdir / "latest.pt", path)
    monkeypatch.chdir(tmp_path)
    assert result(capsys, path, "--video") == result(capsys, logdir / "latest.pt"), "to the last bit"
    assert len(list((path.parent / "videos").iterdir())) == 3
    assert [file.name for file in tmp_path.iterdir()] == ["alone"]


def test_exported_weights_are_those_of_the_checkpoint(logdir, trained, tmp_path, capsys):
    path = tmp_path / "agent.safetensors"
    tensors = export(capsys, logdir, path)
    theirs = {f"{part}.{k}": v for part in ("world_model", "behavior") for k, v in trained[part].items()}
    kept = {name: value for name, value in theirs.items() if "slow_critic" not in name}
    assert differences(tensors, {name: kept[name] for name in tensors}) == []
    assert tensors.keys() == kept.keys()
    read = checkpoints.read_weights(path)["agent"]["behavior"]
    critic = {k[7:]: v for k, v in read.items() if k.startswith("critic.")}
    slow = {k[12:]: v for k, v in read.items() if k.startswith("slow_critic.")}
    assert critic and differences(critic, slow) == []


def test_exported_file_has_task_step_and_config_but_no_paths(logdir, tmp_path, capsys):
    path = tmp_path / "agent.safetensors"
    export(capsys, logdir, path)
    header = about(path)
    assert (header["task"], header["step"], header["torch"]) == ("dummy_cue", "120", torch.__version__)
    config = Config.from_yaml(header["config"], "the file")
    assert config.logdir is None and config.rssm.deter == 8
    assert str(logdir) not in path.read_bytes().decode("latin-1")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_matrices_can_be_rounded(logdir, tmp_path, capsys, dtype):
    whole = export(capsys, logdir, tmp_path / "whole.safetensors")
    path = tmp_path / "rounded.safetensors"
    rounded = export(capsys, logdir, path, "--dtype", dtype)
    for name, value in whole.items():
        assert rounded[name].dtype == (checkpoints.DTYPES[dtype] if value.dim() > 1 else torch.float32)
        torch.testing.assert_close(rounded[name].float(), value, rtol=2**-8, atol=1e-7)
    assert path.stat().st_size < 0.75 * (tmp_path / "whole.safetensors").stat().st_size
    assert len(result(capsys, path)["returns"]) == 3


def test_number_that_a_dtype_cannot_hold_is_refused(logdir, tmp_path):
    payload = checkpoints.load_checkpoint(logdir)[0]
    config = Config.from_yaml(payload["config"], "here")
    payload["agent"]["behavior"]["actor.outs.0.weight"][0, 0] = 1e5
    path = tmp_path / "agent.safetensors"
    with pytest.raises(UserError, match="float16 cannot hold behavior.actor.outs.0.weight"):
        checkpoints.write_weights(path, config, 1, payload["agent"], "float16")
    assert list(tmp_path.iterdir()) == []
    checkpoints.write_weights(path, config, 1, payload["agent"], "bfloat16")


def test_new_run_starts_from_weights_without_decoder_and_optimiser(logdir, tmp_path, capsys, monkeypatch):
    path = tmp_path / "agent.safetensors"
    tensors = export(capsys, logdir, path, "--without_decoder")
    assert not any("decoder" in name for name in tensors) and any("encoder" in name for name in tensors)
    assert result(capsys, path) == result(capsys, logdir)
    monkeypatch.chdir(tmp_path)
    assert main("--from_checkpoint", str(path), "--steps", "40") == 0
    (new,) = (tmp_path / "logdir" / "dummy_cue").iterdir()
    assert "optimiser" in log(new) and "no decoder" in log(new)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["agent.safetensors", "logdir"]
    assert main("--from_checkpoint", str(path), "--logdir", str(new), "--steps", "60") == 0
    assert "Resumed at step 40" in log(new) and log(new).count("no decoder") == 1


def test_weights_of_another_task_are_refused(logdir, tmp_path, capsys):
    path = tmp_path / "agent.safetensors"
    export(capsys, logdir, path)
    command = ["--from_checkpoint", str(path), "--logdir", str(tmp_path / "new"), "--task", "dummy_vector"]
    assert main(*command) == 2
    assert "does not fit this agent" in capsys.readouterr().err


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
    assert result(capsys, tmp_path / "run", *advised) == result(capsys, path, *advised)
    assert main("--from_checkpoint", str(path), "--logdir", str(tmp_path / "new"), "--steps", "60") == 0


def test_export_options_that_do_not_fit_are_refused(logdir, tmp_path, capsys):
    path = tmp_path / "agent.safetensors"
    assert "must end in .safetensors" in error(capsys, "--logdir", logdir, "--export", tmp_path / "agent.pt")
    assert "--video" in error(capsys, "--logdir", logdir, "--export", path, "--video")
    assert "--export" in error(capsys, "--logdir", logdir, "--dtype=float16")
    assert "No checkpoint at" in error(capsys, "--from_checkpoint", path)
    assert "Cannot write" in error(capsys, "--logdir", logdir, "--export", logdir / "latest.pt" / path.name)
    assert list(tmp_path.iterdir()) == []


# --- Damaged and foreign files


@pytest.fixture
def exported(logdir, tmp_path, capsys) -> Path:
    path = tmp_path / "agent.safetensors"
    export(capsys, logdir, path)
    return path


def refused(capsys, path: Path) -> str:
    """The one-line error of both programs that read the file."""
    line = error(capsys, "--from_checkpoint", path)
    assert str(path) in line and len(line) < 1000
    assert main("--from_checkpoint", str(path), "--logdir", str(path.parent / "new")) == 2
    assert capsys.readouterr().err == line
    assert not (path.parent / "new").exists()
    return line


def test_file_that_was_cut_off_is_refused(exported, capsys):
    data = exported.read_bytes()
    for broken in (b"", data[:500], data[: len(data) - 1], struct.pack("<Q", 2**60) + data[8:]):
        exported.write_bytes(broken)
        assert "damaged" in refused(capsys, exported)


def test_any_changed_bit_is_found(exported, capsys):
    data = exported.read_bytes()
    (header,) = struct.unpack("<Q", data[:8])
    option = data.index(b"train_ratio: 3") + len("train_ratio: ")
    for place in (option, header + 8, len(data) - 1):
        flipped = bytearray(data)
        flipped[place] ^= 1
        exported.write_bytes(flipped)
        assert "checksum is wrong" in refused(capsys, exported)


def test_file_of_another_program_or_version_is_refused(exported, capsys):
    for header in (None, {**about(exported), "lore_format": "2"}):
        save_file(load_file(exported), exported, metadata=header)
        assert "does not hold weights of this version" in refused(capsys, exported)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("step", None, "KeyError: 'step'"),
        ("skills", "{", "JSONDecodeError"),
        ("config", "task: !!python/object/apply:os.system [id]", "the config in"),
    ],
)
def test_file_with_a_valid_checksum_is_not_trusted_either(exported, capsys, name, value, says):
    tensors, header = load_file(exported), {**about(exported), name: value}
    header = {k: v for k, v in header.items() if v is not None and k != "sha256"}
    save_file(tensors, exported, metadata={**header, "sha256": checkpoints._digest(header, tensors)})
    assert says in refused(capsys, exported)


# --- Transfer


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Starts a run with these options without training; returns its agent's state and its log."""

    def begin(*options: object, name: str = "new") -> tuple[dict, str]:
        states = []
        with monkeypatch.context() as patch:
            patch.setattr(dreamer, "loop", lambda *_, agent, **__: states.append(agent.state_dict()))
            assert train(tmp_path / name, *map(str, options)) == 0
        return states[0], log(tmp_path / name)

    return begin


def part(agent: dict, name: str) -> dict[str, torch.Tensor]:
    module, prefixes = checkpoints.PARTS[name]
    return {key: value for key, value in agent[module].items() if key.startswith(prefixes)}


def test_every_weight_of_the_agent_belongs_to_one_part(trained):
    named = [
        f"{where}.{key}" for name, (where, _) in checkpoints.PARTS.items() for key in part(trained, name)
    ]
    every = [f"{module}.{key}" for module in ("world_model", "behavior") for key in trained[module]]
    assert sorted(named) == sorted(every)
    assert configs.read().options["transfer"].words == tuple(checkpoints.PARTS)


def test_named_parts_are_copied_and_the_others_are_new(logdir, trained, begin):
    fresh, _ = begin("--task", "dummy_memory", name="fresh")
    command = ("--task", "dummy_memory", "--from_checkpoint", logdir / "latest.pt", "--transfer")
    taken, text = begin(*command, "encoder,rssm")
    for name in checkpoints.PARTS:
        origin = trained if name in ("encoder", "rssm") else fresh
        assert differences(part(taken, name), part(origin, name)) == [], name
        assert differences(part(trained, name), part(fresh, name)), f"{name} has learned nothing"
    assert differences(taken["optimizer"], fresh["optimizer"]) == [] and taken["updates"] == 0
    assert differences(taken["rngs"], fresh["rngs"]) == []
    sizes = [len(part(trained, name)) for name in ("encoder", "rssm")]
    lines = [line.partition(" INFO ")[2] for line in text.splitlines() if "ransferred" in line]
    assert lines == [
        f"Transferred encoder: {sizes[0]} of {sizes[0]} tensors",
        f"Transferred rssm: {sizes[1]} of {sizes[1]} tensors",
        "Not transferred: decoder, reward, cont, actor, critic, the optimiser",
    ]
    everything, text = begin(*command, *checkpoints.PARTS, name="all")
    for name in checkpoints.PARTS:
        assert differences(part(everything, name), part(trained, name)) == []
    assert "Not transferred: the optimiser" in text


def test_larger_model_takes_what_fits_and_names_the_rest(logdir, trained, begin):
    larger = ("--rssm.deter", "16")
    fresh, _ = begin(*larger, name="fresh")
    taken, text = begin(*larger, "--from_checkpoint", logdir / "latest.pt", "--transfer", "encoder", "rssm")
    assert differences(part(taken, "encoder"), part(trained, "encoder")) == []
    ours, theirs, new = (part(agent, "rssm") for agent in (taken, trained, fresh))
    fits = {name for name in ours if ours[name].shape == theirs[name].shape}
    assert {"rssm.in_action.0.weight", "rssm.post_out.weight"} <= fits < ours.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name] if name in fits else new[name]), name
        shapes = tuple(theirs[name].shape), tuple(value.shape)
        line = "  {} starts untrained: {} in the checkpoint, {} here".format(name, *shapes)
        assert (line in text) == (name not in fits)
    assert f"Transferred rssm: {len(fits)} of {len(ours)} tensors" in text


def test_task_with_other_actions_and_observations(logdir, begin):
    command = ("--from_checkpoint", logdir, "--transfer", "encoder", "rssm")
    _, text = begin("--task", "dummy_continuous", *command, "actor")
    assert "  rssm.in_action.0.weight starts untrained: (8, 4) in the checkpoint, (8, 2) here" in text
    assert "  actor.std_outs.0.weight starts untrained: nothing in the checkpoint, (2, 16) here" in text
    _, text = begin("--task", "dummy_vector", *command, name="blind")
    assert "Transferred encoder: 0 of " in text
    assert "  encoder.cnn.convs.0.weight is not used: (" in text and ", nothing here" in text


def test_transfer_of_parts_of_which_nothing_fits_is_refused(logdir, tmp_path, capsys):
    command = ("--task", "dummy_vector", "--from_checkpoint", str(logdir), "--transfer", "encoder")
    assert train(tmp_path / "new", *command) == 2
    line = capsys.readouterr().err
    assert "Nothing of encoder can be transferred, as no shape fits: encoder." in line
    assert line.count("\n") == 1 and not (tmp_path / "new").exists()


def test_transfer_of_weights_that_are_not_finite_is_refused(logdir, tmp_path, capsys):
    payload = checkpoints.load_checkpoint(logdir)[0]
    payload["agent"]["world_model"]["rssm.in_deter.0.weight"].fill_(torch.nan)
    path = checkpoints.save_checkpoint(tmp_path / "broken", payload, 120, keep=1)
    command = ("--task", "dummy_memory", "--from_checkpoint", str(path), "--transfer", "rssm")
    assert train(tmp_path / "new", *command) == 2
    line = capsys.readouterr().err
    assert str(path) in line and "rssm.in_deter.0.weight holds numbers that are not finite" in line
    assert line.count("\n") == 1 and not (tmp_path / "new").exists()


def test_exported_weights_transfer_like_the_checkpoint(logdir, tmp_path, begin, capsys):
    path = tmp_path / "agent.safetensors"
    export(capsys, logdir, path)
    parts = ("encoder", "rssm", "actor", "critic")
    one, _ = begin("--from_checkpoint", logdir / "latest.pt", "--transfer", *parts)
    other, text = begin("--from_checkpoint", path, "--transfer", *parts, name="other")
    critic = {name: value for name, value in one["behavior"].items() if "slow" not in name}
    assert differences(critic, {name: other["behavior"][name] for name in critic}) == []
    assert differences(one["world_model"], other["world_model"]) == []


def test_transfer_happens_once_and_is_not_inherited(logdir, tmp_path, begin):
    first = tmp_path / "first"
    command = ("--from_checkpoint", str(logdir), "--transfer", "encoder")
    assert train(first, *command, "--steps", "40") == 0
    assert train(first, "--steps", "60") == 0  # resumes with or without these options
    assert train(first, *command, "--steps", "80") == 0
    assert log(first).count("Transferred encoder") == 1 and log(first).count("Resumed at") == 2
    saved = checkpoints.load_checkpoint(first)[0]["agent"]
    state, text = begin("--from_checkpoint", first / "latest.pt", name="second")
    for module in ("world_model", "behavior", "optimizer"):
        assert differences(state[module], saved[module]) == []
    assert "ransferred" not in text


def test_transfer_without_a_logdir_starts_a_new_run(logdir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in logdir.rglob("*") if path.is_file()}
    command = ("--from_checkpoint", str(logdir / "latest.pt"), "--transfer", "rssm", "--steps", "40")
    assert main(*command) == 0
    (new,) = (tmp_path / "logdir" / "dummy_cue").iterdir()
    assert "Transferred rssm" in log(new)
    assert main(*TINY, *command, "--logdir", str(logdir)) == 2  # its own run is not started again
    assert before == {path: path.read_bytes() for path in logdir.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--from_checkpoint a.pt --transfer encoder rsm", "--transfer encoder rsm: must be one of encoder"),
        ("--transfer rssm", "add --from_checkpoint"),
        ("--from_checkpoint a.pt --transfer", "--transfer needs a value: write one of encoder, rssm"),
    ],
)
def test_transfer_options_that_do_not_fit_are_refused(options, says):
    with pytest.raises(UserError, match=says):
        configs.load(options.split())
