"""What a run would take of which machine, reckoned without a GPU and without the teacher's file."""

import dataclasses
from collections import Counter

from sid_fast.config.settings import Settings, option, rounds_of
from sid_fast.engine import cost
from sid_fast.engine.cards import card
from sid_fast.engine.fit import divisors
from sid_fast.engine.precision import TYPES
from sid_fast.engine.recompute import checkpoint_activations
from sid_fast.errors import UserError
from sid_fast.files.download import TEACHERS
from sid_fast.files.network import load_network
from sid_fast.networks import NetworkConfig

GIB = 2**30
ALLOWANCE = 2 * GIB  # CUDA context, cuDNN's workspace and what the allocator cannot use
NODE = 8  # GPUs that NVLink joins
LINKS = {"inside a node": 300.0, "between nodes": 40.0}  # GB/s a GPU sends and receives
FEW = 16  # images a round below which a GPU of today is not kept busy


@dataclasses.dataclass
class PlanOptions:
    """What --plan is told of the machine."""

    plan: bool = option(
        False, "print what the run would take of a machine (the options down to --link), and stop"
    )
    gpus: int = option(1, "plan: how many GPUs", 1, 2**20)
    card: str = option("h200", "plan: which GPU: rtx4090, a100, h100 or h200")
    memory: float | None = option(None, "plan: GiB of a GPU; default: the card's", 1)
    tflops: float | None = option(
        None, "plan: matrix rate of a GPU, TFLOP/s; default: the card's at this precision", 1e-3
    )
    mfu: float = option(0.5, "plan: part of that rate the whole step is taken to reach", 0.01, 1)
    link: float | None = option(
        None, "plan: GB/s a GPU sends to the others; default: 300 to 8 GPUs, 40 beyond", 1e-3
    )


PLAN_ONLY = {f.name for f in dataclasses.fields(PlanOptions)} - {"plan"}


def network_of(teacher: str) -> NetworkConfig:
    """The configuration of a teacher; of a published one without its file."""
    known = TEACHERS.get(teacher)
    return known.network if known else load_network(teacher).config


@dataclasses.dataclass(frozen=True)
class Counts:
    """What is counted of a step: bytes that stay and that an image adds, by kind; FLOP an image.

    forward: FLOP of one forward of one image; form: of the kernels, "triton" or "reference".
    """

    stays: Counter[str]
    image: Counter[str]
    flop: float
    forward: float
    form: str = "triton"

    def memory(self, images: int, gpus: int = 1, sharded: bool = False) -> Counter[str]:
        """Bytes by kind on one of so many GPUs, at the peak of a round of `images`.

        sharded: each keeps its part of weights, gradients, optimiser and average, besides the
        gathered weights that it computes with.
        """
        kinds = {*self.stays, *self.image}
        found = Counter({kind: self.stays[kind] + images * self.image[kind] for kind in kinds})
        if gpus > 1:
            found["reduction"] = self.stays["gradients"] // 2  # of one network at a time
        if sharded:
            for kind in ("weights", "gradients", "optimiser", "average"):
                found[kind] //= gpus
            if not self.stays["copies"]:
                found["gathered"] = self.stays["weights"]
        found["allowance"] = ALLOWANCE
        return found


def precision_of(settings: Settings) -> str:
    """auto comes to bf16 on every card that is known here."""
    return "bf16" if settings.precision == "auto" else settings.precision


def check_request(settings: Settings, options: PlanOptions) -> None:
    """UserError for a card or precision that is not known, or a batch that the GPUs cannot share.

    Before anything is counted, which takes its time.
    """
    card(options.card)
    if precision_of(settings) not in TYPES:
        known = ", ".join(TYPES)
        raise UserError(f"precision={settings.precision!r} is unknown: choose from {known}")
    rounds_of(dataclasses.replace(settings, micro_batch=None), options.gpus)


def counts(
    network: NetworkConfig, settings: Settings, recompute: bool = False, form: str = "triton"
) -> Counts:
    """Count a step at one image and at two; memory is linear in them.

    recompute: with --checkpoint-activations; form: of the kernels, "triton" or "reference".
    """
    prepare = {"prepare": checkpoint_activations} if recompute else {}
    forwards = cost.FORWARDS + 4 * recompute  # of ψ, and of G, φ and ψ, once more
    settings = dataclasses.replace(settings, precision=precision_of(settings))
    one, two = cost.steps(network, settings, [1, 2], form, **prepare)
    kinds = {*one.peak, *two.peak}
    image = Counter({kind: two.peak[kind] - one.peak[kind] for kind in kinds})
    return Counts(
        stays=Counter({kind: one.peak[kind] - image[kind] for kind in kinds}),
        image=image,
        flop=(flop := sum(op.flops for op in two.ops) / 2),
        forward=flop / forwards,
        form=form,
    )


def estimated_micro_batch(found: Counts, batch: int, room: float, gpus: int, sharded: bool) -> int:
    """The largest divisor of `batch`, images a GPU, that fits into room bytes; 0: not even one."""
    fitting = (n for n in divisors(batch) if found.memory(n, gpus, sharded).total() <= room)
    return next(fitting, 0)


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


def plan(found: Counts, settings: Settings, kimg: float, options: PlanOptions) -> Plan:
    """Reckon with what was counted."""
    gpus, batch = options.gpus, settings.batch_size
    ways = ("ddp", "fsdp") if gpus > 1 else ("one GPU",)
    room = memory_of(options) * GIB
    micro = estimated_micro_batch(found, batch // gpus, room, gpus, sharded=gpus > 1)
    rate = options.mfu * tflops_of(settings, options) * 1e12
    compute = found.flop * batch / gpus / rate
    # An all-reduce is a reduce-scatter and an all-gather, each of all numbers but one's own part.
    traffic = 2 * (gpus - 1) / gpus * found.stays["gradients"]
    exchange = traffic / (link_of(options) * 1e9)
    # Either network's gradients travel while the last round's backward (two forwards) goes on.
    exposed = max(0.0, exchange - 2 * 2 * found.forward * micro / rate)
    seconds = compute + exposed
    return Plan(
        memory={w: found.memory(max(micro, 1), gpus, sharded=w == "fsdp") for w in ways},
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


def memory_of(options: PlanOptions) -> float:
    return options.memory or card(options.card).memory


def tflops_of(settings: Settings, options: PlanOptions) -> float:
    return options.tflops or card(options.card).tflops[precision_of(settings)]


def link_of(options: PlanOptions) -> float:
    return options.link or LINKS["inside a node" if options.gpus <= NODE else "between nodes"]


def text(
    name: str,
    network: NetworkConfig,
    found: Counts,
    settings: Settings,
    kimg: float,
    options: PlanOptions,
) -> str:
    """The plan as it is printed."""
    p = plan(found, settings, kimg, options)
    gpus, batch, memory = options.gpus, settings.batch_size, memory_of(options)
    million = found.stays["average"] / 4e6
    tb_s = f"{options.mfu:.0%} of {tflops_of(settings, options):.0f} TFLOP/s a GPU"
    lines = [
        f"{name}: {network}, {million:.1f} M parameters, {precision_of(settings)}, "
        f"{found.form} kernels",
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


def _advice(found: Counts, options: PlanOptions) -> list[str]:
    """What to change where not one image fits."""
    need = found.memory(1, options.gpus, sharded=options.gpus > 1).total() / GIB
    ways = [f"a card of {need:.1f} GiB or more (--card, --memory)"]
    if found.image["activations"] > GIB / 4:
        ways.append("--checkpoint-activations")
    if not found.stays["copies"]:
        ways.append("--precision bf16, for half the activations")
    more = found.memory(1, 8 * options.gpus, sharded=True).total() / GIB
    if more <= memory_of(options):
        ways.append(f"--gpus {8 * options.gpus}, sharded: {more:.1f} GiB each")
    return [f"does not fit: one image takes {need:.1f} GiB of {memory_of(options):g}. Instead:"] + [
        f"  - {way}" for way in ways
    ]
