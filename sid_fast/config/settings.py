"""The numbers a step depends on: of the distillation, and of a teacher's training."""

import dataclasses
from dataclasses import field
from typing import Any

from sid_fast.errors import UserError

LARGE = 1e12
PRECISION = (
    "type the network computes in: fp32, tf32, bf16 or fp16; auto is bf16 on a GPU that has it and "
    "fp32 elsewhere. Weights, averages, losses and statistics are float32 in all"
)


def option(
    default: Any, help: str, low: float | None = None, high: float = LARGE, short: str = ""
) -> Any:
    """A dataclass field that explains itself on the command line and knows its range.

    short: another name for it there, such as -n.
    """
    metadata = {"help": help, "low": low, "high": high, "short": short}
    return field(default=default, metadata=metadata)


def check(settings: Any) -> None:
    """Raise UserError, naming the field, for a value outside its range (NaN is outside any)."""
    for f in dataclasses.fields(settings):
        value, low, high = getattr(settings, f.name), f.metadata.get("low"), f.metadata.get("high")
        if low is not None and value is not None and not low <= value <= high:
            name, high = f.name.strip("_"), "10^12" if high == LARGE else high
            raise UserError(f"{name}={value} is out of range: choose from {low} to {high}")


def part(values: Any, kind: type) -> Any:
    """The fields of dataclass `kind` out of a larger dataclass that has them all."""
    return kind(**{f.name: getattr(values, f.name) for f in dataclasses.fields(kind)})


def rounds_of(settings: Any, processes: int = 1) -> int:
    """Rounds of gradient accumulation a step: batch_size / micro_batch / processes.

    Raises UserError, naming the nearest batch size that works, where they do not divide.
    """
    batch, micro = settings.batch_size, settings.micro_batch
    chunk = (micro or 1) * processes
    if batch % chunk:
        nearest = max(round(batch / chunk), 1) * chunk
        micro_text = f"micro_batch {micro} × " if micro else ""
        raise UserError(
            f"batch_size={batch} does not divide by {micro_text}{processes} process"
            f"{'es' if processes > 1 else ''}; the nearest that does is {nearest}"
        )
    return batch // chunk if micro else 1


def identity_of(settings: Any) -> dict[str, Any]:
    """The settings that a resumed run must share: not how its steps are fitted into memory."""
    return {k: v for k, v in dataclasses.asdict(settings).items() if k != "micro_batch"}


def smaller_micro_batch(settings: Any, processes: int = 1) -> int | None:
    """The largest micro-batch below the present one with which the batch divides; None below 1."""
    share = settings.batch_size // processes
    now = settings.micro_batch or share
    return next((n for n in range(now - 1, 0, -1) if share % n == 0), None)


@dataclasses.dataclass
class Settings:
    """What one step of the distillation depends on, besides the teacher."""

    alpha: float = option(1.2, "α of the generator loss, the weight of its second term", -0.5, 2)
    tmax: int = option(800, "largest t of the generator step, in thousandths", 1, 1000)
    init_sigma: float = option(2.5, "noise level at which the generator makes an image", 1e-3, 1e3)
    fake_lr: float = option(1e-5, "learning rate of the fake score", 0, 1)
    generator_lr: float = option(1e-5, "learning rate of the generator", 0, 1)
    fake_beta1: float = option(0.0, "Adam β1 of the fake score; 0 keeps no moment", 0, 0.9999)
    generator_beta1: float = option(0.0, "Adam β1 of the generator; 0 keeps no moment", 0, 0.9999)
    beta2: float = option(0.999, "Adam β2 of both", 0, 0.999999)
    eps: float | None = option(None, "Adam ε of both; default 1e-8, and 1e-6 with fp16", 1e-15)
    ema_halflife_kimg: float = option(500.0, "half-life of the generator's average, kimg", 0)
    ema_rampup_ratio: float = option(
        0.05, "the half-life is at most this part of the images so far; 0 for no ramp-up", 0
    )
    fake_loss_scale: float = option(1.0, "factor of the fake score's loss", 0)
    generator_loss_scale: float = option(100.0, "factor of the generator's loss", 0)
    precision: str = option("auto", PRECISION)
    batch_size: int = option(256, "images a step, over all processes and rounds", 1, 2**24)
    micro_batch: int | None = option(
        None, "images a round on one process, if the batch is to be made in rounds", 1
    )
    dropout: float = option(0.0, "dropout of fake score and generator in training", 0, 0.999)
    augment_p: float = option(
        0.0, "how often the fake score's images are warped; 0 for never", 0, 1
    )


@dataclasses.dataclass
class PretrainSettings:
    """What one step of a teacher's training depends on, besides network and images."""

    lr: float = option(1e-3, "learning rate of Adam", 0, 1)
    lr_rampup_kimg: float = option(10_000.0, "the learning rate rises linearly over so many", 0)
    beta1: float = option(0.9, "Adam β1", 0, 0.9999)
    beta2: float = option(0.999, "Adam β2", 0, 0.999999)
    eps: float | None = option(None, "Adam ε; default 1e-8, and 1e-6 with fp16", 1e-15)
    ema_halflife_kimg: float = option(500.0, "half-life of the average, kimg", 0)
    ema_rampup_ratio: float = option(
        0.05, "the half-life is at most this part of the images so far; 0 for no ramp-up", 0
    )
    precision: str = option("auto", PRECISION)
    batch_size: int = option(512, "images a step, over all processes and rounds", 1, 2**24)
    micro_batch: int | None = option(
        None, "images a round on one process, if the batch is to be made in rounds", 1
    )
    dropout: float = option(0.13, "dropout in training", 0, 0.999)
    augment_p: float = option(0.12, "how often images are warped; 0 for never", 0, 1)


@dataclasses.dataclass
class RunOptions:
    """Where a run lives, how long it is, and how often it says and writes something."""

    out: str | None = option(None, "run folder; default: the next number below runs/")
    kimg: float = option(1000.0, "length of the run, thousand images", 0.001)
    seed: int = option(0, "decides every random number of the run", 0, 2**63 - 1)
    device: str = option("auto", "auto, cpu or cuda; auto takes a GPU where there is one")
    kernels: str = option(
        "auto",
        "auto, reference (PyTorch), triton or cuda, and OPERATION=NAME for single operations "
        "(triton,group_norm=reference); auto is what is proven on the device",
    )
    parallel: str = option(
        "auto",
        "how several processes share the networks: ddp (whole everywhere), fsdp (in parts), hsdp "
        "(in parts inside a node, copies between nodes); auto takes ddp where memory allows",
    )
    shard_group: int | None = option(
        None, "processes that share one copy in hsdp; default: those of a node", 1
    )
    timeout: float = option(
        10.0, "minutes without a word from another process after which a run gives up", 0.05, 1e5
    )
    log_every: int = option(50, "steps from one log line to the next", 1)
    snapshot_every: float = option(
        500.0, "kimg from one snapshot and sample grid to the next", 0.001
    )
    state_every: float = option(1000.0, "kimg from one full training state to the next", 0.001)
    keep_states: int = option(2, "newest training states that are kept", 1)
    keep_snapshots: int = option(20, "newest snapshots that are kept; sample grids all are", 1)
    resume: str | None = option(
        None, "go on from a state file, a run folder, or `latest`: the newest in --out or runs/"
    )
    eval_every: float | None = option(
        None,
        "kimg from one evaluation of the network's images to the next; default: none. The best "
        "network is kept as best-*.safetensors",
        0.001,
    )
    eval_images: int = option(50_000, "images of an evaluation; of fewer, KID tells more", 2)
    detector: str = option(
        "inception", "feature network of an evaluation, as in python -m sid_fast.evaluate"
    )
    trust: bool = option(False, "run a detector that is not known here; it is a program")
    ref: str | None = option(
        None, "statistics of real images (.npz) to evaluate against; default: the images of --data"
    )
