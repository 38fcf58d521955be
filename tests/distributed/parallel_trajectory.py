"""Run by torchrun from test_parallel.py: golden trajectories, every round split by rows.

python parallel_trajectory.py GOLDEN STATES NETWORK:MODE[:save|resume] … runs one after the other.
MODE is one of --parallel, or `tight`: fsdp with nothing kept gathered. NETWORK is that of a
trajectory of SiD, or of SiDA (`sida_NAME`). `faults` is a small one with values planted that are
not finite, `graphs` replays its steps, `cut` compares it with one process.
"""

import dataclasses
import functools
import sys
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

import sid_fast
import sid_fast.kernels
from sid_fast import errors
from sid_fast.config.types import group_size
from sid_fast.data.datasets import ImageDataset, write_dataset
from sid_fast.models import EDMNetwork
from sid_fast.performance import ddp, fsdp, process_group
from sid_fast.training.checkpoint import States, find_state, load_state
from tests.helpers import recorder, toy
from tests.helpers.golden import (
    TRAJECTORY_TOLERANCE,
    golden_draws,
    golden_settings,
    read,
    trajectory_error,
)
from tests.helpers.networks import small_edm2, small_teacher

golden, states = Path(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
cpu = torch.device("cpu")
ddp.DDPGradSync.BUCKET = 2**16  # several of them, sent while backward goes on
load = functools.cache(lambda name: sid_fast.load_network(golden / f"{name}.pkl"))


def part(
    rounds: list[sid_fast.Draw], micro_batch: int, share: int | None = None, shares: int = 0
) -> list[sid_fast.Draw]:
    """This process's rows of a step (or one of so many shares) in rounds of micro_batch each.

    They are consecutive, so that groups of SiDA stay whole.
    """
    share, shares = (rank, world) if share is None else (share, shares)
    fields = ("z", "sigma", "noise", "class_labels", "real")
    values = {name: [getattr(d, name) for d in rounds] for name in fields}
    rows = {k: torch.cat(v).chunk(shares)[share] for k, v in values.items() if v[0] is not None}
    chunks = {name: v.split(micro_batch) for name, v in rows.items()}
    return [
        sid_fast.Draw(**dict(zip(chunks, chunk, strict=True)))
        for chunk in zip(*chunks.values(), strict=True)
    ]


def distiller_of(
    teacher: EDMNetwork, mode: str, settings: sid_fast.Settings, **options
) -> sid_fast.Distiller:
    return sid_fast.Distiller(teacher, settings, sharding=plan_of(mode), **options)


def plan_of(mode: str) -> fsdp.ShardingPlan:
    name = "fsdp" if mode == "tight" else mode
    plan = fsdp.plan(name, cpu, lambda shards, reshard_after_forward: 0, shard_group=min(world, 2))
    return dataclasses.replace(plan, reshard_after_forward=mode == "tight")


def trajectory(name: str, mode: str, state: str = "") -> None:
    sida, name = name.startswith("sida_"), name.removeprefix("sida_")
    data = read(golden / f"{'sida_' * sida}trajectory_{name}.npz")
    start = {k: v.clone() for k, v in load(name).state_dict().items()}
    settings = golden_settings(data)
    share = settings.batch_size // world
    settings.micro_batch = max(min(share, settings.micro_batch // world), group_size(settings))
    teacher = EDMNetwork(load(name).config)
    teacher.load_state_dict(start)
    distiller = distiller_of(teacher, mode, settings)
    writer = States(states, distiller, settings, keep=1)
    if state == "resume":
        load_state(find_state(str(states), None), distiller)
    for step in range(distiller.steps, int(data["steps"])):
        draws = golden_draws(data, step)
        distiller.step({k: part(rounds, settings.micro_batch) for k, rounds in draws.items()})
        if state == "save" and step == 1:
            assert writer.begin() is None  # and training goes on
    assert writer.finish() is None
    for net, key in (
        (distiller.fake_score, "fake_score"),
        (distiller.generator, "G"),
        (distiller.ema, "G_ema"),
    ):
        if (found := fsdp.gather_full(net)) is not None:
            error = trajectory_error(data, start, found, key)
            print(f"{mode} {name} {key} {error:.2e}", flush=True)
            assert error <= TRAJECTORY_TOLERANCE


def faults(mode: str) -> None:
    settings = sid_fast.Settings(batch_size=4, eps=1.0, fake_lr=1e-3, generator_lr=1e-3)
    distiller = distiller_of(small_teacher(), mode, settings)
    draws = distiller.draw()
    if rank == world - 1:
        for rounds in draws.values():
            rounds[0].z[0] = torch.nan
    metrics = distiller.step(draws)
    assert int(metrics["fake/dropped"]) == int(metrics["generator/dropped"]) == 1
    assert int(metrics["fake/nonfinite"]) == int(metrics["generator/nonfinite"]) == 0
    same_everywhere(distiller, metrics)

    optimizer = distiller.optimizers["generator"]
    planted, real = optimizer.named["model.map_layer0.weight"], optimizer.grad_sync.wait
    optimizer.grad_sync.wait = lambda: (real(), planted.grad.fill_(torch.nan))
    metrics = distiller.step()
    assert int(metrics["generator/nonfinite"]) == planted.numel()
    same_everywhere(distiller, metrics)

    draws = distiller.draw()
    for rounds in draws.values():
        rounds[0].z.fill_(torch.nan)
    before = [p.clone() for p in fsdp.local_shards(optimizer.params)]
    metrics = distiller.step(draws)
    assert bool(metrics["fake/skipped"])
    assert bool(metrics["generator/skipped"])
    assert all(map(torch.equal, fsdp.local_shards(optimizer.params), before))
    if rank == 0:
        print(f"{mode} faults")


def replays(mode: str, rounds: str, method: str = "sid") -> None:
    """Recorded steps, messages and all, end on the bits of those that ask Python every time.

    SiDA's first one is without the generator, and the others are captured anew.
    """
    recorder.stand_in(setattr)
    each = 1 + (method == "sida")
    settings = sid_fast.Settings(
        batch_size=each * int(rounds) * world, micro_batch=each, dropout=0.2, precision="bf16"
    )
    found = []
    for graph in (False, True):
        if method == "sida":
            distiller = sida(plan_of(mode), settings, data=real_images(), cuda_graph=graph)
        else:
            teacher = small_edm2() if method == "edm2" else small_teacher()
            distiller = distiller_of(teacher, mode, settings, cuda_graph=graph)
        distiller.step()
        fsdp.gather_full(distiller.generator)  # as a snapshot gathers its network
        distiller.step()
        metrics = distiller.step()
        found.append(fsdp.local_shards([*distiller.state_dict().values(), *metrics.values()]))
    assert len(distiller.graphs.graphs) == (1 if rounds == "1" else 6)
    assert all(map(torch.equal, *found))
    if rank == 0:
        print(f"{mode} graphs")


def cut(mode: str) -> None:
    """The run that one process makes of whole batches, and a third method too, up to rounding."""
    settings = sid_fast.Settings(
        batch_size=8, micro_batch=2, dropout=0.2, augment_p=0.5, eps=1.0, fake_lr=1e-3,
        generator_lr=1e-3,
    )  # fmt: skip
    plan = plan_of(mode)
    for name, make in {
        "SiD": lambda plan, s: sid_fast.Distiller(small_teacher(), s, 3, None, plan),
        "toy": lambda plan, s: toy.trainer(plan),
        "SiDA": lambda plan, s: sida(plan, s, data=real_images()),
        "EDM2": lambda plan, s: sid_fast.Distiller(
            small_edm2(), dataclasses.replace(s, augment_p=0.0), 3, None, plan
        ),
        "two forwards": lambda plan, s: toy.trainer(plan, method=toy.TwoForwards),
    }.items():
        expected = make(fsdp.SINGLE_PROCESS, dataclasses.replace(settings, micro_batch=None))
        start = flat(expected.ema)
        for _ in range(3):
            expected.step()
        found = make(plan, settings)
        for _ in range(3):
            found.step()
        if (net := fsdp.gather_full(found.ema)) is not None:
            error = float(
                (flat(net) - flat(expected.ema)).norm() / (flat(expected.ema) - start).norm()
            )
            assert error < 1e-4, error
            print(f"{mode} {name} cut {error:.1e}", flush=True)


def sida(plan: fsdp.ShardingPlan, settings: sid_fast.Settings, **options) -> sid_fast.Distiller:
    """SiDA of a small network in groups of two, whose generator learns from the second step on."""
    settings = dataclasses.asdict(settings) | dict(
        adversarial_group=2, generator_start_kimg=0.0, adversarial_start_kimg=0.0
    )
    settings = sid_fast.SiDASettings(**settings)
    return sid_fast.Distiller(small_teacher(), settings, 3, None, plan, **options)


def real_images() -> ImageDataset:
    """A file of this process's own, the same everywhere."""
    path = states / f"images{rank}.zip"
    images = np.random.default_rng(0).integers(0, 256, (20, 1, 8, 8), np.uint8)
    write_dataset(path, images, np.arange(20) % 10)
    return ImageDataset(path)


def same_draws(mode: str) -> None:
    """SiDA: one round of 4, two of 2 and two processes of 2 are the same numbers."""
    settings = sid_fast.Settings(batch_size=4, eps=1.0, fake_lr=1e-3, generator_lr=1e-3)
    halves = dataclasses.replace(settings, micro_batch=2)
    whole = sida(fsdp.SINGLE_PROCESS, settings, data=real_images())
    rounds, found = sida(fsdp.SINGLE_PROCESS, halves), sida(plan_of(mode), halves)
    for _ in range(3):
        draws = whole.draw()
        whole.step(draws)
        rounds.step({k: [d for r in (0, 1) for d in part(v, 2, r, 2)] for k, v in draws.items()})
        metrics = found.step({k: part(v, 2) for k, v in draws.items()})
    same_everywhere(found, metrics)
    for name in ("fake_score", "generator", "ema"):
        net = fsdp.gather_full(getattr(found, name))
        for other in filter(None, (net, getattr(rounds, name))):
            expected = flat(getattr(whole, name))
            error = float((flat(other) - expected).norm() / expected.norm())
            assert error <= 1e-6, (name, error)
    if rank == 0:
        print(f"{mode} same draws", flush=True)


def sida_faults(mode: str) -> None:
    """A real image of one process that is not finite, then all of its samples: an empty group."""
    settings = sid_fast.Settings(
        batch_size=4 * world, micro_batch=2, eps=1.0, fake_lr=1e-3, generator_lr=1e-3
    )
    distiller = sida(plan_of(mode), settings, data=real_images())
    distiller.step()
    for rows in (slice(1), slice(None)):
        draws = distiller.draw()
        if rank == world - 1:
            draws["fake"][0].real[rows] = torch.nan
            draws["generator"][1].z[rows] = torch.inf
        metrics = distiller.step(draws)
        dropped = 1 if rows.stop else 2
        assert int(metrics["fake/dropped"]) == int(metrics["generator/dropped"]) == dropped
        assert int(metrics["fake/nonfinite"]) == int(metrics["generator/nonfinite"]) == 0
        same_everywhere(distiller, metrics)
    if rank == 0:
        print(f"{mode} faults of SiDA", flush=True)


def flat(net: EDMNetwork) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in net.parameters()])


def fails() -> None:
    """A capture that fails on one process, behind its messages, is used on none of them.

    Where graphs are required that is an error; under auto all go on eagerly, to the same bits.
    """
    recorder.stand_in(setattr)
    settings = sid_fast.Settings(batch_size=2 * world, dropout=0.2, generator_beta1=0.9)
    update, updates = sid_fast.kernels.adam_ema, []

    def fail_in_a_capture(*args, **kwargs):
        updates.append(recorder.recording())
        if rank == world - 1 and updates[-1] and sum(updates) == 2:  # of the generator
            raise errors.OutOfMemory("an update")
        return update(*args, **kwargs)

    def started(graph: bool | str) -> sid_fast.Distiller:
        updates.clear()
        return distiller_of(small_teacher(), "ddp", settings, cuda_graph=graph)

    reason = f"process {world - 1}: an update"
    with mock.patch.object(sid_fast.kernels, "adam_ema", fail_in_a_capture):
        with pytest.raises((errors.UserError, errors.OutOfMemory), match="an update") as caught:
            started(True).step()
        assert isinstance(caught.value, errors.OutOfMemory) == (rank == world - 1)
        found = []
        for graph in (False, "auto"):
            distiller = started(graph)
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                metrics = [distiller.step() for _ in range(3)]
            metrics = [v for m in metrics for v in m.values()]
            found.append([*distiller.state_dict().values(), *metrics])
    assert distiller.graphs.failed == reason
    assert not distiller.graphs.graphs
    assert all(map(torch.equal, *found))
    said = [str(w.message) for w in warned if w.category is errors.Fallback]
    assert len(said) == (rank == 0)
    assert all(reason in line for line in said)
    same_everywhere(distiller, {"last": metrics[-1]})
    if rank == 0:
        print("failed graphs")


def gathers_buffers() -> None:
    """The random frequencies of NCSN++ are no parameters."""
    config = dataclasses.replace(small_teacher().config, architecture="ncsnpp")
    net = EDMNetwork(config)
    expected = {k: v.clone() for k, v in net.state_dict().items()}
    fsdp.plan("fsdp", cpu, lambda *_: 0).shard(net)
    found = fsdp.gather_full(net, everywhere=True).state_dict()
    assert all(torch.equal(found[k], v) for k, v in expected.items())


def hosts_agree() -> None:
    """What one of them has been told, a signal say, all of them know."""
    assert process_group.all_reduce_any(rank == world - 1)
    assert not process_group.all_reduce_any(False)
    assert process_group.broadcast_from_rank0(lambda: 7 + rank) == 7


def same_everywhere(distiller: sid_fast.Distiller, metrics: dict[str, torch.Tensor]) -> None:
    """All processes agree on the metrics and, where they have whole networks, on these."""
    values = [float(v) for v in metrics.values()]
    optimizers = distiller.optimizers.values()
    for p in (p for optimizer in optimizers for p in optimizer.params):
        assert all(torch.isfinite(v).all() for v in fsdp.local_shards([p]))
        if not hasattr(p, "to_local"):
            values.append(float(p.detach().double().sum()))
    everyone = [None] * world
    dist.all_gather_object(everyone, values)
    assert all(v == values for v in everyone)


with process_group.joined(cpu, "fsdp"):
    rank, world = dist.get_rank(), dist.get_world_size()
    hosts_agree()
    gathers_buffers()
    for case in sys.argv[3:]:
        name, *rest = case.split(":")
        case = {
            "faults": faults,
            "graphs": replays,
            "failed graphs": fails,
            "cut": cut,
            "same draws": same_draws,
            "faults of SiDA": sida_faults,
        }.get(name)
        case(*rest) if case else trajectory(name, *rest)
