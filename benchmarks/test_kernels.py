"""The cases of benchmarks.kernels under pytest-benchmark.

pytest benchmarks --benchmark-json FILE

A CPU runs only the smallest shapes of each kernel, and no torch.compile.
"""

import pytest

from benchmarks import kernels, timing
from sid_fast.performance import process_group

DEVICE = process_group.pick_device()


def calls():
    """Yield a parameter set for each case, provider and mode."""
    for case in kernels.cases(kernels.Options(), DEVICE):
        for provider in case.providers:
            if DEVICE.type == "cuda" or provider != "compile":
                for mode in ("forward", "backward")[: 1 + case.differentiable]:
                    name = f"{case.name} {case.shape} {case.dtype} {mode}"
                    yield pytest.param(case, provider, mode, id=f"{name} {provider}")


@pytest.mark.parametrize(("case", "provider", "mode"), list(calls()))
def test_kernel(benchmark, case, provider, mode):
    """Time one call."""
    try:
        call = timing.ColdCacheTimer(kernels.make_calls(case, provider, DEVICE)[mode], DEVICE)
    except Exception as error:  # a library without a kernel for the shape
        pytest.skip(timing.failure_reason(error))

    def run():
        call.function()
        timing.synchronize(DEVICE)

    benchmark.group = f"{case.name} {case.shape} {case.dtype} {mode}"
    at = mode == "backward"
    benchmark.extra_info |= {"bytes": case.nbytes[at], "flop": case.flop[at]}
    benchmark.pedantic(run, rounds=10 if DEVICE.type == "cuda" else 2, warmup_rounds=1)
