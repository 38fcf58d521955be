"""Run by torchrun from test_parallel.py: the golden trajectory, every round split by rows."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from golden import TRAJECTORY_TOLERANCE, read
from test_distiller import golden_draws, golden_settings, trajectory_error

import sid_fast
from sid_fast.engine import parallel

folder, name = Path(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
data = read(folder / f"trajectory_{name}.npz")
teacher = sid_fast.load_network(folder / f"{name}.pkl")
start = {k: v.clone() for k, v in teacher.state_dict().items()}
with parallel.joined(torch.device("cpu")):
    settings = golden_settings(data)
    settings.micro_batch //= dist.get_world_size()
    distiller = sid_fast.Distiller(teacher, settings)

    def part(draw: sid_fast.Draw) -> sid_fast.Draw:
        rows = slice(dist.get_rank(), None, dist.get_world_size())
        values = draw.z, draw.sigma, draw.noise, draw.class_labels
        return sid_fast.Draw(*(None if v is None else v[rows] for v in values))

    for step in range(int(data["steps"])):
        draws = golden_draws(data, step)
        distiller.step({phase: [part(d) for d in rounds] for phase, rounds in draws.items()})
    for net, key in (
        (distiller.fake_score, "fake_score"),
        (distiller.generator, "G"),
        (distiller.ema, "G_ema"),
    ):
        error = trajectory_error(data, start, net, key)
        print(f"rank {dist.get_rank()} of {dist.get_world_size()}: {name} {key} {error:.2e}")
        assert error <= TRAJECTORY_TOLERANCE
