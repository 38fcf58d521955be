"""How many images a round: the most that fit, by trying."""

import gc
from collections.abc import Callable

import torch

from sid_fast.config.types import divisors
from sid_fast.errors import RunFailed
from sid_fast.performance import process_group


def largest_micro_batch(
    batch: int, estimate: int, try_step: Callable[[int], None], say: Callable[[str], None]
) -> int:
    """The largest divisor of `batch`, no more than `estimate`, that no process is too small for.

    batch: images a step and process. try_step(n) does the work of a round of n images without
    exchanging anything, and raises torch.OutOfMemoryError where they do not fit; the next
    smaller is tried then, on all processes. say takes a line on what was decided. Raises
    RunFailed where not even one image fits.
    """
    for n in divisors(batch):
        if n > max(estimate, 1):
            continue
        if not process_group.all_reduce_any(_runs_out(try_step, n)):
            say(f"micro-batch {n} of {batch} images: the largest that fits")
            return n
        say(f"micro-batch {n} was estimated to fit and does not: trying the next smaller")
    raise RunFailed(
        "out of memory with a micro-batch of one image: --checkpoint-activations takes less, and "
        "so do more GPUs or a larger one; python -m sid_fast.plan estimates them"
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
