"""Train an EDM or EDM2 teacher on your own images.

python -m sid_fast.pretrain --data images.zip --out runs/teacher
"""

import contextlib
import dataclasses
from functools import partial
from pathlib import Path

import torch

from sid_fast import cli, kernels
from sid_fast.config.types import (
    PretrainSettings,
    RunOptions,
    StepOptions,
    TeacherOptions,
    check,
    ema_stds,
    grad_accum_steps,
    option,
    part,
)
from sid_fast.data.digits import open_dataset
from sid_fast.data.feed import ImageFeed
from sid_fast.errors import UserError
from sid_fast.evaluation import decoding
from sid_fast.io import invocation, progress
from sid_fast.methods.edm import EDM, teacher_config
from sid_fast.models.families import build_network
from sid_fast.performance import fsdp, mixed_precision, process_group
from sid_fast.performance.activation_checkpoint import checkpoint_activations
from sid_fast.sampling import heun
from sid_fast.tools import autotune, estimator, graph_trial, host_load, host_memory, micro_batch
from sid_fast.training import power_ema, sinks
from sid_fast.training.callbacks import Evaluations, Snapshots, require_reference
from sid_fast.training.checkpoint import read_header
from sid_fast.training.loop import Loop, refuse_other_run, start_options
from sid_fast.training.random_streams import seed_of
from sid_fast.training.step import Trainer


@dataclasses.dataclass
class PretrainConfig(RunOptions, StepOptions, TeacherOptions):  # type: ignore[misc]  # micro_batch
    """Options of `python -m sid_fast.pretrain`."""

    preset: str | None = None
    data: str | None = option(
        None,
        "training images or latents: an EDM data set (zip or folder), or `digits`",
        heading="Data",
    )
    sampler_steps: int = option(
        18,
        "sampler steps for sample grids and evaluations",
        1,
        1000,
        heading="Run and output",
    )
    # run() replaces None by a number before it builds PretrainSettings.
    lr_rampup_kimg: float | None = option(  # type: ignore[assignment]
        None,
        "kimg of linear learning-rate warm-up; default: 1/20 of --kimg",
        0,
        heading="Optimizer and EMA",
    )


def run(config: PretrainConfig, given: set[str]) -> None:
    """Train a teacher; `given` names the fields that the command line set."""
    auto = config.micro_batch == "auto"
    if auto:  # a resumed run first tries its saved micro-batch
        config.micro_batch, given = None, given - {"micro_batch"}
    resume = cli.resume(config, given)
    check(config)
    refuse_other_run(config.out, resume)
    sinks.require(config.log_to)
    cli.refuse_idle_run_options(config, given)
    if not config.data:
        raise UserError("data is missing: give the training images as --data IMAGES.zip")
    if config.lr_rampup_kimg is None:  # the ratio of EDM: 10 of 200 million images
        config.lr_rampup_kimg = config.kimg / 20
    device = process_group.named_device(config.device)
    kernels.dispatch.configure(config.kernels, device, config.deterministic)
    cli.refuse_idle(
        config, given, not config.ema_std, '--ema-std ""', "ema_halflife_kimg", "ema_rampup_ratio"
    )
    power_ema.exponents(config.ema_std)
    data = open_dataset(config.data)
    require_reference(config, data)
    settings = part(config, PretrainSettings)
    network = teacher_config(config, settings, data)
    levels = [network.resolution >> i for i in range(len(network.channel_mult))]
    if "attention_resolutions" in given:
        for resolution in sorted({*network.attention_resolutions} - {*levels}):
            raise UserError(
                f"attention_resolutions: {resolution} is no level of the network: choose from "
                f"{', '.join(map(str, levels))}"
            )
    # In child processes, before CUDA starts.
    tuning = autotune.for_run(config, given, settings, lambda: network, device, resume, auto)
    device = process_group.pick_device(config.device, config.deterministic)
    choice = tuning.candidate
    if choice:
        choice.apply(config.kernels, device)
        config.micro_batch = choice.micro_batch or config.micro_batch
    with process_group.joined(device, config.parallel, config.timeout):
        auto &= not (choice and choice.micro_batch)
        if auto and resume and read_header(resume)["processes"] != process_group.world_size():
            config.micro_batch = None
        settings = part(config, PretrainSettings)
        grad_accum_steps(settings, process_group.world_size())
        estimator.require_host_memory(network, config, device)
        state = estimator.StateMemory(
            lambda s: EDM(build_network(network), s),
            mixed_precision.resolve_precision(settings, device),
            kernels.dispatch.runs(device),
        )
        sharding = fsdp.plan(config.parallel, device, state.nbytes, config.shard_group)
        if device.type == "cuda":
            upper = micro_batch.estimated(network, config, settings, device, sharding, data)
        torch.manual_seed(seed_of(config.seed, "weights"))
        net = build_network(network).to(device)
        if auto and device.type == "cuda":
            config.micro_batch = micro_batch.that_fits(net, config, settings, upper, sharding)
            settings = part(config, PretrainSettings)
        mode, graphs, note = graph_trial.choose(
            config.cuda_graph, choice, network, settings, device, sharding.mesh is not None,
            config.deterministic,
        )  # fmt: skip
        feed = ImageFeed(
            data, settings.batch_size, config.seed, device, sharding.rank, sharding.ranks
        )
        compile = config.compile or bool(choice and choice.compile)
        fingerprint = {f"network {k}": v for k, v in network.to_dict().items()}
        with progress.phase("building the network"):
            trainer = Trainer(
                EDM(net, settings, feed),
                settings,
                config.seed,
                sharding,
                fingerprint,
                cuda_graph=graphs,
                compile=compile,
                channels_last=choice.channels_last if choice else None,
            )
        if config.checkpoint_activations:
            checkpoint_activations(net)
        sampler = partial(heun, num_steps=config.sampler_steps)
        decoder = decoding.make_decoder(network, config.vae, device, "the network")
        snapshots = Snapshots(config, trainer, trainer.emas, sampler, decoder, ema_stds(settings))
        evaluations = None
        if config.eval_every:
            decoding.require_images(decoder, "the network")
            host_memory.require_features(decoder.shape, config.eval_images, config.detector)
            evaluations = Evaluations(
                config,
                trainer,
                trainer.ema,
                data,
                config.sampler_steps,
                cuda_graph=mode,
                decoder=decoder,
            )
        name = f"teacher-{config.preset or Path(config.data).stem}"
        backends = kernels.dispatch.report(device)
        where = (
            f"on {device} in {trainer.settings.precision}, kernels: {backends}"
            f"{', CUDA graphs' * bool(graphs)}{', torch.compile' * compile}, {sharding.text}"
        )
        headline = f"training a teacher ({network}) on {len(data):,} images {feed.text}\n  {where}"
        headline += tuning.text and f", {tuning.text}"
        notes = note, host_load.advice(device), *tuning.notes
        headline += "".join(f"\nnote: {line}" for line in notes if line)
        changed = cli.changed_options(config, "pretrain")
        extra = {"tuning": tuning.to_json(), "changed": changed}
        with contextlib.closing(feed):
            loop = Loop(trainer, config, snapshots, name, headline, evaluations, extra)
            if loop.run(resume) and process_group.rank() == 0:
                invocation.suggest(*next_commands(config, loop.folder))


def next_commands(config: PretrainConfig, folder: Path) -> list[str]:
    """What to type after a run in a folder: look at images, distil the teacher, train on."""
    steps = "--steps", config.sampler_steps
    grid = "--seeds", "0-63", "--grid", "images.png"
    longer = "--resume", folder, "--kimg", f"{2 * config.kimg:g}", *start_options(config)
    return [
        invocation.command_line("generate", "--network", folder, *steps, *grid),
        invocation.command_line("train", "--teacher", folder),
        invocation.command_line("pretrain", *longer),
    ]


main = cli.command(PretrainConfig, run, "pretrain", __doc__)

if __name__ == "__main__":
    cli.main(main, "sid_fast.pretrain")
