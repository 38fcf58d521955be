"""The ranks of a run: which one this process is, and what the hosts tell one another.

One process needs none of it.
"""

import contextlib
import datetime
import gc
import os
import signal
import socket
import traceback
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist

from sid_fast.errors import RunFailed, UserError
from sid_fast.performance import determinism, failure


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
        determinism.enable()
    return device


DEFAULT_TIMEOUT_MINUTES = (
    10.0  # that a process waits for the others, unless --timeout says otherwise
)
LONG_TIMEOUT = datetime.timedelta(days=7)  # for what has no stated length: downloads, snapshots
CHECKPOINT_TIMEOUT = datetime.timedelta(hours=1)  # a state


class _Group(NamedTuple):
    """Words between hosts, whatever the device, each on connections of its own; --timeout."""

    store: dist.Store
    minutes: float
    control: dist.ProcessGroup  # small messages in every step
    long_wait: dist.ProcessGroup  # barriers for work of unknown length on rank 0
    checkpoint: dist.ProcessGroup  # used by the thread that writes checkpoints


_group: _Group | None = None


@contextlib.contextmanager
def joined(
    device: torch.device, mode: str = "auto", minutes: float = DEFAULT_TIMEOUT_MINUTES
) -> Iterator[None]:
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
    groups = (
        dist.new_group(backend="gloo", timeout=t)
        for t in (timeout, LONG_TIMEOUT, CHECKPOINT_TIMEOUT)
    )
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
        failure.drop_pending_works()
        met: BaseException | None = error
        while met:
            traceback.clear_frames(met.__traceback__)
            met = met.__context__
        gc.collect()
        store = _group.store
        missing = failure.missing_ranks(store, me, count, lambda: _leave(device, orderly=False))
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
    global _group
    failure.unclean_exit = not orderly and world_size() > 1
    if not failure.unclean_exit or device.type == "cpu":
        for graph in failure.captured_graphs:
            graph.reset()  # before the connections that it sends on are closed
        dist.destroy_process_group()
    elif _group is not None:
        for group in (_group.control, _group.long_wait, _group.checkpoint):
            dist.destroy_process_group(group)
    _group = None


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def checkpoint_group() -> dist.ProcessGroup | None:
    """The group that reads and writes states."""
    return _group and _group.checkpoint


def barrier() -> None:
    """Return once the first process is here too, however long it takes: it measures alone."""
    if _group is not None:
        dist.barrier(group=_group.long_wait)


def broadcast_from_rank0(make: Callable[[], int]) -> int:
    """A number that the first process makes, on every process."""
    if _group is None:
        return make()
    word = torch.tensor(make() if rank() == 0 else 0)
    dist.broadcast(word, src=0, group=_group.control)
    return int(word)


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """The first process of each node goes through the block before the others do."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local:
        barrier()
    try:
        yield
    finally:
        if not local:
            barrier()


def gather(mine: torch.Tensor, total: int) -> torch.Tensor:
    """The rows of all processes, [total, …], where process r of w holds rows r, r + w, …"""
    if _group is None:
        return mine
    padded = mine.new_zeros(-(-total // world_size()), *mine.shape[1:])
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded, group=_group.control)
    return torch.stack(parts, dim=1).flatten(0, 1)[:total]


def all_reduce_any(flag: bool) -> bool:
    """Whether the flag is set on any process: a word between the hosts, not the devices."""
    if _group is None:
        return flag
    word = torch.tensor(int(flag))
    dist.all_reduce(word, group=_group.control)
    return bool(word)


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over the processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def first_text(text: str) -> str:
    """Of texts from all ranks the first that is not empty, with its rank, on all of them."""
    if _group is None:
        return text
    texts: list[str] = [""] * world_size()
    dist.all_gather_object(texts, text, group=_group.control)
    found = ((r, each) for r, each in enumerate(texts) if each)
    return "process {}: {}".format(*next(found)) if any(texts) else ""


def host_throttle(device: torch.device) -> failure.HostThrottle:
    """Keeps this host within a step of its device, where there are other ranks."""
    alone = world_size() == 1 or device.type != "cuda"
    return failure.HostThrottle(
        None if alone else device, _group.minutes if _group else DEFAULT_TIMEOUT_MINUTES
    )
