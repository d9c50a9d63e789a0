"""Wrappers around one environment."""

import numpy as np
import pytest
from gymnasium import spaces

import config as configs
import envs
from basics import UserError
from envs import wrappers
from envs.dummy import Dummy


def dummy(**options) -> Dummy:
    return Dummy(size=(20, 24), vectors=("vector",), **options)


def play(env, actions, seed=0):
    steps = [env.reset(seed=seed)[0]]
    return steps + [env.step(action)[0] for action in actions]


@pytest.mark.parametrize(
    "wrap, shape",
    [
        (lambda env: wrappers.Resize(env, (64, 64)), (64, 64, 3)),
        (lambda env: wrappers.GrayScale(env), (20, 24, 1)),
        (lambda env: wrappers.FrameStack(env, 4), (20, 24, 12)),
        (lambda env: wrappers.FrameStack(wrappers.GrayScale(wrappers.Resize(env, (8, 8))), 2), (8, 8, 2)),
    ],
)
def test_image_wrappers_change_space_and_observations(wrap, shape):
    env = wrap(dummy())
    assert env.obs_space["image"].shape == shape and env.obs_space["vector"].shape == (4,)
    steps = play(env, [0, 1])
    assert all(spaces.Dict(env.obs_space).contains(obs) for obs in steps)
    np.testing.assert_equal(steps, play(env, [0, 1]))


def test_resize_averages_and_grayscale_weights_colours():
    image = np.zeros((4, 4, 3), np.uint8)
    image[::2, ::2] = 200
    assert (wrappers.resize(image, (2, 2)) == 50).all()
    color = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]], np.uint8)
    assert wrappers.gray(color)[0, :, 0].tolist() == [76, 150, 29, 255]


def test_frame_stack_has_the_newest_frame_last_and_starts_with_copies_of_the_first():
    frames = [obs["image"] for obs in play(dummy(), [0, 1, 2])]
    stacks = [obs["image"] for obs in play(wrappers.FrameStack(dummy(), 3), [0, 1, 2])]
    for t, stack in enumerate(stacks):
        expected = [frames[max(0, t - 2)], frames[max(0, t - 1)], frames[t]]
        np.testing.assert_array_equal(stack, np.concatenate(expected, -1))


def test_time_limit_action_repeat_and_clip_reward():
    env = wrappers.ActionRepeat(dummy(memory=True, length=6), 4)
    env.reset(seed=0)
    cue = env._cue
    assert env.step(cue)[1:4] == (3.0, False, False)  # the first of the four steps has no reward
    assert env.step(cue)[1:4] == (2.0, True, False)
    env = wrappers.ClipReward(env, min_reward=-1, max_reward=1)
    env.reset(seed=0)
    assert env.step(cue)[1] == 1.0
    env = wrappers.TimeLimit(dummy(), 3)
    env.reset(seed=0)
    assert [env.step(0)[3] for _ in range(3)] == [False, False, True]


def test_audio_inject_adds_noise_from_the_seed():
    silent, noisy = (wrappers.AudioInject(dummy(), 500, std) for std in (0.0, 2.0))
    assert not play(silent, [1])[1]["audio"].any()
    first, second = play(noisy, [1])
    assert 1.8 < first["audio"].std() < 2.2 and abs(first["audio"].mean()) < 0.3
    assert not np.array_equal(first["audio"], second["audio"])
    np.testing.assert_equal(play(noisy, [1]), [first, second])
    assert not np.array_equal(play(noisy, [1], seed=1)[0]["audio"], first["audio"])
    with pytest.raises(UserError, match="already has audio"):
        wrappers.AudioInject(noisy, 3)


@pytest.mark.parametrize("wrapper", [wrappers.GrayScale, wrappers.NoisyTV])
def test_wrapper_names_what_it_needs(wrapper):
    with pytest.raises(UserError, match=r"needs images.*vector"):
        wrapper(Dummy(image=False, vectors=("vector",)))


def test_normalised_actions_are_clipped_and_scaled_to_the_envs_range():
    class Recorder:
        act_space = {
            "inside": spaces.Box(np.array([0, -2], np.float32), np.array([1, 6], np.float32)),
            "below": spaces.Box(3, np.inf, (1,), np.float64),
            "above": spaces.Box(-np.inf, 3, (1,), np.float32),
            "free": spaces.Box(-np.inf, np.inf, (1,), np.float32),
            "whole": spaces.Box(0, 255, (1,), np.uint8),
            "index": spaces.Discrete(4),
        }

        def step(self, action):
            return action

    env = wrappers.NormalizeActions(Recorder())
    boxes = {key: space for key, space in env.act_space.items() if key != "index"}
    assert all(space == spaces.Box(-1, 1, space.shape, np.float32) for space in boxes.values())
    assert env.act_space["index"] == spaces.Discrete(4)

    def do(value):
        done = env.step(
            {key: np.full(space.shape, value, np.float32) for key, space in boxes.items()} | {"index": 2}
        )
        for key, space in Recorder.act_space.items():
            assert space.contains(np.asarray(done[key])), key
        return {key: np.asarray(each).tolist() for key, each in done.items() if key != "index"}

    expected = {"inside": [0, -2], "below": [3], "above": [1], "free": [-1], "whole": [0]}
    assert do(-1) == do(-7) == expected
    expected = {"inside": [1, 6], "below": [5], "above": [3], "free": [1], "whole": [255]}
    assert do(1) == do(7) == expected
    assert do(0) == {"inside": [0.5, 2], "below": [4], "above": [2], "free": [0], "whole": [128]}


def test_normalising_an_action_from_minus_one_to_one_changes_no_bit():
    class Plain:
        act_space = spaces.Box(-1, 1, (1000,), np.float32)

        def step(self, action):
            return action

    action = np.random.default_rng(0).normal(0, 0.5, 1000).clip(-1, 1).astype(np.float32)
    np.testing.assert_array_equal(wrappers.NormalizeActions(Plain()).step(action), action)


def test_options_add_wrappers_and_restored_episodes_continue():
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
