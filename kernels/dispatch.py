"""Which implementation of a kernel runs: decided here and nowhere else."""

import contextlib
import os
from collections.abc import Iterator

import torch

from sid_fast.errors import UserError

IMPLEMENTATIONS = ("cuda", "triton", "reference")
_forced: str | None = None


def choose(cuda: bool = False) -> str:
    """The implementation of an operation that has a CUDA C++ form, built, or has none.

    Where it has none, Triton stands in for it.
    """
    # PyTorch's own wherever nothing else is asked for: the kernels are proven by interpreter and
    # compiler, and become a GPU's default with their figures measured on one.
    name = _forced or "reference"
    return "triton" if name == "cuda" and not cuda else name


def force(name: str | None) -> None:
    """Run one implementation from here on, wherever the tensors are; None: as `choose` says.

    Triton on a CPU needs TRITON_INTERPRET=1 in the environment before triton is imported; CUDA
    on a CPU runs the host build of the same arithmetic. Raises ValueError for an unknown name.
    """
    global _forced
    if name not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"kernels={name!r}: choose from {', '.join(IMPLEMENTATIONS)}")
    _forced = name


def configure(name: str, device: torch.device) -> None:
    """What --kernels asks for on a device; UserError for what cannot run there."""
    if name not in ("auto", *IMPLEMENTATIONS):
        raise UserError(f"kernels={name!r} is unknown: choose auto, {', '.join(IMPLEMENTATIONS)}")
    if name == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError("kernels=triton on a CPU is for tests: set TRITON_INTERPRET=1 (slow)")
    force(None if name == "auto" else name)


@contextlib.contextmanager
def forced(name: str) -> Iterator[None]:
    """`force` for the length of the block."""
    before = _forced
    force(name)
    try:
        yield
    finally:
        force(before)
