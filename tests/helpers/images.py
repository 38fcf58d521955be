"""Random images, PNG files and zip archives."""

import io
import json
import zipfile

import numpy as np
from PIL import Image

RNG = np.random.default_rng(0)


def png(pixels, mode=None, **options):
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels, mode)
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def make_zip(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data if isinstance(data, bytes) else json.dumps(data))
    return path


def pictures(n: int, channels: int = 1) -> np.ndarray:
    return RNG.integers(256, size=(n, channels, 8, 8), dtype=np.uint8)
