"""evaluate.py on a checkpoint that dreamer.py has just written."""

import json
import math
import shutil
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch

import checkpoint as checkpoints
import config
import dreamer
import envs
import evaluate
import models
from agent import Dreamer
from envs.dummy import COLORS, CUE_LENGTH
from evaluation import EvalEpisode, play_episodes

STEPS = 120


@pytest.fixture(scope="module")
def logdir(tmp_path_factory) -> Path:
    """A run that has just been trained, for some steps."""
    folder = tmp_path_factory.mktemp("run")
    options = ["--steps", str(STEPS), "--prefill", "64", "--eval_every", "0"]
    code = dreamer.main(["--configs", "dummy_cue", "debug", "--logdir", str(folder), *options])
    assert code == 0
    return folder


@pytest.fixture
def played(monkeypatch) -> list[EvalEpisode]:
    """The episodes that are played in the test."""
    episodes = []

    def play(*args, **kwargs):
        for episode in play_episodes(*args, **kwargs):
            episodes.append(episode)
            yield episode

    monkeypatch.setattr(evaluate, "play_episodes", play)
    return episodes


def run(capsys, *options: object) -> dict:
    """What `evaluate.py --json` prints."""
    capsys.readouterr()
    assert evaluate.main([*map(str, options), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def error(capsys, *options: object) -> str:
    """The one-line error of a command."""
    capsys.readouterr()
    assert evaluate.main([*map(str, options)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    return captured.err


# The result


def test_json_is_one_object_on_the_standard_output(logdir, capsys):
    result = run(capsys, "--logdir", logdir, "--episodes", 4)
    about = {"task": "dummy_cue", "policy": "agent", "step": STEPS, "seed": 0, "episodes": 4, "envs": 1}
    assert about.items() <= result.items()
    assert result["checkpoint"] == str(logdir / "latest.pt")
    assert result["lengths"] == [CUE_LENGTH] * 4 and result["length_mean"] == CUE_LENGTH
    assert len(result["returns"]) == 4 and result["return_mean"] == np.mean(result["returns"])
    low, high = result["return_interval"]
    assert min(result["returns"]) <= low <= result["return_mean"] <= high <= max(result["returns"])
    assert (result["score"], result["success_rates"], result["videos"]) == (None, {}, [])


def test_returns_are_those_of_the_episodes(logdir, played, capsys):
    result = run(capsys, "--logdir", logdir, "--episodes", 2)
    cues = [episode.steps["image"][:-1, 32, 32] for episode in played]  # of the steps that were acted in
    right = [COLORS[episode.steps["action"][:-1]] for episode in played]
    assert result["returns"] == [(a == b).all(-1).sum() for a, b in zip(cues, right, strict=True)]


def test_the_agent_acts_with_the_weights_of_the_checkpoint(logdir, monkeypatch, capsys):
    saved, _, _ = checkpoints.load_checkpoint(logdir)
    agents = []
    act = Dreamer.act

    def remember(agent, *args):
        agents.append(agent)
        return act(agent, *args)

    monkeypatch.setattr(Dreamer, "act", remember)
    run(capsys, "--logdir", logdir, "--episodes", 1)
    for module, weights in agents[0].weights().items():
        for name, value in weights.items():
            assert torch.equal(value.cpu(), saved["agent"][module][name]), f"{module}.{name}"


def test_achievements_become_success_rates_and_a_score():
    episode = {"return": 1.0, "length": 10.0}
    done = [
        episode | {"log_achievement_wood": 1.0, "log_achievement_coal": 0.0},
        episode | {"log_achievement_wood": 0.0, "log_achievement_coal": 0.0},
    ]
    summary = evaluate.summarize(done, "crafter_reward")
    assert summary["success_rates"] == {"coal": 0.0, "wood": 50.0}
    assert summary["score"] == pytest.approx(math.sqrt(51) - 1)


def test_achievement_counts_at_any_step_of_the_episode():
    steps = {"reward": np.zeros(4, np.float32), "log_achievement_wood": np.array([0, 1, 0, 0], np.float32)}
    outcome = evaluate.outcome(EvalEpisode(steps), action_repeat=2)
    assert outcome == {"return": 0.0, "length": 6, "log_achievement_wood": 1.0}


# Worlds


def test_same_seed_gives_the_same_result_and_another_seed_other_worlds(logdir, played, capsys):
    first, again, _ = (run(capsys, "--logdir", logdir, "--seed", s, "--episodes", 2) for s in (3, 3, 4))
    assert first == again
    worlds = [episode.steps["image"][:, 32, 32].tobytes() for episode in played]
    assert worlds[:2] == worlds[2:4]
    assert len(set(worlds[2:])) == 4


def test_worlds_differ_from_those_of_training_and_its_evaluations(logdir, played, capsys):
    saved = config.Config.load_saved(logdir / "config.yaml")
    run(capsys, "--logdir", logdir, "--seed", saved.seed, "--episodes", 4)
    ours = {episode.steps["image"][:, 32, 32].tobytes() for episode in played}
    for mode in ("train", "eval"):
        env = envs.make_env(saved, mode, 0)
        for _ in range(8):
            cues = [env.reset()[0]["image"][32, 32]]
            cues += [env.step({"action": 0})[0]["image"][32, 32] for _ in range(CUE_LENGTH)]
            assert np.stack(cues).tobytes() not in ours


def test_random_plays_the_same_worlds_without_the_agent(logdir, played, monkeypatch, capsys):
    agent = run(capsys, "--logdir", logdir, "--episodes", 2)
    monkeypatch.setattr(Dreamer, "act", None)  # a call would fail
    random = run(capsys, "--logdir", logdir, "--episodes", 2, "--random")
    assert random["policy"] == "random" and random.keys() == agent.keys()
    for one, other in zip(played[:2], played[2:], strict=True):
        np.testing.assert_array_equal(one.steps["image"], other.steps["image"])
        assert not np.array_equal(one.steps["action"], other.steps["action"])


def test_each_env_plays_the_same_number_of_episodes(logdir, played, capsys):
    result = run(capsys, "--logdir", logdir, "--episodes", 4, "--envs", 2)
    assert len(result["returns"]) == 4
    assert len({episode.steps["image"][:, 32, 32].tobytes() for episode in played}) == 4


# Videos


def test_video_writes_an_mp4_of_each_episode(logdir, tmp_path, played, capsys):
    folder = tmp_path / "elsewhere"
    options = ("--from_checkpoint", logdir / "latest.pt", "--logdir", folder, "--episodes", 2, "--video")
    result = run(capsys, *options)
    files = [folder / "videos" / f"evaluate_{STEPS}_{index}.mp4" for index in range(2)]
    assert result["videos"] == [str(file) for file in files]
    assert sorted((folder / "videos").iterdir()) == files
    for file, episode in zip(files, played, strict=True):
        frames = read_mp4(file)
        assert len(frames) == len(episode.frames) == CUE_LENGTH + 1
        middle = frames[:, 128, 128].astype(int)  # the video is 256 x 256
        assert np.abs(middle - episode.frames[:, 32, 32]).max() < 40  # the codec blurs colours


def test_without_video_nothing_is_written(logdir, tmp_path, capsys):
    copy = tmp_path / "run"
    copy.mkdir()
    shutil.copy(logdir / "latest.pt", copy)  # the checkpoint alone is enough
    run(capsys, "--logdir", copy, "--episodes", 1)
    assert [file.name for file in copy.iterdir()] == ["latest.pt"]


def read_mp4(path: Path) -> np.ndarray:
    """The frames of a video, uint8 [T, 256, 256, 3]."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path)]
    done = subprocess.run(
        [*command, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], capture_output=True, check=True
    )
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, 256, 256, 3)


# Mistakes


def test_folder_without_a_checkpoint_is_named(tmp_path, capsys):
    assert f"No checkpoint at {tmp_path}" in error(capsys, "--logdir", tmp_path)
    assert "No checkpoint at" in error(capsys, "--from_checkpoint", tmp_path / "latest.pt")
    assert list(tmp_path.iterdir()) == []


def test_file_that_is_not_a_checkpoint_is_named(tmp_path, capsys):
    path = tmp_path / "other.pt"
    torch.save({"weights": torch.zeros(1)}, path)
    assert f"{path} is not a checkpoint of" in error(capsys, "--from_checkpoint", path)
    torch.save(torch.zeros(1), path)
    assert f"{path} is not a checkpoint of" in error(capsys, "--from_checkpoint", path)


def test_damaged_latest_is_skipped_with_a_line(logdir, tmp_path, capsys):
    copy = shutil.copytree(logdir, tmp_path / "run")
    whole = (copy / "latest.pt").read_bytes()
    (copy / "latest.pt").unlink()  # it may be a hard link
    (copy / "latest.pt").write_bytes(whole[:1000])
    assert evaluate.main(["--logdir", str(copy), "--episodes", "1", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["checkpoint"] == str(copy / "checkpoints" / f"step-{STEPS:012d}.pt")
    assert "latest.pt is damaged and skipped" in captured.err


def test_mistakes_in_options_are_one_line_errors(logdir, capsys):
    assert "--logdir" in error(capsys)
    assert "the nearest is --episodes" in error(capsys, "--logdir", logdir, "--episode", 3)
    assert "the nearest is --video" in error(capsys, "--logdir", logdir, "--vidoe=True")
    for value in ("0", "-2", "many", "1.5"):
        assert "--episodes" in error(capsys, "--logdir", logdir, "--episodes", value)
    assert "use 4" in error(capsys, "--logdir", logdir, "--episodes", 5, "--envs", 4)
    assert "seed -1" in error(capsys, "--logdir", logdir, "--seed", -1)
    assert "--device" in error(capsys, "--logdir", logdir, "--device", "abacus")


@pytest.mark.parametrize(
    ("full", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "The GPU is full (CUDA out of memory). "),
        (MemoryError("Unable to allocate 9.5 GiB"), "The RAM is full (Unable to allocate 9.5 GiB). "),
    ],
)
def test_full_memory_is_a_one_line_error(logdir, monkeypatch, capsys, full, says):
    def no_room(*_, **__):
        raise full

    monkeypatch.setattr(models.WorldModel, "to", no_room)
    line = error(capsys, "--logdir", logdir, "--episodes", 1)
    assert says in line and ("--device cpu" in line) == ("GPU" in says) and "--batch_size" not in line


def test_video_of_a_task_without_images_is_refused(logdir, tmp_path, capsys):
    path = with_another_task(logdir, tmp_path)
    assert "dummy_vector shows no images" in error(capsys, "--from_checkpoint", path, "--video")


def test_a_checkpoint_of_another_shape_is_refused(logdir, tmp_path, capsys):
    path = with_another_task(logdir, tmp_path)
    assert "does not fit this agent" in error(capsys, "--from_checkpoint", path)


def with_another_task(logdir: Path, folder: Path) -> Path:
    """The checkpoint of the run with another task in its config."""
    payload, _, _ = checkpoints.load_checkpoint(logdir)
    payload["config"] = payload["config"].replace("task: dummy_cue", "task: dummy_vector")
    return checkpoints.save_checkpoint(folder, payload, STEPS, keep=1)


# Explain


@pytest.fixture(scope="module")
def advised_logdir(tmp_path_factory) -> Path:
    """A run with a prior that was learned from good advice, and two skills."""
    folder = tmp_path_factory.mktemp("advised")
    (folder / "skills.yaml").write_text("skills: [{name: twice, actions: [action_1, action_1]}]\n")
    options = "--llm.enabled True --llm.backend advice_helpers:CueOracle --prior.enabled True"
    options += " --options.enabled True --llm.max_gap_steps 1 --llm.min_gap_steps 1 --llm.until 1000"
    options += f" --steps {STEPS} --prefill 64 --eval_every 0 --opt.lr 3e-3 --opt.warmup 0"
    assert dreamer.main(["--configs", "dummy_cue", "debug", "--logdir", str(folder), *options.split()]) == 0
    return folder


def panels(monkeypatch) -> list[dict]:
    """The panels that are drawn in the test."""
    drawn = []
    draw = evaluate.decision_panel
    monkeypatch.setattr(
        evaluate, "decision_panel", lambda frame, info, width: drawn.append(info) or draw(frame, info, width)
    )
    return drawn


def test_explain_shows_each_decision_next_to_its_frame(advised_logdir, played, monkeypatch, capsys):
    drawn = panels(monkeypatch)
    result = run(capsys, "--logdir", advised_logdir, "--episodes", 2, "--envs", 2, "--explain")
    files = [advised_logdir / "videos" / f"explain_{STEPS}_{index}.mp4" for index in range(2)]
    assert result["videos"] == [str(file) for file in files]
    reader = imageio_ffmpeg.read_frames(files[0])
    width, height = next(reader)["size"]
    assert width > height > 200 and len(list(reader)) == CUE_LENGTH + 1
    assert len(drawn) == 2 * (CUE_LENGTH + 1)
    actions = [index for episode in played for index in episode.steps["action"]]
    for info, action in zip(drawn, actions, strict=True):
        assert info["actions"] == ["action_0", "action_1", "action_2", "action_3"]
        assert info["choice"] == f"action_{action}" and info["caption"] == "image: an image is seen"
        assert info["beta"] == 0 and info["mix"] == info["actor"] != info["adviser"]
        for name in ("actor", "adviser", "mix"):
            assert sum(info[name]) == pytest.approx(1, abs=1e-5)
        assert math.isfinite(info["value"]) and math.isfinite(info["predicted_return"])
    assert {info["option"] for info in drawn} == {None, "twice"}


def test_advised_plays_with_the_prior_as_training_does(advised_logdir, monkeypatch, capsys):
    drawn, advised = panels(monkeypatch), []
    act = Dreamer.act
    monkeypatch.setattr(
        Dreamer, "act", lambda *args, **options: advised.append(options) or act(*args, **options)
    )
    bare = run(capsys, "--logdir", advised_logdir, "--episodes", 1)
    assert not any(advised)
    advised.clear()
    result = run(capsys, "--logdir", advised_logdir, "--episodes", 1, "--advised", "--explain")
    assert advised == [{"advised": True}] * (CUE_LENGTH + 1)
    assert (bare["policy"], result["policy"]) == ("agent", "advised")
    assert all(info["beta"] > 0 and info["mix"] != info["actor"] for info in drawn)
    assert evaluate.main(["--logdir", str(advised_logdir), "--episodes", "1", "--advised"]) == 0
    assert ", with the prior" in capsys.readouterr().out


def test_explaining_does_not_change_the_episodes(advised_logdir, logdir, monkeypatch, capsys):
    for folder in (advised_logdir, logdir):
        drawn = panels(monkeypatch)
        plain = run(capsys, "--logdir", folder, "--episodes", 1)
        with_views = run(capsys, "--logdir", folder, "--episodes", 1, "--explain")
        assert plain["returns"] == with_views["returns"] and plain["return_interval"] is None
    assert all(info["adviser"] is None and info["beta"] == 0 for info in drawn)  # this one has no adviser


def test_explain_and_advised_are_refused_where_they_do_not_fit(logdir, tmp_path, capsys):
    assert "prior.enabled" in error(capsys, "--logdir", logdir, "--advised")
    for name in ("--advised", "--explain"):
        assert "leave one out" in error(capsys, "--logdir", logdir, "--random", name)
    options = ["--configs", "debug", "--task", "dummy_continuous", "--steps", "100", "--eval_every", "0"]
    assert dreamer.main([*options, "--logdir", str(tmp_path)]) == 0
    assert "one Discrete action" in error(capsys, "--logdir", tmp_path, "--explain")
    assert not (tmp_path / "videos").exists()
