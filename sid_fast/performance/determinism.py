"""Determinism: a resumed run ends on the same bits, at the price of cuDNN's fastest algorithms."""

import torch


def enable() -> None:
    """Reproducible cuDNN algorithms, and float32 products that are float32."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
