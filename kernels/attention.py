"""Self-attention over the pixels of a feature map: one pass over the keys, no N×N matrix in memory.

This is FlashAttention (arXiv 2205.14135, 2307.08691): forward computes the softmax with a running
maximum and sum, and saves the log-sum-exp, from which backward recomputes the attention weights.
Backward is deterministic: one kernel owns blocks of queries and one owns blocks of keys, so each
gradient is summed in a fixed order.

The qkv bias takes no extra pass over memory:

- v's bias is added to the output, because the attention weights sum to 1;
- k's bias has no effect, because it adds the same amount to all logits of a query, and softmax is
  invariant to that;
- q's bias is added to queries when they are loaded; the kernel that owns keys instead adds k·b to
  the logits, one number per key.
"""

import functools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from sid_fast.kernels._operator import differentiate, operator
from sid_fast.kernels._triton import INTERPRETED, tl, triton
from sid_fast.kernels.dispatch import choose

# (BLOCK, STEP, warps, stages) by bytes per element, kernel and head size. A program owns BLOCK
# queries (or keys) and loads STEP keys (or queries) per loop iteration. These are the largest tiles
# found that spill on none of sm_80, sm_90 and sm_100 and fit an A100's shared memory. float32 does
# not use the tensor cores and needs more registers.
TILES = {
    2: {
        "forward": {64: (128, 64, 4, 3), 128: (128, 64, 8, 2), 256: (64, 64, 8, 2)},
        "backward_q": {64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (64, 32, 8, 2)},
        "backward_kv": {64: (64, 32, 4, 2), 128: (64, 32, 4, 2), 256: (64, 32, 8, 2)},
    },
    4: {
        "forward": {64: (32, 32, 8, 2), 128: (32, 32, 8, 2), 256: (32, 16, 8, 2)},
        "backward_q": {64: (32, 32, 8, 2), 128: (32, 32, 8, 2), 256: (32, 16, 8, 2)},
        "backward_kv": {64: (32, 16, 8, 2), 128: (32, 32, 8, 2), 256: (16, 16, 8, 2)},
    },
}
# Tiles for 16-bit heads by compute capability, kernel and head size. They are better on that
# architecture by instruction counts (benchmarks/LOG.md), but spill or do not fit elsewhere. Padded
# heads use TILES. A warpgroup is four warps: with eight warps for 64 rows, both warpgroups would
# compute all logits, and each narrow HGMMA would read its rows from shared memory again.
TILES_BY_ARCH = {
    90: {
        "forward": {64: (128, 128, 4, 2), 256: (64, 32, 4, 2)},
        "backward_q": {64: (128, 64, 4, 2), 256: (128, 32, 8, 2)},
        "backward_kv": {64: (64, 64, 4, 2)},
    },
}
MAX_SIZE = 256  # channels per head; attention_eager runs larger heads


def attention(qkv: torch.Tensor, heads: int, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Apply multi-head softmax attention between all pixels of an image.

    The softmax over the keys is computed in float32, with scale 1/√(C/heads).

    Args:
        qkv: [N, 3·C, H, W], float32, bfloat16 or float16; channels in the order [{q, k, v}, head,
            channel] (see blocked_order).
        heads: number of heads; must divide C.
        bias: [3·C] in the same order, usually float32; added to qkv, where k's part has no effect.

    Returns:
        [N, C, H, W] in the dtype of qkv; the Triton kernel writes it channels-last.

    Raises:
        ValueError: if `heads` does not divide C, or `bias` has another length.
    """
    if qkv.shape[1] % (3 * heads):
        raise ValueError(
            f"attention: {qkv.shape[1]} channels of qkv: must be a multiple of 3·heads={3 * heads}"
        )
    if bias is not None and bias.shape != qkv.shape[1:2]:
        raise ValueError(f"attention: bias is {tuple(bias.shape)}: must be ({qkv.shape[1]},)")
    if choose("attention", qkv.device) == "eager" or qkv.shape[1] // (3 * heads) > MAX_SIZE:
        return attention_eager(qkv, heads, bias)
    return _attention(qkv, heads, bias)[0]


def attention_eager(
    qkv: torch.Tensor, heads: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`attention` by PyTorch's scaled_dot_product_attention, which keeps no N×N matrix."""
    n, _, height, width = qkv.shape
    if qkv.dtype == torch.float64:  # no fused kernel of PyTorch's takes it
        return attention_explicit(qkv, heads, bias)
    q, k, v = (t.transpose(-1, -2) for t in _split_heads(qkv, heads, bias))
    # The fused kernels want channels adjacent, as they are in a channels-last qkv.
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).reshape(n, height, width, -1).permute(0, 3, 1, 2)


def attention_explicit(
    qkv: torch.Tensor, heads: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`attention` as its formula, in any dtype; N×N weights in memory."""
    n, c3, height, width = qkv.shape
    q, k, v = _split_heads(qkv, heads, bias)
    logits = (q.transpose(-1, -2) @ k).to(torch.promote_types(qkv.dtype, torch.float32))
    weights = (logits / math.sqrt(q.shape[2])).softmax(-1).to(qkv.dtype)
    return (v @ weights.transpose(-1, -2)).reshape(n, c3 // 3, height, width)


def _split_heads(
    qkv: torch.Tensor, heads: int, bias: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """q, k and v, each [N, heads, channels per head, pixels]."""
    if bias is not None:
        qkv = qkv + bias.to(qkv.dtype)[:, None, None]
    n, c3, height, width = qkv.shape
    return qkv.reshape(n, 3, heads, c3 // 3 // heads, height * width).unbind(1)


def blocked_order(channels: int, heads: int) -> torch.Tensor:
    """Return the permutation from upstream's rows of a qkv weight to ours, int64 [3·channels].

    Upstream's rows are ordered [head, channel, {q, k, v}], ours [{q, k, v}, head, channel], as
    `attention` reads them: ours = upstream[blocked_order(…)]. Its argsort is the inverse.
    """
    upstream = torch.arange(3 * channels).reshape(heads, channels // heads, 3)
    return upstream.permute(2, 0, 1).flatten()


def bytes_moved(
    images: int, heads: int, size: int, pixels: int, itemsize: int, backward: bool = False
) -> int:
    """Return the bytes that forward or backward must read and write at least.

    Forward reads qkv and writes out and lse. Backward reads qkv, out, its gradient and lse, and
    writes the gradient of qkv.

    Args:
        images: batch size.
        heads: heads per image.
        size: channels per head.
        pixels: pixels per image.
        itemsize: bytes per element of qkv.
        backward: whether to count the backward pass.
    """
    return images * heads * pixels * (size * itemsize * (8 if backward else 4) + 4)


def flop(images: int, heads: int, size: int, pixels: int, backward: bool = False) -> int:
    """Return the FLOP of the matrix products: two forward, five backward.

    The two backward kernels recompute two of the five; the repetitions are not counted.
    """
    return images * heads * 2 * pixels**2 * size * (5 if backward else 2)


# Memory layout in the kernels: qkv [image, pixel, {q, k, v}, head, channel] and
# out [image, pixel, head, channel]. `head` is an index over the heads of all images.


@triton.jit
def _starts(head, PIXELS: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr):
    """Return the offsets of a head in qkv (its q), in out, and in lse and delta."""
    pixel = (head // HEADS).to(tl.int64) * PIXELS
    channel = head % HEADS * SIZE
    return (
        pixel * (3 * HEADS * SIZE) + channel,
        pixel * (HEADS * SIZE) + channel,
        head.to(tl.int64) * PIXELS,
    )


@triton.jit
def _inside(pixels, PIXELS: tl.constexpr, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    return (pixels[:, None] < PIXELS) & (tl.arange(0, BLOCK_SIZE)[None, :] < SIZE)


@triton.jit
def _read(
    start,
    pixels,
    BLOCK: tl.constexpr,
    ROW: tl.constexpr,
    PIXELS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Load [BLOCK, BLOCK_SIZE]: pixels, ROW apart, and channels of a head; 0 beyond both."""
    pointers = start + pixels[:, None] * ROW + tl.arange(0, BLOCK_SIZE)[None, :]
    if PIXELS % BLOCK == 0 and SIZE == BLOCK_SIZE:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=_inside(pixels, PIXELS, SIZE, BLOCK_SIZE), other=0.0)
    return tile


@triton.jit
def _write(
    start,
    pixels,
    tile,
    ROW: tl.constexpr,
    PIXELS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    pointers = start + pixels[:, None] * ROW + tl.arange(0, BLOCK_SIZE)[None, :]
    tile = tile.to(start.dtype.element_ty)
    tl.store(pointers, tile, mask=_inside(pixels, PIXELS, SIZE, BLOCK_SIZE))


@triton.jit
def _bias(
    bias, head, PART: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr, LANES: tl.constexpr
):
    """Load a head's bias of q (PART 0) or v (PART 2) as float32; 0 beyond its channels."""
    lane = tl.arange(0, LANES)
    at = (PART * HEADS + head % HEADS) * SIZE + lane
    return tl.load(bias + at, mask=lane < SIZE, other=0.0).to(tl.float32)


@triton.jit
def _read_queries(
    qkv,
    bias,
    head,
    queries,
    BLOCK: tl.constexpr,
    PIXELS: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Load a head's queries and add their bias; 0 beyond the last, which keeps weights finite."""
    q = _read(qkv, queries, BLOCK, 3 * HEADS * SIZE, PIXELS, SIZE, BLOCK_SIZE)
    if bias is not None:
        biased = q.to(tl.float32) + _bias(bias, head, 0, HEADS, SIZE, BLOCK_SIZE)[None, :]
        if PIXELS % BLOCK:
            biased = tl.where(queries[:, None] < PIXELS, biased, 0.0)
        q = biased.to(q.dtype)
    return q


@triton.jit
def _dot(a, b, sum):
    """Return sum + a·b in float32; float32 operands are not rounded to tf32."""
    if INTERPRETED:  # the interpreter multiplies bfloat16 bit patterns (triton issue 11584)
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sum, input_precision="ieee")


@triton.jit
def _forward(
    qkv,
    bias,
    out,
    lse,
    PIXELS: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Compute out and lse for BLOCK queries of one head; lse = log2 Σ exp2(logits·log2 e)."""
    CHANNELS: tl.constexpr = HEADS * SIZE
    SCALE: tl.constexpr = 1.4426950408889634 * SIZE**-0.5  # exp(x) = exp2(x·log2 e)
    blocks: tl.constexpr = (PIXELS + BLOCK - 1) // BLOCK
    head = tl.program_id(0) // blocks
    queries = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    in_qkv, in_out, in_lse = _starts(head, PIXELS, HEADS, SIZE)
    qkv += in_qkv
    q = _read_queries(qkv, bias, head, queries, BLOCK, PIXELS, HEADS, SIZE, BLOCK_SIZE)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    mean = tl.zeros([BLOCK, BLOCK_SIZE], tl.float32)
    for first in range(0, PIXELS, STEP):
        keys = first + tl.arange(0, STEP)
        k = _read(qkv + CHANNELS, keys, STEP, 3 * CHANNELS, PIXELS, SIZE, BLOCK_SIZE)
        logits = _dot(q, tl.trans(k), None) * SCALE
        if PIXELS % STEP:
            logits = tl.where(keys[None, :] < PIXELS, logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        p = tl.exp2(logits - higher[:, None])
        shrink = tl.exp2(highest - higher)
        highest = higher
        total = total * shrink + tl.sum(p, 1)
        v = _read(qkv + 2 * CHANNELS, keys, STEP, 3 * CHANNELS, PIXELS, SIZE, BLOCK_SIZE)
        mean = _dot(p.to(v.dtype), v, mean * shrink[:, None])
    mean = mean / total[:, None]
    if bias is not None:
        mean += _bias(bias, head, 2, HEADS, SIZE, BLOCK_SIZE)[None, :]
    _write(out + in_out, queries, mean, CHANNELS, PIXELS, SIZE, BLOCK_SIZE)
    tl.store(lse + in_lse + queries, highest + tl.log2(total), mask=queries < PIXELS)


@triton.jit
def _backward_q(
    qkv,
    bias,
    out,
    grad,
    lse,
    delta,
    grad_qkv,
    bias_sums,
    PIXELS: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Compute the gradient of BLOCK queries of one head, and delta = Σ out·grad for _backward_kv.

    bias_sums, if not None, [image, block of pixels, {q, k, v}, head, channel], gets this program's
    part of the gradient of the bias.
    """
    CHANNELS: tl.constexpr = HEADS * SIZE
    SCALE: tl.constexpr = 1.4426950408889634 * SIZE**-0.5
    blocks: tl.constexpr = (PIXELS + BLOCK - 1) // BLOCK
    head = tl.program_id(0) // blocks
    queries = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    in_qkv, in_out, in_lse = _starts(head, PIXELS, HEADS, SIZE)
    qkv += in_qkv
    q = _read_queries(qkv, bias, head, queries, BLOCK, PIXELS, HEADS, SIZE, BLOCK_SIZE)
    g = _read(grad + in_out, queries, BLOCK, CHANNELS, PIXELS, SIZE, BLOCK_SIZE)
    o = _read(out + in_out, queries, BLOCK, CHANNELS, PIXELS, SIZE, BLOCK_SIZE)
    o = o.to(tl.float32)
    if bias is not None:  # delta is Σ out·grad for the output without v's bias
        o -= _bias(bias, head, 2, HEADS, SIZE, BLOCK_SIZE)[None, :]
    d = tl.sum(o * g.to(tl.float32), 1)
    tl.store(delta + in_lse + queries, d, mask=queries < PIXELS)
    if bias_sums is not None:
        lane = tl.arange(0, BLOCK_SIZE)
        part = head // HEADS * blocks + tl.program_id(0) % blocks
        bias_sums += part * (3 * CHANNELS) + head % HEADS * SIZE + lane
        tl.store(bias_sums + CHANNELS, tl.zeros([BLOCK_SIZE], tl.float32), mask=lane < SIZE)
        tl.store(bias_sums + 2 * CHANNELS, tl.sum(g.to(tl.float32), 0), mask=lane < SIZE)
    norm = tl.load(lse + in_lse + queries, mask=queries < PIXELS, other=0.0)
    dq = tl.zeros([BLOCK, BLOCK_SIZE], tl.float32)
    for first in range(0, PIXELS, STEP):
        keys = first + tl.arange(0, STEP)
        k = _read(qkv + CHANNELS, keys, STEP, 3 * CHANNELS, PIXELS, SIZE, BLOCK_SIZE)
        p = tl.exp2(_dot(q, tl.trans(k), None) * SCALE - norm[:, None])
        if PIXELS % STEP:  # exp2(−norm) may be inf, and inf times a zero key NaN
            p = tl.where(keys[None, :] < PIXELS, p, 0.0)
        v = _read(qkv + 2 * CHANNELS, keys, STEP, 3 * CHANNELS, PIXELS, SIZE, BLOCK_SIZE)
        ds = p * (_dot(g, tl.trans(v), None) - d[:, None])
        dq = _dot(ds.to(k.dtype), k, dq)
    dq *= SIZE**-0.5
    _write(grad_qkv + in_qkv, queries, dq, 3 * CHANNELS, PIXELS, SIZE, BLOCK_SIZE)
    if bias_sums is not None:
        tl.store(bias_sums, tl.sum(dq, 0), mask=lane < SIZE)


@triton.jit
def _backward_kv(
    qkv,
    bias,
    grad,
    lse,
    delta,
    grad_qkv,
    PIXELS: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Compute the gradients of BLOCK keys and their values; weights here are [keys, queries]."""
    CHANNELS: tl.constexpr = HEADS * SIZE
    SCALE: tl.constexpr = 1.4426950408889634 * SIZE**-0.5
    blocks: tl.constexpr = (PIXELS + BLOCK - 1) // BLOCK
    head = tl.program_id(0) // blocks
    keys = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    in_qkv, in_out, in_lse = _starts(head, PIXELS, HEADS, SIZE)
    qkv += in_qkv
    grad_qkv += in_qkv
    k = _read(qkv + CHANNELS, keys, BLOCK, 3 * CHANNELS, PIXELS, SIZE, BLOCK_SIZE)
    v = _read(qkv + 2 * CHANNELS, keys, BLOCK, 3 * CHANNELS, PIXELS, SIZE, BLOCK_SIZE)
    if bias is not None:
        q_bias = _bias(bias, head, 0, HEADS, SIZE, BLOCK_SIZE)
        biased = tl.sum(k.to(tl.float32) * q_bias[None, :], 1)
        total = tl.zeros([BLOCK], tl.float32)
    dk = tl.zeros([BLOCK, BLOCK_SIZE], tl.float32)
    dv = tl.zeros([BLOCK, BLOCK_SIZE], tl.float32)
    for first in range(0, PIXELS, STEP):
        queries = first + tl.arange(0, STEP)
        inside = queries < PIXELS
        q = _read(qkv, queries, STEP, 3 * CHANNELS, PIXELS, SIZE, BLOCK_SIZE)
        norm = tl.load(lse + in_lse + queries, mask=inside, other=float("inf"))
        logits = _dot(k, tl.trans(q), None)
        if bias is not None:
            logits += biased[:, None]
        p = tl.exp2(logits * SCALE - norm[None, :])
        g = _read(grad + in_out, queries, STEP, CHANNELS, PIXELS, SIZE, BLOCK_SIZE)
        dv = _dot(p.to(g.dtype), g, dv)
        d = tl.load(delta + in_lse + queries, mask=inside, other=0.0)
        ds = p * (_dot(v, tl.trans(g), None) - d[None, :])
        dk = _dot(ds.to(q.dtype), q, dk)
        if bias is not None:
            total += tl.sum(ds, 1)
    if bias is not None:
        dk += total[:, None] * _bias(bias, head, 0, HEADS, SIZE, BLOCK_SIZE)[None, :]
    dk *= SIZE**-0.5
    _write(grad_qkv + CHANNELS, keys, dk, 3 * CHANNELS, PIXELS, SIZE, BLOCK_SIZE)
    _write(grad_qkv + 2 * CHANNELS, keys, dv, 3 * CHANNELS, PIXELS, SIZE, BLOCK_SIZE)


FLOAT32_ARGUMENTS = ("bias", "lse", "delta", "bias_sums")
KERNELS = {"forward": _forward, "backward_q": _backward_q, "backward_kv": _backward_kv}


@functools.cache
def _arch(device: torch.device) -> int:
    """Return a GPU's compute capability, such as 90 for 9.0; 0 without a GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _configuration(
    kernel: str, pixels: int, heads: int, size: int, itemsize: int, arch: int
) -> tuple[dict[str, int], int, int]:
    """Return a kernel's constants, warps and stages."""
    padded = max(16, 1 << (size - 1).bit_length())
    tile = TILES[itemsize][kernel][max(64, padded)]
    if itemsize == 2 and size == padded:
        tile = TILES_BY_ARCH.get(arch, {}).get(kernel, {}).get(size, tile)
    block, step, warps, stages = tile
    if size < padded and itemsize == 2:  # masks of padded channels take registers
        block = max(16, block // 2)
    padded_pixels = max(16, 1 << (pixels - 1).bit_length())
    constants = {
        "PIXELS": pixels,
        "HEADS": heads,
        "SIZE": size,
        "BLOCK_SIZE": padded,
        "BLOCK": min(block, padded_pixels),
        # Take two loop iterations or more: a single one becomes straight-line code, which spills.
        "STEP": min(step, max(16, padded_pixels // 2)),
    }
    return constants, warps, stages


def _launch(kernel: str, qkv: torch.Tensor, heads: int, *others: torch.Tensor | None) -> None:
    images, c3, height, width = qkv.shape
    constants, warps, stages = _configuration(
        kernel, height * width, heads, c3 // 3 // heads, qkv.itemsize, _arch(qkv.device)
    )
    programs = images * heads * -(-height * width // constants["BLOCK"])
    with torch.cuda.device_of(qkv):
        KERNELS[kernel][(programs,)](qkv, *others, **constants, num_warps=warps, num_stages=stages)


def _empty(qkv: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    n, c3, height, width = qkv.shape
    out = torch.empty(
        (n, c3 // 3, height, width),
        dtype=qkv.dtype,
        device=qkv.device,
        memory_format=torch.channels_last,
    )
    return out, qkv.new_empty((n, heads, height * width), dtype=torch.float32)


def _run_attention(
    qkv: torch.Tensor, heads: int, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out and lse for qkv in blocked order."""
    qkv = qkv.contiguous(memory_format=torch.channels_last)
    out, lse = _empty(qkv, heads)
    _launch("forward", qkv, heads, bias, out, lse)
    return out, lse


def _attention_like(qkv, heads, bias):
    return _empty(qkv, heads)


_attention = operator("attention", _run_attention, _attention_like)


def _run_attention_backward(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    heads: int,
    sums: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient of qkv and, if `sums`, that of the bias per image and block of pixels."""
    qkv = qkv.contiguous(memory_format=torch.channels_last)
    grad = grad.contiguous(memory_format=torch.channels_last)
    grad_qkv, bias_sums = _backward_like(grad, qkv, bias, out, lse, heads, sums)
    delta = torch.empty_like(lse)
    written = grad_qkv, bias_sums if sums else None
    _launch("backward_q", qkv, heads, bias, out, grad, lse, delta, *written)
    _launch("backward_kv", qkv, heads, bias, grad, lse, delta, grad_qkv)
    return grad_qkv, bias_sums


def _backward_like(grad, qkv, bias, out, lse, heads, sums):
    images, c3, height, width = qkv.shape
    pixels = height * width
    constants, _, _ = _configuration(
        "backward_q", pixels, heads, c3 // 3 // heads, qkv.itemsize, _arch(qkv.device)
    )
    shape = (images, -(-pixels // constants["BLOCK"]), c3) if sums else (0,)
    grad_qkv = torch.empty_like(qkv, memory_format=torch.channels_last)
    return grad_qkv, torch.empty(shape, device=qkv.device, dtype=torch.float32)


_attention_backward = operator("attention_backward", _run_attention_backward, _backward_like)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # no zeros for the gradient of lse, which is never used
    qkv, ctx.heads, bias = inputs
    ctx.save_for_backward(qkv, bias, *output)


def _differentiate(ctx, grad, _):
    qkv, bias, out, lse = ctx.saved_tensors
    wanted = bias is not None and ctx.needs_input_grad[2]
    grad_qkv, sums = _attention_backward(grad, qkv, bias, out, lse, ctx.heads, wanted)
    return grad_qkv, None, sums.sum((0, 1)).to(bias.dtype) if wanted else None


differentiate("attention", _differentiate, _save)


def configurations(arch: int = 0) -> Iterator[tuple]:
    """Yield (label, kernel, signature, constants, warps, stages): upstream's and awkward shapes."""
    upstream = [(1, 256, 256), (1, 256, 64), (6, 64, 1024), (9, 64, 256), (12, 64, 64)]
    awkward = [(3, 32, 256), (2, 128, 256), (1, 192, 81), (2, 64, 81)]
    for heads, size, pixels in upstream + awkward:
        for element in ("bf16", "fp16", "fp32"):
            for name, kernel in KERNELS.items():
                constants, warps, stages = _configuration(
                    name, pixels, heads, size, 4 if element == "fp32" else 2, arch
                )
                signature = {
                    argument: "*fp32" if argument in FLOAT32_ARGUMENTS else f"*{element}"
                    for argument in kernel.arg_names
                    if argument not in constants
                }
                label = f"{name} {element} {heads}x{size} N={pixels}"
                yield label, kernel, signature, constants, warps, stages
