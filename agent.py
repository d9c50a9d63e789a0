"""The agent: acts from observations, learns from replayed sequences, and explains itself."""

import contextlib
import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import gymnasium
import numpy as np
import torch
from torch import Tensor

import checkpoint as checkpoints
import cuda_graph
import distributed
import models
import networks
import tools
from basics import UserError, derive_seed
from config import Config
from exploration import EXPLORERS, Greedy, param_group
from lore_llm import synthetic
from lore_llm.captions import make_captioner
from lore_llm.hooks import advice_spaces
from lore_llm.policy import ActingPolicy, AdvisedPolicy

OPEN_LOOP_CONTEXT = 5  # frames of a `train_openl` video that the world model sees before it predicts alone
OPEN_LOOP_ROWS = 6  # sequences in it
FEATURES_DROPOUT = 0.5  # share of the steps at which training hides the features of the adviser
EXPLAIN_ROLLOUTS = 8  # imagined trajectories for a predicted return

Arrays = dict[str, np.ndarray]
NO_ITEMS: Mapping[str, Tensor] = MappingProxyType({})


class Dreamer:
    """The agent: world model, actor and critic, explorer, and the policy that takes advice.

    Acting, training and reports draw from separate generators and do not affect each other.
    """

    def __init__(
        self, obs_space: Mapping[str, gymnasium.Space], act_space: Mapping[str, gymnasium.Space],
        config: Config, device: torch.device,
    ):  # fmt: skip
        self.config, self.device = config, device
        check_actions(act_space)
        advised = advice_spaces(config, act_space)[0]
        obs_space = dict(obs_space) | {k: v for k, v in advised.items() if k == "llm_features"}
        self.actions = networks.ActionVector(act_space)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, "weights"))
            self.world_model = models.WorldModel(obs_space, self.actions, config).to(device)
            self.behavior = models.ImagBehavior(self.rssm.feat_size, self.actions, config).to(device)
            torch.manual_seed(derive_seed(config.seed, "explorer"))
            self.explorer = EXPLORERS[config.expl_behavior](self.world_model, config).to(device)
        self.greedy = Greedy(self.world_model, config)  # acts when the explorer does not
        names = ("act", "train", "explore", "report", "synthetic", "options", "features")
        own = distributed.seed_names()
        self.rngs = {name: tools.torch_rng(config.seed, name, *own, device=device) for name in names}
        self.obs_space = dict(obs_space)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, "guide"))
            spaces = self.obs_space, act_space
            self.policy = make_policy(self.world_model, self.explorer, config, spaces, self.rngs).to(device)
        self.exploring = True
        self.unseen = networks.unrouted(obs_space, self.world_model.encoder.keys)
        if not any(self.world_model.encoder.keys):
            raise UserError(
                f"The agent has no inputs: no pattern of --encoder.*_keys matches {', '.join(self.unseen)}."
            )
        self.opt = tools.LaProp(self._param_groups(), **config.opt)
        self._join(self.world_model, self.behavior, self.explorer, self.policy)
        seen = {key for key in obs_space if not key.startswith("log_")}
        self.obs_keys = sorted(seen - {"reward", "is_last", "is_terminal", "symbolic", "llm_features"})
        self.autocast = functools.partial(
            torch.autocast, device.type, torch.bfloat16, enabled=tools.precision(config, device) == "bfloat16"
        )
        self.updates = 0
        self.update = self._update
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32, which convolutions have by default
            self.copies = torch.cuda.Stream(device)
        if tools.compiles(config, device):
            self._compile()
            self._record()

    def _join(self, *parts: torch.nn.Module) -> None:
        """Give all ranks the same weights, and collect the tensors that they share in an update."""
        modules = [module for part in parts for module in part.modules()]
        distributed.broadcast([value for part in parts for value in part.state_dict().values()])
        self.trained = [p for group in self.opt.param_groups for p in group["params"]]
        self.averages = [getattr(m, name) for m in modules for name in getattr(m, "averages", ())]

    def _record(self) -> None:
        """On CUDA, record the update as a graph from now on; not with several learners."""
        compiled = tools.compiles(self.config, self.device)
        if compiled and self.device.type == "cuda" and distributed.world_size() == 1:
            drawn = [rng for name, rng in self.rngs.items() if name not in ("act", "report")]
            self.update = cuda_graph.GraphedUpdate(self._update, *drawn)

    def explore(self, exploring: bool) -> None:
        """Whether the explorer acts and learns (until `expl_until`)."""
        if exploring != self.exploring:
            self.exploring = exploring
            self._record()  # a recorded update would not change

    @property
    def rssm(self) -> networks.RSSM:
        return self.world_model.rssm

    def _param_groups(self) -> list[dict]:
        """The parameters of all parts, with their own learning rates where the config gives them."""
        c = self.config
        return [
            param_group(self.world_model, c.model_lr),
            param_group(self.behavior.actor, c.actor_lr),
            param_group(self.behavior.critic, c.critic_lr),
            *self.explorer.param_groups(),
            *self._policy_groups(),
        ]

    def _policy_groups(self) -> list[dict]:
        return self.policy.param_groups(self.config.actor_lr, self.config.model_lr)

    def _compile(self) -> None:
        """Compile the functions that training calls, in place, so that checkpoints keep their names."""
        parts = (self.behavior, *self.explorer.children())
        behaviors = [part for part in parts if isinstance(part, models.ImagBehavior)]
        compiled = (
            (self.world_model.encoder, "forward"),
            (self.world_model.decoder, "forward"),
            (self.rssm, "observe_step"),
            (self.rssm, "imagine"),
            *((part, "forward") for own in behaviors for part in (own.actor, own.critic)),
        )
        for module, name in compiled:
            setattr(module, name, torch.compile(getattr(module, name)))

    def parameters(self) -> int:
        """The number of trained parameters."""
        return sum(p.numel() for p in self.trained)

    def initial_state(self, envs: int) -> dict[str, Tensor]:
        """The state before the first observation: deter, stoch, previous action, each [envs, ...]."""
        action = torch.zeros(envs, self.actions.size, device=self.device)
        return {**self.rssm.initial(envs), "action": action, **self.policy.initial(self.obs_space, envs)}

    def acting_state(self, saved: Mapping[str, Tensor], envs: int) -> dict[str, Tensor]:
        """A saved state that `act` returned, on the device. Raises ValueError for another agent's."""
        initial = self.initial_state(envs)
        if _shapes(saved) != _shapes(initial):
            raise ValueError("the acting state is of another agent")
        return {k: saved[k].to(v.device) for k, v in initial.items()}

    @torch.no_grad()
    def act(
        self, obs: Arrays, state: dict[str, Tensor], generator: torch.Generator, explore: bool = False,
        advised: bool = False, plans: Mapping[int, Sequence[int]] = MappingProxyType({}),
    ) -> tuple[Arrays, dict[str, Tensor], Arrays]:  # fmt: skip
        """Actions for observations [n, ...]; returns (action, next state, latents to store with the step).

        The task's actor acts; with `explore` the explorer does, as long as it explores, and the task's actor
        with the prior afterwards, or if `advised`. `plans` (env: actions) start to be executed.
        """
        explorer = self.explorer if explore and self.exploring else self.greedy
        actor = explorer.actor(self.behavior)
        data = {k: torch.from_numpy(obs[k]).to(self.device) for k in self.obs_keys}
        amount, rssm = len(data["is_first"]), self.rssm
        data |= self._features(obs, amount)
        # On a CPU, rounding all weights for so few rows would take longer than it saves.
        with self.autocast() if self.device.type == "cuda" else contextlib.nullcontext():
            data = self.world_model.hearing({k: v[:, None] for k, v in data.items()})
            embed = self.world_model.encoder(data)
            noise = rssm.noise(amount, 1, generator=generator)
            post = rssm.observe(state, embed, state["action"][:, None], data["is_first"], noise)
            post = {k: post[k][:, 0] for k in ("deter", "stoch")}
            feat, noise = rssm.feat(post), actor.noise(amount, generator=generator)
            action, running, stored = self.policy.act(
                self.behavior, actor, feat, noise, obs, state, plans, advised or explore
            )
        deter, stoch = rssm.pack(post)
        latents = {"deter": deter.cpu().numpy(), "stoch": stoch.cpu().numpy(), **stored}
        return self.actions.decode(action), {**post, "action": action, **running}, latents

    def _features(self, obs: Arrays, amount: int) -> dict[str, Tensor]:
        """The adviser's features as an observation; zeros where it gave none."""
        if "llm_features" not in self.obs_space:
            return {}
        blank = np.zeros((amount, *self.obs_space["llm_features"].shape), np.float32)
        return {"llm_features": torch.from_numpy(obs.get("llm_features", blank)).to(self.device)}

    @torch.no_grad()
    def curiosity(self, state: dict[str, Tensor]) -> np.ndarray | None:
        """The expected intrinsic reward [n] of a state that `act` returned, and the action taken in it.

        None without an explorer that is curious, and after `expl_until`.
        """
        if not (self.explorer.curious and self.exploring):
            return None
        reward = self.explorer.intrinsic(self.rssm.feat(state), state["action"])
        return reward.float().cpu().numpy()

    def train(
        self, batch: Mapping[str, np.ndarray | Tensor], items: Mapping[str, np.ndarray | Tensor] = NO_ITEMS
    ) -> tuple[dict[str, Tensor], Arrays | None]:
        """One update from sequences [B, context + T, ...] and synthetic items, as arrays or uploaded.

        Returns metrics, and per step [B, T, ...] what the replay keeps: refreshed latents `deter` and
        `stoch`, and the world model's `loss`. A gradient that is not finite changes no weight: then the
        metric `opt/skipped` is 1 and there is nothing to keep.
        """
        metrics, kept = self.update(self.upload(batch), self.upload(items))
        if metrics["opt/skipped"]:
            return metrics, None
        self.updates += 1
        if self.updates % self.config.slow_target_update == 0:
            self.behavior.update_slow_critic()
            self.explorer.update_slow_critic()
        return metrics, {k: v.cpu().numpy() for k, v in kept.items()}

    def _update(
        self, data: Mapping[str, Tensor], items: Mapping[str, Tensor] = NO_ITEMS
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """An update that does not wait for the GPU; returns metrics, and what the replay keeps."""
        scales, generator = self.config.loss_scales, self.rngs["train"]
        data = {**data, "reward": data["reward"] * self.config.reward_scale}
        if "llm_features" in data:
            data["llm_features"] = self._drop_features(data)
        with self.autocast():
            post, data = self.world_model.observe(data, generator)
            losses, metrics = self.world_model.loss(post, data)
            model_loss = sum(scales[name] * loss.detach() for name, loss in losses.items())  # [B, T]
            explorer = self.explorer if self.exploring else self.greedy
            expl_losses, expl_metrics, data = explorer.loss(
                self.world_model, post, data, self.rngs["explore"]
            )
            more, more_metrics = self.behavior.loss(
                self.world_model, post, data, generator, explorer.task_reward, self.policy, items
            )
            policy_losses, policy_metrics = self.policy.learn(self.world_model, self.behavior, post, data)
        losses |= more
        # The losses of explorer and policy are weighted already.
        total = sum(scales.get(name, 1.0) * loss.mean() for name, loss in losses.items())
        total = total + sum(expl_losses.values()) + sum(policy_losses.values())
        losses |= expl_losses | policy_losses
        self.opt.zero_grad()
        total.backward()
        for param in self.trained if distributed.world_size() > 1 else ():
            if param.grad is None:  # it may have one on another rank
                param.grad = torch.zeros_like(param)
        distributed.all_reduce([param.grad for param in self.trained])
        outcome = self.opt.step()
        distributed.all_reduce(self.averages)
        metrics |= more_metrics | expl_metrics | policy_metrics
        metrics |= {f"loss/{name}": loss.detach().mean() for name, loss in losses.items()}
        metrics |= {"opt/loss": total.detach()} | {f"opt/{name}": value for name, value in outcome.items()}
        deter, stoch = self.rssm.pack({k: post[k].detach() for k in ("deter", "stoch")})
        return metrics, {"deter": deter, "stoch": stoch, "loss": model_loss}

    def _drop_features(self, data: Mapping[str, Tensor]) -> Tensor:
        """The adviser's features with dropout, where there are any."""
        draws = torch.rand(data["is_first"].shape, device=self.device, generator=self.rngs["features"])
        seen = data["llm_mask"] & (draws >= FEATURES_DROPOUT)
        return data["llm_features"] * seen[..., None]

    @torch.no_grad()
    def evaluate_plans(self, items: Arrays) -> dict[str, np.ndarray]:
        """Predicted returns of plans and of the actor: see `synthetic.evaluate`."""
        rollouts, generator = self.config.synthetic.synthetic_rollouts, self.rngs["synthetic"]
        data, ensemble = self.upload(items), self.policy.ensemble
        with self.autocast():
            found = synthetic.evaluate(self.behavior, self.world_model, data, rollouts, generator, ensemble)
        return {name: value.float().cpu().numpy() for name, value in found.items()}

    @torch.no_grad()
    def model_loss(self, batch: Arrays) -> float:
        """The world model's loss on sequences [B, context + T, ...], without learning from them."""
        data = self.upload(batch)
        data["reward"] = data["reward"] * self.config.reward_scale
        with self.autocast():
            post, data = self.world_model.observe(data, self.rngs["report"])
            losses, _ = self.world_model.loss(post, data)
        return float(sum(self.config.loss_scales[name] * loss.mean() for name, loss in losses.items()))

    @torch.no_grad()
    def explain(self, state: dict[str, Tensor], advised: bool = True) -> list[dict]:
        """Explain the decision of each env in a state that `act` returned: see docs/llm.md.

        To `ActingPolicy.explain` it adds the index of the `action`, the `value`, and the `predicted_return`
        of imagined steps.
        """
        feat, amount = self.rssm.feat(state), len(state["deter"])
        with self.autocast():
            views = self.policy.explain(self.behavior, feat, state, advised)
            value = self.behavior.critic(feat).mean
            start = {k: state[k].repeat_interleave(EXPLAIN_ROLLOUTS, 0) for k in ("deter", "stoch")}
            dream = self.policy.imagine(self.behavior, self.rssm, start, self.rngs["report"], advised)
            reward = self.world_model.reward_head(dream.feat).mean
            cont = self.world_model.cont_head(dream.feat).prob
            values = self.behavior.critic(dream.feat).mean
            ret = models.lambda_return(torch.zeros_like(cont), 1 - cont, reward, values, 1.0, 1.0)
        expected = ret[:, 0].unflatten(0, (amount, EXPLAIN_ROLLOUTS)).mean(1)
        return [
            {
                **view,
                "action": int(state["action"][env].argmax()),
                "value": float(value[env]),
                "predicted_return": float(expected[env]),
            }
            for env, view in enumerate(views)
        ]

    def report(self, batch: Arrays) -> dict[str, np.ndarray]:
        """Open-loop videos, uint8 [T, rows * H, 3 * W, C], for each reconstructed image and audio key."""
        data = self.upload({k: v[:OPEN_LOOP_ROWS] for k, v in batch.items()})
        context = min(OPEN_LOOP_CONTEXT, self.config.batch_length - 1)
        with self.autocast():
            videos = self.world_model.open_loop(data, context, self.rngs["report"])
        return {key: video.cpu().numpy() for key, video in videos.items()}

    def upload(self, batch: Mapping[str, np.ndarray | Tensor]) -> dict[str, Tensor]:
        """Copy a batch to the device. Another thread may call it, so that the next batch is ready in time."""
        if self.device.type == "cpu":
            return {k: torch.as_tensor(v) for k, v in batch.items()}
        if all(isinstance(v, Tensor) for v in batch.values()):
            return dict(batch)
        with torch.cuda.stream(self.copies):  # in parallel to the running update
            pinned = {k: torch.from_numpy(v).pin_memory() for k, v in batch.items()}
            data = {k: v.to(self.device, non_blocking=True) for k, v in pinned.items()}
        self.copies.synchronize()
        for value in data.values():
            value.record_stream(torch.cuda.default_stream(self.device))  # which uses it
        return data

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """The learned parameters and the return normaliser, by module."""
        parts = ("world_model", "behavior", "explorer", "policy")
        return {name: getattr(self, name).state_dict() for name in parts}

    def state_dict(self) -> dict:
        return {
            **self.weights(),
            "optimizer": self.opt.state_dict(),
            "updates": self.updates,
            "rngs": {name: rng.get_state() for name, rng in self.rngs.items()},
            "skills": self.policy.option_names(),
        }

    def _set_rngs(self, states: Mapping[str, Tensor]) -> None:
        for name, rng in self.rngs.items():
            # The run may resume on another kind of device, whose generators have other states.
            if name in states and states[name].shape == rng.get_state().shape:
                rng.set_state(states[name])

    def load_state_dict(self, state: dict, *, resume: bool = True) -> list[str]:
        """Load weights, optimiser and random states from a checkpoint; returns lines for the log.

        Without `resume` the random states are kept, and so are the parts that the checkpoint does not have: a
        different explorer, a policy with different advice, the decoder, the optimiser. Raises UserError if a
        shape differs.
        """
        notes, groups, last = [], None, len(self.opt.param_groups)
        weights = {name: state.get(name, {}) for name in self.weights()}
        weights["explorer"] = self.explorer.adopt(state["explorer"], resume)
        if not resume:
            # The optimiser's groups are in the order of the parts: those before a new part are loaded.
            last -= len(self._policy_groups())
            if _shapes(self.policy.state_dict()) != _shapes(weights["policy"]):
                if self.config.llm.enabled:
                    notes.append("The checkpoint's agent had other advice: what advice teaches is new")
                groups = last
                del weights["policy"]
            if _shapes(self.explorer.state_dict()) != _shapes(weights["explorer"]):
                notes.append(f"The checkpoint has another explorer: {self.config.expl_behavior} is new")
                groups = last - len(self.explorer.param_groups())
                del weights["explorer"]
            decoder = {k: v for k, v in self.world_model.state_dict().items() if k.startswith("decoder.")}
            if not decoder.keys() & weights["world_model"].keys():
                notes.append("The checkpoint has no decoder: it is new")
                weights["world_model"] = weights["world_model"] | decoder
        if "policy" in weights:
            self.policy.set_option_names(state.get("skills", []))
        for name, value in weights.items():
            _load_weights(getattr(self, name), value, name)
        if resume or "optimizer" in state:
            self.opt.load_state_dict(state["optimizer"], groups)
            self.updates = state["updates"]
        else:
            notes.append("The checkpoint has only weights: the optimiser is new")
        self._record()  # a recorded update would write to the replaced moments
        if resume and distributed.is_main():
            self._set_rngs(state["rngs"])
        return notes

    def transfer(self, state: Mapping, parts: Sequence[str]) -> list[str]:
        """Load the named parts of a checkpoint of another task or size where shapes fit; lines for the log.

        Everything else is as in a new agent, including the optimiser: its moments are of other losses.
        """
        return checkpoints.transfer({name: getattr(self, name) for name in self.weights()}, state, parts)


def check_actions(act_space: Mapping[str, gymnasium.Space]) -> None:
    """Raise UserError for an action that the actor cannot take."""
    kinds = gymnasium.spaces.Discrete, gymnasium.spaces.MultiDiscrete, gymnasium.spaces.Box
    for key, space in act_space.items():
        if not isinstance(space, kinds):
            raise UserError(
                f"Action {key!r} is {space}; the actor knows Discrete, MultiDiscrete and Box, "
                "and a Dict of these."
            )


def make_policy(
    world_model: models.WorldModel, explorer: Greedy, config: Config,
    spaces: tuple[Mapping[str, gymnasium.Space], Mapping[str, gymnasium.Space]],
    rngs: Mapping[str, torch.Generator],
) -> ActingPolicy:  # fmt: skip
    """The actor's policy, with or without advice; `spaces` are those of observations and actions."""
    if not config.llm.enabled:
        return ActingPolicy()
    ensemble = getattr(explorer, "disagreement", None)
    return AdvisedPolicy(world_model, make_captioner(config, *spaces), config, ensemble, rngs)


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in weights.items()}


def _load_weights(module: torch.nn.Module, weights: Mapping[str, Tensor], name: str) -> None:
    own = module.state_dict()
    for key in sorted(own.keys() | weights.keys()):
        here = tuple(own[key].shape) if key in own else "nothing"
        there = tuple(weights[key].shape) if key in weights else "nothing"
        if here != there:
            raise UserError(
                f"The checkpoint does not fit this agent: {name}.{key} is {there} in the checkpoint and "
                f"{here} here. Use the config and the task that it was trained with, or a new --logdir "
                "without it."
            )
        if not weights[key].isfinite().all():
            raise ValueError(f"{name}.{key} holds numbers that are not finite")
    module.load_state_dict(weights)
