"""A network's outputs as images: pixels, latents decoded by a VAE, or a preview of latents.

The VAE is read from diffusers' files. Only its .safetensors weights and config.json are read, and
nothing in them is executed.

The preview needs no VAE. It is a linear map of the 4 channels to red, green and blue at each
position, an approximation that users of Stable Diffusion's VAE measured
(discuss.huggingface.co/t/decoding-latents-to-rgb-without-upscaling/23204): coarse shapes and about
the right colours, each position enlarged to 8x8 pixels.
"""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sid_fast.data import latents
from sid_fast.errors import UserError
from sid_fast.io.safetensors import read_tensors
from sid_fast.io.untrusted import (
    MAX_NETWORK_BYTES,
    Refused,
    brief,
    checked_int,
    describe,
    naming,
    read_json,
    sniff_file,
)
from sid_fast.models import NetworkConfig
from sid_fast.models.registry import check_weights
from sid_fast.sampling import to_uint8

INSTALL = 'pip install "sid-fast[vae]"'
_WHAT = "a VAE: a diffusers folder, or a .safetensors file with its config.json"
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
_GROUP = 4  # latents decoded at once on a GPU: 4 images of 512x512 pixels take 5 GB
# Red, green and blue of the 4 channels, for latents times _PREVIEW_SCALE and colours in [-1, 1].
_RGB = (
    (0.298, 0.207, 0.208),
    (0.187, 0.286, 0.173),
    (-0.158, 0.189, 0.264),
    (-0.184, -0.271, -0.473),
)
_PREVIEW_SCALE = 0.18215  # Stable Diffusion's, for which they were measured
# Renamed in diffusers since the published files were written.
_RENAMED = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}
# What of config.json the network is built from.
_FIELDS = (
    "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels",
    "layers_per_block", "act_fn", "latent_channels", "norm_num_groups", "use_quant_conv",
    "use_post_quant_conv", "mid_block_add_attention",
)  # fmt: skip

# Defaults of AutoencoderKL, and limits.
_SIZES = {"latent_channels": (4, 1024), "layers_per_block": (1, 16), "norm_num_groups": (32, 4096)}


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Turns a network's outputs, float [N, C, R, R], into uint8 images on the CPU.

    Attributes:
        shape: Of an image, [C, H, W].
        decode: Maps at most `group` outputs to uint8 images.
        group: Outputs per call of decode, always as many; None: all at once.
        is_preview: Whether the images are a preview of latents.
    """

    shape: tuple[int, int, int]
    decode: Callable[[torch.Tensor], torch.Tensor]
    group: int | None = None
    is_preview: bool = False

    @torch.no_grad()
    def __call__(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return the images; each does not depend on the others."""
        size = self.group or len(outputs)
        images = []
        for i in range(0, len(outputs), size):
            rows = torch.arange(i, i + size, device=outputs.device) % len(outputs)
            images.append(self.decode(outputs[rows]).cpu())
        return torch.cat(images)[: len(outputs)]


@dataclasses.dataclass(frozen=True)
class VAE:
    """The decoder of a VAE.

    Attributes:
        channels: Of its latents.
        pixels: Of an image per latent position, along each side.
        decode: Maps latents, float32 [N, channels, R, R], to images in [-1, 1], float32
            [N, 3, pixels·R, pixels·R].
    """

    channels: int
    pixels: int
    decode: Callable[[torch.Tensor], torch.Tensor]


def make_decoder(
    network: NetworkConfig, vae: str | None, device: torch.device, name: str
) -> Decoder:
    """Return the decoder of a network's outputs.

    Args:
        network: Of the network.
        vae: File or folder of a VAE; None: latents are previewed.
        device: That the VAE runs on.
        name: Of the network, for errors.

    Raises:
        UserError: The VAE cannot be used, does not fit, or the network makes no latents.
    """
    side = network.resolution
    if not network.is_latent:
        if vae:
            raise UserError(f"vae={vae}: {name} makes images, not latents: leave out --vae")
        return Decoder((network.channels, side, side), to_uint8)
    if vae is None:
        side *= latents.PIXELS
        return Decoder((3, side, side), preview, is_preview=True)
    loaded = load_vae(vae, device)
    if loaded.channels != network.channels:
        raise UserError(
            f"vae={vae} has latents of {loaded.channels} channels, but those of {name} have "
            f"{network.channels}: give the VAE that the training data were made with"
        )
    inverse = latents.normalization(device).inverse

    def decode(outputs: torch.Tensor) -> torch.Tensor:
        images = loaded.decode(inverse(outputs.to(device)))
        if not images.isfinite().all():
            raise UserError(f"vae={vae} decodes to pixels that are NaN or infinite: give another")
        return to_uint8(images)

    side *= loaded.pixels
    return Decoder((3, side, side), decode, _GROUP if device.type == "cuda" else 1)


def require_images(decoder: Decoder, name: str) -> None:
    """Raise UserError if images are needed and there is only a preview of them."""
    if decoder.is_preview:
        raise UserError(
            f"{name} makes latents, and images are evaluated: give the VAE that decodes them as "
            "--vae FOLDER"
        )


def preview(outputs: torch.Tensor) -> torch.Tensor:
    """Approximate the images of a network's normalised latents without a VAE.

    Args:
        outputs: [N, 4, R, R].

    Returns:
        uint8 [N, 3, 8R, 8R].
    """
    rgb = torch.tensor(_RGB, device=outputs.device)
    if outputs.dim() != 4 or outputs.shape[1] != len(rgb):
        raise UserError(
            f"latents of shape {list(outputs.shape)} have no preview, which needs "
            f"{len(rgb)} channels: give their VAE as --vae"
        )
    raw = latents.normalization(outputs.device).inverse(outputs) * _PREVIEW_SCALE
    images = to_uint8((raw[:, :, None] * rgb[:, :, None, None]).sum(1))
    return images.repeat_interleave(latents.PIXELS, 2).repeat_interleave(latents.PIXELS, 3)


def load_vae(path: str, device: torch.device) -> VAE:
    """Load the VAE of a diffusers folder (or of its subfolder vae), or of a .safetensors file.

    Raises:
        UserError: Files are missing, damaged or do not fit, or diffusers is not installed.
    """
    weights, file = _locate(Path(path))
    with naming(file, "the configuration of a VAE"):
        config = _read_config(file)
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise UserError(f"vae={path} needs diffusers, which is missing: {INSTALL}") from error
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    with naming(file, "the configuration of a VAE"), torch.device("meta"):
        model: Any = AutoencoderKL.from_config(config)
    with naming(weights, "the weights of a VAE"):
        state = {_current_name(k): v.float() for k, v in read_tensors(weights).items()}
        try:
            check_weights(state, model.state_dict())
        except UserError as error:
            raise UserError(f"{weights}: {error}") from error
        model.load_state_dict(state, assign=True)
    del model.encoder
    model.requires_grad_(False).eval().to(device)

    def decode(raw: torch.Tensor) -> torch.Tensor:
        return model.decode(raw, return_dict=False)[0]

    pixels = 2 ** (len(config["block_out_channels"]) - 1)
    return VAE(config["latent_channels"], pixels, decode)


def _locate(path: Path) -> tuple[Path, Path]:
    """Return the files of the weights and of the configuration."""
    if path.is_dir():
        folder = path / "vae" if (path / "vae" / "config.json").exists() else path
        weights = next((folder / n for n in _WEIGHTS if (folder / n).exists()), None)
        if weights is None:
            pickled = sorted([*path.glob("*.bin"), *path.glob("vae/*.bin")])
            why = f": {pickled[0].name} is a pickle, which is not read" if pickled else ""
            raise UserError(f"{path} holds no {_WEIGHTS[0]}{why}; give {_WHAT}")
    else:
        folder, weights = path.parent, path
        if (kind := sniff_file(path, MAX_NETWORK_BYTES)) != "safetensors":
            raise UserError(f"{path} is {describe(kind)}: give {_WHAT}")
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} holds no config.json, which says how to build the VAE: copy it")
    return weights, folder / "config.json"


def _read_config(file: Path) -> dict[str, Any]:
    """Read what of a configuration matters, within limits that keep it small."""
    values = read_json(file, 2**20)
    if not isinstance(values, dict) or values.get("_class_name") != "AutoencoderKL":
        kind = values.get("_class_name") if isinstance(values, dict) else values
        raise Refused(f"it is of {brief(kind)}, not of AutoencoderKL")
    config = {name: values[name] for name in _FIELDS if name in values}
    widths = config.get("block_out_channels")
    if not isinstance(widths, list) or not 1 <= len(widths) <= 8:
        raise Refused(f"block_out_channels is {brief(widths)}, not a list of 1 to 8 widths")
    for width in widths:
        checked_int(width, 1, 4096, "a width in block_out_channels")
    for name, (default, high) in _SIZES.items():
        checked_int(config.setdefault(name, default), 1, high, name)
    if config.get("out_channels", 3) != 3:
        raise Refused(f"it decodes to {brief(config['out_channels'])} channels, not 3")
    return config


def _current_name(name: str) -> str:
    for old, new in _RENAMED.items():
        name = name.replace(old, new)
    return name
