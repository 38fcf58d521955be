"""Pickles of upstream's layout, written opcode by opcode: no class of upstream is needed."""

import dataclasses
import pickle
import struct
from typing import Any

import torch

from sid_fast.models import EDM2Network, EDMNetwork
from sid_fast.models.edm_unet.config import ARCHITECTURES


@dataclasses.dataclass
class Call:
    """A call of a global with arguments, then BUILD with `state` unless that is None.

    Without arguments (None) it is the global itself.
    """

    module: str
    name: str
    args: tuple | None = ()
    state: Any = None


class Python2(bytes):
    """A str of Python 2."""


def dump(value: Any) -> bytes:
    """Pickle plain values, containers and Calls with protocol 2's opcodes, and no memo."""
    return b"\x80\x02" + _dump(value) + b"."


def _dump(value: Any) -> bytes:
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        body = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(body)]) + body
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    if isinstance(value, Python2):
        return b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, bytes):
        return b"B" + struct.pack("<I", len(value)) + value
    if isinstance(value, tuple | list):
        items = b"(" + b"".join(map(_dump, value))
        return items + b"t" if isinstance(value, tuple) else b"]" + items + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(_dump(v) for item in value.items() for v in item) + b"u"
    if isinstance(value, Call):
        named = f"c{value.module}\n{value.name}\n".encode()
        called = named if value.args is None else named + _dump(value.args) + b"R"
        return called if value.state is None else called + _dump(value.state) + b"b"
    raise TypeError(type(value))


def storage(tensor: torch.Tensor) -> bytes:
    """The bytes of a storage in torch.save's format from before 1.6."""
    kind = {torch.float16: "HalfStorage", torch.float32: "FloatStorage"}[tensor.dtype]
    count = tensor.numel()
    description = b"\x80\x02(" + _dump("storage") + f"ctorch\n{kind}\n".encode()
    description += _dump("0") + _dump("cpu") + _dump(count) + b"NtQ."
    parts = [pickle.dumps(v, 2) for v in (torch.serialization.MAGIC_NUMBER, 1001, {})]
    parts += [description, pickle.dumps(["0"], 2), struct.pack("<Q", count)]
    return b"".join(parts) + tensor.numpy().tobytes()


def tensor(value: torch.Tensor) -> Call:
    """A tensor as torch pickles it."""
    value = value.detach().contiguous()
    loaded = Call("torch.storage", "_load_from_bytes", (storage(value),))
    shape = tuple(value.shape), value.stride()
    return Call("torch._utils", "_rebuild_tensor_v2", (loaded, 0, *shape, False, {}))


def module(
    class_name: str, tensors: dict[str, Any], modules: dict[str, Any], **fields: Any
) -> Call:
    """A module of upstream's persistent classes."""
    state = {
        "_parameters": tensors,
        "_buffers": {},
        "_modules": modules,
        "_non_persistent_buffers_set": Call("builtins", "set", ([],)),
        "_init_args": (),
        "_init_kwargs": {},
    }
    meta = {"class_name": class_name, "module_src": "raise SystemExit", "state": state | fields}
    return Call("torch_utils.persistence", "_reconstruct_persistent_obj", (meta,))


def _part(source: torch.nn.Module) -> Call:
    values = {k: v for k, v in source.state_dict().items() if "." not in k}
    tensors = {k: tensor(v) for k, v in values.items()}
    children = {k: _part(child) for k, child in source.named_children()}
    return module(type(source).__name__, tensors, children)


def network_pickle(net: EDMNetwork, **arguments: Any) -> bytes:
    """Pickle a network as upstream would; `arguments` override those of its constructor."""

    config, kind = net.config, ARCHITECTURES[net.config.architecture]
    kwargs = {
        "img_resolution": config.resolution,
        "img_channels": config.channels,
        "label_dim": config.label_dim,
        "augment_dim": config.augment_dim,
        "model_type": kind.model_type,
        "embedding_type": kind.embedding_type,
        "encoder_type": kind.encoder_type,
        "model_channels": config.model_channels,
        "channel_mult": list(config.channel_mult),
        "num_blocks": config.num_blocks,
        "attn_resolutions": list(config.attention_resolutions),
        "dropout": config.dropout,
        "channel_mult_noise": kind.embedding_width,
        "resample_filter": list(kind.filter),
    }
    net_part = _part(net.model)
    root = module("EDMPrecond", {}, {"model": net_part}, _init_kwargs=kwargs | arguments)
    return dump({"ema": root, "dataset_kwargs": {"path": "/data"}})


def edm2_pickle(net: EDM2Network, class_name: str = "Precond", **arguments: Any) -> bytes:
    """Pickle an EDM2 network as upstream would; an argument of None is left out."""
    config = net.config
    kwargs = {
        "img_resolution": config.resolution,
        "img_channels": config.channels,
        "label_dim": config.label_dim,
        "use_fp16": True,
        "logvar_channels": config.logvar_channels or 128,
        "model_channels": config.model_channels,
        "channel_mult": list(config.channel_mult),
        "num_blocks": config.num_blocks,
        "attn_resolutions": list(config.attention_resolutions),
        "dropout": config.dropout,
    } | arguments
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    children = {name: _part(child) for name, child in net.named_children()}
    root = module(class_name, {}, children, _init_kwargs=kwargs)
    return dump({"ema": root, "encoder": module("StandardRGBEncoder", {}, {})})
