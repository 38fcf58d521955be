"""The report names the provenance of every figure; --compare ignores overlapping ranges."""

import re

import pytest

from benchmarks import report, results
from sid_fast import cli
from tests.helpers.results import ROW


def ms(low, middle, high):
    return {"ms_p20": low, "ms_p50": middle, "ms_p80": high}


def kernels(path, device="NVIDIA H200", **times):
    file = results.Results(path, "kernels", device=device, driver="580.1")
    for shape, spread in times.items():
        file.add(ROW | {"shape": shape} | spread)
    return path


def main(*arguments):
    """Run the command; returns its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["report", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main(report.main, "benchmarks.report")
    return stopped.value.code or 0


@pytest.fixture
def folder(tmp_path):
    kernels(tmp_path / "results" / "h200" / "kernels.jsonl", a=ms(1, 1.234, 2), b=ms(2, 3, 4))
    train = results.Results(tmp_path / "results/h200/train.jsonl", "train", device="NVIDIA X")
    for variant, rate in (("published", 10.0), ("sid_fast", 5678.0)):
        for micro in (8, 16):
            train.add(step(variant, micro, img_s=rate * micro))
    train.add(step("optimised", 16, None))
    evaluation = results.Results(
        tmp_path / "results" / "evaluation.jsonl", "evaluation", device="CPU", detector="pixels",
        data="cifar10.zip",
    )  # fmt: skip
    for kind, ratio in (("dali", 4.321), ("plain", 1.0)):
        evaluation.add(
            dict(stage="reading", variant=kind, images=9, img_s=4.5, speedup=ratio) | ms(1, 2, 3)
        )
    steps = results.Results(tmp_path / "results/breakdown.jsonl", "breakdown", device="NVIDIA Z")
    for kind, name, floor in (("update", "all", 0.5), ("update", "adam_ema_kernel", None)):
        steps.add(
            dict(preset="ffhq64", precision="bf16", micro_batch=64, kind=kind, name=name, calls=2.0,
                 device_ms=1.75, share=0.25, floor_ms=floor)
        )  # fmt: skip
    return tmp_path / "results"


def step(variant, micro_batch, middle=2, preset="cifar10-uncond", **figures):
    """Make a row of the training benchmark; without a time, of a variant that did not fit."""
    keys = {"preset": preset, "variant": variant, "micro_batch": micro_batch}
    if middle is None:
        return keys | {"status": "out of memory"}
    return keys | ms(middle, middle, middle) | figures | {"status": "ok"}


def test_every_figure_stands_with_its_device_date_and_commit(folder):
    assert main("--results", folder) == 0
    text = (folder.parent / "README.md").read_text("utf-8")
    for path in folder.rglob("*.jsonl"):
        row = results.read(path)[0]
        heading = next(line for line in text.splitlines() if row["device"] in line)
        assert row["commit"] in heading
        assert row["date"][:10] in heading
        assert f"load {row['load']:g} before" in heading
    assert "1.23" in text
    assert "90,848" in text
    assert "| optimised | 16 | out of memory |" in re.sub(r"(\|  )+", "", text)  # in no figure
    figures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(figures) == 4
    assert "| update | adam_ema_kernel | 2 | 1.75 | 0.25 |" in text
    for figure in figures:
        assert (folder.parent / figure).stat().st_size > 5000
    assert "driver 580.1" in text
    assert "No GPU measurements" not in text
    assert "pixels on cifar10.zip" in text
    assert "4.32" in text


def test_a_file_of_two_commits_has_two_sections(tmp_path, monkeypatch):
    path = tmp_path / "results" / "kernels.jsonl"
    for commit in ("abc", "abd"):
        monkeypatch.setenv("SID_FAST_COMMIT", commit)
        kernels(path, **{f"of {commit}": ms(1, 2, 3)})
    assert main("--results", path.parent) == 0
    text = (tmp_path / "README.md").read_text("utf-8")
    first, second = (text.index(f"commit {commit}") for commit in ("abc", "abd"))
    assert first < text.index("of abc") < second < text.index("of abd")
    assert len(set(re.findall(r"!\[.*?\]\((.*?)\)", text))) == 2


def test_bars_show_the_micro_batch_at_which_most_variants_ran(monkeypatch, tmp_path):
    """A curve needs more than one micro-batch; rows without a time are in no figure."""
    drawn = []
    monkeypatch.setattr(report, "draw_bars", lambda path, title, rows, *_: drawn.append(rows))
    monkeypatch.setattr(report, "draw_throughput", lambda path, *_: drawn.append(path.name))
    path = tmp_path / "train.jsonl"
    train = results.Results(path, "train")
    rows = [step("sid_fast", 8), step("published", 8), step("sid_fast", 64)]
    rows += [step("optimised", 64, None), step("sid_fast", 16, preset="ffhq64")]
    for row in [*rows, step("sid_fast", 8, None, preset="imagenet64")]:
        train.add(row)
    texts, figures = report._train(results.read(path), tmp_path / "train")
    curve, bars, alone = drawn
    assert curve == "train-cifar10-uncond.png"
    assert [(row["variant"], row["micro_batch"]) for row in alone] == [("sid_fast", 16)]
    assert [(row["variant"], row["micro_batch"]) for row in bars] == [
        ("sid_fast", 8), ("published", 8)
    ]  # fmt: skip
    assert len(figures) == 3
    assert "| sid_fast | 8 | out of memory |" in texts[2]
    path = tmp_path / "kernels.jsonl"
    untimed = {k: v for k, v in ROW.items() if not k.startswith("ms")}
    results.Results(path, "kernels").add(untimed | {"status": "no kernel for this shape"})
    texts, figures = report._kernels(results.read(path), tmp_path / "kernels")
    assert not figures
    assert "no kernel for this shape" in texts[0]


def test_a_report_without_a_gpu_says_so(tmp_path):
    check = results.Results(tmp_path / "results" / "check.jsonl", "check", driver=None)
    check.add(dict(name="x", status="passed", error=0.0, bound=0.0, seconds=1.0, note=""))
    (tmp_path / "results" / "log.jsonl").write_text('{"images": 8}')  # of a run, not a result
    assert main("--results", tmp_path / "results") == 0
    assert "No GPU measurements yet" in (tmp_path / "README.md").read_text()


def test_slower_means_disjoint_ranges(tmp_path, capsys):
    same = dict.fromkeys("abce", ms(1, 1.1, 1.2))
    old = kernels(tmp_path / "old.jsonl", **same, d=ms(1, 1, 1))
    new = kernels(
        tmp_path / "new.jsonl", a=ms(1.19, 2, 3), b=ms(1.3, 1.4, 1.5), c=ms(0.5, 0.6, 0.7),
        e=ms(0.9, 1, 1.05),
    )  # fmt: skip
    assert main("--compare", old, new) == 1
    shown = capsys.readouterr().out
    assert "slower  group_norm b" in shown
    assert "1.1 ms (1-1.2) 1.4 ms (1.3-1.5)" in shown
    assert "faster  group_norm c" in shown
    assert "missing group_norm d" in shown
    assert "group_norm a" not in shown
    assert "group_norm e" not in shown
    assert "5 rows: 1 slower, 1 faster, 1 missing, 0 new" in shown
    assert main("--compare", old, old) == 0


def test_different_devices_are_not_compared(tmp_path, capsys):
    old = kernels(tmp_path / "old.jsonl", a=ms(1, 1, 1))
    new = kernels(tmp_path / "new.jsonl", device="CPU", a=ms(1, 1, 1))
    assert main("--compare", old, new) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "NVIDIA H200" in error
    assert "CPU" in error
    assert main("--compare", old, tmp_path / "none.jsonl") == 2
    assert "none.jsonl" in capsys.readouterr().err
