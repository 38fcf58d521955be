"""The one door for untrusted bytes: every reader of files that others made goes through it.

Sizes are checked before anything is read, types before anything is formatted, and depths and counts
are bounded. A file's first bytes decide what it is, never its name.
"""

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, BinaryIO, Literal

from sid_fast.errors import UserError

Kind = Literal[
    "pickle", "torch", "safetensors", "npz", "npy", "zip", "json", "png", "jpeg", "html", "xml",
    "lfs", "gzip", "bzip2", "xz", "zstd", "7z", "tar", "hdf5", "empty", "unknown",
]  # fmt: skip
FIRST_BYTES = 512  # enough for sniff
_CHUNK = 1 << 20  # bytes
MAX_NETWORK_BYTES = 1 << 36  # of a network's file; the largest EDM network has 1.2e9

# What a file of each kind is, and the way out where there is only one.
_DESCRIPTIONS: dict[Kind, str] = {
    "pickle": "a pickle",
    "torch": "a file of torch.save",
    "safetensors": "a safetensors file",
    "npz": "a NumPy archive (.npz)",
    "npy": "a NumPy array (.npy)",
    "zip": "a zip archive",
    "json": "a JSON file",
    "png": "a PNG image",
    "jpeg": "a JPEG image",
    "html": "an HTML page, such as a server shows for a login or an error",
    "xml": "an XML document, such as a server answers with for an error",
    "lfs": "a Git LFS pointer, not the file itself (`git lfs pull` gets it)",
    "gzip": "compressed with gzip (`gunzip` unpacks it)",
    "bzip2": "compressed with bzip2 (`bunzip2` unpacks it)",
    "xz": "compressed with xz (`unxz` unpacks it)",
    "zstd": "compressed with zstd (`unzstd` unpacks it)",
    "7z": "a 7z archive",
    "tar": "a tar archive (`tar -xf` unpacks it)",
    "hdf5": "an HDF5 file",
    "empty": "empty",
    "unknown": "of an unknown kind",
}

_MAGIC: dict[bytes, Kind] = {
    b"\x89PNG\r\n\x1a\n": "png",
    b"\xff\xd8\xff": "jpeg",
    b"\x93NUMPY": "npy",
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"\x89HDF\r\n\x1a\n": "hdf5",
    b"version https://git-lfs": "lfs",
}
# The first member of a file of torch.save or torch.jit.save; before 1.6 a pickled magic number.
_TORCH_MEMBER = re.compile(rb"[^/]+/(data\.pkl|data/\d+|constants\.pkl|\.format_version|code/.*)")
_OLD_TORCH = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


class Refused(UserError):
    """Bytes that are refused; the message lacks the name of the file, which `naming` adds."""


@contextmanager
def naming(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Turn any exception of the block into a UserError that names the file.

    UserErrors that are not Refused name it already and pass unchanged. Damaged bytes can fail in
    any way, so every Exception counts as damage; its text is not shown, as the file made it.

    Args:
        path: the file that the block reads.
        what: what it should be, such as "an EDM network pickle".
    """
    try:
        yield
    except Refused as error:
        raise UserError(f"{path} cannot be used as {what}: {error}") from error
    except UserError:
        raise
    except OSError as error:
        raise unreadable(path, error) from error
    except Exception as error:
        raise UserError(
            f"{path} is damaged or not {what} ({type(error).__name__}): delete it, then copy "
            "or download it again"
        ) from error


def require_file(path: str | os.PathLike[str], max_bytes: int) -> int:
    """Return a file's size without opening it.

    Raises:
        UserError: it is missing, no regular file (a device or a pipe may never end), or larger
            than `max_bytes`.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise unreadable(path, error) from error
    if stat.S_ISDIR(status.st_mode):
        raise UserError(f"{path} is a folder: give the name of a file")
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is a device or a pipe: give the name of a regular file")
    if status.st_size > max_bytes:
        raise UserError(
            f"{path} has {status.st_size:,} bytes, more than the {max_bytes:,} that such a file "
            "may have: give another file"
        )
    return status.st_size


def open_limited(path: str | os.PathLike[str], max_bytes: int) -> BinaryIO:
    """Open a file that require_file accepts, for reading; UserError if that fails."""
    require_file(path, max_bytes)
    try:
        return open(path, "rb")
    except OSError as error:
        raise unreadable(path, error) from error


def read_limited(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """Read a whole file of at most `max_bytes`; UserError for a larger or an unreadable one."""
    with open_limited(path, max_bytes) as file:
        try:
            data = file.read(max_bytes + 1)
        except OSError as error:
            raise unreadable(path, error) from error
    if len(data) > max_bytes:  # it has grown, or says 0 bytes as files in /proc do
        raise UserError(f"{path} has more than the {max_bytes:,} bytes that such a file may have")
    return data


def unreadable(
    path: str | os.PathLike[str], error: OSError | ValueError, advice: str = "check the path"
) -> UserError:
    """Make the UserError for a file that the system cannot find or read; `advice` if missing."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return UserError(f"{path} does not exist: {advice}")
    if isinstance(error, PermissionError):
        return UserError(f"{path} cannot be read (permission denied): check its permissions")
    reason = getattr(error, "strerror", None) or error
    return UserError(f"{path} cannot be read ({reason}): check the path")


def sniff(first: bytes) -> Kind:
    """Say what a file is by its first bytes; FIRST_BYTES of them are enough."""
    if not first:
        return "empty"
    for magic, kind in _MAGIC.items():
        if first.startswith(magic):
            return kind
    if first.startswith(b"PK\x03\x04"):
        name = first[30 : 30 + int.from_bytes(first[26:28], "little")]
        if _TORCH_MEMBER.fullmatch(name):
            return "torch"
        return "npz" if name.endswith(b".npy") else "zip"
    if first.startswith(b"PK\x05\x06"):
        return "zip"  # without members
    if first[8:9] == b"{" and 2 <= int.from_bytes(first[:8], "little") <= 100_000_000:
        return "safetensors"
    if first[:1] == b"\x80" and first[1:2] and first[1] <= 5:
        return "torch" if first[2:].startswith(_OLD_TORCH) else "pickle"
    if first[257:262] == b"ustar":
        return "tar"
    text = first.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"<?xml") and b"<html" not in text:
        return "xml"
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--", b"<script")):
        return "html"
    if text.startswith((b"{", b"[")):
        return "json"
    return "unknown"


def sniff_file(path: str | os.PathLike[str], max_bytes: int) -> Kind:
    """Say what a file is by its first bytes; UserError as open_limited."""
    with open_limited(path, max_bytes) as file:
        try:
            return sniff(file.read(FIRST_BYTES))
        except OSError as error:
            raise unreadable(path, error) from error


def describe(kind: Kind) -> str:
    """Say in words what a file of this kind is; reads well after "is"."""
    return _DESCRIPTIONS[kind]


def read_json(
    path: str | os.PathLike[str], max_bytes: int, max_depth: int = 8, max_items: int = 1_000_000
) -> Any:
    """Read a JSON file of at most `max_bytes` like parse_json; counts values while reading.

    Raises:
        UserError: As open_limited.
        Refused: As parse_json.
    """
    with open_limited(path, max_bytes) as file:
        try:
            data = read_values(file, max_bytes, max_items)
        except OSError as error:
            raise unreadable(path, error) from error
    return parse_json(data, max_depth, max_items)


def read_values(file: IO[bytes], max_bytes: int, max_items: int) -> bytes:
    """Read the JSON text of an open file, at most `max_bytes`, and count its values meanwhile.

    Raises:
        Refused: It holds more than `max_items` values, as parse_json counts them: no more is read
            than a MiB beyond; or it has more than `max_bytes`.
    """
    data, items = bytearray(), 0
    while chunk := file.read(min(_CHUNK, max_bytes + 1 - len(data))):
        data += chunk
        items += _count_values(chunk)
        _refuse_more_values(items, max_items)
        if len(data) > max_bytes:
            raise Refused(f"it has more than the {max_bytes:,} bytes that such a file may have")
    return bytes(data)


def _count_values(data: bytes) -> int:
    return sum(map(data.count, (b",", b"[", b"{")))


def _refuse_more_values(items: int, max_items: int) -> None:
    if items > max_items:
        raise Refused(f"it holds more than {max_items:,} values")


def parse_json(data: bytes, max_depth: int = 8, max_items: int = 1_000_000) -> Any:
    """Parse JSON into None, bool, int, float, str, list and dict.

    Args:
        data: UTF-8 text.
        max_depth: how deep lists and objects may nest; a plain value has depth 0.
        max_items: how many values it may hold. Commas and brackets are counted before parsing, also
            those within strings, as a count of the values would come too late for the memory.

    Raises:
        Refused: it is not UTF-8, not JSON, too deep, too large, or has an integer of more than 19
            digits.
    """
    _refuse_more_values(_count_values(data), max_items)
    try:
        value = json.loads(data.decode("utf-8-sig"), parse_int=_parse_int)
    except UnicodeDecodeError as error:
        raise Refused("it is not UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise Refused(f"it is not JSON: {error.msg} in line {error.lineno}") from error
    except RecursionError as error:
        raise Refused(f"its lists nest deeper than {max_depth} levels") from error
    containers, depth = [value] if isinstance(value, list | dict) else [], 0
    while containers:
        depth += 1
        if depth > max_depth:
            raise Refused(f"its lists nest deeper than {max_depth} levels")
        containers = [
            inner
            for outer in containers
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, list | dict)
        ]
    return value


def _parse_int(digits: str) -> int:
    if len(digits) > 20:  # converting them takes quadratic time
        raise Refused(f"it holds an integer of {len(digits)} characters")
    return int(digits)


def brief(value: Any, width: int = 60) -> str:
    """Show a value that a file made, in few characters; a container only by its type.

    Formatting a list or a huge integer of a file can take hours.

    Args:
        value: any object.
        width: characters of text that are shown.
    """
    if isinstance(value, str):
        return repr(value[:width]) + "…" * (len(value) > width)
    if isinstance(value, bool | float | None):
        return repr(value)
    if isinstance(value, int):
        return repr(value) if abs(value) < 2**64 else f"an integer of {value.bit_length()} bits"
    plain = bool | int | float | str | None
    if (
        isinstance(value, list | tuple)
        and len(value) <= 8
        and all(isinstance(v, plain) for v in value)
    ):
        return f"[{', '.join(map(brief, value))}]"
    return f"a {type(value).__name__}"


def checked_int(value: Any, low: int, high: int, what: str) -> int:
    """Return a value that is an int (no bool) from `low` to `high`; else Refused, naming `what`."""
    if type(value) is not int or not low <= value <= high:
        raise Refused(f"{what} is {brief(value)}, not an integer from {low} to {high}")
    return value


def checked_shape(value: Any, max_elements: int, what: str) -> tuple[int, ...]:
    """Return a list or tuple as the shape of an array.

    Raises:
        Refused: it is not at most 8 integers from 0 to 2^63 - 1 whose product is at most
            `max_elements`; `what` names it.
    """
    if not isinstance(value, list | tuple) or len(value) > 8:
        raise Refused(f"{what} is {brief(value)}, not a list of at most 8 sizes")
    elements = 1
    for size in value:
        elements *= checked_int(size, 0, 2**63 - 1, what)
    if elements > max_elements:
        raise Refused(f"{what} {brief(value)} has more than {max_elements:,} elements")
    return tuple(value)
