"""Element-wise chains of EDM2's magnitude-preserving blocks, each in one pass over memory.

All tensors are feature maps in channels-last order, float32 or 16 bit; the arithmetic is float32.
A tensor with two consumers is returned as two outputs, so that the backward kernel sums their
gradients, instead of an extra autograd pass.
"""

from sid_fast.kernels.mp.cat import cat_gains, mp_cat_silu, mp_cat_silu_eager
from sid_fast.kernels.mp.device import mp_silu_eager
from sid_fast.kernels.mp.norm import pixel_norm, pixel_norm_eager
from sid_fast.kernels.mp.scale import scaled_silu, scaled_silu_eager
from sid_fast.kernels.mp.shapes import SHAPES, TENSORS, bytes_moved, configurations
from sid_fast.kernels.mp.sum import mp_sum, mp_sum_eager

__all__ = [
    "SHAPES",
    "TENSORS",
    "bytes_moved",
    "cat_gains",
    "configurations",
    "mp_cat_silu",
    "mp_cat_silu_eager",
    "mp_silu_eager",
    "mp_sum",
    "mp_sum_eager",
    "pixel_norm",
    "pixel_norm_eager",
    "scaled_silu",
    "scaled_silu_eager",
]
