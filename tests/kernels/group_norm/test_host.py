"""The C++ group norm of a CPU against float64, its determinism, and what it leaves to eager."""

import pytest
import torch

from sid_fast.kernels import _cuda
from sid_fast.kernels.dispatch import choose, forced
from sid_fast.kernels.group_norm import group_norm, group_norm_eager, host
from tests.helpers.group_norm import EPS, SHAPES, draw, relative, run

CPU = torch.device("cpu")
FUSIONS = {
    "silu": {},
    "plain": {"silu": False},
    "add": {"add": True},
    "scale_shift": {"scale_shift": True},
    "add-scale_shift": {"add": True, "scale_shift": True},
}
# Norms that fall back to eager: options of draw, or of group_norm.
UNFUSED = {
    "skip": {"skip": 7},
    "residual": {"residual": True},
    "x_bias": {"x_bias": True},
    "x_scale": {"x_scale": 0.5},
    "dropout": {"dropout": 0.5, "seed": torch.tensor([3, 4, 0])},
    "down": {"resample": "down"},
    "up": {"resample": "up"},
}


@pytest.fixture(autouse=True)
def built(library, monkeypatch):
    monkeypatch.setattr(_cuda, "library", lambda: library)
    with forced({"group_norm": "cuda"}):
        yield


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def draw_contiguous(shape, groups, **fusion):
    """Return draw's tensors, in float32 and NCHW, and its options."""
    tensors, options = draw(shape, groups, torch.float32, CPU, **fusion)
    return {name: t.contiguous() for name, t in tensors.items()}, options


def check(tensors, options):
    """Compare y and every gradient with float64."""
    out, grads, incoming = run(group_norm, tensors, options)
    assert out.y.grad_fn.name() == "_HostGroupNormBackward"
    double = {name: t.double() for name, t in tensors.items()}
    ref, ref_grads, _ = run(group_norm_eager, double, options, incoming)
    assert relative(out.y, ref.y) <= 2e-6
    assert torch.equal(out.h, tensors["x"])
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        assert relative(grad, ref_grads[name]) <= 2e-6, name


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("shape", ["few-channels", "odd-group", "even-tiles"])
def test_fusions(shape, fusion):
    check(*draw_contiguous(*SHAPES[shape], **FUSIONS[fusion]))


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape):
    check(*draw_contiguous(*SHAPES[shape], add=True, scale_shift=True))


def test_add_may_be_one_row_for_all():
    """Like a convolution's bias, expanded to [N, C]; scale and shift are strided parts."""
    tensors, options = draw_contiguous((2, 24, 6, 5), 6, add=True)
    tensors["add"] = tensors["add"][:1].expand(2, -1)
    tensors["scale"], tensors["shift"] = torch.randn(2, 48).chunk(2, dim=1)
    check(tensors, options)


def test_silu_over_its_range():
    """The exponential neither overflows nor loses precision."""
    y = torch.linspace(-200, 200, 4001)
    zero, one = torch.zeros(1), torch.ones(1, 1)
    # The norm of zeros is 0, so that y is silu(shift).
    out = group_norm(
        torch.zeros(4001, 1, 1, 1), zero, zero, 1, 1.0,
        scale=one.expand(4001, 1), shift=y[:, None],
    ).y.flatten()  # fmt: skip
    ref = torch.nn.functional.silu(y.double())
    assert ((out - ref).abs() <= 2e-6 * ref.abs().clamp(min=1e-6)).all()


def test_a_large_mean_costs_no_precision():
    tensors, options = draw_contiguous(*SHAPES["even-tiles"])
    signs = 1 - 2 * ((torch.arange(18)[:, None] + torch.arange(16)) % 2)
    tensors["x"] = (1024 + signs).float().expand_as(tensors["x"]).contiguous()
    check(tensors, options)


def test_a_nan_stays_in_its_sample_and_group():
    tensors, options = draw_contiguous((3, 24, 6, 5), 6, scale_shift=True)
    clean = group_norm(**tensors, **options).y
    tensors["x"][1, 3, 2, 2] = float("nan")
    out = group_norm(**tensors, **options).y
    assert torch.equal(out[::2], clean[::2])
    assert out[1, :4].isnan().all()
    assert torch.equal(out[1, 4:], clean[1, 4:])


def test_bits_do_not_depend_on_threads_runs_or_batch(threads):
    tensors, options = draw_contiguous((7, 24, 18, 16), 6, add=True, scale_shift=True)
    assert tensors["x"].numel() >= host.PARALLEL_NUMEL
    results = []
    for count in (1, 2, 3, 2):
        threads(count)
        out, grads, incoming = run(group_norm, tensors, options)
        results.append([out.y, *grads.values()])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
    first = {name: t if t.dim() == 1 else t[:1] for name, t in tensors.items()}
    alone, grads_alone, _ = run(
        group_norm, first, options, incoming._replace(**{
            name: g[:1] for name, g in incoming._asdict().items() if g is not None
        }),
    )  # fmt: skip
    assert torch.equal(alone.y, results[0][0][:1])
    assert torch.equal(grads_alone["x"], grads["x"][:1])


def test_it_computes_only_the_gradients_that_are_wanted():
    tensors, options = draw_contiguous((2, 24, 6, 5), 6, add=True, scale_shift=True)
    y = group_norm(**{k: v.requires_grad_(k == "x") for k, v in tensors.items()}, **options).y
    y.sum().backward()
    assert [name for name, t in tensors.items() if t.grad is not None] == ["x"]


@pytest.mark.parametrize("case", UNFUSED)
def test_what_it_does_not_fuse_is_eager(case):
    tensors, options = draw_contiguous((2, 24, 6, 4), 6, **UNFUSED[case])
    assert same_as_eager(tensors, options)


def test_other_layouts_and_types_are_eager():
    tensors, options = draw_contiguous((2, 24, 6, 4), 6)
    last = tensors["x"].contiguous(memory_format=torch.channels_last)
    assert same_as_eager(tensors | {"x": last}, options)
    assert same_as_eager(tensors | {"x": tensors["x"].bfloat16()}, options)
    assert same_as_eager({name: t.double() for name, t in tensors.items()}, options)


def same_as_eager(tensors, options) -> bool:
    out, ref = group_norm(**tensors, **options), group_norm_eager(**tensors, **options)
    return torch.equal(out.y, ref.y) and torch.equal(out.h, ref.h)


def test_a_gpu_has_no_build_of_it():
    assert choose("group_norm", torch.device("cuda")) != "cuda"


def test_the_operators_are_traced_without_a_break():
    tensors, options = draw_contiguous((2, 24, 6, 4), 6, add=True, scale_shift=True)
    x, weight, bias, add, scale, shift = tensors.values()
    arguments = x, weight, bias, add, scale, shift, 6, EPS, True
    checks = ("test_schema", "test_faketensor")
    operators = torch.ops.sid_fast
    torch.library.opcheck(operators.group_norm_host.default, arguments, test_utils=checks)
    _, stats = operators.group_norm_host(*arguments)
    torch.library.opcheck(
        operators.group_norm_host_backward.default,
        (x, x, stats, *arguments[1:6], EPS, True, [True, True, True]),
        test_utils=checks,
    )

    def loss(**tensors):
        return group_norm(**tensors, **options).y.square().sum()

    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    plain, traced = (
        torch.autograd.grad(f(**leaves), list(leaves.values())) for f in (loss, compiled)
    )
    assert all(map(torch.equal, plain, traced))
