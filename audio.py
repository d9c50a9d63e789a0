"""Audio: waveforms as log-mel spectra for the model, and as sound tracks and images for videos.

Letters of the shapes: B batch, T time, C channels, L samples, F frequency bands, N frames of a spectrogram;
`...` are batch dimensions.
"""

import math
import re
from collections.abc import Mapping

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basics import UserError

INT16_FULL_SCALE = 32768
PICTURE_ENLARGED = 2  # pixels per side of a spectrogram's cell
SMALLEST_RANGE = 1e-6  # of its values: silence is black
GREY, WHITE = 128, 255


def waveform_keys(obs_space: Mapping[str, gymnasium.Space], config: Mapping) -> list[str]:
    """The audio keys that hold waveforms, (samples,) or (channels, samples).

    These are all audio keys if `audio.sample_rate` is set, otherwise none. Raises UserError for an audio key
    that does not fit the config.
    """
    patterns = (config.encoder.audio_keys, config.decoder.audio_keys)
    keys = [key for key in sorted(obs_space) if any(re.fullmatch(p, key) for p in patterns)]
    if not config.audio.sample_rate:
        for key in keys:
            if obs_space[key].dtype == np.int16:
                raise UserError(
                    f"Audio key {key!r} is int16, a waveform: set --audio.sample_rate to its rate in Hz, or "
                    "use float32 if it is a vector or a spectrogram."
                )
        return []
    for key in keys:
        space = obs_space[key]
        if len(space.shape) not in (1, 2) or not (space.dtype == np.int16 or space.dtype.kind == "f"):
            raise UserError(
                f"Audio key {key!r} is {space.dtype} {tuple(space.shape)}; with --audio.sample_rate set it "
                "must be a waveform, (samples,) or (channels, samples), of int16 or float32. With "
                "--audio.sample_rate 0 it may be a vector or a spectrogram."
            )
    return keys


class Hearing(nn.Module):
    """Turns the waveforms among the observations into log-mel spectra and leaves the rest unchanged.

    `obs_space` is the space of its output.
    """

    def __init__(self, obs_space: Mapping[str, gymnasium.Space], config: Mapping):
        super().__init__()
        self.keys = waveform_keys(obs_space, config)
        self.obs_space = dict(obs_space)
        if self.keys:
            self.log_mel = LogMel(**config.audio)
        for key in self.keys:
            *channels, samples = obs_space[key].shape
            shape = (*(channels or [1]), *self.log_mel.shape(samples))
            self.obs_space[key] = gymnasium.spaces.Box(0, np.inf, shape, np.float32)

    def forward(self, obs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Replace each waveform [..., C, L] or [..., L] in `obs` by its spectra [..., C, F, N]."""
        if not self.keys:
            return obs
        batch = obs["is_first"].dim()
        waves = {
            key: obs[key] if obs[key].dim() == batch + 2 else obs[key][..., None, :] for key in self.keys
        }
        return {**obs, **{key: self.log_mel(wave) for key, wave in waves.items()}}


class LogMel(nn.Module):
    """Waveform -> log-mel spectrogram: ln(1 + power / floor) in each band and frame. Silence is exactly 0.

    The power of a tone at full scale is 1. Always in float32.

    Args:
        sample_rate: in Hz.
        n_fft: samples per Hann window.
        hop_length: samples from one window to the next; the first is centred on the first sample.
        n_mels: number of bands.
        floor: power that counts as silence.
    """

    def __init__(self, sample_rate: int, n_fft: int, hop_length: int, n_mels: int, floor: float):
        super().__init__()
        self.n_fft, self.hop_length, self.n_mels, self.floor = n_fft, hop_length, n_mels, floor
        window = torch.hann_window(n_fft)
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("mel", mel_matrix(sample_rate, n_fft, n_mels), persistent=False)
        self.scale = (
            2 / window.sum().item()
        ) ** 2  # positive and negative frequencies have half of a tone each

    def shape(self, samples: int) -> tuple[int, int]:
        """Bands and frames of the spectrogram of a waveform."""
        return self.n_mels, 1 + samples // self.hop_length

    @torch.no_grad()
    def forward(self, wave: Tensor) -> Tensor:
        """int16, or float with full scale 1, [..., L] -> [..., F, N]. Values are clipped; NaN is silence."""
        with torch.autocast(wave.device.type, enabled=False):
            x = wave.float() if wave.is_floating_point() else wave.float() / INT16_FULL_SCALE
            x = x.nan_to_num().clamp(-1, 1)
            rows = x.reshape(-1, x.shape[-1])
            spectrum = torch.stft(
                rows,
                self.n_fft,
                self.hop_length,
                window=self.window,
                pad_mode="constant",
                return_complex=True,
            )
            power = torch.view_as_real(spectrum).square().sum(-1) * self.scale  # [rows, n_fft / 2 + 1, N]
            bands = torch.log1p(self.mel @ power / self.floor)
            return bands.reshape(*wave.shape[:-1], *bands.shape[1:])


def mel_matrix(sample_rate: int, n_fft: int, n_mels: int) -> Tensor:
    """[n_mels, n_fft / 2 + 1]: triangles of height 1, evenly spaced in mel from 0 Hz to half the sample rate.

    mel = 2595 log10(1 + Hz / 700), as in HTK. Raises UserError if a band contains no frequency.
    """

    def to_mel(hertz: float) -> float:
        return 2595 * math.log10(1 + hertz / 700)

    steps = torch.linspace(0, to_mel(sample_rate / 2), n_mels + 2, dtype=torch.float64)
    edges = 700 * (10 ** (steps / 2595) - 1)  # [n_mels + 2] Hz: start, peak and end of each triangle
    low, peak, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    hertz = torch.arange(n_fft // 2 + 1, dtype=torch.float64) * sample_rate / n_fft
    matrix = torch.minimum((hertz - low) / (peak - low), (high - hertz) / (high - peak)).clamp(min=0)
    if empty := int((matrix.sum(1) == 0).sum()):
        raise UserError(
            f"audio.n_mels {n_mels} is too many for audio.n_fft {n_fft}: {empty} bands contain no frequency. "
            "Use fewer bands or a longer window."
        )
    return matrix.float()


# --- Videos --------------------------------------------------------------------------------------------


def track(wave: np.ndarray) -> np.ndarray:
    """The concatenated waveforms of an episode, [T, L] or [T, C, L] -> int16 [T * L, C]."""
    wave = wave[:, None] if wave.ndim == 2 else wave
    if wave.dtype != np.int16:
        clipped = np.nan_to_num(wave.astype(np.float32)).clip(-1, 1)
        wave = (clipped * (INT16_FULL_SCALE - 1)).astype(np.int16)
    return np.ascontiguousarray(wave.transpose(0, 2, 1).reshape(-1, wave.shape[1]))


def picture(truth: Tensor, prediction: Tensor, context: int) -> Tensor:
    """Spectra [B, T, ..., F, N] or vectors [B, T, F] as an image, uint8 [H, W, 1].

    One row per sequence: truth, prediction and error (grey: none) from left to right. In each, time runs to
    the right, frequency upwards, and channels are stacked. A white line marks the end of the `context` steps.
    """
    strips = []
    for values in (truth, prediction):
        values = values.float()
        values = values[..., None] if values.dim() == 3 else values  # [B, T, ..., F, N]
        values = values.flatten(2, -2).transpose(1, 2)  # [B, rows, T, N]
        strips.append(values.flip(1))
    low = min(0.0, strips[0].min().item())
    high = max(strips[0].max().item(), low + SMALLEST_RANGE)
    truth, prediction = ((strip - low) / (high - low) for strip in strips)
    strips = [truth, prediction, (prediction - truth + 1) / 2]
    frames = truth.shape[-1]
    pixels = [(strip.clamp(0, 1) * 255).to(torch.uint8).flatten(2) for strip in strips]  # [B, rows, T * N]
    for strip in pixels:
        strip[:, :, context * frames] = WHITE
    image = F.pad(
        torch.cat([F.pad(strip, (0, 1), value=GREY) for strip in pixels], 2), (0, 0, 0, 1), value=GREY
    )
    image = image.flatten(0, 1)
    return image.repeat_interleave(PICTURE_ENLARGED, 0).repeat_interleave(PICTURE_ENLARGED, 1)[..., None]
