"""The networks' group norms: shapes, bytes moved, and configurations to compile ahead of time."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from sid_fast.kernels.group_norm.backward import backward_kernel
from sid_fast.kernels.group_norm.forward import forward_kernel
from sid_fast.kernels.group_norm.launch import launch

# Shapes of the upstream networks' norms by fusion, that is, by the operations fused with the norm:
# (channels, side), or (channels of h, channels of skip, side) with a skip connection.
#   plain  a block's norm0 after a stored tensor
#   sum    a block's norm0 that also adds up the previous block's convolution, bias and residual
#   norm1  a block's norm1, with the embedding as `add` (DDPM++), or with the convolution's bias as
#          `add` and the embedding as `scale` and `shift` (ADM)
#   norm2  the norm before attention, without SiLU
#   down, up, skip  also resamples, or reads a skip connection (decoder)
NORM_SHAPES = {
    "plain": ((384, 32), (576, 16), (256, 16), (256, 8), (768, 8)),
    "plain down": ((384, 32), (256, 16), (576, 16)),
    "plain up": ((384, 32), (256, 16), (576, 16), (768, 8)),
    "plain skip": (
        *((384, 192, 32), (384, 384, 32), (576, 384, 16), (576, 576, 16)),
        *((768, 576, 8), (768, 768, 8)),
    ),
    "sum": (
        *((128, 64), (192, 64), (256, 32), (128, 32), (192, 32)),
        *((256, 16), (384, 16), (256, 8), (576, 8)),
    ),
    "sum down": ((128, 64), (192, 64), (256, 32)),
    "sum up": ((256, 32), (256, 8)),
    "sum skip": (
        *((128, 128, 64), (256, 128, 64), (192, 192, 64), (384, 192, 64)),
        *((256, 128, 32), (256, 256, 32), (576, 384, 32), (256, 256, 16), (768, 576, 16)),
        *((256, 256, 8), (768, 768, 8)),
    ),
    "norm1 add": ((128, 64), (256, 64), (128, 32), (256, 32), (256, 16), (256, 8)),
    "norm1 scale_shift": (
        *((192, 64), (384, 64), (192, 32), (384, 32), (576, 32)),
        *((384, 16), (576, 16), (768, 16), (576, 8), (768, 8)),
    ),
    "norm2": ((384, 32), (256, 16), (576, 16), (256, 8), (768, 8)),
}


# Arguments of the forward and the backward kernel: those of every norm, and those that each word of
# a fusion adds.
_ALWAYS = "x y stats weight bias", "h y_grad dx stats weight bias dparam"
_ARGUMENTS = {
    "plain": ("", "h_grad h_for_skip_grad"),
    "sum": ("residual x_bias h", "h_grad h_for_skip_grad dx_bias"),
    "norm1": ("seed", "seed"),
    "norm2": ("residual x_bias h", "h_grad dx_bias"),
    "add": ("add", "add dadd"),
    "scale_shift": ("add scale shift", "add dadd scale shift dscale dshift"),
    "skip": ("skip", "skip skip_grad dskip"),
    "down": ("resampled", "resampled_grad"),
    "up": ("resampled", "resampled_grad"),
}
# Gradients that a word of a fusion removes, because that output has no consumer: only the resampled
# h is used, and only encoder blocks feed skip connections.
_UNUSED = {"down": {"h_grad"}, "up": {"h_grad", "h_for_skip_grad"}, "skip": {"h_for_skip_grad"}}


def kernel_arguments(fusion: str, backward: bool) -> set[str]:
    """Return the names of the tensors that a kernel gets; `fusion` is a key of NORM_SHAPES."""
    given = set(_ALWAYS[backward].split())
    for word in fusion.split():
        given |= set(_ARGUMENTS[word][backward].split())
    return given.difference(*(_UNUSED.get(word, ()) for word in fusion.split()))


def _resample_of(fusion: str) -> str | None:
    return next((word for word in fusion.split() if word in ("down", "up")), None)


def bytes_moved(
    fusion: str, shape: tuple[int, ...], samples: int, itemsize: int, backward: bool
) -> int:
    """Return the bytes of activations that a launch must read and write at least.

    Assumes that the second pass over a sample hits the cache, and that all parameters are trained.

    Args:
        fusion: a key of NORM_SHAPES.
        shape: as the values of NORM_SHAPES.
        samples: batch size.
        itemsize: bytes per element.
        backward: whether to count the backward kernel.
    """
    *channels, side = shape
    left, total = channels[0], sum(channels)
    width = {"down": side // 2, "up": side * 2, None: side}[_resample_of(fusion)]
    elements = {
        **dict.fromkeys(("x", "residual", "h", "h_grad", "h_for_skip_grad", "dx"), left * side**2),
        **dict.fromkeys(("skip", "skip_grad", "dskip"), (total - left) * side**2),
        **dict.fromkeys(("y", "y_grad"), total * width**2),
        **dict.fromkeys(("resampled", "resampled_grad"), left * width**2),
    }
    return samples * itemsize * sum(elements.get(v, 0) for v in kernel_arguments(fusion, backward))


def _variants(fusion: str, backward: bool) -> Iterator[tuple[str, set[str]]]:
    """Yield (label suffix, arguments): training, with dropout (norm1), frozen (backward)."""
    given = kernel_arguments(fusion, backward)
    yield "", given - {"seed"}
    if "seed" in given:
        yield " dropout", given
    if backward:
        yield " frozen", given - {"seed", "dparam", "dx_bias", "dadd", "dscale", "dshift"}


def configurations() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """Yield (label, kernel, signature, constants, warps, stages) of NORM_SHAPES in every dtype.

    Labels are "DIRECTION FUSION [dropout|frozen] CHANNELS@SIZE DTYPE".
    """
    types = dict.fromkeys(("stats", "weight", "bias", "dparam", "x_bias", "dx_bias"), "*fp32")
    types |= {"seed": "*i64", "eps": "fp32", "x_scale": "fp32"}
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    kernels = {"forward": forward_kernel, "backward": backward_kernel}
    for fusion, (direction, kernel), dtype in itertools.product(
        NORM_SHAPES, kernels.items(), dtypes
    ):
        backward = direction == "backward"
        variants = list(_variants(fusion, backward))
        for shape, (variant, given) in itertools.product(NORM_SHAPES[fusion], variants):
            *channels, side = shape
            launched = launch(
                (sum(channels), side, side), channels[0], dtypes[dtype], 32,
                fusion != "norm2", _resample_of(fusion), backward,
            )  # fmt: skip
            constants = dict(launched.constants)
            warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
            if backward and not {"dx_bias", "x_bias"} & kernel_arguments(fusion, backward):
                constants["x_scale"] = None  # x_scale is 1 unless something was added
            if launched.tiles == 1:
                constants["tiles"] = 1
            signature = {}
            for argument in kernel.arg_names:
                name = argument.removesuffix("_ptr")
                if name != argument and name not in given:
                    constants[argument] = None
                elif argument not in constants:
                    default = "i32" if name == argument else f"*{dtype}"
                    signature[argument] = types.get(name, default)
            size = f"{'+'.join(map(str, channels))}@{side}x{side}"
            label = f"{direction} {fusion}{variant} {size} {dtype}"
            yield label, kernel, signature, constants, warps, stages
