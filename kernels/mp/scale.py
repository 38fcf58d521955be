"""Embedding scale, magnitude-preserving SiLU and dropout in one pass.

A tile is a strip of each quarter of the image, as in the group norm kernels, so that a thread holds
the four elements that share random numbers. Backward stores one sum over pixels per program for the
gradient of the scale; where an image needs several programs, a second reduction adds them up.
"""

import torch
import torch.nn.functional as F

from sid_fast.kernels._operator import operator
from sid_fast.kernels._triton import tl, triton
from sid_fast.kernels.dispatch import choose
from sid_fast.kernels.dropout import DENOMINATOR, dropout_key, keep_mask
from sid_fast.kernels.dropout import dropout as drop_elements
from sid_fast.kernels.group_norm.device import fold, load_channels, pixels_of_tile
from sid_fast.kernels.mp.device import (
    WARPS,
    block_of,
    channels_last,
    load,
    mp_silu,
    mp_silu_eager,
    mp_silu_grad,
    store,
)

BLOCK_HW = 64  # pixels of a tile
TILES = (4, 2, 1)  # of a program in backward: the first that divides an image's tiles


def scaled_silu(
    y: torch.Tensor,
    scale: torch.Tensor,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return dropout(silu(y·(scale + 1))/0.596).

    Args:
        y: [N, C, H, W], float32 or 16 bit.
        scale: [N, C].
        dropout: Probability of zeroing an element, 0 ≤ dropout < 1; 0 outside training.
        seed: int64 [3] on the device of y, as for kernels.dropout, whose mask it draws. Without a
            seed, dropout draws from torch's generator.

    Returns:
        A tensor of the dtype of y; the Triton kernel writes it channels-last.

    Raises:
        ValueError: if the shapes do not match, or dropout is out of range.
    """
    if scale.shape != y.shape[:2]:
        raise ValueError(
            f"scaled_silu: scale is {tuple(scale.shape)}: must be {tuple(y.shape[:2])}"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"scaled_silu: dropout={dropout}: must be at least 0 and less than 1")
    if choose("mp", y.device) == "eager":
        return scaled_silu_eager(y, scale, dropout, seed)
    if dropout and seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (3,), device=y.device)
    drop = round(dropout * DENOMINATOR)
    return _ScaledSiLU.apply(channels_last(y), scale.contiguous(), seed if drop else None, drop)


def scaled_silu_eager(
    y: torch.Tensor,
    scale: torch.Tensor,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute `scaled_silu` in plain PyTorch; dropout without a seed uses torch's generator."""
    out = mp_silu_eager(y * (scale + 1)[:, :, None, None].to(y.dtype))
    if not dropout:
        return out
    return F.dropout(out, dropout) if seed is None else drop_elements(out, dropout, seed)


@triton.jit
def _place(PARTS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return (sample, part of its pixels, channels) of the program."""
    BLOCKS: tl.constexpr = CHANNELS // BLOCK_C
    channel = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    index = tl.program_id(0) // BLOCKS
    return index // PARTS, index % PARTS, channel


@triton.jit
def forward_kernel(
    y_ptr, scale_ptr, seed_ptr, out_ptr, drop,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute a tile of one sample; PARTS is the number of its tiles."""
    sample, t, channel = _place(PARTS, CHANNELS, BLOCK_C)
    first, pixel, _, _, mask = pixels_of_tile(t, PIXELS, PIXELS, BLOCK_HW, None)
    start = (sample.to(tl.int64) * PIXELS + first) * CHANNELS
    offset = pixel[:, None] * CHANNELS + channel[None, :]
    gain = load_channels(scale_ptr + sample * CHANNELS, channel) + 1.0
    out = mp_silu(load(y_ptr + start + offset, mask) * gain[None, :])
    if seed_ptr is not None:
        key, high = dropout_key(seed_ptr, sample)
        keep = keep_mask(key, high, drop, t, channel, BLOCK_HW, CHANNELS)
        out = tl.where(keep, out * (1.0 / (1.0 - drop * (1.0 / 65536))), 0.0)
    store(out_ptr + start + offset, out, mask)


@triton.jit
def backward_kernel(
    y_ptr, scale_ptr, seed_ptr, grad_ptr, dy_ptr, dscale_ptr, drop,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr, TILES: tl.constexpr,
    BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of y in TILES tiles and, unless dscale is None, their sum for scale."""
    sample, part, channel = _place(PARTS, CHANNELS, BLOCK_C)
    base = sample.to(tl.int64) * (PIXELS * CHANNELS)
    gain = load_channels(scale_ptr + sample * CHANNELS, channel) + 1.0
    factor = 1.0
    if seed_ptr is not None:
        key, high = dropout_key(seed_ptr, sample)
        factor = 1.0 / (1.0 - drop * (1.0 / 65536))
    sums = tl.zeros([BLOCK_HW // 4, BLOCK_C], tl.float32)
    for i in range(TILES):
        t = part * TILES + i
        first, pixel, _, _, mask = pixels_of_tile(t, PIXELS, PIXELS, BLOCK_HW, None)
        start = base + first * CHANNELS
        offset = pixel[:, None] * CHANNELS + channel[None, :]
        y = load(y_ptr + start + offset, mask)
        grad = load(grad_ptr + start + offset, mask) * mp_silu_grad(y * gain[None, :])
        if seed_ptr is not None:
            keep = keep_mask(key, high, drop, t, channel, BLOCK_HW, CHANNELS)
            grad = tl.where(keep, grad * factor, 0.0)
        store(dy_ptr + start + offset, grad * gain[None, :], mask)
        if dscale_ptr is not None:
            sums += fold(grad * y, 4)
    if dscale_ptr is not None:
        row = sample * PARTS + part
        store(dscale_ptr + row * CHANNELS + channel, tl.sum(sums, 0), None)


def launch(channels: int, pixels: int, backward: bool) -> dict[str, int]:
    """Return a kernel's constants and warps for an image."""
    tiles = -(-pixels // BLOCK_HW)
    constants = {
        "PIXELS": pixels, "CHANNELS": channels, "BLOCK_HW": BLOCK_HW,
        "BLOCK_C": block_of(channels), "PARTS": tiles, "num_warps": WARPS,
    }  # fmt: skip
    if backward:
        per_program = next(count for count in TILES if tiles % count == 0)
        constants |= {"TILES": per_program, "PARTS": tiles // per_program}
    return constants


def parts_of(y: torch.Tensor) -> int:
    """Return how many backward programs share the pixels of an image."""
    return launch(y.shape[1], y[0, 0].numel(), True)["PARTS"]


def _programs(y: torch.Tensor, constants: dict[str, int]) -> tuple[int]:
    return (len(y) * constants["PARTS"] * (y.shape[1] // constants["BLOCK_C"]),)


def _run_forward(
    y: torch.Tensor, scale: torch.Tensor, seed: torch.Tensor | None, drop: int
) -> torch.Tensor:
    out = torch.empty_like(y)
    constants = launch(y.shape[1], y[0, 0].numel(), False)
    with torch.cuda.device_of(y):
        forward_kernel[_programs(y, constants)](y, scale, seed, out, drop, **constants)
    return out


def _run_backward(
    grad: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor,
    seed: torch.Tensor | None,
    drop: int,
    wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of y and of scale, which is empty unless `wanted`."""
    dy, dscale = _backward_like(grad, y, scale, seed, drop, wanted)
    constants = launch(y.shape[1], y[0, 0].numel(), True)
    parts = parts_of(y)
    sums = dscale
    if parts > 1 and wanted:
        sums = scale.new_empty((len(y), parts, y.shape[1]), dtype=torch.float32)
    with torch.cuda.device_of(y):
        backward_kernel[_programs(y, constants)](
            y, scale, seed, grad, dy, sums if wanted else None, drop, **constants
        )
        if sums is not dscale:
            dscale = sums.sum(1).to(scale.dtype)
    return dy, dscale


def _backward_like(grad, y, scale, seed, drop, wanted):
    return torch.empty_like(y), torch.empty_like(scale) if wanted else scale.new_empty(0)


_forward = operator("scaled_silu", _run_forward, lambda y, *_: torch.empty_like(y))
_backward = operator("scaled_silu_backward", _run_backward, _backward_like)


class _ScaledSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, scale, seed, drop):
        ctx.save_for_backward(y, scale, seed)
        ctx.drop = drop
        return _forward(y, scale, seed, drop)

    @staticmethod
    def backward(ctx, grad):
        y, scale, seed = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1]
        dy, dscale = _backward(channels_last(grad), y, scale, seed, ctx.drop, wanted)
        return dy, dscale if wanted else None, None, None
