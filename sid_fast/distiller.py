"""Distiller: SiD and SiDA as a Python object, for use without the command line."""

import copy
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from sid_fast.config.types import (
    PretrainSettings,
    Settings,
    SiDASettings,
    check,
    grad_accum_steps,
)
from sid_fast.data.datasets import Dataset
from sid_fast.data.feed import BlankFeed, ImageFeed
from sid_fast.errors import UserError
from sid_fast.io.digest import digest
from sid_fast.methods.base import Method
from sid_fast.methods.edm import EDM
from sid_fast.methods.sid import Draw, SiD
from sid_fast.methods.sida import SiDA, check_images
from sid_fast.models import Network, NetworkConfig
from sid_fast.performance import fsdp, mixed_precision
from sid_fast.training.step import Trainer


def blank_feed(
    network: NetworkConfig,
    settings: Settings | PretrainSettings,
    device: torch.device,
    kind: type[BlankFeed] = BlankFeed,
) -> BlankFeed | None:
    """Return made-up images for a trainer that only measures or tries steps; None for SiD."""
    if not isinstance(settings, SiDASettings | PretrainSettings):
        return None
    shape = network.channels, network.resolution, network.resolution
    return kind(settings.batch_size, shape, network.label_dim, device)


def data_free_method(
    net: Network, settings: Settings | PretrainSettings, kind: type[BlankFeed] = BlankFeed
) -> Method:
    """Make the method of the settings for steps that only measure or try.

    Args:
        net: The teacher; with PretrainSettings the network to train.
        settings: Of SiD, SiDA or EDM.
        kind: What takes the place of real images in SiDA and EDM.
    """
    feed = blank_feed(net.config, settings, next(net.parameters()).device, kind)
    if isinstance(settings, PretrainSettings):
        return EDM(net, settings, feed)
    if isinstance(settings, SiDASettings):
        return SiDA(net, settings, feed=feed)
    return SiD(net, settings)


class Distiller(Trainer):
    """Distils a teacher f_φ into a one-step generator G_θ, with the help of a fake score f_ψ.

    `generator`, `fake_score` and `ema`, the EMA of the generator, are modules initialised from the
    teacher; their state_dicts use upstream's names. SiDASettings make the method SiDA.

    Args:
        teacher: A network on the device to train on. It is frozen in place; with 16-bit precision,
            and for EDM2, a copy is used instead.
        settings: Training settings.
        seed: Determines every random number.
        label_weights: Relative class frequencies, [label_dim]; uniform if None, over the classes
            that the teacher was trained on.
        sharding: See Trainer.
        data: Real images for SiDA, or a feed of them; without, every step needs draws.
        generator: Network of the teacher's shape from which SiDA's generator and EMA start (SiD²A).
        cuda_graph: See Trainer.
        compile: See Trainer.
        channels_last: See Trainer.

    Raises:
        UserError: The settings, data or generator cannot be used.
    """

    def __init__(
        self,
        teacher: Network,
        settings: Settings,
        seed: int = 0,
        label_weights: torch.Tensor | None = None,
        sharding: fsdp.ShardingPlan | None = None,
        *,
        data: Dataset | ImageFeed | None = None,
        generator: Network | None = None,
        cuda_graph: bool | Literal["auto"] = False,
        compile: bool = False,
        channels_last: bool | None = None,
    ):
        check(settings)
        device = next(teacher.parameters()).device
        settings = mixed_precision.resolve_precision(settings, device)
        if label_weights is None and teacher.config.absent_classes:
            label_weights = torch.zeros(teacher.config.label_dim)
            label_weights[list(teacher.config.classes)] = 1
        fingerprint = {
            "teacher": digest(teacher.state_dict().values()),
            "label weights": None if label_weights is None else digest([label_weights]),
        }
        if teacher.compute_in_alters(mixed_precision.TYPES[settings.precision]):
            teacher = copy.deepcopy(teacher)
        sharding = sharding or fsdp.replicated()
        if isinstance(settings, SiDASettings):
            grad_accum_steps(settings, sharding.ranks)  # refuses before the images are read
            feed = data if isinstance(data, ImageFeed) else None
            if isinstance(data, Dataset):
                check_images(data, teacher.config)
                shares = sharding.rank, sharding.ranks
                feed = ImageFeed(data, settings.batch_size, seed, device, *shares)
            method: SiD = SiDA(teacher, settings, label_weights, feed, generator)
        elif data is not None or generator is not None:
            raise UserError("data and generator are of SiDA: give SiDASettings")
        else:
            method = SiD(teacher, settings, label_weights)
        super().__init__(
            method, settings, seed, sharding, fingerprint, cuda_graph=cuda_graph, compile=compile,
            channels_last=channels_last,
        )  # fmt: skip
        self.teacher = method.teacher
        self.generator, self.fake_score = method.generator, method.fake_score

    def step(self, draws: Mapping[str, Sequence[Draw]] | None = None) -> dict[str, torch.Tensor]:
        """Update the fake score, then the generator and its EMA.

        Args:
            draws: One Draw per micro-batch and phase, {"fake": […], "generator": […]}; sampled if
                None. While SiDA's generator rests (generator_start_kimg), its draws are ignored.

        Returns:
            Metrics of both phases as fake/NAME and generator/NAME; see AdamWithEMA.step.
        """
        return super().step(draws)

    def draw(self) -> dict[str, list[Draw]]:
        """Sample the random inputs of the next step: a function of (seed, step, rank)."""
        return self.sample_inputs()
