"""Memory, bandwidth and peak matrix rates of the GPUs that estimates know."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Specs:
    """Specifications of a GPU.

    Attributes:
        memory: GiB.
        bandwidth: of memory, TB/s.
        tflops: peak dense matrix rate by precision, TFLOP/s.
        source: where the numbers come from.
    """

    memory: float
    bandwidth: float
    tflops: dict[str, float]
    source: str


def _tflops(half: float, tf32: float, fp32: float) -> dict[str, float]:
    return {"bf16": half, "fp16": half, "tf32": tf32, "fp32": fp32}


_MEASURED = (
    "measured with PyTorch on one card: bandwidth (a copy) and bf16 (a matrix product of 8192³, "
    "random data); the rest are NVIDIA's figures"
)
CARDS = {
    "rtx4090": Specs(24, 1.008, _tflops(165.2, 82.6, 82.6), "NVIDIA's figures"),
    "a100": Specs(80, 2.039, _tflops(312, 156, 19.5), "NVIDIA's figures"),
    "h100": Specs(80, 3.0, _tflops(798, 494.7, 66.9), _MEASURED),
    "h200": Specs(141, 4.3, _tflops(790, 494.7, 66.9), _MEASURED),
}


def card(name: str) -> Specs:
    """Look up a card of config.types.Card."""
    return CARDS[name]
