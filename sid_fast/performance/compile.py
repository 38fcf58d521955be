"""torch.compile: every residual block as one graph, around the hand-written kernels."""

import os
import tempfile
import warnings

import torch

from sid_fast.errors import Fallback
from sid_fast.io.cache import user_cache
from sid_fast.models import Network

# Blocks share code but differ in shape, and each is compiled for training, frozen and without
# gradients. PyTorch's default limit is 8.
RECOMPILE_LIMIT = 512
BACKEND = "inductor"


def compile_blocks(*nets: Network) -> None:
    """Compile the residual blocks in place; takes minutes in the first step, unless cached."""
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        folder = user_cache() / "inductor"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
        except OSError as error:
            warnings.warn(
                f"{folder} cannot be written ({error.strerror}), so compiled code is not kept "
                "there: set SID_FAST_CACHE to a folder you can write to",
                Fallback,
                stacklevel=2,
            )
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.accumulated_recompile_limit = RECOMPILE_LIMIT
    for net in nets:
        for block in net.backbone.blocks():
            block.compile(fullgraph=True, dynamic=False, backend=BACKEND)


def compiled_graphs() -> list[str]:
    """How many graphs this process has compiled, as a part of a progress line."""
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return [f"{graphs} graphs compiled"] if graphs else []
