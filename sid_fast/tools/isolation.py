"""Child processes that may crash, hang or run out of memory without harm to the run.

They are forked from a server that has imported torch and never opens a GPU: each child starts in a
fraction of a second, with a GPU context of its own that ends with it.
"""

import contextlib
import multiprocessing
import os
import signal
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

from sid_fast.errors import is_out_of_memory

PRELOAD = ["torch", "sid_fast.tools.trial"]
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # a child is alone


OUT_OF_MEMORY = "out of memory"
BUSY = "busy or unavailable"  # CUDA's error on a GPU whose compute mode admits one process


class Failed(Exception):
    """Why a child gave no answer, in a line. The child has ended."""


class Child:
    """An object in a process of its own: make(*arguments), made at the first call.

    make, its arguments and what methods return travel by pickle. Used as a context manager, it
    ends with the block.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.closed = False
        self.connection, theirs = context.Pipe()
        self.errors = tempfile.NamedTemporaryFile()  # noqa: SIM115  # closed by close()
        self.process = context.Process(
            target=_serve, args=(theirs, self.errors.name, make, arguments), daemon=True
        )
        self.process.start()
        theirs.close()

    def call(self, method: str, *arguments: Any, limit: float) -> Any:
        """What the method returns; Failed if it raises, crashes, or takes over `limit` seconds."""
        self.ask(method, *arguments, limit=limit)
        return self.answer()

    def ask(self, method: str, *arguments: Any, limit: float) -> None:
        """Start a call; answer() waits for its end, and several children work meanwhile."""
        if self.closed:
            raise Failed("has ended")
        self.limit = limit
        with contextlib.suppress(BrokenPipeError):  # answer() says how it ended
            self.connection.send((method, arguments, limit))

    def answer(self) -> Any:
        """Wait for the end of the call; see call."""
        failure, value = "", None
        try:
            if self.connection.poll(self.limit):
                failure, value = self.connection.recv()
            else:
                failure = f"did not end in {self.limit:g} s"
        except (EOFError, ConnectionResetError):
            failure = self._ending()
        if failure:
            self.close()
            raise Failed(failure)
        return value

    def _ending(self) -> str:
        """How the process ended without an answer."""
        self.process.join(10)
        status = self.process.exitcode
        if status and status < 0:
            return f"ended by {signal.Signals(-status).name}"
        self.errors.seek(0)
        last = self.errors.read().decode(errors="replace").strip().rpartition("\n")[2]
        return last[:300] or f"exit status {status}"

    def close(self) -> None:
        """Kill the process; later calls fail."""
        self.closed = True
        self.process.kill()
        self.process.join(5)  # one that hangs in the driver outlives it
        self.connection.close()
        self.errors.close()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def lacks_room(reason: str) -> bool:
    """Whether a child failed for the other processes on its GPU; alone it may succeed."""
    return OUT_OF_MEMORY in reason or BUSY in reason


def reason_of(error: BaseException) -> str:
    """An error in a line."""
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    return (str(error).strip().partition("\n")[0] or type(error).__name__)[:300]


def _serve(connection: Any, errors: str, make: Callable[..., Any], arguments: tuple) -> None:
    """The child: calls methods until its parent closes the connection."""
    for name in TORCHRUN:
        os.environ.pop(name, None)
    try:
        file = os.open(errors, os.O_WRONLY | os.O_APPEND)
    except FileNotFoundError:  # its parent wants it no more
        os._exit(1)
    os.dup2(file, 1)
    os.dup2(file, 2)
    made = None
    with contextlib.suppress(EOFError):
        while True:
            method, inputs, limit = connection.recv()
            signal.alarm(int(limit) + 10)  # whoever would end it may be gone
            try:
                if made is None:
                    made = make(*arguments)
                answer = "", getattr(made, method)(*inputs)
            except Exception as error:
                traceback.print_exc()
                answer = reason_of(error), None
            signal.alarm(0)
            connection.send(answer)
    os._exit(0)  # an orderly end waits for the device
