"""DDP: replicated networks; gradients are all-reduced in flat buckets during backward."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sid_fast.models import Network
from sid_fast.performance import failure


class DDPGradSync:
    """Accumulates a replicated network's gradients in float32 buckets, averaged over the ranks.

    How gradients flow: backward produces one per autograd leaf (models.base.Leaf), a parameter
    or a low-precision copy. A hook takes it from the leaf, so that autograd launches no kernel to
    accumulate it. Once all parameters of a bucket have a gradient, one foreach call casts them into
    the bucket (first micro-batch) or adds them in float32 (later ones). In the last micro-batch the
    bucket is then all-reduced while backward continues.

    p.grad is a view of a bucket at a fixed address, unset only during backward. Parameters that
    backward does not reach get zero gradients. A step calls backward() once per micro-batch,
    wait() before reading the gradients, after_update() after the update, and then zero().

    PyTorch's own DDP does not fit a network that is trained in one phase and frozen in the next:
    DDP and `replicate` expect a gradient for every trainable parameter after every forward, but the
    generator step gives none to map_augment or to the fake score. FSDP2 over a mesh without shards
    keeps a second copy of all parameters.
    """

    BUCKET = 2**23  # elements, 32 MiB: enough to saturate a link
    ALIGN = 64  # elements; aligns every gradient for 16-byte loads

    def __init__(self, net: Network, ranks: int = 1):
        self.params, self.ranks = list(net.parameters()), ranks
        self.buckets: list[torch.Tensor] = []
        self.members: list[list[nn.Parameter]] = []  # parameters of each bucket
        self.bucket_of: dict[nn.Parameter, int] = {}
        leaves, size = net.leaves(), self.BUCKET
        if self.ranks == 1:  # no all-reduce: four buckets save launches, and bound 16-bit gradients
            size = max(size, sum(p.numel() for p in self.params) // 4)
        # Backward reaches the last layers first, so they fill the first buckets. A leaf shared by
        # all blocks gets its gradient after the first block's backward.
        multiple = [leaf.sources for leaf in leaves if len(leaf.sources) > 1]
        shared = [p for sources in multiple for _, params in sources for p in params]
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
        self.grads = {p: p.grad for p in self.params if p.grad is not None}
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
        """Reset the gradients: the next micro-batch overwrites them."""
        self.first = True

    def backward(self, loss: torch.Tensor, scale: float, sync_grads: bool) -> None:
        """Accumulate the gradients of scale·Σ loss [N]; sync_grads starts the all-reduces."""
        self.syncing, self.works = sync_grads and self.ranks > 1, []
        self.missing = [set(members) for members in self.members]
        self.taken: list[list[tuple[nn.Parameter, torch.Tensor]]] = [[] for _ in self.buckets]
        for p in self.params:
            p.grad = None  # backward then passes its own tensor to the hook, without adding
        try:
            loss.backward(torch.full_like(loss, scale))
        finally:
            for p, grad in self.grads.items():
                p.grad = grad
        for number, missing in enumerate(self.missing):
            if missing:
                self._fill(number)
        self.first = self.syncing = False

    def _on_grad_ready(self, sources: list, leaf: torch.Tensor) -> None:
        grad, leaf.grad = leaf.grad, None
        assert grad is not None
        for rows, params in sources:
            for p in params:
                number = self.bucket_of[p]
                self.missing[number].remove(p)  # a second gradient would overwrite the first
                self.taken[number].append((p, grad[rows]))
                if not self.missing[number]:
                    self._fill(number)
        # In bucket order, not backward's: all ranks must start the same collectives in turn.
        while self.syncing and len(self.works) < len(self.buckets):
            if self.missing[len(self.works)]:
                break
            self._all_reduce_next_bucket()

    @torch.no_grad()
    def _fill(self, number: int) -> None:
        """Move this micro-batch's gradients into their bucket."""
        taken, self.taken[number] = self.taken[number], []
        if self.first and self.missing[number]:
            torch._foreach_zero_([self.grads[p] for p in self.missing[number]])
        for dtype in dict.fromkeys(grad.dtype for _, grad in taken):
            into = [self.grads[p] for p, grad in taken if grad.dtype == dtype]
            grads = [grad for _, grad in taken if grad.dtype == dtype]
            if self.first:
                torch._foreach_copy_(into, grads)
                continue
            if dtype != torch.float32:  # foreach adds mixed dtypes with one launch per tensor
                wide = [torch.empty_like(grad) for grad in into]
                torch._foreach_copy_(wide, grads)
                grads = wide
            torch._foreach_add_(into, grads)

    def _all_reduce_next_bucket(self) -> None:
        self.works.append(dist.all_reduce(self.buckets[len(self.works)], async_op=True))

    def wait(self) -> None:
        """Wait until the gradients are averaged over the ranks."""
        if self.ranks == 1:
            return
        while len(self.works) < len(self.buckets):  # behind a bucket that lacked gradients
            self._all_reduce_next_bucket()
        for work in self.works:
            work.wait()
        torch._foreach_div_(self.buckets, self.ranks)

    def after_update(self) -> None:
        """Do nothing: parameters are replicated and already up to date."""

    def local_grads(self) -> list[torch.Tensor]:
        """Return this rank's shards of the gradients, in the order of the parameters."""
        return list(self.grads.values())

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over the ranks, in place."""
        if self.ranks > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_over_shards(self, count: torch.Tensor) -> torch.Tensor:
        """Sum a count over the gradient shards of a network; here there is only one."""
        return count
