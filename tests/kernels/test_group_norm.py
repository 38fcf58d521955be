"""The group norm kernel against float64, forward and backward."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sid_fast.kernels._triton import tl, triton
from sid_fast.kernels.dispatch import forced
from sid_fast.kernels.dropout import philox_2x32
from sid_fast.kernels.group_norm import (
    FEWER_PER_THREAD,
    GroupNormOutput,
    bytes_moved,
    configurations,
    group_norm,
    group_norm_eager,
    launch,
)

# Bounds on ‖out − ref‖/‖ref‖; ref is computed in float64 from the same rounded inputs. Rounding to
# nearest costs 0.0017 in bfloat16, and dropout's backward over tiles rounds twice.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
EPS = 1e-5
LAST = torch.channels_last

# Operations fused with the norm, in the networks' combinations.
SUM = {"residual": True, "x_bias": True, "x_scale": 0.5**0.5}
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
# ([N, C, H, W], groups): images that fit one tile, images that take several, and awkward sizes.
SHAPES = {
    "4-a-group": ((1, 128, 4, 4), 32),
    "6-a-group": ((1, 192, 4, 4), 32),
    "8-a-group": ((1, 256, 4, 4), 32),
    "12-a-group": ((1, 384, 5, 7), 32),
    "18-a-group": ((1, 576, 4, 4), 32),
    "24-a-group": ((1, 768, 3, 3), 32),
    "36-a-group": ((1, 1152, 1, 2), 32),
    "42-a-group": ((1, 1344, 3, 1), 32),
    "48-a-group": ((1, 1536, 2, 1), 32),
    "few-channels": ((2, 24, 6, 10), 6),
    "one-pixel": ((2, 64, 1, 1), 8),
    "odd-group": ((1, 35, 9, 3), 7),
    "one-group": ((1, 96, 3, 3), 1),
    "top-of-64": ((1, 128, 64, 64), 32),
    "tiles": ((1, 24, 16, 33), 2),
    "tiles-6-a-group": ((1, 42, 32, 16), 7),
    "even-tiles": ((2, 20, 18, 16), 5),
    "odd-tiles": ((2, 20, 17, 17), 5),
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


def relative(out: torch.Tensor, ref: torch.Tensor) -> float:
    return ((out.double() - ref).norm() / ref.norm().clamp(min=1e-30)).item()


def draw(
    shape, groups, dtype, device, add=False, scale_shift=False, residual=False, x_bias=False,
    skip=0, **options,
):  # fmt: skip
    """Return the tensors and the options of group_norm, x with large means; skip: its channels."""
    torch.manual_seed(0)
    n, c = shape[:2]

    def normal(*size, dtype=dtype):
        return torch.randn(size).to(device, dtype)

    x = (torch.randn(shape) * 2 + 3 * torch.randn(1, c, 1, 1)).to(device, dtype)
    x, right = (v.contiguous(memory_format=LAST) for v in x.split([c - skip, skip], dim=1))
    tensors = {
        "x": x,
        "weight": normal(c, dtype=torch.float32),
        "bias": normal(c, dtype=torch.float32),
    }
    if skip:
        tensors["skip"] = right
    if residual:
        tensors["residual"] = normal(*x.shape).contiguous(memory_format=LAST)
    if x_bias:
        tensors["x_bias"] = normal(len(x[0]), dtype=torch.float32)
    if add:
        tensors["add"] = normal(n, c)
    if scale_shift:
        tensors["scale"], tensors["shift"] = normal(n, 2 * c).chunk(2, dim=1)
    return tensors, options | {"groups": groups, "eps": EPS}


def like(out: GroupNormOutput) -> GroupNormOutput:
    """Draw an incoming gradient for every output."""
    return GroupNormOutput(*(None if v is None else torch.randn(v.shape).to(v) for v in out))


def run(function, tensors, options, incoming=None, mask=None):
    """Return the outputs, the gradients of the tensors, and the incoming gradients.

    Args:
        function: group_norm or group_norm_eager.
        tensors: its tensor arguments.
        options: its other arguments.
        incoming: gradients of the outputs; by default they are drawn for every output.
        mask: a scaled dropout mask to apply to y.
    """
    tensors = {k: v.detach().requires_grad_() for k, v in tensors.items()}
    out = function(**tensors, **options)
    if mask is not None:
        out = out._replace(y=out.y * mask)
    torch.manual_seed(1)
    incoming = incoming or like(out)
    pairs = [(o, g.to(o.dtype)) for o, g in zip(out, incoming, strict=True) if g is not None]
    torch.autograd.backward(*zip(*pairs, strict=True))
    return out, {k: v.grad for k, v in tensors.items()}, incoming


def check(tensors, options, dtype, mask=None):
    """Compare every output and gradient of the kernel with the float64 reference."""
    double = {k: v.double() for k, v in tensors.items()}
    exact = {k: v for k, v in options.items() if k not in ("dropout", "seed")}
    with forced("triton"):
        outs, grads, incoming = run(group_norm, tensors, options)
    h = group_norm_eager(**double, **exact).h
    assert relative(outs.h, h) <= TOLERANCE[dtype]
    # The kernel normalises h as stored, that is, rounded.
    double["x"] += (outs.h.detach() - h) / options.get("x_scale", 1)
    refs, ref_grads, _ = run(group_norm_eager, double, exact, incoming, mask)
    errors = {}
    for name, out, ref in zip(GroupNormOutput._fields, outs, refs, strict=True):
        assert (out is None) == (ref is None), name
        if out is not None:
            assert out.dtype == dtype
            assert out.shape == ref.shape
            assert out.is_contiguous(memory_format=LAST)
            errors[f"output {name}"] = relative(out, ref)
    for name, ref in ref_grads.items():
        assert grads[name].dtype == tensors[name].dtype
        errors[name] = relative(grads[name], ref)
    assert all(error <= TOLERANCE[dtype] for error in errors.values()), errors


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "top-of-64"])
def test_shapes(shape, device):
    """Every group size and image size, fused with a sum and conditioning."""
    conditioning = {"scale_shift": True} if shape.endswith("a-group") else {"add": True}
    check(*draw(*SHAPES[shape], torch.float32, device, **SUM, **conditioning), torch.float32)


@pytest.mark.parametrize("shape", ["top-of-64", "6-a-group", "odd-group", "odd-tiles"])
def test_shapes_in_bfloat16(shape, device):
    """Tile sizes depend on the dtype."""
    check(*draw(*SHAPES[shape], torch.bfloat16, device, **SUM), torch.bfloat16)


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


@pytest.mark.parametrize("fusion", FUSIONS)
def test_fusions_over_tiles(fusion, device):
    """The same over several tiles, in the most precise dtype."""
    check(*draw(*SHAPES["even-tiles"], torch.float32, device, **FUSIONS[fusion]), torch.float32)


@pytest.mark.parametrize("resample", ["down", "up"])
@pytest.mark.parametrize(
    "shape",
    [((1, 768, 2, 2), 32), ((2, 192, 4, 2), 32), ((1, 24, 6, 6), 6), ((1, 32, 34, 2), 8)],
    ids=["one-block", "upright", "six-wide", "long"],
)
def test_resampling(shape, resample, device):
    """Sides that are not powers of two, and the fewest blocks of pixels possible."""
    check(*draw(*shape, torch.float32, device, **SUM, resample=resample), torch.float32)


def dropout_mask(shape, groups, dropout, seed, device):
    """Return a mask of 0 and 1/(1 − dropout): the output for weight 0 and bias 1."""
    zeros = torch.zeros(shape, device=device).contiguous(memory_format=torch.channels_last)
    flat = zeros[0, :, 0, 0]
    with forced("triton"):
        out = group_norm(zeros, flat, flat + 1, groups, EPS, silu=False, dropout=dropout, seed=seed)
    return out.y


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


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"dropout": -0.1}, "dropout=-0.1: must"),
        ({"dropout": 1.0}, "dropout=1.0: must"),
        ({"resample": "half"}, "resample='half': choose"),
        ({"resample": "down"}, "'down' of 6x5 pixels: sides must be even"),
        ({"resample": "up", "dropout": 0.1}, "resample='up' cannot be combined"),
        (
            {"resample": "up", "skip": torch.zeros(2, 8, 6, 5)},
            "32 channels: must equal the length of weight",
        ),
        ({"groups": 5}, "multiple of groups=5"),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(v),
)
@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_bad_arguments(backend, bad, message):
    tensors, options = draw((2, 24, 6, 5), 6, torch.float32, "cpu")
    with forced(backend), pytest.raises(ValueError, match=message):
        group_norm(**tensors, **options | bad)


def test_mismatched_shapes_are_refused(device):
    fusion = {**SUM, "add": True, "scale_shift": True, "skip": 8}
    tensors, options = draw((2, 24, 6, 4), 6, torch.float32, device, **fusion)
    right = tensors["skip"]
    for name, value, message in (
        ("skip", right.half(), "skip is torch.float16: must be torch.float32"),
        ("skip", right[..., :2], r"skip is \(2, 8, 6, 2\): must be \(2, 8, 6, 4\)"),
        ("skip", right[:1], r"skip is \(1, 8, 6, 4\): must be"),
        ("residual", right, r"residual is \(2, 8, 6, 4\): must be \(2, 16, 6, 4\)"),
        ("x_bias", tensors["bias"], r"x_bias is \(24,\): must be \(16,\)"),
        ("add", tensors["add"][:1], r"add is \(1, 24\): must be \(2, 24\)"),
        ("shift", None, "only one of scale and shift is given"),
    ):
        with pytest.raises(ValueError, match=message):
            group_norm(**tensors | {name: value}, **options)
    with pytest.raises(ValueError, match="cannot be combined with dropout or skip"):
        group_norm(**tensors, **options, resample="up")


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


COMBINATIONS = {
    "sum-scale_shift": {**SUM, "scale_shift": True, "add": True, "dropout": 0.2},
    "sum-skip": {**SUM, "skip": 7},
    "sum-down": {**SUM, "resample": "down"},
    "up": {"resample": "up"},
}


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


@pytest.mark.parametrize("fusion", [{**SUM, "skip": 7}, {"resample": "down"}], ids=str)
def test_one_output_used_at_a_time(fusion, device):
    """Unused outputs contribute no gradient."""
    tensors, options = draw((2, 24, 6, 4), 6, torch.float32, device, **fusion)
    double = {k: v.double() for k, v in tensors.items()}
    with forced("triton"):
        incoming = like(group_norm(**tensors, **options))
    for used, grad in enumerate(incoming):
        if grad is not None:
            alone = GroupNormOutput(*(g if i == used else None for i, g in enumerate(incoming)))
            with forced("triton"):
                _, grads, _ = run(group_norm, tensors, options, alone)
            _, refs, _ = run(group_norm_eager, double, options, alone)
            for name, result in grads.items():
                ref = 0.0 if refs[name] is None else refs[name]
                assert (result - ref).norm() <= 1e-5 * grad.norm(), (used, name)


class ActivationCalls(TorchDispatchMode):
    """Record (operator, arguments, results) of all calls that read or write an activation."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        outs = out if isinstance(out, tuple | list) else [out]
        active = any(isinstance(v, torch.Tensor) and v.dim() == 4 for v in (*args, *outs))
        if active and not func.is_view:
            self.calls.append((func, args, out))
        return out


def recorded_calls(fusion, device, frozen=()):
    """Return the calls of forward and those of backward, with a gradient for every output."""
    tensors, options = draw((2, 24, 6, 6), 6, torch.float32, device, **fusion)
    options["seed"] = torch.tensor([3, 4, 0], device=device)
    leaves = {k: v.requires_grad_(k not in frozen) for k, v in tensors.items()}
    with forced("triton"), ActivationCalls() as forward:
        out = group_norm(**leaves, **options)
    outs = [v for v in out if v is not None]
    ins = [torch.randn_like(v) for v in outs]
    with ActivationCalls() as backward:
        torch.autograd.grad(outs, [v for v in leaves.values() if v.requires_grad], ins)
    return forward.calls, backward.calls


@pytest.mark.parametrize("fusion", COMBINATIONS)
def test_the_kernels_are_the_only_passes(fusion, device):
    """Each direction makes one call on activations, to an operator that passes opcheck."""
    for calls, operator in zip(
        recorded_calls(COMBINATIONS[fusion], device),
        (torch.ops.sid_fast.group_norm, torch.ops.sid_fast.group_norm_backward),
        strict=True,
    ):
        assert [call[0] for call in calls] == [operator.default]
        with forced("triton"):
            torch.library.opcheck(*calls[0][:2], test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("fusion", "fused", "shape", "directions"),
    [
        ("plain", {}, (24, 6), 2),
        ("sum", SUM, (24, 6), 2),
        ("norm2", {"residual": True}, (24, 6), 1),
        ("plain skip", {"skip": 7}, (17, 7, 6), 1),
        ("sum down", {**SUM, "resample": "down"}, (24, 6), 1),
        ("plain up", {"resample": "up"}, (24, 6), 1),
    ],
)
def test_bytes_moved(fusion, fused, shape, directions, device):
    """Every activation that an operator reads or writes counts once."""
    for backward, ((_, args, outs),) in enumerate(recorded_calls(fused, device)[:directions]):
        activations = [v for v in (*args, *outs) if isinstance(v, torch.Tensor) and v.dim() == 4]
        moved = bytes_moved(fusion, shape, 2, 4, bool(backward))
        assert moved == sum(v.numel() * 4 for v in activations)


def test_a_frozen_norm_computes_no_parameter_gradients(device):
    fusion = {**SUM, "scale_shift": True, "add": True}
    parameters = ("weight", "bias", "x_bias", "add", "scale", "shift")
    for frozen, sizes in (((), [24, 48, 48, 48, 48]), (parameters, [0] * 5)):
        ((_, _, (dx, dskip, *rest)),) = recorded_calls(fusion, device, frozen)[1]
        assert dx.shape == (2, 24, 6, 6)
        assert not len(dskip)
        assert [v.numel() for v in rest] == sizes


def test_eager_on_a_cpu_equals_pytorchs_own_operations():
    """Without a seed, dropout draws from torch's generator."""
    tensors, options = draw((2, 32, 4, 4), 8, torch.float32, "cpu")
    torch.manual_seed(5)
    out = group_norm(**tensors, **options, dropout=0.5).y
    torch.manual_seed(5)
    norm = torch.nn.functional.group_norm(tensors["x"], 8, tensors["weight"], tensors["bias"], EPS)
    norm = torch.nn.functional.silu(norm)
    assert torch.equal(out, torch.nn.functional.dropout(norm, 0.5))


@pytest.mark.parametrize("fusion", COMBINATIONS)
def test_compiles_without_a_graph_break(fusion, device):
    tensors, options = draw((2, 24, 6, 4), 6, torch.float32, device, **COMBINATIONS[fusion])
    options["seed"] = torch.tensor([3, 4, 0], device=device)
    with forced("triton"):
        incoming = like(group_norm(**tensors, **options))

    def loss(**tensors):
        outs = group_norm(**tensors, **options)
        return sum((o * g).sum() for o, g in zip(outs, incoming, strict=True) if g is not None)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = {k: v.requires_grad_() for k, v in tensors.items()}
    with forced("triton"):
        plain, traced = loss(**leaves), compiled(**leaves)
        grads, traced_grads = (
            torch.autograd.grad(v, list(leaves.values())) for v in (plain, traced)
        )
    assert torch.equal(plain, traced)
    for name, grad, other in zip(leaves, grads, traced_grads, strict=True):
        assert torch.equal(grad, other), name


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


@pytest.mark.parametrize("key", sorted(FEWER_PER_THREAD, key=str), ids=str)
def test_launches_with_fewer_elements_per_thread(key, device, monkeypatch):
    """Use 4 of the 32 groups: the same program, but an eighth as many."""
    channels, side, dtype, resample, backward = key
    few = channels // 8
    monkeypatch.setitem(
        FEWER_PER_THREAD, (few, side, dtype, resample, backward), FEWER_PER_THREAD[key]
    )
    launch.cache_clear()
    real, small = (
        launch((c, side, side), c, dtype, groups, True, resample, backward).constants
        for c, groups in ((channels, 32), (few, 4))
    )
    assert real | {"CHANNELS": few, "LEFT": few, "GROUPS": 4} == small
    check(*draw((1, few, side, side), 4, dtype, device, resample=resample), dtype)
    launch.cache_clear()


def test_configurations_cover_what_a_step_launches():
    """norm1 with and without dropout, backward with and without frozen weights, unique labels."""
    constants_of = {label: constants for label, _, _, constants, _, _ in configurations()}
    assert len(constants_of) == len(list(configurations()))
    shape = "256@32x32 bf16"
    assert constants_of[f"forward norm1 add {shape}"]["seed_ptr"] is None
    assert "seed_ptr" not in constants_of[f"forward norm1 add dropout {shape}"]
    trained, frozen = (constants_of[f"backward sum{end} {shape}"] for end in ("", " frozen"))
    parameter_gradients = {"dparam_ptr", "dx_bias_ptr"}
    assert parameter_gradients <= frozen.keys()
    assert not parameter_gradients & trained.keys()
