"""EDM2: a U-Net of magnitude-preserving layers, with EDM's preconditioning (arXiv 2312.02696)."""

from sid_fast.models.edm2.config import EDM2Config
from sid_fast.models.edm2.precond import EDM2Network

__all__ = ["EDM2Config", "EDM2Network"]
