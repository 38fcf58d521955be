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


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def posterior(n: int, resolution: int = 8, dtype=np.float32) -> np.ndarray:
    """Means and deviations of n latents, [n, 8, R, R]."""
    values = RNG.standard_normal((n, 8, resolution, resolution))
    values[:, 4:] = np.abs(values[:, 4:])
    return values.astype(dtype)


def latent_zip(path, stored, labels=None):
    """A data set of latents as EDM2's tool writes it."""
    names = [f"00000/img-mean-std-{i:08d}.npy" for i in range(len(stored))]
    members = {name: npy(array) for name, array in zip(names, stored, strict=True)}
    pairs = None if labels is None else [[n, int(c)] for n, c in zip(names, labels, strict=True)]
    return make_zip(path, members | {"dataset.json": {"labels": pairs}})
