"""Estimate memory, time and cost of a run on a given cluster, without a GPU."""

import dataclasses
from collections import Counter
from functools import partial

from sid_fast.config.types import (
    Card,
    Settings,
    SiDASettings,
    grad_accum_steps,
    micro_batches,
    option,
)
from sid_fast.kernels.dispatch import describe
from sid_fast.models import NetworkConfig
from sid_fast.tools.estimator import GIB, Counts, estimated_micro_batch
from sid_fast.tools.gpu_specs import card

NODE = 8  # GPUs joined by NVLink
LINKS = {"inside a node": 300.0, "between nodes": 40.0}  # GB/s per GPU and direction
MIN_EFFICIENT_MICRO_BATCH = 16  # images; fewer leave a current GPU underused

_cluster = partial(option, heading="Cluster")


@dataclasses.dataclass
class Cluster:
    """The cluster that a run is planned for."""

    gpus: int = _cluster(1, "number of GPUs", 1, 2**20)
    card: Card = _cluster("h200", "GPU model")
    memory: float | None = _cluster(None, "memory per GPU, GiB; default: that of --card", 1)
    tflops: float | None = _cluster(
        None,
        "peak dense matrix rate per GPU, TFLOP/s; default: that of --card at --precision",
        1e-3,
    )
    mfu: float = _cluster(0.5, "assumed fraction of that rate that a whole step reaches", 0.01, 1)
    link: float | None = _cluster(
        None, "bandwidth per GPU and direction, GB/s; default: 300 up to 8 GPUs, 40 above", 1e-3
    )


def precision_of(settings: Settings) -> str:
    """Resolve precision auto: bf16 on every card of gpu_specs."""
    return "bf16" if settings.precision == "auto" else settings.precision


def check_batch(settings: Settings, gpus: int) -> None:
    """Raise UserError if the batch does not divide evenly over the GPUs."""
    grad_accum_steps(dataclasses.replace(settings, micro_batch=None), gpus)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Estimated resources of a run.

    Attributes:
        memory: peak bytes per GPU by layout ("one GPU", or "ddp" and "fsdp") and by kind.
        micro_batch: images per micro-batch, the largest that fits; 0 if one image does not fit.
        grad_accum_steps: micro-batches per step and GPU.
        flop: FLOP per step, over all GPUs.
        compute: seconds of computation per step.
        traffic: bytes that each GPU sends per step.
        communication: seconds to send them.
        exposed: seconds of communication per step that computation does not hide.
        images_per_second: training images per second, over all GPUs.
        days: length of the run.
        warmup: seconds per step in which the fake score alone learns (SiDA); 0: no such steps.
    """

    memory: dict[str, Counter[str]]
    micro_batch: int
    grad_accum_steps: int
    flop: float
    compute: float
    traffic: float
    communication: float
    exposed: float
    images_per_second: float
    days: float
    warmup: float = 0.0


def plan(counts: Counts, settings: Settings, kimg: float, options: Cluster) -> Plan:
    """Estimate a run of `kimg` thousand images on a cluster from the counts of one step."""
    gpus, batch = options.gpus, settings.batch_size
    layouts = ("ddp", "fsdp") if gpus > 1 else ("one GPU",)
    available = memory_of(options) * GIB
    micro = estimated_micro_batch(
        counts, micro_batches(settings, gpus), available, gpus, shards=gpus
    )
    rate = options.mfu * tflops_of(settings, options) * 1e12
    compute = counts.flop * batch / gpus / rate
    # All-reduce = reduce-scatter + all-gather; each sends all but the GPU's own 1/gpus.
    traffic = 2 * (gpus - 1) / gpus * counts.resident["gradients"]
    communication = traffic / (link_of(options) * 1e9)
    # Each network's all-reduce overlaps its last micro-batch's backward (the FLOP of 2 forwards).
    hidden = 2 * 2 * counts.forward * micro / rate
    exposed = max(0.0, communication - hidden)
    seconds = compute + exposed
    warmup, warmup_kimg = 0.0, 0.0
    if isinstance(settings, SiDASettings):
        warmup = counts.fake_flop * batch / gpus / rate + exposed / 2  # one network of two
        warmup_kimg = min(kimg, settings.generator_start_kimg)
    total = ((kimg - warmup_kimg) * seconds + warmup_kimg * warmup) * 1000 / batch
    return Plan(
        memory={
            layout: counts.memory(max(micro, 1), gpus, gpus if layout == "fsdp" else 1)
            for layout in layouts
        },
        micro_batch=micro,
        grad_accum_steps=batch // gpus // micro if micro else 0,
        flop=counts.flop * batch,
        compute=compute,
        traffic=traffic,
        communication=communication,
        exposed=exposed,
        images_per_second=batch / seconds,
        days=total / 86400,
        warmup=warmup if warmup_kimg else 0.0,
    )


def _duration(days: float, gpus: int) -> str:
    """Time of a run and of all its GPUs, in the largest unit of which it takes a tenth."""
    unit, count = next(
        (u for u in (("day", 1), ("hour", 24)) if days * u[1] >= 0.1), ("minute", 24 * 60)
    )
    return f"{days * count:.1f} {unit}s, {days * count * gpus:.1f} GPU-{unit}s"


def memory_of(options: Cluster) -> float:
    """Memory per GPU, GiB."""
    return options.memory or card(options.card).memory


def tflops_of(settings: Settings, options: Cluster) -> float:
    """Peak dense matrix rate per GPU, TFLOP/s."""
    return options.tflops or card(options.card).tflops[precision_of(settings)]


def link_of(options: Cluster) -> float:
    """Bandwidth per GPU and direction, GB/s."""
    return options.link or LINKS["inside a node" if options.gpus <= NODE else "between nodes"]


def text(
    name: str,
    network: NetworkConfig,
    counts: Counts,
    settings: Settings,
    kimg: float,
    options: Cluster,
) -> str:
    """Format the plan as the report that `python -m sid_fast.plan` prints."""
    p = plan(counts, settings, kimg, options)
    gpus, batch, memory = options.gpus, settings.batch_size, memory_of(options)
    million = counts.parameters / 1e6
    rate = f"{options.mfu:.0%} of {tflops_of(settings, options):.0f} TFLOP/s per GPU"
    lines = [
        f"{name}: {network}, {million:.1f} M parameters, {precision_of(settings)}, "
        f"kernels: {describe(counts.backends)}",
        f"on {gpus} x {options.card}, {memory:g} GiB each; all numbers are estimates",
        "",
        f"memory per GPU, GiB {''.join(f'{layout:>10}' for layout in p.memory)}",
    ]
    kinds = list(dict.fromkeys(kind for m in p.memory.values() for kind in m))
    for kind in sorted(kinds, key=lambda k: ORDER.index(k)):
        values = [m[kind] / GIB for m in p.memory.values()]
        if any(values):
            lines.append(f"  {KIND_NAMES[kind]:18}{''.join(f'{v:10.2f}' for v in values)}")
    totals = "".join(f"{m.total() / GIB:10.2f}" for m in p.memory.values())
    lines += [f"  {'total':18}{totals}", ""]
    if not p.micro_batch:
        return "\n".join([*lines, *_advice(counts, options)])
    lines += [
        f"largest micro-batch  {p.micro_batch} of {batch // gpus} images per GPU: "
        f"{p.grad_accum_steps} micro-batch{'es' if p.grad_accum_steps > 1 else ''} per step",
        f"work per step        {amount(p.flop)}FLOP: {amount(counts.flop)}FLOP per image, "
        f"{counts.flop / counts.forward:.3g} forward passes",
        f"compute per step     {p.compute * 1e3:,.1f} ms at {rate} (assumed MFU)",
    ]
    if gpus > 1:
        hidden = (
            f"{p.exposed * 1e3:.1f} ms not hidden by computation"
            if p.exposed
            else "hidden by the last micro-batch's backward"
        )
        lines.append(
            f"communication        {p.traffic / 1e9:.2f} GB per GPU and step, "
            f"{p.communication * 1e3:.1f} ms at {link_of(options):g} GB/s (assumed); {hidden}"
        )
    if isinstance(settings, SiDASettings):
        lines += _warmup(p, counts, settings, kimg)
    lines.append(
        f"whole run            {amount(kimg * 1e3).rstrip()} images at "
        f"{p.images_per_second:,.0f} images/s: {_duration(p.days, gpus)}"
    )
    if p.memory.get("ddp", Counter()).total() > memory * GIB:
        lines.append("note: fits only when sharded: use --parallel fsdp")
    if p.micro_batch < MIN_EFFICIENT_MICRO_BATCH:
        lines.append(
            f"note: a micro-batch of {p.micro_batch} underuses a GPU, so expect a lower MFU; "
            + (
                "fewer GPUs would cost less"
                if p.grad_accum_steps == 1
                else "--checkpoint-activations allows a larger one"
            )
        )
    return "\n".join(lines)


def _warmup(p: Plan, counts: Counts, settings: SiDASettings, kimg: float) -> list[str]:
    """Lines on the two parts of SiDA's warm-up."""
    start, end = settings.generator_start_kimg, settings.adversarial_start_kimg
    lines = []
    if p.warmup:
        lines.append(
            f"warm-up              {amount(min(start, kimg) * 1e3).rstrip()} images of the fake "
            f"score alone: {counts.fake_flop / counts.forward:.3g} forward passes, "
            f"{p.warmup * 1e3:,.1f} ms per step"
        )
    if (images := min(end, kimg) - start) > 0:
        lines.append(
            f"{'':21}{amount(images * 1e3).rstrip()} images without the adversarial loss, at the "
            "cost of later steps"
        )
    return lines


def amount(value: float) -> str:
    """Format with three digits and an SI prefix, ready for a unit: 1234 gives "1.23 k"."""
    sizes = {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0}
    prefix = next((p for p, size in sizes.items() if value >= size), "")
    return f"{value / sizes[prefix]:.3g} {prefix}"


KIND_NAMES = {
    "teacher": "teacher",
    "weights": "weights, float32",
    "gradients": "gradients",
    "optimiser": "optimizer state",
    "average": "EMA",
    "copies": "16-bit weights",
    "gathered": "gathered weights",
    "reduction": "all-reduce buffers",
    "activations": "activations",
    "workspace": "workspace",
    "allowance": "CUDA and allocator",
}
ORDER = list(KIND_NAMES)


def _advice(counts: Counts, options: Cluster) -> list[str]:
    """Lines on what to change if a single image does not fit."""
    need = counts.memory(1, options.gpus, shards=options.gpus).total() / GIB
    remedies = [f"a GPU of {need:.1f} GiB or more (--card, --memory)"]
    if counts.image["activations"] > GIB / 4:
        remedies.append("--checkpoint-activations")
    if not counts.resident["copies"]:
        remedies.append("--precision bf16, for half the activations")
    more = counts.memory(1, 8 * options.gpus, shards=8 * options.gpus).total() / GIB
    if more <= memory_of(options):
        remedies.append(f"--gpus {8 * options.gpus}, sharded: {more:.1f} GiB each")
    head = (
        f"does not fit: one image takes {need:.1f} GiB, a GPU has {memory_of(options):g}. Instead:"
    )
    return [head, *(f"  - {line}" for line in remedies)]
