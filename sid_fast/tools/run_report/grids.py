"""Chooses and encodes the sample grids of a page, so that all fit in a bounded number of bytes."""

import base64
import dataclasses
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from sid_fast.errors import UserError
from sid_fast.io.untrusted import Refused, naming, read_limited
from sid_fast.tools.run_report.runs import Run

MAX_POSITIONS = 30  # of the slider
MAX_PAGE_BYTES = 12 << 20  # of all images of a page, before base64
_MAX_FILE_BYTES = 64 << 20
_MAX_PIXELS = 1 << 25
_SMALLEST = 64  # pixels, to which a large image may shrink


@dataclasses.dataclass(frozen=True)
class Grid:
    """A sample grid as a page shows it. images: training images seen; url: a data URL."""

    images: int
    width: int
    height: int
    url: str


def positions(runs: Sequence[Run]) -> list[int]:
    """The images seen at which the slider stops: those of all grids, or evenly chosen ones."""
    return evenly(sorted({images for run in runs for images, _ in run.grids}), MAX_POSITIONS)


def evenly(values: Sequence[int], count: int) -> list[int]:
    """At most `count` of the values, evenly spaced by index; the first and last stay."""
    if len(values) <= count:
        return list(values)
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def chosen(run: Run, stops: Sequence[int]) -> list[tuple[int, Path]]:
    """The grids of a run that the slider shows: at each stop the last one until then."""
    shown = {}
    for stop in stops:
        until = [grid for grid in run.grids if grid[0] <= stop]
        if until:
            shown[until[-1][0]] = until[-1][1]
    return sorted(shown.items())


def encode(files: Sequence[tuple[int, Path]], max_bytes: int, notes: list[str]) -> Iterator[Grid]:
    """Yield the grids of some files, each in at most about `max_bytes` bytes.

    Small ones stay exact (PNG), larger ones become JPEGs. Files are decoded and encoded anew, so
    nothing else that they hold reaches the page.

    Args:
        files: images seen, and path.
        max_bytes: of one grid.
        notes: takes a line for each file that cannot be used, and an empty grid is yielded.
    """
    for images, path in files:
        try:
            with naming(path, "a sample grid"):
                data = read_limited(path, _MAX_FILE_BYTES)
                picture = _decode(data)
        except UserError as error:
            notes.append(f"left out: {error}")
            yield Grid(images, 0, 0, "")
            continue
        kind, encoded = _encode(picture, max_bytes, exact=len(data) <= max_bytes)
        url = f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"
        yield Grid(images, picture.width, picture.height, url)


def _decode(data: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(data), formats=["PNG"])
    if picture.width * picture.height > _MAX_PIXELS:
        raise Refused(f"it has {picture.width} x {picture.height} pixels")
    return picture.convert("L" if picture.mode in ("1", "L") else "RGB")


def _encode(picture: Image.Image, max_bytes: int, exact: bool) -> tuple[str, bytes]:
    """Encode as PNG if `exact` and small enough, else as JPEG, halved as often as necessary."""
    if exact and len(data := _saved(picture, "png")) <= max_bytes:
        return "png", data
    while len(data := _saved(picture, "jpeg", quality=82)) > max_bytes:
        if max(picture.size) < 2 * _SMALLEST:
            break
        picture = picture.reduce(2)
    return "jpeg", data


def _saved(picture: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()
