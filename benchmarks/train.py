"""The SiD iteration of the presets, ours and others', side by side.

    python -m benchmarks.train --preset cifar10-uncond --micro-batch 8,32,64

A step is one round of micro_batch images: both phases and both updates, on networks of the
preset's shape with random weights. Variants (--variants; see VARIANTS) take turns, so that clocks
and other work on the machine meet all alike; those that do not fit into memory beside the others
take theirs after them, with `ours` again in their turns. `to_ours` is their time as a multiple of
its. MFU is 11 forwards' FLOP an image (fake step 4, generator step 7), by PyTorch's counter, over
the rate of the fastest matrix product in the same run, which is bfloat16's on a GPU and float32's
on most CPUs, whatever the variant computes in. Memory is what a variant adds: at its peak, from
nothing, within three steps. Host time is until a step that found an idle device returns.
"""

import atexit
import contextlib
import dataclasses
import functools
import gc
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measure
from benchmarks.baselines import Plain, Skilled
from benchmarks.record import PERCENTILES, RESULTS, Record, percentiles
from sid_fast import cli, kernels
from sid_fast.cli import presets
from sid_fast.config.types import Precision, Settings, check, option, part
from sid_fast.distiller import Distiller
from sid_fast.errors import UserError
from sid_fast.kernels._cuda import library
from sid_fast.models import EDMNetwork, NetworkConfig
from sid_fast.models.registry import network_config
from sid_fast.performance import fsdp, mixed_precision, process_group
from sid_fast.tools.graph_trial import network
from sid_fast.train import TrainConfig

FORWARDS = 11  # an image of a step costs; fake step G 1, ψ 3; generator step G 3, φ 2, ψ 2


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to run a step.

    kind: ours, plain or skilled; precision as of --precision; kernels as of dispatch.force, None
    for what a user gets; options go to Distiller, or are the mode of torch.compile; benchmark and
    deterministic are cuDNN's flags: whether it times its algorithms and takes the fastest, and
    whether only deterministic ones; channels_last: False has everything in NCHW. sharded:
    --parallel fsdp, at this one process.
    """

    kind: str = "ours"
    precision: Precision = "bf16"
    kernels: Any = "triton"
    options: dict[str, Any] = dataclasses.field(default_factory=lambda: {"cuda_graph": True})
    benchmark: bool = False
    deterministic: bool = True
    channels_last: bool = True
    sharded: bool = False

    @property
    def graphed(self) -> bool:
        return bool(self.options.get("cuda_graph")) or self.options.get("mode") == GRAPHED


GRAPHED = "reduce-overhead"  # the mode in which torch.compile makes CUDA graphs of its own
TUNED = {"benchmark": True, "deterministic": False}


def but(operation: str, form: str = "eager") -> Variant:
    return Variant(kernels=dict.fromkeys(kernels.dispatch.OPERATIONS, "triton") | {operation: form})


def plain(dtype: Precision) -> Variant:
    return Variant("plain", dtype, "eager", {}, **TUNED)


def skilled(mode: str) -> Variant:
    return Variant("skilled", "bf16", "eager", {"mode": mode}, **TUNED)


VARIANTS = {
    "ours": Variant(),
    "default": Variant(kernels=None),
    "published": plain("fp32"),
    "published bf16": plain("bf16"),
    "skilled": skilled("max-autotune-no-cudagraphs"),
    "no graphs": Variant(options={}),
    "published fp16": plain("fp16"),
    "skilled default mode": skilled("default"),
    "skilled graphs": skilled(GRAPHED),
    "ours fp32": Variant(precision="fp32"),
    "cuDNN benchmark": Variant(benchmark=True),
    "cuDNN not deterministic": Variant(deterministic=False),
    "no fused block": but("block"),
    "no fused group norm": but("group_norm"),
    "no fused attention": but("attention"),
    "no fused loss": but("sid_loss"),
    "no fused optimiser": but("adam_ema"),
    "no fused augmentation": but("augment"),
    "CUDA optimiser": but("adam_ema", "cuda"),
    # Nor what needs it: the kernels that read and write feature maps.
    "no channels-last": Variant(
        kernels={"sid_loss": "triton", "adam_ema": "triton"}, channels_last=False
    ),
    "ours tf32": Variant(precision="tf32"),
    "fsdp": Variant(sharded=True),
    "fsdp no graphs": Variant(sharded=True, options={}),
    "compile": Variant(options={"cuda_graph": True, "compile": True}),
}


# The others take parts away that a CPU does not run: it has all of ours in plain PyTorch. Ours come
# first, so that all take turns together.
ON_CPU = (
    "ours",
    "default",
    "ours fp32",
    "published",
    "published bf16",
    "skilled default mode",
    "fsdp",
)


@dataclasses.dataclass
class Options:
    preset: str = option("", "presets, with commas between; default: digits on a CPU, else all")
    micro_batch: tuple[int, ...] = option((), "images a round; default: 8, 16, … what fits")
    variants: str = option(
        "", f"with commas between, out of: {', '.join(VARIANTS)}; default: all that run here"
    )
    turns: int = option(20, "steps that are timed of each, at most", 1)
    share: float = option(20.0, "seconds of turns for a micro-batch, unless --turns end sooner", 0)
    seconds: float = option(1e6, "set up nothing more after so many", 0)
    device: str = option("auto", "auto, cpu or cuda")
    out: str | None = option(None, "the result file; default: benchmarks/results/train.json")
    append: bool = option(False, "keep the rows that the result file has")


class Running:
    """A variant with its networks, after three steps."""

    def __init__(self, variant: Variant, settings: Settings, config: NetworkConfig, device):
        self.variant, self.device = variant, device
        gc.collect()
        before = memory(device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            before = memory(device)
            torch.cuda.reset_peak_memory_stats(device)
        with self.around():
            self.step = self.make(settings, config)
            for _ in range(3):
                self.step()
        measure.synchronize(device)
        self.peak = [(p - b) / 2**30 for p, b in zip(memory(device, "max_"), before, strict=True)]

    def make(self, settings: Settings, config: NetworkConfig) -> Callable[[], object]:
        v = self.variant
        teacher = network(config, self.device)
        if v.kind == "ours":
            if isinstance(v.kernels, dict) and v.kernels["adam_ema"] == "cuda" and not library():
                raise RuntimeError("the CUDA kernels are not built")
            graph = v.graphed and self.device.type == "cuda"
            settings = dataclasses.replace(settings, precision=v.precision)
            sharding = fsdp.SINGLE_PROCESS
            if v.sharded:
                one_process(self.device)
                sharding = fsdp.plan("fsdp", self.device, lambda shards, reshard_after_forward: 0)
            options = v.options | {"cuda_graph": graph}
            return Distiller(teacher, settings, sharding=sharding, **options).step
        dtype = mixed_precision.TYPES[v.precision]
        settings = dataclasses.replace(settings, eps=mixed_precision.ADAM_EPS[v.precision])
        return {"plain": Plain, "skilled": Skilled}[v.kind](
            teacher, settings, dtype, **v.options
        ).step

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """What is chosen for the whole process, as this variant has it."""
        cudnn = torch.backends.cudnn
        with contextlib.ExitStack() as stack:
            forms = self.variant.kernels if self.device.type == "cuda" else "eager"
            stack.enter_context(kernels.dispatch.forced("eager"))
            stack.enter_context(kernels.dispatch.forced(forms))
            if not self.variant.channels_last:
                patch = mock.patch.object(torch, "channels_last", torch.contiguous_format)
                stack.enter_context(patch)
            cudnn.benchmark = self.variant.benchmark
            cudnn.deterministic = self.variant.deterministic
            mixed_precision.set_precision(self.variant.precision, self.device)
            yield

    def __call__(self) -> None:
        with self.around():
            self.step()


@functools.cache
def one_process(device: torch.device) -> None:
    """Be a group of one process, until the end of it."""
    group = contextlib.ExitStack()
    group.enter_context(process_group.joined(device, "fsdp"))
    atexit.register(group.close)


def memory(device: torch.device, most: str = "") -> list[int]:
    """Bytes allocated and reserved, now or ("max_") at most; 0 on a CPU, which does not say."""
    if device.type != "cuda":
        return [0, 0]
    kinds = "allocated", "reserved"
    return [getattr(torch.cuda, f"{most}memory_{kind}")(device) for kind in kinds]


def one_round(preset: str, images: int) -> tuple[NetworkConfig, Settings]:
    """A preset's network, and its settings for a step of one round of so many images."""
    config = TrainConfig(**presets("train")[preset])
    settings = part(config, Settings)
    assert config.teacher
    return network_config(config.teacher), dataclasses.replace(
        settings, batch_size=images, micro_batch=None
    )


def forward_flop(config: NetworkConfig) -> int:
    """FLOP of a forward of one image: of convolutions and matrix products, 2 a multiply-add."""
    x = torch.empty(1, config.channels, config.resolution, config.resolution, device="meta")
    labels = torch.empty(1, config.label_dim, device="meta") if config.label_dim else None
    with torch.device("meta"), torch.no_grad(), kernels.dispatch.forced("eager"):
        net = EDMNetwork(config)
        with FlopCounterMode(display=False) as count:
            net(x, torch.ones(1), labels)
    return count.get_total_flops()


class Bench:
    """One preset at one micro-batch: sets variants up, lets them take turns, writes rows."""

    def __init__(self, record: Record, options: Options, device: torch.device, end: float):
        self.record, self.options, self.device, self.end = record, options, device, end

    def run(self, preset: str, micro_batch: int, names: Iterable[str], flop: int) -> bool:
        """Whether any variant fitted into memory."""
        config, settings = one_round(preset, micro_batch)
        self.keys: dict[str, Any] = {"preset": preset, "micro_batch": micro_batch}
        self.flop = FORWARDS * flop * micro_batch
        alive: dict[str, Running] = {}
        written: set[str] = set()
        fitted = False
        for name in sorted(names, key=lambda name: name != "ours"):
            if time.monotonic() > self.end:
                print(f"out of time before {name} at {preset}, micro-batch {micro_batch}")
                break
            # One without graphs takes its memory anew in each step: nothing may have come since.
            if VARIANTS[name].graphed and not all(VARIANTS[n].graphed for n in alive):
                self.turns(alive, written)
                alive = {k: v for k, v in alive.items() if k == "ours"}
            try:
                found = self.set_up(name, settings, config)
            except KeyboardInterrupt:  # minutes of compilation that no one waits for
                self.turns(alive, written)
                raise
            if found == "out of memory" and set(alive) - {"ours"}:
                self.turns(alive, written)
                alive = {k: v for k, v in alive.items() if k == "ours"}
                found = self.set_up(name, settings, config)
            if found == "out of memory" and alive:
                self.turns(alive, written)
                alive = {}
                found = self.set_up(name, settings, config)
            if isinstance(found, str):
                self.write(name, None, None, None, status=found)
            else:
                alive[name], fitted = found, True
        self.turns(alive, written)
        return fitted

    def set_up(self, name: str, settings: Settings, config: NetworkConfig) -> "Running | str":
        """The variant, or why there is none."""
        start = time.monotonic()
        try:
            if self.device.type == "cpu" and name not in ON_CPU:
                raise RuntimeError("needs a GPU")
            found: Running | str = Running(VARIANTS[name], settings, config, self.device)
        except Exception as error:  # the others go on
            found = measure.reason(error)
        gc.collect()
        if self.device.type == "cuda" and isinstance(found, str):
            torch.cuda.empty_cache()
        what = "ready" if isinstance(found, Running) else found
        print(f"  {name}: {what} after {time.monotonic() - start:.1f} s", flush=True)
        return found

    def turns(self, alive: dict[str, Running], written: set[str]) -> None:
        """Time those that are alive; rows of those that have none yet."""
        if not set(alive) - written:
            return
        most, share = self.options.turns, self.options.share
        try:
            times = measure.in_turns(alive, self.device, share, most, least=min(3, most))
        except torch.OutOfMemoryError:
            for name in set(alive) - written:
                self.write(name, None, None, None, status="out of memory beside the others")
            written |= set(alive)
            return
        ours = times.get("ours")
        for name in alive:
            if name not in written:
                self.write(name, alive[name], times[name], ours)
        written |= set(alive)

    def write(self, name, running, times, ours, status: str = "ok") -> None:
        row = dict.fromkeys(self.record.form.figures) | {"ms": dict.fromkeys(PERCENTILES)}
        if running is not None:
            device, host = zip(*times, strict=True)
            ms = percentiles(list(device))
            seconds = ms["p50"] / 1e3
            rate = max(self.record.head["ceilings"][kind] for kind in ("bf16", "fp32")) * 1e12
            cuda = self.device.type == "cuda"
            row |= {
                "ms": ms,
                "it_s": 1 / seconds,
                "img_s": self.keys["micro_batch"] / seconds,
                "mfu": self.flop / seconds / rate,
                "to_ours": ours and ms["p50"] / measure.median([ms for ms, _ in ours]),
                "peak_allocated": running.peak[0] if cuda else None,
                "peak_reserved": running.peak[1] if cuda else None,
                "host_ms": measure.median(list(host)),
            }
        row |= {**self.keys, "variant": name, "status": status}
        self.record.add(**row)
        print(line(row), flush=True)


HEAD = (
    f"{'preset':16} {'variant':22} {'batch':>5} {'ms':>9} {'img/s':>9} {'MFU':>6} {'to ours':>7} "
    f"{'GiB':>6} {'host ms':>8}"
)


def line(row: dict) -> str:
    what = f"{row['preset']:16} {row['variant']:22} {row['micro_batch']:5}"
    if row["status"] != "ok":
        return f"{what} {row['status']}"
    ratio, peak = row["to_ours"], row["peak_allocated"]
    return (
        f"{what} {row['ms']['p50']:9.2f} {row['img_s']:9.1f} {row['mfu']:6.1%} "
        f"{'' if ratio is None else f'{ratio:.3f}':>7} {'' if peak is None else f'{peak:.2f}':>6} "
        f"{row['host_ms']:8.2f}"
    )


def chosen(names: str, known: dict, what: str) -> list[str]:
    """The names of a list with commas between; UserError for one that is not known."""
    found = [name.strip() for name in names.split(",") if name.strip()]
    if unknown := [name for name in found if name not in known]:
        raise UserError(f"{what}={unknown[0]!r} is unknown: choose from {', '.join(known)}")
    return found


def run(options: Options, given: set[str]) -> None:
    check(options)
    device = process_group.pick_device(options.device)
    cuda = device.type == "cuda"
    end = time.monotonic() + options.seconds
    known = presets("train")
    everything = ("cifar10-uncond", "ffhq64", "imagenet64-cond") if cuda else ("digits",)
    names = chosen(options.preset, known, "preset") or everything
    variants = chosen(options.variants, VARIANTS, "variants") or (VARIANTS if cuda else ON_CPU)
    batches = options.micro_batch or tuple(2**i for i in range(3, 11 if cuda else 4))
    torch.backends.cuda.matmul.allow_tf32 = False
    ceilings = measure.ceilings(device)
    record = Record(
        Path(options.out or RESULTS / "train.json"),
        "train",
        append=options.append,
        ceilings=ceilings,
    )
    print(
        f"{record.head['device']}: {', '.join(f'{k} {v:.3g}' for k, v in ceilings.items())} "
        "(products TFLOP/s, copy TB/s)"
    )
    print(HEAD)
    bench = Bench(record, options, device, end)
    for preset in names:
        flop = forward_flop(network_config(known[preset]["teacher"]))
        for micro_batch in batches:
            if time.monotonic() > end or not bench.run(preset, micro_batch, variants, flop):
                break
    print(f"kept as {record.path} and .csv")


main = cli.command(Options, run, None, __doc__)

if __name__ == "__main__":
    cli.main(main, "benchmarks.train")
