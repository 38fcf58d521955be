"""Where the time of a step goes: on the device, by operation, against what each has to take.

    python -m benchmarks.breakdown --preset cifar10-uncond --micro-batch 64

A step of ours, of one round, launched from the host under PyTorch's profiler: what is summed is
the time of its kernels, without the gaps between them, which CUDA graphs close. The floor of a
kind of operation is counted: operation by operation the longer of its FLOP at the rate of a matrix
product and its bytes at the rate of a copy, each the fastest of the same run. It is the floor of
the direct convolution: one by Winograd's algorithm has fewer FLOP and may fall below it.
"""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any, cast

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import measure
from benchmarks.record import RESULTS, Record
from benchmarks.train import VARIANTS, Running, one_round
from sid_fast import cli
from sid_fast.cli import presets
from sid_fast.config.types import Precision, check, option
from sid_fast.errors import UserError
from sid_fast.performance import process_group
from sid_fast.tools import estimator, op_counter

# Of TF32 no product is timed, so that there is no floor.
PRECISIONS = ("bf16", "fp16", "fp32")
STEPS = 3  # under the profiler
SINGLE = 40  # operations and kernels that get a row of their own: those that take longest


@dataclasses.dataclass
class Options:
    preset: str | None = option(None, "default: digits on a CPU, else cifar10-uncond")
    micro_batch: int | None = option(None, "images a round; default: 64, or 8 on a CPU", 1)
    precision: str | None = option(None, "bf16, fp16 or fp32; default: bf16, or fp32 on a CPU")
    device: str = option("auto", "auto, cpu or cuda")
    out: str | None = option(None, "the result file; default: benchmarks/results/breakdown.json")
    append: bool = option(False, "keep the rows that the result file has")


def kind_of(operation: str) -> str:
    """The kind of what the profiler names so: as op_counter counts, depthwise ones aside."""
    name = operation.rpartition("::")[2]
    return "convolution" if "conv" in name else op_counter.KINDS.get(name, "pointwise")


def floors(ops: list[op_counter.Op], product: float, copy: float) -> Counter[str]:
    """The least ms by kind, at so many TFLOP/s and TB/s."""
    found: Any = Counter()  # of floats
    for op in ops:
        kind = "convolution" if op.kind == "resampling" else op.kind
        found[kind] += max(op.flops / product, op.nbytes / copy) / 1e9
    return found


def profiled(step: Running, cuda: bool) -> tuple[dict[str, tuple[float, float]], ...]:
    """Calls and device ms of a step, by operation, and on a GPU by kernel."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities) as found:
        for _ in range(STEPS):
            step()
        measure.synchronize(step.device)
    tables: tuple[dict, dict] = {}, {}
    for event in found.key_averages():
        time = event.self_device_time_total if cuda else event.self_cpu_time_total
        if time:
            kernel = event.device_type != DeviceType.CPU
            tables[kernel][event.key] = event.count / STEPS, time / STEPS / 1e3
    return tables


def run(options: Options, given: set[str]) -> None:
    check(options)
    device = process_group.pick_device(options.device)
    cuda = device.type == "cuda"
    known = presets("train")
    preset = options.preset or ("cifar10-uncond" if cuda else "digits")
    if preset not in known:
        raise UserError(f"preset={preset!r} is unknown: choose from {', '.join(known)}")
    precision = cast(Precision, options.precision or ("bf16" if cuda else "fp32"))  # see below
    if precision not in PRECISIONS:
        choices = ", ".join(PRECISIONS)
        raise UserError(f"precision={precision!r} cannot be broken down: choose from {choices}")
    images = options.micro_batch or (64 if cuda else 8)

    config, settings = one_round(preset, images)
    settings = dataclasses.replace(settings, precision=precision)
    rates = measure.ceilings(device)
    product = rates["fp32"]
    if precision != "fp32":  # a CPU may convert and compute in float32: faster than bfloat16's
        product = max(product, rates["bf16"])
    backend = "triton" if cuda else "eager"
    (counted,) = estimator.steps(config, settings, [images], backend)
    least = floors(counted.ops, product, rates["copy"])

    variant = dataclasses.replace(VARIANTS["no graphs" if cuda else "ours"], precision=precision)
    step = Running(variant, settings, config, device)
    operations, single = profiled(step, cuda)
    total = sum(ms for _, ms in operations.values())
    kinds: Any = Counter()  # of floats
    for name, (_, ms) in operations.items():
        kinds[kind_of(name)] += ms

    record = Record(
        Path(options.out or RESULTS / "breakdown.json"),
        "breakdown",
        append=options.append,
        ceilings=rates,
    )
    keys = {"preset": preset, "precision": precision, "micro_batch": images}

    def row(kind: str, name: str, calls: float | None, ms: float, floor: float | None) -> dict:
        share = {"device_ms": ms, "share": ms / total, "floor_ms": floor}
        return {**keys, "kind": kind, "name": name, "calls": calls, **share}

    rows = [row(kind, "all", None, kinds[kind], least[kind]) for kind in kinds | least]
    rows.sort(key=lambda row: -row["device_ms"])
    rows.append(row("all", "all", None, total, sum(least.values())))
    for table, what in ((operations, kind_of), (single, lambda name: "kernel")):
        longest = sorted(table.items(), key=lambda item: -item[1][1])[:SINGLE]
        rows += [row(what(name), name[:120], *found, None) for name, found in longest]
    record.extend(rows)
    print("\n".join([HEAD, *map(line, rows)]))
    print(f"kept as {record.path} and .csv")


HEAD = f"{'kind':14} {'operation':64} {'calls':>6} {'ms':>9} {'share':>6} {'floor ms':>9}"


def line(row: dict) -> str:
    calls, floor = row["calls"], row["floor_ms"]
    return (
        f"{row['kind']:14} {row['name'][:64]:64} {'' if calls is None else f'{calls:g}':>6} "
        f"{row['device_ms']:9.3f} {row['share']:6.1%} {'' if floor is None else f'{floor:.3f}':>9}"
    )


main = cli.command(Options, run, None, __doc__)

if __name__ == "__main__":
    cli.main(main, "benchmarks.breakdown")
