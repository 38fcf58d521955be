"""The group norm kernels against float64, forward and backward."""

import itertools

import pytest
import torch

from sid_fast.kernels.dispatch import forced
from sid_fast.kernels.group_norm import GroupNormOutput, group_norm, group_norm_eager
from tests.helpers.group_norm import COMBINATIONS, DTYPES, SHAPES, SUM, check, draw, relative, run

# Operations fused with the norm, in the networks' combinations.
FUSIONS = {
    "silu": {},
    "plain": {"silu": False},
    "x_bias": {"x_bias": True},
    "x_scale": {"x_scale": 0.5},
    "residual": {"residual": True, "silu": False},
    "add": {"add": True},
    "scale_shift": {"scale_shift": True},
    "add-scale_shift": {"add": True, "scale_shift": True},
    "sum-add": {**SUM, "add": True},
    "skip": {"skip": 7},
    "sum-skip": {**SUM, "skip": 11, "add": True},
    "down": {"resample": "down"},
    "up": {"resample": "up"},
    "sum-down": {**SUM, "resample": "down"},
    "sum-up": {**SUM, "resample": "up", "add": True},
}
# ([N, C, H, W], groups, channels of skip) of two concatenated inputs.
CONCATENATED = {
    "384=256+128": ((1, 384, 3, 5), 32, 128),
    "512=256+256": ((1, 512, 2, 2), 32, 256),
    "576=384+192": ((1, 576, 4, 3), 32, 192),
    "960=576+384": ((1, 960, 3, 2), 32, 384),
    "1344=768+576": ((1, 1344, 2, 1), 32, 576),
    "one-pixel": ((2, 64, 1, 1), 8, 20),
    "one-channel": ((1, 35, 3, 5), 7, 1),
    "tiles-of-384": ((1, 36, 17, 19), 3, 12),
    "tiles-one-group": ((1, 24, 16, 17), 1, 23),
}


LARGE = {"12-a-group", "24-a-group"}


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(shape, marks=pytest.mark.slow if shape in LARGE else ())
        for shape in SHAPES
        if shape != "top-of-64"
    ],
)
def test_shapes(shape, device):
    """Every group size and image size, fused with a sum and conditioning."""
    conditioning = {"scale_shift": True} if shape.endswith("a-group") else {"add": True}
    check(*draw(*SHAPES[shape], torch.float32, device, **SUM, **conditioning), torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["top-of-64", "6-a-group", "odd-group", "odd-tiles"])
def test_shapes_in_bfloat16(shape, device):
    """Tile sizes depend on the dtype."""
    check(*draw(*SHAPES[shape], torch.bfloat16, device, **SUM), torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("case", CONCATENATED)
def test_concatenated_inputs(case, device):
    """The boundary between h and skip falls inside a group or between two groups."""
    *shape, skip = CONCATENATED[case]
    check(*draw(*shape, torch.float32, device, skip=skip, **SUM), torch.float32)


@DTYPES
@pytest.mark.parametrize("fusion", FUSIONS)
def test_fusions(fusion, dtype, device):
    """Everything that may be fused with the norm, in one tile."""
    check(*draw(*SHAPES["few-channels"], dtype, device, **FUSIONS[fusion]), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("fusion", FUSIONS)
def test_fusions_over_tiles(fusion, device):
    """The same over several tiles, in the most precise dtype."""
    check(*draw(*SHAPES["even-tiles"], torch.float32, device, **FUSIONS[fusion]), torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("resample", ["down", "up"])
@pytest.mark.parametrize(
    "shape",
    [((1, 768, 2, 2), 32), ((2, 192, 4, 2), 32), ((1, 24, 6, 6), 6), ((1, 32, 34, 2), 8)],
    ids=["one-block", "upright", "six-wide", "long"],
)
def test_resampling(shape, resample, device):
    """Sides that are not powers of two, and the fewest blocks of pixels possible."""
    check(*draw(*shape, torch.float32, device, **SUM, resample=resample), torch.float32)


@pytest.mark.parametrize("layout", ["NCHW", "strided"])
def test_layouts(layout, device):
    """Inputs and incoming gradients may have any layout; outputs are channels-last."""
    fusion = {**SUM, "scale_shift": True, "skip": 9}
    tensors, options = draw((2, 24, 6, 5), 6, torch.float32, device, **fusion)
    for name in ("x", "residual", "skip"):
        value = tensors[name].contiguous()
        if layout == "strided":
            value = torch.stack([value, value + 1], dim=-1)[..., 0]
        tensors[name] = value
    tensors["scale"] = tensors["scale"].t().contiguous().t()
    check(tensors, options, torch.float32)


def test_add_may_be_one_row_for_all(device):
    """Like a convolution's bias, expanded to [N, C]."""
    tensors, options = draw((2, 24, 6, 5), 6, torch.float32, device, scale_shift=True, add=True)
    tensors["add"] = tensors["add"][:1].expand(2, -1)
    check(tensors, options, torch.float32)


def test_large_mean(device):
    """With a mean of 1000 standard deviations, the error stays within float32's precision."""
    for shape, fusion in itertools.product(("few-channels", "even-tiles"), ({}, {"skip": 7})):
        tensors, options = draw(*SHAPES[shape], torch.float32, device, **fusion)
        for name in tensors.keys() & {"x", "skip"}:
            tensors[name] = torch.randn_like(tensors[name]) + 1000
        ref = group_norm_eager(**{k: v.double() for k, v in tensors.items()}, **options)
        with forced("triton"):
            out = group_norm(**tensors, **options)
        assert relative(out.y, ref.y) < 1e-4


@pytest.mark.parametrize("shape", ["few-channels", "even-tiles"])
def test_float32_subtracts_the_mean_first(shape, device):
    """A large mean that float32 represents exactly costs no precision."""
    tensors, options = draw(*SHAPES[shape], torch.float32, device)
    height, width = tensors["x"].shape[2:]
    signs = 1 - 2 * ((torch.arange(height)[:, None] + torch.arange(width)) % 2)
    tensors["x"] = (1024 + signs).to(tensors["x"]).expand_as(tensors["x"])
    check(tensors, options, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", ["few-channels", "even-tiles"])
def test_large_mean_in_16_bits(shape, dtype, device):
    """Folding the mean into the shift costs less than the rounding of the dtype."""
    tensors, options = draw(*SHAPES[shape], dtype, device, scale_shift=True)
    tensors["x"] = (torch.randn_like(tensors["x"].float()) + 100).to(dtype)
    check(tensors, options, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_sum_is_rounded_to_nearest(dtype, device):
    """It is rounded as PyTorch does; NaN is preserved."""
    tensors, options = draw(*SHAPES["few-channels"], dtype, device, residual=True)
    tensors["x"][0, 0, 0, 0] = float("nan")
    with forced("triton"):
        out = group_norm(**tensors, **options)
    assert torch.equal(out.h.nan_to_num(7), (tensors["x"] + tensors["residual"]).nan_to_num(7))


@pytest.mark.parametrize("shape", ["few-channels", "even-tiles"])
def test_the_sum_is_normalised_as_it_was_stored(shape, device):
    """Forward normalises the rounded h, because backward only has that."""
    tensors, options = draw(*SHAPES[shape], torch.bfloat16, device, residual=True)
    tensors["x"] += 100
    with forced("triton"):
        out = group_norm(**tensors, **options)
        del tensors["residual"]
        again = group_norm(**tensors | {"x": out.h}, **options)
    assert torch.equal(out.y, again.y)


@pytest.mark.slow
@pytest.mark.parametrize("fusion", COMBINATIONS)
def test_a_sample_does_not_depend_on_its_batch(fusion, device):
    """Its output, dropout and gradient are bit-exact alone, in a batch, and in repeated runs."""
    tensors, options = draw(*SHAPES["even-tiles"], torch.float32, device, **COMBINATIONS[fusion])
    options["seed"] = torch.tensor([3, 4, 0], device=device)
    first = {k: v if v.dim() == 1 else v[:1] for k, v in tensors.items()}
    with forced("triton"):
        out, grads, incoming = run(group_norm, tensors, options)
        again, grads_again, _ = run(group_norm, tensors, options)
        incoming = GroupNormOutput(*(None if g is None else g[:1] for g in incoming))
        alone, grads_alone, _ = run(group_norm, first, options, incoming)
    for a, b, c in zip(out, again, alone, strict=True):
        assert a is None or (torch.equal(a, b) and torch.equal(a[:1], c))
    for name, grad in grads.items():
        assert torch.equal(grad, grads_again[name]), name
        assert grad.dim() == 1 or torch.equal(grad[:1], grads_alone[name]), name


def test_a_nan_stays_in_its_sample_and_group(device):
    tensors, options = draw((3, 24, 6, 5), 6, torch.float32, device, scale_shift=True)
    with forced("triton"):
        clean = group_norm(**tensors, **options).y
        tensors["x"][1, 3, 2, 2] = float("nan")
        out = group_norm(**tensors, **options).y
    assert torch.equal(out[::2], clean[::2])
    assert out[1, :4].isnan().all()
    assert torch.equal(out[1, 4:], clean[1, 4:])


def test_float16_saturates(device):
    """Inputs, outputs and gradients that overflow become ±65504; NaN is preserved."""
    x = torch.randn(2, 32, 4, 4, device=device).half()
    x[0, 3, 1, 1], x[1, 5, 2, 2] = torch.inf, torch.nan
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.full((32,), 5e4, device=device), torch.zeros(32, device=device)
    with forced("triton"):
        out = group_norm(x, weight, bias, 8, 1e-6, residual=x.detach().clone(), silu=False)
        y_grad = torch.full_like(out.y, 6e4)
        y_grad[0, 7, 0, 0] = -torch.inf
        torch.autograd.backward([out.y, out.h], [y_grad, torch.full_like(out.h, 6e4)])
    for t in (out.y, out.h, x.grad):
        assert t[0].isfinite().all()
        assert t[1].isnan().any()
    assert out.h[0, 3, 1, 1] == out.y[0].abs().max() == x.grad[0].abs().max() == 65504
