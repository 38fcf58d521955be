"""EDM2's configurations: its sizes and their validation."""

import dataclasses
from typing import ClassVar

from sid_fast.models.edm_unet.config import NetworkConfig

HEAD_CHANNELS = 64  # channels per attention head
LATENT_CHANNELS = 4  # of the VAE that EDM2's ImageNet-512 networks work on, sd-vae-ft-mse

# model_channels and dropout of the published networks, by size (arXiv 2312.02696).
SIZES = {
    "xxs": (64, 0.0),
    "xs": (128, 0.0),
    "s": (192, 0.0),
    "m": (256, 0.1),
    "l": (320, 0.1),
    "xl": (384, 0.1),
    "xxl": (448, 0.1),
}


@dataclasses.dataclass(frozen=True)
class EDM2Config(NetworkConfig):
    """Everything needed to build an EDM2 network; stored with its weights.

    The defaults are those of size XS on the latents of ImageNet-512; see of_size.

    Raises:
        UserError: A field is out of range or does not fit the others.
    """

    architecture: str = "edm2"
    resolution: int = 64
    channels: int = LATENT_CHANNELS
    label_dim: int = 1000
    model_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    num_blocks: int = 3
    attention_resolutions: tuple[int, ...] = (16, 8)
    logvar_channels: int = 128  # Fourier features of the log-variance head; 0: no head

    architectures: ClassVar = ("edm2",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.augment_dim:
            self._refuse("augment_dim", "EDM2 networks take no augmentation labels; use 0")
        if type(self.logvar_channels) is not int or not 0 <= self.logvar_channels <= 4096:
            self._refuse("logvar_channels", "use an integer from 0 to 4096")

    @classmethod
    def of_size(cls, size: str, **fields: object) -> "EDM2Config":
        """Return a published size, one of SIZES, with other fields where given."""
        model_channels, dropout = SIZES[size]
        values = {"model_channels": model_channels, "dropout": dropout} | fields
        return cls(**values)  # type: ignore[arg-type]

    @property
    def head_channels(self) -> int:
        """Channels per attention head."""
        return HEAD_CHANNELS

    @property
    def operations(self) -> frozenset[str]:
        """See NetworkConfig."""
        return frozenset(["attention", "mp", "weight_norm"])

    @property
    def training_noise(self) -> tuple[float, float]:
        """See NetworkConfig; EDM2's values for latents and for pixels differ."""
        return (-0.4, 1.0) if self.is_latent else (-0.8, 1.6)

    @property
    def has_log_variance(self) -> bool:
        """Whether the network has a log-variance head."""
        return self.logvar_channels > 0

    @property
    def is_latent(self) -> bool:
        """Whether the network makes latents of a VAE: those of ImageNet-512 have 4 channels."""
        return self.channels == LATENT_CHANNELS

    @property
    def embedding_channels(self) -> int:
        """Width of the embedding of noise level and class."""
        return self.model_channels * max(self.channel_mult)
