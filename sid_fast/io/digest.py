"""Fingerprints of tensors."""

import hashlib
from collections.abc import Iterable

import torch


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """Hash tensors' values: the first 16 hexadecimal digits of their sha256."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()[:16]
