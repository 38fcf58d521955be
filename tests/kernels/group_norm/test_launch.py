"""Launch parameters, and the configurations that are compiled ahead of time."""

import pytest

from sid_fast.kernels.group_norm import FEWER_PER_THREAD, configurations, launch
from tests.helpers.group_norm import check, draw


@pytest.mark.slow
@pytest.mark.parametrize("key", sorted(FEWER_PER_THREAD, key=str), ids=str)
def test_launches_with_fewer_elements_per_thread(key, device, monkeypatch):
    """Use 4 of the 32 groups: the same program, but an eighth as many."""
    channels, side, dtype, resample, backward = key
    few = channels // 8
    monkeypatch.setitem(
        FEWER_PER_THREAD, (few, side, dtype, resample, backward), FEWER_PER_THREAD[key]
    )
    launch.cache_clear()
    real, small = (
        launch((c, side, side), c, dtype, groups, True, resample, backward).constants
        for c, groups in ((channels, 32), (few, 4))
    )
    assert real | {"CHANNELS": few, "LEFT": few, "GROUPS": 4} == small
    check(*draw((1, few, side, side), 4, dtype, device, resample=resample), dtype)
    launch.cache_clear()


def test_configurations_cover_what_a_step_launches():
    """norm1 with and without dropout, backward with and without frozen weights, unique labels."""
    constants_of = {label: constants for label, _, _, constants, _, _ in configurations()}
    assert len(constants_of) == len(list(configurations()))
    shape = "256@32x32 bf16"
    assert constants_of[f"forward norm1 add {shape}"]["seed_ptr"] is None
    assert "seed_ptr" not in constants_of[f"forward norm1 add dropout {shape}"]
    trained, frozen = (constants_of[f"backward sum{end} {shape}"] for end in ("", " frozen"))
    parameter_gradients = {"dparam_ptr", "dx_bias_ptr"}
    assert parameter_gradients <= frozen.keys()
    assert not parameter_gradients & trained.keys()
