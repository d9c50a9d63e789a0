"""Several learners with one library of skills: the same skills and weights, and the executions of all."""

import hashlib
import json
import os
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from advice_helpers import SilentService, make_agent
from run_helpers import TINY, differences, log, metrics
from test_advice_run import DOORKEY, FULL, late_replay
from test_distributed import Threads, free_port

import checkpoint as checkpoints
import distributed
import dreamer
import lore_llm.hooks as hooks_module
from logger import Timer
from lore_llm import OptionSpec, options
from lore_llm.advice import Advice
from lore_llm.hooks import AdviceHooks
from lore_llm.option_actor import PLAN, Outcome
from lore_llm.service import Answered

OBS = {"is_first": np.zeros(2, bool), "is_last": np.zeros(2, bool)}
FILE = "skills: [{{name: {new}, actions: [{old}]}}, {{name: mine, actions: [{action}, {action}]}}]"


class Learners:
    """The advice hooks of two learners, which do each step together."""

    def __init__(self, logdir: Path, patch: pytest.MonkeyPatch):
        self.threads = Threads(patch)
        self.all_hooks = self.threads.together(lambda rank: make_hooks(logdir, rank), (0, 1))

    def step(self, step: int, outcomes=((), ())) -> None:
        def act(each: tuple[AdviceHooks, list]) -> None:
            hooks, outcomes = each
            state = hooks.agent.initial_state(2)
            hooks.before(OBS, state, step)
            for row, outcome in enumerate(outcomes):
                state["outcome"][row] = torch.tensor(outcome[1:], dtype=torch.float64)
            hooks.after(OBS, state, step)

        self.threads.together(act, list(zip(self.all_hooks, outcomes, strict=True)))

    def load(self, *states: dict) -> None:
        def act(each: tuple[AdviceHooks, dict]) -> None:
            if each[1]:
                each[0].load_state_dict(each[1])

        self.threads.together(act, list(zip(self.all_hooks, states, strict=True)))

    def same(self) -> dict:
        """What both have of the skills, which must be the same."""
        seen = []
        for hooks in self.all_hooks:
            actor = hooks.policy.options
            table = {key: torch.from_numpy(value) for key, value in hooks.library.table().items()}
            assert (table["uids"] == actor.uids).all() and (table["actions"] == actor.script).all()
            skills = [skill and options._pack(skill) for skill in hooks.library.slots]
            seen.append({"skills": skills, "names": hooks.policy.names, "actor": actor.state_dict()})
            seen[-1]["actor"] = {key: value.clone() for key, value in seen[-1]["actor"].items()}
        for one in seen:  # only the first counts
            for skill in filter(None, one["skills"]):
                del skill["stats"]
        assert differences(*seen) == []
        return seen[0]


def make_hooks(logdir: Path, rank: int) -> AdviceHooks:
    agent = make_agent(("options",), *"--llm.until 1000 --options.option_min_tries 4".split())
    agent.rngs["options"].manual_seed(rank)
    return AdviceHooks(SilentService(), agent, late_replay(), agent.config, logdir, Timer())


def skill(name: str, *actions: int) -> OptionSpec:
    return OptionSpec(name=name, primitive_actions=actions, expected_duration=len(actions), confidence=0.9)


def answering(*specs: OptionSpec, asked: list | None = None):
    """An `AdviceService.ask` that proposes skills, asked or not."""

    def ask(*args, skills, **more):
        if asked is not None:
            asked.append(skills)
        return [Answered(0, 0, Advice(skills=specs), "", False)]

    return ask


@pytest.fixture
def learners(tmp_path, monkeypatch):
    monkeypatch.setattr(hooks_module, "POLL_STEPS", 1)
    return Learners(tmp_path, monkeypatch)


def test_learners_have_the_skills_of_the_first_and_equal_weights(learners):
    first, second = learners.all_hooks
    asked = [], []
    first.service.ask = answering(skill("back", 1, 2), skill("on", 3), asked=asked[0])
    second.service.ask = answering(skill("unasked", 4), asked=asked[1])
    blank = first.policy.options.out.weight.clone()
    learners.step(10)
    seen = learners.same()
    assert seen["names"] == ["back", "on", None] and asked == ([True], [False])
    changed = (seen["actor"]["out.weight"] != blank).any(1)
    assert changed.tolist() == [True, True, False]
    first.service.ask = SilentService().ask
    learners.step(11)  # the second still proposes one without being asked
    assert differences(learners.same(), seen) == []
    assert second.agent.rngs["options"].get_state().equal(torch.Generator().manual_seed(1).get_state())


def test_executions_of_all_learners_decide(learners):
    learners.all_hooks[0].service.ask = answering(skill("harmful", 1), skill("fine", 2))
    learners.step(10)
    learners.all_hooks[0].service.ask = SilentService().ask

    def executed(uid: int, *gains: float) -> list[Outcome]:
        return [Outcome(0, uid, gain, 0.0, 1.0, gain > 0, 1) for gain in gains]

    plan = [Outcome(1, PLAN, 0.5, 0.1, 1.0, True, 3)]
    learners.step(11, (executed(1, -1.0) + plan, executed(1, -1.1) + executed(2, 1.0)))
    assert learners.same()["names"] == ["harmful", "fine", None]
    before = learners.same()["actor"]["out.weight"]
    learners.step(12, ((), executed(1, -0.9, -1.0)))  # the fourth try: none of the two alone has as many
    seen = learners.same()
    assert seen["names"] == [None, "fine", None]
    assert (seen["actor"]["out.weight"] != before).any(1).tolist() == [True, False, False]
    told = learners.threads.together(AdviceHooks.metrics, learners.all_hooks)
    assert told[0]["options/removed"] == 1 and told[0]["options/fine/tries"] == 1
    assert [name for name in told[1] if name[:8] == "options/"] == ["options/used_share"]
    assert [len(hooks.counts) for hooks in learners.all_hooks] == [0, 0]


def test_what_a_person_edits_reaches_all_learners(learners, tmp_path):
    learners.all_hooks[0].service.ask = answering(skill("old", 1))
    learners.step(10)
    learners.all_hooks[0].service.ask = SilentService().ask
    path = tmp_path / "skills.yaml"
    _, old, action, *_ = learners.all_hooks[0].captioner.actions
    path.write_text(FILE.format(new="new", old=old, action=action))
    learners.step(20)
    assert learners.same()["names"] == ["new", "mine", None]
    path.write_text(FILE.format(new="newer", old=old, action=action))  # another name only
    learners.step(30)
    assert learners.same()["names"] == ["newer", "mine", None]


def test_resumed_learners_have_the_skills_whatever_their_number_was(learners, tmp_path, monkeypatch):
    learners.all_hooks[0].service.ask = answering(skill("old", 1))
    learners.step(10)
    states = learners.threads.together(AdviceHooks.state_dict, learners.all_hooks)
    assert states[1]["library"] == {}
    later = Learners(tmp_path, monkeypatch)
    later.load(states[0], {})  # the second is new
    later.step(11)
    assert later.same()["names"] == ["old", None, None]
    later = Learners(tmp_path, monkeypatch)
    later.load(states[0], states[0])  # only the first has saved
    later.step(11)
    assert later.same()["names"] == ["old", None, None]
    first, second = (hooks.rng.bit_generator.state for hooks in later.all_hooks)
    assert first != second


# ---- Whole runs

SHORT = (*TINY, *DOORKEY, *FULL, *"--train_ratio 2 --eval_every 0 --llm.until 1000".split())
STEPS = (70, 90)  # env steps at which the run ends, and is resumed


def look(hooks: AdviceHooks, step: int) -> dict:
    """What a learner has after a step."""
    agent = hooks.agent
    tensors = [value for part in agent.weights().values() for value in part.values()]
    optimizer = [m for group in agent.opt.state_dict()["state"].values() for m in group.values()]
    data = b"".join(torch.as_tensor(t).contiguous().float().numpy().tobytes() for t in (*tensors, *optimizer))
    return {
        "step": step,
        "updates": agent.updates,
        "weights": hashlib.sha256(data).hexdigest(),
        "uids": agent.policy.options.uids.tolist(),
        "names": agent.policy.names,
        "library": [skill and skill.uid for skill in hooks.library.slots],
    }


def as_learner(rank: int, ports: list[int], folder: Path) -> None:
    """One of two learners, in a run in which every other skill does harm and a person adds a skill."""
    hooks_module.POLL_STEPS = 10
    seen: list[dict] = []
    executed: Counter[int] = Counter()
    after, record = AdviceHooks.after, AdviceHooks._record_options

    def after_and_look(hooks: AdviceHooks, obs: dict, state: dict, step: int) -> None:
        after(hooks, obs, state, step)
        seen.append(look(hooks, step))
        if distributed.is_main() and step == 50:
            path = hooks.logdir / "skills.yaml"
            path.write_text("skills: [{name: mine, actions: [forward, forward]}]")

    def harm(hooks: AdviceHooks, outcomes: list[Outcome]) -> bool:
        executed.update(outcome.uid for outcome in outcomes)
        return record(hooks, [each._replace(gain=-1.0 if each.uid % 2 else 1.0) for each in outcomes])

    AdviceHooks.after, AdviceHooks._record_options = after_and_look, harm
    for port, steps in zip(ports, STEPS, strict=True):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        assert dreamer.main([*SHORT, "--steps", str(steps), "--logdir", str(folder / "run")]) == 0
        while rank and not (folder / f"{steps}-0.json").exists():  # until rank 0 has saved
            time.sleep(0.1)
        found = {"seen": seen, "executed": executed, "skills": skills_of(folder / "run")}
        (folder / f"{steps}-{rank}.json").write_text(json.dumps(found))
        seen.clear()


def skills_of(logdir: Path) -> dict[str, dict]:
    """The skills of the last checkpoint by their uids."""
    slots = checkpoints.load_checkpoint(logdir)[0]["hooks"]["library"]["slots"]
    return {str(skill["uid"]): skill for skill in slots if skill}


@pytest.mark.slow
def test_learners_of_a_whole_run_have_the_same_skills_and_weights_and_keep_them_on_resume(tmp_path):
    mp.spawn(as_learner, ([free_port() for _ in STEPS], tmp_path), nprocs=2)
    whole, resumed = ([json.loads((tmp_path / f"{s}-{r}.json").read_text()) for r in (0, 1)] for s in STEPS)
    seen = whole[0]["seen"]
    assert differences(seen, whole[1]["seen"]) == [] and seen[-1]["updates"] > 5
    assert all(look["uids"] == [uid or 0 for uid in look["library"]] for look in seen)
    slots = [(a, b) for one, other in pairwise(seen) for a, b in zip(one["uids"], other["uids"], strict=True)]
    assert any(a and not b for a, b in slots) and any(b and a != b for a, b in slots)  # some went, some came
    assert any("mine" in look["names"] for look in seen) and "was read: skills mine" in log(tmp_path / "run")
    ours, theirs = (Counter(one["executed"]) for one in whole)
    tries = {uid: skill["stats"]["tries"] for uid, skill in whole[0]["skills"].items()}
    assert tries == {uid: ours[uid] + theirs[uid] for uid in tries} and max(tries.values()) > 1
    gone = (ours | theirs).keys() - tries.keys()
    assert any(ours[uid] < 2 for uid in gone)  # one learner alone would not have removed it yet
    assert metrics(tmp_path / "run")[-1]["options/removed"] > 0

    assert differences(resumed[0]["seen"], resumed[1]["seen"]) == []
    assert resumed[0]["seen"][-1]["updates"] > seen[-1]["updates"]
    before, after = whole[0]["skills"], resumed[0]["skills"]
    stay = before.keys() & after.keys()
    assert stay and all(after[uid]["stats"]["tries"] >= before[uid]["stats"]["tries"] for uid in stay)
