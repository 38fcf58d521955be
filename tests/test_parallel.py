"""Several processes do what one does."""

import pytest
from processes import TORCHRUN, python
from test_distiller import TRAJECTORIES


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_two_processes_with_half_the_batch_each_meet_the_golden_trajectory(golden, name):
    script = __file__.replace("test_parallel", "parallel_trajectory")
    done = python(*TORCHRUN, 2, script, golden, name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("of 2") == 6
