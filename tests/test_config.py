"""configs.yaml, the command line, saved configs and their error messages."""

import copy
import pickle
import re

import pytest

import config
from basics import UserError
from config import Config

SMALL = """
# Nothing but tests.
defaults:
  # Run
  steps: 1000000  # [0, inf] [frozen: task] how long
  lr: 4e-5  # [0, 1] a 'quoted # sign' in a comment
  flag: False
  word: auto  # (auto|cpu|str)
  hash: 'a # b'  # text with a number sign
  net:  # a group
    units: 2  # [1, 9] width
  # Numbers
  sizes: [1, 2]  # [1, 9] list
  names: [x, y]  # (x|y|z) list of words
  maybe: null  # (null|float) [0, 1] number or nothing
  mode: auto  # (auto|True|False) three ways
task_presets:
  game: {steps: 2e3, net: {units: 3}}  # a game
advice_presets: {}
scale_presets: {}
"""


def load(line="", **kwargs):
    return config.load(line.split(), **kwargs)


def fails(line, **kwargs):
    """The one line that the user sees."""
    with pytest.raises(UserError) as error:
        load(line, **kwargs)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "configs.yaml"
    path.write_text(SMALL)
    return config.read(path)


def broken(tmp_path, old, new):
    """The error for SMALL with one thing changed."""
    assert old in SMALL
    path = tmp_path / "configs.yaml"
    path.write_text(SMALL.replace(old, new))
    with pytest.raises(UserError) as error:
        config.read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


# The shipped file


def test_defaults_load_and_fit_each_other():
    defaults = load()
    assert defaults.task == "crafter_reward"
    assert defaults.presets == [] and defaults.notes == []


@pytest.mark.parametrize("preset", list(config.read().presets))
def test_every_preset_loads(preset):
    assert load(f"--configs {preset}").presets == [preset]


def test_no_option_hides_a_method_of_config_or_a_flag():
    taken = {*dir(load()), *vars(load()), "configs", "configs_added", "help", "print_config"}
    names = {part for name in config.read().options for part in name.split(".")}
    assert not names & taken


def test_every_option_has_a_help_text_or_a_documented_group():
    schema = config.read()
    for name, option in schema.options.items():
        assert option.help or schema.groups.get(name.rpartition(".")[0]), name


def test_sizes_are_those_of_the_paper():
    big = load("--configs size200m")
    assert (big.rssm.deter, big.rssm.hidden, big.rssm.classes) == (8192, 1024, 64)
    assert big.encoder.cnn_depth == 64 and big.critic.units == 1024


def test_presets_named_in_the_code_exist():
    kinds = {name: preset.kind for name, preset in config.read().presets.items()}
    assert {kinds[name] for name in config.CPU_PRESET_TASKS} == {"task_presets"}
    assert kinds[config.CPU_PRESET] == "scale_presets"
    assert set(config.QUICK_ON_CPU) <= set(kinds)


# Old names


def test_old_names_are_not_in_use_and_their_successors_exist():
    schema = config.read()
    for old, new in schema.old_names.items():
        assert old not in schema.options and old not in schema.groups and not schema.leaves(old), old
        assert new.partition(" ")[0] in schema.options, old


def test_old_name_names_its_successor():
    assert fails("--total_frames 5") == "--total_frames is not an option; use --steps"
    assert "horizon (discount = 1 - 1/horizon)" in fails("--discount 0.99")
    assert fails("--run.steps 5") == "--run.steps is not an option; the nearest is --steps"


def test_old_values_name_the_new_ones():
    assert "envs is a group of options: --envs.amount," in fails("--envs 4")
    assert "options: --wandb.enabled, --wandb.project" in fails("--wandb True")
    assert "the nearest is float32" in fails("--precision 32")
    assert "write --configs debug" in fails("--debug True")
    assert "--opt.lr" in fails("--opt adam")


# Merging


def test_presets_merge_by_class_whatever_their_order():
    one = load("--configs crafter lore_full cpu")
    other = load("--configs cpu lore_full crafter")
    assert one.presets == other.presets == ["crafter", "lore_full", "cpu"]
    assert one == other
    assert one.train_ratio == 32.0  # the scale wins over the task's 512
    assert load("--configs crafter").train_ratio == 512.0


def test_presets_of_one_class_merge_in_the_order_given():
    assert load("--configs dummy_cue crafter").task == "crafter_reward"
    assert load("--configs crafter dummy_cue").task == "dummy_cue"
    assert load("--configs crafter dummy_cue").time_limit == 10000


def test_single_options_win_over_presets_wherever_they_stand():
    assert load("--batch_size 3 --configs cpu").batch_size == 3
    result = load("--configs crafter --configs cpu --batch_size=3")
    assert result.batch_size == 3 and result.presets == ["crafter", "cpu"]


# Giving options


def test_nested_option_by_full_name_and_unique_leaf_alone():
    assert load("--encoder.mlp_units 32").encoder.mlp_units == 32
    assert load("--encoder.mlp_units 32").decoder.mlp_units == 256
    assert load("--lr 3e-4").opt.lr == 3e-4


def test_leaf_of_several_groups_lists_the_candidates():
    message = fails("--mlp_units 32")
    assert "--encoder.mlp_units" in message and "--decoder.mlp_units" in message


@pytest.mark.parametrize("text", ["--size 32 48", "--size [32,48]", "--size [32, 48]", "--size=[32,48]"])
def test_list_takes_several_words_or_yaml(text):
    line = text.replace("32", "64").replace("48", "96")
    assert load(line).size == [64, 96]


def test_list_of_words():
    start = "--from_checkpoint a.pt --transfer"
    assert (
        load(f"{start} encoder rssm").transfer
        == load(f"{start} encoder,rssm").transfer
        == ["encoder", "rssm"]
    )
    assert load(f"{start} actor").transfer == ["actor"]
    assert load("--transfer []").transfer == []


@pytest.mark.parametrize("text", ["2000000", "2e6", "2_000_000", "2.0e6"])
def test_whole_numbers_in_every_notation(text):
    value = load(f"--steps {text}").steps
    assert value == 2000000 and type(value) is int


@pytest.mark.parametrize("text", ["True", "true", "1"])
def test_true_in_every_spelling(text):
    assert load(f"--deterministic {text}").deterministic is True


def test_negative_number_is_a_value_and_not_an_option():
    assert "--steps -1: must be in [0, inf]; the nearest is 0" == fails("--steps -1")
    assert load("--task -1").task == "-1"


def test_text_that_looks_like_yaml_stays_text():
    assert config.load(["--logdir", "2024"]).logdir == "2024"
    assert config.load(["--encoder.mlp_keys", ".*|{a}"]).encoder.mlp_keys == ".*|{a}"
    assert load("--device cuda:1").device == "cuda:1"


def test_null_is_nothing():
    assert load("--actor_lr 1e-3 --actor_lr null").actor_lr is None
    assert load("--actor_lr 1e-3").actor_lr == 1e-3


# Mistakes


def test_unknown_option_names_the_nearest():
    assert fails("--batch_sise 4") == "--batch_sise is not an option; the nearest is --batch_size"
    assert "the nearest is --rssm.deter" in fails("--rssm.detr 4")
    assert "the nearest is --batch_size" in fails("--batch-size 4")
    assert "--encoder.mlp_units or --decoder.mlp_units" in fails("--mlp_unit 4")
    assert "the nearest is --configs" in fails("--config crafter")


def test_unknown_preset_names_the_nearest():
    assert fails("--configs crafte") == "--configs crafte: there is no such preset; the nearest is crafter"
    assert "size12m" in fails("--configs size12M")


def test_preset_written_as_option_or_word():
    assert "write --configs crafter" in fails("--crafter")
    assert "write --configs crafter" in fails("crafter")
    assert "unexpected size12m" in fails("--steps 5 size12m")
    assert "unexpected word -x" in fails("-x 5")


def test_bad_choice_names_the_nearest():
    message = fails("--imag_gradient dynamic")
    assert "one of reinforce, dynamics, both" in message and "the nearest is dynamics" in message


@pytest.mark.parametrize(
    "line, says",
    [
        ("--steps 2.5", "a whole number"),
        ("--steps many", "a whole number"),
        ("--steps True", "a whole number"),
        ("--steps inf", "a whole number"),
        ("--train_ratio nan", "a number"),
        ("--opt.lr x", "a number"),
        ("--deterministic yes", "True or False"),
        ("--deterministic 2", "True or False"),
        ("--replay.capacity some", "auto or a whole number"),
        ("--size 64 big", "a whole number"),
    ],
)
def test_wrong_type_says_what_is_wanted(line, says):
    message = fails(line)
    assert f"must be {says}" in message or f"must be one of {says}" in message


def test_wrong_range_names_range_and_nearest():
    assert fails("--mlp_units 2 --configs cpu").startswith("--mlp_units is in several groups")
    assert fails("--actor.unimix 2") == "--actor.unimix 2: must be in [0, 1]; the nearest is 1.0"
    assert "[0, 4294967295]" in fails("--seed 4294967296")


def test_option_without_value():
    assert fails("--deterministic") == "--deterministic needs a value: write True or False"
    assert "--steps needs a value: write a whole number" == fails("--steps --seed 1")
    assert "needs a value" in fails("--logdir")
    assert "needs a value" in fails("--logdir=")
    assert "needs at least one preset" in fails("--configs --seed 1")
    assert "takes no value" in fails("--print_config now")


@pytest.mark.parametrize(
    "line, says",
    [
        ("--eval_episodes 10 --eval_amount 3", "multiple of eval_amount 3"),
        ("--deter 100", "multiple of rssm.blocks 8"),
        ("--size 64", "height and width"),
        ("--size 60 64", "multiple of 16"),
        ("--size 32 64", "from 48 to 256"),
        ("--size 512 512", "from 48 to 256"),
        ("--imag_last 65", "batch_length 64"),
        ("--audio.hop_length 600", "audio.n_fft 512"),
        ("--encoder.mlp_keys [", "regular expression"),
        ("--replay.capacity 64", "at least 65"),
        ("--replay.capacity 129 --envs.amount 2", "at least 130"),
    ],
)
def test_options_that_do_not_fit_each_other(line, says):
    assert says in fails(line)


def test_other_image_sizes_fit():
    assert load("--size 96 48").size == [96, 48]
    assert load("--encoder.cnn_mults 2 3 4 --size 128 24").size == [128, 24]


# The file's own form


def test_comments_give_help_constraint_and_section(small):
    options = small.options
    assert options["steps"].help == "[0, inf] [frozen: task] how long"
    assert options["steps"].frozen == "task" and options["lr"].frozen is None
    assert options["lr"].help == "[0, 1] a 'quoted # sign' in a comment"
    assert options["hash"].help == "text with a number sign" and options["hash"].default == "a # b"
    assert options["steps"].section == "Run" and options["sizes"].section == "Numbers"
    assert small.groups["net"] == "a group" and options["net.units"].help == "[1, 9] width"
    assert small.presets["game"].help == "a game"


def test_default_gives_the_type(small):
    options = small.options
    assert options["steps"].types == ("int",) and options["lr"].types == ("float",)
    assert options["word"].types == ("str",) and options["word"].words == ("auto", "cpu")
    assert small.preset("game").values == {"steps": 2000, "net.units": 3}


def test_constraint_holds_for_list_items(small):
    with pytest.raises(UserError, match=r"in \[1, 9\]"):
        small.options["sizes"].convert([3, 10], "sizes")
    with pytest.raises(UserError, match="the nearest is z"):
        small.options["names"].convert(["x", "zz"], "names")


def test_every_value_has_the_type_of_its_option(small):
    options = small.options
    assert options["maybe"].convert(None, "") is None
    assert options["maybe"].convert("0.5", "") == 0.5
    assert options["mode"].convert("True", "") is True
    assert options["word"].convert("anything", "") == "anything"
    for name, value in [
        ("word", 3),
        ("sizes", 3),
        ("steps", None),
        ("lr", True),
        ("mode", "yes"),
        ("flag", []),
    ]:
        with pytest.raises(UserError):
            options[name].convert(value, name)


@pytest.mark.parametrize(
    "old, new, says",
    [
        (
            "net: {units: 3}",
            "net: {unit: 3}",
            "preset game: net.unit is not an option; the nearest is net.units",
        ),
        ("net: {units: 3}", "nets: {}", "preset game: nets is not an option"),
        ("net: {units: 3}", "net: 3", "net is a group of options"),
        ("net: {units: 3}", "lr: {a: 3}", "lr.a is not an option"),
        ("steps: 2e3", "steps: -1", "preset game: steps -1: must be in [0, inf]"),
        ("{steps: 2e3, net: {units: 3}}", "fast", "preset game: must hold options"),
        ("[0, inf] [frozen: task] how long", "[0, inf how long", "defaults steps: not a constraint"),
        ("[0, inf] [frozen: task] how long", "[0, many] how long", "defaults steps: could not convert"),
        ("[0, inf] [frozen: task] how long", "[2000000, inf] how long", "defaults steps 1000000: must be in"),
        ("[frozen: task]", "[frozen: work]", "defaults steps: frozen is one of task"),
        ("(null|float) [0, 1]", "no", "defaults maybe: without a constraint"),
        ("task_presets:", "task_preset:", "must hold the groups defaults, task_presets"),
        ("advice_presets: {}", "advice_presets: {game: {}}", "another preset called game"),
        ("advice_presets: {}", "advice_presets: [game]", "must hold the groups"),
        ("flag: False", "flag: [", "not valid YAML"),
        ("flag: False", "steps: 3", "line 7: not valid YAML: found duplicate key"),
    ],
)
def test_mistake_in_the_file_names_the_place(tmp_path, old, new, says):
    assert says in broken(tmp_path, old, new)


def test_missing_or_unreadable_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"Cannot read .*none\.yaml"):
        config.read(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"Cannot read .*bytes\.yaml: not a text file"):
        config.read(tmp_path / "bytes.yaml")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(UserError, match=r"empty\.yaml: must hold the groups"):
        config.read(tmp_path / "empty.yaml")


# Showing


def test_help_lists_presets_options_and_comments(capsys):
    with pytest.raises(SystemExit) as stop:
        load("--help --nonsense")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "usage: python3 dreamer.py" in text
    schema = config.read()
    for name in schema.options:
        assert f"--{name} " in text
    for name in schema.presets:
        assert re.search(rf"^  {name} ", text, re.M)
    flat = " ".join(text.split())
    assert "(auto|int) [1, inf] steps kept" in flat
    assert "--steps 1000000 [0, inf] env steps of the whole run" in flat
    assert schema.presets["crafter"].help in flat


def test_print_config_shows_what_would_run(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        load("--configs crafter --print_config --seed 7", has_cuda=False)
    assert stop.value.code == 0
    path = tmp_path / "config.yaml"
    path.write_text(capsys.readouterr().out)
    shown = Config.load_saved(path)
    assert shown == load("--configs crafter --seed 7", has_cuda=False)
    assert shown.presets == ["crafter", "cpu"] and shown.added == ["cpu"]


# The preset for laptops


def test_crafter_without_gpu_takes_the_cpu_preset_and_says_so():
    result = load("--configs crafter lore_full", has_cuda=False)
    assert result.presets == ["crafter", "lore_full", "cpu"] and result.added == ["cpu"]
    assert result.rssm.deter == 512
    assert len(result.notes) == 1 and "Preset cpu added" in result.notes[0]


def test_lpm_noisytv_is_small_on_a_cpu_and_sizes_win():
    small = load("--configs lpm_noisytv", has_cuda=False)
    assert small.presets == ["lpm_noisytv", "cpu"] and small.rssm.deter == 512
    assert (small.task, small.obs, small.size) == ("gym_Pendulum-v1", "pixels", [64, 64])
    assert small.noisy_tv.enabled and small.expl_behavior == "lpm"
    for size in ("debug", "size1m"):
        sized = load(f"--configs {size} lpm_noisytv --noisy_tv.enabled False", has_cuda=False)
        assert sized.presets == ["lpm_noisytv", size] and sized.expl_behavior == "lpm"
        assert dict(sized.actor) == dict(load(f"--configs {size}").actor)
        assert not sized.noisy_tv.enabled


@pytest.mark.parametrize(
    "line, has_cuda",
    [
        ("--configs crafter", True),
        ("--configs crafter", None),
        ("--configs crafter --device cuda", False),
        ("--configs crafter size1m", False),
        ("--configs crafter debug", False),
        ("--configs dummy_cue", False),
    ],
)
def test_cpu_preset_is_not_added_otherwise(line, has_cuda):
    result = load(line, has_cuda=has_cuda)
    assert result.added == [] and "cpu" not in result.presets


def test_device_cpu_counts_as_no_gpu():
    assert load("--configs crafter --device cpu", has_cuda=True).added == ["cpu"]


def test_size_on_a_cpu_says_that_it_is_slow():
    (note,) = load("--configs crafter size12m", has_cuda=False).notes
    assert "size12m" in note and "--configs cpu" in note
    assert load("--configs crafter size12m", has_cuda=True).notes == []
    assert load("--configs crafter cpu", has_cuda=False).notes == []


# The object


def test_config_is_a_nested_mapping_with_attributes():
    result = load()
    assert result.rssm.deter == result["rssm"]["deter"] == dict(**result.rssm)["deter"]
    assert list(result)[0] == "task" and len(result.wandb) == 2
    with pytest.raises(AttributeError, match="no option nothing"):
        _ = result.nothing
    with pytest.raises(KeyError):
        _ = result["nothing"]


def test_config_is_read_only_and_shares_nothing():
    result = load()
    with pytest.raises(AttributeError, match="read only"):
        result.seed = 3
    with pytest.raises(AttributeError, match="read only"):
        result.rssm.deter = 3
    with pytest.raises(TypeError):
        result["seed"] = 3
    plain = result.to_dict()
    plain["size"][0] = 1
    plain["rssm"]["deter"] = 1
    assert result.size == [64, 64]
    result.size[1] = 1  # a list of one Config is no default of the next
    assert load().size == [64, 64] and load().rssm.deter == result.rssm.deter == 2048


def test_config_travels_to_other_processes():
    result = load("--configs crafter", has_cuda=False)
    for twin in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
        assert twin == result and twin.presets == result.presets and twin.rssm.deter == 512


def test_replace_checks_and_leaves_the_old_one():
    result = load("--configs debug")
    other = result.replace({"rssm.deter": 64, "logdir": "x"})
    assert (result.rssm.deter, other.rssm.deter, other.logdir) == (32, 64, "x")
    assert other.presets == ["debug"]
    with pytest.raises(UserError, match="the nearest is rssm.deter"):
        result.replace({"rssm.deterr": 1})
    with pytest.raises(UserError, match="multiple of rssm.blocks"):
        result.replace({"rssm.deter": 33})


# Saved and resumed


@pytest.fixture
def saved(tmp_path):
    """Saves the config of a command line and reads it back."""

    def save(line, **kwargs):
        load(line, **kwargs).save(tmp_path / "config.yaml")
        return Config.load_saved(tmp_path / "config.yaml")

    return save


def test_saved_config_comes_back_exactly(saved, tmp_path):
    line = "--configs crafter --logdir null --task 1e6 --opt.lr 1e-5 --encoder.cnn_keys $^"
    assert saved(line, has_cuda=False) == load(line, has_cuda=False)
    text = (tmp_path / "config.yaml").read_text()
    assert text.startswith("# ") and "size: [64, 64]" in text
    assert "\nconfigs: [crafter, cpu]\nconfigs_added: [cpu]\ntask: '1e6'\nlogdir: null\n" in text


def test_saved_config_is_read_as_data_and_checked(tmp_path):
    path = tmp_path / "config.yaml"
    for text, says in [
        ("rssm: {deter: [", "not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("rssm: {deter: big}", "rssm.deter big: must be a whole number"),
        ("rssm: {deter: 9}", "multiple of rssm.blocks"),
        ("nonsense: 1", "nonsense is not an option"),
        ("1: 1", "1 is not an option"),
        ("configs: crafter", "must be lists"),
        ("", "must hold options"),
        ("#" * (2**20 + 1), "longer than 1048576 characters"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError) as error:
            Config.load_saved(path)
        assert str(path) in str(error.value) and says in str(error.value)
    with pytest.raises(UserError, match="Cannot read"):
        Config.load_saved(tmp_path / "absent.yaml")


def test_same_command_resumes_without_differences(saved):
    line = "--configs crafter --seed 3"
    old = saved(line, has_cuda=False)
    for has_cuda in (False, True):
        new = load(line, has_cuda=has_cuda, saved=old)
        assert new.presets == ["crafter", "cpu"] and new.added == ["cpu"]
        assert config.resume_changes(old, new) == []


def test_run_that_began_on_a_gpu_stays_large_on_a_cpu(saved):
    old = saved("--configs crafter", has_cuda=True)
    new = load("--configs crafter", has_cuda=False, saved=old)
    assert new.presets == ["crafter"] and new.rssm.deter == 2048
    assert "Slow" in new.notes[0]


def test_differences_are_shown(saved):
    old = saved("--configs debug --logdir a --seed 1")
    new = load("--configs debug --logdir b --seed 2 --actor_lr 1e-3 --imag_gradient both", saved=old)
    assert config.resume_changes(old, new) == [
        "seed: 1 -> 2",
        "imag_gradient: reinforce -> both",
        "actor_lr: null -> 0.001",
    ]


@pytest.mark.parametrize(
    "change",
    "task=dummy_cue action_repeat=2 size=[96,96] rssm.deter=64 rssm.stoch=8 "
    "rssm.blocks=2 encoder.mlp_units=8 encoder.cnn_keys=x decoder.cnn_depth=4 encoder.strided=True "
    "reward_head.dist=symlog_disc critic.bins=41 actor.layers=1".split(),
)
def test_what_cannot_change_is_refused_with_both_values(saved, change):
    name, _, value = change.partition("=")
    old = saved("--configs debug")
    new = load(f"--configs debug --{name} {value}", saved=old)
    with pytest.raises(UserError) as error:
        config.resume_changes(old, new)
    message = str(error.value)
    assert f"{name}: " in message and f" -> {value.replace(',', ', ')}" in message
    assert "a new --logdir starts a fresh run" in message and "\n" not in message


def test_replay_context_and_such_may_change(saved):
    old = saved("--configs debug")
    new = load("--configs debug --replay_context 0 --train_ratio 2 --envs.amount 2", saved=old)
    assert len(config.resume_changes(old, new)) == 3


def test_checkpoint_alone_brings_its_config(saved):
    old = saved("--configs crafter debug --seed 5 --logdir runs/a --traindir elsewhere")
    line = "--from_checkpoint runs/a/latest.pt --steps 700"
    new = load(line, saved=old)
    assert (new.seed, new.steps, new.rssm.deter, new.presets) == (5, 700, 32, ["crafter", "debug"])
    assert new.logdir is None and new.from_checkpoint == "runs/a/latest.pt" and new.traindir == "elsewhere"
    assert config.resume_changes(old, new) == ["steps: 300 -> 700"]
    assert load(f"{line} --logdir runs/b", saved=old).traindir is None  # a new run has its own episodes


def test_checkpoint_with_configs_takes_the_command(saved):
    old = saved("--configs debug --seed 5")
    new = load("--configs debug --from_checkpoint a/latest.pt", saved=old)
    assert new.seed == 0 and config.resume_changes(old, new) == ["seed: 5 -> 0"]


def test_run_paths_only_looks():
    assert config.run_paths("--configs debug --logdir a".split()) == ("a", None, None)
    # Fits only with the saved config, so it is not checked yet; and nothing is printed.
    line = "--from_checkpoint a/latest.pt --eval_amount 7 --print_config --help"
    assert config.run_paths(line.split()) == (None, "a/latest.pt", None)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("--prior.enabled True", "needs an adviser"),
        ("--llm.enabled True", "nothing uses the advice"),
        ("--configs lore_prior --expl_behavior random", "works on the task's actor"),
        ("--configs lore_prior --expl_behavior lpm --expl_task_actor separate", "works on the task's actor"),
        ("--configs lore_options --expl_behavior lpm", "measures options by the task's reward"),
        ("--configs lore_options --imag_gradient both", "needs imag_gradient reinforce"),
        ("--configs lore_synth --expl_behavior plan2explore", "measures plans by the task's reward"),
    ],
)
def test_advice_that_cannot_work_is_refused(line, reason):
    assert reason in fails(line)


def test_advice_goes_with_explorers_that_leave_the_tasks_reward_or_actor_alone():
    load("--configs lore_prior --expl_behavior plan2explore")
    load("--configs lore_synth --expl_behavior plan2explore --expl_task_actor separate")
    load("--configs lore_synth --expl_behavior random")


# A config as a command line


def test_overrides_are_what_the_presets_do_not_say():
    options = "--configs crafter cpu --seed 3 --size 32 32 --encoder.cnn_mults 1 2"
    found = load(f"{options} --train_ratio {load('--configs crafter cpu').train_ratio}")
    assert found.overrides() == {"seed": 3, "size": [32, 32], "encoder.cnn_mults": [1, 2]}


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--configs", "crafter", "lore_full", "debug", "--llm.until", "null", "--noisy_tv.enabled", "True"],
        ["--traindir", "two words", "--encoder.mlp_keys=--odd", "--steps", "1e5", "--opt.lr", "3e-5"],
        ["--configs", "doorkey", "--traindir=--odd", "--precision", "float32"],
    ],
)
def test_a_config_can_be_given_as_a_command_line(argv):
    given = config.load(argv)
    again = config.load(given.to_argv())
    assert again.to_dict() == given.to_dict() and again.presets == given.presets
