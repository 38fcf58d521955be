"""Reading the golden data."""

from pathlib import Path

import numpy as np
import torch

from sid_fast.networks import EDMNetwork
from sid_fast.networks.layers import QKV

NETWORKS = ["ddpmpp_uncond", "ddpmpp_cond", "ncsnpp_uncond", "adm_cond"]
TOLERANCE = 1e-4  # relative in norm, of values and gradients
TRAJECTORY_TOLERANCE = 1e-3


def read(path: Path) -> dict[str, torch.Tensor]:
    with np.load(path) as data:
        return {name: torch.from_numpy(np.asarray(data[name])) for name in data}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found − expected‖ / ‖expected‖; NaN never passes a comparison."""
    return float((found.detach().double() - expected.double()).norm() / expected.double().norm())


def check_gradients(net: EDMNetwork, data: dict[str, torch.Tensor], prefix: str) -> None:
    """Compare the gradients of all parameters with PREFIX.NAME, _head and _norm."""
    checked = 0
    for name, p in net.named_parameters():
        found = p.grad
        layer = net.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, QKV):
            found = found[layer.order().argsort()]
        if (expected := data.get(f"{prefix}.{name}")) is None:
            expected = data.get(f"{prefix}_head.{name}")
            if expected is None:
                assert found is None or not found.any(), f"{name}: golden has no gradient"
                continue
            norm = float(data[f"{prefix}_norm.{name}"])
            assert abs(float(found.norm()) - norm) <= TOLERANCE * norm, name
            found = found.flatten()[:512]
        if float(expected.norm()) == 0:
            assert not found.any(), name
        else:
            assert relative(found, expected) <= TOLERANCE, name
        checked += 1
    assert checked > 50
