"""--transfer: parts of a trained agent for another task or size."""

from pathlib import Path

import pytest
import torch
from run_helpers import TINY, assert_same_run, differences, log, main, stop_and_resume, train
from test_weights import export

import checkpoint as checkpoints
import config
import dreamer
from basics import UserError

NEW = "Begins anew: decoder, reward, cont, actor, critic, the optimiser"


@pytest.fixture(scope="module")
def logdir(tmp_path_factory) -> Path:
    """A run whose weights have moved away from those it began with."""
    folder = tmp_path_factory.mktemp("run")
    assert train(folder, "--eval_every", "0", "--opt.lr", "3e-3", "--opt.warmup", "0") == 0
    return folder


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Begin a run with these options without training it: its agent's state and what it told."""

    def begin(*options: str, name: str = "new") -> tuple[dict, str]:
        states = []
        with monkeypatch.context() as patch:
            patch.setattr(dreamer, "train", lambda run, _: states.append(run.agent.state_dict()))
            assert train(tmp_path / name, *map(str, options)) == 0
        return states[0], log(tmp_path / name)

    return begin


def part(agent: dict, name: str) -> dict[str, torch.Tensor]:
    module, prefixes = checkpoints.PARTS[name]
    return {key: value for key, value in agent[module].items() if key.startswith(prefixes)}


@pytest.fixture(scope="module")
def trained(logdir) -> dict:
    return checkpoints.load_checkpoint(logdir)[0]["agent"]


def test_every_weight_of_the_agent_is_of_one_part(trained):
    named = [
        f"{checkpoints.PARTS[name][0]}.{key}" for name in checkpoints.PARTS for key in part(trained, name)
    ]
    every = [f"{module}.{key}" for module in ("world_model", "behavior") for key in trained[module]]
    assert sorted(named) == sorted(every)


def test_parts_are_those_of_the_option():
    assert config.read().options["transfer"].words == tuple(checkpoints.PARTS)


def test_the_named_parts_are_taken_and_the_others_are_new(logdir, trained, begin):
    fresh, told = begin("--task", "dummy_memory", name="fresh")
    assert "ransfer" not in told
    command = ("--task", "dummy_memory", "--from_checkpoint", logdir / "latest.pt", "--transfer")
    taken, told = begin(*command, "encoder,rssm")
    for name in checkpoints.PARTS:
        origin = trained if name in ("encoder", "rssm") else fresh
        assert differences(part(taken, name), part(origin, name)) == [], name
        assert differences(part(trained, name), part(fresh, name)), f"{name} has learned nothing"
    assert differences(taken["optimizer"], fresh["optimizer"]) == [] and taken["updates"] == 0
    assert differences(taken["rngs"], fresh["rngs"]) == []
    sizes = [len(part(trained, name)) for name in ("encoder", "rssm")]
    assert [
        line.partition(" INFO ")[2] for line in told.splitlines() if "ransferred" in line or "Begins" in line
    ] == [
        f"Transferred encoder: {sizes[0]} of {sizes[0]} tensors",
        f"Transferred rssm: {sizes[1]} of {sizes[1]} tensors",
        NEW,
    ]
    everything, told = begin(*command, *checkpoints.PARTS, name="all")
    for name in checkpoints.PARTS:
        assert differences(part(everything, name), part(trained, name)) == []
    assert "Begins anew: the optimiser" in told


def test_a_larger_model_takes_what_fits_and_names_what_does_not(logdir, trained, begin):
    larger = (
        "--rssm.deter",
        "16",
        "--from_checkpoint",
        logdir / "latest.pt",
        "--transfer",
        "encoder",
        "rssm",
    )
    fresh, _ = begin("--rssm.deter", "16", name="fresh")
    taken, told = begin(*larger)
    assert differences(part(taken, "encoder"), part(trained, "encoder")) == []
    ours, theirs, new = (part(agent, "rssm") for agent in (taken, trained, fresh))
    fits = {name for name in ours if ours[name].shape == theirs[name].shape}
    assert (
        {"in_action.0.weight", "post_out.weight"}
        <= {name.removeprefix("rssm.") for name in fits}
        < {name.removeprefix("rssm.") for name in ours}
    )
    for name, value in ours.items():
        assert torch.equal(value, theirs[name] if name in fits else new[name]), name
        shapes = tuple(theirs[name].shape), tuple(value.shape)
        line = "  {} begins anew: {} in the checkpoint, {} here".format(name, *shapes)
        assert (line in told) == (name not in fits)
    assert f"Transferred rssm: {len(fits)} of {len(ours)} tensors" in told


def test_a_task_with_other_actions_and_eyes(logdir, begin):
    """dummy_continuous has actions of another kind, and dummy_vector a vector instead of an image."""
    command = ("--task", "dummy_continuous", "--from_checkpoint", logdir, "--transfer")
    _, told = begin(*command, "encoder", "rssm", "actor")
    assert "  rssm.in_action.0.weight begins anew: (8, 4) in the checkpoint, (8, 2) here" in told
    assert "  actor.outs.0.weight begins anew: (4, 16) in the checkpoint, (2, 16) here" in told
    assert "  actor.std_outs.0.weight begins anew: nothing in the checkpoint, (2, 16) here" in told
    _, told = begin("--task", "dummy_vector", *command[2:], "encoder", "rssm", name="blind")
    assert "Transferred encoder: 0 of " in told
    assert "  encoder.cnn.convs.0.weight is left behind: (" in told and ", nothing here" in told


def test_nothing_that_fits_is_refused(logdir, tmp_path, capsys):
    command = ("--task", "dummy_vector", "--from_checkpoint", str(logdir), "--transfer", "encoder")
    capsys.readouterr()
    assert train(tmp_path / "new", *command) == 2
    told = capsys.readouterr().err
    assert (
        "Nothing of encoder can be transferred, as no shape fits: encoder." in told and told.count("\n") == 1
    )
    assert not (tmp_path / "new").exists()


def test_weights_that_are_not_finite_are_refused(logdir, tmp_path, capsys):
    """Else the run would say that it diverged, and ask for a lower learning rate."""
    payload = checkpoints.load_checkpoint(logdir)[0]
    payload["agent"]["world_model"]["rssm.in_deter.0.weight"].fill_(torch.nan)
    path = checkpoints.save_checkpoint(tmp_path / "broken", payload, 120, keep=1)
    command = ("--task", "dummy_memory", "--from_checkpoint", str(path), "--transfer")
    capsys.readouterr()
    assert train(tmp_path / "new", *command, "encoder", "rssm") == 2
    told = capsys.readouterr().err
    assert str(path) in told and "rssm.in_deter.0.weight holds numbers that are not finite" in told
    assert told.count("\n") == 1 and not (tmp_path / "new").exists()


def test_weights_alone_are_transferred_from_too(logdir, tmp_path, begin, capsys):
    path = tmp_path / "agent.safetensors"
    export(capsys, logdir, path)
    parts = ("encoder", "rssm", "actor", "critic")
    one, _ = begin("--from_checkpoint", logdir / "latest.pt", "--transfer", *parts)
    other, told = begin("--from_checkpoint", path, "--transfer", *parts, name="other")
    critic = {name: value for name, value in one["behavior"].items() if "slow" not in name}
    assert differences(critic, {name: other["behavior"][name] for name in critic}) == []
    assert differences(one["world_model"], other["world_model"]) == []
    assert "Transferred critic" in told


# The new run


def test_a_resumed_run_does_not_transfer_again(logdir, tmp_path):
    command = ("--task", "dummy_memory", "--from_checkpoint", str(logdir), "--transfer", "encoder", "rssm")
    assert train(tmp_path / "whole", *command) == 0
    stop_and_resume(tmp_path / "new", *command, at=[30, 71])
    assert_same_run(tmp_path / "new", tmp_path / "whole")
    told = log(tmp_path / "new")
    assert told.count("Transferred encoder") == 1 and "Resumed at step 72" in told
    # Who leaves the options out goes on with it too, and sees no difference.
    assert train(tmp_path / "new", "--task", "dummy_memory") == 0
    assert "Changed since" not in log(tmp_path / "new")
    assert config.Config.load_saved(tmp_path / "whole" / "config.yaml").transfer == ["encoder", "rssm"]


def test_whoever_begins_from_the_new_run_takes_all_of_it(logdir, tmp_path, begin, capsys):
    first = tmp_path / "first"
    assert train(first, "--from_checkpoint", str(logdir), "--transfer", "encoder", "--steps", "40") == 0
    saved = checkpoints.load_checkpoint(first)[0]["agent"]
    states = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dreamer, "train", lambda run, _: states.append(run.agent.state_dict()))
        second = str(tmp_path / "second")
        assert main("--from_checkpoint", str(first / "latest.pt"), "--logdir", second) == 0
    for module in ("world_model", "behavior", "optimizer"):
        assert differences(states[0][module], saved[module]) == []
    export(capsys, first, tmp_path / "agent.safetensors")
    assert config.Config.load_saved(first / "config.yaml").transfer == ["encoder"]


def test_without_a_logdir_the_run_is_a_new_one(logdir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "source"
    assert train(source, "--traindir", str(tmp_path / "eps"), "--eval_every", "0", "--steps", "40") == 0
    before = {
        path: path.read_bytes()
        for path in (*source.rglob("*"), *(tmp_path / "eps").rglob("*"))
        if path.is_file()
    }
    assert main("--from_checkpoint", str(source / "latest.pt"), "--transfer", "rssm") == 0
    (new,) = (tmp_path / "logdir" / "dummy_cue").iterdir()
    assert "Transferred rssm" in log(new) and list((new / "train_eps").iterdir())
    after = {
        path: path.read_bytes()
        for path in (*source.rglob("*"), *(tmp_path / "eps").rglob("*"))
        if path.is_file()
    }
    assert before == after


# Mistakes


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            "--from_checkpoint a.pt --transfer encoder rsm",
            "--transfer encoder rsm: must be one of encoder, rssm",
        ),
        ("--from_checkpoint a.pt --transfer encoder,rsm", "the nearest is rssm"),
        ("--transfer rssm", "add --from_checkpoint"),
        ("--from_checkpoint a.pt --transfer", "--transfer needs a value: write one of encoder, rssm"),
    ],
)
def test_mistakes_are_told(options, says):
    with pytest.raises(UserError, match=says):
        config.load(options.split())


def test_the_run_of_the_checkpoint_is_not_begun_anew(logdir, capsys):
    before = sorted(logdir.rglob("*"))
    command = ["--from_checkpoint", str(logdir / "latest.pt"), "--transfer", "rssm"]
    assert main(*TINY, *command, "--logdir", str(logdir)) == 2
    assert "name another --logdir" in capsys.readouterr().err
    assert sorted(logdir.rglob("*")) == before
