"""In which types a network computes (--precision); its parameters are float32 in all of them."""

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
# A step of Adam divides by √v + ε; where gradients are rounded to 16 bit with 5 bits of exponent,
# small ones are noise, and the published runs take a larger ε.
ADAM_EPS = {"fp32": 1e-8, "tf32": 1e-8, "bf16": 1e-8, "fp16": 1e-6}


def set_precision(name: str, device: torch.device) -> str:
    """What --precision means on a device: auto is bf16 on a GPU that has it, otherwise fp32.

    float32 products are rounded to TF32 on this device from here on, or no longer are. Raises
    UserError for what is unknown or not there.
    """
    cuda = device.type == "cuda"
    if name == "auto":
        bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bf16" if bf16 else "fp32"
    if name == "tf32" and not cuda:
        raise UserError("precision=tf32 is a type of NVIDIA GPUs; use fp32 or bf16 on a CPU")
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    return name


def resolve_precision(settings: Any, device: torch.device) -> Any:
    """Settings with precision and eps as they come out on the device, if they were left open."""
    kind = set_precision(settings.precision, device)
    return dataclasses.replace(settings, precision=kind, eps=settings.eps or ADAM_EPS[kind])
