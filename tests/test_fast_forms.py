"""Each fast form of a computation gives what its plain form gives, forward and backward."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import networks
import tools

ROWS = {"vectors": (3, 7, 24), "one row": (1, 24), "more than a chunk": (50, 24)}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(networks, "CHUNK", 256)


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
def test_chunked_norm_is_the_plain_one(shape):
    torch.manual_seed(0)
    x, weight = 3 * torch.randn(shape), torch.rand(shape[-1]) + 0.5
    fast = gradients(lambda x, w: networks.ChunkedNormSiLU.apply(x, w, torch.float32), x, weight)
    assert_same(fast, gradients(networks.rms_norm_silu, x, weight))


def test_chunked_norm_over_channels_and_of_zeros():
    torch.manual_seed(0)
    x = torch.randn(5, 12, 6, 4).contiguous(memory_format=torch.channels_last)
    x[0] = 0  # where the norm is the epsilon's
    norm = networks.RMSNormSiLU(12)

    def plain(x):
        return networks.rms_norm_silu(x.permute(0, 2, 3, 1), norm.weight).permute(0, 3, 1, 2)

    assert_same(gradients(lambda x: networks.channel_norm_silu(norm, x), x), gradients(plain, x))


def test_chunked_norm_rounds_once_under_autocast():
    torch.manual_seed(0)
    x, norm = torch.randn(40, 24).bfloat16(), networks.RMSNormSiLU(24)
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x)
    assert out.dtype == torch.bfloat16
    exact = networks.rms_norm_silu(x.double().float(), norm.weight)
    torch.testing.assert_close(out.float(), exact, rtol=2**-8, atol=1e-6)


def test_chunked_norm_leaves_its_input_and_can_go_backward_twice():
    x = torch.randn(9, 24, requires_grad=True)
    before = x.detach().clone()
    out = networks.RMSNormSiLU(24)(x).sum()
    first, second = (torch.autograd.grad(out, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(x, before) and torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_pooling_is_the_plain_one_where_pixels_tie_too(dtype):
    torch.manual_seed(0)
    x = torch.randint(-2, 3, (7, 3, 8, 6)).to(dtype)  # few values, so that many pixels are equal
    x = x.contiguous(memory_format=torch.channels_last)
    fast, plain = (gradients(f, x) for f in (networks.ChunkedMaxPool.apply, lambda x: F.max_pool2d(x, 2)))
    assert_same(fast, plain, rtol=0, atol=0)


def test_imagination_with_weights_rounded_beforehand_is_the_same_to_the_bit():
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
            fast = rssm.imagine(state, action, noise, weights)
    assert all(torch.equal(fast[key], plain[key]) for key in plain)


def networks_config():
    import config

    return config.load(["--configs", "crafter", "debug"]).rssm


FAULTS = """
import resource, sys, torch, tools
if sys.argv[1] == "keep":
    assert tools.keep_freed_memory()
count = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):  # the small blocks beside them settle
    torch.ones(1 << 24)
before = count()
for _ in range(4):
    torch.ones(1 << 24)  # 64 MiB: 16,384 pages
print(count() - before)
"""


@pytest.mark.skipif(not tools.keep_freed_memory(), reason="only glibc can keep freed memory")
def test_kept_memory_is_not_faulted_in_again():
    def faults(how):
        command = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults("keep") < 100 < faults("give back")
