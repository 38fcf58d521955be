"""Results of the acceptance checks: one row per check in the file named by SID_FAST_CHECKS."""

import functools
import math
import os

import pytest

from benchmarks.results import Results
from tests.gpu import checks


@functools.cache
def _results(path: str) -> Results:
    return Results(path, "check")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    path = os.environ.get("SID_FAST_CHECKS")
    if path and (report.when == "call" or (report.when == "setup" and not report.passed)):
        row = {"name": item.name, "status": report.outcome, "seconds": round(report.duration, 1)}
        row |= item.user_properties
        if "note" not in row and call.excinfo is not None:
            row["note"] = " ".join(str(call.excinfo.value).split())[:160]
        _results(path).add(row)
    return report


@pytest.fixture
def context(request, device):
    """Where a check runs, with the backend of the test's parameter."""
    backend = request.node.callspec.params.get("backend", "default")
    with checks.deterministic():
        yield checks.Context(device, 10 if device.type == "cuda" else 1, backend)


@pytest.fixture
def confirm(record_property):
    """confirm((error, bound, note)) records the outcome of a check and asserts it."""

    def assert_within(outcome):
        error, bound, note = outcome
        record_property("error", error if math.isfinite(error) else None)
        record_property("bound", bound)
        record_property("note", note)
        print(f"{error:.2e} <= {bound:g}? {note}", end=" ")
        assert error <= bound, note

    return assert_within
