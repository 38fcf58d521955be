"""Stands in for CapturedGraph where there is no GPU: operations are recorded and run again.

As in a capture, what a function asks Python for is asked once: a replay is the operations alone,
on the same memory. Messages between processes are operations, too. Streams there are none, and
no memory is used twice within a graph.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)
from torch.utils._pytree import tree_leaves, tree_map

from sid_fast.performance import cuda_graphs


def stand_in(put: Callable[[object, str, object], None]) -> None:
    """Put recordings in the place of graphs: put is setattr, or takes it back later."""
    put(cuda_graphs, "CapturedGraph", Recorded)
    put(cuda_graphs, "warm_up", lambda function, times=2: [function() for _ in range(times)])
    put(cuda_graphs, "_failed", "")
    put(torch.cuda, "get_rng_state", lambda _: torch.get_rng_state())
    put(torch.cuda, "set_rng_state", lambda state, _: torch.set_rng_state(state))


def recording() -> bool:
    return any(isinstance(mode, Recorded) for mode in _get_current_dispatch_mode_stack())


class Recorded(TorchDispatchMode):
    """Takes CapturedGraph's arguments. Making one changes nothing: all memory is put back."""

    def __init__(self, function, pool=None):
        super().__init__()
        self.operations, self.before = [], {}
        self.own = pool.own if pool else set()  # storages
        self.messages = 0  # that have been sent, and not waited for
        rng_state = torch.get_rng_state()
        try:
            with contextlib.ExitStack() as stack:
                wait, patch = dist.Work.wait, partial(mock.patch.object, create=True)
                for target, name, new in (
                    (_fsdp_param, "alloc_storage", self._allocate),
                    (_fsdp_param_group, "alloc_storage", self._allocate),
                    (_fsdp_param, "free_storage", self._free),
                    (dist.Work, "wait", lambda *work: self._wait(wait, *work)),
                ):
                    stack.enter_context(patch(target, name, new))
                stack.enter_context(self)
                self.result = function()
        finally:
            torch.set_rng_state(rng_state)
            for memory, value in self.before.values():
                memory.copy_(value)
        if self.messages > 0:
            raise RuntimeError(f"{self.messages} messages are not joined with the graph")

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a capture cannot wait for a value")
        names = operation._schema.arguments
        given = dict(zip((a.name for a in names), args, strict=False)) | kwargs
        for argument in names:
            if argument.alias_info and argument.alias_info.is_write:
                self._keep(given.get(argument.name))
        # An operation may empty lists that it is passed, so the arguments are copied first.
        copied = tree_map(lambda leaf: leaf, (args, kwargs))
        found = operation(*args, **kwargs)
        self.messages += operation.namespace == "c10d"
        if operation.namespace != "profiler":
            self.operations.append((operation, *copied, found))
        return found

    def _wait(self, wait, *work):
        """Not recorded: the collective itself is, and a replay waits for it."""
        self.messages -= 1
        with _disable_current_modes():
            return wait(*work)

    def _keep(self, argument):
        """Keep the memory of tensors that are about to be written."""
        for tensor in tree_leaves(argument):
            if isinstance(tensor, torch.Tensor):
                tensor = getattr(tensor, "_local_tensor", tensor)
                storage = tensor.untyped_storage()
                if storage._cdata not in self.before:
                    memory = torch.empty(0, dtype=torch.uint8).set_(storage)
                    self.before[storage._cdata] = memory, memory.clone()

    def _allocate(self, tensor):
        """FSDP's, for gathered weights; a graph's memory remains its own when it is freed."""
        size = tensor.numel() * tensor.itemsize
        if tensor.untyped_storage().size() != size:
            tensor.untyped_storage().resize_(size)
        self.own.add(tensor.untyped_storage()._cdata)

    def _free(self, tensor):
        storage = tensor.untyped_storage()
        if storage.size() and storage._cdata not in self.own:
            raise RuntimeError("a graph frees memory that it reads, and that is not its own")

    def reset(self):
        self.operations = None  # nothing to replay

    @torch.no_grad()
    def __call__(self):
        for operation, args, kwargs, expected in self.operations:
            found = operation(*args, **kwargs)
            for new, old in zip(tree_leaves(found), tree_leaves(expected), strict=True):
                if isinstance(new, torch.Tensor):
                    if new.data_ptr() != old.data_ptr():
                        old.copy_(new)
                elif isinstance(new, torch.ScriptObject):
                    dist.Work.unbox(new).wait()
        return self.result
