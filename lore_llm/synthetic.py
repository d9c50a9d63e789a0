"""Path A, imagined experience: proposed plans are rolled out from real states, and the states that they lead
to become additional starts of imagination. They do not train the world model, and no value or policy gradient
is taken along a plan.

An item is the place of a real state in the replay, and a plan. It is rolled out by the current world model
each time it is sampled. Letters: M items, L steps of a plan, F feat, A actions, B batch, T time.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lore_llm.advice import MAX_PLAN
from models import ImagBehavior, WorldModel, lambda_return
from networks import State
from replay import Replay

MAX_ITEMS = 1000  # the oldest go first
WEIGHT_DECAY = 0.999  # of the weight of an item with every update


def rows(config: Mapping) -> int:
    """How many starts are added to the real ones of a batch: at most `synthetic_ratio_max` of all."""
    real = config.batch_size * (config.imag_last or config.batch_length)
    ratio = config.synthetic.synthetic_ratio_max
    return math.floor(real * ratio / (1 - ratio))


def amount(config: Mapping) -> int:
    """How many items are sampled for a batch (M)."""
    return math.ceil(rows(config) / MAX_PLAN)


class Rollout(NamedTuple):
    """Plans as the world model predicts them. Entries after a plan's end have weight 0."""

    states: State  # [M, L, ...] that the steps lead to
    feat: Tensor  # [M, L+1, F]
    action: Tensor  # [M, L, A]
    valid: Tensor  # [M, L] bool
    weight: Tensor  # [M, L] of the states, as starts
    advantage: Tensor  # [M, L] of the plan's actions, in units of the scale of returns
    clone_weight: Tensor  # [M, L] of the plan's actions, for cloning


@torch.no_grad()
def roll_out(
    behavior: ImagBehavior, world_model: WorldModel, items: Mapping[str, Tensor],
    generator: torch.Generator | None,
) -> Rollout:  # fmt: skip
    """Follow the plans of `items`: deter [M, D], stoch [M, S] as stored, plan [M, L], length, weight [M]."""
    rssm = world_model.rssm
    start, plan = rssm.unpack(items["deter"], items["stoch"]), items["plan"]
    action = F.one_hot(plan, world_model.actions.size).float()  # [M, L, A]
    count, steps = plan.shape
    noise, weights = rssm.noise(steps, count, generator=generator), rssm.split_weights()
    state, states = start, []
    for t in range(steps):
        state = rssm.imagine(state, action[:, t], noise[t], weights)
        states.append(state)
    reached = {key: torch.stack([each[key] for each in states], 1) for key in start}  # [M, L, ...]
    feat = torch.cat([rssm.feat(start)[:, None], rssm.feat(reached)], 1)  # [M, L+1, F]
    reward = world_model.reward_head(feat).mean
    cont = world_model.cont_head(feat).prob
    value = behavior.critic(feat).mean
    index = torch.arange(steps + 1, device=plan.device)
    last = index >= items["length"][:, None]  # [M, L+1] the plan is over
    ret = lambda_return(last, 1 - cont, reward, value, 1.0, behavior.lam)
    advantage = (ret - value[:, :-1]) / behavior.retnorm.scale
    valid = ~last[:, :-1]
    alive = cont[:, 1:].cumprod(1)  # no start after the end of an episode
    weight = items["weight"][:, None] * valid
    advantage = torch.where(valid, advantage, 0.0)
    clone = weight * alive.roll(1, 1).index_fill(1, index[:1], 1.0) * advantage.clamp(min=0)
    return Rollout(reached, feat, action, valid, weight * alive, advantage, clone)


@torch.no_grad()
def evaluate(
    behavior: ImagBehavior, world_model: WorldModel, items: Mapping[str, Tensor], rollouts: int,
    generator: torch.Generator | None, ensemble: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Predicted returns [M] of plans, and of the actor over as many steps: means of some `rollouts`.

    `disagreement` [M] is the ensemble's mean over the plan's states, 0 without one.
    """
    rssm, actions = world_model.rssm, world_model.actions.size
    keys = "deter", "stoch", "plan", "length"
    repeated = {key: items[key].repeat_interleave(rollouts, 0) for key in keys}
    plan, count = repeated["plan"], 2 * len(repeated["plan"])  # first the plans' rows, then the policy's
    start = rssm.unpack(repeated["deter"], repeated["stoch"])
    state = {key: torch.cat([value, value]) for key, value in start.items()}
    noise = rssm.noise(plan.shape[1], count, generator=generator)
    draws = torch.rand(plan.shape[1], count // 2, 1, device=plan.device, generator=generator)
    weights, feats, taken = rssm.split_weights(), [rssm.feat(state)], []
    for t in range(plan.shape[1]):
        own = behavior.actor(feats[-1][count // 2 :]).parts[0].sample(draws[t])
        action = torch.cat([F.one_hot(plan[:, t], actions).to(own.dtype), own])
        state = rssm.imagine(state, action, noise[t], weights)
        feats.append(rssm.feat(state))
        taken.append(action)
    feat, action = torch.stack(feats, 1), torch.stack(taken, 1)
    reward, cont = world_model.reward_head(feat).mean, world_model.cont_head(feat).prob
    last = torch.arange(plan.shape[1] + 1, device=plan.device) >= repeated["length"].repeat(2)[:, None]
    ret = lambda_return(last, 1 - cont, reward, behavior.critic(feat).mean, 1.0, 1.0)[:, 0]
    returns = ret.unflatten(0, (2, -1, rollouts)).mean(-1)  # [2, M]
    half = count // 2
    valid = (~last[:half, :-1]).float()
    if ensemble:
        spread = ensemble(feat[:half, :-1], action[:half]) * valid
        spread = spread.sum(1) / valid.sum(1).clamp(min=1)
    else:
        spread = torch.zeros(half, device=feat.device)
    disagreement = spread.unflatten(0, (-1, rollouts)).mean(1)
    scale = behavior.retnorm.scale
    return {"plan": returns[0], "policy": returns[1], "disagreement": disagreement, "scale": scale}


@dataclass
class Item:
    """The place of a real state in the replay, and a plan proposed for it."""

    env: int
    place: int
    plan: list[int]
    confidence: float
    born: int  # the agent's updates when it was accepted


class SyntheticItems:
    """The accepted items, the newest last; samples batches of them."""

    def __init__(self, config: Mapping, rng: np.random.Generator):
        self.rng = rng
        self.amount = amount(config)
        self.items: deque[Item] = deque(maxlen=MAX_ITEMS)

    def add(self, item: Item) -> None:
        self.items.append(item)

    def choose(
        self, replay: Replay, updates: int, reliability: float
    ) -> Callable[[Replay], dict[str, np.ndarray]]:
        """Choose M items for a batch; returns a function that gathers them, to be called by any thread.

        It returns deter, stoch, plan [M, L], length, weight [M]; weight 0 where there is no item. The weight
        is confidence times reliability, decayed by the updates since the item was accepted.
        """
        live = [item for item in self.items if replay.holds(item.env, item.place)]
        if len(live) < len(self.items):  # their states were evicted
            self.items = deque(live, self.items.maxlen)
        chosen = [live[i] for i in self.rng.integers(len(live), size=self.amount)] if live else []
        plan = np.zeros((self.amount, MAX_PLAN), np.int64)
        length, weight = np.zeros(self.amount, np.int64), np.zeros(self.amount, np.float32)
        where = np.zeros((self.amount, 2), np.int64)
        for row, item in enumerate(chosen):
            plan[row, : len(item.plan)] = item.plan
            length[row], where[row] = len(item.plan), (item.env, item.place)
            age = max(0, updates - item.born)
            weight[row] = item.confidence * reliability * WEIGHT_DECAY**age

        def gather(replay: Replay) -> dict[str, np.ndarray]:
            latents = replay.latents(where[:, 0], where[:, 1])
            known = latents["deter"].any(1)  # others were stored without latents and not trained on yet
            return {**latents, "plan": plan, "length": length, "weight": weight * known}

        return gather

    def state_dict(self) -> dict[str, Any]:
        return {"items": [asdict(item) for item in self.items], "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.items.clear()
        self.items.extend(Item(**item) for item in state["items"])
        self.rng.bit_generator.state = state["rng"]


def tensors(latents: Mapping[str, np.ndarray], plans: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """Items for `evaluate`: latents [M, ...] with the plans and their lengths."""
    plan = np.zeros((len(plans), MAX_PLAN), np.int64)
    for row, actions in enumerate(plans):
        plan[row, : len(actions)] = actions
    return {**latents, "plan": plan, "length": np.array([len(p) for p in plans], np.int64)}
