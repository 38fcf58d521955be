"""Network families: building, loading and saving."""

from sid_fast.models.edm_unet import EDMNetwork, NetworkConfig

__all__ = ["EDMNetwork", "NetworkConfig"]
