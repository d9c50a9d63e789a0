"""Updates of r2dreamer (NM512/r2dreamer), for `speed.py update --r2dreamer` to measure in turns; see there.

It runs as DreamerV3 (`rep_loss: dreamer`) on a fixed batch of Crafter's shapes, without its replay. Its
hard-coded float16 is replaced by the given precision, because float16 is useless on a CPU. It needs torch,
tensordict, omegaconf and tensorboard; nothing of LoRe is imported.
"""

import argparse
import functools
import sys
from pathlib import Path

import gymnasium
import numpy as np
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from turns import resident_peak, serve

ACTIONS, IMAGE = 17, (64, 64, 3)
SIZE1M = {"deter": 512, "hidden": 64, "discrete": 4, "depth": 4, "units": 64, "act": "SiLU", "norm": True}


class FixedBatch:
    """Replaces its replay: the same batch each time, without the cost of sampling."""

    def __init__(self, config, device: torch.device, batch: int, length: int):
        rng, shape = np.random.default_rng(0), (batch, length)
        flags = {
            key: torch.zeros(*shape, 1, dtype=torch.bool) for key in ("is_first", "is_last", "is_terminal")
        }
        action = torch.from_numpy(rng.integers(ACTIONS, size=shape))
        data = {
            "image": torch.from_numpy(rng.integers(256, size=(*shape, *IMAGE), dtype=np.uint8)),
            "action": torch.nn.functional.one_hot(action, ACTIONS).float(),
            "reward": torch.from_numpy(rng.normal(size=(*shape, 1)).astype(np.float32)),
            **flags,
        }
        self.data = TensorDict(data, batch_size=shape).to(device)
        stoch = torch.zeros(batch, config.rssm.stoch, config.rssm.discrete, device=device)
        self.initial = stoch, torch.zeros(batch, config.rssm.deter, device=device)

    def sample(self):
        return self.data.clone(), None, self.initial

    def update(self, *_: object) -> None:
        """Latents are not written back."""


def make_update(args: argparse.Namespace):
    """A function that does one update, and the parameter count."""
    sys.path.insert(0, str(args.repo))
    import dreamer as r2dreamer

    device = torch.device(args.device)
    base = OmegaConf.load(args.repo / "configs/model/_base_.yaml")
    # Its smallest size is 12M; 1M has the sizes of ours.
    named = args.repo / f"configs/model/{args.size.replace('m', 'M')}.yaml"
    size = OmegaConf.create(SIZE1M) if args.size == "size1m" else OmegaConf.load(named)
    keys = {"mlp_keys": "$^", "cnn_keys": "image"}
    size.pop("defaults", None)
    config = OmegaConf.create(
        {
            "device": args.device,
            "env": {"encoder": keys, "decoder": keys},
            "model": OmegaConf.merge(base, size, {"rep_loss": "dreamer", "compile": args.compile}),
        }
    )
    OmegaConf.resolve(config)
    mixed = args.precision == "bfloat16"
    r2dreamer.autocast = lambda device_type, dtype: torch.autocast(device_type, torch.bfloat16, enabled=mixed)
    r2dreamer.GradScaler = functools.partial(torch.amp.GradScaler, args.device, enabled=False)
    obs_space = gymnasium.spaces.Dict({"image": gymnasium.spaces.Box(0, 255, IMAGE, np.uint8)})
    act_space = gymnasium.spaces.Discrete(ACTIONS)
    act_space.n, act_space.discrete = ACTIONS, True  # a plain int; and as its own wrappers mark it
    agent = r2dreamer.Dreamer(config.model, obs_space, act_space).to(device)
    batch = FixedBatch(config.model, device, args.batch_size, args.batch_length)

    def update() -> None:
        agent.update(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return update, sum(p.numel() for p in agent._named_params.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repo", type=Path, required=True, help="a checkout of r2dreamer")
    parser.add_argument("--size", default="size12m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--batch_length", type=int, default=64)
    args = parser.parse_args()
    args.repo = args.repo.resolve()
    if args.threads:
        torch.set_num_threads(args.threads)
    update, parameters = make_update(args)
    cuda = torch.device(args.device).type == "cuda"
    peak = (lambda: torch.cuda.max_memory_allocated() / 2**30) if cuda else resident_peak
    serve(update, {"parameters": parameters}, peak)


if __name__ == "__main__":
    main()
