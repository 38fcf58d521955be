"""Memory, time and cost of a run on a given cluster, estimated without a GPU."""

import dataclasses
from collections import Counter
from functools import partial

from sid_fast.config.types import Card, Settings, grad_accum_steps, option
from sid_fast.kernels.dispatch import describe
from sid_fast.models import NetworkConfig
from sid_fast.tools.estimator import GIB, Counts, estimated_micro_batch
from sid_fast.tools.gpu_specs import card

NODE = 8  # GPUs that NVLink joins
LINKS = {"inside a node": 300.0, "between nodes": 40.0}  # GB/s a GPU sends and receives
FEW = 16  # images a micro-batch below which a GPU of today is not kept busy

_cluster = partial(option, heading="Cluster")


@dataclasses.dataclass
class Cluster:
    """The machine that a run is planned for."""

    gpus: int = _cluster(1, "how many GPUs", 1, 2**20)
    card: Card = _cluster("h200", "which GPU")
    memory: float | None = _cluster(None, "GiB of a GPU; default: the card's", 1)
    tflops: float | None = _cluster(
        None, "matrix rate of a GPU, TFLOP/s; default: the card's at this precision", 1e-3
    )
    mfu: float = _cluster(0.5, "part of that rate the whole step is taken to reach", 0.01, 1)
    link: float | None = _cluster(
        None, "GB/s a GPU sends to the others; default: 300 to 8 GPUs, 40 beyond", 1e-3
    )


def precision_of(settings: Settings) -> str:
    """auto comes to bf16 on every card that is known here."""
    return "bf16" if settings.precision == "auto" else settings.precision


def check_batch(settings: Settings, gpus: int) -> None:
    """UserError for a batch that so many GPUs cannot share."""
    grad_accum_steps(dataclasses.replace(settings, micro_batch=None), gpus)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run takes of a machine: all of it is an estimate. Times in seconds, sizes in bytes.

    memory: by way of sharing ("ddp", "fsdp") and kind, in rounds of micro_batch images, which is
    0 where not even one fits. traffic: what a GPU sends in a step. exposed: the part of a step
    that waits for it.
    """

    memory: dict[str, Counter[str]]
    micro_batch: int
    rounds: int
    flop: float
    compute: float
    traffic: float
    exchange: float
    exposed: float
    images_per_second: float
    days: float


def plan(found: Counts, settings: Settings, kimg: float, options: Cluster) -> Plan:
    """Reckon with what was counted."""
    gpus, batch = options.gpus, settings.batch_size
    ways = ("ddp", "fsdp") if gpus > 1 else ("one GPU",)
    room = memory_of(options) * GIB
    micro = estimated_micro_batch(found, batch // gpus, room, gpus, shards=gpus)
    rate = options.mfu * tflops_of(settings, options) * 1e12
    compute = found.flop * batch / gpus / rate
    # An all-reduce is a reduce-scatter and an all-gather, each of all numbers but one's own part.
    traffic = 2 * (gpus - 1) / gpus * found.stays["gradients"]
    exchange = traffic / (link_of(options) * 1e9)
    # Either network's gradients travel while the last round's backward (two forwards) goes on.
    exposed = max(0.0, exchange - 2 * 2 * found.forward * micro / rate)
    seconds = compute + exposed
    return Plan(
        memory={w: found.memory(max(micro, 1), gpus, gpus if w == "fsdp" else 1) for w in ways},
        micro_batch=micro,
        rounds=batch // gpus // micro if micro else 0,
        flop=found.flop * batch,
        compute=compute,
        traffic=traffic,
        exchange=exchange,
        exposed=exposed,
        images_per_second=batch / seconds,
        days=kimg * 1000 / batch * seconds / 86400,
    )


def memory_of(options: Cluster) -> float:
    return options.memory or card(options.card).memory


def tflops_of(settings: Settings, options: Cluster) -> float:
    return options.tflops or card(options.card).tflops[precision_of(settings)]


def link_of(options: Cluster) -> float:
    return options.link or LINKS["inside a node" if options.gpus <= NODE else "between nodes"]


def text(
    name: str,
    network: NetworkConfig,
    found: Counts,
    settings: Settings,
    kimg: float,
    options: Cluster,
) -> str:
    """The plan as it is printed."""
    p = plan(found, settings, kimg, options)
    gpus, batch, memory = options.gpus, settings.batch_size, memory_of(options)
    million = found.parameters / 1e6
    tb_s = f"{options.mfu:.0%} of {tflops_of(settings, options):.0f} TFLOP/s a GPU"
    lines = [
        f"{name}: {network}, {million:.1f} M parameters, {precision_of(settings)}, "
        f"kernels: {describe(found.backends)}",
        f"on {gpus} x {options.card}, {memory:g} GiB each; estimates, nothing here is measured",
        "",
        f"memory of a GPU, GiB{''.join(f'{way:>10}' for way in p.memory)}",
    ]
    kinds = list(dict.fromkeys(kind for m in p.memory.values() for kind in m))
    for kind in sorted(kinds, key=lambda k: ORDER.index(k)):
        values = [m[kind] / GIB for m in p.memory.values()]
        if any(values):
            lines.append(f"  {ABOUT[kind]:18}{''.join(f'{v:10.2f}' for v in values)}")
    totals = "".join(f"{m.total() / GIB:10.2f}" for m in p.memory.values())
    lines += [f"  {'sum':18}{totals}", ""]
    if not p.micro_batch:
        return "\n".join([*lines, *_advice(found, options)])
    lines += [
        f"largest micro-batch  {p.micro_batch} of {batch // gpus} images a GPU: "
        f"{p.rounds} round{'s' if p.rounds > 1 else ''} a step",
        f"work a step          {amount(p.flop)}FLOP: {amount(found.flop)}FLOP an image, "
        f"{found.flop / found.forward:.0f} forwards",
        f"time a step          {p.compute * 1e3:,.1f} ms at {tb_s} (MFU assumed)",
    ]
    if gpus > 1:
        hidden = (
            f"{p.exposed * 1e3:.1f} ms of it wait"
            if p.exposed
            else "the last round's backward hides it"
        )
        lines.append(
            f"communication        {p.traffic / 1e9:.2f} GB a GPU and step, "
            f"{p.exchange * 1e3:.1f} ms at {link_of(options):g} GB/s (assumed); {hidden}"
        )
    lines.append(
        f"the whole run        {amount(kimg * 1e3)}img at {p.images_per_second:,.0f} img/s: "
        f"{p.days:.1f} days, {p.days * gpus:.1f} GPU days"
    )
    if p.memory.get("ddp", Counter()).total() > memory * GIB:
        lines.append("note: only sharded does it fit: --parallel fsdp")
    if p.micro_batch < FEW:
        lines.append(
            f"note: rounds of {p.micro_batch} will not keep a GPU busy: expect a lower MFU; "
            + ("fewer GPUs cost less" if p.rounds == 1 else "--checkpoint-activations makes room")
        )
    return "\n".join(lines)


def amount(value: float) -> str:
    """Three digits with their prefix, for a unit to follow."""
    sizes = {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0}
    prefix = next((p for p, size in sizes.items() if value >= size), "")
    return f"{value / sizes[prefix]:.3g} {prefix}"


ABOUT = {
    "teacher": "teacher",
    "weights": "weights, float32",
    "gradients": "gradients",
    "optimiser": "optimiser's state",
    "average": "moving average",
    "copies": "16-bit weights",
    "gathered": "gathered weights",
    "reduction": "reduction",
    "activations": "activations",
    "workspace": "workspace",
    "allowance": "allowance",
}
ORDER = list(ABOUT)


def _advice(found: Counts, options: Cluster) -> list[str]:
    """What to change where not one image fits."""
    need = found.memory(1, options.gpus, shards=options.gpus).total() / GIB
    ways = [f"a card of {need:.1f} GiB or more (--card, --memory)"]
    if found.image["activations"] > GIB / 4:
        ways.append("--checkpoint-activations")
    if not found.stays["copies"]:
        ways.append("--precision bf16, for half the activations")
    more = found.memory(1, 8 * options.gpus, shards=8 * options.gpus).total() / GIB
    if more <= memory_of(options):
        ways.append(f"--gpus {8 * options.gpus}, sharded: {more:.1f} GiB each")
    return [f"does not fit: one image takes {need:.1f} GiB of {memory_of(options):g}. Instead:"] + [
        f"  - {way}" for way in ways
    ]
