"""GPUs to reckon with: memory, bandwidth and matrix rate."""

import dataclasses

from sid_fast.errors import UserError


@dataclasses.dataclass(frozen=True)
class Card:
    """memory in GiB as the driver shows it; bandwidth in TB/s; tflops by precision, dense."""

    memory: float
    bandwidth: float
    tflops: dict[str, float]
    source: str


def _tflops(half: float, tf32: float, fp32: float) -> dict[str, float]:
    return {"bf16": half, "fp16": half, "tf32": tf32, "fp32": fp32}


_MEASURED = (
    "measured on one through PyTorch: bandwidth (a copy), bf16 (a product of 8192³, random "
    "data); the rest is the maker's"
)
CARDS = {
    "rtx4090": Card(24, 1.008, _tflops(165.2, 82.6, 82.6), "the maker's figures"),
    "a100": Card(80, 2.039, _tflops(312, 156, 19.5), "the maker's figures"),
    "h100": Card(80, 3.0, _tflops(798, 494.7, 66.9), _MEASURED),
    "h200": Card(141, 4.3, _tflops(790, 494.7, 66.9), _MEASURED),
}


def card(name: str) -> Card:
    """The card called `name`; UserError lists those that are known."""
    if name not in CARDS:
        raise UserError(f"card={name!r} is unknown: choose from {', '.join(CARDS)}")
    return CARDS[name]
