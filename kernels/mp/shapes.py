"""The networks' shapes: bytes moved, and configurations to compile ahead of time."""

import itertools
from collections.abc import Iterator
from typing import Any

from sid_fast.kernels.mp import cat, norm, scale
from sid_fast.kernels.mp import sum as addition

# (channels, side), or (channels, channels of skip, side), of the sizes XS and M by operation.
# qkv_norm is pixel_norm without SiLU, of heads of 64 channels; its shapes depend on the head alone.
LEVELS = (
    *((128, 64), (256, 32), (384, 16), (512, 8)),
    *((256, 64), (512, 32), (768, 16), (1024, 8)),
)
SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "pixel_norm": (*LEVELS, (896, 8)),
    "qkv_norm": ((1152, 16),),
    "scaled_silu": LEVELS,
    "sum": ((256, 32),),
    "cat_silu": (
        *((128, 128, 64), (256, 128, 64), (256, 256, 32), (384, 256, 32), (384, 384, 16)),
        *((512, 512, 8), (512, 256, 64), (512, 512, 32), (768, 768, 16), (1024, 1024, 8)),
        *((512, 8), (1024, 8)),
    ),
}
HEAD = 64  # channels of a head
# Tensors the size of the result that a launch reads or writes: forward, backward.
TENSORS = {
    "pixel_norm": (3, 4), "qkv_norm": (2, 3), "scaled_silu": (2, 3), "sum": (3, 4),
    "cat_silu": (2, 4),
}  # fmt: skip


def bytes_moved(
    operation: str, shape: tuple[int, ...], samples: int, itemsize: int, backward: bool
) -> int:
    """Return the bytes of feature maps that a launch must read and write at least.

    Assumes that every output has a gradient and that nothing is clipped.

    Args:
        operation: a key of SHAPES.
        shape: as the values of SHAPES.
        samples: batch size.
        itemsize: bytes per element.
        backward: whether to count the backward kernel.
    """
    *channels, side = shape
    elements = samples * _total(channels) * side**2
    return elements * itemsize * TENSORS[operation][backward]


def _total(channels: list[int]) -> int:
    left, *right = channels
    return left + (right[0] if right else 0)


def _variants(operation: str, backward: bool) -> Iterator[tuple[str, set[str]]]:
    """Yield (label suffix, pointers and scalars that are None)."""
    if operation == "scaled_silu":
        yield "", {"seed_ptr"}
        yield " dropout", set()
        if backward:
            yield " frozen", {"seed_ptr", "dscale_ptr"}
    elif operation == "sum":
        yield "", {"limit", "clipped_ptr", "out_ptr"} if backward else {"limit"}
        yield " clip", set()
    elif operation == "qkv_norm":
        yield "", {"s_ptr", "s_grad_ptr"}
    else:
        yield "", set()


def configurations() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """Yield (label, kernel, signature, constants, warps, stages) of SHAPES in every dtype.

    Labels are "OPERATION DIRECTION [dropout|frozen|clip] CHANNELS@SIZE DTYPE".
    """
    modules = {
        "pixel_norm": norm, "qkv_norm": norm, "scaled_silu": scale, "sum": addition,
        "cat_silu": cat,
    }  # fmt: skip
    types = {
        "seed_ptr": "*i64", "clipped_ptr": "*i8", "rows": "i32:16", "pixels": "i32:16",
        "size": "i32:16", "drop": "i32",
        **dict.fromkeys(("a_gain", "b_gain", "left_gain", "right_gain", "limit"), "fp32"),
    }  # fmt: skip
    itemsizes = {"bf16": 2, "fp16": 2, "fp32": 4}
    for operation, backward, dtype in itertools.product(SHAPES, (False, True), itemsizes):
        module: Any = modules[operation]
        kernel = module.backward_kernel if backward else module.forward_kernel
        for shape, (variant, absent) in itertools.product(
            SHAPES[operation], list(_variants(operation, backward))
        ):
            *channels, side = shape
            constants: dict[str, Any] = {"BLOCK": addition.BLOCK, "num_warps": addition.WARPS}
            if operation == "cat_silu":
                constants = cat.launch(channels[0], _total(channels) - channels[0])
            elif operation == "scaled_silu":
                constants = scale.launch(channels[0], side**2, backward)
            elif module is norm:
                row = HEAD if operation == "qkv_norm" else channels[0]
                constants = norm.launch(row, itemsizes[dtype], backward)
            constants = dict(constants)
            if operation == "cat_silu" and len(channels) == 1:
                absent = absent | {"skip_ptr", "skip_grad_ptr", "dskip_ptr"}
            warps = constants.pop("num_warps")
            constants |= {name: None for name in kernel.arg_names if name in absent}
            signature = {
                name: types.get(name, f"*{dtype}")
                for name in kernel.arg_names
                if name not in constants
            }
            direction = "backward" if backward else "forward"
            size = f"{'+'.join(map(str, channels))}@{side}x{side}"
            label = f"{operation} {direction}{variant} {size} {dtype}"
            yield label, kernel, signature, constants, warps, 3
