"""Which implementation of each operation runs: decided here and nowhere else."""

import contextlib
import os
from collections.abc import Iterator, Mapping

import torch

from sid_fast.errors import UserError
from sid_fast.kernels import _apex, _cuda
from sid_fast.kernels._triton import AVAILABLE

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


# The backend of an operation by device type, where --kernels says nothing; eager for the rest.
# Counted bytes and launches decide (GroupNorm 203 GiB -> 119 a CIFAR-10 step of 64 images, Adam
# 13,000 launches -> 2); `python -m sid_fast.tune` times all backends on the machine itself.
DEFAULTS = {
    "cuda": dict.fromkeys(("group_norm", "sid_loss", "random", "adam_ema"), "triton"),
    "cpu": {"adam_ema": "cuda"},  # the host build of the same C++
}


def choose(operation: str, device: torch.device) -> str:
    """The backend that runs an operation on tensors of a device.

    A forced backend that the operation lacks, or that was not built, falls back to Triton; a
    default that was not built falls back to eager.
    """
    return _resolve(_forced, operation, device)


def _resolve(forced: Mapping[str, str], operation: str, device: torch.device) -> str:
    default = DEFAULTS.get(device.type, {}).get(operation, "eager")
    name = forced.get(operation, default)
    missing = name not in ("eager", *OPERATIONS[operation])
    missing |= name == "cuda" and _cuda.library() is None
    missing |= name == "triton" and not AVAILABLE
    if not missing:
        return name
    return "triton" if operation in forced and AVAILABLE else "eager"


def runs(device: torch.device) -> dict[str, str]:
    """The backend of every operation on a device."""
    return _runs(_forced, device)


def _runs(forced: Mapping[str, str], device: torch.device) -> dict[str, str]:
    return {name: _resolve(forced, name, device) for name in OPERATIONS}


def report(device: torch.device) -> str:
    """What runs on a device, in a line: one name, or one for each operation if they differ."""
    found = runs(device)
    if len(set(found.values())) == 1:
        return found["group_norm"]
    return ", ".join(f"{operation} {name}" for operation, name in found.items())


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
