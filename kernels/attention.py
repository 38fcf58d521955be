"""Self-attention over the pixels of a feature map: one pass over the keys, no N×N matrix in memory.

The algorithm is FlashAttention's (arXiv 2205.14135, 2307.08691): softmax with a running maximum
and sum, of which the logarithm is kept, so that the backward pass recomputes the weights. The
backward pass is two kernels, one owning blocks of queries and one blocks of keys, so that every
gradient is summed in a fixed order.
"""

import math
from collections.abc import Iterator

import torch

from sid_fast.kernels._triton import INTERPRETED, tl, triton
from sid_fast.kernels.dispatch import choose

# Queries or keys a program owns, keys or queries it takes in a turn of its loop, warps, stages; by
# bytes an element, kernel and head size. The largest found that neither spill on sm_80, 90 and 100
# nor outgrow an A100's shared memory; float32 stays off the tensor cores and needs the registers.
TILES = {
    2: {
        "forward": {64: (128, 64, 4, 3), 128: (128, 64, 8, 2), 256: (128, 64, 8, 2)},
        "backward_q": {64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (64, 64, 8, 2)},
        "backward_kv": {64: (64, 64, 4, 2), 128: (64, 32, 4, 2), 256: (64, 32, 8, 2)},
    },
    4: {
        "forward": {64: (32, 32, 8, 2), 128: (32, 32, 8, 2), 256: (32, 16, 8, 2)},
        "backward_q": {64: (32, 32, 8, 2), 128: (32, 32, 8, 2), 256: (32, 16, 8, 2)},
        "backward_kv": {64: (32, 32, 8, 2), 128: (32, 32, 8, 2), 256: (16, 16, 8, 2)},
    },
}
MAX_SIZE = 256  # channels a head, beyond which the reference runs


def attention(qkv: torch.Tensor, heads: int, blocked: bool = False) -> torch.Tensor:
    """Softmax attention of every pixel to every pixel, head by head.

    qkv is [N, 3·C, H, W], float32, bfloat16 or float16; C must divide by heads. Its channels
    are laid out [head, channel, {q, k, v}], as in published weights, or, with blocked=True,
    [{q, k, v}, head, channel] (see blocked_order), which is read where it lies and saves a
    pass. The softmax runs over the keys in float32 with scale 1/√(C/heads). Returns
    [N, C, H, W] in the dtype of qkv, channels-last on a GPU. Raises ValueError if the channels
    do not divide.
    """
    if qkv.shape[1] % (3 * heads):
        raise ValueError(f"attention: {qkv.shape[1]} channels do not divide into {heads} heads")
    if choose("attention") == "reference" or qkv.shape[1] // (3 * heads) > MAX_SIZE:
        return attention_ref(qkv, heads, blocked)
    if not blocked:
        qkv = qkv.unflatten(1, (heads, -1, 3)).permute(0, 4, 5, 3, 1, 2)
        qkv = qkv.flatten(3).permute(0, 3, 1, 2)  # one copy, to channels-last
    return _attention(qkv, heads)[0]


def attention_ref(qkv: torch.Tensor, heads: int, blocked: bool = False) -> torch.Tensor:
    """attention in plain PyTorch, on any device and also in float64; N×N weights in memory."""
    n, c3, height, width = qkv.shape
    size = c3 // 3 // heads
    if blocked:
        q, k, v = qkv.reshape(n, 3, heads, size, height * width).unbind(1)
    else:
        q, k, v = qkv.reshape(n, heads, size, 3, height * width).unbind(3)
    logits = (q.transpose(-1, -2) @ k).to(torch.promote_types(qkv.dtype, torch.float32))
    weights = (logits / math.sqrt(size)).softmax(-1).to(qkv.dtype)
    return (v @ weights.transpose(-1, -2)).reshape(n, c3 // 3, height, width)


def blocked_order(channels: int, heads: int) -> torch.Tensor:
    """The rows of a published qkv weight (or bias) in blocked order: int64 [3·channels].

    weight[blocked_order(…)] makes a convolution write the blocked layout; its argsort undoes it.
    """
    published = torch.arange(3 * channels).reshape(heads, channels // heads, 3)
    return published.permute(2, 0, 1).flatten()


# What follows sees memory as qkv [image, pixel, {q, k, v}, head, channel] and
# out [image, pixel, head, channel]; `head` counts over the heads of all images.


@triton.jit
def _starts(head, PIXELS: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr):
    """Where a head's q begins in qkv, its channels in out, and its pixels in lse and delta."""
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
    """[BLOCK, BLOCK_SIZE]: one head's channels, pixels ROW apart, zeros beyond either end."""
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
def _dot(a, b, sum):
    """sum + a·b in float32; float32 operands are not rounded to tf32."""
    if INTERPRETED:  # whose bfloat16 products multiply bit patterns (triton issue 11584)
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sum, input_precision="ieee")


@triton.jit
def _forward(
    qkv,
    out,
    lse,
    PIXELS: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """A program owns BLOCK queries of one head; lse is log2 Σ exp2 of the logits in base 2."""
    CHANNELS: tl.constexpr = HEADS * SIZE
    SCALE: tl.constexpr = 1.4426950408889634 * SIZE**-0.5  # exp(x) = exp2(x·log2 e)
    blocks: tl.constexpr = (PIXELS + BLOCK - 1) // BLOCK
    head = tl.program_id(0) // blocks
    queries = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    in_qkv, in_out, in_lse = _starts(head, PIXELS, HEADS, SIZE)
    qkv += in_qkv
    q = _read(qkv, queries, BLOCK, 3 * CHANNELS, PIXELS, SIZE, BLOCK_SIZE)
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
    _write(out + in_out, queries, mean, CHANNELS, PIXELS, SIZE, BLOCK_SIZE)
    tl.store(lse + in_lse + queries, highest + tl.log2(total), mask=queries < PIXELS)


@triton.jit
def _backward_q(
    qkv,
    out,
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
    """A program owns BLOCK queries: writes their gradient, and delta = Σ out·grad for the keys'."""
    CHANNELS: tl.constexpr = HEADS * SIZE
    SCALE: tl.constexpr = 1.4426950408889634 * SIZE**-0.5
    blocks: tl.constexpr = (PIXELS + BLOCK - 1) // BLOCK
    head = tl.program_id(0) // blocks
    queries = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    in_qkv, in_out, in_lse = _starts(head, PIXELS, HEADS, SIZE)
    qkv += in_qkv
    q = _read(qkv, queries, BLOCK, 3 * CHANNELS, PIXELS, SIZE, BLOCK_SIZE)
    g = _read(grad + in_out, queries, BLOCK, CHANNELS, PIXELS, SIZE, BLOCK_SIZE)
    o = _read(out + in_out, queries, BLOCK, CHANNELS, PIXELS, SIZE, BLOCK_SIZE)
    d = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    tl.store(delta + in_lse + queries, d, mask=queries < PIXELS)
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


@triton.jit
def _backward_kv(
    qkv,
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
    """A program owns BLOCK keys and their values; the weights it recomputes are [keys, queries]."""
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
    dk = tl.zeros([BLOCK, BLOCK_SIZE], tl.float32)
    dv = tl.zeros([BLOCK, BLOCK_SIZE], tl.float32)
    for first in range(0, PIXELS, STEP):
        queries = first + tl.arange(0, STEP)
        inside = queries < PIXELS
        q = _read(qkv, queries, STEP, 3 * CHANNELS, PIXELS, SIZE, BLOCK_SIZE)
        norm = tl.load(lse + in_lse + queries, mask=inside, other=0.0)
        p = tl.exp2(_dot(k, tl.trans(q), None) * SCALE - norm[None, :])
        g = _read(grad + in_out, queries, STEP, CHANNELS, PIXELS, SIZE, BLOCK_SIZE)
        dv = _dot(p.to(g.dtype), g, dv)
        d = tl.load(delta + in_lse + queries, mask=inside, other=0.0)
        ds = p * (_dot(v, tl.trans(g), None) - d[None, :])
        dk = _dot(ds.to(q.dtype), q, dk)
    dk *= SIZE**-0.5
    _write(grad_qkv + CHANNELS, keys, dk, 3 * CHANNELS, PIXELS, SIZE, BLOCK_SIZE)
    _write(grad_qkv + 2 * CHANNELS, keys, dv, 3 * CHANNELS, PIXELS, SIZE, BLOCK_SIZE)


KERNELS = {"forward": _forward, "backward_q": _backward_q, "backward_kv": _backward_kv}


def _configuration(
    kernel: str, pixels: int, heads: int, size: int, itemsize: int
) -> tuple[dict[str, int], int, int]:
    """The constants of a kernel, its warps and its stages."""
    padded = max(16, 1 << (size - 1).bit_length())
    block, step, warps, stages = TILES[itemsize][kernel][max(64, padded)]
    enough = max(16, 1 << (pixels - 1).bit_length())
    constants = {
        "PIXELS": pixels,
        "HEADS": heads,
        "SIZE": size,
        "BLOCK_SIZE": padded,
        "BLOCK": min(block, enough),
        "STEP": min(step, enough),
    }
    return constants, warps, stages


def _launch(kernel: str, qkv: torch.Tensor, heads: int, *others: torch.Tensor) -> None:
    images, c3, height, width = qkv.shape
    constants, warps, stages = _configuration(
        kernel, height * width, heads, c3 // 3 // heads, qkv.itemsize
    )
    programs = images * heads * -(-height * width // constants["BLOCK"])
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


@torch.library.custom_op("sid_fast::attention", mutates_args=())
def _attention(qkv: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocked qkv -> out, lse."""
    qkv = qkv.contiguous(memory_format=torch.channels_last)
    out, lse = _empty(qkv, heads)
    _launch("forward", qkv, heads, out, lse)
    return out, lse


@torch.library.custom_op("sid_fast::attention_backward", mutates_args=())
def _attention_backward(
    grad: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, heads: int
) -> torch.Tensor:
    qkv = qkv.contiguous(memory_format=torch.channels_last)
    grad = grad.contiguous(memory_format=torch.channels_last)
    grad_qkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    _launch("backward_q", qkv, heads, out, grad, lse, delta, grad_qkv)
    _launch("backward_kv", qkv, heads, grad, lse, delta, grad_qkv)
    return grad_qkv


@_attention_backward.register_fake
def _(grad, qkv, out, lse, heads):
    return torch.empty_like(qkv, memory_format=torch.channels_last)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # of lse, which no one uses
    ctx.save_for_backward(inputs[0], *output)
    ctx.heads = inputs[1]


def _differentiate(ctx, grad, _):
    return _attention_backward(grad, *ctx.saved_tensors, ctx.heads), None


_attention.register_fake(_empty)
_attention.register_autograd(_differentiate, setup_context=_save)


def configurations() -> Iterator[tuple]:
    """What kernels.compile compiles: the shapes of the published networks, and awkward ones."""
    published = [(1, 256, 256), (1, 256, 64), (6, 64, 1024), (9, 64, 256), (12, 64, 64)]
    awkward = [(3, 32, 256), (2, 128, 256), (1, 192, 81), (2, 64, 81)]
    for heads, size, pixels in published + awkward:
        for element in ("bf16", "fp16", "fp32"):
            for name, kernel in KERNELS.items():
                constants, warps, stages = _configuration(
                    name, pixels, heads, size, 4 if element == "fp32" else 2
                )
                signature = {
                    argument: "*fp32" if argument in ("lse", "delta") else f"*{element}"
                    for argument in kernel.arg_names
                    if argument not in constants
                }
                label = f"{name} {element} {heads}x{size} N={pixels}"
                yield label, kernel, signature, constants, warps, stages
