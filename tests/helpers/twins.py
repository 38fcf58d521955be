"""Compare an operation's Triton kernels with its eager twin in float64."""

from collections.abc import Callable, Sequence

import torch

from sid_fast.kernels.dispatch import forced

# Norm of the error over norm of the result: a few roundings of the type.
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}

Call = Callable[..., Sequence[torch.Tensor | None]]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def run(
    call: Call,
    inputs: Sequence[torch.Tensor],
    backend: str,
    dtype: torch.dtype,
    unused: Sequence[int],
) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
    """Return the outputs and the gradients of the inputs; `unused` outputs have no gradient."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
    with forced(backend):
        outs = [out for out in call(*leaves) if out is not None]
        used = [out for i, out in enumerate(outs) if i not in unused]
        rng = torch.Generator().manual_seed(len(outs))
        grads = [torch.randn(out.shape, generator=rng).to(inputs[0].dtype) for out in used]
        grads = [grad.to(used[0]) for grad in grads]
        return [out.detach() for out in outs], torch.autograd.grad(used, leaves, grads)


def check(call: Call, inputs: Sequence[torch.Tensor], unused: Sequence[int] = ()) -> None:
    """Compare outputs and gradients, for inputs of one dtype."""
    dtype = inputs[0].dtype
    found = run(call, inputs, "triton", dtype, unused)
    expected = run(call, inputs, "eager", torch.float64, unused)
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == dtype
            assert a.shape == b.shape
            assert relative(a, b) <= BOUNDS[dtype]


def channels_last(shape: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int = 0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(tuple(shape), generator=rng).to(device, dtype)
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def check_compiles(call: Call, inputs: Sequence[torch.Tensor]) -> None:
    """Compare eager execution of the kernels with torch.compile without graph breaks."""
    leaves = [t.detach().requires_grad_() for t in inputs]

    def loss(*tensors):
        outs = [out for out in call(*tensors) if out is not None]
        return sum((out * (i + 1)).square().sum() for i, out in enumerate(outs))

    with forced("triton"):
        plain = loss(*leaves)
        traced = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
        grads, others = (torch.autograd.grad(value, leaves) for value in (plain, traced))
    assert torch.equal(plain, traced)
    for grad, other in zip(grads, others, strict=True):
        assert torch.equal(grad, other)
