"""Atari 2600 games (Bellemare et al. 2013), `atari_{game}`, such as `atari_pong`. ale-py has the ROMs."""

from typing import Any

import ale_py
from ale_py import roms
from gymnasium.wrappers import AtariPreprocessing

import envs

MAX_NOOPS = 30  # at the start of an episode, as is usual (Machado et al. 2018)
MAX_FRAMES = 108_000  # per episode: half an hour of play (Machado et al. 2018)
STICKY = 0.25  # probability that an action is repeated for one more frame (Machado et al. 2018)


def make(name: str, config: Any) -> AtariPreprocessing:
    """The environment of task `atari_{name}`.

    Images are the maximum of the last two frames, resized. Losing a life does not end an episode. The end of
    the game is terminal, the time limit a truncation.
    """
    games = roms.get_all_rom_ids()
    if name not in games:
        raise envs.unknown_task("atari", name, sorted(games))
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no version message
    env = ale_py.AtariEnv(
        name,
        render_mode="rgb_array",
        frameskip=1,
        repeat_action_probability=STICKY if config.atari.sticky else 0.0,
        full_action_space=config.atari.actions == "all",
        max_num_frames_per_episode=MAX_FRAMES,
    )
    height, width = config.size
    env = AtariPreprocessing(
        env,
        noop_max=MAX_NOOPS,
        frame_skip=config.action_repeat,
        screen_size=(width, height),
        grayscale_obs=False,
    )
    env.repeats_actions = True
    return env
