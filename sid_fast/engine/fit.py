"""How many images a round: the most that fit, by trying."""

import contextlib
import gc
from collections.abc import Callable, Iterator

import torch

from sid_fast.engine import parallel
from sid_fast.errors import OutOfMemory, RunFailed


def divisors(n: int) -> list[int]:
    """All divisors, the largest first."""
    return [n // d for d in range(1, n + 1) if n % d == 0]


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
        if not parallel.any_(_runs_out(try_step, n)):
            say(f"micro-batch {n} of {batch} images: the largest that fits")
            return n
        say(f"micro-batch {n} was estimated to fit and does not: trying the next smaller")
    raise RunFailed(
        "out of memory with a micro-batch of one image: --checkpoint-activations takes less, and "
        "so does more GPUs or a larger one; --plan reckons with them"
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


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """Out of memory in the block is OutOfMemory, which says in what and how much was asked for."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        asked = ". ".join(str(error).split(". ")[:2])  # what follows are statistics
        raise OutOfMemory(f"{what}: {asked}") from error
