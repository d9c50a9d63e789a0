"""Path A: the plans that become starts of imagination, their weights, and that they train no model."""

from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from advice_helpers import (
    ACTIONS,
    OBS,
    SilentService,
    advised_config,
    make_agent,
    make_batch,
    make_items,
    unsettle,
)

import distributions as dists
import models
from logger import Timer
from lore_llm import synthetic
from lore_llm.advice import MAX_PLAN, Advice
from lore_llm.hooks import AdviceHooks, advice_spaces
from lore_llm.option_actor import PLAN
from lore_llm.service import Answered
from lore_llm.synthetic import Item, SyntheticItems
from networks import Policy
from replay import Replay

GOOD = 1  # the action that a toy world rewards
DISC = 0.9


class ToyRSSM:
    """A world whose state is the last action, and where a start's state says nothing."""

    def unpack(self, deter, stoch):
        return {"deter": torch.zeros(len(deter), ACTIONS), "stoch": torch.zeros(len(deter), 1)}

    def noise(self, *shape, generator):
        return torch.zeros(*shape)

    def split_weights(self):
        return None

    def feat(self, state):
        return state["deter"]

    def imagine(self, state, action, noise, weights):
        return {"deter": action.float(), "stoch": state["stoch"]}


class Toy:
    """World model and behaviour: a reward for GOOD, one value everywhere, and one action that ends all."""

    def __init__(self, lam=0.5, scale=4.0, deadly=4, value=2.0):
        self.rssm, self.actions, self.lam = ToyRSSM(), SimpleNamespace(size=ACTIONS), lam
        self.retnorm = SimpleNamespace(scale=torch.tensor(scale))
        self.reward_head = lambda feat: SimpleNamespace(mean=feat[..., GOOD])
        self.cont_head = lambda feat: SimpleNamespace(prob=DISC * (1 - feat[..., deadly]))
        self.critic = lambda feat: SimpleNamespace(mean=torch.full(feat.shape[:-1], value))
        self.logits = torch.zeros(ACTIONS)

    def actor(self, feat):
        return Policy([dists.OneHot(self.logits.expand(*feat.shape[:-1], ACTIONS))], [ACTIONS])


def items_of(*plans, weight=0.5):
    found = synthetic.tensors({}, plans)
    items = {key: torch.from_numpy(value) for key, value in found.items()}
    items["deter"], items["stoch"] = torch.zeros(len(plans), 3), torch.zeros(len(plans), 1)
    return {**items, "weight": torch.full((len(plans),), weight)}


# ---- How many


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("batch, length, last", [(1, 1, 0), (2, 3, 0), (16, 64, 0), (16, 64, 8), (3, 5, 2)])
def test_extra_starts_are_never_more_than_their_share(ratio, batch, length, last):
    config = SimpleNamespace(batch_size=batch, batch_length=length, imag_last=last)
    config.synthetic = SimpleNamespace(synthetic_ratio_max=ratio)
    real, extra = batch * (last or length), synthetic.rows(config)
    assert extra <= ratio * (real + extra) + 1e-9
    assert extra + 1 > ratio * (real + extra + 1) - 1e-9  # one more would be too many
    assert synthetic.amount(config) * MAX_PLAN >= extra


def test_batch_too_small_for_any_extra_start_trains_without(tmp_path):
    agent, hooks = make_hooks(tmp_path, "--synthetic.synthetic_ratio_max", "0.05")
    assert synthetic.rows(agent.config) == 0
    fill(hooks.replay)
    hooks.synthetic.add(Item(0, 5, [1, 2], 1.0, 0))
    assert hooks.items()() == {}
    agent.train(make_batch(agent))


# ---- Rollouts


def test_rollout_by_hand():
    toy = Toy(value=4.0)
    rollout = synthetic.roll_out(toy, toy, items_of([0, GOOD, GOOD], [GOOD, 4, GOOD, GOOD]), None)
    assert rollout.action.argmax(-1)[0, :3].tolist() == [0, GOOD, GOOD]
    assert torch.equal(rollout.states["deter"], rollout.action)  # the states that the steps lead to
    assert rollout.valid.sum(1).tolist() == [3, 4]
    # Lambda-returns to the plan's end, where the value is what is expected.
    r2 = 1 + 0.9 * 4
    r1 = 1 + 0.9 * (0.5 * 4 + 0.5 * r2)
    r0 = 0 + 0.9 * (0.5 * 4 + 0.5 * r1)
    advantage = [(r - 4) / 4 for r in (r0, r1, r2)]
    assert rollout.advantage[0, :3].tolist() == pytest.approx(advantage, abs=1e-6)
    assert (rollout.advantage[0, 3:] == 0).all()
    # A start weighs less the less probable it is that the episode gets there; a clone likewise, before it.
    assert rollout.weight[0, :3].tolist() == pytest.approx([0.5 * 0.9, 0.5 * 0.81, 0.5 * 0.729])
    assert (rollout.weight[0, 3:] == 0).all()
    alive = [1, 0.9, 0.81]
    cloned = [0.5 * a * max(0, adv) for a, adv in zip(alive, advantage, strict=True)]
    assert rollout.clone_weight[0, :3].tolist() == pytest.approx(cloned, abs=1e-6) and min(advantage) < 0
    assert (rollout.clone_weight[0, 3:] == 0).all()
    # The second action of the other plan ends the episode.
    assert rollout.weight[1, :4].tolist() == pytest.approx([0.45, 0, 0, 0])
    assert rollout.clone_weight[1, 2:].sum() == 0


def test_cloning_is_the_log_probability_of_the_plan_by_its_advantage():
    agent = make_agent(("synthetic",), "--synthetic.lambda_bc", "0.3")
    unsettle(agent)
    advised, behavior = agent.policy, agent.behavior
    items = make_items(agent, 4)
    real = agent.rssm.unpack(items["deter"], items["stoch"])
    starts = advised.starts(behavior, agent.world_model, real, items)
    rollout = starts.rollout
    assert rollout.clone_weight.sum() > 0 and (rollout.clone_weight >= 0).all()
    probs = behavior.actor(rollout.feat[:, :-1]).parts[0].probs
    chosen = (probs * rollout.action).sum(-1).log()
    expected = -0.3 * (rollout.clone_weight * chosen).sum() / (4 * 3)
    dream = models.Imagined(torch.zeros(8, 2, 3), None, None)
    losses, metrics = advised.loss(behavior, dream, None, starts, 1.0)
    assert torch.allclose(losses["advice_bc"], expected)
    assert torch.allclose(metrics["synthetic/bc_loss"], expected / 0.3)


# ---- Starts


def extra_starts(agent, items):
    real = {
        "deter": torch.zeros(12, agent.config.rssm.deter),
        "stoch": torch.zeros(12, agent.config.rssm.stoch, agent.config.rssm.classes),
    }
    return agent.policy.starts(agent.behavior, agent.world_model, real, items)


def test_starts_are_the_real_ones_and_those_that_plans_lead_to():
    agent = make_agent(("synthetic",))
    assert synthetic.rows(agent.config) == 4  # of 16
    items = make_items(agent, 1)
    starts, weight, rollout = extra_starts(agent, items)
    assert len(starts["deter"]) == len(starts["stoch"]) == 16 and weight.shape == (16, 1)
    assert torch.equal(starts["deter"][12:], rollout.states["deter"][0, :4])
    assert not starts["deter"][:12].any()
    raw = torch.cat([torch.ones(12), rollout.weight[0, :4]])
    assert torch.allclose(weight[:, 0], 16 * raw / raw.sum())  # a mean over all is the weighted mean
    assert weight[15] == 0 and (weight[12:15] > 0).all()  # the plan has 3 steps
    assert (weight[12:] < weight[0]).all()


def test_without_items_of_any_weight_the_real_starts_count_alone():
    agent = make_agent(("synthetic",))
    items = make_items(agent, 1)
    items["weight"][:] = 0
    weight = extra_starts(agent, items).weight
    assert (weight[:12] == 16 / 12).all() and (weight[12:] == 0).all()
    real = {"deter": torch.zeros(1)}
    assert agent.policy.starts(agent.behavior, agent.world_model, real, {}) == models.Starts(real)


def test_return_normaliser_sees_real_rows_only(monkeypatch):
    agent = make_agent(("synthetic",))
    unsettle(agent)
    seen, rets = [], []
    update, losses = models.ReturnNorm.update, models.imagination_losses
    monkeypatch.setattr(models.ReturnNorm, "update", lambda self, ret: seen.append(ret) or update(self, ret))

    def noted(*args, **kwargs):
        found = losses(*args, **kwargs)
        rets.append(found[1])
        return found

    monkeypatch.setattr(models, "imagination_losses", noted)
    agent.train(make_batch(agent), make_items(agent, 1))
    assert rets[0].shape == (16, 3) and torch.equal(seen[0], rets[0][:12])


def test_items_do_not_train_the_world_model():
    weights = []
    for weight in (0.0, 1.0):
        agent = make_agent(("synthetic",), "--opt.warmup", "0")
        unsettle(agent)
        items = make_items(agent, 1)
        items["weight"][:] = weight
        agent.train(make_batch(agent), items)
        weights.append(agent.weights())
    for name, value in weights[0]["world_model"].items():
        assert torch.equal(value, weights[1]["world_model"][name]), name
    actors = [each["behavior"]["actor.outs.0.weight"] for each in weights]
    assert not torch.equal(*actors)


def test_metric_is_the_share_of_starts_that_were_used():
    agent = make_agent(("synthetic",))
    metrics, _ = agent.train(make_batch(agent), make_items(agent, 1))
    assert float(metrics["synthetic/ratio"]) == pytest.approx(3 / 15)


# ---- The items


def some_replay(n_envs=2, rows=10, **options):
    spaces = OBS | {"action": gymnasium.spaces.Discrete(ACTIONS)}
    return Replay(spaces, n_envs, n_envs * rows, 4, 1, 0, deter_size=3, stoch_size=2, classes=4, **options)


def fill(replay, steps=8, n_envs=2, latents=True, extra=()):
    """Steps of one episode in each env; deter holds the env and the place."""
    for _ in range(steps):
        place = replay.heads[0]
        step = {key: np.zeros((n_envs, *space.shape), space.dtype) for key, space in OBS.items()}
        step |= {"action": np.zeros(n_envs, np.int32)} | dict(extra)
        step["is_first"][:] = place == 0
        if latents:
            size = replay.layout["deter"][0][0]
            deter = np.zeros((n_envs, size), np.float16)
            deter[:, 0], deter[:, 1] = 1 + np.arange(n_envs), place
            step |= {"deter": deter, "stoch": np.zeros((n_envs, replay.layout["stoch"][0][0]), np.uint8)}
        replay.add(step)


def some_items(**options):
    words = [word for name, value in options.items() for word in (f"--synthetic.{name}", str(value))]
    config = advised_config(("synthetic",), *words)
    return SyntheticItems(config, np.random.default_rng(0))


def test_items_weigh_confidence_times_reliability_and_decay():
    items, replay = some_items(), some_replay()
    fill(replay)
    items.add(Item(1, 3, [4, 0, 2], 0.8, born=7))
    drawn = items.choose(replay, updates=9, reliability=0.5)(replay)
    assert drawn["weight"].tolist() == pytest.approx([0.8 * 0.5 * synthetic.WEIGHT_DECAY**2])
    assert drawn["plan"][0].tolist() == [4, 0, 2] + [0] * 12 and drawn["length"].tolist() == [3]
    assert drawn["deter"][0, :2].tolist() == [2, 3]  # env 1, place 3


def test_items_whose_state_was_evicted_are_dropped():
    items, replay = some_items(), some_replay(rows=5)
    fill(replay, steps=5)
    for place in (1, 4):
        items.add(Item(0, place, [place], 1.0, 0))
    fill(replay, steps=2)  # places 0 and 1 are gone
    drawn = [items.choose(replay, 0, 1.0)(replay)["plan"][0, 0] for _ in range(20)]
    assert set(drawn) == {4} and [item.place for item in items.items] == [4]
    fill(replay, steps=5)
    assert items.choose(replay, 0, 1.0)(replay)["weight"].tolist() == [0] and not items.items


def test_items_without_latents_have_no_weight_until_they_were_trained_on():
    items, replay = some_items(), some_replay()
    fill(replay, latents=False)
    items.add(Item(0, 3, [1], 1.0, 0))
    assert items.choose(replay, 0, 1.0)(replay)["weight"].tolist() == [0]
    replay.ring["deter"][:] = 1
    assert items.choose(replay, 0, 1.0)(replay)["weight"].tolist() == [1]


def test_items_are_drawn_from_all_and_the_oldest_go_first(monkeypatch):
    monkeypatch.setattr(synthetic, "MAX_ITEMS", 3)
    items, replay = some_items(), some_replay()
    fill(replay)
    for place in range(5):
        items.add(Item(0, place, [place], 1.0, 0))
    drawn = {int(items.choose(replay, 0, 1.0)(replay)["plan"][0, 0]) for _ in range(60)}
    assert drawn == {2, 3, 4}


def test_items_are_resumed():
    items, replay = some_items(), some_replay()
    fill(replay)
    for place in range(6):
        items.add(Item(place % 2, place, [place], 0.5, place))
    other = some_items()
    other.load_state_dict(items.state_dict())
    draws = [
        [int(each.choose(replay, 9, 1.0)(replay)["plan"][0, 0]) for _ in range(9)] for each in (items, other)
    ]
    assert draws[0] == draws[1] and len(set(draws[0])) > 2 and other.items == items.items


# ---- Evaluating plans


def test_predicted_returns_of_plan_and_policy_by_hand():
    toy = Toy()
    toy.logits = torch.tensor([-99.0, -99.0, 99.0, -99.0, -99.0])  # the policy never does the good thing
    found = synthetic.evaluate(toy, toy, items_of([GOOD, 0, GOOD], [GOOD, 4]), 3, None)
    rest = 0.9**3 * 2
    assert found["plan"][0] == pytest.approx(1 + 0.81 + rest, rel=1e-5)
    assert found["policy"][0] == pytest.approx(rest, rel=1e-5)  # over as many steps
    assert found["plan"][1] == pytest.approx(1.0, rel=1e-5)  # the episode ends, and with it the value
    assert found["policy"][1] == pytest.approx(0.81 * 2, rel=1e-5)
    assert float(found["scale"]) == 4 and not found["disagreement"].any()


def test_predicted_return_of_the_policy_is_a_mean_over_rollouts():
    toy = Toy(deadly=0)
    toy.logits = torch.tensor([-99.0, 0.0, 0.0, -99.0, -99.0])  # good or not, by chance
    generator = torch.Generator().manual_seed(0)
    found = synthetic.evaluate(toy, toy, items_of([2]), 4000, generator)
    assert float(found["policy"]) == pytest.approx(0.5 + 0.9 * 2, abs=0.03)
    assert float(found["plan"]) == pytest.approx(0.9 * 2)


def test_disagreement_is_the_mean_over_the_plans_own_steps():
    toy = Toy()
    found = synthetic.evaluate(
        toy, toy, items_of([1, 2, 3], [4]), 2, None, lambda feat, action: action.argmax(-1).float()
    )
    assert found["disagreement"].tolist() == [2.0, 4.0]


# ---- The run's side


def make_hooks(tmp_path, *options, paths=("synthetic",)):
    agent = make_agent(paths, "--prefill", "10", *options)
    act = {"action": gymnasium.spaces.Discrete(ACTIONS)}
    found, defaults = advice_spaces(agent.config, act)
    rssm = agent.config.rssm
    replay = Replay(
        OBS | act | found, 2, 60, 6, 1, 0, deter_size=rssm.deter, stoch_size=rssm.stoch,
        classes=rssm.classes, defaults=defaults,
    )  # fmt: skip
    return agent, AdviceHooks(SilentService(), agent, replay, agent.config, tmp_path, Timer())


def predict(agent, *, plan=2.0, policy=1.0, disagreement=0.0):
    """Fix the world model's predictions for any plan."""

    def evaluate(items):
        count = len(items["plan"])
        values = {"plan": plan, "policy": policy, "disagreement": disagreement, "scale": 1.0}
        return {name: np.full(count, value) for name, value in values.items()}

    agent.evaluate_plans = evaluate


def answer(env=0, place=0, plan=("action_1", "action_2"), late=False, **advice):
    return Answered(env, place, Advice(plan=plan, **advice), "", late)


def ask_with(hooks, *answers, step):
    """One step before which the adviser answers so."""
    hooks.service.ask = lambda *args, **kwargs: list(answers)
    obs = {key: np.zeros((2, *space.shape), space.dtype) for key, space in OBS.items()}
    return obs, *hooks.before(obs, hooks.agent.initial_state(2), step)


@pytest.mark.parametrize(
    "plan, disagreement, accepted",
    [(1.1, 0.0, True), (1.0, 0.0, False), (0.9, 0.0, False), (9.0, 0.5, True), (9.0, 0.51, False)],
)
def test_plan_is_accepted_when_it_beats_the_policy_and_the_model_is_sure(
    tmp_path, plan, disagreement, accepted
):
    agent, hooks = make_hooks(tmp_path, "--eval_every", "0", "--synthetic.synthetic_warmup", "0")
    fill(hooks.replay)
    agent.policy.ensemble = lambda feat, action: torch.zeros(())
    agent.policy.largest.fill_(0.5)
    predict(agent, plan=plan, policy=1.0, disagreement=disagreement)
    obs, _, _ = ask_with(hooks, answer(env=1, place=4, confidence=0.7), step=100)
    hooks.after(obs, agent.initial_state(2), 100)
    expected = [Item(1, 4, [1, 2], 0.7, agent.updates)] if accepted else []
    assert list(hooks.synthetic.items) == expected
    metrics = hooks.metrics()
    assert metrics["synthetic/accepted"] == accepted
    assert metrics["synthetic/return_gain"] == pytest.approx(plan - 1)


@pytest.mark.parametrize(
    "step, losses, ready",
    [
        (49, [1.0, 1.0], False),  # warm-up
        (50, [1.0, 1.0], True),
        (50, [], False),  # not known yet
        (50, [1.0], False),
        (50, [1.0, 0.9], False),  # it falls by a tenth
        (50, [1.0, 0.91], True),
        (50, [1.0, 1.5], True),
    ],
)
def test_plans_are_used_after_the_warm_up_when_the_model_has_settled(tmp_path, step, losses, ready):
    agent, hooks = make_hooks(tmp_path, "--synthetic.synthetic_warmup", "50")
    fill(hooks.replay)
    predict(agent)
    hooks.model_losses = losses
    obs, _, _ = ask_with(hooks, answer(), step=step)
    hooks.after(obs, agent.initial_state(2), step)
    assert bool(hooks.synthetic.items) == ready


def test_plans_of_the_prefill_are_not_evaluated(tmp_path):
    agent, hooks = make_hooks(tmp_path, "--eval_every", "0", "--synthetic.synthetic_warmup", "0")
    fill(hooks.replay)
    predict(agent)
    for step, known in ((9, 0), (10, 1)):
        obs, _, _ = ask_with(hooks, answer(), step=step)
        hooks.after(obs, agent.initial_state(2), step)
        assert len(hooks.synthetic.items) == known


def test_late_plans_about_steps_without_latents_are_not_evaluated(tmp_path):
    agent, hooks = make_hooks(tmp_path, "--eval_every", "0", "--synthetic.synthetic_warmup", "0")
    fill(hooks.replay, latents=False)
    predict(agent)
    obs, _, _ = ask_with(hooks, answer(), step=10)
    hooks.after(obs, agent.initial_state(2), 10)
    assert not hooks.synthetic.items and "synthetic/accepted" not in hooks.metrics()


def test_the_models_losses_of_the_last_two_evaluations_are_kept(tmp_path):
    agent, hooks = make_hooks(tmp_path)
    losses = iter([5.0, 4.0, 3.5])
    agent.model_loss = lambda batch: next(losses)
    length = 9
    episode = {key: np.zeros((length, *space.shape), space.dtype) for key, space in OBS.items()}
    episode |= {"action": np.zeros(length, np.int32)}
    for expected in ([5.0], [5.0, 4.0], [4.0, 3.5]):
        hooks.evaluated([episode])
        assert hooks.model_losses == expected


def test_loss_of_the_model_is_that_of_training_on_the_same_steps(tmp_path):
    agent, hooks = make_hooks(tmp_path, "--reward_scale", "50", "--rssm.free_nats", "9")
    unsettle(agent)
    rng = np.random.default_rng(0)
    steps = 100
    episode = {key: np.zeros((steps, *space.shape), space.dtype) for key, space in OBS.items()}
    episode |= {"action": np.zeros(steps, np.int32)}
    episode["vector"] = rng.normal(size=(steps, 4)).astype(np.float32)
    episode["reward"] = rng.normal(size=steps).astype(np.float32)
    batch = hooks._sequences([episode])
    assert batch["vector"].shape == (2, 7, 4)
    assert np.array_equal(batch["vector"][1], episode["vector"][93:])
    agent.rngs["report"].set_state(agent.rngs["train"].get_state())  # the same samples
    loss = agent.model_loss(batch)
    metrics, _ = agent.train(batch)
    scales = agent.config.loss_scales
    names = ("vector", "reward", "cont", "dyn", "rep")
    assert loss == pytest.approx(float(sum(scales[n] * metrics[f"loss/{n}"] for n in names)), rel=1e-6)


@pytest.mark.parametrize("value, share", [(0.0, 0.0), (0.25, 0.25), (0.5, 0.5), (1.0, 0.5)])
def test_plans_are_executed_with_a_probability_that_falls_where_they_do_harm(tmp_path, value, share):
    _, hooks = make_hooks(tmp_path, "--synthetic.synthetic_execution_prob", "0.5", "--llm.until", "9999")
    hooks.reliability = SimpleNamespace(value=torch.tensor(value))
    started = [ask_with(hooks, answer(env=1), step=step)[2] for step in range(600)]
    assert sum(map(len, started)) / 600 == pytest.approx(share, abs=0.06)
    assert all(plans in ({}, {1: [1, 2]}) for plans in started)


def test_late_plans_are_evaluated_where_they_belong_but_not_executed(tmp_path):
    options = "--synthetic.synthetic_execution_prob 1 --eval_every 0 --synthetic.synthetic_warmup 0"
    agent, hooks = make_hooks(tmp_path, *options.split())
    fill(hooks.replay)
    predict(agent)
    obs, _, plans = ask_with(hooks, answer(place=2, late=True), answer(env=1, place=99, late=True), step=10)
    assert plans == {}
    hooks.after(obs, agent.initial_state(2), 10)
    assert [(item.env, item.place) for item in hooks.synthetic.items] == [(0, 2)]


def test_predicted_return_of_an_executed_plan_is_compared_with_the_real_one(tmp_path):
    agent, hooks = make_hooks(tmp_path, "--synthetic.synthetic_execution_prob", "1")
    fill(hooks.replay)
    predict(agent, plan=7.0)
    obs, _, plans = ask_with(hooks, answer(env=0, place=7), answer(env=1, place=7), step=10)
    assert set(plans) == {0, 1}
    state = agent.initial_state(2)
    state["uid"][:] = PLAN
    state["position"][:] = torch.tensor([0, 3])  # env 1 still executes an earlier plan
    hooks.after(obs, state, 10)
    assert hooks.predicted == {0: 7.0}
    state["outcome"][0] = torch.tensor([PLAN, 0.25, 5.0, 4.0, 1, 3])
    hooks.after(obs, state, 11)
    assert hooks.metrics()["synthetic/execution_error"] == (7 - 5) / 4 and not hooks.predicted


def test_reliability_of_plans_comes_from_executions(tmp_path):
    agent, hooks = make_hooks(tmp_path)
    obs, _, _ = ask_with(hooks, step=1)
    assert float(hooks.reliability.value) == 0.5
    for gain, above in ((1.0, True), (-1.0, False)):
        for _ in range(400):
            state = agent.initial_state(2)
            state["outcome"][0] = torch.tensor([PLAN, gain, 0.5, 1.0, gain > 0, 3])
            hooks.after(obs, state, 1)
        assert (float(hooks.reliability.value) > 0.99) == above
    assert float(hooks.reliability.value) < 0.01
    metrics = hooks.metrics()
    assert metrics["synthetic/execution_gain"] == 0
