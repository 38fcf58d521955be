"""Group normalisation fused with its neighbours in the EDM U-Net, in one pass over memory.

Fused before the norm: the previous block's epilogue (convolution bias, residual, scale), the
decoder's concatenation, added conditioning. Fused after it: scale-shift conditioning, SiLU,
dropout, resampling by two. Concatenated inputs are normalised without copying them together; a
group may contain channels of both.

In channels-last order, a group is a narrow column: C/groups channels (8 to 96 bytes in 16 bit) of
every pixel. A program therefore owns several adjacent groups of one sample, to read full memory
sectors, and all pixels. If they fit, they stay in registers between statistics and normalisation.
Otherwise the program makes a second pass over its tiles in reverse order: those read last are
still in the L1 cache.
"""

from sid_fast.kernels.group_norm.eager import GroupNormOutput, group_norm_eager
from sid_fast.kernels.group_norm.launch import FEWER_PER_THREAD, launch
from sid_fast.kernels.group_norm.op import group_norm
from sid_fast.kernels.group_norm.shapes import (
    NORM_SHAPES,
    bytes_moved,
    configurations,
    kernel_arguments,
)

__all__ = [
    "FEWER_PER_THREAD",
    "NORM_SHAPES",
    "GroupNormOutput",
    "bytes_moved",
    "configurations",
    "group_norm",
    "group_norm_eager",
    "kernel_arguments",
    "launch",
]
