"""Latents of a VAE: data sets of them, and how a network sees them.

EDM2's networks of ImageNet-512 work on latents [4, 64, 64] of the VAE sd-vae-ft-mse
(arXiv 2312.02696). A data set holds the VAE's posterior of each image, a mean and a deviation per
value, and every read draws a latent from it. Networks see it normalised, x = latent·scale + bias
with constants per channel, so that data have mean 0 and deviation σ_data = 0.5.
"""

import io
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from sid_fast.data.datasets import Dataset, Listing
from sid_fast.data.images import MAX_RESOLUTION
from sid_fast.errors import UserError
from sid_fast.io.archives import npy_header
from sid_fast.io.untrusted import Refused, describe, sniff

CHANNELS = 4  # of a latent
PIXELS = 8  # of an image per latent position, along each side
# The mean and deviation of each channel over the latents of ImageNet-512, as EDM2 uses them.
_MEAN = (5.81, 3.25, 0.12, -2.15)
_DEVIATION = (4.17, 4.62, 3.71, 3.28)
_SIGMA_DATA = 0.5
_HEADER_BYTES = 2**16 + 10  # of an .npy file of version 1.0, at most


class Normalization(NamedTuple):
    """x = latent·scale + bias and its inverse. scale and bias are float32 [4, 1, 1]."""

    scale: torch.Tensor
    bias: torch.Tensor

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """Return what a network sees of latents [N, 4, R, R]."""
        return latents * self.scale + self.bias

    def inverse(self, x: torch.Tensor) -> torch.Tensor:
        """Return the latents, float32 [N, 4, R, R], of a network's outputs."""
        return (x.float() - self.bias) / self.scale


def normalization(device: torch.device) -> Normalization:
    """Return EDM2's constants on a device."""
    scale = _SIGMA_DATA / torch.tensor(_DEVIATION).reshape(CHANNELS, 1, 1)
    bias = -torch.tensor(_MEAN).reshape(CHANNELS, 1, 1) * scale
    return Normalization(scale.to(device), bias.to(device))


def sample(
    stored: torch.Tensor, noise: torch.Tensor | None, normalize: Normalization
) -> torch.Tensor:
    """Draw latents from stored samples, and normalise them.

    Args:
        stored: float16 or float32 [N, 8, R, R], mean and deviation; or [N, 4, R, R], latents.
        noise: ε ~ N(0, I), [N, 4, R, R]; None for latents.
        normalize: EDM2's constants.

    Returns:
        (mean + deviation·ε)·scale + bias, float32 [N, 4, R, R].
    """
    stored = stored.float()
    if noise is None:
        return normalize(stored)
    mean, deviation = stored.chunk(2, dim=1)
    return normalize(mean + deviation * noise)


class LatentDataset(Dataset):
    """Latents of images, in an .npy file each: float32 or float16 [8, R, R] or [4, R, R].

    8 channels are the mean and the deviation of the VAE's posterior, as EDM2's data set tool writes
    them; 4 channels are latents themselves. See Dataset for the rest.

    Attributes:
        stored_channels: 8 or 4.
    """

    suffix, is_latent, channels = ".npy", True, CHANNELS

    @property
    def has_deviation(self) -> bool:
        """Whether latents are drawn anew at each read."""
        return self.stored_channels == 2 * CHANNELS

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """The shape of a sample as it is stored."""
        return self.stored_channels, self.resolution, self.resolution

    def __getitem__(self, index: int) -> np.ndarray:
        name = self._names[index]
        sample = self._parse(name, self._member(name))
        expected = self.dtype, self.sample_shape
        if (sample.dtype, sample.shape) != expected:
            raise self._error(
                name,
                f"holds {sample.dtype} {list(sample.shape)}, the first one {expected[0]} "
                f"{list(expected[1])}: make all latents alike",
            )
        if not np.isfinite(sample).all():
            raise self._error(name, "has values that are NaN or infinite: make it again")
        if self.has_deviation and sample[CHANNELS:].min() < 0:
            raise self._error(
                name,
                "has negative values in its last 4 channels, which are the deviation: make it "
                "again, not with the logarithm of the variance",
            )
        return sample

    def _inspect(self, name: str, data: np.ndarray) -> None:
        sample = self._parse(name, data)
        self.dtype, (self.stored_channels, self.resolution, _) = sample.dtype, sample.shape

    def _parse(self, name: str, data: np.ndarray) -> np.ndarray:
        """Read an .npy file as [8, R, R] or [4, R, R] in the machine's byte order."""
        kind = sniff(data[:512].tobytes())
        if kind != "npy":
            raise self._error(name, f"is not an .npy file ({describe(kind)}): replace it")
        file = io.BytesIO(data[:_HEADER_BYTES])
        try:
            shape, fortran, dtype = npy_header(file, len(data), 2 * CHANNELS * MAX_RESOLUTION**2)
        except Refused as error:
            raise self._error(name, error) from error
        except Exception as error:  # damaged bytes can fail in any way
            raise self._error(name, "has a damaged header: replace it") from error
        if dtype.newbyteorder("=") not in (np.float16, np.float32):
            raise self._error(name, f"holds {dtype}: save latents as float32 or float16")
        if len(shape) != 3 or shape[1] != shape[2] or not shape[1]:
            raise self._error(
                name, f"has the shape {list(shape)}: latents are [8, R, R] or [4, R, R]"
            )
        if shape[0] not in (CHANNELS, 2 * CHANNELS):
            raise self._error(
                name,
                f"has {shape[0]} channels: latents have 4, or 8 with mean and deviation, as EDM2's "
                "data set tool writes them",
            )
        if (missing := int(np.prod(shape)) * dtype.itemsize - (len(data) - file.tell())) > 0:
            raise self._error(name, f"is cut short by {missing:,} bytes: copy it again")
        values = np.frombuffer(data[file.tell() :], dtype, int(np.prod(shape)))
        values = values.reshape(shape, order="F" if fortran else "C")
        return np.array(values, dtype.newbyteorder("="), order="C")

    def _nothing(self, others: Mapping[str, int], hidden: int) -> UserError:
        return UserError(f"{self.path} holds no latents (.npy): give a data set zip or folder")


def holds_latents(files: Listing) -> bool:
    """Whether a data set holds .npy files and no images."""
    suffixes = {name[-4:].lower() for name in files.visible}
    return ".npy" in suffixes and ".png" not in suffixes


def require_kind(data: Dataset, latent: bool, who: str, instead: str) -> None:
    """Raise UserError for latents where pixels are needed, and the other way round.

    Args:
        data: the data set.
        latent: whether latents are needed.
        who: needs them, such as "the teacher".
        instead: the end of the message.
    """
    if data.is_latent != latent:
        kinds = "images (PNG)", "latents (.npy)"
        raise UserError(
            f"{data.path} holds {kinds[data.is_latent]}, and {who} needs {kinds[latent]}: {instead}"
        )
