"""Dropout zeroes the same elements in every backend and for every split of the batch."""

import pytest
import torch

from sid_fast import kernels
from sid_fast.kernels import dispatch
from sid_fast.kernels.dropout import dropout

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
    for eager, triton in zip(*results, strict=True):
        torch.testing.assert_close(triton, eager, rtol=1e-2 if dtype != torch.float32 else 1e-6,
                                   atol=0)  # fmt: skip
        assert torch.equal(triton == 0, eager == 0)


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
