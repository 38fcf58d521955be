"""Which implementation of a kernel runs: decided here and nowhere else."""

import contextlib
from collections.abc import Iterator

import torch

IMPLEMENTATIONS = ("cuda", "triton", "reference")
_forced: str | None = None


def choose(tensor: torch.Tensor, cuda: bool = False) -> str:
    """The implementation for an operation on `tensor`: PyTorch's own on a CPU, else the fastest.

    cuda: whether there is a CUDA C++ form of the operation, built; Triton stands in for it.
    """
    name = _forced or ("cuda" if tensor.device.type == "cuda" else "reference")
    return "triton" if name == "cuda" and not cuda else name


@contextlib.contextmanager
def forced(name: str) -> Iterator[None]:
    """Run one implementation for the length of the block, wherever the tensors are.

    Triton on a CPU needs TRITON_INTERPRET=1 in the environment before triton is imported; CUDA
    on a CPU runs the host build of the same arithmetic.
    """
    global _forced
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"kernels={name!r}: choose from {', '.join(IMPLEMENTATIONS)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before
