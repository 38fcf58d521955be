"""Bit-exact reproducibility, at the price of cuDNN's fastest algorithms."""

import torch


def enable() -> None:
    """Select deterministic cuDNN algorithms, and turn TF32 convolutions off."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
