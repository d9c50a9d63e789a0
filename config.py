"""Reads configs.yaml and the command line into one checked, nested, read-only Config.

`load` merges the defaults, task presets, advice presets, scale presets and single options, in this order.
The comment of each option in configs.yaml starts with its legal values. Every mistake is a `UserError` of
one line that names the nearest valid preset, option or value.
"""

import contextlib
import copy
import difflib
import io
import itertools
import math
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
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
RUN_PATHS = ("logdir", "from_checkpoint", "transfer")  # may differ when a run resumes
MAX_YAML = 2**20  # characters of a YAML text; configs.yaml has about 30,000
MAX_SHOWN = 100  # characters of a value or a name in a message

# Why an option with `[frozen: KEY]` in its comment cannot change when a run is resumed.
FROZEN = {
    "task": "the replay and the step count belong to the old task",
    "network": "the networks in the checkpoint have the old shape",
    "explorer": "the checkpoint has the old explorer",
    "advice": "the agent in the checkpoint was trained with other advice",
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
            raise ComposerError(None, None, "anchors (&) and aliases (*) are refused", event.start_mark)
        return super().compose_node(parent, index)


def parse_yaml(text: str, where: str) -> Any:
    """The content of a YAML text. Raises UserError with `where` and the line."""
    if len(text) > MAX_YAML:
        raise UserError(f"{where}: not valid YAML: longer than {MAX_YAML} characters")
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = PlainComposer
    try:
        return yaml.load(text)
    except Exception as error:  # ruamel raises more than YAMLError
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        why = getattr(error, "problem", None) or first_line(error)
        raise UserError(f"{where}{line}: not valid YAML: {why}") from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file in UTF-8"
        raise UserError(f"Cannot read {path}: {reason}") from None


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
    """Yields ('group.name', value); an empty group as ('group', {}), so that its name can be checked."""
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


def _to_float(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(number := float(value)):
        raise ValueError
    return number


def _to_int(value: Any) -> int:
    if not (number := _to_float(value)).is_integer():
        raise ValueError
    return int(number)


def _to_str(value: Any) -> str:
    if not isinstance(value, str) or CONTROL.search(value):
        raise ValueError
    return value


_NULL = {"None": None, "null": None}
_BOOL = {"True": True, "true": True, "1": True, "False": False, "false": False, "0": False}
# In the order in which they are tried: a function that raises for other values, and the type in words.
READERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "null": (lambda value: _NULL[str(value)], "null"),
    "bool": (lambda value: _BOOL[str(value)], "True or False"),
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
    help: str  # the whole comment
    section: str

    @classmethod
    def read(cls, name: str, default: Any, comment: str, section: str) -> "Option":
        """Raises ValueError if the comment's constraint is malformed or the type is unclear."""
        match = _CONSTRAINT.match(comment)
        words = (match["words"] or "").split("|")
        if comment.startswith(("(", "["), match.end()):
            raise ValueError(f"not a constraint: {comment[match.end() :]}")
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
        return cls(name, default, tuple(types), tuple(words), bounds, match["frozen"], comment, section)

    @property
    def expected(self) -> str:
        """The legal values in words."""
        phrases = [f"one of {', '.join(self.words)}"] if self.words else []
        return " or ".join(phrases + [phrase for name, (_, phrase) in READERS.items() if name in self.types])

    def convert(self, value: Any, where: str) -> Any:
        """The value in the option's type. Raises UserError, which starts with `where`, if not allowed."""
        if not isinstance(self.default, list):
            return self._convert_one(value, where)
        if not isinstance(value, list):
            raise UserError(f"{where}: must be a list, for example {_show(self.default)}")
        return [self._convert_one(item, where) for item in value]

    def _convert_one(self, value: Any, where: str) -> Any:
        if isinstance(value, str) and value in self.words:
            return value
        for reader in (READERS[name][0] for name in READERS if name in self.types):
            with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError):
                return self._in_bounds(reader(value), where)
        hint = f"the default is {_show(self.default)}"
        if self.words:
            hint = f"the nearest is {_nearest(str(value), self.words)}"
        raise UserError(f"{where}: must be {self.expected}; {hint}")

    def _in_bounds(self, value: Any, where: str) -> Any:
        low, high = self.bounds or (-math.inf, math.inf)
        if type(value) not in (int, float) or low <= value <= high:
            return value
        near = type(value)(min(max(value, low), high))
        raise UserError(f"{where}: must be in [{low:.12g}, {high:.12g}]; the nearest is {near}")


# configs.yaml


@dataclass(frozen=True)
class Preset:
    kind: str  # one of CLASSES
    values: dict[str, Any]  # by full name of the option
    help: str


@dataclass(frozen=True)
class Schema:
    """The content of configs.yaml."""

    options: dict[str, Option]  # by full name
    groups: dict[str, str]  # name: help
    presets: dict[str, Preset]
    class_help: dict[str, str]  # class of presets: help
    old_names: dict[str, str]  # name elsewhere: option, and a note in brackets

    def preset(self, name: str) -> Preset:
        """Raises UserError if there is no such preset."""
        if name not in self.presets:
            near = _nearest(name, self.presets)
            raise UserError(f"--configs {_show(name)}: there is no such preset; the nearest is {near}")
        return self.presets[name]

    def merged(self, presets: list[str]) -> dict[str, Any]:
        """The defaults with presets applied in the order given, by full name."""
        values = {name: option.default for name, option in self.options.items()}
        for preset in presets:
            values |= self.preset(preset).values
        return values

    def leaves(self, leaf: str) -> list[str]:
        return [name for name in self.options if name.rpartition(".")[2] == leaf]

    def unknown(self, name: str, where: str) -> UserError:
        """The error for an option that does not exist."""
        dashes = "--" if where.startswith("--") else ""
        name = name.replace("-", "_")
        if name in self.old_names:
            return UserError(f"{where} is not an option; use {dashes}{self.old_names[name]}")
        if name in self.presets:
            return UserError(f"{where} is not an option but a preset: write --configs {name}")
        leaf = name.rpartition(".")[2]  # `steps` of `run.steps` in dreamerv3
        known = [option.rpartition(".")[2] for option in self.options]
        known += [*self.groups, *self.options, "configs", "help", "print_config"]
        near = leaf if self.leaves(leaf) else _nearest(name, known)
        names = " or ".join(dashes + name for name in self.leaves(near) or [near])
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


def _scan_comments(text: str) -> tuple[dict[str, str], dict[str, str]]:
    """The comment on each key's line, and the last comment line above it, by full name."""
    comments, headings = {}, {}
    path: list[str] = []
    heading = ""
    for line in text.splitlines():
        if line.lstrip().startswith("#"):
            heading = line.strip("# ")
        elif key := re.match(r"( *)([\w.]+):(?:\s|$)", line):
            path[len(key[1]) // 2 :] = [key[2]]
            comment = re.match(r"""(?:'[^']*'|"[^"]*"|[^'"])*?\s#\s*(.*)""", line)
            comments[".".join(path)] = comment[1].strip() if comment else ""
            headings[".".join(path)] = heading
    return comments, headings


@lru_cache
def read(path: Path = CONFIGS) -> Schema:
    """Reads configs.yaml and checks all of it. Raises UserError with the file and the place."""
    text = _read_text(path)
    tree = parse_yaml(text, str(path))
    parts = ("defaults", *CLASSES)
    if not isinstance(tree, dict) or not all(isinstance(tree.get(part), dict) for part in parts):
        raise UserError(f"{path}: must hold the groups {', '.join(parts)}")
    comments, headings = _scan_comments(text)
    schema = Schema({}, {}, {}, {}, tree.get("old_names", {}))
    for name, default in _flatten(tree["defaults"]):
        groups = itertools.accumulate(name.split(".")[:-1], "{}.{}".format)
        schema.groups.update((group, comments.get(f"defaults.{group}", "")) for group in groups)
        place, section = f"{path}, defaults {name}", headings.get(f"defaults.{name}", "")
        try:
            option = Option.read(name, default, comments.get(f"defaults.{name}", ""), section)
        except ValueError as error:
            raise UserError(f"{place}: {error}") from None
        option.convert(default, f"{place} {_show(default)}")
        schema.options[name] = option
    for kind in CLASSES:
        schema.class_help[kind] = headings.get(kind, "")
        for name, body in tree[kind].items():
            if name in schema.presets:
                raise UserError(f"{path}, {kind}: there is another preset called {name}")
            values = schema.flat_values(body, f"{path}, preset {name}: ")
            schema.presets[name] = Preset(kind, values, comments.get(f"{kind}.{name}", ""))
    return schema


# The result


class Config(Mapping):
    """Options by name: `config.rssm.deter`, `config['rssm']`, `dict(**config.rssm)`. Read only.

    presets: applied presets in order, those that were added automatically last
    added: the presets that were added automatically
    notes: lines for the log about these decisions
    """

    def __init__(
        self, values: Mapping[str, Any], presets: list[str] = (), added: list[str] = (), notes: list[str] = ()
    ):
        copies = {k: Config(v) if isinstance(v, Mapping) else copy.copy(v) for k, v in values.items()}
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
        return {k: v.to_dict() if isinstance(v, Config) else copy.copy(v) for k, v in self.items()}

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
        return words + [f"--{name}={_written(value)}" for name, value in self.overrides().items()]

    def save(self, path: str | Path) -> None:
        """Writes the config whole or not at all. Raises UserError if the system refuses."""
        atomic_write(path, lambda file: file.write(self.to_yaml().encode()))

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
        raise UserError(f"--{option.name} needs a value: write {option.expected}")
    if isinstance(option.default, list):
        return option.convert(re.sub(r"^\[|\]$|,", " ", text).split(), where)
    if len(words) > 1:
        raise UserError(f"{where}: takes one value; unexpected {_show(' '.join(words[1:]))}")
    return option.convert(text, where)


def _parse(schema: Schema, argv: list[str]) -> tuple[list[str] | None, dict[str, Any], bool]:
    """The presets (None without --configs), checked options by full name, and whether to print the config."""
    presets, options, print_config = None, {}, False
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            hint = f"write --configs {word}" if word in schema.presets else "options are written --name value"
            raise UserError(f"unexpected word {_show(word)}: {hint}")
        name, equals, inline = word[2:].partition("=")
        words = [inline] if equals else []
        while rest and not rest[0].startswith("--"):
            words.append(rest.pop(0))
        where = _show(" ".join([f"--{name}", *words]))
        if name == "print_config":
            if words:
                raise UserError(f"{where}: takes no value; unexpected {_show(' '.join(words))}")
            print_config = True
        elif name == "configs":
            if not words:
                raise UserError("--configs needs at least one preset, for example --configs crafter")
            presets = [*(presets or []), *words]
        elif (full := _find(schema, name)) in schema.groups:
            near = ", ".join(f"--{option}" for option in schema.options if option.startswith(f"{full}."))
            preset = f"; for the preset write --configs {full}" if full in schema.presets else ""
            raise UserError(f"{where}: {full} is a group of options: {near}{preset}")
        else:
            options[full] = _value(schema.options[full], words, where)
    return presets, options, print_config


# Loading


def _on_cpu(device: str, has_cuda: bool | None) -> bool:
    return device == "cpu" or (device == "auto" and has_cuda is False)


def _merge(
    schema: Schema, named: list[str] | None, options: dict, has_cuda: bool | None, saved: Config | None
) -> Config:
    scales = [name for name, preset in schema.presets.items() if preset.kind == "scale_presets"]
    added, notes, why = [], [], "the saved run has it"
    if saved is not None and named is None and "from_checkpoint" in options:
        presets, added, values = saved.presets, saved.added, dict(_flatten(saved))
        # The command says where the run is; a new run does not write into the old run's episodes.
        new = "logdir" in options or options.get("transfer")
        for name in (*RUN_PATHS, *(["traindir"] if new else [])):
            values[name] = schema.options[name].default
    else:
        presets = sorted(dict.fromkeys(named or []), key=lambda name: CLASSES.index(schema.preset(name).kind))
        if not set(presets) & set(scales):
            on_cpu = _on_cpu(options.get("device", "auto"), has_cuda)
            if saved is not None:  # decided once, the same on any machine
                added = saved.added
            elif on_cpu and set(presets) & set(CPU_PRESET_TASKS):
                added, why = [CPU_PRESET], "there is no GPU and no size is named, e.g. size12m"
        presets = [*presets, *added]
        values = schema.merged(presets)
    values |= options
    if added:
        notes.append(f"Preset {', '.join(added)} added: {why}.")
    elif _on_cpu(values["device"], has_cuda) and not set(presets) & set(QUICK_ON_CPU):
        size = next((name for name in presets if name in scales), "the default size")
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

    Args:
        has_cuda: whether CUDA works here. None if unknown: no preset is added and no note on speed given.
        saved: the config of the run that is resumed, or of the checkpoint's run. It decides which preset is
            added automatically. With `--from_checkpoint` and no `--configs`, the options are applied to it.

    Raises UserError for mistakes, SystemExit(0) after `--help` and `--print_config`.
    """
    schema = read()
    if {"--help", "-h"} & set(argv):
        _print_and_exit(help_text(schema))
    presets, options, print_config = _parse(schema, argv)
    config = _merge(schema, presets, options, has_cuda, saved)
    check(config)
    if print_config:
        _print_and_exit(config.to_yaml())
    return config


def run_paths(argv: list[str]) -> tuple[str | None, str | None, list[str] | None]:
    """(logdir, from_checkpoint, transfer) as the command line gives them: which run to resume, if any.

    Prints nothing and checks no combination of options, as these may depend on the run's saved config.
    """
    argv = [word for word in argv if word not in ("--help", "-h")]
    options = _parse(read(), argv)[1]
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
            shown = ", ".join(refused[:3]) + (f" and {len(refused) - 3} more" if len(refused) > 3 else "")
            raise UserError(f"Cannot resume with {shown}: {reason}; a new --logdir starts a fresh run")
    return list(changed.values())


# Checks that need several options


def check(config: Config, where: str = "") -> None:
    """Raises UserError, which starts with `where`, if options do not fit each other."""
    for problem in _problems(config):
        raise UserError(where + problem)


def _problems(config: Config) -> Iterator[str]:
    envs, rssm, audio, size = config.envs, config.rssm, config.audio, config.size
    if config.eval_episodes % envs.eval_amount:
        yield f"eval_episodes {config.eval_episodes}: must be a multiple of eval_amount {envs.eval_amount}"
    if rssm.deter % rssm.blocks:
        yield f"rssm.deter {rssm.deter}: must be a multiple of rssm.blocks {rssm.blocks}"
    shrink = 2 ** len(config.encoder.cnn_mults)  # each convolution halves the resolution
    low, high = 3 * shrink, 16 * shrink  # 3 to 16 for the smallest feature map, as in the reference
    if len(size) != 2:
        yield f"size {_show(size)}: must be height and width, for example 64 64"
    elif any(side % shrink or not low <= side <= high for side in size):
        yield f"size {_show(size)}: both must be a multiple of {shrink} (see cnn_mults) from {low} to {high}"
    for group, name in itertools.product(("encoder", "decoder"), ("audio_keys", "cnn_keys", "mlp_keys")):
        try:
            re.compile(config[group][name])
        except (re.error, OverflowError, RecursionError) as error:
            yield f"{group}.{name} {_show(config[group][name])}: not a regular expression: {error}"
    if config.imag_last > config.batch_length:
        yield f"imag_last {config.imag_last}: must be at most batch_length {config.batch_length}"
    if audio.hop_length > audio.n_fft:
        yield f"audio.hop_length {audio.hop_length}: must be at most audio.n_fft {audio.n_fft}"
    if config.transfer and not config.from_checkpoint:
        yield "transfer names parts of a checkpoint: add --from_checkpoint with its file"
    needed, capacity = envs.amount * (config.batch_length + config.replay_context), config.replay.capacity
    if capacity != "auto" and capacity < needed:
        yield f"replay.capacity {capacity}: must be at least {needed}, one training sequence for each env"
    yield from _advice_problems(config)


def _advice_problems(config: Config) -> Iterator[str]:
    explorer, task_actor = config.expl_behavior, config.expl_task_actor
    paths = [name for name in ("prior", "synthetic", "options") if config[name].enabled]
    curious = explorer not in ("greedy", "random")
    if paths and not config.llm.enabled:
        yield f"{paths[0]}.enabled True: needs an adviser, add llm.enabled True"
    if config.llm.enabled and not (paths or config.llm.features):
        yield "llm.enabled True: nothing uses the advice; add --configs lore_full, or prior.enabled True"
    if "prior" in paths and (explorer == "random" or (curious and task_actor == "separate")):
        yield (
            "prior.enabled True: works on the task's actor, which does not act with expl_behavior "
            f"{explorer} and expl_task_actor {task_actor}; use greedy, or shared"
        )
    if "synthetic" in paths and curious and task_actor == "shared":
        yield (
            "synthetic.enabled True: measures plans by the task's reward alone, which is not what the actor "
            f"maximises with expl_behavior {explorer}; use greedy, or expl_task_actor separate"
        )
    if "options" in paths and explorer != "greedy":
        yield f"options.enabled True: measures options by the task's reward; use greedy, not {explorer}"
    if "options" in paths and config.imag_gradient != "reinforce":
        yield f"options.enabled True: needs imag_gradient reinforce, not {config.imag_gradient}"


# Help


def help_text(schema: Schema) -> str:
    """Usage, presets by class and options by section, each with its comment."""
    column = 38
    wrapper = textwrap.TextWrapper(
        max(80, shutil.get_terminal_size((110, 24)).columns), subsequent_indent=" " * column,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip

    def entry(head: str, text: str) -> str:
        wrapper.initial_indent = f"  {head:<{column - 3}} "
        return wrapper.fill(text or "-")

    lines = [
        "usage: python3 dreamer.py [--configs PRESET ...] [--OPTION VALUE ...]",
        "",
        entry("--configs PRESET [PRESET ...]", "presets, in any order; single options win over them"),
        entry("--OPTION VALUE, --OPTION=VALUE", "nested as --group.name; a unique name may be given alone"),
        entry("--print_config", "show all options with presets and options applied"),
        entry("--help, -h", "show this"),
    ]
    for kind, text in schema.class_help.items():
        lines += ["", f"{kind.replace('_', ' ').capitalize()}: {text}"]
        lines += [entry(name, preset.help) for name, preset in schema.presets.items() if preset.kind == kind]
    section, group = None, ""
    for name, option in schema.options.items():
        if option.section != section:
            section = option.section
            lines += ["", f"Options: {section}"]
        if name.rpartition(".")[0] != group:
            group = name.rpartition(".")[0]
            lines += [f"  {group}: {schema.groups[group]}"] if schema.groups.get(group) else []
        lines.append(entry(f"--{name} {_show(option.default)}", option.help))
    return "\n".join(lines)
