"""The experiments' scripts and their summary."""

import importlib
import json
import os
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.analysis import experiment

ROOT = Path(__file__).parents[2]
# Replaces Python on a machine with a GPU: logs its command lines. Training stops with --max-hours.
STAND_IN = r"""#!/usr/bin/env bash
case "$*" in
    "-c print"*) python3 "$@" ;;
    "-m "*) printf '%s\x1f' "${@:2}" >>"$CALLS" && echo >>"$CALLS" ;;
esac
[[ "$*" == *pretrain* ]] && exit "$STATUS"
[[ "$*" == *sid_fast.train* ]] && exit 75
exit 0
"""


@pytest.fixture
def cifar10(tmp_path):
    """cifar10(status of pretraining) -> the process and its calls by module."""
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    for name in ("images.zip", "detector.pt"):
        (tmp_path / name).touch()
    (tmp_path / "calls").touch()
    script = ROOT / "benchmarks/experiments/cifar10/run.sh"

    def run(status=75):
        environment = {
            "PYTHON": str(python), "CALLS": str(tmp_path / "calls"), "STATUS": str(status),
        }  # fmt: skip
        done = subprocess.run(
            [script, tmp_path / "images.zip", tmp_path / "detector.pt", tmp_path / "out", "1000"],
            env=os.environ | environment, capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        return done, [line.split("\x1f")[:-1] for line in (tmp_path / "calls").open()]

    return run


def test_cifar10_trains_a_teacher_and_three_generators_within_the_time(cifar10, tmp_path):
    done, calls = cifar10()
    assert done.returncode == 0, done.stderr
    modules = [name for name, *_ in calls]
    assert modules == [
        "sid_fast.pretrain",
        *["sid_fast.train"] * 3,
        "benchmarks.analysis.experiment",
    ]
    given = [
        importlib.import_module(name).main.make_context(name, [*arguments]).params
        for name, *arguments in calls[:-1]
    ]
    assert sum(options["max_hours"] for options in given) < 1000 / 3600
    assert [options["preset"] for options in given[1:]] == [
        "cifar10-cond", "cifar10-cond-sida", "cifar10-cond-sid2a",
    ]  # fmt: skip
    assert all(options["teacher"] == str(tmp_path / "out/teacher") for options in given[1:])
    assert given[3]["generator"] == given[1]["out"]


def test_cifar10_stops_at_a_part_that_fails(cifar10):
    done, calls = cifar10(status=1)
    assert done.returncode == 1
    assert [name for name, *_ in calls] == ["sid_fast.pretrain"]


def test_cifar10_without_arguments_says_how_to_call_it():
    done = subprocess.run(
        ROOT / "benchmarks/experiments/cifar10/run.sh", capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "run.sh IMAGES DETECTOR" in done.stderr


def test_a_run_without_an_evaluation_is_left_out_of_the_picture(tmp_path, capsys):
    for name, images in (("long", (0, 64)), ("short", (0,))):
        run = tmp_path / name
        run.mkdir()
        (run / "config.json").write_text(json.dumps({"out": str(run), "data": "/data/x.zip"}))
        records = [{"images": n, "FID": 2.0 + n, "teacher": 1.5} for n in images]
        (run / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        Image.new("L", (70, 70)).save(run / "samples-0000000000.png")
    out = tmp_path / "experiment"
    experiment.main(str(out), {"SiD": [tmp_path / "long"], "SiDA": [tmp_path / "short"]})
    assert capsys.readouterr().out.splitlines() == [
        "SiD: 66; mean 66", "SiDA: no evaluation of a trained network",
    ]  # fmt: skip
    assert (out / "distance.png").exists()
    assert (out / "long/over_time.png").exists()
    assert json.loads((out / "long/config.json").read_text())["data"] == "x.zip"
