"""Acceptance on a GPU; benchmarks/gpu_acceptance.sh runs it, in small without a GPU too."""

import dataclasses
import gc

import pytest
import torch

from tests.gpu import checks

pytestmark = pytest.mark.gpu
each_backend = pytest.mark.parametrize("backend", checks.BACKENDS)


@pytest.fixture(autouse=True)
def _free_memory():
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("name", checks.STEP_CHECKS)
@each_backend
def test_step(name, backend, context, confirm):
    confirm(checks.STEP_CHECKS[name](context))


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("name", checks.NETWORKS)
def test_network(name, kind, context, confirm):
    confirm(checks.network_agrees(context, checks.NETWORKS[name], kind))


@pytest.mark.parametrize("name", checks.EDM2_CHECKS)
@each_backend
def test_edm2(name, backend, context, confirm):
    confirm(checks.EDM2_CHECKS[name](dataclasses.replace(context, network=checks.EDM2)))


@pytest.mark.parametrize("name", checks.LATE_CHECKS)
@each_backend
def test_late(name, backend, context, confirm):
    confirm(checks.LATE_CHECKS[name](context))
