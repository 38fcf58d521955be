"""Distil an EDM or EDM2 teacher into a one-step generator with SiD or, on real images too, SiDA.

python -m sid_fast.train --preset digits
python -m sid_fast.train --preset cifar10-uncond-sida --data cifar10.zip
"""

import contextlib
import dataclasses
from functools import partial
from pathlib import Path

import torch

from sid_fast import cli, kernels
from sid_fast.config.types import (
    MethodOptions,
    RunOptions,
    StepOptions,
    check,
    check_method,
    grad_accum_steps,
    option,
)
from sid_fast.data.datasets import Dataset
from sid_fast.data.digits import open_dataset
from sid_fast.data.latents import require_kind
from sid_fast.distiller import Distiller, data_free_method
from sid_fast.errors import UserError
from sid_fast.evaluation import decoding
from sid_fast.io import invocation, progress
from sid_fast.methods.sida import check_generator, check_images
from sid_fast.models import Network, NetworkConfig
from sid_fast.models.families import build_network
from sid_fast.models.registry import load_generator, load_teacher, network_config
from sid_fast.performance import fsdp, mixed_precision, process_group
from sid_fast.performance.activation_checkpoint import checkpoint_activations
from sid_fast.sampling import one_step
from sid_fast.tools import autotune, estimator, graph_trial, host_load, host_memory, micro_batch
from sid_fast.training import sinks
from sid_fast.training.callbacks import Evaluations, Snapshots, require_reference
from sid_fast.training.checkpoint import read_header
from sid_fast.training.loop import Loop, refuse_other_run, start_options


@dataclasses.dataclass
class TrainConfig(RunOptions, StepOptions, MethodOptions):  # type: ignore[misc]  # micro_batch
    """Options of `python -m sid_fast.train`."""

    preset: str | None = None
    teacher: str | None = option(
        None,
        "network to distil: an EDM pickle (.pkl), a .safetensors snapshot, a run folder (its "
        "newest snapshot), an https URL, or the name of a published teacher such as cifar10-cond",
        heading="Teacher and data",
    )
    data: str | None = option(
        None,
        "EDM data set: zip or folder of PNGs, or of .npy latents for a teacher that makes latents. "
        "Its class frequencies weight the sampled labels (default: uniform over the classes that "
        "the teacher was trained on) and its images, not latents, are the reference for "
        "--eval-every. SiDA trains on it, SiD never does",
        heading="Teacher and data",
    )
    generator: str | None = option(
        None,
        "network that generator and EMA start from, instead of the teacher: the folder of a SiD "
        "run (its best network, else its newest snapshot) or a file",
        heading="SiDA",
    )
    teacher_steps: int = option(
        18,
        "sampler steps for the one evaluation of the teacher, as a baseline; 0: no baseline",
        0,
        1000,
        heading="Evaluation during the run",
    )


def run(config: TrainConfig, given: set[str]) -> None:
    """Distil the teacher; `given` names the fields that the command line set."""
    auto = config.micro_batch == "auto"
    if auto:  # a resumed run first tries its saved micro-batch
        config.micro_batch, given = None, given - {"micro_batch"}
    resume = cli.resume(config, given)
    check(config)
    refuse_other_run(config.out, resume)
    sinks.require(config.log_to)
    cli.refuse_idle_run_options(config, given)
    check_method(config, given)
    if not config.teacher:
        raise UserError("teacher is missing: give --teacher FILE or --preset NAME")
    check_sida(config, resume)
    if config.eval_every and not (config.data or config.ref):
        raise UserError(
            f"eval_every={config.eval_every} needs a reference: give real images as --data, or "
            "their statistics as --ref"
        )
    device = process_group.named_device(config.device)
    kernels.dispatch.configure(config.kernels, device, config.deterministic)
    data = open_dataset(config.data) if config.data else None
    require_reference(config, data)
    # In child processes, before CUDA starts.
    tuning = autotune.for_run(
        config, given, config.settings(), partial(network_config, config.teacher), device, resume,
        auto,
    )  # fmt: skip
    device = process_group.pick_device(config.device, config.deterministic)
    choice = tuning.candidate
    if choice:
        choice.apply(config.kernels, device)
        config.micro_batch = choice.micro_batch or config.micro_batch
    with process_group.joined(device, config.parallel, config.timeout):
        auto &= not (choice and choice.micro_batch)
        if auto and resume and read_header(resume)["processes"] != process_group.world_size():
            config.micro_batch = None
        grad_accum_steps(config.settings(), process_group.world_size())
        loading = progress.phase(f"loading {config.teacher}")
        with process_group.main_process_first(), loading:  # may download
            teacher = load_teacher(config.teacher)
            generator = None
            if config.generator and not resume:
                generator = open_generator(config, given, teacher.config)
        if data and config.method == "sid":
            check_data(data, teacher.config)
        elif data:
            check_images(data, teacher.config)
        if data and teacher.config.label_dim:  # what is drawn here is drawn of the generator later
            teacher.config = teacher.config.with_classes(data.classes)
        network = teacher.config
        decoder = decoding.make_decoder(network, config.vae, device, config.teacher)
        if config.eval_every:
            decoding.require_images(decoder, config.teacher)
        estimator.require_host_memory(network, config, device)
        state = estimator.StateMemory(
            lambda settings: data_free_method(build_network(network), settings),
            mixed_precision.resolve_precision(config.settings(), device),
            kernels.dispatch.runs(device),
        )
        sharding = fsdp.plan(config.parallel, device, state.nbytes, config.shard_group)
        if device.type == "cuda":
            fed = None if config.method == "sid" else data
            upper = micro_batch.estimated(network, config, config.settings(), device, sharding, fed)
        teacher = teacher.to(device)
        if auto and device.type == "cuda":
            with progress.phase("finding the largest micro-batch"):
                config.micro_batch = micro_batch.that_fits(
                    teacher, config, config.settings(), upper, sharding
                )
        settings = config.settings()
        mode, graphs, note = graph_trial.choose(
            config.cuda_graph, choice, network, settings, device, sharding.mesh is not None,
            config.deterministic,
        )  # fmt: skip
        compile = config.compile or bool(choice and choice.compile)
        with progress.phase("building the networks"):
            trainer = Distiller(
                teacher,
                settings,
                config.seed,
                label_weights(data, teacher.config),
                sharding,
                data=None if config.method == "sid" else data,
                generator=generator,
                cuda_graph=graphs,
                compile=compile,
                channels_last=choice.channels_last if choice else None,
            )
        if config.checkpoint_activations:
            checkpoint_activations(trainer.teacher, trainer.generator, trainer.fake_score)
        teacher = trainer.teacher

        snapshots = Snapshots(
            config,
            trainer,
            trainer.emas,
            partial(one_step, init_sigma=settings.init_sigma),
            decoder,
        )
        evaluations = None
        if config.eval_every:
            host_memory.require_features(decoder.shape, config.eval_images, config.detector)
            evaluations = Evaluations(
                config,
                trainer,
                trainer.ema,
                data,
                teacher=teacher if config.teacher_steps else None,
                teacher_steps=config.teacher_steps,
                cuda_graph=mode,
                decoder=decoder,
            )
        described = kernels.dispatch.report(device)
        where = (
            f"on {device} in {trainer.settings.precision}, kernels: {described}"
            f"{', CUDA graphs' * bool(graphs)}{', torch.compile' * compile}, {sharding.text}"
        )
        feed = trainer.method.feed
        trained_on = f" with SiDA on {len(feed.dataset):,} images {feed.text}" if feed else ""
        headline = f"distilling {config.teacher} ({teacher.config}){trained_on}\n  {where}"
        headline += tuning.text and f", {tuning.text}"
        notes = note, host_load.advice(device), too_short(config), *tuning.notes
        headline += "".join(f"\nnote: {line}" for line in notes if line)
        if decoder.is_preview:
            headline += "\nnote: sample grids show a preview of the latents: give --vae for images"
        if data and data.labels is None and teacher.config.label_dim:
            headline += f"\nnote: {data.path} has no labels: classes are sampled uniformly"
        name = config.preset or "distil"
        extra = {"tuning": tuning.to_json(), "changed": cli.changed_options(config, "train")}
        with contextlib.closing(feed) if feed else contextlib.nullcontext():
            loop = Loop(trainer, config, snapshots, name, headline, evaluations, extra)
            if loop.run(resume) and process_group.rank() == 0:
                latent = network.is_latent
                invocation.suggest(*next_commands(config, loop.folder, latent))


def too_short(config: TrainConfig) -> str:
    """Return a note on what a run with SiDA is too short for; empty if for nothing."""
    if config.method == "sid":
        return ""
    for name, what in (
        ("generator_start_kimg", "the generator learns"),
        ("adversarial_start_kimg", "the generator's loss includes the adversarial one"),
    ):
        if config.kimg <= getattr(config, name):
            start = f"{cli.flag(name)} {getattr(config, name):g}"
            return f"the run ends at {config.kimg:g} kimg, before {what} ({start})"
    return ""


def next_commands(config: TrainConfig, folder: Path, latent: bool) -> list[str]:
    """What to type after a run in a folder: look at images, measure them, train on."""
    vae = ("--vae", config.vae or "VAE") if latent else ()
    pixels: tuple[object, ...] = ()
    if config.detector != "inception":  # comparable with the run's own evaluations
        pixels = "--detector", config.detector, "-n", config.eval_images
    images = config.data and not latent
    reference = ("--data", config.data) if images else ("--ref", config.ref or "STATS.npz")
    network = "--network", folder, *vae
    longer = "--resume", folder, "--kimg", f"{2 * config.kimg:g}", *start_options(config)
    return [
        invocation.command_line("generate", *network, "--seeds", "0-63", "--grid", "images.png"),
        invocation.command_line("evaluate", *network, *reference, *pixels),
        invocation.command_line("train", *longer),
    ]


def check_sida(config: TrainConfig, resume: Path | None) -> None:
    """Raise UserError if the run to resume has another method or generator, or SiDA lacks data."""
    if resume:
        saved = read_header(resume)["options"]
        method, generator = saved.get("method", "sid"), saved.get("generator")
        if config.method != method:
            raise UserError(
                f"{resume} was written with method={method}, not {config.method}: start a new run; "
                f"--method sid2a --generator {resume.parent} continues from its generator"
            )
        if config.generator != generator:
            raise UserError(
                f"{resume} was written with generator={generator}, not {config.generator}: start a "
                "new run, or leave out --generator"
            )
    if config.method != "sid" and not config.data:
        raise UserError(
            f"data is missing: --method {config.method} trains on real images; give the teacher's "
            "data set as --data IMAGES.zip"
        )
    if config.method == "sid2a" and not config.generator:
        raise UserError(
            "generator is missing: --method sid2a starts from a SiD run; give --generator RUN"
        )


def open_generator(config: TrainConfig, given: set[str], teacher: NetworkConfig) -> Network:
    """Load --generator and take its init_sigma, unless the command line sets another.

    Raises:
        UserError: it has another architecture than the teacher, or another init_sigma.
    """
    assert config.generator
    generator = load_generator(config.generator)
    if generator.config.init_sigma is not None and "init_sigma" not in given:
        config.init_sigma = generator.config.init_sigma
    wanted = dataclasses.replace(teacher, init_sigma=config.init_sigma)
    check_generator(generator.config, wanted, config.generator)
    return generator


def check_data(data: Dataset, network: NetworkConfig) -> None:
    """Raise UserError if the data set does not match the teacher's images and classes."""
    way = "give the teacher's own data set, or leave out --data"
    require_kind(data, network.is_latent, "the teacher", way)
    for name in ("resolution", "channels"):
        if getattr(data, name) != getattr(network, name):
            raise UserError(
                f"{data.path} has {name} {getattr(data, name)}, the teacher has {name} "
                f"{getattr(network, name)}: {way}"
            )
    if data.label_dim > network.label_dim:
        raise UserError(
            f"{data.path} has {data.label_dim} classes, the teacher has {network.label_dim}: {way}"
        )


def label_weights(data: Dataset | None, network: NetworkConfig) -> torch.Tensor | None:
    """Count each class in the data, float32 [label_dim]; None: sample classes uniformly."""
    if data is None or data.labels is None or not network.label_dim:
        return None
    return torch.bincount(torch.from_numpy(data.labels), minlength=network.label_dim).float()


PLAN_OPTIONS = ("plan", "gpus", "card", "memory", "tflops", "mfu", "link")
MOVED = dict.fromkeys(PLAN_OPTIONS, "sid_fast.plan")
main = cli.command(TrainConfig, run, "train", __doc__, MOVED)

if __name__ == "__main__":
    cli.main(main, "sid_fast.train")
