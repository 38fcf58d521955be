"""The teacher's sampler against recorded numbers of the original."""

import pytest
import torch

import sid_fast
from sid_fast.io import progress
from tests.helpers.golden import TOLERANCE, read, relative
from tests.helpers.networks import small_teacher


@pytest.mark.parametrize("name", ["ddpmpp_uncond", "adm_cond"])
@pytest.mark.parametrize("steps", [5, 18])
def test_heun_matches_golden(golden, name, steps):
    net = sid_fast.load_network(golden / f"{name}.pkl")
    data = read(golden / f"{name}.heun{steps}.npz")
    x = sid_fast.sampling.heun(net, data["latents"], data.get("class_labels"), num_steps=steps)
    assert x.dtype == torch.float64
    assert relative(x, data["x"]) <= TOLERANCE


@pytest.mark.parametrize("steps", [1, 3])
def test_each_network_call_counts_a_part_of_a_batch(steps):
    """A batch can take minutes, in which the progress line must move."""
    net = small_teacher()
    latents, classes = sid_fast.sampling.seed_inputs(list(range(70)), net.config, None)
    with progress.phase("generating", 200, "images") as shown:
        sid_fast.sampling.generate_images(net, latents, classes, 2.5, steps)
        assert shown.done + shown.partial == pytest.approx(70)
