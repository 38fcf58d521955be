"""Result files are whole after every row, and say what a row may hold."""

import csv
import json

import pytest

from benchmarks import record
from sid_fast.errors import UserError
from tests.helpers.results import ROW


def test_every_row_is_on_the_disk_before_the_next(tmp_path):
    path = tmp_path / "h200" / "kernels.json"
    result = record.Record(path, "kernels", device="NVIDIA H200", preset="x")
    for n in (1, 2):
        result.add(**ROW)
        found = record.read(path)
        assert found["rows"] == [ROW] * n
        assert (found["benchmark"], found["device"], found["preset"]) == (
            "kernels", "NVIDIA H200", "x",
        )  # fmt: skip
        assert found["commit"]
        assert found["versions"]["torch"]
        assert "T" in found["date"]
        with open(path.with_suffix(".csv"), newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == n
        assert rows[-1]["ms_p80"] == "3.0"
        assert rows[-1]["name"] == "group_norm"
    assert sorted(p.name for p in path.parent.iterdir()) == ["kernels.csv", "kernels.json"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"speed": 1}, "speed"),
        ({"gb_s": ...}, "gb_s"),
        ({"ms": {"p50": 1.0}}, "p50"),
    ],
)
def test_a_row_of_another_form_is_refused_and_leaves_the_file(tmp_path, change, word):
    result = record.Record(tmp_path / "kernels.json", "kernels")
    result.add(**ROW)
    row = {k: v for k, v in (ROW | change).items() if v is not ...}
    with pytest.raises(ValueError, match=word):
        result.add(**row)
    assert len(record.read(tmp_path / "kernels.json")["rows"]) == 1


def test_columns_stand_in_the_order_of_the_form(tmp_path):
    """What a row is of first, whatever order it is given in."""
    result = record.Record(tmp_path / "kernels.json", "kernels")
    result.add(**dict(reversed(ROW.items())))
    expected = [*result.form.keys, "ms", *result.form.figures]
    assert list(record.read(result.path)["rows"][0]) == expected
    header = result.path.with_suffix(".csv").read_text().partition("\n")[0]
    assert header.split(",")[:6] == [*result.form.keys, "ms_p20"]


def test_percentiles():
    assert record.percentiles([float(n) for n in range(11)]) == {"p20": 2, "p50": 5, "p80": 8}


@pytest.mark.parametrize("text", ["", "[]", '{"rows": []}', '{"benchmark": "x", "rows": []}'])
def test_what_is_no_result_is_named(tmp_path, text):
    path = tmp_path / "odd.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"odd\.json"):
        record.read(path)


def test_a_result_without_rows_is_not_written(tmp_path):
    record.Record(tmp_path / "kernels.json", "kernels")
    assert not list(tmp_path.iterdir())
    assert json.dumps(record.surroundings())
