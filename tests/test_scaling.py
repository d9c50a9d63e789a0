"""docs/scaling.md: its tables are what the script prints, its commands run, its constants are the code's."""

import json
import runpy
import sys

import pytest
import torch
from test_benchmarks import ROOT, commands
from test_exploration_study import load

import config
import plot
import sweep

PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
OTHERS = {name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("performance", "llm")}
scaling = load("scaling")
DEFAULTS = {name: constant.value for name, constant in scaling.CONSTANTS.items()}


def cells(title: str, **changes: float) -> list[dict[str, str]]:
    """A table's rows by column, with some constants changed."""
    text = scaling.tables(DEFAULTS | changes, [1, 8, 256], [1, 100, 10_000])[title]
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    return [dict(zip(head, row, strict=True)) for row in rows]


def run(script: str, options: list[str], monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "argv", [script, *options])
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    runpy.run_path(str(ROOT / script), run_name="__main__")
    return capsys.readouterr().out


# The page


def test_the_tables_are_what_the_script_prints(monkeypatch, capsys):
    out = run("benchmarks/scaling.py", [], monkeypatch, capsys)
    for title, table in scaling.tables(DEFAULTS, [1, 8, 256], [1, 100, 10_000]).items():
        assert f"{title}\n\n{table}\n" in out
        assert table in PAGE, f"the table {title!r} is another now: copy what benchmarks/scaling.py prints"


@pytest.mark.parametrize("command", commands("scaling.md"), ids=" ".join)
def test_its_commands_are_understood(command, monkeypatch, capsys):
    script, *options = command
    if script == "sweep.py":
        args, more = sweep.parse(options)
        assert sweep.plan(sweep.read_grid(args.grid), args.configs, more, args.logdir)
    elif script == "plot.py":
        assert plot.parse(options)
    elif script == "benchmarks/scaling.py":
        assert "A whole run" in run(script, options, monkeypatch, capsys)
    else:
        source = (ROOT / script).read_text(encoding="utf-8")
        assert all(f'"{word}"' in source for word in options if word.startswith("--"))


# The constants


def test_constants_of_the_preset_are_the_presets():
    preset = config.load(["--configs", "crafter", "size12m"])
    names = (
        "steps",
        "train_ratio",
        "batch_size",
        "batch_length",
        "save_every",
        "eval_every",
        "eval_episodes",
    )
    for name in (*names, "keep_checkpoints"):
        assert DEFAULTS[name] == preset[name], name
    assert DEFAULTS["per_call"] == preset.llm.max_batch
    assert (
        preset.replay.capacity == "auto" and preset.llm.until is None
    )  # 1e6 where there is room; half of steps


@pytest.mark.parametrize(
    "name, page, text",
    [
        ("parameters", "performance", "10,498,259"),
        ("update_s", "performance", "| `size12m` | 10,498,259 | 16 x 64 | bfloat16 | 2.34 |"),
        ("peak_bytes", "performance", "| 2.34 | 0.0032 | 0.0008 | 2.71 |"),
        ("policy_fixed_s", "performance", "| `size12m` | 10,498,259 | 16 x 64 | bfloat16 | 2.34 | 0.0032 |"),
        ("policy_env_s", "performance", "of four envs at `size12m` takes 0.0053 s"),
        ("env_s", "performance", "one env does 2182 of `crafter_reward`"),
        ("worker_steps_s", "performance", "| `crafter_reward` | 2 | 2464 |"),
        ("worker_bytes", "performance", "two of `crafter_reward` after 0.50 s with 91 MB each"),
        ("questions", "llm", "(`min_gap_steps` 10) | 0.10 |"),
        ("hit_rate", "llm", "| cache hit rate over the whole run | 27 % |"),
        ("tokens_first", "llm", "1,700 with the schema"),
        ("tokens_out", "llm", "up to 250 tokens"),
    ],
)
def test_measured_constants_stand_where_they_were_measured(name, page, text):
    assert text in OTHERS[page]
    stated = {"env_s": 1 / 2182, "worker_steps_s": 2464 / 2, "worker_bytes": 91e6, "peak_bytes": 2.71 * 2**30}
    stated |= {"parameters": 10_498_259, "update_s": 2.34, "questions": 0.10, "hit_rate": 0.27}
    stated |= {"tokens_first": 1700, "tokens_out": 250}
    stated |= {"policy_env_s": (0.0053 - 0.0032) / 3, "policy_fixed_s": 0.0032 - (0.0053 - 0.0032) / 3}
    assert DEFAULTS[name] == pytest.approx(stated[name])


def test_each_constant_says_where_it_is_from():
    for name, constant in scaling.CONSTANTS.items():
        assert constant.source.startswith(("measured: ", "computed: ", "assumed")), name


# What the tables say


def test_one_learner_sends_nothing_and_two_halve_the_part_that_can_be_divided():
    one, eight, many = cells("Learners")
    assert one["sent by each in an update, MB"] == "0" and one["times one learner"] == "1"
    factor = 0.34 + 0.66 / 8
    assert float(eight["an update, s"]) == pytest.approx(2.34 * factor, rel=0.01)
    assert float(eight["times one learner"]) == pytest.approx(1 / factor, rel=0.01)
    assert float(eight["sent by each in an update, MB"]) == pytest.approx(7 / 4 * 4 * 10.498259, rel=0.01)
    assert (many["batch"], many["sequences each"]) == ("256", "1")
    assert float(many["updates"].replace(",", "")) == pytest.approx(500_000 / 16, rel=0.01)


def test_at_the_break_even_more_learners_take_as_long_as_one():
    for row in cells("Learners")[1:]:
        at = float(row["pays if an update takes one more than, s"])
        ranks = int(row["learners"])
        c = DEFAULTS | {"update_s": at}
        both = [
            scaling.updates_per_step(c, n) * (scaling.update_seconds(c, n) + scaling.ring_seconds(c, n))
            for n in (1, ranks)
        ]
        assert both[0] == pytest.approx(both[1], rel=0.01)


def test_hours_are_the_sum_of_their_parts():
    for row in cells("A whole run"):
        parts = sum(float(row[name]) for name in scaling.RUN_PARTS)
        assert float(row["hours"]) == pytest.approx(parts, rel=0.01)
        assert int(row["envs"].replace(",", "")) % int(row["learners"]) == 0


def test_more_envs_than_cores_are_no_faster():
    rates = [
        float(row["env steps/s"].replace(",", "")) for row in cells("Envs of one learner", policy_env_s=0)
    ]
    assert rates[2] == pytest.approx(16 * 1232, rel=0.01) and rates[0] < rates[1] < rates[2]


def test_questions_share_calls_and_cost_what_tokens_cost():
    one, hundred, many = cells("Questions to a language model")
    assert one["calls"] == "36,500" and hundred["calls"] == many["calls"] == "4,560"
    cost = 36_500 * (1700 * 0.10 + 250 * 0.40) / 1e6
    assert float(one["cost"]) == pytest.approx(cost, rel=0.01)
    assert cells("Questions to a language model", price_input=0, price_output=0)[0]["cost"] == "0"


def test_the_numbers_between_the_tables_follow_from_the_constants():
    c = DEFAULTS
    long = c["eval_episodes"] * 10_000 * scaling.env_seconds(c, 1)  # an evaluation of long episodes, s
    largest = c | {"parameters": 372_920_979}
    for text in (
        f"{c['worker_bytes'] / 2**20:.0f} MiB a worker",
        f"some {long / 60:.0f} minutes, {100 * long / 3600:.0f} hours in 100 evaluations",
        f"send {scaling.ring_bytes(largest, 8) / 1e9:.1f} GB each, {scaling.ring_seconds(largest, 8):.1f} s",
        f"`size400m`: {largest['parameters'] / c['parameters']:.0f} times as much",
        f"all-gather of {c['batch_size'] * c['batch_length'] * 15 * 4 / 1e3:.0f} KB",
        f"{10_000 * 5_000 * c['open_bytes'] / 2**30:.0f} GiB on average",
        f"after some {1e4 / c['questions'] / (1 - c['hit_rate']) / 1e3:.0f},000 steps",
        f"{scaling.number(256 * c['per_call'] * c['calls_at_once'] / c['latency_s'])} answers a second",
    ):
        assert text in PAGE, text


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (0.001863, "0.00186"), (2.34, "2.34"), (10.0, "10"), (36_512, "36,500"), (999.9, "1,000")],
)
def test_numbers_have_three_digits(value, text):
    assert scaling.number(value) == text


# What was measured for it


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, options",
    [
        ("benchmarks/allreduce.py", "--counts 8 1000 --repeats 2 --json"),
        ("benchmarks/sizes.py", "--size debug --steps 200 --json -- --train_ratio 1"),
    ],
)
def test_the_measurements_run_and_print_json(script, options, monkeypatch, capsys):
    threads = torch.get_num_threads()
    try:
        out = run(script, options.split(), monkeypatch, capsys)
    finally:
        torch.set_num_threads(threads)
    result = json.loads(out.splitlines()[-1])
    if script.endswith("allreduce.py"):
        assert (
            0 < result["8"]["best_s"] <= result["8"]["median_s"]
            and result["1000"]["bytes"] == 4000
            and result["bytes_per_s"] > 0
        )
    else:
        assert result["checkpoint_bytes"] > 10_000 and result["episode_bytes_per_step"] > 100
        assert result["replay_bytes_per_step"] > 64 * 64 * 3 and result["save_s"] > 0
