"""Fast Score identity Distillation (SiD) of EDM diffusion models into one-step generators.

`load_network` loads a teacher, and `Distiller` distils it with `Settings`. The commands are
`python -m sid_fast.train`, `.tune`, `.plan`, `.generate`, `.evaluate`, `.report` and `.pretrain`.
"""

import os as _os
import signal as _signal
import sys as _sys

# A command, which Python is about to import.
if _sys.argv[:1] == ["-m"] or _os.path.basename(_sys.argv[0] if _sys.argv else "") == "sid-fast":
    # Ctrl-C during the seconds of imports ends it without a traceback; cli.main takes over.
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    # Without C++ stack traces of connections to a lost process. PyTorch reads it when imported.
    _os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

    from sid_fast.io import terminal as _terminal

    _terminal.announce_loading()

from sid_fast import augment, losses, noise, sampling
from sid_fast.config.types import Settings, SiDASettings
from sid_fast.distiller import Distiller
from sid_fast.methods.sid import Draw
from sid_fast.models.registry import load_network, save_network

__all__ = [
    "Distiller",
    "Draw",
    "Settings",
    "SiDASettings",
    "augment",
    "load_network",
    "losses",
    "noise",
    "sampling",
    "save_network",
]
