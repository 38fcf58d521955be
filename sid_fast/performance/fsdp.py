"""FSDP2: every rank keeps a shard of each tensor; weights are all-gathered for use.

`hsdp` shards within groups of ranks, such as the nodes of a cluster, and replicates across groups.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, cast, overload

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sid_fast.errors import UserError
from sid_fast.models import Network
from sid_fast.models.families import build_network
from sid_fast.performance import process_group
from sid_fast.performance.ddp import DDPGradSync

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclasses.dataclass(frozen=True)
class ShardingPlan:
    """How networks and optimiser states are distributed over the ranks; see plan().

    Attributes:
        mesh: [dp_shard] or [dp_replicate, dp_shard]; None: networks are replicated.
        reshard_after_forward: Free gathered weights after each use. Otherwise they stay gathered
            within a step; float32 weights, gradients, moments and EMA are sharded either way.
        text: Description for the user.
        ranks: Number of ranks.
        rank: This rank.
    """

    mesh: DeviceMesh | None = None
    reshard_after_forward: bool = False
    text: str = "one process"
    ranks: int = 1
    rank: int = 0

    @property
    def dp_shard(self) -> int:
        """Ranks that share one copy of the networks."""
        return 1 if self.mesh is None else self.mesh.size(self.mesh.ndim - 1)

    def shard(self, net: Network, dtype: torch.dtype = torch.float32) -> None:
        """Shard a network's parameters in place (FSDP2); does nothing without a mesh.

        Weights are gathered in `dtype`; gradients are reduced in float32.
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
        for module in (*net.backbone.blocks(), net):
            sharded = fully_shard(
                module,
                mesh=self.mesh,
                reshard_after_forward=self.reshard_after_forward,
                mp_policy=types,
            )
            sharded.set_reshard_after_backward(self.reshard_after_forward)
        for name in net.forward_methods:
            register_fsdp_forward_method(net, name)

    def grad_sync(self, net: Network) -> "DDPGradSync":
        """Allocate the network's gradients and return the object that averages them."""
        if self.mesh is not None:
            return FSDPGradSync(net, self.mesh)
        return DDPGradSync(net, self.ranks)


SINGLE_PROCESS: ShardingPlan = ShardingPlan()  # ignores any other ranks


def replicated(text: str = "") -> ShardingPlan:
    """Return the plan that replicates networks on every rank (DDP)."""
    ranks = process_group.world_size()
    text = text or (f"replicated on {ranks} processes" if ranks > 1 else SINGLE_PROCESS.text)
    return ShardingPlan(text=text, ranks=ranks, rank=process_group.rank())


# The share of GPU memory that networks and optimisers may take; the rest is for activations.
STATE_MEMORY_FRACTION = 0.5


def plan(
    mode: str,
    device: torch.device,
    state_bytes: Callable[[int, bool], int],
    shard_group: int | None = None,
) -> "ShardingPlan":
    """Turn --parallel into a plan.

    auto is ddp if the state leaves enough memory for activations, and always on a CPU; otherwise
    fsdp on one node and hsdp on several. If memory allows, sharded weights stay gathered within a
    step.

    Args:
        mode: auto, ddp, fsdp or hsdp.
        device: This rank's device.
        state_bytes: Bytes per GPU that networks and optimisers take, as a function of dp_shard and
            reshard_after_forward.
        shard_group: Ranks per hsdp group; default: those of a node.

    Raises:
        UserError: shard_group does not divide the number of ranks.
    """
    ranks = process_group.world_size()
    group = shard_group or process_group.launch().local_world_size
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
        text = f"replicated on {ranks} processes: {size / 1e9:.2g} GB of state"
        return replicated(text)
    shape: tuple[int, ...] = (ranks,)
    names: tuple[str, ...] = ("dp_shard",)
    if mode == "fsdp":
        group = ranks
    else:
        if ranks % group:
            raise UserError(
                f"shard_group={group} does not divide {ranks} processes; use a divisor, "
                "or --parallel fsdp"
            )
        shape, names = (ranks // group, group), ("dp_replicate", "dp_shard")
    reshard_after_forward = (size := state_bytes(group, False)) > room
    size = state_bytes(group, True) if reshard_after_forward else size
    text = f"{mode}: state in {group} shard{'s' * (group > 1)}"
    text += f", {ranks // group} replicas" if mode == "hsdp" else ""
    text += ", weights gathered block by block" if reshard_after_forward else ", weights gathered"
    return ShardingPlan(
        init_device_mesh(device.type, shape, mesh_dim_names=names),
        reshard_after_forward,
        f"{text}: {size / 1e9:.2g} GB per process",
        ranks,
        process_group.rank(),
    )


class FSDPGradSync(DDPGradSync):
    """The interface of DDPGradSync over FSDP2, which accumulates and averages the gradients."""

    def __init__(self, net: nn.Module, mesh: DeviceMesh):
        self.params, self.ranks = list(net.parameters()), process_group.world_size()
        for p in self.params:
            p.grad = torch.zeros_like(p)
        self.modules = sharded_modules(net)
        self.shard_group = mesh.get_group(mesh.ndim - 1)

    def zero(self) -> None:
        """Zero the gradients."""
        torch._foreach_zero_(self.local_grads())

    def local_grads(self) -> list[torch.Tensor]:
        """Return this rank's shards of the gradients, in the order of the parameters."""
        return local_shards([p.grad for p in self.params if p.grad is not None])

    def backward(self, loss: torch.Tensor, scale: float, sync_grads: bool) -> None:
        """Accumulate the gradients of scale·Σ loss [N]; sync_grads reduce-scatters them."""
        for module in self.modules:
            module.set_requires_gradient_sync(sync_grads, recurse=False)
        loss.backward(torch.full_like(loss, scale))

    def wait(self) -> None:
        """Do nothing: FSDP2 orders its collectives on the device."""

    def after_update(self) -> None:
        """Drop gathered weights, which are outdated now."""
        for module in self.modules:
            module.reshard()

    def sum_over_shards(self, count: torch.Tensor) -> torch.Tensor:
        """Sum a count over the gradient shards of a network, in place."""
        dist.all_reduce(count, group=self.shard_group)
        return count


def sharded_modules(net: nn.Module) -> list:
    """List the modules that FSDP2 shards; none if the network is not sharded."""
    if not dist.is_initialized():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [m for m in net.modules() if isinstance(m, FSDPModule)]


@torch.no_grad()
def local_shards(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return views of this rank's shard of each tensor, leaving out empty ones."""
    shards = [getattr(t, "to_local", lambda t=t: t)() for t in tensors]
    return [shard for shard in shards if shard.numel()]


@overload
def gather_full(net: Network, everywhere: Literal[True]) -> Network: ...
@overload
def gather_full(net: Network, everywhere: bool = False) -> Network | None: ...
@torch.no_grad()
def gather_full(net: Network, everywhere: bool = False) -> Network | None:
    """Gather a sharded network in full; a collective that every rank must call.

    Tensors are gathered one at a time, so ranks that get no network never hold more than one.

    Args:
        net: The network; returned itself if it is not sharded.
        everywhere: Return the network on every rank, not only on rank 0.

    Returns:
        The network, or None on the other ranks.
    """
    modules, mine = sharded_modules(net), everywhere or process_group.rank() == 0
    if not modules:
        return net if mine else None
    for module in modules:
        module.reshard()
    device, copy = next(net.parameters()).device, None
    if mine:
        with torch.device("meta"):
            copy = build_network(net.config)
        copy = copy.to_empty(device=device).requires_grad_(False).eval()
        copy.compute_dtype = net.compute_dtype
        for name, buffer in net.named_buffers():
            copy.get_buffer(name).copy_(buffer)
    for name, p in net.named_parameters():
        value = cast("DTensor", p).full_tensor()
        if copy is not None:
            copy.get_parameter(name).copy_(value)
    return copy
