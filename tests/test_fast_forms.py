"""Each fast form of a computation gives what its plain form gives, forward and backward."""

import platform
import subprocess
import sys
import time

import pytest
import run_helpers
import torch
import torch.nn.functional as F

import config as configs
import fast
import networks
import replay
from tools import precision

ROWS = {"vectors": (3, 7, 24), "one row": (1, 24), "more than a chunk": (50, 24)}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(fast, "CHUNK", 256)


def gradients(function, *inputs):
    """The result, and the gradients of its weighted sum with respect to the inputs."""
    inputs = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    out = function(*inputs)
    weights = torch.linspace(-1, 2, out.numel()).reshape(out.shape)
    return out.detach(), *torch.autograd.grad((out.float() * weights).sum(), inputs)


def assert_same(fast, plain, rtol=1e-5, atol=1e-5):
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=rtol, atol=atol)


@pytest.mark.parametrize("shape", ROWS.values(), ids=ROWS.keys())
def test_chunked_norm_equals_the_plain_one(shape):
    torch.manual_seed(0)
    x, weight = 3 * torch.randn(shape), torch.rand(shape[-1]) + 0.5
    chunked = gradients(lambda x, w: fast.ChunkedNormSiLU.apply(x, w, torch.float32), x, weight)
    assert_same(chunked, gradients(fast.plain_rms_norm_silu, x, weight))


def test_chunked_norm_over_channels_and_of_zeros():
    torch.manual_seed(0)
    x = torch.randn(5, 12, 6, 4).contiguous(memory_format=torch.channels_last)
    x[0] = 0  # where the norm is the epsilon's
    norm = networks.RMSNormSiLU(12)

    def plain(x):
        return fast.plain_rms_norm_silu(x.permute(0, 2, 3, 1), norm.weight).permute(0, 3, 1, 2)

    assert_same(gradients(lambda x: networks.channel_norm_silu(norm, x), x), gradients(plain, x))


def test_chunked_norm_rounds_once_under_autocast():
    torch.manual_seed(0)
    x, norm = torch.randn(40, 24).bfloat16(), networks.RMSNormSiLU(24)
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x)
    assert out.dtype == torch.bfloat16
    exact = fast.plain_rms_norm_silu(x.double().float(), norm.weight)
    torch.testing.assert_close(out.float(), exact, rtol=2**-8, atol=1e-6)


def test_chunked_norm_leaves_its_input_and_can_go_backward_twice():
    x = torch.randn(9, 24, requires_grad=True)
    before = x.detach().clone()
    out = networks.RMSNormSiLU(24)(x).sum()
    first, second = (torch.autograd.grad(out, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(x, before) and torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_pooling_equals_the_plain_one_also_for_equal_pixels(dtype):
    torch.manual_seed(0)
    x = torch.randint(-2, 3, (7, 3, 8, 6)).to(dtype)  # few values, so that many pixels are equal
    x = x.contiguous(memory_format=torch.channels_last)
    chunked, plain = (gradients(f, x) for f in (fast.ChunkedMaxPool.apply, lambda x: F.max_pool2d(x, 2)))
    assert_same(chunked, plain, rtol=0, atol=0)


def test_imagination_with_weights_rounded_in_advance_is_the_same_bit_for_bit():
    torch.manual_seed(0)
    config = networks_config()
    rssm = networks.RSSM(16, 4, config)
    state = {"deter": torch.randn(5, 32), "stoch": torch.eye(4)[torch.randint(4, (5, 4))]}
    action, noise = torch.eye(4)[torch.randint(4, (5,))], rssm.noise(5, generator=None)
    with torch.autocast("cpu", torch.bfloat16):
        weights = rssm.split_weights()
        assert weights.dyn_state.dtype == torch.float32  # gradients of the scan's steps are summed in it
        plain = rssm.imagine(state, action, noise, weights)
        with torch.no_grad():
            weights = rssm.split_weights()
            assert weights.dyn_state.dtype == torch.bfloat16
            rounded = rssm.imagine(state, action, noise, weights)
    assert all(torch.equal(rounded[key], plain[key]) for key in plain)


@pytest.mark.parametrize(("hidden", "rounded"), [(16, False), (128, True)])
def test_only_a_small_scan_stays_in_float32_on_a_cpu(hidden, rounded):
    torch.manual_seed(0)
    config = networks_config(hidden)
    rssm = networks.RSSM(16, 4, config)
    embed, action = torch.randn(2, 3, 16), torch.randn(2, 3, 4)
    is_first, noise = torch.zeros(2, 3, dtype=torch.bool), rssm.noise(2, 3, generator=None)
    args = rssm.initial(2), embed, action, is_first, noise
    plain = rssm.observe(*args)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = rssm.observe(*args)
    assert torch.equal(mixed["logit"], plain["logit"]) != rounded


@pytest.mark.parametrize(
    ("abilities", "expected"),
    [({"avx512_bf16": True}, "bfloat16"), ({"amx_bf16": True}, "bfloat16"), ({"avx2": True}, "float32")],
)
def test_precision_auto_is_bfloat16_where_a_cpu_multiplies_in_it(abilities, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: abilities, raising=False)
    cpu = torch.device("cpu")
    assert precision(configs.load(["--configs", "debug"]), cpu) == expected
    chosen = configs.load(["--configs", "debug", "--precision", "float32"])
    assert precision(chosen, cpu) == "float32"


@pytest.mark.slow
def test_a_slow_sampler_changes_no_bit(tmp_path, monkeypatch):
    """A thread draws the next batch during updates and env steps; its content is independent of the speed."""
    several = (
        "--train_ratio",
        "24",
        "--steps",
        "60",
    )  # several updates per step, else none is drawn during one
    assert run_helpers.train(tmp_path / "quick", *several) == 0
    sample = replay.Replay.sample

    def slow(*args, **kwargs):
        time.sleep(0.05)  # longer than an update
        return sample(*args, **kwargs)

    monkeypatch.setattr(replay.Replay, "sample", slow)
    assert run_helpers.train(tmp_path / "slow", *several) == 0
    run_helpers.assert_same_run(tmp_path / "quick", tmp_path / "slow")


def networks_config(hidden: int = 16):
    return configs.load(["--configs", "crafter", "debug", "--rssm.hidden", str(hidden)]).rssm


FAULTS = """
import resource, sys, torch, tools
if sys.argv[1] == "keep":
    assert tools.keep_freed_memory()
count = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):  # until the small blocks settle
    torch.ones(1 << 24)
before = count()
for _ in range(4):
    torch.ones(1 << 24)  # 64 MiB: 16,384 pages
print(count() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can keep freed memory")
def test_kept_memory_causes_no_page_faults():
    def faults(how):
        command = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults("keep") < 100 < faults("give back")


def test_split_weights_are_cached_until_a_weight_changes():
    rssm = networks.RSSM(16, 4, networks_config())
    with torch.no_grad():
        first = rssm.split_weights()
        assert rssm.split_weights() is first
        rssm.dyn_first.weight.mul_(2)
        torch.testing.assert_close(rssm.split_weights().dyn_state, 2 * first.dyn_state)
        with torch.autocast("cpu", torch.bfloat16):
            assert rssm.split_weights().dyn_state.dtype == torch.bfloat16
        rssm.load_state_dict(rssm.state_dict() | {"post_first.weight": torch.ones(16, 48)})
        assert rssm.split_weights().post_embed.eq(1).all()
    assert rssm.split_weights().dyn_state.requires_grad
