"""Configs against a simple model: any command and any text is a config, or an error of one line.

The model merges plain dicts: defaults, presets by class, single options.
"""

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import config as configs
from basics import CONTROL, UserError
from config import Config, Option

SCHEMA = configs.read()
PRESETS = list(SCHEMA.presets)
LONGEST = 1500  # characters of a message
VALID = configs.load(["--configs", "debug"]).to_yaml()

texts = st.text(min_size=1, max_size=12).filter(lambda text: not CONTROL.search(text)) | st.just("x/" * 200)
anything = st.text(max_size=60) | st.text("-=[]{}:,.#&*!|>'\"%@`\n\t \\0a1eE+~", max_size=60)


def assert_plain(error: UserError) -> str:
    """A mistake is one line that a terminal can show, and not too long."""
    message = str(error)
    assert message and len(message) < LONGEST and not CONTROL.search(message)
    return message


def values_of(option: Option) -> st.SearchStrategy:
    """What one entry of an option may be."""
    low, high = option.bounds or (-1e6, 1e6)
    kinds = {
        "null": st.none(),
        "bool": st.booleans(),
        "int": st.integers(int(max(low, -(10**6))), int(min(high, 10**6))),
        "float": st.floats(max(low, -1e300), min(high, 1e300)),
        "str": texts,
    }
    choices = [st.sampled_from(option.words)] if option.words else []
    return st.one_of(*choices, *(kinds[name] for name in option.types))


@st.composite
def overrides(draw) -> tuple[list[str], str, object]:
    """An option as written in a command, its full name and its value."""
    option = draw(st.sampled_from(list(SCHEMA.options.values())))
    value = draw(
        st.lists(values_of(option), min_size=1, max_size=3)
        if isinstance(option.default, list)
        else values_of(option)
    )
    name = option.name
    leaf = name.rpartition(".")[2]
    if len(SCHEMA.leaves(leaf)) == 1 and leaf not in SCHEMA.options and leaf not in SCHEMA.groups:
        name = draw(st.sampled_from([name, leaf]))
    shown = "[" + ", ".join(map(repr, value)) + "]" if isinstance(value, list) else str(value)
    shown = "null" if value is None else shown
    words = draw(st.sampled_from([[f"--{name}={shown}"], [f"--{name}", shown]]))
    if len(words) == 2 and shown.startswith("--"):
        words = [f"--{name}={shown}"]
    value = SCHEMA.options[option.name].convert(value, "")  # an int where a float is, for example
    return words, option.name, value


class Commands(RuleBasedStateMachine):
    """A command that grows by presets and options; configs that are saved, read, replaced and resumed."""

    def __init__(self):
        super().__init__()
        self.presets: list[str] = []
        self.options: dict[str, object] = {}
        self.words: list[list[str]] = []
        self.config = configs.load([])

    def argv(self) -> list[str]:
        chosen = [["--configs", *self.presets]] if self.presets else []
        return sum(chosen + self.words, [])

    def attempt(self) -> bool:
        """Load the command; where options do not fit each other, that is a mistake in one line."""
        try:
            self.config = configs.load(self.argv())
        except UserError as error:
            assert_plain(error)
            return False
        return True

    @rule(preset=st.sampled_from(PRESETS))
    def add_preset(self, preset):
        self.presets.append(preset)
        if not self.attempt():
            self.presets.pop()

    @rule(override=overrides())
    def add_option(self, override):
        words, name, value = override
        before = dict(self.options)
        self.words.append(words)
        self.options[name] = value
        if not self.attempt():
            self.words.pop()
            self.options = before

    @rule(data=st.data())
    def shuffle(self, data):
        """The order of presets of other classes, and of different options, means nothing."""
        before = self.config
        by_class = {k: [p for p in self.presets if SCHEMA.presets[p].kind == k] for k in configs.CLASSES}
        self.presets = sum((by_class[kind] for kind in data.draw(st.permutations(configs.CLASSES))), [])
        names = [configs._find(SCHEMA, words[0][2:].partition("=")[0]) for words in self.words]
        last = dict(zip(names, self.words, strict=True))
        self.words = data.draw(st.permutations(list(last.values())))
        assert self.attempt() and self.config == before and self.config.presets == before.presets

    @rule(name=st.text("abcdefghijklmnopqrstuvwxyz._-", min_size=1, max_size=20), word=texts)
    def misspell(self, name, word):
        """The error for an unknown name suggests a known one."""
        known = name in SCHEMA.options or name in SCHEMA.groups or SCHEMA.leaves(name)
        if known or name in ("configs", "help", "print_config"):
            return
        with pytest.raises(UserError) as error:
            configs.load([*self.argv(), f"--{name}={word}"])
        message = assert_plain(error.value)
        assert "is not an option" in message
        told = message.rpartition("the nearest is ")[2].split(" or ")
        assert "nearest" not in message or all(
            each[2:] in {*SCHEMA.options, *SCHEMA.groups, "configs", "help", "print_config"} for each in told
        )

    @precondition(lambda self: self.config)
    @rule()
    def save_and_read(self):
        with tempfile.TemporaryDirectory() as folder:
            self.config.save(Path(folder) / "config.yaml")
            read = Config.load_saved(Path(folder) / "config.yaml")
        assert read == self.config and read.presets == self.config.presets
        assert configs.resume_changes(read, self.config) == []
        again = configs.load(["--from_checkpoint", "x.pt"], saved=read)
        paths = {name: SCHEMA.options[name].default for name in configs.RUN_PATHS}
        assert again.replace(paths) == self.config.replace(paths)

    @rule()
    def write_as_a_command(self):
        again = configs.load(self.config.to_argv())
        assert again == self.config and again.presets == self.config.presets

    @invariant()
    def config_is_the_model(self):
        values = {name: option.default for name, option in SCHEMA.options.items()}
        for kind in configs.CLASSES:
            for preset in dict.fromkeys(p for p in self.presets if SCHEMA.presets[p].kind == kind):
                values |= SCHEMA.presets[preset].values
        values |= self.options
        found = dict(configs._flatten(self.config))
        assert found == values
        assert {name: type(value) for name, value in found.items()} == {k: type(v) for k, v in values.items()}


def test_command_is_the_merge_of_its_parts():
    run_state_machine_as_test(
        Commands,
        settings=settings(max_examples=15, stateful_step_count=15, suppress_health_check=list(HealthCheck)),
    )


@settings(max_examples=60)
@given(
    words=st.lists(anything | st.sampled_from(["--", "--rssm", "--configs", "--size", "--envs"]), max_size=4)
)
@example(words=["--envs", "{amount: &a [*a]}"])
@example(words=["--size", "[" * 3000])
@example(words=["--encoder.mlp_keys", "a{99999999999999999999}"])
@example(words=["--logdir", "\ud800"])
@example(words=["--" + "k" * 10**5])
def test_any_command_is_a_config_or_a_mistake(words):
    try:
        configs.load(words)
    except UserError as error:
        assert_plain(error)
    except SystemExit as stop:  # --help
        assert stop.code == 0


def nested(depth: int, leaf: str) -> str:
    return "{a: " * depth + leaf + "}" * depth


def bomb() -> str:
    lines = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    return "\n".join(["a0: &a0 [x]", *lines, "size: *a11"])


@settings(max_examples=60)
@given(text=anything)
@example(text=bomb())
@example(text="size: &a [*a]")
@example(text=nested(5000, "1"))
@example(text="a: !!python/object/apply:os.system [ls]")
@example(text="logdir: !!binary aGk=")
@example(text="? {a: 1}\n: 2")
@example(text='"\\e[2J\\n": 1')
@example(text='logdir: "a\\0b"')
@example(text="seed: 2001-99-01")
@example(text="seed: " + "9" * 5000)
@example(text="%YAML 9.9\n---\na")
def test_any_text_is_a_config_or_a_mistake(text):
    read(text)


@settings(max_examples=30)
@given(data=st.data())
def test_damaged_config_is_a_config_or_a_mistake(data):
    start = data.draw(st.integers(0, len(VALID)))
    end = data.draw(st.integers(start, min(len(VALID), start + 80)))
    read(VALID[:start] + data.draw(anything) + VALID[end:])


def read(text: str) -> None:
    try:
        found = Config.from_yaml(text, "somewhere")
    except UserError as error:
        assert assert_plain(error).startswith("somewhere")
    else:
        assert Config.from_yaml(found.to_yaml(), "here") == found
        values = [value for _, value in configs._flatten(found) if isinstance(value, str)]
        assert not any(CONTROL.search(value) for value in [*values, *found.presets])
