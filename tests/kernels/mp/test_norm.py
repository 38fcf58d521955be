"""Pixel norm and SiLU against float64, forward and backward."""

import pytest
import torch

from sid_fast.kernels import pixel_norm
from sid_fast.kernels.dispatch import forced
from tests.helpers.twins import channels_last, check, check_compiles

# Channels of XS, and counts that are no power of two or fill no tile.
SHAPES = [(2, 128, 4, 4), (2, 384, 2, 3), (3, 24, 5, 3), (1, 896, 1, 1), (3, 3, 2, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_and_silu_are_exact(device, shape, dtype):
    x = 3 * channels_last(shape, dtype, device)
    check(pixel_norm, [x])


@pytest.mark.parametrize("unused", [[0], [1]])
def test_either_output_may_have_no_gradient(device, unused):
    check(pixel_norm, [channels_last((2, 24, 3, 3), torch.float32, device)], unused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("channels", "groups"), [(192, 3), (24, 6), (60, 3)])
def test_groups_of_channels_are_normalised_by_themselves(device, channels, groups, dtype):
    x = channels_last((2, channels, 3, 5), dtype, device)
    check(lambda x: pixel_norm(x, groups, silu=False), [x])
    with forced("triton"):
        parts = pixel_norm(x.float(), groups, silu=False).n.unflatten(1, (groups, -1))
    torch.testing.assert_close(parts.square().mean(2).sqrt(), torch.ones_like(parts[:, :, 0]),
                               atol=1e-3, rtol=0)  # fmt: skip


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_a_black_pixel_stays_black_and_has_a_gradient(device, backend):
    """x/(0 + ε): the slope at 0 is 1/ε, and 1/ε/2/0.596 through SiLU."""
    x = torch.zeros(1, 8, 1, 2, device=device).requires_grad_()
    with forced(backend):
        n, s = pixel_norm(x)
        (grad,) = torch.autograd.grad((n, s), x, (torch.ones_like(n), torch.ones_like(s)))
    assert not n.any()
    assert not s.any()
    torch.testing.assert_close(grad, torch.full_like(grad, 1e4 * (1 + 0.5 / 0.596)))


def test_memory_order_does_not_matter(device):
    x = channels_last((2, 24, 3, 4), torch.float32, device)
    with forced("triton"):
        expected, found = pixel_norm(x), pixel_norm(x.contiguous())
    assert torch.equal(expected.n, found.n)
    assert found.s.is_contiguous(memory_format=torch.channels_last)


def test_groups_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(ValueError, match="groups=5 does not divide 24 channels"):
        pixel_norm(torch.ones(1, 24, 2, 2), 5)


def test_compiles_without_a_graph_break(device):
    check_compiles(pixel_norm, [channels_last((2, 24, 4, 3), torch.float32, device)])


def test_the_operators_pass_opcheck(device):
    x = channels_last((2, 24, 4, 3), torch.float32, device)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.sid_fast.pixel_norm.default, (x, 1, True), test_utils=utils)
    torch.library.opcheck(torch.ops.sid_fast.pixel_norm.default, (x, 3, False), test_utils=utils)
    backward = torch.ops.sid_fast.pixel_norm_backward.default
    torch.library.opcheck(backward, (x, x, None, 1), test_utils=utils)
