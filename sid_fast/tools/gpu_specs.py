"""GPUs to reckon with: memory, bandwidth and matrix rate."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Specs:
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
    "rtx4090": Specs(24, 1.008, _tflops(165.2, 82.6, 82.6), "the maker's figures"),
    "a100": Specs(80, 2.039, _tflops(312, 156, 19.5), "the maker's figures"),
    "h100": Specs(80, 3.0, _tflops(798, 494.7, 66.9), _MEASURED),
    "h200": Specs(141, 4.3, _tflops(790, 494.7, 66.9), _MEASURED),
}


def card(name: str) -> Specs:
    """The card called `name`, one of config.types.Card."""
    return CARDS[name]
