"""--micro-batch auto: find the largest micro-batch that fits by trying steps."""

import copy
import dataclasses
import gc
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sid_fast import kernels
from sid_fast.config.types import PretrainSettings, micro_batches
from sid_fast.data.datasets import Dataset
from sid_fast.data.feed import fits, stored_bytes
from sid_fast.distiller import data_free_method
from sid_fast.errors import RunFailed, UserError, is_out_of_memory
from sid_fast.io.streams import note
from sid_fast.models import Network, NetworkConfig
from sid_fast.performance import fsdp, mixed_precision, process_group
from sid_fast.performance.activation_checkpoint import checkpoint_activations
from sid_fast.sampling import group_size
from sid_fast.tools import estimator, host_memory
from sid_fast.training.step import Trainer

# Beside the step, whose CUDA graph keeps its memory: the Inception network on a batch of images,
# and the VAE's decoder on a group of latents of 64x64.
DETECTOR = 2 * estimator.GIB
VAE = 6 * estimator.GIB


def reserved(
    network: NetworkConfig, config: Any, device: torch.device, data: Dataset | None = None
) -> int:
    """Bytes to leave for evaluations, decoded grids and a resident data set; see estimated."""
    nbytes = VAE if config.vae else 0
    if config.eval_every:
        images = group_size(torch.device("cuda"), network.resolution)
        nbytes = max(nbytes, DETECTOR) + host_memory.least_forward_bytes(network, images)
    if data and fits(data, device):
        nbytes += stored_bytes(data)
    return nbytes


def estimated(
    network: NetworkConfig,
    config: Any,
    settings: Any,
    device: torch.device,
    sharding: fsdp.ShardingPlan,
    data: Dataset | None = None,
) -> int:
    """Estimate the largest micro-batch for rank 0's GPU, before anything is allocated there.

    Counts what the chosen backends keep in memory, and leaves room for what is `reserved`.

    Args:
        network: of the teacher.
        config: the run's options (config.types.StepOptions and RunOptions).
        settings: of the run's method.
        device: of the run.
        sharding: layout of the networks over the ranks.
        data: that the steps train on; it may stay on the device.

    Raises:
        UserError: Not even the smallest micro-batch fits, or config.micro_batch needs more than the
            GPU's memory; the message gives the sizes and what would fit.
    """
    world = process_group.world_size()
    sizes = micro_batches(settings, world)
    resolved = mixed_precision.resolve_precision(settings, device)
    backends = kernels.dispatch.runs(device)
    counts = estimator.counts(network, resolved, config.checkpoint_activations, backends)
    layout = world, sharding.dp_shard, sharding.reshard_after_forward
    beside = reserved(network, config, device, data)
    free, total = (nbytes - beside for nbytes in torch.cuda.mem_get_info(device))
    upper = estimator.estimated_micro_batch(counts, sizes, free, *layout)
    upper = process_group.broadcast_from_rank0(lambda: upper)
    asked = config.micro_batch if isinstance(config.micro_batch, int) else sizes[-1]
    need = counts.memory(asked, *layout).total()
    if upper and need <= total:
        return upper
    way = f"--micro-batch {upper} fits" if upper else "use --checkpoint-activations or more GPUs"
    if not upper and world > 1 and sharding.dp_shard == 1:
        way = "use --parallel fsdp"
    raise UserError(
        f"micro_batch={asked} needs an estimated {need / estimator.GIB:.1f} GiB; {device} has "
        f"{free / estimator.GIB:.1f} GiB free of {total / estimator.GIB:.1f}: {way}, and "
        "python -m sid_fast.plan estimates any other GPU"
    )


def that_fits(
    net: Network, config: Any, settings: Any, upper: int, sharding: fsdp.ShardingPlan
) -> int:
    """The largest micro-batch that fits on every GPU, in images.

    Tries one step per size, from the start down, until one fits. With sharded networks nothing is
    tried: a rank that runs out of memory would leave the others waiting in a collective.

    Args:
        net: the teacher, or the network to train as one, on this rank's GPU; not changed.
        config: config.micro_batch is the resumed run's size, tried first; None: start from `upper`.
        settings: of the run's method.
        upper: the estimate to start from otherwise.
        sharding: layout of the networks over the ranks.
    """

    def try_step(n: int) -> None:
        if sharding.mesh is not None:
            return
        device = next(net.parameters()).device
        single = dataclasses.replace(settings, batch_size=n, micro_batch=n)
        resolved = mixed_precision.resolve_precision(single, device)
        # Held during the trial, so that evaluations find it free.
        nbytes = reserved(net.config, config, device) if device.type == "cuda" else 0
        ballast = torch.empty(nbytes, dtype=torch.uint8, device=device)
        # Trained itself, or a frozen teacher that the compute dtype would change.
        mine = isinstance(settings, PretrainSettings)
        mine |= net.compute_in_alters(mixed_precision.TYPES[resolved.precision])
        method = data_free_method(copy.deepcopy(net) if mine else net, resolved)
        trainer = Trainer(method, resolved, sharding=fsdp.SINGLE_PROCESS)
        if config.checkpoint_activations:
            checkpoint_activations(*method.frozen.values(), *method.networks.values())
        with trainer.updates_disabled():
            trainer.dry_run()
        del ballast

    def log(line: str) -> None:
        if process_group.rank() == 0:
            note(line, sys.stdout)

    sizes = micro_batches(settings, process_group.world_size())
    start = config.micro_batch if isinstance(config.micro_batch, int) else upper
    return largest_micro_batch(sizes, start, try_step, log)


def largest_micro_batch(
    sizes: Sequence[int], estimate: int, try_step: Callable[[int], None], log: Callable[[str], None]
) -> int:
    """The largest of `sizes`, at most `estimate`, whose step fits on every rank.

    A size that fails on one rank is given up on all, and the next smaller one is tried.

    Args:
        sizes: possible micro-batches, largest first; the first is a rank's whole batch.
        estimate: the first size to try, or the smallest of `sizes` if that is larger.
        try_step: runs a step of n images without collectives; raises an error that
            is_out_of_memory if they do not fit.
        log: prints a line.

    Raises:
        RunFailed: the smallest size does not fit.
    """
    for n in sizes:
        if n > max(estimate, sizes[-1]):
            continue
        if not process_group.all_reduce_any(_runs_out(try_step, n)):
            log(f"micro-batch: {n} of {sizes[0]} images per GPU, the largest that fits")
            return n
        log(f"micro-batch: {n} images do not fit, trying the next smaller size")
    raise RunFailed(
        f"out of GPU memory with a micro-batch of {sizes[-1]}: use --checkpoint-activations, more "
        "GPUs or larger ones; python -m sid_fast.plan estimates what each needs"
    )


def _runs_out(try_step: Callable[[int], None], n: int) -> bool:
    try:
        try_step(n)
        return False
    except RuntimeError as error:
        if is_out_of_memory(error):
            return True
        raise
    finally:
        gc.collect()
        torch.cuda.empty_cache()
