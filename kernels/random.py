"""Counter-based random numbers: a pure function of (seed, step, stream, sample, element).

Philox 4x32-10 (Salmon et al., SC 2011) maps a 64-bit key and a 128-bit counter to four 32-bit
words. The key is the run's seed; the counter is (block of four elements, global sample index,
step, stream). There is no generator state, so a sample's numbers do not depend on the micro-batch,
the number of ranks or earlier steps, and a CUDA graph draws new numbers when the tensor `counter`
changes.
"""

import math
from typing import Any

import torch

from sid_fast.kernels._operator import operator
from sid_fast.kernels._triton import INTERPRETED, tl, triton
from sid_fast.kernels.dispatch import choose

MASK = 0xFFFFFFFF
ROUND_CONSTANTS = 0xD2511F53, 0xCD9E8D57
KEY_INCREMENTS = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
KINDS = ("uniform", "normal")


def random(counter: torch.Tensor, stream: int, shape: tuple[int, ...], kind: str) -> torch.Tensor:
    """Draw random numbers for consecutive samples.

    Args:
        counter: int64 [3], on the device to draw on: key, step (taken modulo 2^32), global index
            of the first sample.
        stream: below 2^32; distinguishes the draws of the same sample and step.
        shape: of the result; dimension 0 counts samples.
        kind: "uniform" in [0, 1), with 24 bits, or "normal", by the Box-Muller transform of 32-bit
            uniforms (at most 6.7 σ).

    Returns:
        float32 of `shape`.

    Raises:
        ValueError: if `kind` is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: choose from {', '.join(KINDS)}")
    n, elements = shape[0], math.prod(shape[1:])
    function = random_eager if choose("random", counter.device) == "eager" else _random
    return function(counter, stream, n, elements, kind == "normal").reshape(shape)


def random_eager(
    counter: torch.Tensor, stream: int, n: int, elements: int, normal: bool
) -> torch.Tensor:
    """Draw the numbers of `random` in plain PyTorch: float32 [n, elements]."""
    blocks = torch.arange(-(-elements // 4), device=counter.device)
    samples = (counter[2] + torch.arange(n, device=counter.device))[:, None]
    words = philox_eager(counter[0], blocks, samples, counter[1], stream)
    if not normal:
        return (torch.stack(words, -1) >> 8).float().mul_(2**-24).flatten(1)[:, :elements]
    pairs = []
    for radius, angle in (words[:2], words[2:]):
        radius = (-2 * (radius.float() * 2**-32 + 2**-33).log()).sqrt()
        angle = angle.float() * (2 * math.pi * 2**-32)
        pairs += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(pairs, -1).flatten(1)[:, :elements]


def philox_eager(
    key: torch.Tensor, *counter: torch.Tensor | int, rounds: int = ROUNDS
) -> tuple[torch.Tensor, ...]:
    """Return the four 32-bit words of a Philox block, in int64; key and counters broadcast."""
    words: list[Any] = [c & MASK for c in counter]  # ints or tensors; tensors after a round
    c0, c1, c2, c3 = words
    k0, k1 = key & MASK, (key >> 32) & MASK
    for _ in range(rounds):
        # An int64 product has the bits of the unsigned one. The shift extends its sign; & MASK
        # drops the extension.
        a, b = ROUND_CONSTANTS[0] * c0, ROUND_CONSTANTS[1] * c2
        c0, c2 = ((b >> 32) & MASK) ^ c1 ^ k0, ((a >> 32) & MASK) ^ c3 ^ k1
        c1, c3 = b & MASK, a & MASK
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & MASK, (k1 + KEY_INCREMENTS[1]) & MASK
    return c0, c1, c2, c3


@triton.jit
def _approx(x, ASM: tl.constexpr):
    """Run `sin.approx` or `cos.approx`: within 2^-20 for |x| ≤ π; library functions would spill."""
    return tl.inline_asm_elementwise(ASM, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _normal_pair(radius, angle):
    radius = tl.sqrt(-2.0 * tl.log(radius.to(tl.float32) * 2.0**-32 + 2.0**-33))
    # Read as a signed word, the angle is in [-π, π).
    angle = angle.to(tl.int32, bitcast=True).to(tl.float32) * (6.283185307179586 * 2.0**-32)
    if INTERPRETED:
        return radius * tl.cos(angle), radius * tl.sin(angle)
    cos = _approx(angle, "cos.approx.ftz.f32 $0, $1;")
    return radius * cos, radius * _approx(angle, "sin.approx.ftz.f32 $0, $1;")


@triton.jit(do_not_specialize=["stream", "elements"])
def _kernel(counter_ptr, out_ptr, stream, elements, NORMAL: tl.constexpr, BLOCK: tl.constexpr):
    """Draw up to 4·BLOCK elements of one sample per program."""
    sample = tl.program_id(0)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    zero = block * 0
    a, b, c, d = tl.philox(
        tl.load(counter_ptr),
        block,
        zero + (tl.load(counter_ptr + 2) + sample).to(tl.int32),
        zero + tl.load(counter_ptr + 1).to(tl.int32),
        zero + stream,
    )
    if NORMAL:
        a, b = _normal_pair(a, b)
        c, d = _normal_pair(c, d)
    else:
        a = (a >> 8).to(tl.float32) * 2.0**-24
        b = (b >> 8).to(tl.float32) * 2.0**-24
        c = (c >> 8).to(tl.float32) * 2.0**-24
        d = (d >> 8).to(tl.float32) * 2.0**-24
    values = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [4 * BLOCK])
    element = tl.program_id(1) * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    start = sample.to(tl.int64) * elements
    tl.store(out_ptr + start + element, values, mask=element < elements)


def _constants(elements: int) -> dict[str, int]:
    block = min(256, max(16, triton.next_power_of_2(-(-elements // 4))))
    return {"BLOCK": block, "num_warps": max(1, block // 64)}


def _run_random(
    counter: torch.Tensor, stream: int, n: int, elements: int, normal: bool
) -> torch.Tensor:
    out = counter.new_empty((n, elements), dtype=torch.float32)
    constants = _constants(elements)
    grid = n, -(-elements // (4 * constants["BLOCK"]))
    with torch.cuda.device_of(counter):
        signed = stream - 2**32 if stream >= 2**31 else stream  # the kernel takes an i32
        _kernel[grid](counter, out, signed, elements, NORMAL=normal, **constants)
    return out


def _random_fake(counter, stream, n, elements, normal):
    return counter.new_empty((n, elements), dtype=torch.float32)


_random = operator("random", _run_random, _random_fake)


# Elements per sample: latents and noise of the presets' images, and one number (such as σ).
SIZES = (3 * 32**2, 3 * 64**2, 1)


def configurations():
    """Yield (label, kernel, signature, constants, warps, stages); see kernels.compile."""
    signature = {
        "counter_ptr": "*i64", "out_ptr": "*fp32", "stream": "i32", "elements": "i32",
    }  # fmt: skip
    for kind in KINDS:
        for elements in SIZES:
            constants = _constants(elements)
            warps = constants.pop("num_warps")
            constants["NORMAL"] = kind == "normal"
            yield f"{kind} {elements}", _kernel, signature, constants, warps, 3
