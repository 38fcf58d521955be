"""The operator: refused arguments, passes over activations, and torch.compile."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sid_fast.kernels.dispatch import forced
from sid_fast.kernels.group_norm import GroupNormOutput, bytes_moved, group_norm, group_norm_eager
from tests.helpers.group_norm import COMBINATIONS, EPS, SUM, draw, like, run


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"dropout": -0.1}, "dropout=-0.1: must"),
        ({"dropout": 1.0}, "dropout=1.0: must"),
        ({"resample": "half"}, "resample='half': choose"),
        ({"resample": "down"}, "'down' of 6x5 pixels: sides must be even"),
        ({"resample": "up", "dropout": 0.1}, "resample='up' cannot be combined"),
        (
            {"resample": "up", "skip": torch.zeros(2, 8, 6, 5)},
            "32 channels: must equal the length of weight",
        ),
        ({"groups": 5}, "multiple of groups=5"),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(v),
)
@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_bad_arguments(backend, bad, message):
    tensors, options = draw((2, 24, 6, 5), 6, torch.float32, "cpu")
    with forced(backend), pytest.raises(ValueError, match=message):
        group_norm(**tensors, **options | bad)


def test_mismatched_shapes_are_refused(device):
    fusion = {**SUM, "add": True, "scale_shift": True, "skip": 8}
    tensors, options = draw((2, 24, 6, 4), 6, torch.float32, device, **fusion)
    right = tensors["skip"]
    for name, value, message in (
        ("skip", right.half(), "skip is torch.float16: must be torch.float32"),
        ("skip", right[..., :2], r"skip is \(2, 8, 6, 2\): must be \(2, 8, 6, 4\)"),
        ("skip", right[:1], r"skip is \(1, 8, 6, 4\): must be"),
        ("residual", right, r"residual is \(2, 8, 6, 4\): must be \(2, 16, 6, 4\)"),
        ("x_bias", tensors["bias"], r"x_bias is \(24,\): must be \(16,\)"),
        ("add", tensors["add"][:1], r"add is \(1, 24\): must be \(2, 24\)"),
        ("shift", None, "only one of scale and shift is given"),
    ):
        with pytest.raises(ValueError, match=message):
            group_norm(**tensors | {name: value}, **options)
    with pytest.raises(ValueError, match="cannot be combined with dropout or skip"):
        group_norm(**tensors, **options, resample="up")


@pytest.mark.parametrize("fusion", [{**SUM, "skip": 7}, {"resample": "down"}], ids=str)
def test_one_output_used_at_a_time(fusion, device):
    """Unused outputs contribute no gradient."""
    tensors, options = draw((2, 24, 6, 4), 6, torch.float32, device, **fusion)
    double = {k: v.double() for k, v in tensors.items()}
    with forced("triton"):
        incoming = like(group_norm(**tensors, **options))
    for used, grad in enumerate(incoming):
        if grad is not None:
            alone = GroupNormOutput(*(g if i == used else None for i, g in enumerate(incoming)))
            with forced("triton"):
                _, grads, _ = run(group_norm, tensors, options, alone)
            _, refs, _ = run(group_norm_eager, double, options, alone)
            for name, result in grads.items():
                ref = 0.0 if refs[name] is None else refs[name]
                assert (result - ref).norm() <= 1e-5 * grad.norm(), (used, name)


class ActivationCalls(TorchDispatchMode):
    """Record (operator, arguments, results) of all calls that read or write an activation."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        outs = out if isinstance(out, tuple | list) else [out]
        active = any(isinstance(v, torch.Tensor) and v.dim() == 4 for v in (*args, *outs))
        if active and not func.is_view:
            self.calls.append((func, args, out))
        return out


def recorded_calls(fusion, device, frozen=()):
    """Return the calls of forward and those of backward, with a gradient for every output."""
    tensors, options = draw((2, 24, 6, 6), 6, torch.float32, device, **fusion)
    options["seed"] = torch.tensor([3, 4, 0], device=device)
    leaves = {k: v.requires_grad_(k not in frozen) for k, v in tensors.items()}
    with forced("triton"), ActivationCalls() as forward:
        out = group_norm(**leaves, **options)
    outs = [v for v in out if v is not None]
    ins = [torch.randn_like(v) for v in outs]
    with ActivationCalls() as backward:
        torch.autograd.grad(outs, [v for v in leaves.values() if v.requires_grad], ins)
    return forward.calls, backward.calls


@pytest.mark.parametrize("fusion", COMBINATIONS)
def test_the_kernels_are_the_only_passes(fusion, device):
    """Each direction makes one call on activations, to an operator that passes opcheck."""
    for calls, operator in zip(
        recorded_calls(COMBINATIONS[fusion], device),
        (torch.ops.sid_fast.group_norm, torch.ops.sid_fast.group_norm_backward),
        strict=True,
    ):
        assert [call[0] for call in calls] == [operator.default]
        with forced("triton"):
            torch.library.opcheck(*calls[0][:2], test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("fusion", "fused", "shape", "directions"),
    [
        ("plain", {}, (24, 6), 2),
        ("sum", SUM, (24, 6), 2),
        ("norm2", {"residual": True}, (24, 6), 1),
        ("plain skip", {"skip": 7}, (17, 7, 6), 1),
        ("sum down", {**SUM, "resample": "down"}, (24, 6), 1),
        ("plain up", {"resample": "up"}, (24, 6), 1),
    ],
)
def test_bytes_moved(fusion, fused, shape, directions, device):
    """Every activation that an operator reads or writes counts once."""
    for backward, ((_, args, outs),) in enumerate(recorded_calls(fused, device)[:directions]):
        activations = [v for v in (*args, *outs) if isinstance(v, torch.Tensor) and v.dim() == 4]
        moved = bytes_moved(fusion, shape, 2, 4, bool(backward))
        assert moved == sum(v.numel() * 4 for v in activations)


def test_a_frozen_norm_computes_no_parameter_gradients(device):
    fusion = {**SUM, "scale_shift": True, "add": True}
    parameters = ("weight", "bias", "x_bias", "add", "scale", "shift")
    for frozen, sizes in (((), [24, 48, 48, 48, 48]), (parameters, [0] * 5)):
        ((_, _, (dx, dskip, *rest)),) = recorded_calls(fusion, device, frozen)[1]
        assert dx.shape == (2, 24, 6, 6)
        assert not len(dskip)
        assert [v.numel() for v in rest] == sizes


def test_eager_on_a_cpu_equals_pytorchs_own_operations():
    """Without a seed, dropout draws from torch's generator."""
    tensors, options = draw((2, 32, 4, 4), 8, torch.float32, "cpu")
    torch.manual_seed(5)
    out = group_norm(**tensors, **options, dropout=0.5).y
    torch.manual_seed(5)
    norm = torch.nn.functional.group_norm(tensors["x"], 8, tensors["weight"], tensors["bias"], EPS)
    norm = torch.nn.functional.silu(norm)
    assert torch.equal(out, torch.nn.functional.dropout(norm, 0.5))


@pytest.mark.parametrize("fusion", COMBINATIONS)
def test_compiles_without_a_graph_break(fusion, device):
    tensors, options = draw((2, 24, 6, 4), 6, torch.float32, device, **COMBINATIONS[fusion])
    options["seed"] = torch.tensor([3, 4, 0], device=device)
    with forced("triton"):
        incoming = like(group_norm(**tensors, **options))

    def loss(**tensors):
        outs = group_norm(**tensors, **options)
        return sum((o * g).sum() for o, g in zip(outs, incoming, strict=True) if g is not None)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = {k: v.requires_grad_() for k, v in tensors.items()}
    with forced("triton"):
        plain, traced = loss(**leaves), compiled(**leaves)
        grads, traced_grads = (
            torch.autograd.grad(v, list(leaves.values())) for v in (plain, traced)
        )
    assert torch.equal(plain, traced)
    for name, grad, other in zip(leaves, grads, traced_grads, strict=True):
        assert torch.equal(grad, other), name
