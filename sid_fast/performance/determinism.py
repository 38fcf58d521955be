"""Bit-exact GPU runs, at the price of the fastest algorithms.

A CPU run is always bit-exact. So are the random numbers of any run; what differs between two runs
on a GPU is the order in which libraries add numbers up.
"""

import contextlib
import os
from collections.abc import Iterator

import torch

from sid_fast.errors import UserError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
FIXED = ":4096:8"  # cuBLAS then splits no product over streams in varying order


def configure(deterministic: bool) -> None:
    """Select deterministic GPU algorithms, or leave the choice to the libraries.

    Call it before CUDA starts. Turns TF32 convolutions off in either case; `--precision tf32` turns
    them on again.

    Raises:
        UserError: `deterministic`, but CUDA has already started without a fixed cuBLAS workspace.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = deterministic
    if deterministic and os.environ.get(WORKSPACE) not in (":4096:8", ":16:8"):
        if torch.cuda.is_initialized():
            raise UserError(
                f"deterministic: CUDA has started without {WORKSPACE}; set it to {FIXED} in the "
                "environment"
            )
        os.environ[WORKSPACE] = FIXED
    if deterministic:
        # Filling new tensors with NaN is a debugging aid, and extra launches.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        from torch._inductor import config  # slow to import

        config.deterministic = True  # torch.compile would choose reductions by timing them
    torch.use_deterministic_algorithms(deterministic)


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Turn PyTorch's refusal of an operation without a deterministic form into a UserError."""
    try:
        yield
    except RuntimeError as error:
        operation, found, _ = str(error).partition(" does not have a deterministic implementation")
        if not found:
            raise
        raise UserError(
            f"deterministic: {operation} has no deterministic form on this GPU; choose another "
            "--kernels backend, or --no-deterministic"
        ) from error
