"""Reconstruct each tracked EMA from the snapshots of the other width, and print the errors.

python benchmarks/experiments/digits-edm2/held_out.py runs/teacher
"""

import sys
from pathlib import Path

import torch

from sid_fast.ema import combined, snapshots
from sid_fast.io.safetensors import read_snapshot
from sid_fast.models.families import build_network, read_config
from sid_fast.training import power_ema

stored, config = snapshots(Path(sys.argv[1]))
end = max(s.images for s in stored)
with torch.device("meta"):
    net = build_network(read_config(config))


def relative(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return ‖found − expected‖ / ‖expected‖ over all tensors."""
    error = sum(float((found[k] - v).square().sum()) for k, v in expected.items())
    return (error / sum(float(v.square().sum()) for v in expected.values())) ** 0.5


for std in sorted({s.std for s in stored}):
    last = {s.std == std: read_snapshot(s.path)[0] for s in stored if s.images == end}
    others = [s for s in stored if s.std != std]
    print(f"width {std:g}: the other width itself {relative(last[False], last[True]):.1e}")
    for every in (4, 2, 1):
        used = others[::-1][::every]
        weights = power_ema.combination([s.profile for s in used], (end, power_ema.exponent(std)))
        found = combined(net, [s.path for s in used], weights.tolist())
        print(f"  from {len(used)} snapshots {relative(found, last[True]):.1e}")
