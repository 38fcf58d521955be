"""Exceptions and warnings with messages for the user."""

import re

import torch

LINE = 500  # characters of a message


def one_line(text: object) -> str:
    """Make one line of text that a terminal can show, also where a file or a server made it.

    Unprintable characters, such as those of escape sequences, become U+FFFD, and white space
    becomes one space. The `user:password@` of a URL is left out. A line above LINE characters loses
    its middle: the start names the file, the end says the way out.
    """
    text = re.sub(r"(?<=://)[^/?#\s]*@", "", str(text))
    if len(text) > 8 * LINE:  # cut first, as it may have megabytes
        text = text[: 4 * LINE] + " … " + text[-4 * LINE :]
    return printable(" ".join(text.split()))


def printable(line: str) -> str:
    """Replace unprintable characters of a line and cut its middle, as one_line; keeps spaces."""
    line = "".join(c if c.isprintable() else "\ufffd" for c in line)
    if len(line) > LINE:
        line = line[: LINE // 2] + " … " + line[3 - LINE // 2 :]
    return line


class UserError(Exception):
    """Invalid input; the message names the file or field, its value and a remedy.

    Commands print it as one line and exit with status 2. Other exceptions, except RunFailed, are
    bugs and keep their traceback.

    Args:
        message: Made printable and cut by one_line, since it may quote a file.
    """

    def __init__(self, message: object = ""):
        super().__init__(one_line(message))


class WriteFailed(UserError):
    """A file cannot be written; once training has begun, the run continues without it."""


class RunFailed(Exception):
    """A run cannot continue; the message says why and names its last good state. Exit status 1."""

    def __init__(self, message: object = ""):
        super().__init__(one_line(message))


class OutOfMemory(torch.OutOfMemoryError):
    """The device ran out of memory in the phase and micro-batch that the message names.

    Networks and optimisers are as before the step, unless they are sharded. Subclasses torch's
    error, so that handlers of that one also catch it.
    """


# Of libraries that allocate beside PyTorch on a GPU that is nearly full: Triton, CUDA, cuBLAS.
_ALLOCATION_FAILED = "out of memory", "STATUS_ALLOC_FAILED"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device ran out of memory, in PyTorch's allocator or beside it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(w in str(error) for w in _ALLOCATION_FAILED)


def allocation_request(error: BaseException) -> str:
    """Return what an out-of-memory error asked for, without the allocator's statistics."""
    return ". ".join(str(error).split(". ")[:2])


class Fallback(UserWarning):
    """Warning that a slower path is used; the message says why, in one line."""
