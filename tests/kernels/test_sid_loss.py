"""The losses on raw network outputs against float64 autograd of the papers' equations."""

import importlib

import pytest
import torch

from sid_fast import kernels
from sid_fast.kernels import dispatch
from tests.helpers.golden import relative

module = importlib.import_module("sid_fast.kernels.sid_loss")

# Relative error in norm, by the dtype of the network outputs and their gradients.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 6e-4}
INTERPRETED = {torch.bfloat16: 8e-3}  # Triton's interpreter truncates bfloat16
# [N, C, H, W]: the presets' RGB images and odd sizes; one block and several.
SHAPES = [(2, 3, 32, 32), (3, 3, 8, 8), (1, 1, 5, 7), (2, 4, 25, 27)]
ALPHA, DATA = 1.2, 0.5


@pytest.fixture(params=["triton", "eager"])
def backend(request):
    with dispatch.forced(request.param):
        yield request.param


def tolerance(dtype, backend, device):
    if backend == "triton" and device.type == "cpu":
        return INTERPRETED.get(dtype, TOLERANCE[dtype])
    return TOLERANCE[dtype]


def make(shape, device, dtype=torch.float32, layout="channels_last", seed=0):
    """Draw images, σ, noise and two raw network outputs."""
    rng = torch.Generator().manual_seed(seed)

    def tensor(dtype=torch.float32):
        t = torch.randn(shape, generator=rng).to(device, dtype)
        if layout == "channels_last":
            return t.to(memory_format=torch.channels_last)
        if layout == "strided":
            return torch.cat([t, t.new_full(shape, torch.nan)], dim=3)[..., : shape[3]]
        return t

    sigma = torch.randn(shape[0], generator=rng).exp().to(device)
    y, noise, teacher = tensor(), tensor(), tensor(dtype)
    fake_score = (teacher.float() + 0.3 * tensor()).to(dtype)
    return y, sigma, noise, teacher, fake_score


def formulas(y, sigma, noise, teacher, fake_score):
    """Compute the papers' losses in float64 and their gradients by autograd."""
    y, teacher, fake_score = (t.double().requires_grad_(True) for t in (y, teacher, fake_score))
    s = sigma.double().reshape(-1, 1, 1, 1)
    total = s**2 + DATA**2
    c_skip, c_out = DATA**2 / total, s * DATA / total.sqrt()
    x_t = y + s * noise.double()
    r, f = c_skip * x_t + c_out * teacher, c_skip * x_t + c_out * fake_score
    d = r - f
    w = (y - r).detach().abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-5)
    loss = (d * ((r - y) - ALPHA * d) / w).sum((1, 2, 3))
    upstream = torch.arange(1, len(y) + 1, device=y.device).double()
    grads = torch.autograd.grad(loss, (teacher, fake_score, y), upstream)
    weight = total / (s * DATA) ** 2
    e = c_skip * x_t.detach() + c_out * fake_score - y.detach()
    fake = (weight * e**2).sum((1, 2, 3))
    (fake_grad,) = torch.autograd.grad(fake, fake_score, upstream)
    return {
        "x_t": x_t.detach(),
        "network_input": x_t / total.sqrt(),
        "loss": loss,
        "distance": d.square().sum((1, 2, 3)),
        "weight": w.flatten(),
        "grads": grads,
        "fake_loss": fake,
        "fake_distance": e.square().sum((1, 2, 3)),
        "fake_weight": weight.flatten(),
        "fake_grad": fake_grad,
    }


def run(y, sigma, noise, teacher, fake_score, valid=None):
    """Compute the same with sid_fast.kernels."""
    y, teacher, fake_score = (
        t.detach().clone().requires_grad_(True) for t in (y, teacher, fake_score)
    )
    noised = kernels.noised(y, sigma, noise, valid, dtype=teacher.dtype)
    losses = kernels.generator_loss(teacher, fake_score, noised, y, ALPHA)
    upstream = torch.arange(1, len(y) + 1, device=y.device).float()
    grads = torch.autograd.grad(losses.loss, (teacher, fake_score, y), upstream)
    fake = kernels.fake_score_loss(fake_score, noised, y)
    (fake_grad,) = torch.autograd.grad(fake.loss, fake_score, upstream)
    return noised, losses, grads, fake, fake_grad


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(dtype, "channels_last") for dtype in TOLERANCE]
    + [(torch.bfloat16, "contiguous"), (torch.float32, "strided")],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_losses_and_gradients_match_float64(device, backend, dtype, shape, layout):
    arguments = make(shape, device, dtype, layout)
    noised, losses, grads, fake, fake_grad = run(*arguments)
    wanted = formulas(*arguments)
    exact, rough = TOLERANCE[torch.float32], tolerance(dtype, backend, device)
    assert relative(noised.x_t, wanted["x_t"]) <= exact
    assert noised.network_input.dtype == dtype
    assert relative(noised.network_input, wanted["network_input"]) <= rough
    assert relative(noised.c_noise, arguments[1].double().log() / 4) <= exact
    for name in ("loss", "distance", "weight"):
        assert relative(getattr(losses, name), wanted[name].detach()) <= exact, name
        assert relative(getattr(fake, name), wanted[f"fake_{name}"]) <= exact, name
        assert getattr(losses, name).dtype == torch.float32
    assert noised.valid.all()
    assert losses.kept.all()
    assert fake.kept.all()
    for grad, expected, to in zip(grads, wanted["grads"], ("F_φ", "F_ψ", "y"), strict=True):
        assert relative(grad, expected) <= (exact if to == "y" else rough), to
    assert grads[0].dtype == grads[1].dtype == dtype
    assert relative(fake_grad, wanted["fake_grad"]) <= rough
    if layout == "channels_last":
        for t in (noised.x_t, noised.network_input, *grads, fake_grad):
            assert t.is_contiguous(memory_format=torch.channels_last)


def test_the_gradient_returns_through_the_networks(device, backend):
    """A generator step through two networks matches autograd of the whole equation."""
    y, sigma, noise, *_ = make((3, 3, 8, 8), device)

    def raw(gain):
        return lambda x: torch.sin(gain * x) + x.roll(1, 3)

    def denoiser(network):
        def run(x, sigma):
            total = sigma**2 + DATA**2
            return x * DATA**2 / total + sigma * DATA / total.sqrt() * network(x / total.sqrt())

        return run

    teacher, fake_score = raw(1.0), raw(1.3)
    a = y.clone().requires_grad_(True)
    noised = kernels.noised(a, sigma, noise)
    outputs = teacher(noised.network_input), fake_score(noised.network_input)
    losses = kernels.generator_loss(*outputs, noised, a, ALPHA).loss
    losses.sum().backward()
    b = y.clone().requires_grad_(True)
    x_t, level = b + sigma.reshape(-1, 1, 1, 1) * noise, sigma.reshape(-1, 1, 1, 1)
    r, f = denoiser(teacher)(x_t, level), denoiser(fake_score)(x_t, level)
    w = (b - r).detach().abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-5)
    wanted = ((r - f) * ((r - b) - ALPHA * (r - f)) / w).sum((1, 2, 3))
    wanted.sum().backward()
    assert relative(losses, wanted) <= 1e-5
    assert relative(a.grad, b.grad) <= 1e-5


@pytest.mark.parametrize("value", [torch.nan, -torch.inf, 1e8])
@pytest.mark.parametrize("spoil", ["y", "sigma", "noise", "teacher", "fake_score", "valid"])
@pytest.mark.parametrize("shape", [(3, 3, 8, 8), (3, 4, 25, 27)])
def test_a_dropped_sample_leaves_the_others_bit_identical(device, backend, shape, spoil, value):
    arguments = make(shape, device)
    clean = run(*arguments)
    valid = torch.ones(3, dtype=torch.bool, device=device)
    if spoil == "valid":
        valid[1] = False
    else:
        i = ("y", "sigma", "noise", "teacher", "fake_score").index(spoil)
        at = 0 if value == -torch.inf else -1  # in the first block or the last
        arguments[i][(1, *[at] * (arguments[i].dim() - 1))] = value
    noised, losses, grads, fake, fake_grad = spoiled = run(*arguments, valid)

    others = torch.tensor([0, 2], device=device)
    for a, b in zip(flattened(clean), flattened(spoiled), strict=True):
        assert torch.equal(a[others], b[others])
    assert float(losses.loss[1]) == 0 == float(losses.distance[1])
    assert losses.kept.tolist() == [True, False, True]
    assert not any(g[1].any() for g in grads)  # any() is True for NaN
    if spoil in ("y", "sigma", "noise", "valid"):
        assert noised.valid.tolist() == [True, False, True]
        assert not noised.network_input[1].any()
        assert not noised.x_t[1].any()
        assert float(noised.sigma[1]) == 1
    if spoil != "teacher":
        assert fake.kept.tolist() == [True, False, True]
        assert float(fake.loss[1]) == 0
        assert not fake_grad[1].any()


@pytest.mark.parametrize("spoil", ["teacher", "fake_score"])
def test_a_float16_overflow_drops_its_sample_only(device, backend, spoil):
    arguments = make((3, 3, 8, 8), device, torch.float16)
    clean = run(*arguments)
    arguments[3 + (spoil == "fake_score")][1, 0, 0, 0] = 1e5  # inf in float16
    noised, losses, grads, fake, fake_grad = spoiled = run(*arguments)
    for a, b in zip(flattened(clean), flattened(spoiled), strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])
    assert noised.valid.all()
    assert losses.kept.tolist() == [True, False, True]
    assert not any(g[1].any() for g in grads)
    assert fake.kept.tolist() == [True, spoil == "teacher", True]
    assert bool(fake_grad[1].any()) == (spoil == "teacher")


def test_values_are_dropped_exactly_beyond_the_limit(device, backend):
    """Test the adjacent values on both sides of it, for every input and a denoised image."""
    limit, least = (torch.tensor(v, device=device) for v in (1e6, 1e-6))
    zero = torch.zeros_like(limit)
    beyond, below = limit.nextafter(2 * limit), least.nextafter(zero)
    inputs = [zero, limit, beyond, -limit, -beyond]
    sigmas = [limit, beyond, least, below, zero, -limit, limit * torch.nan]
    n = 2 * len(inputs) + len(sigmas)
    images, noise = (torch.zeros(n, 2, 3, 3, device=device) for _ in range(2))
    sigma = torch.ones(n, device=device)
    images[: len(inputs), 1, 2, 2] = torch.stack(inputs)
    noise[len(inputs) : 2 * len(inputs), 0, 1, 0] = torch.stack(inputs)
    sigma[2 * len(inputs) :] = torch.stack(sigmas)
    wanted = [True, True, False, True, False] * 2 + [True, False, True, *[False] * 4]
    noised = kernels.noised(images, sigma, noise)
    assert noised.valid.tolist() == wanted

    # x_t = 0, so r = c_out·F. At σ = 1, c_out = √0.2: r is 0.97 of the limit, then 1.03.
    zeros = torch.zeros(4, 2, 3, 3, device=device)
    raw = zeros.clone()
    raw[1, 0, 0, 0], raw[2, 1, 2, 2], raw[3, 1, 2, 2] = 2.17e6, 2.3e6, -2.3e6
    noised = kernels.noised(zeros, torch.ones(4, device=device), zeros)
    wanted = [True, True, False, False]
    assert kernels.generator_loss(raw, zeros, noised, zeros, ALPHA).kept.tolist() == wanted
    assert kernels.generator_loss(zeros, raw, noised, zeros, ALPHA).kept.tolist() == wanted
    assert kernels.fake_score_loss(raw, noised, zeros).kept.tolist() == wanted


def test_an_overflow_inside_a_network_zeroes_the_images_gradient(device, backend):
    """The exp of a finite input is infinite, so its backward pass gives 0·inf = NaN."""
    y, sigma, noise, *_ = make((3, 3, 8, 8), device)

    def gradient(y):
        y = y.clone().requires_grad_(True)
        noised = kernels.noised(y, sigma, noise)
        raw = [v * noised.network_input + 1e-3 * noised.network_input.exp() for v in (1.0, 1.3)]
        losses = kernels.generator_loss(*raw, noised, y, ALPHA)
        losses.loss.sum().backward()
        return y.grad, noised.valid, losses.kept

    clean, *_ = gradient(y)
    y[1, 0, 0, 0] = 1e5
    grad, before, after = gradient(y)
    assert before.all()
    assert after.tolist() == [True, False, True]
    assert torch.equal(grad[[0, 2]], clean[[0, 2]])
    assert not grad[1].any()


def flattened(results):
    for result in results:
        if isinstance(result, tuple):
            yield from flattened(result)
        else:
            yield result


def test_w_is_at_least_1e_5(device, backend):
    """With r = y = 0, mean|y − r| is 0."""
    zero = torch.zeros(2, 3, 8, 8, device=device)
    noised = kernels.noised(zero, torch.ones(2, device=device), zero)
    losses = kernels.generator_loss(zero, zero + 1e-3, noised, zero, ALPHA)
    assert torch.allclose(losses.weight, torch.full_like(losses.weight, 1e-5))
    assert torch.isfinite(losses.loss).all()
    assert losses.loss.all()


def test_the_kernels_write_every_element(device):
    """Outputs are allocated by torch.empty; fill that memory with NaN first."""
    arguments = make((2, 4, 25, 27), device)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with dispatch.forced("triton"):
            for t in flattened(run(*arguments)):
                assert torch.isfinite(t).all()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def test_traced_without_a_break(device):
    arguments = make((2, 3, 8, 8), device)
    valid = torch.ones(2, dtype=torch.bool, device=device)

    def step(y, sigma, noise, teacher, fake_score, valid):
        noised = kernels.noised(y, sigma, noise, valid)
        generator = kernels.generator_loss(teacher, fake_score, noised, y, ALPHA).loss
        return generator + kernels.fake_score_loss(fake_score, noised, y).loss

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_(i in (0, 3, 4)) for i, t in enumerate(arguments)]
        loss = function(*leaves, valid)
        loss.sum().backward()
        results.append([loss, *(leaves[i].grad for i in (0, 3, 4))])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("op", ["noised", "generator_loss", "fake_score_loss"])
def test_registration_is_sound(device, op):
    """Schema, fake tensors and autograd pass torch's opcheck."""
    y, sigma, noise, teacher, fake_score = (
        t.to(memory_format=torch.channels_last) if t.dim() == 4 else t
        for t in make((2, 3, 8, 8), device)
    )
    valid = torch.ones(2, dtype=torch.bool, device=device)
    leaves = [t.clone().requires_grad_(True) for t in (teacher, fake_score, y)]
    arguments = {
        "noised": (leaves[2], sigma, noise, valid, torch.float32, DATA),
        "generator_loss": (*leaves[:2], noise, leaves[2], sigma, valid, ALPHA, DATA),
        "fake_score_loss": (leaves[1], noise, y, sigma, valid, DATA),
    }[op]
    torch.library.opcheck(getattr(torch.ops.sid_fast, op).default, arguments)


def test_bytes_and_flop_equal_a_count_by_hand():
    """Per element: F_φ, F_ψ and their gradients in 16 bit; x_t, y and the gradient of y in 32."""
    assert module.bytes_moved(10, "generator_loss", 2) == 10 * (4 * 2 + 3 * 4)
    # First pass: 7 for r, f, e and d, 5 for their three sums. Second: 7 again, 2 divisions by w,
    # 3 + 3 + 1 for the gradients.
    assert module.flop(10, "generator_loss") == 10 * (7 + 5 + 7 + 2 + 7)
