"""FSDP2: every rank keeps a shard of each tensor; weights are gathered where they are used.

`hsdp` does so inside groups that are copies of one another, such as the nodes of a cluster.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, cast, overload

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sid_fast.errors import UserError
from sid_fast.models import EDMNetwork
from sid_fast.models.edm_unet.unet import Block
from sid_fast.performance import process_group
from sid_fast.performance.ddp import DDPGradSync

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclasses.dataclass(frozen=True)
class ShardingPlan:
    """How networks and their optimisers lie over the processes; see plan().

    ranks: how many take part, and which of them this is. mesh: [dp_shard] or [dp_replicate,
    dp_shard]; None: whole networks everywhere.
    reshard_after_forward: free gathered weights after each use. Otherwise they stay gathered
    within a step, and only gradients, moments, float32 weights and the average are sharded.
    """

    mesh: DeviceMesh | None = None
    reshard_after_forward: bool = False
    text: str = "one process"  # what it is, for people
    ranks: int = 1
    rank: int = 0

    @property
    def dp_shard(self) -> int:
        """Ranks that share one copy of the networks."""
        return 1 if self.mesh is None else self.mesh.size(self.mesh.ndim - 1)

    def shard(self, net: EDMNetwork, dtype: torch.dtype = torch.float32) -> None:
        """Leave of the network's parameters this process's part (FSDP2), in place.

        They are gathered in `dtype`; gradients are added up in float32.
        """
        if self.mesh is None:
            return
        from torch.distributed.fsdp import (
            MixedPrecisionPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        types = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for module in (*(m for m in net.modules() if isinstance(m, Block)), net):
            sharded = fully_shard(
                module,
                mesh=self.mesh,
                reshard_after_forward=self.reshard_after_forward,
                mp_policy=types,
            )
            sharded.set_reshard_after_backward(self.reshard_after_forward)
        for name in net.forward_methods:
            register_fsdp_forward_method(net, name)

    def grad_sync(self, net: EDMNetwork) -> "DDPGradSync":
        """Give the network's parameters gradients, and the processes a way to average them."""
        if self.mesh is not None:
            return FSDPGradSync(net, self.mesh)
        return DDPGradSync(net, self.ranks)


SINGLE_PROCESS = ShardingPlan()  # of one process, whatever others there are


def replicated(text: str = "") -> ShardingPlan:
    """Whole networks on each of the processes that there are."""
    ranks = process_group.world_size()
    text = text or (f"whole on each of {ranks} processes" if ranks > 1 else SINGLE_PROCESS.text)
    return ShardingPlan(text=text, ranks=ranks, rank=process_group.rank())


STATE_MEMORY_FRACTION = (
    0.5  # of a GPU's memory that networks and optimisers may take; the rest is activations
)


def plan(
    mode: str,
    device: torch.device,
    state_bytes: Callable[[int, bool], int],
    shard_group: int | None = None,
) -> "ShardingPlan":
    """The layout that --parallel means.

    auto takes ddp where the state fits beside the activations, and always on a CPU; then hsdp on
    several nodes and fsdp on one. state_bytes(dp_shard, reshard_after_forward): what networks and
    optimisers take of one GPU. shard_group: ranks of an hsdp group, a node's by default. Sharded
    weights stay gathered between their uses where memory allows. UserError for a group size that
    does not divide the ranks.
    """
    ranks = process_group.world_size()
    group = shard_group or int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    room = float("inf")
    if device.type == "cuda":
        room = torch.cuda.get_device_properties(device).total_memory * STATE_MEMORY_FRACTION
    if ranks == 1 and mode in ("auto", "ddp"):
        return SINGLE_PROCESS
    if mode == "auto":
        if device.type == "cpu" or state_bytes(1, False) <= room:
            mode = "ddp"
        else:
            mode = "hsdp" if ranks > group else "fsdp"
    if mode == "ddp":
        size = state_bytes(1, False)
        text = f"whole on each of {ranks} processes: {size / 1e9:.2g} GB of state"
        return replicated(text)
    shape: tuple[int, ...] = (ranks,)
    names: tuple[str, ...] = ("dp_shard",)
    if mode == "fsdp":
        group = ranks
    else:
        if ranks % group:
            raise UserError(
                f"shard_group={group} does not divide {ranks} processes; choose a divisor, "
                "or --parallel fsdp"
            )
        shape, names = (ranks // group, group), ("dp_replicate", "dp_shard")
    reshard_after_forward = (size := state_bytes(group, False)) > room
    size = state_bytes(group, True) if reshard_after_forward else size
    text = f"{mode}: state in {group} parts"
    text += f", {ranks // group} copies" if mode == "hsdp" else ""
    text += ", weights gathered block by block" if reshard_after_forward else ", weights gathered"
    return ShardingPlan(
        init_device_mesh(device.type, shape, mesh_dim_names=names),
        reshard_after_forward,
        f"{text}: {size / 1e9:.2g} GB a process",
        ranks,
        process_group.rank(),
    )


class FSDPGradSync(DDPGradSync):
    """FSDP2 accumulates and averages; every rank keeps its shard."""

    def __init__(self, net: nn.Module, mesh: DeviceMesh):
        self.params, self.ranks = list(net.parameters()), process_group.world_size()
        for p in self.params:
            p.grad = torch.zeros_like(p)
        self.modules = sharded_modules(net)
        self.shard_group = mesh.get_group(mesh.ndim - 1)

    def zero(self) -> None:
        torch._foreach_zero_(self.local_grads())

    def local_grads(self) -> list[torch.Tensor]:
        return local_shards([p.grad for p in self.params if p.grad is not None])

    def backward(self, loss: torch.Tensor, scale: float, sync_grads: bool) -> None:
        for module in self.modules:
            module.set_requires_gradient_sync(sync_grads, recurse=False)
        loss.backward(torch.full_like(loss, scale))

    def wait(self) -> None:
        pass

    def after_update(self) -> None:
        for module in self.modules:
            module.reshard()

    def sum_over_shards(self, count: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(count, group=self.shard_group)
        return count


def sharded_modules(net: nn.Module) -> list:
    """The modules that FSDP2 shards; none if the network is whole."""
    if not dist.is_initialized():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [m for m in net.modules() if isinstance(m, FSDPModule)]


@torch.no_grad()
def local_shards(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """This process's part of each tensor, where it has one: the memory itself, not a copy."""
    parts = [getattr(t, "to_local", lambda t=t: t)() for t in tensors]
    return [part for part in parts if part.numel()]


@overload
def gather_full(net: EDMNetwork, everywhere: Literal[True]) -> EDMNetwork: ...
@overload
def gather_full(net: EDMNetwork, everywhere: bool = False) -> EDMNetwork | None: ...
@torch.no_grad()
def gather_full(net: EDMNetwork, everywhere: bool = False) -> EDMNetwork | None:
    """The network, gathered if it is sharded, on the first process; None on the others, unless

    it is wanted everywhere. Every process has to call it. Tensor after tensor: a process that gets
    none holds no more than one whole.
    """
    modules, mine = sharded_modules(net), everywhere or process_group.rank() == 0
    if not modules:
        return net if mine else None
    for module in modules:
        module.reshard()
    device, copy = next(net.parameters()).device, None
    if mine:
        with torch.device("meta"):
            copy = EDMNetwork(net.config)
        copy = copy.to_empty(device=device).requires_grad_(False).eval()
        copy.compute_dtype = net.compute_dtype
        for name, buffer in net.named_buffers():
            copy.get_buffer(name).copy_(buffer)
    for name, p in net.named_parameters():
        value = cast("DTensor", p).full_tensor()
        if copy is not None:
            copy.get_parameter(name).copy_(value)
    return copy
