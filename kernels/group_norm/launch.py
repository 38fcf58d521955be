"""How the kernels are launched for a shape."""

import functools
import math
from typing import Any, NamedTuple

import torch


def _power_of_two(n: int) -> int:
    """The least power of two ≥ n."""
    return 1 << (n - 1).bit_length()


def _groups_per_block(channels: int, groups: int, pixels: int) -> tuple[int, int]:
    """GROUPS_PER_BLOCK, and BLOCK_C, the lanes (a power of two) over which they lie.

    32 lanes are 64 bytes in 16 bit. Small images take more, so that a program has enough to do;
    so do groups that would leave over a quarter of the lanes idle. Among the numbers that fill
    the lanes, whole 16-byte pieces come first, then blocks of equal size.
    """
    group = channels // groups
    lanes = max(32, min(128, 4096 // _power_of_two(pixels)))
    while lanes < channels:
        fits = [k for k in range(1, groups + 1) if 3 * lanes <= 4 * k * group <= 4 * lanes]
        if fits:
            return max(fits, key=lambda k: (k * group % 8 == 0, groups % k == 0, k)), lanes
        lanes *= 2
    return groups, max(8, _power_of_two(channels))


# Launches whose threads hold less than the usual share, by this factor, and why:
# (channels, side, type, resample, backward).
SPREAD = {
    # 172 registers: one program of 8 warps would have a multiprocessor to itself.
    (576, 16, torch.bfloat16, "up", False): 2,
    # ptxas would rather keep a word in memory than give up a program.
    (576, 16, torch.float32, "up", True): 2,
    (1536, 8, torch.float32, None, False): 2,
    (256, 64, torch.float16, None, False): 2,
    (512, 32, torch.float16, None, False): 2,
    (256, 16, torch.float16, None, True): 2,
}


class Launch(NamedTuple):
    """What does not change between the launches of a kernel for one shape."""

    blocks: int  # programs a sample
    tiles: int
    constants: dict[str, Any]  # compile-time constants, warps and stages


@functools.cache
def launch(
    shape: tuple[int, ...],
    left: int,
    dtype: torch.dtype,
    groups: int,
    silu: bool,
    resample: str | None,
    backward: bool,
) -> Launch:
    """For the norm of [C, H, W], `left` of whose channels are those of h.

    A program's block of up to 8192 elements stays in registers, 32 of them a thread; 16 in the
    backward of float32, where 32 spilled on sm_100. A larger block goes over its tiles twice with 8
    warps, 64 bytes a thread at a time (of two tensors in backward), and keeps 8 elements of every
    running sum. 16 warps for images of 64x64 would leave one program a multiprocessor, which
    cannot compute while it waits for memory.
    """
    channels, height, width = shape
    pixels = height * width
    per_block, block_c = _groups_per_block(channels, groups, pixels)
    block_hw, fold = max(4, _power_of_two(pixels)), 1
    held = 16 if backward and dtype == torch.float32 else 32
    warps = max(1, block_hw * block_c // (32 * held))
    if block_hw * block_c > 8192:
        warps = 8
        fold = (4 if backward else 8) // dtype.itemsize
        block_hw = warps * 32 * 8 * fold // block_c
    less = SPREAD.get((channels, width, dtype, resample, backward), 1)
    if block_hw >= pixels:
        warps *= less
    else:
        block_hw //= less
    constants = {
        "PIXELS": pixels,
        "WIDTH": width,
        "CHANNELS": channels,
        "LEFT": left,
        "GROUPS": groups,
        "GROUPS_PER_BLOCK": per_block,
        "GROUPS_POW2": _power_of_two(per_block),
        "BLOCK_C": block_c,
        "BLOCK_HW": block_hw,
        "FOLD": fold,
        "VECTOR": math.gcd(4, per_block * channels // groups, channels, left),
        "SILU": silu,
        "RESAMPLE": resample,
        "num_warps": warps,
        "num_stages": 1,
    }
    return Launch(-(-groups // per_block), -(-pixels // block_hw), constants)
