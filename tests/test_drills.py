"""The short form of the fault drills; `python -m tests.drills` is the long one."""

import pytest

from tests.helpers.processes import python


@pytest.mark.slow
def test_no_drill_loses_work():
    done = python("-m", "tests.drills", "--short")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("7 of 7 drills\n"), done.stdout
