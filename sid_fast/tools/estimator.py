"""What a step takes: FLOP, bytes and memory, counted on tensors without values.

The one memory model, behind `plan`, `--parallel auto` and every choice of a micro-batch.
"""

import dataclasses
import functools
import gc
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch

from sid_fast.config.types import Settings, divisors
from sid_fast.methods.base import Method, RandomStream
from sid_fast.methods.sid import SiD
from sid_fast.models import EDMNetwork, NetworkConfig
from sid_fast.performance import fsdp
from sid_fast.performance.activation_checkpoint import checkpoint_activations
from sid_fast.tools.op_counter import Backends, Count, Op, fake
from sid_fast.training.step import Trainer

GIB = 2**30
ALLOWANCE = 2 * GIB  # CUDA context, cuDNN's workspace and what the allocator cannot use
# The forwards an image of an iteration costs: fake step G 1, ψ 3; generator step G 3, φ 2, ψ 2.
FORWARDS = 11
SHARDED = ("weights", "gradients", "optimiser", "average")  # under fsdp, a part on every GPU


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of one round of `images`: its operations, and bytes by kind at the peak."""

    images: int
    ops: list[Op]
    peak: Counter[str]


def steps(
    network: NetworkConfig,
    settings: Settings,
    rounds: Iterable[int],
    backends: Backends = "triton",
    prepare: Callable[..., None] = lambda *nets: None,
) -> list[Step]:
    """Count a step of SiD for every number of images a round.

    settings: their batch and micro-batch do not matter. backend: of the kernels, "triton" or
    "eager". prepare: called with teacher, generator and fake score before the first step.
    """
    found = []
    with fake(backends), Count() as count:
        trainer = _trainer(lambda s: SiD(EDMNetwork(network), s), settings)
        prepare(*trainer.method.frozen.values(), *trainer.method.networks.values())
        gc.collect()  # the float32 teacher, where a copy in another type has taken its place
        for kind, tensors in _resident(trainer).items():
            count.call(kind, *tensors)
        for n in rounds:
            count.ops, count.peak = [], Counter()
            inputs = {
                phase.name: [phase.sample_inputs(RandomStream(trainer.counter, phase.name, n))]
                for phase in trainer.method.phases
            }
            trainer.step(inputs)
            found.append(Step(n, count.ops, count.peak))
    return found


def _trainer(make: Callable[[Any], Method], settings: Any) -> Trainer:
    # tf32 is fp32 on another unit; auto comes to bf16 on every GPU that is known here.
    kind = {"tf32": "fp32", "auto": "bf16"}.get(settings.precision, settings.precision)
    settings = dataclasses.replace(settings, batch_size=1, micro_batch=None, precision=kind)
    method = make(settings)
    for net in (*method.networks.values(), *method.frozen.values()):
        for p in net.parameters():
            if p.dim() == 4:  # as Trainer lays out weights on a GPU
                p.data = p.data.contiguous(memory_format=torch.channels_last)
    return Trainer(method, settings, sharding=fsdp.SINGLE_PROCESS)


def _resident(trainer: Trainer) -> dict[str, list[torch.Tensor]]:
    """What stays from step to step, by kind.

    The modules' own tensors: a state_dict holds copies of reordered rows.
    """

    def tensors(*nets: torch.nn.Module) -> list[torch.Tensor]:
        return [v for net in nets for v in (*net.parameters(), *net.buffers())]

    optimizers, frozen = trainer.optimizers.values(), trainer.method.frozen.values()
    return {
        "teacher": tensors(*frozen)
        + [leaf.tensor for net in frozen for leaf in net.compute_copies],
        "weights": tensors(*(o.net for o in optimizers)),
        "gradients": [p.grad for o in optimizers for p in o.params if p.grad is not None],
        "optimiser": [v for o in optimizers for v in (*o.exp_avg, *o.exp_avg_sq)],
        "average": tensors(trainer.ema),
        "copies": [leaf.tensor for o in optimizers for leaf in o.net.compute_copies],
    }


class StateMemory:
    """What the training of a method keeps of one GPU from step to step, counted once.

    make: the method for given settings, called on tensors without values.
    """

    def __init__(self, make: Callable[[Any], Method], settings: Any, backends: Backends = "triton"):
        self.make, self.settings, self.backends = make, settings, backends

    @functools.cached_property
    def stays(self) -> Counter[str]:
        with fake(self.backends):
            found = _resident(_trainer(self.make, self.settings))
        sizes: Counter[str] = Counter()
        seen = set()
        for kind, tensors in found.items():
            for storage in (v.untyped_storage() for v in tensors):
                if storage._cdata not in seen:  # views of one tensor count once
                    seen.add(storage._cdata)
                    sizes[kind] += storage.nbytes()
        return sizes

    def nbytes(self, shards: int = 1, reshard_after_forward: bool = False) -> int:
        """In so many shards; see sharded()."""
        return sharded(self.stays, shards, reshard_after_forward).total()


def sharded(stays: Counter[str], shards: int, reshard_after_forward: bool = False) -> Counter[str]:
    """What of it a GPU keeps in so many shards.

    reshard_after_forward: weights are gathered block by block. Otherwise each GPU keeps all of the
    weights that it computes with, the teacher's too.
    """
    found = Counter(stays)
    if shards == 1 and not reshard_after_forward:
        return found
    for kind in SHARDED:
        found[kind] //= shards
    if reshard_after_forward:
        found["teacher"] //= shards
        found["copies"] = 0
    elif not stays["copies"]:
        found["gathered"] = stays["weights"]
    return found


@dataclasses.dataclass(frozen=True)
class Counts:
    """What is counted of a step: bytes that stay and that an image adds, by kind; FLOP an image.

    forward: FLOP of one forward of one image; parameters: of one network; backends: see
    op_counter.fake.
    """

    stays: Counter[str]
    image: Counter[str]
    flop: float
    forward: float
    parameters: int
    backends: Backends

    def memory(
        self, images: int, gpus: int = 1, shards: int = 1, reshard_after_forward: bool = False
    ) -> Counter[str]:
        """Bytes by kind on one of so many GPUs, at the peak of a micro-batch of `images`.

        shards, reshard_after_forward: see sharded().
        """
        found = sharded(self.stays, shards, reshard_after_forward)
        for kind, nbytes in self.image.items():
            found[kind] += images * nbytes
        if gpus > 1:
            found["reduction"] = self.stays["gradients"] // 2  # of one network at a time
        found["allowance"] = ALLOWANCE
        return found


def counts(
    network: NetworkConfig,
    settings: Settings,
    recompute: bool = False,
    backends: Backends = "triton",
) -> Counts:
    """Count a step at one image and at two; memory is linear in them.

    recompute: with --checkpoint-activations; backends: see op_counter.fake.
    """
    prepare = {"prepare": checkpoint_activations} if recompute else {}
    forwards = FORWARDS + 4 * recompute  # of ψ, and of G, φ and ψ, once more
    one, two = steps(network, settings, [1, 2], backends, **prepare)
    kinds = {*one.peak, *two.peak}
    image = Counter({kind: two.peak[kind] - one.peak[kind] for kind in kinds})
    with torch.device("meta"):
        parameters = sum(p.numel() for p in EDMNetwork(network).parameters())
    return Counts(
        stays=Counter({kind: one.peak[kind] - image[kind] for kind in kinds}),
        image=image,
        flop=(flop := sum(op.flops for op in two.ops) / 2),
        forward=flop / forwards,
        parameters=parameters,
        backends=backends,
    )


def estimated_micro_batch(
    found: Counts,
    batch: int,
    room: float,
    gpus: int,
    shards: int,
    reshard_after_forward: bool = False,
) -> int:
    """The largest divisor of `batch`, images a GPU, that fits into room bytes; 0: not even one."""

    def fits(n: int) -> bool:
        return found.memory(n, gpus, shards, reshard_after_forward).total() <= room

    fitting = filter(fits, divisors(batch))
    return next(fitting, 0)
