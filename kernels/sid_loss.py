"""SiD's two losses on raw network outputs, fused with EDM's preconditioning.

The denoised image D(x; σ) = c_skip·x + c_out·F(c_in·x) is never written to memory: `noised` makes
the input of F, and each loss kernel computes the per-sample losses and the gradients from F's
output in one launch. One program handles one sample, in two passes: sums, then gradients.

A sample with a value that is not finite or exceeds LIMIT is dropped: its loss and gradients are 0.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from sid_fast.kernels._operator import differentiate, operator
from sid_fast.kernels._triton import tl, triton
from sid_fast.kernels.dispatch import choose

BLOCK = 2048
# Larger values count as infinite: no valid image, noise or denoised image comes near LIMIT, and
# within it no sum over a sample overflows. σ must be within [1/LIMIT, LIMIT].
LIMIT = 1e6


class Noised(NamedTuple):
    """Noised images, as the networks and the losses read them; a dropped sample is 0 with σ = 1.

    Attributes:
        x_t: y + σε, float32 [N, C, H, W].
        network_input: c_in·x_t in the compute dtype; the only output with a gradient, that of y.
        sigma: σ, float32 [N].
        c_noise: ln(σ)/4, float32 [N].
        valid: False for dropped samples, bool [N].
    """

    x_t: torch.Tensor
    network_input: torch.Tensor
    sigma: torch.Tensor
    c_noise: torch.Tensor
    valid: torch.Tensor


class Losses(NamedTuple):
    """Losses and statistics per sample, each [N]; only `loss` has a gradient.

    Attributes:
        loss: summed over the sample's elements.
        distance: ‖f_φ − f_ψ‖² (generator) or ‖f_ψ − y‖² (fake score).
        weight: the divisor w (generator) or the factor λ (fake score) of the loss.
        kept: False for dropped samples, bool.
    """

    loss: torch.Tensor
    distance: torch.Tensor
    weight: torch.Tensor
    kept: torch.Tensor


def noised(
    images: torch.Tensor,
    sigma: torch.Tensor,
    noise: torch.Tensor,
    valid: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    sigma_data: float = 0.5,
) -> Noised:
    """Add noise σε to images y and scale them for the network (arXiv 2206.00364, table 1).

    The backward pass zeroes a sample's incoming gradient if it is not finite. This happens if the
    sample overflows inside a network: the loss drops it with a gradient of 0, which the network's
    backward pass turns into 0·inf = NaN.

    Args:
        images: y, [N, C, H, W], floating point.
        sigma: σ, N elements.
        noise: ε, [N, C, H, W], floating point.
        valid: bool [N]; False drops a sample. Default: all True.
        dtype: compute dtype of the network.
        sigma_data: standard deviation of the data.

    Returns:
        The noised images, channels-last.
    """
    if valid is None:
        valid = torch.ones(len(images), dtype=torch.bool, device=images.device)
    sigma = sigma.float().reshape(-1)
    images, noise = _channels_last(images), _channels_last(noise)
    return Noised(*_noised(images, sigma, noise, valid, dtype, sigma_data))


def generator_loss(
    teacher: torch.Tensor,
    fake_score: torch.Tensor,
    noised: Noised,
    images: torch.Tensor,
    alpha: float,
    sigma_data: float = 0.5,
) -> Losses:
    """Compute ℓ = d·((r − y) − α·d)/w with d = r − f (SiD, arXiv 2404.04057, equation 23).

    r = f_φ(x_t), f = f_ψ(x_t), and w = max(mean|y − r|, 1e-5) is a constant in the gradient.
    Gradients flow to F_φ, F_ψ and y, in their dtypes. The gradient of y here includes the path
    through c_skip·x_t; the path through the networks ends in noised.network_input.

    Args:
        teacher: F_φ(noised.network_input), [N, C, H, W].
        fake_score: F_ψ(noised.network_input), [N, C, H, W].
        noised: the noised images.
        images: y, the images that `noised` was made from.
        alpha: α.
        sigma_data: standard deviation of the data.
    """
    raw = _channels_last(teacher), _channels_last(fake_score), noised.x_t, _channels_last(images)
    out = _generator_loss(*raw, noised.sigma, noised.valid, alpha, sigma_data)
    return Losses(*out[:4])


def fake_score_loss(
    fake_score: torch.Tensor, noised: Noised, images: torch.Tensor, sigma_data: float = 0.5
) -> Losses:
    """Compute λ·(f_ψ(x_t) − y)², λ = (σ² + σ_data²)/(σ·σ_data)² (arXiv 2206.00364, table 1).

    The arguments are those of generator_loss. Only fake_score gets a gradient.
    """
    raw = _channels_last(fake_score), noised.x_t, _channels_last(images).detach()
    out = _fake_score_loss(*raw, noised.sigma, noised.valid, sigma_data)
    return Losses(*out[:4])


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _per_sample(v: torch.Tensor) -> torch.Tensor:
    return v.reshape(-1, 1, 1, 1)


def _in_range(*tensors: torch.Tensor, limit: float = LIMIT) -> torch.Tensor:
    checks = [(t.abs() <= limit).flatten(1).all(1) for t in tensors]
    return functools.reduce(torch.logical_and, checks)


def _constants(x: torch.Tensor) -> dict:
    return {"SIZE": x[0].numel(), "BLOCK": BLOCK, "LIMIT": LIMIT, "num_warps": 8}


# ---- noised


def _run_noised(
    images: torch.Tensor,
    sigma: torch.Tensor,
    noise: torch.Tensor,
    valid: torch.Tensor,
    dtype: torch.dtype,
    sigma_data: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if choose("sid_loss", images.device) == "eager":
        return noised_eager(images, sigma, noise, valid, dtype, sigma_data)
    out = _noised_like(images, sigma, noise, valid, dtype, sigma_data)
    with torch.cuda.device_of(images):
        _noised_kernel[(len(images),)](
            images, sigma.contiguous(), noise, valid.contiguous(), *out, sigma_data,
            **_constants(images),
        )  # fmt: skip
    return out


def _noised_like(images, sigma, noise, valid, dtype, sigma_data):
    x_t = torch.empty_like(images, dtype=torch.float32, memory_format=torch.channels_last)
    scaled = torch.empty_like(images, dtype=dtype, memory_format=torch.channels_last)
    return x_t, scaled, torch.empty_like(sigma), torch.empty_like(sigma), torch.empty_like(valid)


_noised = operator("noised", _run_noised, _noised_like)


def noised_eager(images, sigma, noise, valid, dtype, sigma_data):
    """Compute `noised` in plain PyTorch: in float64 if sigma is, else in float32."""
    valid = valid & (sigma >= 1 / LIMIT) & (sigma <= LIMIT) & _in_range(images, noise)
    sigma = torch.where(valid, sigma, 1.0)
    x_t = images.to(sigma.dtype) + _per_sample(sigma) * noise
    x_t = torch.where(_per_sample(valid), x_t, 0.0)
    c_in = 1 / (sigma**2 + sigma_data**2).sqrt()
    return x_t, (_per_sample(c_in) * x_t).to(dtype), sigma, sigma.log() / 4, valid


def _noised_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # no zeros for outputs without a gradient
    images, *_, ctx.sigma_data = inputs
    x_t, _, sigma, c_noise, valid = output
    ctx.dtype = images.dtype
    ctx.mark_non_differentiable(x_t, sigma, c_noise, valid)
    ctx.save_for_backward(sigma, valid)


def _noised_backward(ctx, _, grad, *__):
    sigma, valid = ctx.saved_tensors
    c_in = _per_sample((sigma**2 + ctx.sigma_data**2).rsqrt())
    valid = valid & _in_range(grad, limit=torch.finfo(grad.dtype).max)
    grad = torch.where(_per_sample(valid), c_in * grad, 0.0).to(ctx.dtype)
    return grad, None, None, None, None, None


differentiate("noised", _noised_backward, _noised_context)


# ---- generator_loss


def _run_generator_loss(
    teacher: torch.Tensor,
    fake_score: torch.Tensor,
    x_t: torch.Tensor,
    images: torch.Tensor,
    sigma: torch.Tensor,
    valid: torch.Tensor,
    alpha: float,
    sigma_data: float,
) -> tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]:
    arguments = teacher, fake_score, x_t, images, sigma, valid, alpha, sigma_data
    if choose("sid_loss", images.device) == "eager":
        return generator_loss_eager(*arguments)
    out = _generator_loss_like(*arguments)
    with torch.cuda.device_of(images):
        _generator_loss_kernel[(len(teacher),)](
            *arguments[:6], *out, alpha, sigma_data, **_constants(images)
        )
    return out


def _generator_loss_like(teacher, fake_score, x_t, images, sigma, valid, alpha, sigma_data):
    sums = (torch.empty_like(sigma) for _ in range(3))
    grads = (torch.empty_like(t) for t in (teacher, fake_score, images))
    return *sums, torch.empty_like(valid), *grads


_generator_loss = operator("generator_loss", _run_generator_loss, _generator_loss_like)


def generator_loss_eager(teacher, fake_score, x_t, images, sigma, valid, alpha, sigma_data):
    """Compute `generator_loss` and its gradients in plain PyTorch: float64 if sigma is."""
    total = _per_sample(sigma**2 + sigma_data**2)
    c_skip, c_out = sigma_data**2 / total, _per_sample(sigma) * sigma_data / total.sqrt()
    r, f = c_skip * x_t + c_out * teacher, c_skip * x_t + c_out * fake_score
    valid = valid & _in_range(r, f)
    y, r, f = (torch.where(_per_sample(valid), v.to(sigma.dtype), 0.0) for v in (images, r, f))
    d, e = r - f, r - y
    weight = e.abs().mean((1, 2, 3)).clamp(min=1e-5)
    w = _per_sample(weight)
    loss = (d * (e - alpha * d) / w).sum((1, 2, 3))
    grads = (
        c_out * (e + (1 - 2 * alpha) * d) / w,
        c_out * (2 * alpha * d - e) / w,
        (c_skip - 1) * d / w,  # −d/w from y, and c_skip·d/w from x_t in r and f
    )
    typed = (g.to(t.dtype) for g, t in zip(grads, (teacher, fake_score, images), strict=True))
    return loss, d.square().sum((1, 2, 3)), weight, valid, *typed


def _loss_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    rest = output[1:]
    ctx.mark_non_differentiable(*rest)
    ctx.save_for_backward(*rest[3:])


def _scaled(grad, gradients):
    return [(_per_sample(grad) * g).to(g.dtype) for g in gradients]


def _generator_loss_backward(ctx, grad, *_):
    teacher, fake_score, images = _scaled(grad, ctx.saved_tensors)
    return teacher, fake_score, None, images, None, None, None, None


differentiate("generator_loss", _generator_loss_backward, _loss_context)


# ---- fake_score_loss


def _run_fake_score_loss(
    fake_score: torch.Tensor,
    x_t: torch.Tensor,
    images: torch.Tensor,
    sigma: torch.Tensor,
    valid: torch.Tensor,
    sigma_data: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    arguments = fake_score, x_t, images, sigma, valid, sigma_data
    if choose("sid_loss", images.device) == "eager":
        return fake_score_loss_eager(*arguments)
    out = _fake_score_loss_like(*arguments)
    with torch.cuda.device_of(images):
        _fake_score_loss_kernel[(len(images),)](
            *arguments[:5], *out, sigma_data, **_constants(images)
        )
    return out


def _fake_score_loss_like(fake_score, x_t, images, sigma, valid, sigma_data):
    sums = (torch.empty_like(sigma) for _ in range(3))
    return *sums, torch.empty_like(valid), torch.empty_like(fake_score)


_fake_score_loss = operator("fake_score_loss", _run_fake_score_loss, _fake_score_loss_like)


def fake_score_loss_eager(fake_score, x_t, images, sigma, valid, sigma_data):
    """Compute `fake_score_loss` and its gradient in plain PyTorch: float64 if sigma is."""
    total = sigma**2 + sigma_data**2
    weight = total / (sigma * sigma_data) ** 2
    c_skip = _per_sample(sigma_data**2 / total)
    c_out = _per_sample(sigma * sigma_data / total.sqrt())
    f = c_skip * x_t + c_out * fake_score
    valid = valid & _in_range(f)
    e = torch.where(_per_sample(valid), f - images, 0.0)
    distance = e.square().sum((1, 2, 3))
    grad = 2 * _per_sample(weight) * c_out * e
    return weight * distance, distance, weight, valid, grad.to(fake_score.dtype)


def _fake_score_loss_backward(ctx, grad, *_):
    return *_scaled(grad, ctx.saved_tensors), None, None, None, None, None


differentiate("fake_score_loss", _fake_score_loss_backward, _loss_context)


def bytes_moved(elements: int, kernel: str, itemsize: int) -> int:
    """Return the bytes that a launch over `elements` must read and write at least.

    Assumes that the second pass over a sample hits the cache.

    Args:
        elements: of all samples.
        kernel: "noised", "generator_loss" or "fake_score_loss".
        itemsize: bytes per element of F's output.
    """
    raw, image = {"noised": (1, 3), "generator_loss": (4, 3), "fake_score_loss": (2, 2)}[kernel]
    return elements * (raw * itemsize + image * 4)


def flop(elements: int, kernel: str) -> int:
    """Return the FLOP of a launch over `elements`, both passes included."""
    return elements * {"noised": 3, "generator_loss": 28, "fake_score_loss": 11}[kernel]


@triton.jit
def _read(x, offsets, SIZE: tl.constexpr):
    return tl.load(x + offsets, mask=offsets < SIZE, other=0.0).to(tl.float32)


@triton.jit
def _all(flags):
    return tl.min(flags.to(tl.int32), 0) == 1


@triton.jit
def _noised_kernel(
    images, sigma, noise, valid_in, x_t, network_input, sigma_out, c_noise, valid_out, sigma_data,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    at = n * SIZE
    s = tl.load(sigma + n)
    in_range = tl.full([BLOCK], 1, tl.int1)
    for start in range(0, SIZE, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        in_range &= tl.abs(_read(images + at, offsets, SIZE)) <= LIMIT  # False for NaN
        in_range &= tl.abs(_read(noise + at, offsets, SIZE)) <= LIMIT
    valid = _all(in_range) & (s >= 1 / LIMIT) & (s <= LIMIT) & tl.load(valid_in + n)
    s = tl.where(valid, s, 1.0)
    c_in = 1 / tl.sqrt_rn(s * s + sigma_data * sigma_data)
    for start in range(0, SIZE, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        x = _read(images + at, offsets, SIZE) + s * _read(noise + at, offsets, SIZE)
        x = tl.where(valid, x, 0.0)
        tl.store(x_t + at + offsets, x, mask=offsets < SIZE)
        scaled = (c_in * x).to(network_input.dtype.element_ty)
        tl.store(network_input + at + offsets, scaled, mask=offsets < SIZE)
    tl.store(sigma_out + n, s)
    tl.store(c_noise + n, tl.log(s) / 4)
    tl.store(valid_out + n, valid)


@triton.jit
def _denoised(raw, x_t, c_skip, c_out, offsets, SIZE: tl.constexpr):
    return c_skip * _read(x_t, offsets, SIZE) + c_out * _read(raw, offsets, SIZE)


@triton.jit
def _store(x, offsets, value, valid, SIZE: tl.constexpr):
    value = tl.where(valid, value, 0.0).to(x.dtype.element_ty)
    tl.store(x + offsets, value, mask=offsets < SIZE)


@triton.jit
def _generator_loss_kernel(
    teacher, fake_score, x_t, images, sigma, valid_in, loss, distance, weight, valid_out,
    teacher_grad, fake_score_grad, images_grad, alpha, sigma_data,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    at = n * SIZE
    s = tl.load(sigma + n)
    total = s * s + sigma_data * sigma_data
    c_skip = sigma_data * sigma_data / total
    c_out = s * sigma_data / tl.sqrt_rn(total)

    in_range = tl.full([BLOCK], 1, tl.int1)
    error = tl.zeros([BLOCK], tl.float32)  # |r − y|
    product = tl.zeros([BLOCK], tl.float32)  # d·(r − y)
    square = tl.zeros([BLOCK], tl.float32)  # d²
    for start in range(0, SIZE, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        r = _denoised(teacher + at, x_t + at, c_skip, c_out, offsets, SIZE)
        f = _denoised(fake_score + at, x_t + at, c_skip, c_out, offsets, SIZE)
        e = r - _read(images + at, offsets, SIZE)
        in_range &= (tl.abs(r) <= LIMIT) & (tl.abs(f) <= LIMIT)
        error += tl.abs(e)
        product += (r - f) * e
        square += (r - f) * (r - f)
    valid = _all(in_range) & tl.load(valid_in + n)
    w = tl.where(valid, tl.maximum(tl.sum(error) / SIZE, 1e-5), 1e-5)
    squares = tl.sum(square)
    tl.store(loss + n, tl.where(valid, (tl.sum(product) - alpha * squares) / w, 0.0))
    tl.store(distance + n, tl.where(valid, squares, 0.0))
    tl.store(weight + n, w)
    tl.store(valid_out + n, valid)

    for start in range(0, SIZE, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        r = _denoised(teacher + at, x_t + at, c_skip, c_out, offsets, SIZE)
        f = _denoised(fake_score + at, x_t + at, c_skip, c_out, offsets, SIZE)
        d = (r - f) / w
        e = (r - _read(images + at, offsets, SIZE)) / w
        _store(teacher_grad + at, offsets, c_out * (e + (1 - 2 * alpha) * d), valid, SIZE)
        _store(fake_score_grad + at, offsets, c_out * (2 * alpha * d - e), valid, SIZE)
        # −d/w from y, and c_skip·d/w from x_t in r and f.
        _store(images_grad + at, offsets, (c_skip - 1) * d, valid, SIZE)


@triton.jit
def _fake_score_loss_kernel(
    fake_score, x_t, images, sigma, valid_in, loss, distance, weight, valid_out, fake_score_grad,
    sigma_data, SIZE: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    at = n * SIZE
    s = tl.load(sigma + n)
    total = s * s + sigma_data * sigma_data
    c_skip = sigma_data * sigma_data / total
    c_out = s * sigma_data / tl.sqrt_rn(total)
    w = total / (s * sigma_data * (s * sigma_data))

    in_range = tl.full([BLOCK], 1, tl.int1)
    square = tl.zeros([BLOCK], tl.float32)
    for start in range(0, SIZE, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        f = _denoised(fake_score + at, x_t + at, c_skip, c_out, offsets, SIZE)
        e = f - _read(images + at, offsets, SIZE)
        in_range &= tl.abs(f) <= LIMIT
        square += e * e
    valid = _all(in_range) & tl.load(valid_in + n)
    squares = tl.where(valid, tl.sum(square), 0.0)
    tl.store(loss + n, w * squares)
    tl.store(distance + n, squares)
    tl.store(weight + n, w)
    tl.store(valid_out + n, valid)

    for start in range(0, SIZE, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        f = _denoised(fake_score + at, x_t + at, c_skip, c_out, offsets, SIZE)
        e = f - _read(images + at, offsets, SIZE)
        _store(fake_score_grad + at, offsets, 2 * w * c_out * e, valid, SIZE)


def configurations() -> Iterator[tuple]:
    """Yield (label, kernel, signature, constants, warps, stages); see kernels.compile."""
    sums = dict(loss="*fp32", distance="*fp32", weight="*fp32", valid_out="*i1")
    common = dict(x_t="*fp32", images="*fp32", sigma="*fp32", valid_in="*i1", sigma_data="fp32")
    for resolution in (32, 64):
        constants = dict(SIZE=3 * resolution**2, BLOCK=BLOCK, LIMIT=LIMIT)
        for raw in ("fp32", "bf16", "fp16"):
            signatures = (
                ("noised", _noised_kernel, dict(
                    noise="*fp32", network_input=f"*{raw}", sigma_out="*fp32", c_noise="*fp32",
                    valid_out="*i1",
                )),
                ("generator_loss", _generator_loss_kernel, sums | dict(
                    teacher=f"*{raw}", fake_score=f"*{raw}", teacher_grad=f"*{raw}",
                    fake_score_grad=f"*{raw}", images_grad="*fp32", alpha="fp32",
                )),
                ("fake_score_loss", _fake_score_loss_kernel, sums | dict(
                    fake_score=f"*{raw}", fake_score_grad=f"*{raw}",
                )),
            )  # fmt: skip
            for name, kernel, signature in signatures:
                label = f"{name} {resolution}x{resolution} {raw}"
                yield label, kernel, common | signature, constants, 8, 1
