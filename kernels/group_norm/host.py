"""The host build of csrc/group_norm.cpp: norm, conditioning and SiLU in one pass on a CPU."""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from sid_fast.kernels import _cuda
from sid_fast.kernels._operator import operator

# Fewer elements run on one thread: waking the others would take longer.
PARALLEL_NUMEL = 32768


class _Norm(ctypes.Structure):
    """GroupNorm in csrc/interface.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "add", "scale", "shift")),
        *((name, ctypes.c_int64) for name in ("samples", "channels", "pixels", "groups")),
        *((name, ctypes.c_int64) for name in ("add_stride", "scale_shift_stride", "silu")),
        ("eps", ctypes.c_double),
    ]


class _Grads(ctypes.Structure):
    """GroupNormGrads in csrc/interface.h."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("y_grad", "dx", "param_sums", "dparam", "dadd", "dscale", "dshift")
    ]


def is_supported(
    x: torch.Tensor, tensors: tuple[torch.Tensor | None, ...], unfused: tuple[Any, ...]
) -> bool:
    """Return whether the host build can compute a norm.

    Args:
        x: the norm's input; must be on a CPU and contiguous.
        tensors: weight, bias and conditioning; like x, float32.
        unfused: arguments of operations that the build does not fuse; all must be unset.
    """
    return (
        x.device.type == "cpu"
        and x.is_contiguous()
        and all(t is None or t.dtype == torch.float32 for t in (x, *tensors))
        and not any(option is not None for option in unfused)
    )


def rows(*values: torch.Tensor | None) -> tuple[tuple[torch.Tensor | None, ...], int]:
    """Return [N, C] tensors with contiguous rows and one common row stride, and that stride."""
    given = [v for v in values if v is not None]
    if not given:
        return values, 0
    if len({v.stride() for v in given}) > 1 or given[0].stride(1) != 1:
        given = [v.contiguous() for v in given]
    return tuple(given), given[0].stride(0)


def _pointer(t: torch.Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _threads(x: torch.Tensor) -> int:
    return torch.get_num_threads() if x.numel() >= PARALLEL_NUMEL else 1


def _describe(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    add: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[_Norm, tuple[torch.Tensor | None, ...]]:
    """Return the C++ build's arguments, and the tensors to keep alive while it reads them."""
    (add,), add_stride = rows(add)
    (scale, shift), scale_shift_stride = rows(scale, shift)
    tensors = (x, weight.contiguous(), bias.contiguous(), add, scale, shift)
    n, channels, height, width = x.shape
    norm = _Norm(
        *map(_pointer, tensors), n, channels, height * width, groups,
        add_stride, scale_shift_stride, silu, eps,
    )  # fmt: skip
    return norm, tensors


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    add: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y and the statistics [2, N, groups]: mean and 1/std."""
    y, stats = _forward_fake(x, weight, bias, add, scale, shift, groups, eps, silu)
    norm, _alive = _describe(x, weight, bias, add, scale, shift, groups, eps, silu)
    library = _cuda.library()
    assert library is not None  # otherwise `choose` would not return "cuda"
    library.sid_fast_group_norm_host(
        ctypes.byref(norm), y.data_ptr(), stats.data_ptr(), _threads(x)
    )
    return y, stats


def _forward_fake(x, weight, bias, add, scale, shift, groups, eps, silu):
    return torch.empty_like(x), x.new_empty((2, len(x), groups))


def _backward(
    y_grad: torch.Tensor,
    x: torch.Tensor,
    stats: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    add: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    eps: float,
    silu: bool,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of x, (weight, bias) as [2, C], add, scale and shift.

    wanted: whether to compute those of weight and bias, of add, of scale and shift; the others are
    empty.
    """
    dx, dparam, dadd, dscale, dshift = out = _backward_fake(
        y_grad, x, stats, weight, bias, add, scale, shift, eps, silu, wanted
    )
    has_param, has_add, has_scale_shift = wanted
    norm, _alive = _describe(x, weight, bias, add, scale, shift, stats.shape[2], eps, silu)
    param_sums = x.new_empty((2, *x.shape[:2])) if has_param else None
    grads = _Grads(
        *map(_pointer, (y_grad, dx, param_sums)),
        dparam.data_ptr() if has_param else None,
        dadd.data_ptr() if has_add else None,
        *((dscale.data_ptr(), dshift.data_ptr()) if has_scale_shift else (None, None)),
    )
    library = _cuda.library()
    assert library is not None
    pointers = ctypes.byref(norm), ctypes.byref(grads), stats.data_ptr()
    library.sid_fast_group_norm_backward_host(*pointers, _threads(x))
    return out


def _backward_fake(y_grad, x, stats, weight, bias, add, scale, shift, eps, silu, wanted):
    has_param, has_add, has_scale_shift = wanted
    rows = x.shape[:2]
    return (
        torch.empty_like(x),
        x.new_empty((2, len(weight)) if has_param else 0),
        x.new_empty(rows if has_add else 0),
        *(x.new_empty(rows if has_scale_shift else 0) for _ in range(2)),
    )


_forward_operator = operator("group_norm_host", _forward, _forward_fake)
_backward_operator = operator("group_norm_host_backward", _backward, _backward_fake)


def _is_plain(x: torch.Tensor) -> bool:
    """Return whether x holds values that nothing traces; calls then skip the operator's 30 µs."""
    traced = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
    return type(x) in (torch.Tensor, torch.nn.Parameter) and not traced


class _HostGroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, add, scale, shift, groups, eps, silu):
        tensors = (weight, bias, add, scale, shift)
        run = _forward if _is_plain(x) else _forward_operator
        y, stats = run(x, *tensors, groups, eps, silu)
        ctx.save_for_backward(x, stats, *tensors)
        ctx.options = eps, silu
        return y

    @staticmethod
    def backward(ctx, y_grad):
        needs = ctx.needs_input_grad
        wanted = has_param, has_add, has_scale_shift = [
            needs[1] or needs[2],
            needs[3],
            needs[4] or needs[5],
        ]
        run: Callable[..., Any] = _backward if _is_plain(y_grad) else _backward_operator
        dx, dparam, dadd, dscale, dshift = run(
            y_grad.contiguous(), *ctx.saved_tensors, *ctx.options, wanted
        )
        return (
            dx,
            *(dparam.unbind() if has_param else (None, None)),
            dadd if has_add else None,
            *((dscale, dshift) if has_scale_shift else (None, None)),
            *[None] * 3,
        )


def group_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    add: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    silu: bool,
) -> torch.Tensor:
    """Return silu(norm(x + add)·(scale + 1) + shift), differentiable; see kernels.group_norm.

    Saves x and the statistics for the backward pass, which computes the rest again. The result does
    not depend on the number of threads. The arguments must be `is_supported`.
    """
    return _HostGroupNorm.apply(x, weight, bias, add, scale, shift, groups, eps, silu)
