"""Magnitude-preserving concatenation and SiLU: the input of a decoder block's first convolution.

The concatenated tensor is never written. What else reads it, the 1x1 skip convolution, is two
matrix products with `cat_gains` as their factors.
"""

import math
from typing import NamedTuple

import torch

from sid_fast.kernels._operator import operator
from sid_fast.kernels._triton import tl, triton
from sid_fast.kernels.dispatch import choose
from sid_fast.kernels.mp.device import (
    PER_THREAD,
    WARPS,
    block_of,
    channels_last,
    feature_map,
    load,
    mp_silu,
    mp_silu_eager,
    mp_silu_grad,
    store,
)


class CatOutput(NamedTuple):
    """The result, and aliases of the inputs for their other consumers.

    Attributes:
        s: silu(mp_cat(x, skip, t))/0.596, [N, C1 + C2, H, W].
        x: [N, C1, H, W].
        skip: [N, C2, H, W]; None without a skip tensor.
    """

    s: torch.Tensor
    x: torch.Tensor
    skip: torch.Tensor | None


def cat_gains(left: int, right: int, t: float) -> tuple[float, float]:
    """Return the factors of tensors of `left` and `right` channels in their concatenation.

    The right one contributes the share t to the magnitude (arXiv 2312.02696, equation 103).
    """
    scale = math.sqrt((left + right) / ((1 - t) ** 2 + t**2))
    return scale * (1 - t) / math.sqrt(left), scale * t / math.sqrt(right)


def mp_cat_silu(x: torch.Tensor, skip: torch.Tensor | None = None, t: float = 0.5) -> CatOutput:
    """Return silu(cat(α·x, β·skip))/0.596, α and β from cat_gains; without skip, of x alone.

    Args:
        x: [N, C1, H, W], float32 or 16 bit.
        skip: [N, C2, H, W] in the dtype of x, or None.
        t: The share of skip, from 0 to 1.

    Raises:
        ValueError: if the shapes or dtypes do not match.
    """
    if skip is not None:
        if skip.shape[0] != x.shape[0] or skip.shape[2:] != x.shape[2:]:
            raise ValueError(
                f"mp_cat_silu: skip is {tuple(skip.shape)}: only its channels may differ from x, "
                f"{tuple(x.shape)}"
            )
        if skip.dtype != x.dtype:
            raise ValueError(f"mp_cat_silu: skip is {skip.dtype}: must be {x.dtype}, like x")
    if choose("mp", x.device) == "eager":
        return CatOutput(mp_cat_silu_eager(x, skip, t), x, skip)
    return CatOutput(*_MPCatSiLU.apply(channels_last(x), channels_last(skip), t))


def mp_cat_silu_eager(
    x: torch.Tensor, skip: torch.Tensor | None = None, t: float = 0.5
) -> torch.Tensor:
    """Compute the s of `mp_cat_silu` in plain PyTorch."""
    if skip is not None:
        left, right = cat_gains(x.shape[1], skip.shape[1], t)
        x = torch.cat([x * left, skip * right], dim=1)
    return mp_silu_eager(x)


@triton.jit
def _tile(
    left_ptr, right_ptr, pixels,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Return (in_left, addresses in left or right, offsets in the concatenation, mask)."""
    BLOCKS: tl.constexpr = (LEFT + RIGHT) // BLOCK_C
    first = (tl.program_id(0) // BLOCKS).to(tl.int64) * BLOCK_ROWS
    column = tl.program_id(0) % BLOCKS * BLOCK_C
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    lane = tl.arange(0, BLOCK_C)[None, :]
    in_left = column < LEFT
    ptr = _side_ptr(left_ptr, right_ptr, first, column, row, lane, in_left, LEFT, RIGHT)
    offset = first * (LEFT + RIGHT) + column + (row * (LEFT + RIGHT) + lane)
    return first, column, row, lane, in_left, ptr, offset, row < pixels - first


@triton.jit
def _side_ptr(
    left_ptr, right_ptr, first, column, row, lane, in_left,
    LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    """Return the addresses of a tile in the left or the right tensor."""
    if RIGHT == 0:
        ptr = left_ptr + (first * LEFT + column) + (row * LEFT + lane)
    else:
        left = left_ptr + (first * LEFT + column)
        right = right_ptr + (first * RIGHT + (column - LEFT))
        ptr = tl.where(in_left, left, right) + (row * tl.where(in_left, LEFT, RIGHT) + lane)
    return ptr


@triton.jit
def forward_kernel(
    x_ptr, skip_ptr, s_ptr, pixels, left_gain, right_gain,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_ROWS pixels of BLOCK_C channels, all from one of the two tensors."""
    _, _, _, _, in_left, ptr, offset, mask = _tile(
        x_ptr, skip_ptr, pixels, LEFT, RIGHT, BLOCK_ROWS, BLOCK_C
    )
    x = load(ptr, mask)
    if RIGHT > 0:
        x *= tl.where(in_left, left_gain, right_gain)
    store(s_ptr + offset, mp_silu(x), mask)


@triton.jit
def backward_kernel(
    x_ptr, skip_ptr, s_grad_ptr, x_grad_ptr, skip_grad_ptr, dx_ptr, dskip_ptr, pixels,
    left_gain, right_gain,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of x and skip; x_grad and skip_grad, those of the aliases, are added.

    x_grad and skip_grad must be both given or both None.
    """
    first, column, row, lane, in_left, ptr, offset, mask = _tile(
        x_ptr, skip_ptr, pixels, LEFT, RIGHT, BLOCK_ROWS, BLOCK_C
    )
    x = load(ptr, mask)
    grad = load(s_grad_ptr + offset, mask)
    if RIGHT > 0:
        gain = tl.where(in_left, left_gain, right_gain)
        grad *= mp_silu_grad(x * gain) * gain
    else:
        grad *= mp_silu_grad(x)
    if x_grad_ptr is not None:
        other = _side_ptr(x_grad_ptr, skip_grad_ptr, first, column, row, lane, in_left, LEFT, RIGHT)
        grad += load(other, mask)
    out = _side_ptr(dx_ptr, dskip_ptr, first, column, row, lane, in_left, LEFT, RIGHT)
    store(out, grad, mask)


def launch(left: int, right: int) -> dict[str, int]:
    """Return the kernels' constants and warps."""
    block_c = block_of(left, right)
    return {
        "LEFT": left, "RIGHT": right, "BLOCK_ROWS": WARPS * 32 * PER_THREAD // block_c,
        "BLOCK_C": block_c, "num_warps": WARPS,
    }  # fmt: skip


def _start(kernel, x, skip, t, *tensors) -> None:
    n, left, height, width = x.shape
    right = 0 if skip is None else skip.shape[1]
    factors = (1.0, 1.0) if skip is None else cat_gains(left, right, t)
    constants = launch(left, right)
    pixels = n * height * width
    programs = -(-pixels // constants["BLOCK_ROWS"]) * ((left + right) // constants["BLOCK_C"])
    with torch.cuda.device_of(x):
        kernel[(programs,)](x, skip, *tensors, pixels, *factors, **constants)


def _run_forward(x: torch.Tensor, skip: torch.Tensor | None, t: float) -> torch.Tensor:
    s = _forward_like(x, skip, t)
    _start(forward_kernel, x, skip, t, s)
    return s


def _forward_like(x, skip, t):
    return feature_map(x, x.shape[1] + (0 if skip is None else skip.shape[1]))


def _run_backward(
    x: torch.Tensor,
    skip: torch.Tensor | None,
    s_grad: torch.Tensor,
    x_grad: torch.Tensor | None,
    skip_grad: torch.Tensor | None,
    t: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of x and of skip, which is empty without one."""
    dx, dskip = _backward_like(x, skip, s_grad, x_grad, skip_grad, t)
    grads = (s_grad, x_grad, skip_grad)
    _start(backward_kernel, x, skip, t, *grads, dx, None if skip is None else dskip)
    return dx, dskip


def _backward_like(x, skip, s_grad, x_grad, skip_grad, t):
    return torch.empty_like(x), x.new_empty(0) if skip is None else torch.empty_like(skip)


_forward = operator("mp_cat_silu", _run_forward, _forward_like)
_backward = operator("mp_cat_silu_backward", _run_backward, _backward_like)


class _MPCatSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, skip, t):
        ctx.save_for_backward(x, skip)
        ctx.t = t
        ctx.set_materialize_grads(False)
        return _forward(x, skip, t), x.view_as(x), None if skip is None else skip.view_as(skip)

    @staticmethod
    def backward(ctx, s_grad, x_grad, skip_grad):
        x, skip = ctx.saved_tensors
        if s_grad is None:
            return x_grad, skip_grad, None
        if skip is not None and (x_grad is None) != (skip_grad is None):
            x_grad = torch.zeros_like(x) if x_grad is None else x_grad
            skip_grad = torch.zeros_like(skip) if skip_grad is None else skip_grad
        grads = map(channels_last, (s_grad, x_grad, skip_grad))
        dx, dskip = _backward(x, skip, *grads, ctx.t)
        return dx, None if skip is None else dskip, None
