"""Read EDM teacher and SiD generator pickles without executing anything in them.

Every global that a pickle names is looked up in a short table of record classes, which only store
their arguments. The result is a tree of plain values and records, from which untrusting code then
builds the weights. Any malformed file ends in a UserError.
"""

import io
import math
import os
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from sid_fast.errors import UserError


@dataclass(frozen=True)
class PickledNetwork:
    """The network in a pickle: how to build it and its weights.

    Attributes:
        class_name: class of the pickled network.
        init_kwargs: its constructor's arguments: None, bool, int, float, str and lists of these.
        state: parameters and persistent buffers by state_dict name, contiguous float32 on the CPU.
    """

    class_name: str
    init_kwargs: dict[str, Any]
    state: dict[str, torch.Tensor]


def read_pickle(path: str | os.PathLike[str]) -> PickledNetwork:
    """Read the network under key `ema` of an EDM or SiD pickle; executes nothing in the file.

    Raises:
        UserError: the file is missing, truncated or damaged, holds no such network, or names a
            global that these files do not need.
    """
    try:
        with open(path, "rb") as file:
            data = _Unpickler(file).load()
        return _network(data)
    except (EOFError, _CutShort) as error:
        raise UserError(f"{path} is cut short: copy or download it again") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the path") from error
    except _Refused as error:
        raise UserError(f"{path} is not a usable EDM or SiD network pickle: {error}") from error
    except Exception as error:  # damaged bytes can fail in any way
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"{path} is damaged or not an EDM or SiD network pickle ({reason}): "
            "copy or download it again"
        ) from error


class _Refused(Exception):
    """The pickle is readable but not acceptable; the message says why."""


class _CutShort(Exception):
    """The file is truncated."""


class _Record:
    """Stand-in for a function or class named in the file: stores its arguments, does nothing.

    The BUILD opcode normally sets attributes. Here it only calls `__setstate__`, which stores the
    state on a record and fails on a record class. `__slots__` leaves no `__dict__` to fill.
    """

    __slots__ = ("args", "state")
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> "_Record":
        record = super().__new__(cls)
        record.args, record.state = args, None
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Persistent(_Record):
    __slots__ = ()


class _Container(_Record):
    __slots__ = ()


class _Parameter(_Record):
    __slots__ = ()


class _Tensor(_Record):
    __slots__ = ()


class _Storage(_Record):
    __slots__ = ()


class _Scalar(_Record):
    __slots__ = ()


class _Dict(dict):
    """Stand-in for every dict class; drops attributes set by BUILD."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass


_GLOBALS: dict[tuple[str, str], Any] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _Persistent,
    ("dnnlib.util", "EasyDict"): _Dict,
    ("collections", "OrderedDict"): _Dict,
    ("torch.nn.modules.container", "ModuleDict"): _Container,
    ("torch.nn.modules.container", "ModuleList"): _Container,
    ("torch.nn.modules.container", "Sequential"): _Container,
    ("torch._utils", "_rebuild_parameter"): _Parameter,
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
    ("torch.storage", "_load_from_bytes"): _Storage,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "DoubleStorage"): torch.float64,
    ("numpy", "dtype"): _Record,
    ("numpy", "ndarray"): _Record,
    ("numpy.core.multiarray", "scalar"): _Scalar,
    ("numpy._core.multiarray", "scalar"): _Scalar,
    ("numpy.core.multiarray", "_reconstruct"): _Record,
    ("numpy._core.multiarray", "_reconstruct"): _Record,
}


def _plain_keys(keys: list[Any]) -> None:
    """Refuse keys that nest: hashing a tuple a million levels deep would crash the process."""
    if any(isinstance(key, tuple | frozenset) for key in keys):
        raise _Refused("it has dict keys or set members that are not plain values")


# The pure-Python unpickler: a single PUT opcode can make the C one allocate 64 GB.
_Base: Any = pickle._Unpickler  # type stubs lack its stack and handlers


class _Unpickler(_Base):
    # BYTEARRAY8 allocates its declared size; the EXT opcodes' cache bypasses find_class.
    dispatch: ClassVar[dict[int, Any]] = {
        code: load
        for code, load in pickle._Unpickler.dispatch.items()
        if code not in pickle.BYTEARRAY8 + pickle.EXT1 + pickle.EXT2 + pickle.EXT4
    }

    def load_setitem(self) -> None:
        _plain_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        _plain_keys(self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        _plain_keys(self.stack[::2])
        super().load_dict()

    def load_additems(self) -> None:
        _plain_keys(self.stack)
        super().load_additems()

    def load_frozenset(self) -> None:
        _plain_keys(self.stack)
        super().load_frozenset()

    dispatch |= {
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        pickle.ADDITEMS[0]: load_additems,
        pickle.FROZENSET[0]: load_frozenset,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _GLOBALS[module, name]
        except KeyError:
            raise _Refused(
                f"it names {f'{module}.{name}'!r}, which such a file does not need "
                "(nothing was executed): get the file from a source you trust"
            ) from None


class _StorageUnpickler(_Unpickler):
    def persistent_load(self, pid: Any) -> Any:
        return pid


def _network(data: Any) -> PickledNetwork:
    if not isinstance(data, dict) or "ema" not in data:
        raise _Refused("it has no entry 'ema': give a network snapshot")
    if not isinstance(data["ema"], _Persistent):
        raise _Refused("its entry 'ema' is not a network: give a network snapshot")
    class_name = data["ema"].args[0]["class_name"]
    fields = _fields(data["ema"])
    if fields["_init_args"]:
        raise _Refused(
            "its network was built with positional arguments, so they cannot be identified"
        )
    return PickledNetwork(
        class_name=str(class_name),
        init_kwargs={str(key): _plain(value) for key, value in fields["_init_kwargs"].items()},
        state=dict(_tensors(data["ema"], "", set())),
    )


def _fields(module: Any) -> dict[str, Any]:
    """The `__dict__` of a pickled module."""
    if isinstance(module, _Persistent):
        return module.args[0]["state"]
    if isinstance(module, _Container):
        return module.state
    raise _Refused(f"a {type(module).__name__} stands where a network module should")


def _tensors(module: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters and persistent buffers in state_dict order."""
    fields = _fields(module)
    _visit(fields, seen)
    tensors = dict(fields["_parameters"])
    hidden = fields.get("_non_persistent_buffers_set", ())
    tensors.update({k: v for k, v in fields["_buffers"].items() if k not in hidden})
    for name, record in tensors.items():
        if record is not None:
            yield prefix + name, _tensor(record, seen)
    for name, child in fields["_modules"].items():
        if child is not None:
            yield from _tensors(child, f"{prefix}{name}.", seen)


def _visit(part: Any, seen: set[int]) -> None:
    """Refuse a part that occurs twice: a small file could expand exponentially that way."""
    if id(part) in seen:
        raise _Refused("parts of its network are shared, which no EDM or SiD network does")
    seen.add(id(part))


def _tensor(record: Any, seen: set[int]) -> torch.Tensor:
    if isinstance(record, _Parameter):
        record = record.args[0]
    if not isinstance(record, _Tensor) or not isinstance(record.args[0], _Storage):
        raise _Refused(f"a {type(record).__name__} stands where a tensor should")
    storage, offset, size, stride = record.args[:4]
    (raw,) = storage.args
    _visit(raw, seen)
    flat = _storage(raw)
    if math.prod(size) > flat.numel():  # stride 0 would repeat elements
        raise _Refused(f"a tensor of shape {size} has a storage of {flat.numel()} elements")
    view = flat.as_strided(size, stride, offset)  # checks the bounds
    return view.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def _storage(raw: bytes) -> torch.Tensor:
    """Read all elements of a storage in torch.save's format from before 1.6.

    The format: five pickles (magic number, version, machine, the storage's description, its key),
    the number of elements as int64, then the elements. These pickles are as untrusted as the outer
    one, and torch.load allows far more globals than they need.
    """
    file = io.BytesIO(raw)
    magic, version, _, description, _ = (_StorageUnpickler(file).load() for _ in range(5))
    if magic != torch.serialization.MAGIC_NUMBER or version != torch.serialization.PROTOCOL_VERSION:
        raise _Refused("its tensors are in an unknown format")
    kind, dtype, _, _, _, view = description
    if kind != "storage" or not isinstance(dtype, torch.dtype) or view is not None:
        raise _Refused("its tensors are in an unknown format")
    size = int.from_bytes(file.read(8), "little") * dtype.itemsize
    elements = bytearray(file.read(size))
    if len(elements) != size:
        raise _CutShort
    return torch.frombuffer(elements, dtype=dtype)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain_scalar(item) for item in value]
    return _plain_scalar(value)


def _plain_scalar(value: Any) -> bool | int | float | str | None:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, _Scalar):
        dtype, raw = value.args
        code = f"{dtype.state[1]}{dtype.args[0]}"  # byte order, then kind and size
        if re.fullmatch(r"[<>|][biuf][1248]", code):  # in particular no object dtype
            return np.frombuffer(raw, code).item()
    raise _Refused(f"the network's arguments hold a {type(value).__name__}, not a plain value")
