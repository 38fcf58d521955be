"""The kernels and their rivals under pytest-benchmark.

pytest benchmarks --benchmark-json FILE

Shapes and providers are those of `python -m benchmarks.kernels`, which also says how close each
comes to its floor. On a CPU, a few small shapes of every kernel, and no compiler.
"""

import pytest

from benchmarks import kernels, measure
from sid_fast.performance import process_group

DEVICE = process_group.pick_device()


def calls():
    for case in kernels.cases(kernels.Options(), DEVICE):
        for provider in case.forms:
            if DEVICE.type == "cuda" or provider != "compile":
                for mode in ("forward", "backward")[: 1 + case.differentiable]:
                    name = f"{case.name} {case.shape} {case.dtype} {mode}"
                    yield pytest.param(case, provider, mode, id=f"{name} {provider}")


@pytest.mark.parametrize(("case", "provider", "mode"), list(calls()))
def test_kernel(benchmark, case, provider, mode):
    try:
        call = measure.Cold(kernels.prepared(case, provider, DEVICE)[mode], DEVICE)
    except Exception as error:  # a rival without a kernel for the shape
        pytest.skip(measure.reason(error))

    def run():
        call.function()
        measure.synchronize(DEVICE)

    benchmark.group = f"{case.name} {case.shape} {case.dtype} {mode}"
    at = mode == "backward"
    benchmark.extra_info |= {"bytes": case.nbytes[at], "flop": case.flop[at]}
    benchmark.pedantic(run, rounds=10 if DEVICE.type == "cuda" else 2, warmup_rounds=1)
