"""Dataclasses of settings: what each field means, its range or choices, and its heading."""

import dataclasses
import types
import typing
from dataclasses import field
from functools import partial
from typing import Any, Literal

from sid_fast.errors import UserError

LARGE = 1e12
Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
Parallel = Literal["auto", "ddp", "fsdp", "hsdp"]
Switch = Literal["auto", "on", "off"]
Card = Literal["rtx4090", "a100", "h100", "h200"]
Architecture = Literal["ddpmpp", "ncsnpp", "adm"]


def option(
    default: Any,
    help: str,
    low: float | None = None,
    high: float = LARGE,
    *,
    short: str = "",
    heading: str = "Options",
) -> Any:
    """A dataclass field that explains itself on the command line and knows its range.

    short: another name for it there, such as -n. heading: under which --help lists it.
    """
    metadata = {"help": help, "low": low, "high": high, "short": short, "heading": heading}
    return field(default=default, metadata=metadata)


def members(hint: Any) -> tuple[tuple[str, ...], tuple[type, ...]]:
    """A type hint's literal values, and its types besides None and them."""
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint), ()
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        values, kinds = zip(*map(members, typing.get_args(hint)), strict=True)
        return sum(values, ()), sum(kinds, ())
    return (), () if hint is type(None) else (hint,)


def check(settings: Any) -> None:
    """UserError, naming the field, for a value out of its range (NaN always is) or choices."""
    hints = typing.get_type_hints(type(settings))
    for f in dataclasses.fields(settings):
        value, low, high = getattr(settings, f.name), f.metadata.get("low"), f.metadata.get("high")
        name, (choices, kinds) = f.name.strip("_"), members(hints[f.name])
        if value is None or value in choices:
            continue
        if not kinds:
            raise UserError(f"{name}={value!r} is unknown: choose from {', '.join(choices)}")
        if low is not None and not low <= value <= high:
            high = "10^12" if high == LARGE else high
            raise UserError(f"{name}={value} is out of range: choose from {low} to {high}")


def part(values: Any, kind: type) -> Any:
    """The fields of dataclass `kind` out of a larger dataclass that has them all."""
    return kind(**{f.name: getattr(values, f.name) for f in dataclasses.fields(kind)})


def grad_accum_steps(settings: Any, ranks: int = 1) -> int:
    """Micro-batches a step: batch_size / micro_batch / ranks, or 1 without a micro_batch.

    UserError, naming the nearest batch size that works, where they do not divide.
    """
    batch, micro = settings.batch_size, settings.micro_batch
    chunk = (micro or 1) * ranks
    if batch % chunk:
        nearest = max(round(batch / chunk), 1) * chunk
        micro_text = f"micro_batch {micro} × " if micro else ""
        raise UserError(
            f"batch_size={batch} does not divide by {micro_text}{ranks} process"
            f"{'es' if ranks > 1 else ''}; the nearest that does is {nearest}"
        )
    return batch // chunk if micro else 1


def resume_fingerprint(settings: Any) -> dict[str, Any]:
    """The settings that a resumed run must share: not how its steps are fitted into memory."""
    return {k: v for k, v in dataclasses.asdict(settings).items() if k != "micro_batch"}


def divisors(n: int) -> list[int]:
    """All divisors, the largest first."""
    return [n // d for d in range(1, n + 1) if n % d == 0]


def smaller_micro_batch(settings: Any, ranks: int = 1) -> int | None:
    """The next smaller micro-batch with which the batch divides; None below 1."""
    share = settings.batch_size // ranks
    now = settings.micro_batch or share
    return next((n for n in divisors(share) if n < now), None)


PRECISION = (
    "type the network computes in; auto is bf16 on a GPU that has it and fp32 elsewhere. Weights, "
    "averages, losses and statistics are float32 in all"
)
MICRO_BATCH = "images a forward pass on one GPU, if the batch is to be split (gradients add up)"

_method = partial(option, heading="Method")
_optimizer = partial(option, heading="Optimizer and average")
_step = partial(option, heading="Batch and precision")
_output = partial(option, heading="Run and output")
_evaluation = partial(option, heading="Evaluation during the run")
_machine = partial(option, heading="Machine")


@dataclasses.dataclass
class Settings:
    """What one step of the distillation depends on, besides the teacher."""

    alpha: float = _method(1.2, "α of the generator loss, the weight of its second term", -0.5, 2)
    tmax: int = _method(800, "largest t of the generator step, in thousandths", 1, 1000)
    init_sigma: float = _method(2.5, "noise level at which the generator makes an image", 1e-3, 1e3)
    fake_lr: float = _optimizer(1e-5, "learning rate of the fake score", 0, 1)
    generator_lr: float = _optimizer(1e-5, "learning rate of the generator", 0, 1)
    fake_beta1: float = _optimizer(0.0, "Adam β1 of the fake score; 0 keeps no moment", 0, 0.9999)
    generator_beta1: float = _optimizer(
        0.0, "Adam β1 of the generator; 0 keeps no moment", 0, 0.9999
    )
    beta2: float = _optimizer(0.999, "Adam β2 of both", 0, 0.999999)
    eps: float | None = _optimizer(None, "Adam ε of both; default 1e-8, and 1e-6 with fp16", 1e-15)
    ema_halflife_kimg: float = _optimizer(500.0, "half-life of the generator's average, kimg", 0)
    ema_rampup_ratio: float = _optimizer(
        0.05, "the half-life is at most this part of the images so far; 0 for no ramp-up", 0
    )
    fake_loss_scale: float = _method(1.0, "factor of the fake score's loss", 0)
    generator_loss_scale: float = _method(100.0, "factor of the generator's loss", 0)
    precision: Precision = _step("auto", PRECISION)
    batch_size: int = _step(256, "images a step, over all GPUs", 1, 2**24)
    micro_batch: int | None = _step(None, MICRO_BATCH, 1)
    dropout: float = _method(0.0, "dropout of fake score and generator in training", 0, 0.999)
    augment_p: float = _method(
        0.0, "how often the fake score's images are warped; 0 for never", 0, 1
    )


@dataclasses.dataclass
class PretrainSettings:
    """What one step of a teacher's training depends on, besides network and images."""

    lr: float = _optimizer(1e-3, "learning rate of Adam", 0, 1)
    lr_rampup_kimg: float = _optimizer(10_000.0, "the learning rate rises linearly over so many", 0)
    beta1: float = _optimizer(0.9, "Adam β1", 0, 0.9999)
    beta2: float = _optimizer(0.999, "Adam β2", 0, 0.999999)
    eps: float | None = _optimizer(None, "Adam ε; default 1e-8, and 1e-6 with fp16", 1e-15)
    ema_halflife_kimg: float = _optimizer(500.0, "half-life of the average, kimg", 0)
    ema_rampup_ratio: float = _optimizer(
        0.05, "the half-life is at most this part of the images so far; 0 for no ramp-up", 0
    )
    precision: Precision = _step("auto", PRECISION)
    batch_size: int = _step(512, "images a step, over all GPUs", 1, 2**24)
    micro_batch: int | None = _step(None, MICRO_BATCH, 1)
    dropout: float = _method(0.13, "dropout in training", 0, 0.999)
    augment_p: float = _method(0.12, "how often images are warped; 0 for never", 0, 1)


@dataclasses.dataclass
class RunOptions:
    """Where a run lives, how long it is, and how often it says and writes something."""

    out: str | None = _output(None, "run folder; default: the next number below runs/")
    kimg: float = _output(1000.0, "length of the run, thousand images", 0.001)
    seed: int = _output(0, "decides every random number of the run", 0, 2**63 - 1)
    resume: str | None = _output(
        None, "go on from a state file, a run folder, or `latest`: the newest in --out or runs/"
    )
    log_every: int = _output(50, "steps from one log line to the next", 1)
    snapshot_every: float = _output(
        500.0, "kimg from one snapshot and sample grid to the next", 0.001
    )
    state_every: float = _output(1000.0, "kimg from one full training state to the next", 0.001)
    keep_states: int = _output(2, "newest training states that are kept", 1)
    keep_snapshots: int = _output(20, "newest snapshots that are kept; sample grids all are", 1)
    device: str = _machine("auto", "auto, cpu or cuda; auto takes a GPU where there is one")
    kernels: str = _machine(
        "auto",
        "auto, eager (PyTorch), triton or cuda, and OPERATION=NAME for single operations "
        "(triton,group_norm=eager); auto is eager, and triton for random numbers on a GPU",
    )
    parallel: Parallel = _machine(
        "auto",
        "how several GPUs share the networks: ddp (whole everywhere), fsdp (in shards), hsdp "
        "(in shards inside a node, copies between nodes); auto takes ddp where memory allows",
    )
    shard_group: int | None = _machine(
        None, "GPUs that share one copy in hsdp; default: those of a node", 1
    )
    timeout: float = _machine(
        10.0, "minutes without a word from another process after which a run gives up", 0.05, 1e5
    )
    eval_every: float | None = _evaluation(
        None,
        "kimg from one evaluation of the network's images to the next; default: none. The best "
        "network is kept as best-*.safetensors",
        0.001,
    )
    eval_images: int = _evaluation(50_000, "images of an evaluation; of fewer, KID tells more", 2)
    detector: str = _evaluation(
        "inception", "feature network of an evaluation, as in python -m sid_fast.evaluate"
    )
    trust: bool = _evaluation(False, "run a detector that is not known here; it is a program")
    ref: str | None = _evaluation(
        None, "statistics of real images (.npz) to evaluate against; default: the images of --data"
    )
