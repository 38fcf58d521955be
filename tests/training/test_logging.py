"""The log of a run is bounded, and survives damage."""

import json
import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sid_fast.errors import UserError, WriteFailed
from sid_fast.training import logging
from sid_fast.training.logging import Log, read_log, thin


def test_a_log_stays_below_its_bound_and_keeps_its_evaluations(tmp_path, monkeypatch):
    monkeypatch.setattr(logging, "MAX_BYTES", 20_000)
    with Log(tmp_path, -1) as log:
        for images in range(1000):
            log.write(images, {"loss": images / 7})
            if images % 100 == 0:
                log.write(images, {"FID": 1.0, "evaluation_s": 2.0})
            assert (tmp_path / "log.jsonl").stat().st_size <= 20_000
    records = read_log(tmp_path / "log.jsonl")
    assert [r["images"] for r in records if "evaluation_s" in r] == [*range(0, 1000, 100)]
    steps = [r["images"] for r in records if "loss" in r]
    assert steps[0] == 0
    assert steps[-1] == 999
    assert steps == sorted(set(steps))


def test_evaluations_alone_are_bounded_too():
    records = [{"images": i, "evaluation_s": 1.0} for i in range(1000)]
    kept = thin(records, 5000)
    assert sum(len(json.dumps(r)) + 1 for r in kept) <= 5000
    assert [kept[0], kept[-1]] == [records[0], records[-1]]
    assert thin(records[:10], 5000) == records[:10]


def test_damaged_lines_lose_no_other_records(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [b'{"images": 1, "a": 1}', b"\xff\0", b"[]", b'{"a": 1}', b"[" * 10_000,
             b'{"images": "2"}', b"9" * 5000, b'{"images": 3}', b'{"images": 4, "cut']  # fmt: skip
    path.write_bytes(b"\n".join(lines))
    assert [r["images"] for r in read_log(path)] == [1, 3]
    with Log(tmp_path, 3) as log:
        log.write(4, {"a": 2.0})
    assert [r["images"] for r in read_log(path)] == [1, 3, 4]
    assert (tmp_path / "log-damaged.jsonl").read_bytes() == b"\n".join(lines)


def test_a_cut_last_line_is_no_damage(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"images": 1}\n{"ima')
    with Log(tmp_path, 1):
        pass
    assert read_log(tmp_path / "log.jsonl") == [{"images": 1}]
    assert not (tmp_path / "log-damaged.jsonl").exists()


def test_a_log_that_cannot_be_thinned_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(logging, "MAX_BYTES", 100)
    with Log(tmp_path, -1) as log:
        log.write(1, {"a" * 60: 1.0})

        def full(path):
            raise WriteFailed("full")

        with monkeypatch.context() as patch:
            patch.setattr(logging, "atomic_path", full)
            with pytest.raises(WriteFailed):
                log.write(2, {"a" * 60: 1.0})
        log.write(3, {"a" * 60: 1.0})
    assert [r["images"] for r in read_log(tmp_path / "log.jsonl")] == [1, 3]


def board(folder) -> dict[str, list]:
    """The scalars that TensorBoard shows: name -> [(images, value), ...]."""
    shown = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0})
    shown.Reload()
    return {n: [(e.step, e.value) for e in shown.Scalars(n)] for n in shown.Tags()["scalars"]}


def test_tensorboard_shows_a_record_at_once_and_a_resumed_run_once(tmp_path):
    with Log(tmp_path, -1) as log:
        for images in (4, 8, 12):
            log.write(images, {"loss": float(images)})
            assert board(tmp_path)["loss"][-1] == (images, images)
    with Log(tmp_path, 4) as log:  # resumed from the state of 4 images
        log.write(8, {"loss": 1.0})
    assert board(tmp_path)["loss"] == [(4, 4.0), (8, 1.0)]
    assert read_log(tmp_path / "log.jsonl")[-1] == {"images": 8, "loss": 1.0}


def test_values_that_are_not_finite_are_null(tmp_path):
    with Log(tmp_path, -1) as log:
        log.write(4, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0})
    line = (tmp_path / "log.jsonl").read_text()
    assert line == '{"images": 4, "a": null, "b": null, "c": null, "d": 1.0}\n'


def test_tensorboard_is_bounded_and_made_anew_from_the_log(tmp_path, monkeypatch):
    monkeypatch.setattr(logging, "MAX_BYTES", 20_000)
    monkeypatch.setattr(logging, "MAX_BOARD_BYTES", 40_000)
    sizes = []
    foreign = {"images": -1, "text": "x", "list": [1], "none": None}
    (tmp_path / "log.jsonl").write_text(json.dumps(foreign) + "\n")
    with Log(tmp_path, -1) as log:
        for images in range(1000):
            log.write(images, {"loss": images / 8, "nan": math.nan})
            files = list((tmp_path / "tensorboard").iterdir())
            sizes.append(sum(f.stat().st_size for f in files))
            assert sizes[-1] <= 40_000
            assert len(files) == 1
    assert sizes[-1] > 5000
    shown = board(tmp_path)["loss"]
    assert shown[0][0] < 200
    assert shown[-1] == (999, 999 / 8)
    assert shown == sorted(set(shown))
    assert len(shown) > 30


def test_a_run_that_is_often_restarted_has_few_files(tmp_path, monkeypatch):
    monkeypatch.setattr(logging, "MAX_BOARD_FILES", 5)
    for images in range(20):
        with Log(tmp_path, images) as log:
            log.write(images, {"loss": 1.0})
        assert len(list((tmp_path / "tensorboard").iterdir())) <= 5
    assert board(tmp_path)["loss"] == [(images, 1.0) for images in range(20)]


def test_a_log_without_a_bound_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(logging, "MAX_READ_BYTES", 100)
    (tmp_path / "log.jsonl").write_text('{"images": 1}\n' * 10)
    with pytest.raises(UserError, match=r"log.jsonl has 140 bytes, more than the 100"):
        Log(tmp_path, 1)
