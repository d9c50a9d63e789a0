"""Train DreamerV3: python3 dreamer.py --configs crafter --logdir ./logdir/crafter

The entry: reads the config, makes envs, replay and agent, and runs the loop: act, store, train, log,
evaluate, save. `--help` lists presets and options. Running the same command again resumes.
"""

import contextlib
import functools
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import gymnasium
import numpy as np
import torch
from torch import Tensor

import audio
import config as configs
import cuda_graph
import distributed
import models
import networks
import replay as replays
import tools
import weights
from basics import UserError, derive_seed, first_line, numpy_rng, stop_signals
from config import Config
from distributed import LostRank, Ranks
from envs import make_env
from episodes import EpisodeWriter
from exploration import EXPLORERS, Greedy, Random, param_group
from lock import RunLock
from logger import Collector, Logger, Timer, WandbRun, add_heat_strip, merged_logs, write_mp4, write_wav
from lore_llm import synthetic
from lore_llm.advisor import Advisor
from lore_llm.captions import make_captioner
from lore_llm.coach import Coach, NoCoach, advice_spaces, is_count, make_advisor
from lore_llm.guide import Guide
from parallel import VecEnv, make_vec
from replay import Replay
from stats import ACHIEVEMENT, EpisodeStats, SuccessRates, merged_successes

OPEN_LOOP_CONTEXT = 5  # frames that the world model sees in a `train_openl` video before it is on its own
OPEN_LOOP_ROWS = 6  # sequences shown in it
EXPLAIN_ROLLOUTS = 8  # imagined for a predicted return
REPLAY_STATE = "replay_state"  # folder in the logdir, with one folder for each checkpoint
REPLAY_RING = "replay_ring"  # folder in the logdir for a ring on the disk
RANK_FOLDER = "rank-{}"  # in these two, what belongs to another learner than the first
OWN_STATE = "own.pt"  # file of what such a learner has of its own, beside what its replay saved
CPU_FULL = "DefaultCPUAllocator"  # in torch's error where there is no RAM
GPU_FULL = (
    "CUDA error: out of memory",
    "_STATUS_ALLOC_FAILED",
)  # without a class of their own: CUDA, cuBLAS, cuDNN
LOWER = "--batch_size, --batch_length or --imag_last"  # options of what an update takes
LOWER_ON_GPU = f"Lower {LOWER}, take --precision bfloat16 or, for a new run, a smaller preset as size1m."
LOWER_IN_RAM = (
    f"Lower {LOWER}, --replay.capacity or --envs.amount, put the replay into files with "
    "--replay.backend memmap or, for a new run, take a smaller preset as size1m."
)
ESTIMATE_UPDATES = 20  # updates after which the run's duration is estimated

Arrays = dict[str, np.ndarray]


# --- The agent -----------------------------------------------------------------------------------------


class Dreamer:
    """The agent: acts from observations, learns from replayed sequences, saves and loads itself.

    Its random draws come from generators of its own: acting, training and reports do not disturb each
    other.
    """

    def __init__(
        self,
        obs_space: Mapping[str, gymnasium.Space],
        act_space: Mapping[str, gymnasium.Space],
        config: Config,
        device: torch.device,
        ranks: Ranks | None = None,
    ):
        """`ranks` are the learners with which it shares its gradients; without, it learns alone."""
        self.config, self.device, self.ranks = config, device, ranks or Ranks()
        check_actions(act_space, config.actor_dist)
        advised = advice_spaces(config, act_space)[0]
        obs_space = dict(obs_space) | {k: v for k, v in advised.items() if k == "llm_features"}
        self.actions = networks.ActionVector(act_space)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(tools.derive_seed(config.seed, "weights"))
            self.world_model = models.WorldModel(obs_space, self.actions, config).to(device)
            self.behavior = models.ImagBehavior(self.rssm.feat_size, self.actions, config).to(device)
            torch.manual_seed(tools.derive_seed(config.seed, "explorer"))
            self.explorer = EXPLORERS[config.expl_behavior](self.world_model, config).to(device)
        self.greedy = Greedy(self.world_model, config)  # who explores when nobody does any more
        names = ("act", "train", "explore", "report", "synthetic", "options", "features")
        own = self.ranks.names()
        self.rngs = {name: tools.torch_rng(config.seed, name, *own, device=device) for name in names}
        self.obs_space = dict(obs_space)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(tools.derive_seed(config.seed, "guide"))
            spaces = self.obs_space, act_space
            self.guide = make_guide(self.world_model, self.explorer, config, spaces, self.rngs).to(device)
        self.exploring = True
        self.unseen = networks.unrouted(obs_space, self.world_model.encoder.keys)
        if not any(self.world_model.encoder.keys):
            raise UserError(
                f"The agent would see nothing: no pattern of --encoder.*_keys fits {', '.join(self.unseen)}."
            )
        self.opt = tools.LaProp(self._param_groups(), **config.opt)
        self._join(self.world_model, self.behavior, self.explorer, self.guide)
        seen = {key for key in obs_space if not key.startswith("log_")}
        self.obs_keys = sorted(seen - {"reward", "is_last", "is_terminal", "symbolic", "llm_features"})
        self.autocast = functools.partial(
            torch.autocast, device.type, torch.bfloat16, enabled=precision(config, device) == "bfloat16"
        )
        self.updates = 0
        self.update = self._update
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32, which convolutions have by default
            self.copies = torch.cuda.Stream(device)
        if compiles(config, device):
            self._compile()
            self._record()

    def _join(self, *parts: torch.nn.Module) -> None:
        """Let all ranks begin with the same weights, and see what they have to share in an update."""
        modules = [module for part in parts for module in part.modules()]
        self.ranks.copy([value for part in parts for value in part.state_dict().values()])
        self.trained = [p for group in self.opt.param_groups for p in group["params"]]
        self.averages = [getattr(m, name) for m in modules for name in getattr(m, "averages", ())]
        for module in modules:
            if isinstance(module, models.ReturnNorm):
                module.gather = self.ranks.gather

    def _record(self) -> None:
        """On CUDA, record the update anew as a graph; not what several learners do together."""
        if compiles(self.config, self.device) and self.device.type == "cuda" and self.ranks.size == 1:
            drawn = [rng for name, rng in self.rngs.items() if name not in ("act", "report")]
            self.update = cuda_graph.GraphedUpdate(self._update, *drawn)

    def explore(self, exploring: bool) -> None:
        """Let the explorer act and learn, or not any more (`expl_until`)."""
        if exploring != self.exploring:
            self.exploring = exploring
            self._record()  # a recorded update goes on as it was

    @property
    def rssm(self) -> networks.RSSM:
        return self.world_model.rssm

    def _param_groups(self) -> list[dict]:
        """One optimiser over all, with learning rates of their own where the config gives them."""
        c = self.config
        return [
            param_group(self.world_model, c.model_lr),
            param_group(self.behavior.actor, c.actor_lr),
            param_group(self.behavior.critic, c.critic_lr),
            *self.explorer.param_groups(),
            *self._guide_groups(),
        ]

    def _guide_groups(self) -> list[dict]:
        return self.guide.param_groups(self.config.actor_lr, self.config.model_lr)

    def _compile(self) -> None:
        """Compile the functions that training calls, in place: so checkpoints keep their names."""
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
        """How many parameters are trained."""
        return sum(p.numel() for group in self.opt.param_groups for p in group["params"])

    def initial_state(self, envs: int) -> dict[str, Tensor]:
        """The state before the first observation: deter, stoch, previous action, each [envs, ...]."""
        action = torch.zeros(envs, self.actions.size, device=self.device)
        return {**self.rssm.initial(envs), "action": action, **self.guide.initial(self.obs_space, envs)}

    def acting_state(self, saved: Mapping[str, Tensor], envs: int) -> dict[str, Tensor]:
        """The state in which `act` left off, from a checkpoint. Raises ValueError for another agent's."""
        if _shapes(saved) != _shapes(self.initial_state(envs)):
            raise ValueError("the state in which it acted is of another agent")
        return {k: v.to(self.device) for k, v in saved.items()}

    @torch.no_grad()
    def act(
        self,
        obs: Arrays,
        state: dict[str, Tensor],
        generator: torch.Generator,
        explore: bool = False,
        advised: bool = False,
        plans: Mapping[int, Sequence[int]] = MappingProxyType({}),
    ) -> tuple[Arrays, dict[str, Tensor], Arrays]:
        """Actions for observations [n, ...]: (action, next state, latents to store with the step).

        They are those of the task's actor; with `explore` of who explores, as long as someone does, and then,
        or if `advised`, the actor is seen through the prior. `plans` (env: actions) begin to be executed.
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
            feat = rssm.feat(post)
            guided = actor is self.behavior.actor
            advised = advised or explore
            policy = self.guide.act(self.behavior, feat, advised, explore) if guided else actor(feat)
            choice = policy.sample(actor.noise(amount, generator=generator))
            action, running, stored = self.guide.execute(
                self.behavior, feat, choice, obs, state, plans, explore
            )
        deter, stoch = rssm.pack(post)
        latents = {"deter": deter.cpu().numpy(), "stoch": stoch.cpu().numpy(), **stored}
        return self.actions.decode(action), {**post, "action": action, **running}, latents

    def _features(self, obs: Arrays, amount: int) -> dict[str, Tensor]:
        """What the adviser says of the situation, as an observation; zeros where it says nothing."""
        if "llm_features" not in self.obs_space:
            return {}
        blank = np.zeros((amount, *self.obs_space["llm_features"].shape), np.float32)
        return {"llm_features": torch.from_numpy(obs.get("llm_features", blank)).to(self.device)}

    @torch.no_grad()
    def curiosity(self, state: dict[str, Tensor]) -> np.ndarray | None:
        """The intrinsic reward [n] that is expected of a state and the action taken in it.

        `state` is one that `act` returned. None where nobody is curious, or not any more.
        """
        if not (self.explorer.curious and self.exploring):
            return None
        reward = self.explorer.intrinsic(self.rssm.feat(state), state["action"])
        return reward.float().cpu().numpy()

    def train(self, batch: Mapping[str, np.ndarray | Tensor]) -> tuple[dict[str, Tensor], Arrays | None]:
        """One update from sequences [B, context + T, ...], as arrays or as `upload` gives them.

        Returns metrics, and per step [B, T, ...] what the replay keeps: refreshed latents `deter` and
        `stoch`, and the world model's `loss`. A gradient that is not finite changes no weight: then the
        metric `opt/skipped` is 1 and there is nothing to keep.
        """
        metrics, kept = self.update(self.upload(batch))
        if metrics["opt/skipped"]:
            return metrics, None
        self.updates += 1
        if self.updates % self.config.slow_target_update == 0:
            self.behavior.update_slow_critic()
            self.explorer.update_slow_critic()
        return metrics, {k: v.cpu().numpy() for k, v in kept.items()}

    def _update(self, data: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """An update without waiting for the GPU: its metrics, and what the replay keeps."""
        scales, generator = self.config.loss_scales, self.rngs["train"]
        data = {**data, "reward": data["reward"] * self.config.reward_scale}
        self.guide.items = {k[5:]: data.pop(k) for k in list(data) if k.startswith("item_")}
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
                self.world_model, post, data, generator, explorer.task_reward, self.guide
            )
            guide_losses, guide_metrics = self.guide.learn(self.world_model, self.behavior, post, data)
        losses |= more
        # Those of explorer and guide come weighted.
        total = sum(scales.get(name, 1.0) * loss.mean() for name, loss in losses.items())
        total = total + sum(expl_losses.values()) + sum(guide_losses.values())
        losses |= expl_losses | guide_losses
        self.opt.zero_grad()
        total.backward()
        for param in self.trained if self.ranks.size > 1 else ():
            if param.grad is None:  # perhaps it has one on another rank
                param.grad = torch.zeros_like(param)
        self.ranks.average([param.grad for param in self.trained])
        outcome = self.opt.step()
        self.ranks.average(self.averages)
        metrics |= more_metrics | expl_metrics | guide_metrics
        metrics |= {f"loss/{name}": loss.detach().mean() for name, loss in losses.items()}
        metrics |= {"opt/loss": total.detach()} | {f"opt/{name}": value for name, value in outcome.items()}
        deter, stoch = self.rssm.pack({k: post[k].detach() for k in ("deter", "stoch")})
        return metrics, {"deter": deter, "stoch": stoch, "loss": model_loss}

    def _drop_features(self, data: Mapping[str, Tensor]) -> Tensor:
        """The adviser's features as training sees them: only where there are any, and not always."""
        draws = torch.rand(data["is_first"].shape, device=self.device, generator=self.rngs["features"])
        seen = data["llm_mask"] & (draws >= self.config.llm.features_dropout)
        return data["llm_features"] * seen[..., None]

    @torch.no_grad()
    def judge(self, items: Arrays) -> dict[str, np.ndarray]:
        """What the world model expects of plans: see `synthetic.judge`."""
        rollouts, generator = self.config.synthetic.synthetic_rollouts, self.rngs["synthetic"]
        with self.autocast():
            judged = synthetic.judge(
                self.guide, self.behavior, self.world_model, self.upload(items), rollouts, generator
            )
        return {name: value.float().cpu().numpy() for name, value in judged.items()}

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
        """Of each env, in a state that `act` returned, why the agent does what it does: see docs/llm.md.

        What `Unguided.explain` tells, the index of the `action`, the `value`, and the `predicted_return` of
        imagined steps from there.
        """
        feat, amount = self.rssm.feat(state), len(state["deter"])
        with self.autocast():
            views = self.guide.explain(self.behavior, feat, state, advised)
            value = self.behavior.critic(feat).mean
            start = {k: state[k].repeat_interleave(EXPLAIN_ROLLOUTS, 0) for k in ("deter", "stoch")}
            dream = self.guide.imagine(self.behavior, self.rssm, start, self.rngs["report"], advised)
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
        """A batch on the device. Another thread may call it, so that the next batch is there in time."""
        if self.device.type == "cpu":
            return {k: torch.as_tensor(v) for k, v in batch.items()}
        if all(isinstance(v, Tensor) for v in batch.values()):
            return dict(batch)
        with torch.cuda.stream(self.copies):  # beside the update that is running
            pinned = {k: torch.from_numpy(v).pin_memory() for k, v in batch.items()}
            data = {k: v.to(self.device, non_blocking=True) for k, v in pinned.items()}
        self.copies.synchronize()
        for value in data.values():
            value.record_stream(torch.cuda.default_stream(self.device))  # which is where it is used
        return data

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """The learned parameters and the return normaliser, by module."""
        parts = ("world_model", "behavior", "explorer", "guide")
        return {name: getattr(self, name).state_dict() for name in parts}

    def state_dict(self) -> dict:
        return {
            **self.weights(),
            "optimizer": self.opt.state_dict(),
            "updates": self.updates,
            "rngs": {name: rng.get_state() for name, rng in self.rngs.items()},
            "skills": self.guide.skills(),
        }

    def own_state_dict(self) -> dict:
        """What another rank than 0 has of its own: random states, and what its explorer remembers."""
        return {key: self.state_dict()[key] for key in ("rngs", "explorer")}

    def load_own_state_dict(self, state: dict) -> None:
        """Go on with the `own_state_dict` of this rank."""
        self._set_rngs(state["rngs"])
        _load_weights(self.explorer, state["explorer"], "explorer")

    def _set_rngs(self, states: Mapping[str, Tensor]) -> None:
        for name, rng in self.rngs.items():
            # A run may go on with another kind of device, whose generators have other states.
            if name in states and states[name].shape == rng.get_state().shape:
                rng.set_state(states[name])

    def load_state_dict(self, state: dict, *, resume: bool = True) -> list[str]:
        """Take weights, optimiser and random states from a checkpoint; lines for the log about what was not.

        Without `resume` random states stay as they are, and so does an explorer that is not the
        checkpoint's, and the optimiser or the decoder if the file has none. Raises UserError where a shape
        differs.
        """
        notes, groups = [], None
        weights = {name: state.get(name, {}) for name in self.weights()}
        weights["explorer"] = self.explorer.adopt(state["explorer"], resume)
        if not resume and _shapes(self.guide.state_dict()) != _shapes(weights["guide"]):
            if self.config.llm.enabled:
                notes.append("The checkpoint's agent was advised otherwise; what advice teaches starts anew")
            del weights["guide"]
            groups = len(self.opt.param_groups) - len(self._guide_groups())
        if not resume and _shapes(self.explorer.state_dict()) != _shapes(weights["explorer"]):
            notes.append(
                f"The checkpoint has another explorer than {self.config.expl_behavior}, which starts anew"
            )
            del weights["explorer"]
            groups = len(self.opt.param_groups) - len(self._guide_groups())
            groups -= len(self.explorer.param_groups())
        decoder = {k: v for k, v in self.world_model.state_dict().items() if k.startswith("decoder.")}
        if not resume and not decoder.keys() & weights["world_model"].keys():
            notes.append("The checkpoint has no decoder, which starts anew")
            weights["world_model"] = weights["world_model"] | decoder
        if "guide" in weights:
            self.guide.set_names(state.get("skills", []))
        for name, value in weights.items():
            _load_weights(getattr(self, name), value, name)
        if resume or "optimizer" in state:
            self.opt.load_state_dict(state["optimizer"], groups)
            self.updates = state["updates"]
        else:
            notes.append("The checkpoint has weights alone, so the optimiser starts anew")
        self._record()  # a recorded update writes the moments that were replaced
        if resume and self.ranks.leads:  # the others have their own
            self._set_rngs(state["rngs"])
        return notes

    def transfer(self, state: Mapping, parts: Sequence[str]) -> list[str]:
        """Take the named parts of a checkpoint, of another task or size, where shapes fit; lines for the log.

        Everything else is as in a new agent, the optimiser too: its moments are of other losses.
        """
        return weights.transfer({name: getattr(self, name) for name in self.weights()}, state, parts)


def check_actions(act_space: Mapping[str, gymnasium.Space], actor_dist: str) -> None:
    """Raise UserError for an action that the actor cannot take, or that `actor_dist` does not fit."""
    kinds = gymnasium.spaces
    fits = {kinds.Discrete: "onehot", kinds.MultiDiscrete: "onehot", kinds.Box: "normal"}
    for key, space in act_space.items():
        dist = fits.get(type(space))
        if dist is None:
            raise UserError(
                f"Action {key!r} is {space}; the actor knows Discrete, MultiDiscrete and Box, "
                "and a Dict of these."
            )
        if actor_dist not in ("auto", dist):
            raise UserError(
                f"--actor_dist {actor_dist} does not fit action {key!r} ({space}): use {dist} or auto."
            )


def make_guide(
    world_model: models.WorldModel,
    explorer: Greedy,
    config: Config,
    spaces: tuple[Mapping[str, gymnasium.Space], Mapping[str, gymnasium.Space]],
    rngs: Mapping[str, torch.Generator],
) -> models.Unguided:
    """Who stands between the actor and the envs: nobody, or the one that heeds the advice."""
    if not config.llm.enabled:
        return models.Unguided()
    ensemble = getattr(explorer, "disagreement", None)
    return Guide(world_model, make_captioner(config, *spaces), config, ensemble, rngs)


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


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where it works, else the CPU. Raises UserError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if cuda_works() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # new streams and CUDA graphs are of the current device
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"--device {name} does not work here: {reason} --device auto finds one that does."
        ) from error
    return device


def count_gpus() -> int:
    """How many CUDA GPUs are here that work."""
    return torch.cuda.device_count() if cuda_works() else 0


def cuda_works() -> bool:
    """Whether a CUDA GPU is here and computes: a driver too old for this torch is found out now."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.zeros(1, device="cuda") + 1
    except torch.OutOfMemoryError:  # it computes, for somebody else
        return True
    except RuntimeError:
        return False
    return True


def precision(config: Config, device: torch.device) -> str:
    """What `precision: auto` means: bfloat16 where the hardware multiplies in it, else float32."""
    if config.precision != "auto":
        return config.precision
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # torch before 2.12 does not tell.
        abilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        fast = abilities.get("avx512_bf16", False) or abilities.get("amx_bf16", False)
    return "bfloat16" if fast else "float32"


def compiles(config: Config, device: torch.device) -> bool:
    """What `compile: auto` means: on CUDA under Linux, where Triton is."""
    if config.compile != "auto":
        return config.compile
    return device.type == "cuda" and sys.platform == "linux"


def keeps_memory(config: Config, device: torch.device) -> bool:
    """What `keep_memory: auto` means: on the CPU, where updates take their memory from the system."""
    return device.type == "cpu" if config.keep_memory == "auto" else config.keep_memory


# --- The run -------------------------------------------------------------------------------------------


class Diverged(UserError):
    """Too many updates in a row had a gradient that is not finite."""


@contextlib.contextmanager
def memory_explained(on_gpu: str = LOWER_ON_GPU, in_ram: str = LOWER_IN_RAM) -> Iterator[None]:
    """Within, memory that is not there is a UserError, which names the options that lower the need."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in GPU_FULL):
            where, advice = "The GPU is full", on_gpu
        elif isinstance(error, MemoryError) or CPU_FULL in str(error):
            where, advice = "The RAM is full", in_ram
        else:
            raise
        reason = first_line(error).rstrip(".")
        traceback.clear_frames(error.__traceback__)  # what an update held is needed for saving
        raise UserError(f"{where} ({reason}). {advice}") from error


class Run:
    """Everything that a run consists of, and the counters that tell where it is.

    `step` counts env steps (action repeat included), `transitions` stored steps that are not is_first. Of
    several learners each has a run with a share of envs, replay and batch; what they count is of all.
    """

    def __init__(
        self,
        config: Config,
        logdir: Path,
        checkpoint: dict | None = None,
        resume: bool = False,
        notes: Sequence[str] = (),
        ranks: Ranks | None = None,
        source: Path | None = None,
    ):
        """`checkpoint` is gone on with if `resume`, else only its weights and optimiser are taken, or what
        `transfer` names.

        It was read from the file `source`. `notes` are lines that the log begins with. Raises UserError; what
        can be wrong with the command is found before anything is written.
        """
        self.config, self.logdir, self.ranks = config, logdir, ranks or Ranks()
        self.source = source
        if config.deterministic:
            tools.enable_determinism()
        if config.threads:
            torch.set_num_threads(config.threads)
        elif self.ranks.size > 1:  # which share the cores of their machine
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // self.ranks.local_size))
        tools.seed_everything(config.seed, *self.ranks.names())
        self.device = choose_device(distributed.place(config.device, config.parallel, count_gpus()))
        check_shares(config, self.ranks)
        self.batch_size = self.ranks.share(config.batch_size, "batch_size")
        self.step = self.transitions = self.episodes = self.evaluations = 0
        self.streak = self.timed_updates = 0
        self.eval_envs: VecEnv | None = None
        self._noted: set[str] = set()
        self.failure = ""  # what ends the run as soon as all learners are between two steps
        self.due = 0  # updates to do in this step
        self.sampler = ThreadPoolExecutor(1, "sampler")
        self.next_batch: Future | None = None
        self.last_batch: Arrays | None = None
        self.timer = Timer()
        self._parts = contextlib.ExitStack()  # what `close` has to close
        try:
            self._build(checkpoint, resume, notes)
        except BaseException:
            self.close()
            raise

    def _build(self, checkpoint: dict | None, resume: bool, notes: Sequence[str]) -> None:
        config, saved = self.config, checkpoint if resume else None
        wandb_id = logged = capacity = None
        if saved:
            with tools.content_of(self.source):
                wandb_id, logged = saved["logger"]["wandb"], int(saved["every"]["log"]["last"])
                capacity = int(saved["capacity"])
        self.envs = self._make_envs("train")
        act_space = self.envs.act_space
        advised, defaults = advice_spaces(config, act_space)
        obs_space = self.envs.obs_space
        self.agent = Dreamer(obs_space, act_space, config, self.device, self.ranks)
        if checkpoint:
            with tools.content_of(self.source):
                agent = checkpoint["agent"]
                if config.transfer and not resume:
                    notes = [*notes, *self.agent.transfer(agent, config.transfer)]
                else:
                    notes = [*notes, *self.agent.load_state_dict(agent, resume=resume)]
        stored = obs_space | act_space | advised
        plan = self._plan_replay(stored, capacity)
        if config.llm.enabled:
            captioner = self.agent.guide.captioner
            advisor, more = make_advisor(config, captioner, len(self.envs), self.logdir, self.ranks.size)
            self._parts.callback(advisor.close)
            notes = [*notes, *more]
        self.prefill = Random(act_space, numpy_rng(config.seed, "prefill", *self.ranks.names()))
        self.stats = EpisodeStats(len(self.envs), config.action_repeat)
        self.success = SuccessRates(config.task.partition("_")[0])
        self.coach = NoCoach()
        every = {"log": config.log_every, "eval": config.eval_every, "save": config.save_every}
        self.every = {name: tools.Every(steps) for name, steps in every.items()}
        self.ratio = tools.Ratio(config.train_ratio / (config.batch_size * config.batch_length))

        self.logger = self._make_logger(logged, wandb_id)
        self._parts.callback(self.logger.close)
        self.print = self.logger.print
        for line in [self._about(), *notes, plan.line]:
            self.print(line)
        if self.agent.unseen:
            self.print(
                f"Not encoded, so the agent does not see: {', '.join(self.agent.unseen)} "
                "(no pattern of --encoder.*_keys fits)"
            )
        self.replay = self._make_replay(stored, plan, defaults)
        if config.llm.enabled:
            parts = advisor, self.agent, self.replay, config, self.logdir, self.timer, self.ranks
            self.coach = Coach(*parts)
            self._parts.callback(self._end_advice, advisor)  # before the logger is closed
        # Not earlier: the ring's memory is to be taken as it fills.
        if keeps_memory(config, self.device) and tools.keep_freed_memory():
            self.print("Freed memory is kept for the next update (--keep_memory False gives it back)")
        if saved:
            with tools.content_of(self.source):
                self._resume(saved)
        else:
            self._start()
        self._print_notes(self.envs)
        if self.ranks.leads:
            config.save(self.logdir / "config.yaml")

    def _make_logger(self, logged: int | None, wandb_id: str | None) -> Logger:
        """Who tells of the run: the first learner; what was told after the step `logged` is told again."""
        config = self.config
        if not self.ranks.leads:
            return Collector()
        wandb = None
        if config.wandb.enabled:
            wandb = WandbRun(self.logdir, config.wandb.project, config.to_dict(), wandb_id)
        steps, fps = config.steps, config.video_fps
        return Logger(self.logdir, total_steps=steps, fps=fps, resume_step=logged, wandb=wandb)

    def _about(self) -> str:
        """What runs here, in a line."""
        config, learners = self.config, self.ranks.size
        shared = f", shared by {learners} learners" if learners > 1 else ""
        return (
            f"{config.task} on {device_name(self.device)} in {precision(config, self.device)}: "
            f"{self.agent.parameters():,} parameters{shared}; presets {', '.join(config.presets) or 'none'}"
        )

    def _make_envs(self, mode: str) -> VecEnv:
        options = self.config.envs
        video = mode == "eval" and self.config.eval_videos
        amount, first = options.eval_amount, 0
        if mode == "train":
            amount = self.ranks.share(options.amount, "envs.amount")
            first = self.ranks.rank * amount
        make = functools.partial(make_env, self.config, mode, video=video, first=first)
        envs = make_vec(
            make, amount, options.parallel,
            timeout=options.timeout, max_restarts=options.max_restarts, ray_address=options.ray_address,
        )  # fmt: skip
        self._parts.callback(envs.close)
        return envs

    def _end_advice(self, advisor: Advisor) -> None:
        """Some of what the adviser has to say comes at its end, as what is wrong with the cache's file."""
        advisor.close()
        self._print_notes()

    def _print_notes(self, envs: VecEnv | None = None) -> None:
        """Tell what the coach and the envs have to say of themselves, each line once."""
        for line in [*(envs.notes() if envs else []), *self.coach.notes()]:
            self._note(line)

    def _note(self, line: str) -> None:
        """Tell a line, once, that perhaps only this learner has to tell."""
        if line not in self._noted:
            self._noted.add(line)
            self.logger.note(line)

    def _gather_notes(self) -> None:
        """Let the first learner tell what the others have to say, and it has not said itself."""
        for rank, lines in enumerate(self.ranks.collect(self.logger.take_notes())):
            for line in lines:
                if line not in self._noted:
                    self._noted.add(line)
                    self.print(f"Learner {rank}: {line}")

    def _plan_replay(self, spaces: Mapping[str, gymnasium.Space], chosen: int | None) -> replays.Plan:
        config, rssm = self.config, self.config.rssm
        layout = replays.ring_layout(spaces, rssm.deter, rssm.stoch, rssm.classes)
        window = config.batch_length + config.replay_context
        capacity = config.replay.capacity
        if chosen and capacity == "auto":  # what was chosen once stays: the free memory differs each time
            capacity = chosen
        backend, sampler = config.replay.backend, config.replay.sampler
        here = self.ranks.local_size  # learners that share this machine's memory
        if capacity != "auto":
            capacity = int(capacity) * here // self.ranks.size
        plan = replays.plan(
            layout,
            len(self.envs) * here,
            window,
            capacity,
            backend,
            self._own(self.logdir / REPLAY_RING),
            sampler,
        )
        return plan._replace(capacity=self.ranks.tell(plan.capacity // here))

    def _own(self, folder: Path) -> Path:
        """The folder itself for the first learner, and one in it for each other."""
        return folder if self.ranks.leads else folder / RANK_FOLDER.format(self.ranks.rank)

    def _make_replay(
        self, spaces: Mapping[str, gymnasium.Space], plan: replays.Plan, defaults: Mapping[str, float]
    ) -> Replay:
        config, rssm, c = self.config, self.config.rssm, self.config.replay
        folder = Path(config.traindir) if config.traindir else self.logdir / "train_eps"
        if not self.ranks.leads:
            self.ranks.wait()  # until the first has cleared what a kill has left, in folders of others too
        replay = Replay(
            spaces, len(self.envs), plan.capacity, config.batch_length, config.replay_context,
            derive_seed(config.seed, *self.ranks.names()) if self.ranks.rank else config.seed,
            deter_size=rssm.deter, stoch_size=rssm.stoch, classes=rssm.classes, backend=plan.backend,
            folder=self._own(self.logdir / REPLAY_RING), sampler=c.sampler, online=c.online,
            curious={k.removeprefix("curious_"): v for k, v in c.items() if k.startswith("curious_")},
            writer=EpisodeWriter(folder, spaces, len(self.envs), c.keep_steps), defaults=defaults,
        )  # fmt: skip
        self._parts.callback(replay.close)
        self._parts.callback(self.sampler.shutdown)  # before the replay that it reads is closed
        if self.ranks.leads:
            self.ranks.wait()
        self.ranks.wait()  # until all have cleared what a kill has left, and before anybody writes
        return replay

    def _start(self) -> None:
        """Begin a new run; episodes that are already in the training folder are learned from and counted."""
        loaded = self.replay.load_episodes(self.ranks.rank, self.ranks.size)
        for line in loaded.lines:
            self._note(line)
        steps, self.transitions = self.ranks.total(loaded.steps, loaded.transitions)
        if steps:
            self.print(f"Loaded {steps:,} steps from {self.replay.writer.folder}")
        self.step = self.transitions * self.config.action_repeat
        self.episodes = steps - self.transitions
        self._reset_envs(self.episodes)

    def _reset_envs(self, episode: int) -> None:
        """Begin a new episode in every env, with a number, and so a seed, that no env has had yet."""
        self.obs = self.envs.reset(episode)
        self.state = self.agent.initial_state(len(self.envs))

    def close(self) -> None:
        """Give everything back; the files stay."""
        self._parts.close()

    # --- Checkpoints -----------------------------------------------------------------------------------

    def save(self, *, clean: bool, failed: bool = False) -> None:
        """Write a checkpoint of this moment, between two steps; with `clean`, all that exact resume needs.

        If the envs have `failed`, their open episodes end here: a resumed run starts new ones.
        """
        if self.next_batch:
            wait([self.next_batch])  # of a step that failed: it reads the replay
        self._print_notes()  # the coach's are in no checkpoint; the envs may be closed
        self._gather_notes()
        place = self._replay_state(self.step)
        replay = self.replay.save(self._own(place), latents=clean)
        own = self._own_state_dict(replay, None if failed else self.envs.state())
        state = self._state_dict(own)
        if self.ranks.leads:
            tools.save_checkpoint(self.logdir, state, self.step, self.config.keep_checkpoints)
            for folder in place.parent.iterdir():
                if not (self.logdir / tools.CHECKPOINTS / f"{folder.name}.pt").exists():
                    shutil.rmtree(folder)
                elif folder != place:
                    for latents in folder.rglob("latents.npz"):
                        latents.unlink()  # large, and of use to the last stop only
        self.ranks.wait()  # until the checkpoint is there that the older files of this step do not belong to
        replays.keep_moment(self._own(place), replay["moment"])
        self.print(f"Saved {self.logdir / 'latest.pt'} at step {self.step:,}")
        self.ranks.wait()

    def _replay_state(self, step: int) -> Path:
        """Folder of what the replay keeps beside the checkpoint of an env step."""
        return self.logdir / REPLAY_STATE / tools.checkpoint_path(self.logdir, step).stem

    def save_after_failure(self, *, failed: bool = True) -> None:
        """Keep what was collected when an env, the disk or the memory failed, of this learner or another."""
        try:
            with memory_explained():
                self.save(clean=True, failed=failed)
        except UserError as error:
            self.print(f"The steps since the last checkpoint could not be saved: {error}")

    def _own_state_dict(self, replay: dict, envs: list[dict] | None) -> dict:
        """What each learner has of its own."""
        return {
            "acting": {k: v.cpu() for k, v in self.state.items()},
            "obs": _tensors(self.obs),
            "envs": envs and [{**state, "actions": _tensors(state["actions"])} for state in envs],
            "prefill": self.prefill.rng.bit_generator.state,
            "replay": replay,
            "stats": self.stats.state_dict(),
            "coach": self.coach.state_dict(),
            "rng": tools.rng_state(),
        }

    def _state_dict(self, own: dict) -> dict:
        """The checkpoint. What the learners beside the first have of their own they write beside it."""
        replay = own["replay"]
        told = {name: getattr(self, name).state_dict() for name in ("logger", "success")}
        told |= {"moment": replay["moment"], "open": list(replay["open"].values())}
        told |= {"next_episode": self.envs.next_episode}
        told = self.ranks.collect(told)
        moments = [each["moment"] for each in told]
        if not self.ranks.leads:
            path = self._own_path(self.ranks.rank, moments)
            tools.save_tensors(path, own | {"agent": self.agent.own_state_dict()})
        self.ranks.wait()  # a checkpoint is there when all that belongs to it is there
        if self.ranks.size > 1:
            replay |= {"newest": max(moments), "opened": [name for each in told for name in each["open"]]}
        return {
            "config": self.config.to_yaml(),
            "step": self.step,
            "transitions": self.transitions,
            "episodes": self.episodes,
            "evaluations": self.evaluations,
            "next_episode": max(each["next_episode"] for each in told),
            "moments": moments,
            "agent": self.agent.state_dict(),
            "capacity": self.replay.n_envs * self.replay.rows * self.ranks.size,
            "logger": merged_logs([each["logger"] for each in told]),
            "success": merged_successes([each["success"] for each in told]),
            "every": {name: clock.state_dict() for name, clock in self.every.items()},
            "ratio": self.ratio.state_dict(),
            **own,
        }

    def _own_path(self, rank: int, moments: Sequence[str]) -> Path:
        """The file of a learner's own state, beside what its replay saved at its moment of `moments`."""
        return self._replay_state(self.step) / RANK_FOLDER.format(rank) / moments[rank] / OWN_STATE

    def _resume(self, saved: dict) -> None:
        """Go on from a checkpoint of this run, at the very moment at which it was written."""
        self.step, self.transitions = saved["step"], int(saved["transitions"])
        self.episodes, self.evaluations = int(saved["episodes"]), int(saved["evaluations"])
        for name, clock in self.every.items():
            clock.load_state_dict(saved["every"][name])
        self.ratio.load_state_dict(saved["ratio"])
        if self.ranks.leads:  # what had been counted by all until then
            self.logger.load_state_dict(saved["logger"])
            self.success.load_state_dict(saved["success"])
        saved.setdefault("moments", [saved["replay"]["moment"]])  # from before there were several learners
        if len(saved["moments"]) == self.ranks.size:
            own = saved if self.ranks.leads else self._read_own(saved, self.ranks.rank)
            loaded = self._load_replay(own)
        else:
            own = saved if self.ranks.leads else None
            loaded = self._divide_replay(saved)
        for line in loaded.lines:
            self._note(line)
        if own:
            self.prefill.rng.bit_generator.state = own["prefill"]
            if own.get("coach"):
                self.coach.load_state_dict(own["coach"], self.step, loaded.exact)
        if loaded.exact and self._restore_envs(own):
            self.stats.load_state_dict(own["stats"])
            self.state = self.agent.acting_state(own["acting"], len(self.envs))
        else:
            self._note("The open episodes end here, as they cannot be gone on with; the envs start new ones.")
            self._reset_envs(saved["next_episode"])
        if own:
            tools.set_rng_state(own["rng"])  # nothing may draw after it
        steps = self.ranks.total(loaded.steps)[0]
        self.print(f"Resumed at step {self.step:,} with {steps:,} steps in the replay")

    def _read_own(self, saved: dict, rank: int) -> dict | None:
        """What a learner beside the first wrote of its own with the checkpoint; None if it is not there."""
        try:
            return tools.load_tensors(self._own_path(rank, saved["moments"]))
        except (OSError, tools.BrokenCheckpoint):
            return None

    def _load_replay(self, own: dict | None) -> replays.Loaded:
        """This learner's replay as it was; the first sets aside what the checkpoint does not know."""
        if not self.ranks.leads:
            self.ranks.wait()
        if own:
            loaded = self.replay.load(
                own["replay"], self._own(self._replay_state(self.step)), self.ranks.leads
            )
            if not self.ranks.leads:
                self.agent.load_own_state_dict(own["agent"])
        else:
            loaded = self.replay.load_episodes(self.ranks.rank, self.ranks.size)
        if self.ranks.leads:
            self.ranks.wait()
        if self.ranks.size > 1 and not self.ranks.any(loaded.exact):  # each has taken what is of all
            loaded = self._part_of_episodes(loaded.lines)
        return loaded

    def _part_of_episodes(self, lines: Sequence[str]) -> replays.Loaded:
        """The episodes that are this learner's, where all look at the same files."""
        loaded = self.replay.load_episodes(self.ranks.rank, self.ranks.size)
        return loaded._replace(lines=[*lines, *loaded.lines])

    def _divide_replay(self, saved: dict) -> replays.Loaded:
        """The episodes of a run of another number of learners, divided over those of today."""
        lines = []
        if self.ranks.leads:
            place = self._replay_state(self.step)
            now, before = self.ranks.size, len(saved["moments"])
            lines = [f"The run had {before} learners and now has {now}: the replay is divided anew."]
            lines += self.replay.release(saved["replay"], place)
            for rank in range(1, before):
                if own := self._read_own(saved, rank):
                    self.replay.release(own["replay"], place / RANK_FOLDER.format(rank), tidy=False)
        self.ranks.wait()
        return self._part_of_episodes(lines)

    def _restore_envs(self, saved: dict) -> bool:
        """Play the open episodes again. False if they are not what they were."""
        if not saved["envs"]:
            return False
        try:
            self.obs = self.envs.restore([{**s, "actions": _arrays(s["actions"])} for s in saved["envs"]])
        except UserError as error:  # an env that does not repeat itself may not take these actions
            self._note(str(error))
            self.envs = self._make_envs("train")
            return False
        before = _arrays(saved["obs"])
        return before.keys() == self.obs.keys() and all(
            np.array_equal(before[key], value) for key, value in self.obs.items()
        )

    # --- What happens in the loop ----------------------------------------------------------------------

    def interact(self) -> None:
        """One step in each training env: act, store, count, and see what comes of it."""
        until = self.config.expl_until
        self.agent.explore(not until or self.step < until)
        advice, plans = self.coach.before(self.obs, self.step)
        obs = {**self.obs, **advice}
        if self.step < self.config.prefill:
            action, latents = self.prefill.act(len(self.envs)), {}
        else:
            with self.timer("policy"):
                rng = self.agent.rngs["act"]
                action, self.state, latents = self.agent.act(obs, self.state, rng, explore=True, plans=plans)
        with self.timer("replay"):
            self.replay.add({k: v for k, v in {**obs, **action, **latents}.items() if k[:4] != "log_"})
        self.coach.after(obs, self.state, self.step)
        self._count(obs)
        self._plan_updates()
        with self.timer("env"), self._failing_together():
            self.obs = self.envs.step(action)

    @contextlib.contextmanager
    def _failing_together(self) -> Iterator[None]:
        """Within, what fails ends a run of several learners not before all are between two steps.

        Only there can all save the same moment. The learner that failed does its part in the updates first.
        """
        try:
            yield
        except UserError as error:
            if self.ranks.size == 1:
                raise
            self.failure = f"Learner {self.ranks.rank}: {error}"

    def _count(self, obs: Arrays) -> None:
        """Count what was stored, and log the episodes that it ends."""
        first = int(obs["is_first"].sum())
        first, moved = self.ranks.total(first, len(self.envs) - first)
        self.episodes += first
        self.transitions += moved
        self.step += moved * self.config.action_repeat
        for episode in self.stats.add(obs):
            self.success.add(episode)
            metrics = {f"env/episode_{name}": episode[name] for name in ("return", "length")}
            extra = {f"env/{k[4:]}": v for k, v in episode.items() if k.startswith("log_")}
            self.logger.add(metrics | {k: v for k, v in extra.items() if "achievement" not in k})

    def _plan_updates(self) -> None:
        """See how many updates `train_ratio` asks for; the first batch is drawn while the envs step."""
        self.due = 0
        if self.step < self.config.prefill:
            return
        due = self.ratio(self.transitions)
        if not self.ranks.any(not self.replay.can_sample(self.batch_size)):  # else it is not owed later
            self.due = due
        if self.due:
            self._draw()

    def _draw(self) -> None:
        """Let the next batch be drawn and brought to the device, beside whatever happens meanwhile."""

        items = self.coach.items()

        def draw() -> tuple[Arrays, Arrays, dict[str, Tensor]]:
            batch = self.replay.sample(self.batch_size)
            where = batch.pop("where")
            return batch, where, self.agent.upload({**batch, **items()})

        self.next_batch = self.sampler.submit(draw)

    def learn(self) -> None:
        """The updates that are due."""
        for left in reversed(range(self.due)):
            with self.timer("replay"):
                batch, where, data = self.next_batch.result()
            if left:
                self._draw()
            with self.timer("train"):
                metrics, kept = self.agent.train(data)
            self.logger.add(metrics)
            self.last_batch = batch
            self._estimate()
            # The next batch is drawn before the latents of this one change, however long that takes.
            wait([self.next_batch])
            if kept is None:
                self._count_nonfinite(batch)
                continue
            self.streak = 0
            with self.timer("replay"):
                self.replay.update_latents(where, kept["deter"], kept["stoch"])
                self.replay.update_priorities(where, kept["loss"])

    def _estimate(self) -> None:
        """After the first updates, one line says how long the run will take."""
        self.timed_updates += 1
        if self.timed_updates == 1:
            self.first_update = time.perf_counter()
        elif self.timed_updates == ESTIMATE_UPDATES:
            since = self.first_update
            each = (time.perf_counter() - since) / (
                ESTIMATE_UPDATES - 1
            )  # its share of the env steps included
            per_step = float(self.ratio.ratio) / self.config.action_repeat
            hours = each * per_step * (self.config.steps - self.step) / 3600
            self.print(
                f"About {hours:.1f} hours to go at {each:.2f} seconds per update (evaluation not included)"
            )

    def _count_nonfinite(self, batch: Arrays) -> None:
        """A streak of skipped updates ends the run; the last good checkpoint stays as it is."""
        self.streak += 1
        if self.streak < self.config.max_nonfinite:
            return
        path = self.logdir / "diagnosis.pt"
        diagnosis = {"step": self.step, "batch": _tensors(batch), "agent": self.agent.state_dict()}
        if self.ranks.leads:
            tools.save_tensors(path, diagnosis)
        raise Diverged(
            f"The gradient was not finite in {self.streak} updates in a row, so the run stops. The batch and "
            f"the weights are in {path}. Resume with a lower --opt.lr; the last checkpoint is untouched."
        )

    def evaluate(self, stop: Sequence[int] = ()) -> bool:
        """Full episodes in the evaluation envs: returns, videos and episode files.

        False if it was stopped in between; then nothing is kept of it, and it can be done anew. Other
        learners wait for the first.
        """
        done = False
        if self.ranks.leads:
            with self._failing_together():
                done = self._evaluate(stop)
        done = self.ranks.tell(done)
        self.evaluations += done
        self.coach.copy_evaluation(self.ranks)
        return done

    def _evaluate(self, stop: Sequence[int]) -> bool:
        config = self.config
        if self.eval_envs is None:
            self.eval_envs = self._make_envs("eval")
            self._print_notes(self.eval_envs)
        share = config.eval_episodes // config.envs.eval_amount
        rng = tools.torch_rng(config.seed, "eval", self.evaluations, device=self.device)
        first = self.evaluations * share  # each evaluation counts other episodes, with seeds of their own
        done: list[EvalEpisode] = []
        advised = []
        with self.timer("eval"):
            curiosity = self.agent.curiosity
            for episode in play_episodes(self.agent, self.eval_envs, share, rng, first, curiosity):
                if stop:
                    return False
                done.append(episode)
            if self.agent.guide.weighs():  # the same worlds once more, through the prior
                rng = tools.torch_rng(config.seed, "eval_advised", self.evaluations, device=self.device)
                follower = AdvisedAgent(self.agent)
                for episode in play_episodes(follower, self.eval_envs, share, rng, first):
                    if stop:
                        return False
                    advised.append(episode)
            self._write_eval_episodes(done)
            if config.eval_videos:
                self._write_eval_videos(done)
            self.coach.evaluated([episode.steps for episode in done])
        for episode in advised:
            length = episode.length * config.action_repeat
            self.logger.add({"eval_advised/episode_return": episode.score})
            self.logger.add({"eval_advised/episode_length": length})
        for episode in done:
            length = episode.length * config.action_repeat
            self.logger.add({"eval/episode_return": episode.score, "eval/episode_length": length})
            self.logger.add({f"eval/{key[4:]}": share for key, share in episode.shares.items()})
        return True

    def _write_eval_episodes(self, done: "list[EvalEpisode]") -> None:
        folder = Path(self.config.evaldir) if self.config.evaldir else self.logdir / "eval_eps"
        spaces = self.eval_envs.obs_space | self.eval_envs.act_space
        with contextlib.closing(EpisodeWriter(folder, spaces, 1)) as writer:
            for episode in done:
                for t in range(episode.length + 1):
                    writer.add({key: episode.steps[key][t : t + 1] for key in spaces})

    def _write_eval_videos(self, done: "list[EvalEpisode]") -> None:
        config = self.config
        heard = audio.waveform_keys(self.eval_envs.obs_space, config)
        for index, episode in enumerate(done):
            write_video(self.logdir / "videos" / f"eval_{self.step}_{index}.mp4", episode, config, heard)
        if done[0].frames is not None:
            frames = shown(done[0], config.frame_stack)
            self.logger.video("eval_policy", frames[: config.video_frames], self.step)
        if config.video_pred_log and self.last_batch is not None:
            for key, frames in self.agent.report(self.last_batch).items():
                name = "train_openl" if key == "image" else f"train_openl_{key}"
                self.logger.video(name, newest(frames, config.frame_stack), self.step)

    def log(self) -> None:
        """Write what was collected since the last time, by all learners."""
        size = self.ranks.total(self.replay.size)[0]
        self.logger.add({"replay/size": size, "opt/updates": self.agent.updates})
        advice = self.coach.metrics()
        counted = {name: advice.pop(name) for name in list(advice) if is_count(name)}
        self.logger.add(advice | self.timer.shares())
        told = self.ranks.collect((self.logger.state_dict(), self.success.state_dict(), counted))
        logs, successes, counts = zip(*told, strict=True)
        if self.ranks.size > 1:
            self.logger.load_state_dict(merged_logs(logs))
        for name in dict.fromkeys(name for each in counts for name in each):
            self.logger.add({name: sum(each.get(name, 0.0) for each in counts)})
        success = SuccessRates(self.config.task.partition("_")[0])
        success.load_state_dict(merged_successes(successes))
        self.logger.add(success.metrics())
        self.logger.write(self.step)
        self._print_notes(self.envs)
        self._gather_notes()


class AdvisedAgent:
    """The agent behind `play_episodes`' interface, seen through the prior: its actor as it is in training."""

    def __init__(self, agent: Dreamer):
        self.initial_state = agent.initial_state
        self.act = functools.partial(agent.act, advised=True)


@dataclass
class EvalEpisode:
    """One finished episode as arrays [L, ...] by key, actions included, from the reset on.

    `intrinsic` [L] is the reward that a curious agent expected at each step. `views` [L] say why it acted as
    it did, where somebody asked.
    """

    steps: Arrays
    intrinsic: np.ndarray | None = None
    views: Sequence[dict] = ()

    @property
    def score(self) -> float:
        """The return: the sum of rewards."""
        return float(self.steps["reward"].astype(np.float64).sum())

    @property
    def length(self) -> int:
        """Policy steps."""
        return len(self.steps["reward"]) - 1

    @property
    def shares(self) -> dict[str, float]:
        """As `log_*_share`: the share of the steps at which a `log_*` scalar was above 0 (no achievement)."""
        logged = {k: v for k, v in self.steps.items() if k.startswith("log_") and v.ndim == 1}
        return {f"{k}_share": float((v[1:] > 0).mean()) for k, v in logged.items() if ACHIEVEMENT not in k}

    @property
    def frames(self) -> np.ndarray | None:
        """What it looked like, uint8 [L, H, W, C]: the key `image`, else the first that is one."""
        images = sorted(
            (k != "image", k) for k, v in self.steps.items() if v.dtype == np.uint8 and v.ndim == 4
        )
        return self.steps[images[0][1]] if images else None


def newest(frames: np.ndarray, stack: int) -> np.ndarray:
    """The newest of `stack` images that lie along the channels: [..., C] -> [..., C / stack]."""
    return frames[..., -(frames.shape[-1] // stack) :]


def shown(episode: EvalEpisode, stack: int) -> np.ndarray:
    """The newest of `stack` images of each step, over a strip of intrinsic rewards where there are any."""
    frames = newest(episode.frames, stack)
    if episode.intrinsic is not None:
        frames = add_heat_strip(frames, episode.intrinsic)
    return frames


def write_video(path: Path, episode: EvalEpisode, config: Config, heard: Sequence[str]) -> list[Path]:
    """Write what an episode looked like to `path`, an mp4, and what it sounded like to the .wav beside it.

    `heard` are the keys of waveforms, of which the first is taken. The mp4 has the sound too, and then runs
    at its pace: a step lasts as long as its waveform. What an episode lacks is not written. Returns the
    files.
    """
    frames, fps, files = episode.frames, config.video_fps, []
    sound, rate = None, config.audio.sample_rate
    if heard:
        sound = audio.track(episode.steps[heard[0]])
        fps = rate * (episode.length + 1) / len(sound)
        files.append(path.with_suffix(".wav"))
        write_wav(files[-1], sound, rate)
    if frames is not None:
        files.append(path)
        write_mp4(path, shown(episode, config.frame_stack), fps, sound, rate)
    return files


def play_episodes(
    agent: Dreamer,
    envs: VecEnv,
    share: int,
    generator: torch.Generator,
    first: int = 0,
    curiosity: Callable[[dict[str, Tensor]], np.ndarray | None] = lambda state: None,
    explain: Callable[[Arrays, dict[str, Tensor]], Sequence[dict]] = lambda obs, state: (),
) -> Iterator[EvalEpisode]:
    """Play `share` full episodes in each env, from episode number `first` on; yields them as they finish.

    Each env counts the same number, so that envs whose episodes are short do not weigh more. `agent` is
    anything with the agent's `initial_state` and `act`. `curiosity` tells the intrinsic rewards [n] of the
    state that `act` returns, and `explain` a view [n] of observations and that state.
    """
    amount = len(envs)
    obs, state = envs.reset(first), agent.initial_state(amount)
    running: list[list[Arrays]] = [[] for _ in range(amount)]
    rewards: list[list[float]] = [[] for _ in range(amount)]  # intrinsic ones
    views: list[list[dict]] = [[] for _ in range(amount)]
    left = [share] * amount
    while any(left):
        action, state, _ = agent.act(obs, state, generator)
        intrinsic, seen = curiosity(state), explain(obs, state)
        for index, steps in enumerate(running):
            if not left[index]:
                continue
            if obs["is_first"][index]:
                steps.clear()  # the env's worker was restarted: the episode that it broke off does not count
                rewards[index].clear()
                views[index].clear()
            steps.append({key: value[index] for key, value in {**obs, **action}.items()})
            if intrinsic is not None:
                rewards[index].append(intrinsic[index])
            views[index] += seen[index : index + 1]
            if obs["is_last"][index]:
                left[index] -= 1
                arrays = {k: np.stack([s[k] for s in steps]) for k in steps[0]}
                expected = np.array(rewards[index]) if rewards[index] else None
                yield EvalEpisode(arrays, expected, tuple(views[index]))
                steps.clear()
                rewards[index].clear()
                views[index].clear()
        if any(left):
            obs = envs.step(action)


def train(run: Run, stop: Sequence[int] = ()) -> None:
    """The loop. Everything that happens in a run happens here, in this order.

    It ends between two steps when all are done, or soon after `stop` gets an entry or a learner fails. What
    is due then and not done is done first by the resumed run, so it sees the same numbers.
    """
    while not run.ranks.any(stop or run.failure or run.ranks.orphaned()):
        if run.every["eval"].due(run.step) and not run.evaluate(stop):
            break
        run.every["eval"](run.step)
        if run.every["log"](run.step):
            run.log()
        if run.every["save"](run.step):
            run.save(clean=False)
        if run.step >= run.config.steps:
            break
        run.interact()
        run.learn()
        run.logger.progress(run.step)


@dataclass
class Command:
    """What the command line asks for: a new run, or to go on with one."""

    config: Config
    logdir: Path
    checkpoint: dict | None  # that it starts from
    resume: bool  # the checkpoint's run is gone on with
    notes: list[str]  # lines that the log begins with
    source: Path | None  # the file that it was read from
    seen: list[tuple[Path, int]]  # what `saved_in` told before the checkpoint was read


def read_command(argv: list[str]) -> Command:
    """Understand the command line. Raises UserError.

    A logdir with a checkpoint is resumed. `--from_checkpoint` without `--logdir`, or with its own run's,
    resumes the run that the checkpoint belongs to; with a new logdir it starts a new run from its weights
    and optimiser. A file of weights alone belongs to no run, and `--transfer` always begins a new one.
    """
    logdir, source, parts = configs.run_paths(argv)
    home = run_folder(Path(source)) if source and not tools.holds_weights_alone(Path(source)) else None
    own = home and logdir and Path(logdir).resolve() == home.resolve()
    if parts and own:
        raise UserError(
            f"--transfer begins a new run, and {logdir} is the checkpoint's: name another --logdir"
        )
    if own or (home and logdir is None and not parts):
        logdir, resume, origin = home, True, source
    else:
        resume = logdir is not None and bool(tools.find_checkpoints(logdir))
        origin = logdir if resume else source
    before = saved_in(logdir) if logdir else []
    checkpoint, path, notes = tools.load_checkpoint(origin) if origin else (None, None, [])
    saved = checkpoint and Config.from_yaml(checkpoint["config"], f"the config in {path}")
    config = configs.load(argv, has_cuda=cuda_works(), saved=saved)
    changes = configs.resume_changes(saved, config) if resume else []
    notes += [*config.notes, *(f"Changed since the run was saved: {line}" for line in changes)]
    folder = Path(logdir or Path("logdir") / config.task.replace(":", "_") / time.strftime("%Y%m%dT%H%M%S"))
    return Command(config, folder, checkpoint, resume, notes, path, before)


def saved_in(logdir: str | Path) -> list[tuple[Path, int]]:
    """The checkpoints and their times, by which one is told that was written meanwhile."""
    return [(path, path.stat().st_mtime_ns) for path in tools.find_checkpoints(logdir)]


def run_folder(checkpoint: Path) -> Path:
    """The logdir of the run that a checkpoint file, or a folder, belongs to."""
    if os.path.isdir(checkpoint):
        return checkpoint
    return checkpoint.parent.parent if checkpoint.parent.name == tools.CHECKPOINTS else checkpoint.parent


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


def _tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in arrays.items()}


def _arrays(tensors: Mapping[str, Tensor]) -> Arrays:
    return {k: v.numpy() for k, v in tensors.items()}


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says. Returns the exit code: 0, 2 for the user's mistakes, 130, 143."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        command = read_command(argv)
        if command.config.parallel > 1 and not distributed.launched():
            distributed.place(command.config.device, command.config.parallel, count_gpus())
            check_shares(command.config, Ranks(command.config.parallel))
            return distributed.launch(command.config.parallel, [*argv, "--logdir", str(command.logdir)])
        with stop_signals() as stop, memory_explained(), contextlib.closing(join(command.config)) as ranks:
            command.logdir = Path(ranks.tell(str(command.logdir)))
            return run_command(command, stop, ranks)
    except LostRank as error:
        if distributed.LAUNCHER in os.environ:  # it says what happened
            return distributed.LOST
        print(f"error: {error}", file=sys.stderr)
        return 2
    except UserError as error:
        if distributed.has_the_word():  # the others mostly fail in the same way
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def check_shares(config: Config, ranks: Ranks) -> None:
    """Raise UserError for what several learners cannot share."""
    ranks.share(config.batch_size, "batch_size")
    ranks.share(config.envs.amount, "envs.amount")


def join(config: Config) -> Ranks:
    """This process among the learners."""
    device = choose_device(distributed.place(config.device, config.parallel, count_gpus()))
    return distributed.join(device)


def run_command(command: Command, stop: Sequence[int], ranks: Ranks) -> int:
    """Train, and save at the end; the exit code. UserError if another run lives in the logdir."""
    with contextlib.ExitStack() as parts:
        notes = command.notes
        if ranks.leads:
            notes = [*parts.enter_context(RunLock(command.logdir)).notes, *notes]
            if saved_in(command.logdir) != command.seen:
                raise UserError(
                    f"Another run in {command.logdir} has just saved and ended. Start again to go on from it."
                )
        ranks.wait()
        own = command.config, command.logdir, command.checkpoint, command.resume, notes
        run = parts.enter_context(contextlib.closing(Run(*own, ranks, command.source)))
        try:
            with memory_explained():
                train(run, stop)
        except (Diverged, LostRank):
            raise
        except UserError:
            if ranks.size == 1:  # else the others would have to save theirs of the same moment
                run.save_after_failure()
            raise
        if failures := [failure for failure in ranks.collect(run.failure) if failure]:
            run.save_after_failure(failed=bool(run.failure))
            raise UserError(failures[0])
        run.save(clean=True)
        if stop:
            run.print(f"Stopped by {signal.Signals(stop[0]).name}; the same command goes on")
    return 128 + stop[0] if stop else 0


if __name__ == "__main__":
    sys.exit(main())
