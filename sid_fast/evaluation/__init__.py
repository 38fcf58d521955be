"""Metrics of generated against real images: FID, KID, IS, precision and recall."""

from sid_fast.evaluation.frechet import frechet_distance, moments
from sid_fast.evaluation.metrics import inception_score, kernel_distance, precision_recall

__all__ = [
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "moments",
    "precision_recall",
]
