"""DDPM++, NCSN++ and ADM with EDM preconditioning (arXiv 2206.00364)."""

from sid_fast.networks.config import NetworkConfig
from sid_fast.networks.precond import EDMNetwork

__all__ = ["EDMNetwork", "NetworkConfig"]
