"""Updates or policy steps of LoRe, for `speed.py` to measure in turns; see there.

It measures the checkout in --repo, which may be an older one. Data are random and have Crafter's shapes;
there is no replay. Words after `--` are options of dreamer.py.
"""

import argparse
import sys

import gymnasium
import numpy as np
import torch
from turns import resident_peak, serve

ACTIONS = 17
OBS_SPACE = {
    "image": gymnasium.spaces.Box(0, 255, (64, 64, 3), np.uint8),
    "reward": gymnasium.spaces.Box(-np.inf, np.inf, (), np.float32),
    **{key: gymnasium.spaces.Box(0, 1, (), np.bool_) for key in ("is_first", "is_last", "is_terminal")},
}
ACT_SPACE = {"action": gymnasium.spaces.Discrete(ACTIONS)}


def random_steps(*shape: int) -> dict[str, np.ndarray]:
    """Random observations and actions [*shape, ...] in the middle of an episode."""
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(256, size=(*shape, 64, 64, 3), dtype=np.uint8),
        "reward": rng.normal(size=shape).astype(np.float32),
        "action": rng.integers(ACTIONS, size=shape, dtype=np.int32),
        **{key: np.zeros(shape, bool) for key in ("is_first", "is_last", "is_terminal")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repo", required=True)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--envs", type=int, default=0, help="measure a policy step of so many envs")
    parser.add_argument("options", nargs="*")
    args = parser.parse_args()
    sys.path.insert(0, args.repo)
    import config as configs
    import tools

    try:
        from agent import Dreamer
        from tools import choose_device
    except ImportError:  # an older checkout
        from dreamer import Dreamer, choose_device

    if args.threads:
        torch.set_num_threads(args.threads)
    config = configs.load(["--configs", "crafter", *args.options])
    device = choose_device(config.device)
    cuda = device.type == "cuda"
    if not cuda:
        tools.keep_freed_memory()
    agent = Dreamer(OBS_SPACE, ACT_SPACE, config, device)
    state = agent.initial_state(args.envs)
    obs, rssm = random_steps(args.envs), config.rssm
    shape = (config.batch_size, config.replay_context + config.batch_length)
    latents = {"deter": np.zeros((*shape, rssm.deter), np.float16)}
    latents["stoch"] = np.zeros((*shape, rssm.stoch), np.uint8 if rssm.classes else np.float16)
    batch = random_steps(*shape) | latents

    def update() -> None:
        agent.train(batch)
        if cuda:
            torch.cuda.synchronize()

    def policy_step() -> None:
        nonlocal state
        _, state, _ = agent.act(obs, state, agent.rngs["act"])

    peak = (lambda: torch.cuda.max_memory_allocated() / 2**30) if cuda else resident_peak
    serve(policy_step if args.envs else update, {"parameters": agent.parameters()}, peak)


if __name__ == "__main__":
    main()
