"""Time the SiD or SiDA step of the presets: sid_fast's variants and two PyTorch baselines.

    python -m benchmarks.train --preset cifar10-uncond --micro-batch 8,32,64

A step is one micro-batch: both phases and both updates, on networks of the preset's shape with
random weights. The variants of --variants run interleaved, so that clocks and other load affect
all alike. Variants that don't fit into memory together are timed in groups, each group again
interleaved with `sid_fast`, if it fits.

- `relative_time`: time over that of `sid_fast`, interleaved in the same group.
- `mfu`: FLOP of 11 forward passes per image (fake step 4, generator step 7; SiDA: and 3 of the
  encoder), by PyTorch's counter, over the fastest matrix product in the same run, whatever the
  precision of the variant. That is bfloat16's on a GPU and float32's on most CPUs.
- `peak_allocated`, `peak_reserved`: memory that the variant adds at its peak, GiB, from the
  construction of its networks through three steps.
- `host_ms`: time until a step that starts on an idle device returns.
"""

import atexit
import contextlib
import dataclasses
import functools
import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import timing
from benchmarks.baselines import OptimisedBaseline, PublishedBaseline
from benchmarks.results import RESULTS, Results, times
from sid_fast import cli, kernels
from sid_fast.cli import presets
from sid_fast.config.types import Precision, Settings, SiDASettings, check, option
from sid_fast.distiller import Distiller, blank_feed
from sid_fast.errors import UserError
from sid_fast.kernels._cuda import library
from sid_fast.models import NetworkConfig
from sid_fast.models.families import build_network
from sid_fast.models.registry import network_config
from sid_fast.performance import fsdp, mixed_precision, process_group
from sid_fast.tools.proof import network
from sid_fast.train import TrainConfig

# Forward passes per image and step; backward counts as 2, or 1 for gradients of inputs only.
FORWARDS = 11  # fake step: G 1, ψ 3; generator step: G 3, φ 2, ψ 2


@dataclasses.dataclass(frozen=True)
class Variant:
    """How to run a step.

    Attributes:
        kind: sid_fast, or a baseline: published or optimised.
        precision: as --precision.
        kernels: argument of dispatch.forced; None keeps the defaults that users get.
        options: of Distiller, or of the baseline.
        benchmark: cuDNN times its algorithms and takes the fastest.
        deterministic: cuDNN uses deterministic algorithms only.
        channels_last: False keeps all tensors NCHW.
        sharded: --parallel fsdp, on this one process.
    """

    kind: Literal["sid_fast", "published", "optimised"] = "sid_fast"
    precision: Precision = "bf16"
    kernels: Any = "triton"
    options: dict[str, Any] = dataclasses.field(default_factory=lambda: {"cuda_graph": True})
    benchmark: bool = False
    deterministic: bool = True
    channels_last: bool = True
    sharded: bool = False

    @property
    def uses_graphs(self) -> bool:
        """Whether the step is replayed as CUDA graphs, which torch.compile can also make."""
        return bool(self.options.get("cuda_graph")) or self.options.get("mode") == COMPILE_GRAPHS


COMPILE_GRAPHS = "reduce-overhead"  # the mode of torch.compile that captures CUDA graphs
TUNED = {"benchmark": True, "deterministic": False}


def replace_kernel(operation: str, backend: str = "eager") -> Variant:
    """Use another backend for one operation."""
    backends = dict.fromkeys(kernels.dispatch.OPERATIONS, "triton") | {operation: backend}
    return Variant(kernels=backends)


def published(precision: Precision) -> Variant:
    """Run the recipe as published."""
    return Variant("published", precision, "eager", {}, **TUNED)


def optimised(mode: str) -> Variant:
    """Run the recipe as optimised PyTorch, with a mode of torch.compile."""
    return Variant("optimised", "bf16", "eager", {"mode": mode}, **TUNED)


VARIANTS = {
    "sid_fast": Variant(),
    "default": Variant(kernels=None),
    "published": published("fp32"),
    "published bf16": published("bf16"),
    "optimised": optimised("max-autotune-no-cudagraphs"),
    "no graphs": Variant(options={}),
    "published fp16": published("fp16"),
    "optimised default mode": optimised("default"),
    "optimised graphs": optimised(COMPILE_GRAPHS),
    "sid_fast fp32": Variant(precision="fp32"),
    "cuDNN benchmark": Variant(benchmark=True),
    "cuDNN not deterministic": Variant(deterministic=False),
    "no fused block": replace_kernel("block"),
    "no fused group norm": replace_kernel("group_norm"),
    "no fused attention": replace_kernel("attention"),
    "no fused loss": replace_kernel("sid_loss"),
    "no fused optimiser": replace_kernel("adam_ema"),
    "no fused augmentation": replace_kernel("augment"),
    "CUDA optimiser": replace_kernel("adam_ema", "cuda"),
    # The kernels that read feature maps need channels-last.
    "no channels-last": Variant(
        kernels={"sid_loss": "triton", "adam_ema": "triton"}, channels_last=False
    ),
    "sid_fast tf32": Variant(precision="tf32"),
    "fsdp": Variant(sharded=True),
    "fsdp no graphs": Variant(sharded=True, options={}),
    "compile": Variant(options={"cuda_graph": True, "compile": True}),
}


# On a CPU sid_fast runs the default backends: variants without one kernel would all be the same.
ON_CPU = (
    "sid_fast",
    "default",
    "sid_fast fp32",
    "published",
    "published bf16",
    "optimised default mode",
    "fsdp",
)


@dataclasses.dataclass
class Options:
    """Options of the command."""

    preset: str = option("", "comma-separated presets; default: digits on a CPU, else all")
    micro_batch: tuple[int, ...] = option((), "images per step; default: 8, 16, … while they fit")
    variants: str = option(
        "", f"comma-separated list of {', '.join(VARIANTS)}; default: all that run here"
    )
    max_steps: int = option(20, "timed steps of each variant, at most", 1)
    timed_seconds: float = option(20.0, "timed seconds per micro-batch, at most", 0)
    seconds: float = option(1e6, "set up no new variant after this many seconds", 0)
    device: str = option("auto", "auto, cpu or cuda")
    out: str | None = option(
        None, "result file to append to; default: benchmarks/results/train.jsonl"
    )


class Running:
    """A variant that has run three steps; calling it runs one more."""

    def __init__(self, variant: Variant, settings: Settings, config: NetworkConfig, device):
        self.variant, self.device = variant, device
        gc.collect()
        before = memory(device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            before = memory(device)
            torch.cuda.reset_peak_memory_stats(device)
        with self.settings():
            self.step = self.make(settings, config)
            for _ in range(3):
                self.step()
        timing.synchronize(device)
        self.peak = [(p - b) / 2**30 for p, b in zip(memory(device, "max_"), before, strict=True)]

    def make(self, settings: Settings, config: NetworkConfig) -> Callable[[], object]:
        """Build the networks; returns the function that runs a step."""
        v = self.variant
        teacher = network(config, self.device)
        if v.kind == "sid_fast":
            if isinstance(v.kernels, dict) and v.kernels["adam_ema"] == "cuda" and not library():
                raise RuntimeError("the CUDA kernels are not built")
            graph = v.uses_graphs and self.device.type == "cuda"
            settings = dataclasses.replace(settings, precision=v.precision)
            sharding = fsdp.SINGLE_PROCESS
            if v.sharded:
                join_single_process_group(self.device)
                sharding = fsdp.plan("fsdp", self.device, lambda shards, reshard_after_forward: 0)
            options = v.options | {"cuda_graph": graph}
            feed = blank_feed(config, settings, self.device)
            return Distiller(teacher, settings, sharding=sharding, data=feed, **options).step
        if isinstance(settings, SiDASettings):
            raise RuntimeError("the baselines have no SiDA")
        dtype = mixed_precision.TYPES[v.precision]
        settings = dataclasses.replace(settings, eps=mixed_precision.ADAM_EPS[v.precision])
        baseline = PublishedBaseline if v.kind == "published" else OptimisedBaseline
        return baseline(teacher, settings, dtype, **v.options).step

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        """Apply the variant's process-wide settings: backends, layout, cuDNN, TF32."""
        cudnn = torch.backends.cudnn
        with contextlib.ExitStack() as stack:
            backends = self.variant.kernels
            if self.device.type == "cpu" and backends != "eager":
                backends = None
            stack.enter_context(kernels.dispatch.forced("eager"))
            stack.enter_context(kernels.dispatch.forced(backends))
            if not self.variant.channels_last:
                patch = mock.patch.object(torch, "channels_last", torch.contiguous_format)
                stack.enter_context(patch)
            cudnn.benchmark = self.variant.benchmark
            cudnn.deterministic = self.variant.deterministic
            mixed_precision.set_precision(self.variant.precision, self.device)
            yield

    def __call__(self) -> None:
        """Run a step."""
        with self.settings():
            self.step()


@functools.cache
def join_single_process_group(device: torch.device) -> None:
    """Join a process group of this process alone until the interpreter exits."""
    group = contextlib.ExitStack()
    group.enter_context(process_group.joined(device, "fsdp"))
    atexit.register(group.close)


def memory(device: torch.device, prefix: Literal["", "max_"] = "") -> list[int]:
    """Return bytes allocated and reserved, now or (max_) at the peak; 0 on a CPU."""
    if device.type != "cuda":
        return [0, 0]
    kinds = "allocated", "reserved"
    return [getattr(torch.cuda, f"{prefix}memory_{kind}")(device) for kind in kinds]


def single_micro_batch(preset: str, images: int) -> tuple[NetworkConfig, Settings]:
    """Return a preset's network and its settings for a step of one micro-batch."""
    config = TrainConfig(**presets("train")[preset])
    settings = dataclasses.replace(config.settings(), batch_size=images, micro_batch=None)
    if isinstance(settings, SiDASettings):  # both phases from the second step on
        settings = dataclasses.replace(
            settings, adversarial_group=math.gcd(settings.adversarial_group, images),
            generator_start_kimg=0.0, adversarial_start_kimg=0.0,
        )  # fmt: skip
    assert config.teacher
    return network_config(config.teacher), settings


def step_flop(config: NetworkConfig, settings: Settings) -> int:
    """Count FLOP of a step per image."""
    extra = 3 * forward_flop(config, encoder=True) if isinstance(settings, SiDASettings) else 0
    return FORWARDS * forward_flop(config) + extra


def forward_flop(config: NetworkConfig, encoder: bool = False) -> int:
    """Count FLOP of one image's forward pass: convolutions and matrix products, 2 per FMA.

    encoder: Of the encoder alone.
    """
    x = torch.empty(1, config.channels, config.resolution, config.resolution, device="meta")
    labels = torch.empty(1, config.label_dim, device="meta") if config.label_dim else None
    with torch.device("meta"), torch.no_grad(), kernels.dispatch.forced("eager"):
        net = build_network(config)
        with FlopCounterMode(display=False) as count:
            (net.logits if encoder else net)(x, torch.ones(1), labels)
    return count.get_total_flops()


class Bench:
    """Times the variants of one preset at one micro-batch and writes their rows."""

    def __init__(
        self, results: Results, options: Options, device: torch.device, rates: dict[str, float]
    ):
        self.results, self.options, self.device = results, options, device
        self.peak = max(rates["bf16"], rates["fp32"]) * 1e12
        self.end = time.monotonic() + options.seconds
        self.keys: dict[str, Any] = {}

    def out_of_time(self) -> bool:
        """Whether --seconds have passed."""
        return time.monotonic() > self.end

    def run(self, preset: str, micro_batch: int, names: Iterable[str]) -> bool:
        """Time the variants; returns whether any fits into memory."""
        config, settings = single_micro_batch(preset, micro_batch)
        self.keys = {"preset": preset, "micro_batch": micro_batch}
        self.flop = step_flop(config, settings) * micro_batch
        alive: dict[str, Running] = {}
        written: set[str] = set()
        fits = False

        def time_and_free(keep: Iterable[str] = ()) -> None:
            nonlocal alive
            self.time(alive, written)
            alive = {name: running for name, running in alive.items() if name in keep}

        for name in sorted(names, key=lambda name: name != "sid_fast"):
            if self.out_of_time():
                print(f"out of time before {name} at {preset}, micro-batch {micro_batch}")
                break
            # A variant without graphs allocates anew in each step, so time it before adding more.
            if VARIANTS[name].uses_graphs and not all(VARIANTS[n].uses_graphs for n in alive):
                time_and_free(keep=["sid_fast"])
            try:
                running = self.set_up(name, settings, config)
            except KeyboardInterrupt:  # interrupts a compilation of minutes
                self.time(alive, written)
                raise
            for keep in (["sid_fast"], []):
                if running == "out of memory" and set(alive) - set(keep):
                    time_and_free(keep)
                    running = self.set_up(name, settings, config)
            if isinstance(running, str):
                self.write(name, {"status": running})
            else:
                alive[name], fits = running, True
        self.time(alive, written)
        return fits

    def set_up(self, name: str, settings: Settings, config: NetworkConfig) -> "Running | str":
        """Set up a variant; returns the reason if it fails."""
        start = time.monotonic()
        try:
            if self.device.type == "cpu" and name not in ON_CPU:
                raise RuntimeError("needs a GPU")
            running: Running | str = Running(VARIANTS[name], settings, config, self.device)
        except Exception as error:  # go on with the others
            running = timing.failure_reason(error)
        gc.collect()
        if self.device.type == "cuda" and isinstance(running, str):
            torch.cuda.empty_cache()
        status = "ready" if isinstance(running, Running) else running
        print(f"  {name}: {status} after {time.monotonic() - start:.1f} s", flush=True)
        return running

    def time(self, alive: dict[str, Running], written: set[str]) -> None:
        """Time the variants interleaved; writes the rows of those not in `written`."""
        if not set(alive) - written:
            return
        steps, seconds = self.options.max_steps, self.options.timed_seconds
        try:
            timed = timing.interleaved(alive, self.device, seconds, steps, min(3, steps))
        except torch.OutOfMemoryError:
            for name in set(alive) - written:
                self.write(name, {"status": "out of memory beside the others"})
            written |= set(alive)
            return
        base = [ms for ms, _ in timed.get("sid_fast", [])]
        for name, running in alive.items():
            if name not in written:
                device, host = zip(*timed[name], strict=True)
                row = times(device)
                rate = 1e3 / row["ms_p50"]
                row |= {
                    "it_s": rate,
                    "img_s": self.keys["micro_batch"] * rate,
                    "mfu": self.flop * rate / self.peak,
                    "host_ms": timing.median(list(host)),
                    "status": "ok",
                }
                if base:
                    row["relative_time"] = row["ms_p50"] / timing.median(base)
                if self.device.type == "cuda":
                    row["peak_allocated"], row["peak_reserved"] = running.peak
                self.write(name, row)
        written |= set(alive)

    def write(self, variant: str, figures: dict[str, Any]) -> None:
        """Append a row to the results and print it."""
        row = {**self.keys, "variant": variant, **figures}
        self.results.add(row)
        print(line(row), flush=True)


HEAD = (
    f"{'preset':16} {'variant':23} {'batch':>5} {'ms':>9} {'img/s':>9} {'MFU':>6} {'rel.':>7} "
    f"{'GiB':>6} {'host ms':>8}"
)


def line(row: dict) -> str:
    """Format a row for the terminal, below HEAD."""
    head = f"{row['preset']:16} {row['variant']:23} {row['micro_batch']:5}"
    if row["status"] != "ok":
        return f"{head} {row['status']}"
    ratio, peak = row.get("relative_time"), row.get("peak_allocated")
    return (
        f"{head} {row['ms_p50']:9.2f} {row['img_s']:9.1f} {row['mfu']:6.1%} "
        f"{'' if ratio is None else f'{ratio:.3f}':>7} {'' if peak is None else f'{peak:.2f}':>6} "
        f"{row['host_ms']:8.2f}"
    )


def parse_list(names: str, known: dict, option: str) -> list[str]:
    """Split a comma-separated list; raises UserError for a name that is not known."""
    parsed = [name.strip() for name in names.split(",") if name.strip()]
    if unknown := [name for name in parsed if name not in known]:
        raise UserError(f"{option}={unknown[0]!r} is unknown: choose from {', '.join(known)}")
    return parsed


def run(options: Options, given: set[str]) -> None:
    """Run the command."""
    check(options)
    device = process_group.pick_device(options.device)
    cuda = device.type == "cuda"
    known = presets("train")
    everything = ("cifar10-uncond", "ffhq64", "imagenet64-cond") if cuda else ("digits",)
    names = parse_list(options.preset, known, "preset") or everything
    variants = parse_list(options.variants, VARIANTS, "variants") or (VARIANTS if cuda else ON_CPU)
    batches = options.micro_batch or tuple(2**i for i in range(3, 11 if cuda else 4))
    torch.backends.cuda.matmul.allow_tf32 = False
    rates = timing.peak_rates(device)
    path = options.out or RESULTS / "train.jsonl"
    results = Results(path, "train", **timing.rate_columns(rates))
    print(results.columns["device"], *(f"{name} {rate:.3g}" for name, rate in rates.items()))
    print(HEAD)
    bench = Bench(results, options, device, rates)
    for preset in names:
        for micro_batch in batches:
            if bench.out_of_time() or not bench.run(preset, micro_batch, variants):
                break
    print(f"results: {results.path}")


main = cli.command(Options, run, None, __doc__)

if __name__ == "__main__":
    cli.main(main, "benchmarks.train")
