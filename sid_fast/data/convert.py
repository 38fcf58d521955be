"""Turn image files of any format into square 8-bit PNGs of one size."""

import contextlib
import io
import threading
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from sid_fast.data.images import png_bytes

Crop = Literal["center", "pad", "none"]
Filter = Literal["auto", "lanczos", "area"]
# Formats that only decode. Never EPS, for which PIL runs Ghostscript.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"P5", b"P6")
_MAX_PIXELS = 2**27  # 134 megapixels: 400 MB as RGB
_LARGE_PIXELS = 2**25
_large = threading.Lock()  # one image of more than _LARGE_PIXELS is decoded at a time
_GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")
_RGB_MODES = ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")


class LeftOut(Exception):
    """An image that cannot be used; the message is the reason, without the image's name."""


@dataclass(frozen=True)
class Conversion:
    """How images are made alike.

    Attributes:
        resolution: height and width in pixels; None: that of the image.
        channels: 1 or 3; None: those of the image.
        crop: center: the central square; pad: add black borders; none: only square images.
        filter: for scaling down; auto: 2x2 means to exactly half the size, else Lanczos.
    """

    resolution: int | None = None
    channels: int | None = None
    crop: Crop = "center"
    filter: Filter = "auto"


@dataclass(frozen=True)
class Converted:
    """A converted image.

    Attributes:
        png: the file.
        resolution: height and width in pixels.
        channels: 1 or 3.
        was_transparent: transparent pixels were laid on white.
    """

    png: bytes
    resolution: int
    channels: int
    was_transparent: bool


def inspect(data: bytes | np.ndarray, how: Conversion) -> tuple[int, int]:
    """Return the resolution and channels of a conversion's result, from an image's header alone.

    Args:
        data: an image file, or pixels as uint8 [H, W] or [H, W, 3].
        how: the conversion.

    Raises:
        LeftOut: the header shows that the image cannot be used.
    """
    image = _open(data)
    channels = how.channels or (1 if image.mode in _GREY_MODES else 3)
    return _side(image.size, how), channels


def convert(data: bytes | np.ndarray, how: Conversion) -> Converted:
    """Convert one image; the arguments are those of `inspect`.

    The orientation of EXIF is applied, 16 bits become 8, and transparent images are laid on white.

    Raises:
        LeftOut: the image cannot be used.
    """
    image = _open(data)
    side = _side(image.size, how)  # before anything is decoded
    large = image.width * image.height > _LARGE_PIXELS
    with _large if large else contextlib.nullcontext():
        try:
            image.load()
            with contextlib.suppress(Exception):  # damaged EXIF does not spoil the pixels
                image = ImageOps.exif_transpose(image)
            image, was_transparent = _to_8_bits(image)
        except LeftOut:
            raise
        except Exception as error:  # damaged bytes can fail in any way
            raise LeftOut("damaged") from error
        if how.channels:
            image = image.convert("L" if how.channels == 1 else "RGB")
        image = _resize(_square(image, how, side), side, how.filter)
    return Converted(png_bytes(image), side, 1 if image.mode == "L" else 3, was_transparent)


def _open(data: bytes | np.ndarray) -> Image.Image:
    """Read the header of an image."""
    if isinstance(data, np.ndarray):
        return Image.fromarray(data)
    if not data:
        raise LeftOut("empty")
    Image.init()  # registers all formats; only some are by default
    try:
        image = Image.open(io.BytesIO(data), formats=[f for f in _FORMATS if f in Image.OPEN])
        several = image.format != "MPO" and getattr(image, "is_animated", False)
    except Image.DecompressionBombError as error:
        raise LeftOut(_TOO_LARGE) from error
    except Exception as error:  # damaged bytes can fail in any way
        known = data.startswith(_MAGIC) or data[8:12] in (b"WEBP", b"avif")
        raise LeftOut("damaged" if known else "not an image that can be read") from error
    if several:
        raise LeftOut("animated or of several pages")
    if image.width * image.height > _MAX_PIXELS:
        raise LeftOut(_TOO_LARGE)
    if image.mode not in _GREY_MODES + _RGB_MODES:
        kind = {"F": "floating-point", "LAB": "CIELAB"}.get(image.mode, image.mode)
        raise LeftOut(f"of {kind} pixels")
    return image


_TOO_LARGE = f"larger than {_MAX_PIXELS / 1e6:.0f} megapixels"


def _side(size: tuple[int, int], how: Conversion) -> int:
    """The resolution of the result for an image of size (width, height)."""
    if how.crop == "none" and size[0] != size[1]:
        raise LeftOut("not square")
    if how.crop == "pad":
        return how.resolution or max(size)
    if how.resolution and min(size) < how.resolution:
        raise LeftOut(f"smaller than {how.resolution} px")
    return how.resolution or min(size)


def _to_8_bits(image: Image.Image) -> tuple[Image.Image, bool]:
    """Convert to mode L or RGB; also return whether transparent pixels were laid on white."""
    grey = image.mode in _GREY_MODES
    if image.mode == "I" or image.mode.startswith("I;16"):
        pixels = np.asarray(image).astype(np.int64)
        if image.mode == "I" and (image.format != "PNG" or pixels.min() < 0):
            raise LeftOut("of 32-bit pixels")
        return Image.fromarray(((pixels * 255 + 32767) // 65535).astype(np.uint8)), False
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        rgba = image.convert("RGBA")
        was_transparent = rgba.getchannel("A").getextrema() != (255, 255)
        if was_transparent:
            rgba = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        return rgba.convert("L" if grey else "RGB"), was_transparent
    return image.convert("L" if grey else "RGB"), False


def _square(image: Image.Image, how: Conversion, side: int) -> Image.Image:
    """Cut out the central square, or add black borders to the square of at least `side` pixels."""
    width, height = image.size
    square = max(width, height, side) if how.crop == "pad" else min(width, height)
    if width == height == square:
        return image
    # A crop beyond the borders is filled with black.
    left, top = (width - square) // 2, (height - square) // 2
    return image.crop((left, top, left + square, top + square))


def _resize(image: Image.Image, side: int, filter: Filter) -> Image.Image:
    """Scale a square image down to side x side pixels."""
    if image.width == side:
        return image
    if filter == "auto" and image.width == 2 * side:
        pixels = np.asarray(image, np.uint16)
        rows = pixels[::2] + pixels[1::2]
        sums = rows[:, ::2] + rows[:, 1::2]
        means = (sums + 1 + (sums >> 2 & 1)) >> 2  # halves are rounded to the even number
        return Image.fromarray(means.astype(np.uint8))
    kind = Image.Resampling.BOX if filter == "area" else Image.Resampling.LANCZOS
    return image.resize((side, side), kind)
