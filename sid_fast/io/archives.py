"""Zip archives and .npz files of others: declared sizes are checked before a member is read."""

import math
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np

from sid_fast.errors import UserError
from sid_fast.io.untrusted import (
    FIRST_BYTES,
    Refused,
    checked_shape,
    describe,
    naming,
    open_limited,
    sniff,
)

MAX_BYTES = 2**44  # of an archive; members are limited by those who read them
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # zipfile unpacks others without a bound
_FREE_BYTES = 2**26  # of a member, at any compression
_MAX_RATIO = 100  # of larger ones; labels reach 20, noise and covariances 2
_HEADER_BYTES = 2**16  # of an .npy member of version 1.0, at most


def open_zip(path: Path, what: str) -> zipfile.ZipFile:
    """Open a zip archive; UserError, which says what the file is, if it is none.

    Args:
        path: of the archive, a regular file.
        what: what it should be, such as "a data set zip or folder".
    """
    with open_limited(path, MAX_BYTES) as file:
        kind = sniff(file.read(FIRST_BYTES))
    try:
        return zipfile.ZipFile(path)
    except Exception as error:  # damaged bytes can fail in any way
        if kind not in ("unknown", "zip", "npz", "torch"):
            raise UserError(f"{path} is {describe(kind)}: give {what}") from error
        raise UserError(
            f"{path} is damaged or not a zip file: copy it again, or give {what}"
        ) from error


def require_member(info: zipfile.ZipInfo, max_bytes: int) -> None:
    """Check what a member's entry declares.

    Raises:
        Refused: the member is encrypted, neither stored nor deflated, larger than `max_bytes`, or
            large and compressed as no real data can be.
    """
    if info.flag_bits & 0x1:
        raise Refused("is encrypted: unzip it with its password, and zip it without one")
    if info.compress_type not in _METHODS:
        raise Refused(
            f"is compressed by method {info.compress_type}: zip it with deflate, or uncompressed"
        )
    if info.file_size > max_bytes:
        raise Refused(f"has {info.file_size:,} bytes, more than the {max_bytes:,} it may have")
    if info.file_size > max(_FREE_BYTES, _MAX_RATIO * info.compress_size):
        raise Refused(
            f"would unpack from {info.compress_size:,} bytes to {info.file_size:,}, as no real "
            "data do: make the file again"
        )


def read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, max_bytes: int) -> bytes:
    """Read a member that require_member accepts, and check its CRC.

    Never more than the declared size is unpacked; ZipFile.read would unpack all that there is.
    """
    require_member(info, max_bytes)
    with archive.open(info) as file:
        data = file.read(info.file_size)
    if len(data) != info.file_size:
        raise Refused("is cut short: copy it again")
    return data


def read_arrays(path: Path, what: str, max_elements: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Read some arrays of an .npz file; executes nothing, and reads nothing else of the file.

    Args:
        path: of the file.
        what: what the file should be, for errors.
        max_elements: how many elements each array may have, by name.

    Returns:
        Those of the arrays that the file has: booleans, numbers or strings.

    Raises:
        UserError: the file is missing, damaged, no zip archive, or an array is too large or holds
            Python objects.
    """
    arrays = {}
    with naming(path, what), open_zip(path, what) as archive:
        for name, limit in max_elements.items():
            member = f"{name}.npy"
            if member in archive.NameToInfo:
                try:
                    arrays[name] = _read_array(archive, archive.getinfo(member), limit)
                except Refused as error:
                    raise Refused(f"its {name} {error}") from error
    return arrays


def _read_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, limit: int) -> np.ndarray:
    require_member(info, _HEADER_BYTES + 16 * max(limit, 100))
    with archive.open(info) as file:
        npy_header(file, info.file_size, limit)
    with archive.open(info) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.lib.format.read_array(file, allow_pickle=False)


def npy_header(file: IO[bytes], nbytes: int, limit: int) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read the header of an .npy file, up to its first value.

    Args:
        file: at its beginning.
        nbytes: of the whole file.
        limit: elements that it may have.

    Returns:
        The shape, whether the order is Fortran's, and the type: booleans, numbers or strings.

    Raises:
        Refused: it holds anything else, such as Python objects, has more elements, or is cut short.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's of a header that Python 2 wrote
        if np.lib.format.read_magic(file) != (1, 0):  # later ones are for structured arrays
            raise Refused("is neither numbers nor text")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.kind not in "biufU":
        raise Refused("is neither numbers nor text")
    if math.prod(checked_shape(shape, limit, "shape")) * dtype.itemsize > nbytes:
        raise Refused("is cut short: copy it again")
    return shape, fortran, dtype
