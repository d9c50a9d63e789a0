"""Explorers: the actor that explores, and the intrinsic reward that is added to the task's.

An explorer is a class in EXPLORERS. `Greedy` does nothing and is the base class. `Curious` is the base class
of explorers that reward what the world model does not know. Their subclasses define the intrinsic reward of
real transitions and its expectation in imagination. They learn from the world model's states and send no
gradient back.
Letters: B batch, T time, N rows, A actions, F feat, M ensemble members.
"""

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distributions as dists
import networks
from basics import UserError
from models import Data, ImagBehavior, Losses, Metrics, WorldModel, frozen, task_reward
from networks import State, action_classes

FIFO_BATCHES = 16  # what lpm.fifo auto holds
ROWS = 1024  # of an ensemble at a time: its predictions for all imagined states would take gigabytes
SMALLEST_STD = 1e-6  # of ensemble members: its gradient and its logarithm are finite


class Random:
    """Uniformly random actions, for the prefill."""

    def __init__(self, act_space: Mapping[str, gymnasium.Space], rng: np.random.Generator):
        self.act_space = act_space
        self.rng = rng

    def act(self, amount: int) -> dict[str, np.ndarray]:
        """Actions [amount, ...] for `amount` envs: int32 indices, float32 values."""
        out = {}
        for key, space in self.act_space.items():
            if classes := action_classes(space):
                index = [self.rng.integers(n, size=amount, dtype=np.int32) for n in classes]
                index = np.stack(index, -1).reshape(amount, *space.shape)
                out[key] = (index + space.start).astype(np.int32)
            else:  # make_env has scaled its range to [-1, 1]
                values = self.rng.uniform(space.low, space.high, (amount, *space.shape))
                out[key] = values.astype(np.float32)
        return out


# --- Parts ---------------------------------------------------------------------------------------------


class ErrorPredictor(nn.Module):
    """g of LPM: an MLP of four linear layers with ELU, x [..., inputs] -> the expected error [...].

    Always in float32: progress is a small difference of its outputs.
    """

    def __init__(self, inputs: int, units: int):
        super().__init__()
        sizes = [inputs, units, units, units, 1]
        linears = [networks.Linear(i, o) for i, o in zip(sizes[:-1], sizes[1:], strict=True)]
        self.layers = nn.ModuleList(linears)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            for layer in self.layers[:-1]:
                x = F.elu(layer(x))
            return self.layers[-1](x).squeeze(-1)


class ErrorFifo(nn.Module):
    """The last `capacity` transitions, with the prediction errors at the time when they were added.

    `shapes` gives the shape and dtype of each value of a transition. The buffers are part of checkpoints.
    All shapes are fixed and nothing waits for a GPU.
    """

    def __init__(self, capacity: int, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]):
        super().__init__()
        self.capacity, self.names = capacity, list(shapes)
        for name, (shape, dtype) in shapes.items():
            self.register_buffer(name, torch.zeros(capacity, *shape, dtype=dtype))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))  # in total

    @property
    def size(self) -> Tensor:
        return self.pushed.clamp(max=self.capacity)

    @property
    def full(self) -> Tensor:
        return self.pushed >= self.capacity

    @torch.no_grad()
    def push(self, values: Mapping[str, Tensor]) -> None:
        """Add n <= capacity transitions {name: [n, ...]}."""
        rows = len(values[self.names[0]])
        places = (self.pushed + torch.arange(rows, device=self.pushed.device)) % self.capacity
        for name in self.names:
            buffer = getattr(self, name)
            buffer.index_copy_(0, places, values[name].to(buffer.dtype))
        self.pushed += rows

    def sample(self, rows: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        """{name: [rows, ...]}, drawn uniformly with replacement; zeros while it is empty."""
        draws = torch.rand(rows, device=self.pushed.device, generator=generator)
        places = (draws * self.size).long().clamp(max=self.capacity - 1)  # rounding may reach the size
        return {name: getattr(self, name)[places] for name in self.names}


def learning_progress(predicted: Tensor, error: Tensor, *, floor: float, space: str = "log") -> Tensor:
    """The intrinsic reward of LPM (arXiv 2509.25438): the decrease of the error, [...].

    `predicted` is a prediction of log(error + floor), learned from earlier errors. In `log` space progress is
    a log ratio of errors, in `linear` space (the authors' code) their difference.
    """
    if space == "log":
        return predicted - (error + floor).log()
    return predicted.exp() - floor - error  # 0 if the error is as predicted


class Ensemble(nn.Module):
    """M MLPs with ELU, initialised independently: x [N, inputs] -> [N, M, outputs].

    Each layer is one product for all members. `layers` counts the hidden layers.
    """

    def __init__(self, inputs: int, outputs: int, members: int, layers: int, units: int):
        super().__init__()
        self.members, wide = members, members * units
        self.first = networks.Linear(inputs, wide)
        self.rest = nn.ModuleList(
            networks.BlockLinear(wide, members * size, members, fan_in=units)
            for size in [units] * (layers - 1) + [outputs]
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.rest:
            x = layer(F.elu(x))
        return x.unflatten(-1, (self.members, -1))

    def spread(self, x: Tensor) -> Tensor:
        """The `spread` [...] of the members' predictions for x [..., inputs]."""
        rows = x.flatten(0, -2)
        parts = [rows] if torch.is_grad_enabled() else rows.split(ROWS)
        return torch.cat([spread(self(part)) for part in parts]).unflatten(0, x.shape[:-1])


def spread(predictions: Tensor) -> Tensor:
    """Standard deviation over members [N, M, O], averaged over the outputs: [N]."""
    predictions = predictions.float()
    variance = (predictions - predictions.mean(1, keepdim=True)).square().mean(1)
    return variance.clamp(min=SMALLEST_STD**2).sqrt().mean(-1)


class RewardNorm(nn.Module):
    """The running standard deviation of rewards, at least 1, so that dividing by it never amplifies."""

    averages = ("moments",)  # buffers that are means over all learners

    def __init__(self, rate: float = 0.01):
        super().__init__()
        self.rate = rate
        # Running means of 1, x and x^2: the first corrects the bias of the initial zeros.
        self.register_buffer("moments", torch.zeros(3))

    @torch.no_grad()
    def update(self, mean: Tensor, square: Tensor) -> None:
        """Update the running means with the means of x and x^2."""
        new = torch.stack([torch.ones_like(mean), mean, square])
        self.moments.lerp_(torch.where(new.isfinite().all(), new, self.moments), self.rate)

    @property
    def scale(self) -> Tensor:
        mean, square = self.moments[1:] / self.moments[0].clamp(min=1e-30)
        return (square - mean.square()).clamp(min=1).sqrt()


class Uniform:
    """Continuous actions [..., A], uniform in [-1, 1]."""

    def __init__(self, batch: torch.Size):
        self.batch = batch

    def sample(self, noise: Tensor) -> Tensor:
        """From uniform noise [..., A] in [0, 1)."""
        return (2 * noise - 1).expand(*self.batch, -1)


class RandomActor:
    """An `Actor` whose actions are uniformly random."""

    def __init__(self, actions: networks.ActionVector):
        self.parts = []  # the number of classes of each index, or minus the size of continuous actions
        for key, size in actions.sizes.items():
            self.parts += actions.classes[key] or (-size,)
        self.sizes = [abs(part) for part in self.parts]

    def noise(self, *batch: int, generator: torch.Generator) -> networks.PolicyNoise:
        return [
            torch.rand(*batch, 1 if part > 0 else -part, device=generator.device, generator=generator)
            for part in self.parts
        ]

    def __call__(self, feat: Tensor) -> networks.Policy:
        batch = feat.shape[:-1]
        uniform = [
            dists.OneHot(feat.new_zeros(*batch, part)) if part > 0 else Uniform(batch) for part in self.parts
        ]
        return networks.Policy(uniform, self.sizes)


# --- Explorers -----------------------------------------------------------------------------------------


class Greedy(nn.Module):
    """No exploration: the task's actor acts for the task's reward. The base class of all explorers."""

    curious = False  # whether there is an intrinsic reward

    def __init__(self, world_model: WorldModel, config: Mapping):
        super().__init__()

    def param_groups(self) -> list[dict[str, Any]]:
        """The explorer's parameter groups for the optimiser, each from `param_group`."""
        return []

    def actor(self, task: ImagBehavior) -> Any:
        """The actor that acts in training; `task` is the task's actor-critic."""
        return task.actor

    def task_reward(self, feat: Tensor, action: Tensor, reward: Tensor) -> Tensor:
        """The task actor's reward in imagination: a `models.RewardSum`."""
        return task_reward(feat, action, reward)

    def loss(
        self, world_model: WorldModel, post: State, data: Data, generator: torch.Generator
    ) -> tuple[Losses, Metrics, Data]:
        """Its losses (scalars), metrics, and `data` with the reward that the task's critic learns."""
        return {}, {}, data

    def update_slow_critic(self) -> None:
        """Update the slow critic of the explorer's own actor-critic, if it has one."""

    def adopt(self, weights: Mapping[str, Tensor], resume: bool) -> dict[str, Tensor]:
        """The `weights` of a checkpoint's explorer as this explorer loads them.

        Without `resume` they start a new run, perhaps of another task.
        """
        return dict(weights)


class RandomActions(Greedy):
    """Uniformly random actions, from which the task's actor learns."""

    def __init__(self, world_model: WorldModel, config: Mapping):
        super().__init__(world_model, config)
        self.random_actor = RandomActor(world_model.actions)

    def actor(self, task: ImagBehavior) -> RandomActor:
        return self.random_actor


class Curious(Greedy):
    """The base class of explorers with an intrinsic reward, a function of a state and the action in it.

    A subclass defines `models` (its networks), `learn` (their losses, and the intrinsic reward of real
    transitions) and `expected` (that reward in imagination). The sum

        expl_extr_scale * task reward + expl_intr_scale * intrinsic reward / scale

    is maximised by the task's actor-critic (`expl_task_actor: shared`), or by a second one (`separate`).
    """

    curious = True
    normalize = True  # the meaning of expl_normalize auto

    def __init__(self, world_model: WorldModel, config: Mapping):
        super().__init__(world_model, config)
        self.config = config
        rssm = world_model.rssm
        self.inputs = rssm.feat_size + world_model.actions.size
        self.normalized = self.normalize if config.expl_normalize == "auto" else config.expl_normalize
        self.norm = RewardNorm()
        self.shared = config.expl_task_actor == "shared"
        if not self.shared:
            self.behavior = ImagBehavior(rssm.feat_size, world_model.actions, config)

    def models(self) -> list[nn.Module]:
        """Its networks, except actor and critic."""
        raise NotImplementedError

    def learn(
        self, world_model: WorldModel, post: State, data: Data, action: Tensor, generator: torch.Generator
    ) -> tuple[Losses, Metrics, Tensor, Tensor]:
        """Losses of its models, metrics, the intrinsic reward of real transitions [N] and their mask [N].

        post and data [B, T, ...], detached; action [B, T-1, A], taken at each step.
        """
        raise NotImplementedError

    def expected(self, x: Tensor) -> Tensor:
        """The expected intrinsic reward [...] of `state_action` rows x [..., F + A]."""
        raise NotImplementedError

    def param_groups(self) -> list[dict[str, Any]]:
        c = self.config
        groups = [param_group(module, c.model_lr) for module in self.models()]
        if not self.shared:
            own = self.behavior
            groups += [param_group(own.actor, c.actor_lr), param_group(own.critic, c.critic_lr)]
        return groups

    def actor(self, task: ImagBehavior) -> networks.Actor:
        return task.actor if self.shared else self.behavior.actor

    def intrinsic(self, feat: Tensor, action: Tensor) -> Tensor:
        """The expected intrinsic reward [...], scaled, of states [..., F] and actions [..., A]."""
        with frozen(*self.models()):
            reward = self.expected(state_action(feat, action))
        return reward / self.norm.scale if self.normalized else reward

    def reward_sum(self, feat: Tensor, action: Tensor, reward: Tensor) -> Tensor:
        """The sum of both rewards: a `models.RewardSum`. A reward arrives with the state after its action."""
        bonus = self.intrinsic(feat[:, :-1], action)
        return self.config.expl_extr_scale * reward + self.config.expl_intr_scale * F.pad(bonus, (1, 0))

    def task_reward(self, feat: Tensor, action: Tensor, reward: Tensor) -> Tensor:
        return self.reward_sum(feat, action, reward) if self.shared else reward

    def loss(
        self, world_model: WorldModel, post: State, data: Data, generator: torch.Generator
    ) -> tuple[Losses, Metrics, Data]:
        post = {k: v.detach() for k, v in post.items()}
        action = world_model.actions.encode(data)[:, :-1]  # [B, T-1, A]
        losses, metrics, reward, live = self.learn(world_model, post, data, action, generator)
        mean, square = masked_mean(reward, live), masked_mean(reward.square(), live)
        metrics |= {"expl/reward_mean": mean, "expl/reward_std": (square - mean.square()).clamp(min=0).sqrt()}
        if self.normalized:
            self.norm.update(mean, square)
            metrics["expl/reward_scale"] = self.norm.scale
        with torch.no_grad():
            total = self.reward_sum(world_model.rssm.feat(post), action, data["reward"])
            extr = self.config.expl_extr_scale * data["reward"]
            seen = {**data, "reward": torch.where(data["is_first"], extr, total)}
        if self.shared:
            return losses, metrics, seen
        own, own_metrics = self.behavior.loss(world_model, post, seen, generator, self.reward_sum)
        scales = self.config.loss_scales
        losses |= {f"expl_{name}": scales[name] * loss.mean() for name, loss in own.items()}
        metrics |= {f"expl_{name}": value for name, value in own_metrics.items()}
        return losses, metrics, data

    def update_slow_critic(self) -> None:
        if not self.shared:
            self.behavior.update_slow_critic()


def param_group(module: nn.Module, lr: float | None) -> dict[str, Any]:
    """A parameter group for the optimiser; without `lr`, with the optimiser's learning rate."""
    return {"params": list(module.parameters())} | ({} if lr is None else {"lr": lr})


def state_action(feat: Tensor, action: Tensor) -> Tensor:
    """feat [..., F] and action [..., A] as one vector; actions are bounded as in the RSSM."""
    return torch.cat([feat, (action / action.detach().abs().clamp(min=1)).to(feat.dtype)], -1)


def masked_mean(x: Tensor, live: Tensor) -> Tensor:
    """The mean of x where `live`; 0 if `live` is nowhere true."""
    return torch.where(live, x, 0.0).sum() / live.sum().clamp(min=1)


class Plan2Explore(Curious):
    """Rewards the disagreement of an ensemble of next-state models (Plan2Explore, arXiv 2005.05960).

    Its members predict the next `disag_target` from a state and the action taken in it. Noise is no lasting
    reward: in the end all members predict its mean.
    """

    def __init__(self, world_model: WorldModel, config: Mapping):
        super().__init__(world_model, config)
        rssm = world_model.rssm
        sizes = {"stoch": rssm.stoch_size, "deter": rssm.deter, "embed": world_model.encoder.size}
        members, layers, units = config.disag_models, config.disag_layers, config.disag_units
        self.ensemble = Ensemble(self.inputs, sizes[config.disag_target], members, layers, units)

    def models(self) -> list[nn.Module]:
        return [self.ensemble]

    def learn(self, world_model, post, data, action, generator):
        x = state_action(world_model.rssm.feat(post)[:, :-1], action).flatten(0, 1)  # [N, F + A]
        target = post[self.config.disag_target][:, 1:].flatten(0, 1).flatten(1)  # [N, O]
        predictions = self.ensemble(x)  # [N, M, O]
        live = ~data["is_first"][:, 1:].flatten()
        error = (predictions.float() - target[:, None]).square().sum(-1).mean(-1)  # [N]
        losses = {"expl_model": masked_mean(error, live)}
        return losses, {}, self._reward(spread(predictions.detach())), live

    def expected(self, x: Tensor) -> Tensor:
        return self._reward(self.ensemble.spread(x))

    def _reward(self, disagreement: Tensor) -> Tensor:
        return disagreement

    def disagreement(self, feat: Tensor, action: Tensor) -> Tensor:
        """The spread [...] of the ensemble's predictions for states [..., F] and actions [..., A]."""
        return self.ensemble.spread(state_action(feat, action))


class Surprise(Curious):
    """Rewards the prediction error itself: the baseline, which noise attracts for ever.

    The error depends on the next observation, which imagination does not have. So a head learns the reward
    from state and action.
    """

    def __init__(self, world_model: WorldModel, config: Mapping):
        super().__init__(world_model, config)
        if config.lpm.error == "image" and not any(world_model.decoder.keys):
            raise UserError(
                "--lpm.error image measures reconstructed observations, and no pattern of --decoder.*_keys "
                "matches any: use --lpm.error latent or kl"
            )
        self.head = networks.TwoHotHead(self.inputs, config.reward_head)
        # The number of sequences of a batch whose error is measured, and of their transitions.
        self.sequences = max(1, round(config.lpm.share * config.batch_size))
        self.rows = self.sequences * (config.batch_length - 1)

    def models(self) -> list[nn.Module]:
        return [self.head]

    def learn(self, world_model, post, data, action, generator):
        if self.sequences < len(action):
            draws = torch.rand(len(action), device=action.device, generator=generator)
            chosen = draws.topk(self.sequences).indices
            post, data = ({k: v[chosen] for k, v in values.items()} for values in (post, data))
            action = action[chosen]
        error = world_model.prior_error(post, data, self.config.lpm.error)[:, 1:].flatten()  # [N]
        live = ~data["is_first"][:, 1:].flatten()
        state = {k: post[k][:, :-1].flatten(0, 1) for k in ("deter", "stoch")}  # [N, ...]
        action = action.flatten(0, 1)
        losses, metrics, reward = self.real_reward(world_model.rssm, state, action, error, live, generator)
        predicted = self.head(state_action(world_model.rssm.feat(state), action))
        losses["expl_head"] = masked_mean(predicted.loss(reward), live)
        metrics["expl/error"] = masked_mean(error, live)
        metrics["expl/reward_pred"] = masked_mean(predicted.mean.detach(), live)
        return losses, metrics, reward, live

    def real_reward(
        self, rssm: networks.RSSM, state: State, action: Tensor, error: Tensor, live: Tensor,
        generator: torch.Generator,
    ) -> tuple[Losses, Metrics, Tensor]:  # fmt: skip
        """Losses, metrics and reward [N] of real transitions: state [N, ...], action [N, A], error [N]."""
        return {}, {}, error

    def expected(self, x: Tensor) -> Tensor:
        return self.head(x).mean


class LPM(Surprise):
    """Learning Progress Monitoring (Hou, An, Du, arXiv 2509.25438): rewards the decrease of the error.

    `predictor` regresses the log errors of earlier updates, kept in a FIFO, so it represents the earlier
    model. It also learns the level of noise, which brings no progress.
    """

    normalize = False  # dividing by a small deviation would bring back progress that has vanished

    def __init__(self, world_model: WorldModel, config: Mapping):
        super().__init__(world_model, config)
        c, rssm = config.lpm, world_model.rssm
        capacity = FIFO_BATCHES * self.rows if c.fifo == "auto" else c.fifo
        if capacity < self.rows:
            raise UserError(
                f"--lpm.fifo {c.fifo} is smaller than the {self.rows} transitions that each batch adds: "
                f"give at least {self.rows}, or auto for {FIFO_BATCHES} batches"
            )
        self.predictor = ErrorPredictor(self.inputs, c.units)
        latents = torch.uint8 if rssm.classes else torch.float16
        shapes = {"deter": ((rssm.deter,), torch.float16), "stoch": ((rssm.stoch,), latents)}
        shapes |= {"action": ((world_model.actions.size,), torch.float32)}
        shapes |= {"error": ((), torch.float32), "live": ((), torch.bool)}  # error: log(error + error_floor)
        self.fifo = ErrorFifo(capacity, shapes)

    def models(self) -> list[nn.Module]:
        return [*super().models(), self.predictor]

    def param_groups(self) -> list[dict[str, Any]]:
        groups = super().param_groups()
        # No warm-up: until the predictor has learned the level of the errors, that level looks like progress.
        index = self.models().index(self.predictor)
        groups[index] |= {"lr": self.config.lpm.error_lr, "warmup": 0}
        return groups

    def adopt(self, weights: Mapping[str, Tensor], resume: bool) -> dict[str, Tensor]:
        own = {f"fifo.{name}": value for name, value in self.fifo.state_dict().items()}
        # Errors of another run, or for another batch size, say nothing about this one.
        keep = resume and all(key in weights and weights[key].shape == own[key].shape for key in own)
        return dict(weights) if keep else {**weights, **own}

    def real_reward(self, rssm, state, action, error, live, generator):
        c = self.config.lpm
        with torch.no_grad():
            predicted = self._predict(rssm, state, action)
            progress = learning_progress(predicted, error, floor=c.error_floor, space=c.space)  # [N]
            reward = torch.where(self.fifo.full, progress, 0.0)
        past = self.fifo.sample(self.rows, generator)
        expected = self._predict(rssm, rssm.unpack(past["deter"], past["stoch"]), past["action"])
        losses = {"expl_model": masked_mean((expected - past["error"]).square(), past["live"])}
        deter, stoch = rssm.pack(state)
        errors = (error + c.error_floor).log()
        # An update with values that are not finite is skipped; later updates must not draw them either.
        known = {"error": errors.nan_to_num(0, 0, 0), "live": live & errors.isfinite()}
        self.fifo.push({"deter": deter.nan_to_num(), "stoch": stoch, "action": action.nan_to_num(), **known})
        metrics = {"expl/error_pred": masked_mean(predicted.exp() - c.error_floor, live)}
        metrics["expl/fifo_full"] = self.fifo.full.float()
        return losses, metrics, reward

    def _predict(self, rssm: networks.RSSM, state: State, action: Tensor) -> Tensor:
        feat = torch.cat([state["deter"], rssm.flat(state["stoch"])], -1)  # not rounded as rssm.feat is
        return self.predictor(state_action(feat, action))


# To add an explorer, add its class here.
EXPLORERS: dict[str, type[Greedy]] = {
    "greedy": Greedy,
    "random": RandomActions,
    "surprise": Surprise,
    "plan2explore": Plan2Explore,
    "lpm": LPM,
}
