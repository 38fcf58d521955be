"""Pixel norm and the magnitude-preserving SiLU of its result: one read of the input.

A program holds all channels of a few pixels, so that a norm is a sum within a warp. Backward
recomputes the norm from the input, which the skip connection keeps alive anyway.
"""

import math
from typing import Any, NamedTuple

import torch

from sid_fast.kernels._operator import operator
from sid_fast.kernels._triton import tl, triton
from sid_fast.kernels.dispatch import choose
from sid_fast.kernels.mp.device import (
    PER_THREAD,
    WARPS,
    channels_last,
    load,
    mp_silu,
    mp_silu_eager,
    mp_silu_grad,
    store,
)

EPS = 1e-4


class PixelNormOutput(NamedTuple):
    """The normalised pixels n and s = silu(n)/0.596, both [N, C, H, W]; s is None without SiLU."""

    n: torch.Tensor
    s: torch.Tensor | None


def pixel_norm(x: torch.Tensor, groups: int = 1, silu: bool = True) -> PixelNormOutput:
    """Return n = x/(rms(x) + 1e-4) and s = silu(n)/0.596 (arXiv 2312.02696).

    Args:
        x: [N, C, H, W], float32 or 16 bit.
        groups: The root mean square is over each of so many groups of channels of a pixel; must
            divide C.
        silu: Whether to return s.

    Returns:
        Tensors of the dtype of x; the Triton kernel writes them channels-last.

    Raises:
        ValueError: if `groups` does not divide C.
    """
    if x.shape[1] % groups:
        raise ValueError(f"pixel_norm: groups={groups} does not divide {x.shape[1]} channels")
    if choose("mp", x.device) == "eager":
        return pixel_norm_eager(x, groups, silu)
    return PixelNormOutput(*_PixelNorm.apply(channels_last(x), groups, silu))


def pixel_norm_eager(x: torch.Tensor, groups: int = 1, silu: bool = True) -> PixelNormOutput:
    """Compute `pixel_norm` in plain PyTorch; the norm in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    grouped = x.unflatten(1, (groups, -1)) if groups > 1 else x
    axis = 2 if groups > 1 else 1
    norm = torch.linalg.vector_norm(grouped, dim=axis, keepdim=True, dtype=wide)
    rms = norm / math.sqrt(x.shape[1] // groups)
    n = grouped / (rms + EPS).to(x.dtype)
    n = n.flatten(1, 2) if groups > 1 else n
    return PixelNormOutput(n, mp_silu_eager(n) if silu else None)


@triton.jit
def _tile(rows, ROW: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return (offset of the program's first row, offsets from there, mask) of its tile."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    row = tl.arange(0, BLOCK_ROWS)
    channel = tl.arange(0, BLOCK_C)[None, :]
    mask = (row < rows - first)[:, None]
    if BLOCK_C != ROW:
        mask = mask & (channel < ROW)
    return first * ROW, row[:, None] * ROW + channel, mask


@triton.jit
def forward_kernel(
    x_ptr, n_ptr, s_ptr, rows,
    ROW: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Normalise BLOCK_ROWS rows of ROW channels."""
    start, offset, mask = _tile(rows, ROW, BLOCK_ROWS, BLOCK_C)
    x = load(x_ptr + start + offset, mask)
    rms = tl.sqrt_rn(tl.sum(x * x, 1) * (1.0 / ROW))
    n = x * (1.0 / (rms + EPS))[:, None]
    store(n_ptr + start + offset, n, mask)
    if s_ptr is not None:
        store(s_ptr + start + offset, mp_silu(n), mask)


@triton.jit
def backward_kernel(
    x_ptr, n_grad_ptr, s_grad_ptr, dx_ptr, rows,
    ROW: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Compute dx from the gradients of n and s; one of them may be None.

    With g the total gradient of n and r = 1/(rms + ε): dx = r·g − x·r²·mean(x·g)/rms.
    """
    start, offset, mask = _tile(rows, ROW, BLOCK_ROWS, BLOCK_C)
    x = load(x_ptr + start + offset, mask)
    rms = tl.sqrt_rn(tl.sum(x * x, 1) * (1.0 / ROW))
    r = 1.0 / (rms + EPS)
    g = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    if s_grad_ptr is not None:
        g += load(s_grad_ptr + start + offset, mask) * mp_silu_grad(x * r[:, None])
    if n_grad_ptr is not None:
        g += load(n_grad_ptr + start + offset, mask)
    slope = tl.sum(x * g, 1) * (r * r / ROW) / tl.where(rms == 0, 1.0, rms)
    store(dx_ptr + start + offset, r[:, None] * g - x * slope[:, None], mask)


def launch(row: int, itemsize: int, backward: bool) -> dict[str, Any]:
    """Return a kernel's constants and warps for rows of `row` channels of `itemsize` bytes."""
    block_c = 1 << (row - 1).bit_length()
    per_thread = PER_THREAD // 2 if backward else PER_THREAD
    block_rows = max(1, WARPS * 32 * per_thread // block_c)
    return {
        "ROW": row, "BLOCK_ROWS": block_rows, "BLOCK_C": block_c, "EPS": EPS, "num_warps": WARPS,
    }  # fmt: skip


def _run_forward(x: torch.Tensor, groups: int, silu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return n and s, which is empty without SiLU; x must be channels-last."""
    n, s = out = _forward_like(x, groups, silu)
    row = x.shape[1] // groups
    rows = x.numel() // row
    constants = launch(row, x.itemsize, False)
    with torch.cuda.device_of(x):
        forward_kernel[(-(-rows // constants["BLOCK_ROWS"]),)](
            x, n, s if silu else None, rows, **constants
        )
    return out


def _forward_like(x, groups, silu):
    return torch.empty_like(x), torch.empty_like(x) if silu else x.new_empty(0)


def _run_backward(
    x: torch.Tensor, n_grad: torch.Tensor | None, s_grad: torch.Tensor | None, groups: int
) -> torch.Tensor:
    dx = torch.empty_like(x)
    row = x.shape[1] // groups
    rows = x.numel() // row
    constants = launch(row, x.itemsize, True)
    with torch.cuda.device_of(x):
        backward_kernel[(-(-rows // constants["BLOCK_ROWS"]),)](
            x, n_grad, s_grad, dx, rows, **constants
        )
    return dx


_forward = operator("pixel_norm", _run_forward, _forward_like)
_backward = operator(
    "pixel_norm_backward", _run_backward, lambda x, n_grad, s_grad, groups: torch.empty_like(x)
)


class _PixelNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, groups, silu):
        n, s = _forward(x, groups, silu)
        ctx.save_for_backward(x)
        ctx.groups = groups
        ctx.set_materialize_grads(False)
        return n, s if silu else None

    @staticmethod
    def backward(ctx, n_grad, s_grad):
        (x,) = ctx.saved_tensors
        if n_grad is None and s_grad is None:
            return None, None, None
        dx = _backward(x, channels_last(n_grad), channels_last(s_grad), ctx.groups)
        return dx, None, None
