"""Dataclasses of settings: each field has a help text, a range or choices, and a --help heading."""

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
ForcedNormalization = Literal["auto", "both", "generator", "none", "upstream"]
Tune = Literal["auto", "off", "again"]
Card = Literal["rtx4090", "a100", "h100", "h200"]
Architecture = Literal["ddpmpp", "ncsnpp", "adm", "edm2"]
Distillation = Literal["sid", "sida", "sid2a"]
Sink = Literal["tensorboard", "wandb"]


def option(
    default: Any,
    help: str,
    low: float | None = None,
    high: float = LARGE,
    *,
    short: str = "",
    heading: str = "Options",
) -> Any:
    """A dataclass field with its command-line help text and its range.

    Args:
        default: value where neither the command line nor a preset gives one.
        help: text for --help.
        low: smallest allowed value; None: no range check.
        high: largest allowed value.
        short: an additional short option name, such as -n.
        heading: the --help section that lists the option.
    """
    metadata = {"help": help, "low": low, "high": high, "short": short, "heading": heading}
    return field(default=default, metadata=metadata)


def members(hint: Any) -> tuple[tuple[str, ...], tuple[type, ...]]:
    """Split a type hint into its literal values and its other types, None left out."""
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint), ()
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        values, kinds = zip(*map(members, typing.get_args(hint)), strict=True)
        return sum(values, ()), sum(kinds, ())
    return (), () if hint is type(None) else (hint,)


def check(settings: Any) -> None:
    """Raise UserError, naming the field, for a value outside its range or choices, or NaN."""
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
    """Build dataclass `kind` from the fields of a larger dataclass that contains them all."""
    return kind(**{f.name: getattr(values, f.name) for f in dataclasses.fields(kind)})


def grad_accum_steps(settings: Any, ranks: int = 1) -> int:
    """Micro-batches per step and rank: batch_size / micro_batch / ranks; 1 without a micro_batch.

    Raises:
        UserError: batch_size does not divide evenly; the message names the nearest one that does.
    """
    batch, micro = settings.batch_size, settings.micro_batch
    chunk = (micro or 1) * ranks
    if batch % chunk:
        nearest = max(round(batch / chunk), 1) * chunk
        micro_text = f"micro_batch {micro} × " if micro else ""
        raise UserError(
            f"batch_size={batch} is not a multiple of {micro_text}{ranks} process"
            f"{'es' if ranks > 1 else ''}; the nearest multiple is {nearest}"
        )
    _check_groups(settings, ranks)
    return batch // chunk if micro else 1


def _check_groups(settings: Any, ranks: int) -> None:
    """Raise UserError, naming the nearest that works, if a micro-batch would cut a group."""
    group, share = group_size(settings), settings.batch_size // ranks
    micro = settings.micro_batch or share
    if micro % group == 0:
        return
    whole = micro_batches(settings, ranks)
    if whole:
        nearest = min(whole, key=lambda n: (abs(n - micro), n))
        raise UserError(
            f"micro_batch={micro} cuts groups of adversarial_group={group} images; the "
            f"nearest that does not is {nearest}"
        )
    fits = [r for r in range(1, ranks) if settings.batch_size % (r * group) == 0]
    way = f"at most {fits[-1]} process{'es' * (fits[-1] > 1)} can share it, and " if fits else ""
    nearest = min(divisors(micro), key=lambda n: (abs(n - group), n))
    raise UserError(
        f"adversarial_group={group} does not divide {share} images a process (batch_size="
        f"{settings.batch_size} on {ranks}): {way}the nearest group that does is {nearest}"
    )


def group_size(settings: Any) -> int:
    """Consecutive samples that must share a micro-batch (SiDA); 1 if samples are independent."""
    return getattr(settings, "adversarial_group", 1)


def ema_stds(settings: Any) -> tuple[float, ...]:
    """Widths of a teacher's power-function EMAs, the widest first; none: an EMA with a half-life.

    The widest is the one of sample grids and evaluations.
    """
    return tuple(sorted(getattr(settings, "ema_std", ()), reverse=True))


# Options of one start of a run: neither config.json nor states hold them.
START_OPTIONS = frozenset({"log_to", "max_hours", "profile"})


def recorded(options: Any) -> dict[str, Any]:
    """The options that config.json and states hold: all but START_OPTIONS."""
    return {k: v for k, v in dataclasses.asdict(options).items() if k not in START_OPTIONS}


# A resumed run may change these.
RATES = ("lr", "fake_lr", "generator_lr", "ema_halflife_kimg")


def resume_fingerprint(settings: Any) -> dict[str, Any]:
    """The settings that a resumed run must share with its checkpoint, except RATES."""
    return {k: v for k, v in dataclasses.asdict(settings).items() if k != "micro_batch"}


def divisors(n: int) -> list[int]:
    """All divisors of n, largest first."""
    return [n // d for d in range(1, n + 1) if n % d == 0]


def micro_batches(settings: Any, ranks: int = 1) -> list[int]:
    """All micro-batches that divide each rank's batch and hold whole groups, largest first."""
    group = group_size(settings)
    return [n for n in divisors(settings.batch_size // ranks) if n % group == 0]


def smaller_micro_batch(settings: Any, ranks: int = 1) -> int | None:
    """The next smaller of `micro_batches`; None if there is none."""
    current = settings.micro_batch or settings.batch_size // ranks
    return next((n for n in micro_batches(settings, ranks) if n < current), None)


PRECISION = (
    "precision of the networks' arithmetic; auto: bf16 on GPUs that support it, fp32 elsewhere. "
    "Master weights, EMA, losses and statistics are always float32"
)
MICRO_BATCH = (
    "images per forward pass on each GPU, with gradient accumulation; default: the whole batch at "
    "once"
)

VAE = (
    "VAE that decodes the latents of an EDM2 network: a diffusers folder, or a .safetensors file "
    "with its config.json beside it, such as those of stabilityai/sd-vae-ft-mse"
)

_method = partial(option, heading="Method")
_sida = partial(option, heading="SiDA")
_optimizer = partial(option, heading="Optimizer and EMA")
_edm2 = partial(option, heading="EDM2 teachers")
_step = partial(option, heading="Batch and precision")
_output = partial(option, heading="Run and output")
_evaluation = partial(option, heading="Evaluation during the run")
_machine = partial(option, heading="Machine")
_network = partial(option, heading="Network")


@dataclasses.dataclass
class Settings:
    """Hyper-parameters of a distillation step."""

    alpha: float = _method(1.2, "α, weight of the generator loss's second term", -0.5, 2)
    tmax: int = _method(
        800, "largest t of the generator step's noise, in thousandths; 1000: σ = 80", 1, 1000
    )
    init_sigma: float = _method(2.5, "σ of the generator's input noise", 1e-3, 1e3)
    fake_lr: float = _optimizer(1e-5, "learning rate of the fake score", 0, 1)
    generator_lr: float = _optimizer(1e-5, "learning rate of the generator", 0, 1)
    fake_beta1: float = _optimizer(
        0.0, "Adam β1 of the fake score; 0: no first moment is stored", 0, 0.9999
    )
    generator_beta1: float = _optimizer(
        0.0, "Adam β1 of the generator; 0: no first moment is stored", 0, 0.9999
    )
    beta2: float = _optimizer(0.999, "Adam β2 of both networks", 0, 0.999999)
    eps: float | None = _optimizer(
        None, "Adam ε of both networks; default: 1e-8, with fp16 1e-6", 1e-15
    )
    ema_halflife_kimg: float = _optimizer(500.0, "half-life of the generator's EMA, kimg", 0)
    ema_rampup_ratio: float = _optimizer(
        0.05, "caps the EMA half-life at this fraction of the images seen; 0: no ramp-up", 0
    )
    fake_loss_scale: float = _method(1.0, "factor on the fake score's loss", 0)
    generator_loss_scale: float = _method(100.0, "factor on the generator's loss", 0)
    precision: Precision = _step("auto", PRECISION)
    batch_size: int = _step(256, "images per step, over all GPUs", 1, 2**24)
    micro_batch: int | None = _step(None, MICRO_BATCH, 1)
    dropout: float = _method(0.0, "dropout probability of fake score and generator", 0, 0.999)
    augment_p: float = _method(
        0.0, "augmentation probability of the fake score's images; 0: none", 0, 1
    )
    p_mean: float | None = _method(
        None,
        "mean of ln σ in the fake score's step; default: that of the teacher's training: -1.2, of "
        "EDM2 -0.4 on latents and -0.8 on pixels",
        -20,
        20,
    )
    p_std: float | None = _method(
        None,
        "standard deviation of ln σ in the fake score's step; default: that of the teacher's "
        "training: 1.2, of EDM2 1.0 on latents and 1.6 on pixels",
        0,
        20,
    )
    log_variance: Switch = _edm2(
        "auto",
        "train the fake score's log-variance head, and divide the losses by the variance; auto: if "
        "the teacher has such a head",
    )
    forced_normalization: ForcedNormalization = _edm2(
        "auto",
        "networks whose weights are normalised after each update, which keeps their effective "
        "learning rate. auto: both with SiD, the generator with SiDA, as published. upstream: as "
        "auto, and with SiDA the EMA too, each time it is sampled or evaluated",
    )


@dataclasses.dataclass
class SiDASettings(Settings):
    """Settings of SiDA: SiD with real images and an adversarial term."""

    alpha: float = _method(1.0, "α, weight of the generator loss's second term", -0.5, 2)
    discriminator_loss_scale: float = _sida(1.0, "factor on the discriminator's loss", 0)
    adversarial_loss_scale: float = _sida(
        0.01,
        "factor on the generator's adversarial loss, on top of the number of values in an image",
        0,
    )
    adversarial_group: int = _sida(
        32, "images that share the mean of an adversarial loss; divides the micro-batch", 1
    )
    generator_start_kimg: float = _sida(
        100.0, "kimg before the generator learns; until then only the fake score does", 0
    )
    adversarial_start_kimg: float = _sida(
        200.0, "kimg before the generator's loss includes the adversarial one", 0
    )
    fake_grad_clip: float | None = _sida(
        1.0, "clips each value of the fake score's gradient to ± this", 1e-12
    )


@dataclasses.dataclass
class StepOptions:
    """Options for how a step is executed; they change its numbers only by rounding."""

    # run() replaces "auto" by a number before it builds Settings.
    micro_batch: int | Literal["auto"] | None = option(
        "auto",
        "images per forward pass on each GPU, with gradient accumulation; auto: the largest that "
        "fits in GPU memory; on a CPU the whole batch at once",
        1,
        heading="Batch and precision",
    )
    cuda_graph: Switch = option(
        "auto",
        "run steps and evaluations as CUDA graphs. auto: test capture on a small network first, "
        "and run without graphs, with a note, if that fails or the networks are sharded (fsdp, "
        "hsdp). on: fail if graphs cannot be used",
        heading="Machine",
    )
    compile: bool = option(
        False,
        "compile every network block with torch.compile; the first steps take minutes",
        heading="Machine",
    )
    checkpoint_activations: bool = option(
        False,
        "store only each block's input and recompute the block in backward: less memory, about a "
        "third more work",
        heading="Machine",
    )
    tune_minutes: float | None = option(
        None,
        "budget of tuning, in minutes without compilation; default: 1 % of the run, at least 2 (on "
        "a CPU 0.75) and at most 10",
        0.01,
        1e4,
        heading="Machine",
    )


@dataclasses.dataclass
class MethodOptions(SiDASettings):
    """Settings of any distillation method, as command-line options."""

    method: Distillation = _method(
        "sid",
        "sid: needs no images. sida: SiDA trains on the real images of --data too, with an "
        "adversarial loss, and needs 2 to 4 times fewer images for 8 % more work each. sid2a: SiDA "
        "that starts from a SiD generator (--generator)",
    )
    alpha: float = _method(
        None,  # __post_init__ replaces it by the method's
        "α, weight of the generator loss's second term; default: 1.2 with --method sid, else 1.0",
        -0.5,
        2,
    )

    def __post_init__(self) -> None:
        """Fill in the method's own α."""
        if self.alpha is None:
            self.alpha = self._kind().alpha

    def settings(self) -> Settings:
        """Build the settings of the chosen method."""
        return part(self, self._kind())

    def _kind(self) -> type[Settings]:
        return Settings if self.method == "sid" else SiDASettings


def check_method(options: MethodOptions, given: set[str]) -> None:
    """Raise UserError if the command line set (`given`) an option that the method does not have."""
    if options.method != "sid":
        return
    for f in dataclasses.fields(options):
        if f.name in given and f.metadata.get("heading") == "SiDA":
            raise UserError(
                f"{f.name}={getattr(options, f.name)} is an option of SiDA: add --method sida, or "
                "leave it out"
            )


@dataclasses.dataclass
class PretrainSettings:
    """Hyper-parameters of a training step of a teacher."""

    lr: float = _optimizer(1e-3, "Adam learning rate", 0, 1)
    lr_rampup_kimg: float = _optimizer(10_000.0, "kimg of linear learning-rate warm-up", 0)
    lr_decay_batches: float = _optimizer(
        0.0, "the learning rate falls with 1/√steps after so many steps; 0: it stays constant", 0
    )
    beta1: float = _optimizer(0.9, "Adam β1", 0, 0.9999)
    beta2: float = _optimizer(0.999, "Adam β2", 0, 0.999999)
    eps: float | None = _optimizer(None, "Adam ε; default: 1e-8, with fp16 1e-6", 1e-15)
    ema_halflife_kimg: float = _optimizer(500.0, "half-life of the EMA, kimg", 0)
    ema_rampup_ratio: float = _optimizer(
        0.05, "caps the EMA half-life at this fraction of the images seen; 0: no ramp-up", 0
    )
    ema_std: tuple[float, ...] = _optimizer(
        (),
        "widths of power-function EMAs, such as 0.05,0.1, as fractions of the images seen, in "
        "place of an EMA with a half-life",
    )
    precision: Precision = _step("auto", PRECISION)
    batch_size: int = _step(512, "images per step, over all GPUs", 1, 2**24)
    micro_batch: int | None = _step(None, MICRO_BATCH, 1)
    dropout: float = _method(0.13, "dropout probability", 0, 0.999)
    augment_p: float = _method(0.12, "augmentation probability of the images; 0: none", 0, 1)
    p_mean: float | None = _method(
        None, "mean of ln σ; default: -1.2, of edm2 -0.4 on latents and -0.8 on pixels", -20, 20
    )
    p_std: float | None = _method(
        None,
        "standard deviation of ln σ; default: 1.2, of edm2 1.0 on latents and 1.6 on pixels",
        0,
        20,
    )


@dataclasses.dataclass
class NetworkOptions:
    """A teacher's architecture, as far as its images do not decide it."""

    architecture: Architecture = _network("ddpmpp", "network architecture")
    model_channels: int = _network(128, "base number of channels", 1)
    channel_mult: tuple[int, ...] = _network(
        (2, 2, 2), "channels of each resolution level, as multiples of --model-channels"
    )
    num_blocks: int = _network(4, "residual blocks per resolution level", 1)
    attention_resolutions: tuple[int, ...] = _network(
        (16,), "resolutions (pixels) with self-attention"
    )


# EDM2's own, where they differ from those of EDM.
EDM2_DEFAULTS: dict[str, Any] = {
    "channel_mult": (1, 2, 3, 4),
    "num_blocks": 3,
    "attention_resolutions": (16, 8),
    "lr_decay_batches": 35_000.0,
    "beta2": 0.99,
    "ema_std": (0.05, 0.1),
    "batch_size": 2048,
    "augment_p": 0.0,
}


@dataclasses.dataclass
class TeacherOptions(NetworkOptions, PretrainSettings):
    """A teacher's network and training settings, as command-line options.

    Some have another default with --architecture edm2: EDM2_DEFAULTS.
    """

    # __post_init__ replaces each None by the default of the architecture.
    channel_mult: tuple[int, ...] = _network(
        None,
        "channels of each resolution level, as multiples of --model-channels; default: 2,2,2, with "
        "edm2 1,2,3,4",
    )
    num_blocks: int = _network(
        None, "residual blocks per resolution level; default: 4, with edm2 3", 1
    )
    attention_resolutions: tuple[int, ...] = _network(
        None, "resolutions (pixels) with self-attention; default: 16, with edm2 16,8"
    )
    lr: float = _optimizer(
        None,
        "Adam learning rate; default: 1e-3, with edm2 0.012·√(128/model_channels), within 6 % of "
        "the published sizes'",
        0,
        1,
    )
    lr_decay_batches: float = _optimizer(
        None,
        "the learning rate falls with 1/√steps after so many steps; 0: it stays constant; default: "
        "0, with edm2 35,000 (70,000 for latents of ImageNet-512)",
        0,
    )
    beta2: float = _optimizer(None, "Adam β2; default: 0.999, with edm2 0.99", 0, 0.999999)
    ema_std: tuple[float, ...] = _optimizer(
        None,
        "widths of power-function EMAs, as fractions of the images seen, in place of an EMA with a "
        "half-life. Each is saved in snapshots; python -m sid_fast.ema makes one of any width from "
        "them; sample grids and evaluations are of the widest. Default: none, with edm2 0.05,0.1",
    )
    batch_size: int = _step(
        None, "images per step, over all GPUs; default: 512, with edm2 2048", 1, 2**24
    )
    dropout: float = _method(
        None,
        "dropout probability; default: 0.13, with edm2 0 (0.1 from --model-channels 256 on)",
        0,
        0.999,
    )
    augment_p: float = _method(
        None,
        "augmentation probability of the images; 0: none; default: 0.12, with edm2 0, as its "
        "networks take no augmentation labels",
        0,
        1,
    )

    def __post_init__(self) -> None:
        """Fill in the defaults of the architecture."""
        defaults = vars(NetworkOptions()) | vars(PretrainSettings())
        if self.architecture == "edm2":
            defaults |= EDM2_DEFAULTS
            defaults["lr"] = 0.012 * (128 / self.model_channels) ** 0.5
            defaults["dropout"] = 0.1 if self.model_channels >= 256 else 0.0
        for f in dataclasses.fields(TeacherOptions):
            if f.default is None and getattr(self, f.name) is None:
                setattr(self, f.name, defaults[f.name])


@dataclasses.dataclass
class RunOptions:
    """Options of a training run: folder, length, logging, checkpoints, evaluation, hardware."""

    out: str | None = _output(None, "run folder; default: a new numbered folder in runs/")
    kimg: float = _output(1000.0, "length of the run in thousands of images (kimg)", 0.001)
    seed: int = _output(0, "seed of every random number in the run", 0, 2**63 - 1)
    resume: str | None = _output(
        None,
        "continue from a checkpoint folder (state-*), a run folder, or `latest`: the newest "
        "checkpoint in --out or runs/. Options that are not given keep their saved values. "
        "Learning rates and --ema-halflife-kimg may change",
    )
    log_every: int = _output(
        50, "steps between log lines; log.jsonl stays below 64 MiB, tensorboard/ below 256", 1
    )
    snapshot_every: float = _output(
        500.0, "kimg between snapshots of the EMA network, each with a sample grid", 0.001
    )
    state_every: float = _output(1000.0, "kimg between checkpoints (full training states)", 0.001)
    keep_states: int = _output(
        2, "number of newest checkpoints to keep; the one with the most steps is kept as well", 1
    )
    keep_snapshots: int = _output(
        20,
        "number of newest snapshots to keep. Of more power-function EMAs every second one is "
        "removed, so that the whole run is covered, and of more than 200 sample grids too",
        1,
    )
    log_to: Sink = _output(
        "tensorboard",
        "where curves go: tensorboard (a folder of the run), or wandb: Weights & Biases as well "
        "(pip install wandb; WANDB_MODE=offline keeps them on this machine)",
    )
    vae: str | None = _output(
        None,
        f"{VAE}. A run on latents without it shows a preview in its sample grids, a linear map of "
        "the latents to colours, and cannot use --eval-every",
    )
    max_hours: float | None = _output(
        None,
        "hours since the start of the process after which a state is complete and the run has left "
        "with exit status 75; --resume continues it",
        1e-4,
        1e5,
    )
    profile: bool = _output(
        False,
        "trace some steps after the warm-up with torch.profiler, into profile/ of the run folder; "
        "the phases of every step become NVTX ranges",
    )
    device: str = _machine("auto", "auto, cpu or cuda; auto: a GPU if there is one")
    kernels: str = _machine(
        "auto",
        "kernel backend: auto, eager (PyTorch), triton or cuda; OPERATION=BACKEND overrides it for "
        "one operation (triton,group_norm=eager). auto: on a GPU triton for the group norm, the "
        "losses, random numbers and Adam, else eager; on a CPU eager, with Adam in C++",
    )
    deterministic: bool = _machine(
        False,
        "make a GPU run bit-exact, across kill -9 and --resume too, with slower algorithms; a CPU "
        "run always is",
    )
    parallel: Parallel = _machine(
        "auto",
        "layout over several GPUs: ddp (a full replica on each), fsdp (sharded over all), hsdp "
        "(sharded within a node, replicated across nodes). auto: ddp if the training state fits in "
        "half the GPU memory, else fsdp, or hsdp on several nodes",
    )
    shard_group: int | None = _machine(
        None, "GPUs per replica in hsdp; default: the GPUs of one node", 1
    )
    tune: Tune = _machine(
        "auto",
        "tune the training step on this GPU: use the fastest numerically correct candidate. auto: "
        "use a cached result, else tune if the run is at least 20 times the budget; again: always "
        "tune anew; off: keep the defaults",
    )
    timeout: float = _machine(
        10.0, "minutes to wait for another process before the run stops with an error", 0.05, 1e5
    )
    eval_every: float | None = _evaluation(
        None,
        "kimg between evaluations of the EMA network; default: no evaluation. The best network is "
        "saved as best-*.safetensors",
        0.001,
    )
    eval_images: int = _evaluation(
        50_000,
        "generated images per evaluation; below 50,000 KID is logged too, as FID is then biased",
        2,
        10**8,
    )
    detector: str = _evaluation(
        "inception", "feature network; see --detector of python -m sid_fast.evaluate"
    )
    trust: bool = _evaluation(
        False, "run a --detector file whose sha256 is unknown; its code runs on this machine"
    )
    ref: str | None = _evaluation(
        None, "statistics of real images (.npz) to compare with; default: the images of --data"
    )
