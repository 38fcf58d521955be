"""Acceptance checks of the step on a GPU; tests/gpu/test_acceptance.py runs them.

Each check takes a Context and returns (error, bound, note); it passes if error <= bound. Errors are
relative norms. The error between two runs is the distance of their final weights over the distance
that the weights moved; 0 means bit-identical. On a CPU the networks are tiny, networks run in
Triton's interpreter, and checks that need a GPU or whole interpreted steps are skipped.
"""

import contextlib
import copy
import dataclasses
import os
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sid_fast import Draw, Settings, load_network
from sid_fast.config.types import Precision
from sid_fast.distiller import Distiller
from sid_fast.errors import Fallback
from sid_fast.kernels import dispatch
from sid_fast.kernels._triton import INTERPRETED
from sid_fast.methods.base import Phase, RandomStream
from sid_fast.methods.sid import SiD
from sid_fast.models import EDM2Config, NetworkConfig
from sid_fast.models.teachers import TEACHERS
from sid_fast.performance import cuda_graphs, fsdp, mixed_precision, process_group
from sid_fast.performance.cuda_graphs import CapturedGraph, warm_up
from sid_fast.tools import estimator, graph_trial
from sid_fast.tools.proof import flat, network, weights, worst
from tests.helpers.golden import (
    TRAJECTORY_TOLERANCE,
    golden_draws,
    golden_settings,
    read,
    trajectory_error,
)

GOLDEN = Path(os.environ.get("SID_FAST_SHARED", Path(__file__).parents[3] / "shared")) / "golden"
TINY = NetworkConfig(
    "ddpmpp", resolution=8, model_channels=16, channel_mult=(1, 2), num_blocks=1,
    attention_resolutions=(4,), augment_dim=9,
)  # fmt: skip
CIFAR10 = TEACHERS["cifar10-uncond"].network
TINY_EDM2 = EDM2Config(
    resolution=8, label_dim=4, model_channels=64, channel_mult=(1,), num_blocks=1,
    attention_resolutions=(8,),
)  # fmt: skip
EDM2 = dataclasses.replace(TEACHERS["edm2-img512-xs"].network, num_blocks=1)
# eps = 1 makes updates proportional to gradients, so that their errors compare.
SETTINGS = Settings(batch_size=8, dropout=0.13, augment_p=0.12, eps=1.0, fake_lr=1e-2,
                    generator_lr=1e-2)  # fmt: skip


Outcome = tuple[float, float, str]  # error, bound, note


@dataclasses.dataclass
class Context:
    """Where a check runs.

    Attributes:
        device: of the networks.
        steps: of a run.
        backend: one of BACKENDS.
        network: of distillers; a tiny one of its family on a CPU.
    """

    device: torch.device
    steps: int
    backend: str = "default"
    network: NetworkConfig = CIFAR10

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @contextlib.contextmanager
    def use_backend(self) -> Iterator[None]:
        """Run the steps in the block with the backend."""
        with dispatch.forced(BACKENDS[self.backend]):
            if not self.cuda and "triton" in dispatch.runs(self.device).values():
                pytest.skip("needs a GPU: the interpreter takes minutes for a step")
            yield

    def needs_gpu(self) -> None:
        if not self.cuda:
            pytest.skip("needs a GPU")

    def distiller(self, kind: Precision = "fp32", seed: int = 0, **options) -> Distiller:
        tiny = TINY_EDM2 if isinstance(self.network, EDM2Config) else TINY
        config = self.network if self.cuda else tiny
        augment_p = SETTINGS.augment_p if config.augment_dim else 0.0
        settings = dataclasses.replace(SETTINGS, precision=kind, augment_p=augment_p)
        return Distiller(network(config, self.device), settings, seed, **options)

    def run(self, kind: Precision = "fp32", **options) -> Distiller:
        distiller = self.distiller(kind, **options)
        for _ in range(self.steps):
            distiller.step()
        return distiller


Check = Callable[[Context], Outcome]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative error in the 2-norm."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def relative_distance(actual: Distiller, expected: Distiller, start: torch.Tensor) -> float:
    """Distance of two runs over the distance moved; inf if it is NaN or nothing moved."""
    a, b = weights(actual), weights(expected)
    moved = float((b - start).norm())
    distance = float((a - b).norm()) / moved if moved > 0 else torch.inf
    return worst([distance])


SCALE_TOLERANCE = 5e-3  # relative; 16-bit noise would hide a scale error of this size


def within(
    actual: torch.Tensor, eager: torch.Tensor, expected: torch.Tensor, kind: str
) -> tuple[float, float, str]:
    """Compare a 16-bit or float32 result with eager's of that precision and an exact one.

    Returns error and scale difference, each over its limit, and a note. The error's limit is 1e-4,
    or in 16 bit 1.5 times eager's error if that is larger. The scale is the projection on
    `expected`; it may differ from eager's, or from 1 where eager's own is further off, by
    SCALE_TOLERANCE plus a fifth of eager's error.
    """
    error, usual = relative(actual, expected), relative(eager, expected)
    limit = 1e-4 if kind == "fp32" else max(1.5 * usual, 1e-4)
    square = expected @ expected
    off = min(abs(float((actual - other) @ expected / square)) for other in (eager, expected))
    note = f"{error:.1e} (eager {usual:.1e}), scale off by {off:.1e}"
    return error / limit, off / (SCALE_TOLERANCE + 0.2 * usual), note


def network_agrees(ctx: Context, config: NetworkConfig, kind: str) -> Outcome:
    """Compare a network's output and gradients: Triton kernels against eager float32.

    The error is the largest of the ratios that `within` returns.
    """
    if not (ctx.cuda or INTERPRETED):
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
    if not ctx.cuda and isinstance(config, EDM2Config):
        config = TINY_EDM2
    elif not ctx.cuda:
        config = dataclasses.replace(
            TINY, architecture=config.architecture, label_dim=config.label_dim,
            model_channels=64 if config.architecture == "adm" else 16,
        )  # fmt: skip
    net = network(config, ctx.device)
    net.set_dropout(0.0)  # the backends draw different masks
    rng = torch.Generator(ctx.device).manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng, device=ctx.device)

    with torch.no_grad():  # no branch is near zero, and no bias is zero
        for p in net.parameters():
            p.mul_(2) if p.dim() > 1 else p.add_(0.1 * random(*p.shape))
    x = random(4, config.channels, config.resolution, config.resolution)
    grad = random(*x.shape)
    sigma = torch.tensor([0.02, 0.3, 2.0, 40.0], device=ctx.device)
    labels = torch.eye(config.label_dim, device=ctx.device)[:4] if config.label_dim else None

    def results(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        running = copy.deepcopy(net)
        running.to(memory_format=torch.channels_last)
        running.compute_dtype = dtype  # parameters and their gradients stay float32
        image = x.clone().requires_grad_()
        with dispatch.forced(backend):
            out = running(image, sigma, labels)
            out.backward(grad)
        grads = [p.grad for p in running.parameters() if p.grad is not None]
        return [flat([out]), flat([image.grad]), flat(grads)]

    exact, dtype = results("eager", torch.float32), mixed_precision.TYPES[kind]
    worst_ratios, notes = [], []
    parts = zip(
        ("output", "image gradient", "gradients"), results("triton", dtype),
        results("eager", dtype), exact, strict=True,
    )  # fmt: skip
    for name, actual, eager, expected in parts:
        *ratios, note = within(actual, eager, expected, kind)
        worst_ratios += ratios
        notes.append(f"{name} {note}")
    return worst(worst_ratios), 1.0, "; ".join(notes)


def repeats(ctx: Context) -> Outcome:
    """Two runs from the same seed, without CUDA graphs, are bit-identical."""
    with ctx.use_backend():
        start = weights(ctx.distiller())
        return relative_distance(ctx.run(), ctx.run(), start), 0.0, f"{ctx.steps} steps"


def replays_draws(ctx: Context) -> Outcome:
    """A replayed graph draws the same random numbers as an eager step."""
    ctx.needs_gpu()
    distiller = ctx.distiller()
    method = distiller.method
    assert isinstance(method, SiD)

    def draw() -> list[torch.Tensor]:
        inputs = method.sample_fake_inputs(RandomStream(distiller.counter, "fake", 8))
        assert inputs.augment is not None
        return [inputs.z, inputs.sigma, inputs.noise, *inputs.augment.values()]

    distiller.counter[1].fill_(5)
    expected = [t.clone() for t in draw()]
    distiller.counter[1].fill_(0)
    warm_up(draw)
    graph = CapturedGraph(draw)
    distiller.counter[1].fill_(5)
    return float((flat(graph()) - flat(expected)).abs().max()), 0.0, "largest difference"


def replays(ctx: Context, kind: Precision, bound: float) -> Outcome:
    """A run with CUDA graphs matches one without, from the same seed."""
    ctx.needs_gpu()
    with ctx.use_backend():
        start = weights(ctx.distiller())
        return relative_distance(ctx.run(kind, cuda_graph=True), ctx.run(kind), start), bound, (
            f"{ctx.steps} steps, dropout and augmentation on"
        )  # fmt: skip


def capture_trial(ctx: Context) -> Outcome:
    """The trial in another process passes that `--cuda-graph auto` makes before a run."""
    ctx.needs_gpu()
    with ctx.use_backend():
        job, candidate = graph_trial.job(CIFAR10, SETTINGS, ctx.device)
    reason = graph_trial.attempt(job, candidate)
    return float(bool(reason)), 0.0, reason or "in a separate process"


def failed_capture(ctx: Context) -> Outcome:
    """After a failed capture, `auto` continues without graphs, bit-identically.

    The planted failure reads from the device during the capture. It may break this process.
    """
    ctx.needs_gpu()
    with ctx.use_backend(), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", Fallback)
        expected, actual = ctx.distiller(), ctx.distiller(cuda_graph="auto")
        start, update = weights(expected), actual.update

        def read_in_capture(phase: Phase) -> dict[str, torch.Tensor]:
            metrics = update(phase)
            if torch.cuda.is_current_stream_capturing():
                float(metrics[f"{phase.name}/loss"])
            return metrics

        actual.update = read_in_capture
        try:
            for _ in range(ctx.steps):
                actual.step()
                expected.step()
        finally:
            cuda_graphs._failed = ""  # the process-wide record of the planted failure
    messages = [str(w.message) for w in warned if w.category is Fallback]
    assert len(messages) == 1, messages
    return relative_distance(actual, expected, start), 0.0, messages[0]


def no_host_sync(ctx: Context, replayed: bool) -> Outcome:
    """Steps after the third make no synchronising CUDA call."""
    ctx.needs_gpu()
    with ctx.use_backend():
        distiller = ctx.distiller("bf16", cuda_graph=replayed)
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


def resumes(ctx: Context) -> Outcome:
    """A run resumed from its state_dict is bit-identical to an uninterrupted one."""
    with ctx.use_backend():
        start = weights(ctx.distiller())
        expected = ctx.run(cuda_graph=ctx.cuda)
        saved = {name: t.clone() for name, t in expected.state_dict().items()}
        resumed = ctx.distiller(cuda_graph=ctx.cuda)
        resumed.load_state_dict(saved)
        resumed.steps, resumed.images = expected.steps, expected.images
        for distiller in (expected, resumed):
            for _ in range(ctx.steps):
                distiller.step()
        return (
            relative_distance(resumed, expected, start),
            0.0,
            f"2 x {ctx.steps} steps",
        )


def shards(ctx: Context) -> Outcome:
    """FSDP on one process, with CUDA graphs on a GPU, matches unsharded training."""
    with ctx.use_backend():
        expected = ctx.distiller()
        start = weights(expected)
        for _ in range(ctx.steps):
            expected.step()
        with process_group.joined(ctx.device, "fsdp"):
            sharding = fsdp.plan("fsdp", ctx.device, lambda shards, reshard_after_forward: 0)
            sharded = ctx.run(sharding=sharding, cuda_graph=ctx.cuda)
            note = f"{ctx.steps} steps, {sharding.text}"
            return relative_distance(sharded, expected, start), TRAJECTORY_TOLERANCE, note


def compiles(ctx: Context) -> Outcome:
    """A run with torch.compile matches one without."""
    ctx.needs_gpu()
    with ctx.use_backend():
        start = weights(ctx.distiller())
        expected = ctx.run()
        begin = time.monotonic()
        compiled = ctx.run(compile=True)
    note = f"{ctx.steps} steps; {time.monotonic() - begin:.0f} s with compilation"
    return relative_distance(compiled, expected, start), 1e-3, note


def follows_golden(ctx: Context, name: str) -> Outcome:
    """Steps with recorded draws follow the golden trajectory, on a GPU as CUDA graphs."""
    if not GOLDEN.is_dir():
        pytest.skip("no golden data; set SID_FAST_SHARED to the folder that holds golden/")
    data = read(GOLDEN / f"trajectory_{name}.npz")
    teacher = load_network(GOLDEN / f"{name}.pkl").to(ctx.device)
    start = {key: v.cpu().clone() for key, v in teacher.state_dict().items()}
    with ctx.use_backend():
        settings = dataclasses.replace(golden_settings(data), precision="fp32")
        distiller = Distiller(teacher, settings)
        draws = move(ctx.device, golden_draws(data, 0))
        run: Callable[[], Any] = partial(distiller.run, draws)
        if ctx.cuda:
            distiller.enabled.fill_(False)
            warm_up(run)
            distiller.enabled.fill_(True)
            run = CapturedGraph(run)
        distiller.run = lambda inputs=None: run()
        for step in range(int(data["steps"])):
            copy_values(draws, move(ctx.device, golden_draws(data, step)))
            distiller.step(draws)
    nets = {"fake_score": distiller.fake_score, "G": distiller.generator, "G_ema": distiller.ema}
    errors = {key: trajectory_error(data, start, net.cpu(), key) for key, net in nets.items()}
    note = ", ".join(f"{key} {error:.1e}" for key, error in errors.items())
    return worst(errors.values()), TRAJECTORY_TOLERANCE, note


def move(device: torch.device, draws: dict[str, list[Draw]]) -> dict[str, list[Draw]]:
    """Copy draws to a device, as float32."""

    def move_draw(draw: Draw) -> Draw:
        fields: dict[str, Any] = {
            name: value if value is None else value.to(device).float()
            for name, value in dataclasses.asdict(draw).items()
        }
        return Draw(**fields)

    return {phase: [move_draw(draw) for draw in rounds] for phase, rounds in draws.items()}


def copy_values(target: dict[str, list[Draw]], source: dict[str, list[Draw]]) -> None:
    """Copy draws into the tensors that a captured graph reads."""
    for phase, rounds in source.items():
        for old, new in zip(target[phase], rounds, strict=True):
            for field in ("z", "sigma", "noise", "class_labels"):
                if getattr(old, field) is not None:
                    getattr(old, field).copy_(getattr(new, field))


@torch.no_grad()
def perturb_fake_score(distiller: Distiller) -> None:
    """Move the fake score off the teacher: where both agree, the generator has no gradient."""
    rng = torch.Generator(distiller.device).manual_seed(3)
    for p in distiller.fake_score.parameters():
        p.add_(0.5 * p.std() * torch.randn(p.shape, generator=rng, device=p.device))
    distiller.load_state_dict(distiller.state_dict())


def gradients_agree(ctx: Context, kind: Precision) -> Outcome:
    """16-bit gradients match float32's for the same draws, without dropout."""
    grads = {}
    for precise in ("fp32", kind):
        with ctx.use_backend():
            distiller = ctx.distiller(precise)
            for net in (distiller.generator, distiller.fake_score):
                net.set_dropout(0.0)
            perturb_fake_score(distiller)
            draws = distiller.draw()
            for phase in distiller.method.phases:
                distiller.backward(phase, draws[phase.name][0], first=True)
        nets = distiller.fake_score, distiller.generator
        grads[precise] = [flat(p.grad for p in net.parameters()) for net in nets]
    errors = [relative(*pair) for pair in zip(grads[kind], grads["fp32"], strict=True)]
    return worst(errors), 0.1, "fake score {:.1e}, generator {:.1e}".format(*errors)


def memory_estimate(ctx: Context, teacher: str, images: int) -> Outcome:
    """The peak counted on fake tensors matches the allocator's."""
    ctx.needs_gpu()
    config = TEACHERS[teacher].network
    settings = dataclasses.replace(SETTINGS, batch_size=images, precision="bf16")
    with ctx.use_backend():
        (step,) = estimator.steps(config, settings, [images], dispatch.runs(ctx.device))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with ctx.use_backend():
        distiller = Distiller(network(config, ctx.device), settings)
        distiller.step()  # cuDNN and Triton tune
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        distiller.step()
    measured = torch.cuda.max_memory_allocated() - before
    counted = step.peak.total()
    note = f"counted {counted / 2**30:.2f} GiB, measured {measured / 2**30:.2f}, {images} images"
    return abs(counted / measured - 1), 0.1, note


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Select deterministic algorithms and switch TF32 off in the block.

    cuDNN's alone would not do: PyTorch's attention, which the default backend runs, adds up its
    gradients in varying order otherwise.
    """
    cudnn, fill = torch.backends.cudnn, torch.utils.deterministic
    before = cudnn.deterministic, cudnn.benchmark, fill.fill_uninitialized_memory
    enabled = torch.are_deterministic_algorithms_enabled()
    cudnn.deterministic, cudnn.benchmark, fill.fill_uninitialized_memory = True, False, False
    torch.use_deterministic_algorithms(True)
    mixed_precision.set_precision("fp32", torch.device("cpu"))
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark, fill.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(enabled)


NETWORKS = {
    "cifar10-uncond": CIFAR10,
    "ffhq64": TEACHERS["ffhq64"].network,
    "imagenet64-cond": TEACHERS["imagenet64-cond"].network,
    "edm2-img512-xs": TEACHERS["edm2-img512-xs"].network,
}


def backends() -> dict[str, str | None]:
    """Backends to check, as arguments of dispatch.forced: the default, then the others."""
    with dispatch.forced(None):
        default = set(dispatch.runs(torch.device("cuda")).values())
    others = [name for name in ("triton", "eager") if default != {name}]
    return {"default": None, **{name: name for name in others}}


BACKENDS = backends()
# Most valuable first.
STEP_CHECKS: dict[str, Check] = {
    "trial": capture_trial,
    "repeats": repeats,
    "graph draws": replays_draws,
    "graph fp32": partial(replays, kind="fp32", bound=0.0),
    "graph bf16": partial(replays, kind="bf16", bound=1e-3),
    "no host sync, graphs": partial(no_host_sync, replayed=True),
    "resume": resumes,
    "no host sync": partial(no_host_sync, replayed=False),
    "golden ddpmpp_uncond": partial(follows_golden, name="ddpmpp_uncond"),
    "golden adm_cond": partial(follows_golden, name="adm_cond"),
    "gradients bf16": partial(gradients_agree, kind="bf16"),
}
# Of an EDM2 network: normalised weight copies, forced normalisation and the chains of its blocks.
EDM2_CHECKS: dict[str, Check] = {
    name: STEP_CHECKS[name]
    for name in ("repeats", "graph fp32", "graph bf16", "no host sync, graphs", "resume")
}
# Slow, or may break the process.
LATE_CHECKS: dict[str, Check] = {
    "gradients fp16": partial(gradients_agree, kind="fp16"),
    "memory cifar10-uncond": partial(memory_estimate, teacher="cifar10-uncond", images=64),
    "memory imagenet64-cond": partial(memory_estimate, teacher="imagenet64-cond", images=16),
    "compile": compiles,
    "fsdp": shards,
    "failed capture": failed_capture,
}
