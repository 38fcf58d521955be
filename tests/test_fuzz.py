"""A few damaged files for every reader; tests/fuzz.py is the long hunt."""

import pytest

from tests.fuzz import TARGETS, hunt


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_are_refused_or_valid(name, tmp_path):
    counts = hunt(name, tmp_path, max_examples=60, derandomize=True, database=None)
    assert counts["tried"] >= 60
