"""Is the source in the room found by ear? Success with audio, without it, and with shuffled audio.

    python3 benchmarks/audio.py --jobs 2

Trains an agent for each arm and seed (about 3 minutes each on one core of a CPU). All agents, and random
actions, then play the same unseen episodes. Finished runs are not repeated and interrupted ones are resumed.
Other options are passed to dreamer.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import runs
from benchmarks.runs import Measures, Results, Study, Summary
from evaluate import evaluate
from reports import figures, logs

OPTIONS = (
    "--configs audio cpu --threads 1 --steps 10000 --eval_every 1500 "
    # Smaller than the cpu preset where most time is spent.
    "--rssm.deter 256 --batch_size 16 --batch_length 16 --imag_last 8"
)
ARMS = {
    "audio": "",
    # No key of the network reads or predicts the sound; the image remains.
    "without": "--encoder.audio_keys none --encoder.mlp_keys none --decoder.audio_keys none "
    "--decoder.mlp_keys none",
    "shuffled": "--task soundsearch_shuffled",
}
COLORS = {"audio": "tab:blue", "without": "tab:orange", "shuffled": "tab:green"}
EVALUATION_SEED = 1000  # of the episodes that all agents play
GREY = "0.6"


def measure(logdir: Path, quick: bool) -> Measures:
    """Percent of 100 episodes in which the source is found, by the agent and by random actions."""

    def found(random: bool) -> float:
        played = evaluate(logdir, 1 if quick else 100, seed=EVALUATION_SEED, device="cpu", random=random)
        return played["success_rates"]["found"]

    curve = logs.curve(logs.read_metrics(logdir), logs.EVAL)
    return {"found": found(False), "random": found(True), "curves": {"eval": curve}}


def report(results: Results) -> tuple[Summary, list[str]]:
    summary = {
        arm: {name: runs.spread([run[name] for run in seeds.values()]) for name in ("found", "random")}
        for arm, seeds in results.items()
    }
    columns = {"found": ("source found, %", "{:.0f}"), "random": ("random actions, %", "{:.0f}")}
    return summary, runs.table(summary, columns)


def draw(results: Results, summary: Summary, out: Path) -> None:
    """Evaluation returns during training, and the success at the end, seed by seed."""
    figure, (left, right) = figures.pyplot().subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for index, (arm, seeds) in enumerate(results.items()):
        for number, run in enumerate(seeds.values()):
            label = arm if number == 0 else None
            left.plot(*run["curves"]["eval"], ".-", color=COLORS[arm], label=label, lw=1)
        values = summary[arm]["found"]["values"]
        right.bar(index, sum(values) / len(values), 0.6, color=COLORS[arm], alpha=0.4)
        right.plot([index] * len(values), values, "o", color=COLORS[arm])
    random = next(iter(summary.values()))["random"]["value"]
    right.axhline(random, color=GREY, ls="--")
    right.text(0.5, random + 1, "random actions", color=GREY, ha="center")
    right.set_xticks(range(len(results)), results)
    right.set(title="source found, at the end", ylabel="percent of episodes", ylim=(0, 105))
    left.set(title="return of the evaluations", xlabel="env steps")
    left.grid(alpha=0.3)
    left.legend()
    figure.savefig(out, dpi=90)


QUICK = (
    "--configs debug --steps 160 --prefill 60 --time_limit 0 --batch_size 2 --batch_length 8 --train_ratio 4"
)
STUDIES = {"audio": Study(OPTIONS, ARMS, range(3), measure, report, draw, f"{QUICK} --video_pred_log False")}


if __name__ == "__main__":
    sys.exit(runs.main(STUDIES, "logdir/audio_benchmark", __doc__))
