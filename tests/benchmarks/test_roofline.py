"""Floors: the larger of compute and memory time, summed over the operations of a layer."""

import re

import pytest

from benchmarks import results
from benchmarks.analysis import roofline
from sid_fast.errors import UserError
from sid_fast.tools import op_counter
from sid_fast.tools.gpu_specs import Specs
from tests.helpers.networks import SMALL

CARD = Specs(80, bandwidth=2.0, tflops={"bf16": 100.0}, source="made up")


def op(flops, nbytes, layer="a", kind="convolution"):
    return op_counter.Op("x", kind, layer, flops, nbytes, (1,))


def test_the_floor_is_the_larger_of_compute_and_memory():
    assert roofline.floor(op(10**14, 10**12), CARD, "bf16") == (1.0, "compute")
    assert roofline.floor(op(10**12, 10**12), CARD, "bf16") == (0.5, "memory")


def test_a_layer_is_the_sum_of_its_operations():
    ops = [op(10**8, 10**6), op(0, 4 * 10**6), op(5, 5, "b"), op(0, 2, "a", "pointwise")]
    first, second, third = roofline.rows("forward", ops, CARD, "bf16")
    assert (first["layer"], first["calls"], first["bound"]) == ("a", 2, "memory")
    assert first["gflop"] == 0.1
    assert first["mb"] == 5.0
    assert first["floor_us"] == pytest.approx(1.0 + 2.0)
    assert (second["layer"], third["kind"]) == ("b", "pointwise")


def test_norms_are_their_layers_alone():
    ops = [op(0, 5, "a.norm0"), op(0, 7, "a.8x8_aux_norm"), op(0, 11, "a.norm0.b"), op(0, 13, "a")]
    assert roofline.norms(ops) == (2, 12)


@pytest.mark.slow
def test_the_command_writes_results_and_a_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(roofline, "network_config", lambda teacher: SMALL)
    options = roofline.Options(preset="digits", images=4, out=str(tmp_path))
    roofline.run(options, set())
    shown = capsys.readouterr().out
    assert "ESTIMATE for h200: 790 TFLOP/s, 4.3 TB/s (measured" in shown
    calls, eager_calls = re.findall(r"group norms, forward, .*: (\d+) operations", shown)
    assert int(calls) < int(eager_calls)
    assert "enc.8x8_block0.norm0" in shown
    assert "the whole step" in shown
    rows = results.read(tmp_path / "digits-h200-bf16.jsonl")
    assert {row["device"] for row in rows} == {"estimate for h200"}
    scopes = [row["scope"] for row in rows]
    assert set(scopes) == {"forward", "step"}
    step = [row for row in rows if row["scope"] == "step"]
    floor = re.search(r"a micro-batch of 4 takes at least ([\d.]+) ms", shown)[1]
    assert sum(row["floor_us"] for row in step) / 1e3 == pytest.approx(float(floor), abs=0.01)
    assert (tmp_path / "digits-h200-bf16.png").stat().st_size > 20_000


def test_an_unknown_card_lists_those_known():
    with pytest.raises(UserError, match="h200"):
        roofline.run(roofline.Options(preset="digits", card="tpu"), set())
