"""Shared by the tests of advice: a tiny advised agent, a batch as from the replay, options, advisers."""

from collections.abc import Mapping, Sequence

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F

import config as configs
from agent import Dreamer
from config import Config
from envs.dummy import COLORS
from lore_llm import LLMAdapter
from lore_llm.rules import Rules

ACTIONS = 5
BATCH, LENGTH = 2, 6
PATHS = ("prior", "synthetic", "options")
OBS = {
    "vector": gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float32),
    "symbolic": gymnasium.spaces.Box(0, 99, (2,), np.int32),
    "reward": gymnasium.spaces.Box(-np.inf, np.inf, (), np.float32),
    "is_first": gymnasium.spaces.Box(0, 1, (), np.bool_),
    "is_last": gymnasium.spaces.Box(0, 1, (), np.bool_),
    "is_terminal": gymnasium.spaces.Box(0, 1, (), np.bool_),
}


def advised_config(paths: Sequence[str] = PATHS, *options: str) -> Config:
    """Of an agent that is advised along some paths."""
    argv = ["--configs", "debug", "dummy_cue", "--batch_size", str(BATCH), "--batch_length", str(LENGTH)]
    argv += ["--precision", "float32"]
    if paths:
        argv += ["--llm.enabled", "True", "--llm.backend", "none"]
    argv += [word for path in paths for word in (f"--{path}.enabled", "True")]
    return configs.load([*argv, "--options.max_options", "3", "--options.option_max_length", "4", *options])


def make_agent(paths: Sequence[str] = PATHS, *options: str) -> Dreamer:
    act_space = {"action": gymnasium.spaces.Discrete(ACTIONS)}
    return Dreamer(OBS, act_space, advised_config(paths, *options), torch.device("cpu"))


def make_batch(agent: Dreamer, seed: int = 0) -> dict[str, np.ndarray]:
    """Random steps with advice; those of options are made by `executed`."""
    rng, config = np.random.default_rng(seed), agent.config
    shape, rssm = (BATCH, LENGTH + config.replay_context), config.rssm
    batch = {
        "vector": rng.normal(size=(*shape, 4)).astype(np.float32),
        "reward": rng.normal(size=shape).astype(np.float32),
        "action": rng.integers(ACTIONS, size=shape, dtype=np.int32),
        "is_first": np.zeros(shape, bool),
        "is_last": np.zeros(shape, bool),
        "is_terminal": np.zeros(shape, bool),
        "deter": rng.normal(size=(*shape, rssm.deter)).astype(np.float16),
        "stoch": rng.integers(rssm.classes, size=(*shape, rssm.stoch)).astype(np.uint8),
    }
    batch["is_first"][:, 0] = True
    if config.prior.enabled:
        batch["llm_mask"] = rng.random(shape) < 0.7
        batch["llm_logits"] = np.where(batch["llm_mask"][..., None], rng.normal(size=(*shape, ACTIONS)), 0)
        batch["llm_logits"] = batch["llm_logits"].astype(np.float32)
    if config.options.enabled:
        batch["decision"], batch["option"] = np.ones(shape, bool), np.zeros(shape, np.int32)
        batch["decision"][0, 3:5] = False  # decided at step 2, and the next time at step 5
        batch["option"][0, 2:5] = 11
    return batch


def make_items(agent: Dreamer, amount: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Synthetic items with plans of 3 actions, as they come with a batch."""
    rng, rssm = np.random.default_rng(seed), agent.config.rssm
    items = {
        "deter": rng.normal(size=(amount, rssm.deter)).astype(np.float16),
        "stoch": rng.integers(rssm.classes, size=(amount, rssm.stoch)).astype(np.uint8),
        "plan": np.zeros((amount, 15), np.int64),
        "length": np.full(amount, 3),
        "weight": np.full(amount, 0.5, np.float32),
    }
    items["plan"][:, :3] = rng.integers(ACTIONS, size=(amount, 3))
    return {key: torch.from_numpy(value) for key, value in items.items()}


def give_skills(agent: Dreamer, skills: Mapping[int, tuple[int, Sequence[int], int]]) -> None:
    """Put skills into slots: slot -> (uid, actions, timeout)."""
    slots, longest = agent.policy.options.script.shape
    table = {"uids": np.zeros(slots, np.int64), "timeouts": np.zeros(slots, np.int64)}
    table["actions"] = np.zeros((slots, longest), np.int64)
    for slot, (uid, actions, timeout) in skills.items():
        table["uids"][slot], table["timeouts"][slot] = uid, timeout
        table["actions"][slot, :timeout] = [actions[i % len(actions)] for i in range(timeout)]
    agent.policy.options.set_table(table)


def unsettle(agent: Dreamer) -> None:
    """Give output layers that start at zero some weights, or no gradient would pass through them."""
    torch.manual_seed(1)
    parts = [agent.world_model.reward_head, agent.behavior.critic, agent.behavior.slow_critic]
    if agent.policy.prior:
        parts.append(agent.policy.prior)
        agent.policy.prior.advice_rate.fill_(1.0)  # advice has been there for long
    for part in parts:
        torch.nn.init.normal_(part.out.weight, std=0.1)


def some_feat(agent: Dreamer, *batch: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rssm, config = agent.rssm, agent.config.rssm
    deter = torch.randn(*batch, config.deter, generator=generator)
    index = torch.randint(config.classes, (*batch, config.stoch), generator=generator)
    return rssm.feat({"deter": deter, "stoch": F.one_hot(index, config.classes).float()})


class SilentService:
    """A service without answers, for tests that replace `ask`."""

    def ask(self, *args, **kwargs):
        return []

    def metrics(self):
        return {}

    def notes(self):
        return []

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        """Stateless."""

    def close(self):
        """Nothing to close."""


class CueOracle(LLMAdapter):
    """Knows the rewarded action of the dummy tasks from the observation."""

    instant = True

    def infer(self, obs_np, num_actions):
        """The simple form of an adviser."""
        if "vector" in obs_np:
            cue = int(obs_np["vector"].argmax())
        else:
            middle = obs_np["image"][len(obs_np["image"]) // 2, obs_np["image"].shape[1] // 2].astype(int)
            cue = int(np.abs(middle - COLORS).sum(-1).argmin())
        return {"prior_logits": self.logits(cue, num_actions), "confidence": 1.0, "plan": [f"action_{cue}"]}

    def logits(self, cue, num_actions):
        return [20.0 * (action == cue) for action in range(num_actions)]


class CueLiar(CueOracle):
    """Advises against the rewarded action."""

    def logits(self, cue, num_actions):
        return [-20.0 * (action == cue) for action in range(num_actions)]


class Remote(Rules):
    """The embedded rules as an adviser that is called in the background and cached."""

    instant = False
    reachable = True

    def advise(self, requests):
        if not Remote.reachable:
            raise AssertionError("no call is allowed")
        return super().advise(requests)
