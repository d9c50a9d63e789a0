"""docs/llm.md is true: its commands run, its classes advise, and the names in its tables exist."""

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from llm_servers import FakeLLM, Say
from run_helpers import log, main, metrics, train
from test_docs import metrics_of

import config as configs
from envs import make_env
from lore_llm.advice import AdviceSpec, Request
from lore_llm.captions import make_captioner
from lore_llm.options import OptionLibrary

ROOT = Path(__file__).parent.parent
GUIDES = ("docs/llm.md", "docs/llm.ja.md")
KEYS = ("GEMINI_API_KEY", "GOOGLE_API_KEY", "GEMINI_MODEL", "OPENAI_API_KEY", "GOOGLE_GEMINI_BASE_URL")
KEY = "secret-key-of-the-test"
FAST = (
    "--configs debug --device cpu --steps 130 --eval_every 0 --save_every 1000 --llm.until 130 "
    "--log_decisions_every 10 --train_ratio 1"
).split()


def text_of(guide: str) -> str:
    return (ROOT / guide).read_text(encoding="utf-8")


def blocks(language: str, guide: str = GUIDES[0]) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(guide), re.MULTILINE | re.DOTALL)


def names(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines()]
TRAIN = [command for command in COMMANDS if command.startswith("python3 dreamer.py")]


def command_with(*words: str) -> list[str]:
    """The options of the one training command of the guide that has these words."""
    (found,) = (command for command in TRAIN if all(word in shlex.split(command) for word in words))
    return shlex.split(found)[2:]


@pytest.fixture(autouse=True)
def workdir(tmp_path, monkeypatch) -> Path:
    """A folder with the modules of the guide, from which commands are run; no keys in the environment."""
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "mypackage").mkdir()
    for block in blocks("python"):
        if match := re.match(r"# (mypackage/\w+\.py)\n", block):
            (tmp_path / match[1]).write_text(block)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "mypackage"]:
        del sys.modules[name]


def last(logdir: Path, name: str) -> float:
    """The last value that a run logged of a metric, 0 if none."""
    return next((line[name] for line in reversed(metrics(logdir)) if name in line), 0.0)


# The text


@pytest.mark.parametrize("guide", GUIDES)
def test_options_that_are_named_exist(guide):
    schema = configs.read()
    for name in re.findall(r"`(?:--)?((?:llm|prior|synthetic|options)\.[\w.]+)", text_of(guide)):
        assert name in schema.options, name
    for name in re.findall(r"`--([\w.]+)", text_of(guide)):
        assert name in schema.options, name


# Commands


def run(*options: str, logdir: str, task: str = "crafter_reward") -> Path:
    """Run a command of the guide for some steps; the logdir."""
    assert main(*options, *FAST, "--task", task, "--logdir", logdir) == 0
    assert KEY.encode() not in b"".join(
        path.read_bytes() for path in Path(logdir).rglob("*") if path.is_file()
    )
    return Path(logdir)


def test_gemini_is_recorded_and_replayed_as_the_guide_says(workdir, monkeypatch):
    recording, replaying = (
        command_with("./answers.sqlite", f"./logdir/{name}") for name in ("recorded", "replayed")
    )
    with FakeLLM() as server:
        monkeypatch.setenv("GEMINI_API_KEY", KEY)
        there = ("--llm.base_url", server.url)
        recorded = run(*recording, *there, logdir="recorded")
        assert (workdir / "answers.sqlite").is_file() and last(recorded, "llm_adapter/calls") > 0
        assert "Adviser: gemini, model gemini-3.5-flash-lite" in log(recorded)
    monkeypatch.delenv("GEMINI_API_KEY")
    replayed = run(*replaying, *there, logdir="replayed")  # without server and key
    assert last(replayed, "llm_adapter/calls") == 0 < last(replayed, "llm_adapter/answers")
    assert last(replayed, "llm_adapter/dropped") == 0
    decisions = [(logdir / "decisions.jsonl").read_text() for logdir in (recorded, replayed)]
    assert decisions[0] == decisions[1]


def test_an_openai_compatible_server_advises_as_the_guide_says():
    with FakeLLM(Say()) as server:
        there = ("--llm.base_url", server.openai_url, "--deterministic", "True")
        logdir = run(*command_with("./logdir/vllm"), *there, logdir="own", task="dummy_cue")
        asked = [request for request in server.asked if request.path.endswith("/chat/completions")]
        assert asked and asked[0].body["model"] == "fake-model"
    assert last(logdir, "llm_adapter/answers") > 0 and (logdir / "llm_cache.sqlite").is_file()


# User classes and files


def test_the_simple_adviser_of_the_guide_advises():
    from mypackage.my_adviser import MyAdviser

    adviser = MyAdviser(AdviceSpec(("noop", "other"), (), 1, 1000, 0), {})
    image = np.full((64, 64, 3), 100, np.uint8)
    (answer,) = adviser.answer([Request("", frozenset({"prior", "features"}), {"image": image})]).answers
    assert not answer.problems and answer.advice.features and answer.advice.action_prior.logits[0] > 0


def test_the_full_adviser_of_the_guide_proposes_a_skill_and_plans():
    logdir = run(*command_with("mypackage.lumberjack:Lumberjack"), logdir="own")
    assert last(logdir, "llm_adapter/answers") > 5
    assert not any("llm_adapter/errors" in name for name in metrics_of(logdir))
    assert 'name: "chop"' in (logdir / "skills_learned.yaml").read_text()
    from mypackage.lumberjack import Lumberjack

    adviser = Lumberjack(AdviceSpec(("noop", "move_left", "do"), ("collect_wood",), 0, 1000, 8), {})
    (tree, far) = adviser.advise([Request(c, frozenset()) for c in ("left tree; right grass", "tree far")])
    assert tree.plan == ("do",) * 3 and far.plan == ("move_left",) * 3 and not far.skills
    assert adviser.identity == "lumberjack 1"


def test_the_captioner_of_the_guide_makes_shorter_captions():
    config = configs.load(command_with("mypackage.short:Short"))
    env = make_env(config, "train", 0)
    captioner = make_captioner(config, env.obs_space, env.act_space)
    caption = captioner.caption(env.reset()[0])
    assert caption.startswith("Facing") and "Achieved" not in caption


def test_the_skills_of_the_guide_are_valid(tmp_path):
    config = configs.load(["--configs", "crafter", "lore_full"])
    env = make_env(config, "train", 0)
    (block,) = blocks("yaml")
    path = tmp_path / "skills.yaml"
    path.write_text(block)
    library = OptionLibrary(tmp_path, make_captioner(config, env.obs_space, env.act_space), config.options)
    changed, lines = library.poll()
    names = "skills fetch wood, to the left and drink; pinned to the left and drink; banned chop"
    assert changed == [0, 1] and lines == [f"skills.yaml was read: {names}"]
    wood, drink = library.options()
    assert wood.spec.subgoal == "collect_wood" and wood.timeout == drink.timeout == 5
    assert library.is_pinned(drink.spec) and not library.is_pinned(wood.spec)


def test_decisions_have_the_fields_of_the_guide(capsys):
    run(*command_with("./logdir/crafter"), logdir="./logdir/crafter")
    (line,) = (line for line in text_of(GUIDES[0]).splitlines() if "`decisions.jsonl` gets one line" in line)
    told = json.loads(Path("./logdir/crafter/decisions.jsonl").read_text().splitlines()[0])
    fields = set(names(line)) - {"log_decisions_every", "decisions.jsonl", "plan"}
    assert fields | {"step", "env"} == set(told)
    (script,) = (block for block in blocks("python") if "decisions.jsonl" in block)
    capsys.readouterr()
    exec(script, {})
    assert "beta 0." in capsys.readouterr().out


def test_what_may_change_on_resume_and_what_not(tmp_path, capfd):
    options = ("--configs", "lore_full", "--llm.backend", "none", "--eval_every", "0")
    assert train(tmp_path / "run", *options, "--steps", "40") == 0
    assert train(tmp_path / "run", *options, "--steps", "50", "--beta_max", "0.1") == 0
    for option in ("--max_options", "--option_max_length", "--llm.features"):
        assert train(tmp_path / "run", *options, "--steps", "60", option, "3") == 2
        assert "trained with other advice" in capfd.readouterr().err
