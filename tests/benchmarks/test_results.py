"""Result files hold every row as soon as it is measured, with its provenance."""

import json

import pytest

from benchmarks import results
from sid_fast.errors import UserError, WriteFailed
from tests.helpers.results import ROW


def test_every_row_is_in_the_file_before_the_next(tmp_path):
    path = tmp_path / "h200" / "kernels.jsonl"
    file = results.Results(path, "kernels", device="NVIDIA H200", preset="x")
    for n in (1, 2):
        file.add(ROW | {"shape": str(n)})
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["shape"] for line in lines] == ["1", "2"][:n]
    assert lines == results.read(path)
    row = lines[-1]
    assert ROW.items() <= (row | {"shape": ROW["shape"]}).items()
    assert (row["benchmark"], row["device"], row["preset"]) == ("kernels", "NVIDIA H200", "x")
    assert set(results.PROVENANCE) <= set(row)
    assert row["commit"]
    assert row["torch"]
    assert "T" in row["date"]
    assert not any(isinstance(value, dict | list) for value in row.values()), "columns are flat"


def test_a_later_row_replaces_an_earlier_one_of_the_same_keys(tmp_path, monkeypatch):
    path = tmp_path / "kernels.jsonl"
    for commit, ms in (("abc", 1.0), ("abd", 3.0)):
        monkeypatch.setenv("SID_FAST_COMMIT", commit)
        results.Results(path, "kernels").add(ROW | {"ms_p50": ms})
        results.Results(path, "kernels").add(ROW | {"mode": "backward", "ms_p50": ms})
    rows = results.read(path)
    assert [(r["mode"], r["ms_p50"], r["commit"]) for r in rows] == [
        ("forward", 3.0, "abd"), ("backward", 3.0, "abd")
    ]  # fmt: skip
    assert len(path.read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("change", "word"), [({"mode": ...}, "mode"), ({"gb_s": float("nan")}, "JSON")]
)
def test_a_row_without_a_key_or_with_nan_is_refused(tmp_path, change, word):
    path = tmp_path / "kernels.jsonl"
    file = results.Results(path, "kernels")
    file.add(ROW)
    before = path.read_text()
    with pytest.raises(ValueError, match=word):
        file.add({k: v for k, v in (ROW | change).items() if v is not ...})
    assert path.read_text() == before


def test_a_folder_in_the_way_is_named(tmp_path):
    with pytest.raises(WriteFailed, match=str(tmp_path)):
        results.Results(tmp_path, "kernels").add(ROW)


def test_times():
    assert results.times([float(n) for n in range(11)]) == {
        "ms_p20": 2, "ms_p50": 5, "ms_p80": 8
    }  # fmt: skip


@pytest.mark.parametrize("text", ["{", "[]", '{"alpha": 1}', '{"benchmark": "x"}', "1"])
def test_another_file_is_refused_by_name(tmp_path, text):
    path = tmp_path / "odd.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=r"odd\.jsonl"):
        results.read(path)
