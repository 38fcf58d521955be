"""A lost rank: finding out, saying who it was, and leaving without waiting for it."""

import datetime
import time
import weakref
from collections.abc import Callable

import torch
import torch.distributed as dist

PEER_REPLY_SECONDS = (
    5.0  # seconds in which a process that has lost another one says that it is there
)

captured_graphs: weakref.WeakSet = weakref.WeakSet()  # CUDA graphs, which may send messages
grad_syncs: weakref.WeakSet = weakref.WeakSet()  # what has `works`: messages on their way
unclean_exit = False  # others were left in the middle of something: nothing here may wait for them


def drop_pending_works() -> None:
    """Wait for no message that is on its way: a capture that failed has sent none."""
    for sender in grad_syncs:
        sender.works.clear()


def missing_ranks(store: dist.Store, rank: int, count: int, leave: Callable[[], None]) -> str:
    """The ranks that do not say that they are there, once one has been lost.

    leave() closes the connections to the others, so that those notice at once.
    """
    missing, deadline = [], time.monotonic() + PEER_REPLY_SECONDS
    try:
        store.set(f"here/{rank}", "")
        leave()
        for other in range(count):
            left = datetime.timedelta(seconds=max(deadline - time.monotonic(), 0.1))
            try:
                store.wait([f"here/{other}"], left)
            except RuntimeError:
                missing.append(f"process {other} on {store.get(f'host/{other}').decode()}")
    except RuntimeError:  # the host that keeps the names is lost too
        missing = missing or ["the first node"]
    return ", ".join(missing)


class HostThrottle:
    """Keeps the host within a step of its device, so that it can tell when a peer is lost.

    NCCL waits forever for a dead peer, and a blocking read would hang the host too. Hosts have
    deadlines of their own: they exchange a flag every step before each waits for its device.
    device: None where nothing has to be waited for; minutes: how long a step may take.
    """

    def __init__(self, device: torch.device | None, minutes: float):
        self.device, self.minutes = device, minutes
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
        deadline = time.monotonic() + 60 * self.minutes
        while event and not event.query():
            if time.monotonic() > deadline:
                raise dist.DistError(f"{self.device} still waits for the other processes")
            time.sleep(5e-4)
