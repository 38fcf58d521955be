"""Less memory for more time: blocks that keep their input alone and run again in backward."""

from torch import nn
from torch.utils.checkpoint import checkpoint

from sid_fast.networks.unet import Block


def checkpoint_activations(*nets: nn.Module) -> None:
    """Make every block of these networks keep its input alone (arXiv 1604.06174).

    Outputs and gradients are what they were, dropout included; backward costs one more forward.
    """
    for net in nets:
        for module in net.modules():
            if isinstance(module, Block):
                module.forward = _recomputing(module)


def _recomputing(block: Block):
    run = block.forward

    def forward(*inputs, **named):
        draws = block.training and block.dropout > 0  # to be drawn again in backward
        return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=draws, **named)

    return forward
