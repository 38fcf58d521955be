"""CUDA graphs: when there are any, and that rehearsal and replay make the same steps.

Where there is no GPU operations are recorded in place of launches: see recorder.py.
"""

import pytest
import recorder
import torch
from test_distiller import FAST, small_teacher, weights

from sid_fast import Distiller, Settings
from sid_fast.engine import graphs
from sid_fast.errors import OutOfMemory, UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_what_the_option_comes_to():
    assert graphs.usable("auto", CUDA) == (True, "")
    assert graphs.usable("on", CUDA) == (True, "")
    assert graphs.usable("off", CUDA) == (False, "")
    assert graphs.usable("auto", CPU) == (False, "")
    used, note = graphs.usable("auto", CUDA, sharded=True)
    assert not used and "--cuda-graph on" in note
    assert graphs.usable("on", CUDA, sharded=True) == (True, "")
    used, note = graphs.usable("auto", CUDA, recompute=True)
    assert not used and "CUDA graphs are off: blocks" in note
    with pytest.raises(UserError, match="none on cpu"):
        graphs.usable("on", CPU)
    with pytest.raises(UserError, match="cuda-graph='yes'"):
        graphs.usable("yes", CUDA)


@pytest.fixture
def stand_in(monkeypatch, device):
    if device.type == "cpu":
        recorder.stand_in(monkeypatch.setattr)


@pytest.mark.parametrize("micro_batch", [4, 1, None])
def test_a_replayed_run_is_the_eager_one(stand_in, device, micro_batch):
    """Dropout, warps and a first moment included; the two rehearsals leave no trace."""
    settings = Settings(
        **FAST | {"batch_size": 8},
        dropout=0.2,
        augment_p=0.5,
        generator_beta1=0.9,
        micro_batch=micro_batch,
    )
    found = []
    for replayed in (False, True):
        distiller = Distiller(small_teacher().to(device), settings, cuda_graph=replayed)
        for _ in range(3):
            metrics = distiller.step()
        found.append((weights(distiller), metrics["generator/loss"].clone()))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    expected = [1, 6, 1, 1, 6, 1] if micro_batch == 1 else [1]
    assert [times for _, times in distiller.graphs.parts] == expected


def test_a_capture_that_failed_elsewhere_is_not_used_here(stand_in, monkeypatch):
    """Processes that replay and processes that do not would send in different orders."""
    monkeypatch.setattr(graphs.parallel, "any_", lambda failed: True)
    distiller = Distiller(small_teacher(), Settings(**FAST), cuda_graph=True)
    with pytest.raises(UserError, match=r"\(on another process\); use --cuda-graph off"):
        distiller.step()


def test_a_failed_capture_says_why_and_the_way_out(stand_in, monkeypatch):
    def fail(*_, **__):
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        finally:
            raise RuntimeError("capture was invalidated")  # by ending it

    monkeypatch.setattr(graphs, "Graph", fail)
    distiller = Distiller(small_teacher(), Settings(**FAST), cuda_graph=True)
    with pytest.raises(UserError, match=r"\(operation .* capturing\); use --cuda-graph off"):
        distiller.step()


def test_what_is_said_on_purpose_hides_its_cause():
    try:
        try:
            raise RuntimeError("CUDA out of memory. 2.00 GiB. GPU 0 has a total …")
        except RuntimeError as error:
            raise OutOfMemory("fake step: 2.00 GiB") from error
    except OutOfMemory as error:
        assert graphs.reason_of(error) == "fake step: 2.00 GiB"
    assert graphs.reason_of(AssertionError()) == "AssertionError"
