"""Audio: spectra against values computed by hand, routing, losses, the files of a run; and the room."""

import json
import math
import subprocess
import wave

import gymnasium
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from run_helpers import assert_same_run, main, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import audio
import config as configs
import evaluate
import networks
from agent import Dreamer
from basics import UserError
from envs import sound_search

BATCH, LENGTH = 2, 5
FLAGS = ("is_first", "is_last", "is_terminal")
ACTION = {"action": gymnasium.spaces.Discrete(5)}
RATE = 8000


def box(shape: tuple, dtype=np.float32) -> gymnasium.spaces.Box:
    low, high = (
        (-np.inf, np.inf) if np.dtype(dtype).kind == "f" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    )
    return gymnasium.spaces.Box(low, high, shape, dtype)


def make_agent(*options: str, **spaces: gymnasium.Space) -> Dreamer:
    """An agent for the given observations and a vector, reward and flags."""
    argv = ["--configs", "debug", "--batch_size", str(BATCH), "--batch_length", str(LENGTH), *options]
    obs_space = {"vector": box((3,)), "reward": box(()), **spaces}
    obs_space |= {key: gymnasium.spaces.Box(0, 1, (), np.bool_) for key in FLAGS}
    return Dreamer(obs_space, ACTION, configs.load(argv), torch.device("cpu"))


def make_batch(agent: Dreamer, **spaces: gymnasium.Space) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shape, rssm = (BATCH, LENGTH + 1), agent.config.rssm
    batch = {"deter": np.zeros((*shape, rssm.deter), np.float16)}
    batch["stoch"] = np.zeros((*shape, rssm.stoch), np.uint8)
    batch["action"] = rng.integers(5, size=shape, dtype=np.int32)
    batch |= {key: rng.random(shape) < 0.2 for key in FLAGS}
    for key, space in {"vector": box((3,)), "reward": box(()), **spaces}.items():
        values = rng.normal(size=(*shape, *space.shape))
        batch[key] = (values * (5000 if space.dtype == np.int16 else 0.3)).astype(space.dtype)
    return batch


# Spectra


def test_mel_matrix_equals_one_computed_by_hand():
    # 8 kHz and a window of 8: frequencies 0, 1, 2, 3, 4 kHz. 4 kHz is 2146.06 mel; a third of it is 620.61 Hz
    # and two thirds are 1791.4 Hz: a triangle over 0, 620.61, 1791.4 and one over 620.61, 1791.4, 4000.
    expected = [[0, 0.67594, 0, 0, 0], [0, 0.32406, 0.90555, 0.45277, 0]]
    torch.testing.assert_close(audio.mel_matrix(8000, 8, 2), torch.tensor(expected), atol=1e-4, rtol=0)


def test_a_full_scale_tone_has_power_one():
    """A Hann window shows a tone in three neighbouring frequencies, with powers 1/4, 1, 1/4."""
    log_mel, index = audio.LogMel(RATE, 256, 128, 8, 1e-6), 40
    tone = torch.sin(2 * math.pi * index / 256 * torch.arange(1024))
    power = log_mel.mel[:, index - 1 : index + 2] @ torch.tensor([0.25, 1, 0.25])
    middle = log_mel(tone)[:, 4]
    torch.testing.assert_close(middle, torch.log1p(power / 1e-6), atol=1e-3, rtol=1e-4)
    assert middle.max() == pytest.approx(math.log(1e6), abs=0.7)


def test_spectra_equal_the_plain_formula():
    rate, n_fft, hop, floor = RATE, 64, 16, 1e-4
    x = np.random.default_rng(0).uniform(-1, 1, 100)
    padded = np.pad(x, n_fft // 2)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    fourier = np.exp(-2j * np.pi * np.outer(np.arange(n_fft // 2 + 1), np.arange(n_fft)) / n_fft)
    frames = [fourier @ (window * padded[i : i + n_fft]) for i in range(0, len(x) + 1, hop)]
    power = np.abs(np.stack(frames, 1) * 2 / window.sum()) ** 2
    mel = audio.mel_matrix(rate, n_fft, 6).numpy()
    log_mel = audio.LogMel(rate, n_fft, hop, 6, floor)
    result = log_mel(torch.from_numpy(x))
    assert result.dtype == torch.float32 and tuple(result.shape) == log_mel.shape(len(x)) == (6, 7)
    np.testing.assert_allclose(result, np.log(mel @ power + floor) - np.log(floor), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_silence_is_exactly_zero(dtype):
    quiet = torch.from_numpy(np.zeros((3, 2, 500), dtype))
    assert not audio.LogMel(RATE, 256, 128, 8, 1e-6)(quiet).any()


def test_clipping_and_nan_are_safe():
    log_mel = audio.LogMel(RATE, 64, 32, 8, 1e-6)
    x = torch.sin(torch.arange(500) / 3) * 0.9
    broken, repaired = x.clone(), x.clone()
    for index, (bad, good) in enumerate(
        ((torch.nan, 0), (torch.inf, 1), (-torch.inf, -1), (1e30, 1), (-7, -1))
    ):
        broken[100 + index], repaired[100 + index] = bad, good
    assert torch.equal(log_mel(broken), log_mel(repaired))
    assert log_mel(torch.full((500,), torch.nan)).eq(0).all()
    loudest = torch.tensor([-32768, 32767] * 250, dtype=torch.int16)
    assert log_mel(loudest).isfinite().all()


def test_int16_and_float_sound_the_same():
    log_mel = audio.LogMel(RATE, 64, 32, 8, 1e-6)
    x = torch.randint(-32768, 32768, (2, 500))
    assert torch.equal(log_mel(x.to(torch.int16)), log_mel(x.float() / 32768))


DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


@pytest.mark.parametrize("device", DEVICES)
def test_spectra_stay_float32_in_autocast_on_every_device(device):
    log_mel = audio.LogMel(RATE, 256, 128, 8, 1e-6)
    x = torch.randn(3, 2, 800) * 0.2
    plain = log_mel(x)
    log_mel.to(device)
    with torch.autocast(device, torch.bfloat16):
        inside = log_mel(x.to(device))
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside.cpu(), plain, atol=1e-3, rtol=1e-4)


# Routing


def test_audio_is_routed_before_images_and_images_before_vectors():
    spaces = {
        "audio": box((4,)),
        "audio_left": box((8, 6)),
        "camera": box((32, 32, 3), np.uint8),
        "audio_camera": box((32, 32, 3), np.uint8),
        "my_audio": box((5,)),
        "vector": box((3,)),
        "log_audio": box(()),
        "is_first": box(()),
    }
    config = configs.load(["--encoder.audio_keys", "audio.*"]).encoder
    keys = networks.route_keys(spaces, config)
    assert list(keys.audio) == ["audio", "audio_left"]
    assert list(keys.images) == ["audio_camera", "camera"]  # an image stays an image
    assert list(keys.vectors) == ["my_audio", "vector"]  # a full match, not a part
    everything = [key for kind in keys for key in kind]
    assert len(everything) == len(set(everything))
    assert list(networks.route_keys(spaces, configs.load([]).encoder).audio) == ["audio"]


def test_unsuitable_audio_keys_are_refused():
    with pytest.raises(UserError, match="set --audio.sample_rate"):
        make_agent(audio=box((2, 512), np.int16))
    with pytest.raises(UserError, match="must be a waveform"):
        make_agent("--audio.sample_rate", "8000", audio=box((2, 3, 512)))
    with pytest.raises(UserError, match="Use fewer bands or a longer window"):
        make_agent("--audio.sample_rate", "8000", "--n_mels", "200", "--n_fft", "256", audio=box((512,)))
    with pytest.raises(UserError, match="2 times, too often for the 8 bands x 3 frames of 'audio'"):
        make_agent("--audio_net", "cnn", audio=box((8, 3)))


# In the agent

WAVES = [
    "--audio.sample_rate",
    "8000",
    "--audio.n_fft",
    "64",
    "--audio.hop_length",
    "64",
    "--audio.n_mels",
    "8",
]
KINDS = {
    "vector": ([], box((12,)), (12,)),
    "spectrogram": ([], box((8, 6)), (8, 6)),
    "two ears' spectrogram": ([], box((2, 8, 6)), (2, 8, 6)),
    "waveform": (WAVES, box((300,)), (1, 8, 5)),
    "two ears' waveform": (WAVES, box((2, 300), np.int16), (2, 8, 5)),
}


@pytest.mark.parametrize("net", ["mlp", "cnn"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_audio_is_encoded_and_reconstructed(kind, net):
    options, space, encoded = KINDS[kind]
    agent = make_agent(*options, "--audio_net", net, audio=space)
    model, batch = agent.world_model, make_batch(agent, audio=space)
    assert model.encoder.keys.audio == model.decoder.keys.audio == {"audio": encoded}
    assert "audio" not in model.encoder.keys.vectors
    post, data = model.observe(agent.upload(batch), agent.rngs["train"])
    losses, _ = model.loss(post, data)
    recon = model.decoder(post["deter"], agent.rssm.flat(post["stoch"]))["audio"]
    truth = data["audio"]
    assert truth.shape == (BATCH, LENGTH, *encoded)
    symlog = truth.sign() * truth.abs().log1p()
    by_hand = (recon.raw - symlog.flatten(2)).square().sum(-1)
    torch.testing.assert_close(losses["audio"], by_hand)
    losses["audio"].mean().backward()
    for part in (model.encoder.audio, model.decoder.audio):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in part.parameters())
        assert any(p.grad.any() for p in part.parameters())
    metrics, _ = agent.train(batch)
    assert not metrics["opt/skipped"] and metrics["loss/audio"] > 0
    obs = {key: value[:, 0] for key, value in batch.items() if key in agent.obs_keys}
    agent.act(obs, agent.initial_state(BATCH), agent.rngs["act"])
    picture = agent.report(batch)["audio"]
    assert picture.dtype == np.uint8 and picture.ndim == 4 and len(picture) == 1


def test_the_audio_loss_has_its_own_scale():
    moved = {}
    for scale in ("0", "1"):
        agent = make_agent("--loss_scales.audio", scale, "--opt.warmup", "0", audio=box((12,)))
        before = agent.world_model.decoder.audio[1].weight.clone()
        agent.train(make_batch(agent, audio=box((12,))))
        moved[scale] = not torch.equal(before, agent.world_model.decoder.audio[1].weight)
    assert moved == {"0": False, "1": True}


# Off means off


def test_without_audio_keys_no_audio_option_changes_a_bit(tmp_path):
    options = (
        "--audio.sample_rate 8000 --audio.n_mels 3 --encoder.audio_net cnn "
        "--loss_scales.audio 3.0 --encoder.audio_keys sound.*"
    ).split()
    assert train(tmp_path / "plain") == train(tmp_path / "options", *options) == 0
    assert_same_run(tmp_path / "plain", tmp_path / "options")


def test_without_audio_keys_nothing_is_built_or_computed():
    agent = make_agent()
    assert not any("audio" in name or "hearing" in name for name, _ in agent.world_model.named_parameters())
    data = agent.upload(make_batch(agent))
    assert agent.world_model.hearing(data) is data
    assert "loss/audio" not in agent.train(make_batch(agent))[0]


# Videos


def test_a_picture_shows_truth_prediction_and_error_side_by_side():
    truth = torch.zeros(2, 3, 4, 2)  # [B, T, F, N]
    truth[1, 1, 3, 0] = 2.0  # the second sequence: the highest band, in the third frame
    image = audio.picture(truth, torch.zeros_like(truth), context=2)[..., 0]
    cells = image[:: audio.PICTURE_ENLARGED, :: audio.PICTURE_ENLARGED]
    assert cells.shape == (2 * (4 + 1), 3 * (6 + 1))
    truth, prediction, error = (cells[5:9, start : start + 6].int() for start in (0, 7, 14))
    assert all(
        (strip[:, 4] == audio.WHITE).all() for strip in (truth, prediction, error)
    )  # the context's end
    others = [0, 1, 2, 3, 5]
    assert truth[0, 2] == 255 and truth[:, others].sum() == 255
    assert not prediction[:, others].any()
    assert error[0, 2] == 0 and (error[1:, others] == 127).all()


def test_the_track_of_an_episode_is_its_waveforms_in_order():
    steps = np.arange(12, dtype=np.int16).reshape(2, 2, 3)  # [T, C, L]
    assert audio.track(steps).T.tolist() == [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]
    loud = np.array([[0.5, 2.0], [-2.0, np.nan]], np.float32)  # [T, L]
    assert audio.track(loud).tolist() == [[16383], [32767], [-32767], [0]]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run in the room, with two evaluations, and an evaluation of it with videos."""
    logdir = tmp_path_factory.mktemp("room")
    options = "--configs audio debug --device cpu --time_limit 0 --steps 220 --batch_length 16 --logdir"
    assert main(*options.split(), str(logdir)) == 0
    return logdir


def test_an_evaluation_can_be_heard(run):
    result = evaluate.evaluate(run, 1, video_folder=run / "videos")
    assert result["success_rates"].keys() == {"found"}
    assert all((run / "videos" / name).samefile(name) for name in result["videos"])
    waves = sorted((run / "videos").glob("*.wav"))
    assert {path.name.split("_")[0] for path in waves} == {"eval", "evaluate"}
    for path in waves:
        with wave.open(str(path)) as file:
            assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (RATE, 2, 2)
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        steps = len(samples) / 2 / sound_search.SAMPLES
        assert steps.is_integer() and steps >= 2 and np.abs(samples).max() > 100
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path.with_suffix(".mp4")), "-f", "s16le", "-"]
        done = subprocess.run(command, capture_output=True, check=True)
        sound = np.frombuffer(done.stdout, "<i2")
        assert b"Video: h264" in done.stderr and b"8000 Hz, stereo" in done.stderr
        assert len(sound) / len(samples) == pytest.approx(1, abs=0.15)  # AAC works in blocks of 1024
        assert np.abs(sound).max() == pytest.approx(np.abs(samples).max(), rel=0.5)


def test_the_spectrogram_is_predicted_in_tensorboard_and_its_loss_logged(run):
    events = EventAccumulator(str(run))
    events.Reload()
    assert {"train_openl", "train_openl_audio"} <= set(events.Tags()["images"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line["loss/audio"]) for line in lines[3:])
    assert "soundsearch/success_rate/found" in lines[-1]
    with np.load(next((run / "train_eps").glob("*.npz"))) as episode:
        assert episode["audio"].dtype == np.int16 and episode["audio"].shape[1:] == (2, sound_search.SAMPLES)


def test_an_env_whose_only_input_is_injected_audio_trains(tmp_path):
    options = ["--audio_dim", "6", "--audio_noise_std", "0.1", "--video_pred_log", "True"]
    options += ["--encoder.cnn_keys", "none", "--decoder.cnn_keys", "none", "--steps", "50"]
    assert train(tmp_path, *options) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss/audio"] > 0 and "loss/image" not in lines[-1] and "loss/vector" not in lines[-1]
    with np.load(next((tmp_path / "train_eps").glob("*.npz"))) as episode:
        assert episode["audio"].shape[1:] == (6,) and episode["audio"].std() == pytest.approx(0.1, abs=0.05)


# The room


def heard(x: float, y: float) -> np.ndarray:
    """[ears, samples] of a source at (x, y), by a resting head in the middle."""
    return sound_search.hear(np.array([x, y]), np.zeros(2), np.zeros(2), 0.5).astype(np.float64)


def level(sound: np.ndarray) -> np.ndarray:
    """Of each ear in decibels."""
    return 20 * np.log10(np.sqrt((sound**2).mean(-1)))


def delay(sound: np.ndarray) -> float:
    """Seconds by which the right ear hears it before the left, from the peak of the correlation."""
    lags = np.arange(-20, 21)
    left, right = sound
    scores = [(left[50:-50] * np.roll(right, lag)[50:-50]).sum() for lag in lags]
    return lags[int(np.argmax(scores))] / RATE


def test_the_nearer_ear_hears_it_louder_and_earlier():
    left, right = level(heard(3, 0))
    assert right - left > 3
    assert delay(heard(3, 0)) == pytest.approx(0.2 / sound_search.SPEED_OF_SOUND, abs=1 / RATE)
    assert delay(heard(-3, 0)) == pytest.approx(-0.2 / sound_search.SPEED_OF_SOUND, abs=1 / RATE)
    np.testing.assert_array_equal(heard(-3, 0), heard(3, 0)[::-1])
    np.testing.assert_array_equal(*heard(0, 3))


def test_twice_the_distance_is_six_decibels_softer():
    np.testing.assert_allclose(level(heard(0, 2)) - level(heard(0, 4)), 6.02, atol=0.3)


def test_steps_join_without_a_gap():
    """While the head moves, the sound is continuous: it jumps no more between steps than within them."""
    source, seconds = np.array([3.0, 2.0]), sound_search.SAMPLES / RATE
    places = np.random.default_rng(0).uniform(-5, 5, (20, 2))
    steps = [sound_search.hear(source, *places[i : i + 2], i * seconds) for i in range(19)]
    jumps = np.abs(np.diff(np.concatenate(steps, 1).astype(int)))
    seams = jumps[:, sound_search.SAMPLES - 1 :: sound_search.SAMPLES]
    assert seams.shape == (2, 18) and seams.mean() < 1.5 * jumps.mean()


def play(env, policy, seed):
    """Observations and rewards of an episode."""
    obs, _ = env.reset(seed=seed)
    seen, rewards, done = [obs], [], False
    while not done:
        obs, reward, terminated, truncated, _ = env.step(policy(env))
        seen.append(obs)
        rewards.append(reward)
        done = terminated or truncated
    return seen, rewards, terminated


def test_the_image_does_not_depend_on_the_source():
    """Episodes differ only in the source: the same actions show the same images, bit for bit."""
    actions = np.random.default_rng(0).integers(4, size=sound_search.LENGTH)
    films, sounds, sources = [], [], []
    env = sound_search.SoundSearch()
    for seed in range(8):
        seen, *_ = play(env, lambda env: int(actions[env._step]), seed)
        films.append(np.stack([obs["image"] for obs in seen]))
        sounds.append(seen[0]["audio"])
        sources.append(env._source)
    assert len(np.unique(sources, axis=0)) == len(sources)
    for film, sound in zip(films[1:], sounds[1:], strict=True):
        length = min(len(film), len(films[0]))
        assert length > 2 and np.array_equal(film[:length], films[0][:length])
        assert not np.array_equal(sound, sounds[0])
    assert any(len(np.unique(frame.reshape(-1, 3), axis=0)) == 3 for frame in films[0])  # agent, floor, wall
    assert not np.array_equal(env.render(), env._image()), "people see the source"


def test_shuffled_sound_does_not_depend_on_the_source():
    sounds = []
    for source in ((4.0, 4.0), (-4.0, 1.0)):
        env = sound_search.SoundSearch(shuffled=True)
        env.reset(seed=1)
        env._source = np.array(source)
        sounds.append([env.step(0)[0]["audio"] for _ in range(3)])
    assert np.array_equal(*sounds)
    assert not np.array_equal(sounds[0][0], sounds[0][1])


@pytest.mark.slow
def test_the_source_is_found_by_ear(tmp_path):
    """With the benchmark's settings; minutes. A random agent finds it in 9 % of the episodes."""
    options = "--rssm.deter 256 --batch_size 16 --batch_length 16 --imag_last 8 --eval_every 0"
    command = ["--configs", "audio", "cpu", "--device", "cpu", "--threads", "1", *options.split()]
    for steps in range(8000, 12001, 1000):  # each run resumes the one before
        assert main(*command, "--steps", str(steps), "--logdir", str(tmp_path)) == 0
        found = evaluate.evaluate(tmp_path, 40)["success_rates"]["found"]
        if found >= 85:
            return
    pytest.fail(f"found in {found} % of the episodes")
