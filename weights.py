"""Weights to share: an agent as one .safetensors file, and parts of it for another task or size.

Such a file holds what acting needs and the config, and nothing that could be executed: no optimiser, no
replay, no paths of the machine that wrote it. `evaluate.py --export` writes it; wherever a checkpoint is
taken (`--from_checkpoint`) it may stand instead.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor, nn

from basics import UserError, atomic_write
from config import Config

SUFFIX = ".safetensors"
FORMAT = "1"  # goes up when the program can no longer read what it wrote before
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_HEADER = 2**20  # bytes of names, shapes and the config; those of the largest agents are 40,000
# What a part is called in an agent: its module, and how the names of its weights begin there.
PARTS = {
    "encoder": ("world_model", ("encoder.",)),
    "rssm": ("world_model", ("rssm.",)),
    "decoder": ("world_model", ("decoder.",)),
    "reward": ("world_model", ("reward_head.",)),
    "cont": ("world_model", ("cont_head.",)),
    "actor": ("behavior", ("actor.",)),
    "critic": ("behavior", ("critic.", "slow_critic.", "retnorm.")),
}
MODULES = ("world_model", "behavior", "explorer", "policy")
# Options that say where something is on the machine that trained, or in its network.
PLACES = ("logdir", "from_checkpoint", "traindir", "evaldir", "llm.base_url", "llm.cache", "envs.ray_address")


def write(
    path: str | os.PathLike,
    config: Config,
    step: int,
    agent: Mapping[str, Any],
    dtype: str = "float32",
    decoder: bool = True,
) -> int:
    """Write an agent to a file, whole or not at all; how many numbers it holds.

    Args:
        path: ends in .safetensors.
        config: that it was trained with; the `PLACES` in it are left out.
        step: env steps that it was trained for.
        agent: a checkpoint's, as `Dreamer.state_dict` gives it. Optimiser, slow critics (they start as the
            critics) and an explorer's past are left out.
        dtype: of matrices and kernels. Vectors and scalars are few, and stay float32.
        decoder: without it the file is smaller, and who trains on from it learns to reconstruct anew.

    Raises UserError for a number that `dtype` cannot hold, and if the disk refuses.
    """
    if Path(path).suffix != SUFFIX:
        raise UserError(f"--export {path} must end in {SUFFIX}")
    tensors = {
        f"{module}.{name}": _convert(f"{module}.{name}", value, DTYPES[dtype])
        for module in MODULES
        for name, value in agent.get(module, {}).items()
        if not {"slow_critic", "fifo"} & set(name.split(".")) and (decoder or not name.startswith("decoder."))
    }
    about = {
        "lore_format": FORMAT,
        "task": config.task,
        "step": str(step),
        "config": config.replace({**dict.fromkeys(PLACES), "transfer": []}).to_yaml(),
        "skills": json.dumps(agent.get("skills", [])),
        "torch": torch.__version__,
    }
    about["sha256"] = _digest(about, tensors)
    data = save(tensors, metadata=about)
    atomic_write(path, lambda file: file.write(data))
    return sum(value.numel() for value in tensors.values())


def _convert(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of a weight for the file."""
    rounded = value.to(dtype) if value.is_floating_point() and value.dim() > 1 else value
    if rounded.dtype != value.dtype and not rounded.isfinite().all() and value.isfinite().all():
        largest = value.abs().max()
        raise UserError(
            f"--dtype {str(dtype).removeprefix('torch.')} cannot hold {name}, which has {largest:.3g} in it: "
            "take bfloat16 or float32"
        )
    return rounded.clone(memory_format=torch.contiguous_format)


def _digest(about: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over everything that the file says."""
    digest = hashlib.sha256(json.dumps(sorted(about.items())).encode())
    for name, value in sorted(tensors.items()):
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def read(path: str | os.PathLike) -> dict[str, Any]:
    """What `write` wrote, as a checkpoint's payload: `config`, `step`, and `agent` without its optimiser.

    Raises UserError for what is no such file, or is damaged.
    """
    try:
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > MAX_HEADER:
            raise UserError(
                f"{path} is not a file of LoRe's weights: its header says that it has {header:,} bytes."
            )
        with safetensors.safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from error
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} cannot be read, it is damaged or no safetensors file: {error}") from error
    if about.get("lore_format") != FORMAT:
        raise UserError(
            f"{path} holds no weights of this version of LoRe. Use the version that wrote it, and see "
            "evaluate.py --export."
        )
    if about.pop("sha256", None) != _digest(about, tensors):
        raise UserError(f"{path} is damaged: its checksum is wrong. Copy it once more.")
    try:
        if not about["step"].isdecimal():
            raise ValueError("step must be a number")
        payload = {"config": about["config"], "step": int(about["step"])}
        agent = {module: {} for module in MODULES} | {"skills": _skills(about["skills"])}
        for name, value in tensors.items():
            module, _, rest = name.partition(".")
            agent[module][rest] = value
            if "critic" in rest.split("."):
                agent[module][rest.replace("critic.", "slow_critic.", 1)] = value.clone()
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} holds no weights of LoRe: {type(error).__name__}: {error}") from error
    return {**payload, "agent": agent}


def _skills(text: str) -> list[list[str | None]]:
    """Name and subgoal of each skill, as `write` wrote them. Raises ValueError."""
    skills = json.loads(text)
    if not isinstance(skills, list) or not all(
        isinstance(skill, list)
        and len(skill) == 2
        and all(part is None or isinstance(part, str) for part in skill)
        for skill in skills
    ):
        raise ValueError("skills must be pairs of a name and a subgoal")
    return skills


def transfer(modules: Mapping[str, nn.Module], agent: Mapping[str, Any], parts: Sequence[str]) -> list[str]:
    """Copy the `PARTS` that are named from a checkpoint's agent to `modules`, each weight whose shape fits.

    Returns lines that say what was taken, what was not and why. Raises UserError if nothing fits, ValueError
    for weights that are not finite.
    """
    lines, some = [], False
    for part in parts:
        module, prefixes = PARTS[part]
        here, there = (
            {name: value for name, value in weights.items() if name.startswith(prefixes)}
            for weights in (modules[module].state_dict(), agent[module])
        )
        taken = {k: v for k, v in there.items() if k in here and v.shape == here[k].shape}
        if broken := [name for name, value in taken.items() if not value.isfinite().all()]:
            raise ValueError(f"{module}.{broken[0]} holds numbers that are not finite")
        modules[module].load_state_dict(taken, strict=False)
        some |= bool(taken)
        lines.append(f"Transferred {part}: {len(taken)} of {len(here)} tensors")
        for name in sorted((here.keys() | there.keys()) - taken.keys()):
            shapes = (tuple(each[name].shape) if name in each else "nothing" for each in (there, here))
            fate = "begins anew" if name in here else "is left behind"
            lines.append("  {} {}: {} in the checkpoint, {} here".format(name, fate, *shapes))
    if not some:
        reason = next((line.strip() for line in lines if line.startswith("  ")), "they have no weights")
        raise UserError(f"Nothing of {', '.join(parts)} can be transferred, as no shape fits: {reason}")
    others = [part for part in PARTS if part not in parts]
    return [*lines, f"Begins anew: {', '.join([*others, 'the optimiser'])}"]
