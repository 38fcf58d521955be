"""The adversarial losses of SiDA, from the logits of the fake score's encoder (arXiv 2410.14919).

Consecutive samples form groups. The binary cross-entropy is a mean over a group's valid samples and
all their positions, and each sample weights it with its own λ or 1/ω. So samples of a group depend
on each other, and the group is part of the algorithm. Each Triton program handles one group: a pass
over its logits for the means, and one for the derivatives.

A sample with a logit that is non-finite or beyond LIMIT leaves its group. A group without valid
samples has the loss 0.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from sid_fast.kernels._operator import differentiate, operator
from sid_fast.kernels._triton import tl, triton
from sid_fast.kernels.dispatch import choose
from sid_fast.kernels.sid_loss import LIMIT

CLAMP = 10.0  # the generator's logits beyond ±CLAMP give no gradient
TILE = 2048  # logits per tile, about


class DiscriminatorLoss(NamedTuple):
    """Per-sample results of discriminator_loss, [N]; 0 for a dropped sample.

    Only `loss` has a gradient.

    Attributes:
        loss: λ·(B^r + B^f)/2.
        real_logit: Mean logit of the real image.
        fake_logit: Mean logit of the generated image.
        real_share: Fraction of the real image's logits that are positive: taken for real.
        fake_share: The same of the generated image.
        kept: Whether the sample is valid.
    """

    loss: torch.Tensor
    real_logit: torch.Tensor
    fake_logit: torch.Tensor
    real_share: torch.Tensor
    fake_share: torch.Tensor
    kept: torch.Tensor


class AdversarialLoss(NamedTuple):
    """Per-sample results of adversarial_loss, [N]; see DiscriminatorLoss."""

    loss: torch.Tensor
    logit: torch.Tensor
    share: torch.Tensor
    kept: torch.Tensor


def discriminator_loss(
    real: torch.Tensor,
    fake: torch.Tensor,
    weight: torch.Tensor,
    valid: torch.Tensor,
    group: int,
) -> DiscriminatorLoss:
    """Compute λ_i·(B^r + B^f)/2 for each sample i.

    B^r and B^f are the group's means of softplus(−ℓ^r) and softplus(ℓ^f). Gradients reach both.

    Args:
        real: Logits ℓ^r of the real images, float32 [N, 1, H, W].
        fake: Logits ℓ^f of the generated images, like real.
        weight: λ, float32 [N].
        valid: bool [N], False for samples already known to be invalid.
        group: Samples per group.

    Raises:
        ValueError: if N is not a multiple of the group.
    """
    _check(real, group)
    real, fake = real.contiguous(), fake.contiguous()
    return DiscriminatorLoss(*_discriminator_loss(real, fake, weight, valid, group)[:6])


def adversarial_loss(
    logits: torch.Tensor, weight: torch.Tensor, valid: torch.Tensor, group: int
) -> AdversarialLoss:
    """Compute B^g/ω_i for each sample i, B^g the group's mean of softplus(−clamp(ℓ, −10, 10)).

    Args:
        logits: Logits ℓ of the generated images, float32 [N, 1, H, W].
        weight: ω, float32 [N].
        valid: bool [N], False for samples already known to be invalid.
        group: Samples per group.

    Raises:
        ValueError: if N is not a multiple of the group.
    """
    _check(logits, group)
    return AdversarialLoss(*_adversarial_loss(logits.contiguous(), weight, valid, group)[:4])


def _check(logits: torch.Tensor, group: int) -> None:
    if group < 1 or len(logits) % group:
        raise ValueError(f"group={group} does not divide {len(logits)} samples")


def _launch(logits: torch.Tensor, group: int) -> dict:
    positions = logits[0].numel()
    lanes = 1 << (positions - 1).bit_length()
    rows = max(min(TILE // lanes, 1 << (group - 1).bit_length()), 1)
    return {
        "GROUP": group, "POSITIONS": positions, "LANES": lanes, "ROWS": rows, "LIMIT": LIMIT,
        "num_warps": 8,
    }  # fmt: skip


def _per_sample(v: torch.Tensor) -> torch.Tensor:
    return v.reshape(-1, 1, 1, 1)


# ---- discriminator_loss


def _run_discriminator_loss(
    real: torch.Tensor, fake: torch.Tensor, weight: torch.Tensor, valid: torch.Tensor, group: int
) -> tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]:
    if choose("sida_loss", real.device) == "eager":
        return discriminator_loss_eager(real, fake, weight, valid, group)
    out = _discriminator_loss_like(real, fake, weight, valid, group)
    with torch.cuda.device_of(real):
        _discriminator_loss_kernel[(len(real) // group,)](
            real, fake, weight.contiguous(), valid.contiguous(), *out, **_launch(real, group)
        )
    return out


def _discriminator_loss_like(real, fake, weight, valid, group):
    sums = (torch.empty_like(weight) for _ in range(5))
    grads = torch.empty_like(weight), torch.empty_like(real), torch.empty_like(fake)
    return *sums, torch.empty_like(valid), *grads


_discriminator_loss = operator(
    "sida_discriminator_loss", _run_discriminator_loss, _discriminator_loss_like
)


def discriminator_loss_eager(real, fake, weight, valid, group):
    """Compute discriminator_loss in plain PyTorch, in the logits' dtype.

    Returns:
        The fields of DiscriminatorLoss; λ, 0 for a dropped sample; the derivatives of B^r/2 and
        B^f/2 by each logit.
    """
    kept = valid & _within(real) & _within(fake)
    real, fake = (torch.where(_per_sample(kept), v, 0.0) for v in (real, fake))
    weight = torch.where(kept, weight, 0.0)
    means = [_group_mean(F.softplus(v), kept, group) for v in (-real, fake)]
    share = _per_sample(_shares(kept, group) / (2 * real[0].numel()))
    return (
        weight * (means[0] + means[1]) / 2,
        *(v.mean((1, 2, 3)) for v in (real, fake)),
        *((v > 0).to(v.dtype).mean((1, 2, 3)) for v in (real, fake)),
        kept,
        weight,
        -share * (-real).sigmoid(),
        share * fake.sigmoid(),
    )


def _within(logits: torch.Tensor) -> torch.Tensor:
    return (logits.abs() <= LIMIT).flatten(1).all(1)


def _shares(kept: torch.Tensor, group: int) -> torch.Tensor:
    """Return 1/(valid samples of its group) for each valid sample, 0 for a dropped one; [N]."""
    count = kept.reshape(-1, group).sum(1, keepdim=True).clamp(min=1)
    return (kept.reshape(-1, group) / count).reshape(-1)


def _group_mean(values: torch.Tensor, kept: torch.Tensor, group: int) -> torch.Tensor:
    """Return each sample's mean over the valid samples of its group and all positions; [N]."""
    parts = values.mean((1, 2, 3)) * _shares(kept, group)
    return _group_sum(parts, group)


def _group_sum(values: torch.Tensor, group: int) -> torch.Tensor:
    return values.reshape(-1, group).sum(1, keepdim=True).expand(-1, group).reshape(-1)


def _context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.group = inputs[-1]
    rest = output[1:]
    ctx.mark_non_differentiable(*rest)
    ctx.save_for_backward(*output[-(len(inputs) - 2) :])


def _backward(ctx, grad, *_):
    """Multiply each derivative of a group's mean by the group's Σ upstream·weight."""
    weight, *derivatives = ctx.saved_tensors
    factor = _per_sample(_group_sum(grad * weight, ctx.group))
    return *(factor * d for d in derivatives), None, None, None


differentiate("sida_discriminator_loss", _backward, _context)


# ---- adversarial_loss


def _run_adversarial_loss(
    logits: torch.Tensor, weight: torch.Tensor, valid: torch.Tensor, group: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if choose("sida_loss", logits.device) == "eager":
        return adversarial_loss_eager(logits, weight, valid, group)
    out = _adversarial_loss_like(logits, weight, valid, group)
    with torch.cuda.device_of(logits):
        _adversarial_loss_kernel[(len(logits) // group,)](
            logits, weight.contiguous(), valid.contiguous(), *out, CLAMP=CLAMP,
            **_launch(logits, group),
        )  # fmt: skip
    return out


def _adversarial_loss_like(logits, weight, valid, group):
    sums = (torch.empty_like(weight) for _ in range(3))
    return *sums, torch.empty_like(valid), torch.empty_like(weight), torch.empty_like(logits)


_adversarial_loss = operator("sida_adversarial_loss", _run_adversarial_loss, _adversarial_loss_like)


def adversarial_loss_eager(logits, weight, valid, group):
    """Compute adversarial_loss in plain PyTorch, in the logits' dtype.

    Returns:
        The fields of AdversarialLoss; 1/ω, 0 for a dropped sample; the derivative of B^g by each
        logit.
    """
    kept = valid & _within(logits)
    logits = torch.where(_per_sample(kept), logits, 0.0)
    weight = torch.where(kept, 1 / weight, 0.0)
    mean = _group_mean(F.softplus(-logits.clamp(-CLAMP, CLAMP)), kept, group)
    share = _per_sample(_shares(kept, group) / logits[0].numel())
    derivative = torch.where(logits.abs() <= CLAMP, -share * (-logits).sigmoid(), 0.0)
    positive = (logits > 0).to(logits.dtype)
    sums = mean * weight, logits.mean((1, 2, 3)), positive.mean((1, 2, 3))
    return *sums, kept, weight, derivative


differentiate("sida_adversarial_loss", _backward, _context)


def bytes_moved(logits: int, kernel: str) -> int:
    """Return the bytes that a launch over this many logits per side must read and write.

    All are float32; the second pass over a group hits the cache.
    """
    return 4 * logits * {"discriminator": 4, "adversarial": 2}[kernel]


@triton.jit
def _softplus(x):
    """Return ln(1 + eˣ), accurate where eˣ is small too."""
    e = tl.exp(-tl.abs(x))
    return tl.maximum(x, 0.0) + tl.where(e < 1e-3, e - 0.5 * e * e, tl.log(1 + e))


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _logits(x, at, inside):
    return tl.load(x + at, mask=inside, other=0.0)


@triton.jit
def _rows(
    first, start, GROUP: tl.constexpr, POSITIONS: tl.constexpr, LANES: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Return a tile's samples, which are in the group, and its logits' offsets, which are valid."""
    row = start + tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    ours = row < GROUP
    samples = first + row
    at = samples[:, None] * POSITIONS + lane[None, :]
    return samples, ours, at, ours[:, None] & (lane < POSITIONS)[None, :]


@triton.jit
def _mean(values, POSITIONS: tl.constexpr):
    return tl.sum(values, 1) / POSITIONS


@triton.jit
def _fine(x, LIMIT: tl.constexpr):
    return tl.min((tl.abs(x) <= LIMIT).to(tl.int32), 1) == 1


@triton.jit
def _discriminator_loss_kernel(
    real, fake, weight, known, loss, real_logit, fake_logit, real_share, fake_share, kept_out,
    weight_out, real_grad, fake_grad,
    GROUP: tl.constexpr, POSITIONS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    LIMIT: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * GROUP
    count = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS], tl.float32)  # of both means, over positions
    for start in range(0, GROUP, ROWS):
        samples, ours, at, inside = _rows(first, start, GROUP, POSITIONS, LANES, ROWS)
        r = _logits(real, at, inside)
        f = _logits(fake, at, inside)
        kept = tl.load(known + samples, mask=ours, other=0) & _fine(r, LIMIT) & _fine(f, LIMIT)
        valid = inside & kept[:, None]
        count += kept.to(tl.float32)
        total += _mean(tl.where(valid, _softplus(-r) + _softplus(f), 0.0), POSITIONS)
        tl.store(kept_out + samples, kept, mask=ours)
        tl.store(real_logit + samples, _mean(tl.where(valid, r, 0.0), POSITIONS), mask=ours)
        tl.store(fake_logit + samples, _mean(tl.where(valid, f, 0.0), POSITIONS), mask=ours)
        tl.store(
            real_share + samples, _mean(tl.where(valid & (r > 0), 1.0, 0.0), POSITIONS), mask=ours
        )
        tl.store(
            fake_share + samples, _mean(tl.where(valid & (f > 0), 1.0, 0.0), POSITIONS), mask=ours
        )
    m = tl.maximum(tl.sum(count), 1.0)
    half = tl.sum(total) / m / 2
    share = 1 / (2 * POSITIONS * m)

    for start in range(0, GROUP, ROWS):
        samples, ours, at, inside = _rows(first, start, GROUP, POSITIONS, LANES, ROWS)
        r = _logits(real, at, inside)
        f = _logits(fake, at, inside)
        kept = tl.load(known + samples, mask=ours, other=0) & _fine(r, LIMIT) & _fine(f, LIMIT)
        w = tl.where(kept, tl.load(weight + samples, mask=ours, other=0.0), 0.0)
        tl.store(loss + samples, w * half, mask=ours)
        tl.store(weight_out + samples, w, mask=ours)
        valid = kept[:, None]
        tl.store(real_grad + at, tl.where(valid, -share * _sigmoid(-r), 0.0), mask=inside)
        tl.store(fake_grad + at, tl.where(valid, share * _sigmoid(f), 0.0), mask=inside)


@triton.jit
def _adversarial_loss_kernel(
    logits, weight, known, loss, logit, share_out, kept_out, weight_out, grad,
    GROUP: tl.constexpr, POSITIONS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    LIMIT: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * GROUP
    count = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, GROUP, ROWS):
        samples, ours, at, inside = _rows(first, start, GROUP, POSITIONS, LANES, ROWS)
        x = _logits(logits, at, inside)
        kept = tl.load(known + samples, mask=ours, other=0) & _fine(x, LIMIT)
        valid = inside & kept[:, None]
        count += kept.to(tl.float32)
        clamped = tl.minimum(tl.maximum(x, -CLAMP), CLAMP)
        total += _mean(tl.where(valid, _softplus(-clamped), 0.0), POSITIONS)
        tl.store(kept_out + samples, kept, mask=ours)
        tl.store(logit + samples, _mean(tl.where(valid, x, 0.0), POSITIONS), mask=ours)
        tl.store(
            share_out + samples, _mean(tl.where(valid & (x > 0), 1.0, 0.0), POSITIONS), mask=ours
        )
    m = tl.maximum(tl.sum(count), 1.0)
    mean = tl.sum(total) / m
    share = 1 / (POSITIONS * m)

    for start in range(0, GROUP, ROWS):
        samples, ours, at, inside = _rows(first, start, GROUP, POSITIONS, LANES, ROWS)
        x = _logits(logits, at, inside)
        kept = tl.load(known + samples, mask=ours, other=0) & _fine(x, LIMIT)
        w = tl.where(kept, 1 / tl.load(weight + samples, mask=ours, other=1.0), 0.0)
        tl.store(loss + samples, w * mean, mask=ours)
        tl.store(weight_out + samples, w, mask=ours)
        free = kept[:, None] & (tl.abs(x) <= CLAMP)
        tl.store(grad + at, tl.where(free, -share * _sigmoid(-x), 0.0), mask=inside)


def configurations() -> Iterator[tuple]:
    """Yield (label, kernel, signature, constants, warps, stages); see kernels.compile."""
    kept = dict(known="*i1", kept_out="*i1")
    discriminator = dict.fromkeys(
        ("real", "fake", "weight", "loss", "real_logit", "fake_logit", "real_share", "fake_share",
         "weight_out", "real_grad", "fake_grad"), "*fp32",
    )  # fmt: skip
    adversarial = dict.fromkeys(
        ("logits", "weight", "loss", "logit", "share_out", "weight_out", "grad"), "*fp32"
    )
    for group in (32, 64):
        constants = _launch(torch.empty(1, 1, 8, 8), group)
        warps = constants.pop("num_warps")
        for name, kernel, signature, more in (
            ("discriminator", _discriminator_loss_kernel, discriminator, {}),
            ("adversarial", _adversarial_loss_kernel, adversarial, {"CLAMP": CLAMP}),
        ):
            label = f"{name} groups of {group} 8x8"
            yield label, kernel, signature | kept, constants | more, warps, 1
