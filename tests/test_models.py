"""The parameters that each loss trains, other options, and shortcuts against their plain forms."""

import gymnasium
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import config as configs
import distributions as dists
import models
import networks
from agent import Dreamer
from basics import UserError

DISCRETE = {"action": gymnasium.spaces.Discrete(5)}
CONTINUOUS = {"action": gymnasium.spaces.Box(-1, 1, (3,), np.float32)}
OBS = {
    "image": gymnasium.spaces.Box(0, 255, (64, 64, 3), np.uint8),
    "vector": gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float32),
    "audio": gymnasium.spaces.Box(-np.inf, np.inf, (6,), np.float32),
    "reward": gymnasium.spaces.Box(-np.inf, np.inf, (), np.float32),
    "is_first": gymnasium.spaces.Box(0, 1, (), np.bool_),
    "is_last": gymnasium.spaces.Box(0, 1, (), np.bool_),
    "is_terminal": gymnasium.spaces.Box(0, 1, (), np.bool_),
}
BATCH, LENGTH = 2, 5


def make_agent(*options: str, act_space=DISCRETE) -> Dreamer:
    argv = ["--configs", "debug", "--batch_size", str(BATCH), "--batch_length", str(LENGTH), *options]
    return Dreamer(OBS, act_space, configs.load(argv), torch.device("cpu"))


def make_batch(agent: Dreamer, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    steps = LENGTH + agent.config.replay_context
    shape, rssm = (BATCH, steps), agent.config.rssm
    space = agent.actions.space["action"]
    if isinstance(space, gymnasium.spaces.Discrete):
        action = rng.integers(space.n, size=shape, dtype=np.int32)
    else:
        action = rng.uniform(-1, 1, (*shape, *space.shape)).astype(np.float32)
    stoch = rng.integers(max(1, rssm.classes), size=(*shape, rssm.stoch)).astype(np.uint8)
    return {
        "image": rng.integers(256, size=(*shape, 64, 64, 3), dtype=np.uint8),
        "vector": rng.normal(size=(*shape, 4)).astype(np.float32),
        "audio": rng.normal(size=(*shape, 6)).astype(np.float32),
        "reward": rng.normal(size=shape).astype(np.float32),
        "action": action,
        "is_first": rng.random(shape) < 0.2,
        "is_last": rng.random(shape) < 0.2,
        "is_terminal": rng.random(shape) < 0.1,
        "deter": rng.normal(size=(*shape, rssm.deter)).astype(np.float16),
        "stoch": stoch if rssm.classes else stoch.astype(np.float16),
    }


def losses_of(agent: Dreamer, batch: dict) -> dict[str, torch.Tensor]:
    data = agent.upload(batch)
    post, data = agent.world_model.observe(data, agent.rngs["train"])
    losses, _ = agent.world_model.loss(post, data)
    more, _ = agent.behavior.loss(agent.world_model, post, data, agent.rngs["train"])
    return losses | more


def unsettle(agent: Dreamer) -> None:
    """Give output layers that start at zero some weights, or no gradient would pass through them."""
    torch.manual_seed(1)
    for head in (agent.world_model.reward_head, agent.behavior.critic, agent.behavior.slow_critic):
        torch.nn.init.normal_(head.out.weight, std=0.1)


def trained_modules(agent: Dreamer, loss: torch.Tensor) -> set[str]:
    """The parts of the agent of which at least one parameter gets a gradient from the loss."""
    agent.opt.zero_grad()
    loss.mean().backward(retain_graph=True)
    parts = {**dict(agent.world_model.named_children()), **dict(agent.behavior.named_children())}
    return {
        name
        for name, part in parts.items()
        if any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    }


MODEL = {"encoder", "rssm"}
TRAINS = {
    "image": MODEL | {"decoder"},
    "vector": MODEL | {"decoder"},
    "audio": MODEL | {"decoder"},
    "reward": MODEL | {"reward_head"},
    "cont": MODEL | {"cont_head"},
    "dyn": {"rssm", "encoder"},  # the prior reads deter, which the encoder has shaped
    "rep": MODEL,
    "policy": {"actor"},
    "value": {"critic"},
    "repval": MODEL | {"critic"},
}


@pytest.mark.parametrize("act_space", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])
@pytest.mark.parametrize("gradient", ["reinforce", "dynamics", "both"])
def test_each_loss_trains_what_the_design_says(act_space, gradient):
    agent = make_agent("--imag_gradient", gradient, "--rssm.free_nats", "0", act_space=act_space)
    unsettle(agent)
    losses = losses_of(agent, make_batch(agent))
    assert losses.keys() == TRAINS.keys() == agent.config.loss_scales.keys()
    for name, loss in losses.items():
        assert trained_modules(agent, loss) == TRAINS[name], name


def test_dyn_trains_the_prior_and_rep_the_posterior():
    agent = make_agent("--rssm.free_nats", "0")
    losses = losses_of(agent, make_batch(agent))
    rssm = agent.rssm
    for name, trained, not_trained in (
        ("dyn", rssm.prior_net, [rssm.post_out]),
        ("rep", [rssm.post_out], rssm.prior_net),
    ):
        agent.opt.zero_grad()
        losses[name].mean().backward(retain_graph=True)
        assert trained[-1].weight.grad.abs().sum() > 0
        last = not_trained[-1].weight.grad
        # The posterior of earlier steps reaches deter; that of the last step must not be trained by dyn.
        assert name == "dyn" or last is None or last.abs().sum() == 0


def test_reinforce_and_dynamics_differ_in_the_actors_gradient_and_both_mixes_them():
    grads = {}
    for gradient in ("reinforce", "dynamics", "both"):
        agent = make_agent("--imag_gradient", gradient, "--imag_gradient_mix", "0.25", act_space=CONTINUOUS)
        unsettle(agent)
        loss = losses_of(agent, make_batch(agent))["policy"].mean()
        grads[gradient] = torch.autograd.grad(loss, agent.behavior.actor.outs[0].weight)[0]
    assert not torch.allclose(grads["reinforce"], grads["dynamics"], rtol=0.1)
    mixed = 0.25 * grads["reinforce"] + 0.75 * grads["dynamics"]
    torch.testing.assert_close(grads["both"], mixed, rtol=1e-3, atol=1e-6)


def test_slow_value_target_bootstraps_from_the_slow_critic():
    rets = {}
    for slow in ("True", "False"):
        agent = make_agent("--slow_value_target", slow)
        torch.nn.init.normal_(agent.behavior.slow_critic.out.weight, std=0.1)
        batch = make_batch(agent)
        data = agent.upload(batch)
        post, data = agent.world_model.observe(data, agent.rngs["train"])
        _, metrics = agent.behavior.loss(agent.world_model, post, data, agent.rngs["train"])
        rets[slow] = metrics["imag/value"].item()
    assert rets["False"] == 0.0  # the fast critic starts at exactly zero
    assert rets["True"] != 0.0


def test_value_and_reward_start_at_exactly_zero():
    agent = make_agent()
    feat = torch.randn(7, agent.rssm.feat_size)
    assert torch.equal(agent.behavior.critic(feat).mean, torch.zeros(7))
    assert torch.equal(agent.world_model.reward_head(feat).mean, torch.zeros(7))


@pytest.mark.parametrize(
    "options",
    [
        ("--rssm.classes", "0"),
        ("--reward_head.dist", "symlog_disc", "--critic.dist", "symlog_disc"),
        ("--imag_gradient", "dynamics"),
        ("--imag_gradient", "both"),
        ("--imag_last", "3"),
        ("--replay_context", "0"),
        ("--encoder.strided", "True"),
        ("--discount_lambda", "0"),
        ("--slow_target_update", "2"),
        ("--precision", "bfloat16"),
    ],
    ids=" ".join,
)
def test_an_update_with_this_option_changes_all_weights_and_no_loss_is_broken(options):
    agent = make_agent(*options, "--opt.warmup", "0", "--opt.lr", "1e-3", "--rssm.free_nats", "0")
    unsettle(agent)
    before = {k: v.clone() for k, v in agent.world_model.named_parameters()}
    before |= {f"actor.{k}": v.clone() for k, v in agent.behavior.actor.named_parameters()}
    for seed in range(2):
        metrics, latents = agent.train(make_batch(agent, seed))
        assert all(np.isfinite(float(v)) for v in metrics.values()), metrics
    assert latents["deter"].shape == (BATCH, LENGTH, agent.rssm.deter)
    after = dict(agent.world_model.named_parameters())
    after |= {f"actor.{k}": v for k, v in agent.behavior.actor.named_parameters()}
    same = [k for k, v in before.items() if torch.equal(v, after[k])]
    assert not same, f"not trained: {same}"


def test_gaussian_latents_have_the_closed_form_kl():
    post = dists.Normal(torch.tensor([[0.5, -1.0]]), torch.tensor([[0.7, 2.0]]))
    prior = dists.Normal(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 1.5]]))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(post.mean, post.std), torch.distributions.Normal(prior.mean, prior.std)
    ).sum(-1)
    torch.testing.assert_close(post.kl(prior), expected)
    losses = models.kl_losses(post, prior, free_nats=100.0)
    assert torch.equal(losses["dyn"], torch.tensor([100.0]))


def test_separate_learning_rates_reach_their_part_only():
    agent = make_agent("--actor_lr", "0", "--critic_lr", "0", "--opt.warmup", "0")
    unsettle(agent)
    actor = agent.behavior.actor.outs[0].weight.clone()
    encoder = agent.world_model.encoder.cnn.convs[0].weight.clone()
    agent.train(make_batch(agent))
    assert torch.equal(agent.behavior.actor.outs[0].weight, actor)
    assert not torch.equal(agent.world_model.encoder.cnn.convs[0].weight, encoder)


def test_slow_critic_follows_after_the_step():
    agent = make_agent("--opt.warmup", "0", "--opt.lr", "1e-2", "--slow_target_fraction", "0.5")
    slow = agent.behavior.slow_critic.out.weight.clone()
    agent.train(make_batch(agent))
    fast = agent.behavior.critic.out.weight
    torch.testing.assert_close(agent.behavior.slow_critic.out.weight, 0.5 * slow + 0.5 * fast)


def test_symlog_disc_targets_and_means_are_in_symlog_space():
    bins = torch.linspace(-20, 20, 255)
    target = torch.tensor([-50.0, 0.0, 3.0, 1000.0])
    logits = torch.zeros(4, 255, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        dists.TwoHot(logits, bins, symlog_space=True).loss(target).sum().backward()
        optimizer.step()
    torch.testing.assert_close(
        dists.TwoHot(logits, bins, symlog_space=True).mean, target, rtol=0.02, atol=0.02
    )


def test_an_update_that_is_not_finite_changes_no_weight():
    agent = make_agent("--opt.warmup", "0")
    batch = make_batch(agent)
    agent.train(batch)
    before = {k: v.clone() for part in agent.weights().values() for k, v in part.items()}
    batch["reward"][0, 2] = np.nan
    metrics, kept = agent.train(batch)
    assert metrics["opt/skipped"] and kept is None
    after = {k: v for part in agent.weights().values() for k, v in part.items()}
    assert [k for k, v in before.items() if not torch.equal(v, after[k])] == ["retnorm.range"]
    assert after["retnorm.range"].isfinite().all()


def test_returns_that_are_not_finite_leave_the_return_scale():
    norm = models.ReturnNorm(rate=0.5, limit=1.0, low=5.0, high=95.0)
    norm.update(torch.linspace(0, 10, 101))
    before = norm.range.clone()
    norm.update(torch.full((10,), torch.nan))
    assert torch.equal(norm.range, before)
    torch.testing.assert_close(before, torch.tensor([0.25, 4.75]))


# --- Shortcuts against their plain forms ---------------------------------------------------------------


@pytest.mark.parametrize("strided", [False, True])
def test_phase_form_equals_doubling_and_convolution(strided):
    torch.manual_seed(0)
    conv = networks.UpConv(3, 4, strided)
    torch.nn.init.normal_(conv.bias)
    x = torch.randn(2, 3, 5, 6)
    doubled = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    if strided:  # the reference keeps the odd positions of the doubled image and zeros the others
        mask = torch.zeros_like(doubled)
        mask[..., 1::2, 1::2] = 1
        doubled = doubled * mask
    plain = F.conv2d(doubled, conv.weight, conv.bias, padding=2)
    torch.testing.assert_close(conv(x), plain, rtol=1e-5, atol=1e-5)


def test_strided_convolution_pads_as_the_reference():
    conv = networks.Conv(2, 3, 5, stride=2)
    x = torch.randn(1, 2, 8, 8)
    padded = F.pad(x, (1, 2, 1, 2))  # XLA's SAME for stride 2 on an even size: one less at the low side
    torch.testing.assert_close(conv(x), F.conv2d(padded, conv.weight, conv.bias, 2))


def test_hoisted_core_equals_the_concatenated_form():
    """The reference repeats the (deter, stoch, action) features for each block and concatenates."""
    torch.manual_seed(0)
    rssm = make_agent().rssm
    state = {"deter": torch.randn(3, rssm.deter), "stoch": torch.randn(3, rssm.stoch, rssm.classes)}
    action = torch.randn(3, 5) * 3
    parts = [
        rssm.in_deter(state["deter"]),
        rssm.in_stoch(state["stoch"].flatten(1)),
        rssm.in_action(action / action.abs().clamp(min=1)),
    ]
    shared = torch.cat(parts, -1)[:, None].expand(-1, rssm.blocks, -1)
    x = torch.cat([state["deter"].unflatten(-1, (rssm.blocks, -1)), shared], -1).flatten(1)
    x = rssm.dyn_norm(rssm.dyn_first(x))
    gates = rssm.gru(x).unflatten(-1, (rssm.blocks, -1)).chunk(3, -1)
    reset, cand, update = (gate.flatten(1) for gate in gates)
    update = torch.sigmoid(update - 1)
    weights = rssm.split_weights()
    plain = update * torch.tanh(torch.sigmoid(reset) * cand) + (1 - update) * state["deter"]
    torch.testing.assert_close(
        rssm.core(state, rssm.action_input(action, weights), weights), plain, rtol=1e-5, atol=1e-5
    )


def test_samples_follow_the_probabilities():
    torch.manual_seed(0)
    dist = dists.OneHot(torch.tensor([2.0, 0.0, -1.0, 0.5]).expand(20000, 4), unimix=0.1)
    share = dist.sample(torch.rand(20000, 1)).mean(0)
    torch.testing.assert_close(share, dist.probs[0], rtol=0.05, atol=0.01)


def test_latents_survive_the_replay():
    rssm = make_agent().rssm
    stoch = F.one_hot(torch.randint(rssm.classes, (2, rssm.stoch)), rssm.classes).float()
    state = {"deter": torch.rand(2, rssm.deter), "stoch": stoch}
    deter, index = rssm.pack(state)
    back = rssm.unpack(deter, index)
    assert torch.equal(back["stoch"], stoch)
    torch.testing.assert_close(back["deter"], state["deter"], rtol=1e-3, atol=1e-3)
    index[0] = networks.NO_LATENT
    assert rssm.unpack(deter, index)["stoch"][0].abs().sum() == 0


# --- The agent -----------------------------------------------------------------------------------------


def test_acting_does_not_disturb_training():
    """Each use has its own random generator: more acting changes no bit of an update."""
    results = []
    for acts in (0, 3):
        agent = make_agent("--opt.warmup", "0")
        obs = {k: v[:, 0] for k, v in make_batch(agent).items()}
        state = agent.initial_state(BATCH)
        for _ in range(acts):
            _, state, _ = agent.act(obs, state, agent.rngs["act"])
        agent.train(make_batch(agent))
        results.append(agent.world_model.encoder.cnn.convs[0].weight.clone())
    assert torch.equal(*results)


def test_global_random_numbers_do_not_matter():
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        agent = make_agent("--opt.warmup", "0")
        agent.train(make_batch(agent))
        results.append(agent.behavior.actor.outs[0].weight.clone())
    assert torch.equal(*results)


def test_acting_continues_where_training_would():
    """The scan over a sequence and step-by-step acting give the same deter for the same latents."""
    agent = make_agent("--rssm.classes", "0")
    batch = {k: v[:, 1:] for k, v in make_batch(agent).items()}
    batch["is_first"][:, 0] = True
    data = agent.upload(batch)
    rssm = agent.rssm
    action = agent.actions.encode(data)
    prev = torch.cat([torch.zeros_like(action[:, :1]), action[:, :-1]], 1)
    noise = torch.zeros(BATCH, LENGTH, rssm.stoch)
    embed = agent.world_model.encoder(data)
    scan = rssm.observe(rssm.initial(BATCH), embed, prev, data["is_first"], noise)
    state = rssm.initial(BATCH)
    for t in range(LENGTH):
        step = rssm.observe(
            state, embed[:, t : t + 1], prev[:, t : t + 1], data["is_first"][:, t : t + 1], noise
        )
        state = {k: step[k][:, 0] for k in ("deter", "stoch")}
        torch.testing.assert_close(state["deter"], scan["deter"][:, t])


def test_actions_of_an_unknown_kind_are_refused():
    with pytest.raises(UserError, match="knows Discrete, MultiDiscrete and Box"):
        make_agent(act_space={"action": gymnasium.spaces.MultiBinary(4)})


@pytest.mark.slow
def test_compiled_functions_are_the_ones_that_training_calls_and_keep_their_names():
    agent = make_agent("--compile", "True")
    plain = make_agent("--compile", "False")
    batch = make_batch(agent)
    calls = torch._dynamo.utils.counters["frames"]
    before = calls["ok"]
    agent.train(batch)
    assert calls["ok"] > before, "training compiled nothing"
    plain.train(batch)
    assert agent.weights()["world_model"].keys() == plain.weights()["world_model"].keys()
    assert not any("_orig_mod" in key for part in agent.weights().values() for key in part)
    for key, value in plain.weights()["world_model"].items():
        torch.testing.assert_close(agent.weights()["world_model"][key], value, rtol=1e-4, atol=1e-5)
