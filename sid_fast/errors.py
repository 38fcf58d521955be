"""The one exception that is the user's to mend."""

import torch


class UserError(Exception):
    """Bad input: its message names the file or field, the value and the way out.

    The commands print it as a single line and exit with status 2; everything else that is
    raised is a fault of ours and keeps its traceback.
    """


class WriteFailed(UserError):
    """A file that the disk does not take. A run that has begun goes on without it."""


class RunFailed(Exception):
    """A run that cannot go on: says why, and where its last good state is. Exit status 1."""


class OutOfMemory(torch.OutOfMemoryError):
    """The device had no memory for the phase and round that the message names.

    Networks and optimisers are as before the step, unless they are sharded. It is torch's own
    error, too, so that whoever handles that one need not know of this.
    """


class Fallback(UserWarning):
    """Something runs in a slower way than it was meant to; the message says why, in one line."""
