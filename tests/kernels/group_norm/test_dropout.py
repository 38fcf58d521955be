"""Dropout fused with the group norm: its mask, statistics and seed."""

import itertools

import pytest
import torch

from sid_fast.kernels.dispatch import forced
from sid_fast.kernels.group_norm import FEWER_PER_THREAD, group_norm, launch
from tests.helpers.group_norm import DTYPES, EPS, SHAPES, SUM, check, draw


def dropout_mask(shape, groups, dropout, seed, device):
    """Return a mask of 0 and 1/(1 − dropout): the output for weight 0 and bias 1."""
    zeros = torch.zeros(shape, device=device).contiguous(memory_format=torch.channels_last)
    flat = zeros[0, :, 0, 0]
    with forced("triton"):
        out = group_norm(zeros, flat, flat + 1, groups, EPS, silu=False, dropout=dropout, seed=seed)
    return out.y


@pytest.mark.slow
@DTYPES
@pytest.mark.parametrize("shape", ["few-channels", "odd-tiles"])
@pytest.mark.parametrize("silu", [True, False], ids=["silu", "plain"])
def test_dropout(shape, silu, dtype, device):
    """Backward uses the mask of forward: recomputed, or from the gradient its first pass stored."""
    seed = torch.tensor([-(2**62) - 5, 2**40 + 3, 7], device=device)
    tensors, options = draw(
        *SHAPES[shape], dtype, device, **SUM, add=True, scale_shift=True, silu=silu
    )
    mask = dropout_mask(*SHAPES[shape], 0.3, seed, device).double()
    check(tensors, options | {"dropout": 0.3, "seed": seed}, dtype, mask)


@pytest.mark.parametrize("p", [0.05, 0.13, 0.5])
def test_dropout_zeroes_a_fraction_p_and_scales_the_rest(p, device):
    shape, groups = (2, 64, 16, 16), 8
    mask = dropout_mask(shape, groups, p, torch.tensor([5, 6, 0], device=device), device)
    values = mask.unique()
    assert len(values) == 2
    assert values[0] == 0
    assert values[1] == pytest.approx(1 / (1 - p), rel=1e-4)
    for part in (mask, *mask, *mask.split(16, dim=1), *mask.split(4, dim=2)):
        deviation = (p / (1 - p) / part.numel()) ** 0.5
        assert part.mean().item() == pytest.approx(1, abs=4.5 * deviation)


def uncorrelated(a, b, p):
    """Return whether two masks, minus their mean of 1, are uncorrelated up to chance."""
    product = (a - 1) * (b - 1)
    return abs(product.mean().item()) < 5 * p / (1 - p) / product.numel() ** 0.5


def test_dropout_of_elements_is_independent(device):
    """Neighbours in every dimension and pixels that share a Philox block are uncorrelated."""
    p = 0.13
    mask = dropout_mask((2, 64, 16, 16), 8, p, torch.tensor([1, 0, 0], device=device), device)
    quarters = [(mask, mask.roll(4 * i, 2)) for i in (1, 2, 3)]
    near = [(mask, mask.roll(n, d)) for d in range(4) for n in range(1, min(4, mask.shape[d]))]
    for pair in (*near, *quarters, (mask, mask.roll(8, 1)), (mask, mask.roll((4, 1), (2, 1)))):
        assert uncorrelated(*pair, p)


@pytest.mark.slow
def test_dropout_of_samples_layers_and_steps_is_independent(device):
    """The seed is (key, stream, first sample); both 32-bit halves of key and stream matter."""
    p, masks = 0.13, []
    for seed in [(1, 0), (2, 0), (1, 1), (1, 2), (1, 2**32), (1 + 2**32, 0), (-1, 0), (1, -1)]:
        masks += dropout_mask((2, 64, 8, 8), 8, p, torch.tensor([*seed, 0], device=device), device)
    assert all(uncorrelated(a, b, p) for a, b in itertools.combinations(masks, 2))


@pytest.mark.parametrize("shape", [(2, 24, 18, 16), (1, 64, 17, 17)], ids=str)
def test_dropout_depends_on_the_seed_only(shape, device, monkeypatch):
    """Not on groups, tiles or dtype; repeated runs are identical."""
    seed = torch.tensor([3, 4, 0], device=device)
    mask = dropout_mask(shape, 8, 0.3, seed, device)
    assert torch.equal(mask, dropout_mask(shape, 8, 0.3, seed, device))
    assert torch.equal(mask, dropout_mask(shape, 2, 0.3, seed, device))
    default = launch((*shape[1:],), shape[1], torch.float32, 8, False, None, False)
    monkeypatch.setitem(FEWER_PER_THREAD, (shape[1], shape[3], torch.float32, None, False), 2)
    launch.cache_clear()
    fewer = launch((*shape[1:],), shape[1], torch.float32, 8, False, None, False)
    assert default != fewer
    assert torch.equal(mask, dropout_mask(shape, 8, 0.3, seed, device))
    launch.cache_clear()
    x = torch.zeros(shape, device=device, dtype=torch.bfloat16)
    flat = torch.zeros(shape[1], device=device)
    with forced("triton"):
        y = group_norm(x, flat, flat + 1, 8, EPS, silu=False, dropout=0.3, seed=seed).y
    assert torch.equal(y > 0, mask > 0)


def test_dropout_draws_its_seed_from_torch(device):
    tensors, options = draw((1, 32, 8, 8), 8, torch.float32, device)
    with forced("triton"):
        out = []
        for manual in (0, 0, 1):
            torch.manual_seed(manual)
            out.append(group_norm(**tensors, **options, dropout=0.5).y)
    assert torch.equal(out[0], out[1])
    assert not torch.equal(out[0], out[2])


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_dropout_out_of_range(dropout, device):
    tensors, options = draw((1, 32, 2, 2), 8, torch.float32, device)
    with forced("triton"), pytest.raises(ValueError, match=f"dropout={dropout}"):
        group_norm(**tensors, **options, dropout=dropout)
