"""Less memory for more time: blocks that keep their input alone and run again in backward."""

from torch import nn
from torch.utils.checkpoint import checkpoint

from sid_fast.models.edm_unet.unet import Block


def checkpoint_activations(*nets: nn.Module) -> None:
    """Make every block of these networks keep its input alone (arXiv 1604.06174).

    Outputs and gradients are what they were, dropout included; backward costs one more forward.
    """
    for net in nets:
        for module in net.modules():
            if isinstance(module, Block):
                module.forward = _recomputing(module)  # type: ignore[method-assign]  # of this one


def _recomputing(block: Block):
    run = block.forward

    def forward(*inputs, **named):
        # Dropout's mask is a function of its seed: no random state has to be put back.
        return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False, **named)

    return forward
