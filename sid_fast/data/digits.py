"""The embedded data set: scikit-learn's handwritten digits as an EDM data set."""

import os
from pathlib import Path

import numpy as np

from sid_fast.data.datasets import Dataset, ImageDataset, list_files, write_dataset
from sid_fast.data.latents import LatentDataset, holds_latents
from sid_fast.errors import one_line
from sid_fast.io.download import cache_folder, require_writable_cache
from sid_fast.io.streams import note


def open_dataset(path: str) -> Dataset:
    """Open a data set of images or latents, or `digits`: 1,797 grey 8x8 images in 10 classes.

    Rank 0 prints the data set's note, if it has one.
    """
    if path == "digits" and not Path(path).exists():
        import sklearn.datasets  # slow to import and used only here

        folder = cache_folder()
        cached = folder / f"digits-sklearn-{sklearn.__version__}.zip"
        if not cached.exists():
            require_writable_cache(folder)
            digits = sklearn.datasets.load_digits()
            images = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]
            write_dataset(cached, images, digits.target)
        path = str(cached)
    files = list_files(path)
    data: Dataset = LatentDataset(files) if holds_latents(files) else ImageDataset(files)
    if data.note and os.environ.get("RANK", "0") == "0":
        note(one_line(f"note: {path}: {data.note}"))
    return data
