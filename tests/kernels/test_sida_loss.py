"""Each of SiDA's heads alone against float64 autograd of the formulas (arXiv 2410.14919)."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from sid_fast.kernels import dispatch
from tests.helpers.golden import relative

module = importlib.import_module("sid_fast.kernels.sida_loss")

# Samples, group, height, width of the logits: as published, and odd ones; one group and several.
SHAPES = [(64, 32, 8, 8), (6, 2, 4, 4), (5, 5, 8, 8), (3, 1, 5, 7), (2, 2, 48, 47)]


@pytest.fixture(params=["triton", "eager"])
def backend(request):
    with dispatch.forced(request.param):
        yield request.param


def make(n, height, width, device, seed=0):
    """Real and fake logits on either side of the clamp, weights over three decades, upstream."""
    rng = torch.Generator().manual_seed(seed)
    real, fake = 6 * torch.randn(2, n, 1, height, width, generator=rng)
    edges = torch.tensor([9.9, -9.9, 10.0, -10.0, 10.1, -10.1, 30.0, -30.0])
    for logits in (real, fake):
        logits.flatten()[: len(edges)] = edges
    weight, upstream = torch.randn(2, n, generator=rng).mul(1.5).exp()
    return [t.to(device) for t in (real, fake, weight, upstream)]


def groups_of(kept, group):
    """The indices of each group's valid samples."""
    for start in range(0, len(kept), group):
        yield [i for i in range(start, start + group) if kept[i]]


def discriminator(real, fake, weight, kept, group, upstream):
    """λ_i·(B^r + B^f)/2, and the gradients of Σ upstream·loss, in float64."""
    real, fake = (t.double().requires_grad_(True) for t in (real, fake))
    loss = torch.zeros(len(real), dtype=torch.float64, device=real.device)
    for members in groups_of(kept, group):
        if members:
            mean = F.softplus(-real[members]).mean() + F.softplus(fake[members]).mean()
            loss[members] = weight[members].double() * mean / 2
    if not loss.requires_grad:
        return loss, torch.zeros_like(real), torch.zeros_like(fake)
    grads = torch.autograd.grad(loss, (real, fake), upstream.double())
    return loss.detach(), *grads


def adversarial(logits, weight, kept, group, upstream):
    """B^g/ω_i, and the gradient of Σ upstream·loss, in float64."""
    logits = logits.double().requires_grad_(True)
    loss = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
    for members in groups_of(kept, group):
        if members:
            mean = F.softplus(-logits[members].clamp(-10, 10)).mean()
            loss[members] = mean / weight[members].double()
    if not loss.requires_grad:
        return loss, torch.zeros_like(logits)
    return loss.detach(), *torch.autograd.grad(loss, logits, upstream.double())


def run(function, logits, weight, kept, group, upstream):
    """What a head returns, and its gradients."""
    leaves = [t.detach().clone().requires_grad_(True) for t in logits]
    found = function(*leaves, weight, kept, group)
    return found, torch.autograd.grad(found.loss, leaves, upstream)


def all_kept(n, device):
    return torch.ones(n, dtype=torch.bool, device=device)


@pytest.mark.parametrize("dropped", [[], [1], "all", "first group"])
@pytest.mark.parametrize(("n", "group", "height", "width"), SHAPES)
def test_heads_match_float64(device, backend, n, group, height, width, dropped):
    real, fake, weight, upstream = make(n, height, width, device)
    kept = all_kept(n, device)
    some = {"all": slice(None), "first group": slice(group)}.get(str(dropped), dropped)
    kept[some] = False

    found, grads = run(module.discriminator_loss, (real, fake), weight, kept, group, upstream)
    for a, b in zip(
        (found.loss, *grads), discriminator(real, fake, weight, kept, group, upstream), strict=True
    ):
        assert a.dtype == torch.float32
        assert relative(a, b) <= 1e-5 or not (a.any() or b.any())
    assert torch.equal(found.kept, kept)
    for side, logits in (("real", real), ("fake", fake)):
        logits = torch.where(kept.reshape(-1, 1, 1, 1), logits, 0.0).double()
        mean, share = (getattr(found, f"{side}_{name}") for name in ("logit", "share"))
        assert torch.allclose(mean.double(), logits.mean((1, 2, 3)), atol=1e-5)
        assert torch.allclose(share.double(), (logits > 0).double().mean((1, 2, 3)), atol=1e-6)

    found, grads = run(module.adversarial_loss, (fake,), weight, kept, group, upstream)
    for a, b in zip(
        (found.loss, *grads), adversarial(fake, weight, kept, group, upstream), strict=True
    ):
        assert relative(a, b) <= 1e-5 or not (a.any() or b.any())
    assert torch.equal(found.kept, kept)
    logits = torch.where(kept.reshape(-1, 1, 1, 1), fake, 0.0).double()
    assert torch.allclose(found.logit.double(), logits.mean((1, 2, 3)), atol=1e-5)
    assert torch.allclose(found.share.double(), (logits > 0).double().mean((1, 2, 3)), atol=1e-6)


def test_gradients_by_hand(device, backend):
    """Two groups of two 1x1 logits, one of them dropped; derivatives by hand."""
    at = torch.tensor([9.9, -10.1, 10.1, -9.9], device=device).reshape(4, 1, 1, 1)
    weight = torch.tensor([2.0, 3.0, 5.0, 7.0], device=device)
    kept = torch.tensor([True, True, True, False], device=device)
    up = torch.full([4], 0.25, device=device)  # 1/B
    sigmoid = at.double().sigmoid().flatten().tolist()

    _, (real_grad, fake_grad) = run(module.discriminator_loss, (-at, at), weight, kept, 2, up)
    # Λ = 5 over m = 2, and 5 over 1: sigmoid(ℓ^f)·Λ/(2 m B); ℓ^r = −ℓ^f makes the other its −1.
    wanted = [s * factor / 8 for s, factor in zip(sigmoid, (5 / 2, 5 / 2, 5, 0), strict=True)]
    assert fake_grad.flatten().tolist() == pytest.approx(wanted, rel=1e-5)
    assert real_grad.flatten().tolist() == pytest.approx([-v for v in wanted], rel=1e-5)

    _, (grad,) = run(module.adversarial_loss, (at,), weight, kept, 2, up)
    # −sigmoid(−ℓ)·W/(m B) with W = 1/2 + 1/3 and m = 2; beyond ±10 there is none.
    wanted = [-(1 - sigmoid[0]) * (1 / 2 + 1 / 3) / 8, 0, 0, 0]
    assert grad.flatten().tolist() == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e8])
@pytest.mark.parametrize("side", ["real", "fake"])
def test_a_bad_logit_drops_its_sample_from_its_group(device, backend, side, value):
    real, fake, weight, upstream = make(6, 4, 4, device)
    without = all_kept(6, device)
    without[2] = False
    expected, wanted = run(module.discriminator_loss, (real, fake), weight, without, 3, upstream)
    {"real": real, "fake": fake}[side][2, 0, 3, 3] = value
    kept = all_kept(6, device)
    found, grads = run(module.discriminator_loss, (real, fake), weight, kept, 3, upstream)
    assert all(map(torch.equal, (*found, *grads), (*expected, *wanted)))
    assert found.kept.tolist() == [True, True, False, True, True, True]

    expected, wanted = run(module.adversarial_loss, (make(6, 4, 4, device)[1],), weight, without, 3,
                           upstream)  # fmt: skip
    fake[2, 0, 3, 3] = value
    found, grads = run(module.adversarial_loss, (fake,), weight, kept, 3, upstream)
    assert all(map(torch.equal, (*found, *grads), (*expected, *wanted)))


def test_a_group_is_alone(device, backend):
    """What is in one changes nothing in another, to the bit."""
    real, fake, weight, upstream = make(6, 4, 4, device)
    kept = all_kept(6, device)
    before = run(module.discriminator_loss, (real, fake), weight, kept, 2, upstream)
    real[4:], fake[4:], weight[4:] = 1.0, -1.0, 9.0
    after = run(module.discriminator_loss, (real, fake), weight, kept, 2, upstream)
    for a, b in zip((*before[0], *before[1]), (*after[0], *after[1]), strict=True):
        assert torch.equal(a[:4], b[:4])


def test_groups_divide_the_samples(device):
    real, fake, weight, _ = make(6, 4, 4, device)
    with pytest.raises(ValueError, match="group=4 does not divide 6 samples"):
        module.discriminator_loss(real, fake, weight, all_kept(6, device), 4)
    with pytest.raises(ValueError, match="group=0"):
        module.adversarial_loss(real, weight, all_kept(6, device), 0)


@pytest.mark.parametrize("op", ["sida_discriminator_loss", "sida_adversarial_loss"])
def test_registration_is_sound(device, op):
    """Schema, fake tensors and autograd, by torch's own check."""
    real, fake, weight, _ = make(4, 3, 3, device)
    logits = [t.requires_grad_(True) for t in (real, fake)][: 1 + ("discriminator" in op)]
    arguments = (*logits, weight, all_kept(4, device), 2)
    torch.library.opcheck(getattr(torch.ops.sid_fast, op).default, arguments)


def test_no_element_goes_unwritten(device, poisoned):
    """Outputs come from empty memory, which is NaN here."""
    real, fake, weight, upstream = make(6, 5, 7, device)
    with dispatch.forced("triton"):
        for function, logits in (
            (module.discriminator_loss, (real, fake)),
            (module.adversarial_loss, (fake,)),
        ):
            found, grads = run(function, logits, weight, all_kept(6, device), 3, upstream)
            assert all(torch.isfinite(t).all() for t in (*found, *grads))


def test_floors_are_those_counted_by_hand():
    """Of the discriminator: two logits read and two derivatives written, in 32 bits."""
    assert module.bytes_moved(10, "discriminator") == 10 * 4 * 4
    assert module.bytes_moved(10, "adversarial") == 10 * 2 * 4
