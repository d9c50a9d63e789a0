"""Several learners: equal gradients, whole runs, stops, losses, resumes. Processes talk over gloo."""

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

import gymnasium
import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from run_helpers import ROOT, TINY, assert_same_run, differences, log, main, metrics
from test_models import OBS
from torch.distributed.run import get_args_parser

import checkpoint as checkpoints
import config as configs
import distributed
from agent import Dreamer
from basics import UserError
from episodes import EpisodeWriter
from models import ReturnNorm
from replay import Replay

BATCH, LENGTH, HORIZON, ACTIONS = 4, 5, 3, 4


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def as_rank(index: int, size: int, port: int, folder: Path) -> None:
    """Do the `work` of one of `size` processes."""
    os.environ |= {"RANK": str(index), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with distributed.joined(torch.device("cpu")):
        work(folder)


def work(folder: Path) -> None:
    rank, agent = distributed.rank(), make_agent(BATCH)
    seen = gradients(agent, joint_batch(agent), rank, distributed.world_size())
    torch.save({"exchanged": exchange(rank), "gradients": seen}, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict]:
    """The results of `work` in each of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(as_rank, (2, free_port(), folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


# ---- What they exchange


def exchange(rank: int) -> dict:
    tensors = [torch.full((2, 3), float(rank)), torch.tensor(4.0 * rank)]
    distributed.all_reduce(tensors)
    distributed.all_reduce([])
    own = torch.full((2,), float(rank))
    distributed.broadcast([own])
    result = {
        "all_reduce": [tensor.tolist() for tensor in tensors],
        "broadcast": own.tolist(),
        "all_gather": distributed.all_gather(torch.arange(2.0) + 10 * rank).tolist(),
        "total": distributed.total(1, rank),
        "any_rank": [distributed.any_rank(rank == 1), distributed.any_rank(False)],
        "broadcast_object": distributed.broadcast_object({"rank": rank}),
        "all_gather_object": distributed.all_gather_object(rank),
    }
    norm = ReturnNorm(rate=1.0, limit=1.0, low=0.0, high=100.0)
    norm.update(torch.tensor([1.0, 2.0]) + 10 * rank)
    result["range"] = norm.range.tolist()
    return result


def test_ranks_exchange_what_they_should(two_ranks):
    for told in two_ranks:
        assert told["exchanged"] == {
            "all_reduce": [[[0.5] * 3] * 2, 2.0],
            "broadcast": [0.0, 0.0],
            "all_gather": [0.0, 1.0, 10.0, 11.0],
            "total": [2, 1],
            "any_rank": [True, False],
            "broadcast_object": {"rank": 0},
            "all_gather_object": [0, 1],
            "range": [1.0, 12.0],  # percentiles of the returns of both
        }


# ---- Gradients


def make_agent(batch_size: int) -> Dreamer:
    argv = f"--configs debug dummy_cue --batch_size {batch_size} --batch_length {LENGTH}".split()
    argv += f"--imag_horizon {HORIZON} --precision float32 --opt.warmup 0 --opt.lr 1e-2".split()
    space = {"action": gymnasium.spaces.Discrete(ACTIONS)}
    agent = Dreamer(OBS, space, configs.load(argv), torch.device("cpu"))
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


# ---- The command line


@pytest.mark.parametrize(
    ("parallel", "totals", "expected"),
    [(1, (3, 5), (3, 5)), (2, (4, 6), (4, 6)), (4, (1, 16), (4, 16)), (3, (4, 2), (6, 3))],
)
def test_totals_are_raised_to_a_multiple_of_the_learners(parallel, totals, expected):
    command = [*TINY, "--envs.amount", str(totals[0]), "--batch_size", str(totals[1])]
    config, lines = distributed.divisible(configs.load([*command, "--parallel", str(parallel)]))
    assert (config.envs.amount, config.batch_size) == expected
    assert len(lines) == sum(a != b for a, b in zip(totals, expected, strict=True))
    if parallel == 4:
        assert lines == ["--envs.amount 1 is raised to 4, a multiple of the 4 learners"]


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
        ("cuda:1", 2, 2, {}, "is one GPU for 2 learners"),
    ],
)
def test_each_learner_has_its_own_gpu(name, parallel, gpus, environment, place, monkeypatch):
    for key, value in environment.items():
        monkeypatch.setenv(key, str(value))
    if place is None or " " in place:
        with pytest.raises(UserError, match=place or "take --parallel 1"):
            distributed.local_device(name, parallel, gpus)
    else:
        assert distributed.local_device(name, parallel, gpus) == place


def test_missing_environment_variables_are_reported(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="RANK, MASTER_ADDR, MASTER_PORT is not set"):
        with distributed.joined(torch.device("cpu")):
            pass


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
def test_launcher_reports_why_the_learners_ended(ends, passed, code, told, capfd):
    ranks = [ending(what) for what in ends]
    assert distributed._wait(ranks, passed) == code
    assert all(process.poll() is not None for process in ranks)
    err = capfd.readouterr().err
    assert told in err and len(err.splitlines()) == bool(told)


@pytest.mark.parametrize(("passed", "seconds"), [(1, 1), (2, 3600)])
def test_launcher_waits_for_a_clean_stop_until_the_second_signal(passed, seconds, monkeypatch):
    monkeypatch.setattr(distributed, "GRACE_SECONDS", 0)
    ranks = [ending("sys.exit(130)"), ending(f"time.sleep({seconds}); sys.exit(130)")]
    assert distributed._wait(ranks, [signal.SIGINT] * passed) == 130
    assert (ranks[1].poll() is not None) == (passed == 1)
    ranks[1].kill()
    ranks[1].wait()


def test_one_learner_reports_errors(tmp_path, monkeypatch):
    assert distributed.reports_errors() and distributed.reports_errors()
    monkeypatch.setenv(distributed.REPORTED, str(tmp_path / "word"))
    assert distributed.reports_errors() and not distributed.reports_errors()


# ---- Folders that they share


class Threads:
    """Two learners as threads of this process, which exchange objects as ranks do."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.own, self.board = threading.local(), [None, None]
        self.barrier = threading.Barrier(2, timeout=60)
        for name in ("world_size", "rank", "total", "broadcast_object", "all_gather_object", "broadcast"):
            patch.setattr(distributed, name, getattr(self, name))

    def together(self, act, items) -> list:
        """Call `act(item)` in both threads, each with its own of two items."""

        def call(rank: int, item):
            self.own.rank = rank
            return act(item)

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(call, range(2), items))

    def world_size(self) -> int:
        return 2

    def rank(self) -> int:
        return self.own.rank

    def all_gather_object(self, value):
        self.board[self.rank()] = value
        self.barrier.wait()
        values = list(self.board)
        self.barrier.wait()
        return values

    def total(self, *counts):
        return [sum(column) for column in zip(*self.all_gather_object(counts), strict=True)]

    def broadcast_object(self, value):
        return self.all_gather_object(value)[0]

    def broadcast(self, tensors):
        for mine, first in zip(tensors, self.broadcast_object(tensors), strict=True):
            mine.copy_(first)
        self.barrier.wait()


def test_a_broken_file_does_not_change_which_learner_loads_an_episode(tmp_path):
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


def test_the_torchrun_command_of_the_guide_is_understood():
    lines = (ROOT / "docs" / "scaling.md").read_text().splitlines()
    (command,) = (shlex.split(line) for line in lines if line.startswith("torchrun "))
    args = get_args_parser().parse_args(command[1:])
    assert args.training_script == "dreamer.py" and (args.nnodes, args.nproc_per_node) == ("2", "4")
    assert configs.load(args.training_script_args).parallel == 1


# ---- Whole runs


def start(logdir: Path, *options: str, launcher: tuple[str, ...] = ("dreamer.py",)) -> subprocess.Popen:
    """The tiny run with two learners in processes."""
    command = [sys.executable, *launcher, *TINY, "--logdir", str(logdir), *options]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def run(logdir: Path, *options: str, code: int = 0) -> str:
    """Train to the end; what it wrote to the standard error."""
    process = start(logdir, "--parallel", "2", *options)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == code, errors
    return errors


def until_logged(logdir: Path, text: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not ((logdir / "train.log").exists() and text in log(logdir)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def assert_resumes(logdir: Path) -> None:
    """The run resumes from its last checkpoint, and each learner finds episodes for its replay."""
    step = checkpoints.load_checkpoint(logdir)[0]["step"]
    run(logdir, "--steps", str(step + 20))
    assert f"Resumed at step {step} with" in log(logdir)
    assert checkpoints.load_checkpoint(logdir)[0]["step"] >= step + 20


@pytest.mark.slow
def test_two_learners_train_as_one_run_and_resume(tmp_path):
    options = ("--eval_every", "0", "--envs.amount", "4")
    run(tmp_path / "two", *options)
    assert "parameters, shared by 2 learners; presets" in log(tmp_path / "two")
    assert main(*TINY, "--logdir", str(tmp_path / "one"), *options) == 0
    ours, theirs = metrics(tmp_path / "two"), metrics(tmp_path / "one")
    for name in ("step", "replay/size", "opt/updates"):  # counted over all learners
        assert [line[name] for line in ours] == [line[name] for line in theirs]
    assert len(list((tmp_path / "two" / "train_eps").glob("*.npz"))) == 4  # an episode of each env
    assert ours[-1]["opt/updates"] > 10 and np.isfinite(ours[-1]["loss/policy"])
    progress = checkpoints.load_checkpoint(tmp_path / "two")[0]["progress"]
    assert progress["transitions"] == progress["step"] == 120
    assert progress["success"]["episodes"] == 4
    assert_resumes(tmp_path / "two")


@pytest.mark.slow
def test_the_command_of_the_readme_trains_with_one_env_a_learner(tmp_path):
    text = (ROOT / "README.md").read_text()
    (command,) = [
        shlex.split(line) for line in text.splitlines() if "--parallel" in line and "python3" in line
    ]
    assert command[:4] == "python3 dreamer.py --configs crafter".split()
    configs_end = command.index("--parallel")
    command[configs_end:configs_end] = ["debug"]
    command[command.index("--logdir") + 1] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, *command[1:], "--device", "cpu", "--steps", "80"],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--envs.amount 1 is raised to 4, a multiple of the 4 learners" in log(tmp_path)
    assert checkpoints.load_checkpoint(tmp_path)[0]["step"] >= 80


@pytest.mark.slow
def test_an_error_of_all_learners_is_reported_once(tmp_path):
    options = "--opt.lr 1e30 --opt.warmup 0 --opt.agc 0 --steps 1000".split()
    errors = run(tmp_path, *options, code=2)
    assert errors.count("The gradient was not finite") == 1 and len(errors.splitlines()) == 1


@pytest.mark.slow
def test_a_signal_stops_all_learners_and_the_run_resumes(tmp_path):
    process = start(tmp_path, "--parallel", "2", "--steps", "100000")
    until_logged(tmp_path, "step 60/", process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 143 and errors == ""
    assert_resumes(tmp_path)


@pytest.mark.slow
def test_a_killed_learner_ends_the_run_in_one_line_and_it_resumes(tmp_path):
    process = start(tmp_path, "--parallel", "2", "--steps", "100000", "--save_every", "40")
    until_logged(tmp_path, "at step 40", process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    ranks = {
        Path(f"/proc/{pid}/environ").read_text().split("\0LOCAL_RANK=")[1][0]: int(pid)
        for pid in children.stdout.split()
    }
    os.kill(ranks["1"], signal.SIGKILL)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 2
    assert errors.strip().splitlines() == [
        "error: Learner 1 was ended by SIGKILL. The same command resumes from the last checkpoint."
    ]
    assert_resumes(tmp_path)


@pytest.mark.slow
def test_learners_whose_launcher_is_killed_save_and_end(tmp_path):
    process = start(tmp_path, "--parallel", "2", "--steps", "100000")
    until_logged(tmp_path, "step 60/", process)
    process.kill()
    deadline = time.monotonic() + 300
    while "Saved" not in log(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert_resumes(tmp_path)


@pytest.mark.slow
def test_torchrun_on_one_or_two_machines_trains_as_parallel_does(tmp_path):
    run(tmp_path / "parallel")
    torchrun = ("-m", "torch.distributed.run")
    shared = ("--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(free_port()))
    processes = [
        start(tmp_path / "one", launcher=(*torchrun, *"--standalone --nproc-per-node 2 dreamer.py".split()))
    ]
    processes += [
        start(
            tmp_path / "two",
            launcher=(*torchrun, "--nnodes", "2", "--node-rank", node, *shared, "dreamer.py"),
        )
        for node in ("0", "1")
    ]
    for process in processes:
        out, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
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
    assert last["uncertainty_gate/advised_share"] > 0 and last["step"] == state["step"]
    assert last["llm_adapter/questions"] > state["hooks"]["service"]["totals"]["questions"] > 0  # of both
