"""The noisy TV: what switches it on, its pictures, and its logged share of steps."""

import functools
import io
import json
import os
import tarfile

import numpy as np
import pytest
from gymnasium import spaces
from run_helpers import metrics, train

import config as configs
import envs
import evaluate
from basics import UserError
from envs import tv_pictures, wrappers
from envs.dummy import COLORS, Dummy
from envs.wrappers import NoisyTV

dummy = functools.partial(Dummy, size=(20, 40), vectors=("vector",))


def play(env, actions, seed=0):
    steps = [env.reset(seed=seed)[0]]
    return steps + [env.step(action)[0] for action in actions]


def column(steps, key):
    return [np.asarray(step[key]).tolist() for step in steps]


def is_picture(image, pictures=None):
    """Whether a frame [20, 40, 3] is a tiled picture of the TV."""
    pictures = tv_pictures.pictures(None) if pictures is None else pictures
    tile = np.concatenate([pictures, pictures[:, :, :8]], 2)[:, :20]  # [N, 20, 40, 3]
    return bool((tile == image).all((1, 2, 3)).any())


# What switches it on


def test_extra_actions_show_a_picture_while_the_env_does_its_noop():
    env, bare = NoisyTV(dummy(), actions=2, noop=3), dummy()
    assert env.act_space == spaces.Discrete(6)
    steps, plain = play(env, [1, 4, 2, 5]), play(bare, [1, 3, 2, 3])
    assert column(steps, "log_tv") == [0, 0, 1, 0, 1]
    assert all(np.array_equal(a["vector"], b["vector"]) for a, b in zip(steps, plain, strict=True))
    for step, other, on in zip(steps, plain, [0, 0, 1, 0, 1], strict=True):
        assert np.array_equal(step["image"], other["image"]) == (not on)
        assert is_picture(step["image"]) == on
    bare.reset(seed=0)
    env.reset(seed=0)
    assert env.step(5)[1:] == bare.step(3)[1:]


def test_the_control_has_the_same_actions_and_shows_nothing():
    env, bare = NoisyTV(dummy(), actions=2, noise=False), dummy()
    assert env.act_space == spaces.Discrete(6)
    steps, plain = play(env, [1, 4, 2, 5]), play(bare, [1, 0, 2, 0])
    assert column(steps, "log_tv") == [0, 0, 1, 0, 1]
    for step, other in zip(steps, plain, strict=True):
        del step["log_tv"]
        np.testing.assert_equal(step, other)


class Recorder(Dummy):
    """A continuous env that records its actions."""

    def __init__(self):
        super().__init__(size=(20, 40), continuous=True)
        self.asked = []

    def step(self, action):
        self.asked.append(np.asarray(action).tolist())
        return super().step(action)


@pytest.mark.parametrize("noise", [True, False])
def test_continuous_action_beyond_the_threshold_switches_it_on_and_does_nothing_else(noise):
    env, bare = NoisyTV(Recorder(), threshold=0.5, noise=noise), Recorder()
    assert env.act_space == bare.act_space
    actions = np.array([[0.5, -0.5], [0.4, -0.6], [1.0, 1.0], [0.0, 0.1]], np.float32)
    steps = play(env, actions)
    assert column(steps, "log_tv") == [0, 0, 1, 1, 0]
    assert env.asked == [[0.5, -0.5], [0, 0], [0, 0], [0, np.float32(0.1)]]
    assert [is_picture(step["image"]) for step in steps] == [False, False, noise, noise, False]


def test_pictures_depend_on_the_episodes_seed_and_do_not_change_the_env():
    env = NoisyTV(dummy())
    steps, again, other = (play(env, [4, 4, 4, 0], seed) for seed in (0, 0, 1))
    np.testing.assert_equal(steps, again)
    assert not np.array_equal(steps[1]["image"], other[1]["image"])
    assert not np.array_equal(steps[1]["image"], steps[2]["image"])
    np.testing.assert_equal(column(steps, "vector"), column(play(dummy(), [0] * 4), "vector"))


def test_unsuitable_env_is_an_error():
    def fails(match, env, **options):
        with pytest.raises(UserError, match=match):
            NoisyTV(env, **options)

    fails(r"needs images.*the environment has vector", Dummy(image=False, vectors=("vector",)))
    fails("noop is action 4, but there are 4 actions", dummy(), noop=4)
    env = dummy()
    env.act_space = spaces.MultiDiscrete([2, 2])
    fails(r"one Discrete action, or one Box.*MultiDiscrete", env)
    env.act_space = spaces.Box(-2, 2, (1,))
    fails("NormalizeActions makes it so", env)
    env.obs_space = {"image": spaces.Box(0, 255, (20, 24, 4), np.uint8)}
    fails("one or three channels", env)


# As options


TV = ["--noisy_tv.enabled", "True"]


def make(*options):
    return envs.make_env(configs.load([*options]), "train", 0)


def test_tv_comes_after_resize_and_repeat_and_before_grayscale_and_stack():
    options = [*TV, "--noisy_tv.actions", "2", "--task", "dummy_mixed", "--action_repeat", "2"]
    options += ["--size", "64", "48", "--grayscale", "True", "--frame_stack", "2", "--time_limit", "10"]
    env, other = make(*options), make(*options)
    env.reset()
    assert env.obs_space["image"].shape == (64, 48, 2) and env.act_space["action"].n == 6
    assert env.obs_space["log_tv"] == spaces.Box(0, 1, (), np.float32)
    first = env.step({"action": 4})[0]
    second = env.step({"action": 0})[0]
    assert first["log_tv"] == 1 and second["log_tv"] == 0
    picture = first["image"][..., 1]
    np.testing.assert_array_equal(picture[:32, :32], picture[32:, :32])
    np.testing.assert_array_equal(second["image"][..., 0], picture)
    np.testing.assert_equal(other.restore(env.state())[0], second)  # the same pictures after a resume
    np.testing.assert_equal(other.step({"action": 5})[0], env.step({"action": 5})[0])
    steps = 3
    while not env.step({"action": 4})[0]["is_last"]:
        steps += 1
    assert steps + 1 == 5  # 10 env steps, also while the TV is on


def test_pendulum_needs_pixels():
    with pytest.raises(UserError, match=r"gym_Pendulum-v1 does not show.*--obs pixels"):
        make(*TV, "--task", "gym_Pendulum-v1")
    env = make(*TV, "--task", "gym_Pendulum-v1", "--obs", "pixels", "--action_repeat", "2")
    still = env.reset()[0]["image"]
    swung, shown = (env.step({"action": np.array([a], np.float32)})[0] for a in (0.9, -0.95))
    assert (swung["log_tv"], shown["log_tv"]) == (0, 1)
    assert (still == 255).mean() > 0.8 and (swung["image"] == 255).mean() > 0.8  # a pendulum on white
    np.testing.assert_array_equal(shown["image"][:32, :32], shown["image"][32:, 32:])


def test_off_is_off(monkeypatch):
    monkeypatch.delattr(wrappers, "NoisyTV")  # not used
    options = ["--noisy_tv.actions", "3", "--noisy_tv.data", "/no/such/file"]
    env, plain = make("--task", "dummy_mixed", *options), make("--task", "dummy_mixed")
    assert env.obs_space == plain.obs_space and env.act_space == plain.act_space
    for act in [lambda e: e.reset()[0], *[lambda e, a=a: e.step({"action": a})[0] for a in (0, 1, 2, 3)]]:
        np.testing.assert_equal(act(env), act(plain))


# Its share of the steps


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run in which three of seven actions switch the TV on."""
    logdir = tmp_path_factory.mktemp("run")
    options = [*TV, "--noisy_tv.actions", "3", "--obs", "pixels", "--eval_episodes", "2"]
    assert train(logdir, *options) == 0
    return logdir


def test_training_and_evaluation_log_the_share_of_steps(run):
    lines = metrics(run)
    shares = [line["env/tv_share"] for line in lines if "env/tv_share" in line]
    assert shares and all(0.1 < share < 0.8 for share in shares)
    assert all(share * 32 == round(share * 32) for share in shares)  # of two episodes of 16 steps each
    episodes = sorted((run / "eval_eps").glob("*.npz"))[:2]
    on = [np.load(path)["action"][:-1] >= 4 for path in episodes]
    told = next(line["eval/tv_share"] for line in lines if "eval/tv_share" in line)
    assert told == np.mean(on) > 0
    images = np.load(episodes[0])["image"]
    shown = (images.reshape(len(images), -1, 3)[:, :, None] == COLORS).all(-1).any(-1).sum(-1)
    assert (shown[1:][on[0]] == 0).all() and (shown[1:][~on[0]] == 64).all()
    assert len(list((run / "videos").glob("eval_*_0.mp4"))) == 2


def test_evaluate_reports_the_share(run, capsys):
    options = ["--logdir", str(run), "--episodes", "2", "--random"]
    assert evaluate.main([*options, "--json"]) == 0
    share = json.loads(capsys.readouterr().out)["shares"]["tv"]
    assert 0 < share < 1
    assert evaluate.main(options) == 0
    assert f"tv          {share:.1%} of the steps" in capsys.readouterr().out


# Generated pictures


def test_generated_pictures_are_distinct_and_as_varied_as_photographs():
    pictures = tv_pictures.pictures(None)
    assert pictures.shape == (4096, 32, 32, 3) and pictures.dtype == np.uint8
    assert not pictures.flags.writeable and tv_pictures.pictures(None) is pictures
    flat = pictures.reshape(len(pictures), -1).astype(np.float32)
    assert len(np.unique(flat[:, :64], axis=0)) == len(pictures)
    # CIFAR-10: mean about 120, standard deviation 63, 99 principal components for 90 % of the variance.
    assert abs(flat.mean() - 127) < 10 and 50 < flat.std() < 80
    assert (pictures.std((1, 2)).mean(-1) > 15).mean() > 0.99  # almost none is plain
    some = flat[:1000] - flat[:1000].mean(0)
    variance = np.linalg.eigvalsh(some @ some.T)[::-1].cumsum()
    assert 90 < np.searchsorted(variance, 0.9 * variance[-1]) < 130  # of all 4096: 129 components


# CIFAR-10


@pytest.fixture(scope="module")
def photos():
    """Synthetic pictures in the shape of CIFAR-10's first batch, uint8 [10000, 32, 32, 3]."""
    steps = np.arange(10_000)[:, None, None, None] * 3 + np.arange(32)[:, None, None] * 5
    return (steps + np.arange(32)[:, None] * 7 + np.arange(3) * 80).astype(np.uint8)


def binary(photos):
    planes = photos.transpose(0, 3, 1, 2).reshape(10_000, -1)
    return np.concatenate([np.full((10_000, 1), 9, np.uint8), planes], 1).tobytes()


def write_archive(path, files):
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_cifar10_is_read_from_its_archive_and_from_its_folder(photos, tmp_path):
    name = "cifar-10-batches-bin/data_batch_1.bin"
    folder = tmp_path / os.path.dirname(name)
    folder.mkdir()
    (tmp_path / name).write_bytes(binary(photos))
    files = {"a/readme.html": b"hello", name: binary(photos)}
    archive = write_archive(tmp_path / "cifar-10-binary.tar.gz", files)
    for data in (archive, folder, tmp_path):
        assert np.array_equal(tv_pictures.read_cifar10(str(data)), photos)
    env = NoisyTV(dummy(), data=str(folder))
    assert is_picture(play(env, [4])[1]["image"], photos)
    tv_pictures.pictures.cache_clear()


def test_broken_cifar10_is_an_error_at_the_start(photos, tmp_path):
    good = write_archive(tmp_path / "good.tar.gz", {"b/data_batch_1.bin": binary(photos)}).read_bytes()
    for name, content, message in [
        ("missing.tar.gz", None, "no such file or folder"),
        ("cut.tar.gz", good[: len(good) // 2], "ended before"),
        ("no.tar.gz", b"<html>not found</html>", "not cifar-10-binary.tar.gz"),
        ("short/data_batch_1.bin", b"x" * 30_729_999, "does not have 30,730,000 bytes"),
        ("wrong/cat.png", b"", "it has no data_batch_1.bin"),
    ]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if content is not None:
            path.write_bytes(content)
        data = str(path if path.parent == tmp_path else path.parent)
        with pytest.raises(UserError, match=message) as error:
            make(*TV, "--task", "dummy_cue", "--noisy_tv.data", data)
        assert data in str(error.value) and "leave" in str(error.value)
