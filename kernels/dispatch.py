"""Choose the backend of each operation: `--kernels`, and overrides for tests and benchmarks."""

import contextlib
import os
from collections.abc import Iterator, Mapping

import torch

from sid_fast.errors import UserError
from sid_fast.kernels import _apex, _cuda
from sid_fast.kernels._triton import AVAILABLE

# Backends of each operation besides "eager" (plain PyTorch). `block` is the U-Net's residual block:
# eager in edm_unet/unet.py, composed of the fused operations in edm_unet/fused.py. `mp` is all of
# kernels.mp, the element-wise chains of EDM2's blocks.
OPERATIONS = {
    "block": ("triton",),
    "group_norm": ("triton", "apex", "cuda"),
    "attention": ("triton",),
    "sid_loss": ("triton",),
    "sida_loss": ("triton",),
    "augment": ("triton",),
    "random": ("triton",),
    "adam_ema": ("triton", "cuda"),
    "weight_norm": ("triton",),
    "mp": ("triton",),
}
BACKENDS = ("cuda", "triton", "eager", "apex")
_forced: dict[str, str] = {}


def available_backends() -> list[str]:
    """Return the backends that --kernels accepts on this machine."""
    return [name for name in BACKENDS if name != "apex" or _apex.installed()]


# The backend of an operation by device type, where --kernels says nothing; eager for the rest.
# Counted bytes and launches decide (GroupNorm 203 GiB -> 119 a CIFAR-10 step of 64 images, Adam
# 13,000 launches -> 2); `python -m sid_fast.tune` times all backends on the machine itself.
DEFAULTS = {
    "cuda": dict.fromkeys(
        ("group_norm", "sid_loss", "sida_loss", "random", "adam_ema", "weight_norm", "mp"),
        "triton",
    ),
    # The host build of csrc; measured, see benchmarks/LOG.md.
    "cpu": dict.fromkeys(("group_norm", "adam_ema"), "cuda"),
}
HOST_ONLY = {"group_norm"}  # operations whose "cuda" backend has no device build


def choose(operation: str, device: torch.device) -> str:
    """Return the backend that runs an operation on tensors of a device.

    A forced backend that the operation lacks on the device, or that was not built, falls back to
    Triton; a default that was not built falls back to eager.
    """
    return _resolve(_forced, operation, device)


def _resolve(forced: Mapping[str, str], operation: str, device: torch.device) -> str:
    default = DEFAULTS.get(device.type, {}).get(operation, "eager")
    name = forced.get(operation, default)
    missing = name not in ("eager", *OPERATIONS[operation])
    if name == "cuda":
        missing |= not _cuda.is_built()
        missing |= device.type != "cpu" and operation in HOST_ONLY
    missing |= name == "triton" and not AVAILABLE
    if not missing:
        return name
    return "triton" if operation in forced and AVAILABLE else "eager"


def runs(device: torch.device) -> dict[str, str]:
    """Return the backend of every operation on a device."""
    return _resolve_all(_forced, device)


def _resolve_all(forced: Mapping[str, str], device: torch.device) -> dict[str, str]:
    return {name: _resolve(forced, name, device) for name in OPERATIONS}


def report(device: torch.device) -> str:
    """Summarise the backends on a device, as `describe` does; a CPU runs "cuda" in C++."""
    names = {"cuda": "C++"} if device.type == "cpu" else {}
    return describe({operation: names.get(name, name) for operation, name in runs(device).items()})


def describe(backends: str | Mapping[str, str]) -> str:
    """Summarise the backends of all operations: "OPERATION, … NAME, the rest NAME", or one NAME."""
    if isinstance(backends, str):
        return backends
    operations: dict[str, list[str]] = {}
    for operation, name in backends.items():
        operations.setdefault(name, []).append(operation)
    *others, rest = sorted(operations, key=lambda name: len(operations[name]))
    named = [f"{', '.join(operations[name])} {name}" for name in others]
    return ", ".join([*named, f"the rest {rest}"]) if named else rest


def force(names: str | Mapping[str, str] | None) -> None:
    """Set the backend of all operations, or of some, on every device.

    "triton" on a CPU needs TRITON_INTERPRET=1 in the environment before triton is imported; "cuda"
    on a CPU runs the host build of the C++.

    Args:
        names: a backend for all operations; a mapping from operations to backends, which leaves
            the other operations unchanged; or None to restore the defaults.

    Raises:
        ValueError: if an operation or a backend is unknown.
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
    """Apply `force` within a `with` block."""
    global _forced
    before = _forced
    force(names)
    try:
        yield
    finally:
        _forced = before


def pinned() -> dict[str, str]:
    """Return the backends that were asked for, by operation; the others have their default."""
    return dict(_forced)


def configure(text: str, device: torch.device, deterministic: bool = False) -> None:
    """Apply the value of --kernels for runs on a device.

    Args:
        text: comma-separated backends: NAME for all operations, OPERATION=NAME for one.
        device: where the operations will run.
        deterministic: refuse backends that may give other bits in another run.

    Raises:
        UserError: if an operation or backend is unknown, or cannot run on the device.
    """
    global _forced
    names: dict[str, str] = {}
    for part in text.split(","):
        operation, _, name = part.rpartition("=")
        _check_backend(text, operation, name)
        names |= dict.fromkeys([operation] if operation else OPERATIONS, name)
    names = {operation: name for operation, name in names.items() if name != "auto"}
    backends = _resolve_all(names, device).values()
    if device.type == "cpu" and "apex" in backends:
        raise UserError(f"kernels={text}: apex runs on NVIDIA GPUs only, not on {device}")
    if deterministic and "apex" in backends:
        raise UserError(
            f"kernels={text}: apex's group norm does not promise to be deterministic: choose "
            "triton, or leave out --deterministic"
        )
    if device.type == "cpu" and "triton" in backends and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(
            f"kernels={text}: Triton runs on a CPU only in its interpreter, for tests; "
            "set TRITON_INTERPRET=1 (slow)"
        )
    _forced = names


def _check_backend(text: str, operation: str, name: str) -> None:
    """Raise UserError unless the operation, or any if it is empty, has the backend here."""
    if name == "reference":
        raise UserError(f"kernels={text}: the backend `reference` is now called `eager`")
    if operation and operation not in OPERATIONS:
        raise UserError(
            f"kernels={text}: unknown operation {operation!r}: choose {', '.join(OPERATIONS)}"
        )
    backends = ["eager", *OPERATIONS[operation]] if operation else BACKENDS
    backends = ["auto", *(backend for backend in backends if backend in available_backends())]
    if name not in backends:
        problem = f"no backend {name!r}" + (f" for {operation}" if operation else "")
        if name == "apex" and not _apex.installed():
            problem = (
                "NVIDIA's apex with its group norm is not installed (PyPI's apex is unrelated)"
            )
        raise UserError(f"kernels={text}: {problem}: choose {', '.join(backends)}")
