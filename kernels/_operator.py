"""Register torch operators."""

from collections.abc import Callable, Sequence

import torch

_LIBRARY = torch.library.Library("sid_fast", "FRAGMENT")


def operator(
    name: str, function: Callable, fake: Callable, mutates_args: Sequence[str] = ()
) -> Callable:
    """Register torch.ops.sid_fast.NAME and return it.

    torch.library.custom_op would add 10 µs of Python to every call.

    Args:
        name: the operator's name.
        function: its implementation on CPU and CUDA; the annotations are the schema.
        fake: takes the same arguments and returns outputs of the right shape and dtype.
        mutates_args: names of the arguments that `function` writes to.
    """
    _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=mutates_args))
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, function, key)
    torch.library.register_fake(f"sid_fast::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.sid_fast, name).default


def differentiate(name: str, backward: Callable, save: Callable) -> None:
    """Register an operator's gradient, as torch.library.register_autograd does."""
    torch.library.register_autograd(f"sid_fast::{name}", backward, setup_context=save, lib=_LIBRARY)
