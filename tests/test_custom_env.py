"""Custom environments train, and docs/custom_env.md is correct."""

import json
import re
import shlex
import signal
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from run_helpers import assert_same_run, log, main, metrics, signal_at, train

import checkpoint as checkpoints
import config as configs
import envs
import evaluate
from agent import Dreamer
from envs import check as checks
from envs.dummy import Dummy
from episodes import list_episodes

ROOT = Path(__file__).parent.parent
GUIDES = ("docs/custom_env.md", "docs/custom_env.ja.md")


def blocks(language: str, guide: str = GUIDES[0]) -> list[str]:
    text = (ROOT / guide).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines()]
CUSTOM = "python3 dreamer.py --configs custom --task custom_task_name"
DEBUG = "python3 dreamer.py --configs debug custom --task custom_task_name --logdir ./logdir/custom_debug"
CHECK = "python3 -m envs.check custom_task_name"
START = f"{CUSTOM} --logdir ./logdir/custom"
TUNED = f"{CUSTOM} --batch_size 32 --model_lr 5e-4 --logdir ./logdir/custom_tuned"
RESUME = f"{CUSTOM} --from_checkpoint ./logdir/custom/latest.pt"


# Classes of users


class OldEnv:
    """A class with the old API."""

    def __init__(self, task, size=(64, 64)):
        self._size = tuple(size)
        self._step = 0

    @property
    def obs_space(self):
        return {"image": spaces.Box(low=0, high=255, shape=(*self._size, 3), dtype=np.uint8)}

    @property
    def act_space(self):
        return spaces.Discrete(4)

    def reset(self):
        self._step = 0
        return {"image": self.render(), "is_first": False}, {}

    def step(self, action):
        self._step += 1
        terminated = self._step >= 5 + action
        return {"image": self.render(), "is_first": False}, float(action == 1), terminated, False, {}

    def render(self, mode="rgb_array"):
        assert mode == "rgb_array"
        return np.full((*self._size, 3), 5 * self._step, np.uint8)


class Vectors(gymnasium.Env):
    """No image; discrete and vector observations, sound, and render()."""

    observation_space = spaces.Dict(
        {
            "audio": spaces.Box(-1, 1, (5,), np.float32),
            "place": spaces.Discrete(3),
            "speed": spaces.Box(-np.inf, np.inf, (2,), np.float64),
        }
    )
    action_space = spaces.Box(-1, 1, (2,), np.float32)
    renders = 0

    def __init__(self, render_mode="rgb_array"):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._obs(), {}

    def step(self, action):
        self.steps += 1
        return self._obs(), float(action[0]), self.steps > 8, False, {}

    def _obs(self):
        sound = self.np_random.uniform(-1, 1, 5).astype(np.float32)
        place = self.np_random.integers(3)
        return {"audio": sound, "place": place, "speed": self.np_random.normal(size=2)}

    def render(self):
        Vectors.renders += 1
        return np.full((30, 40, 3), 20 * self.steps, np.uint8)


class Mixture(Vectors):
    """The same with two images of different sizes."""

    observation_space = spaces.Dict(
        {
            **Vectors.observation_space,
            "front": spaces.Box(0, 255, (20, 30, 3), np.uint8),
            "depth": spaces.Box(0, 255, (16, 16, 1), np.uint8),
        }
    )

    def _obs(self):
        front = self.np_random.integers(0, 255, (20, 30, 3), np.uint8)
        return {**super()._obs(), "front": front, "depth": np.full((16, 16, 1), self.steps, np.uint8)}


class Blind(Vectors):
    def render(self):
        raise RuntimeError("no display")


@pytest.fixture
def task(monkeypatch):
    """A function that makes the task `mine_env` of a class; returns its option."""

    def add(make):
        monkeypatch.setitem(envs.REGISTRY, "mine", make)
        return ["--task", "mine_env"]

    return add


def test_class_with_the_old_api_trains_and_flags_are_filled_in(tmp_path, task):
    assert train(tmp_path, *task(OldEnv)) == 0
    for file in list_episodes(tmp_path / "train_eps"):
        with np.load(file.path) as episode:
            assert episode["is_first"].tolist() == [True] + [False] * (file.length - 1)
            assert episode["is_last"][-1] == episode["is_terminal"][-1] == 1
    assert any("loss/image" in line for line in metrics(tmp_path))


def test_env_without_images_trains_and_render_provides_the_videos(tmp_path, task):
    Vectors.renders = 0
    options = task(Vectors)
    assert train(tmp_path, *options, "--steps", "49") == 0  # the evaluation at the start only
    evaluations, frames = 1, 1 + (1 + 9)  # one at the start, then each step of an episode
    assert Vectors.renders == evaluations * frames, "training does not render"
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 1
    for folder in ("train_eps", "eval_eps"):
        for file in list_episodes(tmp_path / folder):
            with np.load(file.path) as episode:
                assert not any(episode[key].dtype == np.uint8 for key in episode)
                assert episode["place"].shape == (file.length, 3)
    result = evaluate.evaluate(tmp_path, 1, video_folder=tmp_path / "out")
    assert len(result["videos"]) == 1 and Path(result["videos"][0]).stat().st_size > 0
    before = Vectors.renders
    evaluate.evaluate(tmp_path, 1)
    assert Vectors.renders == before, "no video was requested"


def test_failing_render_only_loses_the_video(tmp_path, task):
    assert train(tmp_path, *task(Blind), "--steps", "60") == 0
    assert "No videos of the evaluation: RuntimeError: no display" in log(tmp_path)
    assert not (tmp_path / "videos").exists()


def test_seeds_of_custom_envs_fit_any_generator():
    seeds = []

    class Old(OldEnv):
        def __init__(self, size, seed):
            super().__init__("x", size)
            np.random.RandomState(seed)
            self.seed = lambda seed: seeds.append(seed) or np.random.RandomState(seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(envs.REGISTRY, "custom", Old)
        for index in (0, 1):
            env = envs.make_env(configs.load(["--task", "custom_x"]), "train", index)
            env.reset()
            env.reset()
    assert len(set(seeds)) == 4


def test_any_mixture_of_keys_trains(tmp_path, task):
    assert train(tmp_path, *task(Mixture), "--steps", "60", "--video_pred_log", "True") == 0
    line = metrics(tmp_path)[-1]
    assert line["loss/image"] > 0 and line["loss/vector"] > 0
    assert "images of" in log(tmp_path) and "resized to 16x16" in log(tmp_path)


def test_keys_that_are_not_encoded_are_named_and_no_encoded_key_is_an_error(tmp_path, task, capfd):
    only = ["--encoder.cnn_keys", "front", "--encoder.mlp_keys", "place"]
    assert train(tmp_path / "a", *task(Mixture), *only, "--steps", "40") == 0
    (line,) = re.findall(r"the agent does not see: ([\w, ]+) \(", log(tmp_path / "a"))
    assert {"depth", "speed"} <= set(line.split(", ")) and "front" not in line
    nothing = ["--encoder.cnn_keys", "x", "--encoder.mlp_keys", "x"]
    assert train(tmp_path / "b", *task(lambda size: Dummy(size)), *nothing) == 2
    assert "The agent has no inputs" in capfd.readouterr().err and not (tmp_path / "b").exists()


WRAPPED = "--grayscale True --frame_stack 2 --audio_dim 3 --audio_noise_std 1 --clip_reward True".split()


@pytest.mark.slow
def test_resumed_run_of_a_wrapped_env_equals_the_uninterrupted_run(tmp_path):
    assert train(tmp_path / "whole", *WRAPPED) == 0
    with signal_at(77):
        assert train(tmp_path / "parts", *WRAPPED) == 143
    assert train(tmp_path / "parts", *WRAPPED) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    with np.load(list_episodes(tmp_path / "whole" / "train_eps")[0].path) as episode:
        assert episode["image"].shape[1:] == (16, 16, 2)
    assert list((tmp_path / "whole" / "videos").glob("*.mp4"))


def test_reward_scale_only_affects_learning(tmp_path):
    assert train(tmp_path, "--reward_scale", "10", "--steps", "40") == 0
    with np.load(list_episodes(tmp_path / "train_eps")[0].path) as episode:
        assert set(np.unique(episode["reward"])) == {0.0, 1.0}
    predicted = []
    for scale, reward in ((10.0, 1.0), (1.0, 10.0), (1.0, 1.0)):
        config = configs.load(["--configs", "debug", "--task", "dummy_vector"])
        config = config.replace({"reward_scale": scale, "opt.warmup": 0, "opt.lr": 1e-2})
        env = envs.make_env(config, "train", 0)
        agent = Dreamer(env.obs_space, env.act_space, config, torch.device("cpu"))
        batch = {key: np.zeros((2, 3, *space.shape), space.dtype) for key, space in env.obs_space.items()}
        batch |= {"deter": np.zeros((2, 3, 32), np.float32), "stoch": np.zeros((2, 3, 4), np.uint8)}
        batch |= {"action": np.zeros((2, 3), np.int32), "reward": np.full((2, 3), reward, np.float32)}
        predicted.append([float(agent.train(batch)[0]["imag/reward"]) for _ in range(3)])
    assert predicted[0] == predicted[1] != predicted[2]


# The guide


def test_guide_shows_the_example_and_its_line_in_the_registry():
    example = (ROOT / "envs" / "custom_env.py").read_text(encoding="utf-8")
    shown, line = blocks("python")[:2]
    assert shown == f"# envs/custom_env.py\n{example}"
    assert line in (ROOT / "envs" / "__init__.py").read_text(encoding="utf-8")


@pytest.fixture
def workdir(tmp_path, monkeypatch) -> Path:
    """A working directory with the files of the guide."""
    for block in blocks("python"):
        if match := re.match(r"# (mypackage/\w+\.py)\n", block):
            path = tmp_path / match[1]
            path.parent.mkdir(exist_ok=True)
            path.write_text(block)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    for name in ("GEMINI_API_KEY", "GOOGLE_API_KEY"):  # otherwise the run would ask a language model
        monkeypatch.delenv(name, raising=False)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "mypackage"]:
        del sys.modules[name]


FAST = "--envs.amount 2 --envs.parallel none --steps 130 --device cpu --time_limit 20 --eval_every 0".split()


@pytest.mark.parametrize("command", [c for c in COMMANDS if "envs.check" in c])
def test_check_of_the_guide_finds_no_fault(workdir, capsys, command):
    assert checks.main(shlex.split(command)[3:]) == 0
    assert "is fine" in capsys.readouterr().out


@pytest.mark.parametrize("command", [c for c in COMMANDS if "--configs debug" in c])
def test_debug_command_of_the_guide_runs(workdir, command):
    argv = shlex.split(command)
    assert argv[:2] == ["python3", "dreamer.py"]
    assert main(*argv[2:], *FAST) == 0
    assert metrics(Path(argv[argv.index("--logdir") + 1]))


def test_captioner_of_the_guide_sees_what_the_agent_does_not(workdir):
    (command,) = (command for command in COMMANDS if "--llm.captioner" in command)
    assert main(*shlex.split(command)[2:], *FAST, "--logdir", "./advised") == 0
    decisions = (workdir / "advised" / "decisions.jsonl").read_text().splitlines()
    captions = {json.loads(line)["caption"] for line in decisions}
    assert captions and all(re.fullmatch(r"The end is \d steps to the right\.", each) for each in captions)
    for file in list_episodes(workdir / "advised" / "train_eps"):
        with np.load(file.path) as episode:
            assert "clock" in episode and "symbolic" not in episode
    from mypackage.corridor import Corridor, CorridorCaptioner

    env = Corridor()
    captioner = CorridorCaptioner(["action_0", "action_1"], env.obs_space)
    before, _ = env.reset(seed=0)
    assert captioner.actions == ("left", "right")
    while True:
        now, _, terminated, _, _ = env.step(1)
        assert not captioner.blocked(before, now, 1)
        assert captioner.reached("reach_end", before, now) == terminated
        if terminated:
            break
    env.reset(seed=0)
    env.place = 0
    before = env.observe()
    assert captioner.blocked(before, env.step(0)[0], 0)


@pytest.mark.slow
def test_commands_of_the_guide_run_as_written(workdir):
    """Up to the first update, with the full model; then SIGTERM ends them after a save."""
    train = Dreamer.train

    def train_once(agent, data, *args):
        signal.raise_signal(signal.SIGTERM)
        return train(agent, data, *args)

    assert checks.main(shlex.split(CHECK)[3:]) == 0
    for command in (START, TUNED, RESUME, DEBUG):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Dreamer, "train", train_once)
            code = main(*shlex.split(command)[2:])
        assert code == 143, command
    assert "Resumed at step" in log(workdir / "logdir" / "custom")
    for name in ("custom", "custom_tuned", "custom_debug"):
        checkpoint = checkpoints.load_checkpoint(workdir / "logdir" / name)[0]
        assert checkpoint["agent"]["updates"] > 0
