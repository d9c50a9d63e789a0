"""A room with an invisible sound source, which the agent must find by hearing.

soundsearch_room      two ears hear the source
soundsearch_shuffled  a control: each step sounds as at random places
"""

from typing import Any

import numpy as np
from gymnasium import spaces

import envs

SIDE = 10.0  # metres; the room is a square around the origin
STEP = 1.0  # metres per move
REACH = 0.75  # metres at which the source is found; some point of the agent's lattice is always within
MIN_DISTANCE = 2.0  # metres from the source to the middle, where the agent starts
LENGTH = 20  # most steps of an episode
MOVES = np.array([(0, 1), (1, 0), (0, -1), (-1, 0)], np.float64)  # forward, right, backward, left
CLOSER_REWARD = 0.1  # per metre closer
FOUND_REWARD = 1.0

SAMPLE_RATE = 8000  # Hz
SAMPLES = 1024  # per step: 128 ms
SPEED_OF_SOUND = 343.0  # metres per second
EARS = np.array([(-0.1, 0.0), (0.1, 0.0)])  # metres from the middle of the head, left and right
EAR_DIRECTIONS = np.array([(-np.sin(np.pi / 3), 0.5), (np.sin(np.pi / 3), 0.5)])  # 60 degrees to each side
LOUDNESS = 0.2  # amplitude at one metre
NEAREST = 0.5  # metres; closer sources are not louder
PITCH, GLIDE = 320.0, 80.0  # Hz: mean and amplitude of the fundamental
GLIDE_SECONDS = 1.024  # its period
HARMONICS = np.arange(1, 10)
# Gain of the harmonics in the ear that faces away: low for the high ones.
SHADOW = np.linspace(0.5, 0.05, len(HARMONICS))

FLOOR, WALL, AGENT, SOURCE = (
    np.array(c, np.uint8) for c in ((70, 70, 80), (170, 160, 140), (250, 220, 60), (230, 40, 40))
)
AGENT_RADIUS = 0.6  # metres, in the image


def make(name: str, config: Any) -> "SoundSearch":
    """The environment of task `soundsearch_{name}`, with images of `config.size`."""
    tasks = {"room": False, "shuffled": True}
    if name not in tasks:
        raise envs.unknown_task("soundsearch", name, tasks)
    return SoundSearch(config.size, shuffled=tasks[name])


class SoundSearch:
    """A square room from above. The agent moves in four directions and always faces forward, up in the image.

    `audio` is the sound at the two ears during the step, int16 (2, 1024) at 8 kHz: closer sources are louder,
    the ear that faces the source hears it louder, brighter and earlier, and sounds from behind are dull.
    The image shows the agent but not the source. Each metre closer is rewarded, and reaching the source most,
    which terminates the episode.

    `log_achievement_found` is 1 once the source is reached.

    Args:
        size: height and width of the image.
        shuffled: at each step, hear a source and an agent at random places instead.
    """

    def __init__(self, size: tuple[int, int] = (32, 32), shuffled: bool = False):
        height, width = size
        self._shuffled = shuffled
        self._random = np.random.default_rng()
        rows = (np.arange(height) + 0.5) / height * -1 + 0.5
        columns = (np.arange(width) + 0.5) / width - 0.5
        margin = SIDE + 2 * AGENT_RADIUS  # metres that the image shows
        self._pixels = np.stack(np.meshgrid(columns, rows), -1) * margin  # [H, W, 2] metres
        self.obs_space = {
            "image": spaces.Box(0, 255, (height, width, 3), np.uint8),
            "audio": spaces.Box(-32768, 32767, (len(EARS), SAMPLES), np.int16),
            "log_achievement_found": spaces.Box(0, 1, (), np.float32),
        }
        self.act_space = spaces.Discrete(len(MOVES))

    def reset(self, seed: int | None = None) -> tuple[dict, dict]:
        if seed is not None:
            self._random = np.random.default_rng(seed)
        self._agent, self._source = np.zeros(2), self._place()
        self._step = 0
        return self._obs(self._agent), {}

    def step(self, action: int) -> tuple[dict, float, bool, bool, dict]:
        before, self._step = self._agent, self._step + 1
        self._agent = np.clip(before + STEP * MOVES[action], -SIDE / 2, SIDE / 2)
        was, distance = (float(np.linalg.norm(self._source - place)) for place in (before, self._agent))
        found = distance <= REACH
        reward = CLOSER_REWARD * (was - distance) + FOUND_REWARD * found
        return self._obs(before, found), reward, found, self._step >= LENGTH, {}

    def render(self) -> np.ndarray:
        """The room with the source, for videos: uint8 [H, W, 3]."""
        image = self._image()
        image[np.linalg.norm(self._pixels - self._source, axis=-1) <= REACH] = SOURCE
        return image

    def _place(self) -> np.ndarray:
        """A place for the source, uniform except near the middle."""
        while True:
            place = self._random.uniform(-SIDE / 2, SIDE / 2, 2)
            if np.linalg.norm(place) >= MIN_DISTANCE:
                return place

    def _obs(self, before: np.ndarray, found: bool = False) -> dict[str, np.ndarray]:
        source, start, end = self._source, before, self._agent
        if self._shuffled:
            source, start = self._place(), self._random.uniform(-SIDE / 2, SIDE / 2, 2)
            end = start
        return {
            "image": self._image(),
            "audio": hear(source, start, end, self._step * SAMPLES / SAMPLE_RATE),
            "log_achievement_found": np.float32(found),
        }

    def _image(self) -> np.ndarray:
        image = np.full((*self._pixels.shape[:2], 3), FLOOR)
        image[np.abs(self._pixels).max(-1) > SIDE / 2] = WALL
        image[np.linalg.norm(self._pixels - self._agent, axis=-1) <= AGENT_RADIUS] = AGENT
        return image


def hear(source: np.ndarray, start: np.ndarray, end: np.ndarray, time: float) -> np.ndarray:
    """The sound of `source` at the ears while the head moves from `start` to `end`: int16 [ears, samples].

    Places are (x, y) in metres; `time` in seconds is the start of the step. With distance the sound arrives
    later and softer; an ear that faces away hears less of the high harmonics.
    """
    share = np.arange(SAMPLES)[:, None] / SAMPLES
    head = start + share * (end - start)  # [L, 2]
    to_source = source - (head + EARS[:, None])  # [ears, L, 2]
    distance = np.linalg.norm(to_source, axis=-1)  # [ears, L]
    moment = time + np.arange(SAMPLES) / SAMPLE_RATE - distance / SPEED_OF_SOUND
    away = (1 - (to_source * EAR_DIRECTIONS[:, None]).sum(-1) / np.maximum(distance, 1e-9)) / 2  # 0 to 1
    gain = 1 - away[..., None] * (1 - SHADOW)  # [ears, L, harmonics]
    cycle = 2 * np.pi / GLIDE_SECONDS
    phase = 2 * np.pi * PITCH * moment - 2 * np.pi * GLIDE / cycle * np.cos(cycle * moment)
    tones = np.sin(phase[..., None] * HARMONICS) / len(HARMONICS) ** 0.5
    wave = LOUDNESS * (gain * tones).sum(-1) / np.maximum(distance, NEAREST)  # [ears, L]
    return (np.clip(wave, -1, 1) * 32767).astype(np.int16)
