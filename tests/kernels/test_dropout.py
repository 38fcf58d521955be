"""Dropout zeroes the same elements in every backend and for every split of the batch."""

import pytest
import torch

from sid_fast import kernels
from sid_fast.kernels import dispatch
from sid_fast.kernels._triton import tl, triton
from sid_fast.kernels.dropout import dropout, philox_2x32

SEED = (-(2**61) + 7, 5 | 2**40, 2**31 - 1)


def seed(device, first=SEED[2]):
    return torch.tensor([*SEED[:2], first], device=device)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(3, 8, 4, 4), (2, 20, 5, 3), (1, 1, 1, 1), (2, 64, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_and_eager_drop_the_same_elements(device, shape, dtype, channels_last):
    x = torch.randn(shape, device=device).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    grad, results = torch.randn_like(x), []
    for backend in ("eager", "triton"):
        y = x.clone().requires_grad_()
        with dispatch.forced(backend):
            out = dropout(y, 0.3, seed(device))
            out.backward(grad)
        assert out.dtype == dtype
        assert out.stride() == x.stride()
        results.append((out.detach(), y.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-2 if dtype != torch.float32 else 1e-6,
                                   atol=0)  # fmt: skip
        assert torch.equal(found == 0, expected == 0)


@pytest.mark.parametrize("fusion", ["plain", "scale_shift"])
def test_the_group_norm_drops_the_same_elements_in_every_backend(device, fusion):
    n, channels, side = 2, 64, 8
    x = torch.randn(n, channels, side, side, device=device)
    more = {}
    if fusion == "scale_shift":
        more = {k: torch.randn(n, channels, device=device) for k in ("scale", "shift", "add")}
    ones, zeros = torch.ones(channels, device=device), torch.zeros(channels, device=device)
    outputs = []
    for backend in ("eager", "triton"):
        with dispatch.forced(backend):
            y = kernels.group_norm(x, ones, zeros, 16, 1e-5, dropout=0.4, seed=seed(device), **more)
        outputs.append(y.y)
    assert torch.equal(outputs[0] == 0, outputs[1] == 0)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_mask_depends_on_the_global_index_of_the_sample(device, backend):
    x = torch.ones(4, 8, 4, 4, device=device)
    with dispatch.forced(backend):
        full = dropout(x, 0.5, seed(device, 10))
        halves = [dropout(x[:2], 0.5, seed(device, first)) for first in (10, 12)]
    assert torch.equal(full, torch.cat(halves))


@triton.jit
def philox_kernel(counter_ptr, key_ptr, out_ptr):
    at = tl.arange(0, 4)
    low, high = tl.load(counter_ptr + at), tl.load(counter_ptr + 4 + at)
    low, high, key = low.to(tl.uint32), high.to(tl.uint32), tl.load(key_ptr + at).to(tl.uint32)
    a, b = philox_2x32(low, high, key)
    tl.store(out_ptr + at, a.to(tl.int64))
    tl.store(out_ptr + 4 + at, b.to(tl.int64))


def philox(low: int, high: int, key: int) -> tuple[int, int]:
    for _ in range(10):
        product = low * 0xD256D193
        low, high, key = product >> 32 ^ key ^ high, product % 2**32, (key + 0x9E3779B9) % 2**32
    return low, high


def test_random_numbers_are_philox(device):
    """The known answers of the Random123 library for philox2x32-10, and one more."""
    ones = 2**32 - 1
    counters = [(0, 0), (ones, ones), (0x243F6A88, 0x85A308D3), (1, 2)]
    keys = [0, ones, 0x13198A2E, 3]
    known = [(0xFF1DAE59, 0x6CD10DF2), (0x2C3F628B, 0xAB4FD7AD), (0xDD7CE038, 0xF62A4C12)]
    expected = [philox(*c, k) for c, k in zip(counters, keys, strict=True)]
    assert expected[:3] == known
    out = torch.zeros(2, 4, dtype=torch.int64, device=device)
    counters = torch.tensor(counters, device=device).t().contiguous()
    philox_kernel[(1,)](counters, torch.tensor(keys, device=device), out)
    assert out.t().tolist() == [list(pair) for pair in expected]
