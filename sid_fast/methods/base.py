"""The interface of a training method: networks, and phases that each update one of them.

`training.step` turns any method into a training step. Methods contain no code for devices, ranks,
CUDA graphs, precision or optimisers.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

from sid_fast import kernels
from sid_fast.data import latents
from sid_fast.data.feed import ImageFeed
from sid_fast.data.images import to_float
from sid_fast.models import Network, NetworkConfig


class RandomStream:
    """Random numbers for n consecutive samples in one phase of one step.

    Every number is a pure function of (seed, step, phase, name, global sample index), so a sample's
    numbers do not depend on the micro-batch or the number of ranks.

    Args:
        counter: int64 [3] on the device, see kernels.random.
        phase: Name of the phase.
        n: Number of samples.

    Raises:
        ValueError: A name is drawn twice, which would repeat the same numbers.
    """

    def __init__(self, counter: torch.Tensor, phase: str, n: int):
        self.counter, self.phase, self.n = counter, phase, n
        self.drawn: set[int] = set()

    def uniform(self, name: str, *shape: int) -> torch.Tensor:
        """Draw from U[0, 1): float32 `[n, *shape]`."""
        return self._draw("uniform", name, shape)

    def normal(self, name: str, *shape: int) -> torch.Tensor:
        """Draw from N(0, 1): float32 `[n, *shape]`."""
        return self._draw("normal", name, shape)

    def _draw(self, kind: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        stream = stream_number(self.phase, kind, name)
        if stream in self.drawn:
            raise ValueError(f"{name} is drawn twice in phase {self.phase!r}: use another name")
        self.drawn.add(stream)
        return kernels.random(self.counter, stream, (self.n, *shape), kind)


def stream_number(*names: str) -> int:
    """Hash the names that identify a random stream to 32 bits."""
    return zlib.crc32("/".join(names).encode())


@dataclasses.dataclass(frozen=True)
class Phase:
    """One part of a step: minimises a loss over one network.

    The objective is loss_scale / batch_size · Σ loss over the valid samples of the batch. With
    terms, Σ loss becomes the sum of several fields, each times its own factor.

    Attributes:
        name: Prefix of the phase's metrics; "" for the only phase of a method.
        network: Key of the trained network. All others are frozen and in eval mode meanwhile.
        sample_inputs: Samples the inputs of rng.n samples.
        loss: Computes each sample's loss and validity from these inputs, as kernels.Losses or
            another NamedTuple with the fields loss and kept. It must mask non-finite
            samples before any network (losses.finite, losses.mask_invalid): inside one they would
            reach the gradient of every weight.
        lr: Learning rate as a function of the images seen so far.
        beta1: Adam's β₁.
        loss_scale: Constant factor of the loss.
        terms: The fields to be minimised and their factors, functions of the images seen so far;
            empty: loss alone.
        metrics: The fields whose means over the valid samples are reported.
        grad_clip: Limit of each gradient value; None: no limit.
        active: Whether a step that starts at so many images includes the phase. Otherwise network,
            optimizer and EMA stay as they are.
    """

    name: str
    network: str
    sample_inputs: Callable[[RandomStream], Any]
    loss: Callable[[Any], Any]  # kernels.Losses, or another NamedTuple with a field `kept`
    lr: Callable[[int], float]
    beta1: float = 0.0
    loss_scale: float = 1.0
    terms: Mapping[str, Callable[[int], float]] = dataclasses.field(default_factory=dict)
    metrics: tuple[str, ...] = ("loss", "distance")
    grad_clip: float | None = None
    active: Callable[[int], bool] = lambda images: True


class Method:
    """Base class of training methods.

    Attributes:
        networks: The trained networks, by name.
        frozen: Networks that are used but not trained, by name.
        averaged: Name of the network whose EMA is the result.
        phases: One per trained network, in the order in which a step runs them.
        progress: Metrics shown in the progress line, with their labels.
        fingerprint: Values that must match for a checkpoint to be resumed, besides settings and
            seed.
        feed: Real images for sample_inputs, or None. The trainer loads each step's images before
            the step.
    """

    networks: Mapping[str, Network]
    frozen: Mapping[str, Network]
    averaged: str
    phases: tuple[Phase, ...]
    progress: ClassVar[Mapping[str, str]]
    fingerprint: Mapping[str, Any]
    feed: ImageFeed | None = None

    def work(self, images: int) -> float:
        """Work of the first `images` images of a run, in images of an ordinary step."""
        return images


def one_hot_labels(
    rng: RandomStream, label_dim: int, cumulative: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Sample one-hot class labels, float32 [n, label_dim]; None if label_dim is 0.

    cumulative [label_dim]: running sum of the relative class frequencies, float64; uniform if None.
    """
    if not label_dim:
        return None
    u = rng.uniform("labels")
    if cumulative is None:
        classes = (u * label_dim).long().clamp_(max=label_dim - 1)
    else:
        classes = torch.searchsorted(cumulative[:-1], u * cumulative[-1], right=True)
    return torch.zeros(rng.n, label_dim, device=u.device).scatter_(1, classes[:, None], 1.0)


def real_images(feed: ImageFeed, rng: RandomStream) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Take rng.n real images of the staged step as a network sees them, and their labels.

    Latents are drawn from the VAE's posterior with noise of the stream "latents".

    Returns:
        Images in [−1, 1] or normalised latents, float32 [n, C, R, R]; labels as ImageFeed.take.
    """
    images, labels = feed.take(rng.counter, rng.n)
    if feed.normalization is None:
        return to_float(images), labels
    noise = None
    if feed.has_deviation:
        noise = rng.normal("latents", images.shape[1] // 2, *images.shape[2:])
    return latents.sample(images, noise, feed.normalization), labels


def noise_distribution(settings: Any, network: NetworkConfig) -> tuple[float, float]:
    """Return P_mean and P_std: those of the settings, else those of the network's family."""
    mean, std = network.training_noise
    return (
        mean if settings.p_mean is None else settings.p_mean,
        std if settings.p_std is None else settings.p_std,
    )
