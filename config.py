"""Reads configs.yaml and the command line into one checked, nested, read-only Config.

`load` merges the defaults, task presets, advice presets, scale presets and single options, in this order.
The comment of each option in configs.yaml starts with its legal values. Every mistake is a `UserError` of
one line that names the nearest valid preset, option or value.
"""

import contextlib
import difflib
import io
import math
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.representer import SafeRepresenter

from basics import CONTROL, UserError, atomic_write, first_line

CONFIGS = Path(__file__).with_name("configs.yaml")
CLASSES = ("task_presets", "advice_presets", "scale_presets")  # in the order of merging
CPU_PRESET = "cpu"
CPU_PRESET_TASKS = ("crafter", "audio", "lpm_noisytv")  # get CPU_PRESET on a CPU if no scale preset is named
QUICK_ON_CPU = ("cpu", "cpu_vector", "debug", "doorkey")
RUN_PATHS = ("logdir", "from_checkpoint", "transfer")  # where a run is and how it began, not what it is
MAX_SHOWN = 100  # characters of a value or a name in a message

# Why an option with `[frozen: KEY]` in its comment cannot change when a run is resumed.
FROZEN = {
    "task": "the replay and the step count belong to the old task",
    "network": "the networks in the checkpoint have the old shape",
    "explorer": "the checkpoint has the old explorer",
    "advice": "the agent in the checkpoint was trained with other advice",
}

# What users of dreamerv3-torch, dreamerv3, r2dreamer and the older LoRe type. A note may follow in brackets.
OLD_NAMES = {
    "total_frames": "steps",
    "log_dir": "logdir",
    "log_interval": "log_every",
    "save_every_frames": "save_every",
    "replay_capacity": "replay.capacity",
    "noisy-tv": "noisy_tv.enabled",
    "use_llm": "llm.enabled",
    "llm_use_cli": "llm.backend (gemini_cli)",
    "enable_synthetic_replay": "synthetic.enabled",
    "enable_hierarchical_options": "options.enabled",
    "deterministic_run": "deterministic",
    "eval_episode_num": "eval_episodes",
    "offline_traindir": "traindir",
    "dataset_size": "replay.capacity",
    "dyn_hidden": "rssm.hidden",
    "dyn_deter": "rssm.deter",
    "dyn_stoch": "rssm.stoch",
    "dyn_discrete": "rssm.classes",
    "kl_free": "rssm.free_nats",
    "dyn_scale": "loss_scales.dyn",
    "rep_scale": "loss_scales.rep",
    "actor.lr": "actor_lr",
    "critic.lr": "critic_lr",
    "grad_clip": "opt.agc (adaptive clipping)",
    "discount": "horizon (discount = 1 - 1/horizon)",
    "run.envs": "envs.amount",
    "replay.size": "replay.capacity",
    "buffer.max_size": "replay.capacity",
    "jax.platform": "device",
    "jax.compute_dtype": "precision",
    "imag_length": "imag_horizon",
    "act_entropy": "actor.entropy",
    "lamb": "discount_lambda",
}


# YAML and text


class _Representer(SafeRepresenter):
    """Writes lists on one line."""


_Representer.add_representer(
    list, lambda self, data: self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)
)


class PlainComposer(Composer):
    """Refuses anchors, and thus aliases, by which a small file can become huge."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.parser.peek_event()
        if event.anchor is not None:
            reason = "anchors (&name) and aliases (*name) are refused"
            raise ComposerError(None, None, reason, event.start_mark)
        return super().compose_node(parent, index)


def parse_yaml(text: str, where: str) -> Any:
    """The content of a YAML text. Raises UserError with `where` and the line."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = PlainComposer
    try:
        return yaml.load(text)
    except Exception as error:  # of any kind: ruamel raises more than YAMLError for some nonsense
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        why = getattr(error, "problem", None) or first_line(error)
        raise UserError(f"{where}{line}: not valid YAML: {why}") from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not valid YAML: not a text file in UTF-8") from None


def _nearest(word: str, valid: Any) -> str:
    return difflib.get_close_matches(word[:MAX_SHOWN].lower(), list(valid), n=1, cutoff=0.0)[0]


def _written(value: Any) -> str:
    """A value as it is written in YAML and on the command line."""
    if isinstance(value, list):
        return "[" + ", ".join(map(_written, value)) + "]"
    return "null" if value is None else str(value)


def _show(value: Any) -> str:
    """A value or a name in a message."""
    text = _written(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _flatten(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields ('group.name', value); an empty group is yielded as it is, so that its name can be checked."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _nest(values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *groups, leaf = name.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = value
    return tree


# Options and their values


def _to_null(value: Any) -> None:
    if value not in (None, "null", "None"):
        raise ValueError


def _to_bool(value: Any) -> bool:
    return {"True": True, "true": True, "1": True, "False": False, "false": False, "0": False}[str(value)]


def _to_float(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(number := float(value)):
        raise ValueError
    return number


def _to_int(value: Any) -> int:
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return int(value)  # exact where a float is not
    number = _to_float(value)
    if not number.is_integer():
        raise ValueError
    return value if isinstance(value, int) else int(number)


def _to_str(value: Any) -> str:
    if not isinstance(value, str) or CONTROL.search(value):
        raise ValueError
    return value


# In the order in which they are tried.
READERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "null": (_to_null, "null"),
    "bool": (_to_bool, "True or False"),
    "int": (_to_int, "a whole number"),
    "float": (_to_float, "a number"),
    "str": (_to_str, "text in UTF-8 on one line"),
}
# What a comment may start with: (a|b|int), [low, high] and [frozen: why].
_CONSTRAINT = re.compile(
    r"(?:\((?P<words>[^()\s]+)\)\s*)?"
    r"(?:\[(?P<low>[^\[\],:]+),(?P<high>[^\[\],]+)\]\s*)?"
    r"(?:\[frozen: (?P<frozen>\w+)\]\s*)?"
)


@dataclass(frozen=True)
class Option:
    """One option of configs.yaml: its default and its legal values. For a list, `types` are its items'."""

    name: str
    default: Any
    types: tuple[str, ...]
    words: tuple[str, ...]
    bounds: tuple[float, float] | None
    frozen: str | None  # key of FROZEN: cannot change when a run is resumed
    allowed: str  # the constraint as written
    help: str
    section: str

    @classmethod
    def read(cls, name: str, default: Any, comment: str, section: str) -> "Option":
        """Raises ValueError if the comment's constraint is malformed or the type is unclear."""
        match = _CONSTRAINT.match(comment)
        words, text = (match["words"] or "").split("|"), comment[match.end() :]
        if text.startswith(("(", "[")):
            raise ValueError(f"not a constraint: {text}")
        if (match["frozen"] or "task") not in FROZEN:
            raise ValueError(f"frozen is one of {', '.join(FROZEN)}, not {match['frozen']}")
        bounds = (float(match["low"]), float(match["high"])) if match["low"] else None
        types = [word for word in words if word in READERS] + ["bool"] * ("True" in words)
        if words == [""]:
            sample = (default or [None])[0] if isinstance(default, list) else default
            types = [type(sample).__name__]
        if not set(types) <= set(READERS):
            raise ValueError("without a constraint the default must be a bool, number, text or list of these")
        words = [word for word in words if word and word not in READERS and word not in ("True", "False")]
        allowed = comment[: match.end()].strip()
        return cls(name, default, tuple(types), tuple(words), bounds, match["frozen"], allowed, text, section)

    @property
    def is_list(self) -> bool:
        return isinstance(self.default, list)

    @property
    def expected(self) -> str:
        """The legal values in words."""
        phrases = [f"one of {', '.join(self.words)}"] if self.words else []
        return " or ".join(phrases + [phrase for name, (_, phrase) in READERS.items() if name in self.types])

    def convert(self, value: Any, where: str) -> Any:
        """The value in the option's type. Raises UserError, which starts with `where`, if not allowed."""
        if not self.is_list:
            return self._convert_one(value, where)
        if not isinstance(value, list):
            raise UserError(f"{where}: must be a list, for example {_show(self.default)}")
        return [self._convert_one(item, where) for item in value]

    def _convert_one(self, value: Any, where: str) -> Any:
        if isinstance(value, str) and value in self.words:
            return value
        for name, (reader, _) in READERS.items():
            if name in self.types:
                try:
                    return self._in_bounds(reader(value), where)
                except (ValueError, TypeError, KeyError, OverflowError):
                    continue  # not of this type: try the next
        hint = f"the default is {_show(self.default)}"
        if self.words:
            hint = f"the nearest is {_nearest(str(value), self.words)}"
        raise UserError(f"{where}: must be {self.expected}; {hint}")

    def _in_bounds(self, value: Any, where: str) -> Any:
        if self.bounds and type(value) in (int, float):
            low, high = self.bounds
            if not low <= value <= high:
                near = type(value)(min(max(value, low), high))
                raise UserError(f"{where}: must be in [{low:.12g}, {high:.12g}]; the nearest is {near}")
        return value


# configs.yaml


@dataclass(frozen=True)
class Schema:
    """What configs.yaml holds: options by full name, presets by class, comments."""

    path: Path
    options: dict[str, Option]
    groups: dict[str, str]  # name: help
    presets: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)  # class, name, option: value
    preset_help: dict[str, str] = field(default_factory=dict)  # by class and by preset

    def class_of(self, preset: str) -> str:
        """The class of a preset. Raises UserError if there is no such preset."""
        for kind, presets in self.presets.items():
            if preset in presets:
                return kind
        near = _nearest(preset, [name for presets in self.presets.values() for name in presets])
        raise UserError(f"--configs {_show(preset)}: there is no such preset; the nearest is {near}")

    def is_preset(self, name: str) -> bool:
        return any(name in presets for presets in self.presets.values())

    def preset(self, name: str) -> dict[str, Any]:
        return self.presets[self.class_of(name)][name]

    def merged(self, presets: list[str]) -> dict[str, Any]:
        """The defaults with presets applied in the order given, by full name."""
        values = {name: option.default for name, option in self.options.items()}
        for preset in presets:
            values |= self.preset(preset)
        return values

    def leaves(self, leaf: str) -> list[str]:
        return [name for name in self.options if name.rpartition(".")[2] == leaf]

    def unknown(self, name: str, where: str) -> UserError:
        """The error for an option that does not exist."""
        dashes = "--" if where.startswith("--") else ""
        name = name if name in OLD_NAMES else name.replace("-", "_")
        if name in OLD_NAMES:
            return UserError(f"{where} is not an option; use {dashes}{OLD_NAMES[name]}")
        if self.is_preset(name):
            return UserError(f"{where} is not an option but a preset: write --configs {name}")
        names = self.leaves(name.rpartition(".")[2])  # `run.steps` of dreamerv3
        if not names:
            near = {full.rpartition(".")[2]: full for full in self.options}
            near |= {full: full for full in (*self.groups, *self.options, "configs", "help", "print_config")}
            found = _nearest(name, near)
            names = self.leaves(found) or [near[found]]
        names = " or ".join(dashes + name for name in names)
        return UserError(f"{where} is not an option; the nearest is {names}")

    def flat_values(self, tree: Any, where: str) -> dict[str, Any]:
        """Flattens and checks a nested mapping. Raises UserError, which starts with `where` and the name."""
        if not isinstance(tree, Mapping):
            raise UserError(f"{where}must hold options as name: value")
        values = {}
        for name, value in _flatten(tree):
            place = f"{where}{_show(name)}"
            if name in self.options:
                if isinstance(value, Mapping):
                    raise UserError(f"{place} is one option, not a group")
                values[name] = self.options[name].convert(value, f"{place} {_show(value)}")
            elif name not in self.groups:
                raise self.unknown(name, place)
            elif value != {}:
                raise UserError(f"{place} is a group of options: it needs {{name: value}}")
        return values


def _scan_comments(text: str) -> tuple[dict[tuple[str, ...], str], dict[tuple[str, ...], str]]:
    """The comment on each key's line, and the block of comment lines above it, by path."""
    comments, headings = {}, {}
    stack: list[tuple[int, str]] = []
    block: list[str] = []
    in_block = False
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if line.lstrip().startswith("#"):
            if indent <= 2:
                block = [*block, line.strip("# ")] if in_block else [line.strip("# ")]
                in_block = True
            continue
        in_block = False
        if key := re.match(r" *([\w.]+):(?:\s|$)", line):
            stack = [*(item for item in stack if item[0] < indent), (indent, key[1])]
            path = tuple(name for _, name in stack)
            comment = re.match(r"""(?:'[^']*'|"[^"]*"|[^'"])*?\s#\s*(.*)""", line)
            comments[path] = comment[1].strip() if comment else ""
            headings[path] = " ".join(block)
    return comments, headings


def _read_options(
    path: Path, defaults: Mapping, comments: Mapping, headings: Mapping
) -> tuple[dict[str, Option], dict[str, str]]:
    options, groups = {}, {}
    for name, default in _flatten(defaults):
        parts = name.split(".")
        for depth in range(1, len(parts)):
            groups.setdefault(".".join(parts[:depth]), comments.get(("defaults", *parts[:depth]), ""))
        comment = comments.get(("defaults", *parts), "")
        try:
            option = Option.read(name, default, comment, headings.get(("defaults", parts[0]), ""))
        except ValueError as error:
            raise UserError(f"{path}, defaults {name}: {error}") from None
        option.convert(default, f"{path}, defaults {name} {_show(default)}")
        options[name] = option
    return options, groups


@lru_cache
def read(path: Path = CONFIGS) -> Schema:
    """Reads configs.yaml and checks all of it. Raises UserError with the file and the place."""
    text = _read_text(path)
    tree = parse_yaml(text, str(path))
    parts = ("defaults", *CLASSES)
    if not isinstance(tree, dict) or set(tree) != set(parts):
        raise UserError(f"{path}: must hold exactly {', '.join(parts)}")
    for part in parts:
        if not isinstance(tree[part], dict):
            raise UserError(f"{path}, {part}: must be a mapping of names, {{}} if empty")
    comments, headings = _scan_comments(text)
    schema = Schema(path, *_read_options(path, tree["defaults"], comments, headings))
    for kind in CLASSES:
        schema.preset_help[kind] = headings.get((kind,), "")
        schema.presets[kind] = {}
        for name, body in tree[kind].items():
            if name in schema.preset_help:
                raise UserError(f"{path}, {kind}: there is another preset called {name}")
            schema.presets[kind][name] = schema.flat_values(body, f"{path}, preset {name}: ")
            schema.preset_help[name] = comments.get((kind, name), "")
    return schema


# The result


class Config(Mapping):
    """Options by name: `config.rssm.deter`, `config['rssm']`, `dict(**config.rssm)`. Read only.

    presets: applied presets in order, those that were added automatically last
    added: the presets that were added automatically
    notes: lines for the log about these decisions
    """

    presets: list[str]
    added: list[str]
    notes: list[str]

    def __init__(
        self, values: Mapping[str, Any], presets: list[str] = (), added: list[str] = (), notes: list[str] = ()
    ):
        copies = {}
        for name, value in values.items():
            copies[name] = Config(value) if isinstance(value, Mapping) else value
            if isinstance(value, list):
                copies[name] = list(value)
        vars(self).update(_values=copies, presets=list(presets), added=list(added), notes=list(notes))

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __getattr__(self, name: str) -> Any:
        # Private names are never options; copy and pickle ask for them before `_values` exists.
        if name.startswith("_") or name not in self._values:
            raise AttributeError(f"there is no option {name}")
        return self._values[name]

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a Config is read only: use replace({{'{name}': ...}})")

    def __repr__(self) -> str:
        return f"Config({self.to_dict()})"

    def to_dict(self) -> dict[str, Any]:
        """A plain nested dict, which may be changed without changing the Config."""
        plain = {}
        for name, value in self.items():
            plain[name] = value.to_dict() if isinstance(value, Config) else value
            if isinstance(value, list):
                plain[name] = list(value)
        return plain

    def replace(self, changes: Mapping[str, Any]) -> "Config":
        """A Config with some options changed, by full name: {'rssm.deter': 64}. Raises UserError."""
        values = dict(_flatten(self)) | read().flat_values(changes, "option ")
        config = Config(_nest(values), self.presets, self.added, self.notes)
        check(config)
        return config

    def to_yaml(self) -> str:
        """The whole config as YAML with a comment on top; `load_saved` reads it."""
        yaml = YAML(typ="safe", pure=True)
        yaml.Representer = _Representer
        yaml.default_flow_style = False
        yaml.sort_base_mapping_type_on_output = False
        yaml.width = 2**16  # never break a value into lines
        stream = io.StringIO()
        yaml.dump({"configs": self.presets, "configs_added": self.added, **self.to_dict()}, stream)
        return (
            "# All options of this run, with every preset and override applied.\n"
            "# configs: the presets in the order applied; configs_added: those that LoRe added.\n"
        ) + stream.getvalue()

    def overrides(self) -> dict[str, Any]:
        """The options that differ from the presets, by full name."""
        values = read().merged(self.presets)
        return {name: value for name, value in _flatten(self) if value != values[name]}

    def to_argv(self) -> list[str]:
        """The words of a command line from which `load` makes this config."""
        words = ["--configs", *self.presets] if self.presets else []
        for name, value in self.overrides().items():
            text = [_written(item) for item in value] if isinstance(value, list) else [_written(value)]
            if text[:1] and text[0].startswith("--"):  # it would be taken for an option
                words.append(f"--{name}={' '.join(text)}")
            else:
                words += [f"--{name}", *(text or ["[]"])]
        return words

    def save(self, path: str | Path) -> None:
        """Writes the config whole or not at all. Raises UserError if the system refuses."""
        text = self.to_yaml()
        atomic_write(path, lambda file: file.write(text.encode()))

    @classmethod
    def load_saved(cls, path: str | Path) -> "Config":
        """Reads what `save` wrote. Raises UserError naming the file."""
        return cls.from_yaml(_read_text(Path(path)), str(path))

    @classmethod
    def from_yaml(cls, text: str, where: str) -> "Config":
        """Reads what `to_yaml` gave; missing options take their defaults. Raises UserError naming `where`."""
        tree = parse_yaml(text, where)
        if not isinstance(tree, dict):
            raise UserError(f"{where}: must hold options as name: value")
        presets, added = tree.pop("configs", []), tree.pop("configs_added", [])
        for names in (presets, added):
            if not isinstance(names, list) or not all(isinstance(n, str) and n.isidentifier() for n in names):
                raise UserError(f"{where}: configs and configs_added must be lists of presets")
        schema = read()
        config = cls(_nest(schema.merged([]) | schema.flat_values(tree, f"{where}: ")), presets, added)
        check(config, f"{where}: ")
        return config


# The command line


@dataclass
class Command:
    """What the command line says: presets (None if `--configs` is absent), options by full name, flags."""

    presets: list[str] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    print_config: bool = False


def _find(schema: Schema, name: str) -> str:
    """The full name of an option or a group that was given in full or by its unique last part."""
    if name in schema.options or name in schema.groups:
        return name
    found = schema.leaves(name)
    if not found:
        raise schema.unknown(name, f"--{_show(name)}")
    if len(found) > 1:
        candidates = ", ".join(f"--{full}" for full in found)
        raise UserError(f"--{name} is in several groups; write one of {candidates}")
    return found[0]


def _value(option: Option, words: list[str], where: str) -> Any:
    text = " ".join(words)
    if not text and (not words or option.default is None):
        plain = isinstance(option.default, bool) or option.default is None
        example = "" if plain else f", for example {_show(option.default)}"
        raise UserError(f"--{option.name} needs a value: write {option.expected}{example}")
    if option.is_list:
        return option.convert(re.sub(r"^\[|\]$|,", " ", text).split(), where)
    if len(words) > 1:
        raise UserError(f"{where}: takes one value; unexpected {_show(' '.join(words[1:]))}")
    return option.convert(text, where)


def _group_error(schema: Schema, group: str, words: list[str], where: str) -> UserError:
    names = [name for name in schema.options if name.startswith(f"{group}.")]
    hint = f"its options are {', '.join(f'--{name}' for name in names)}"
    with contextlib.suppress(UserError):
        _value(schema.options[names[0]], words, where)
        hint = f"the nearest is --{names[0]} {' '.join(words)}"  # `--envs 4` of dreamerv3-torch
    if not words and schema.is_preset(group):
        hint += f"; for the preset of that name write --configs {group}"
    return UserError(f"{where}: {group} is a group of options; {hint}")


def _parse(schema: Schema, argv: list[str]) -> Command:
    """Splits the command line and checks options and values; `_merge` checks the presets."""
    command = Command()
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            hint = f"write --configs {word}" if schema.is_preset(word) else "options are written --name value"
            raise UserError(f"unexpected word {_show(word)}: {hint}")
        name, equals, inline = word[2:].partition("=")
        words = [inline] if equals else []
        while rest and not rest[0].startswith("--"):
            words.append(rest.pop(0))
        where = _show(" ".join([f"--{name}", *words]))
        if name == "print_config":
            if words:
                raise UserError(f"{where}: takes no value; unexpected {_show(' '.join(words))}")
            command.print_config = True
        elif name == "configs":
            if not words:
                raise UserError("--configs needs at least one preset, for example --configs crafter")
            command.presets = [*(command.presets or []), *words]
        elif (full := _find(schema, name)) in schema.groups:
            raise _group_error(schema, full, words, where)
        else:
            command.options[full] = _value(schema.options[full], words, where)
    return command


# Loading


def _on_cpu(device: str, has_cuda: bool | None) -> bool:
    return device == "cpu" or (device == "auto" and has_cuda is False)


def _merge(schema: Schema, command: Command, has_cuda: bool | None, saved: Config | None) -> Config:
    scales = schema.presets["scale_presets"]
    notes, why = [], "the saved run has it"
    if saved is not None and command.presets is None and "from_checkpoint" in command.options:
        presets, added, values = saved.presets, saved.added, dict(_flatten(saved))
        # The command says where the run is; a new run does not write into the old run's episodes.
        new = "logdir" in command.options or command.options.get("transfer")
        values |= {
            name: schema.options[name].default for name in (*RUN_PATHS, *(["traindir"] if new else []))
        }
    else:
        named = dict.fromkeys(command.presets or [])
        presets = sorted(named, key=lambda preset: CLASSES.index(schema.class_of(preset)))
        device = command.options.get("device", "auto")
        added = []
        if not set(presets) & set(scales):
            if saved is not None:  # decided once, the same on any machine
                added = saved.added
            elif _on_cpu(device, has_cuda) and set(presets) & set(CPU_PRESET_TASKS):
                added = [CPU_PRESET]
                why = "there is no GPU and no size is named, e.g. size12m"
        presets = [*presets, *added]
        values = schema.merged(presets)
    values |= command.options
    if added:
        notes.append(f"Preset {', '.join(added)} added: {why}.")
    elif _on_cpu(values["device"], has_cuda) and not set(presets) & set(QUICK_ON_CPU):
        size = next((preset for preset in presets if preset in scales), "the default size")
        notes.append(f"Slow: {size} on a CPU. --configs {CPU_PRESET} is made for it.")
    return Config(_nest(values), presets, added, notes)


def _print_and_exit(text: str) -> NoReturn:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `--help | head`; Python flushes once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0)


def load(argv: list[str], *, has_cuda: bool | None = None, saved: Config | None = None) -> Config:
    """The config that the command line asks for, checked.

    has_cuda: whether CUDA works here; None if unknown: then no preset is added and no speed is estimated
    saved: the config of the run that is resumed, or of the checkpoint's run. It decides which preset is
        added automatically. With `--from_checkpoint` and no `--configs`, the options are applied to it
    Raises UserError for mistakes, SystemExit(0) after `--help` and `--print_config`.
    """
    schema = read()
    if {"--help", "-h"} & set(argv):
        _print_and_exit(help_text(schema))
    command = _parse(schema, argv)
    config = _merge(schema, command, has_cuda, saved)
    check(config)
    if command.print_config:
        _print_and_exit(config.to_yaml())
    return config


def run_paths(argv: list[str]) -> tuple[str | None, str | None, list[str] | None]:
    """(logdir, from_checkpoint, transfer) as the command line gives them: which run to resume, if any.

    Prints nothing and checks no combination of options, as these may depend on the run's saved config.
    """
    argv = [word for word in argv if word not in ("--help", "-h")]
    options = _parse(read(), argv).options
    return tuple(options.get(name) for name in RUN_PATHS)


def resume_changes(saved: Config, config: Config) -> list[str]:
    """Lines `name: old -> new` for a run that resumes with `config` instead of `saved`.

    Raises UserError if a frozen option differs.
    """
    old, new, options = dict(_flatten(saved)), dict(_flatten(config)), read().options
    changed = {
        name: f"{name}: {_show(old[name])} -> {_show(new[name])}"
        for name in new
        if name not in RUN_PATHS and old[name] != new[name]
    }
    for key, reason in FROZEN.items():
        if refused := [text for name, text in changed.items() if options[name].frozen == key]:
            more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
            raise UserError(
                f"Cannot resume with {', '.join(refused[:3])}{more}: {reason}; "
                "a new --logdir starts a fresh run"
            )
    return list(changed.values())


# Checks that need several options


def check(config: Config, where: str = "") -> None:
    """Raises UserError, which starts with `where`, if options do not fit each other."""
    problem = next(_problems(config), None)
    if problem:
        raise UserError(where + problem)


def _problems(config: Config) -> Iterator[str]:
    rssm = config.rssm
    if config.eval_episodes % config.envs.eval_amount:
        yield (
            f"eval_episodes {config.eval_episodes} must be a multiple of "
            f"envs.eval_amount {config.envs.eval_amount}"
        )
    if rssm.deter % rssm.blocks:
        yield f"rssm.deter {rssm.deter} must be a multiple of rssm.blocks {rssm.blocks}"
    yield from _size_problems(config.size, len(config.encoder.cnn_mults))
    for group in ("encoder", "decoder"):
        for name in ("audio_keys", "cnn_keys", "mlp_keys"):
            try:
                re.compile(config[group][name])
            except (re.error, OverflowError, RecursionError) as error:
                yield f"{group}.{name} {_show(config[group][name])}: not a regular expression: {error}"
    if config.imag_last > config.batch_length:
        yield f"imag_last {config.imag_last} must be at most batch_length {config.batch_length}"
    if config.audio.hop_length > config.audio.n_fft:
        yield (
            f"audio.hop_length {config.audio.hop_length} must be at most audio.n_fft {config.audio.n_fft}, "
            "or what lies between two windows is not heard"
        )
    yield from _advice_problems(config)
    if config.transfer and not config.from_checkpoint:
        yield "transfer names parts of a checkpoint: add --from_checkpoint with its file"
    needed = config.envs.amount * (config.batch_length + config.replay_context)
    if config.replay.capacity != "auto" and config.replay.capacity < needed:
        yield (
            f"replay.capacity {config.replay.capacity} must be at least {needed}: "
            "one sequence of batch_length + replay_context steps for each of envs.amount"
        )


def _advice_problems(config: Config) -> Iterator[str]:
    paths = [name for name in ("prior", "synthetic", "options") if config[name].enabled]
    if paths and not config.llm.enabled:
        yield f"{paths[0]}.enabled True needs an adviser: add llm.enabled True"
    if config.llm.enabled and not (paths or config.llm.features):
        yield (
            "llm.enabled True says who is asked but not what for: add prior.enabled, synthetic.enabled or "
            "options.enabled True, or --configs lore_full for all three"
        )
    own = config.expl_behavior == "random" or (
        config.expl_task_actor == "separate" and config.expl_behavior != "greedy"
    )
    for name in ("prior", "options"):
        if own and config[name].enabled:
            yield (
                f"{name}.enabled True works on the task's actor, which does not act with expl_behavior "
                f"{config.expl_behavior} and expl_task_actor {config.expl_task_actor}: use greedy, or shared"
            )
    if config.options.enabled and config.expl_behavior != "greedy":
        yield (
            f"options.enabled True measures skills by the task's reward alone, which is not what "
            f"expl_behavior {config.expl_behavior} seeks: use greedy"
        )
    curious = config.expl_behavior not in ("greedy", "random") and config.expl_task_actor == "shared"
    if config.synthetic.enabled and curious:
        yield (
            f"synthetic.enabled True measures plans by the task's reward alone, which is not what the actor "
            f"seeks with expl_behavior {config.expl_behavior}: use greedy, or expl_task_actor separate"
        )
    if config.options.enabled and config.imag_gradient != "reinforce":
        yield f"options.enabled True needs imag_gradient reinforce, not {config.imag_gradient}"


def _size_problems(size: list[int], layers: int) -> Iterator[str]:
    if len(size) != 2 or min(size) < 1:
        yield f"size {_show(size)} must be height and width, for example 64 64"
        return
    shrink = 2**layers  # each convolution halves the resolution
    low, high = 3, 16  # of the smallest feature map, as in the reference
    if any(side % shrink or not low <= side // shrink <= high for side in size):
        yield (
            f"size {_show(size)}: each side must be a multiple of {shrink} = 2**{layers} "
            f"(one halving for each of cnn_mults) from {low * shrink} to {high * shrink}"
        )


# Help


def help_text(schema: Schema) -> str:
    """Usage, presets by class and options by section, each with its comment."""
    width, column = max(80, shutil.get_terminal_size((110, 24)).columns), 38

    def entry(head: str, text: str) -> str:
        first = f"  {head:<{column - 3}} "
        return textwrap.fill(
            text or "-",
            width,
            initial_indent=first,
            subsequent_indent=" " * column,
            break_long_words=False,
            break_on_hyphens=False,
        )

    lines = [
        "usage: python3 dreamer.py [--configs PRESET ...] [--OPTION VALUE ...]",
        "",
        entry("--configs PRESET [PRESET ...]", "presets, in any order; single options win over them"),
        entry("--OPTION VALUE, --OPTION=VALUE", "nested as --group.name; a unique name may be given alone"),
        entry("--print_config", "show all options with presets and options applied"),
        entry("--help, -h", "show this"),
    ]
    for kind, presets in schema.presets.items():
        lines += ["", f"{kind.replace('_', ' ').capitalize()}: {schema.preset_help[kind]}"]
        lines += [entry(name, schema.preset_help[name]) for name in presets]
    section, group = None, ""
    for name, option in schema.options.items():
        if option.section != section:
            section = option.section
            lines += ["", f"Options: {section}"]
        if name.rpartition(".")[0] != group:
            group = name.rpartition(".")[0]
            lines += [f"  {group}: {schema.groups[group]}"] if schema.groups.get(group) else []
        lines.append(entry(f"--{name} {_show(option.default)}", f"{option.allowed} {option.help}".strip()))
    return "\n".join(lines)
