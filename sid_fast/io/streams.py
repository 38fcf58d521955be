"""Standard streams whose failures never end a command, and printing of text from files."""

import errno
import io
import os
import select
import sys
import time
from typing import Any, TextIO

from tqdm import tqdm

from sid_fast.errors import printable
from sid_fast.io import terminal

quiet = False  # --quiet: errors, warnings and the final result alone
last_output = 0.0  # time.monotonic() of the last line


class _LossyFile(io.FileIO):
    """A raw stream that drops output which cannot be written, as to a full disk or a closed pipe.

    Attributes:
        lost: the first error.
    """

    lost: OSError | None = None

    def write(self, data: Any) -> int:
        """Write, or drop, all or part of the data; returns the number of bytes."""
        try:
            while (written := super().write(data)) is None:  # a non-blocking pipe is full
                select.select([], [self], [])
            return written
        except OSError as error:
            self.lost = self.lost or error
            return memoryview(data).nbytes


def make_safe() -> None:
    """Make stdout and stderr accept any text and never raise; call it before any output.

    Characters outside a stream's encoding become "?". Output is dropped where the stream is closed,
    its reader has gone, or the disk is full. Streams that a program has replaced are left as they
    are.
    """
    terminal.loaded()
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # else the next file becomes stdout
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            raw = _LossyFile(stream.fileno(), "wb", closefd=False)
            safe = io.TextIOWrapper(
                io.BufferedWriter(raw),
                encoding=stream.encoding,
                errors="replace",
                line_buffering=stream.line_buffering or stream.write_through,
            )
            setattr(sys, name, safe)


def lost_output() -> str:
    """Flush stdout; the reason why part of it was lost, or "". A reader that left is no loss."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    lost = raw.lost if isinstance(raw, _LossyFile) else None
    return "" if lost is None or lost.errno == errno.EPIPE else os.strerror(lost.errno or 0)


def clean(text: str) -> str:
    """Make each line of a text printable and cut it (errors.LINE), since it may quote a file."""
    return "\n".join(map(printable, text.split("\n")))


def say(text: str, file: TextIO | None = None) -> None:
    """Print a text, cleaned, at once, above a live progress line; file: default stdout."""
    global last_output
    file = file or sys.stdout
    tqdm.write(clean(text), file=file)
    file.flush()
    last_output = time.monotonic()


def note(text: str, file: TextIO | None = None) -> None:
    """Print a text as `say` does, unless --quiet; file: default stderr."""
    if not quiet:
        say(text, file or sys.stderr)
