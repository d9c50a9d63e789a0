"""Path C: the actor's choices, options in imagination and in the env, and when they end."""

from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from advice_helpers import ACTIONS, OBS, give_skills, make_agent, make_batch, some_feat, unsettle

import distributions as dists
import models
from lore_llm.option_actor import NOTHING, PLAN, outcomes, primitives

SLOTS = 3
SKILLS = {0: (10, [4], 1), 2: (11, [1, 2, 3], 4)}  # slot -> uid, actions, timeout; slot 1 is empty


def options_agent(*options: str, skills=SKILLS):
    agent = make_agent(("options",), *options)
    unsettle(agent)
    give_skills(agent, skills)
    return agent


# ---- The distribution over what is available


def masked(unimix=0.1, *, scale=1.0, rows=6, available=(False, True, False, True, True)):
    generator = torch.Generator().manual_seed(0)
    logits = (scale * torch.randn(rows, 5, generator=generator)).requires_grad_()
    mask = torch.tensor(available).expand(rows, 5)
    return logits, dists.MaskedOneHot(logits, unimix, mask)


@pytest.mark.parametrize("unimix", [0.0, 0.1])
def test_what_is_not_available_has_no_probability_and_the_rest_shares_the_uniform(unimix):
    logits, dist = masked(unimix)
    rest = [1, 3, 4]
    expected = (1 - unimix) * torch.softmax(logits[:, rest], -1) + unimix / 3
    assert torch.allclose(dist.probs[:, rest], expected)
    assert (dist.probs[:, [0, 2]] == 0).all()


@pytest.mark.parametrize("unimix", [0.0, 0.1])
def test_what_is_not_available_is_never_drawn(unimix):
    _, dist = masked(unimix, rows=4)
    low, high = torch.zeros(4, 1), torch.full((4, 1), 1 - 2**-24)
    assert dist.sample(low).argmax(-1).tolist() == [1] * 4
    assert dist.sample(high).argmax(-1).tolist() == [4] * 4
    for noise in torch.linspace(0, 1 - 2**-24, 999):
        drawn = dist.sample(noise.expand(4, 1)).argmax(-1)
        assert all(index in (1, 3, 4) for index in drawn.tolist())
    edges = dist.probs.detach().cumsum(-1)  # exactly at the bounds between two classes
    for noise in edges[:, :-1].unbind(1):
        drawn = dist.sample(noise[:, None].clamp(max=1 - 2**-24)).argmax(-1)
        assert all(index in (1, 3, 4) for index in drawn.tolist())


@pytest.mark.parametrize("scale", [1.0, 300.0])
@pytest.mark.parametrize("unimix", [0.0, 0.01])
def test_masked_numbers_and_gradients_are_finite(unimix, scale):
    logits, dist = masked(unimix, scale=scale)
    other = dists.MaskedOneHot(torch.zeros(6, 5), unimix, dist.available)
    value = torch.nn.functional.one_hot(torch.tensor([1, 3, 4, 1, 3, 4]), 5).float()
    for number in (dist.entropy(), dist.log_prob(value), dist.kl(other), other.kl(dist)):
        assert number.isfinite().all()
        (grad,) = torch.autograd.grad(number.sum(), logits, retain_graph=True)
        assert grad.isfinite().all() and (grad[:, [0, 2]] == 0).all()
    assert dist.detach().kl(dist).abs().max() < 1e-5 and not dist.detach().probs.requires_grad


def test_masked_entropy_and_divergence_are_those_of_what_is_available():
    logits, dist = masked(0.0)
    rest = dists.OneHot(logits[:, [1, 3, 4]])
    other = torch.randn(6, 5)
    assert torch.allclose(dist.entropy(), rest.entropy(), atol=1e-6)
    kl = dist.kl(dists.MaskedOneHot(other, 0.0, dist.available))
    assert torch.allclose(kl, rest.kl(dists.OneHot(other[:, [1, 3, 4]])), atol=1e-6)


def test_without_options_the_actor_chooses_as_the_plain_one():
    plain, agent = make_agent(()), options_agent(skills={})
    for each in (plain, agent):
        torch.manual_seed(3)
        torch.nn.init.normal_(each.behavior.actor.outs[0].weight, std=0.5)
    feat = some_feat(agent, 40)
    policy, expected = agent.policy.view(agent.behavior, feat).policy, plain.behavior.actor(feat)
    probs = policy.parts[0].probs
    assert torch.allclose(probs[:, SLOTS:], expected.parts[0].probs, atol=1e-6)
    assert (probs[:, :SLOTS] == 0).all()
    assert torch.allclose(policy.entropy(), expected.entropy(), atol=1e-5)
    noise = [torch.rand(40, 1)]
    assert torch.equal(policy.sample(noise)[:, SLOTS:], expected.sample(noise))


def test_primitive_probabilities_leave_options_out():
    agent = options_agent()
    policy = agent.policy.view(agent.behavior, some_feat(agent, 5)).policy
    probs = policy.parts[0].probs
    assert (probs[:, [0, 2]] > 0).all() and (probs[:, 1] == 0).all()
    alone = primitives(policy, ACTIONS)
    assert torch.allclose(alone.sum(-1), torch.ones(5))
    assert torch.allclose(alone, probs[:, SLOTS:] / probs[:, SLOTS:].sum(-1, keepdim=True))


def test_a_new_option_in_a_slot_starts_with_new_outputs():
    agent = options_agent()
    out = agent.policy.options.out
    with torch.no_grad():
        out.weight.fill_(7.0)
        out.bias.fill_(7.0)
    agent.policy.options.reset_slot(1, agent.rngs["options"])
    assert (out.weight[[0, 2]] == 7).all() and (out.bias[[0, 2]] == 7).all()
    assert out.weight[1].abs().max() < 1 and out.weight[1].std() > 0 and out.bias[1] == 0


# ---- Returns over options


def test_lambda_return_takes_a_lambda_of_each_step():
    # The actor decides at 0 and at 3; 1 and 2 lie in mid-option, where nothing may be bootstrapped.
    reward = torch.tensor([[9.0, 1.0, 2.0, 3.0, 4.0]])
    value = torch.tensor([[5.0, 1e6, 1e6, 10.0, 20.0]])
    zero = torch.zeros(1, 5)
    lam, disc = 0.5, 0.9
    decides = torch.tensor([[0.0, 0.0, 1.0, 1.0]])  # in the states 1 to 4
    ret = models.lambda_return(zero, zero, reward, value, disc, lam * decides + (1 - decides))[0]
    r3 = 4 + 0.9 * 20
    r2 = 3 + 0.9 * (0.5 * 10 + 0.5 * r3)
    r1 = 2 + 0.9 * r2
    r0 = 1 + 0.9 * r1
    assert ret.tolist() == pytest.approx([r0, r1, r2, r3])
    number = models.lambda_return(zero, zero, reward, value, disc, 0.5)
    tensor = models.lambda_return(zero, zero, reward, value, disc, torch.full((1, 4), 0.5))
    assert torch.equal(number, tensor)


def test_lambda_return_of_an_option_that_the_horizon_cuts_bootstraps_there():
    reward, value = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[5.0, 1e6, 7.0]])
    zero = torch.zeros(1, 3)
    ret = models.lambda_return(zero, zero, reward, value, 0.9, torch.ones(1, 2))[0]
    assert ret.tolist() == pytest.approx([1 + 0.9 * (2 + 0.9 * 7), 2 + 0.9 * 7])


def test_lambda_is_that_of_the_config_where_the_actor_decides_and_else_one():
    agent = options_agent()
    decides = torch.tensor([1.0, 0.0])
    assert agent.behavior.trace_decay(decides).tolist() == pytest.approx([0.95, 1.0])
    assert agent.behavior.trace_decay(1.0) == agent.behavior.lam


def noted(function, results):
    def call(*args, **kwargs):
        results.append(function(*args, **kwargs))
        return results[-1]

    return call


def test_losses_count_at_decisions_only(monkeypatch):
    agent = options_agent("--imag_horizon", "3")
    prefer(agent, 2)  # an option of 4 steps: only the first step is a decision
    end_always(agent, -50.0)
    found = {"policy_loss": [], "value_loss": []}
    for name, losses in found.items():
        monkeypatch.setattr(models, name, noted(getattr(models, name), losses))
    agent.train(make_batch(agent))
    (policy,), (imagined, replayed) = found.values()
    assert imagined.shape == (12, 3) and (imagined[:, 1:] == 0).all() and (imagined[:, 0] > 0).all()
    assert (policy[:, 1:] == 0).all() and (policy[:, 0] != 0).all()
    # Of the replayed steps, those at which an option ran on (3 and 4, less one of context) have no target.
    assert replayed[0].gt(0).tolist() == [True, True, False, False, True]
    assert replayed[1].gt(0).all()


# ---- Imagination


def prefer(agent, choice: int) -> None:
    """Let the actor take a choice (slots first) nearly always."""
    with torch.no_grad():
        for linear in (agent.policy.options.out, agent.behavior.actor.outs[0]):
            linear.weight.zero_()
            linear.bias.fill_(-20.0)
        where = agent.policy.options.out if choice < SLOTS else agent.behavior.actor.outs[0]
        where.bias[choice if choice < SLOTS else choice - SLOTS] = 20.0


def end_always(agent, logit: float) -> None:
    with torch.no_grad():
        agent.policy.options.end_out.weight.zero_()
        agent.policy.options.end_out.bias.fill_(logit)


def dreamt(agent, rows=5):
    config = agent.config.rssm
    start = {
        "deter": torch.zeros(rows, config.deter),
        "stoch": torch.zeros(rows, config.stoch, config.classes),
    }
    with torch.no_grad():
        return agent.policy.imagine(agent.behavior, agent.rssm, start, agent.rngs["train"])


def test_imagined_option_runs_to_its_timeout_and_then_the_actor_decides():
    agent = options_agent("--imag_horizon", "7", "--actor.unimix", "0")
    prefer(agent, 2)
    end_always(agent, -50.0)
    dream = dreamt(agent)
    assert (dream.action.argmax(-1) == torch.tensor([1, 2, 3, 1, 1, 2, 3])).all()
    assert (dream.decided == torch.tensor([1.0, 0, 0, 0, 1, 0, 0])).all()
    assert (dream.decides_next == torch.tensor([0.0, 0, 0, 1, 0, 0, 0])).all()  # it still runs at the horizon
    assert (dream.choice[:, [0, 4]].argmax(-1) == 2).all()
    assert dream.feat.shape[:2] == (5, 8)


def test_imagined_option_runs_on_whatever_else_the_actor_would_choose():
    skills = {0: (10, [4], 3), 2: (11, [1, 2, 3], 3)}
    agent = options_agent("--imag_horizon", "6", "--actor.unimix", "0", skills=skills)
    prefer(agent, 2)
    agent.policy.options.out.bias.data[0] = 20.0  # one as often as the other
    end_always(agent, -50.0)
    actions = dreamt(agent, 200).action.argmax(-1).unflatten(1, (2, 3)).flatten(0, 1)  # of each option
    assert {tuple(each) for each in actions.tolist()} == {(4, 4, 4), (1, 2, 3)}


def test_imagined_option_of_one_step_and_primitives_decide_at_every_step():
    agent = options_agent("--imag_horizon", "4", "--actor.unimix", "0")
    for choice, action in ((0, 4), (SLOTS + 2, 2)):
        prefer(agent, choice)
        end_always(agent, -50.0)
        dream = dreamt(agent)
        assert (dream.action.argmax(-1) == action).all() and (dream.choice.argmax(-1) == choice).all()
        assert (dream.decided == 1).all() and (dream.decides_next == 1).all()


def test_imagined_option_ends_where_the_network_predicts_it():
    agent = options_agent("--imag_horizon", "4", "--actor.unimix", "0")
    prefer(agent, 2)
    end_always(agent, 50.0)
    dream = dreamt(agent)
    assert (dream.action.argmax(-1) == 1).all() and (dream.decided == 1).all()
    end_always(agent, 0.0)  # at half of the steps
    dream = dreamt(agent, rows=4000)
    first = 1 - dream.decided[:, 1].mean()
    assert float(first) == pytest.approx(0.5, abs=0.03)
    ran_on = dream.decided[:, 1] == 0
    assert (dream.action[ran_on][:, 1].argmax(-1) == 2).all()
    assert (dream.action[~ran_on][:, 1].argmax(-1) == 1).all()


def test_ends_are_predicted_in_the_state_that_the_option_led_to():
    agent = options_agent("--imag_horizon", "3", "--actor.unimix", "0")
    prefer(agent, 2)
    asked = []
    agent.policy.options.ends = lambda feat, slot: asked.append((feat, slot)) or torch.full((5,), -50.0)
    dream = dreamt(agent)
    assert len(asked) == 3
    for t, (feat, slot) in enumerate(asked):
        assert torch.equal(feat, dream.feat[:, t + 1]) and (slot.argmax(-1) == 2).all()


def test_imagination_draws_as_without_options_where_none_is_there():
    plain, agent = make_agent((), "--imag_horizon", "4"), options_agent("--imag_horizon", "4", skills={})
    for each in (plain, agent):
        torch.manual_seed(3)
        torch.nn.init.normal_(each.behavior.actor.outs[0].weight, std=0.5)
    ours, theirs = dreamt(agent, 30), dreamt(plain, 30)
    assert torch.equal(ours.action, theirs.action) and torch.allclose(ours.feat, theirs.feat)


def test_views_disturb_no_generator_of_training():
    agent = options_agent()
    before = {name: rng.get_state() for name, rng in agent.rngs.items()}
    agent.explain(agent.initial_state(2))
    changed = {name for name, rng in agent.rngs.items() if not torch.equal(rng.get_state(), before[name])}
    assert changed == {"report"}


# ---- The network that predicts ends


def end_labels(agent, data):
    """Where the loss looks, [B, T-1], and what it wants there."""
    logits = torch.zeros(*data["option"].shape, requires_grad=True)
    agent.policy.options.ends = lambda feat, slot: logits[:, 1:]
    agent.policy.options.end_loss(some_feat(agent, *data["option"].shape), data).backward()
    grad = logits.grad[:, 1:]
    assert (logits.grad[:, 0] == 0).all()
    return grad != 0, grad < 0


def steps(decision, uid, **flags):
    length = len(decision)
    data = {"decision": torch.tensor([decision], dtype=torch.bool), "option": torch.tensor([uid])}
    for name in ("is_first", "is_last"):
        data[name] = torch.zeros(1, length, dtype=torch.bool)
        data[name][0, flags.get(name, [])] = True
    return data


X, o = True, False


@pytest.mark.parametrize(
    "decision, uid, flags, looked, ends",
    [
        # Uid 11 times out after 4 steps: what follows its last step is known.
        ([1, 0, 0, 0, 1, 1], [11, 11, 11, 11, 0, 0], {}, [X, X, X, o, o], [o, o, o, o, o]),
        ([1, 0, 1, 0, 0, 1], [11, 11, 11, 11, 11, 0], {}, [X, X, X, X, X], [o, X, o, o, X]),
        # Uid 10 lasts one step, 77 is gone, 0 are primitive actions.
        ([1, 1, 0, 1, 1, 1], [10, 77, 77, 10, 0, 0], {}, [o, o, o, o, o], [o, o, o, o, o]),
        # It started before the sequence, at an unknown step.
        ([0, 0, 1, 0, 1, 1], [11, 11, 11, 11, 0, 0], {}, [o, o, X, X, o], [o, o, o, X, o]),
        # Ends of episodes do not count.
        ([1, 0, 1, 1, 0, 1], [11, 11, 0, 11, 11, 0], {"is_last": [2], "is_first": [3]},
         [X, o, o, X, X], [o, o, o, o, X]),
        # The worker was restarted in mid-option.
        ([1, 0, 1, 1, 1, 1], [11, 11, 0, 0, 0, 0], {"is_first": [2]}, [X, o, o, o, o], [o, o, o, o, o]),
    ],
)  # fmt: skip
def test_ends_are_learned_of_real_executions(decision, uid, flags, looked, ends):
    found, wanted = end_labels(options_agent(), steps(decision, uid, **flags))
    assert found[0].tolist() == looked
    assert (wanted & found)[0].tolist() == ends


def test_end_loss_by_hand_and_without_executions():
    agent = options_agent()
    end_always(agent, 1.0)
    data = steps([1, 0, 1, 0, 0, 1], [11, 11, 11, 11, 11, 0])
    loss = agent.policy.options.end_loss(some_feat(agent, 1, 6), data).detach()
    p = 1 / (1 + np.exp(-1.0))
    assert float(loss) == pytest.approx(-(2 * np.log(p) + 3 * np.log(1 - p)) / 5, rel=1e-5)
    assert float(agent.policy.options.end_loss(some_feat(agent, 1, 3), steps([1, 1, 1], [0, 0, 0]))) == 0


# ---- In the envs


class Critic(torch.nn.Module):
    """Returns the values of the test."""

    def __init__(self, env):
        super().__init__()
        self.env = env

    def forward(self, feat):
        return SimpleNamespace(mean=self.env.value)


class Scripted:
    """The policy in two envs whose observations and choices are given by the test."""

    def __init__(self, paths=("options", "synthetic"), skills=SKILLS):
        self.agent = make_agent(paths, "--horizon", "2", "--reward_scale", "2")  # disc 0.5
        if "options" in paths:
            give_skills(self.agent, skills)
        self.policy, self.outcomes = self.agent.policy, []
        self.state = self.agent.initial_state(2)
        self.slots = SLOTS if "options" in paths else 0
        self.value = torch.zeros(2)
        self.agent.behavior.critic = Critic(self)

    def step(self, choices, reward=(0, 0), value=(0, 0), plans=None, symbolic=None, **flags):
        """Actions, decision and option of this step; `choices` are indices, slots first."""
        self.value = torch.tensor(value, dtype=torch.float32)
        obs = {name: np.zeros(2, bool) for name in ("is_first", "is_last", "is_terminal")}
        for name, envs in flags.items():
            obs[name][envs] = True
        obs["reward"] = np.array(reward, np.float32)
        obs["symbolic"] = np.array(symbolic or [(0, 0), (0, 0)], np.int32)
        choice = torch.nn.functional.one_hot(torch.tensor(choices), self.slots + ACTIONS).float()
        with torch.no_grad():
            action, running, stored = self.policy.execute(
                self.agent.behavior, torch.zeros(2, 1), choice, obs, self.state, plans or {}
            )
        self.state = {**self.state, **running}
        self.outcomes += outcomes(running)
        decision = stored["decision"].tolist() if stored else None
        return action.argmax(-1).tolist(), decision, stored["option"].tolist() if stored else None


def test_options_start_run_and_return_in_the_env():
    env = Scripted()
    assert env.step([2, SLOTS + 3], is_first=[0, 1]) == ([1, 3], [True, True], [11, 0])
    assert env.step([0, 0]) == ([2, 4], [False, True], [11, 10])  # env 0 runs on whatever is chosen
    assert env.step([SLOTS + 4, 2]) == ([3, 1], [False, True], [11, 11])
    assert env.step([SLOTS, SLOTS]) == ([1, 2], [False, False], [11, 11])
    assert env.step([SLOTS + 4, SLOTS]) == ([4, 3], [True, False], [0, 11])  # the timeout of 4 steps
    assert [(o.env, o.uid, o.length) for o in env.outcomes] == [(1, 10, 1), (0, 11, 4)]


def test_outcome_of_an_option_is_its_discounted_return_less_what_was_expected():
    env = Scripted()
    env.agent.behavior.retnorm.range[1] = 4.0  # the scale
    env.step([2, SLOTS], value=(3, 0), is_first=[0, 1])
    env.step([0, SLOTS], reward=(1, 0))
    env.step([0, SLOTS], reward=(2, 0))
    env.step([0, SLOTS], reward=(4, 0))
    env.step([SLOTS, SLOTS], reward=(8, 0), value=(16, 0))
    (outcome,) = env.outcomes
    ret = 2 * (1 + 2 / 2 + 4 / 4 + 8 / 8) + 16 / 16  # reward_scale 2, discount 1/2
    assert outcome.gain == pytest.approx((ret - 3) / 4)
    assert (outcome.uid, outcome.length, outcome.success) == (11, 4, True)
    assert (outcome.ret, outcome.scale) == (ret, 4)


def test_option_ends_with_the_episode():
    env = Scripted()
    env.step([2, 2], value=(1, 1), is_first=[0, 1])
    _, decision, option = env.step([2, 2], reward=(3, 3), value=(8, 8), is_last=[0, 1], is_terminal=[1])
    assert decision == [True, True] and option == [0, 0]  # nothing starts at the end
    gains = [outcome.gain for outcome in env.outcomes]
    assert gains == pytest.approx([2 * 3 + 0.5 * 8 - 1, 2 * 3 - 1])  # a truncated episode is bootstrapped
    assert env.step([SLOTS, 2], is_first=[0, 1]) == ([0, 1], [True, True], [0, 11])
    assert len(env.outcomes) == 2


def test_option_stops_when_the_worker_was_restarted():
    env = Scripted()
    env.step([2, SLOTS], is_first=[0, 1])
    assert env.step([SLOTS + 3, SLOTS], reward=(9, 0), is_first=[0]) == ([3, 0], [True, True], [0, 0])
    assert env.outcomes == []
    assert env.step([2, SLOTS]) == ([1, 0], [True, True], [11, 0])


class Watcher:
    """A captioner whose subgoal is reached when the first number of `symbolic` has grown."""

    def reached(self, subgoal, before, now):
        assert subgoal == "grow"
        return bool(now["symbolic"][0] > before["symbolic"][0])

    def blocked(self, before, now, action):
        self.seen = (before["symbolic"].tolist(), now["symbolic"].tolist(), action)
        return bool((now["symbolic"] == before["symbolic"]).all())


def test_option_ends_at_its_subgoal_which_is_its_success():
    env = Scripted()
    env.policy.captioner, env.policy.subgoals = Watcher(), ["grow", None, "grow"]
    env.step([2, 2], value=(9, 9), is_first=[0, 1], symbolic=[(5, 0), (5, 0)])
    assert env.step([0, 0], symbolic=[(5, 1), (4, 1)])[1] == [False, False]
    # Reached is measured from the start, not from the step before.
    assert env.step([SLOTS, SLOTS], symbolic=[(6, 2), (5, 2)])[1] == [True, False]
    (outcome,) = env.outcomes
    assert outcome.success and outcome.gain < 0 and outcome.length == 2
    assert env.policy.captioner.seen == ([4, 1], [5, 2], 2)


def test_option_ends_where_its_action_was_blocked():
    env = Scripted()
    env.policy.captioner, env.policy.subgoals = Watcher(), ["grow", None, "grow"]
    env.step([2, 2], is_first=[0, 1], symbolic=[(5, 0), (5, 0)], value=(-1, 0))
    assert env.step([SLOTS, SLOTS], symbolic=[(5, 0), (5, 1)])[1] == [True, False]
    (outcome,) = env.outcomes
    assert not outcome.success and outcome.gain > 0  # success is the subgoal's, where there is one


def test_plan_is_executed_and_every_step_of_it_is_a_decision():
    env = Scripted()
    plan = [4, 3, 0]
    assert env.step([2, SLOTS], plans={0: plan}, is_first=[0, 1], value=(3, 0)) == (
        [4, 0], [True, True], [0, 0],
    )  # fmt: skip
    assert int(env.state["uid"][0]) == PLAN
    assert env.step([2, SLOTS], reward=(1, 0)) == ([3, 0], [True, True], [0, 0])
    assert env.step([2, SLOTS], reward=(1, 0)) == ([0, 0], [True, True], [0, 0])
    assert env.step([SLOTS + 1, SLOTS], reward=(1, 0), value=(4, 0)) == ([1, 0], [True, True], [0, 0])
    (outcome,) = env.outcomes
    ret = 2 * (1 + 1 / 2 + 1 / 4) + 4 / 8
    assert (outcome.uid, outcome.length) == (PLAN, 3)
    assert outcome.gain == pytest.approx(ret - 3) and outcome.ret == pytest.approx(ret)
    assert int(env.state["uid"][0]) == NOTHING


def test_a_running_option_or_plan_goes_before_a_new_plan():
    env = Scripted()
    env.step([2, SLOTS], plans={1: [3, 3]}, is_first=[0, 1])
    assert env.step([0, 0], plans={0: [4, 4], 1: [0, 0]})[0] == [2, 3]
    assert env.step([0, SLOTS + 1], plans={0: [4, 4]})[0] == [3, 1]
    assert env.step([0, SLOTS + 1])[0] == [1, 1]
    assert env.step([SLOTS, SLOTS], plans={0: [4, 4]})[0] == [4, 0]  # it has returned


def test_no_plan_begins_at_the_end_of_an_episode():
    env = Scripted()
    env.step([SLOTS, SLOTS], is_first=[0, 1])
    env.step([SLOTS, SLOTS], plans={0: [4, 4]}, is_last=[0])
    assert int(env.state["uid"][0]) == NOTHING


def test_plans_are_executed_without_options_too():
    env = Scripted(paths=("synthetic",))
    assert env.step([1, 2], plans={1: [4, 0]}, is_first=[0, 1]) == ([1, 4], None, None)
    assert env.step([1, 2])[0] == [1, 0]
    assert env.step([1, 2])[0] == [1, 2]


def test_removed_option_that_is_running_runs_to_its_end():
    env = Scripted()
    env.step([2, SLOTS], is_first=[0, 1])
    give_skills(env.agent, {0: (12, [4], 1)})
    assert env.step([SLOTS, 0]) == ([2, 4], [False, True], [11, 12])


def test_agent_stores_what_the_env_did():
    agent = options_agent("--actor.unimix", "0")
    prefer(agent, 2)
    obs = {key: np.zeros((2, *space.shape), space.dtype) for key, space in OBS.items()}
    state = agent.initial_state(2)
    actions = []
    for step in range(5):
        obs["is_first"][:] = step == 0
        # `symbolic` changes, so nothing is blocked.
        obs["symbolic"][:] = step
        action, state, latents = agent.act(obs, state, agent.rngs["act"], explore=True)
        actions.append(action["action"].tolist())
        assert latents["option"].tolist() == [11, 11] and latents["option"].dtype == np.int32
        assert latents["decision"].tolist() == [step in (0, 4)] * 2
        assert (state["action"].argmax(-1).numpy() == action["action"]).all()  # the input of the model
    assert actions == [[1, 1], [2, 2], [3, 3], [1, 1], [1, 1]]


def test_spaces_of_what_is_stored_fit_the_replay():
    from lore_llm.hooks import advice_spaces

    agent = options_agent()
    spaces, defaults = advice_spaces(agent.config, {"action": gymnasium.spaces.Discrete(ACTIONS)})
    assert set(spaces) == {"decision", "option"} and defaults == {"decision": 1.0, "option": 0.0}
    assert advice_spaces(make_agent(()).config, {"action": gymnasium.spaces.Discrete(5)}) == ({}, {})


def test_metric_is_the_share_of_options_among_imagined_choices():
    agent = make_agent(("options",))
    choice = F.one_hot(torch.tensor([[0, 4, 3, 5], [4, 0, 0, 6]]), 3 + ACTIONS).float()  # slot 0, or none
    decided = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0]])  # what was drawn elsewhere is void
    dream = models.Imagined(torch.zeros(2, 5, 1), choice[..., 3:], choice, decided, decided)
    _, metrics = agent.policy.loss(agent.behavior, dream, None, models.Starts({}), 1.0)
    assert float(metrics["options/imagined_share"]) == 0.5
