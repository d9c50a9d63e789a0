"""Reads configs.yaml and the command line into one checked, nested, read-only Config.

`load` merges the defaults, task presets, advice presets, scale presets and single options, in this order.
What each option allows stands at the start of its comment in configs.yaml. Every mistake is a `UserError`
of one line that names the nearest valid preset, option or value.
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
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.representer import SafeRepresenter

from basics import CONTROL, UserError, atomic_write, first_line

CONFIGS = Path(__file__).with_name("configs.yaml")
CLASSES = ("task_presets", "advice_presets", "scale_presets")  # in the order of merging
CPU_PRESET = "cpu"
CPU_PRESET_TASKS = (
    "crafter",
    "audio",
    "lpm_noisytv",
)  # task presets that take CPU_PRESET on a CPU when no scale preset is named
QUICK_ON_CPU = ("cpu", "cpu_vector", "debug", "doorkey")
RUN_PATHS = ("logdir", "from_checkpoint", "transfer")  # where a run is and how it began, not what it is
MAX_CHARS = 2**20  # of YAML; ours has a few thousand
MAX_DEPTH = 10  # of its brackets and groups
MAX_SHOWN = 100  # characters of a value or a name in a message

# What a resumed run cannot change, and why.
FROZEN = {
    "task": (
        *("task", "action_repeat", "clip_reward", "obs", "dmc.*", "atari.*", "crafter.*", "minigrid.*"),
        *("noisy_tv.enabled", "noisy_tv.actions", "noisy_tv.threshold", "noisy_tv.no*"),
    ),
    "network": (
        *("grayscale", "frame_stack", "audio_dim"),
        *("size", "actor_dist", "rssm.deter", "rssm.hidden", "rssm.stoch", "rssm.classes", "rssm.blocks"),
        *("rssm.*_layers", "*coder.mlp_*", "*coder.cnn_*", "*coder.audio_*", "audio.*"),
        *("*.strided", "*.bspace"),
        *("*head.layers", "*head.units", "actor.layers", "actor.units", "critic.layers", "critic.units"),
        *("*.bins", "reward_head.dist", "critic.dist"),
    ),
    "explorer": (
        *("expl_behavior", "expl_task_actor", "disag_models", "disag_target", "disag_layers", "disag_units"),
        *("lpm.layers", "lpm.units", "lpm.error", "lpm.error_floor"),
    ),
    "advice": (
        *("llm.enabled", "llm.features", "prior.enabled", "prior.layers", "prior.units", "prior.logit_clip"),
        *("synthetic.enabled", "options.enabled", "options.max_options", "options.option_max_length"),
        *("options.layers", "options.units"),
    ),
}
FROZEN_REASONS = {
    "task": "the replay and the step count belong to the old task",
    "network": "the checkpoint's networks have the old shape",
    "explorer": "the checkpoint's explorer is the old one",
    "advice": "the checkpoint's agent has been advised otherwise",
}
# Frozen options that only count for some explorers.
ONLY_FOR = {"disag_*": ("plan2explore",), "lpm.*": ("lpm",)}

# Names known from dreamerv3-torch, dreamerv3, r2dreamer and the older LoRe. A note may follow in brackets.
RENAMED = {
    "total_frames": "steps",
    "step": "steps",
    "log_dir": "logdir",
    "log_interval": "log_every",
    "save_every_frames": "save_every",
    "deterministic_run": "deterministic",
    "eval_episode_num": "eval_episodes",
    "offline_traindir": "traindir",
    "offline_evaldir": "evaldir",
    "replay_capacity": "replay.capacity",
    "dataset_size": "replay.capacity",
    "dyn_hidden": "rssm.hidden",
    "dyn_deter": "rssm.deter",
    "dyn_stoch": "rssm.stoch",
    "dyn_discrete": "rssm.classes",
    "dyn_rec_depth": "rssm.dyn_layers",
    "dyn_min_std": "rssm.min_std",
    "rssm.discrete": "rssm.classes",
    "rssm.unimix_ratio": "rssm.unimix",
    "unimix_ratio": "rssm.unimix",
    "kl_free": "rssm.free_nats",
    "dyn_scale": "loss_scales.dyn",
    "rep_scale": "loss_scales.rep",
    "reward_head.loss_scale": "loss_scales.reward",
    "cont_head.loss_scale": "loss_scales.cont",
    "loss_scales.rec": "loss_scales.image (and loss_scales.vector)",
    "loss_scales.recon": "loss_scales.image (and loss_scales.vector)",
    "loss_scales.rew": "loss_scales.reward",
    "loss_scales.con": "loss_scales.cont",
    "encoder.kernel_size": "encoder.cnn_kernel",
    "decoder.kernel_size": "decoder.cnn_kernel",
    "actor.dist": "actor_dist",
    "actor.lr": "actor_lr",
    "actor.eps": "opt.eps",
    "actor.grad_clip": "opt.agc",
    "actor.unimix_ratio": "actor.unimix",
    "critic.lr": "critic_lr",
    "critic.eps": "opt.eps",
    "critic.grad_clip": "opt.agc",
    "critic.slow_target": "slow_value_target (or slow_reg, the pull of the critic to the slow one)",
    "critic.slow_target_update": "slow_target_update",
    "critic.slow_target_fraction": "slow_target_fraction",
    "value.layers": "critic.layers",
    "value.units": "critic.units",
    "value.dist": "critic.dist",
    "opt_eps": "opt.eps",
    "grad_clip": "opt.agc (adaptive clipping)",
    "discount": "horizon (discount = 1 - 1/horizon)",
    "reward_EMA": "retnorm.rate (returns are always normalised)",
    "run.steps": "steps",
    "run.train_ratio": "train_ratio",
    "run.log_every": "log_every (in env steps)",
    "run.report_every": "eval_every (in env steps)",
    "run.save_every": "save_every (in env steps)",
    "run.envs": "envs.amount",
    "run.eval_envs": "envs.eval_amount",
    "run.eval_eps": "eval_episodes",
    "run.from_checkpoint": "from_checkpoint",
    "replay.size": "replay.capacity",
    "buffer.max_size": "replay.capacity",
    "jax.platform": "device",
    "jax.compute_dtype": "precision",
    "imag_length": "imag_horizon",
    "agent.imag_length": "imag_horizon",
    "lamb": "discount_lambda",
    "agent.imag_loss.lam": "discount_lambda",
    "act_entropy": "actor.entropy",
    "agent.imag_loss.actent": "actor.entropy",
    "agent.imag_loss.slowtar": "slow_value_target",
    "agent.imag_loss.slowreg": "slow_reg",
    "agent.slowvalue.rate": "slow_target_fraction",
    "agent.slowvalue.every": "slow_target_update",
    "agent.retnorm.perclo": "retnorm.low",
    "agent.retnorm.perchi": "retnorm.high",
    "pmin": "opt.agc_floor",
    "noisy-tv": "noisy_tv.enabled",
    "use_llm": "llm.enabled",
    "llm_use_cli": "llm.backend (gemini_cli)",
    "llm_model": "llm.model",
    "enable_synthetic_replay": "synthetic.enabled",
    "enable_hierarchical_options": "options.enabled",
    "stickey": "atari.sticky",
    "env.atari.repeat": "action_repeat",
    "env.dmc.repeat": "action_repeat",
    "env.dmc.image": "obs (pixels)",
    "env.dmc.proprio": "obs (native)",
}

# Values of dreamerv3-torch whose spelling does not tell the new one.
OLD_VALUES = {("envs.parallel", "True"): "process", ("envs.parallel", "False"): "none"}

# Old names without a successor, and why.
_SILU = "activations are always SiLU, as in the Nature version"
_NORM = "layers are always normalised by RMSNorm, as in the Nature version"
_STD = "set actor.min_std and actor.max_std"
_MINRES = "the smallest resolution is size / 2**(number of cnn_mults)"
GONE = {
    **dict.fromkeys(["act", "encoder.act", "decoder.act"], _SILU),
    **dict.fromkeys(["norm", "encoder.norm", "decoder.norm"], _NORM),
    **dict.fromkeys(["actor.std", "actor.temp", "dyn_std_act", "dyn_mean_act"], _STD),
    **dict.fromkeys(["encoder.minres", "decoder.minres"], _MINRES),
    "lives": "lives are not looked at: an episode ends with the game",
    "resize": "images are always shrunk by OpenCV's area method",
    "break_speed": "blocks break as fast as the game has it; an attack is held instead",
    "decoder.cnn_sigmoid": "images always end in a sigmoid, as in the Nature version",
    "disag_offset": "the ensemble always predicts the next step",
    "disag_action_cond": "the ensemble always sees the action taken in the state",
    "reset_every": "networks are never reset",
    "weight_decay": "there is none, as in the Nature version",
    "initial": "the first state is always zeros, as in the Nature version",
    "pretrain": "training starts after prefill and keeps to train_ratio",
    "eval_state_mean": "the latent state is always sampled",
}


class _Constructor(SafeConstructor):
    """Reads `1e6` as the whole number that it is; `1e-3` and `1.0` stay floats."""

    def construct_yaml_float(self, node: Any) -> int | float:
        value = super().construct_yaml_float(node)
        return int(value) if "." not in node.value and value.is_integer() else value


_Constructor.add_constructor("tag:yaml.org,2002:float", _Constructor.construct_yaml_float)


class _Representer(SafeRepresenter):
    """Writes lists on one line."""


_Representer.add_representer(
    list, lambda self, data: self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)
)


class PlainComposer(Composer):
    """Refuses what our files do not need: aliases, by which a small one can become huge, and tags."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.parser.peek_event()
        if event.anchor is not None:
            reason = "anchors (&name) and aliases (*name) are refused"
            raise ComposerError(None, None, reason, event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise ComposerError(None, None, "tags (!name) are refused", event.start_mark)
        return super().compose_node(parent, index)


def _parse_yaml(text: str, where: str) -> Any:
    if len(text) > MAX_CHARS:
        raise UserError(f"{where}: not valid YAML: longer than {MAX_CHARS} characters")
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor, yaml.Composer, yaml.max_depth = _Constructor, PlainComposer, MAX_DEPTH
    try:
        return yaml.load(text)
    except Exception as error:  # of any kind: ruamel has others than YAMLError for some nonsense
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
    """A value in a message."""
    return _cut(_written(value))


def _cut(text: str) -> str:
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


def _to_list(value: Any) -> list:
    if not isinstance(value, list):
        raise ValueError
    return value


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
    "list": (_to_list, "a list"),
    "str": (_to_str, "text in UTF-8 on one line"),
}


@dataclass(frozen=True)
class Option:
    """One option of configs.yaml: its default and what it allows. For a list, `types` are its items'."""

    name: str
    default: Any
    types: tuple[str, ...]
    words: tuple[str, ...]
    bounds: tuple[float, float] | None
    allowed: str  # the constraint as written
    help: str
    section: str

    @property
    def is_list(self) -> bool:
        return isinstance(self.default, list)

    @property
    def expected(self) -> str:
        """What is allowed, in words."""
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
            near = OLD_VALUES.get((self.name, str(value))) or _nearest(str(value), self.words)
            hint = f"the nearest is {near}"
        raise UserError(f"{where}: must be {self.expected}; {hint}")

    def _in_bounds(self, value: Any, where: str) -> Any:
        if self.bounds and type(value) in (int, float):
            low, high = self.bounds
            if not low <= value <= high:
                near = type(value)(min(max(value, low), high))
                raise UserError(f"{where}: must be in [{low:.12g}, {high:.12g}]; the nearest is {near}")
        return value


def _read_constraint(comment: str) -> tuple[list[str], tuple[float, float] | None, str, str]:
    """Splits `(a|int) [1, inf] text` into words, bounds, the constraint itself and the text."""
    words, bounds, rest = [], None, comment
    if match := re.match(r"\(([^()\s]+)\)\s*", rest):
        words, rest = match[1].split("|"), rest[match.end() :]
    if match := re.match(r"\[([^\[\],]+),([^\[\],]+)\]\s*", rest):
        bounds, rest = (float(match[1]), float(match[2])), rest[match.end() :]
    if rest.startswith(("(", "[")):
        raise ValueError(f"not a constraint: {rest}")
    return words, bounds, comment[: len(comment) - len(rest)].strip(), rest


def _make_option(name: str, default: Any, comment: str, section: str) -> Option:
    """Raises ValueError if the constraint is malformed or names no type."""
    words, bounds, allowed, help_text = _read_constraint(comment)
    types = [word for word in words if word in READERS]
    types += ["bool"] if "True" in words else []
    if not words:
        sample = (default or [None])[0] if isinstance(default, list) else default
        types = [type(sample).__name__]
    words = [word for word in words if word not in READERS and word not in ("True", "False")]
    if not set(types) <= set(READERS):
        raise ValueError("without a constraint the default must be a bool, number, text or list of these")
    return Option(name, default, tuple(types), tuple(words), bounds, allowed, help_text, section)


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
        names = [name for presets in self.presets.values() for name in presets]
        near = _nearest(preset, names)
        raise UserError(f"--configs {_cut(preset)}: there is no such preset; the nearest is {near}")

    def preset(self, name: str) -> dict[str, Any]:
        return self.presets[self.class_of(name)][name]

    def leaves(self, leaf: str) -> list[str]:
        return [name for name in self.options if name.rpartition(".")[2] == leaf]

    def unknown(self, name: str, where: str) -> UserError:
        """The error for an option that does not exist."""
        dashes = "--" if where.startswith("--") else ""
        name = name if name in RENAMED else name.replace("-", "_")
        if name in RENAMED:
            return UserError(f"{where} is not an option: its successor is {dashes}{RENAMED[name]}")
        if name in GONE:
            return UserError(f"{where} is not an option: {GONE[name]}")
        if any(name in presets for presets in self.presets.values()):
            return UserError(f"{where} is not an option but a preset: write --configs {name}")
        near = {full.rpartition(".")[2]: full for full in self.options} | {full: full for full in self.groups}
        near |= {full: full for full in (*self.options, "configs", "help", "print_config")}
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
            place = f"{where}{_cut(name)}"
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
    """The comment on each key's line, and the block of comment lines that stands above it, by path."""
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
        *parents, _ = parts = name.split(".")
        for depth in range(1, len(parts)):
            groups.setdefault(".".join(parts[:depth]), comments.get(("defaults", *parts[:depth]), ""))
        comment = comments.get(("defaults", *parts))
        try:
            if comment is None:  # a group on one line: its constraint holds for all its options
                comment = _read_constraint(comments.get(("defaults", *parents), ""))[2]
            option = _make_option(name, default, comment, headings.get(("defaults", parts[0]), ""))
        except ValueError as error:
            raise UserError(f"{path}, defaults {name}: {error}") from None
        option.convert(default, f"{path}, defaults {name} {_show(default)}")
        options[name] = option
    return options, groups


@lru_cache
def read(path: Path = CONFIGS) -> Schema:
    """Reads configs.yaml and checks all of it. Raises UserError with the file and the place."""
    text = _read_text(path)
    tree = _parse_yaml(text, str(path))
    parts = ("defaults", *CLASSES)
    if not isinstance(tree, dict) or set(tree) != set(parts):
        raise UserError(f"{path}: must hold exactly {', '.join(parts)}")
    comments, headings = _scan_comments(text)
    for part in parts:
        if not isinstance(tree[part], dict):
            raise UserError(f"{path}, {part}: must be a mapping of names, {{}} if empty")
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
    added: the ones of them that were added automatically
    notes: lines for the log about what was decided
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

    def __delattr__(self, name: str) -> None:
        raise AttributeError("a Config is read only")

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
            "# configs: the presets in the order applied; configs_added: those that LoRe added by itself.\n"
        ) + stream.getvalue()

    def overrides(self) -> dict[str, Any]:
        """The options that are not as the presets say, by full name."""
        schema = read()
        values = {name: option.default for name, option in schema.options.items()}
        for preset in self.presets:
            values |= schema.preset(preset)
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
        """Reads what `to_yaml` gave; what is not in it takes its default. Raises UserError naming `where`."""
        schema = read()
        tree = _parse_yaml(text, where)
        if not isinstance(tree, dict):
            raise UserError(f"{where}: must hold options as name: value")
        lists = [tree.pop(name, []) for name in ("configs", "configs_added")]
        for names in lists:
            try:
                [_to_str(name) for name in _to_list(names)]
            except ValueError:
                raise UserError(f"{where}: configs and configs_added must be lists of presets") from None
        values = {name: option.default for name, option in schema.options.items()}
        config = cls(_nest(values | schema.flat_values(tree, f"{where}: ")), *lists)
        check(config, f"{where}: ")
        return config


# The command line


@dataclass
class Command:
    """What the command line says: presets (None if `--configs` is absent), options by full name, flags."""

    presets: list[str] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    flags: set[str] = field(default_factory=set)


def _find(schema: Schema, name: str) -> str:
    """The full name of an option or a group that was given as it is or by its unique last part."""
    if name in schema.options or name in schema.groups:
        return name
    found = schema.leaves(name)
    if not found:
        raise schema.unknown(name, f"--{_cut(name)}")
    if len(found) > 1:
        candidates = ", ".join(f"--{full}" for full in found)
        raise UserError(f"--{name} stands in several groups; write one of {candidates}")
    return found[0]


def _value(option: Option, words: list[str], where: str) -> Any:
    text = " ".join(words)
    if not text and (not words or option.default is None):
        plain = isinstance(option.default, bool) or option.default is None
        example = "" if plain else f", for example {_show(option.default)}"
        raise UserError(f"--{option.name} needs a value: write {option.expected}{example}")
    takes_list = option.is_list or "list" in option.types
    if takes_list and text.startswith("["):
        return option.convert(_parse_yaml(text, where), where)
    if option.is_list and option.words:  # names have no comma in them
        words = [name for word in words for name in word.split(",")]
    if option.is_list or (takes_list and not (len(words) == 1 and words[0] in option.words)):
        return option.convert(words, where)
    if len(words) > 1:
        raise UserError(f"{where}: takes one value; unexpected {_cut(' '.join(words[1:]))}")
    return option.convert(text, where)


def _group_values(schema: Schema, group: str, words: list[str], where: str) -> dict[str, Any]:
    text = " ".join(words)
    if text.startswith("{"):
        tree = _parse_yaml(text, where)
        for part in reversed(group.split(".")):
            tree = {part: tree}
        return schema.flat_values(tree, "--")
    names = [name for name in schema.options if name.startswith(f"{group}.")]
    hint = f"its options are {', '.join(f'--{name}' for name in names)}"
    with contextlib.suppress(UserError):
        _value(schema.options[names[0]], words, where)
        hint = f"the nearest is --{names[0]} {text}"  # `--envs 4` of old commands
    if not words and any(group in presets for presets in schema.presets.values()):
        hint += f"; for the preset of that name write --configs {group}"
    raise UserError(f"{where}: {group} is a group of options; {hint}")


def _parse(schema: Schema, argv: list[str]) -> Command:
    """Splits the command line; options and values are checked, presets only for being there."""
    command = Command()
    rest = ["--help" if word == "-h" else word for word in argv]
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            known = any(word in presets for presets in schema.presets.values())
            hint = f"write --configs {word}" if known else "options are written --name value"
            raise UserError(f"unexpected word {_cut(word)}: {hint}")
        name, equals, inline = word[2:].partition("=")
        words = [inline] if equals else []
        while rest and not rest[0].startswith("--"):
            words.append(rest.pop(0))
        where = _cut(" ".join([f"--{name}", *words]))
        if name in ("help", "print_config"):
            if words:
                raise UserError(f"{where}: takes no value; unexpected {_cut(' '.join(words))}")
            command.flags.add(name)
        elif name == "configs":
            if not words:
                raise UserError("--configs needs at least one preset, for example --configs crafter")
            command.presets = [*(command.presets or []), *words]
        elif (full := _find(schema, name)) in schema.groups:
            command.options.update(_group_values(schema, full, words, where))
        else:
            command.options[full] = _value(schema.options[full], words, where)
    return command


# Loading


def _on_cpu(device: str, has_cuda: bool | None) -> bool:
    return device == "cpu" or (device == "auto" and has_cuda is False)


def _merge(schema: Schema, command: Command, has_cuda: bool | None, saved: Config | None) -> Config:
    scales = schema.presets["scale_presets"]
    if saved is not None and command.presets is None and "from_checkpoint" in command.options:
        values = dict(_flatten(saved))
        # The command says where the run is; episodes of the old run are not written to by a new one.
        new = "logdir" in command.options or command.options.get("transfer")
        paths = (*RUN_PATHS, "traindir", "evaldir") if new else RUN_PATHS
        values |= {name: schema.options[name].default for name in paths}
        presets, added = saved.presets, saved.added
    else:
        values = {name: option.default for name, option in schema.options.items()}
        presets = sorted(
            dict.fromkeys(command.presets or []), key=lambda p: CLASSES.index(schema.class_of(p))
        )
        for preset in presets:
            values |= schema.preset(preset)
        added = []
        if not any(preset in scales for preset in presets):
            if saved is not None:  # decided once, kept on any machine
                added = saved.added
            elif _on_cpu(command.options.get("device", values["device"]), has_cuda):
                added = [CPU_PRESET] if any(preset in CPU_PRESET_TASKS for preset in presets) else []
        for preset in added:
            values |= schema.preset(preset)
        presets = [*presets, *added]
    values |= command.options
    notes = []
    if added:
        why = (
            "the saved run has it"
            if saved is not None
            else f"there is no GPU and no size is named, e.g. {_a_size(scales)}"
        )
        notes.append(f"Preset {', '.join(added)} added: {why}.")
    elif _on_cpu(values["device"], has_cuda) and not set(presets) & set(QUICK_ON_CPU):
        size = next((preset for preset in presets if preset in scales), "the default size")
        notes.append(f"Slow: {size} on a CPU. --configs {CPU_PRESET} is made for it.")
    return Config(_nest(values), presets, added, notes)


def _a_size(scales: Mapping[str, Any]) -> str:
    return next(name for name in scales if name.startswith("size12"))


def _print_and_exit(text: str) -> NoReturn:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `--help | head`: nobody reads the rest, and Python flushes once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0)


def load(argv: list[str], *, has_cuda: bool | None = None, saved: Config | None = None) -> Config:
    """The config that the command line asks for, checked.

    has_cuda: whether CUDA works here; None if unknown: then no preset is added and no speed is judged
    saved: the config of the run (or of the checkpoint's run) that is gone on with. It decides which preset
        is added automatically. With `--from_checkpoint` and no `--configs`, it is what options are applied to
    Raises UserError for mistakes, SystemExit(0) after `--help` and `--print_config`.
    """
    schema = read()
    if {"--help", "-h"} & set(argv):
        _print_and_exit(help_text(schema))
    command = _parse(schema, argv)
    config = _merge(schema, command, has_cuda, saved)
    check(config)
    if "print_config" in command.flags:
        _print_and_exit(config.to_yaml())
    return config


def run_paths(argv: list[str]) -> tuple[str | None, str | None, list[str] | None]:
    """(logdir, from_checkpoint, transfer) as the command line gives them: which run to go on with, if any.

    Prints nothing and judges no combination of options, as these may depend on the run's saved config.
    """
    argv = [word for word in argv if word not in ("--help", "-h")]
    options = _parse(read(), argv).options
    return tuple(options.get(name) for name in RUN_PATHS)


def resume_changes(saved: Config, config: Config) -> list[str]:
    """Lines `name: old -> new` for a run that goes on with `config` instead of `saved`.

    Raises UserError if an option differs that cannot: the task, or what gives the networks their shapes.
    """
    old, new = dict(_flatten(saved)), dict(_flatten(config))
    changed = {
        name: f"{name}: {_show(old[name])} -> {_show(new[name])}"
        for name in new
        if name not in RUN_PATHS and old[name] != new[name]
    }
    idle = [p for p, explorers in ONLY_FOR.items() if config.expl_behavior not in explorers]
    for reason, patterns in FROZEN.items():
        refused = [
            text
            for name, text in changed.items()
            if any(fnmatchcase(name, p) for p in patterns) and not any(fnmatchcase(name, p) for p in idle)
        ]
        if refused:
            more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
            raise UserError(
                f"Cannot resume with {', '.join(refused[:3])}{more}: {FROZEN_REASONS[reason]}; "
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
    rssm, encoder, decoder, actor = config.rssm, config.encoder, config.decoder, config.actor
    if config.eval_episodes % config.envs.eval_amount:
        yield (
            f"eval_episodes {config.eval_episodes} must be a multiple of "
            f"envs.eval_amount {config.envs.eval_amount}"
        )
    for name, parts in (("rssm.blocks", rssm.blocks), ("decoder.bspace", decoder.bspace)):
        if rssm.deter % parts:
            yield f"rssm.deter {rssm.deter} must be a multiple of {name} {parts}"
    if len(encoder.cnn_mults) != len(decoder.cnn_mults):
        yield (
            f"encoder.cnn_mults {encoder.cnn_mults} and decoder.cnn_mults {decoder.cnn_mults} "
            "must be of the same length"
        )
    yield from _size_problems(config.size, len(encoder.cnn_mults))
    for group in ("encoder", "decoder"):
        for name in ("audio_keys", "cnn_keys", "mlp_keys"):
            try:
                re.compile(config[group][name])
            except (re.error, OverflowError, RecursionError) as error:
                yield f"{group}.{name} {_show(config[group][name])}: not a regular expression: {error}"
    if unknown := set(config.grad_heads) - {"decoder", "reward", "cont"}:
        yield f"grad_heads {_show(sorted(unknown))}: may hold decoder, reward, cont"
    if config.imag_last > config.batch_length:
        yield f"imag_last {config.imag_last} must be at most batch_length {config.batch_length}"
    if actor.min_std > actor.max_std:
        yield f"actor.min_std {actor.min_std} must be at most actor.max_std {actor.max_std}"
    if not 0 <= config.retnorm.low < config.retnorm.high <= 100:
        yield (
            f"retnorm.low {config.retnorm.low} and retnorm.high {config.retnorm.high} must be percentiles, "
            "low below high"
        )
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


def _entry(head: str, text: str, width: int) -> str:
    column = 38
    text = text or "-"
    body = textwrap.wrap(text, width - column, break_long_words=False)
    first = (
        f"  {head:<{column - 3}} {body[0]}"
        if len(head) < column - 2
        else f"  {head}\n{' ' * column}{body[0]}"
    )
    return "\n".join([first, *(" " * column + line for line in body[1:])])


def help_text(schema: Schema | None = None) -> str:
    """Usage, presets by class and options by section, each with its comment."""
    schema = schema or read()
    width = max(80, shutil.get_terminal_size((110, 24)).columns)
    lines = [
        "usage: python3 dreamer.py [--configs PRESET ...] [--OPTION VALUE ...]",
        "",
        _entry("--configs PRESET [PRESET ...]", "presets, in any order; single options win over them", width),
        _entry(
            "--OPTION VALUE, --OPTION=VALUE",
            "nested as --group.name; a unique name may be given alone",
            width,
        ),
        _entry('--GROUP "{name: VALUE, ...}"', "several options of a group at once", width),
        _entry("--print_config", "show all options as they would run", width),
        _entry("--help, -h", "show this", width),
    ]
    for kind, presets in schema.presets.items():
        lines += ["", f"{kind.replace('_', ' ').capitalize()}: {schema.preset_help[kind]}"]
        lines += [
            _entry(name, schema.preset_help[name] or _summary(body), width) for name, body in presets.items()
        ]
    section, group = None, ""
    for name, option in schema.options.items():
        if option.section != section:
            section = option.section
            lines += ["", f"Options: {section}"]
        if name.rpartition(".")[0] != group:
            group = name.rpartition(".")[0]
            lines += [f"  {group}: {schema.groups[group]}"] if schema.groups.get(group) else []
        lines.append(
            _entry(f"--{name} {_show(option.default)}", f"{option.allowed} {option.help}".strip(), width)
        )
    return "\n".join(lines)


def _summary(values: Mapping[str, Any]) -> str:
    shown = [f"{name} {_show(value)}" for name, value in values.items()]
    return ", ".join(shown[:3] + ["..."] * (len(shown) > 3))
