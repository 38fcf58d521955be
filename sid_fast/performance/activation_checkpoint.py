"""Activation checkpointing: less memory, at the cost of one more forward pass."""

from torch import nn
from torch.utils.checkpoint import checkpoint

from sid_fast.models import Network


def checkpoint_activations(*nets: Network) -> None:
    """Save only the input of every block, and recompute the rest in backward (arXiv 1604.06174).

    Outputs and gradients do not change, with dropout either.
    """
    for net in nets:
        for block in net.backbone.blocks():
            block.forward = _recomputing(block)


def _recomputing(block: nn.Module):
    run = block.forward

    def forward(*inputs, **named):
        # Dropout masks are a function of their seeds, so there is no RNG state to restore.
        return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False, **named)

    return forward
