"""Profile the device time of a step by operation, next to the counted floor of each kind.

    python -m benchmarks.analysis.breakdown --preset cifar10-uncond --micro-batch 64

One step of one micro-batch runs eagerly under PyTorch's profiler. Times are sums over kernels,
without the gaps between launches, which CUDA graphs close. The floor of a kind sums over its
operations the larger of FLOP over the matrix rate and bytes over the copy bandwidth, both measured
in the same run. It counts direct convolutions; Winograd's algorithm needs fewer FLOP and may be
faster than this floor.
"""

import dataclasses
from collections import Counter
from typing import Any, cast

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import timing
from benchmarks.results import RESULTS, Results
from benchmarks.train import VARIANTS, Running, single_micro_batch
from sid_fast import cli
from sid_fast.cli import presets
from sid_fast.config.types import Precision, check, option
from sid_fast.errors import UserError
from sid_fast.performance import process_group
from sid_fast.tools import estimator, op_counter

# Not tf32: its matrix rate is not measured, so there would be no floor.
PRECISIONS = ("bf16", "fp16", "fp32")
STEPS = 3  # under the profiler
SINGLE = 40  # rows for single operations, and for kernels: the longest


@dataclasses.dataclass
class Options:
    """Options of the command."""

    preset: str | None = option(None, "default: digits on a CPU, else cifar10-uncond")
    micro_batch: int | None = option(None, "images per step; default: 64, or 8 on a CPU", 1)
    precision: str | None = option(None, "bf16, fp16 or fp32; default: bf16, or fp32 on a CPU")
    device: str = option("auto", "auto, cpu or cuda")
    out: str | None = option(
        None, "result file to append to; default: benchmarks/results/breakdown.jsonl"
    )


def kind_of(operation: str) -> str:
    """Map a profiler's operation to a kind of op_counter, depthwise convolutions included."""
    name = operation.rpartition("::")[2]
    return "convolution" if "conv" in name else op_counter.KINDS.get(name, "pointwise")


def floors(ops: list[op_counter.Op], product: float, copy: float) -> Counter[str]:
    """Sum the floors by kind, ms; product: TFLOP/s; copy: TB/s."""
    floors: Any = Counter()  # str -> float
    for op in ops:
        kind = "convolution" if op.kind == "resampling" else op.kind
        floors[kind] += max(op.flops / product, op.nbytes / copy) / 1e9
    return floors


def profile_step(step: Running, cuda: bool) -> tuple[dict[str, tuple[float, float]], ...]:
    """Return (calls, device ms) of a step, by operation and, on a GPU, by kernel."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            step()
        timing.synchronize(step.device)
    tables: tuple[dict, dict] = {}, {}
    for event in profiler.key_averages():
        time = event.self_device_time_total if cuda else event.self_cpu_time_total
        if time:
            kernel = event.device_type != DeviceType.CPU
            tables[kernel][event.key] = event.count / STEPS, time / STEPS / 1e3
    return tables


def run(options: Options, given: set[str]) -> None:
    """Run the command."""
    check(options)
    device = process_group.pick_device(options.device)
    cuda = device.type == "cuda"
    known = presets("train")
    preset = options.preset or ("cifar10-uncond" if cuda else "digits")
    if preset not in known:
        raise UserError(f"preset={preset!r} is unknown: choose from {', '.join(known)}")
    precision = cast(Precision, options.precision or ("bf16" if cuda else "fp32"))
    if precision not in PRECISIONS:
        choices = ", ".join(PRECISIONS)
        raise UserError(f"precision={precision!r} has no measured rate: choose from {choices}")
    images = options.micro_batch or (64 if cuda else 8)

    config, settings = single_micro_batch(preset, images)
    settings = dataclasses.replace(settings, precision=precision)
    rates = timing.peak_rates(device)
    product = rates["fp32"]
    if precision != "fp32":  # a CPU may compute in float32, if that is faster than bfloat16
        product = max(product, rates["bf16"])
    backend = "triton" if cuda else "eager"
    (counted,) = estimator.steps(config, settings, [images], backend)
    least = floors(counted.ops, product, rates["copy"])

    variant = dataclasses.replace(
        VARIANTS["no graphs" if cuda else "sid_fast"], precision=precision
    )
    step = Running(variant, settings, config, device)
    operations, single = profile_step(step, cuda)
    total = sum(ms for _, ms in operations.values())
    kinds: Any = Counter()  # str -> float
    for name, (_, ms) in operations.items():
        kinds[kind_of(name)] += ms

    keys = {"preset": preset, "precision": precision, "micro_batch": images}

    def row(kind: str, name: str, calls: float | None, ms: float, floor: float | None) -> dict:
        figures = {"calls": calls, "device_ms": ms, "share": ms / total, "floor_ms": floor}
        return {**keys, "kind": kind, "name": name, **figures}

    rows = [row(kind, "all", None, kinds[kind], least[kind]) for kind in kinds | least]
    rows.sort(key=lambda row: -row["device_ms"])
    rows.append(row("all", "all", None, total, sum(least.values())))
    for table, kind in ((operations, kind_of), (single, lambda name: "kernel")):
        longest = sorted(table.items(), key=lambda item: -item[1][1])[:SINGLE]
        rows += [row(kind(name), name[:120], *figures, None) for name, figures in longest]
    path = options.out or RESULTS / "breakdown.jsonl"
    results = Results(path, "breakdown", **timing.rate_columns(rates))
    for each in rows:
        results.add(each)
    print("\n".join([HEAD, *map(line, rows)]))
    print(f"results: {results.path}")


HEAD = f"{'kind':14} {'operation':64} {'calls':>6} {'ms':>9} {'share':>6} {'floor ms':>9}"


def line(row: dict) -> str:
    """Format a row for the terminal, below HEAD."""
    calls, floor = row["calls"], row["floor_ms"]
    return (
        f"{row['kind']:14} {row['name'][:64]:64} {'' if calls is None else f'{calls:g}':>6} "
        f"{row['device_ms']:9.3f} {row['share']:6.1%} {'' if floor is None else f'{floor:.3f}':>9}"
    )


main = cli.command(Options, run, None, __doc__)

if __name__ == "__main__":
    cli.main(main, "benchmarks.analysis.breakdown")
