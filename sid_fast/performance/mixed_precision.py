"""Compute precision (--precision); parameters are float32 in every one."""

import dataclasses
from typing import Any

import torch

from sid_fast.errors import UserError

TYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
# Adam divides by √v + ε. Gradients that underflow in fp16 are noise, so upstream uses a larger ε.
ADAM_EPS = {"fp32": 1e-8, "tf32": 1e-8, "bf16": 1e-8, "fp16": 1e-6}


def set_precision(name: str, device: torch.device) -> str:
    """Resolve a precision for the device, and set PyTorch's TF32 switches to match.

    auto is bf16 on a GPU that supports it natively, otherwise fp32.

    Raises:
        UserError: The device does not support the precision.
    """
    cuda = device.type == "cuda"
    if name == "auto":
        bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bf16" if bf16 else "fp32"
    if name == "tf32" and not cuda:
        raise UserError("precision=tf32 needs an NVIDIA GPU; use fp32 or bf16 on a CPU")
    # Not matmul.allow_tf32: beside it, get_float32_matmul_precision may raise.
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    return name


def resolve_precision(settings: Any, device: torch.device) -> Any:
    """Fill in automatic settings: precision, and the eps that goes with it (see set_precision)."""
    precision = set_precision(settings.precision, device)
    return dataclasses.replace(
        settings, precision=precision, eps=settings.eps or ADAM_EPS[precision]
    )
