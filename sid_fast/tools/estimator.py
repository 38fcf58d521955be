"""FLOP, memory traffic and peak memory of a training step, counted on fake tensors.

The only memory model: `plan`, `--parallel auto` and `--micro-batch auto` all use it.
"""

import dataclasses
import functools
import gc
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from sid_fast.config.types import Settings, SiDASettings
from sid_fast.distiller import data_free_method
from sid_fast.methods.base import Method, RandomStream
from sid_fast.models import NetworkConfig
from sid_fast.models.families import build_network
from sid_fast.performance import fsdp, process_group
from sid_fast.performance.activation_checkpoint import checkpoint_activations
from sid_fast.tools import host_memory
from sid_fast.tools.host_memory import GIB
from sid_fast.tools.op_counter import Backends, Count, Op, fake, forward
from sid_fast.training.step import Trainer

ALLOWANCE = 2 * GIB  # CUDA context, cuDNN workspaces, allocator fragmentation
# Cost of a step per image by method, in forward passes (a backward is 2, without weight gradients
# 1). SiD: fake score step G 1, ψ 3; generator step G 3, φ 2, ψ 2. SiDA adds 3 of the encoder.
FORWARDS = {"sid": 11, "sida": 12, "edm": 3}
# Micro-batches of a count: with fewer images the peak may lie elsewhere, such as in the update.
COUNTED = 16, 32
LATE = 10**15  # images seen, after every warm-up
SHARDED = ("weights", "gradients", "optimiser", "average")  # kinds that fsdp always shards


@dataclasses.dataclass(frozen=True)
class Step:
    """A counted step of one micro-batch: its images, operations, and peak bytes by kind."""

    images: int
    ops: list[Op]
    peak: Counter[str]


def steps(
    network: NetworkConfig,
    settings: Settings,
    micro_batches: Iterable[int],
    backends: Backends = "triton",
    prepare: Callable[..., None] = lambda *nets: None,
    images: int = LATE,
) -> list[Step]:
    """Count one SiD or SiDA step of a single micro-batch, for each micro-batch size.

    Args:
        network: of the teacher.
        settings: SiDASettings count SiDA; batch_size, micro_batch and adversarial_group are
            ignored.
        micro_batches: numbers of images.
        backends: see op_counter.fake.
        prepare: called with teacher, generator and fake score before the first step.
        images: images seen before the step.
    """
    counted = []
    with fake(backends), Count() as count:
        trainer = _trainer(lambda s: data_free_method(build_network(network), s), settings)
        prepare(*trainer.method.frozen.values(), *trainer.method.networks.values())
        gc.collect()  # frees the float32 teacher if a low-precision copy replaced it
        for kind, tensors in _resident(trainer).items():
            count.set_kind(kind, *tensors)
        for n in micro_batches:
            count.ops, count.peak = [], Counter()
            inputs = {
                phase.name: [phase.sample_inputs(RandomStream(trainer.counter, phase.name, n))]
                for phase in trainer.method.phases
            }
            trainer.images = images
            trainer.step(inputs)
            counted.append(Step(n, count.ops, count.peak))
    return counted


def _trainer(make: Callable[[Any], Method], settings: Any) -> Trainer:
    # tf32 uses the memory and FLOP of fp32; auto is bf16 on every card of gpu_specs.
    precision = {"tf32": "fp32", "auto": "bf16"}.get(settings.precision, settings.precision)
    settings = dataclasses.replace(settings, batch_size=1, micro_batch=None, precision=precision)
    if isinstance(settings, SiDASettings):
        settings = dataclasses.replace(settings, adversarial_group=1)
    method = make(settings)
    for net in (*method.networks.values(), *method.frozen.values()):
        for p in net.parameters():
            if p.dim() == 4:  # Trainer's memory format on a GPU
                p.data = p.data.contiguous(memory_format=torch.channels_last)
    return Trainer(method, settings, sharding=fsdp.SINGLE_PROCESS)


def _resident(trainer: Trainer) -> dict[str, list[torch.Tensor]]:
    """Tensors that live from step to step, by kind.

    Taken from the modules, since a state_dict holds copies of reordered rows.
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
        "average": tensors(*trainer.emas),
        "copies": [leaf.tensor for o in optimizers for leaf in o.net.compute_copies],
    }


class StateMemory:
    """Memory of a method's training state, without activations; counted on first use.

    Args:
        make: builds the method from settings; called under fake tensors.
        settings: of the run.
        backends: see op_counter.fake.
    """

    def __init__(self, make: Callable[[Any], Method], settings: Any, backends: Backends = "triton"):
        self.make, self.settings, self.backends = make, settings, backends

    @functools.cached_property
    def resident(self) -> Counter[str]:
        """Bytes by kind on one GPU, unsharded."""
        with fake(self.backends):
            by_kind = _resident(_trainer(self.make, self.settings))
        sizes: Counter[str] = Counter()
        seen = set()
        for kind, tensors in by_kind.items():
            for storage in (v.untyped_storage() for v in tensors):
                if storage._cdata not in seen:  # count views of one tensor once
                    seen.add(storage._cdata)
                    sizes[kind] += storage.nbytes()
        return sizes

    def nbytes(self, shards: int = 1, reshard_after_forward: bool = False) -> int:
        """Bytes per GPU over `shards` shards; see sharded()."""
        return sharded(self.resident, shards, reshard_after_forward).total()


def sharded(
    resident: Counter[str], shards: int, reshard_after_forward: bool = False
) -> Counter[str]:
    """Bytes by kind that each GPU keeps when the resident tensors are sharded.

    Args:
        resident: bytes by kind, unsharded.
        shards: number of GPUs per replica.
        reshard_after_forward: weights are gathered block by block. Otherwise each GPU keeps all
            weights that it computes with, the teacher's included.
    """
    per_gpu = Counter(resident)
    if shards == 1 and not reshard_after_forward:
        return per_gpu
    for kind in SHARDED:
        per_gpu[kind] //= shards
    if reshard_after_forward:
        per_gpu["teacher"] //= shards
        per_gpu["copies"] = 0
    elif not resident["copies"]:
        per_gpu["gathered"] = resident["weights"]
    return per_gpu


@dataclasses.dataclass(frozen=True)
class Counts:
    """Counts of a step, from which memory() extrapolates.

    Attributes:
        resident: bytes by kind that do not depend on the micro-batch.
        image: bytes by kind that each image of the micro-batch adds.
        flop: FLOP of a step per image.
        fake_flop: of a step of SiDA's warm-up, in which the fake score alone learns; 0 for SiD.
        forward: FLOP of one forward pass of one image.
        parameters: of one network.
        backends: see op_counter.fake.
    """

    resident: Counter[str]
    image: Counter[str]
    flop: float
    forward: float
    parameters: int
    backends: Backends
    fake_flop: float = 0.0

    def memory(
        self, images: int, gpus: int = 1, shards: int = 1, reshard_after_forward: bool = False
    ) -> Counter[str]:
        """Peak bytes by kind on each of `gpus` GPUs, at a micro-batch of `images`.

        shards, reshard_after_forward: see sharded().
        """
        peak = sharded(self.resident, shards, reshard_after_forward)
        for kind, nbytes in self.image.items():
            peak[kind] += images * nbytes
        if gpus > 1:
            peak["reduction"] = self.resident["gradients"] // 2  # one network at a time
        peak["allowance"] = ALLOWANCE
        return peak


def counts(
    network: NetworkConfig,
    settings: Settings,
    recompute: bool = False,
    backends: Backends = "triton",
) -> Counts:
    """Count a step for each of COUNTED images; from there on, memory is linear in the images.

    Args:
        network: of the teacher.
        settings: of the run.
        recompute: with --checkpoint-activations.
        backends: see op_counter.fake.
    """
    prepare = checkpoint_activations if recompute else lambda *nets: None
    less, more = steps(network, settings, COUNTED, backends, prepare)
    fake_flop = 0.0
    if isinstance(settings, SiDASettings):
        (warmup,) = steps(network, settings, [1], backends, prepare, images=0)
        fake_flop = sum(op.flops for op in warmup.ops)
    kinds, extra = {*less.peak, *more.peak}, more.images - less.images
    image = Counter({kind: (more.peak[kind] - less.peak[kind]) // extra for kind in kinds})
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_network(network).parameters())
    return Counts(
        resident=Counter({kind: less.peak[kind] - less.images * image[kind] for kind in kinds}),
        image=image,
        flop=sum(op.flops for op in more.ops) / more.images,
        forward=sum(op.flops for op in forward(network)),
        parameters=parameters,
        backends=backends,
        fake_flop=fake_flop,
    )


def least_bytes(network: NetworkConfig, micro_batch: int, recompute: bool = False) -> int:
    """A lower bound of the bytes that a training step takes, from the configuration alone.

    Counts float32 weights, gradients, Adam's second moments and EMA of the 3x3 convolutions, and
    six feature maps per residual block, or its input alone with --checkpoint-activations
    (`recompute`). The decoder has one block more per level than the encoder.
    """
    weights = maps = 0
    for level, multiplier in enumerate(network.channel_mult):
        channels = network.model_channels * multiplier
        blocks = 2 * network.num_blocks + 1
        weights += blocks * 2 * 9 * channels**2
        maps += blocks * (1 if recompute else 6) * channels * (network.resolution >> level) ** 2
    return 4 * (4 * weights + micro_batch * maps)


def require_host_memory(network: NetworkConfig, settings: Any, device: torch.device) -> None:
    """Raise UserError, before anything is allocated, for a CPU run that cannot fit in memory."""
    if device.type == "cpu":
        batch, ranks = settings.batch_size, process_group.launch().world_size
        micro = settings.micro_batch if isinstance(settings.micro_batch, int) else batch // ranks
        host_memory.require(
            least_bytes(network, micro, getattr(settings, "checkpoint_activations", False)),
            f"a step of {micro} images of a {network} network",
            "use a smaller --micro-batch, --batch-size or network",
        )


def estimated_micro_batch(
    counts: Counts,
    sizes: Sequence[int],
    available: float,
    gpus: int,
    shards: int,
    reshard_after_forward: bool = False,
) -> int:
    """The largest of `sizes` that is estimated to fit; 0 if none does.

    Args:
        counts: of a step.
        sizes: possible micro-batches, largest first.
        available: bytes of GPU memory.
        gpus: number of GPUs.
        shards: GPUs per replica.
        reshard_after_forward: see sharded().
    """

    def fits(n: int) -> bool:
        return counts.memory(n, gpus, shards, reshard_after_forward).total() <= available

    return next(filter(fits, sizes), 0)
