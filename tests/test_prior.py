"""Path B: the prior's weight, the losses that use it, and that nothing changes without advice."""

import contextlib
import gc
import math

import gymnasium
import pytest
import torch
import torch.nn.functional as F
from advice_helpers import (
    ACTIONS,
    OBS,
    PATHS,
    advised_config,
    give_skills,
    make_agent,
    make_batch,
    make_items,
    some_feat,
    unsettle,
)
from run_helpers import differences

import distributions as dists
import models
from agent import Dreamer
from basics import UserError
from lore_llm.prior import GAIN_FLOOR, Prior, Reliability, bounded

FEAT = 24  # inputs of a prior network that is tested alone


def make_prior(**values: float) -> Prior:
    """A prior network that has just had its first advice; `values` of its options."""
    words = [word for name, value in values.items() for word in (f"--prior.{name}", str(value))]
    prior = Prior(FEAT, ACTIONS, advised_config(("prior",), *words))
    prior.advice_rate.fill_(1e-9)
    return prior


# ---- The weight


@pytest.mark.parametrize(
    "uncertainty, share, dual, expected",
    [
        (1.0, 1.0, 0.0, 0.3 * 0.5),  # reliability is 0.5 at the start
        (0.6, 1.0, 0.0, 0.3 * 0.5 * 0.4 / 0.8),
        (0.2, 1.0, 0.0, 0.0),
        (0.1, 1.0, 0.0, 0.0),
        (0.6, 0.25, 0.0, 0.25 * 0.3 * 0.5 * 0.5),
        (0.6, 1.0, 3.0, 0.3 * 0.5 * 0.5 / 4),
    ],
)
def test_beta_follows_its_formula(uncertainty, share, dual, expected):
    prior = make_prior(beta_max=0.3, uncertainty_threshold=0.2)
    prior.share.fill_(share)
    prior.dual.fill_(dual)
    assert float(prior.beta(torch.tensor(uncertainty))) == pytest.approx(expected, abs=1e-7)


def test_beta_grows_with_the_reliability():
    prior = make_prior(beta_max=0.3, uncertainty_threshold=0.0)
    prior.reliability.moments.copy_(torch.tensor([1.0, 1.0, 1.0]))  # a gain each time
    assert float(prior.beta(torch.tensor(1.0))) == pytest.approx(0.3, rel=1e-3)
    prior.reliability.moments.copy_(torch.tensor([1.0, -1.0, 1.0]))
    assert float(prior.beta(torch.tensor(1.0))) == pytest.approx(0.0, abs=1e-3)


def test_there_is_no_weight_before_the_first_advice():
    prior = make_prior()
    prior.advice_rate.fill_(0.0)
    assert float(prior.beta(torch.tensor(1.0))) == 0
    assert float(prior.reliability.value) == 0.5


def test_uncertainty_is_the_mean_of_its_parts():
    agent = make_agent(("prior",))
    unsettle(agent)
    advised, behavior, feat = agent.policy, agent.behavior, some_feat(agent, 7)
    behavior.retnorm.range[1] = 40.0
    torch.nn.init.normal_(behavior.actor.outs[0].weight, std=1.0)
    policy = behavior.actor(feat)
    total, parts = advised.uncertainty(behavior, feat, policy)
    probs = policy.parts[0].probs
    entropy = -(probs * probs.log()).sum(-1).detach() / math.log(ACTIONS)
    assert torch.allclose(parts["entropy"], entropy, atol=1e-6) and float(entropy.min()) < 0.9
    spread = behavior.critic(feat).spread / 40.0
    assert torch.allclose(parts["value_std"], spread.clamp(max=1))
    assert torch.allclose(total, (parts["entropy"] + parts["value_std"]) / 2)
    advised.ensemble = lambda feat, action: torch.full(feat.shape[:-1], 0.3)
    advised.largest.fill_(0.6)
    total, parts = advised.uncertainty(behavior, feat, policy)
    assert torch.allclose(parts["disagreement"], torch.tensor(0.5)) and len(parts) == 3
    assert torch.allclose(total, sum(parts.values()) / 3)


def test_largest_disagreement_follows_the_95th_percentile():
    agent = make_agent(("prior",), "--expl_behavior", "plan2explore")
    advised = agent.policy
    values = torch.arange(agent.config.batch_size * agent.config.batch_length, dtype=torch.float32)
    shape = agent.config.batch_size, agent.config.batch_length  # real states; else imagined ones

    def ensemble(feat, action):
        return values.reshape(shape) if feat.shape[:-1] == shape else torch.zeros(feat.shape[:-1])

    advised.ensemble = ensemble
    agent.train(make_batch(agent))
    high = torch.quantile(values, 0.95)
    assert torch.allclose(advised.largest, high)
    values = values + 100
    agent.train(make_batch(agent))
    assert torch.allclose(advised.largest, high + 0.01 * 100)


# ---- The mix


def test_prior_logits_are_added_to_the_actors_before_the_uniform_mix():
    agent = make_agent(("prior",), "--actor.unimix", "0.1")
    unsettle(agent)
    torch.nn.init.normal_(agent.behavior.actor.outs[0].weight, std=0.5)
    feat = some_feat(agent, 7)
    seen = agent.policy.advised_view(agent.behavior, feat)
    logits = agent.behavior.actor.outs[0](agent.behavior.actor.mlp(feat))
    prior = agent.policy.prior(feat)
    assert float(seen.beta.min()) > 0.03
    expected = 0.9 * F.softmax(logits + seen.beta[:, None] * prior, -1) + 0.1 / ACTIONS
    assert torch.allclose(seen.policy.parts[0].probs, expected, atol=1e-6)
    assert torch.equal(seen.plain.parts[0].probs, agent.behavior.actor(feat).parts[0].probs)
    assert float((expected - seen.plain.parts[0].probs).detach().abs().max()) > 0.01
    bare = agent.policy.view(agent.behavior, feat, advised=False).policy
    assert torch.equal(bare.parts[0].probs, seen.plain.parts[0].probs)
    without = agent.policy.advised_view(agent.behavior, feat, advised=False)
    assert torch.equal(without.policy.parts[0].probs, seen.plain.parts[0].probs) and not without.beta.any()


def test_prior_logits_are_log_probabilities_centred_and_clipped():
    logits = torch.tensor([[30.0, 0.0, 0.0, -50.0], [1.0, 2.0, 3.0, 4.0]])
    out = bounded(logits, 5.0)
    assert out[0].tolist() == [5.0, 5.0, 5.0, -5.0]  # by 35, 5, 5 and -45
    assert torch.allclose(out[1], torch.tensor([-1.5, -0.5, 0.5, 1.5]))
    assert torch.allclose(bounded(logits + 7, 5.0), out, atol=1e-5)
    prior = make_prior(logit_clip=2.0)
    torch.nn.init.normal_(prior.out.weight, std=5.0)
    assert float(prior(torch.randn(50, FEAT)).abs().max()) == 2.0


def test_the_prior_network_learns_the_advice():
    prior = make_prior()
    torch.manual_seed(0)
    feat = torch.randn(2, 8, FEAT)
    advice = bounded(torch.randn(2, 8, ACTIONS) * 4, 20.0)
    mask = torch.rand(2, 8) < 0.8
    opt = torch.optim.Adam(prior.parameters(), 0.01)
    for _ in range(400):
        opt.zero_grad()
        loss, agreement = prior.distill(feat, torch.where(mask[..., None], advice, 1e3), mask)
        loss.backward()
        opt.step()
    assert float((prior(feat) - advice)[mask].abs().mean()) < 0.5
    assert float(agreement) == 1.0
    assert float(prior.distill(feat, -advice, mask)[1]) == 0.0
    assert [float(x) for x in prior.distill(feat, advice, torch.zeros_like(mask))] == [0.0, 0.0]


# ---- Without advice


def test_policy_without_any_advice_is_the_plain_one_to_the_last_bit():
    agent = make_agent(("prior",))
    torch.nn.init.normal_(agent.behavior.actor.outs[0].weight, std=0.5)
    feat = some_feat(agent, 50)
    seen = agent.policy.advised_view(agent.behavior, feat)
    assert not seen.beta.any() and seen.uncertainty.all()
    assert torch.equal(seen.policy.parts[0].probs, agent.behavior.actor(feat).parts[0].probs)


def test_training_without_any_advice_changes_no_bit():
    plain, silent = make_agent(()), make_agent(("prior",), "--prior.lambda_kl", "1.0")
    for agent in (plain, silent):
        agent.opt.param_groups[0]["warmup"] = 0
        for update in range(4):
            batch = make_batch(agent, update)
            if "llm_mask" in batch:
                batch["llm_mask"][:], batch["llm_logits"][:] = False, 0
            agent.train(batch)
    for part in ("world_model", "behavior"):
        assert differences(plain.weights()[part], silent.weights()[part]) == []
    assert not torch.equal(plain.behavior.critic.out.weight, make_agent(()).behavior.critic.out.weight)


def test_options_of_disabled_paths_change_no_bit():
    words = "--prior.beta_max 1 --prior.lambda_kl 9 --prior.lambda_distill 9 --synthetic.lambda_bc 9"
    words += " --options.max_options 2 --llm.features 7 --llm.until 5 --synthetic.synthetic_ratio_max 0.9"
    plain, other = make_agent(()), make_agent((), *words.split())
    for agent in (plain, other):
        for update in range(2):
            agent.train(make_batch(agent, update))
    assert differences(plain.state_dict(), other.state_dict()) == []


# ---- Gradients


def test_no_autograd_graph_is_alive_after_an_update():
    agent = full_agent()
    agent.train(make_batch(agent), make_items(agent, 8))
    gc.collect()

    def in_graph(tensor):
        with contextlib.suppress(RuntimeError):  # the optimiser's views of parameters
            return tensor.requires_grad and not tensor.is_leaf

    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    assert len(tensors) > 50 and not [each.shape for each in tensors if in_graph(each)]


MODEL = ("encoder", "rssm", "decoder", "reward_head", "cont_head")
TRAINS = {
    "policy": {"actor", "options.out"},
    "value": {"critic"},
    "advice_kl": {"actor", "options.out"},
    "advice_bc": {"actor", "options.out"},
    "advice_distill": {"prior", "encoder", "rssm"},
    "option_end": {"options.end"},
}


def advised_losses(agent, **changes):
    """All losses of an update by name, and the parts of the agent that may learn from them."""
    losses = {}
    step = agent.opt.step
    agent.opt.step = lambda: {"grad_norm": torch.zeros(()), "skipped": torch.tensor(False)}
    world_loss, loss, learn = agent.world_model.loss, agent.behavior.loss, agent.policy.learn

    def noted(function):
        def call(*args, **kwargs):
            found, *rest = function(*args, **kwargs)
            losses.update(found)
            return found, *rest

        return call

    agent.world_model.loss, agent.behavior.loss, agent.policy.learn = map(noted, (world_loss, loss, learn))
    backward = torch.Tensor.backward
    torch.Tensor.backward = lambda self, *args, **kwargs: None  # the graph is wanted afterwards
    try:
        batch = {k: torch.from_numpy(v) for k, v in make_batch(agent).items()}
        agent.train(batch | changes, make_items(agent, 8))
    finally:
        torch.Tensor.backward, agent.opt.step = backward, step
    advised = agent.policy
    parts = {name: getattr(agent.world_model, name) for name in MODEL}
    parts |= {"actor": agent.behavior.actor, "critic": agent.behavior.critic, "prior": advised.prior}
    ends = torch.nn.ModuleList([advised.options.end_mlp, advised.options.end_out])
    return losses, parts | {"options.out": advised.options.out, "options.end": ends}


def full_agent(*options):
    agent = make_agent(PATHS, "--rssm.free_nats", "0", "--prior.uncertainty_threshold", "0", *options)
    unsettle(agent)
    give_skills(agent, {1: (11, [0, 1], 4)})
    return agent


def test_each_loss_of_advice_trains_its_own_networks():
    agent = full_agent()
    losses, parts = advised_losses(agent)
    assert TRAINS.keys() <= losses.keys()
    for name, expected in TRAINS.items():
        agent.opt.zero_grad()
        losses[name].mean().backward(retain_graph=True)
        trained = {
            part
            for part, module in parts.items()
            if any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
        }
        assert trained == expected, name


def test_lambda_distill_weighs_what_the_latents_learn_from_the_advice():
    grads = []
    for weight in ("1", "5"):
        agent = make_agent(("prior",), "--prior.lambda_distill", weight)
        unsettle(agent)
        data = {key: torch.from_numpy(value) for key, value in make_batch(agent).items()}
        post, data = agent.world_model.observe(data, agent.rngs["train"])
        losses, _ = agent.policy.learn(agent.world_model, agent.behavior, post, data)
        grads += torch.autograd.grad(losses["advice_distill"], agent.world_model.encoder.parameters())
    one, five = grads[: len(grads) // 2], grads[len(grads) // 2 :]
    assert all(torch.allclose(5 * a, b, atol=1e-6) for a, b in zip(one, five, strict=True))
    assert max(float(a.abs().max()) for a in one) > 1e-4


def test_policy_gradient_is_that_of_a_constant_added_to_the_actors_logits():
    agent = full_agent()
    behavior, advised, feat = agent.behavior, agent.policy, some_feat(agent, 6)
    value = F.one_hot(torch.arange(6) % ACTIONS, ACTIONS + 3).flip(-1).float()
    out = behavior.actor.outs[0].weight
    (grad,) = torch.autograd.grad(advised.view(behavior, feat).policy.log_prob(value).sum(), out)
    seen, hidden = advised.advised_view(behavior, feat), behavior.actor.mlp(feat)
    constant = (seen.beta[:, None] * seen.prior).detach()
    assert float(constant.abs().max()) > 0.01
    logits = behavior.actor.outs[0](hidden) + constant
    by_hand = advised.options.distribution(hidden, logits).log_prob(value).sum()
    assert torch.allclose(grad, torch.autograd.grad(by_hand, out)[0])


def test_advice_kl_pulls_the_actor_towards_the_mix():
    agent = make_agent(("prior",), "--prior.lambda_kl", "5", "--actor.entropy", "0.1")
    unsettle(agent)
    behavior, advised, feat = agent.behavior, agent.policy, some_feat(agent, 6)
    seen = advised.view(behavior, feat[:, None])
    p, q = (each.parts[0].probs[:, 0] for each in (seen.policy, seen.plain))
    dream = advised.imagine(behavior, agent.rssm, start_of(agent, 6), None)._replace(feat=feat[:, None])
    losses, metrics = advised.loss(behavior, dream, seen, models.Starts({}), 1.0)
    kl = (p * (p / q).log()).sum(-1)
    assert torch.allclose(losses["advice_kl"][:, 0], 0.5 * kl, atol=1e-7) and float(kl.min()) > 1e-6
    assert torch.allclose(metrics["uncertainty_gate/avg_kl"], kl.mean())
    # A step along the gradient brings the actor nearer to the mix that was.
    target = seen.policy.parts[0].detach()
    losses["advice_kl"].sum().backward()
    with torch.no_grad():
        for param in behavior.actor.parameters():
            if param.grad is not None:
                param -= 1e-3 * param.grad
    nearer = target.kl(behavior.actor(feat[:, None]).parts[0])
    assert float(nearer.sum()) < float(kl.sum())


def start_of(agent, rows):
    rssm = agent.config.rssm
    return {"deter": torch.zeros(rows, rssm.deter), "stoch": torch.zeros(rows, rssm.stoch, rssm.classes)}


# ---- The bound on the divergence


@pytest.mark.parametrize("target", [0.1, pytest.param(0.02, marks=pytest.mark.slow)])
def test_dual_keeps_the_divergence_at_its_target_at_most(target):
    agent = make_agent(("prior",), "--prior.delta_target", str(target), "--prior.beta_max", "1")
    unsettle(agent)
    advised, behavior = agent.policy, agent.behavior
    torch.nn.init.normal_(advised.prior.out.weight, std=2.0)  # as strong as advice may be
    advised.prior.reliability.moments.copy_(torch.tensor([1.0, 1.0, 1.0]))
    divergences = []
    for update in range(600):
        feat = some_feat(agent, 32, seed=update)
        seen = advised.advised_view(behavior, feat)
        kl = seen.policy.parts[0].kl(seen.plain.parts[0]).mean()
        advised.prior.limit(kl)
        divergences.append(float(kl))
    assert divergences[0] > 5 * target
    late = torch.tensor(divergences[400:])
    assert float(late.mean()) == pytest.approx(target, rel=0.15) and float(late.max()) < 2 * target
    assert math.isfinite(float(advised.prior.dual)) and float(advised.prior.dual) > 1


def test_dual_falls_again_and_never_below_zero():
    prior = make_prior()
    prior.limit(torch.tensor(10.0))
    high = float(prior.dual)
    assert high == pytest.approx(math.exp(0.05) - 1)
    prior.limit(torch.tensor(math.nan))
    assert float(prior.dual) == high
    for _ in range(1000):
        prior.limit(torch.tensor(0.0))
    assert float(prior.dual) == 0


# ---- Reliability


def follow(prior: Prior, quality: float, updates: int = 150, bias: float = 0.0, seed: int = 0) -> float:
    """Reliability after real steps in which the advised action is worth `quality` more than the others."""
    generator = torch.Generator().manual_seed(seed)
    probs = torch.full((4, 16, ACTIONS), 1 / ACTIONS)
    for _ in range(updates):
        advised = torch.randint(ACTIONS, (4, 16), generator=generator)
        action = torch.randint(ACTIONS, (4, 16), generator=generator)
        noise = torch.randn(4, 16, generator=generator)
        followed = (advised == action).float()
        advantage = bias + noise + quality * (followed - 1 / ACTIONS)
        logits = 4.0 * F.one_hot(advised, ACTIONS)
        mask = torch.rand(4, 16, generator=generator) < 0.5
        prior.follow(logits, probs, F.one_hot(action, ACTIONS).float(), advantage, mask)
    return float(prior.reliability.value)


def test_advice_without_a_measured_gain_loses_its_weight():
    prior = make_prior()
    prior.reliability.rate = 0.1
    assert float(prior.trust) == 0.5
    follow(prior, 0.0, updates=1)
    prior.reliability.moments.zero_()  # nothing measured
    assert float(prior.advice_rate) == pytest.approx(0.1)
    assert float(prior.trust) == pytest.approx(0.5 * (1 + math.erf(-0.1 / math.sqrt(2))))
    nothing = torch.zeros(4, 16, dtype=torch.bool)
    probs = torch.full((4, 16, ACTIONS), 1 / ACTIONS)
    prior.follow(probs, probs, probs, torch.zeros(4, 16), nothing)  # without advice nothing changes
    assert float(prior.advice_rate) == pytest.approx(0.1)
    prior.advice_rate.fill_(1.0)
    assert float(prior.trust) == pytest.approx(0.1587, abs=1e-4)  # normal distribution at -1
    prior.reliability.moments.copy_(torch.tensor([1.0, 1.0, 1.0]))  # a gain each time
    assert float(prior.trust) > 0.99


def test_reliability_starts_at_a_half():
    assert float(Reliability(0.01).value) == 0.5


def test_reliability_of_good_advice_goes_to_one_and_of_harmful_advice_to_zero():
    assert follow(make_prior(), 0.5) > 0.98
    assert follow(make_prior(), -0.5) < 0.02


def test_reliability_of_random_advice_is_a_half_in_the_mean():
    values = [follow(make_prior(), 0.0, seed=seed) for seed in range(24)]
    assert sum(values) / len(values) == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("bias", [-1.0, 1.0])
def test_reliability_is_not_moved_by_a_critic_that_expects_too_much_or_too_little(bias):
    # With the prior, the actor follows advice more often than alone.
    prior = make_prior()
    advised = torch.zeros(4, 16, dtype=torch.int64)
    action = advised.clone()
    action[:2] = 1
    probs = torch.full((4, 16, ACTIONS), 1 / ACTIONS)
    ones = torch.ones(4, 16, dtype=torch.bool)
    for _ in range(50):
        advantage = torch.full((4, 16), bias)
        logits = 4.0 * F.one_hot(advised, ACTIONS)
        prior.follow(logits, probs, F.one_hot(action, ACTIONS).float(), advantage, ones)
    assert float(prior.reliability.value) == pytest.approx(0.5, abs=0.01)


def test_reliability_gain_by_hand():
    prior = make_prior()
    prior.reliability.rate = 1.0
    logits = torch.log(torch.tensor([[[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.5, 0.25, 0.25]]]))
    probs = torch.tensor([[[0.6, 0.2, 0.2], [0.0, 0.5, 0.5], [1 / 3, 1 / 3, 1 / 3]]])
    action = F.one_hot(torch.tensor([[0, 1, 2]]), 3).float()
    mask = torch.tensor([[True, True, False]])
    prior.follow(logits, probs, action, torch.tensor([[2.0, 1.0, 99.0]]), mask)
    followed = (0.7 * 0.4 - 0.2 * 0.2 - 0.1 * 0.2, 0.1 * 0.5 - 0.8 * 0.5)
    gain = (0.5 * followed[0] - 0.5 * followed[1]) / 2
    assert torch.allclose(prior.reliability.moments, torch.tensor([1.0, gain, gain**2]))
    t = gain / math.sqrt(gain**2 + GAIN_FLOOR**2)  # of one update that is remembered
    assert float(prior.reliability.value) == pytest.approx(0.5 * (1 + math.erf(t / math.sqrt(2))))


@pytest.mark.parametrize("updates", [1, 30, 300])
def test_reliability_counts_the_updates_that_it_remembers(updates):
    rate, reliability = 0.01, Reliability(0.01)
    for index in range(updates):  # gains of -1 and 1.2 in turn
        reliability.update(torch.tensor(1.2 if index % 2 else -1.0), torch.tensor(True))
    weights = [rate * (1 - rate) ** age for age in range(updates)]
    count = sum(weights) ** 2 / sum(weight**2 for weight in weights)
    total, mean, square = reliability.moments.tolist()
    t = math.sqrt(count) * (mean / total) / math.sqrt(square / total + GAIN_FLOOR**2)
    assert float(reliability.value) == pytest.approx(0.5 * (1 + math.erf(t / math.sqrt(2))), abs=1e-4)


def test_reliability_stays_where_nothing_was_advised_or_is_not_finite():
    prior = make_prior()
    follow(prior, 0.5, updates=3)
    before = prior.reliability.moments.clone()
    prior.reliability.update(torch.tensor(5.0), torch.tensor(False))
    prior.reliability.update(torch.tensor(math.inf), torch.tensor(True))
    assert torch.equal(prior.reliability.moments, before)


def test_steps_with_small_advantages_are_ignored():
    prior = make_prior()
    prior.reliability.rate = 1.0
    logits = 4.0 * F.one_hot(torch.zeros(1, 8, dtype=torch.int64), ACTIONS)
    probs = torch.full((1, 8, ACTIONS), 1 / ACTIONS)
    action = F.one_hot(torch.tensor([[0, 1] * 4]), ACTIONS).float()
    mask = torch.ones(1, 8, dtype=torch.bool)
    noise = torch.tensor([[0.02, -0.02] * 4])  # the critic's guesses are in favour of the advice
    prior.follow(logits, probs, action, noise, mask)
    assert float(prior.reliability.value) == 0.5
    reward = noise.clone()
    reward[0, 1] = 0.9  # and the facts against it
    prior.follow(logits, probs, action, reward, mask)
    assert float(prior.reliability.value) < 0.2


def test_steps_without_a_later_reward_are_ignored():
    prior = make_prior()
    prior.reliability.rate = 1.0
    logits = 4.0 * F.one_hot(torch.zeros(1, 8, dtype=torch.int64), ACTIONS)
    probs = torch.full((1, 8, ACTIONS), 1 / ACTIONS)
    action = F.one_hot(torch.tensor([[0, 1] * 4]), ACTIONS).float()
    mask = torch.ones(1, 8, dtype=torch.bool)
    guess = torch.tensor([[0.5, -0.5] * 4])
    prior.follow(logits, probs, action, guess, mask, torch.zeros(1, 8, dtype=torch.bool))
    assert float(prior.reliability.value) == 0.5
    prior.follow(logits, probs, action, guess, mask, mask)
    assert float(prior.reliability.value) > 0.8


@pytest.mark.parametrize(("reward_at", "share"), [(None, 0.0), (3, 1.0), (6, 0.0)])
def test_only_rewards_later_in_the_episode_count(reward_at, share, monkeypatch):
    agent = make_agent(("prior",))
    unsettle(agent)
    data = agent.upload(make_batch(agent))
    data["reward"] = torch.zeros_like(data["reward"])
    data["is_last"][:, 4] = data["is_first"][:, 5] = True
    if reward_at is not None:
        data["reward"][:, reward_at] = 1.0
    seen = []
    monkeypatch.setattr(Prior, "follow", lambda self, *args: seen.append(args[-1]))
    agent._update(data)
    assert seen[0][:, 1].float().mean() == share  # of the second step after the context


def test_reliability_counts_the_steps_at_which_the_actor_chose():
    agent = make_agent(("prior", "options"))
    noted = {}
    agent.policy.prior.follow = lambda *args: noted.update(mask=args[-2])
    batch = make_batch(agent)
    batch["llm_mask"][:] = True
    batch["is_last"][1, 4] = True
    agent.train(batch)
    mask = noted["mask"]  # of the steps after the context, without the last
    assert mask.shape == (2, 5)
    assert mask[0].tolist() == [True, True, False, False, True]  # an option ran at steps 3 and 4
    assert mask[1].tolist() == [True, True, True, False, True]


# ---- The critic's spread


def test_spread_of_a_value_is_half_of_what_lies_between_its_quantiles():
    bins = torch.tensor([-4.0, -2.0, 0.0, 2.0, 4.0])
    sure = torch.tensor([0.0, 0.0, 50.0, 0.0, 0.0])
    wide = torch.log(torch.tensor([0.2, 0.2, 0.2, 0.2, 0.2]))
    skew = torch.log(torch.tensor([0.1, 0.5, 0.2, 0.1, 0.1]))
    dist = dists.TwoHot(torch.stack([sure, wide, skew]), bins)
    assert dist.spread.tolist() == [0.0, 4.0, 2.0]
    squashed = dists.TwoHot(wide, bins, symlog_space=True)
    assert float(squashed.spread) == pytest.approx(math.exp(4) - 1, rel=1e-5)


def test_spread_of_a_gaussian_is_its_standard_deviation():
    bins = torch.linspace(-10, 10, 2001)
    assert float(dists.TwoHot(-0.5 * (bins / 1.7) ** 2, bins).spread) == pytest.approx(1.7, rel=0.01)


def test_spread_ignores_tiny_mass_in_the_outermost_bins():
    bins = dists.symexp_bins(255)
    logits = torch.full((255,), -50.0)
    logits[127], logits[254] = 0.0, math.log(1e-6)
    assert float(dists.TwoHot(logits, bins).spread) == 0


def test_a_prior_needs_one_discrete_action():
    space = {"action": gymnasium.spaces.MultiDiscrete([3, 4])}
    with pytest.raises(UserError, match="needs one Discrete action"):
        Dreamer(OBS, space, advised_config(("prior",)), torch.device("cpu"))
