"""DDP: whole networks on every rank; gradients are averaged in flat buckets during backward."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sid_fast.models import EDMNetwork
from sid_fast.performance import failure


class DDPGradSync:
    """The gradients of a whole network: averages over the processes, in flat float32 buckets.

    How gradients flow. Backward produces one for each leaf that the network computed with: a
    parameter, or the low-precision copy that stands in for parameters (edm_unet.layers.Leaf). A
    hook takes it from the leaf, so that autograd starts no kernel to add it up. Once every
    parameter of a bucket has its gradient, one list operation casts them into the bucket (first
    round) or adds them to it in float32 (later rounds). In the last round the bucket is then sent
    while backward continues.

    p.grad are views of the buckets and keep their addresses; they are unset only during backward.
    A parameter that backward does not reach has a gradient of zero. A step calls backward() once a
    round, wait() before the gradients are read, updated() after the update, and zero().

    Written out because the libraries' forms do not fit a network that is trained in one phase and
    frozen in the next: DDP and `replicate` expect, at every forward that could take gradients, a
    gradient for every parameter that could (map_augment gets none in the generator step; ψ none at
    all in it), and FSDP2 over a mesh without shards keeps second copies of all parameters.
    """

    BUCKET = 2**23  # numbers: 32 MiB, enough to fill a link
    ALIGN = 64  # numbers: every gradient starts where a kernel may load 16 bytes at a time

    def __init__(self, net: EDMNetwork, ranks: int = 1):
        self.params, self.ranks = list(net.parameters()), ranks
        self.buckets: list[torch.Tensor] = []
        self.members: list[list[nn.Parameter]] = []  # of each bucket
        self.bucket_of: dict[nn.Parameter, int] = {}
        leaves, size = net.leaves(), self.BUCKET
        if self.ranks == 1:  # nothing is sent: fewer launches, few low-precision gradients at once
            size = max(size, sum(p.numel() for p in self.params) // 4)
        # Backward reaches the last layers first, so they fill the first buckets. A leaf that blocks
        # share has its gradient when backward has left the first block.
        shared = [
            p for leaf in leaves if len(leaf.sources) > 1 for _, of in leaf.sources for p in of
        ]
        before = next((i for i, p in enumerate(self.params) if p in set(shared)), 0)
        order = dict.fromkeys([*self.params[:before], *shared, *self.params])
        bucket: list[nn.Parameter] = []
        for p in reversed(order):
            bucket.append(p)
            if sum(q.numel() for q in bucket) >= size:
                self._add(bucket)
                bucket = []
        if bucket:
            self._add(bucket)
        self.grads = {p: p.grad for p in self.params if p.grad is not None}  # all of them
        for leaf in leaves:
            leaf.tensor.register_post_accumulate_grad_hook(
                partial(self._on_grad_ready, leaf.sources)
            )
        self.first, self.syncing = True, False
        self.works: list[Any] = []
        failure.grad_syncs.add(self)

    def _add(self, params: list[nn.Parameter]) -> None:
        starts = [0]
        for p in params:
            starts.append(starts[-1] + -(-p.numel() // self.ALIGN) * self.ALIGN)
        flat = params[0].new_zeros(starts[-1], requires_grad=False)
        for p, start in zip(params, starts, strict=False):
            p.grad = flat.as_strided(p.shape, p.stride(), start)
            self.bucket_of[p] = len(self.buckets)
        self.buckets.append(flat)
        self.members.append(params)

    def zero(self) -> None:
        self.first = True  # the next round overwrites

    def backward(self, loss: torch.Tensor, scale: float, sync_grads: bool) -> None:
        """Accumulate the gradients of scale·Σ loss [N]; the last round starts the averaging."""
        self.syncing, self.works = sync_grads and self.ranks > 1, []
        self.missing = [set(members) for members in self.members]
        self.taken: list[list[tuple[nn.Parameter, torch.Tensor]]] = [[] for _ in self.buckets]
        for p in self.params:
            p.grad = None  # so that backward hands over what it has
        try:
            loss.backward(torch.full_like(loss, scale))
        finally:
            for p, grad in self.grads.items():
                p.grad = grad
        for number, missing in enumerate(self.missing):
            if missing:
                self._fill(number)
        self.first = self.syncing = False

    def _on_grad_ready(self, parts: list, leaf: torch.Tensor) -> None:
        grad, leaf.grad = leaf.grad, None
        assert grad is not None  # the hook runs when it is there
        for rows, params in parts:
            for p in params:
                number = self.bucket_of[p]
                self.missing[number].remove(p)  # a second gradient would overwrite the first
                self.taken[number].append((p, grad[rows]))
                if not self.missing[number]:
                    self._fill(number)
        # In order, whatever backward's: all processes must send the same.
        while self.syncing and len(self.works) < len(self.buckets):
            if self.missing[len(self.works)]:
                break
            self._all_reduce_next_bucket()

    @torch.no_grad()
    def _fill(self, number: int) -> None:
        """Move the gradients that have arrived in this round into their bucket."""
        taken, self.taken[number] = self.taken[number], []
        if self.first and self.missing[number]:
            torch._foreach_zero_([self.grads[p] for p in self.missing[number]])
        for dtype in dict.fromkeys(grad.dtype for _, grad in taken):
            into = [self.grads[p] for p, grad in taken if grad.dtype == dtype]
            grads = [grad for _, grad in taken if grad.dtype == dtype]
            if self.first:
                torch._foreach_copy_(into, grads)
                continue
            if dtype != torch.float32:  # foreach adds two types with one launch a tensor
                wide = [torch.empty_like(grad) for grad in into]
                torch._foreach_copy_(wide, grads)
                grads = wide
            torch._foreach_add_(into, grads)

    def _all_reduce_next_bucket(self) -> None:
        self.works.append(dist.all_reduce(self.buckets[len(self.works)], async_op=True))

    def wait(self) -> None:
        """Return when the gradients are averages over the processes."""
        if self.ranks == 1:
            return
        while len(self.works) < len(self.buckets):  # held up by one that got no gradient
            self._all_reduce_next_bucket()
        for work in self.works:
            work.wait()
        torch._foreach_div_(self.buckets, self.ranks)

    def after_update(self) -> None:
        """The parameters have new values."""

    def local_grads(self) -> list[torch.Tensor]:
        """This rank's part of the gradients, in the order of the parameters."""
        return list(self.grads.values())

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over the ranks, in place."""
        if self.ranks > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_over_shards(self, count: torch.Tensor) -> torch.Tensor:
        """What each process has counted in its own part of the gradients, over all parts."""
        return count
