"""The magnitude-preserving sum and its clipping against float64, forward and backward."""

import pytest
import torch

from sid_fast.kernels import mp_sum
from sid_fast.kernels.dispatch import forced
from sid_fast.kernels.mp import sum as module
from tests.helpers.twins import channels_last, check, check_compiles

SHAPES = [(2, 128, 8, 8), (3, 24, 5, 3), (1, 1, 1, 1)]


def tensors(shape, dtype, device):
    return channels_last(shape, dtype, device), 3 * channels_last(shape, dtype, device, seed=1)


@pytest.mark.parametrize("limit", [None, 1.0, 1.23456])  # the last is no number of 16 bit
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_exact(device, shape, dtype, limit):
    a, b = tensors(shape, dtype, device)
    if limit:  # a number that is rounded to the limit counts as clipped
        out = module.mp_sum_eager(a.double(), b.double(), 0.3)
        far = ((out.abs() - limit).abs() > 0.01).to(dtype)
        a, b = a * far, b * far
        assert a.numel() == 1 or 0.01 < (out.abs() > limit).double().mean() < 0.99
    check(lambda a, b: mp_sum(a, b, 0.3, limit), (a, b))


@pytest.mark.parametrize("unused", [[0], [1]])
def test_one_consumer_is_enough(device, unused):
    inputs = tensors((2, 24, 3, 3), torch.float32, device)
    check(lambda a, b: mp_sum(a, b, 0.3, 2.0), inputs, unused)


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_a_clipped_element_has_no_gradient(device, backend):
    """In one block of three; in the others nothing is clipped."""
    a = torch.zeros(1, 1, 3, module.BLOCK, device=device)
    a[0, 0, 1, [2, 5]] = torch.tensor([1e4, -1e4], device=device)
    b = torch.ones_like(a)
    leaves = a.requires_grad_(), b.requires_grad_()
    with forced(backend):
        out, again = mp_sum(*leaves, 0.3, 256.0)
        da, db = torch.autograd.grad((out, again), leaves, (torch.ones_like(a), 2 * b.detach()))
    if backend == "triton":
        with forced(backend):
            flags = module._forward(a.detach(), b.detach(), 0.3, 256.0)[1]
        assert flags.tolist() == [0, 1, 0]
    assert out.amax() == 256
    assert out.amin() == -256
    gains = module.gains(0.3)
    for grad, gain in zip((da, db), gains, strict=True):
        assert not grad[0, 0, 1, [2, 5]].any()
        assert (grad == 0).sum() == 2
        torch.testing.assert_close(grad.amax(), torch.tensor(3 * gain, device=device))


def test_nan_stays_nan(device):
    a = torch.full((1, 8, 2, 2), torch.nan, device=device)
    with forced("triton"):
        assert mp_sum(a, a, 0.3, 256.0)[0].isnan().all()


def test_float16_saturates(device):
    a = torch.full((1, 8, 2, 2), 65504.0, device=device, dtype=torch.float16)
    with forced("triton"):
        assert (mp_sum(a, a, 0.3)[0] == 65504).all()


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 2, 3, 3\) and \(1, 2, 3, 4\) differ"):
        mp_sum(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 4), 0.3)


@pytest.mark.parametrize("limit", [None, 1.0])
def test_compiles_without_a_graph_break(device, limit):
    inputs = tensors((2, 24, 4, 3), torch.float32, device)
    check_compiles(lambda a, b: mp_sum(a, b, 0.3, limit), inputs)


def test_the_operators_pass_opcheck(device):
    a, b = tensors((2, 24, 4, 3), torch.float32, device)
    utils = ("test_schema", "test_faketensor")
    forward, backward = torch.ops.sid_fast.mp_sum, torch.ops.sid_fast.mp_sum_backward
    for limit in (None, 1.0):
        torch.library.opcheck(forward.default, (a, b, 0.3, limit), test_utils=utils)
    out, clipped = forward(a, b, 0.3, 1.0)
    arguments = (a, None, out, clipped, 0.3, 1.0)
    torch.library.opcheck(backward.default, arguments, test_utils=utils)
