"""Device and host functions that the modules share."""

import torch
import torch.nn.functional as F

from sid_fast.kernels._triton import tl, triton
from sid_fast.kernels.group_norm.device import saturated, saturating_cast, sigmoid

WARPS = 4
PER_THREAD = 32  # elements of a tile


def mp_silu_eager(x: torch.Tensor) -> torch.Tensor:
    """Apply SiLU, divided by the root mean square that it makes of N(0, 1)."""
    return F.silu(x) / 0.596


def channels_last(x: torch.Tensor | None) -> torch.Tensor | None:
    """Return x, [N, C, H, W], in channels-last order; None for None."""
    return None if x is None else x.contiguous(memory_format=torch.channels_last)


def feature_map(x: torch.Tensor, channels: int) -> torch.Tensor:
    """Allocate [N, channels, H, W], channels-last, for the other dimensions and dtype of x."""
    shape = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def block_of(*channels: int, largest: int = 64) -> int:
    """Return the largest power of two up to `largest` that divides all channel counts."""
    block = largest
    while any(count % block for count in channels):
        block //= 2
    return block


@triton.jit
def mp_silu(x):
    """Return silu(x)/0.596."""
    return x * sigmoid(x, 0.596)


@triton.jit
def mp_silu_grad(x):
    """Return the derivative of silu(x)/0.596."""
    s = sigmoid(x, 1.0)
    return s * (1.0 + x * (1.0 - s)) * (1.0 / 0.596)


@triton.jit
def load(ptr, mask):
    """Load float32, 0 where masked."""
    return saturated(tl.load(ptr, mask=mask, other=0.0))


@triton.jit
def store(ptr, value, mask):
    """Store float32 in the type of the memory, with saturation in fp16."""
    tl.store(ptr, saturating_cast(value, ptr.dtype.element_ty), mask=mask)
