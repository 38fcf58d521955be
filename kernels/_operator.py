"""One way to register torch operators."""

from collections.abc import Callable, Sequence

import torch

_LIBRARY = torch.library.Library("sid_fast", "FRAGMENT")


def operator(
    name: str, function: Callable, fake: Callable, mutates_args: Sequence[str] = ()
) -> Callable:
    """Register torch.ops.sid_fast.NAME and return it.

    function's annotations are the schema, as for torch.library.custom_op, which would cost 10 us
    of Python more a call. fake: its outputs' shapes and types, without values. mutates_args: the
    arguments it writes.
    """
    _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=mutates_args))
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, function, key)
    torch.library.register_fake(f"sid_fast::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.sid_fast, name).default


def differentiate(name: str, backward: Callable, save: Callable) -> None:
    """Give an operator its gradient; see torch.library.register_autograd."""
    torch.library.register_autograd(f"sid_fast::{name}", backward, setup_context=save, lib=_LIBRARY)
