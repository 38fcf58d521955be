"""The Fréchet distance in pixel space: a measure for very small images. It is not FID."""

import torch

from sid_fast.evaluation.frechet import frechet_distance, moments
from sid_fast.files.dataset import ImageDataset

NAME = "pixel-space Fréchet distance"


class PixelDistance:
    """Distance of uint8 images to those of a data set, their pixels (in [-1, 1]) the features."""

    def __init__(self, data: ImageDataset):
        self.reference = moments(self._features(torch.from_numpy(data.images())))

    def __call__(self, images: torch.Tensor) -> float:
        return frechet_distance(*moments(self._features(images)), *self.reference)

    @staticmethod
    def _features(images: torch.Tensor) -> torch.Tensor:
        return images.cpu().flatten(1).double() / 127.5 - 1
