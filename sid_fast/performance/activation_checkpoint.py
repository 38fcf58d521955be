"""Activation checkpointing: less memory, at the cost of one more forward pass."""

from torch import nn
from torch.utils.checkpoint import checkpoint

from sid_fast.models.edm_unet.unet import Block


def checkpoint_activations(*nets: nn.Module) -> None:
    """Save only the input of every block, and recompute the rest in backward (arXiv 1604.06174).

    Outputs and gradients do not change, with dropout either.
    """
    for net in nets:
        for module in net.modules():
            if isinstance(module, Block):
                module.forward = _recomputing(module)  # type: ignore[method-assign]


def _recomputing(block: Block):
    run = block.forward

    def forward(*inputs, **named):
        # Dropout masks are a function of their seeds, so there is no RNG state to restore.
        return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False, **named)

    return forward
