"""Network configurations: architectures, sizes and their validation."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from sid_fast.errors import UserError
from sid_fast.io.untrusted import brief

if TYPE_CHECKING:
    from typing import Self  # of Python 3.11

_MAX_BLOCKS = 256  # of the encoder, in all; EDM's largest network has 16


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The differences between DDPM++, NCSN++ and ADM (arXiv 2206.00364, appendix F.2)."""

    embedding: str  # noise-level embedding: positional or fourier
    embedding_width: int  # width of that embedding, in units of model_channels
    swap_embedding: bool  # [cos, sin] -> [sin, cos]
    filter: tuple[int, ...]  # resampling filter along one axis
    residual_encoder: bool  # adds a downsampled path from the image at each level
    adaptive_scale: bool  # the embedding scales and shifts norm1's output; else it is added before
    head_channels: int | None  # channels per attention head; None: a single head
    skip_scale: float
    eps: float
    resample_proj: bool  # resampling skips always have a 1x1 convolution
    attention_everywhere: bool  # in all decoder blocks of an attention level, not only the last

    # The corresponding arguments in upstream's pickles.
    model_type: str
    embedding_type: str | None
    encoder_type: str | None


ARCHITECTURES = {
    "ddpmpp": Architecture(
        embedding="positional", embedding_width=1, swap_embedding=True, filter=(1, 1),
        residual_encoder=False, adaptive_scale=False, head_channels=None, skip_scale=0.5**0.5,
        eps=1e-6, resample_proj=True, attention_everywhere=False,
        model_type="SongUNet", embedding_type="positional", encoder_type="standard",
    ),
    "ncsnpp": Architecture(
        embedding="fourier", embedding_width=2, swap_embedding=True, filter=(1, 3, 3, 1),
        residual_encoder=True, adaptive_scale=False, head_channels=None, skip_scale=0.5**0.5,
        eps=1e-6, resample_proj=True, attention_everywhere=False,
        model_type="SongUNet", embedding_type="fourier", encoder_type="residual",
    ),
    "adm": Architecture(
        embedding="positional", embedding_width=1, swap_embedding=False, filter=(1, 1),
        residual_encoder=False, adaptive_scale=True, head_channels=64, skip_scale=1.0,
        eps=1e-5, resample_proj=False, attention_everywhere=True,
        model_type="DhariwalUNet", embedding_type=None, encoder_type=None,
    ),
}  # fmt: skip


# Upstream's arguments that do not change what a network computes from an input: a runtime setting,
# and what matters in training or bounds the sampler's noise levels.
_NOT_IN_NETWORK = ("use_fp16", "sigma_min", "sigma_max", "label_dropout")


def groups_of(channels: int) -> int:
    """Return the number of GroupNorm groups: 32, or fewer to keep four channels in each."""
    return min(32, channels // 4)


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """Everything needed to build a network; stored with its weights.

    Raises:
        UserError: A field is out of range or does not fit the others.
    """

    architecture: str  # ddpmpp, ncsnpp or adm
    resolution: int  # pixels per side
    channels: int = 3  # image channels
    label_dim: int = 0  # number of classes; 0: unconditional
    augment_dim: int = 0  # length of an augmentation label; 0: none
    model_channels: int = 128
    channel_mult: tuple[int, ...] = (2, 2, 2)  # width of each level, in units of model_channels
    num_blocks: int = 4  # residual blocks per level
    attention_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.0
    sigma_data: float = 0.5
    init_sigma: float | None = None  # noise level of a one-step generator; None: a denoiser
    absent_classes: tuple[int, ...] = ()  # classes without training images, ascending: not drawn

    architectures: ClassVar = tuple(ARCHITECTURES)  # of the family

    def __post_init__(self) -> None:
        if self.architecture not in self.architectures:
            self._refuse("architecture", f"use one of {', '.join(self.architectures)}")
        limits = {
            "resolution": (1, 4096),
            "channels": (1, 64),
            "label_dim": (0, 100_000),
            "augment_dim": (0, 1000),
            "model_channels": (4, 4096),
            "num_blocks": (1, 64),
        }
        for field, (low, high) in limits.items():
            value = getattr(self, field)
            if type(value) is not int or not low <= value <= high:
                self._refuse(field, f"use an integer from {low} to {high}")
        for field, low in (("channel_mult", 1), ("attention_resolutions", 0)):
            values = getattr(self, field)
            if (
                not isinstance(values, tuple)
                or len(values) > 64
                or any(type(v) is not int or not low <= v <= 4096 for v in values)
            ):
                self._refuse(field, f"use a list of at most 64 integers from {low} to 4096")
        if not 1 <= len(self.channel_mult) <= 12:
            self._refuse("channel_mult", "use a list of 1 to 12 multipliers, one per level")
        if self.num_blocks * len(self.channel_mult) > _MAX_BLOCKS:
            levels = len(self.channel_mult)
            self._refuse("num_blocks", f"{levels} levels may have {_MAX_BLOCKS} blocks in all")
        numbers = {"dropout": (0, 0.999), "sigma_data": (1e-3, 1e3), "init_sigma": (1e-3, 1e3)}
        for field, (least, most) in numbers.items():
            value = getattr(self, field)
            if field == "init_sigma" and value is None:
                continue
            if type(value) not in (int, float) or not least <= value <= most:
                self._refuse(field, f"use a number from {least} to {most}")
        absent = self.absent_classes
        if not isinstance(absent, tuple) or any(type(c) is not int for c in absent):
            self._refuse("absent_classes", "use a list of class numbers")
        if absent and not (
            len(absent) < self.label_dim
            and all(a < b for a, b in itertools.pairwise((-1, *absent, self.label_dim)))
        ):
            self._refuse("absent_classes", f"use ascending classes below {self.label_dim}, not all")
        smallest = 2 ** (len(self.channel_mult) - 1)
        if self.resolution % smallest:
            levels = len(self.channel_mult)
            self._refuse("resolution", f"{levels} levels need a multiple of {smallest}")
        if self.model_channels % 4:
            self._refuse("model_channels", "the embedding and GroupNorm need a multiple of 4")
        head = self.head_channels
        for level, mult in enumerate(self.channel_mult):
            attends = (self.resolution >> level) in self.attention_resolutions
            attends |= level == len(self.channel_mult) - 1
            width = self.model_channels * mult
            if head and attends and width % head:
                self._refuse(
                    "model_channels",
                    f"attention over {width} channels cannot be split into heads of {head}",
                )

    def _refuse(self, field: str, why: str) -> None:
        value = brief(getattr(self, field))
        raise UserError(f"network: {field}={value} is not supported: {why}")

    @property
    def head_channels(self) -> int | None:
        """Channels per attention head; None: a single head."""
        return ARCHITECTURES[self.architecture].head_channels

    @property
    def operations(self) -> frozenset[str]:
        """The operations of sid_fast.kernels that a network of this configuration can use."""
        fusible = ARCHITECTURES[self.architecture].filter == (1, 1)
        return frozenset(["group_norm", "attention", *["block"] * fusible])

    @property
    def training_noise(self) -> tuple[float, float]:
        """P_mean and P_std of the family's training, ln σ ~ N(P_mean, P_std²)."""
        return -1.2, 1.2

    @property
    def has_log_variance(self) -> bool:
        """Whether the network has a log-variance head (EDM2)."""
        return False

    @property
    def is_latent(self) -> bool:
        """Whether the network makes latents, which an autoencoder turns into images."""
        return False

    def __str__(self) -> str:
        classes = f"{self.label_dim} classes" if self.label_dim else "unconditional"
        return f"{self.architecture}, {self.resolution}x{self.resolution}, {classes}"

    @property
    def classes(self) -> Sequence[int]:
        """The class numbers to draw from, ascending; empty for an unconditional network."""
        if not self.absent_classes:
            return range(self.label_dim)
        return sorted(set(range(self.label_dim)) - set(self.absent_classes))

    def with_classes(self, classes: Sequence[int]) -> "NetworkConfig":
        """Return a copy that draws from these classes; without any, this configuration."""
        if not classes:
            return self
        absent = tuple(sorted(set(range(self.label_dim)) - set(classes)))
        return dataclasses.replace(self, absent_classes=absent)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary for JSON; absent_classes only where there are any."""
        values = dataclasses.asdict(self)
        if not self.absent_classes:  # versions without this field read the file, too
            del values["absent_classes"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Self":
        """Rebuild a configuration from to_dict's dictionary, possibly after a JSON round trip."""
        if not isinstance(values, dict):
            raise UserError(f"network: {brief(values)} is not a configuration")
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UserError(
                f"network: unknown field {brief(unknown[0])}; written by a newer version?"
            )
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        try:
            return cls(**fields)
        except TypeError as error:
            raise UserError(f"network: invalid configuration: {error}") from None

    @classmethod
    def from_published(cls, class_name: str, kwargs: dict[str, Any]) -> "NetworkConfig":
        """Convert upstream's class name and constructor arguments, as stored in a pickle.

        Missing arguments take upstream's defaults for the architecture.
        """
        if class_name != "EDMPrecond":
            raise UserError(
                f"network: {brief(class_name)} preconditioning is not supported; EDMPrecond is"
            )
        kwargs = dict(kwargs)
        model_type = kwargs.pop("model_type", "DhariwalUNet")
        song = model_type == "SongUNet"
        types = {
            "embedding_type": kwargs.pop("embedding_type", "positional") if song else None,
            "encoder_type": kwargs.pop("encoder_type", "standard") if song else None,
        }
        matches = [
            name
            for name, a in ARCHITECTURES.items()
            if (a.model_type, a.embedding_type, a.encoder_type) == (model_type, *types.values())
        ]
        if not matches:
            raise UserError(
                f"network: no architecture has model_type={brief(model_type)} with "
                f"{', '.join(f'{k}={brief(v)}' for k, v in types.items())}; "
                f"supported are {', '.join(ARCHITECTURES)}"
            )
        architecture = ARCHITECTURES[matches[0]]
        for field in _NOT_IN_NETWORK:
            kwargs.pop(field, None)
        fixed: dict[str, Any] = {
            "channel_mult_emb": 4,
        }
        if song:
            fixed |= {
                "decoder_type": "standard",
                "channel_mult_noise": architecture.embedding_width,
                "resample_filter": list(architecture.filter),
            }
        for field, only in fixed.items():
            value = kwargs.pop(field, only)
            if value != only:
                raise UserError(f"network: {field}={brief(value)} is not supported; {only!r} is")
        names = {
            "img_resolution": "resolution",
            "img_channels": "channels",
            "label_dim": "label_dim",
            "augment_dim": "augment_dim",
            "model_channels": "model_channels",
            "channel_mult": "channel_mult",
            "num_blocks": "num_blocks",
            "attn_resolutions": "attention_resolutions",
            "dropout": "dropout",
            "sigma_data": "sigma_data",
            "init_sigma": "init_sigma",  # of our own pickles, as is the next
            "absent_classes": "absent_classes",
        }
        if unknown := sorted(set(kwargs) - set(names)):
            field = unknown[0]
            raise UserError(f"network: {field[:60]}={brief(kwargs[field])} is not supported")
        defaults = (
            dict(model_channels=128, channel_mult=[1, 2, 2, 2], num_blocks=4, attn_resolutions=[16])
            if song
            else dict(
                model_channels=192,
                channel_mult=[1, 2, 3, 4],
                num_blocks=3,
                attn_resolutions=[32, 16, 8],
            )
        ) | {"dropout": 0.1}
        values = {names[k]: v for k, v in (defaults | kwargs).items()}
        return cls.from_dict({"architecture": matches[0], **values})

    def to_published(self) -> dict[str, Any]:
        """Return upstream's constructor arguments of class EDMPrecond; see from_published."""
        architecture = ARCHITECTURES[self.architecture]
        arguments: dict[str, Any] = {
            "img_resolution": self.resolution,
            "img_channels": self.channels,
            "label_dim": self.label_dim,
            "augment_dim": self.augment_dim,
            "sigma_data": self.sigma_data,
            "model_type": architecture.model_type,
            "model_channels": self.model_channels,
            "channel_mult": list(self.channel_mult),
            "num_blocks": self.num_blocks,
            "attn_resolutions": list(self.attention_resolutions),
            "dropout": self.dropout,
        }
        if architecture.model_type == "SongUNet":
            arguments |= {
                "embedding_type": architecture.embedding_type,
                "encoder_type": architecture.encoder_type,
                "decoder_type": "standard",
                "channel_mult_noise": architecture.embedding_width,
                "resample_filter": list(architecture.filter),
            }
        if self.init_sigma is not None:
            arguments["init_sigma"] = self.init_sigma
        if self.absent_classes:
            arguments["absent_classes"] = list(self.absent_classes)
        return arguments
