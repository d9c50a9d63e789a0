"""sweep.py: the grid, the summary and the scripts. Ray has a stand-in here; test_sweep_ray.py has it."""

import csv
import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
from rich.console import Console
from run_helpers import TINY

import basics
import config
import sweep
from sweep import FAILED, FINISHED, RUNNING, STOPPED, WAITING

posix = pytest.mark.skipif(os.name == "nt", reason="needs signals and a shell of POSIX")


def runs_of(tmp_path, *grid: str, options=("--steps", "100")):
    return sweep.plan(sweep.read_grid(grid), ["debug", "dummy_cue"], list(options), tmp_path)


def main(tmp_path, *words: str) -> int:
    return sweep.main([*TINY, "--logdir", str(tmp_path), *words])


def fake_checkpoint(place: Path, step: int) -> None:
    (place / "checkpoints").mkdir(parents=True, exist_ok=True)
    (place / "checkpoints" / f"step-{step:012d}.pt").touch()


def read_summary(folder: Path) -> list[dict]:
    with open(folder / "summary.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# The grid


def test_the_grid_is_the_product_of_its_options(tmp_path):
    runs = runs_of(tmp_path, "seed=0,1,2", "configs=none,lore_prior")
    assert [run.choice for run in runs] == [
        {"seed": seed, "configs": preset} for seed in "012" for preset in ("none", "lore_prior")
    ]
    assert len({run.place for run in runs}) == 6
    for run in runs:
        loaded = config.load(run.options)
        assert loaded.seed == int(run.choice["seed"]) and loaded.logdir == str(run.place)
        assert loaded.prior.enabled == (run.choice["configs"] == "lore_prior")
        assert loaded.presets[:1] == ["dummy_cue"] and loaded.presets[-1] == "debug"
        assert run.total_steps == 100


def test_values_may_be_lists_and_several_presets(tmp_path):
    runs = runs_of(tmp_path, "size=48 48,64 64", "configs=lore_prior size1m")
    assert [config.load(run.options).size for run in runs] == [[48, 48], [64, 64]]
    assert config.load(runs[0].options).presets == ["dummy_cue", "lore_prior", "debug", "size1m"]
    assert [run.name for run in runs] == [f"size={n}-{n},configs=lore_prior-size1m" for n in (48, 64)]


def test_the_grid_wins_over_options_of_all_runs(tmp_path):
    (run,) = runs_of(tmp_path, "steps=200")
    assert run.total_steps == config.load(run.options).steps == 200


def test_without_a_grid_there_is_one_run(tmp_path):
    (run,) = runs_of(tmp_path)
    assert run.name == "run" and run.choice == {}


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--grid", "seed"], r"seed: write NAME=VALUE,VALUE"),
        (["--grid", "seed=0,"], r"seed=0,: write NAME=VALUE,VALUE"),
        (["--grid", "seed=0", "seed=1"], "seed stands twice"),
        (["--grid", "seed=0,0"], "two runs have the name seed=0"),
        (["--grid", f"traindir=a,{'b' * 300}"], "longer than 200 bytes"),
        (["--grid", f"traindir=a,{'長' * 100}"], "longer than 200 bytes"),
        (["--grid", "logdir=a,b"], "folder of its own"),
        (["--grid", "seed=0,x"], r"run seed=x: --seed x: must be a whole number"),
        (["--grid", "configs=lore_prior,lore_prio"], "run configs=lore_prio: .*nearest is lore_prior"),
        (["--grid", "beta_maxx=1"], r"run beta_maxx=1: .*nearest is --prior.beta_max"),
        (["--grid", "seed=0,1", "--stepps", "5"], r"--stepps is not an option; the nearest is --steps"),
        (
            ["--grid", "eval_episodes=1,3", "--envs.eval_amount", "2"],
            "run eval_episodes=1: .*must be a multiple",
        ),
        (["--cpus", "0"], "0 is not a whole number from 1 on"),
        (["--gpus", "x"], "x is not a number from 0 on"),
        (["--retries", "1.5"], "1.5 is not a whole number from 0 on"),
        (["--slurm", "--gpus", "0.5"], "has whole GPUs"),
        (["--dry_run", "--slurm"], "not allowed with"),
        (["--print_config"], "of one run"),
    ],
)
def test_a_mistake_in_one_cell_ends_the_sweep_in_one_line(words, reason, tmp_path, capsys):
    folder = tmp_path / "sweep"
    assert main(folder, *words) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(reason, error), error
    assert not folder.exists()


def test_logdir_is_needed(capsys):
    assert sweep.main(["--grid", "seed=0"]) == 2
    assert "--logdir" in capsys.readouterr().err


def test_a_checkpoint_of_another_run_needs_presets(tmp_path, capsys):
    assert sweep.main(["--from_checkpoint", "a.pt", "--logdir", str(tmp_path)]) == 2
    assert "needs --configs" in capsys.readouterr().err


def test_what_a_resumed_run_cannot_change_is_found_before_any_begins(tmp_path, capsys):
    (run,) = runs_of(tmp_path, "seed=0")
    config.load(run.options).save(run.place / "config.yaml")
    assert runs_of(
        tmp_path, "seed=0", options=["--rssm.deter", "8"]
    )  # there is no checkpoint: it starts anew
    fake_checkpoint(run.place, 50)
    with pytest.raises(basics.UserError, match="run seed=0: Cannot resume with rssm.deter"):
        runs_of(tmp_path, "seed=0", options=["--rssm.deter", "8"])


# Commands and scripts


def test_dry_run_prints_the_commands_and_does_nothing(tmp_path, capsys):
    folder = tmp_path / "with space"
    assert main(folder, "--grid", "seed=0,1", "size=16 16", "--encoder.mlp_keys", "a|b (c)", "--dry_run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and not folder.exists()
    for seed, line in enumerate(lines):
        python, program, *options = shlex.split(line)
        assert python == sys.executable and (sweep.ROOT / program).name == "dreamer.py"
        loaded = config.load(options)
        assert loaded.seed == seed and loaded.encoder.mlp_keys == "a|b (c)"
        assert loaded.logdir == str(folder / f"seed={seed},size=16-16")


def test_commands_work_from_other_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (run,) = runs_of(Path("runs"), "seed=0")
    assert Path(run.command()[1]).is_absolute() and Path(run.command()[1]).is_file()


@posix
def test_the_slurm_script_runs_the_command_of_its_index(tmp_path, capsys):
    """Bash runs it here, with a printing program as Python; tests cannot have Slurm."""
    folder = tmp_path / "my sweep"
    assert main(folder, "--grid", "seed=0,1,2", "--slurm", "--cpus", "4", "--gpus", "1") == 0
    script = folder / "sweep.sbatch"
    assert capsys.readouterr().out == f"sbatch '{script}'\n"
    text = script.read_text()
    for line in ("--array=0-2", "--cpus-per-task=4", "--gres=gpu:1", "--requeue", "--signal=B:TERM@300"):
        assert f"#SBATCH {line}\n" in text
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    script.write_text(text.replace(f"exec {sys.executable}", "pwd; exec printf '%s\\n'"))
    for index in range(3):
        env = {**os.environ, "SLURM_ARRAY_TASK_ID": str(index)}
        out = subprocess.run(
            ["bash", script], env=env, capture_output=True, text=True, cwd=tmp_path, check=True
        )
        folder, program, *options = out.stdout.splitlines()
        assert Path(folder) == Path.cwd() and (Path.cwd() / program).is_file()
        assert config.load(options).seed == index
    done = subprocess.run(
        ["bash", script], env={**os.environ, "SLURM_ARRAY_TASK_ID": "3"}, capture_output=True
    )
    assert done.returncode == 2 and b"no run 3" in done.stderr


def test_no_gpu_is_asked_of_slurm_where_none_is_named(tmp_path):
    text = sweep.slurm_script(runs_of(tmp_path, "seed=0"), tmp_path, 1, None)
    assert "--gres" not in text


# The summary


def test_measures_are_the_last_and_the_best_returns():
    lines = [
        {"step": 10, "env/episode_return": 1.0},
        {"step": 20, "env/episode_return": 3.0, "eval/episode_return": -2.0},
        {"step": 30, "env/episode_return": 2.0, "eval/episode_return": float("nan")},
    ]
    raw = [json.dumps(line).encode() for line in lines] + [b'{"step": 40, "env/ep']
    found = sweep.measures(raw)
    assert found["step"] == 30
    assert (found["train_return"], found["best_train_return"]) == (2.0, 3.0)
    assert found["best_eval_return"] == -2.0 and found["eval_return"] != found["eval_return"]
    assert sweep.measures([]) == {}


def test_columns_of_the_summary_are_no_options():
    options = {name.rpartition(".")[2] for name in config.read().options}
    assert not options & {*sweep.BEFORE, *sweep.COLUMNS}


def test_the_summary_has_a_line_for_each_run(tmp_path):
    one, other = runs_of(tmp_path, "seed=0,1")
    one.status, one.tries, one.hours, one.machine, one.problem = FAILED, 2, 1.5, "a", 'a "quoted", line'
    other.place.mkdir(parents=True)
    (other.place / "metrics.jsonl").write_text('{"step": 60, "env/episode_return": 2.5}\n')
    sweep.write_summary(tmp_path / "summary.csv", [one, other])
    first, second = read_summary(tmp_path)
    assert first["run"] == "seed=0" and first["seed"] == "0" and first["status"] == "failed"
    assert (first["tries"], first["hours"], first["problem"]) == ("2", "1.5000", 'a "quoted", line')
    assert shlex.split(first["command"]) == one.command()
    assert (second["step"], second["train_return"], second["eval_return"]) == ("60", "2.5", "")
    assert second["total_steps"] == "100"
    again = runs_of(tmp_path, "seed=0,1,2")
    sweep.recall(tmp_path / "summary.csv", again)
    assert [(run.tries, run.hours, run.machine) for run in again] == [(2, 1.5, "a"), (0, 0, ""), (0, 0, "")]


@pytest.mark.parametrize(
    "text",
    [
        "a,b\n1,2\n",
        "run,tries,hours,machine\nseed=0,x,1,a\n",
        "run,tries,hours,machine\nseed=0,1,-1,a\n",
        "\xff",
    ],
)
def test_what_is_no_summary_is_told_so(text, tmp_path, capsys):
    (tmp_path / "summary.csv").write_bytes(text.encode("latin-1"))
    assert main(tmp_path, "--grid", "seed=0", "--summary") == 2
    assert "summary.csv is not the summary of a sweep" in capsys.readouterr().err


def test_summary_alone_tells_what_is_there(tmp_path, capsys):
    done, half, none = runs_of(tmp_path, "seed=0,1,2")
    fake_checkpoint(done.place, 120)
    fake_checkpoint(half.place, 60)
    for run in (done, half):
        config.load([*TINY, *run.options[3:]]).save(run.place / "config.yaml")
    assert main(tmp_path, "--grid", "seed=0,1,2", "--summary") == 0
    assert [(row["status"], row["step"]) for row in read_summary(tmp_path)] == [
        ("finished", "120"), ("stopped", "60"), ("waiting", "0"),
    ]  # fmt: skip
    assert "Runs: 1 stopped, 1 waiting, 1 finished" in capsys.readouterr().out


def test_a_file_where_a_run_is_to_write_is_no_run(tmp_path, capsys):
    (tmp_path / "seed=0").write_text("in the way")
    assert main(tmp_path, "--grid", "seed=0", "--summary") == 0
    (row,) = read_summary(tmp_path)
    assert (row["status"], row["step"]) == ("waiting", "0")
    assert main(tmp_path / "seed=0", "--grid", "seed=0", "--summary") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_run_that_is_given_more_steps_is_not_finished(tmp_path):
    (run,) = runs_of(tmp_path, "seed=0")
    fake_checkpoint(run.place, 100)
    assert run.finished()
    run.total_steps = 101
    assert not run.finished()


def test_the_table_shows_what_has_room_and_those_that_run_first(tmp_path):
    runs = runs_of(tmp_path, "seed=" + ",".join(map(str, range(30))))
    runs[29].status, runs[29].tries, runs[29].since = RUNNING, 1, time.monotonic() - 5400
    runs[28].status = FAILED
    screen = sweep.Screen(runs, tmp_path)
    screen.console = Console(width=120, height=14, record=True, file=open(os.devnull, "w"))
    screen.console.print(screen.table())
    text = screen.console.export_text()
    assert "1 running, 1 failed, 28 waiting" in text
    assert len(text.splitlines()) <= 14
    assert "seed=29" in text and "seed=28" in text and "seed=0 " in text and "seed=27" not in text
    assert "1.50" in text


# Tries, with a stand-in for Ray


class FakeRay(types.SimpleNamespace):
    """As much of Ray as a sweep uses: actors in threads of this process."""

    class RayError(Exception):
        pass

    exceptions = types.SimpleNamespace(RayError=RayError)

    def remote(self, **resources):
        self.resources = resources
        return lambda cls: types.SimpleNamespace(remote=lambda: FakeActor(cls()))

    def wait(self, refs, num_returns, timeout):
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and not all(ref.done.is_set() for ref in refs):
            time.sleep(0.01)
        return [ref for ref in refs if ref.done.is_set()], []

    def get(self, ref):
        assert ref.done.is_set()
        if isinstance(ref.value, Exception):
            raise ref.value
        return ref.value

    def kill(self, actor):
        actor.object.stop()


class FakeActor:
    def __init__(self, made):
        self.object = made

    def __getattr__(self, name):
        return types.SimpleNamespace(remote=lambda *args: FakeRef(getattr(self.object, name), args))


class FakeRef:
    def __init__(self, method, args):
        self.done, self.value = threading.Event(), None
        threading.Thread(target=self._call, args=(method, args), daemon=True).start()

    def _call(self, method, args):
        try:
            self.value = method(*args)
        except FakeRay.RayError as error:
            self.value = error
        self.done.set()


@pytest.fixture
def do(tmp_path, monkeypatch, capsys):
    """Sweeps with a dreamer.py of the test's instead of ours; the runs, and what was told."""
    monkeypatch.setattr(sweep, "POLL", 0.05)
    code = tmp_path / "code"
    code.mkdir()
    monkeypatch.setattr(sweep, "ROOT", code)

    def run(program: str, *grid: str, retries: int = 2, stop=()):
        (code / "dreamer.py").write_text(
            "import os, signal, sys, time, pathlib\n"
            "place = pathlib.Path(sys.argv[-1]); place.mkdir(parents=True, exist_ok=True)\n"
            "def save(step):\n"
            "    (place / 'checkpoints').mkdir(exist_ok=True)\n"
            "    (place / 'checkpoints' / f'step-{step:012d}.pt').touch()\n"
            "print('threads', os.environ['OMP_NUM_THREADS'], flush=True)\n" + program
        )
        runs = runs_of(tmp_path / "sweep", *grid)
        with sweep.Screen(runs, tmp_path / "sweep") as screen:
            resources = {"num_cpus": 3, "num_gpus": 0}
            sweep.Sweep(runs, tmp_path / "sweep", FakeRay(), resources, retries, screen).run(stop)
        return runs, capsys.readouterr().out

    return run


def test_runs_get_their_threads_and_finish(do):
    runs, out = do("save(100)", "seed=0,1")
    assert [(run.status, run.tries, run.problem) for run in runs] == [(FINISHED, 1, "")] * 2
    assert all(run.log.read_text() == "threads 3\n" for run in runs)
    assert all(run.hours > 0 and run.machine and run.finished() for run in runs)
    assert "seed=0: runs on" in out and "seed=1: finished in try 1" in out


@posix
def test_a_killed_run_is_tried_again(do, tmp_path):
    program = "first = not place.joinpath('checkpoints').exists()\nsave(40 if first else 100)\n"
    program += "if first: os.kill(os.getpid(), signal.SIGKILL)"
    (run,), out = do(program, "seed=0")
    assert (run.status, run.tries, run.failures) == (FINISHED, 2, 1)
    assert "seed=0: killed by SIGKILL; it is tried again from step 40 (1 of 2)" in out
    (row,) = read_summary(tmp_path / "sweep")
    assert (row["status"], row["tries"], row["problem"], row["step"]) == ("finished", "2", "", "100")


def test_a_run_that_always_fails_is_given_up(do):
    (run,), out = do("print('boom'); sys.exit(3)", "seed=0", retries=2)
    assert (run.status, run.tries, run.problem) == (FAILED, 3, "exit code 3: boom")
    assert out.count("tried again from the start") == 2 and "seed=0: failed: exit code 3: boom (see" in out


def test_the_users_mistake_is_not_tried_again(do):
    (bad, good), _ = do(
        "if '1' in sys.argv: save(100)\nelse: print('error: no such task'); sys.exit(2)",
        "seed=0,1",
    )
    assert (bad.status, bad.tries, bad.problem) == (FAILED, 1, "exit code 2: error: no such task")
    assert good.status == FINISHED


def test_what_ends_a_run_later_with_the_same_exit_code_is_tried_again(do):
    """An env that keeps failing, a full disk, another learner that was killed: it may be better next time."""
    program = "again = place.joinpath('config.yaml').exists()\nplace.joinpath('config.yaml').write_text('')\n"
    program += "save(100) if again else (print('error: disk full'), sys.exit(2))"
    (run,), out = do(program, "seed=0")
    assert (run.status, run.tries) == (
        FINISHED,
        2,
    ) and "exit code 2: error: disk full; it is tried again" in out
    (run,), _ = do("place.joinpath('config.yaml').write_text(''); sys.exit(2)", "seed=1", retries=1)
    assert (run.status, run.tries) == (FAILED, 2)


def test_a_dead_worker_is_a_failure_of_the_try(do, monkeypatch):
    whole, tries = sweep.Try.run, []

    def run(self, *args):
        tries.append(1)
        if len(tries) == 1:
            raise FakeRay.RayError
        return whole(self, *args)

    monkeypatch.setattr(sweep.Try, "run", run)
    (run,), out = do("save(100)", "seed=0")
    assert (run.status, run.failures) == (FINISHED, 1)
    assert "its Ray worker died (RayError); it is tried again from the start" in out


@posix
def test_a_stop_lets_the_runs_save(do, tmp_path):
    stop: list[int] = []

    def when_both_run():
        while len(list((tmp_path / "sweep").glob("*/up"))) < 2:
            time.sleep(0.01)
        stop.append(signal.SIGTERM)

    threading.Thread(target=when_both_run, daemon=True).start()
    program = "signal.signal(15, lambda *_: (save(70), sys.exit(143)))\n"
    program += "place.joinpath('up').touch()\ntime.sleep(60)"
    runs, out = do(program, "seed=0,1", stop=stop)
    assert [(run.status, run.failures, sweep.saved_step(run.place)) for run in runs] == [(STOPPED, 0, 70)] * 2
    assert "Stopping: 2 runs save and end" in out and "seed=0: stopped at step 70" in out
    assert [row["status"] for row in read_summary(tmp_path / "sweep")] == [STOPPED, STOPPED]


def test_a_run_that_is_stopped_when_all_is_done_has_finished(do):
    (run,), _ = do("save(100); sys.exit(143)", "seed=0")
    assert (run.status, run.tries, run.problem) == (FINISHED, 1, "")


def test_runs_that_wait_when_it_is_stopped_never_begin(do):
    runs, _ = do("save(100)", "seed=0", stop=[signal.SIGTERM])
    assert [(run.status, run.tries) for run in runs] == [(WAITING, 0)]


@posix
def test_a_try_waits_for_the_process_of_an_earlier_one(do, tmp_path):
    """As when only the worker was killed, and the process it had is still saving."""
    (run,) = runs_of(tmp_path / "sweep", "seed=0")
    run.log.parent.mkdir(parents=True)
    with open(run.log, "ab") as file:
        assert sweep._locked(file)
        earlier = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(1); print('saved')"], stdout=file
        )
    (run,), _ = do("save(100)", "seed=0")
    assert run.status == FINISHED and run.log.read_text() == "saved\nthreads 3\n"
    assert earlier.wait() == 0


@posix
def test_a_disk_without_locks_stops_no_try(tmp_path, monkeypatch):
    def cannot(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(sweep.fcntl, "flock", cannot)
    with open(tmp_path / "log", "ab") as file:
        assert sweep._locked(file)


@pytest.mark.parametrize(
    "lacks, reason",
    [
        ("program", "must lie at the same path"),
        ("folder", "no folder .*gone"),
        ("log", "must be on a disk that all"),
    ],
)
def test_a_machine_with_other_files_is_told(lacks, reason, tmp_path, monkeypatch):
    (tmp_path / "dreamer.py").touch()
    (tmp_path / "log").touch()
    monkeypatch.setattr(sweep, "ROOT", tmp_path / "gone" if lacks == "program" else tmp_path)
    folder, log = (
        tmp_path / ("gone" if lacks == name else end) for name, end in (("folder", "."), ("log", "log"))
    )
    code, wrong = sweep.Try().run([], str(folder), str(log), 1)
    assert code == 2 and re.search(reason, wrong), wrong
    assert not (tmp_path / "gone").exists()


def test_such_a_machine_ends_the_sweep(do, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep.Try, "run", lambda *args: (2, "node7 has no such file"))
    with pytest.raises(basics.UserError, match="node7 has no such file"):
        do("", "seed=0,1")
    assert (tmp_path / "sweep" / "summary.csv").exists()


def test_more_than_a_machine_has_is_refused():
    nodes = [{"Alive": True, "Resources": {"CPU": 8.0}}, {"Alive": False, "Resources": {"CPU": 64.0}}]
    ray = types.SimpleNamespace(nodes=lambda: nodes)
    sweep._check_room(ray, {"num_cpus": 8, "num_gpus": 0}, None)
    with pytest.raises(basics.UserError, match="--cpus 9 is too many: this machine has 8 at most"):
        sweep._check_room(ray, {"num_cpus": 9, "num_gpus": 0}, None)
    with pytest.raises(basics.UserError, match="--gpus 1 is too many: the machines of head:1 have 0"):
        sweep._check_room(ray, {"num_cpus": 1, "num_gpus": 1}, "head:1")


def test_the_program_does_not_load_torch(tmp_path):
    """It would cost seconds, and memory on the machine that starts the sweep."""
    script = "import sys, sweep; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", script], cwd=sweep.ROOT, capture_output=True, text=True)
    assert out.stdout == "False\n", out.stderr
