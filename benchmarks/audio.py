"""Is the source in the room found by ear? Success with audio, without it, and with shuffled audio.

    python3 benchmarks/audio.py --seeds 0 1 2 --logdir ./logdir/audio_benchmark --out audio.png

Trains an agent for each variant and seed, one after another (about 3 minutes each on one core of a CPU), and
plays the same unseen episodes with all of them, and with random actions. A training that is there already is
not done again, so the work can be split: --variants, --seeds. Further options go to dreamer.py.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluate import evaluate
from reports import logs

PROGRAM = Path(__file__).resolve().parent.parent / "dreamer.py"
# Smaller than the cpu preset in what costs most time.
TRAIN = (
    "--configs audio cpu --threads 1 --rssm.deter 256 --batch_size 16 --batch_length 16 --imag_last 8 "
    "--eval_every 1500"
).split()
DEAF = "--encoder.audio_keys none --encoder.mlp_keys none --decoder.audio_keys none --decoder.mlp_keys none"
VARIANTS = {
    "audio": [],
    "without": DEAF.split(),  # no key of the network reads or predicts the sound; the image stays
    "shuffled": ["--task", "soundsearch_shuffled"],
}
COLORS = {"audio": "tab:blue", "without": "tab:orange", "shuffled": "tab:green"}
EVALUATION_SEED = 1000  # of the episodes that all agents play
STDERR = 2  # the file descriptor: the result alone goes to the standard output
GREY = "0.6"


def train(variant: str, seed: int, logdir: Path, options: list[str]) -> None:
    """Train one agent, or go on with its training."""
    command = [sys.executable, str(PROGRAM), *TRAIN, *VARIANTS[variant], *options]
    subprocess.run([*command, "--seed", str(seed), "--logdir", str(logdir)], check=True, stdout=STDERR)


def success(logdir: Path, episodes: int, random: bool = False) -> float:
    """Percent of the episodes in which the source is found."""
    result = evaluate(logdir, episodes, seed=EVALUATION_SEED, device="cpu", random=random)
    return result["success_rates"]["found"]


def draw(rates: dict[str, dict[int, float]], random: float, folder: Path, out: Path) -> None:
    """Evaluation returns while training, and the success at the end, seed by seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for index, (variant, seeds) in enumerate(rates.items()):
        color = COLORS[variant]
        for number, seed in enumerate(seeds):
            lines = logs.read_metrics(folder / f"{variant}_{seed}")
            label = variant if number == 0 else None
            left.plot(*logs.curve(lines, "eval/episode_return"), ".-", color=color, label=label, lw=1)
        right.bar(index, sum(seeds.values()) / len(seeds), 0.6, color=color, alpha=0.4)
        right.plot([index] * len(seeds), list(seeds.values()), "o", color=color)
    right.axhline(random, color=GREY, ls="--")
    right.text(0.5, random + 1, "random actions", color=GREY, ha="center")
    right.set_xticks(range(len(rates)), rates)
    right.set(title="source found, at the end", ylabel="percent of episodes", ylim=(0, 105))
    left.set(title="return of the evaluations", xlabel="env steps")
    left.grid(alpha=0.3)
    left.legend()
    figure.savefig(out, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--episodes", type=int, default=100, help="of each evaluation")
    parser.add_argument("--steps", type=int, default=10000, help="env steps of each training")
    parser.add_argument("--logdir", type=Path, default=Path("logdir/audio_benchmark"))
    parser.add_argument("--out", type=Path, help="draw a figure; needs matplotlib")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    args, options = parser.parse_known_args()
    rates: dict[str, dict[int, float]] = {variant: {} for variant in args.variants}
    for seed in args.seeds:
        for variant in args.variants:
            logdir = args.logdir / f"{variant}_{seed}"
            train(variant, seed, logdir, ["--steps", str(args.steps), *options])
            rates[variant][seed] = success(logdir, args.episodes)
    random = success(logdir, args.episodes, random=True)
    if args.out:
        draw(rates, random, args.logdir, args.out)
    lines = [
        f"{variant}: {', '.join(f'{rate:.0f} %' for rate in r.values())}" for variant, r in rates.items()
    ]
    print(
        json.dumps({**rates, "random": random})
        if args.json
        else "\n".join([*lines, f"random: {random:.0f} %"])
    )


if __name__ == "__main__":
    main()
