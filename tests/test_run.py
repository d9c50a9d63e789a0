"""The loop: counting, logging, evaluation, files, and stopping."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from crafter.constants import achievements
from run_helpers import ROOT, assert_same_run, differences, log, metrics, moment, signal_at, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import basics
import checkpoint as checkpoints
import dreamer
import envs
import evaluation
from agent import Dreamer
from checkpoint import Checkpoint
from config import Config
from envs.dummy import Dummy
from episodes import list_episodes
from evaluation import play_episodes
from logger import Logger
from replay import Replay
from stats import achievement_score

NAMES = {
    *("env/episode_return", "env/episode_length", "env/fps", "eval/episode_return", "eval/episode_length"),
    *(f"loss/{name}" for name in "policy value image reward cont dyn rep repval".split()),
    *("opt/grad_norm", "opt/skipped", "opt/updates", "opt/loss", "replay/size"),
    *("time/env", "time/policy", "time/replay", "time/train", "time/eval"),
    *("crafter/score", *(f"crafter/success_rate/{name}" for name in achievements)),
}


@pytest.fixture(scope="module")
def debug_run(tmp_path_factory):
    """The logdir of a whole `debug` run on Crafter, by the command that a user types."""
    logdir = tmp_path_factory.mktemp("debug") / "run"
    command = "dreamer.py --configs crafter debug --device cpu --logdir".split()
    done = subprocess.run(
        [sys.executable, *command, str(logdir)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (logdir / "stdout").write_text(done.stdout)
    return logdir


def test_metrics_have_all_names_that_the_readme_lists(debug_run):
    lines = [json.loads(line) for line in (debug_run / "metrics.jsonl").read_text().splitlines()]
    assert {name for line in lines for name in line} >= NAMES
    assert [line["step"] for line in lines] == [50, 100, 150, 200, 250, 300]
    assert all(np.isfinite(value) for line in lines for value in line.values())
    last = lines[-1]
    rates = [last[f"crafter/success_rate/{name}"] for name in achievements]
    assert last["crafter/score"] == pytest.approx(achievement_score(rates))
    shares = [value for name, value in last.items() if name.startswith("time/")]
    assert 0.5 < sum(shares) <= 1


def test_tensorboard_has_the_same_scalars_and_the_videos(debug_run):
    board = EventAccumulator(str(debug_run), {"scalars": 0, "images": 0, "tensors": 0})
    board.Reload()
    assert set(board.Tags()["scalars"]) >= NAMES
    lines = [json.loads(line) for line in (debug_run / "metrics.jsonl").read_text().splitlines()]
    written = {line["step"]: line["loss/image"] for line in lines if "loss/image" in line}
    shown = {event.step: event.value for event in board.Scalars("loss/image")}
    assert shown == pytest.approx(written)
    for name in ("eval_policy", "train_openl"):
        assert [image.step for image in board.Images(name)] == [150, 300]
        assert board.Images(name)[0].encoded_image_string.startswith(b"GIF8")
    openl = board.Images("train_openl")[0]
    assert (openl.height, openl.width) == (4 * 64, 3 * 64)  # a row for each sequence: truth, model, error


def test_run_leaves_the_files_that_the_readme_lists(debug_run):
    videos = sorted(path.name for path in (debug_run / "videos").iterdir())
    assert videos == ["eval_150_0.mp4", "eval_300_0.mp4"]
    assert Config.load_saved(debug_run / "config.yaml").presets == ["crafter", "debug"]
    assert sorted(path.name for path in (debug_run / "checkpoints").iterdir()) == [
        f"step-{step:012d}.pt" for step in (100, 200, 300)
    ]
    assert [file.length for file in list_episodes(debug_run / "train_eps")] == [61] * 5
    assert [file.length for file in list_episodes(debug_run / "eval_eps")] == [61] * 2
    text = log(debug_run)
    for said in ("on cpu", "presets crafter, debug", "GiB when full", "step 300/300", "to go", "Saved"):
        assert said in text
    printed = [line.split(" INFO ")[1] for line in text.splitlines()]
    assert printed == (debug_run / "stdout").read_text().splitlines()


def test_only_real_steps_are_counted(tmp_path):
    assert train(tmp_path, "--action_repeat", "3", "--replay.capacity", "1000", "--eval_every", "0") == 0
    files = list_episodes(tmp_path / "train_eps")
    state = checkpoints.load_checkpoint(tmp_path)[0]
    stored = sum(end - start for stream in state["replay"]["streams"] for _, start, end in stream)
    assert state["progress"]["transitions"] == stored - state["progress"]["episodes"]
    assert state["step"] == 3 * state["progress"]["transitions"] == 120
    assert state["agent"]["updates"] == (40 - 10) * 3 // 8  # the ratio is one of transitions
    assert len(files) + 2 >= state["progress"]["episodes"] >= len(files) > 0
    assert metrics(tmp_path)[-1]["env/episode_length"] == 3 * (files[0].length - 1)


def test_prefill_acts_at_random_and_adds_no_updates(tmp_path, monkeypatch):
    acted = []
    act = Dreamer.act
    monkeypatch.setattr(Dreamer, "act", lambda *args, **kwargs: acted.append(1) or act(*args, **kwargs))
    assert train(tmp_path, "--prefill", "100", "--steps", "124", "--eval_every", "0") == 0
    assert len(acted) == 12
    assert checkpoints.load_checkpoint(tmp_path)[0]["agent"]["updates"] == int(24 * 3 / 8)


@pytest.mark.parametrize("ratio", ["0", "0.5", "7"])
def test_train_ratio_is_replayed_steps_per_stored_transition(tmp_path, ratio):
    assert train(tmp_path, "--train_ratio", ratio, "--steps", "70", "--eval_every", "0") == 0
    state = checkpoints.load_checkpoint(tmp_path)[0]
    replayed = state["agent"]["updates"] * 2 * 4
    assert abs(replayed - float(ratio) * (70 - 30)) < 2 * 4


def test_updates_refresh_latents_and_priorities_in_the_replay(tmp_path):
    assert train(tmp_path, "--replay.sampler", "curious", "--eval_every", "0", "--steps", "60") == 0
    state = moment(tmp_path)
    visits, priority = state["sampler.npz"]["visits"], state["sampler.npz"]["priority"]
    assert visits.sum() == state["agent"]["updates"] * 2 * 4 > 0
    assert (priority[visits > 0] < priority.max()).all()
    deter = torch.cat([value for key, value in state["latents.npz"].items() if key.startswith("deter")])
    assert (deter != 0).any(1).sum() >= (visits > 0).sum()  # and latents for what was trained on


# ---- Evaluation


def test_evaluation_changes_nothing_in_training(tmp_path):
    assert train(tmp_path / "with", "--video_pred_log", "True") == 0
    assert train(tmp_path / "without", "--eval_every", "0") == 0
    for with_, without in zip(metrics(tmp_path / "with"), metrics(tmp_path / "without"), strict=True):
        assert {k: v for k, v in with_.items() if not k.startswith("eval/")} == without
    assert (tmp_path / "with" / "eval_eps").exists() and not (tmp_path / "without" / "eval_eps").exists()
    both = [moment(tmp_path / name) for name in ("with", "without")]
    for part in ("world_model", "behavior", "optimizer"):
        assert differences(both[0]["agent"][part], both[1]["agent"][part]) == []
    assert differences(both[0]["actor"]["obs"], both[1]["actor"]["obs"]) == []


class Uneven(Dummy):
    """Episodes of the envs differ in length; remembers the seeds of all episodes by the number of the env."""

    seeds: list = []

    def __init__(self, size):
        self.own_seeds = []
        super().__init__(size, length=3 + 6 * (len(Uneven.seeds) % 2))
        Uneven.seeds.append(self.own_seeds)

    def reset(self, seed=None):
        self.own_seeds.append(seed)
        return super().reset(seed)


@pytest.fixture
def uneven(monkeypatch):
    monkeypatch.setattr(Uneven, "seeds", [])
    monkeypatch.setitem(envs.REGISTRY, "uneven", lambda name, config: Uneven(config.size))
    return "--task uneven_x --envs.eval_amount 2 --eval_episodes 6 --steps 100".split()


class Drawn(Dummy):
    """Observes no image, and counts how often it is drawn."""

    frames = 0

    def __init__(self):
        super().__init__(image=False, vectors=("vector",))

    def render(self):
        Drawn.frames += 1
        return np.zeros((16, 16, 3), np.uint8)


def test_evaluations_without_videos_draw_nothing_and_return_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(envs.REGISTRY, "drawn", lambda name: Drawn())
    returns = {}
    for videos in (True, False):
        Drawn.frames = 0
        options = f"--task drawn_x --steps 60 --eval_every 30 --eval_videos {videos}"
        assert train(tmp_path / str(videos), *options.split()) == 0
        assert bool(Drawn.frames) == (tmp_path / str(videos) / "videos").exists() == videos
        lines = (tmp_path / str(videos) / "metrics.jsonl").read_text().splitlines()
        returns[videos] = [json.loads(line).get("eval/episode_return") for line in lines]
    assert returns[True] == returns[False] and any(returns[True])


def test_each_env_gives_the_same_number_of_evaluation_episodes(tmp_path, uneven):
    assert train(tmp_path, *uneven) == 0
    lengths = [file.length for file in list_episodes(tmp_path / "eval_eps")]
    assert len(lengths) == 2 * 6
    assert sorted(lengths[:6]) == sorted(lengths[6:]) == [4, 4, 4, 10, 10, 10]
    assert len(list((tmp_path / "videos").iterdir())) == 12


def test_no_seed_is_used_twice_in_training_and_evaluation(tmp_path, uneven, monkeypatch):
    play, firsts = play_episodes, []
    monkeypatch.setattr(evaluation, "play_episodes", lambda *args: firsts.append(args[4]) or play(*args))
    with signal_at(61):
        train(tmp_path, *uneven)
    assert train(tmp_path, *uneven) == 0
    envs_before, envs_after = Uneven.seeds[:4], Uneven.seeds[4:]
    again = [seeds[1:] for seeds in envs_after[:2]]  # without the open episode, which was played again
    training = [seed for seeds in [*envs_before[:2], *again] for seed in seeds]
    assert len(training) > 15 and len(set(training)) == len(training)
    evaluated = {seed for seeds in (*envs_before[2:], *envs_after[2:]) for seed in seeds}
    assert len(evaluated) >= 12 and not evaluated & set(training)
    assert firsts == [0, 3]  # an evaluation counts three episodes of each env


def test_evaluation_return_is_the_sum_of_rewards_of_whole_episodes(tmp_path):
    assert train(tmp_path, "--eval_episodes", "3", "--steps", "60") == 0
    (line,) = [line for line in metrics(tmp_path) if "eval/episode_return" in line]
    returns = []
    for file in list_episodes(tmp_path / "eval_eps"):
        with np.load(file.path) as episode:
            assert episode["is_last"].tolist() == [False] * 16 + [True]
            returns.append(episode["reward"].sum())
    assert line["eval/episode_return"] == pytest.approx(np.mean(returns))
    assert line["eval/episode_length"] == 16


# ---- Stopping


def test_signal_before_the_first_step_stops_a_run_that_can_be_resumed(tmp_path, monkeypatch):
    assert train(tmp_path / "whole", "--steps", "60") == 0
    with monkeypatch.context() as patch:
        start = dreamer.start
        patch.setattr(dreamer, "start", lambda *args: signal.raise_signal(signal.SIGINT) or start(*args))
        assert train(tmp_path / "stopped", "--steps", "60") == 130
    assert train(tmp_path / "stopped", "--steps", "60") == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_second_signal_interrupts_at_once_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGINT)
    with signal_at(40):
        train(tmp_path)
    save = Checkpoint.save
    monkeypatch.setattr(
        Checkpoint, "save", lambda *args, **how: signal.raise_signal(signal.SIGINT) or save(*args, **how)
    )
    with signal_at(60, signal.SIGINT):
        assert train(tmp_path) == 130
    assert checkpoints.load_checkpoint(tmp_path)[0]["step"] == 40
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.slow  # worker processes take seconds to start
def test_no_worker_process_outlives_a_run(tmp_path):
    assert train(tmp_path, "--envs.parallel", "process", "--steps", "40", "--eval_every", "20") == 0
    assert not multiprocessing.active_children()


def test_all_parts_are_closed_even_if_one_fails(tmp_path, monkeypatch, capfd):
    closed = []
    close = Logger.close
    monkeypatch.setattr(Logger, "close", lambda self: closed.append("logger") or close(self))

    def fails(self):
        closed.append("replay")
        raise basics.UserError("Cannot write the episode: disk full.")

    monkeypatch.setattr(Replay, "close", fails)
    assert train(tmp_path, "--steps", "10") == 2
    assert closed == ["replay", "logger"]
    assert capfd.readouterr().err == "error: Cannot write the episode: disk full.\n"
