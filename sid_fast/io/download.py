"""Resolve a path or https URL to a local file; URLs are downloaded once and verified."""

import hashlib
import http.client
import os
import re
import tempfile
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from sid_fast.errors import Fallback, UserError, WriteFailed
from sid_fast.io import progress, streams
from sid_fast.io.atomic import atomic_path, remove_abandoned
from sid_fast.io.cache import user_cache
from sid_fast.io.untrusted import MAX_NETWORK_BYTES, Kind, describe, sniff_file, unreadable

MB = 10**6


def fetch(source: str, others: str = "") -> Path:
    """Return the local file of a path or an https URL.

    URLs are downloaded once, to $SID_FAST_CACHE or the user's cache folder. `URL#sha256=HEX` is
    verified on every use; without a digest, the file's own is printed. Several processes may fetch
    the same URL at once.

    Args:
        source: the path or URL.
        others: other inputs that the caller accepts, added to the error for a missing file.

    Raises:
        UserError: the file does not exist, the URL is not https, the download fails or is
            incomplete, or the digest differs.
    """
    if "://" in source:
        url, sha256 = _split_digest(source)
    else:
        try:
            os.stat(source)
        except (OSError, ValueError) as error:  # ValueError: a null byte
            raise unreadable(source, error, f"give a file{others or ' or an https URL'}") from None
        return Path(source)

    _require_https(url)
    folder = cache_folder()
    target = _cache_path(url)
    if not target.exists() or _page_kind(target):
        require_writable_cache(folder)
        with atomic_path(target) as temporary:
            _download(url, temporary)
            if kind := _page_kind(temporary):
                raise UserError(f"{url} is {describe(kind)}: check the URL")
            actual = file_sha256(temporary)
            if sha256 not in (None, actual):
                raise UserError(
                    f"{url} has sha256 {actual}, not {sha256}: give the digest you trust, or "
                    "another URL"
                )
        if sha256 is None:
            streams.note(f"not verified; to pin this version give {url}#sha256={actual}")
    elif sha256 is not None and (actual := file_sha256(target)) != sha256:
        raise UserError(
            f"{target} has sha256 {actual}, not {sha256}: delete it to download it again, or give "
            "the digest you trust"
        )
    return target


def _page_kind(path: Path) -> Kind | None:
    """What a file is if it is no download that was asked for but what a server says instead."""
    kind = sniff_file(path, MAX_NETWORK_BYTES)
    return kind if kind in ("html", "xml", "json", "lfs", "empty") else None


def is_cached(source: str) -> bool:
    """Whether fetch(source) would find the URL's file in the cache."""
    return _cache_path(_split_digest(source)[0]).exists()


def _cache_path(url: str) -> Path:
    name = PurePosixPath(url.partition("?")[0]).name
    return cache_folder() / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name[-100:]}"


def _split_digest(source: str) -> tuple[str, str | None]:
    url, _, fragment = source.partition("#")
    if fragment and not re.fullmatch(r"sha256=[0-9a-fA-F]{64}", fragment):
        raise UserError(f"{source}: only sha256= and 64 hexadecimal digits may follow the #")
    return url, fragment.removeprefix("sha256=").lower() or None


def cache_folder() -> Path:
    """Return the download folder, creating it; UserError if that fails."""
    folder = user_cache()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise UserError(
            f"the cache folder {folder} cannot be created "
            f"({getattr(error, 'strerror', None) or error}): "
            "set SID_FAST_CACHE to a folder you can write to"
        ) from error
    return folder


def require_writable_cache(folder: Path) -> None:
    """Raise UserError, naming SID_FAST_CACHE, if no file can be written to the cache folder.

    Removes what killed processes left there.
    """
    remove_abandoned(folder)
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"the cache folder {folder} cannot be written ({error.strerror}): "
            "set SID_FAST_CACHE to a folder you can write to"
        ) from error


def write_cache(write: Callable[[], object]) -> None:
    """Call `write`, which stores a computed result in the cache; warn if that fails."""
    remove_abandoned(cache_folder())
    try:
        write()
    except WriteFailed as error:
        warnings.warn(
            f"{error}, or set SID_FAST_CACHE to a folder you can write to; going on without it",
            Fallback,
            stacklevel=2,
        )


def _require_https(url: str) -> None:
    if not url.lower().startswith("https://"):
        raise UserError(f"{url} is not an https URL: download it yourself and give its path")
    if "@" in re.split(r"[/?#]", url[len("https://") :])[0]:  # messages leave out what is before it
        raise UserError(
            f"{url} has a user and a password, which are not supported: download it yourself and "
            "give its path"
        )


class _HttpsRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, response, code, message, headers, new_url):
        _require_https(new_url)
        return super().redirect_request(request, response, code, message, headers, new_url)


def _download(url: str, path: Path) -> None:
    opener = urllib.request.build_opener(_HttpsRedirects)
    try:
        with opener.open(url, timeout=60) as response, open(path, "wb") as file:
            total = response.length
            name = PurePosixPath(url.partition("?")[0]).name
            megabytes = total / MB if total else None
            with progress.phase(f"downloading {name}", megabytes, "MB") as shown:
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    shown.update(len(chunk) / MB)
            size = file.tell()
    except urllib.error.HTTPError as error:
        raise UserError(
            f"{url}: the server answered {error.code} {error.reason}: check the URL"
        ) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(
            f"{url} cannot be downloaded ({getattr(error, 'reason', error)}): "
            "try again, or download it yourself and give its path"
        ) from error
    if total is not None and size != total:
        raise UserError(f"{url} ended after {size} of {total} bytes: try again")


def file_sha256(path: Path) -> str:
    """Hash a file: its sha256, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
