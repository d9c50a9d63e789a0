"""Runs with a language model as adviser: recorded, repeated, resumed, and with a server that dies."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from advice_helpers import OBS, make_agent
from llm_servers import FakeLLM, Say
from run_helpers import assert_same_run, log, metrics, signal_at, train

from basics import UserError
from lore_llm.cache import Cache
from lore_llm.captions import Captioner
from lore_llm.hooks import AdviceHooks
from lore_llm.option_actor import Execution

KEY = "sk-SecretOfTheTests123"
LORE = (
    "--configs debug dummy_cue lore_full --llm.min_gap_steps 2 --llm.max_gap_steps 4 --llm.until 120".split()
)


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    for name in ("GEMINI_API_KEY", "GOOGLE_API_KEY", "GEMINI_MODEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def advised(logdir: Path, server: FakeLLM, *options: str) -> int:
    """The tiny run with all paths of advice, and a model on the server."""
    model = ("--llm.backend", "openai", "--llm.model", "fake", "--llm.base_url", server.openai_url)
    return train(logdir, *LORE, *model, *options)


def without_calls(logdir: Path) -> list[dict]:
    """Metrics, but not those of calls, which a replay does not make."""
    told = ("calls", "tokens", "cost", "cache_hit_rate")
    return [{k: v for k, v in line.items() if k.partition("/")[2] not in told} for line in metrics(logdir)]


class Stumbling(Captioner):
    """A user's captioner with a bug."""

    def caption(self, obs):
        raise KeyError("image of the player")

    def blocked(self, before, now, action):
        return now["nothing"]


def test_a_captioner_that_fails_does_not_end_the_run(tmp_path):
    options = ("--llm.captioner", f"{__name__}:Stumbling", "--llm.backend", "none", "--steps", "110")
    assert train(tmp_path, *LORE, *options) == 0
    assert "the captioner failed (KeyError in test_llm_runs.py" in log(tmp_path)
    lines = (tmp_path / "decisions.jsonl").read_text().splitlines()
    assert lines and all(json.loads(line)["caption"] is None for line in lines)


def test_a_captioner_that_cannot_tell_an_end_is_named():
    agent = make_agent(("options",))
    agent.policy.captioner = Stumbling(agent.policy.captioner.actions, OBS)
    running = agent.policy.initial(OBS, 1) | {"uid": torch.tensor([1]), "position": torch.tensor([1])}
    obs = {"symbolic": np.zeros((1, 2), np.int32)}
    with pytest.raises(UserError, match="Stumbling.*--llm.captioner.*KeyError: 'nothing'"):
        agent.policy.ended(0, Execution(running), obs)


@pytest.mark.slow
def test_a_recorded_run_is_repeated_and_resumed_without_its_server(tmp_path):
    with FakeLLM() as server:
        assert advised(tmp_path / "recorded", server) == 0
        assert len(server.asked) > 1
        server.stop()
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        for logdir in (whole, parts):
            logdir.mkdir()
            shutil.copy(tmp_path / "recorded" / "llm_cache.sqlite", logdir)
        assert advised(whole, server, "--llm.replay", "True") == 0
        assert without_calls(whole) == without_calls(tmp_path / "recorded")
        assert metrics(whole)[-1]["llm_adapter/answers"] > 10
        for step in (50, 90):
            with signal_at(step):
                assert advised(parts, server, "--llm.replay", "True") == 143
        assert advised(parts, server, "--llm.replay", "True") == 0
        shutil.copy(whole / "llm_cache.sqlite", parts)
        assert_same_run(whole, parts)


def test_a_dying_server_does_not_stop_the_run_and_no_file_contains_the_key(tmp_path, monkeypatch):
    before = AdviceHooks.before

    with FakeLLM(Say(delay=0.01)) as server:

        def stop_and_start(hooks: AdviceHooks, obs: dict, state: dict, step: int):
            if step == 40:
                server.stop()
            if step == 80:
                server.start()
                hooks.service.breaker.until = 0.0  # the pause is over
            return before(hooks, obs, state, step)

        monkeypatch.setattr(AdviceHooks, "before", stop_and_start)
        monkeypatch.setattr(Cache, "get", lambda self, key: None)
        options = "--llm.retries 0 --llm.breaker_failures 2".split()
        assert advised(tmp_path, server, *options) == 0
        assert server.asked[0].headers["Authorization"] == f"Bearer {KEY}"
    last = metrics(tmp_path)[-1]
    assert last["step"] == 120 and last["llm_adapter/dropped"] > 0 and last["llm_adapter/breaker"] == 0
    assert last["llm_adapter/errors/network"] == 2
    told = log(tmp_path)
    assert told.index("does not answer (network") < told.index("the adviser answers again")
    assert json.loads((tmp_path / "decisions.jsonl").read_text().splitlines()[0])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10 and not [path for path in files if KEY.encode() in path.read_bytes()]
