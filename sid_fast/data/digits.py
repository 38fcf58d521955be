"""The embedded data set: scikit-learn's handwritten digits as an EDM data set."""

from pathlib import Path

import numpy as np

from sid_fast.data.datasets import ImageDataset, write_dataset
from sid_fast.io.download import cache_folder


def open_dataset(path: str) -> ImageDataset:
    """Open the data set at a path, or `digits`: 1,797 grey 8x8 images in 10 classes."""
    if path == "digits" and not Path(path).exists():
        import sklearn.datasets  # slow to import and used only here

        cached = cache_folder() / f"digits-sklearn-{sklearn.__version__}.zip"
        if not cached.exists():
            digits = sklearn.datasets.load_digits()
            images = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]
            write_dataset(cached, images, digits.target)
        path = str(cached)
    return ImageDataset(path)
