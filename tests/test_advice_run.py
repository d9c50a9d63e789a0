"""Whole runs with advice: off and silent change no bit, nor do stops; late answers reach their step."""

import json

import gymnasium
import numpy as np
import pytest
from advice_helpers import ACTIONS, OBS, SilentService, make_agent
from run_helpers import assert_same_run, differences, log, main, metrics, signal_at, stop_and_resume, train

import checkpoint as checkpoints
import episodes
from agent import Dreamer
from episodes import EpisodeWriter
from logger import Timer
from lore_llm.advice import ActionPrior, Advice
from lore_llm.hooks import AdviceHooks, advice_spaces
from lore_llm.service import AdviceService, Answered
from replay import Replay

LLM = "--llm.enabled True --llm.min_gap_steps 1 --llm.max_gap_steps 5 --llm.log_decisions_every 10"
FULL = f"""{LLM} --llm.backend rules --llm.until 110 --prior.enabled True --synthetic.enabled True
    --options.enabled True --prior.uncertainty_threshold 0 --synthetic.synthetic_warmup 0
    --synthetic.synthetic_settled 1 --synthetic.synthetic_execution_prob 0.3 --options.option_min_tries 2
    --options.option_generation_interval 20 --opt.lr 3e-3 --opt.warmup 0""".split()
DOORKEY = "--task minigrid_DoorKey-5x5 --minigrid.grid True --time_limit 30".split()
ALL_PATHS = (*DOORKEY, *FULL, "--seed", "7")  # with it some plans are accepted
CRAFTER = "--task crafter_reward --size 24 24 --time_limit 30 --steps 80 --eval_every 0".split()


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for name in ("GEMINI_API_KEY", "GOOGLE_API_KEY", "GEMINI_MODEL"):
        monkeypatch.delenv(name, raising=False)


# ---- Off and silent


def weights(logdir):
    agent = checkpoints.load_checkpoint(logdir)[0]["agent"]
    return {name: agent[name] for name in ("world_model", "behavior")}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    logdir = tmp_path_factory.mktemp("plain")
    assert train(logdir, "--opt.warmup", "0") == 0
    return logdir


def test_options_of_disabled_paths_change_no_bit_of_a_run(tmp_path, plain):
    others = """--llm.backend none --llm.until 7 --llm.features 3 --prior.beta_max 1
        --synthetic.synthetic_ratio_max 0.9 --synthetic.synthetic_warmup 0 --options.max_options 2"""
    assert train(tmp_path, "--opt.warmup", "0", *others.split()) == 0
    assert_same_run(tmp_path, plain)
    assert not any(
        (tmp_path / name).exists() for name in ("skills_learned.yaml", "decisions.jsonl", "llm_cache.sqlite")
    )


def test_an_adviser_that_is_silent_changes_no_bit_of_what_is_learned(tmp_path, plain):
    words = f"{LLM} --llm.backend none --prior.enabled True --prior.lambda_kl 1 --llm.until 1000"
    assert train(tmp_path, "--opt.warmup", "0", *words.split()) == 0
    assert differences(weights(tmp_path), weights(plain)) == []
    ours, theirs = metrics(tmp_path), metrics(plain)
    for one, other in zip(ours, theirs, strict=True):
        shared = one.keys() & other.keys() - {"opt/grad_norm"}  # a sum over more tensors
        assert {"loss/policy", "imag/return", "replay/size"} <= shared or one["step"] < 40
        assert differences({k: one[k] for k in shared}, {k: other[k] for k in shared}) == []
    last = ours[-1]
    assert last["uncertainty_gate/beta"] == last["loss/advice_kl"] == last["uncertainty_gate/avg_kl"] == 0
    assert last["uncertainty_gate/advised_share"] == 0 and last["uncertainty_gate/reliability"] == 0.5


# ---- Stops


def assert_same_advised_run(one, other):
    assert_same_run(one, other)
    assert (one / "decisions.jsonl").read_text() == (other / "decisions.jsonl").read_text()


def assert_all_paths_were_used(logdir):
    """Otherwise equal runs would prove little."""
    lines = metrics(logdir)
    values = {key: [line[key] for line in lines if key in line] for key in set().union(*lines)}
    assert max(values["uncertainty_gate/beta"]) > 0 and max(values["uncertainty_gate/reliability"]) != 0.5
    assert max(values["synthetic/ratio"]) > 0 and "synthetic/execution_gain" in values
    assert max(values["options/used_share"]) > 0 and max(values["loss/option_end"]) > 0
    assert max(values["loss/advice_kl"]) > 0


def test_resumed_run_with_all_paths_equals_uninterrupted_run(tmp_path, whole):
    stop_and_resume(tmp_path, *ALL_PATHS, at=[21, 50, 66, 101])
    assert_same_advised_run(tmp_path, whole(*ALL_PATHS))
    assert_all_paths_were_used(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "task, at",
    [([*DOORKEY, "--envs.parallel", "process"], [33, 71, 100]), (CRAFTER, [21, 35, 50, 64])],
    ids=["doorkey in processes", "crafter"],
)
def test_resumed_runs_of_games_equal_uninterrupted_ones(tmp_path, whole, task, at):
    stop_and_resume(tmp_path, *task, *FULL, at=at)
    assert_same_advised_run(tmp_path, whole(*task, *FULL))


def test_run_resumed_with_other_envs_drops_what_names_places_in_the_old_replay(tmp_path, monkeypatch):
    evaluate = Dreamer.evaluate_plans
    monkeypatch.setattr(  # any plan is good enough
        Dreamer, "evaluate_plans", lambda *args: (found := evaluate(*args)) | {"plan": found["plan"] + 9}
    )
    (tmp_path / "skills.yaml").write_text("skills: [{name: odd, actions: [fly]}]\n")
    options = (*DOORKEY, *FULL, "--llm.until", "1000", "--log_every", "1000", "--eval_every", "0")
    with signal_at(115):
        assert train(tmp_path, *options) == 143
    assert "there is no action fly" in log(tmp_path)  # notes are written when a run is stopped, too
    before = checkpoints.load_checkpoint(tmp_path)[0]["hooks"]
    assert before["synthetic"]["items"]
    kept = {}
    load = AdviceHooks.load_state_dict

    def noted(hooks, *args):
        load(hooks, *args)
        kept.update(items=len(hooks.synthetic.items), proposals=len(hooks.proposals))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdviceHooks, "load_state_dict", noted)
        assert train(tmp_path, *options, "--envs.amount", "1") == 0
    assert kept == {"items": 0, "proposals": 0}
    assert "refilled from episode files" in log(tmp_path)


# ---- Logs


def test_weight_of_the_prior_falls_to_zero_and_then_nothing_is_asked_and_it_is_not_evaluated(
    tmp_path, monkeypatch
):
    shares: dict[int, float] = {}
    asked: list[int] = []
    before, ask = AdviceHooks.before, AdviceService.ask

    def noted(hooks, obs, state, step):
        found = before(hooks, obs, state, step)
        shares[step] = float(hooks.policy.prior.share)
        return found

    monkeypatch.setattr(AdviceHooks, "before", noted)
    monkeypatch.setattr(
        AdviceService, "ask", lambda *args, step, **more: asked.append(step) or ask(*args, step=step, **more)
    )
    words = f"{LLM} --llm.backend advice_helpers:CueOracle --prior.enabled True --llm.until 80"
    assert train(tmp_path, *words.split()) == 0
    for step, share in shares.items():
        assert share == pytest.approx(min(1, max(0, 2 * (1 - step / 80))), abs=1e-6)
    assert max(asked) < 80 <= max(shares)
    lines = metrics(tmp_path)
    assert lines[-1]["uncertainty_gate/beta"] == 0
    assert max(line.get("uncertainty_gate/beta", 0) for line in lines) > 0
    advised = ["eval_advised/episode_return" in line for line in lines if "eval/episode_return" in line]
    assert advised == [True, False]  # at steps 50 and 100


def test_decisions_explain_the_actions(whole):
    path = whole(*ALL_PATHS) / "decisions.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    steps = sorted({line["step"] for line in lines})
    assert all(line["step"] >= 30 for line in lines) and len(lines) == 2 * len(steps)
    assert all(b - a >= 10 for a, b in zip(steps, steps[1:], strict=False)) and len(steps) >= 8
    for line in lines:
        assert "You look" in line["caption"]
        assert line["action"] in "left right forward pickup drop toggle done".split()
        for name in ("actor", "adviser", "mix"):
            assert sum(line[name]) == pytest.approx(1, abs=1e-3) and len(line[name]) == 7
        assert np.isfinite([line["value"], line["predicted_return"], line["beta"]]).all()
    assert {line["option"] for line in lines} - {None}


@pytest.mark.slow
def test_logging_decisions_does_not_change_the_run(tmp_path, whole):
    often, never = tmp_path / "often", tmp_path / "never"
    assert train(often, *DOORKEY, *FULL, "--llm.log_decisions_every", "1", "--eval_every", "0") == 0
    assert train(never, *DOORKEY, *FULL, "--llm.log_decisions_every", "0", "--eval_every", "0") == 0
    assert differences(metrics(often), metrics(never)) == []
    assert not (never / "decisions.jsonl").exists()


# ---- Late answers


def late_replay(folder=None, rows=12):
    """A ring with logits of advice, and perhaps files."""
    config = make_agent(("prior",)).config
    act = {"action": gymnasium.spaces.Discrete(ACTIONS)}
    found, defaults = advice_spaces(config, act)
    spaces = OBS | act | found
    writer = EpisodeWriter(folder, spaces, 2) if folder else None
    return Replay(
        spaces, 2, 2 * rows, 4, 1, 0, deter_size=3, stoch_size=2, classes=4, writer=writer, defaults=defaults
    )


def add_steps(replay, count, last=False):
    for step in range(count):
        values = {key: np.zeros((2, *space.shape), space.dtype) for key, space in OBS.items()}
        values["action"] = np.zeros(2, np.int32)
        values["is_first"] = replay.expect_first.copy()
        values["is_last"] = np.array([False, last and step == count - 1])
        replay.add(values)


LATE = {"llm_logits": np.arange(ACTIONS, dtype=np.float32), "llm_mask": True}


def advised(replay, env):
    """Places of a stream that hold advice."""
    places = range(int(replay.oldest[env]), int(replay.heads[env]))
    return [place for place in places if replay.ring["llm_mask"][place % replay.rows + replay.offsets[env]]]


def test_late_answer_goes_to_the_step_that_asked_and_no_other():
    replay = late_replay()
    add_steps(replay, 6)
    assert replay.amend(1, 3, LATE)
    assert advised(replay, 0) == [] and advised(replay, 1) == [3]
    assert replay.ring["llm_logits"][12 + 3].tolist() == [0, 1, 2, 3, 4]
    assert replay.ring["llm_logits"].sum() == 10
    add_steps(replay, 8)  # over the end of the ring
    assert replay.amend(0, 12, LATE) and replay.amend(0, 13, LATE)
    assert advised(replay, 0) == [12, 13] and advised(replay, 1) == [3]


def test_late_answer_for_an_evicted_or_a_future_step_goes_nowhere():
    replay = late_replay(rows=5)
    add_steps(replay, 8)
    before = {key: array.copy() for key, array in replay.ring.items()}
    assert not replay.amend(0, 2, LATE) and not replay.amend(0, 8, LATE)
    assert all(np.array_equal(before[key], array) for key, array in replay.ring.items())
    assert replay.amend(0, 3, LATE)


def test_late_answer_is_in_the_file_of_an_open_episode_but_not_of_a_written_one(tmp_path):
    replay = late_replay(tmp_path)
    add_steps(replay, 4, last=True)  # that of env 1 is over
    add_steps(replay, 2)
    for env, place in ((0, 2), (1, 2), (1, 5)):
        assert replay.amend(env, place, LATE)
    assert advised(replay, 1) == [2, 5]
    for env in (0, 1):
        replay.writer.finish(env)
    replay.writer.flush()
    files = [
        episodes.read_episode(file.path, replay.step_layout) for file in episodes.list_episodes(tmp_path)
    ]
    found = sorted((len(rows["llm_mask"]), np.flatnonzero(rows["llm_mask"]).tolist()) for rows in files)
    # Of env 1 the first episode (4 steps) was written before, the second one (2 steps) was not.
    assert found == [(2, [1]), (4, []), (6, [2])]
    replay.close()


def test_files_of_a_run_without_advice_are_learned_from_with_defaults(tmp_path):
    act = {"action": gymnasium.spaces.Discrete(ACTIONS)}
    plain = Replay(
        OBS | act,
        2,
        40,
        4,
        1,
        0,
        deter_size=3,
        stoch_size=2,
        classes=4,
        writer=EpisodeWriter(tmp_path, OBS | act, 2),
    )
    add_steps(plain, 7, last=True)
    plain.writer.finish(0)
    plain.close()
    config = make_agent(("prior", "options")).config
    found, defaults = advice_spaces(config, act)
    spaces = OBS | act | found
    replay = Replay(
        spaces, 2, 40, 4, 1, 0, deter_size=3, stoch_size=2, classes=4,
        writer=EpisodeWriter(tmp_path, spaces, 2), defaults=defaults,
    )  # fmt: skip
    loaded = replay.load_episodes()
    assert loaded.steps == 14 and loaded.lines == []
    batch = replay.sample(3)
    assert batch["decision"].all() and not batch["option"].any()
    assert not batch["llm_mask"].any() and not batch["llm_logits"].any()
    replay.close()


def test_answers_are_stored_with_the_steps_that_asked(tmp_path):
    agent = make_agent(("prior",), "--prior.logit_clip", "2", "--llm.until", "1000")
    replay = late_replay()
    hooks = AdviceHooks(SilentService(), agent, replay, agent.config, tmp_path, Timer())
    add_steps(replay, 6)
    prior = ActionPrior(logits=(9.0, 0.0, 0.0, 0.0, -9.0))
    answers = [
        Answered(0, 6, Advice(action_prior=prior), "", False),
        Answered(1, 4, Advice(action_prior=prior), "", True),
        Answered(1, 6, Advice(), "", False),  # empty
    ]
    hooks.service.ask = lambda *args, **kwargs: answers
    entries, plans = hooks.before({}, agent.initial_state(2), 10)
    assert entries["llm_mask"].tolist() == [True, False] and plans == {}
    assert entries["llm_logits"].tolist() == [[2, 0, 0, 0, -2], [0] * 5]
    assert advised(replay, 1) == [4] and advised(replay, 0) == []
    assert replay.ring["llm_logits"][12 + 4].tolist() == [2, 0, 0, 0, -2]


# ---- Refusals


@pytest.mark.parametrize(
    "options, says",
    [
        (f"{LLM} --prior.enabled True --task dummy_continuous", "one Discrete action"),
        (f"{LLM} --options.enabled True --task dummy_continuous", "one Discrete action"),
        (f"{LLM} --prior.enabled True --llm.backend rules", "crafter and minigrid only"),
        (f"{LLM} --prior.enabled True --llm.backend gemny", "Did you mean gemini"),
        (f"{LLM} --prior.enabled True --llm.backend nowhere:Class", "nowhere"),
    ],
)
def test_what_cannot_be_advised_is_refused_in_one_line(tmp_path, capsys, options, says):
    capsys.readouterr()
    assert train(tmp_path, *options.split()) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1 and says in errors


# ---- Whether it helps

LEARN = """--configs debug --task dummy_vector --device cpu --threads 1 --precision float32
    --time_limit 0 --envs.amount 4 --batch_size 8 --batch_length 16 --steps 700 --prefill 200 --train_ratio 32
    --imag_horizon 5 --opt.lr 1e-3 --opt.warmup 20 --eval_every 0 --log_every 100
    --save_every 100000""".split()
ORACLE = f"""{LLM} --prior.enabled True --llm.max_gap_steps 1 --llm.until 100000
    --llm.log_decisions_every 0 --llm.backend advice_helpers:""".split()


def learned(logdir, *options):
    """Mean return of the episodes after the first updates, and the last line of the log."""
    assert main(*LEARN, "--logdir", str(logdir), *options) == 0
    lines = metrics(logdir)
    returns = [
        line["env/episode_return"] for line in lines if line["step"] > 400 and "env/episode_return" in line
    ]
    return np.mean(returns), lines[-1]


@pytest.mark.slow
def test_good_advice_is_learned_from_and_harmful_advice_is_not_followed(tmp_path):
    alone, _ = learned(tmp_path / "alone")
    *words, backend = ORACLE
    helped, last = learned(tmp_path / "helped", *words, f"{backend}CueOracle")
    assert last["uncertainty_gate/reliability"] > 0.95 and last["uncertainty_gate/avg_kl"] < 0.15
    misled, last = learned(tmp_path / "misled", *words, f"{backend}CueLiar")
    assert last["uncertainty_gate/reliability"] < 0.05
    assert helped > alone + 1.2 and misled > alone - 1
