"""Every suite follows the contract with its real package; actions of all spaces reach their environment."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from run_helpers import log, main, metrics, moment, train

import config
import envs
import evaluate
import networks
from basics import UserError
from envs import rendering, wrappers
from exploration import Random

ROOT = Path(__file__).parent.parent
# Task, options, and keys of the observation.
NATIVE = [
    ("dmc_cartpole_balance", ("dmc_proprio",), {"position": (3,), "velocity": (2,)}),
    ("atari_pong", ("atari100k",), {"image": (64, 64, 3)}),
    ("minigrid_DoorKey-5x5", ("minigrid",), {"image": (64, 64, 3)}),
    ("gym_CartPole-v1", ("gym",), {"vector": (4,)}),
    ("gym_Taxi-v4", ("gym",), {"vector": (500,)}),
    ("gym_Pendulum-v1", ("gym", "--obs", "pixels"), {"image": (64, 64, 3)}),
    ("gym_CarRacing-v3", ("gym",), {"image": (64, 64, 3)}),
]
DRAWN = [  # with OpenGL
    ("dmc_walker_walk", ("dmc_vision",), {"image": (64, 64, 3)}),
    ("memorymaze_9x9", ("memorymaze",), {"image": (64, 64, 3)}),
    ("gym_Ant-v5", ("gym", "--obs", "both"), {"image": (64, 64, 3), "vector": (105,)}),
]
NO_DM_CONTROL = sys.version_info >= (3, 13)  # labmaze, which it needs, has no wheels


@pytest.fixture(autouse=True)
def own_mujoco_gl() -> Iterator[None]:
    """Restores MUJOCO_GL after a test."""
    before = os.environ.get("MUJOCO_GL")
    yield
    os.environ.pop("MUJOCO_GL", None)
    if before is not None:
        os.environ["MUJOCO_GL"] = before


@pytest.fixture
def opengl_that_works(monkeypatch) -> set[str]:
    """The names in this set are the working backends; nothing is really tried."""
    working: set[str] = set()
    monkeypatch.setattr(rendering, "_works", lambda backend: backend in working)
    monkeypatch.delitem(sys.modules, "dm_control._render", raising=False)
    os.environ.pop("MUJOCO_GL", None)
    return working


@pytest.fixture
def needs_opengl() -> None:
    try:
        rendering.choose_backend("this test")
    except UserError as error:
        pytest.skip(str(error))


def load(task: str, configs: tuple[str, ...], *options: str) -> config.Config:
    return config.load(["--configs", *configs, "--task", task, *options])


def make(task: str, configs: tuple[str, ...], *options: str, index: int = 0) -> wrappers.Episode:
    if NO_DM_CONTROL and task.startswith(("dmc_", "memorymaze_")):
        pytest.skip("dm-control cannot be installed on this Python")
    return envs.make_env(load(task, configs, *options), "train", index)


def actions(env: wrappers.Episode, amount: int, seed: int = 0) -> list[dict]:
    explorer = Random(env.act_space, np.random.default_rng(seed))
    drawn = explorer.act(amount)
    return [{key: value[index] for key, value in drawn.items()} for index in range(amount)]


def play(env: wrappers.Episode, steps: list[dict]) -> list[dict]:
    """Reset and take the actions; returns the observations of at most one episode."""
    seen = [env.reset()[0]]
    for action in steps:
        if seen[-1]["is_last"]:
            break
        seen.append(env.step(action)[0])
    return seen


def assert_equal(lhs: list[dict], rhs: list[dict]) -> None:
    assert len(lhs) == len(rhs)
    for step, (left, right) in enumerate(zip(lhs, rhs, strict=True)):
        for key in left:
            np.testing.assert_array_equal(left[key], right[key], err_msg=f"{key} at step {step}")


# The contract with the real packages


def check_contract(task, configs, shapes):
    env, other = make(task, configs), make(task, configs)
    own = {key: space.shape for key, space in env.obs_space.items() if key not in wrappers.EPISODE_SPACES}
    assert own == shapes
    steps = actions(env, 25)
    seen = play(env, steps)
    for obs in seen:  # Episode checks shapes, dtypes and NaN
        assert obs.keys() == env.obs_space.keys()
        if "image" in obs:
            assert obs["image"].dtype == np.uint8
    if "image" in shapes:
        assert seen[0]["image"].std() > 1, "the image is uniform"
    # The same seed and actions give the same observations, also after a restore in mid-episode.
    short = env.state()
    short["actions"] = {key: value[:10] for key, value in short["actions"].items()}
    assert_equal([seen[10]], [other.restore(short)[0]])
    assert_equal(seen[11:], [other.step(action)[0] for action in steps[10 : len(seen) - 1]])
    # The next episode is different.
    again = play(env, steps)
    assert any(not np.array_equal(a[k], b[k]) for a, b in zip(seen, again, strict=False) for k in shapes)
    env.close()
    other.close()


@pytest.mark.parametrize(("task", "configs", "shapes"), NATIVE)
def test_suite_follows_the_contract(task, configs, shapes):
    check_contract(task, configs, shapes)


@pytest.mark.parametrize(
    ("task", "configs", "shapes"),
    [pytest.param(*each, marks=[pytest.mark.slow] * (each[0] != "dmc_walker_walk")) for each in DRAWN],
)
def test_suite_with_opengl_follows_the_contract(task, configs, shapes, needs_opengl):
    check_contract(task, configs, shapes)


@pytest.mark.parametrize(
    ("task", "nearest"),
    [
        ("dmc_walker_wlk", "dmc_walker_walk"),
        ("atari_pongg", "atari_pong"),
        ("minigrid_DoorKey5x5", "minigrid_DoorKey-5x5"),
        ("gym_cartpole-v1", "gym_CartPole-v1"),
        ("memorymaze_9x8", "memorymaze_9x9"),
    ],
)
def test_unknown_task_names_the_nearest(task, nearest):
    with pytest.raises(UserError, match=f"Did you mean {nearest}\\?"):
        make(task, ("crafter",))


@pytest.mark.parametrize(("package", "extra"), [("minigrid", "minigrid"), ("memory_maze", "memorymaze")])
def test_missing_package_is_named_with_its_requirements_file(package, extra, monkeypatch, needs_opengl):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, f"envs.{extra}", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "minigrid", None)
    task = {"minigrid": "minigrid_DoorKey-5x5", "memorymaze": "memorymaze_9x9"}[extra]
    with pytest.raises(UserError, match=rf"{package}.*pip install -r requirements/{extra}\.txt"):
        make(task, (extra,))


# DeepMind Control


def test_dmc_time_limit_is_a_truncation_and_discount_zero_is_terminal():
    env = make("dmc_cartpole_balance", ("dmc_proprio",))
    inner = env.env.env._env
    env.reset()
    inner._step_limit = 6
    ends = [env.step({"action": np.zeros(1, np.float32)})[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)], "6 env steps are 3 of 2"
    env.reset()
    inner.task.get_termination = lambda physics: 0.0
    assert env.step({"action": np.zeros(1, np.float32)})[2:4] == (True, False)


def test_dmc_repeats_actions_and_renders_only_the_last_step(needs_opengl):
    env = make("dmc_cartpole_balance", ("dmc_vision",))
    single = make("dmc_cartpole_balance", ("dmc_vision",), "--action_repeat", "1")
    physics = env.env.env._env.physics
    drawn, render = [], physics.render
    physics.render = lambda *args, **kwargs: drawn.append(1) or render(*args, **kwargs)
    action = {"action": np.ones(1, np.float32)}
    env.reset(0)
    single.reset(0)
    twice = [single.step(action) for _ in range(2)]
    obs, reward, *_ = env.step(action)
    np.testing.assert_array_equal(obs["image"], twice[1][0]["image"])
    assert reward == pytest.approx(twice[0][1] + twice[1][1])
    assert len(drawn) == 2, "one at the reset and one for two env steps"


def test_time_limit_counts_env_steps_of_a_suite_that_repeats_actions():
    for limit, length in ((6, 3), (7, 4)):
        env = make("dmc_cartpole_balance", ("dmc_proprio",), "--time_limit", str(limit))
        assert len(play(env, actions(env, 10))) == 1 + length


PROPRIO = """
import logging, os, sys
import dreamer
from envs import rendering
with rendering.dm_control("dmc_cartpole_balance", draws=False):
    from dm_control.mujoco import Physics
def render(*args, **kwargs): raise AssertionError("proprio rendered an image")
Physics.render = render
code = dreamer.main(sys.argv[1:])
assert "OpenGL" not in sys.modules and "glfw" not in sys.modules, "OpenGL was loaded"
assert "MUJOCO_GL" not in os.environ
assert not logging.root.handlers, "log lines would be duplicated"
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.skipif(NO_DM_CONTROL, reason="dm-control cannot be installed on this Python")
def test_proprio_trains_and_evaluates_without_rendering(tmp_path):
    options = "--configs dmc_proprio debug --task dmc_cartpole_balance --steps 200 --time_limit 40"
    environ = {key: value for key, value in os.environ.items() if key != "MUJOCO_GL"}
    command = [sys.executable, "-W", "error::UserWarning:glfw", "-c", PROPRIO, *options.split()]
    command += ["--logdir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "eval/episode_return" in (tmp_path / "metrics.jsonl").read_text()


# OpenGL


def test_first_working_backend_is_chosen(opengl_that_works):
    opengl_that_works.update(("osmesa", "glfw"))
    rendering.choose_backend("dmc_walker_walk")
    assert os.environ["MUJOCO_GL"] == "osmesa"


def test_mujoco_gl_is_never_overwritten(opengl_that_works):
    opengl_that_works.update({"egl", "osmesa"})
    os.environ["MUJOCO_GL"] = "osmesa"
    rendering.choose_backend("dmc_walker_walk")
    assert os.environ["MUJOCO_GL"] == "osmesa"
    os.environ["MUJOCO_GL"] = "glfw"
    with pytest.raises(UserError, match="MUJOCO_GL=glfw cannot render here: libGL .*apt install libgl1"):
        rendering.choose_backend("dmc_walker_walk")
    assert os.environ["MUJOCO_GL"] == "glfw"
    os.environ["MUJOCO_GL"] = "disabled"
    with pytest.raises(UserError, match="MUJOCO_GL=disabled turns rendering off"):
        rendering.choose_backend("dmc_walker_walk")


def test_missing_opengl_names_the_library_to_install(opengl_that_works):
    with pytest.raises(UserError) as error:
        make("dmc_walker_walk", ("dmc_vision",))
    text = str(error.value)
    assert "\n" not in text
    assert "libEGL" in text and "apt install libegl1" in text and "conda-forge" in text
    assert "MUJOCO_GL" not in os.environ


# Atari


def test_atari_no_ops_depend_on_the_seed():
    env = make("atari_space_invaders", ("atari100k",))
    images = [env.reset()[0]["image"] for _ in range(6)]
    assert any((image != images[0]).any() for image in images)


def test_atari_actions_and_stickiness_are_the_options():
    assert make("atari_pong", ("atari100k",)).act_space["action"].n == 6
    assert make("atari_pong", ("atari100k",), "--atari.actions", "all").act_space["action"].n == 18
    sticky = [
        make("atari_pong", ("atari100k",), "--atari.sticky", value).unwrapped.ale.getFloat(
            "repeat_action_probability"
        )
        for value in ("False", "True")
    ]
    assert sticky == [0.0, pytest.approx(0.25)]


def test_atari_step_is_four_frames_and_the_time_limit_is_a_truncation():
    env = make("atari_pong", ("atari100k",), "--time_limit", "60")
    env.reset()
    ale = env.unwrapped.ale
    before = ale.getFrameNumber()
    env.step({"action": 0})
    assert ale.getFrameNumber() - before == 4
    seen = play(env, actions(env, 40))
    assert len(seen) == 1 + 15 and seen[-1]["is_last"] and not seen[-1]["is_terminal"]


def test_losing_a_life_does_not_end_an_atari_episode():
    env = make("atari_breakout", ("atari100k",))
    env.reset()
    ale = env.unwrapped.ale
    fire, noop = {"action": 1}, {"action": 0}
    ends = {}
    for step in range(2000):
        obs = env.step(fire if step % 20 == 0 else noop)[0]
        ends[ale.lives()] = (bool(obs["is_last"]), bool(obs["is_terminal"]))
        if obs["is_last"]:
            break
    assert ends == {5: (False, False)} | dict.fromkeys((4, 3, 2, 1), (False, False)) | {0: (True, True)}


# MiniGrid


def test_minigrid_observes_direction_and_mission_by_option():
    env = make(
        "minigrid_BabyAI-GoToObj", ("minigrid",), "--minigrid.direction", "True", "--minigrid.mission", "True"
    )
    obs = env.reset()[0]
    assert obs["direction"].sum() == 1
    turned = env.step({"action": 0})[0]  # left
    assert turned["direction"].argmax() == (obs["direction"].argmax() - 1) % 4
    rows = obs["mission"].reshape(50, -1)
    from envs.minigrid import WORDS

    words = {index: word for word, index in WORDS.items()}
    shown = [words[row.argmax()] for row in rows if row.any()]
    assert shown == env.unwrapped.mission.split()
    assert set(make("minigrid_DoorKey-5x5", ("minigrid",)).obs_space) - set(wrappers.EPISODE_SPACES) == {
        "image"
    }


def test_minigrid_grid_encodes_all_cells_and_renders_nothing(monkeypatch):
    import minigrid.minigrid_env
    from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX, STATE_TO_IDX

    from envs.minigrid import CELL, KINDS

    drawn = []
    monkeypatch.setattr(minigrid.minigrid_env.MiniGridEnv, "get_frame", lambda *a, **k: drawn.append(a))
    env = make(
        "minigrid_DoorKey-5x5", ("minigrid",), "--minigrid.grid", "True", "--minigrid.direction", "True"
    )
    assert env.obs_space.keys() - wrappers.EPISODE_SPACES.keys() == {"grid", "direction"}
    game = env.unwrapped
    seen = env.reset()[0]
    rng = np.random.default_rng(0)
    found = set()
    for _ in range(1500):
        if seen["is_last"]:
            env.reset()
        seen = env.step({"action": int(rng.integers(6))})[0]
        grid = seen["grid"].reshape(7, 7, CELL)
        view, carried = game.gen_obs()["image"], game.carrying
        assert np.array_equal(grid[..., :KINDS].argmax(-1), view[..., 0])
        assert (grid[..., :KINDS].sum(-1) == 1).all()
        assert bool(carried) == bool(grid[3, 6, OBJECT_TO_IDX["key"]])
        doors = grid[..., OBJECT_TO_IDX["door"]] == 1
        states = grid[..., KINDS + len(COLOR_TO_IDX) :]
        assert np.array_equal(states.sum(-1), doors)
        assert np.array_equal(states[doors].argmax(-1), view[doors][:, 2])
        coloured = grid[..., KINDS : KINDS + len(COLOR_TO_IDX)]
        assert np.array_equal(coloured.sum(-1), view[..., 0] > OBJECT_TO_IDX["empty"])
        assert (coloured[doors].argmax(-1) == COLOR_TO_IDX["yellow"]).all()
        found |= {("door", int(each)) for each in view[doors][:, 2]} | {("carried", bool(carried))}
    carrying = {("carried", False), ("carried", True)}
    assert found == {("door", each) for each in STATE_TO_IDX.values()} | carrying
    assert not drawn


def test_minigrid_accepts_full_ids_and_the_time_limit_is_a_truncation():
    env = make("minigrid_MiniGrid-Empty-5x5-v0", ("minigrid",))
    seen = play(env, [{"action": 0}] * 200)  # turns in place
    assert len(seen) == 1 + 100 and seen[-1]["is_last"] and not seen[-1]["is_terminal"]


@pytest.mark.slow
def test_all_missions_of_minigrid_have_known_words():
    from envs.minigrid import MISSION_LENGTH, encode_mission, list_ids

    assert len(list_ids()) > 100
    for env_id in list_ids():
        env = gymnasium.make(env_id, disable_env_checker=True)
        for seed in range(3):
            mission = env.reset(seed=seed)[0]["mission"]
            rows = encode_mission(mission)
            assert not rows[:, 0].any(), f"{env_id}: {mission}"
            assert not rows[MISSION_LENGTH - 1].any(), f"{env_id}: longer than MISSION_LENGTH: {mission}"


# Gymnasium


class Zoo(gymnasium.Env):
    """Observations and actions of every kind. The reward is one of the actions."""

    metadata = {"render_modes": ["rgb_array"]}
    observation_space = spaces.Dict(
        {
            "camera": spaces.Box(0, 255, (30, 40, 3), np.uint8),
            "gray": spaces.Box(0, 255, (30, 40), np.uint8),
            "place": spaces.Discrete(5, start=2),
            "joints": spaces.Box(-np.inf, np.inf, (2, 3), np.float64),
            "flags": spaces.MultiBinary(4),
            "parts": spaces.Tuple([spaces.Discrete(3), spaces.Box(0, 1, (2,), np.float32)]),
            "inner": spaces.Dict({"a": spaces.MultiDiscrete([2, 3]), "b": spaces.Box(-1, 1, ())}),
        }
    )
    action_space = spaces.Dict(
        {
            "gear": spaces.Discrete(3, start=-1),
            "keys": spaces.MultiDiscrete([[2, 3], [4, 2]]),
            "steer": spaces.Box(np.array([0, -2], np.float32), np.array([1, 6], np.float32)),
            "force": spaces.Box(-np.inf, np.inf, (2,), np.float64),
            "level": spaces.Box(0, 255, (), np.uint8),
        }
    )
    length = 8

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def _obs(self):
        self._places = self.np_random.random(12)
        drawn = self.np_random.integers
        return {
            "camera": drawn(0, 256, (30, 40, 3), np.uint8),
            "gray": np.full((30, 40), drawn(256), np.uint8),
            "place": 2 + int(drawn(5)),
            "joints": self.np_random.normal(size=(2, 3)),
            "flags": drawn(0, 2, 4).astype(np.int8),
            "parts": (int(drawn(3)), self.np_random.random(2, np.float32)),
            "inner": {"a": drawn([2, 3]), "b": np.float32(0.5)},
        }

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._step = 0
        return self._obs(), {}

    def step(self, action):
        assert action["gear"] in (-1, 0, 1)
        assert action["keys"].shape == (2, 2) and self.action_space["keys"].contains(
            action["keys"].astype(np.int64)
        )
        for key in ("steer", "force", "level"):
            assert self.action_space[key].contains(np.asarray(action[key])), (key, action[key])
        self._step += 1
        return self._obs(), float(action["gear"]), self._step >= self.length, False, {}

    def render(self):
        return np.full((20, 30, 3), 7, np.uint8)


gymnasium.register("Zoo-v0", Zoo)
ZOO = "gym_test_suites:Zoo-v0"  # worker processes import this module


def test_gymnasium_observations_of_every_kind_become_images_and_vectors():
    env = make(ZOO, ("gym",))
    obs = play(env, actions(env, 3))[-1]
    shapes = {key: value.shape for key, value in obs.items() if key not in wrappers.EPISODE_SPACES}
    assert shapes == {
        "camera": (64, 64, 3),
        "gray": (64, 64, 1),
        "place": (5,),
        "joints": (2, 3),
        "flags": (4,),
        "parts_0": (3,),
        "parts_1": (2,),
        "inner_a": (5,),
        "inner_b": (),
    }
    assert obs["place"].sum() == 1 and obs["gray"].std() == 0


def test_observation_that_is_not_numeric_is_refused(monkeypatch):
    monkeypatch.setattr(Zoo, "observation_space", spaces.Dict({"text": spaces.Text(9)}))
    with pytest.raises(UserError, match="there are no observations"):
        make(ZOO, ("gym",))


def test_pixels_are_the_rendered_frame_and_both_keeps_the_vector():
    assert set(make("gym_CartPole-v1", ("gym", "--obs", "both")).obs_space) >= {"image", "vector"}
    obs = make(ZOO, ("gym", "--obs", "pixels")).reset()[0]
    assert obs.keys() - wrappers.EPISODE_SPACES.keys() == {"image"}
    assert (obs["image"] == 7).all()


def test_module_before_the_id_is_imported(monkeypatch, tmp_path):
    (tmp_path / "my_zoo.py").write_text(
        "import gymnasium\nfrom test_suites import Zoo\ngymnasium.register('MyZoo-v3', Zoo)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert make("gym_my_zoo:MyZoo-v3", ("gym",)).reset()[0]["is_first"]
    del gymnasium.registry["MyZoo-v3"]
    with pytest.raises(UserError, match="cannot be made: No module named 'no_such_zoo'"):
        make("gym_no_such_zoo:MyZoo-v3", ("gym",))


# Actions of every kind


SPACES = {
    "gear": spaces.Discrete(3, start=-1),
    "keys": spaces.MultiDiscrete([[2, 3], [4, 2]]),
    "steer": spaces.Box(-1, 1, (2, 2), np.float32),
    "gas": spaces.Box(-1, 1, (), np.float32),
}


def test_actions_of_all_spaces_are_encoded_and_decoded_without_loss():
    vector = networks.ActionVector(SPACES)
    assert vector.sizes == {"gear": 3, "keys": 11, "steer": 4, "gas": 1} and vector.size == 19
    drawn = Random(SPACES, np.random.default_rng(0)).act(50)
    for key, space in SPACES.items():
        samples = drawn[key].astype(space.dtype)
        assert all(space.contains(sample if space.shape else space.dtype.type(sample)) for sample in samples)
    flat = vector.encode({key: torch.from_numpy(value) for key, value in drawn.items()})  # [50, A]
    assert flat.shape == (50, 19) and (flat[:, :14].sum(-1) == 1 + 4).all()
    back = vector.decode(flat)
    for key, value in drawn.items():
        assert back[key].dtype == value.dtype
        np.testing.assert_array_equal(back[key], value)


def test_policy_has_one_factor_per_index_and_per_continuous_key():
    options = config.load([]).actor
    actor = networks.Actor(8, networks.ActionVector(SPACES), options)
    generator = torch.Generator().manual_seed(0)
    policy = actor(torch.randn(5, 7, 8, generator=generator))
    action = policy.sample(actor.noise(5, 7, generator=generator))  # [5, 7, A]
    assert actor.sizes == [3, 2, 3, 4, 2, 4, 1] and action.shape == (5, 7, 19)
    assert (action[..., :14].sum(-1) == 5).all()
    pairs = list(zip(policy.parts, action.split(actor.sizes, -1), strict=True))
    torch.testing.assert_close(policy.log_prob(action), sum(part.log_prob(value) for part, value in pairs))
    torch.testing.assert_close(policy.entropy(), sum(part.entropy() for part, _ in pairs))
    assert policy.mode.shape == action.shape


def test_action_with_the_name_of_an_observation_is_refused(monkeypatch):
    monkeypatch.setattr(Zoo, "action_space", spaces.Dict({"camera": spaces.Discrete(2)}))
    with pytest.raises(UserError, match="has 'camera' both as action and as observation"):
        make(ZOO, ("gym",))


def test_env_with_a_dict_of_all_actions_trains_resumes_and_is_evaluated(tmp_path, capsys):
    options = ("--task", ZOO)
    assert train(tmp_path, *options) == 0
    steps = moment(tmp_path)["step"]
    assert "train_eps" in os.listdir(tmp_path) and any("loss/policy" in line for line in metrics(tmp_path))
    with np.load(next((tmp_path / "train_eps").glob("*.npz"))) as episode:
        assert episode["keys"].shape[1:] == (2, 2) and episode["keys"].dtype == np.int32
        assert set(episode["gear"]) <= {-1, 0, 1}
    assert train(tmp_path, *options, "--steps", str(steps + 40)) == 0
    assert "Resumed at step" in log(tmp_path)
    capsys.readouterr()
    assert evaluate.main(["--logdir", str(tmp_path), "--episodes", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["episodes"] == 2


# Whole runs


RUNS = {
    "dmc_vision": "--configs dmc_vision debug --task dmc_walker_walk",
    "atari100k": "--configs atari100k debug --task atari_pong",
    "memorymaze": "--configs memorymaze debug --envs.amount 2",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_short_training_with_the_real_package(name, tmp_path, request):
    if name in ("dmc_vision", "memorymaze"):
        request.getfixturevalue("needs_opengl")
    if NO_DM_CONTROL and name in ("dmc_vision", "memorymaze"):
        pytest.skip("dm-control cannot be installed on this Python")
    assert main(*RUNS[name].split(), "--logdir", str(tmp_path)) == 0
    seen = {key for line in metrics(tmp_path) for key in line}
    assert {"loss/policy", "eval/episode_return", "env/episode_return"} <= seen
    assert list(tmp_path.glob("videos/*.mp4"))
