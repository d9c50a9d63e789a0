"""Several learners: equal gradients, whole runs, stops, losses, resumes. Processes talk over gloo."""

import contextlib
import hashlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from run_helpers import ROOT, TINY, assert_same_run, differences, log, main, metrics, moment
from test_models import OBS
from torch.distributed.run import get_args_parser

import checkpoint as checkpoints
import config as configs
import distributed
import dreamer
import replay as replays
from agent import Dreamer
from basics import UserError
from distributed import JoinedRanks, Ranks
from episodes import EpisodeWriter
from logger import Collector, merged_logs
from lore_llm.hooks import is_count
from models import ReturnNorm
from replay import Replay
from stats import SuccessRates, merged_successes

BATCH, LENGTH, HORIZON, ACTIONS = 4, 5, 3, 4


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def as_rank(rank: int, size: int, port: int, folder: Path) -> None:
    """Do the `work` of one of `size` processes."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    ranks = JoinedRanks(torch.device("cpu"))
    work(ranks, folder)
    ranks.close()


def work(ranks: Ranks, folder: Path) -> None:
    agent = make_agent(BATCH, ranks)
    seen = gradients(agent, joint_batch(agent), ranks.rank, ranks.size)
    torch.save({"exchanged": exchange(ranks), "gradients": seen}, folder / f"{ranks.rank}.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict]:
    """What each of two processes has to tell of `work`."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(as_rank, (2, free_port(), folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


# ---- What they exchange


def exchange(ranks: Ranks) -> dict:
    tensors = [torch.full((2, 3), float(ranks.rank)), torch.tensor(4.0 * ranks.rank)]
    ranks.average(tensors)
    ranks.average([])
    own = torch.full((2,), float(ranks.rank))
    ranks.copy([own])
    result = {
        "average": [tensor.tolist() for tensor in tensors],
        "copy": own.tolist(),
        "gather": ranks.gather(torch.arange(2.0) + 10 * ranks.rank).tolist(),
        "total": ranks.total(1, ranks.rank),
        "any": [ranks.any(ranks.rank == 1), ranks.any(False)],
        "tell": ranks.tell({"rank": ranks.rank}),
        "collect": ranks.collect(ranks.rank),
    }
    norm = ReturnNorm(rate=1.0, limit=1.0, low=0.0, high=100.0)
    norm.gather = ranks.gather
    norm.update(torch.tensor([1.0, 2.0]) + 10 * ranks.rank)
    result["range"] = norm.range.tolist()
    return result


def test_ranks_exchange_what_they_should(two_ranks):
    for told in two_ranks:
        assert told["exchanged"] == {
            "average": [[[0.5] * 3] * 2, 2.0],
            "copy": [0.0, 0.0],
            "gather": [0.0, 1.0, 10.0, 11.0],
            "total": [2, 1],
            "any": [True, False],
            "tell": {"rank": 0},
            "collect": [0, 1],
            "range": [1.0, 12.0],  # percentiles of the returns of both
        }


def test_one_learner_alone_is_all_there_is():
    ranks, tensor = Ranks(), torch.tensor([1.0, 2.0])
    ranks.average([tensor])
    assert tensor.tolist() == [1.0, 2.0] and ranks.gather(tensor) is tensor
    assert ranks.total(3, 4) == [3, 4] and ranks.any([1]) and not ranks.any([])
    assert ranks.tell(5) == 5 and ranks.collect(5) == [5] and ranks.names() == ()


# ---- Gradients


def make_agent(batch_size: int, ranks: Ranks | None = None) -> Dreamer:
    argv = [
        "--configs",
        "debug",
        "dummy_cue",
        "--batch_size",
        str(batch_size),
        "--batch_length",
        str(LENGTH),
    ]
    argv += [
        "--imag_horizon",
        str(HORIZON),
        "--precision",
        "float32",
        "--opt.warmup",
        "0",
        "--opt.lr",
        "1e-2",
    ]
    space = {"action": gymnasium.spaces.Discrete(ACTIONS)}
    agent = Dreamer(OBS, space, configs.load(argv), torch.device("cpu"), ranks)
    torch.manual_seed(1)
    for head in (agent.world_model.reward_head, agent.behavior.critic, agent.behavior.slow_critic):
        torch.nn.init.normal_(head.out.weight, std=0.1)  # or no gradient would pass
    return agent


def joint_batch(agent: Dreamer) -> dict[str, np.ndarray]:
    rng, shape = np.random.default_rng(0), (BATCH, LENGTH + 1)
    rssm = agent.config.rssm
    batch = {
        "image": rng.integers(256, size=(*shape, *OBS["image"].shape), dtype=np.uint8),
        "action": rng.integers(ACTIONS, size=shape, dtype=np.int32),
        "reward": rng.normal(size=shape).astype(np.float32),
        "is_first": rng.random(shape) < 0.1,
        "is_last": rng.random(shape) < 0.1,
        "is_terminal": np.zeros(shape, bool),
        "deter": rng.normal(size=(*shape, rssm.deter)).astype(np.float16),
        "stoch": rng.integers(rssm.classes, size=(*shape, rssm.stoch)).astype(np.uint8),
    }
    for key, space in OBS.items():
        batch.setdefault(key, rng.normal(size=(*shape, *space.shape)).astype(np.float32))
    return batch


def share_noise(agent: Dreamer, rank: int, size: int) -> None:
    """Let the agent draw its part of what one agent would draw for the batches of all ranks."""
    for owner in (agent.rssm, agent.behavior.actor):
        whole = owner.noise

        def part(*shape, generator, whole=whole):
            axis = 1 if shape[0] == HORIZON else 0  # [H, N], or [B, T]
            joint = [n * size if index == axis else n for index, n in enumerate(shape)]
            drawn = whole(*joint, generator=generator)
            cut = [d.chunk(size, axis)[rank] for d in (drawn if isinstance(drawn, list) else [drawn])]
            return cut if isinstance(drawn, list) else cut[0]

        owner.noise = part


def gradients(agent: Dreamer, batch: dict, rank: int = 0, size: int = 1, updates: int = 3) -> dict:
    """The gradients that the optimiser saw, and what became of weights and return percentiles."""
    share_noise(agent, rank, size)
    names = {
        p: f"{part}.{n}"
        for part in ("world_model", "behavior")
        for n, p in getattr(agent, part).named_parameters()
    }
    seen, step = [], agent.opt.step
    agent.opt.step = lambda: seen.append({names[p]: p.grad.clone() for p in agent.trained}) or step()
    mine = {key: np.array_split(value, size)[rank] for key, value in batch.items()}
    for _ in range(updates):
        agent.rngs["train"].manual_seed(7)
        agent.train(mine)
    return {"grads": seen, "range": agent.behavior.retnorm.range, "weights": agent.weights()["world_model"]}


def test_two_ranks_have_the_gradients_of_one_with_the_joint_batch(two_ranks):
    agent = make_agent(BATCH)
    alone = gradients(agent, joint_batch(agent))
    ranks = [told["gradients"] for told in two_ranks]
    assert differences(ranks[0], ranks[1]) == []  # to the bit, weights included
    largest = 0.0
    for update, (ours, theirs) in enumerate(zip(ranks[0]["grads"], alone["grads"], strict=True)):
        assert ours.keys() == theirs.keys()
        # Later ones are of weights that rounding has moved apart: LaProp makes large steps of tiny gradients.
        close = 1e-5 if update == 0 else 1e-2
        for name in ours:
            size = float(theirs[name].abs().max())
            largest = max(largest, size)
            error = float((ours[name] - theirs[name]).abs().max())
            assert error <= close * size + 1e-8, (update, name, error, size)
    assert torch.allclose(ranks[0]["range"], alone["range"], rtol=1e-3)


# ---- Counts of several


def test_logs_and_successes_of_several_are_added_up():
    logs = [
        {"wandb": "id", "sums": {"a": 1.0, "b": 2.0}, "counts": {"a": 1, "b": 2}, "values": {"v": 5.0}},
        {"wandb": None, "sums": {"a": 3.0, "c": 4.0}, "counts": {"a": 1, "c": 1}, "values": {}},
    ]
    merged = merged_logs(logs)
    assert merged["sums"] == {"a": 4.0, "b": 2.0, "c": 4.0} and merged["counts"] == {"a": 2, "b": 2, "c": 1}
    assert merged["wandb"] == "id" and merged["values"] == {"v": 5.0}
    ours, theirs = SuccessRates("crafter"), SuccessRates("crafter")
    ours.add({"log_achievement_x": 1.0})
    for value in (0.0, 1.0, 0.0):
        theirs.add({"log_achievement_x": value})
    both = SuccessRates("crafter")
    both.load_state_dict(merged_successes([ours.state_dict(), theirs.state_dict()]))
    assert both.metrics()["crafter/success_rate/x"] == 50.0


# ---- What cannot be shared


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--parallel 3", "--batch_size 2 cannot be divided over 3 learners: take 3"),
        ("--parallel 2 --batch_size 5", "--batch_size 5 cannot be divided over 2 learners: take 4 or 6"),
        ("--parallel 2 --envs.amount 3", "--envs.amount 3 cannot be divided over 2 learners: take 2 or 4"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_anything_is_written(options, told, tmp_path, capsys):
    assert main(*TINY, *options.split(), "--logdir", str(tmp_path / "run")) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "parallel", "gpus", "environment", "place"),
    [
        ("auto", 1, 0, {}, "auto"),
        ("cuda:1", 1, 2, {}, "cuda:1"),
        ("auto", 2, 0, {}, "auto"),
        ("cpu", 2, 2, {}, "cpu"),
        ("auto", 2, 2, {}, "cuda:0"),
        ("cuda", 2, 2, {"WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2, "LOCAL_RANK": 1}, None),
        ("cuda", 1, 2, {"WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2, "LOCAL_RANK": 1}, "cuda:1"),
        ("auto", 4, 2, {}, "take --parallel 2, or --device cpu"),
        ("cuda", 2, 0, {}, "2 learners on this machine need 2 GPUs, and it has 0: take --device cpu"),
        ("cuda:1", 2, 2, {}, "names one GPU for 2 learners"),
    ],
)
def test_each_learner_has_a_gpu_of_its_own(name, parallel, gpus, environment, place, monkeypatch):
    for key, value in environment.items():
        monkeypatch.setenv(key, str(value))
    if place is None or " " in place:
        with pytest.raises(UserError, match=place or "take --parallel 1"):
            distributed.place(name, parallel, gpus)
    else:
        assert distributed.place(name, parallel, gpus) == place


def test_several_learners_need_to_know_of_each_other(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="RANK, MASTER_ADDR, MASTER_PORT is not set"):
        distributed.join(torch.device("cpu"))


def ending(what: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-S", "-c", f"import os, signal, sys, time; {what}"])


LOST = f"sys.exit({distributed.LOST})"
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
TERM = "signal.signal(15, signal.SIG_DFL); os.kill(os.getpid(), signal.SIGTERM)"


@pytest.mark.parametrize(
    ("ends", "passed", "code", "told"),
    [
        (("sys.exit(0)", "sys.exit(0)"), [], 0, ""),
        ((LOST, f"time.sleep(0.3); {KILL}"), [], 2, "Learner 1 was ended by SIGKILL"),
        ((LOST, "time.sleep(0.3); sys.exit(7)"), [], 7, ""),
        ((LOST, LOST), [], 2, "The learners have lost each other"),
        ((TERM, TERM), [signal.SIGTERM], 143, ""),  # before they could stop in order
        ((TERM, "sys.exit(0)"), [], 2, "Learner 0 was ended by SIGTERM"),
        (("sys.exit(143)", "time.sleep(0.5); sys.exit(143)"), [signal.SIGTERM], 143, ""),
    ],
)  # fmt: skip
def test_the_launcher_tells_why_the_learners_ended(ends, passed, code, told, capfd):
    ranks = [ending(what) for what in ends]
    assert distributed._wait(ranks, passed) == code
    assert all(process.poll() is not None for process in ranks)
    err = capfd.readouterr().err
    assert told in err and len(err.splitlines()) == bool(told)


@pytest.mark.parametrize(("passed", "whole"), [(1, True), (2, False)])
def test_learners_that_stop_in_order_are_given_the_time(passed, whole, monkeypatch):
    monkeypatch.setattr(distributed, "GRACE", 0)
    ranks = [ending("sys.exit(130)"), ending("time.sleep(1); sys.exit(130)")]
    assert distributed._wait(ranks, [signal.SIGINT] * passed) == 130
    assert (ranks[1].poll() is not None) == whole
    ranks[1].wait()


def test_one_learner_has_the_word(tmp_path, monkeypatch):
    assert distributed.has_the_word() and distributed.has_the_word()
    monkeypatch.setenv(distributed.WORD, str(tmp_path / "word"))
    assert distributed.has_the_word() and not distributed.has_the_word()


def test_what_advisers_count_is_added_up():
    counts = ("calls", "cost", "errors/http_429")
    assert all(is_count(f"llm_adapter/{name}") for name in counts)
    means = ("llm_adapter/latency_ms", "llm_adapter/breaker", "synthetic/calls")
    assert not any(is_count(name) for name in means)


# ---- Folders that they share


class Threads(Ranks):
    """A learner in a thread, which can wait for the others."""

    def __init__(self, rank: int, barrier: threading.Barrier):
        super().__init__(barrier.parties)
        self.rank, self.wait = rank, barrier.wait


def test_no_learner_clears_the_ring_of_another(tmp_path, monkeypatch):
    barrier, config = threading.Barrier(2, timeout=30), configs.load(TINY)

    def make(space, envs, *args, folder, **options):
        if folder.name == dreamer.REPLAY_RING:
            time.sleep(0.3)  # the first is late
        return Replay(space, envs, *args, folder=folder, **options)

    monkeypatch.setattr(dreamer, "Replay", make)
    plan = replays.Plan(100, "memmap", 0, "")

    def make_replay(rank: int) -> Replay:
        run = SimpleNamespace(config=config, ranks=Threads(rank, barrier), logdir=tmp_path, envs=[None])
        run._own = lambda folder: dreamer.Run._own(run, folder)
        run._parts, run.sampler = contextlib.ExitStack(), ThreadPoolExecutor(1)
        return dreamer.Run._make_replay(run, {**OBS, "action": gymnasium.spaces.Discrete(4)}, plan, {})

    with ThreadPoolExecutor(2) as pool:
        rings = [replay.ring for replay in pool.map(make_replay, range(2))]
    for folder, ring in zip(("", "rank-1"), rings, strict=True):
        assert len(list((tmp_path / "replay_ring" / folder).glob("*.bin"))) == len(ring)


def test_notes_of_other_learners_reach_the_log_once():
    barrier, printed, board = threading.Barrier(2, timeout=30), [], [None, None]
    said = [["ours", "both"], ["both", "theirs", "theirs"]]

    def gather(rank: int) -> None:
        ranks = Threads(rank, barrier)

        def collect(value):
            board[rank] = value
            barrier.wait()
            return board

        ranks.collect = collect
        logger = Collector() if rank else SimpleNamespace(note=printed.append, take_notes=list)
        tell = logger.print if rank else printed.append
        run = SimpleNamespace(ranks=ranks, logger=logger, print=tell, _noted=set(), envs=None)
        run.hooks = SimpleNamespace(notes=lambda: said[rank])
        run._note = lambda line: dreamer.Run._note(run, line)
        dreamer.Run._print_notes(run)
        dreamer.Run._gather_notes(run)
        if rank:
            logger.close()  # it listens to the log of the whole process

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(gather, range(2)))
    assert printed == ["ours", "both", "Learner 1: theirs"]


def test_a_broken_file_moves_no_episode_to_another_learner(tmp_path):
    spaces = {"is_first": ((), np.bool_), "is_last": ((), np.bool_), "is_terminal": ((), np.bool_)}
    writer = EpisodeWriter(tmp_path, spaces, 1)
    for _ in range(6):
        for t in range(3):
            flags = {"is_first": t == 0, "is_last": t == 2, "is_terminal": False}
            writer.add({key: np.array([flag]) for key, flag in flags.items()})
    writer.flush()
    files = sorted(tmp_path.glob("*.npz"))
    files[2].write_bytes(b"broken")

    def load(part: int) -> list[str]:
        sizes = {"deter_size": 1, "stoch_size": 1, "classes": 2}
        replay = Replay(spaces, 1, 100, 2, 1, 0, **sizes, writer=writer)
        replay.load_episodes(part, 2)
        return [name for name, _ in replay.segments[0]]

    names = [path.name.rpartition("-")[0] for path in files]
    assert load(0) == [names[0], names[4]]  # and not the second of the other's
    writer.close()


def test_the_commands_of_the_guide_are_understood():
    lines = (ROOT / "docs" / "learners.md").read_text().splitlines()
    found = [shlex.split(line) for line in lines if line.startswith("    ")]
    assert [command[0] for command in found] == ["python3", "torchrun"]
    alone, several = found
    assert alone[1] == "dreamer.py" and configs.load(alone[2:]).parallel == 4
    args = get_args_parser().parse_args(several[1:])
    assert args.training_script == "dreamer.py" and (args.nnodes, args.nproc_per_node) == ("2", "4")
    assert configs.load(args.training_script_args).parallel == 1


# ---- Whole runs


def run(logdir: Path, *options: str, wait: bool = True) -> subprocess.Popen:
    """The tiny run with two learners, in processes of its own."""
    command = [sys.executable, "dreamer.py", *TINY, "--parallel", "2", "--logdir", str(logdir), *options]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if wait:
        process.out, process.err = process.communicate(timeout=300)
    return process


def until_logged(logdir: Path, text: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not ((logdir / "train.log").exists() and text in log(logdir)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def first_images(logdir: Path) -> set[str]:
    found = set()
    for path in (logdir / "train_eps").glob("*.npz"):
        with np.load(path) as episode:
            found.add(hashlib.sha256(episode["image"][0].tobytes()).hexdigest())
    return found


def test_two_learners_train_as_one_run(tmp_path):
    process = run(tmp_path / "two", "--eval_every", "0", "--envs.amount", "4")
    assert process.returncode == 0, process.err
    assert "parameters, shared by 2 learners; presets" in log(tmp_path / "two")
    assert main(*TINY, "--logdir", str(tmp_path / "one"), "--eval_every", "0", "--envs.amount", "4") == 0
    ours, theirs = metrics(tmp_path / "two"), metrics(tmp_path / "one")
    for name in ("step", "replay/size", "opt/updates"):  # what all do together is counted as if one did it
        assert [line[name] for line in ours] == [line[name] for line in theirs]
    assert len(list((tmp_path / "two" / "train_eps").glob("*.npz"))) == 4  # an episode of each env
    assert ours[-1]["opt/updates"] > 10 and np.isfinite(ours[-1]["loss/policy"])
    state = checkpoints.load_checkpoint(tmp_path / "two")[0]
    assert len(state["moments"]) == 2 and state["transitions"] == state["step"] == 120


@pytest.mark.slow
def test_resumed_run_of_two_learners_equals_uninterrupted_run(tmp_path):
    assert run(tmp_path / "whole").returncode == 0
    assert run(tmp_path / "stopped", "--steps", "70").returncode == 0
    assert run(tmp_path / "stopped").returncode == 0
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    others = [own_moment(tmp_path / name) for name in ("whole", "stopped")]
    assert differences(*others) == []
    assert differences(others[0]["agent"]["rngs"], moment(tmp_path / "whole")["agent"]["rngs"]) != []


def own_moment(logdir: Path) -> dict:
    """What the second learner wrote of its own, without names of files."""
    state = checkpoints.load_checkpoint(logdir)[0]
    place = logdir / "replay_state" / f"step-{state['step']:012d}" / "rank-1"
    own = checkpoints.load_tensors(place / state["moments"][1] / "own.pt")
    for name in ("moment", "tick", "open", "streams"):
        del own["replay"][name]
    return own


@pytest.mark.slow
def test_another_number_of_learners_goes_on_with_the_same_episodes(tmp_path):
    assert run(tmp_path, "--steps", "60").returncode == 0
    steps = sum_of_steps(tmp_path)
    assert main(*TINY, "--logdir", str(tmp_path), "--steps", "80") == 0
    assert "The run had 2 learners and now has 1" in log(tmp_path)
    assert f"Resumed at step 60 with {steps} steps in the replay" in log(tmp_path)
    assert checkpoints.load_checkpoint(tmp_path)[0]["step"] == 80
    steps = sum_of_steps(tmp_path)
    assert run(tmp_path, "--steps", "120").returncode == 0
    assert "The run had 1 learners and now has 2" in log(tmp_path)
    assert f"Resumed at step 80 with {steps} steps in the replay" in log(tmp_path)


@pytest.mark.slow
def test_with_other_envs_the_learners_divide_the_episodes(tmp_path):
    assert run(tmp_path, "--steps", "60").returncode == 0
    steps = sum_of_steps(tmp_path)
    assert run(tmp_path, "--steps", "64", "--envs.amount", "4").returncode == 0
    assert f"Resumed at step 60 with {steps} steps in the replay" in log(tmp_path)


@pytest.mark.slow
def test_what_fails_for_all_learners_is_told_once(tmp_path):
    options = "--opt.lr 1e30 --opt.warmup 0 --opt.agc 0 --max_nonfinite 2 --steps 1000".split()
    process = run(tmp_path, *options)
    assert process.returncode == 2
    assert process.err.count("The gradient was not finite") == 1 and len(process.err.splitlines()) == 1


def sum_of_steps(logdir: Path) -> int:
    """Steps that the last checkpoint's replay holds: of the episodes' files and of the open ones."""
    files = sum(int(path.stem.split("-")[-1]) for path in (logdir / "train_eps").glob("*.npz"))
    place = logdir / "replay_state" / f"step-{checkpoints.load_checkpoint(logdir)[0]['step']:012d}"
    for path in place.rglob("open-*.npz"):
        with np.load(path) as rows:
            files += len(rows["is_first"])
    return files


@pytest.mark.slow
def test_a_stop_reaches_all_learners_and_the_run_goes_on(tmp_path):
    process = run(tmp_path, "--steps", "100000", wait=False)
    until_logged(tmp_path, "step 60/", process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143 and err == ""
    step = checkpoints.load_checkpoint(tmp_path)[0]["step"]
    assert f"Saved {tmp_path / 'latest.pt'} at step {step}" in log(tmp_path)
    assert run(tmp_path, "--steps", str(step + 20)).returncode == 0
    assert f"Resumed at step {step} " in log(tmp_path) and "filled anew" not in log(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_learner_ends_the_run_in_one_line_and_it_goes_on_from_the_last_checkpoint(lost, tmp_path):
    process = run(tmp_path, "--steps", "100000", "--save_every", "40", wait=False)
    until_logged(tmp_path, "at step 40", process)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    ranks = {
        Path(f"/proc/{pid}/environ").read_text().split("\0LOCAL_RANK=")[1][0]: int(pid) for pid in children
    }
    os.kill(ranks[str(lost)], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert err.strip().splitlines() == [
        f"error: Learner {lost} was ended by SIGKILL. The same command goes on from the last checkpoint."
    ]
    step = checkpoints.load_checkpoint(tmp_path)[0]["step"]
    assert step >= 40
    assert run(tmp_path, "--steps", str(step + 20)).returncode == 0
    assert f"Resumed at step {step} " in log(tmp_path) and "filled anew" not in log(tmp_path)


@pytest.mark.slow
def test_learners_whose_launcher_is_killed_save_and_end(tmp_path):
    process = run(tmp_path, "--steps", "100000", wait=False)
    until_logged(tmp_path, "step 60/", process)
    process.kill()
    deadline = time.monotonic() + 60
    while "Saved" not in log(tmp_path) or (tmp_path / "run.lock").exists():  # it goes with the first learner
        assert time.monotonic() < deadline
        time.sleep(0.05)
    step = checkpoints.load_checkpoint(tmp_path)[0]["step"]
    assert run(tmp_path, "--steps", str(step + 20)).returncode == 0
    assert f"Resumed at step {step} " in log(tmp_path) and "filled anew" not in log(tmp_path)


def torchrun(logdir: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", *arguments, "dreamer.py", *TINY]
    return subprocess.Popen(
        [*command, "--logdir", str(logdir)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.slow
def test_torchrun_trains_as_parallel_does(tmp_path):
    assert run(tmp_path / "parallel").returncode == 0
    process = torchrun(tmp_path / "one", "--standalone", "--nproc-per-node", "2")
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    port = free_port()
    nodes = [  # two machines with a learner each
        torchrun(tmp_path / "two", "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(node),
                 "--master-addr", "127.0.0.1", "--master-port", str(port))
        for node in range(2)
    ]  # fmt: skip
    for process in nodes:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out
    for name in ("one", "two"):
        assert_same_run(tmp_path / "parallel", tmp_path / name)


@pytest.mark.slow
def test_two_learners_take_advice(tmp_path):
    advice = "--configs lore_prior --llm.enabled True --synthetic.enabled True --llm.backend rules".split()
    doorkey = "--configs debug doorkey --prefill 64 --steps 400 --envs.amount 2 --envs.eval_amount 1".split()
    process = subprocess.run(
        [sys.executable, "dreamer.py", *doorkey, *advice, "--eval_every", "100", "--parallel", "2",
         "--device", "cpu", "--logdir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    last, state = metrics(tmp_path)[-1], checkpoints.load_checkpoint(tmp_path)[0]
    assert last["uncertainty_gate/advised_share"] > 0
    place = tmp_path / "replay_state" / f"step-{state['step']:012d}" / "rank-1"
    other = checkpoints.load_tensors(place / state["moments"][1] / "own.pt")
    asked = [own["hooks"]["service"]["totals"]["questions"] for own in (state, other)]
    assert last["step"] == state["step"] and last["llm_adapter/questions"] == sum(asked) > max(asked)
