"""Pixels to network inputs, and to PNG files."""

import io
import math
import os

import numpy as np
import torch
from PIL import Image

from sid_fast.io.atomic import atomic_path

MAX_RESOLUTION = 4096  # pixels per side of an image that is read
_GRID_WIDTH = 500  # pixels, at least


def to_float(images: torch.Tensor) -> torch.Tensor:
    """Convert uint8 images to float32 in [−1, 1], the range of network inputs."""
    return images.float() / 127.5 - 1


def encode_png(image: np.ndarray | torch.Tensor) -> bytes:
    """Encode a uint8 image [C, H, W], C = 1 or 3, as PNG bytes."""
    image = np.asarray(image)
    pixels = image[0] if image.shape[0] == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
    return png_bytes(Image.fromarray(pixels))


def png_bytes(image: Image.Image) -> bytes:
    """Encode an image as PNG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def decode_png(data: bytes | np.ndarray, resolution: int) -> Image.Image:
    """Decode a PNG whose header has been read; raises any exception for damaged bytes.

    Raises:
        ValueError: it is not of resolution x resolution pixels; nothing is unpacked then. A file
            may have several headers, and PIL obeys the last.
    """
    image = Image.open(io.BytesIO(data), formats=["PNG"])
    if image.size != (resolution, resolution):
        raise ValueError(f"a second header says {image.width}x{image.height} pixels")
    image.load()
    return image


def save_png(path: str | os.PathLike[str], image: torch.Tensor) -> None:
    """Write a uint8 image [C, H, W], C = 1 or 3, as a PNG, atomically.

    Raises:
        UserError: the file cannot be written.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(encode_png(image.cpu()))


def save_grid(
    path: str | os.PathLike[str], images: torch.Tensor, columns: int | None = None
) -> None:
    """Write images as one PNG grid, row by row, atomically.

    Small images are enlarged by an integer factor so that the grid is about 500 pixels wide.

    Args:
        path: of the PNG.
        images: uint8 [N, C, H, W], N > 0, C = 1 or 3.
        columns: images per row; default: a near-square grid.

    Raises:
        WriteFailed: the file cannot be written.
    """
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    scale = math.ceil(_GRID_WIDTH / (columns * width))
    tiles = images.cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    gap = max(2, width * scale // 10)
    step_y, step_x = height * scale + gap, width * scale + gap
    canvas = torch.full(
        [channels, math.ceil(count / columns) * step_y - gap, columns * step_x - gap],
        128,  # grey, so that gaps stand out from black and white images
        dtype=torch.uint8,
    )
    for i, tile in enumerate(tiles):
        y, x = i // columns * step_y, i % columns * step_x
        canvas[:, y : y + step_y - gap, x : x + step_x - gap] = tile
    save_png(path, canvas)
