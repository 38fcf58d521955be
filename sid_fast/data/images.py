"""Pixels to network inputs, and to PNG files."""

import io
import math
import os

import numpy as np
import torch
from PIL import Image

from sid_fast.io.atomic import atomic_path

_GRID_WIDTH = 500


def to_float(images: torch.Tensor) -> torch.Tensor:
    """Convert uint8 images to float32 in [−1, 1], the range of network inputs."""
    return images.float() / 127.5 - 1


def encode_png(image: np.ndarray | torch.Tensor) -> bytes:
    """The PNG of a uint8 image [C, H, W], C = 1 or 3."""
    image = np.asarray(image)
    pixels = image[0] if image.shape[0] == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def save_png(path: str | os.PathLike[str], image: torch.Tensor) -> None:
    """Write one uint8 image [C, H, W], C = 1 or 3, atomically; UserError if it cannot be."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(encode_png(image.cpu()))


def save_grid(
    path: str | os.PathLike[str], images: torch.Tensor, columns: int | None = None
) -> None:
    """Write uint8 images [N, C, H, W], N > 0, C = 1 or 3, as one PNG, row by row, atomically.

    Small images are enlarged by a whole factor so that a person can look at the grid, which is
    near square unless `columns` is given. Raises WriteFailed if the disk does not take it.
    """
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    scale = math.ceil(_GRID_WIDTH / (columns * width))
    tiles = images.cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    gap = max(2, width * scale // 10)
    step_y, step_x = height * scale + gap, width * scale + gap
    canvas = torch.full(
        [channels, math.ceil(count / columns) * step_y - gap, columns * step_x - gap],
        128,  # neither black nor white, so that it is no part of an image
        dtype=torch.uint8,
    )
    for i, tile in enumerate(tiles):
        y, x = i // columns * step_y, i % columns * step_x
        canvas[:, y : y + step_y - gap, x : x + step_x - gap] = tile
    save_png(path, canvas)
