"""Named ranges of a step in traces: a no-op unless --profile enables them."""

import contextlib
from collections.abc import Iterator

import torch

enabled = False
_NOTHING = contextlib.nullcontext()


def named(name: str) -> contextlib.AbstractContextManager:
    """Name what the block does, for torch.profiler and, where CUDA is, as an NVTX range."""
    return _range(name) if enabled else _NOTHING


@contextlib.contextmanager
def _range(name: str) -> Iterator[None]:
    nvtx: contextlib.AbstractContextManager = _NOTHING
    if torch.cuda.is_available():
        nvtx = torch.cuda.nvtx.range(name)
    with nvtx, torch.profiler.record_function(name):
        yield
