"""Magnitude-preserving sum with optional clipping."""

import math

import torch

from sid_fast.kernels._operator import operator
from sid_fast.kernels._triton import tl, triton
from sid_fast.kernels.dispatch import choose
from sid_fast.kernels.group_norm.device import saturated, saturating_cast
from sid_fast.kernels.mp.device import PER_THREAD, WARPS, channels_last, load, store

BLOCK = WARPS * 32 * PER_THREAD


def mp_sum(
    a: torch.Tensor, b: torch.Tensor, t: float, limit: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return clip(((1 − t)·a + t·b)/√((1 − t)² + t²), ±limit), for two consumers.

    Independent a and b keep their magnitude (arXiv 2312.02696, equation 88).

    Args:
        a: [N, C, H, W], float32 or 16 bit.
        b: Like a.
        t: The share of b, from 0 to 1.
        limit: Where to clip; an element that comes out at ±limit has no gradient. None: never.

    Returns:
        The sum, twice: each consumer takes one, so that backward adds their gradients in the pass
        that it makes anyway.

    Raises:
        ValueError: if the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"mp_sum: shapes {tuple(a.shape)} and {tuple(b.shape)} differ")
    if choose("mp", a.device) == "eager":
        out = mp_sum_eager(a, b, t, limit)
        return out, out
    return _MPSum.apply(channels_last(a), channels_last(b), t, limit)


def mp_sum_eager(
    a: torch.Tensor, b: torch.Tensor, t: float, limit: float | None = None
) -> torch.Tensor:
    """Compute `mp_sum` in plain PyTorch, for tensors of any shape; returned once."""
    out = torch.lerp(a, b, t) / math.sqrt((1 - t) ** 2 + t**2)
    return out if limit is None else out.clamp(-limit, limit)


@triton.jit
def _tile(size, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offset = tl.arange(0, BLOCK)
    return first, offset, offset < size - first


@triton.jit
def forward_kernel(
    a_ptr, b_ptr, out_ptr, clipped_ptr, size, a_gain, b_gain, limit, BLOCK: tl.constexpr
):  # fmt: skip
    """Add and clip BLOCK elements; `clipped` tells whether any element was beyond the limit."""
    first, offset, mask = _tile(size, BLOCK)
    out = load(a_ptr + first + offset, mask) * a_gain + load(b_ptr + first + offset, mask) * b_gain
    if limit is not None:
        beyond = tl.max((tl.abs(out) > limit).to(tl.int32), 0)
        tl.store(clipped_ptr + tl.program_id(0), beyond.to(tl.int8))
        out = tl.clamp(out, -limit, limit, tl.PropagateNan.ALL)
    store(out_ptr + first + offset, out, mask)


@triton.jit
def backward_kernel(
    grad_ptr, other_grad_ptr, out_ptr, clipped_ptr, da_ptr, db_ptr, size, a_gain, b_gain, limit,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the gradients of both outputs; read `out` only where forward clipped something."""
    first, offset, mask = _tile(size, BLOCK)
    grad = load(grad_ptr + first + offset, mask)
    if other_grad_ptr is not None:
        grad += load(other_grad_ptr + first + offset, mask)
    if limit is not None:  # noqa: SIM102 (without a limit there are no flags to load)
        if tl.load(clipped_ptr + tl.program_id(0)) != 0:
            out = load(out_ptr + first + offset, mask)
            rounded = saturating_cast(tl.full([BLOCK], limit, tl.float32), out_ptr.dtype.element_ty)
            grad = tl.where(tl.abs(out) < saturated(rounded), grad, 0.0)
    store(da_ptr + first + offset, grad * a_gain, mask)
    store(db_ptr + first + offset, grad * b_gain, mask)


def gains(t: float) -> tuple[float, float]:
    """Return the factors of a and b."""
    norm = math.sqrt((1 - t) ** 2 + t**2)
    return (1 - t) / norm, t / norm


def _run_forward(
    a: torch.Tensor, b: torch.Tensor, t: float, limit: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum and, if there is a limit, a flag per BLOCK elements; a, b channels-last."""
    out, clipped = _forward_like(a, b, t, limit)
    with torch.cuda.device_of(a):
        forward_kernel[(-(-a.numel() // BLOCK),)](
            a, b, out, clipped, a.numel(), *gains(t), limit, BLOCK, num_warps=WARPS
        )
    return out, clipped


def _forward_like(a, b, t, limit):
    flags = 0 if limit is None else -(-a.numel() // BLOCK)
    return torch.empty_like(a), a.new_empty(flags, dtype=torch.int8)


def _run_backward(
    grad: torch.Tensor,
    other_grad: torch.Tensor | None,
    out: torch.Tensor | None,
    clipped: torch.Tensor | None,
    t: float,
    limit: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    da, db = _backward_like(grad, other_grad, out, clipped, t, limit)
    with torch.cuda.device_of(grad):
        backward_kernel[(-(-grad.numel() // BLOCK),)](
            grad, other_grad, out, clipped, da, db, grad.numel(), *gains(t), limit, BLOCK,
            num_warps=WARPS,
        )  # fmt: skip
    return da, db


def _backward_like(grad, other_grad, out, clipped, t, limit):
    return torch.empty_like(grad), torch.empty_like(grad)


_forward = operator("mp_sum", _run_forward, _forward_like)
_backward = operator("mp_sum_backward", _run_backward, _backward_like)


class _MPSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, t, limit):
        out, clipped = _forward(a, b, t, limit)
        ctx.save_for_backward(*((None, None) if limit is None else (out, clipped)))
        ctx.options = t, limit
        ctx.set_materialize_grads(False)
        return out, out.view_as(out)

    @staticmethod
    def backward(ctx, *grads):
        given = [channels_last(grad) for grad in grads if grad is not None]
        if not given:
            return None, None, None, None
        other = given[1] if len(given) == 2 else None
        return *_backward(given[0], other, *ctx.saved_tensors, *ctx.options), None, None
