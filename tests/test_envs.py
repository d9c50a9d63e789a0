"""Environments follow the contract of envs/__init__.py."""

import copy
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import config as configs
import envs
from basics import UserError
from envs import dummy, wrappers
from envs.crafter import Crafter

ROOT = Path(__file__).parent.parent
DUMMY_TASKS = [f"dummy_{name}" for name in dummy.TASKS]
DEFAULTS = dict(configs.load([]))


def make(task: str, mode: str = "train", index: int = 0, **options) -> wrappers.Episode:
    return envs.make_env(types.SimpleNamespace(**(DEFAULTS | {"task": task} | options)), mode, index)


def random_actions(env, amount: int, seed: int = 0) -> list[dict]:
    spaces = copy.deepcopy(env.act_space)
    for key, space in spaces.items():
        space.seed(seed + len(key))
    return [{key: space.sample() for key, space in spaces.items()} for _ in range(amount)]


def play(env, actions: list[dict]) -> list[dict]:
    """Reset and take the actions; returns the observations of at most one episode."""
    trajectory = [env.reset()[0]]
    for action in actions:
        if trajectory[-1]["is_last"]:
            break
        trajectory.append(env.step(action)[0])
    return trajectory


def assert_equal(lhs: list[dict], rhs: list[dict]) -> None:
    assert len(lhs) == len(rhs)
    for step, (left, right) in enumerate(zip(lhs, rhs, strict=True)):
        assert left.keys() == right.keys()
        for key in left:
            np.testing.assert_array_equal(left[key], right[key], err_msg=f"{key} at step {step}")


def differ(lhs: list[dict], rhs: list[dict], key: str) -> bool:
    pairs = zip(lhs, rhs, strict=False)
    return any(not np.array_equal(left[key], right[key]) for left, right in pairs)


# The contract


OTHER_TASKS = ["crafter_reward", "soundsearch_room", "soundsearch_shuffled", "tvroom_noise", "tvroom_still"]


@pytest.mark.parametrize("task", [*DUMMY_TASKS, *OTHER_TASKS])
def test_observations_match_the_spaces_and_flags_match_the_episode(task):
    env = make(task, size=[48, 40], time_limit=10)
    assert set(env.act_space) == {"action"}
    trajectory = play(env, random_actions(env, 20))
    for obs in trajectory:
        assert obs.keys() == env.obs_space.keys()
        for key, space in env.obs_space.items():
            assert (obs[key].shape, obs[key].dtype) == (space.shape, space.dtype), key
        if "image" in obs:
            assert obs["image"].shape == (48, 40, 3) and obs["image"].dtype == np.uint8
    assert [bool(obs["is_first"]) for obs in trajectory] == [True] + [False] * (len(trajectory) - 1)
    assert [bool(obs["is_last"]) for obs in trajectory] == [False] * (len(trajectory) - 1) + [True]
    assert trajectory[0]["reward"] == 0


@pytest.mark.parametrize("task", DUMMY_TASKS)
def test_restored_episode_continues_as_the_original(task):
    env, other = make(task), make(task)
    env.reset()
    actions = random_actions(env, 5)
    before = play(env, actions[:3])
    state = pickle.loads(pickle.dumps(env.state()))
    restored = other.restore(state)[0]
    assert_equal([before[-1]], [restored])
    assert_equal(
        [env.step(action)[0] for action in actions[3:]], [other.step(action)[0] for action in actions[3:]]
    )
    assert_equal([env.reset()[0]], [other.reset()[0]])
    assert_equal([env.reset()[0]], [other.reset(episode=3)[0]])


def test_each_episode_env_and_mode_has_its_own_seed():
    first = make("dummy_cue")
    actions = random_actions(first, 16)
    reference = play(first, actions)
    assert_equal(reference, play(make("dummy_cue"), actions))
    assert differ(reference, play(first, actions), "image"), "the next episode"
    assert differ(reference, play(make("dummy_cue", index=1), actions), "image"), "another env"
    assert differ(reference, play(make("dummy_cue", mode="eval"), actions), "image"), "evaluation"
    assert differ(reference, play(make("dummy_cue", seed=1), actions), "image"), "another seed"


@pytest.mark.parametrize("task, nearest", [("dummy_memry", "dummy_memory"), ("crafter", "crafter_reward")])
def test_unknown_task_names_the_nearest(task, nearest):
    with pytest.raises(UserError, match=f"Did you mean {nearest}"):
        make(task)


def test_missing_package_is_named_with_the_file_to_install(monkeypatch, tmp_path):
    (tmp_path / "needs_more.py").write_text("import package_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(envs.REGISTRY, "more", "needs_more:make")
    with pytest.raises(UserError, match=r"package_that_nobody_has.*pip install -r requirements\.txt"):
        make("more_task")


# Checks of what an env returns


class Broken:
    """A dummy env that changes its observation or reward at the second step."""

    def __init__(self, change=None, reward=0.0):
        self._env = dummy.Dummy(size=(8, 8), vectors=("vector",))
        self.obs_space, self.act_space = self._env.obs_space, self._env.act_space
        self._change, self._reward = change, reward
        self._steps = 0

    def reset(self, seed=None):
        return self._env.reset(seed)

    def step(self, action):
        obs, *rest = self._env.step(action)
        self._steps += 1
        if self._steps < 2:
            return obs, *rest
        if self._change:
            self._change(obs)
        return obs, self._reward, *rest[1:]


def replace(key, function):
    def change(obs):
        obs[key] = function(obs[key])

    return change


@pytest.mark.parametrize(
    "broken, message",
    [
        (
            Broken(replace("image", lambda x: x / np.float32(255))),
            r"'image': expected uint8 \(8, 8, 3\), got float32",
        ),
        (
            Broken(replace("image", lambda x: x.transpose(2, 0, 1))),
            r"'image': .*\(8, 8, 3\), got uint8 \(3, 8, 8\)",
        ),
        (Broken(replace("vector", lambda x: x * np.nan)), "'vector': expected finite values"),
        (Broken(lambda obs: obs.pop("vector")), "'vector': expected the key, got no such key"),
        (Broken(reward=float("nan")), "'reward': expected a finite number, got nan"),
    ],
)
def test_invalid_observation_is_an_error_with_key_expected_and_got(broken, message):
    env = wrappers.Episode(broken, lambda episode: episode, "dummy_broken")
    env.reset()
    env.step({"action": 0})
    with pytest.raises(UserError, match=r"dummy_broken.*step 2 of episode 0: " + message):
        env.step({"action": 0})


# Wrappers


def test_time_limit_is_a_truncation_in_env_steps():
    env = make("dummy_cue", time_limit=6, action_repeat=2)
    trajectory = play(env, random_actions(env, 20))
    assert len(trajectory) == 1 + 3
    assert trajectory[-1]["is_last"] and not trajectory[-1]["is_terminal"]


# Dummy


def cue_of(obs: dict) -> int:
    """The cue, read from the image, or -1 where there is none."""
    height, width = obs["image"].shape[:2]
    color = obs["image"][height // 2, width // 2]
    found = (dummy.COLORS == color).all(-1).nonzero()[0]
    return int(found[0]) if len(found) else -1


def returns(env, policy, episodes: int) -> np.ndarray:
    totals = []
    for _ in range(episodes):
        obs, total = env.reset()[0], 0.0
        while not obs["is_last"]:
            obs = env.step({"action": policy(obs)})[0]
            total += float(obs["reward"])
        totals.append(total)
    return np.array(totals)


def test_dummy_cue_is_solved_by_the_action_of_the_color():
    env = make("dummy_cue", size=[16, 32])
    assert (returns(env, cue_of, 5) == env.best_return).all()


def test_dummy_memory_is_solved_by_remembering_the_first_image():
    env = make("dummy_memory")
    memory = []

    def policy(obs):
        cue = cue_of(obs)
        assert (cue >= 0) == bool(obs["is_first"])
        if obs["is_first"]:
            memory[:] = [cue]
        return memory[0]

    assert (returns(env, policy, 5) == env.best_return).all()


def test_dummy_continuous_rewards_the_point_of_the_cue():
    env = make("dummy_continuous")
    angles = 2 * np.pi * np.arange(len(dummy.COLORS)) / len(dummy.COLORS)
    targets = dummy.RADIUS * np.stack([np.cos(angles), np.sin(angles)], -1)
    np.testing.assert_allclose(returns(env, lambda obs: targets[cue_of(obs)], 3), env.best_return, rtol=1e-6)


@pytest.mark.parametrize("task", DUMMY_TASKS)
def test_random_actions_get_at_most_a_quarter_of_the_best_return(task):
    env = make(task, size=[8, 8])
    space = env.act_space["action"]
    space.seed(0)
    found = returns(env, lambda obs: space.sample(), 200)
    by_chance = 3 * found.std() / len(found) ** 0.5  # of the mean
    assert found.mean() <= 0.25 * env.best_return + by_chance


# Crafter


def test_crafter_restored_and_other_episodes():
    env, other = make("crafter_reward"), make("crafter_reward")
    actions = random_actions(env, 60)
    before = play(env, actions[:40])
    assert not before[-1]["is_last"]
    assert_equal([before[-1]], [other.restore(env.state())[0]])
    assert_equal(
        [env.step(action)[0] for action in actions[40:]], [other.step(action)[0] for action in actions[40:]]
    )
    terrain = env._env._world._mat_map.copy()
    env.reset()
    assert (env._env._world._mat_map != terrain).any(), "the next episode has another world"
    evaluation = make("crafter_reward", mode="eval")
    evaluation.reset()
    assert (evaluation._env._world._mat_map != terrain).any(), "evaluation has another world"


# The player is kept alive, so that one long episode has many creatures.
TRAJECTORY = """
import hashlib
import numpy as np
from envs.crafter import Crafter

env, random, digest, seen = Crafter(), np.random.default_rng(0), hashlib.sha256(), set()
env.reset(seed=0)
for step in range(600):
    env._env._player.inventory.update(health=9, food=9, drink=9, energy=9)
    obs, reward, *_ = env.step(int(random.integers(17)))
    creatures = [(type(each).__name__, *map(int, each.pos)) for each in env._env._world.objects]
    seen |= {name for name, *_ in creatures}
    digest.update(obs["image"].tobytes() + repr((reward, creatures)).encode())
print(digest.hexdigest(), *sorted(seen))
"""


def test_crafter_gives_the_same_game_in_every_process():
    processes = []
    for hash_seed in "12":
        environ = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", TRAJECTORY]
        processes.append(subprocess.Popen(command, env=environ, cwd=ROOT, stdout=subprocess.PIPE, text=True))
    lines = [process.communicate()[0] for process in processes]
    assert lines[0] == lines[1]
    assert {"Zombie", "Cow"} <= set(lines[0].split())


def test_crafter_refuses_images_that_are_too_small():
    with pytest.raises(UserError, match="at least 18 x 18"):
        make("crafter_reward", size=[16, 64])
    assert make("crafter_reward", size=[18, 20]).reset()[0]["image"].shape == (18, 20, 3)


def test_crafter_length_is_a_truncation_and_death_a_terminal():
    env = Crafter(length=3)
    env.reset(seed=0)
    ends = [env.step(0)[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)]
    env.reset(seed=0)
    env._env._player.health = 0
    assert env.step(0)[2:4] == (True, False)


def test_crafter_logs_achievements_unlocked_in_the_episode():
    env = make("crafter_noreward")
    keys = [key for key in env.obs_space if key.startswith("log_achievement_")]
    assert len(keys) == 22
    env.reset()
    env._env._player.achievements["eat_cow"] = 2
    obs = env.step({"action": 0})[0]
    assert {key: float(obs[key]) for key in keys if obs[key]} == {"log_achievement_eat_cow": 1.0}
    assert obs["reward"] == 0, "noreward"
    obs = env.reset()[0]
    assert not any(obs[key] for key in keys)
