"""Concatenation and SiLU against float64, forward and backward."""

import pytest
import torch

from sid_fast.kernels import mp_cat_silu
from sid_fast.kernels.dispatch import forced
from tests.helpers.twins import channels_last, check, check_compiles

# N, C1, C2, H, W: of XS, and channel counts with a small common divisor.
SHAPES = [(2, 128, 128, 8, 8), (2, 192, 64, 3, 3), (3, 24, 40, 5, 3), (2, 7, 9, 3, 3)]


def tensors(shape, dtype, device):
    n, left, right, *size = shape
    x = channels_last((n, left, *size), dtype, device)
    return x, channels_last((n, right, *size), dtype, device, seed=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_exact(device, shape, dtype):
    inputs = tensors(shape, dtype, device)
    check(lambda x, skip: mp_cat_silu(x, skip, 0.4), inputs)
    check(mp_cat_silu, inputs[:1])


@pytest.mark.parametrize("unused", [[1], [2], [1, 2], [0]])
def test_any_output_may_have_no_gradient(device, unused):
    inputs = tensors((2, 24, 40, 3, 3), torch.float32, device)
    if unused == [0]:
        check(lambda x, skip: mp_cat_silu(x, skip), inputs, unused)
    else:
        check(mp_cat_silu, inputs, unused)


def test_the_inputs_are_passed_through_without_a_copy(device):
    x, skip = tensors((2, 24, 40, 3, 3), torch.float32, device)
    with forced("triton"):
        out = mp_cat_silu(x, skip)
    assert out.x.data_ptr() == x.data_ptr()
    assert out.skip.data_ptr() == skip.data_ptr()
    assert out.s.is_contiguous(memory_format=torch.channels_last)
    with forced("triton"):
        assert mp_cat_silu(x).skip is None


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        (torch.ones(1, 3, 2, 2), "only its channels may differ"),
        (torch.ones(2, 3, 4, 2), "only its channels may differ"),
        (torch.ones(2, 3, 2, 2, dtype=torch.float16), "must be torch.float32, like x"),
    ],
)
def test_a_skip_tensor_that_does_not_match_is_refused(skip, message):
    with pytest.raises(ValueError, match=message):
        mp_cat_silu(torch.ones(2, 4, 2, 2), skip)


@pytest.mark.parametrize("skips", [1, 2])
def test_compiles_without_a_graph_break(device, skips):
    inputs = tensors((2, 24, 40, 3, 3), torch.float32, device)[:skips]
    check_compiles(mp_cat_silu, inputs)


def test_the_operators_pass_opcheck(device):
    x, skip = tensors((2, 24, 40, 3, 3), torch.float32, device)
    utils = ("test_schema", "test_faketensor")
    forward = torch.ops.sid_fast.mp_cat_silu.default
    backward = torch.ops.sid_fast.mp_cat_silu_backward.default
    for other in (skip, None):
        torch.library.opcheck(forward, (x, other, 0.5), test_utils=utils)
        s = forward(x, other, 0.5)
        arguments = (x, other, s, x, other, 0.5)
        torch.library.opcheck(backward, arguments, test_utils=utils)
