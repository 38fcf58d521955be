"""Precision: the switches of TF32."""

import pytest
import torch

from sid_fast.evaluation.features import exact_float32
from sid_fast.performance.mixed_precision import set_precision

GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def restored():
    yield
    set_precision("fp32", torch.device("cpu"))


def test_switches_survive_evaluations_and_a_script_that_allows_tf32():
    """PyTorch raises where its two interfaces to the same switch were used in a bad order."""
    torch.set_float32_matmul_precision("high")
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    for name in ("bf16", "tf32", "fp32", "tf32", "bf16"):
        assert set_precision(name, GPU) == name
        for _ in range(2):
            with exact_float32():
                assert (matmul.allow_tf32, cudnn.allow_tf32) == (False, False)
            assert (matmul.allow_tf32, cudnn.allow_tf32) == (name == "tf32",) * 2
