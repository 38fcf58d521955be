"""Resolve a path or https URL to a local file; URLs are downloaded once and verified."""

import hashlib
import http.client
import os
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from sid_fast.errors import UserError
from sid_fast.io.atomic import atomic_path
from sid_fast.io.cache import user_cache


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
        if not Path(source).exists():
            raise UserError(f"{source} does not exist: give a file, an https URL{others}")
        return Path(source)

    _require_https(url)
    target = _cache_path(url)
    if not target.exists():
        with atomic_path(target) as temporary:
            _download(url, temporary)
            _verify(url, temporary, sha256)
    elif sha256 is not None:
        _verify(url, target, sha256)
    return target


def is_cached(source: str) -> bool:
    """Whether fetch(source) would find the URL's file in the cache."""
    return _cache_path(_split_digest(source)[0]).exists()


def _cache_path(url: str) -> Path:
    name = PurePosixPath(url.partition("?")[0]).name
    return cache_folder() / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"


def _split_digest(source: str) -> tuple[str, str | None]:
    url, _, fragment = source.partition("#")
    if fragment and not re.fullmatch(r"sha256=[0-9a-fA-F]{64}", fragment):
        raise UserError(f"{source}: only sha256= and 64 hexadecimal digits may follow the #")
    return url, fragment.removeprefix("sha256=").lower() or None


def cache_folder() -> Path:
    """Return the download folder, creating it; UserError if that fails."""
    folder = Path(os.environ.get("SID_FAST_CACHE") or user_cache())
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the cache folder {folder} cannot be created ({error.strerror}): "
            "set SID_FAST_CACHE to a folder you can write to"
        ) from error
    return folder


def _require_https(url: str) -> None:
    if not url.lower().startswith("https://"):
        raise UserError(f"{url} is not an https URL: download it yourself and give its path")


class _HttpsRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, response, code, message, headers, new_url):
        _require_https(new_url)
        return super().redirect_request(request, response, code, message, headers, new_url)


def _download(url: str, path: Path) -> None:
    opener = urllib.request.build_opener(_HttpsRedirects)
    try:
        with opener.open(url, timeout=60) as response, open(path, "wb") as file:
            total = response.length
            with tqdm(total=total, desc=url, unit="B", unit_scale=True, disable=None) as bar:
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    bar.update(len(chunk))
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


def _verify(url: str, path: Path, sha256: str | None) -> None:
    actual = file_sha256(path)
    if sha256 is None:
        print(f"not verified; to pin this version give {url}#sha256={actual}", file=sys.stderr)
    elif actual != sha256:
        raise UserError(
            f"{url} has sha256 {actual}, not {sha256}: delete {path} if it exists "
            "and download again, or give the digest you trust"
        )
