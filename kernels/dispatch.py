"""Which implementation of each operation runs: decided here and nowhere else."""

import contextlib
import os
from collections.abc import Iterator, Mapping

import torch

from sid_fast.errors import UserError
from sid_fast.kernels import _apex, _cuda

# What each operation has beside plain PyTorch, "eager". `block` is how the others are put
# together: the reference is edm_unet/unet.py, its other form edm_unet/fused.py.
OPERATIONS = {
    "block": ("triton",),
    "group_norm": ("triton", "apex"),
    "attention": ("triton",),
    "sid_loss": ("triton",),
    "augment": ("triton",),
    "random": ("triton",),
    "adam_ema": ("triton", "cuda"),
}
BACKENDS = ("cuda", "triton", "eager", "apex")
_forced: dict[str, str] = {}


def available_backends() -> list[str]:
    """The names that can be asked for here."""
    return [name for name in BACKENDS if name != "apex" or _apex.installed()]


def choose(operation: str, device: torch.device | None = None) -> str:
    """The implementation of an operation, which is called as its module.

    Triton stands in for a form that an operation does not have, or that was not built. device:
    where it runs, for an operation whose default depends on it.
    """
    return _resolve(_forced, operation, device)


# Triton by default on a GPU: a hundred passes of integer arithmetic in plain PyTorch.
TRITON_ON_GPU = ("random",)


def _resolve(forced: Mapping[str, str], operation: str, device: torch.device | None = None) -> str:
    # PyTorch's own wherever nothing else is asked for: the kernels are proven by interpreter and
    # compiler, and become a GPU's default with their figures measured on one.
    on_gpu = device is not None and device.type == "cuda"
    default = "triton" if on_gpu and operation in TRITON_ON_GPU else "eager"
    name = forced.get(operation, default)
    missing = name not in ("eager", *OPERATIONS[operation])
    missing |= name == "cuda" and _cuda.library() is None
    return "triton" if missing else name


def _runs(forced: Mapping[str, str], device: torch.device | None) -> dict[str, str]:
    return {name: _resolve(forced, name, device) for name in OPERATIONS}


def report(device: torch.device | None = None) -> str:
    """What runs on a device, in a line: one name, or one for each operation if they differ."""
    runs = _runs(_forced, device)
    if len(set(runs.values())) == 1:
        return runs["group_norm"]
    return ", ".join(f"{operation} {name}" for operation, name in runs.items())


def force(names: str | Mapping[str, str] | None) -> None:
    """Run one implementation from here on, wherever the tensors are; None: as `choose` says.

    A mapping of operations to names leaves the other operations as they are. Triton on a CPU
    needs TRITON_INTERPRET=1 in the environment before triton is imported; CUDA on a CPU runs
    the host build of the same arithmetic. Raises ValueError for an unknown name or operation.
    """
    global _forced
    if isinstance(names, Mapping):
        by_operation = _forced | dict(names)
    else:
        by_operation = dict.fromkeys(OPERATIONS, names) if names else {}
    values = set(by_operation.values())
    if unknown := (set(by_operation) - set(OPERATIONS)) | (values - set(available_backends())):
        raise ValueError(
            f"kernels={unknown.pop()!r} is unknown: choose {', '.join(available_backends())}, "
            f"for {', '.join(OPERATIONS)}"
        )
    _forced = by_operation


@contextlib.contextmanager
def forced(names: str | Mapping[str, str] | None) -> Iterator[None]:
    """`force` for the length of the block."""
    global _forced
    before = _forced
    force(names)
    try:
        yield
    finally:
        _forced = before


def configure(text: str, device: torch.device) -> None:
    """What --kernels asks for on a device; UserError for what cannot run there.

    A name for all operations, OPERATION=NAME for single ones, or both, with commas between.
    """
    global _forced
    names: dict[str, str] = {}
    for part in text.split(","):
        operation, _, name = part.rpartition("=")
        names |= dict.fromkeys(
            [operation] if operation else OPERATIONS, _known(text, operation, name)
        )
    names = {operation: name for operation, name in names.items() if name != "auto"}
    runs = _runs(names, device).values()
    if device.type == "cpu" and "apex" in runs:
        raise UserError(f"kernels={text}: apex runs on NVIDIA GPUs only, not on {device}")
    if device.type == "cpu" and "triton" in runs and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(
            f"kernels={text}: Triton on a CPU is for tests: set TRITON_INTERPRET=1 (slow)"
        )
    _forced = names


def _known(text: str, operation: str, name: str) -> str:
    """The name, if the operation (any, where it is empty) can be run by it here."""
    if name == "reference":
        raise UserError(f"kernels={text}: `reference` is called `eager` now")
    if operation and operation not in OPERATIONS:
        raise UserError(
            f"kernels={text}: {operation!r} is no operation: choose {', '.join(OPERATIONS)}"
        )
    forms = ["eager", *OPERATIONS[operation]] if operation else BACKENDS
    forms = ["auto", *(form for form in forms if form in available_backends())]
    if name not in forms:
        what = repr(name) + (f" of {operation}" if operation else "")
        if name == "apex" and not _apex.installed():
            what = "NVIDIA's apex with its group norm (PyPI's apex is another package)"
        raise UserError(f"kernels={text}: there is no {what}: choose {', '.join(forms)}")
    return name
