"""The teacher's sampler against recorded numbers of the original."""

import pytest
import torch

import sid_fast
from tests.helpers.golden import TOLERANCE, read, relative


@pytest.mark.parametrize("name", ["ddpmpp_uncond", "adm_cond"])
@pytest.mark.parametrize("steps", [5, 18])
def test_heun_matches_golden(golden, name, steps):
    net = sid_fast.load_network(golden / f"{name}.pkl")
    data = read(golden / f"{name}.heun{steps}.npz")
    x = sid_fast.sampling.heun(net, data["latents"], data.get("class_labels"), num_steps=steps)
    assert x.dtype == torch.float64
    assert relative(x, data["x"]) <= TOLERANCE
