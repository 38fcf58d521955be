"""Exceptions and warnings with messages for the user."""

import torch


class UserError(Exception):
    """Invalid input; the message names the file or field, its value and a remedy.

    Commands print it as one line and exit with status 2. Other exceptions, except RunFailed, are
    bugs and keep their traceback.
    """


class WriteFailed(UserError):
    """A file cannot be written; once training has begun, the run continues without it."""


class RunFailed(Exception):
    """A run cannot continue; the message says why and names its last good state. Exit status 1."""


class OutOfMemory(torch.OutOfMemoryError):
    """The device ran out of memory in the phase and micro-batch that the message names.

    Networks and optimisers are as before the step, unless they are sharded. Subclasses torch's
    error, so that handlers of that one also catch it.
    """


class Fallback(UserWarning):
    """Warning that a slower path is used; the message says why, in one line."""
