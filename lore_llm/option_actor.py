"""Path C, options: how the actor chooses them, in imagination and in the envs, and when they end.

The options themselves and their statistics are in options.py. An option is called and returns: once started,
its own actions are taken, one at each step, until it ends. Choices are one vector: the options' slots first,
then the primitive actions.
Letters: n envs, O slots, A actions, C = O + A, L steps of the longest option, F feat, B batch, T time, H
horizon, N rows.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distributions as dists
import networks
from models import Data, ImagBehavior, Imagined
from networks import Policy, State

NOTHING = 0  # what runs in an env: the uid of an option, NOTHING or a PLAN
PLAN = -1
END_LAYERS = 2  # of the network that predicts the ends of options


class Outcome(NamedTuple):
    """An execution in an env that has ended: of the option `uid`, or of a PLAN."""

    env: int
    uid: int
    gain: float  # return minus what the critic expected, in units of the scale of returns
    ret: float  # the return, bootstrapped where it ended
    scale: float  # of returns
    success: bool
    length: int


def outcomes(state: Mapping[str, Tensor]) -> list[Outcome]:
    """The executions that ended in the step that led to an acting state."""
    found = enumerate(state["outcome"].tolist() if "outcome" in state else [])
    return [
        Outcome(env, int(uid), gain, ret, scale, bool(success), int(length))
        for env, (uid, gain, ret, scale, success, length) in found
        if uid != NOTHING
    ]


class Observed(NamedTuple):
    """What a captioner compares with the present observation."""

    start: dict[str, np.ndarray]  # when the option started
    last: dict[str, np.ndarray]  # one step ago
    action: int  # that was taken then


class Execution:
    """What runs in each of n envs, an option or a plan, as a part of the acting state.

    `state` holds tensors [n, ...] on the CPU: `uid` of what runs; its actions `script`, of which `position`
    is the next one of `steps`; its discounted return `ret` so far, the next `discount` and the critic's
    `value` at the start; `symbolic` observations at the start and one step ago; the `outcome` of an
    execution that has just ended.
    """

    KEYS = ("uid", "position", "steps", "script", "ret", "discount", "value", "started_at", "previous")

    def __init__(self, state: Mapping[str, Tensor]):
        self.state = {k: state[k].cpu().clone() for k in self.KEYS if k in state}
        self.state["outcome"] = torch.zeros_like(state["outcome"], device="cpu")

    @classmethod
    def initial(cls, envs: int, longest: int, symbolic: Any | None) -> State:
        """Nothing runs yet; `symbolic` is the space of that observation, if there is one."""
        state = {key: torch.zeros(envs, dtype=torch.int64) for key in ("uid", "position", "steps")}
        state["script"] = torch.zeros(envs, longest, dtype=torch.int64)
        state |= {key: torch.zeros(envs) for key in ("ret", "discount", "value")}
        state["outcome"] = torch.zeros(envs, len(Outcome._fields) - 1, dtype=torch.float64)
        if symbolic is not None:
            blank = torch.from_numpy(np.zeros((envs, *symbolic.shape), symbolic.dtype))
            state |= {"started_at": blank, "previous": blank.clone()}
        return state

    @property
    def uid(self) -> Tensor:
        return self.state["uid"]

    def step(self, reward: Tensor, disc: float, is_first: Tensor) -> Tensor:
        """Count the reward [n] of the last step; whether something runs [n]. A new episode stops it."""
        own = self.state
        running = (own["uid"] != NOTHING) & ~is_first
        own["ret"] += torch.where(running, own["discount"] * reward, 0.0)
        own["discount"] *= disc
        own["position"] += 1
        return running

    def timed_out(self, env: int) -> bool:
        return bool(self.state["position"][env] >= self.state["steps"][env])

    def outcome(self, env: int, value: Tensor, scale: float, is_terminal: bool, success: bool | None) -> None:
        """Note the outcome of what ended in an env; without a subgoal a gain above 0 is a success."""
        own = {key: tensor[env] for key, tensor in self.state.items()}
        rest = 0.0 if is_terminal else float(own["discount"] * value[env])
        ret = float(own["ret"]) + rest
        gain = (ret - float(own["value"])) / scale
        success = gain > 0 if success is None else success
        row = [int(own["uid"]), gain, ret, scale, success, int(own["position"])]
        self.state["outcome"][env] = torch.tensor(row, dtype=torch.float64)

    def start(self, env: int, uid: int, script: Tensor, value: Tensor, obs: Mapping[str, np.ndarray]) -> None:
        """Start an option or a PLAN in an env: its actions `script` [L]; `value` [n] is the critic's."""
        own = self.state
        own["uid"][env] = uid
        own["script"][env, : len(script)] = script
        own["steps"][env], own["position"][env] = len(script), 0
        own["ret"][env], own["discount"][env], own["value"][env] = 0, 1, value[env]
        if "started_at" in own:
            own["started_at"][env] = torch.from_numpy(obs["symbolic"][env])

    def action(self, otherwise: Tensor, obs: Mapping[str, np.ndarray]) -> Tensor:
        """The index [n] of the next action of what runs, `otherwise` [n] where nothing does."""
        own = self.state
        if "previous" in own:
            own["previous"] = torch.from_numpy(obs["symbolic"].copy())
        position = own["position"].clamp(0, own["script"].shape[1] - 1)
        scripted = own["script"].gather(1, position[:, None])[:, 0]
        return torch.where(own["uid"] != NOTHING, scripted, otherwise)

    def observed(self, env: int) -> Observed | None:
        """Earlier observations for the captioner; None where the env does not describe itself."""
        own = self.state
        if "previous" not in own:
            return None
        start, last = ({"symbolic": own[key][env].numpy()} for key in ("started_at", "previous"))
        return Observed(start, last, int(own["script"][env, own["position"][env] - 1]))


class OptionActor(nn.Module):
    """The actor's logits of the options, their table of actions, and a network that predicts their ends."""

    def __init__(self, feat: int, actions: int, config: Mapping):
        super().__init__()
        c = config.options
        self.slots, self.unimix = c.max_options, config.actor.unimix
        units = config.actor.units
        self.out = networks.Linear(units, self.slots, networks.ACTOR_SCALE)
        self.end_mlp = networks.mlp(feat + self.slots, END_LAYERS, units)
        self.end_out = networks.Linear(units, 1)
        self.register_buffer("uids", torch.zeros(self.slots, dtype=torch.int64))  # 0: the slot is empty
        self.register_buffer("timeouts", torch.zeros(self.slots, dtype=torch.int64))
        self.register_buffer("script", torch.zeros(self.slots, c.option_max_length, dtype=torch.int64))
        self.actions = actions

    def set_table(self, table: Mapping[str, np.ndarray]) -> None:
        """Take over `OptionLibrary.table`: uids [O], actions [O, L] and timeouts [O]."""
        for buffer, key in ((self.uids, "uids"), (self.timeouts, "timeouts"), (self.script, "actions")):
            buffer.copy_(torch.from_numpy(table[key]))

    @torch.no_grad()
    def reset_slot(self, slot: int, generator: torch.Generator) -> None:
        """Initialise the actor's output of a slot that holds another option now."""
        row, std = self.out.weight[slot], networks.ACTOR_SCALE / self.out.in_features**0.5
        row.copy_(std * torch.randn(row.shape, device=row.device, generator=generator))
        self.out.bias[slot] = 0

    def distribution(self, hidden: Tensor, logits: Tensor) -> dists.MaskedOneHot:
        """Over all choices [..., C], from the actor's last layer [..., units] and its logits [..., A]."""
        logits = torch.cat([self.out(hidden).float(), logits.float()], -1)
        available = torch.cat([self.uids > 0, self.uids.new_ones(self.actions, dtype=torch.bool)])
        return dists.MaskedOneHot(logits, self.unimix, available.expand(logits.shape))

    def ends(self, feat: Tensor, slot: Tensor) -> Tensor:
        """Logits [...] that the option `slot` [..., O] (one-hot) ends in feat [..., F], which it led to."""
        x = torch.cat([feat, slot.to(feat.dtype)], -1)
        return self.end_out(self.end_mlp(x)).float().squeeze(-1)

    def imagine(
        self, policy, behavior: ImagBehavior, rssm: networks.RSSM, start: State,
        generator: torch.Generator | None, end_generator: torch.Generator | None,
    ) -> Imagined:  # fmt: skip
        """Follow `policy(feat)`, a Policy over choices, from start states [N, ...], options step by step."""
        horizon, rows = behavior.config.imag_horizon, len(start["deter"])
        noise = rssm.noise(horizon, rows, generator=generator)
        policy_noise = behavior.actor.noise(horizon, rows, generator=generator)
        end_noise = torch.rand(horizon, rows, device=noise.device, generator=end_generator)
        weights, state, feats = rssm.split_weights(), start, [rssm.feat(start)]
        running = torch.zeros(rows, dtype=torch.bool, device=noise.device)
        slot = torch.zeros(rows, dtype=torch.int64, device=noise.device)
        position = torch.zeros_like(slot)
        actions, choices, decided = [], [], []
        for t in range(horizon):
            choice = policy(feats[-1].detach()).sample([n[t] for n in policy_noise])  # [N, C]
            decided.append(~running)
            options = choice.detach()[:, : self.slots]
            position = torch.where(running, position, 0)
            slot = torch.where(running, slot, options.argmax(-1))
            running = running | (options.sum(-1) > 0)
            script = F.one_hot(self.script[slot, position], self.actions).to(choice.dtype)  # [N, A]
            action = torch.where(running[:, None], script, choice[:, self.slots :])
            state = rssm.imagine(state, action, noise[t], weights)
            feats.append(rssm.feat(state))
            actions.append(action)
            choices.append(choice)
            position = position + 1
            with torch.no_grad():
                ends = self.ends(feats[-1], F.one_hot(slot, self.slots)).sigmoid() > end_noise[t]
            running = running & ~ends & (position < self.timeouts[slot])
        decides = torch.stack([*decided, ~running], 1).float()  # [N, H+1]
        return Imagined(
            torch.stack(feats, 1), torch.stack(actions, 1), torch.stack(choices, 1),
            decides[:, :-1], decides[:, 1:],
        )  # fmt: skip

    def end_loss(self, feat: Tensor, data: Data) -> Tensor:
        """Cross-entropy of the predicted ends of real executions, a scalar; feat [B, T, F] without gradient.

        The targets are the steps that an option led to, except at its timeout, which is known, and at the
        episode's end. Options that started before the sequence, or were removed, are left out.
        """
        decision, uid = data["decision"], data["option"].long()  # [B, T]
        slot = (uid[..., None] == self.uids) & (self.uids > 0)  # [B, T, O]
        index = torch.arange(uid.shape[1], device=uid.device)
        began = torch.where(decision, index, -1).cummax(1).values  # index of the last decision so far
        timeout = (slot * self.timeouts).sum(-1)
        known = slot.any(-1) & (began >= 0) & (index - began + 1 < timeout)
        live = known[:, :-1] & ~(data["is_first"] | data["is_last"])[:, 1:]
        logits = self.ends(feat[:, 1:], slot[:, :-1])
        loss = F.binary_cross_entropy_with_logits(logits, decision[:, 1:].float(), reduction="none")
        return torch.where(live, loss, 0.0).sum() / live.sum().clamp(min=1)


def primitives(policy: Policy, actions: int) -> Tensor:
    """Probabilities of the primitive actions alone [..., A], which are the last of the choices."""
    probs = policy.parts[0].probs[..., -actions:]
    return probs / probs.sum(-1, keepdim=True)
