"""Several learners with one library of skills: the same skills and weights, and the executions of all."""

import hashlib
import json
import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from advice_helpers import SilentAdvisor, make_agent
from run_helpers import TINY, assert_same_run, differences, log, main, metrics, moment
from test_advice_run import DOORKEY, FULL, late_replay
from test_distributed import Threads, free_port, own_moment, run

import dreamer
import lore_llm.coach as coaches
import tools
from logger import Timer
from lore_llm import OptionSpec, options
from lore_llm.advice import Advice
from lore_llm.advisor import Answered
from lore_llm.coach import Coach
from lore_llm.guide import PLAN, Outcome

OBS = {"is_first": np.zeros(2, bool), "is_last": np.zeros(2, bool)}
CALM = {"macro": torch.zeros(2)}  # no skill acts
MINE = """\
- name: mine
  actions: [{action}, {action}]

# By this"""


class Talking(Threads):
    """A learner in a thread, which exchanges values with the others."""

    def __init__(self, rank: int, barrier: threading.Barrier, board: list):
        super().__init__(rank, barrier)
        self.board = board

    def collect(self, value):
        self.board[self.rank] = value
        self.wait()
        values = list(self.board)
        self.wait()
        return values

    def total(self, *counts):
        return [sum(column) for column in zip(*self.collect(counts), strict=True)]

    def tell(self, value):
        return self.collect(value)[0]

    def copy(self, tensors):
        for mine, first in zip(tensors, self.tell(tensors), strict=True):
            mine.copy_(first)
        self.wait()


class Learners:
    """Two learners' coaches, which do each step together."""

    def __init__(self, logdir: Path):
        barrier, board = threading.Barrier(2, timeout=60), [None, None]
        self.coaches = []
        for rank in range(2):
            agent = make_agent(("options",), *"--llm.until 1000 --options.option_min_tries 4".split())
            agent.rngs["options"].manual_seed(rank)
            parts = SilentAdvisor(), agent, late_replay(), agent.config, logdir, Timer()
            self.coaches.append(Coach(*parts, Talking(rank, barrier, board)))

    def together(self, act) -> list:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(act, self.coaches))

    def step(self, step: int, outcomes=((), ())) -> None:
        def act(coach: Coach) -> None:
            coach.before(OBS, step)
            coach.guide.outcomes = list(outcomes[coach.ranks.rank])
            coach.after(OBS, CALM, step)

        self.together(act)

    def same(self) -> dict:
        """What both have of the skills, which must be the same."""
        seen = []
        for coach in self.coaches:
            actor = coach.guide.options
            table = {key: torch.from_numpy(value) for key, value in coach.library.table().items()}
            assert (table["uids"] == actor.uids).all() and (table["actions"] == actor.script).all()
            skills = [skill and options._pack(skill) for skill in coach.library.slots]
            seen.append({"skills": skills, "names": coach.guide.names, "actor": actor.state_dict()})
            seen[-1]["actor"] = {key: value.clone() for key, value in seen[-1]["actor"].items()}
        for one in seen:  # only the first counts
            for skill in filter(None, one["skills"]):
                del skill["stats"]
        assert differences(*seen) == []
        return seen[0]


def skill(name: str, *actions: int) -> OptionSpec:
    return OptionSpec(name=name, primitive_actions=actions, expected_duration=len(actions), confidence=0.9)


def answering(*specs: OptionSpec, asked: list | None = None):
    """An `Advisor.ask` that proposes skills, asked or not."""

    def ask(*args, skills, **more):
        if asked is not None:
            asked.append(skills)
        return [Answered(0, 0, Advice(skills=specs), "", False)]

    return ask


@pytest.fixture
def learners(tmp_path, monkeypatch):
    monkeypatch.setattr(options, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(coaches, "POLL_STEPS", 1)
    return Learners(tmp_path)


def test_learners_have_the_skills_of_the_first_and_equal_weights(learners):
    first, second = learners.coaches
    asked = [], []
    first.advisor.ask = answering(skill("back", 1, 2), skill("on", 3), asked=asked[0])
    second.advisor.ask = answering(skill("unasked", 4), asked=asked[1])
    blank = first.guide.options.out.weight.clone()
    learners.step(10)
    seen = learners.same()
    assert seen["names"] == ["back", "on", None] and asked == ([True], [False])
    changed = (seen["actor"]["out.weight"] != blank).any(1)
    assert changed.tolist() == [True, True, False]


def test_executions_of_all_learners_decide(learners):
    learners.coaches[0].advisor.ask = answering(skill("harmful", 1), skill("fine", 2))
    learners.step(10)
    learners.coaches[0].advisor.ask = SilentAdvisor().ask

    def executed(uid: int, *gains: float) -> list[Outcome]:
        return [Outcome(0, uid, gain, np.nan, gain > 0, 1) for gain in gains]

    plan = [Outcome(1, PLAN, 0.5, 0.1, True, 3)]
    learners.step(11, (executed(1, -1.0) + plan, executed(1, -1.1) + executed(2, 1.0)))
    assert learners.same()["names"] == ["harmful", "fine", None]
    before = learners.same()["actor"]["out.weight"]
    learners.step(12, ((), executed(1, -0.9, -1.0)))  # the fourth try: none of the two alone has as many
    seen = learners.same()
    assert seen["names"] == [None, "fine", None]
    assert (seen["actor"]["out.weight"] != before).any(1).tolist() == [True, False, False]
    told = [coach.metrics() for coach in learners.coaches]
    assert told[0]["options/removed"] == 1 and told[0]["options/fine/tries"] == 1
    assert [name for name in told[1] if name[:8] == "options/"] == ["options/used_share"]
    assert [len(coach.counts) for coach in learners.coaches] == [0, 0]


def test_what_a_person_edits_reaches_all_learners(learners, tmp_path):
    learners.coaches[0].advisor.ask = answering(skill("old", 1))
    learners.step(10)
    learners.coaches[0].advisor.ask = SilentAdvisor().ask
    path = tmp_path / "skills.yaml"
    action = learners.coaches[0].captioner.actions[2]
    text = path.read_text().replace("name: old", "name: new").replace("# By this", MINE.format(action=action))
    path.write_text(text)
    learners.step(20)
    assert learners.same()["names"] == ["new", "mine", None]
    text = path.read_text().replace("name: new", "name: newer")  # nothing but a name
    path.write_text(text)
    learners.step(30)
    assert learners.same()["names"] == ["newer", "mine", None]


def test_resumed_learners_have_the_skills_whatever_their_number_was(learners, tmp_path):
    learners.coaches[0].advisor.ask = answering(skill("old", 1))
    learners.step(10)
    states = [coach.state_dict() for coach in learners.coaches]
    assert states[1]["library"] == {}
    (tmp_path / "skills.yaml").unlink()
    later = Learners(tmp_path)
    later.coaches[0].load_state_dict(states[0], 10, True)  # the second is new
    later.step(11)
    assert later.same()["names"] == ["old", None, None]
    later = Learners(tmp_path)
    for coach, state in zip(later.coaches, states, strict=True):
        coach.load_state_dict(state, 10, True)
    later.step(11)
    assert later.same()["names"] == ["old", None, None]


# ---- Whole runs

SHORT = (*TINY, *DOORKEY, *FULL, *"--steps 70 --train_ratio 1 --eval_every 0 --llm.until 1000".split())


def look(run: dreamer.Run) -> dict:
    """What a learner has after a step."""
    tensors = [value for part in run.agent.weights().values() for value in part.values()]
    optimizer = [m for group in run.agent.opt.state_dict()["state"].values() for m in group.values()]
    data = b"".join(torch.as_tensor(t).contiguous().float().numpy().tobytes() for t in (*tensors, *optimizer))
    return {
        "step": run.step,
        "updates": run.agent.updates,
        "weights": hashlib.sha256(data).hexdigest(),
        "uids": run.agent.guide.options.uids.tolist(),
        "names": run.agent.guide.names,
        "library": [skill and skill.uid for skill in run.coach.library.slots],
    }


def watched(rank: int, port: int, folder: Path) -> None:
    """One of two learners of a run with hasty decisions about its skills, and a person who adds one."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    options.SETTLE_SECONDS, options.PRUNE_SIGMAS, coaches.POLL_STEPS = 0.0, -1e9, 10
    seen: list[dict] = []
    executed: Counter[int] = Counter()
    learn, record = dreamer.Run.learn, Coach._record

    def learn_and_look(run: dreamer.Run) -> None:
        learn(run)
        seen.append(look(run))
        path = folder / "run" / "skills.yaml"
        if rank == 0 and run.step == 50:
            text = path.read_text().replace("# By this", MINE.format(action="forward"))
            path.write_text(text)

    def note(coach: Coach, outcomes: list[Outcome]) -> bool:
        executed.update(outcome.uid for outcome in outcomes)
        return record(coach, outcomes)

    dreamer.Run.learn, Coach._record = learn_and_look, note
    assert dreamer.main([*SHORT, "--logdir", str(folder / "run")]) == 0
    (folder / f"{rank}.json").write_text(json.dumps({"seen": seen, "executed": executed}))


@pytest.mark.slow
def test_learners_of_a_whole_run_have_the_same_skills_and_weights(tmp_path):
    mp.spawn(watched, (free_port(), tmp_path), nprocs=2)
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    seen = told[0]["seen"]
    assert differences(seen, told[1]["seen"]) == []
    assert seen[-1]["updates"] > 5 and all(
        look["uids"] == [uid or 0 for uid in look["library"]] for look in seen
    )
    slots = [uids for look in seen if (uids := look["uids"])]
    changes = [
        (before, after)
        for one, other in zip(slots, slots[1:], strict=False)
        for before, after in zip(one, other, strict=True)
        if before != after
    ]
    assert {bool(before) for before, _ in changes} == {False, True}  # some came and some went
    assert "mine" in seen[-1]["names"] and "added mine" in log(tmp_path / "run")
    counts = [Counter(one["executed"]) for one in told]
    last = metrics(tmp_path / "run")[-1]
    library = tools.load_checkpoint(tmp_path / "run")[0]["coach"]["library"]
    there = {str(skill["uid"]): skill["stats"]["tries"] for skill in library["slots"] if skill}
    both = counts[0] + counts[1]
    assert there == {uid: both[uid] for uid in there} and min(map(len, counts)) > 0
    assert last["options/removed"] == library["removals"] > 0


@pytest.mark.slow
def test_resumed_run_with_skills_of_two_learners_equals_uninterrupted_run(tmp_path):
    options = SHORT[len(TINY) :]
    assert run(tmp_path / "whole", *options).returncode == 0
    assert run(tmp_path / "stopped", *options, "--steps", "50").returncode == 0
    assert run(tmp_path / "stopped", *options).returncode == 0
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    assert differences(*(own_moment(tmp_path / name) for name in ("whole", "stopped"))) == []
    before = moment(tmp_path / "stopped")
    slots = before["coach"]["library"]["slots"]
    assert any(skill and skill["stats"]["tries"] for skill in slots)
    assert main(*SHORT, "--logdir", str(tmp_path / "stopped"), "--steps", "80") == 0
    assert run(tmp_path / "stopped", *options, "--steps", "90").returncode == 0
    after = moment(tmp_path / "stopped")["coach"]["library"]["slots"]
    for one, other in zip(slots, after, strict=True):
        assert one is None or one["stats"]["tries"] <= other["stats"]["tries"]
