"""Attention against float64: dtypes, upstream's and awkward shapes, both layouts."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sid_fast import kernels
from sid_fast.kernels.attention import (
    attention_eager,
    attention_explicit,
    blocked_order,
    bytes_moved,
    flop,
)
from sid_fast.kernels.dispatch import forced
from tests.helpers.golden import relative

module = importlib.import_module("sid_fast.kernels.attention")

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
BIASED = TOLERANCE | {torch.bfloat16: 1.5e-2}  # eager in bfloat16 is off by 1e-2

# images, heads, channels per head, height, width
SHAPES = [
    (1, 1, 256, 16, 16),  # DDPM++
    (2, 1, 256, 8, 8),
    pytest.param((1, 6, 64, 32, 32), marks=pytest.mark.gpu),  # ADM; minutes in the interpreter
    (1, 1, 64, 16, 16),
    (2, 12, 64, 8, 8),
    (2, 2, 32, 9, 9),
    (1, 1, 128, 13, 11),
    (1, 1, 192, 7, 7),  # head size not a power of two
    (3, 2, 12, 5, 3),
    (2, 1, 64, 1, 3),
]


def tensors(shape, dtype, device):
    """Draw qkv and the gradient of the output, channels-last."""
    images, heads, size, height, width = shape
    torch.manual_seed(0)
    qkv = torch.randn(images, 3 * heads * size, height, width, dtype=dtype, device=device)
    grad = torch.randn(images, heads * size, height, width, dtype=dtype, device=device)
    return (t.contiguous(memory_format=torch.channels_last) for t in (qkv, grad))


def differentiate(function, qkv, grad, *arguments, bias=None):
    """Return the output, the gradient of qkv and, with a bias, its gradient."""
    qkv = qkv.detach().requires_grad_()
    if bias is None:
        out = function(qkv, *arguments)
        return out.detach(), torch.autograd.grad(out, qkv, grad)[0]
    bias = bias.detach().requires_grad_()
    out = function(qkv, *arguments, bias)
    return out.detach(), *torch.autograd.grad(out, (qkv, bias), grad)


def random_bias(qkv):
    """Draw a bias in float32, the dtype of the parameters."""
    rng = torch.Generator().manual_seed(1)
    return torch.randn(qkv.shape[1], generator=rng).to(qkv.device)


def parts(qkv, heads):
    """Return q, k and v, each [N, heads, pixels, channels]."""
    three = qkv.unflatten(1, (3, heads, -1)).unbind(1)
    return [t.flatten(3).transpose(2, 3) for t in three]


def check(qkv, grad, heads, bias=None, tolerance=None):
    tolerance = tolerance or (TOLERANCE if bias is None else BIASED)[qkv.dtype]
    with forced("triton"):
        out, grad_qkv, *grad_bias = differentiate(kernels.attention, qkv, grad, heads, bias=bias)
    assert out.dtype == grad_qkv.dtype == qkv.dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    exact = None if bias is None else bias.double()
    expected = differentiate(attention_eager, qkv.double(), grad.double(), heads, bias=exact)
    assert relative(out, expected[0]) <= tolerance
    grads, wanted = (parts(g, heads) for g in (grad_qkv, expected[1]))
    for name, a, b in zip("qkv", grads, wanted, strict=True):
        assert relative(a, b) <= tolerance, f"gradient of {name}"
    if bias is not None:
        assert grad_bias[0].dtype == bias.dtype
        grads, wanted = grad_bias[0].chunk(3), expected[2].chunk(3)
        for name, a, b in zip("qv", grads[::2], wanted[::2], strict=True):
            assert relative(a, b) <= tolerance, f"gradient of {name}'s bias"
        assert not grads[1].any()


def test_eager_equals_scaled_dot_product_attention():
    qkv, _ = tensors((2, 3, 8, 4, 5), torch.float64, "cpu")
    q, k, v = parts(qkv, 3)
    expected = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(2, 24, 4, 5)
    assert relative(attention_eager(qkv, 3), expected) < 1e-12


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_eager_is_its_formula_without_the_matrix(dtype, channels_last):
    """Both layouts; PyTorch's fused kernels keep no [pixels, pixels] weights."""
    qkv, grad = tensors((2, 3, 8, 4, 5), dtype, "cpu")
    if channels_last:
        qkv, grad = (t.to(memory_format=torch.channels_last) for t in (qkv, grad))
    bias = random_bias(qkv)
    found = differentiate(attention_eager, qkv, grad, 3, bias=bias)
    wanted = differentiate(attention_explicit, qkv.double(), grad.double(), 3, bias=bias.double())
    for a, b in zip(found, wanted, strict=True):
        assert relative(a, b) <= BIASED[dtype]
    with Shapes() as seen:
        attention_eager(qkv, 3)
    assert not any(shape[-2:] == (20, 20) for shape in seen.shapes)


class Shapes(TorchDispatchMode):
    """Notes the shape of every tensor made."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.shapes += [tuple(t.shape) for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        return out


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtype, device, poisoned):
    check(*tensors(shape, dtype, device), heads=shape[1])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 1, 256, 8, 8),
        pytest.param((1, 6, 64, 32, 32), marks=pytest.mark.gpu),
        (1, 2, 64, 12, 12),  # more than one block of pixels
        (2, 2, 32, 9, 9),
        (3, 2, 12, 5, 3),
    ],
    ids=str,
)
def test_bias_matches_float64(shape, dtype, device, poisoned):
    qkv, grad = tensors(shape, dtype, device)
    check(qkv, grad, shape[1], random_bias(qkv))


@pytest.mark.parametrize("arch", module.TILES_BY_ARCH)
@pytest.mark.parametrize("shape", [(1, 1, 256, 16, 16), (1, 1, 64, 16, 16)], ids=str)
def test_tiles_of_an_architecture_match_float64(shape, arch, device, monkeypatch):
    monkeypatch.setattr(module, "_arch", lambda device: arch)
    qkv, grad = tensors(shape, torch.float16, device)
    check(qkv, grad, shape[1], random_bias(qkv))


def test_tiles_by_architecture():
    """Unpadded 16-bit heads use an architecture's own tiles; all others use TILES."""

    def tile(size, itemsize, arch, pixels=1024):
        constants, warps, stages = module._configuration(
            "backward_kv", pixels, 1, size, itemsize, arch
        )
        return constants["BLOCK"], constants["STEP"], warps, stages

    assert tile(64, 2, 90) == module.TILES_BY_ARCH[90]["backward_kv"][64]
    assert tile(64, 2, 90, pixels=64) == (64, 32, 4, 2)
    safe = module.TILES[2]["backward_kv"]
    assert tile(64, 2, 80) == tile(64, 2, 0) == tile(64, 2, 120) == safe[64]
    assert tile(256, 2, 90) == safe[256]
    assert tile(60, 2, 90) == (32, 32, 4, 2)
    assert tile(64, 4, 90) == module.TILES[4]["backward_kv"][64]


def test_eager_adds_the_bias_to_qkv():
    qkv, _ = tensors((2, 3, 8, 4, 5), torch.float64, "cpu")
    bias = random_bias(qkv)
    expected = attention_eager(qkv + bias.double()[:, None, None], 3)
    assert torch.equal(attention_eager(qkv, 3, bias), expected)


def test_a_frozen_bias_takes_no_extra_operations(device):
    qkv, grad = tensors((2, 2, 16, 5, 5), torch.float32, device)
    bias = random_bias(qkv)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append((str(op), args[-1] if args else None))
            return op(*args, **kwargs or {})

    with forced("triton"):
        wanted = differentiate(kernels.attention, qkv, grad, 2, bias=bias)[1]
        with Watch():
            grad_qkv = differentiate(lambda x: kernels.attention(x, 2, bias), qkv, grad)[1]
    assert torch.equal(grad_qkv, wanted)
    # The forward and the backward operator are the only calls: nothing is copied.
    seen = [(op, last) for op, last in seen if "detach" not in op]
    assert [op for op, _ in seen] == [
        "sid_fast.attention.default",
        "sid_fast.attention_backward.default",
    ]
    assert seen[1][1] is False
    assert grad_qkv.is_contiguous(memory_format=torch.channels_last)


def test_any_strides(device):
    qkv, grad = tensors((2, 2, 16, 4, 4), torch.float32, device)
    check(qkv.contiguous(), grad.contiguous(), 2)
    check(qkv.repeat(1, 1, 1, 2)[..., ::2], grad.mT, 2)
    check(qkv, grad[:1, :1, :1, :1].expand_as(grad), 2)


def test_blocked_order_permutes_an_upstream_weight():
    """Upstream's order is [head, channel, {q, k, v}]."""
    qkv, _ = tensors((1, 2, 32, 3, 3), torch.float32, "cpu")
    order = blocked_order(64, 2)
    q, k, v = (t.flatten(3).mT for t in qkv.unflatten(1, (2, 32, 3)).unbind(3))
    expected = F.scaled_dot_product_attention(q, k, v).mT.reshape(1, 64, 3, 3)
    assert relative(attention_eager(qkv[:, order], 2), expected) < 1e-5
    assert torch.equal(order[order.argsort()], torch.arange(192))


@pytest.mark.parametrize("logit", [-400.0, 400.0])
def test_large_logits_neither_overflow_nor_vanish(logit, device):
    """All logits are close to `logit`, whose exp is no float32. 81 pixels end within a block."""
    qkv, grad = tensors((1, 1, 64, 9, 9), torch.float32, device)
    qkv = qkv * 0.1
    qkv[:, :64] += 7.0
    qkv[:, 64:128] += logit * 8 / 64 / 7.0
    with forced("triton"):
        out, grad_qkv = differentiate(kernels.attention, qkv, grad, 1)
    expected = differentiate(attention_eager, qkv.double(), grad.double(), 1)
    assert relative(out, expected[0]) <= 1e-4  # logits of 400 carry an error of 400 · 2⁻²⁴ each
    assert relative(grad_qkv, expected[1]) <= 1e-4


@pytest.mark.parametrize("logit", [-400.0, 400.0])
def test_logits_made_large_by_the_bias(logit, device):
    """The bias is not added to padding beyond the 81 pixels, where exp of it would be infinite."""
    qkv, grad = tensors((1, 1, 64, 9, 9), torch.float32, device)
    qkv = qkv * 0.1
    qkv[:, 64:128] += 7.0
    bias = torch.zeros(192, device=device)
    bias[:64] = logit * 8 / 64 / 7.0
    check(qkv, grad, 1, bias, tolerance=1e-4)


def test_a_nan_stays_in_its_image(device):
    qkv, grad = tensors((3, 2, 32, 5, 5), torch.float32, device)
    spoilt = qkv.clone()
    spoilt[1, 70, 2, 3] = torch.nan
    with forced("triton"):
        expected = differentiate(kernels.attention, qkv, grad, 2)
        results = differentiate(kernels.attention, spoilt, grad, 2)
    for a, b in zip(results, expected, strict=True):
        assert a[1].isnan().any()
        assert torch.equal(a[[0, 2]], b[[0, 2]])


def test_gradients_are_deterministic(device):
    qkv, grad = tensors((1, 2, 64, 9, 9), torch.bfloat16, device)
    with forced("triton"):
        first, second = (differentiate(kernels.attention, qkv, grad, 2)[1] for _ in range(2))
    assert torch.equal(first, second)


def test_heads_too_large_for_the_kernel_run_eager(device):
    qkv, _ = tensors((1, 1, 320, 2, 2), torch.float32, device)
    with forced("triton"):
        assert torch.equal(kernels.attention(qkv, 1), attention_eager(qkv, 1))


def test_heads_must_divide():
    with pytest.raises(ValueError, match="96 channels of qkv: must be a multiple of 3·heads=15"):
        kernels.attention(torch.zeros(1, 96, 2, 2), 5)


def test_a_bias_must_fit():
    with pytest.raises(ValueError, match=r"bias is \(32,\): must be \(96,\)"):
        kernels.attention(torch.zeros(1, 96, 2, 2), 2, torch.zeros(32))


@pytest.mark.parametrize("biased", [True, False])
def test_operators_are_registered_soundly(device, biased):
    """Schema, fake tensors and autograd pass torch's opcheck, also for NCHW input."""
    qkv, grad = tensors((1, 1, 16, 2, 3), torch.float32, device)
    qkv = qkv.contiguous()
    forward, backward = torch.ops.sid_fast.attention, torch.ops.sid_fast.attention_backward
    bias = random_bias(qkv) if biased else None
    results = forward(qkv, 1, bias)
    torch.library.opcheck(backward.default, (grad, qkv, bias, *results, 1, biased))
    bias = bias if bias is None else bias.requires_grad_()
    torch.library.opcheck(forward.default, (qkv.requires_grad_(), 1, bias))


@pytest.mark.parametrize("biased", [True, False])
def test_compiles_without_a_graph_break(device, biased):
    qkv, grad = tensors((1, 2, 16, 3, 3), torch.float32, device)
    bias = random_bias(qkv) if biased else None

    def block(x, *bias):
        return kernels.attention(x * 2, 2, *bias) + 1

    with forced("triton"):
        expected = differentiate(block, qkv, grad, bias=bias)
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        results = differentiate(compiled, qkv, grad, bias=bias)
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b)


def test_bytes_and_flop_equal_a_count_by_hand():
    """A DDPM++ head at 16×16: 256 pixels of 256 channels, q, k, v and out in bfloat16."""
    assert bytes_moved(1, 1, 256, 256, itemsize=2) == 4 * 131_072 + 1024
    assert bytes_moved(1, 1, 256, 256, itemsize=2, backward=True) == 8 * 131_072 + 1024
    assert flop(1, 1, 256, 256) == 2 * 33_554_432  # two products of 256³ multiply-adds
    assert flop(3, 2, 256, 256, backward=True) == 6 * 5 * 33_554_432
