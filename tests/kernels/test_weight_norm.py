"""Weight normalisation and its gradient: every backend against float64."""

import importlib

import pytest
import torch

from sid_fast import kernels
from sid_fast.kernels import dispatch
from tests.helpers.golden import relative

module = importlib.import_module("sid_fast.kernels.weight_norm")

EPS = 1e-4
# Convolutions and linear layers of EDM2: the first (45 elements a row), in XS and in M, the
# embedding of labels, the log-variance head; then rows of 1 element, tensors of 1 row, lengths
# beside the tiles' and rows of several chunks, aligned and not.
SHAPES = [
    (6, 5, 3, 3), (3, 128, 3, 3), (2, 1792, 3, 3), (10, 256, 1, 1), (2, 512), (3, 1000), (1, 128),
    (3, 1, 1, 1), (2, 1), (1, 1), (1, 1025), (2, 4104), (3, 2056), (9, 520),
]  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.fixture(params=["triton", "eager"])
def backend(request):
    with dispatch.forced(request.param):
        yield request.param


def make(device, shapes=SHAPES, channels_last=False, seed=0):
    """Draw tensors whose rows differ in magnitude, from far below ε to far above 1."""
    rng = torch.Generator().manual_seed(seed)
    out = []
    for i, shape in enumerate(shapes):
        t = torch.randn(shape, generator=rng) * 10.0 ** (i % 7 - 5)
        if channels_last and t.dim() == 4:
            t = t.to(memory_format=torch.channels_last)
        out.append(t.to(device))
    return out


def copies_like(weights, dtype):
    """Return tensors to write; in a 16-bit dtype every fifth is float32."""
    return [
        torch.full_like(w, torch.nan, dtype=torch.float32 if i % 5 == 4 else dtype)
        for i, w in enumerate(weights)
    ]


def unit(w):
    """w/(ε + rms) by row, in float64."""
    w = w.double()
    rows = w.reshape(len(w), -1)
    rms = rows.square().mean(1).sqrt()
    return (rows / (EPS + rms)[:, None]).reshape(w.shape)


def normalized(w):
    return unit(w) / w[0].numel() ** 0.5


def yes(device):
    return torch.ones((), dtype=torch.bool, device=device)


def check(copies, weights, tolerances=ROUNDING):
    for copy, w in zip(copies, weights, strict=True):
        assert relative(copy.double(), normalized(w)) <= tolerances[copy.dtype], w.shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_copies_match_float64(device, backend, channels_last, dtype):
    weights = make(device, channels_last=channels_last)
    before, copies = [w.clone() for w in weights], copies_like(weights, dtype)
    kernels.weight_norm(weights, copies)
    check(copies, before)
    assert all(map(torch.equal, weights, before))


@pytest.mark.parametrize("dtype", DTYPES)
def test_forced_normalisation_matches_float64(device, backend, dtype):
    """The copies are those of the new weights, to the bit: resuming rebuilds them from these."""
    weights = make(device, channels_last=True)
    before, copies = [w.clone() for w in weights], copies_like(weights, dtype)
    kernels.weight_norm(weights, copies, yes(device))
    for w, old in zip(weights, before, strict=True):
        assert relative(w.double(), unit(old)) <= 1e-6, w.shape
    check(copies, weights)
    again = copies_like(weights, dtype)
    kernels.weight_norm(weights, again)
    assert all(map(torch.equal, copies, again))


def test_weights_are_forced_without_copies(device, backend):
    weights, twins = make(device), make(device)
    kernels.weight_norm(weights, [], yes(device))
    kernels.weight_norm(twins, copies_like(twins, torch.float32), yes(device))
    assert all(map(torch.equal, weights, twins))
    assert relative(weights[1].double(), unit(make(device)[1])) <= 1e-6


def test_a_disabled_force_changes_no_weight(device, backend):
    weights = make(device)
    weights[1].view(-1)[3], weights[1].view(-1)[4] = torch.nan, -0.0
    before, copies = [w.clone() for w in weights], copies_like(weights, torch.float16)
    kernels.weight_norm(weights, copies, ~yes(device))
    for w, old in zip(weights, before, strict=True):
        assert torch.equal(w.view(torch.int32), old.view(torch.int32))
    expected = copies_like(weights, torch.float16)
    kernels.weight_norm(weights, expected)
    for copy, other in zip(copies, expected, strict=True):
        assert torch.equal(copy.nan_to_num(7), other.nan_to_num(7))


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_match_float64(device, backend, channels_last):
    """By autograd of the definition, ε included."""
    weights = make(device, channels_last=channels_last)
    grads = make(device, channels_last=channels_last, seed=1)
    expected = []
    for w, grad in zip(weights, grads, strict=True):
        wide = w.double().requires_grad_()
        expected.append(torch.autograd.grad(normalized(wide), wide, grad.double())[0])
    before = [w.clone() for w in weights]
    kernels.weight_norm_backward(weights, grads)
    for grad, value, w in zip(grads, expected, weights, strict=True):
        if w[0].numel() > 1:
            assert relative(grad.double(), value) <= 2e-6, w.shape
        else:  # the gradient and its projection cancel but for ε/(ε + |w|)
            assert torch.allclose(grad.double(), value, rtol=2e-3, atol=1e-7 / EPS), w.shape
    assert all(map(torch.equal, weights, before))


def test_gradients_vanish_along_the_weights_but_for_epsilon(device, backend):
    """The copies hardly depend on the magnitude of the weights."""
    weights = [torch.randn(2, n, device=device) for n in (36, 512, 4608)]
    grads = [w.clone() for w in weights]
    kernels.weight_norm_backward(weights, grads)
    for w, grad in zip(weights, grads, strict=True):
        rms = w.square().mean(1, keepdim=True).sqrt()
        wanted = w * EPS / (EPS + rms) ** 2 / w[0].numel() ** 0.5
        assert torch.allclose(grad, wanted, rtol=2e-2), w.shape


def test_rows_of_zeros(device, backend):
    weights, grads = [torch.zeros(2, 64, device=device)], [torch.ones(2, 64, device=device)]
    copies = copies_like(weights, torch.float32)
    kernels.weight_norm(weights, copies, yes(device))
    assert not copies[0].any()
    assert not weights[0].any()
    kernels.weight_norm_backward(weights, grads)
    assert torch.allclose(grads[0], torch.full_like(grads[0], 1 / (EPS * 8)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_stays_in_its_row(device, backend, value):
    """Rows share a tile: the others are as without it."""
    shapes = [(11, 64), (3, 1032), (2, 4104), (3, 45)]
    for spoiled in ("weights", "grads"):
        weights, grads = make(device, shapes), make(device, shapes, seed=1)
        clean = [w.clone() for w in weights], [g.clone() for g in grads]
        for t in weights if spoiled == "weights" else grads:
            t[1, -1] = value
        outcomes = []
        for w, g in ((weights, grads), clean):
            copies = copies_like(w, torch.float16)
            kernels.weight_norm_backward(w, g)
            kernels.weight_norm(w, copies, yes(device))
            outcomes.append([*copies, *w, *g])
        for found, wanted in zip(*outcomes, strict=True):
            assert not (found[1] == wanted[1]).all() or spoiled == "grads"
            rest = [0, *range(2, len(found))]
            assert torch.equal(found[rest], wanted[rest])
        for g in grads:
            assert not g[1].isfinite().all()
            assert g[1].isnan().all() or value == torch.inf


def test_views_at_any_address(device, backend):
    """Views into flat buffers, as gradients are; the elements around them stay."""
    buffers = [torch.full((2 * 520 + 8,), 7.0, device=device) for _ in range(3)]
    weights, copies, grads = (
        [b[i : i + 1040].view(2, 520)] for i, b in enumerate(buffers, start=1)
    )
    weights[0].copy_(make(device, [(2, 520)])[0])
    before = weights[0].clone()
    kernels.weight_norm(weights, copies)
    check(copies, [before])
    kernels.weight_norm_backward(weights, grads)
    for buffer, i in zip(buffers, (1, 2, 3), strict=True):
        assert (buffer[:i] == 7).all()
        assert (buffer[i + 1040 :] == 7).all()


def test_unsupported_tensors_are_refused(device):
    (conv,) = make(device, [(8, 6, 3, 3)])
    mixed = [conv, conv], [conv.half(), conv.bfloat16()]
    last = [conv], [conv.to(memory_format=torch.channels_last)]
    gaps = [conv[:, ::2]], [conv[:, ::2].clone()]
    transposed = [conv.transpose(0, 1)], [torch.empty_like(conv.transpose(0, 1))]
    wide = [conv], [conv.double()]
    half = [conv.half()], [conv.half()]
    with dispatch.forced("triton"):
        for lists in (mixed, last, gaps, transposed, wide, half):
            with pytest.raises(ValueError, match="weight_norm"):
                kernels.weight_norm(*lists)


def test_the_pointer_table_is_cached_per_tensors(device):
    with dispatch.forced("triton"):
        weights, grads = make(device, SHAPES[:4]), make(device, SHAPES[:4], seed=1)
        copies, count = copies_like(weights, torch.float16), len(module._tables)
        for _ in range(2):
            kernels.weight_norm(weights, copies)
            kernels.weight_norm_backward(weights, grads)
        assert len(module._tables) == count + 2
