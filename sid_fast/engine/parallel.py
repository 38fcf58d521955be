"""Processes: who we are among them, how they share networks, and what they add up.

One process needs none of it. Three layouts: `ddp` keeps whole networks everywhere and averages
gradients; `fsdp` keeps a part of every tensor on every process (FSDP2); `hsdp` does so inside
groups that are copies of one another, such as the nodes of a cluster.
"""

import contextlib
import dataclasses
import datetime
import gc
import os
import signal
import socket
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sid_fast.errors import RunFailed, UserError
from sid_fast.networks import EDMNetwork
from sid_fast.networks.unet import Block

MODES = ("auto", "ddp", "fsdp", "hsdp")


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name` (auto, cpu, cuda, cuda:1); auto takes this process's GPU if any."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device={name!r} is not a device; use auto, cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device={name!r} is not supported; use auto, cpu or cuda")
    if device.type == "cuda":
        device = torch.device("cuda", local if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise UserError(
                f"device={device} is not there: {torch.cuda.device_count()} GPUs are visible; "
                "use fewer processes, or cpu"
            )
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32
        torch.backends.cudnn.deterministic = True  # a resumed run ends on the same bits
    return device


MINUTES = 10.0  # that a process waits for the others, unless --timeout says otherwise
PATIENCE = datetime.timedelta(days=7)  # for what has no stated length: downloads, snapshots
WRITING = datetime.timedelta(hours=1)  # a state
GRACE = 5.0  # seconds in which a process that has lost another one says that it is there


class _Group(NamedTuple):
    """Words between hosts, whatever the device, each on connections of its own; --timeout."""

    store: dist.Store
    minutes: float
    hosts: dist.ProcessGroup  # in every step
    patient: dist.ProcessGroup  # to wait for the first process
    saving: dist.ProcessGroup  # of the thread that writes states


_group: _Group | None = None
captured: weakref.WeakSet = weakref.WeakSet()  # CUDA graphs, which may send messages
_senders: weakref.WeakSet = weakref.WeakSet()  # what has `works`: messages on their way
abandoned = False  # others were left in the middle of something: nothing here may wait for them


@contextlib.contextmanager
def joined(device: torch.device, mode: str = "auto", minutes: float = MINUTES) -> Iterator[None]:
    """Among the other processes, if torchrun started us with any, for the length of the block.

    A process alone forms a group of one where the mode asks for sharding. Raises RunFailed, with
    the names of the processes that do not answer, when one is lost or silent for so many minutes.
    """
    global _group
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    if alone and mode in ("auto", "ddp"):
        yield
        return
    store, me, count = (dist.HashStore(), 0, 1) if alone else next(dist.rendezvous("env://"))
    # torchrun may give a restarted run the store of the one before, with its addresses.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    timeout = datetime.timedelta(minutes=minutes)
    device_id = device if device.type == "cuda" else None
    # Registering a graph's buffers makes processes meet in the capture, and fails in memory that
    # was taken in expandable segments.
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    dist.init_process_group(
        "nccl" if device_id else "gloo",
        store=dist.PrefixStore("processes", store),
        rank=me,
        world_size=count,
        timeout=2 * timeout if device_id else timeout,  # the hosts find out first, and say who
        device_id=device_id,
    )
    groups = (dist.new_group(backend="gloo", timeout=t) for t in (timeout, PATIENCE, WRITING))
    _group = _Group(dist.PrefixStore("sid_fast", store), minutes, *groups)
    _group.store.set(f"host/{me}", socket.gethostname())
    orderly = False
    try:
        yield
        orderly = True
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo/" not in str(error):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from torchrun: it kills us soon enough
        what = "was lost" if "onnection" in str(error) else f"was silent for {minutes:g} minutes"
        reason = str(error).partition("\n")[0]
        # A message keeps its connection open, and so does a frame that sent one.
        forget_messages()
        met: BaseException | None = error
        while met:
            traceback.clear_frames(met.__traceback__)
            met = met.__context__
        gc.collect()
        missing = _missing(device)
        raise RunFailed(
            f"{f'{missing} {what}' if missing else f'the processes lost touch: {reason}'}. "
            "--resume goes on from the last state, and torchrun --max-restarts N does so by itself"
        ) from error
    finally:
        if _group is not None:
            _leave(device, orderly)


def _leave(device: torch.device, orderly: bool) -> None:
    """Close the connections to the other processes, so that those notice at once.

    Where others are left in the middle of something, those between devices stay open: one that
    waits for a message would hold up who closes them.
    """
    global _group, abandoned
    abandoned = not orderly and world() > 1
    if not abandoned or device.type == "cpu":
        for graph in captured:
            graph.reset()  # before the connections that it sends on are closed
        dist.destroy_process_group()
    else:
        for group in (_group.hosts, _group.patient, _group.saving):
            dist.destroy_process_group(group)
    _group = None


def _missing(device: torch.device) -> str:
    """The processes that do not say that they are there, once one has been lost."""
    store, count = _group.store, world()
    missing, deadline = [], time.monotonic() + GRACE
    try:
        store.set(f"here/{rank()}", "")
        _leave(device, orderly=False)
        for other in range(count):
            left = datetime.timedelta(seconds=max(deadline - time.monotonic(), 0.1))
            try:
                store.wait([f"here/{other}"], left)
            except RuntimeError:
                missing.append(f"process {other} on {store.get(f'host/{other}').decode()}")
    except RuntimeError:  # the host that keeps the names is lost too
        missing = missing or ["the first node"]
    return ", ".join(missing)


def saving_group() -> dist.ProcessGroup | None:
    """The group that reads and writes states."""
    return _group and _group.saving


def wait_for_first() -> None:
    """Return once the first process is here too, however long it takes: it measures alone."""
    if _group is not None:
        dist.barrier(group=_group.patient)


def from_first(make: Callable[[], int]) -> int:
    """A number that the first process makes, on every process."""
    if _group is None:
        return make()
    word = torch.tensor(make() if rank() == 0 else 0)
    dist.broadcast(word, src=0, group=_group.hosts)
    return int(word)


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """The first process of each node goes through the block before the others do."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local:
        wait_for_first()
    try:
        yield
    finally:
        if not local:
            wait_for_first()


def gather(mine: torch.Tensor, total: int) -> torch.Tensor:
    """The rows of all processes, [total, …], where process r of w holds rows r, r + w, …"""
    if _group is None:
        return mine
    padded = mine.new_zeros(-(-total // world()), *mine.shape[1:])
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in range(world())]
    dist.all_gather(parts, padded, group=_group.hosts)
    return torch.stack(parts, dim=1).flatten(0, 1)[:total]


def any_(flag: bool) -> bool:
    """Whether the flag is set on any process: a word between the hosts, not the devices."""
    if _group is None:
        return flag
    word = torch.tensor(int(flag))
    dist.all_reduce(word, group=_group.hosts)
    return bool(word)


def first_text(text: str) -> str:
    """Of texts from all processes the first that is not empty, with its process, on all of them."""
    if _group is None:
        return text
    texts: list[str] = [""] * world()
    dist.all_gather_object(texts, text, group=_group.hosts)
    found = ((r, each) for r, each in enumerate(texts) if each)
    return "process {}: {}".format(*next(found)) if any(texts) else ""


def forget_messages() -> None:
    """Wait for no message that is on its way: a capture that failed has sent none."""
    for sender in _senders:
        sender.works.clear()


class Pace:
    """Keeps the host within a step of its device, where there are other processes.

    A device waits without end for one that is gone, and the host that reads from it waits along.
    Hosts have deadlines: they have to meet (any_) before each waits for its device. That the queue
    of launches is full in less than a step is left to the deadline of what eager steps send.
    """

    def __init__(self, device: torch.device):
        self.device = device if world() > 1 and device.type == "cuda" else None
        self.last: torch.cuda.Event | None = None

    def step(self) -> None:
        """A step has been launched: return when the one before it has ended."""
        if self.device:
            before, self.last = self.last, torch.cuda.Event()
            self.last.record()
            self._wait(before)

    def catch_up(self) -> None:
        """Return when the last step has ended."""
        self._wait(self.last)

    def _wait(self, event: "torch.cuda.Event | None") -> None:
        deadline = time.monotonic() + 60 * _group.minutes if event else 0
        while event and not event.query():
            if time.monotonic() > deadline:
                raise dist.DistError(f"{self.device} still waits for the other processes")
            time.sleep(5e-4)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over the processes, in place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


@dataclasses.dataclass(frozen=True)
class Layout:
    """How networks and their optimisers lie over the processes; see plan().

    mesh: of the processes, [shards] or [copies, shards]; None: whole networks everywhere.
    gathered: weights stay whole on the device between their uses in a step, and only gradients,
    moments, masters and the average are in parts.
    """

    mesh: DeviceMesh | None = None
    gathered: bool = True
    text: str = "one process"  # what it is, for people

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
        keep = {"mesh": self.mesh, "reshard_after_forward": not self.gathered, "mp_policy": types}
        for module in [m for m in net.modules() if isinstance(m, Block)] + [net]:
            fully_shard(module, **keep)
            module.set_reshard_after_backward(not self.gathered)
        register_fsdp_forward_method(net, "raw")

    def gradients(self, net: nn.Module) -> "Gradients":
        """Give the network's parameters gradients, and the processes a way to average them."""
        if self.mesh is not None:
            return ShardedGradients(net, self.mesh)
        return Gradients(net)


WHOLE = Layout()

# Bytes a parameter: masters, gradients and second moments of two networks, masters of the teacher
# and the average, and 16-bit copies or first moments, which are left out where there are none.
STATE = 40
GATHERED = 16  # of these, what is whole on every process while weights stay gathered
SHARE = 0.5  # of a device's memory that they may take; the rest is for activations


def plan(
    mode: str, net: nn.Module, device: torch.device, shard_group: int | None = None
) -> "Layout":
    """The layout that --parallel means for training networks of this one's size.

    auto takes ddp where the state fits beside the activations, and always on a CPU; then hsdp on
    several nodes and fsdp on one. shard_group: processes of an hsdp group, a node's by default.
    Sharded weights stay gathered between their uses where memory allows. Raises UserError for an
    unknown mode and for a group size that does not divide the processes.
    """
    if mode not in MODES:
        raise UserError(f"parallel={mode!r} is unknown: choose from {', '.join(MODES)}")
    group = shard_group or int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    parameters, memory = sum(p.numel() for p in net.parameters()), float("inf")
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory * SHARE
    if mode == "auto":
        if world() == 1 or parameters * STATE <= memory:
            mode = "ddp"
        else:
            mode = "hsdp" if world() > group else "fsdp"
    if mode == "ddp":
        text = f"whole on each of {world()} processes" if world() > 1 else "one process"
        return Layout(text=f"{text}: about {parameters * STATE / 1e9:.2g} GB of state")
    if mode == "fsdp":
        group, shape, names = world(), (world(),), ("shards",)
    else:
        if world() % group:
            raise UserError(
                f"shard_group={group} does not divide {world()} processes; choose a divisor, or "
                "--parallel fsdp"
            )
        shape, names = (world() // group, group), ("copies", "shards")
    gathered = parameters * (GATHERED + (STATE - GATHERED) / group) <= memory
    each = GATHERED + (STATE - GATHERED) / group if gathered else STATE / group
    text = f"{mode}: state in {group} parts"
    text += f", {world() // group} copies" if mode == "hsdp" else ""
    text += ", weights gathered" if gathered else ", weights gathered block by block"
    return Layout(
        init_device_mesh(device.type, shape, mesh_dim_names=names),
        gathered,
        f"{text}: about {parameters * each / 1e9:.2g} GB a process",
    )


class Gradients:
    """The gradients of a whole network: averages over the processes, in flat float32 buckets.

    How gradients flow. Backward produces one for each leaf that the network computed with: a
    parameter, or the low-precision copy that stands in for parameters (networks.layers.Leaf). A
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

    def __init__(self, net: EDMNetwork):
        self.params = list(net.parameters())
        self.buckets: list[torch.Tensor] = []
        self.members: list[list[nn.Parameter]] = []  # of each bucket
        self.bucket_of: dict[nn.Parameter, int] = {}
        leaves, size = net.leaves(), self.BUCKET
        if world() == 1:  # nothing is sent: fewer launches, for half a byte more a parameter
            size = max(size, sum(p.numel() for p in self.params) // 4)
        # Backward reaches the last layers first, so they fill the first buckets. A leaf that blocks
        # share has its gradient when backward has left the first block.
        shared = [p for leaf in leaves if len(leaf.parts) > 1 for _, of in leaf.parts for p in of]
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
        self.grads = {p: p.grad for p in self.params}
        for leaf in leaves:
            leaf.tensor.register_post_accumulate_grad_hook(partial(self._arrived, leaf.parts))
        self.first, self.sending, self.works = True, False, []
        _senders.add(self)

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

    def backward(self, loss: torch.Tensor, scale: float, last: bool) -> None:
        """Accumulate the gradients of scale·Σ loss [N]; the last round starts the averaging."""
        self.sending, self.works = last and world() > 1, []
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
        self.first = self.sending = False

    def _arrived(self, parts: list, leaf: torch.Tensor) -> None:
        grad, leaf.grad = leaf.grad, None
        for rows, params in parts:
            for p in params:
                number = self.bucket_of[p]
                self.missing[number].remove(p)  # a second gradient would overwrite the first
                self.taken[number].append((p, grad[rows]))
                if not self.missing[number]:
                    self._fill(number)
        # In order, whatever backward's: all processes must send the same.
        while self.sending and len(self.works) < len(self.buckets):
            if self.missing[len(self.works)]:
                break
            self._send()

    @torch.no_grad()
    def _fill(self, number: int) -> None:
        """Move the gradients that have arrived in this round into their bucket."""
        taken, self.taken[number] = self.taken[number], []
        if self.first and self.missing[number]:
            torch._foreach_zero_([self.grads[p] for p in self.missing[number]])
        for dtype in dict.fromkeys(grad.dtype for _, grad in taken):
            into, grads = zip(
                *((self.grads[p], grad) for p, grad in taken if grad.dtype == dtype), strict=True
            )
            if self.first:
                torch._foreach_copy_(into, grads)
                continue
            if dtype != torch.float32:  # foreach adds two types with one launch a tensor
                wide = [torch.empty_like(grad) for grad in into]
                torch._foreach_copy_(wide, grads)
                grads = wide
            torch._foreach_add_(into, grads)

    def _send(self) -> None:
        self.works.append(dist.all_reduce(self.buckets[len(self.works)], async_op=True))

    def wait(self) -> None:
        """Return when the gradients are averages over the processes."""
        if world() == 1:
            return
        while len(self.works) < len(self.buckets):  # held up by one that got no gradient
            self._send()
        for work in self.works:
            work.wait()
        torch._foreach_div_(self.buckets, world())

    def updated(self) -> None:
        """The parameters have new values."""

    def total(self, count: torch.Tensor) -> torch.Tensor:
        """What each process has counted in its own part of the gradients, over all parts."""
        return count


class ShardedGradients(Gradients):
    """FSDP2 accumulates and averages; every process keeps its part."""

    def __init__(self, net: nn.Module, mesh: DeviceMesh):
        self.params = list(net.parameters())
        for p in self.params:
            p.grad = torch.zeros_like(p)
        self.modules = sharded_modules(net)
        self.shards = mesh.get_group(mesh.ndim - 1)

    def zero(self) -> None:
        torch._foreach_zero_(local([p.grad for p in self.params]))

    def backward(self, loss: torch.Tensor, scale: float, last: bool) -> None:
        for module in self.modules:
            module.set_requires_gradient_sync(last, recurse=False)
        loss.backward(torch.full_like(loss, scale))

    def wait(self) -> None:
        pass

    def updated(self) -> None:
        for module in self.modules:
            module.reshard()

    def total(self, count: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(count, group=self.shards)
        return count


def sharded_modules(net: nn.Module) -> list:
    """The modules that FSDP2 shards; none if the network is whole."""
    if not dist.is_initialized():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [m for m in net.modules() if isinstance(m, FSDPModule)]


@torch.no_grad()
def local(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """This process's part of each tensor, where it has one: the memory itself, not a copy."""
    parts = [getattr(t, "to_local", lambda t=t: t)() for t in tensors]
    return [part for part in parts if part.numel()]


@torch.no_grad()
def whole(net: EDMNetwork, everywhere: bool = False) -> EDMNetwork | None:
    """The network, gathered if it is sharded, on the first process; None on the others, unless

    it is wanted everywhere. Every process has to call it. Tensor after tensor: a process that gets
    none holds no more than one whole.
    """
    modules, mine = sharded_modules(net), everywhere or rank() == 0
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
        value = p.full_tensor()
        if copy is not None:
            copy.get_parameter(name).copy_(value)
    return copy
