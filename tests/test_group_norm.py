"""The group norm kernel against float64, forward and backward."""

import pytest
import torch

from sid_fast.kernels.dispatch import forced
from sid_fast.kernels.group_norm import group_norm, group_norm_ref

# Largest ‖out − ref‖/‖ref‖, the reference in float64 on the same rounded inputs. Rounding to
# nearest costs 0.0017 in bfloat16; Triton's interpreter cuts off instead, which costs 0.0034.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
EPS = 1e-5

# What surrounds the norm: conditioning, activation, residual.
PATTERNS = {
    "silu": {},
    "plain": {"silu": False},
    "add": {"add": True},
    "film": {"film": True},
    "residual": {"residual": True},
    "residual-add": {"residual": True, "add": True},
    "residual-plain": {"residual": True, "silu": False},
}
# [N, C, H, W] and groups: sizes that stay on chip, sizes that take several tiles, awkward ones.
SHAPES = {
    "4-a-group": ((2, 128, 4, 4), 32),
    "6-a-group": ((1, 192, 4, 4), 32),
    "8-a-group": ((2, 256, 4, 4), 32),
    "12-a-group": ((1, 384, 5, 7), 32),
    "18-a-group": ((1, 576, 4, 4), 32),
    "24-a-group": ((1, 768, 3, 3), 32),
    "36-a-group": ((1, 1152, 1, 2), 32),
    "42-a-group": ((1, 1344, 3, 1), 32),
    "48-a-group": ((1, 1536, 2, 1), 32),
    "few-channels": ((3, 24, 6, 5), 6),
    "one-pixel": ((2, 64, 1, 1), 8),
    "odd-group": ((1, 35, 9, 3), 7),
    "one-group": ((1, 96, 3, 3), 1),
    "top-of-64": ((1, 128, 64, 64), 32),
    "tiles": ((1, 24, 32, 33), 2),
    "tiles-6-a-group": ((1, 42, 32, 16), 7),
    "odd-tiles": ((2, 20, 19, 29), 5),
}


def relative(out: torch.Tensor, ref: torch.Tensor) -> float:
    return ((out.double() - ref).norm() / ref.norm().clamp(min=1e-30)).item()


def draw(shape, groups, dtype, device, add=False, film=False, residual=False, silu=True):
    """Arguments of group_norm, with a mean that is not small; and what takes a gradient."""
    torch.manual_seed(0)
    n, c = shape[:2]

    def normal(*size, dtype=dtype):
        return torch.randn(size).to(device, dtype)

    x = (torch.randn(shape) * 2 + 3 * torch.randn(1, c, 1, 1)).to(device, dtype)
    tensors = {
        "x": x.contiguous(memory_format=torch.channels_last),
        "weight": normal(c, dtype=torch.float32),
        "bias": normal(c, dtype=torch.float32),
    }
    if add:
        tensors["add"] = normal(n, c)
    if film:
        tensors["scale"], tensors["shift"] = normal(n, 2 * c).chunk(2, dim=1)
    if residual:
        tensors["residual"] = normal(*shape).contiguous(memory_format=torch.channels_last)
    options = {"groups": groups, "eps": EPS, "silu": silu}
    if residual:
        options["residual_scale"] = 0.5**0.5
    return tensors, options


def run(function, tensors, options, weights, kept=None):
    """Outputs, and gradients of a weighted sum of them; kept: a dropout mask, already scaled."""
    tensors = {k: v.detach().requires_grad_() for k, v in tensors.items()}
    out = function(**tensors, **options)
    out = list(out) if isinstance(out, tuple) else [out]
    if kept is not None:
        out[0] = out[0] * kept
    sum((o * w.to(o.dtype)).sum() for o, w in zip(out, weights, strict=False)).backward()
    return out, {k: v.grad for k, v in tensors.items()}


def check(tensors, options, dtype, kept=None):
    """Kernel and float64 reference agree in every output and gradient."""
    double = {k: v.double() for k, v in tensors.items()}
    exact = {k: v for k, v in options.items() if k not in ("dropout", "seed")}
    weights = [torch.randn(tensors["x"].shape).to(tensors["x"]) for _ in range(2)]
    with forced("triton"):
        outs, grads = run(group_norm, tensors, options, weights)
    if "residual" in tensors:  # the norm is of the sum as it was stored
        scale = options["residual_scale"]
        stored = outs[1].detach().double()
        assert relative(stored, (double["x"] + double["residual"]) * scale) <= TOLERANCE[dtype]
        double["x"] = stored / scale - double["residual"]
    refs, ref_grads = run(group_norm_ref, double, exact, weights, kept)
    assert len(outs) == len(refs)
    errors = {}
    for i, (out, ref) in enumerate(zip(outs, refs, strict=True)):
        assert out.dtype == dtype
        assert out.is_contiguous(memory_format=torch.channels_last)
        errors[f"output {i}"] = relative(out, ref)
    for name, ref in ref_grads.items():
        assert grads[name].dtype == tensors[name].dtype
        errors[name] = relative(grads[name], ref)
    assert all(error <= TOLERANCE[dtype] for error in errors.values()), errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, dtype, device):
    """Every group size and image size, with everything around the norm."""
    film = {"film": True} if shape.endswith("a-group") else {"add": True}
    check(*draw(*SHAPES[shape], dtype, device, residual=True, **film), dtype)


@DTYPES
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", ["few-channels", "odd-tiles"])
def test_patterns(shape, pattern, dtype, device):
    """Everything that may surround the norm, on chip and over several tiles."""
    check(*draw(*SHAPES[shape], dtype, device, **PATTERNS[pattern]), dtype)


def mask(shape, groups, dropout, seed, device):
    """0 or 1/(1 − dropout): the output where weight is 0 and bias is 1."""
    zeros = torch.zeros(shape, device=device).contiguous(memory_format=torch.channels_last)
    flat = zeros[0, :, 0, 0]
    with forced("triton"):
        return group_norm(
            zeros, flat, flat + 1, groups, EPS, silu=False, dropout=dropout, seed=seed
        )


@DTYPES
@pytest.mark.parametrize("shape", ["few-channels", "odd-tiles"])
def test_dropout(shape, dtype, device):
    """Backward recomputes the mask of forward."""
    seed = torch.tensor([-(2**62) - 5, 2**40 + 3], device=device)
    tensors, options = draw(*SHAPES[shape], dtype, device, add=True, film=True, residual=True)
    kept = mask(*SHAPES[shape], 0.3, seed, device).double()
    check(tensors, options | {"dropout": 0.3, "seed": seed}, dtype, kept)


def test_dropout_is_fair(device):
    """The rate is right, nothing repeats over samples, channels or pixels, and seeds differ."""
    shape, groups, p = (2, 64, 16, 16), 8, 0.13
    masks = []
    for seed in [(1, 0), (2, 0), (1, 1), (1, 2**32), (1 + 2**32, 0)]:
        kept = mask(shape, groups, p, torch.tensor(seed, device=device), device)
        values = kept.unique()
        assert len(values) == 2 and values[0] == 0
        assert values[1] == pytest.approx(1 / (1 - p), rel=1e-4)
        assert kept.mean().item() == pytest.approx(1, abs=4 * (p / (1 - p) / kept.numel()) ** 0.5)
        masks.append(kept)
    independent = [(a - 1) * (b - 1) for i, a in enumerate(masks) for b in masks[:i]]
    first = masks[0] - 1
    independent += [first * first.roll(1, d) for d in range(4)] + [first * first.roll(8, 1)]
    for product in independent:
        assert abs(product.mean().item()) < 5 * p / (1 - p) / product.numel() ** 0.5


def test_dropout_draws_its_seed_from_torch(device):
    tensors, options = draw((1, 32, 8, 8), 8, torch.float32, device)
    with forced("triton"):
        out = []
        for manual in (0, 0, 1):
            torch.manual_seed(manual)
            out.append(group_norm(**tensors, **options, dropout=0.5))
    assert torch.equal(out[0], out[1]) and not torch.equal(out[0], out[2])


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_dropout_out_of_range(dropout, device):
    tensors, options = draw((1, 32, 2, 2), 8, torch.float32, device)
    with forced("triton"), pytest.raises(ValueError, match=f"dropout={dropout}"):
        group_norm(**tensors, **options, dropout=dropout)


@pytest.mark.parametrize("layout", ["NCHW", "strided"])
def test_layouts(layout, device):
    """Any input layout; channels-last out. The incoming gradient may have any layout too."""
    tensors, options = draw((2, 24, 6, 5), 6, torch.float32, device, residual=True, film=True)
    for name in ("x", "residual"):
        value = tensors[name].contiguous()
        if layout == "strided":
            value = torch.stack([value, value + 1], dim=-1)[..., 0]
        tensors[name] = value
    tensors["scale"] = tensors["scale"].t().contiguous().t()
    check(tensors, options, torch.float32)


def test_large_mean(device):
    """A mean a thousand times the deviation costs no more digits than float32 has."""
    for shape, groups in (SHAPES["few-channels"], SHAPES["odd-tiles"]):
        tensors, options = draw(shape, groups, torch.float32, device)
        tensors["x"] = torch.randn_like(tensors["x"]) + 1000
        ref = group_norm_ref(**{k: v.double() for k, v in tensors.items()}, **options)
        with forced("triton"):
            out = group_norm(**tensors, **options)
        assert relative(out, ref) < 1e-4


def test_a_sample_does_not_depend_on_its_batch(device):
    """Not its output, its dropout or its gradient, to the bit; nor do runs differ."""
    shape, groups = SHAPES["odd-tiles"]
    tensors, options = draw(shape, groups, torch.float32, device, film=True, residual=True)
    options |= {"dropout": 0.2, "seed": torch.tensor([3, 4], device=device)}
    weights = [torch.randn(shape).to(device) for _ in range(2)]
    first = {k: v if v.dim() == 1 else v[:1] for k, v in tensors.items()}
    with forced("triton"):
        out, grads = run(group_norm, tensors, options, weights)
        again, grads_again = run(group_norm, tensors, options, weights)
        alone, grads_alone = run(group_norm, first, options, [w[:1] for w in weights])
    assert all(torch.equal(a, b) for a, b in zip(out, again, strict=True))
    assert all(torch.equal(grads[k], grads_again[k]) for k in grads)
    assert all(torch.equal(a[:1], b) for a, b in zip(out, alone, strict=True))
    for name in ("x", "residual", "scale", "shift"):
        assert torch.equal(grads[name][:1], grads_alone[name]), name


def test_a_nonfinite_sample_stays_alone(device):
    tensors, options = draw((3, 24, 6, 5), 6, torch.float32, device, film=True)
    with forced("triton"):
        clean = group_norm(**tensors, **options)
        tensors["x"][1, 3, 2, 2] = float("nan")
        out = group_norm(**tensors, **options)
    assert torch.equal(out[::2], clean[::2])
    assert out[1, :4].isnan().all() and torch.equal(out[1, 4:], clean[1, 4:])


def test_only_what_is_asked(device):
    """A frozen norm gets no parameter gradients; one unused output of two is a gradient of 0."""
    tensors, options = draw((2, 24, 6, 5), 6, torch.float32, device, residual=True)
    for used in (0, 1):
        leaves = {k: v.detach().clone() for k, v in tensors.items()}
        leaves["x"].requires_grad_()
        double = {k: v.detach().double() for k, v in leaves.items()}
        double["x"].requires_grad_()
        with forced("triton"):
            group_norm(**leaves, **options)[used].sum().backward()
        group_norm_ref(**double, **options)[used].sum().backward()
        assert leaves["weight"].grad is None
        assert relative(leaves["x"].grad, double["x"].grad) < 1e-4


def test_reference_is_unchanged_on_a_cpu():
    """A CPU runs plain PyTorch, dropout from torch's generator."""
    tensors, options = draw((2, 32, 4, 4), 8, torch.float32, "cpu")
    torch.manual_seed(5)
    out = group_norm(**tensors, **options, dropout=0.5)
    torch.manual_seed(5)
    norm = torch.nn.functional.group_norm(tensors["x"], 8, tensors["weight"], tensors["bias"], EPS)
    norm = torch.nn.functional.silu(norm)
    assert torch.equal(out, torch.nn.functional.dropout(norm, 0.5))


@pytest.mark.parametrize("features", [{}, {"film": True, "residual": True}], ids=["silu", "all"])
def test_registration(features, device):
    """Schema, fake tensors, autograd and tracing with dynamic shapes agree with the operator."""
    tensors, _ = draw((2, 24, 3, 2), 6, torch.float32, device, **features)
    tensors = {k: v.detach().requires_grad_() for k, v in tensors.items()}
    names = ("x", "weight", "bias", "add", "scale", "shift", "residual")
    arguments = [tensors.get(name) for name in names]
    torch.library.opcheck(
        torch.ops.sid_fast.group_norm.default,
        (*arguments, torch.tensor([1, 2], device=device), 6, EPS, True, 0.25, 0.5),
    )


def test_compiles_without_a_graph_break(device):
    tensors, options = draw((2, 24, 3, 2), 6, torch.float32, device, film=True, residual=True)
    weights = [torch.randn(2, 24, 3, 2).to(device) for _ in range(2)]
    compiled = torch.compile(group_norm, fullgraph=True, backend="aot_eager")
    with forced("triton"):
        outs, grads = run(group_norm, tensors, options, weights)
        same, same_grads = run(compiled, tensors, options, weights)
    assert all(torch.equal(a, b) for a, b in zip(outs, same, strict=True))
    assert all(torch.equal(grads[k], same_grads[k]) for k in grads)
