"""Acceptance checks of a training step on a GPU."""

import pytest
import torch

from sid_fast import Distiller, Settings
from tests.helpers.networks import FAST, small_teacher


@pytest.mark.gpu
def test_a_step_never_waits_for_the_gpu():
    settings = Settings(dropout=0.1, augment_p=0.3, generator_beta1=0.9, micro_batch=2, **FAST)
    distiller = Distiller(small_teacher().cuda(), settings)
    distiller.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics = distiller.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(metrics["generator/loss"])
