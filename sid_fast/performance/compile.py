"""torch.compile around what the kernels leave: every residual block, as one graph."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

from sid_fast.io.cache import user_cache
from sid_fast.models.edm_unet.unet import Block

# Blocks share their code but not their shapes, and each runs in training, frozen and without
# gradients; torch would give up after 8.
RECOMPILE_LIMIT = 512
BACKEND = "inductor"


HEARTBEAT_SECONDS = (
    10.0  # seconds to the first line on what takes long; twice as many to every next
)


def compile_blocks(*nets: nn.Module) -> None:
    """Compile the blocks of networks in place; the first calls take minutes, then a cache helps."""
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(user_cache() / "inductor")
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.accumulated_recompile_limit = RECOMPILE_LIMIT
    for net in nets:
        for module in net.modules():
            if isinstance(module, Block):
                module.compile(fullgraph=True, dynamic=False, backend=BACKEND)


@contextlib.contextmanager
def heartbeat(what: str, say: Callable[[str], None]) -> Iterator[None]:
    """A line now and then on how long the block has taken, and what has been compiled in it."""
    began, over = time.perf_counter(), threading.Event()

    def watch() -> None:
        pause = HEARTBEAT_SECONDS
        while not over.wait(pause):
            pause *= 2
            blocks = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            compiled = f", {blocks} graphs of blocks compiled" if blocks else ""
            say(f"{what}: {time.perf_counter() - began:.0f} s so far{compiled}")

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
