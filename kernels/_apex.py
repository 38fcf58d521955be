"""The group norm of NVIDIA's apex, an optional backend.

PyPI's `apex` is an unrelated package. NVIDIA's is recognised by its files, without importing it:
`import apex` would run the other package's code.

apex's FusedAdam is no backend of adam_ema: it neither cleans gradients nor updates an EMA, writes
no channels-last copy, and skips an update only on a loss scaler's flag. Adding those would take
four more passes over the weights. It also needs a first moment when β1 = 0.
"""

import functools
import importlib.util
from pathlib import Path
from types import ModuleType

import torch

FILES = ("contrib/group_norm/group_norm.py", "optimizers/fused_adam.py")
EXTENSION = "group_norm_cuda"  # optional in apex's build; a top-level module next to the package


def installed() -> bool:
    """Return whether `import apex` would find NVIDIA's, built with its group norm."""
    try:  # find_spec imports nothing for a top-level name
        package, extension = map(importlib.util.find_spec, ("apex", EXTENSION))
    except ValueError:  # sys.modules holds a module of that name without a spec
        return False
    folders = package and package.submodule_search_locations
    if not folders or extension is None:
        return False
    return all(Path(next(iter(folders)), file).is_file() for file in FILES)


@functools.cache
def _module() -> ModuleType:
    if not installed():
        raise RuntimeError("apex: NVIDIA's apex with its group norm is not installed")
    return importlib.import_module("apex.contrib.group_norm.group_norm")


def is_supported(x: torch.Tensor, groups: int) -> bool:
    """Return whether apex has a kernel for x: on a GPU, channels-last, known channel count."""
    known = _module().GroupNorm
    return (
        x.is_cuda
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.shape[1] in known.SUPPORTED_CHANNELS
        and groups in known.SUPPORTED_GROUPS
    )


def group_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, silu: bool
) -> torch.Tensor:
    """Return norm(x) or silu(norm(x)), differentiable, without any other fused operation.

    Args:
        x: [N, C, H, W], float32 or 16 bit, that `is_supported`; its incoming gradient must be
            channels-last.
        weight: [C].
        bias: [C].
        groups: number of groups.
        eps: added to the variance.
        silu: apply SiLU after the norm.
    """
    # apex's own rule since the A100.
    passes = "one" if x.shape[2] * x.shape[3] <= 1024 else "two"
    function = getattr(_module(), f"cuda_group_norm_nhwc_{passes}_pass")
    return function(x, groups, weight, bias, eps, "silu" if silu else "")
