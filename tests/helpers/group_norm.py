"""Inputs of group_norm, and its comparison with float64."""

import pytest
import torch

from sid_fast.kernels.dispatch import forced
from sid_fast.kernels.group_norm import GroupNormOutput, group_norm, group_norm_eager

# Bounds on ‖out − ref‖/‖ref‖; ref is computed in float64 from the same rounded inputs. Rounding to
# nearest costs 0.0017 in bfloat16, and dropout's backward over tiles rounds twice.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
EPS = 1e-5
LAST = torch.channels_last
# A sum fused with the norm, as in the U-Net's blocks.
SUM = {"residual": True, "x_bias": True, "x_scale": 0.5**0.5}
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


COMBINATIONS = {
    "sum-scale_shift": {**SUM, "scale_shift": True, "add": True, "dropout": 0.2},
    "sum-skip": {**SUM, "skip": 7},
    "sum-down": {**SUM, "resample": "down"},
    "up": {"resample": "up"},
}
