"""Compare generated with real images: FID, IS, KID, precision and recall in one pass.

python -m sid_fast.evaluate --network runs/000-cifar10 --data cifar10.zip --protocol edm
python -m sid_fast.evaluate reference --data cifar10.zip --out cifar10.npz
"""

import dataclasses
import itertools
import json
import statistics
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from sid_fast import cli
from sid_fast.config.types import VAE, check, option
from sid_fast.data.datasets import Dataset
from sid_fast.data.digits import open_dataset
from sid_fast.data.latents import require_kind
from sid_fast.data.readers import check_reader, choose, read
from sid_fast.errors import UserError
from sid_fast.evaluation import decoding
from sid_fast.evaluation.features import Detector, Pixels, label, load_detector
from sid_fast.evaluation.references import real_stats, reference_of, write_reference
from sid_fast.evaluation.sample import (
    METRICS,
    FeatureStats,
    StageTimer,
    classes_to_draw,
    compare,
    compute_stats,
    generate_batches,
    shard_by_rank,
)
from sid_fast.io import invocation, progress
from sid_fast.io.atomic import atomic_path, open_target
from sid_fast.io.streams import note, say
from sid_fast.models.registry import (
    load_network,
    one_step_sigma,
    require_denoiser,
    require_png_channels,
)
from sid_fast.performance import process_group
from sid_fast.performance.cuda_graphs import resolve_cuda_graph
from sid_fast.tools import host_load, host_memory

NUM = 50_000  # generated images per sample set, by default
MAX_IMAGES = 10**8
DETECTOR_BYTES = 2**20  # per image of a batch: Inception's input alone, float32 [3, 299, 299]
# Name: (number of sample sets, c), with covariances over N − c.
PROTOCOLS = {None: (1, 1), "edm": (3, 1), "sid": (10, 0)}


@dataclasses.dataclass
class DetectorOptions:
    """Options of evaluating and of making a reference."""

    detector: str = option(
        "inception",
        "feature network: inception (NVIDIA's file of 2015-12-05, as used for published FIDs; "
        "downloaded once), pixels (no network), or the path or https URL of a TorchScript file "
        "that maps uint8 [N, 3, R, R] to features",
    )
    trust: bool = option(
        False, "run a --detector file whose sha256 is unknown; its code runs on this machine"
    )
    batch: int | None = option(
        None, "images per call of the detector; default: 512 on a GPU, 64 on a CPU", 1
    )
    reader: str = option(
        "auto", "PNG decoder: dali, plain (PIL, several times slower), or auto: dali if installed"
    )
    device: str = option("auto", "auto, cpu or cuda; auto: a GPU if there is one")


@dataclasses.dataclass
class EvaluateConfig(DetectorOptions):
    """Options of `python -m sid_fast.evaluate`."""

    network: str | None = option(
        None,
        "generator or teacher to evaluate: a .safetensors snapshot, an EDM, EDM2 or SiD pickle "
        "(.pkl), a run folder (its newest snapshot), an https URL, or the name of a published "
        "teacher",
    )
    vae: str | None = option(None, f"{VAE}; needed to evaluate latents")
    images: str | None = option(
        None, "instead of --network: generated images, a zip or folder of PNGs"
    )
    data: str | None = option(
        None,
        "real images: an EDM data set (zip or folder), or `digits`; their statistics are cached",
    )
    ref: str | None = option(
        None,
        "statistics of real images, an .npz with `mu` and `sigma` (path or https URL); without "
        "--data they allow FID and IS only",
    )
    metrics: str = option(
        ",".join(METRICS),
        "metrics to compute, comma-separated: fid, is, kid, pr (precision and recall)",
    )
    protocol: str | None = option(
        None,
        "edm: the lowest FID of 3 sample sets, covariances over N−1; sid: mean ± std of 10 sample "
        "sets, covariances over N; default: 1 sample set, over N−1. Set i = 0, 1, … uses seeds "
        "i·num to (i+1)·num−1",
    )
    num: int | None = option(
        None,
        f"images per sample set; default: {NUM:,}, or all of --images. Under torchrun write -n: "
        "torchrun takes --num for one of its own options",
        2,
        MAX_IMAGES,
        short="-n",
    )
    seeds: str | None = option(
        None, "instead of --num: one sample set of these seeds, such as 0-999"
    )
    steps: int = option(
        1,
        "1 for a one-step generator; for a teacher its sampler steps: 18 at 32x32 pixels, 40 at "
        "64x64",
        1,
        1000,
    )
    init_sigma: float | None = option(
        None,
        "σ of the one-step generator's input noise; default: as saved in the file, else 2.5",
        1e-3,
        1e3,
    )
    out: str | None = option(None, "JSON file to write the results to")


@dataclasses.dataclass
class ReferenceConfig(DetectorOptions):
    """Options of `python -m sid_fast.evaluate reference`."""

    data: str | None = option(None, "real images: an EDM data set (zip or folder), or `digits`")
    out: str | None = option(None, ".npz file to write, with `mu` and `sigma`")


# Seeds or indices of all images; this rank's batches of them.
SampleSet = tuple[Sequence[int], Iterator[torch.Tensor]]


def run(config: EvaluateConfig, given: set[str]) -> None:
    """Evaluate and report; `given` names the fields that the command line set."""
    check(config)
    if config.network and config.images:
        raise UserError(
            "--network and --images are two sources of images to evaluate: leave out one of them"
        )
    if not (config.network or config.images):
        raise UserError(
            "images to evaluate are missing: give either --network SNAPSHOT or --images ZIP"
        )
    if not (config.data or config.ref):
        raise UserError(
            "a reference is missing: give real images as --data, or their statistics as --ref"
        )
    metrics = [m.strip() for m in config.metrics.split(",")]
    if unknown := [m for m in metrics if m not in METRICS]:
        raise UserError(f"metrics: {unknown[0]!r} is unknown: choose from {', '.join(METRICS)}")
    if config.protocol not in PROTOCOLS:
        raise UserError(f"protocol={config.protocol!r} is unknown: choose from edm, sid")
    refuse_idle_options(config, given, metrics)
    if config.protocol == "edm" and "fid" not in metrics:
        raise UserError(
            "metrics: --protocol edm reports the sample set of lowest FID: add fid to --metrics, "
            "or leave out --protocol"
        )
    if config.out:
        open_target(config.out)
    device = process_group.pick_device(config.device)
    timer = StageTimer(device)
    with process_group.joined(device):
        detector, data, reader = prepare(config, device)
        if config.network:
            sets, notes = sets_from_network(config, device, data)
        else:
            sets, notes = set_from_files(config, device, reader), []
        real = real_stats(config.ref, data, detector, timer, reader)
        if process_group.rank() == 0:  # after all that could be refused
            for line in (*notes, host_load.advice(device)):
                if line:
                    note(f"note: {line}")
        results = []
        for i, (items, batches) in enumerate(sets):
            title = f"images, set {i + 1} of {len(sets)}"
            stats = compute_stats(batches, len(items), detector, timer, title)
            if process_group.rank() == 0:
                correction = PROTOCOLS[config.protocol][1]
                results.append(compare(real, stats, detector, timer, metrics, correction))
            process_group.barrier()  # precision and recall can outlast a collective's timeout
        if process_group.rank() == 0:
            report(config, detector, real, [items for items, _ in sets], results, timer)


def refuse_idle_options(config: EvaluateConfig, given: set[str], metrics: list[str]) -> None:
    """Raise UserError if an option or a metric that the command line sets would do nothing."""
    refuse = partial(cli.refuse_idle, config, given)
    refuse(config.network, "--network", "steps", "init_sigma", "seeds", "vae")
    refuse(config.network or config.protocol != "edm", "--network", "protocol")
    refuse(config.steps == 1, "--steps 1", "init_sigma")
    refuse(config.data or config.images, "--data or --images", "reader")
    real = not config.ref or {"kid", "pr"} & {*metrics}
    refuse(real, "kid or pr in --metrics, as --ref serves fid", "data")
    cli.refuse_idle_detector_options(config, given)
    if "metrics" in given and not config.data and (idle := {"kid", "pr"} & {*metrics}):
        raise UserError(f"metrics: {min(idle)} needs real images: add --data, or leave it out")
    if "metrics" in given and config.detector == "pixels" and "is" in metrics:
        raise UserError(
            "metrics: is needs class probabilities, which --detector pixels has not: use another, "
            "or leave it out"
        )


def prepare(
    config: "EvaluateConfig | ReferenceConfig", device: torch.device
) -> tuple[Detector | Pixels, Dataset | None, str]:
    """Load the detector and the real images, if any, and choose the PNG reader."""
    if config.batch and device.type == "cpu":  # the detector always gets full batches
        host_memory.require(
            config.batch * DETECTOR_BYTES,
            f"a batch of {config.batch:,} images in the detector",
            "use a smaller --batch",
        )
    with process_group.main_process_first():  # may download
        data = open_images(config.data) if config.data else None
        with progress.phase(f"loading the detector {config.detector}"):
            detector = load_detector(config.detector, device, config.trust, config.batch)
    return detector, data, check_reader(config.reader)


def open_images(path: str) -> Dataset:
    """Open a data set; UserError if it holds latents."""
    data = open_dataset(path)
    require_kind(data, False, "an evaluation", "give the images that they were made from, or --ref")
    return data


def sets_from_network(
    config: EvaluateConfig, device: torch.device, data: Dataset | None
) -> tuple[list[SampleSet], list[str]]:
    """The sample sets of --network that the protocol asks for, generated lazily, and notes."""
    num = config.num or NUM
    seed_sets: list[Sequence[int]] = [
        range(i * num, (i + 1) * num) for i in range(PROTOCOLS[config.protocol][0])
    ]
    if config.seeds is not None:
        if config.num or config.protocol:
            raise UserError(
                f"seeds={config.seeds} is one sample set: leave out --seeds, or both --num and "
                "--protocol"
            )
        ranges = cli.seed_ranges(config.seeds)
        count = sum(map(len, ranges))
        host_memory.require(40 * count, f"{count:,} seeds", "use fewer --seeds, or --num")
        seed_sets = [list(itertools.chain(*ranges))]
    assert config.network
    loading = progress.phase(f"loading {config.network}")
    with process_group.main_process_first(), loading:  # may download
        net = load_network(config.network).to(device)
    if config.steps > 1:
        require_denoiser(net, config.network, f"a network that is sampled in {config.steps} steps")
    require_png_channels(net, config.network, "only such images can be evaluated")
    decoder = decoding.make_decoder(net.config, config.vae, device, config.network)
    decoding.require_images(decoder, config.network)
    host_memory.require_forward(net.config, device)
    host_memory.require_features(decoder.shape, max(map(len, seed_sets)), config.detector)
    if data and config.detector == "pixels":
        channels, side, _ = decoder.shape
        if (channels, side) != (data.channels, data.resolution):
            raise UserError(
                f"the network makes images of {side}x{side} pixels (channels: {channels}), "
                f"{config.data} has {data.resolution}x{data.resolution} ({data.channels}): "
                "--detector pixels compares images of one shape"
            )
    sigma, guess = one_step_sigma(net.config, config.network, config.init_sigma)
    notes = [guess] if config.steps == 1 else []
    graph, _ = resolve_cuda_graph("auto", device)
    classes = classes_to_draw(data, net)
    if classes:
        known = data is not None and bool(data.classes)
        source = f"{config.data} has" if known else f"{config.network} was trained on"
        notes.append(
            f"{source} images of {len(classes):,} of the network's {net.config.label_dim:,} "
            "classes: only those are generated"
        )
    sets = [
        (seeds, generate_batches(net, seeds, sigma, config.steps, graph, classes, decoder))
        for seeds in seed_sets
    ]
    return sets, notes


def set_from_files(config: EvaluateConfig, device: torch.device, reader: str) -> list[SampleSet]:
    """The one sample set of --images: its first --num images."""
    assert config.images
    data = open_images(config.images)
    num = config.num or len(data)
    if num > len(data):
        raise UserError(f"num={num} is too many: {config.images} has {len(data)} images")
    reader = choose(reader, num)
    return [(range(num), read(data, shard_by_rank(range(num)), device, reader))]


def summary(protocol: str | None, results: list[dict[str, float]]) -> dict[str, float]:
    """Reduce the results of the sample sets: lowest FID (edm), or mean and std (sid).

    The std of NAME is NAME_std.
    """
    if protocol == "sid" and len(results) > 1:
        names = [n for n in results[0] if not n.endswith("_std")]
        values = {n: [r[n] for r in results] for n in names}
        means = {n: statistics.fmean(v) for n, v in values.items()}
        return means | {f"{n}_std": statistics.pstdev(v) for n, v in values.items()}
    return min(results, key=lambda r: r.get("frechet_distance", 0.0))  # one set: maybe without FID


def report(
    config: EvaluateConfig,
    detector: Detector | Pixels,
    real: FeatureStats,
    sets: list[Sequence[int]],
    results: list[dict[str, float]],
    timer: StageTimer,
) -> None:
    """Write --out, then print a table of the results: a failing terminal costs no results."""
    reported = summary(config.protocol, results)
    seconds = {stage: round(s, 3) for stage, s in timer.seconds.items()}
    if config.out:
        document = {
            "reported": reported,
            "draws": results,
            "options": dataclasses.asdict(config),
            "covariance_over": "N-1" if PROTOCOLS[config.protocol][1] else "N",
            "images": len(sets[0]),
            "seeds": [[s[0], s[-1]] for s in sets] if config.network else None,
            "reference_images": real.count,
            "detector": {"name": detector.name, "key": detector.key},
            "seconds": seconds,
            "device": str(timer.device),
            "processes": process_group.world_size(),
            "torch": torch.__version__,
        }
        with atomic_path(config.out) as temporary:
            temporary.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", "utf-8")
    seeds = ", ".join(f"{s[0]}-{s[-1]}" for s in sets)
    source = f"seeds {seeds}" if config.network else "files"
    references = " and ".join(p for p in (config.ref, config.data) if p)
    size = f"{real.count:,} images" if real.count else "unknown number of images"
    say(f"{config.network or config.images}, {len(sets[0]):,} images per sample set ({source})")
    say(f"reference: {references}, {size}")
    if len(results) > 1:
        rule: dict[str | None, str]
        rule = {"edm": "sample set of lowest distance", "sid": "mean ± std of the sample sets"}
        say(f"{'':32} {rule[config.protocol]:32} all sample sets")
    for name in (n for n in reported if not n.endswith("_std")):
        std = reported.get(f"{name}_std")
        text = f"{reported[name]:.5g}" + ("" if std is None else f" ± {std:.2g}")
        each = "  ".join(f"{r[name]:.5g}" for r in results) if len(results) > 1 else ""
        say(f"{label(name, detector):32} {text:32} {each}".rstrip())
    missing = "is" in config.metrics and "inception_score" not in reported
    if missing and config.detector != "pixels":
        say(f"no {label('inception_score', detector)}: this detector has no class probabilities")
    if real.features is None and ("kid" in config.metrics or "pr" in config.metrics):
        say("no kernel distance, precision or recall: they need real images; give --data")
    say("seconds: " + ", ".join(f"{stage} {s:.3g}" for stage, s in seconds.items()))
    if config.out:
        say(f"results: {config.out}")
    invocation.suggest(*next_commands(config))


def next_commands(config: EvaluateConfig) -> list[str]:
    """What to type next: the published protocol, or a look at the images."""
    if not config.network:
        return []
    steps = ("--steps", config.steps) if config.steps > 1 else ()
    vae = ("--vae", config.vae) if config.vae else ()
    network = "--network", config.network, *steps, *vae
    grid = "--seeds", "0-63", "--grid", "images.png"
    commands = [invocation.command_line("generate", *network, *grid)]
    if config.protocol is None and config.detector == "inception":
        real = ("--ref", config.ref) if config.ref else ("--data", config.data)
        commands.insert(
            0, invocation.command_line("evaluate", *network, *real, "--protocol", "edm")
        )
    return commands


def run_reference(config: ReferenceConfig, given: set[str]) -> None:
    """Measure a data set and write its statistics as an .npz file."""
    check(config)
    if not config.data:
        raise UserError("data is missing: give the real images as --data DATASET.zip")
    if not config.out:
        raise UserError("out is missing: give --out NAME.npz")
    if not config.out.endswith(".npz"):
        raise UserError(f"out={config.out} is not an .npz file: give --out NAME.npz")
    open_target(config.out)
    cli.refuse_idle_detector_options(config, given)
    device = process_group.pick_device(config.device)
    with process_group.joined(device):
        detector, data, reader = prepare(config, device)
        assert data is not None
        timer = StageTimer(device)
        stats = reference_of(data, detector, timer, reader)
        if process_group.rank() == 0:
            write_reference(config.out, stats, detector)
            seconds = sum(timer.seconds.values())
            how = f"at {len(data) / seconds:.0f} images/s" if seconds else "from the cache"
            say(
                f"{config.out}: statistics of {len(data):,} images, {len(stats.mean)} "
                f"{detector.name} features, {how}"
            )
            use = "--network", "RUN", "--ref", config.out
            invocation.suggest(invocation.command_line("evaluate", *use))


_reference = cli.command(
    ReferenceConfig,
    run_reference,
    None,
    "Write the feature statistics of a data set to an .npz file for --ref.",
)
main = cli.command(EvaluateConfig, run, None, __doc__, reference=_reference)

if __name__ == "__main__":
    cli.main(main, "sid_fast.evaluate")
