"""The command that runs the tuner's proofs in Triton's interpreter."""

import pytest

from tests.helpers.processes import python


@pytest.mark.slow
def test_small_operations_are_proven_in_the_interpreter():
    operations = ("sid_loss", "sida_loss", "attention")
    chosen = [word for op in operations for word in ("--operation", op)]
    done = python("-m", "benchmarks.analysis.proofs", "--method", "sida", "--alone", *chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ")[:4] for line in done.stdout.splitlines()[2:]]
    assert rows == [["| sida", "fp32", op, "right"] for op in operations]
