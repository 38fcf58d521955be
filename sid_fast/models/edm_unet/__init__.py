"""DDPM++, NCSN++ and ADM with EDM preconditioning (arXiv 2206.00364)."""

from sid_fast.models.edm_unet.config import NetworkConfig
from sid_fast.models.edm_unet.precond import EDMNetwork

__all__ = ["EDMNetwork", "NetworkConfig"]
