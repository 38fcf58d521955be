"""The summary of a folder: what is worst comes first, on one screen."""

from benchmarks import summary
from benchmarks.record import Record
from tests.helpers.results import ROW


def spread(ms):
    return {"p20": ms, "p50": ms, "p80": ms}


def test_kernels_stand_against_their_best_rival_the_slowest_first():
    rows = [
        ROW | {"shape": shape, "provider": provider, "ms": spread(ms), "floor_share": share}
        for shape, provider, ms, share in (
            ("a", "triton", 1.0, 0.5),
            ("a", "eager", 4.0, 0.1),
            ("a", "compile", 3.0, 0.2),
            ("b", "eager", 1.0, 0.9),
            ("b", "triton", 2.0, 0.4),
            ("b", "cuda", 5.0, 0.3),
            ("alone", "triton", 9.0, 0.5),
        )
    ]
    rows.append(ROW | {"shape": "a", "provider": "sdpa", "ms": spread(None), "status": "none"})
    slow, fast = summary.kernels(rows)
    assert slow.startswith("group_norm b")
    assert "2.000 ms,  40% of the floor" in slow
    assert slow.endswith("eager takes 0.50 times as long")
    assert fast.startswith("group_norm a")
    assert fast.endswith("compile takes 3.00 times as long")


def test_every_result_of_a_folder_is_shown_and_other_files_named(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"alpha": 1.2}')
    (tmp_path / "kernels.json.1f.tmp").write_text('{"benchm')  # of a session that was killed
    figures = {"found": None, "bound": None, "seconds": 1.0, "note": "why", "status": "error"}
    checks = Record(tmp_path / "check.json", "check", device="X")
    checks.extend([{"name": f"check {i}", **figures} for i in range(20)])
    summary.main(tmp_path)
    shown = capsys.readouterr().out
    assert "check.json: X, " in shown
    assert ", 20 rows" in shown
    assert "0 pass, 0 fail, 20 error, 0 skip" in shown
    assert "error check 12: None of None, why" in shown
    assert "check 13" not in shown
    assert "… and 7 more" in shown
    assert "config.json is no result" in shown
    assert "tmp" not in shown.replace(str(tmp_path), "")
