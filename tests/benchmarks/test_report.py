"""The report holds every figure with where it comes from; a regression is one beyond its spread."""

import re

import pytest

from benchmarks import record, report
from tests.helpers.results import ROW


def ms(low, middle, high):
    return {"p20": low, "p50": middle, "p80": high}


def kernels(path, device="NVIDIA H200", **times):
    result = record.Record(path, "kernels", device=device, driver="580.1")
    for shape, spread in times.items():
        result.add(**ROW | {"shape": shape, "ms": spread})
    return path


@pytest.fixture
def results(tmp_path):
    kernels(tmp_path / "results" / "h200" / "kernels.json", a=ms(1, 1.234, 2), b=ms(2, 3, 4))
    train = record.Record(tmp_path / "results" / "h200" / "train.json", "train", device="NVIDIA X")
    for variant, rate in (("published", 10.0), ("ours", 5678.0)):
        for micro in (8, 16):
            train.add(**step(variant, micro, img_s=rate * micro))
    train.add(**step("skilled", 16, None))
    evaluation = record.Record(
        tmp_path / "results" / "evaluation.json", "evaluation", device="CPU", detector="pixels",
        data="cifar10.zip",
    )  # fmt: skip
    for kind, ratio in (("dali", 4.321), ("plain", 1.0)):
        evaluation.add(
            stage="reading",
            variant=kind,
            ms=ms(1, 2, 3),
            images=9,
            img_s=4.5,
            over_plain=ratio,
            wait_share=None,
        )
    steps = record.Record(tmp_path / "results" / "breakdown.json", "breakdown", device="NVIDIA Z")
    for kind, name, floor in (("update", "all", 0.5), ("update", "adam_ema_kernel", None)):
        steps.add(
            preset="ffhq64", precision="bf16", micro_batch=64, kind=kind, name=name, calls=2.0,
            device_ms=1.75, share=0.25, floor_ms=floor,
        )  # fmt: skip
    return tmp_path / "results"


def step(variant, micro_batch, middle=2, preset="cifar10-uncond", **figures):
    """A row of the training benchmark; without a time, one of a variant that did not fit."""
    figures = dict.fromkeys(record.FORMS["train"].figures) | figures
    figures["status"] = "ok" if middle else "out of memory"
    spread = ms(middle, middle, middle)
    return {
        "preset": preset, "variant": variant, "micro_batch": micro_batch, "ms": spread, **figures
    }  # fmt: skip


def test_every_figure_stands_with_its_device_date_and_commit(results, capsys):
    assert report.main(["--results", str(results)]) == 0
    text = (results.parent / "README.md").read_text("utf-8")
    for path in results.rglob("*.json"):
        found = record.read(path)
        heading = next(line for line in text.splitlines() if found["device"] in line)
        assert found["commit"] in heading
        assert found["date"][:10] in heading
        assert f"load {found['load']:g} before" in heading
    assert "1.23" in text
    assert "90,848" in text
    assert "peak_reserved" not in text  # nowhere measured
    assert "| skilled | 16 | out of memory |" in re.sub(r"(\|  )+", "", text)  # and in no picture
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(pictures) == 5
    assert "| update | adam_ema_kernel | 2 | 1.75 | 0.25 |" in re.sub(r"\| 64 ", "", text)
    for picture in pictures:
        assert (results.parent / picture).stat().st_size > 5000
    assert "driver 580.1" in text
    assert "Nothing was measured on a GPU" not in text
    assert "pixels on cifar10.zip" in text
    assert "dali reads 4.32 times as fast as plain" in text
    assert "plain reads" not in text


def test_bars_stand_where_most_variants_have_run(monkeypatch, tmp_path):
    """And the curve where there is more than one size; of what has no time there is neither."""
    drawn = []
    monkeypatch.setattr(report, "draw_bars", lambda path, title, rows, *_: drawn.append(rows))
    monkeypatch.setattr(report, "draw_throughput", lambda path, *_: drawn.append(path.name))
    train = record.Record(tmp_path / "train.json", "train")
    train.extend(
        [step("ours", 8), step("published", 8), step("ours", 64), step("skilled", 64, None)]
    )
    train.extend([step("ours", 16, preset="ffhq64"), step("ours", 8, None, preset="imagenet64")])
    texts, pictures = report._train(record.read(train.path), tmp_path / "train")
    curve, bars, alone = drawn
    assert curve == "train-cifar10-uncond.png"
    assert alone == [step("ours", 16, preset="ffhq64")]
    assert bars == [step("ours", 8), step("published", 8)]
    assert len(pictures) == 3
    assert "| imagenet64 | ours | 8 | out of memory |" in texts[2]
    kernels = record.Record(tmp_path / "kernels.json", "kernels")
    kernels.add(**ROW | {"ms": ms(None, None, None), "status": "no kernel for this shape"})
    texts, pictures = report._kernels(record.read(kernels.path), tmp_path / "kernels")
    assert not pictures
    assert "no kernel for this shape" in texts[0]


def test_a_report_without_a_gpu_says_so(tmp_path):
    check = record.Record(tmp_path / "results" / "check.json", "check", driver=None)
    check.add(name="x", status="pass", found=0.0, bound=0.0, seconds=1.0, note="")
    (tmp_path / "results" / "config.json").write_text('{"alpha": 1.2}')  # of a run, not a result
    assert report.main(["--results", str(tmp_path / "results")]) == 0
    assert "Nothing was measured on a GPU yet" in (tmp_path / "README.md").read_text()


def test_slower_is_slower_beyond_both_spreads(tmp_path, capsys):
    old = kernels(
        tmp_path / "old.json",
        a=ms(1, 1.1, 1.2),
        b=ms(1, 1.1, 1.2),
        c=ms(1, 1.1, 1.2),
        d=ms(1, 1, 1),
        e=ms(1, 1.1, 1.2),
    )
    new = kernels(
        tmp_path / "new.json", a=ms(1.19, 2, 3), b=ms(1.3, 1.4, 1.5), c=ms(0.5, 0.6, 0.7),
        e=ms(0.9, 1, 1.05),
    )  # fmt: skip
    assert report.main(["--compare", str(old), str(new)]) == 1
    shown = capsys.readouterr().out
    assert "slower  group_norm b" in shown
    assert "x1.27" in shown
    assert "faster  group_norm c" in shown
    assert "missing group_norm d" in shown
    assert "group_norm a" not in shown
    assert "group_norm e" not in shown
    assert "4 rows compared: 1 slower, 1 faster" in shown
    assert report.main(["--compare", str(old), str(old)]) == 0


def test_two_devices_do_not_compare(tmp_path, capsys):
    old = kernels(tmp_path / "old.json", a=ms(1, 1, 1))
    new = kernels(tmp_path / "new.json", device="CPU", a=ms(1, 1, 1))
    assert report.main(["--compare", str(old), str(new)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "NVIDIA H200" in error
    assert "CPU" in error
    assert report.main(["--compare", str(old), str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
