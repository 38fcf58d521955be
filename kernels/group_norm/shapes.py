"""Where the networks normalise: shapes, bytes, and what to compile ahead of time."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from sid_fast.kernels.group_norm.backward import backward_kernel
from sid_fast.kernels.group_norm.forward import forward_kernel
from sid_fast.kernels.group_norm.launch import launch

# Where the published networks normalise: form -> (channels, side). norm0 of a block normalises what
# the block before gave it: all of it ("plain", after attention), or convolution, bias and residual
# ("sum"), with a skip connection in the decoder: (of x, of the connection, side). norm1
# has the embedding added (DDPM++), or scale and shift besides the bias of the convolution (ADM).
# norm2, before attention, has no activation.
PLACES = {
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
    "norm1 film": (
        *((192, 64), (384, 64), (192, 32), (384, 32), (576, 32)),
        *((384, 16), (576, 16), (768, 16), (576, 8), (768, 8)),
    ),
    "norm2": ((384, 32), (256, 16), (576, 16), (256, 8), (768, 8)),
}


# Which arguments a part of a form brings, forward and backward.
_ALWAYS = "x y stats weight bias", "h y_grad dx stats weight bias dparam"
_ARGUMENTS = {
    "plain": ("", "h_grad h_for_skip_grad"),
    "sum": ("residual x_bias h", "h_grad h_for_skip_grad dx_bias"),
    "norm1": ("seed", "seed"),
    "norm2": ("residual x_bias h", "h_grad dx_bias"),
    "add": ("add", "add dadd"),
    "film": ("add scale shift", "add dadd scale shift dscale dshift"),
    "skip": ("skip", "skip skip_grad dskip"),
    "down": ("resampled", "resampled_grad"),
    "up": ("resampled", "resampled_grad"),
}
# Outputs that a part leaves without a consumer: h is used resampled, and the encoder alone forks.
_UNUSED = {"down": {"h_grad"}, "up": {"h_grad", "h_for_skip_grad"}, "skip": {"h_for_skip_grad"}}


def _arguments(form: str, backward: bool) -> set[str]:
    given = set(_ALWAYS[backward].split())
    for part in form.split():
        given |= set(_ARGUMENTS[part][backward].split())
    return given.difference(*(_UNUSED.get(part, ()) for part in form.split()))


def _resample_of(form: str) -> str | None:
    return next((part for part in form.split() if part in ("down", "up")), None)


def bytes_moved(
    form: str, place: tuple[int, ...], samples: int, itemsize: int, backward: bool
) -> int:
    """What a launch must read and write of activations; form and place as in PLACES.

    The second pass over a sample finds it in the cache. Backward is that of a training network.
    """
    *channels, side = place
    left, total = channels[0], sum(channels)
    width = {"down": side // 2, "up": side * 2, None: side}[_resample_of(form)]
    elements = {
        **dict.fromkeys(("x", "residual", "h", "h_grad", "h_for_skip_grad", "dx"), left * side**2),
        **dict.fromkeys(("skip", "skip_grad", "dskip"), (total - left) * side**2),
        **dict.fromkeys(("y", "y_grad"), total * width**2),
        **dict.fromkeys(("resampled", "resampled_grad"), left * width**2),
    }
    return samples * itemsize * sum(elements.get(v, 0) for v in _arguments(form, backward))


def _variants(form: str, backward: bool) -> Iterator[tuple[str, set[str]]]:
    """(name, arguments): training is nameless; norm1 also with dropout, backward also frozen."""
    given = _arguments(form, backward)
    yield "", given - {"seed"}
    if "seed" in given:
        yield " dropout", given
    if backward:
        yield " frozen", given - {"seed", "dparam", "dx_bias", "dadd", "dscale", "dshift"}


def configurations() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """(label, kernel, signature, constants, warps, stages) of the PLACES in every type.

    Labels are "WAY FORM [dropout|frozen] CHANNELS@SIZE TYPE".
    """
    kinds = dict.fromkeys(("stats", "weight", "bias", "dparam", "x_bias", "dx_bias"), "*fp32")
    kinds |= {"seed": "*i64", "eps": "fp32", "x_scale": "fp32"}
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    kernels = {"forward": forward_kernel, "backward": backward_kernel}
    for form, (way, kernel), dtype in itertools.product(PLACES, kernels.items(), dtypes):
        backward = way == "backward"
        variants = list(_variants(form, backward))
        for place, (variant, given) in itertools.product(PLACES[form], variants):
            *channels, side = place
            launched = launch(
                (sum(channels), side, side), channels[0], dtypes[dtype], 32,
                form != "norm2", _resample_of(form), backward,
            )  # fmt: skip
            constants = dict(launched.constants)
            warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
            if backward and not {"dx_bias", "x_bias"} & _arguments(form, backward):
                constants["x_scale"] = None  # 1, where nothing was added
            if launched.tiles == 1:
                constants["tiles"] = 1
            signature = {}
            for argument in kernel.arg_names:
                name = argument.removesuffix("_ptr")
                if name != argument and name not in given:
                    constants[argument] = None
                elif argument not in constants:
                    kind = "i32" if name == argument else f"*{dtype}"
                    signature[argument] = kinds.get(name, kind)
            size = f"{'+'.join(map(str, channels))}@{side}x{side}"
            label = f"{way} {form}{variant} {size} {dtype}"
            yield label, kernel, signature, constants, warps, stages
