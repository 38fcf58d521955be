"""Processes: who we are among them, and what they add up. One process needs none of it."""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from sid_fast.errors import UserError


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


# The others wait while the first process measures a snapshot.
TIMEOUT = datetime.timedelta(hours=1)
_hosts: dist.ProcessGroup | None = None  # for words between hosts, whatever the device


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Among the other processes, if torchrun started us with any, for the length of the block."""
    global _hosts
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device, timeout=TIMEOUT)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    _hosts = dist.new_group(backend="gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()
        _hosts = None


def from_first(make: Callable[[], int]) -> int:
    """A number that the first process makes, on every process."""
    if _hosts is None:
        return make()
    word = torch.tensor(make() if rank() == 0 else 0)
    dist.broadcast(word, src=0, group=_hosts)
    return int(word)


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """The first process of each node goes through the block before the others do."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    if _hosts is not None and local:
        dist.barrier(group=_hosts)
    try:
        yield
    finally:
        if _hosts is not None and not local:
            dist.barrier(group=_hosts)


def gather(mine: torch.Tensor, total: int) -> torch.Tensor:
    """The rows of all processes, [total, …], where process r of w holds rows r, r + w, …"""
    if _hosts is None:
        return mine
    padded = mine.new_zeros(-(-total // world()), *mine.shape[1:])
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in range(world())]
    dist.all_gather(parts, padded, group=_hosts)
    return torch.stack(parts, dim=1).flatten(0, 1)[:total]


def any_(flag: bool) -> bool:
    """Whether the flag is set on any process: a word between the hosts, not the devices."""
    if _hosts is None:
        return flag
    word = torch.tensor(int(flag))
    dist.all_reduce(word, group=_hosts)
    return bool(word)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def average_(tensors: list[torch.Tensor]) -> None:
    """Average tensors over the processes, in place and in one message."""
    if not dist.is_initialized():
        return
    flat = torch._utils._flatten_dense_tensors(tensors)
    dist.all_reduce(flat)
    flat /= world()
    torch._foreach_copy_(tensors, torch._utils._unflatten_dense_tensors(flat, tensors))
