"""Images of all kinds to square 8-bit PNGs: what is converted and what is left out."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from sid_fast.data import convert as module
from sid_fast.data.convert import Conversion, LeftOut, convert, inspect

pytestmark = pytest.mark.filterwarnings("ignore:.*EXIF")  # PIL's, of damaged files
RNG = np.random.default_rng(0)


def photo(width=48, height=40, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return Image.fromarray(RNG.integers(256, size=shape, dtype=np.uint8))


def file(image, kind="PNG", **options):
    image.save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


def pixels(data, how):
    converted = convert(data, how)
    array = np.asarray(Image.open(io.BytesIO(converted.png)))
    assert array.shape[:2] == (converted.resolution,) * 2
    assert array.ndim == (2 if converted.channels == 1 else 3)
    return array


def reason(data, how):
    with pytest.raises(LeftOut) as caught:
        convert(data, how)
    return str(caught.value)


def test_an_image_of_the_right_size_keeps_its_pixels():
    for image in (photo(32, 32), photo(32, 32, 1)):
        assert np.array_equal(pixels(file(image), Conversion(32)), np.asarray(image))
        assert np.array_equal(pixels(np.asarray(image), Conversion()), np.asarray(image))


@pytest.mark.parametrize("size", [(48, 40), (40, 48), (41, 40)])
def test_the_central_square_is_cut_out(size):
    image = photo(*size)
    side, (left, top) = min(size), ((n - min(size)) // 2 for n in size)
    expected = np.asarray(image)[top : top + side, left : left + side]
    assert np.array_equal(pixels(file(image), Conversion()), expected)
    scaled = Image.fromarray(expected).resize((16, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(pixels(file(image), Conversion(16)), np.asarray(scaled))
    scaled = Image.fromarray(expected).resize((16, 16), Image.Resampling.BOX)
    assert np.array_equal(pixels(file(image), Conversion(16, filter="area")), np.asarray(scaled))


@pytest.mark.parametrize("channels", [1, 3])
def test_exactly_half_the_size_is_the_rounded_mean_of_2x2_pixels(channels):
    image = np.asarray(photo(64, 64, channels))
    means = image.reshape(32, 2, 32, 2, -1).mean((1, 3))
    expected = np.round(means).astype(np.uint8).reshape(32, 32, *image.shape[2:])
    assert np.array_equal(pixels(image, Conversion(32)), expected)
    assert not np.array_equal(pixels(image, Conversion(32, filter="lanczos")), expected)


def test_borders_are_added_in_black():
    image = np.asarray(photo(28, 20, 1)) | 1
    result = pixels(image, Conversion(32, crop="pad"))
    assert np.array_equal(result[6:26, 2:30], image)
    assert np.count_nonzero(result) == image.size
    assert convert(image, Conversion(crop="pad")).resolution == 28
    assert pixels(image, Conversion(14, crop="pad")).shape == (14, 14)


def test_only_square_images_without_a_crop():
    assert reason(file(photo()), Conversion(32, crop="none")) == "not square"
    assert convert(file(photo(40, 40)), Conversion(32, crop="none")).resolution == 32


def test_smaller_images_are_left_out():
    assert reason(file(photo(31, 50)), Conversion(32)) == "smaller than 32 px"


def test_channels():
    grey, rgb = photo(channels=1), photo()
    assert convert(file(grey), Conversion()).channels == 1
    assert convert(file(rgb), Conversion()).channels == 3
    assert np.array_equal(
        pixels(file(grey), Conversion(channels=3)), pixels(file(grey.convert("RGB")), Conversion())
    )
    square = rgb.crop((4, 0, 44, 40))
    grey_pixels = pixels(file(rgb), Conversion(channels=1))
    assert np.array_equal(grey_pixels, np.asarray(square.convert("L")))


def test_the_orientation_of_exif_is_applied():
    image = photo(32, 32)
    exif = image.getexif()
    exif[0x0112] = 6  # to be rotated clockwise
    result = pixels(file(image, exif=exif), Conversion())
    assert np.array_equal(result, np.rot90(np.asarray(image), -1))


def test_damaged_exif_is_ignored():
    image = photo(32, 32)
    for exif in (b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0rubbish"):
        assert convert(file(image, "JPEG", exif=exif), Conversion()).resolution == 32


def test_16_bits_become_8():
    values = RNG.integers(65536, size=(8, 8), dtype=np.uint16)
    values[0, :4] = 0, 65535, 128, 129
    expected = np.round(values / 257).astype(np.uint8)
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(pixels(file(Image.fromarray(values), kind), Conversion()), expected)


def test_transparent_pixels_become_white():
    image = photo(16, 16).convert("RGBA")
    opaque = convert(file(image), Conversion())
    assert not opaque.was_transparent
    assert opaque.channels == 3
    image.putalpha(Image.fromarray(np.repeat(np.uint8([[0, 255]]), 8, 1).repeat(16, 0)))
    assert convert(file(image), Conversion()).was_transparent
    result = pixels(file(image), Conversion())
    assert (result[:, :8] == 255).all()
    assert np.array_equal(result[:, 8:], np.asarray(image)[:, 8:, :3])


def test_colour_keys_count_as_transparency():
    image = Image.fromarray(np.full((8, 8), 7, np.uint8))
    image.putpixel((0, 0), 9)
    data = file(image, transparency=7)
    assert convert(data, Conversion()).was_transparent
    result = pixels(data, Conversion())
    assert result[0, 0] == 9
    assert (result == 255).sum() == 63


@pytest.mark.parametrize(
    ("image", "kind", "channels"),
    [
        (photo().quantize(16), "PNG", 3),
        (photo().quantize(16), "GIF", 3),
        (photo().convert("CMYK"), "JPEG", 3),
        (photo().convert("CMYK"), "TIFF", 3),
        (photo().convert("1"), "PNG", 1),
        (photo().convert("LA"), "PNG", 1),
        (photo(), "WEBP", 3),
        (photo(), "BMP", 3),
        (photo(), "PPM", 3),
    ],
)
def test_every_colour_model_and_format(image, kind, channels):
    data = file(image, kind)
    assert inspect(data, Conversion(32)) == (32, channels)
    assert convert(data, Conversion(32)).channels == channels


def test_what_is_not_a_single_image_is_left_out():
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        data = file(photo(), kind, save_all=True, append_images=[photo()])
        assert reason(data, Conversion()) == "animated or of several pages"
    data = file(photo(), "MPO", save_all=True, append_images=[photo()])  # as phones write
    assert convert(data, Conversion()).resolution == 40


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_damaged_files_are_left_out(kind):
    data = file(photo(200, 200), kind)
    for end in (20, len(data) // 2, len(data) * 9 // 10):
        assert reason(data[:end], Conversion(32)) == "damaged"


def test_other_files_are_left_out():
    assert reason(b"", Conversion()) == "empty"
    for data in (b"<!doctype html>", b"\0\0\0\x18ftypheic", b"%!PS-Adobe-3.0 EPSF-3.0\n"):
        assert reason(data, Conversion()) == "not an image that can be read"
    with pytest.raises(LeftOut, match="not an image"):  # PIL would run Ghostscript
        inspect(file(photo(), "EPS"), Conversion())
    floats = Image.fromarray(np.zeros((4, 4), np.float32))
    assert reason(file(floats, "TIFF"), Conversion()) == "of floating-point pixels"
    ints = Image.fromarray(np.zeros((4, 4), np.int32))
    assert reason(file(ints, "TIFF"), Conversion()) == "of 32-bit pixels"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_left_out_before_it_is_unpacked(monkeypatch):
    image = file(Image.new("L", (8, 8)))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("unpacked"))
    for side in (12_000, 60_000):
        header = bytearray(image)
        header[16:24] = side.to_bytes(4, "big") * 2
        header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
        assert reason(bytes(header), Conversion(8)) == "larger than 134 megapixels"


def test_large_images_are_decoded_one_at_a_time(monkeypatch):
    monkeypatch.setattr(module, "_LARGE_PIXELS", 0)
    held = []
    monkeypatch.setattr(
        module, "_to_8_bits", lambda image: (held.append(module._large.locked()), (image, False))[1]
    )
    convert(file(photo()), Conversion(8))
    assert held == [True]
    assert not module._large.locked()
