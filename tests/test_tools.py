"""basics.py and tools.py: atomic files, seeds, clocks, random states, the optimiser of the reference."""

import errno
import os
import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import basics
import checkpoint as checkpoints
import tools

# ---- files


def raise_disk_full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def all_files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_atomic_write_makes_folders_and_replaces_the_old_file(tmp_path):
    path = tmp_path / "new" / "file.bin"
    basics.atomic_write(path, lambda file: file.write(b"old"))
    basics.atomic_write(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert all_files(tmp_path) == {"new/file.bin"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a bug")])
def test_atomic_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half")
        raise error

    with pytest.raises(type(error)):
        basics.atomic_write(path, write)
    assert path.read_bytes() == b"old"
    assert all_files(tmp_path) == {"file.bin"}


def test_atomic_write_changes_the_old_file_by_one_rename_only(tmp_path, monkeypatch):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "replace", raise_disk_full)
    with pytest.raises(basics.UserError):
        basics.atomic_write(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"old"
    assert all_files(tmp_path) == {"file.bin"}


def test_unwritable_folder_is_a_user_error(tmp_path):
    (tmp_path / "taken").write_text("a file where a folder is needed")
    with pytest.raises(basics.UserError, match="Cannot write"):
        basics.atomic_write(tmp_path / "taken" / "file.bin", lambda file: None)


# ---- seeds


def test_derived_seed_never_changes():
    assert basics.derive_seed(0, "train", 1) == 6133370629789370551
    assert basics.derive_seed(np.int64(0), "train", np.int32(1)) == basics.derive_seed(0, "train", 1)


@pytest.mark.parametrize("other", [(1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "a"), (0, "a", "1"), (0, "a1")])
def test_derived_seed_depends_on_seed_and_each_name(other):
    assert basics.derive_seed(0, "a", 1) != basics.derive_seed(*other)


def test_named_generators_repeat_and_differ_by_name():
    def numbers(*names):
        return basics.numpy_rng(3, *names).random(4), torch.rand(4, generator=tools.torch_rng(3, *names))

    for first, again, other in zip(numbers("a"), numbers("a"), numbers("b"), strict=True):
        assert (first == again).all() and (first != other).any()


# ---- clocks


def test_every_fires_once_for_each_multiple():
    clock = tools.Every(10)
    assert [step for step in range(0, 41, 4) if clock(step)] == [12, 20, 32, 40]


def test_every_neither_bursts_nor_skips_after_a_resume_with_another_interval():
    clock = tools.Every(10)
    clock(95)
    resumed = tools.Every(2)
    resumed.load_state_dict(clock.state_dict())
    assert [resumed(step) for step in (95, 96, 97, 98)] == [False, True, False, True]


@given(
    ratio=st.fractions(0, 5, max_denominator=64),
    strides=st.lists(st.integers(1, 9), min_size=1, max_size=60),
    stop=st.integers(0, 59),
)
def test_ratio_is_exact_on_the_long_run_over_a_resume(ratio, strides, stop):
    clock, transitions, updates = tools.Ratio(ratio), 1000, 0
    assert clock(transitions) == 0
    for index, stride in enumerate(strides):
        if index == stop:
            state = clock.state_dict()
            clock = tools.Ratio(ratio)
            clock.load_state_dict(state)
        transitions += stride
        updates += clock(transitions)
        assert updates == int(ratio * (transitions - 1000))


def test_ratio_changed_on_resume_owes_no_updates_for_the_past():
    clock = tools.Ratio(Fraction(1, 4))
    clock(0)
    clock(1002)
    resumed = tools.Ratio(2)
    resumed.load_state_dict(clock.state_dict())
    assert resumed(1002) == 0
    assert resumed(1003) == 2


# ---- random states


def draw() -> list[float]:
    return [random.random(), np.random.rand(), torch.rand(()).item(), torch.randn(3).sum().item()]


def test_random_states_survive_a_checkpoint(tmp_path):
    tools.seed_everything(5)
    np.random.randn()  # leaves one cached value, which is part of the state
    checkpoints.save_checkpoint(tmp_path, {"rng": tools.rng_state()}, step=0, keep=1)
    expected = [draw(), np.random.randn()]
    payload, _, _ = checkpoints.load_checkpoint(tmp_path)
    tools.set_rng_state(payload["rng"])
    assert [draw(), np.random.randn()] == expected


def test_seed_decides_every_global_generator():
    tools.seed_everything(1)
    first = draw()
    tools.seed_everything(1)
    assert draw() == first
    tools.seed_everything(2)
    assert not set(draw()) & set(first)


def test_determinism_makes_torch_refuse_what_cannot_be_repeated(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    try:
        tools.enable_determinism()
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


# ---- optimizer


def tiny_optimizer(values=(1.0, -2.0, 3.0), **options):
    params = [torch.nn.Parameter(torch.full((4, 3), value)) for value in values]
    return params, tools.LaProp(params, **dict(lr=0.1, warmup=3) | options)


def set_grads(params, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=rng)


def values_of(params) -> list[torch.Tensor]:
    return [param.detach().clone() for param in params]


def test_laprop_reproduces_the_reference(golden_dir):
    with np.load(golden_dir / "optimizer.npz") as golden:
        names = [key.removeprefix("param0:") for key in golden if key.startswith("param0:")]
        params = {name: torch.nn.Parameter(torch.from_numpy(golden[f"param0:{name}"])) for name in names}
        options = {key: golden[key].item() for key in ("lr", "warmup", "agc", "beta1", "beta2", "eps")}
        optimizer = tools.LaProp(params.values(), agc_floor=golden["agc_pmin"].item(), **options)
        steps = sum(key.startswith("grad") and key.endswith(f":{names[0]}") for key in golden)
        assert steps > 0
        for step in range(steps):
            for name, param in params.items():
                param.grad = torch.from_numpy(golden[f"grad{step}:{name}"])
            optimizer.step()
            moved = 0.0
            for name, param in params.items():
                expected, start = golden[f"param{step + 1}:{name}"], golden[f"param0:{name}"]
                # Parameters move by about the learning rate, far less than the files' tolerance.
                np.testing.assert_allclose(param.detach(), expected, rtol=1e-6, atol=options["lr"] * 1e-3)
                moved = max(moved, np.abs(expected - start).max())
            assert (moved > 0) == (step > 0)


def test_first_update_changes_no_parameter_and_the_rate_then_rises_linearly():
    (param,), optimizer = tiny_optimizer([1.0], agc=0.0, beta1=0.0, beta2=0.0)
    moves = []
    for _ in range(5):
        before = param.detach().clone()
        param.grad = torch.full_like(param, 7.0)
        optimizer.step()
        moves.append((before - param).max().item())
    np.testing.assert_allclose(moves, [0, 0.1 / 3, 0.2 / 3, 0.1, 0.1], atol=1e-6)


def test_gradient_is_clipped_to_a_share_of_its_own_tensor():
    (small, large), optimizer = tiny_optimizer([0.0, 100.0], agc=0.5, agc_floor=0.01)
    for param in (small, large):
        param.grad = torch.ones_like(param)
    norm = optimizer.step()["grad_norm"]
    assert norm == pytest.approx(24**0.5)
    squares = [optimizer.state[param]["square"].sum().item() for param in (small, large)]
    # The zero tensor counts as of norm 0.01; the large one allows its gradient in full.
    np.testing.assert_allclose(squares, [0.001 * (0.5 * 0.01) ** 2, 0.001 * 12], rtol=1e-3)


def test_groups_have_their_own_learning_rate():
    slow, fast = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = tools.LaProp([{"params": [slow], "lr": 0.001}, {"params": [fast]}], lr=0.01, warmup=0)
    for param in (slow, fast):
        param.grad = torch.ones(3)
    optimizer.step()
    np.testing.assert_allclose([1 - slow[0].item(), 1 - fast[0].item()], [0.001, 0.01], rtol=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("updates_before", [0, 4])
def test_non_finite_gradient_skips_the_whole_update_and_says_so(bad, updates_before):
    params, optimizer = tiny_optimizer()
    reference_params, reference = tiny_optimizer()
    for step in range(updates_before + 3):
        if step == updates_before:
            set_grads(params, seed=99)
            params[1].grad[2, 1] = bad
            before = values_of(params)
            assert optimizer.step()["skipped"].item()
            assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
        for some in (params, reference_params):
            set_grads(some, seed=step)
        assert not optimizer.step()["skipped"].item()
        reference.step()
    assert all(torch.equal(a, b) for a, b in zip(params, reference_params, strict=True))
    assert optimizer.updates.tolist() == reference.updates.tolist()
    assert optimizer.updates.tolist() == [updates_before + 3] * len(optimizer.param_groups)


def test_parameter_without_gradient_counts_as_zero_gradient():
    params, optimizer = tiny_optimizer()
    zero_params, zero_optimizer = tiny_optimizer()
    for step in range(5):
        for some in (params, zero_params):
            set_grads(some, seed=step)
        if step > 2:
            params[0].grad = None
            zero_params[0].grad.zero_()
        optimizer.step()
        zero_optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, zero_params, strict=True))


def test_optimiser_resumes_bit_for_bit_from_a_checkpoint(tmp_path):
    params, optimizer = tiny_optimizer()
    for step in range(5):
        set_grads(params, seed=step)
        optimizer.step()
    checkpoints.save_checkpoint(tmp_path, {"opt": optimizer.state_dict()}, step=5, keep=1)
    resumed_params, resumed = tiny_optimizer()
    with torch.no_grad():
        for new, old in zip(resumed_params, params, strict=True):
            new.copy_(old)
    resumed.load_state_dict(checkpoints.load_checkpoint(tmp_path)[0]["opt"])
    for some, opt in ((params, optimizer), (resumed_params, resumed)):
        for step in range(5, 8):
            set_grads(some, seed=step)
            opt.step()
    assert all(torch.equal(a, b) for a, b in zip(params, resumed_params, strict=True))


def test_learning_rate_changed_on_resume_has_its_effect():
    _, optimizer = tiny_optimizer(lr=0.1)
    _, resumed = tiny_optimizer(lr=0.5)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.param_groups[0]["lr"] == 0.5
