"""A full GPU or a full RAM ends a run with one line that says what to lower, after a save."""

import numpy as np
import pytest
import torch
from run_helpers import log, metrics, signal_at, train

import checkpoint as checkpoints
import models
import tools
from agent import Dreamer
from basics import UserError
from replay import Replay
from tools import cuda_works

GPU = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 7.79 GiB of which ..."
FULL = {
    "update on a GPU": (
        torch.OutOfMemoryError(GPU),
        "The GPU is full (CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has",
    ),
    "library on a GPU": (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        "The GPU is full (CUDA error: CUBLAS_STATUS_ALLOC_FAILED",
    ),
    "driver": (torch.AcceleratorError("CUDA error: out of memory\nA kernel"), "(CUDA error: out of memory)"),
    "torch on a CPU": (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
            "tried to allocate 40000000000000 bytes. Error code 12 (Cannot allocate memory)"
        ),
        "The RAM is full ([enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
        "memory: you tried to allocate 40000000000000 bytes. Error code 12 (Cannot allocate memory)). Lower",
    ),
    "NumPy": (
        MemoryError("Unable to allocate 728. TiB for an array with shape (100000000000000,)"),
        "The RAM is full (Unable to allocate 728. TiB for an array with shape (100000000000000,)). Lower",
    ),
    "Python": (MemoryError(), "The RAM is full (MemoryError). Lower"),
}  # fmt: skip
OPTIONS = ("--batch_size", "--batch_length", "--imag_last", "size1m")


def message(capfd) -> str:
    errors = capfd.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1 and "Traceback" not in errors
    return errors


@pytest.fixture
def full_after(monkeypatch):
    """A function that lets memory end at an update of a run, by its number from 1."""

    def spoil(error: Exception, update: int):
        whole, done = Dreamer._update, []

        def full(agent, *data):
            done.append(None)
            if len(done) == update:
                raise error
            return whole(agent, *data)

        monkeypatch.setattr(Dreamer, "_update", full)

    return spoil


@pytest.mark.parametrize("error, text", [pytest.param(*case, id=name) for name, case in FULL.items()])
def test_error_says_what_is_full_and_what_lowers_the_need(error, text):
    with pytest.raises(UserError) as caught, tools.memory_explained():
        raise error
    line = str(caught.value)
    assert text in line and "\n" not in line and all(option in line for option in OPTIONS)
    assert ("--precision bfloat16" in line) == ("GPU" in text or "CUDA" in text)
    assert ("--replay.capacity" in line) == ("RAM" in text)


def test_full_memory_in_an_update_ends_the_run_after_a_save_and_a_smaller_batch_resumes_it(
    tmp_path, capfd, full_after
):
    full_after(torch.OutOfMemoryError(GPU), 5)
    assert train(tmp_path, "--eval_every", "0") == 2
    assert "is full" in message(capfd)
    saved = checkpoints.load_checkpoint(tmp_path)[0]
    assert 30 < saved["step"] < 60 and saved["agent"]["updates"] == 4
    stored = sum(end - start for stream in saved["replay"]["streams"] for _, start, end in stream)
    assert stored == saved["progress"]["transitions"] + saved["progress"]["episodes"]
    assert train(tmp_path, "--eval_every", "0", "--batch_size", "1") == 0
    assert f"Resumed at step {saved['step']}" in log(tmp_path) and metrics(tmp_path)[-1]["step"] == 120


def test_where_even_the_save_has_no_memory_the_last_checkpoint_stays(
    tmp_path, capfd, full_after, monkeypatch
):
    with signal_at(40):
        assert train(tmp_path) == 143

    def no_memory(*_):
        raise MemoryError("Unable to allocate 9 GiB")

    full_after(MemoryError(), 10)
    monkeypatch.setattr(torch, "save", no_memory)
    capfd.readouterr()
    assert train(tmp_path) == 2
    assert "The RAM is full" in message(capfd)
    assert "could not be saved: The RAM is full (Unable to allocate 9 GiB)" in log(tmp_path)
    assert checkpoints.load_checkpoint(tmp_path)[0]["step"] == 40


def test_full_gpu_at_the_start_is_reported_before_anything_is_written(tmp_path, capfd, monkeypatch):
    def full(agent, *_):
        raise torch.OutOfMemoryError(GPU)

    monkeypatch.setattr(models.WorldModel, "to", full)
    assert train(tmp_path / "run") == 2
    assert "The GPU is full" in message(capfd)
    assert list(tmp_path.iterdir()) == []


def test_replay_that_finds_no_ram_is_explained(tmp_path, capfd, monkeypatch):
    def no_memory(*_):
        raise np._core._exceptions._ArrayMemoryError((10**9, 64), np.dtype(np.uint8))

    monkeypatch.setattr(Replay, "_allocate", no_memory)
    assert train(tmp_path) == 2
    line = message(capfd)
    assert "Unable to allocate 59.6 GiB" in line and "--replay.backend memmap" in line


def test_full_gpu_counts_as_working(monkeypatch, capfd, tmp_path):
    def full(*_, **__):
        raise torch.OutOfMemoryError(GPU)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", full)
    assert cuda_works()
    assert train(tmp_path / "run", "--device", "cuda") == 2
    assert "The GPU is full" in message(capfd)


def test_other_errors_of_torch_are_not_hidden(tmp_path, full_after):
    full_after(RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), 3)
    with pytest.raises(RuntimeError, match="must match"):
        train(tmp_path)
