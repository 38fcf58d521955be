"""Network families: building, loading and saving."""

from sid_fast.models.base import Network
from sid_fast.models.edm2 import EDM2Config, EDM2Network
from sid_fast.models.edm_unet import EDMNetwork, NetworkConfig

__all__ = ["EDM2Config", "EDM2Network", "EDMNetwork", "Network", "NetworkConfig"]
