"""Does learning progress vanish where nothing is left to learn, even where the error stays high?

    python3 benchmarks/noisy_digits.py

The study of LPM's paper (arXiv 2509.25438) on noisy digits, with the 8x8 digits of scikit-learn instead of
MNIST. A network sees a picture and predicts the next one, by mean squared error. There are two kinds of
transitions, mixed half and half:

- deterministic: a 0 is followed by the same picture, so its error can be learned away;
- stochastic: a 1 is followed by a random picture of a 2 to 9, so its error stays at the pictures' variance.

The parts of LPM are those of exploration.py, with the defaults of configs.yaml and 16 batches of 32 in the
FIFO. There is no agent: all rewards are computed along the same training, which they do not change.

Protocol, fixed before the final run. Seeds 0 to 9 (development used 100 and above), 600 updates. Of the 1,797
pictures a seed leaves out a random quarter. Each update draws 32 transitions from the rest; the errors of the
model before its update enter the FIFO, and the error predictor takes one step on 32 of its entries. Before
each update 32 fresh transitions of each kind are measured and not learned from: with pictures that are
trained on ("seen", like an agent's replay), and with those left out ("unseen", as in the public code).

Measured, as means over the batch, for each seed:

- error: mean squared error per pixel; intensities range from 0 to 1. Also the reward of plain curiosity.
- predicted: exp of the error predictor's output, minus lpm.error_floor, in the same unit.
- lpm_log: learning_progress in log space, in nats. lpm_linear: in linear space, in the error's unit.
- progress: lpm_log with a perfect predictor: the mean log error over the updates in the FIFO, minus today's.
  Both LPM rewards and this are 0 until the FIFO is full.

Reported, with 95 % bootstrap intervals over seeds: `start`, the mean over the first 50 updates with a full
FIFO; `end`, the mean over the last 50 updates; `end_absolute`, the mean absolute value over these, which the
noise of a batch keeps above 0; and for rewards `settled`, the update from which the running mean of 50
updates stays within the band around 0, for each seed (null: never). The band is 0.1 nats for lpm_log and
progress (the error and its prediction differ by 10 %) and 0.007 for lpm_linear and error (about 10 % of the
variance of the pictures that follow in the stochastic kind). A reward has vanished on a kind if the whole
interval of its `end` is in the band.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import config
from basics import UserError, atomic_write, derive_seed, numpy_rng
from benchmarks.runs import cell, spread, write_json
from exploration import FIFO_BATCHES, ErrorFifo, ErrorPredictor, learning_progress
from reports import figures
from tools import torch_rng

KINDS = ("deterministic", "stochastic")
PICTURES = ("seen", "unseen")
CURVES = ("error", "predicted", "lpm_log", "lpm_linear", "progress")
BANDS = {"error": 0.007, "lpm_log": 0.1, "lpm_linear": 0.007, "progress": 0.1}  # of the rewards
WINDOW = 50  # updates that a reported mean covers
BATCH = 32
PIXELS, WHITE = 64, 16  # of scikit-learn's digits
UNSEEN_SHARE = 0.25
UNITS, LR = 256, 1e-3  # of the model
LPM = config.load([], has_cuda=False).lpm
BIN = 20  # updates that a point of the figure covers
TITLES = {
    "deterministic": "Deterministic\na 0 stays unchanged",
    "stochastic": "Stochastic\na 1 becomes a random 2-9",
}
BLUE, GREEN, ORANGE = "#0072b2", "#009e73", "#d55e00"  # from Okabe and Ito's palette for colour-blind readers
LINES = (  # of the upper and the lower row of the figure: curve -> label and style
    {
        "error": ("actual error", {"color": ORANGE, "lw": 2.5}),
        "predicted": ("predicted error", {"color": BLUE, "ls": "--", "lw": 2}),
    },
    {
        "error": ("plain error", {"color": ORANGE, "lw": 2.5}),
        "lpm_log": ("LPM, log", {"color": BLUE, "ls": "--", "lw": 2}),
        "lpm_linear": ("LPM, linear", {"color": GREEN, "ls": "-.", "lw": 2}),
        "progress": ("true progress, log", {"color": "black", "ls": ":", "lw": 1.5}),
    },
)
Curves = dict[str, dict[str, dict[str, list[float]]]]  # of one seed: [pictures][kind][curve][update]


class Digits:
    """Transitions between pictures of digits, from `rng`."""

    def __init__(self, rng: np.random.Generator):
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError as error:
            raise UserError(
                "The digits need scikit-learn: pip install -r requirements/exploration.txt"
            ) from error
        pictures, digits = load_digits(return_X_y=True)  # [1797, 64], [1797]
        self._pictures = torch.from_numpy(pictures / WHITE).float()
        self._rng = rng
        unseen = rng.random(len(digits)) < UNSEEN_SHARE
        self._pools = {}  # indices of zeros, ones, and the rest
        for name, part in (("seen", ~unseen), ("unseen", unseen)):
            masks = (digits == 0, digits == 1, digits > 1)
            self._pools[name] = [np.flatnonzero(mask & part) for mask in masks]

    def batch(self, pictures: str, stochastic: np.ndarray) -> tuple[Tensor, Tensor]:
        """Pictures [n, 64] and the next ones [n, 64]; `stochastic` [n] is the kind of each."""
        zeros, ones, rest = self._pools[pictures]
        n = len(stochastic)
        now = np.where(stochastic, self._rng.choice(ones, n), self._rng.choice(zeros, n))
        after = np.where(stochastic, self._rng.choice(rest, n), now)
        return self._pictures[now], self._pictures[after]

    def variance(self) -> float:
        """The stochastic kind's error if the mean of its pictures is predicted: the lowest possible."""
        return self._pictures[self._pools["seen"][2]].var(0, correction=0).mean().item()


class Model(nn.Module):
    """Predicts the next picture. The last layer sees the input too, as in the public code."""

    def __init__(self):
        super().__init__()
        sizes = (PIXELS, UNITS, UNITS, UNITS)
        layers = [(nn.Linear(*size), nn.ReLU()) for size in zip(sizes, sizes[1:], strict=False)]
        self.hidden = nn.Sequential(*(module for layer in layers for module in layer))
        self.out = nn.Linear(PIXELS + UNITS, PIXELS)

    def forward(self, picture: Tensor) -> Tensor:
        return self.out(torch.cat([picture, self.hidden(picture)], -1))


class Progress:
    """LPM's error predictor, its FIFO and its optimiser, for states [n, inputs] without actions."""

    def __init__(self, inputs: int, generator: torch.Generator, capacity: int = FIFO_BATCHES * BATCH):
        self.predictor = ErrorPredictor(inputs, LPM.units)
        self.fifo = ErrorFifo(capacity, {"state": ((inputs,), torch.float32), "error": ((), torch.float32)})
        self._generator = generator
        self._optimizer = torch.optim.Adam(self.predictor.parameters(), LPM.error_lr)

    def learn(self, state: Tensor, error: Tensor) -> None:
        """Add the errors [n] at the states to the FIFO, then take one step on n of its entries."""
        self.fifo.push({"state": state, "error": torch.log(error + LPM.error_floor)})
        old = self.fifo.sample(len(state), self._generator)
        loss = (self.predictor(old["state"]) - old["error"]).square().mean()
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()

    @torch.no_grad()
    def measure(self, state: Tensor, error: Tensor) -> dict[str, float]:
        """Means over the batch of the measures in the module's docstring, and of the log error."""
        predicted = self.predictor(state)
        values = {
            "error": error,
            "predicted": predicted.exp() - LPM.error_floor,
            "log_error": torch.log(error + LPM.error_floor),
        }
        for space in ("log", "linear"):
            reward = learning_progress(predicted, error, floor=LPM.error_floor, space=space)
            values[f"lpm_{space}"] = torch.where(self.fifo.full, reward, 0.0)
        return {name: value.mean().item() for name, value in values.items()}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Networks of this size are slower with more threads, by far if other jobs run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def run(seed: int, updates: int) -> Curves:
    """Train once, and return the curves of all measures."""
    digits, rng = Digits(numpy_rng(seed, "digits")), numpy_rng(seed, "kinds")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "weights"))
        model, lpm = Model(), Progress(PIXELS, torch_rng(seed, "fifo"))
    optimizer = torch.optim.Adam(model.parameters(), LR)
    curves = {p: {k: {} for k in KINDS} for p in PICTURES}
    for _ in range(updates):
        for pictures in PICTURES:
            for kind in KINDS:
                now, after = digits.batch(pictures, np.full(BATCH, kind == "stochastic"))
                with torch.no_grad():
                    error = (model(now) - after).square().mean(-1)  # [n]
                for name, value in lpm.measure(now, error).items():
                    curves[pictures][kind].setdefault(name, []).append(value)
        now, after = digits.batch("seen", rng.random(BATCH) < 0.5)
        error = (model(now) - after).square().mean(-1)  # [n]
        optimizer.zero_grad()
        error.mean().backward()
        optimizer.step()
        lpm.learn(now, error.detach())
    for kinds in curves.values():
        for of_kind in kinds.values():
            of_kind["progress"] = true_progress(of_kind.pop("log_error"))
    return curves


def true_progress(log_error: Sequence[float]) -> list[float]:
    """The mean of the log errors in the FIFO, minus the next one; 0 until it is full."""
    memories = [log_error[u - FIFO_BATCHES : u] for u in range(FIFO_BATCHES, len(log_error))]
    after = zip(memories, log_error[FIFO_BATCHES:], strict=True)
    return [0.0] * FIFO_BATCHES + [float(np.mean(memory)) - today for memory, today in after]


def settled(curve: Sequence[float], band: float) -> int | None:
    """The update from which the running mean of a reward stays within the band around 0."""
    means = np.convolve(curve[FIFO_BATCHES:], np.full(WINDOW, 1 / WINDOW), "valid")
    outside = np.flatnonzero(np.abs(means) > band)
    if not len(means) or (len(outside) and outside[-1] == len(means) - 1):
        return None
    return FIFO_BATCHES + WINDOW + (int(outside[-1]) + 1 if len(outside) else 0)


def summary(results: Mapping[int, Curves]) -> dict:
    """[pictures][kind][curve] -> the reported numbers of the module's docstring."""
    first, last = slice(FIFO_BATCHES, FIFO_BATCHES + WINDOW), slice(-WINDOW, None)

    def of(pictures: str, kind: str, name: str) -> dict:
        curves = [np.array(seed[pictures][kind][name]) for seed in results.values()]
        out = {
            "start": spread([curve[first].mean() for curve in curves], np.mean),
            "end": spread([curve[last].mean() for curve in curves], np.mean),
            "end_absolute": spread([np.abs(curve[last]).mean() for curve in curves], np.mean),
        }
        if name in BANDS:
            out["settled"] = [settled(curve, BANDS[name]) for curve in curves]
        return out

    return {p: {k: {c: of(p, k, c) for c in CURVES} for k in KINDS} for p in PICTURES}


def draw(results: Mapping[int, Curves], path: Path) -> None:
    """Write the figure of the seen pictures, of BIN updates or more; the ending decides on PNG or SVG."""
    plt = figures.pyplot()
    with plt.rc_context({"font.size": 16, "axes.titlesize": 17, "axes.grid": True, "grid.alpha": 0.3}):
        figure, axes = plt.subplots(2, 2, figsize=(9, 9.5), sharex=True, sharey="row", layout="constrained")
        for kind, column in zip(KINDS, axes.T, strict=True):
            for axis, lines in zip(column, LINES, strict=True):
                for name, (label, style) in lines.items():
                    curves = np.array([seed["seen"][kind][name] for seed in results.values()])  # [S, U]
                    length = curves.shape[1] // BIN * BIN
                    means = curves[:, :length].reshape(len(curves), -1, BIN).mean(-1)  # [S, U / BIN]
                    updates = np.arange(BIN, length + 1, BIN)
                    axis.fill_between(
                        updates, means.min(0), means.max(0), color=style["color"], alpha=0.2, lw=0
                    )
                    axis.plot(updates, means.mean(0), label=label, **style)
            column[0].set(title=TITLES[kind], yscale="log")
            column[1].axhline(0, color="black", lw=0.8)
            column[1].set(xlabel="updates")
        axes[0, 0].set(ylabel="prediction error\n(squared intensity)")
        axes[1, 0].set(ylabel="intrinsic reward\n(squared intensity,\nin log space nats)")
        axes[0, 1].legend()
        axes[1, 1].legend()
        ending = path.suffix.removeprefix(".")
        atomic_write(path, lambda file: figure.savefig(file, format=ending, dpi=90))
        plt.close(figure)


def study(seeds: Sequence[int], updates: int, out: Path) -> dict:
    """Run all seeds and write noisy_digits.json (with all curves), .png and .svg into the folder `out`.

    Returns the numbers without the curves. Raises UserError if a package is missing.
    """
    results = {seed: run(seed, updates) for seed in seeds}
    variances = [Digits(numpy_rng(seed, "digits")).variance() for seed in seeds]
    result = {"updates": updates, "seeds": list(seeds), "variance": spread(variances, np.mean)}
    result["summary"] = summary(results)
    write_json(out / "noisy_digits.json", result | {"curves": results})
    for ending in ("png", "svg"):
        draw(results, out / f"noisy_digits.{ending}")
    return result


def table(result: dict) -> list[str]:
    """Start and end of each curve, on pictures that are trained on."""
    rows = ["| | start | end |", "| --- | --- | --- |"]
    for kind, curves in result["summary"]["seen"].items():
        for curve, measures in curves.items():
            cells = " | ".join(cell(measures[moment], "{:.4f}") for moment in ("start", "end"))
            rows.append(f"| {kind} {curve} | {cells} |")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=range(10))
    parser.add_argument("--updates", type=int, default=600, help=f"at least {BIN}")
    parser.add_argument("--out", type=Path, default=Path("logdir/exploration"))
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    try:
        result = study(args.seeds, args.updates, args.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result) if args.json else "\n".join(table(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
