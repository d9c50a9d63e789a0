"""Path C, options: how the actor chooses skills, in imagination and in the env, and when they end.

What the skills are, and how well they do, stands in options.py. An option is called and returns: from its
start on its own actions are taken, one at each step, until it ends. Choices are one vector: the options'
slots first, then the primitive actions.
Letters: O slots, A actions, C = O + A, L steps of the longest option, F feat, B batch, T time, H horizon, N
rows.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distributions as dists
import networks
from models import Data, ImagBehavior, Imagined
from networks import Policy, State


class OptionActor(nn.Module):
    """The actor's logits of the options, the table of what they do, and the net that foresees their ends."""

    def __init__(self, feat: int, actions: int, config: Mapping):
        super().__init__()
        c = config.options
        self.slots, self.unimix, self.outscale = c.max_options, config.actor.unimix, config.actor.outscale
        units = c.units or config.actor.units
        self.out = networks.Linear(config.actor.units, self.slots, self.outscale)
        self.end_mlp = networks.mlp(feat + self.slots, c.layers, units)
        self.end_out = networks.Linear(units, 1)
        self.register_buffer("uids", torch.zeros(self.slots, dtype=torch.int64))  # 0: the slot is empty
        self.register_buffer("timeouts", torch.zeros(self.slots, dtype=torch.int64))
        self.register_buffer("script", torch.zeros(self.slots, c.option_max_length, dtype=torch.int64))
        self.actions = actions

    def set_table(self, table: Mapping[str, np.ndarray]) -> None:
        """Take what `SkillLibrary.table` tells: uids [O], actions [O, L] and timeouts [O]."""
        for buffer, key in ((self.uids, "uids"), (self.timeouts, "timeouts"), (self.script, "actions")):
            buffer.copy_(torch.from_numpy(table[key]))

    @torch.no_grad()
    def reset_slot(self, slot: int, generator: torch.Generator) -> None:
        """Let the actor's output of a slot, which holds another skill now, begin anew."""
        row, std = self.out.weight[slot], self.outscale / self.out.in_features**0.5
        row.copy_(std * torch.randn(row.shape, device=row.device, generator=generator))
        self.out.bias[slot] = 0

    def distribution(self, hidden: Tensor, logits: Tensor) -> dists.MaskedOneHot:
        """Over all choices [..., C], from the actor's last layer [..., units] and its logits [..., A]."""
        logits = torch.cat([self.out(hidden).float(), logits.float()], -1)
        available = torch.cat([self.uids > 0, self.uids.new_ones(self.actions, dtype=torch.bool)])
        return dists.MaskedOneHot(logits, self.unimix, available.expand(logits.shape))

    def ends(self, feat: Tensor, slot: Tensor) -> Tensor:
        """Logits [...] of the end of the option slot [..., O] (one-hot) in feat [..., F] that it led to."""
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
        """How badly the ends of real executions are foreseen, a scalar: feat [B, T, F], without gradient.

        An end is learned of each step that an option led to, unless it was the timeout's, which is known, or
        the episode's. Options whose start lies before the sequence, or that are gone, are left out.
        """
        decision, uid = data["decision"], data["option"].long()  # [B, T]
        slot = (uid[..., None] == self.uids) & (self.uids > 0)  # [B, T, O]
        index = torch.arange(uid.shape[1], device=uid.device)
        began = torch.where(decision, index, -1).cummax(1).values  # of the last decision so far
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
