"""The explorers: formulas against cases by hand, the flow of gradients, and that greedy changes nothing."""

import math

import gymnasium
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from run_helpers import metrics, train
from test_models import CONTINUOUS, OBS, make_agent, make_batch, unsettle

import checkpoint as checkpoints
import config as configs
import exploration
import networks
from agent import Dreamer
from basics import UserError
from evaluation import EvalEpisode, shown
from exploration import (
    Ensemble,
    ErrorFifo,
    ErrorPredictor,
    RandomActor,
    RewardNorm,
    learning_progress,
    spread,
)

CURIOUS = ("surprise", "plan2explore", "lpm")


def explorer_agent(name: str, *options: str, **kwargs) -> Dreamer:
    agent = make_agent("--expl_behavior", name, *options, **kwargs)
    unsettle(agent)
    return agent


def explore(agent: Dreamer, batch: dict) -> tuple:
    """(losses, metrics, data, the batch's own data) of the explorer on a batch."""
    post, data = agent.world_model.observe(agent.upload(batch), agent.rngs["train"])
    return *agent.explorer.loss(agent.world_model, post, data, agent.rngs["explore"]), data


# --- Formulas ------------------------------------------------------------------------------------------


def test_learning_progress_by_hand():
    predicted, error = torch.tensor([math.log(0.5), math.log(0.5)]), torch.tensor([0.24, 0.99])
    log = learning_progress(predicted, error, floor=0.01)
    assert log.tolist() == pytest.approx([math.log(2), -math.log(2)])
    linear = learning_progress(predicted, error, floor=0.01, space="linear")
    assert linear.tolist() == pytest.approx([0.49 - 0.24, 0.49 - 0.99])


def test_error_predictor_is_linear_layers_with_elu_in_float32():
    predictor = ErrorPredictor(3, 5)
    assert [tuple(layer.weight.shape) for layer in predictor.layers] == [(5, 3), (5, 5), (5, 5), (1, 5)]
    x = torch.randn(2, 7, 3)
    expected = x
    for layer in predictor.layers[:-1]:
        expected = F.elu(expected @ layer.weight.T + layer.bias)
    expected = (expected @ predictor.layers[-1].weight.T + predictor.layers[-1].bias)[..., 0]
    with torch.autocast("cpu", torch.bfloat16):
        out = predictor(x)
    assert out.dtype == torch.float32 and out.shape == (2, 7)
    torch.testing.assert_close(out, expected)


def test_fifo_drops_the_oldest_and_draws_only_pushed_values():
    fifo, rng = ErrorFifo(5, {"x": ((2,), torch.float16), "error": ((), torch.float32)}), torch.Generator()

    def push(*errors: float) -> None:
        fifo.push({"x": torch.tensor([[e, -e] for e in errors]), "error": torch.tensor(errors)})

    def drawn() -> set[float]:
        sample = fifo.sample(500, rng)
        assert torch.equal(sample["x"].float(), torch.stack([sample["error"], -sample["error"]], 1))
        return set(sample["error"].tolist())

    assert not fifo.full and drawn() == {0.0}  # nothing is there yet
    push(1, 2, 3)
    assert not fifo.full and fifo.size == 3 and drawn() == {1, 2, 3}
    push(4, 5, 6)
    assert fifo.full and fifo.size == 5 and drawn() == {2, 3, 4, 5, 6}
    copy = ErrorFifo(5, {"x": ((2,), torch.float16), "error": ((), torch.float32)})
    copy.load_state_dict(fifo.state_dict())
    fifo = copy
    push(7)
    assert drawn() == {3, 4, 5, 6, 7}


def test_ensemble_equals_its_members_one_by_one_and_they_start_differently():
    torch.manual_seed(0)
    ensemble, x = Ensemble(6, 3, members=4, layers=2, units=5), torch.randn(7, 6)
    with torch.no_grad():
        together = ensemble(x)
    assert together.shape == (7, 4, 3)
    ensemble.requires_grad_(False)
    for m in range(4):
        part = slice(5 * m, 5 * m + 5)
        hidden = x @ ensemble.first.weight[part].T + ensemble.first.bias[part]
        hidden = F.elu(hidden) @ ensemble.rest[0].weight[m] + ensemble.rest[0].bias[part]
        out = F.elu(hidden) @ ensemble.rest[1].weight[m] + ensemble.rest[1].bias[3 * m : 3 * m + 3]
        torch.testing.assert_close(together[:, m], out)
    first, second = ensemble.rest[0].weight[:2]
    assert not torch.allclose(first, second, atol=0.1)
    assert ensemble.rest[0].weight.std() == pytest.approx(5**-0.5, rel=0.2)  # of a layer with 5 inputs


def test_spread_is_the_standard_deviation_over_members_averaged_over_outputs():
    predictions = torch.tensor([[[0.0, 1.0], [2.0, 1.0]], [[3.0, 3.0], [3.0, -3.0]]])  # [N, M, O]
    assert spread(predictions).tolist() == pytest.approx([0.5, 1.5], abs=1e-5)
    same = torch.zeros(1, 8, 2, requires_grad=True)
    spread(same).sum().backward()
    assert same.grad.isfinite().all()  # members that agree do not break the dynamics gradient


def test_spread_of_many_rows_equals_that_of_each(monkeypatch):
    ensemble, x = Ensemble(6, 3, members=4, layers=1, units=5), torch.randn(10, 6)
    monkeypatch.setattr(exploration, "ROWS", 3)
    with torch.no_grad():
        torch.testing.assert_close(ensemble.spread(x), spread(ensemble(x)))


def test_rewards_are_divided_by_their_deviation_but_never_amplified():
    norm = RewardNorm(rate=0.1)
    assert norm.scale == 1

    def scale_after(std: float, updates: int) -> float:
        for _ in range(updates):
            norm.update(torch.tensor(10.0), torch.tensor(100.0 + std**2))
        return float(norm.scale)

    assert scale_after(3.0, 1) == pytest.approx(3.0, rel=1e-4)  # from the first update on, not from zeros
    assert scale_after(3.0, 5) == pytest.approx(3.0, rel=1e-4)
    assert scale_after(5.0, 1) == pytest.approx((9 + (25 - 9) * 0.1 / (1 - 0.9**7)) ** 0.5, rel=1e-4)
    before = float(norm.scale)
    norm.update(torch.tensor(10.0), torch.tensor(float("nan")))
    assert norm.scale == before
    assert scale_after(0.01, 200) == 1


# --- The error -----------------------------------------------------------------------------------------


def test_prior_error_is_the_decoded_modes_squared_error_per_dimension():
    agent = explorer_agent("surprise")
    model, batch = agent.world_model, make_batch(agent)
    post, data = model.observe(agent.upload(batch), agent.rngs["train"])
    prior = model.rssm.dist(model.rssm.prior(post["deter"]))
    recons = model.decoder(post["deter"], prior.mode.flatten(-2))
    image = (recons["image"].mean - data["image"].float() / 255).square().mean((-3, -2, -1))
    squashed = {k: torch.sign(data[k]) * torch.log1p(data[k].abs()) for k in ("vector", "audio")}
    vectors = [(recons[k].raw - value).square().mean(-1) for k, value in squashed.items()]
    error = model.prior_error(post, data, "image")
    torch.testing.assert_close(error, (image + sum(vectors)) / 3)
    assert not error.requires_grad
    probs = model.rssm.dist(post["logit"]).probs
    latent = model.prior_error(post, data, "latent")
    torch.testing.assert_close(latent, (probs - prior.probs).square().mean((-2, -1)))
    kl = (probs * (probs.log() - prior.probs.log())).sum((-2, -1))
    torch.testing.assert_close(model.prior_error(post, data, "kl"), kl)


# --- Alignment and masks -------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["stoch", "deter", "embed"])
def test_plan2explore_predicts_the_next_step_from_the_state_and_the_action_taken_in_it(target, monkeypatch):
    agent = explorer_agent("plan2explore", "--disag_target", target)
    seen = []
    forward = agent.explorer.ensemble.forward
    monkeypatch.setattr(agent.explorer.ensemble, "forward", lambda x: seen.append(x) or forward(x))
    batch = make_batch(agent)
    rng = agent.rngs["train"].get_state()
    losses, _, _, data = explore(agent, batch)
    agent.rngs["train"].set_state(rng)
    post, _ = agent.world_model.observe(agent.upload(batch), agent.rngs["train"])
    x, action = seen[0], F.one_hot(data["action"].long(), 5).float()
    expected = torch.cat([agent.rssm.feat(post)[:, :-1], action[:, :-1]], -1).flatten(0, 1)
    torch.testing.assert_close(x, expected)
    goal = post[target].flatten(2)[:, 1:].flatten(0, 1)
    error = (forward(x) - goal[:, None]).square().sum(-1).mean(-1)
    live = ~data["is_first"][:, 1:].flatten()
    torch.testing.assert_close(losses["expl_model"], error[live].mean())
    # Imagination asks with the action taken in the state as well.
    seen.clear()
    agent.explorer.intrinsic(agent.rssm.feat(post)[:, :-1], action[:, :-1])
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize("name", ["surprise", "lpm"])
def test_error_of_the_next_step_belongs_to_the_state_and_the_action_taken_in_it(name, monkeypatch):
    agent = explorer_agent(name)
    model, seen = agent.world_model, {}

    def real_reward(rssm, state, action, error, live, generator):
        seen.update(state=state, action=action, error=error, live=live)
        return {}, {}, error

    monkeypatch.setattr(agent.explorer, "real_reward", real_reward)
    batch = make_batch(agent)
    batch["is_first"][:, 3] = True
    post, data = model.observe(agent.upload(batch), agent.rngs["train"])
    losses, found, _ = agent.explorer.loss(model, post, data, agent.rngs["explore"])
    error = model.prior_error(post, data, "image")
    assert torch.equal(seen["error"], error[:, 1:].flatten())
    for key in ("deter", "stoch"):
        assert torch.equal(seen["state"][key], post[key][:, :-1].flatten(0, 1))
    assert torch.equal(seen["action"], F.one_hot(data["action"].long(), 5).float()[:, :-1].flatten(0, 1))
    assert torch.equal(seen["live"], ~data["is_first"][:, 1:].flatten())
    live_error = error[:, 1:][~data["is_first"][:, 1:]]
    assert found["expl/error"] == pytest.approx(live_error.mean().item())
    assert found["expl/reward_std"] == pytest.approx(live_error.std(correction=0).item(), rel=1e-2)


def test_disagreement_is_the_reward():
    agent = explorer_agent("plan2explore")
    feat, action = torch.randn(2, 3, agent.rssm.feat_size), 2 * torch.rand(2, 3, 5)
    spread_of = agent.explorer.disagreement(feat, action)
    x = torch.cat([feat, action.clamp(max=1)], -1)
    torch.testing.assert_close(spread_of, spread(agent.explorer.ensemble(x.flatten(0, 1))).view(2, 3))
    torch.testing.assert_close(agent.explorer.intrinsic(feat, action), spread_of)


def test_reward_arrives_with_the_state_after_its_action(monkeypatch):
    agent = explorer_agent("surprise", "--expl_extr_scale", "2", "--expl_intr_scale", "10")
    monkeypatch.setattr(agent.explorer, "expected", lambda x: x[..., 0] + x[..., -1])
    feat, action = torch.randn(3, 4, 7), torch.rand(3, 3, 2)
    reward = torch.randn(3, 4)
    total = agent.explorer.reward_sum(feat, action, reward)
    torch.testing.assert_close(total[:, 0], 2 * reward[:, 0])
    torch.testing.assert_close(total[:, 1:], 2 * reward[:, 1:] + 10 * (feat[:, :-1, 0] + action[..., -1]))


def test_scale_divides_the_intrinsic_reward_and_is_off_for_lpm():
    for name, scale in (("surprise", 4.0), ("lpm", 1.0)):
        agent = explorer_agent(name)
        torch.nn.init.normal_(agent.explorer.head.out.weight)
        feat, action = torch.randn(5, agent.rssm.feat_size), torch.zeros(5, 5)
        before = agent.explorer.intrinsic(feat, action)
        agent.explorer.norm.moments.copy_(torch.tensor([1.0, 0.0, 16.0]))
        torch.testing.assert_close(agent.explorer.intrinsic(feat, action) * scale, before)


@pytest.mark.parametrize("name", CURIOUS)
def test_transitions_into_a_first_step_count_nowhere(name):
    agent = explorer_agent(name, "--lpm.fifo", "8")
    batch = make_batch(agent)
    batch["is_first"][:] = False
    batch["is_first"][:, 3] = True  # context is step 0, so the third of five steps
    if name == "lpm":
        for _ in range(2):
            explore(agent, batch)
    results = []
    for shift in (0, 100):
        copy = {k: v.copy() for k, v in batch.items()}
        if shift:  # what was done before it, and the reward that it brought, are of another episode
            copy["reward"][:, 3] += shift
            copy["action"][:, 2] = (copy["action"][:, 2] + 1) % 5
        for rng in agent.rngs.values():
            rng.manual_seed(0)
        state = {k: v.clone() for k, v in agent.explorer.state_dict().items()}
        losses, found, seen, _ = explore(agent, copy)
        agent.explorer.load_state_dict(state)
        if shift:
            # The reset itself has no intrinsic reward: what is left is the task's.
            assert torch.equal(seen["reward"][:, 2], torch.as_tensor(copy["reward"][:, 3]))
        results.append({**losses, **found})
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, msg=key)


# --- Gradients -----------------------------------------------------------------------------------------


def trained(agent: Dreamer, loss: torch.Tensor) -> set[str]:
    """The modules of the agent and its explorer that a loss reaches."""
    agent.opt.zero_grad()
    if loss.requires_grad:
        loss.backward(retain_graph=True)
    parts = {"world_model": agent.world_model, "task": agent.behavior}
    parts |= dict(agent.explorer.named_children())
    return {
        name
        for name, module in parts.items()
        if any(p.grad is not None and p.grad.any() for p in module.parameters())
    }


@pytest.mark.parametrize("name", CURIOUS)
@pytest.mark.parametrize(("actor", "gradient"), [("shared", "reinforce"), ("separate", "dynamics")])
def test_explorers_send_no_gradient_into_the_world_model_nor_get_one_from_actors(name, actor, gradient):
    options = ("--expl_task_actor", actor, "--imag_gradient", gradient, "--lpm.fifo", "8")
    agent = explorer_agent(name, *options, act_space=CONTINUOUS)
    if actor == "separate":
        for head in (agent.explorer.behavior.critic, agent.explorer.behavior.slow_critic):
            torch.nn.init.normal_(head.out.weight, std=0.1)
    batch = make_batch(agent)
    explore(agent, batch)
    post, data = agent.world_model.observe(agent.upload(batch), agent.rngs["train"])
    losses, _, seen = agent.explorer.loss(agent.world_model, post, data, agent.rngs["explore"])
    owners = {
        "expl_model": {"lpm": "predictor", "plan2explore": "ensemble"}.get(name),
        "expl_head": "head",
        **dict.fromkeys(("expl_policy", "expl_value", "expl_repval"), "behavior"),
    }
    assert losses.keys() <= owners.keys()
    for key, loss in losses.items():
        assert trained(agent, loss) == {owners[key]}, key
    more, _ = agent.behavior.loss(
        agent.world_model, post, seen, agent.rngs["train"], agent.explorer.task_reward
    )
    assert trained(agent, more["policy"].mean()) == {"task"}
    assert trained(agent, more["value"].mean()) == {"task"}
    assert trained(agent, more["repval"].mean()) == {"task", "world_model"}


@pytest.mark.parametrize("actor", ["shared", "separate"])
def test_task_actor_maximises_the_sum_or_the_task_reward(actor):
    agent = explorer_agent("plan2explore", "--expl_task_actor", actor)
    _, _, seen, data = explore(agent, make_batch(agent))
    live = ~data["is_first"]
    live[:, 0] = False  # no transition leads to the first step of a sequence
    same = seen["reward"] == data["reward"]
    assert same[~live].all() and (same[live].all() if actor == "separate" else not same[live].any())
    feat, action = torch.randn(2, 3, agent.rssm.feat_size), torch.zeros(2, 2, 5)
    total = agent.explorer.task_reward(feat, action, torch.zeros(2, 3))
    assert bool(total.any()) == (actor == "shared")
    acting = agent.explorer.actor(agent.behavior)
    assert (acting is agent.behavior.actor) == (actor == "shared")


@pytest.mark.parametrize("name", CURIOUS)
@pytest.mark.parametrize("actor", ["shared", "separate"])
def test_an_update_changes_all_weights(name, actor):
    agent = explorer_agent(name, "--expl_task_actor", actor, "--lpm.fifo", "8", "--opt.warmup", "0")
    if actor == "separate":
        torch.nn.init.normal_(agent.explorer.behavior.critic.out.weight, std=0.1)
    batch = make_batch(agent)
    batch["is_first"][:] = False
    before = {n: p.detach().clone() for n, p in agent.explorer.named_parameters() if p.requires_grad}
    for _ in range(3):
        found, _ = agent.train(batch)
    assert not found["opt/skipped"] and all(value.isfinite().all() for value in found.values())
    assert before
    for key, param in agent.explorer.named_parameters():
        if param.requires_grad:
            assert not torch.equal(param, before[key]), key


def test_a_separate_actor_critic_maximises_the_sum_with_the_loss_scales(monkeypatch):
    agent = explorer_agent("plan2explore", "--expl_task_actor", "separate", "--expl_extr_scale", "0.5")
    own, calls = agent.explorer.behavior, []
    loss = own.loss

    def remember(world_model, post, data, generator, reward_sum):
        found = loss(world_model, post, data, generator, reward_sum)
        calls.append((data, reward_sum, found[0]))
        return found

    monkeypatch.setattr(own, "loss", remember)
    batch = make_batch(agent)
    batch["is_first"][:] = False
    batch["is_first"][:, 3] = True
    losses, _, _, data = explore(agent, batch)
    ((seen, reward_sum, raw),) = calls
    assert reward_sum == agent.explorer.reward_sum
    # The first step of a sequence and one that is_first have the task's reward alone.
    plain = seen["reward"] == 0.5 * data["reward"]
    assert plain[0].tolist() == [True, False, True, False, False]
    for name, scale in (("policy", 1.0), ("value", 1.0), ("repval", 0.3)):
        torch.testing.assert_close(losses[f"expl_{name}"], scale * raw[name].mean())


def test_error_predictor_has_its_own_rate_and_no_warmup():
    agent = explorer_agent(
        "lpm", "--lpm.error_lr", "0.5", "--expl_task_actor", "separate", "--model_lr", "0.25"
    )
    rates = {id(p): (g["lr"], g["warmup"]) for g in agent.opt.param_groups for p in g["params"]}
    assert len(rates) == agent_parameters(agent)
    for param in agent.explorer.predictor.parameters():
        assert rates[id(param)] == (0.5, 0)
    for param in agent.explorer.head.parameters():
        assert rates[id(param)] == (0.25, 1000)
    for param in agent.explorer.behavior.actor.parameters():
        assert rates[id(param)] == (4e-5, 1000)


def agent_parameters(agent: Dreamer) -> int:
    """The number of trained tensors of an agent, without slow critics."""
    modules = (agent.world_model, agent.behavior, agent.explorer)
    return sum(p.requires_grad for module in modules for p in module.parameters())


# --- LPM -----------------------------------------------------------------------------------------------


def test_lpm_rewards_nothing_until_its_fifo_is_full():
    agent = explorer_agent("lpm", "--lpm.fifo", "20")  # 2 sequences of 4 transitions: the third fills it
    batch = make_batch(agent)
    means = []
    for _ in range(4):
        _, found, _, _ = explore(agent, batch)
        means.append((float(found["expl/reward_mean"]), float(found["expl/reward_std"])))
    assert means[:3] == [(0.0, 0.0)] * 3 and means[3][0] != 0 and means[3][1] > 0


def test_lpm_compares_with_a_predictor_that_has_not_seen_the_batch(monkeypatch):
    agent = explorer_agent("lpm", "--lpm.fifo", "8", "--opt.warmup", "0")
    calls = []
    push, sample = agent.explorer.fifo.push, agent.explorer.fifo.sample
    monkeypatch.setattr(agent.explorer.fifo, "push", lambda values: calls.append("push") or push(values))
    monkeypatch.setattr(agent.explorer.fifo, "sample", lambda *args: calls.append("sample") or sample(*args))
    explore(agent, make_batch(agent))
    assert calls == ["sample", "push"]


class Source:
    """LPM with given errors in place of a world model's, trained by the agent's optimiser."""

    def __init__(self, *options: str):
        # 64 transitions a batch, which makes 16 batches in the FIFO; the defaults of the optimiser.
        self.agent = explorer_agent("lpm", "--batch_size", "16", "--lpm.fifo", "1024", *options)
        rssm, self.lpm = self.agent.rssm, self.agent.explorer
        torch.manual_seed(0)
        classes = torch.randint(rssm.classes, (64, rssm.stoch))
        self.state = {"deter": torch.rand(64, rssm.deter), "stoch": F.one_hot(classes, rssm.classes).float()}
        self.action, self.live = torch.zeros(64, 5), torch.ones(64, dtype=torch.bool)
        self.opt, self.rng = self.agent.opt, torch.Generator().manual_seed(0)

    def reward(self, error: torch.Tensor) -> float:
        losses, _, reward = self.lpm.real_reward(
            self.agent.rssm, self.state, self.action, error, self.live, self.rng
        )
        self.opt.zero_grad()
        losses["expl_model"].backward()
        self.opt.step()
        return float(reward.mean())


def test_lpm_rewards_nothing_where_nothing_changes_from_the_first_reward_on():
    """Also during the warm-up of the other parameters: the predictor must know the level by then."""
    source = Source("--opt.warmup", "1000")
    rewards = [source.reward(torch.full((64,), 0.003)) for _ in range(120)]
    assert rewards[:15] == [0.0] * 15
    assert max(map(abs, rewards)) < 2 and max(map(abs, rewards[60:])) < 0.3


def test_lpm_rewards_a_source_while_it_is_learned_and_then_no_more():
    source = Source()
    learned = [source.reward(torch.full((64,), 0.001 + 0.2 * 0.985**t)) for t in range(500)]
    # The log of the error falls by 0.015 an update, and the FIFO holds the last sixteen.
    assert 0.07 < np.mean(learned[60:200]) < 0.25
    assert abs(np.mean(learned[450:])) < 0.03


def test_lpm_does_not_reward_noise_and_penalises_a_model_that_forgets():
    source = Source()
    noise = torch.Generator().manual_seed(1)
    rewards = [source.reward(0.05 + 0.1 * torch.rand(64, generator=noise)) for _ in range(300)]
    assert abs(np.mean(rewards[200:])) < 0.03
    assert source.reward(torch.full((64,), 0.5)) < -1  # much worse than expected
    assert source.reward(torch.full((64,), 0.01)) > 1


@pytest.mark.parametrize("space", ["log", "linear"])
def test_lpm_takes_space_and_floor_from_the_config(space):
    source = Source("--lpm.space", space, "--lpm.fifo", "64", "--lpm.error_floor", "0.01")
    source.reward(torch.full((64,), 0.2))
    expected = source.lpm._predict(source.agent.rssm, source.state, source.action)
    error = torch.full((64,), 0.1)
    _, _, reward = source.lpm.real_reward(
        source.agent.rssm, source.state, source.action, error, source.live, source.rng
    )
    by_hand = {"log": expected - math.log(0.11), "linear": expected.exp() - 0.01 - 0.1}
    torch.testing.assert_close(reward, by_hand[space].detach(), rtol=1e-3, atol=1e-3)


def test_lpm_learns_nothing_from_masked_or_infinite_transitions():
    source = Source("--lpm.fifo", "64")
    source.live[:32] = False
    error = torch.full((64,), 0.1)
    error[:32], error[40] = 1e6, float("nan")
    source.lpm.real_reward(source.agent.rssm, source.state, source.action, error, source.live, source.rng)
    losses, _, _ = source.lpm.real_reward(
        source.agent.rssm, source.state, source.action, error, source.live, source.rng
    )
    state = {k: v[32:33] for k, v in source.state.items()}
    guess = source.lpm._predict(source.agent.rssm, state, source.action[:1])
    # All that counts has one error; the predictor's guesses differ little at the start.
    assert losses["expl_model"].item() == pytest.approx((guess.item() - math.log(0.1001)) ** 2, rel=0.3)
    agent = explorer_agent("lpm", "--lpm.fifo", "24", "--opt.warmup", "0")
    broken = make_batch(agent)
    broken["vector"][0, 2] = np.inf
    skipped = [bool(agent.train(batch)[0]["opt/skipped"]) for batch in [broken] + [make_batch(agent)] * 5]
    assert skipped == [True] + [False] * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--lpm.fifo", "7"), "--lpm.fifo 7 is smaller than the 8 transitions that each batch adds"),
        (("--lpm.error_lr", "-1"), "--lpm.error_lr -1: must be in [0, inf]; the nearest is 0"),
        (("--expl_behavior", "lmp"), "the nearest is lpm"),
        (
            ("--decoder.cnn_keys", "none", "--decoder.mlp_keys", "none", "--decoder.audio_keys", "none"),
            "use --lpm.error latent or kl",
        ),
    ],
)
def test_bad_options_are_refused_at_the_start(options, message):
    with pytest.raises(UserError) as error:
        explorer_agent("lpm", *options)
    assert message in str(error.value)


# --- The run -------------------------------------------------------------------------------------------


def test_greedy_is_plain_dreamer_bit_for_bit():
    """The agent's update against one without any explorer."""
    agent, plain = make_agent(), make_agent()
    assert agent.explorer.state_dict() == {} and agent.explorer.param_groups() == []
    batch = make_batch(agent)
    for _ in range(2):
        agent.train(batch)
        with plain.autocast():
            post, data = plain.world_model.observe(plain.upload(batch), plain.rngs["train"])
            losses, _ = plain.world_model.loss(post, data)
            more, _ = plain.behavior.loss(plain.world_model, post, data, plain.rngs["train"])
        plain.opt.zero_grad()
        scales = plain.config.loss_scales
        sum(scales[name] * loss.mean() for name, loss in (losses | more).items()).backward()
        plain.opt.step()
        plain.behavior.update_slow_critic()
    for part in ("world_model", "behavior"):
        ours, theirs = getattr(agent, part).state_dict(), getattr(plain, part).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    fresh = make_agent()
    assert torch.equal(agent.rngs["explore"].get_state(), fresh.rngs["explore"].get_state())


def test_with_greedy_no_option_of_exploration_changes_a_bit(tmp_path):
    train(tmp_path / "plain", "--steps", "60")
    train(
        tmp_path / "options", "--steps", "60", "--expl_intr_scale", "9", "--expl_extr_scale", "0",
        "--expl_until", "50", "--lpm.units", "3", "--disag_models", "2", "--expl_task_actor", "separate",
    )  # fmt: skip
    assert metrics(tmp_path / "plain") == metrics(tmp_path / "options")


def test_after_expl_until_the_run_is_greedy(tmp_path):
    options = ("--expl_behavior", "plan2explore", "--expl_task_actor", "separate", "--expl_until", "60")
    assert train(tmp_path, *options) == 0
    lines = metrics(tmp_path)
    curious = {line["step"]: "expl/reward_mean" in line for line in lines if "loss/policy" in line}
    assert curious[40] and curious[60] and not curious[100] and not curious[120]


def test_actions_of_the_random_actor_are_uniform():
    space = {
        "action": gymnasium.spaces.MultiDiscrete([3, 2]),
        "force": gymnasium.spaces.Box(-1, 1, (2,), np.float32),
    }
    actions = networks.ActionVector(space)
    actor, rng = RandomActor(actions), torch.Generator().manual_seed(0)
    policy = actor(torch.zeros(4000, 9))
    sample = policy.sample(actor.noise(4000, generator=rng))
    assert sample.shape == (4000, actions.size)
    decoded = actions.decode(sample)
    for column, classes in ((0, 3), (1, 2)):
        share = np.bincount(decoded["action"][:, column], minlength=classes) / 4000
        assert share == pytest.approx(np.full(classes, 1 / classes), abs=0.03)
    force = decoded["force"]
    assert force.min() >= -1 and force.max() <= 1
    assert np.histogram(force, 4, (-1, 1))[0] / 8000 == pytest.approx(np.full(4, 0.25), abs=0.03)


def test_random_explores_at_random_while_the_task_actor_is_evaluated():
    agent = make_agent("--expl_behavior", "random")
    torch.nn.init.normal_(agent.behavior.actor.outs[0].bias, std=100.0)  # very sure of something
    obs = {k: np.zeros((300, *OBS[k].shape), OBS[k].dtype) for k in agent.obs_keys}
    rng = torch.Generator().manual_seed(0)

    def largest_share(explore: bool) -> float:
        action, _, _ = agent.act(obs, agent.initial_state(300), rng, explore=explore)
        return np.bincount(action["action"], minlength=5).max() / 300

    assert largest_share(True) < 0.35 and largest_share(False) > 0.9
    agent.explore(False)
    assert largest_share(True) > 0.9


def test_config_and_code_name_the_same_explorers():
    assert list(configs.read().options["expl_behavior"].words) == list(exploration.EXPLORERS)


def test_a_run_starts_from_a_checkpoint_with_another_explorer(tmp_path):
    """Explore first, then learn the task: world model, actor and their moments are loaded."""
    assert train(tmp_path / "first", "--expl_behavior", "plan2explore", "--expl_extr_scale", "0") == 0
    source = str(tmp_path / "first" / "latest.pt")
    folder, options = tmp_path / "lpm", ("--expl_behavior", "lpm", "--lpm.fifo", "6")
    # Still in the prefill: nothing is learned.
    assert train(folder, "--from_checkpoint", source, *options, "--steps", "30") == 0
    one, other = (checkpoints.load_checkpoint(place)[0]["agent"] for place in (tmp_path / "first", folder))
    for part in ("world_model", "behavior"):
        assert all(torch.equal(value, other[part][key]) for key, value in one[part].items())
    for index in range(len(one["optimizer"]["param_groups"][0]["params"])):
        before, after = (each["optimizer"]["state"][index]["momentum"] for each in (one, other))
        assert torch.equal(before, after)
    assert train(folder, *options, "--steps", "60") == 0


def test_another_batch_size_on_resume_empties_the_fifo_and_another_explorer_is_refused(tmp_path, capfd):
    options = ("--expl_behavior", "lpm")
    assert train(tmp_path, "--steps", "40", *options) == 0
    assert train(tmp_path, "--steps", "60") == 2
    assert "expl_behavior: lpm -> greedy" in capfd.readouterr().err
    assert train(tmp_path, "--steps", "60", *options, "--lpm.error", "kl") == 2
    assert "lpm.error: image -> kl" in capfd.readouterr().err
    assert train(tmp_path, "--steps", "44", *options, "--batch_size", "3") == 0


def test_past_errors_are_loaded_only_on_resume():
    agent = explorer_agent("lpm", "--lpm.fifo", "8")
    explore(agent, make_batch(agent))
    state = agent.state_dict()
    for resume, pushed in ((True, 8), (False, 0)):
        other = explorer_agent("lpm", "--lpm.fifo", "8")
        assert other.load_state_dict(state, resume=resume) == []
        assert other.explorer.fifo.pushed == pushed


def test_new_parameters_next_to_those_of_a_checkpoint_start_without_moments():
    old = make_agent("--opt.warmup", "0")
    for _ in range(3):
        old.train(make_batch(old))
    agent = explorer_agent("plan2explore", "--opt.warmup", "0", "--opt.lr", "1e-3")
    agent.load_state_dict(old.state_dict(), resume=False)
    bias = agent.explorer.ensemble.rest[-1].bias
    before = bias.detach().clone()
    agent.train(make_batch(agent))
    assert agent.opt.updates.tolist() == [4, 4, 4, 1]
    # The first step of LaProp is the rate itself, where no gradient is cut.
    step = (bias.detach() - before).abs()
    assert step.max() == pytest.approx(1e-3, rel=1e-3)


def test_curiosity_is_shown_under_the_video_of_an_evaluation():
    agent = explorer_agent("plan2explore")
    state = {**agent.rssm.initial(3), "action": torch.zeros(3, 5)}
    assert agent.curiosity(state).shape == (3,)
    agent.explore(False)
    assert agent.curiosity(state) is None and make_agent().curiosity(state) is None
    steps = {"image": np.zeros((3, 32, 16, 3), np.uint8), "reward": np.zeros(3, np.float32)}
    frames = shown(EvalEpisode(steps, np.array([-1.0, 0.0, 1.0])), 1)
    assert frames.shape == (3, 34, 16, 3) and not frames[:, :32].any()
    assert frames[2, 33, -3:].tolist() == [[0, 0, 0], [255, 127, 0], [255, 255, 255]]
    assert not frames[0, 32:].any() and frames[1, 32, -1].tolist() == [255, 127, 0]
    assert shown(EvalEpisode(steps), 1).shape == (3, 32, 16, 3)


@pytest.mark.parametrize("name", exploration.EXPLORERS)
def test_every_explorer_acts_and_trains_with_continuous_actions(name):
    agent = explorer_agent(name, act_space=CONTINUOUS)
    found, _ = agent.train(make_batch(agent))
    assert not found["opt/skipped"]
    obs = {k: np.zeros((3, *OBS[k].shape), OBS[k].dtype) for k in agent.obs_keys}
    action, _, _ = agent.act(obs, agent.initial_state(3), agent.rngs["act"], explore=True)
    assert all(np.isfinite(value).all() for value in action.values())
