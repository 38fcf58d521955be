"""Launch configurations of the kernels, by shape."""

import functools
import math
from typing import Any, NamedTuple

import torch


def _power_of_two(n: int) -> int:
    """Return the smallest power of two ≥ n."""
    return 1 << (n - 1).bit_length()


def _groups_per_block(channels: int, groups: int, pixels: int) -> tuple[int, int]:
    """Return GROUPS_PER_BLOCK and BLOCK_C, the number of lanes (a power of two) that holds them.

    BLOCK_C is 32 (64 bytes in 16 bit), more for small images, to give a program enough work, and
    for group sizes that would leave over a quarter of the lanes idle; fewer for few channels.
    GROUPS_PER_BLOCK then prefers multiples of 16 bytes, then programs of equal size.
    """
    group = channels // groups
    lanes = max(32, min(128, 4096 // _power_of_two(pixels)))
    while lanes < channels:
        fits = [k for k in range(1, groups + 1) if 3 * lanes <= 4 * k * group <= 4 * lanes]
        if fits:
            return max(fits, key=lambda k: (k * group % 8 == 0, groups % k == 0, k)), lanes
        lanes *= 2
    return groups, max(8, _power_of_two(channels))


# Launches with fewer elements per thread, and the factor, by (channels, side, dtype, resample,
# backward).
FEWER_PER_THREAD = {
    # At 172 registers only one program of 8 warps would fit a multiprocessor.
    (576, 16, torch.bfloat16, "up", False): 2,
    # ptxas would spill a register to keep the occupancy.
    (576, 16, torch.float32, "up", True): 2,
    (1536, 8, torch.float32, None, False): 2,
    (256, 64, torch.float16, None, False): 2,
    (512, 32, torch.float16, None, False): 2,
    (256, 16, torch.float16, None, True): 2,
}


class Launch(NamedTuple):
    """The launch configuration of a kernel for one shape."""

    blocks: int  # programs per sample
    tiles: int  # tiles per program
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
    """Return the launch configuration of a norm.

    A program's block of up to 8192 elements stays in registers: 32 elements per thread, or 16 in
    the backward of float32, where 32 spilled on sm_100. A larger block takes two passes over its
    tiles, with 8 warps; a thread loads 64 bytes of a tile (in backward, of two tensors together)
    and holds 8 elements of each running sum. With 16 warps, for images of 64x64, only one program
    would fit a multiprocessor, and nothing would compute while it waits for memory.

    Args:
        shape: (C, H, W) of cat(h, skip).
        left: channels of h.
        dtype: of the activations.
        groups: number of groups.
        silu: whether SiLU follows the norm.
        resample: None, "down" or "up".
        backward: whether to launch the backward kernel.
    """
    channels, height, width = shape
    pixels = height * width
    per_block, block_c = _groups_per_block(channels, groups, pixels)
    block_hw, fold = max(4, _power_of_two(pixels)), 1
    per_thread = 16 if backward and dtype == torch.float32 else 32
    warps = max(1, block_hw * block_c // (32 * per_thread))
    if block_hw * block_c > 8192:
        warps = 8
        fold = (4 if backward else 8) // dtype.itemsize
        block_hw = warps * 32 * 8 * fold // block_c
    fewer = FEWER_PER_THREAD.get((channels, width, dtype, resample, backward), 1)
    if block_hw >= pixels:
        warps *= fewer
    else:
        block_hw //= fewer
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
