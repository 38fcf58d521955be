"""Group normalisation with everything the EDM U-Net does around it, one pass over memory.

Before the norm: the end of the previous block (bias of its convolution, residual, scale), the
decoder's concatenation, conditioning; after it: conditioning, activation, dropout, resampling by
two. Two tensors are normalised as one where they lie; a group may straddle the seam.

A channels-last group is a narrow column: C/groups channels (8 to 96 bytes in 16 bit) of every
pixel. A program therefore takes a block of adjacent groups of one sample, so that it reads whole
sectors, and all of its pixels. Where they fit, they stay in registers between statistics and
normalisation; where they do not, the program goes over its tiles again in reverse order, so that
what it read last is still in the first-level cache and nothing is read from memory twice.
"""

from sid_fast.kernels.group_norm.eager import GroupNormOutput, group_norm_eager
from sid_fast.kernels.group_norm.launch import SPREAD, launch
from sid_fast.kernels.group_norm.op import group_norm
from sid_fast.kernels.group_norm.shapes import (
    PLACES,
    _arguments,
    bytes_moved,
    configurations,
)

__all__ = [
    "PLACES",
    "SPREAD",
    "GroupNormOutput",
    "_arguments",
    "bytes_moved",
    "configurations",
    "group_norm",
    "group_norm_eager",
    "launch",
]
