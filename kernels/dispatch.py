"""Which implementation of a kernel runs: decided here and nowhere else."""

import contextlib
from collections.abc import Iterator

import torch

IMPLEMENTATIONS = ("triton", "reference")
_forced: str | None = None


def choose(tensor: torch.Tensor) -> str:
    """The implementation for an operation on `tensor`: Triton on a GPU, PyTorch elsewhere."""
    if _forced:
        return _forced
    return "triton" if tensor.device.type == "cuda" else "reference"


@contextlib.contextmanager
def forced(name: str) -> Iterator[None]:
    """Run one implementation for the length of the block, wherever the tensors are.

    Triton on a CPU needs TRITON_INTERPRET=1 in the environment before triton is imported.
    """
    global _forced
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"kernels={name!r}: choose from {', '.join(IMPLEMENTATIONS)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before
