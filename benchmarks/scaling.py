"""What a run takes with more learners and more envs: memory, disk, network, time, and questions to an LLM.

    python3 benchmarks/scaling.py
    python3 benchmarks/scaling.py --gpus 1 4 16 --envs 64 --update_s 0.2 --network_gbit 100

Computes the tables of docs/scaling.md from constants, each of which is an option: put in your own. Nothing is
measured here; where each constant comes from stands in the first table.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

GIB, HOUR = 2**30, 3600


class Constant(NamedTuple):
    value: float
    unit: str
    source: str  # "measured: COMMAND", "computed: ...", or "assumed: ..."


PRESET = "computed: the preset `crafter` with `size12m`"
SIZES = "measured: `benchmarks/sizes.py --size size12m`"
ALLREDUCE = "measured: `benchmarks/allreduce.py --processes 2`"
POLICY = "measured: one env and four at `size12m`, [performance.md](performance.md)"
LLM = "measured: [llm.md](llm.md)"
EXAMPLE = "assumed: the example of [llm.md](llm.md); put in your provider's"

CONSTANTS = {
    "steps": Constant(1e6, "env steps", PRESET),
    "train_ratio": Constant(512, "replayed per stored step", PRESET),
    "batch_size": Constant(16, "sequences", PRESET),
    "batch_length": Constant(64, "steps", PRESET),
    "capacity": Constant(1e6, "steps", PRESET),
    "eval_every": Constant(1e4, "env steps", PRESET),
    "eval_episodes": Constant(10, "", PRESET),
    "keep_checkpoints": Constant(3, "", PRESET),
    "save_every": Constant(1e4, "env steps", PRESET),
    "parameters": Constant(10_498_259, "", "computed: told by each run at its start"),
    "update_s": Constant(
        2.34,
        "s",
        "measured: `benchmarks/update_speed.py --size size12m`, two CPU cores, no GPU; put in yours",
    ),
    "peak_bytes": Constant(
        2.71 * GIB,
        "bytes",
        "measured: the same, a process with a batch of 16; less with fewer, unknown for a GPU",
    ),
    "fixed_share": Constant(
        0.34, "", "computed: batches of 4 and 16 at `size1m` in the table of cost_table.py; unknown for a GPU"
    ),
    "policy_fixed_s": Constant(0.0025, "s", POLICY),
    "policy_env_s": Constant(0.0007, "s per env", POLICY),
    "gloo_message_s": Constant(0.00017, "s", ALLREDUCE + ", best of 40: eight numbers on one machine"),
    "network_gbit": Constant(10, "Gbit/s", "assumed: between machines, at its full rate"),
    "replay_bytes": Constant(16_427, "bytes per step", SIZES),
    "episode_bytes": Constant(1_121, "bytes per step on disk", SIZES),
    "open_bytes": Constant(
        12_299, "bytes per step in memory", "computed: an image of 64 x 64 x 3 and the rest"
    ),
    "episode_steps": Constant(170, "env steps", SIZES + ", random actions"),
    "checkpoint_bytes": Constant(129_570_747, "bytes", SIZES),
    "save_s": Constant(0.6, "s", SIZES),
    "env_s": Constant(1 / 2182, "s", "measured: `benchmarks/env_speed.py`, one env in the main process"),
    "worker_steps_s": Constant(1232, "env steps/s per core", "measured: the same, two workers on two cores"),
    "cores": Constant(16, "per learner, for env workers", "assumed"),
    "worker_bytes": Constant(91e6, "bytes", "measured: a worker process of `crafter_reward`, performance.md"),
    "questions": Constant(0.10, "per env step", LLM + ", min_gap_steps 10"),
    "until": Constant(0.5, "of the steps", PRESET + ": llm.until"),
    "hit_rate": Constant(0.27, "", LLM + ", over 5,000 steps; it rises with the run"),
    "per_call": Constant(8, "questions", "computed: llm.max_batch, with at least so many envs"),
    "calls_at_once": Constant(1, "per adviser", "computed: one worker thread in lore_llm/service.py"),
    "latency_s": Constant(1.0, "s", "assumed: of a call"),
    "tokens_first": Constant(1_700, "tokens", LLM + ": characters / 4, schema included"),
    "tokens_more": Constant(95, "tokens", LLM + ": each further question of a call"),
    "tokens_out": Constant(250, "tokens", LLM + ": of an answer, characters / 4"),
    "price_input": Constant(0.10, "per million tokens", EXAMPLE),
    "price_output": Constant(0.40, "per million tokens", EXAMPLE),
}


# --- The tables ----------------------------------------------------------------------------------------

Constants = Mapping[str, float]
Row = dict[str, str]  # cells by column


def markdown(rows: Sequence[Row]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float) -> str:
    """Three digits, and no more zeros than that needs."""
    if value == 0:
        return "0"
    digits = 2 - math.floor(math.log10(abs(value)))
    text = f"{round(value, digits):,.{max(0, digits)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def constants(c: Constants) -> str:
    """Each constant: its value and where it comes from."""
    rows = []
    for name, constant in CONSTANTS.items():
        source = constant.source if c[name] == constant.value else "given on the command line"
        text = f"{c[name]:,g}" if c[name] < 1e4 else f"{c[name]:,.0f}"
        rows.append({"constant": f"`{name}`", "value": f"{text} {constant.unit}".strip(), "from": source})
    return markdown(rows)


def batch(c: Constants, ranks: int) -> int:
    """The smallest batch from `batch_size` on that can be divided over the learners."""
    return math.ceil(c["batch_size"] / ranks) * ranks


def updates_per_step(c: Constants, ranks: int) -> float:
    """Of all learners together, for each env step."""
    return c["train_ratio"] / (batch(c, ranks) * c["batch_length"])


def update_seconds(c: Constants, ranks: int) -> float:
    """Of one update, communication apart: a fixed part, and one that goes with the sequences of a learner."""
    share = batch(c, ranks) / ranks / c["batch_size"]
    return c["update_s"] * (c["fixed_share"] + (1 - c["fixed_share"]) * share)


def ring_bytes(c: Constants, ranks: int) -> float:
    """That a learner sends, and gets, in a ring all-reduce of the gradients in float32."""
    return 2 * (ranks - 1) / ranks * 4 * c["parameters"]


def ring_seconds(c: Constants, ranks: int) -> float:
    """Of that all-reduce at the network's full rate."""
    return ring_bytes(c, ranks) / (c["network_gbit"] * 1e9 / 8)


def env_seconds(c: Constants, envs: float) -> float:
    """Of one step of the envs of one learner, which are stepped together: the policy, then the envs.

    One env steps in the main process; more have worker processes and share the learner's cores.
    """
    step = c["env_s"] if envs == 1 else envs / (min(envs, c["cores"]) * c["worker_steps_s"])
    return c["policy_fixed_s"] + envs * c["policy_env_s"] + step


def learners(c: Constants, gpus: Sequence[int]) -> str:
    """By learners: what each holds, computes and sends."""
    rows = []
    alone = updates_per_step(c, 1) * update_seconds(c, 1)
    for n in gpus:
        updates = updates_per_step(c, n) * c["steps"]
        row = {"learners": f"{n:,}", "batch": f"{batch(c, n):,}", "sequences each": f"{batch(c, n) // n:,}"}
        row |= {"updates": number(updates), "an update, s": number(update_seconds(c, n))}
        row["updates, hours"] = number(updates * update_seconds(c, n) / HOUR)
        row["times one learner"] = number(alone / (updates_per_step(c, n) * update_seconds(c, n)))
        row["sent by each in an update, MB"] = number(ring_bytes(c, n) / 1e6)
        row["at the network's rate, ms"] = number(1000 * ring_seconds(c, n))
        row["in all, hours"] = number(updates * ring_seconds(c, n) / HOUR)
        # Of one learner's time for the same env steps, what is left without communication.
        left = updates_per_step(c, n) * update_seconds(c, n) / alone
        spared = (1 - left) * updates_per_step(c, 1) / updates_per_step(c, n)
        row["pays if an update takes one more than, s"] = (
            number(ring_seconds(c, n) / spared) if n > 1 else "-"
        )
        ring = c["capacity"] * c["replay_bytes"] / n
        row |= {"replay of each, GiB": number(ring / GIB)}
        row["memory of each, GiB"] = number((ring + c["peak_bytes"]) / GIB)
        rows.append(row)
    return markdown(rows)


def environments(c: Constants, envs: Sequence[int]) -> str:
    """By envs of one learner: how fast they are, and what they take."""
    rows = []
    for n in envs:
        due = n * updates_per_step(c, 1)
        row = {
            "envs": f"{n:,}",
            "policy step, ms": number(1000 * (c["policy_fixed_s"] + n * c["policy_env_s"])),
        }
        row |= {"a step of all, s": number(env_seconds(c, n)), "env steps/s": number(n / env_seconds(c, n))}
        row["over the network with Ray, MB/s"] = number(n / env_seconds(c, n) * c["open_bytes"] / 1e6)
        row["workers, GiB"] = number(n * c["worker_bytes"] / GIB if n > 1 else 0)
        row |= {"updates due after it": number(due), "their time, s": number(due * c["update_s"])}
        row["ring of each, steps"] = number(c["capacity"] / n)
        row["open episodes, GiB"] = number(n * c["episode_steps"] / 2 * c["open_bytes"] / GIB)
        rows.append(row)
    return markdown(rows)


RUN_PARTS = ("updates", "gradients over the network", "envs and policy", "counters", "evaluation", "saving")


def runs(c: Constants, gpus: Sequence[int], envs: Sequence[int]) -> str:
    """By learners and envs: the hours of a whole run, and what they go into.

    Envs are divided over the learners: where that does not go, their number is rounded up.
    """
    rows = []
    evaluated = c["steps"] / c["eval_every"] * c["eval_episodes"] * c["episode_steps"]
    for ranks in gpus:
        for n in dict.fromkeys(math.ceil(n / ranks) * ranks for n in envs):
            updates, together = c["steps"] * updates_per_step(c, ranks), c["steps"] / n  # steps of all envs
            parts = [updates * update_seconds(c, ranks), updates * ring_seconds(c, ranks)]
            parts += [together * env_seconds(c, n // ranks)]
            parts += [together * c["gloo_message_s"] if ranks > 1 else 0]
            parts += [evaluated * env_seconds(c, 1), c["steps"] / c["save_every"] * c["save_s"]]
            row = {"learners": f"{ranks:,}", "envs": f"{n:,}", "hours": number(sum(parts) / HOUR)}
            rows.append(row | {k: number(v / HOUR) for k, v in zip(RUN_PARTS, parts, strict=True)})
    return markdown(rows)


def disk(c: Constants, steps: Sequence[float]) -> str:
    """By env steps: what the logdir holds, and what is written."""
    rows = []
    for total in steps:
        saves = total / c["save_every"]
        row = {"env steps": f"{total:,.0f}", "episode files": number(total / c["episode_steps"])}
        row |= {"of them, GiB": number(total * c["episode_bytes"] / GIB), "saves": number(saves)}
        row["checkpoints kept, GiB"] = number(c["keep_checkpoints"] * c["checkpoint_bytes"] / GIB)
        row["written for checkpoints, GiB"] = number(saves * c["checkpoint_bytes"] / GIB)
        rows.append(row | {"saving, hours": number(saves * c["save_s"] / HOUR)})
    return markdown(rows)


def questions(c: Constants, envs: Sequence[int]) -> str:
    """By envs of one adviser: calls, tokens, cost, and the speed from which it cannot keep up."""
    rows = []
    for n in envs:
        together = min(n, c["per_call"])
        asked = c["steps"] * c["until"] * c["questions"]
        calls = asked * (1 - c["hit_rate"]) / together
        tokens_in = calls * (c["tokens_first"] + (together - 1) * c["tokens_more"])
        tokens_out = calls * together * c["tokens_out"]
        answered = c["calls_at_once"] * c["per_call"] / c["latency_s"]  # waiting questions share a call
        row = {"envs": f"{n:,}", "questions": number(asked), "calls": number(calls)}
        row |= {"million tokens in": number(tokens_in / 1e6), "out": number(tokens_out / 1e6)}
        row["cost"] = number((tokens_in * c["price_input"] + tokens_out * c["price_output"]) / 1e6)
        row["answers/s at most"] = number(answered)
        row["so env steps/s at most"] = number(answered / (c["questions"] * (1 - c["hit_rate"])))
        rows.append(row)
    return markdown(rows)


def tables(c: Constants, gpus: Sequence[int], envs: Sequence[int]) -> dict[str, str]:
    """All tables by title, in the order of the page."""
    return {
        "Constants": constants(c),
        "Learners": learners(c, gpus),
        "Envs of one learner": environments(c, envs),
        "A whole run": runs(c, gpus, envs),
        "Disk": disk(c, [c["steps"], 100 * c["steps"]]),
        "Questions to a language model": questions(c, envs),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 256], help="learners")
    parser.add_argument("--envs", type=int, nargs="+", default=[1, 100, 10_000])
    for name, constant in CONSTANTS.items():
        parser.add_argument(f"--{name}", type=float, default=constant.value, help=constant.unit or "-")
    args = vars(parser.parse_args(argv))
    for title, text in tables(args, args["gpus"], args["envs"]).items():
        print(f"{title}\n\n{text}\n")


if __name__ == "__main__":
    main()
