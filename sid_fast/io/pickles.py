"""Read network pickles and pickled arrays without executing anything in them.

Every global that a pickle names is looked up in a short table of record classes, which only store
their arguments. The result is a tree of plain values and records, from which untrusting code then
builds the weights. Any malformed file ends in a UserError, in time and memory that its size bounds.
"""

import io
import os
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from sid_fast.errors import UserError
from sid_fast.io.untrusted import (
    MAX_NETWORK_BYTES,
    Refused,
    brief,
    checked_int,
    checked_shape,
    naming,
    open_limited,
)

_MAX_OPCODES = 500_000  # the largest EDM network has some 70,000
_MAX_STORAGE_OPCODES = 1000  # of each pickle within a tensor's storage, which has about 20
_MAX_ARRAY_BYTES = 2**30  # of a pickle of arrays; CIFAR-100 has 155 MB
_MAX_ARRAY_OPCODES = 2_000_000  # CIFAR-100 has some 200,000: labels and file names
_MAX_TENSORS = 100_000
_MAX_DEPTH = 16  # of modules in modules
_MAX_NAME = 200  # characters of a module's or tensor's name
_MAX_ARGUMENTS = 100  # of the network's constructor
_MAX_ITEMS = 99_999  # of an argument: the longest are classes


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
    with (
        naming(path, "an EDM or SiD network pickle"),
        open_limited(path, MAX_NETWORK_BYTES) as file,
    ):
        try:
            return _network(_Unpickler(file, _MAX_OPCODES).load())
        except (EOFError, _CutShort) as error:
            raise _cut_short(path) from error


def read_arrays_pickle(path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """Read a pickled dict of lists, text and uint8 arrays, such as a batch of CIFAR-10.

    Nothing in the file is executed. Bytes of Python 2 become text (latin1).

    Args:
        path: of the file.
        what: what it should be, for errors.

    Raises:
        UserError: the file is missing, cut short or damaged, or holds anything else.
    """
    with naming(path, what), open_limited(path, _MAX_ARRAY_BYTES) as file:
        try:
            data = _Unpickler(file, _MAX_ARRAY_OPCODES, encoding="latin1").load()
        except EOFError as error:
            raise _cut_short(path) from error
        values = _typed(data, dict, "its content")
        return {k: _array(v) if isinstance(v, _Record) else v for k, v in values.items()}


def _array(record: "_Record") -> np.ndarray:
    """The uint8 array of a record of numpy's _reconstruct, whose state is that of an ndarray."""
    state = _typed(record.state, tuple, "an array")
    if len(state) != 5 or not isinstance(state[2], _Record) or state[2].args[:1] != ("u1",):
        raise Refused("it holds an array of another type than uint8")
    raw = state[4].encode("latin1") if isinstance(state[4], str) else _bytes(state[4])
    shape = checked_shape(state[1], len(raw), "the shape of an array")
    return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if state[3] is True else "C")


def _cut_short(path: str | os.PathLike[str]) -> UserError:
    return UserError(f"{path} is cut short: delete it, then copy or download it again")


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


class _Set(_Record):
    """A set as protocols 2 and 3 write it: a call with a list."""

    __slots__ = ()


class _Encoded(_Record):
    """Bytes as protocol 2 writes them: text and the name of its encoding, latin1."""

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
    ("builtins", "set"): _Set,
    ("__builtin__", "set"): _Set,
    ("_codecs", "encode"): _Encoded,
    ("numpy", "dtype"): _Record,
    ("numpy", "ndarray"): _Record,
    ("numpy.core.multiarray", "scalar"): _Scalar,
    ("numpy._core.multiarray", "scalar"): _Scalar,
    ("numpy.core.multiarray", "_reconstruct"): _Record,
    ("numpy._core.multiarray", "_reconstruct"): _Record,
}


def _plain_keys(keys: list[Any]) -> None:
    """Refuse keys other than text.

    Hashing a tuple a million levels deep would crash the process, and numbers can be chosen to
    collide, which makes a dict's time quadratic; the hash of text is secret.
    """
    if not all(type(key) is str for key in keys):
        raise Refused("it has dict keys or set members that are not plain text")


# The pure-Python unpickler: a single PUT opcode can make the C one allocate 64 GB.
_Base: Any = pickle._Unpickler  # type stubs lack its stack and handlers

# Opcodes of protocols 2 to 5, without those that such files don't need and that cost more than
# their bytes: BYTEARRAY8 allocates its declared size, EXT bypasses find_class, LONG4 and the text
# of protocol 0 (I, L, p, …) hold integers of any length.
_REFUSED_OPCODES = (
    pickle.BYTEARRAY8 + pickle.NEXT_BUFFER + pickle.READONLY_BUFFER + pickle.EXT1 + pickle.EXT2
    + pickle.EXT4 + pickle.LONG4 + pickle.INT + pickle.LONG + pickle.FLOAT + pickle.STRING
    + pickle.UNICODE + pickle.PUT + pickle.GET + pickle.PERSID + pickle.NEWOBJ_EX
)  # fmt: skip


class _Opcodes(dict):
    """The handlers of one unpickler; looking one up counts an opcode."""

    def __init__(self, handlers: dict[int, Any], limit: int):
        super().__init__(handlers)
        self.left = limit

    def __getitem__(self, code: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise Refused("it has far more objects than a network needs")
        return super().__getitem__(code)

    def __missing__(self, code: int) -> Any:
        raise Refused(f"byte 0x{code:02x} stands where it has no meaning; the file may be damaged")


class _Unpickler(_Base):
    dispatch: ClassVar[dict[int, Any]] = {
        code: load
        for code, load in pickle._Unpickler.dispatch.items()
        if code not in _REFUSED_OPCODES
    }

    def __init__(self, file: Any, max_opcodes: int, encoding: str = "ASCII"):
        super().__init__(file, encoding=encoding)
        self.dispatch = _Opcodes(self.dispatch, max_opcodes)  # type: ignore[misc]

    def _check_call(self) -> None:
        """Refuse a call that is not of a record class with a short tuple.

        Each call copies its arguments: 10,000 calls with one tuple of 100,000 items take 8 GB.
        """
        function, arguments = self.stack[-2:]
        if not (isinstance(function, type) and issubclass(function, _Record | _Dict)):
            raise Refused(f"it calls {brief(function)}")
        if type(arguments) is not tuple or len(arguments) > 16:
            raise Refused("it calls a function with arguments that such a file does not need")

    def load_reduce(self) -> None:
        self._check_call()
        super().load_reduce()

    def load_newobj(self) -> None:
        self._check_call()
        super().load_newobj()

    def load_build(self) -> None:
        if not isinstance(self.stack[-2], _Record | _Dict):
            raise Refused(f"it sets the state of {brief(self.stack[-2])}")
        super().load_build()

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
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.BUILD[0]: load_build,
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
            raise Refused(
                f"it names {brief(f'{module[:100]}.{name[:100]}', 201)}, which such a file does "
                "not need (nothing was executed): get the file from a source you trust"
            ) from None


class _StorageUnpickler(_Unpickler):
    def persistent_load(self, pid: Any) -> Any:
        return pid


def _typed(value: Any, kind: type | tuple[type, ...], what: str) -> Any:
    if not isinstance(value, kind):
        raise Refused(f"{what} is {brief(value)}")
    return value


def _network(data: Any) -> PickledNetwork:
    if not isinstance(data, dict) or "ema" not in data:
        raise Refused("it has no entry 'ema': give a network snapshot")
    if not isinstance(data["ema"], _Persistent):
        raise Refused("its entry 'ema' is not a network: give a network snapshot")
    class_name = _typed(data["ema"].args[0]["class_name"], str, "the class of its network")
    fields = _fields(data["ema"])
    if fields["_init_args"]:
        raise Refused(
            "its network was built with positional arguments, so they cannot be identified"
        )
    kwargs = _typed(fields["_init_kwargs"], dict, "its list of arguments")
    if len(kwargs) > _MAX_ARGUMENTS or any(len(key) > _MAX_NAME for key in kwargs):
        raise Refused("its network has more arguments than an EDM network")
    state: dict[str, torch.Tensor] = {}
    for name, tensor in _tensors(data["ema"], "", 0, set()):
        state[name] = tensor
        if len(state) > _MAX_TENSORS:
            raise Refused(f"its network has more than {_MAX_TENSORS:,} tensors")
    return PickledNetwork(
        class_name=class_name[:_MAX_NAME],
        init_kwargs={key: _plain(value) for key, value in kwargs.items()},
        state=state,
    )


def _fields(module: Any) -> dict[str, Any]:
    """The `__dict__` of a pickled module."""
    if isinstance(module, _Persistent):
        return _typed(module.args[0]["state"], dict, "the state of a module")
    if isinstance(module, _Container):
        return _typed(module.state, dict, "the state of a module")
    raise Refused(f"a {type(module).__name__} stands where a network module should")


def _tensors(
    module: Any, prefix: str, depth: int, seen: set[int]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters and persistent buffers in state_dict order."""
    if depth > _MAX_DEPTH:
        raise Refused(f"its modules nest deeper than {_MAX_DEPTH} levels")
    fields = _fields(module)
    _visit(fields, seen)
    parameters, buffers, modules = (
        _typed(fields[name], dict, f"{name} of a module")
        for name in ("_parameters", "_buffers", "_modules")
    )
    for part in (parameters, buffers, modules):
        _visit(part, seen)
        if any(len(name) > _MAX_NAME for name in part):
            raise Refused(f"a name in it has more than {_MAX_NAME} characters")
    hidden = _members(fields.get("_non_persistent_buffers_set", ()), seen)
    records = parameters | {k: v for k, v in buffers.items() if k not in hidden}
    for name, record in records.items():
        if record is not None:
            yield prefix + name, _tensor(record, seen)
    for name, child in modules.items():
        if child is not None:
            yield from _tensors(child, f"{prefix}{name}.", depth + 1, seen)


def _members(value: Any, seen: set[int]) -> set[str]:
    if isinstance(value, _Set):
        (value,) = value.args or ((),)
    if isinstance(value, list):
        _visit(value, seen)
        _plain_keys(value)
    elif value != ():
        _typed(value, (set, frozenset), "_non_persistent_buffers_set of a module")
    return set(value)


def _visit(part: Any, seen: set[int]) -> None:
    """Refuse a part that occurs twice: a small file could expand exponentially that way."""
    if id(part) in seen:
        raise Refused("parts of its network are shared, which no EDM or SiD network does")
    seen.add(id(part))


def _tensor(record: Any, seen: set[int]) -> torch.Tensor:
    if isinstance(record, _Parameter):
        record = record.args[0]
    if not isinstance(record, _Tensor) or not isinstance(record.args[0], _Storage):
        raise Refused(f"a {type(record).__name__} stands where a tensor should")
    storage, offset, size, stride = record.args[:4]
    (raw,) = storage.args
    _visit(raw, seen)
    flat = _storage(_bytes(raw))
    # No more elements than the storage has: stride 0 would repeat them.
    size = checked_shape(size, flat.numel(), "the shape of a tensor")
    if not isinstance(stride, list | tuple) or len(stride) != len(size):
        raise Refused(f"the strides of a tensor are {brief(stride)}")
    stride = [checked_int(step, 0, 2**63 - 1, "the stride of a tensor") for step in stride]
    offset = checked_int(offset, 0, flat.numel(), "the offset of a tensor")
    view = flat.as_strided(size, stride, offset)  # checks the bounds
    return view.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def _bytes(value: Any) -> bytes:
    if isinstance(value, _Encoded):
        text, encoding = value.args
        if isinstance(text, str) and encoding == "latin1":
            return text.encode("latin1")
    return _typed(value, bytes, "the storage of a tensor or number")


def _storage(raw: bytes) -> torch.Tensor:
    """Read all elements of a storage in torch.save's format from before 1.6.

    The format: five pickles (magic number, version, machine, the storage's description, its key),
    the number of elements as int64, then the elements. These pickles are as untrusted as the outer
    one, and torch.load allows far more globals than they need.
    """
    file = io.BytesIO(raw)
    magic, version, _, description, _ = (
        _StorageUnpickler(file, _MAX_STORAGE_OPCODES).load() for _ in range(5)
    )
    if magic != torch.serialization.MAGIC_NUMBER or version != torch.serialization.PROTOCOL_VERSION:
        raise Refused("its tensors are in an unknown format")
    kind, dtype, _, _, _, view = description
    if kind != "storage" or not isinstance(dtype, torch.dtype) or view is not None:
        raise Refused("its tensors are in an unknown format")
    size = int.from_bytes(file.read(8), "little") * dtype.itemsize
    elements = bytearray(file.read(size))
    if len(elements) != size:
        raise _CutShort
    return torch.frombuffer(elements, dtype=dtype)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        if len(value) > _MAX_ITEMS:
            raise Refused("the network's arguments hold a list that is too long")
        return [_plain_scalar(item) for item in value]
    return _plain_scalar(value)


def _plain_scalar(value: Any) -> bool | int | float | str | None:
    if isinstance(value, bool | float | None):
        return value
    if isinstance(value, int) and abs(value) < 2**63:
        return value
    if isinstance(value, str) and len(value) <= _MAX_NAME:
        return value
    if isinstance(value, _Scalar):
        dtype, raw = value.args
        order, kind = dtype.state[1], dtype.args[0]
        # In particular no object dtype.
        if order in ("<", ">", "|") and isinstance(kind, str) and _NUMBER.fullmatch(kind):
            return np.frombuffer(_bytes(raw), order + kind, 1).item()
    raise Refused(f"the network's arguments hold a {type(value).__name__}, not a plain value")


_NUMBER = re.compile(r"[biuf][1248]")
