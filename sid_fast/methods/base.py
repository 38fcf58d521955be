"""What a method consists of: networks, and phases that each update one of them.

`training.step` turns any method into a training step. A method says nothing about devices, ranks,
graphs, precision or optimisers.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

from sid_fast import kernels
from sid_fast.kernels import Losses
from sid_fast.models import EDMNetwork


class RandomStream:
    """The random numbers of n consecutive samples in one phase of one step.

    Every number is a function of (seed, step, phase, name, global index of the sample), so the same
    sample gets the same numbers whatever the micro-batch and the number of ranks. counter: see
    kernels.random; host_counter: the same on the CPU. ValueError for a name that is drawn twice,
    which would give the same numbers again.
    """

    def __init__(
        self,
        counter: torch.Tensor,
        phase: str,
        n: int,
        host_counter: torch.Tensor | None = None,
    ):
        self.counter, self.phase, self.n, self.host_counter = counter, phase, n, host_counter
        self.drawn: set[int] = set()

    def on_host(self) -> "RandomStream":
        """The same numbers on the CPU, for what the host has to know, without a wait."""
        counter = self.counter if self.host_counter is None else self.host_counter
        return RandomStream(counter.cpu(), self.phase, self.n)

    def uniform(self, name: str, *shape: int) -> torch.Tensor:
        """U[0, 1), float32 [n, *shape]."""
        return self._draw("uniform", name, shape)

    def normal(self, name: str, *shape: int) -> torch.Tensor:
        """N(0, 1), float32 [n, *shape]."""
        return self._draw("normal", name, shape)

    def _draw(self, kind: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        stream = stream_number(self.phase, kind, name)
        if stream in self.drawn:
            raise ValueError(f"{name} is drawn twice in phase {self.phase!r}: give it another name")
        self.drawn.add(stream)
        return kernels.random(self.counter, stream, (self.n, *shape), kind)


def stream_number(*names: str) -> int:
    """A 32-bit number for what random numbers are used for."""
    return zlib.crc32("/".join(names).encode())


@dataclasses.dataclass(frozen=True)
class Phase:
    """The part of a step that updates one network.

    name: prefix of its metrics, or "" in a method of a single phase. network: the key of the one
    that learns, in training mode; all others are frozen and in eval mode meanwhile.
    sample_inputs(rng) draws the inputs of rng.n samples. loss(inputs) gives each sample's loss, and
    which samples are valid; a loss keeps what is not finite out of the networks (losses.finite,
    losses.keep), where it would reach every weight's gradient. The sum over the valid samples,
    times loss_scale / batch size, is minimised. lr(images) is the learning rate after so many
    images; beta1 is Adam's.
    """

    name: str
    network: str
    sample_inputs: Callable[[RandomStream], Any]
    loss: Callable[[Any], Losses]
    lr: Callable[[int], float]
    beta1: float = 0.0
    loss_scale: float = 1.0


class Method:
    """networks: those that learn, by name. frozen: those that do not. averaged: the name of the

    network whose moving average is the result. phases: in the order in which a step takes them.
    progress: metrics of the progress line, and their labels there. fingerprint: what must be equal
    for a training state to fit, besides settings and seed.
    """

    networks: Mapping[str, EDMNetwork]
    frozen: Mapping[str, EDMNetwork]
    averaged: str
    phases: tuple[Phase, ...]
    progress: ClassVar[Mapping[str, str]]
    fingerprint: Mapping[str, Any]


def one_hot_labels(
    rng: RandomStream, label_dim: int, weights: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Class labels, uniform or in proportion to weights [label_dim]: float32 [n, label_dim].

    None where label_dim is 0.
    """
    if not label_dim:
        return None
    u = rng.uniform("labels")
    if weights is None:
        classes = (u * label_dim).long().clamp_(max=label_dim - 1)
    else:
        shares = weights.double().cumsum(0)
        classes = torch.searchsorted(shares[:-1], u * shares[-1], right=True)
    return torch.zeros(rng.n, label_dim, device=u.device).scatter_(1, classes[:, None], 1.0)
