"""Network families: how to build, load and save them."""

from sid_fast.models.edm_unet import EDMNetwork, NetworkConfig

__all__ = ["EDMNetwork", "NetworkConfig"]
