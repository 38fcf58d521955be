"""How far generated images are from real ones."""

from sid_fast.evaluation.frechet import frechet_distance, moments

__all__ = ["frechet_distance", "moments"]
