"""Fast Score identity Distillation (SiD) of EDM diffusion models into one-step generators.

`load_network` loads a teacher, and `Distiller` distils it with `Settings`. The commands are
`python -m sid_fast.train`, `.generate`, `.evaluate`, `.pretrain` and `.plan`.
"""

import signal as _signal
import sys as _sys

# Python starts a command with `-m`: a Ctrl-C during the seconds of imports ends it without a
# traceback. cli.main restores the handler.
if _sys.argv[:1] == ["-m"] and _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

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
