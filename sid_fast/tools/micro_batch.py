"""--micro-batch auto: find the largest micro-batch that fits by trying steps."""

import gc
from collections.abc import Callable, Sequence

import torch

from sid_fast.errors import RunFailed
from sid_fast.performance import process_group


def largest_micro_batch(
    sizes: Sequence[int], estimate: int, try_step: Callable[[int], None], log: Callable[[str], None]
) -> int:
    """The largest of `sizes`, at most `estimate`, whose step fits on every rank.

    A size that fails on one rank is given up on all, and the next smaller one is tried.

    Args:
        sizes: possible micro-batches, largest first; the first is a rank's whole batch.
        estimate: the first size to try, or the smallest of `sizes` if that is larger.
        try_step: runs a step of n images without collectives; raises torch.OutOfMemoryError if
            they do not fit.
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
    except torch.OutOfMemoryError:
        return True
    finally:
        gc.collect()
        torch.cuda.empty_cache()
