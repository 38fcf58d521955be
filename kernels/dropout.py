"""Dropout whose mask depends only on (seed, sample, channel, pixel).

The image's pixels, in row-major order, form four quarters. Pixels at the same position in the four
quarters share a Philox block and take 16 bits of it each. The fused dropout of the group norm
kernels draws the same mask (keep_mask), so all backends drop the same elements.
"""

import torch

from sid_fast.kernels._operator import differentiate, operator
from sid_fast.kernels._triton import INTERPRETED, tl, triton
from sid_fast.kernels.dispatch import choose
from sid_fast.kernels.random import MASK

DENOMINATOR = 65536  # of the drop probability, which is drop/65536 with an integer `drop`
BLOCK = 1024


def dropout(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    """Zero elements with probability p and scale the others by 1/(1 − p).

    Args:
        x: [N, C, H, W], float32 or 16 bit.
        p: 0 ≤ p < 1, rounded to a multiple of 1/65536.
        seed: int64 [3] on the device of x: key, stream, index of the first sample.

    Returns:
        A tensor of the shape, dtype and memory order of x.
    """
    if choose("random", x.device) == "eager":
        return dropout_eager(x, p, seed)
    return _dropout(x, seed, round(p * DENOMINATOR))


def dropout_eager(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    """Apply `dropout` in plain PyTorch."""
    drop = round(p * DENOMINATOR)
    n, channels, height, width = x.shape
    keep = keep_mask_eager(seed, drop, n, channels, height * width)
    keep = keep.reshape(n, height, width, channels).permute(0, 3, 1, 2)
    if x.is_contiguous():  # torch.where returns the memory order of `keep`
        keep = keep.contiguous()
    return torch.where(keep, x * (DENOMINATOR / (DENOMINATOR - drop)), 0.0)


def keep_mask_eager(
    seed: torch.Tensor, drop: int, n: int, channels: int, pixels: int
) -> torch.Tensor:
    """Return the mask, bool [N, pixels, C]: False with probability drop/65536."""
    key, stream, first = seed.unbind()
    low = (key & MASK) ^ (((stream >> 32) & MASK) * 0x85EBCA6B & MASK)
    high = (((key >> 32) & MASK) * 0xC2B2AE35 & MASK) ^ ((stream & MASK) * 0x9E3779B1 & MASK)
    high = (high + first + torch.arange(n, device=seed.device)) & MASK
    quarter = -(-pixels // 4)
    block = torch.arange(quarter * channels, device=seed.device)
    a, b = philox_2x32_eager(block[None], high[:, None], low)
    words = torch.stack([a, a << 16, b, b << 16], 1) & MASK
    words = words.reshape(n, 4 * quarter, channels)[:, :pixels]
    return words >= drop << 16


def philox_2x32_eager(
    counter: torch.Tensor, high: torch.Tensor, key: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the two 32-bit words of Philox 2x32-10 (Salmon et al., SC 2011), in int64."""
    for _ in range(10):
        product = counter * 0xD256D193
        counter, high = ((product >> 32) & MASK) ^ key ^ high, product & MASK
        key = (key + 0x9E3779B9) & MASK
    return counter, high


@triton.jit
def philox_product(x):
    """Return the upper and lower word of x·0xD256D193; one instruction, two without the PTX."""
    if INTERPRETED:
        product = x.to(tl.uint64) * 0xD256D193
        words = (product >> 32).to(tl.uint32), product.to(tl.uint32)
    else:
        words = tl.inline_asm_elementwise(
            "{ .reg .u64 t; mul.wide.u32 t, $2, 0xD256D193; mov.b64 {$1, $0}, t; }", "=r,=r,r",
            [x], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1,
        )  # fmt: skip
    return words


@triton.jit
def philox_2x32(counter, high, key):
    """Return two words of Philox 2x32-10 (Salmon et al., SC 2011): counter (counter, high), key."""
    for _ in tl.static_range(10):
        upper, lower = philox_product(counter)
        counter = upper ^ key ^ high
        high = lower
        key = tl.add(key, 0x9E3779B9, sanitize_overflow=False)
    return counter, high


@triton.jit
def dropout_key(seed_ptr, sample):
    """Return a sample's Philox key and the upper word of its counter."""
    seed = tl.load(seed_ptr).to(tl.uint64)
    stream = tl.load(seed_ptr + 1).to(tl.uint64)
    sample += tl.load(seed_ptr + 2)
    key = seed.to(tl.uint32) ^ wrapping_product((stream >> 32).to(tl.uint32), 0x85EBCA6B)
    high = wrapping_product((seed >> 32).to(tl.uint32), 0xC2B2AE35) ^ wrapping_product(
        stream.to(tl.uint32), 0x9E3779B1
    )
    return key, tl.add(high, sample.to(tl.uint32), sanitize_overflow=False)


@triton.jit
def wrapping_product(x, FACTOR: tl.constexpr):
    """Return x·FACTOR modulo 2^32."""
    return (x.to(tl.uint64) * FACTOR).to(tl.uint32)


@triton.jit
def keep_mask(
    key, high, drop, t, channel, BLOCK_HW: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Return the mask of tile t of a group norm kernel: a strip of rows from each quarter.

    Each element computes its Philox block; the compiler merges the four equal ones of a thread.
    """
    row = tl.arange(0, BLOCK_HW)
    STRIP: tl.constexpr = BLOCK_HW // 4
    quarter = (row // STRIP)[:, None]
    block = ((t * STRIP + row % STRIP) * CHANNELS)[:, None] + channel[None, :]
    return _block_mask(block, quarter, key, high, drop)


@triton.jit
def _block_mask(block, quarter, key, high, drop):
    a, b = philox_2x32(block.to(tl.uint32), high, key)
    word = tl.where(quarter < 2, a, b)
    # Compare the upper or the lower 16 bits, as the upper ones of `word`: `drop << 16` has zeros in
    # its lower half, so the lower half of `word` never decides.
    word = tl.where(quarter % 2 == 0, word, word << 16)
    return word >= (drop.to(tl.uint32) << 16)


@triton.jit
def _kernel(
    x_ptr,
    seed_ptr,
    out_ptr,
    drop,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Process BLOCK elements of one sample per program."""
    sample = tl.program_id(0)
    key, high = dropout_key(seed_ptr, sample)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pixel, channel = element % PIXELS, element // PIXELS
    if CHANNELS_LAST:
        pixel, channel = element // CHANNELS, element % CHANNELS
    QUARTER: tl.constexpr = (PIXELS + 3) // 4
    keep = _block_mask(pixel % QUARTER * CHANNELS + channel, pixel // QUARTER, key, high, drop)
    exists = element < PIXELS * CHANNELS
    start = sample.to(tl.int64) * (PIXELS * CHANNELS)
    x = tl.load(x_ptr + start + element, mask=exists).to(tl.float32)
    x = tl.where(keep, x * (65536.0 / (65536 - drop)), 0.0)
    tl.store(out_ptr + start + element, x.to(out_ptr.dtype.element_ty), mask=exists)


def _run_dropout(x: torch.Tensor, seed: torch.Tensor, drop: int) -> torch.Tensor:
    out = _dropout_like(x, seed, drop)
    n, channels, height, width = x.shape
    last = not out.is_contiguous()
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    grid = n, -(-channels * height * width // BLOCK)
    with torch.cuda.device_of(x):
        _kernel[grid](x, seed, out, drop, height * width, channels, last, BLOCK, num_warps=4)
    return out


def _dropout_like(x, seed, drop):
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    order = torch.channels_last if last else torch.contiguous_format
    return torch.empty_like(x, memory_format=order)


_dropout = operator("dropout", _run_dropout, _dropout_like)


def _save(ctx, inputs, output):
    _, seed, ctx.drop = inputs
    ctx.save_for_backward(seed)


def _backward(ctx, grad):
    return _dropout(grad, *ctx.saved_tensors, ctx.drop), None, None


differentiate("dropout", _backward, _save)


def configurations():
    """Yield (label, kernel, signature, constants, warps, stages); see kernels.compile."""
    signature = {"seed_ptr": "*i64", "drop": "i32"}
    for dtype in ("bf16", "fp16", "fp32"):
        for channels, side in ((256, 32), (192, 64)):
            for last in (False, True):
                constants = {
                    "PIXELS": side**2, "CHANNELS": channels, "CHANNELS_LAST": last, "BLOCK": BLOCK
                }  # fmt: skip
                order = "channels-last" if last else "NCHW"
                types = {"x_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"} | signature
                yield f"{channels}@{side}x{side} {order} {dtype}", _kernel, types, constants, 4, 3
