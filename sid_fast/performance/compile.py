"""torch.compile: every residual block as one graph, around the hand-written kernels."""

import os

import torch
from torch import nn

from sid_fast.io.cache import user_cache
from sid_fast.models.edm_unet.unet import Block

# Blocks share code but differ in shape, and each is compiled for training, frozen and without
# gradients. PyTorch's default limit is 8.
RECOMPILE_LIMIT = 512
BACKEND = "inductor"


def compile_blocks(*nets: nn.Module) -> None:
    """Compile the residual blocks in place; takes minutes in the first step, unless cached."""
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(user_cache() / "inductor")
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.accumulated_recompile_limit = RECOMPILE_LIMIT
    for net in nets:
        for module in net.modules():
            if isinstance(module, Block):
                module.compile(fullgraph=True, dynamic=False, backend=BACKEND)


def compiled_graphs() -> list[str]:
    """How many graphs this process has compiled, as a part of a progress line."""
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return [f"{graphs} graphs compiled"] if graphs else []
