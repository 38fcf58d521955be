"""The group norm kernel against float64, forward and backward."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sid_fast.kernels._triton import tl, triton
from sid_fast.kernels.dispatch import forced
from sid_fast.kernels.dropout import philox_2x32
from sid_fast.kernels.group_norm import (
    SPREAD,
    GroupNormOutput,
    bytes_moved,
    configurations,
    group_norm,
    group_norm_eager,
    launch,
)

# Largest ‖out − ref‖/‖ref‖, the reference in float64 on the same rounded inputs. Rounding to
# nearest costs 0.0017 in bfloat16, and dropout's backward over tiles rounds twice.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
EPS = 1e-5
LAST = torch.channels_last

# What surrounds the norm, as the networks combine it.
SUM = {"residual": True, "x_bias": True, "x_scale": 0.5**0.5}
FORMS = {
    "silu": {},
    "plain": {"silu": False},
    "x_bias": {"x_bias": True},
    "x_scale": {"x_scale": 0.5},
    "residual": {"residual": True, "silu": False},
    "add": {"add": True},
    "film": {"film": True},
    "add-film": {"add": True, "film": True},
    "sum-add": {**SUM, "add": True},
    "skip": {"skip": 7},
    "sum-skip": {**SUM, "skip": 11, "add": True},
    "down": {"resample": "down"},
    "up": {"resample": "up"},
    "sum-down": {**SUM, "resample": "down"},
    "sum-up": {**SUM, "resample": "up", "add": True},
}
# [N, C, H, W] and groups: sizes that stay on chip, sizes that take several tiles, awkward ones.
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
# The same for two tensors that are normalised as one, with the second one's channels.
SEAMS = {
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
    shape, groups, dtype, device, add=False, film=False, residual=False, x_bias=False, skip=0,
    **options,
):  # fmt: skip
    """Tensors and other arguments of group_norm. Means are not small. skip: its channels."""
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
    if film:
        tensors["scale"], tensors["shift"] = normal(n, 2 * c).chunk(2, dim=1)
    return tensors, options | {"groups": groups, "eps": EPS}


def like(out: GroupNormOutput) -> GroupNormOutput:
    """An incoming gradient for every output."""
    return GroupNormOutput(*(None if v is None else torch.randn(v.shape).to(v) for v in out))


def run(function, tensors, options, incoming=None, kept=None):
    """Outputs, and the gradients that incoming ones (by default of every output, drawn) make.

    kept: a dropout mask, already scaled.
    """
    tensors = {k: v.detach().requires_grad_() for k, v in tensors.items()}
    out = function(**tensors, **options)
    if kept is not None:
        out = out._replace(y=out.y * kept)
    torch.manual_seed(1)
    incoming = incoming or like(out)
    pairs = [(o, g.to(o.dtype)) for o, g in zip(out, incoming, strict=True) if g is not None]
    torch.autograd.backward(*zip(*pairs, strict=True))
    return out, {k: v.grad for k, v in tensors.items()}, incoming


def check(tensors, options, dtype, kept=None):
    """Kernel and float64 reference agree in every output and gradient."""
    double = {k: v.double() for k, v in tensors.items()}
    exact = {k: v for k, v in options.items() if k not in ("dropout", "seed")}
    with forced("triton"):
        outs, grads, incoming = run(group_norm, tensors, options)
    h = group_norm_eager(**double, **exact).h
    assert relative(outs.h, h) <= TOLERANCE[dtype]
    # The norm is of the sum as it was stored.
    double["x"] += (outs.h.detach() - h) / options.get("x_scale", 1)
    refs, ref_grads, _ = run(group_norm_eager, double, exact, incoming, kept)
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
    """Every group size and image size, with everything around the norm."""
    film = {"film": True} if shape.endswith("a-group") else {"add": True}
    check(*draw(*SHAPES[shape], torch.float32, device, **SUM, **film), torch.float32)


@pytest.mark.parametrize("shape", ["top-of-64", "6-a-group", "odd-group", "odd-tiles"])
def test_shapes_in_bfloat16(shape, device):
    """Sizes of a tile go by the type."""
    check(*draw(*SHAPES[shape], torch.bfloat16, device, **SUM), torch.bfloat16)


@pytest.mark.parametrize("seam", SEAMS)
def test_seams(seam, device):
    """Two tensors as one, the seam inside a group or between two."""
    *shape, skip = SEAMS[seam]
    check(*draw(*shape, torch.float32, device, skip=skip, **SUM), torch.float32)


@DTYPES
@pytest.mark.parametrize("form", FORMS)
def test_forms(form, dtype, device):
    """Everything that may surround the norm, on chip."""
    check(*draw(*SHAPES["few-channels"], dtype, device, **FORMS[form]), dtype)


@pytest.mark.parametrize("form", FORMS)
def test_forms_over_tiles(form, device):
    """The same over several tiles, in the type that hides least."""
    check(*draw(*SHAPES["even-tiles"], torch.float32, device, **FORMS[form]), torch.float32)


@pytest.mark.parametrize("resample", ["down", "up"])
@pytest.mark.parametrize(
    "shape",
    [((1, 768, 2, 2), 32), ((2, 192, 4, 2), 32), ((1, 24, 6, 6), 6), ((1, 32, 34, 2), 8)],
    ids=["one-block", "upright", "six-wide", "long"],
)
def test_resampling(shape, resample, device):
    """Sides that are no power of two, and as few blocks of pixels as there can be."""
    check(*draw(*shape, torch.float32, device, **SUM, resample=resample), torch.float32)


def mask(shape, groups, dropout, seed, device):
    """0 or 1/(1 − dropout): the output where weight is 0 and bias is 1."""
    zeros = torch.zeros(shape, device=device).contiguous(memory_format=torch.channels_last)
    flat = zeros[0, :, 0, 0]
    with forced("triton"):
        out = group_norm(zeros, flat, flat + 1, groups, EPS, silu=False, dropout=dropout, seed=seed)
    return out.y


@DTYPES
@pytest.mark.parametrize("shape", ["few-channels", "odd-tiles"])
@pytest.mark.parametrize("silu", [True, False], ids=["silu", "plain"])
def test_dropout(shape, silu, dtype, device):
    """Backward has the mask of forward: recomputed, or kept in what the first pass wrote."""
    seed = torch.tensor([-(2**62) - 5, 2**40 + 3, 7], device=device)
    tensors, options = draw(*SHAPES[shape], dtype, device, **SUM, add=True, film=True, silu=silu)
    kept = mask(*SHAPES[shape], 0.3, seed, device).double()
    check(tensors, options | {"dropout": 0.3, "seed": seed}, dtype, kept)


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
    """Known answers of the Random123 library for philox2x32-10, and one more."""
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
def test_dropout_zeroes_the_share_and_scales_the_rest(p, device):
    shape, groups = (2, 64, 16, 16), 8
    kept = mask(shape, groups, p, torch.tensor([5, 6, 0], device=device), device)
    values = kept.unique()
    assert len(values) == 2
    assert values[0] == 0
    assert values[1] == pytest.approx(1 / (1 - p), rel=1e-4)
    for part in (kept, *kept, *kept.split(16, dim=1), *kept.split(4, dim=2)):
        spread = (p / (1 - p) / part.numel()) ** 0.5
        assert part.mean().item() == pytest.approx(1, abs=4.5 * spread)


def uncorrelated(a, b, p):
    """Whether two masks, less their mean of 1, are independent."""
    product = (a - 1) * (b - 1)
    return abs(product.mean().item()) < 5 * p / (1 - p) / product.numel() ** 0.5


def test_dropout_of_elements_is_independent(device):
    """Of neighbours in every dimension, and of pixels that share a block of random numbers."""
    p = 0.13
    kept = mask((2, 64, 16, 16), 8, p, torch.tensor([1, 0, 0], device=device), device)
    quarters = [(kept, kept.roll(4 * i, 2)) for i in (1, 2, 3)]
    near = [(kept, kept.roll(n, d)) for d in range(4) for n in range(1, min(4, kept.shape[d]))]
    for pair in (*near, *quarters, (kept, kept.roll(8, 1)), (kept, kept.roll((4, 1), (2, 1)))):
        assert uncorrelated(*pair, p)


def test_dropout_of_samples_layers_and_steps_is_independent(device):
    """seed is (of the step, of the layer): neither half of either is lost."""
    p, masks = 0.13, []
    for seed in [(1, 0), (2, 0), (1, 1), (1, 2), (1, 2**32), (1 + 2**32, 0), (-1, 0), (1, -1)]:
        masks += mask((2, 64, 8, 8), 8, p, torch.tensor([*seed, 0], device=device), device)
    assert all(uncorrelated(a, b, p) for a, b in itertools.combinations(masks, 2))


@pytest.mark.parametrize("shape", [(2, 24, 18, 16), (1, 64, 17, 17)], ids=str)
def test_dropout_depends_on_the_seed_alone(shape, device, monkeypatch):
    """Whatever the groups, the tiles and the type; and runs do not differ."""
    seed = torch.tensor([3, 4, 0], device=device)
    kept = mask(shape, 8, 0.3, seed, device)
    assert torch.equal(kept, mask(shape, 8, 0.3, seed, device))
    assert torch.equal(kept, mask(shape, 2, 0.3, seed, device))
    plan = launch((*shape[1:],), shape[1], torch.float32, 8, False, None, False)
    monkeypatch.setitem(SPREAD, (shape[1], shape[3], torch.float32, None, False), 2)
    launch.cache_clear()
    thinner = launch((*shape[1:],), shape[1], torch.float32, 8, False, None, False)
    assert plan != thinner
    assert torch.equal(kept, mask(shape, 8, 0.3, seed, device))
    launch.cache_clear()
    x = torch.zeros(shape, device=device, dtype=torch.bfloat16)
    flat = torch.zeros(shape[1], device=device)
    with forced("triton"):
        y = group_norm(x, flat, flat + 1, 8, EPS, silu=False, dropout=0.3, seed=seed).y
    assert torch.equal(y > 0, kept > 0)


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
        ({"resample": "up", "dropout": 0.1}, "resample='up' goes with neither"),
        ({"resample": "up", "skip": torch.zeros(2, 8, 6, 5)}, "32 channels: weight has 24"),
        ({"groups": 5}, "24 channels"),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["triton", "eager"])
def test_bad_arguments(form, bad, message):
    tensors, options = draw((2, 24, 6, 5), 6, torch.float32, "cpu")
    with forced(form), pytest.raises(ValueError, match=message):
        group_norm(**tensors, **options | bad)


def test_parts_have_to_fit(device):
    form = {**SUM, "add": True, "film": True, "skip": 8}
    tensors, options = draw((2, 24, 6, 4), 6, torch.float32, device, **form)
    right = tensors["skip"]
    for name, value, message in (
        ("skip", right.half(), "skip is torch.float16: must be torch.float32"),
        ("skip", right[..., :2], r"skip is \(2, 8, 6, 2\): must be \(2, 8, 6, 4\)"),
        ("skip", right[:1], r"skip is \(1, 8, 6, 4\): must be"),
        ("residual", right, r"residual is \(2, 8, 6, 4\): must be \(2, 16, 6, 4\)"),
        ("x_bias", tensors["bias"], r"x_bias is \(24,\): must be \(16,\)"),
        ("add", tensors["add"][:1], r"add is \(1, 24\): must be \(2, 24\)"),
        ("shift", None, "scale and shift come together"),
    ):
        with pytest.raises(ValueError, match=message):
            group_norm(**tensors | {name: value}, **options)
    with pytest.raises(ValueError, match="neither dropout nor skip"):
        group_norm(**tensors, **options, resample="up")


@pytest.mark.parametrize("layout", ["NCHW", "strided"])
def test_layouts(layout, device):
    """Any input layout; channels-last out. The incoming gradients may have any layout too."""
    form = {**SUM, "film": True, "skip": 9}
    tensors, options = draw((2, 24, 6, 5), 6, torch.float32, device, **form)
    for name in ("x", "residual", "skip"):
        value = tensors[name].contiguous()
        if layout == "strided":
            value = torch.stack([value, value + 1], dim=-1)[..., 0]
        tensors[name] = value
    tensors["scale"] = tensors["scale"].t().contiguous().t()
    check(tensors, options, torch.float32)


def test_add_may_be_one_row_for_all(device):
    """As the bias of a convolution is, expanded to [N, C]."""
    tensors, options = draw((2, 24, 6, 5), 6, torch.float32, device, film=True, add=True)
    tensors["add"] = tensors["add"][:1].expand(2, -1)
    check(tensors, options, torch.float32)


def test_large_mean(device):
    """A mean a thousand times the deviation costs no more digits than float32 has."""
    for shape, form in itertools.product(("few-channels", "even-tiles"), ({}, {"skip": 7})):
        tensors, options = draw(*SHAPES[shape], torch.float32, device, **form)
        for name in tensors.keys() & {"x", "skip"}:
            tensors[name] = torch.randn_like(tensors[name]) + 1000
        ref = group_norm_eager(**{k: v.double() for k, v in tensors.items()}, **options)
        with forced("triton"):
            out = group_norm(**tensors, **options)
        assert relative(out.y, ref.y) < 1e-4


@pytest.mark.parametrize("shape", ["few-channels", "even-tiles"])
def test_float32_subtracts_the_mean_first(shape, device):
    """Where the mean is a float32, a large one costs no digits at all."""
    tensors, options = draw(*SHAPES[shape], torch.float32, device)
    height, width = tensors["x"].shape[2:]
    signs = 1 - 2 * ((torch.arange(height)[:, None] + torch.arange(width)) % 2)
    tensors["x"] = (1024 + signs).to(tensors["x"]).expand_as(tensors["x"])
    check(tensors, options, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", ["few-channels", "even-tiles"])
def test_large_mean_in_16_bits(shape, dtype, device):
    """The mean is subtracted within one product; that costs less than the type's rounding."""
    tensors, options = draw(*SHAPES[shape], dtype, device, film=True)
    tensors["x"] = (torch.randn_like(tensors["x"].float()) + 100).to(dtype)
    check(tensors, options, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_sum_is_rounded_to_nearest(dtype, device):
    """As PyTorch rounds it; a NaN stays one."""
    tensors, options = draw(*SHAPES["few-channels"], dtype, device, residual=True)
    tensors["x"][0, 0, 0, 0] = float("nan")
    with forced("triton"):
        out = group_norm(**tensors, **options)
    assert torch.equal(out.h.nan_to_num(7), (tensors["x"] + tensors["residual"]).nan_to_num(7))


@pytest.mark.parametrize("shape", ["few-channels", "even-tiles"])
def test_the_sum_is_normalised_as_it_was_stored(shape, device):
    """Rounded: or backward, which has nothing else, would take another input than forward."""
    tensors, options = draw(*SHAPES[shape], torch.bfloat16, device, residual=True)
    tensors["x"] += 100
    with forced("triton"):
        out = group_norm(**tensors, **options)
        del tensors["residual"]
        again = group_norm(**tensors | {"x": out.h}, **options)
    assert torch.equal(out.y, again.y)


EVERYTHING = {
    "sum-film": {**SUM, "film": True, "add": True, "dropout": 0.2},
    "sum-skip": {**SUM, "skip": 7},
    "sum-down": {**SUM, "resample": "down"},
    "up": {"resample": "up"},
}


@pytest.mark.parametrize("form", EVERYTHING)
def test_a_sample_does_not_depend_on_its_batch(form, device):
    """Not its output, its dropout or its gradient, to the bit; nor do runs differ."""
    tensors, options = draw(*SHAPES["even-tiles"], torch.float32, device, **EVERYTHING[form])
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


def test_a_nonfinite_sample_stays_alone(device):
    tensors, options = draw((3, 24, 6, 5), 6, torch.float32, device, film=True)
    with forced("triton"):
        clean = group_norm(**tensors, **options).y
        tensors["x"][1, 3, 2, 2] = float("nan")
        out = group_norm(**tensors, **options).y
    assert torch.equal(out[::2], clean[::2])
    assert out[1, :4].isnan().all()
    assert torch.equal(out[1, 4:], clean[1, 4:])


@pytest.mark.parametrize("form", [{**SUM, "skip": 7}, {"resample": "down"}], ids=str)
def test_an_output_without_use(form, device):
    """Each output alone: those that nobody used bring no gradient."""
    tensors, options = draw((2, 24, 6, 4), 6, torch.float32, device, **form)
    double = {k: v.double() for k, v in tensors.items()}
    with forced("triton"):
        incoming = like(group_norm(**tensors, **options))
    for used, grad in enumerate(incoming):
        if grad is not None:
            alone = GroupNormOutput(*(g if i == used else None for i, g in enumerate(incoming)))
            with forced("triton"):
                _, grads, _ = run(group_norm, tensors, options, alone)
            _, refs, _ = run(group_norm_eager, double, options, alone)
            for name, found in grads.items():
                ref = 0.0 if refs[name] is None else refs[name]
                assert (found - ref).norm() <= 1e-5 * grad.norm(), (used, name)


class Seen(TorchDispatchMode):
    """Operators that read or write an activation, as called: with arguments and results."""

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


def seen(form, device, frozen=()):
    """The calls that forward makes, those that backward makes, and what backward takes and gives.

    Every output has an incoming gradient.
    """
    tensors, options = draw((2, 24, 6, 6), 6, torch.float32, device, **form)
    options["seed"] = torch.tensor([3, 4, 0], device=device)
    leaves = {k: v.requires_grad_(k not in frozen) for k, v in tensors.items()}
    with forced("triton"), Seen() as forward:
        out = group_norm(**leaves, **options)
    outs = [v for v in out if v is not None]
    ins = [torch.randn_like(v) for v in outs]
    with Seen() as backward:
        torch.autograd.grad(outs, [v for v in leaves.values() if v.requires_grad], ins)
    return forward.calls, backward.calls


@pytest.mark.parametrize("form", EVERYTHING)
def test_no_pass_but_the_kernels(form, device):
    """Neither way calls anything else on an activation; and the two operators are well-behaved."""
    for calls, operator in zip(
        seen(EVERYTHING[form], device),
        (torch.ops.sid_fast.group_norm, torch.ops.sid_fast.group_norm_backward),
        strict=True,
    ):
        assert [call[0] for call in calls] == [operator.default]
        with forced("triton"):
            torch.library.opcheck(*calls[0][:2], test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("form", "around", "place", "ways"),
    [
        ("plain", {}, (24, 6), 2),
        ("sum", SUM, (24, 6), 2),
        ("norm2", {"residual": True}, (24, 6), 1),
        ("plain skip", {"skip": 7}, (17, 7, 6), 1),
        ("sum down", {**SUM, "resample": "down"}, (24, 6), 1),
        ("plain up", {"resample": "up"}, (24, 6), 1),
    ],
)
def test_bytes_moved(form, around, place, ways, device):
    """All the activations that an operator takes and gives, once."""
    for backward, ((_, args, outs),) in enumerate(seen(around, device)[:ways]):
        activations = [v for v in (*args, *outs) if isinstance(v, torch.Tensor) and v.dim() == 4]
        moved = bytes_moved(form, place, 2, 4, bool(backward))
        assert moved == sum(v.numel() * 4 for v in activations)


def test_a_frozen_norm(device):
    """Does no work for the gradients of its parameters."""
    form = {**SUM, "film": True, "add": True}
    parameters = ("weight", "bias", "x_bias", "add", "scale", "shift")
    for frozen, sizes in (((), [24, 48, 48, 48, 48]), (parameters, [0] * 5)):
        ((_, _, (dx, dskip, *rest)),) = seen(form, device, frozen)[1]
        assert dx.shape == (2, 24, 6, 6)
        assert not len(dskip)
        assert [v.numel() for v in rest] == sizes


def test_reference_is_unchanged_on_a_cpu():
    """A CPU runs plain PyTorch, dropout from torch's generator."""
    tensors, options = draw((2, 32, 4, 4), 8, torch.float32, "cpu")
    torch.manual_seed(5)
    out = group_norm(**tensors, **options, dropout=0.5).y
    torch.manual_seed(5)
    norm = torch.nn.functional.group_norm(tensors["x"], 8, tensors["weight"], tensors["bias"], EPS)
    norm = torch.nn.functional.silu(norm)
    assert torch.equal(out, torch.nn.functional.dropout(norm, 0.5))


@pytest.mark.parametrize("form", EVERYTHING)
def test_compiles_without_a_graph_break(form, device):
    tensors, options = draw((2, 24, 6, 4), 6, torch.float32, device, **EVERYTHING[form])
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
        grads, same = (torch.autograd.grad(v, list(leaves.values())) for v in (plain, traced))
    assert torch.equal(plain, traced)
    for name, grad, other in zip(leaves, grads, same, strict=True):
        assert torch.equal(grad, other), name


def test_float16_has_no_infinity(device):
    """What overflows is the largest number, in and out, there and back; a NaN is not hidden."""
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


@pytest.mark.parametrize("spread", sorted(SPREAD, key=str), ids=str)
def test_shapes_that_are_spread_thinner(spread, device, monkeypatch):
    """4 of the 32 groups: the programs are the same, and an eighth of them."""
    channels, side, dtype, resample, backward = spread
    few = channels // 8
    monkeypatch.setitem(SPREAD, (few, side, dtype, resample, backward), SPREAD[spread])
    launch.cache_clear()
    real, small = (
        launch((c, side, side), c, dtype, groups, True, resample, backward).constants
        for c, groups in ((channels, 32), (few, 4))
    )
    assert real | {"CHANNELS": few, "LEFT": few, "GROUPS": 4} == small
    check(*draw((1, few, side, side), 4, dtype, device, resample=resample), dtype)
    launch.cache_clear()


def test_configurations_cover_what_a_step_launches():
    """norm1 with dropout and without, backward of a frozen network too; labels are unique."""
    found = {label: constants for label, _, _, constants, _, _ in configurations()}
    assert len(found) == len(list(configurations()))
    place = "256@32x32 bf16"
    assert found[f"forward norm1 add {place}"]["seed_ptr"] is None
    assert "seed_ptr" not in found[f"forward norm1 add dropout {place}"]
    trained, frozen = (found[f"backward sum{kind} {place}"] for kind in ("", " frozen"))
    none = {"dparam_ptr", "dx_bias_ptr"}
    assert none <= frozen.keys()
    assert not none & trained.keys()
