"""Is what runs on this device the step that was proven elsewhere?

    python -m benchmarks.check

Checks run for `default`, the backends that a user gets, then for the others; `--only default:`
takes the first. One row per check: `pass`, `fail`, `skip` (and why), or the error that ended it;
`found` is at most `bound` where it passes. Figures are relative norms; for two runs, the distance
between their weights over the distance they moved, 0 meaning the same bits. On a CPU networks are
tiny, single kernels run in Triton's interpreter under TRITON_INTERPRET=1, and checks that need a
GPU, or whole steps in the interpreter, are skipped. The exit status is 1 if a check fails.
"""

import contextlib
import copy
import dataclasses
import gc
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.record import RESULTS, Record
from benchmarks.train import network
from sid_fast import Draw, Settings, cli, load_network
from sid_fast.config.types import Precision, option
from sid_fast.distiller import Distiller
from sid_fast.errors import Fallback, RunFailed
from sid_fast.kernels import dispatch
from sid_fast.kernels._triton import INTERPRETED
from sid_fast.methods.base import Phase, RandomStream
from sid_fast.methods.sid import SiD
from sid_fast.models import NetworkConfig
from sid_fast.models.teachers import TEACHERS
from sid_fast.performance import cuda_graphs, fsdp, mixed_precision, process_group
from sid_fast.performance.cuda_graphs import CapturedGraph, warm_up
from sid_fast.tools import estimator, graph_trial
from tests.helpers.golden import (
    TRAJECTORY_TOLERANCE,
    golden_draws,
    golden_settings,
    read,
    trajectory_error,
)

GOLDEN = Path(os.environ.get("SID_FAST_SHARED", Path(__file__).parents[2] / "shared")) / "golden"
TINY = NetworkConfig(
    "ddpmpp", resolution=8, model_channels=16, channel_mult=(1, 2), num_blocks=1,
    attention_resolutions=(4,), augment_dim=9,
)  # fmt: skip
CIFAR10 = TEACHERS["cifar10-uncond"].network
# ε = 1: an update is then in proportion to its gradient, as a comparison wants it.
SETTINGS = Settings(batch_size=8, dropout=0.13, augment_p=0.12, eps=1.0, fake_lr=1e-2,
                    generator_lr=1e-2)  # fmt: skip


class Skipped(Exception):
    """The check cannot be made here; the message says why."""


@dataclasses.dataclass
class Options:
    only: str = option("", "only the checks with this in their name")
    steps: int = option(0, "steps of a run; default: 10 on a GPU, 3 on a CPU", 0)
    device: str = option("auto", "auto, cpu or cuda")
    out: str | None = option(None, "the result file; default: benchmarks/results/check.json")
    append: bool = option(False, "keep the rows that the result file has")


@dataclasses.dataclass
class Here:
    """Where the checks run. A check takes it and returns (found, bound, note)."""

    device: torch.device
    steps: int
    backend: str = "default"

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @contextlib.contextmanager
    def forced(self) -> Iterator[None]:
        """This backend in the block, which takes steps."""
        with dispatch.forced(BACKENDS[self.backend]):
            if not self.cuda and "triton" in dispatch.runs(self.device).values():
                raise Skipped("needs a GPU: a step takes minutes in the interpreter")
            yield

    def needs_gpu(self) -> None:
        if not self.cuda:
            raise Skipped("needs a GPU")

    def distiller(self, kind: Precision = "fp32", seed: int = 0, **options) -> Distiller:
        teacher = network(CIFAR10 if self.cuda else TINY, self.device)
        return Distiller(teacher, dataclasses.replace(SETTINGS, precision=kind), seed, **options)

    def run(self, kind: Precision = "fp32", **options) -> Distiller:
        distiller = self.distiller(kind, **options)
        for _ in range(self.steps):
            distiller.step()
        return distiller


Check = Callable[[Here], tuple[float, float, str]]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def worst(errors: Iterable[float]) -> float:
    """The largest, and inf where one is NaN, which is no larger than anything."""
    return max(math.inf if math.isnan(error) else error for error in errors)


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def weights(distiller: Distiller) -> torch.Tensor:
    nets = distiller.fake_score, distiller.generator, distiller.ema
    return flat(fsdp.local_shards([p for net in nets for p in net.parameters()]))


def apart(found: Distiller, expected: Distiller, start: torch.Tensor) -> float:
    """How far two runs are apart, over the way they have gone; NaN and a standstill are inf."""
    a, b = weights(found), weights(expected)
    gone = float((b - start).norm())
    distance = float((a - b).norm()) / gone if gone > 0 else torch.inf
    return distance if distance == distance else torch.inf


SCALE = 5e-3  # relative: a factor that the noise of 16 bit would hide


def within(
    ours: torch.Tensor, eager: torch.Tensor, expected: torch.Tensor, kind: str
) -> tuple[float, float, str]:
    """Shares of what ours may be off: by its error, and by its scale; and both in words.

    The error may be 1e-4, in 16 bit 1.5 times eager's if that is more. The scale, a projection on
    what is expected, may differ from eager's by SCALE and a fifth of eager's error.
    """
    error, usual = relative(ours, expected), relative(eager, expected)
    limit = 1e-4 if kind == "fp32" else max(1.5 * usual, 1e-4)
    off = abs(float((ours - eager) @ expected / (expected @ expected)))
    note = f"{error:.1e} (eager {usual:.1e}), scale off by {off:.1e}"
    return error / limit, off / (SCALE + 0.2 * usual), note


def network_agrees(here: Here, config: NetworkConfig, kind: str) -> tuple[float, float, str]:
    """Triton's form of a network against the eager one in float32: output and all gradients.

    `found` is the worst of the shares of what is allowed, of errors and of scales: see `within`.
    """
    if not (here.cuda or INTERPRETED):
        raise Skipped("needs a GPU, or TRITON_INTERPRET=1")
    if not here.cuda:
        config = dataclasses.replace(
            TINY, architecture=config.architecture, label_dim=config.label_dim,
            model_channels=64 if config.architecture == "adm" else 16,
        )  # fmt: skip
    net = network(config, here.device)
    net.set_dropout(0.0)  # each form draws masks of its own
    rng = torch.Generator(here.device).manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng, device=here.device)

    with torch.no_grad():  # all branches weigh alike, and no bias is 0
        for p in net.parameters():
            p.mul_(2) if p.dim() > 1 else p.add_(0.1 * random(*p.shape))
    x = random(4, config.channels, config.resolution, config.resolution)
    grad = random(*x.shape)
    sigma = torch.tensor([0.02, 0.3, 2.0, 40.0], device=here.device)
    labels = torch.eye(config.label_dim, device=here.device)[:4] if config.label_dim else None

    def outcome(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        running = copy.deepcopy(net)
        running.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # no stub
        running.compute_dtype = dtype  # parameters cast at every use: their gradients are float32
        image = x.clone().requires_grad_()
        with dispatch.forced(backend):
            out = running(image, sigma, labels)
            out.backward(grad)
        grads = [p.grad for p in running.parameters() if p.grad is not None]
        return [flat([out]), flat([image.grad]), flat(grads)]

    exact, dtype = outcome("eager", torch.float32), mixed_precision.TYPES[kind]
    shares, notes = [], []
    parts = zip(
        ("output", "image gradient", "gradients"), outcome("triton", dtype),
        outcome("eager", dtype), exact, strict=True,
    )  # fmt: skip
    for name, ours, eager, expected in parts:
        *found, note = within(ours, eager, expected, kind)
        shares += found
        notes.append(f"{name} {note}")
    return worst(shares), 1.0, "; ".join(notes)


def repeats(here: Here) -> tuple[float, float, str]:
    """Two runs from the same seed, without graphs: what the others are compared with."""
    with here.forced():
        start = weights(here.distiller())
        return apart(here.run(), here.run(), start), 0.0, f"{here.steps} steps"


def replays_draws(here: Here) -> tuple[float, float, str]:
    """A graph draws what an eager step draws."""
    here.needs_gpu()
    distiller = here.distiller()
    method = distiller.method
    assert isinstance(method, SiD)

    def draw() -> list[torch.Tensor]:
        found = method.sample_fake_inputs(RandomStream(distiller.counter, "fake", 8))
        assert found.augment is not None
        return [found.z, found.sigma, found.noise, *found.augment.values()]

    distiller.counter[1].fill_(5)
    expected = [t.clone() for t in draw()]
    distiller.counter[1].fill_(0)
    warm_up(draw)
    graph = CapturedGraph(draw)
    distiller.counter[1].fill_(5)
    return float((flat(graph()) - flat(expected)).abs().max()), 0.0, "largest difference"


def replays(here: Here, kind: Precision, bound: float) -> tuple[float, float, str]:
    """A run of graphs against one without, from the same seed."""
    here.needs_gpu()
    with here.forced():
        start = weights(here.distiller())
        return apart(here.run(kind, cuda_graph=True), here.run(kind), start), bound, (
            f"{here.steps} steps, dropout and augmentation on"
        )  # fmt: skip


def passes_trial(here: Here) -> tuple[float, float, str]:
    """What `--cuda-graph auto` asks of a small network in another process, before a run."""
    here.needs_gpu()
    with here.forced():
        job = graph_trial.probe_spec(CIFAR10, SETTINGS, here.device)
    reason = graph_trial.run_probe(job, graph_trial.LIMIT)
    return float(bool(reason)), 0.0, reason or "in a process of its own"


def survives(here: Here) -> tuple[float, float, str]:
    """A capture that fails under auto leaves the run without graphs, to the bit.

    It reads from the device, which no capture may. After it this process may be broken.
    """
    here.needs_gpu()
    with here.forced(), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", Fallback)
        expected, found = here.distiller(), here.distiller(cuda_graph="auto")
        start, update = weights(expected), found.update

        def reads(phase: Phase) -> dict[str, torch.Tensor]:
            metrics = update(phase)
            if torch.cuda.is_current_stream_capturing():
                float(metrics[f"{phase.name}/loss"])
            return metrics

        found.update = reads  # type: ignore[method-assign]  # of this one
        try:
            for _ in range(here.steps):
                found.step()
                expected.step()
        finally:
            cuda_graphs._failed = ""  # planted
    said = [str(w.message) for w in warned if w.category is Fallback]
    if len(said) != 1:
        raise AssertionError(f"{len(said)} notes that graphs are off")
    return apart(found, expected, start), 0.0, said[0]


def never_waits(here: Here, replayed: bool) -> tuple[float, float, str]:
    """No launch of the steady state makes the host wait for the device."""
    here.needs_gpu()
    with here.forced():
        distiller = here.distiller("bf16", cuda_graph=replayed)
        for _ in range(3):
            distiller.step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                distiller.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return 0.0, 0.0, "sync debug mode: error"


def resumes(here: Here) -> tuple[float, float, str]:
    """A run that is broken off and taken up by another process's Distiller, against a whole one."""
    with here.forced():
        start = weights(here.distiller())
        whole = here.run(cuda_graph=here.cuda)
        saved = {name: t.clone() for name, t in whole.state_dict().items()}
        again = here.distiller(cuda_graph=here.cuda)
        again.load_state_dict(saved)
        again.steps, again.images = whole.steps, whole.images
        for distiller in (whole, again):
            for _ in range(here.steps):
                distiller.step()
        return apart(again, whole, start), 0.0, f"{here.steps} steps and {here.steps} more"


def shards(here: Here) -> tuple[float, float, str]:
    """FSDP at one process, replayed where there are graphs, against whole networks."""
    with here.forced():
        whole = here.distiller()
        start = weights(whole)
        for _ in range(here.steps):
            whole.step()
        with process_group.joined(here.device, "fsdp"):
            layout = fsdp.plan("fsdp", here.device, lambda shards, reshard_after_forward: 0)
            parts = here.run(layout=layout, cuda_graph=here.cuda)
            note = f"{here.steps} steps, {layout.text}"
            return apart(parts, whole, start), TRAJECTORY_TOLERANCE, note


def compiles(here: Here) -> tuple[float, float, str]:
    """torch.compile on and off."""
    here.needs_gpu()
    with here.forced():
        start = weights(here.distiller())
        plain = here.run()
        begin = time.monotonic()
        compiled = here.run(compile=True)
    note = f"{here.steps} steps; {time.monotonic() - begin:.0f} s with compilation"
    return apart(compiled, plain, start), 1e-3, note


def follows_golden(here: Here, name: str) -> tuple[float, float, str]:
    """The recorded trajectory, on a GPU as graphs whose draws are put in."""
    if not GOLDEN.is_dir():
        raise Skipped("no golden data; set SID_FAST_SHARED to the folder that holds golden/")
    data = read(GOLDEN / f"trajectory_{name}.npz")
    teacher = load_network(GOLDEN / f"{name}.pkl").to(here.device)
    start = {key: v.cpu().clone() for key, v in teacher.state_dict().items()}
    with here.forced():
        settings = dataclasses.replace(golden_settings(data), precision="fp32")
        distiller = Distiller(teacher, settings)
        draws = on(here.device, golden_draws(data, 0))
        run: Callable[[], Any] = partial(distiller.run, draws)
        if here.cuda:
            distiller.enabled.fill_(False)
            warm_up(run)
            distiller.enabled.fill_(True)
            run = CapturedGraph(run)
        distiller.run = lambda inputs=None: run()  # type: ignore[method-assign]  # of this one
        for step in range(int(data["steps"])):
            put(draws, on(here.device, golden_draws(data, step)))
            distiller.step(draws)
    nets = {"fake_score": distiller.fake_score, "G": distiller.generator, "G_ema": distiller.ema}
    errors = {key: trajectory_error(data, start, net.cpu(), key) for key, net in nets.items()}
    note = ", ".join(f"{key} {error:.1e}" for key, error in errors.items())
    return worst(errors.values()), TRAJECTORY_TOLERANCE, note


def on(device: torch.device, draws: dict[str, list[Draw]]) -> dict[str, list[Draw]]:
    def moved(draw: Draw) -> Draw:
        fields: dict[str, Any] = {
            name: value if value is None else value.to(device).float()
            for name, value in dataclasses.asdict(draw).items()
        }
        return Draw(**fields)

    return {phase: [moved(draw) for draw in rounds] for phase, rounds in draws.items()}


def put(target: dict[str, list[Draw]], source: dict[str, list[Draw]]) -> None:
    """Copy the values of draws into those that a graph reads."""
    for phase, rounds in source.items():
        for old, new in zip(target[phase], rounds, strict=True):
            for field in ("z", "sigma", "noise", "class_labels"):
                if getattr(old, field) is not None:
                    getattr(old, field).copy_(getattr(new, field))


@torch.no_grad()
def part_ways(distiller: Distiller) -> None:
    """Make the fake score another network than the teacher: where both agree, G has no gradient."""
    rng = torch.Generator(distiller.device).manual_seed(3)
    for p in distiller.fake_score.parameters():
        p.add_(0.5 * p.std() * torch.randn(p.shape, generator=rng, device=p.device))
    distiller.load_state_dict(distiller.state_dict())


def stays_close(here: Here, kind: Precision) -> tuple[float, float, str]:
    """A 16-bit round's gradients against float32's, of the same draws without dropout."""
    grads = {}
    for precise in ("fp32", kind):
        with here.forced():
            distiller = here.distiller(precise)
            for net in (distiller.generator, distiller.fake_score):
                net.set_dropout(0.0)
            part_ways(distiller)
            draws = distiller.draw()
            for phase in distiller.method.phases:
                distiller.backward(phase, draws[phase.name][0], first=True)
        nets = distiller.fake_score, distiller.generator
        grads[precise] = [flat(p.grad for p in net.parameters()) for net in nets]
    errors = [relative(*pair) for pair in zip(grads[kind], grads["fp32"], strict=True)]
    return worst(errors), 0.1, "fake score {:.1e}, generator {:.1e}".format(*errors)


def estimates_memory(here: Here, teacher: str, images: int) -> tuple[float, float, str]:
    """The peak that is counted on fake tensors against the allocator's."""
    here.needs_gpu()
    config = TEACHERS[teacher].network
    settings = dataclasses.replace(SETTINGS, batch_size=images, precision="bf16")
    with here.forced():
        (step,) = estimator.steps(config, settings, [images], dispatch.runs(here.device))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with here.forced():
        distiller = Distiller(network(config, here.device), settings)
        distiller.step()  # cuDNN and Triton settle
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        distiller.step()
    measured = torch.cuda.max_memory_allocated() - before
    counted = step.peak.total()
    note = f"counted {counted / 2**30:.2f} GiB, measured {measured / 2**30:.2f}, {images} images"
    return abs(counted / measured - 1), 0.1, note


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Same input, same bits, and float32 unrounded."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    mixed_precision.set_precision("fp32", torch.device("cpu"))
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


NETWORKS = {
    "cifar10-uncond": CIFAR10,
    "ffhq64": TEACHERS["ffhq64"].network,
    "imagenet64-cond": TEACHERS["imagenet64-cond"].network,
}


def backends() -> dict[str, str | None]:
    """What dispatch.forced is told, by name: what a user gets first, then what that is not."""
    found: dict[str, str | None] = {"default": None}
    with dispatch.forced(None):
        usual = set(dispatch.runs(torch.device("cuda")).values())
    others = {"eager": "eager", "triton": "triton"}
    return found | {name: backend for name, backend in others.items() if usual != {backend}}


BACKENDS = backends()


def for_each(checks: dict[str, Check], name_as: str = "{backend}: {name}") -> dict[str, Check]:
    """The checks for every backend, one after the other."""

    def on_backend(here: Here, backend: str, check: Check) -> tuple[float, float, str]:
        return check(dataclasses.replace(here, backend=backend))

    return {
        name_as.format(backend=backend, name=name): partial(
            on_backend, backend=backend, check=check
        )
        for backend in BACKENDS
        for name, check in checks.items()
    }


# What is worth most first.
CHECKS: dict[str, Check] = {
    **for_each(
        {
            "trial": passes_trial,
            "repeats": repeats,
            "graph draws": replays_draws,
            "graph fp32": partial(replays, kind="fp32", bound=0.0),
            "graph bf16": partial(replays, kind="bf16", bound=1e-3),
            "no waiting, graphs": partial(never_waits, replayed=True),
            "resume": resumes,
            "no waiting": partial(never_waits, replayed=False),
            "golden ddpmpp_uncond": partial(follows_golden, name="ddpmpp_uncond"),
            "golden adm_cond": partial(follows_golden, name="adm_cond"),
            "gradients bf16": partial(stays_close, kind="bf16"),
        }
    ),
    **{
        f"network {name} {kind}": partial(network_agrees, config=config, kind=kind)
        for name, config in NETWORKS.items()
        for kind in ("fp32", "bf16")
    },
    # Slow, or risky for those that follow.
    **for_each(
        {
            "gradients fp16": partial(stays_close, kind="fp16"),
            "memory cifar10-uncond": partial(estimates_memory, teacher="cifar10-uncond", images=64),
            "memory imagenet64-cond": partial(
                estimates_memory, teacher="imagenet64-cond", images=16
            ),
            "compile": compiles,
            "fsdp": shards,
            "failed capture": survives,
        },
        "late: {name} ({backend})",
    ),
}


def made(check: Check, here: Here) -> dict:
    """The row of a check, but for its name."""
    begin = time.monotonic()
    found = bound = None
    try:
        with deterministic():
            found, bound, note = check(here)
        status = "pass" if found <= bound else "fail"
        if not math.isfinite(found):
            found, note = None, f"{found}; {note}"
    except Skipped as reason:
        status, note = "skip", str(reason)
    except Exception as error:  # the others go on
        status, note = "error", measure.reason(error)
    gc.collect()
    if here.cuda:
        torch.cuda.empty_cache()
    seconds = round(time.monotonic() - begin, 1)
    return {"status": status, "found": found, "bound": bound, "seconds": seconds, "note": note}


def run(options: Options, given: set[str]) -> None:
    device = process_group.pick_device(options.device)
    here = Here(device, options.steps or (10 if device.type == "cuda" else 3))
    record = Record(Path(options.out or RESULTS / "check.json"), "check", append=options.append)
    bad, made_here = [], 0
    for name, check in CHECKS.items():
        if options.only not in name:
            continue
        row = made(check, here)
        record.add(name=name, **row)
        made_here += 1
        figures = "" if row["found"] is None else f"{row['found']:.2e} <= {row['bound']:g}"
        print(
            f"{row['status']:5} {name:32} {figures:20} {row['seconds']:6.1f} s  {row['note']}",
            flush=True,
        )
        bad += [name] * (row["status"] in ("fail", "error"))
    if bad:
        raise RunFailed(f"{len(bad)} of {made_here} checks failed: {', '.join(bad)}")


main = cli.command(Options, run, None, __doc__)

if __name__ == "__main__":
    cli.main(main, "benchmarks.check")
