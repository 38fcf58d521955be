"""Run by torchrun from test_parallel.py: golden trajectories, every round split by rows.

Each layout named as NETWORK:MODE runs in turn; MODE is one of --parallel, or `tight`: fsdp with
nothing kept gathered.
"""

import dataclasses
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from golden import TRAJECTORY_TOLERANCE, read
from test_distiller import golden_draws, golden_settings, trajectory_error

import sid_fast
from sid_fast.engine import parallel

folder, cases = Path(sys.argv[1]), sys.argv[2:]
torch.set_num_threads(1)
cpu = torch.device("cpu")


def part(rounds: list[sid_fast.Draw]) -> list[sid_fast.Draw]:
    """This process's rows of a step, in as many rounds as there are rows for."""
    values = ([getattr(d, k) for d in rounds] for k in ("z", "sigma", "noise", "class_labels"))
    rows = [v[0] if v[0] is None else torch.cat(v)[rank::world] for v in values]
    count = min(len(rounds), len(rows[0]))
    chunks = ([None] * count if v is None else v.chunk(count) for v in rows)
    return [sid_fast.Draw(*chunk) for chunk in zip(*chunks, strict=True)]


def trajectory(name: str, mode: str) -> None:
    data = read(folder / f"trajectory_{name}.npz")
    teacher = sid_fast.load_network(folder / f"{name}.pkl")
    start = {k: v.clone() for k, v in teacher.state_dict().items()}
    settings = golden_settings(data)
    settings.micro_batch = max(settings.micro_batch // world, 1)
    layout = parallel.plan(
        "fsdp" if mode == "tight" else mode, teacher, cpu, shard_group=min(world, 2)
    )
    layout = dataclasses.replace(layout, gathered=mode != "tight")
    distiller = sid_fast.Distiller(teacher, settings, layout=layout)
    for step in range(int(data["steps"])):
        draws = golden_draws(data, step)
        distiller.step({phase: part(rounds) for phase, rounds in draws.items()})
    for net, key in (
        (distiller.fake_score, "fake_score"),
        (distiller.generator, "G"),
        (distiller.ema, "G_ema"),
    ):
        if (found := parallel.whole(net)) is not None:
            error = trajectory_error(data, start, found, key)
            print(f"{mode} {name} {key} {error:.2e}", flush=True)
            assert error <= TRAJECTORY_TOLERANCE


with parallel.joined(cpu, "fsdp"):
    rank, world = dist.get_rank(), dist.get_world_size()
    import time

    for case in cases:
        t = time.process_time()
        trajectory(*case.split(":"))
        print(rank, case, time.process_time() - t)
