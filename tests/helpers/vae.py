"""A stand-in for diffusers with a tiny AutoencoderKL, and VAE folders in diffusers' layout."""

import json
import sys
import types

import torch
from safetensors.torch import save_file
from torch import nn

CONFIG = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.4.2",
    "latent_channels": 4,
    "out_channels": 3,
    "block_out_channels": [32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 32,
}


class AutoencoderKL(nn.Module):
    """Decodes by a 1x1 convolution and nearest upsampling."""

    def __init__(self, latent_channels, block_out_channels):
        super().__init__()
        self.encoder = nn.Conv2d(3, latent_channels, 1)
        self.attention = nn.ModuleDict({"to_q": nn.Linear(2, 2)})
        self.decoder = nn.Conv2d(latent_channels, 3, 1)
        self.factor = 2 ** (len(block_out_channels) - 1)

    @classmethod
    def from_config(cls, config):
        return cls(config["latent_channels"], config["block_out_channels"])

    def decode(self, raw, return_dict):
        assert not return_dict
        return (nn.functional.interpolate(self.decoder(raw), scale_factor=self.factor),)


def stand_in(monkeypatch) -> None:
    """Make `from diffusers import AutoencoderKL` give the class above."""
    module = types.ModuleType("diffusers")
    module.AutoencoderKL = AutoencoderKL
    monkeypatch.setitem(sys.modules, "diffusers", module)


def write_vae(folder, config=None, **changes):
    """Write a VAE folder of the stand-in; attention has the name of published files."""
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIG | changes if config is None else config
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    state = AutoencoderKL(config.get("latent_channels", 4), CONFIG["block_out_channels"])
    tensors = {k.replace("to_q", "query"): v for k, v in state.state_dict().items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    return folder
