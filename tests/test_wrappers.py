"""Wrappers around ours and around gymnasium's environments."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

import config as configs
import envs
from basics import UserError
from envs import wrappers
from envs.adapter import Adapter
from envs.dummy import Dummy


def dummy(**options) -> Dummy:
    return Dummy(size=(20, 24), vectors=("vector",), **options)


class Picture(gymnasium.Env):
    """A gymnasium env whose observation is an image without a key."""

    observation_space = spaces.Box(0, 255, (20, 24, 3), np.uint8)
    action_space = spaces.Discrete(3, start=1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.taken = []
        return self._obs(), {}

    def step(self, action):
        self.taken.append(action)
        return self._obs(), 5.0, False, len(self.taken) == 7, {}

    def _obs(self):
        return self.np_random.integers(0, 256, (20, 24, 3), np.uint8)


def play(env, actions, seed=0):
    steps = [env.reset(seed=seed)[0]]
    return steps + [env.step(action)[0] for action in actions]


def matches(env, obs) -> bool:
    space = getattr(env, "obs_space", None) or env.observation_space
    space = spaces.Dict(space) if isinstance(space, dict) else space
    return space.contains(obs)


IMAGE_WRAPPERS = [
    (lambda env: wrappers.Resize(env, (64, 64)), (64, 64, 3)),
    (lambda env: wrappers.GrayScale(env), (20, 24, 1)),
    (lambda env: wrappers.FrameStack(env, 4), (20, 24, 12)),
    (lambda env: wrappers.FrameStack(wrappers.GrayScale(wrappers.Resize(env, (8, 8))), 2), (8, 8, 2)),
]


@pytest.mark.parametrize("wrap, shape", IMAGE_WRAPPERS)
def test_image_wrappers_change_space_and_observations_of_ours_and_gymnasiums(wrap, shape):
    ours, theirs = wrap(dummy()), wrap(Picture())
    assert ours.obs_space["image"].shape == theirs.observation_space.shape == shape
    assert ours.obs_space["vector"].shape == (4,)
    for env, actions in ((ours, [0, 1]), (theirs, [1, 2])):
        steps, again = play(env, actions), play(env, actions)
        assert all(matches(env, obs) for obs in steps)
        for one, other in zip(steps, again, strict=True):  # what is random comes from the seed
            np.testing.assert_equal(one, other)


def test_resize_averages_and_gray_weighs_colours():
    image = np.zeros((4, 4, 3), np.uint8)
    image[::2, ::2] = 200
    assert (wrappers.resize(image, (2, 2)) == 50).all()
    env = wrappers.GrayScale(dummy())
    env.reset(seed=0)
    color = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]], np.uint8)
    assert env._new("image", color)[0, :, 0].tolist() == [76, 150, 29, 255]


def test_frame_stack_shows_the_newest_frame_last_and_starts_with_copies_of_the_first():
    bare, env = dummy(), wrappers.FrameStack(dummy(), 3)
    frames = [obs["image"] for obs in play(bare, [0, 1, 2])]
    stacks = [obs["image"] for obs in play(env, [0, 1, 2])]
    for t, stack in enumerate(stacks):
        wanted = [frames[max(0, t - 2)], frames[max(0, t - 1)], frames[t]]
        np.testing.assert_array_equal(stack, np.concatenate(wanted, -1))


def test_clip_reward_and_normalised_observations():
    env = wrappers.ClipReward(Picture(), min_reward=-1, max_reward=1)
    env.reset(seed=0)
    assert env.step(1)[1] == 1.0
    for bare in (gymnasium.make("Pendulum-v1"), dummy()):
        env = wrappers.NormalizeObservation(bare)
        space = spaces.Discrete(4) if isinstance(bare, Dummy) else bare.action_space
        space.seed(1)
        seen = []
        for seed in range(30):
            seen += play(env, [space.sample() for _ in range(15)], seed)
        assert all(matches(env, obs) for obs in seen)
        values = np.array([obs["vector"] if isinstance(obs, dict) else obs for obs in seen])
        assert abs(values.mean()) < 0.5 and 0.5 < values.std() < 2
    again = wrappers.NormalizeObservation(dummy())  # the same in every process and after a resume
    np.testing.assert_equal(play(again, [0, 1]), play(env, [0, 1]))


def test_one_hot_action_is_the_action_that_it_names_and_the_agent_chooses_among_them():
    bare = Picture()
    env = wrappers.OneHotAction(bare)
    assert env.action_space.shape == (3,) and env.action_space.contains(env.action_space.sample())
    env.reset(seed=0)
    env.step(np.array([0, 1, 0], np.float32))
    with pytest.raises(ValueError, match="one-hot"):
        env.step(np.array([1, 1, 0], np.float32))
    adapted = Adapter(env)
    assert adapted.act_space == spaces.Discrete(3)
    adapted.step(2)
    assert bare.taken == [2, 3]


def test_audio_inject_adds_zeros_plus_noise():
    for bare, key in ((dummy(), "image"), (Picture(), "observation")):
        silent, noisy = (wrappers.AudioInject(bare, 500, std) for std in (0.0, 2.0))
        assert not play(silent, [1])[1]["audio"].any()
        first, second = play(noisy, [1])
        assert matches(noisy, first) and key in first
        assert 1.8 < first["audio"].std() < 2.2 and abs(first["audio"].mean()) < 0.3
        assert not np.array_equal(first["audio"], second["audio"])
        np.testing.assert_equal(play(noisy, [1]), [first, second])
        assert not np.array_equal(play(noisy, [1], seed=1)[0]["audio"], first["audio"])
    with pytest.raises(UserError, match="audio of its own"):
        wrappers.AudioInject(noisy, 3)


@pytest.mark.parametrize("wrapper", [wrappers.GrayScale, wrappers.Resize, wrappers.FrameStack])
def test_a_wrapper_that_does_not_fit_says_what_it_needs(wrapper):
    with pytest.raises(UserError, match=r"needs images.*vector"):
        wrapper(Dummy(image=False, vectors=("vector",)))


def test_options_wrap_the_env_and_restored_episodes_go_on():
    options = ["--grayscale", "True", "--frame_stack", "2", "--clip_reward", "True", "--action_repeat", "2"]
    options += ["--audio_dim", "3", "--audio_noise_std", "1", "--size", "48", "48", "--task", "dummy_mixed"]
    config = configs.load(options)
    env, other = (envs.make_env(config, "train", 0) for _ in range(2))
    assert env.obs_space["image"].shape == (48, 48, 2) and env.obs_space["audio"].shape == (3,)
    env.reset()
    env.reset()
    steps = [env.step({"action": action})[0] for action in (0, 1, 2, 3, 1)]
    assert {float(obs["reward"]) for obs in steps} <= {0.0, 1.0}
    np.testing.assert_equal(other.restore(env.state())[0], steps[-1])
    np.testing.assert_equal(other.step({"action": 1})[0], env.step({"action": 1})[0])
