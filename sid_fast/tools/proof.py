"""Prove that a candidate's step equals the eager float32 step, up to the rounding of its type.

Each proof returns "", or in a few words what is wrong. Network weights are random, without the
zeros of a fresh network, so that an error in any branch shows in the gradients.
"""

import dataclasses
import gc
import math
from collections.abc import Iterable
from typing import Any

import torch

from sid_fast.config.types import (
    PretrainSettings,
    Settings,
    SiDASettings,
    grad_accum_steps,
    group_size,
)
from sid_fast.data.feed import BlankFeed
from sid_fast.distiller import data_free_method
from sid_fast.methods.base import Phase, RandomStream, one_hot_labels
from sid_fast.models import Network, NetworkConfig
from sid_fast.models.edm_unet.layers import GroupNorm
from sid_fast.models.families import build_network
from sid_fast.performance import cuda_graphs, fsdp, mixed_precision
from sid_fast.performance.activation_checkpoint import checkpoint_activations
from sid_fast.tools.candidates import Candidate
from sid_fast.training.step import Trainer

IMAGES = 4  # a proof's micro-batch
# Of gradients in 16 bit: over as many pixels its roundings change the scale by 0.1 to 0.2 %.
PIXELS, MAX_IMAGES = 2**14, 64
ERROR = 1e-4  # relative; in 16 bit 1.5 times the eager step's, if that is more
SCALE = 5e-3  # relative: a factor that the noise of 16 bit would hide
STEPS = 3
LARGE = 300_000_000  # weights of a network that is proven with fewer blocks
# Between replayed and eager weights, relative to how far the steps moved them. cuBLAS may choose
# another product in a graph; random numbers that repeat are off by more than 0.1.
BOUND = 1e-2

METHODS = {Settings: "sid", SiDASettings: "sida", PretrainSettings: "edm"}


@dataclasses.dataclass(frozen=True)
class Job:
    """What is tuned: the steps of a run, without its weights or data.

    settings: of the method, as the user gave them; their batch is that of all ranks, and their
    type tells the method. images: how many the run has seen when it is past every warm-up of the
    method. pinned: the names of the fields of Candidate that the user has decided. deterministic:
    the run wants the same bits from the same seed, and libraries choose their algorithms by it.
    """

    network: NetworkConfig
    settings: Any
    device: str
    kernels: str = "auto"
    cuda_graph: bool = False
    compile: bool = False
    recompute: bool = False
    deterministic: bool = False
    ranks: int = 1
    layout: str = "ddp"
    images: int = 10**15
    pinned: frozenset[str] = frozenset()

    @property
    def method(self) -> str:
        """sid, sida or edm."""
        return METHODS[type(self.settings)]

    @property
    def share(self) -> int:
        """Images of a rank's step."""
        return self.settings.batch_size // self.ranks


class RandomFeed(BlankFeed):
    """Random images and classes in the place of real ones: a function of step and sample."""

    def take(self, counter: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See ImageFeed.take."""
        rng = RandomStream(counter, "random images", n)
        images = (256 * rng.uniform("images", *self.shape)).to(torch.uint8)
        return images, one_hot_labels(rng, self.label_dim)


def worst(errors: Iterable[float]) -> float:
    """The largest, and inf where one is NaN, which is no larger than anything."""
    return max(math.inf if math.isnan(error) else error for error in errors)


def flat(tensors: Iterable[torch.Tensor | None]) -> torch.Tensor:
    """Concatenate all values, float64; skips None."""
    return torch.cat([t.detach().double().flatten() for t in tensors if t is not None])


def parameters(trainer: Trainer) -> list[torch.Tensor]:
    """List all weights of the trained networks and the EMA."""
    nets = *trainer.method.networks.values(), *trainer.emas
    return fsdp.local_shards([p.detach() for net in nets for p in net.parameters()])


def weights(trainer: Trainer) -> torch.Tensor:
    """Return all weights of the trained networks and the EMA, float64."""
    return flat(parameters(trainer))


def norm(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the 2-norm over all tensors, in float64 and one tensor at a time."""
    return torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt()


def distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> torch.Tensor:
    """Return the 2-norm of the difference."""
    return norm(x.double() - y for x, y in zip(a, b, strict=True))


def relative(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The relative error in the 2-norm over all tensors of a list."""
    return float(distance(found, expected) / norm(expected))


def disagreement(
    ours: list[torch.Tensor], eager: list[torch.Tensor], exact: list[torch.Tensor]
) -> str:
    """Compare `ours` with `exact`; return the reason if it is wrong, else "".

    The error may be 1.5 times eager's in the same dtype, at least ERROR; the scale is within SCALE
    of eager's or of the exact one, from which eager's own may be further off.
    """
    error = relative(ours, exact)
    limit = max(1.5 * relative(eager, exact), ERROR)
    sums = [
        torch.stack([((a.double() - b) * c).sum(), ((a.double() - c) * c).sum()])
        for a, b, c in zip(ours, eager, exact, strict=True)
    ]
    of_eager, of_exact = (torch.stack(sums).sum(0) / norm(exact) ** 2).tolist()
    if not (abs(of_eager) <= SCALE or abs(of_exact) <= SCALE):  # NaN included
        return f"{of_eager:+.1%} in scale"
    return "" if error <= limit else f"off by {error:.1e}, {limit:.1e} allowed"


def network(config: NetworkConfig, device: torch.device) -> Network:
    """Random weights and biases, without the zeros of a fresh network."""
    rng = torch.Generator(device).manual_seed(0)
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda), torch.device(device):
        torch.manual_seed(0)  # of Fourier features
        net = build_network(config)
    with torch.no_grad():
        for p in net.parameters():
            noise = torch.randn(p.shape, generator=rng, device=device)
            p.copy_(noise.mul_(0.5 * p[0].numel() ** -0.5)) if p.dim() > 1 else p.add_(0.1 * noise)
    return net


@torch.no_grad()
def perturb_trained_networks(trainer: Trainer) -> None:
    """Perturb every trained network: SiD's generator has no gradient where ψ equals φ."""
    rng = torch.Generator(trainer.device).manual_seed(3)
    for net in trainer.method.networks.values():
        for p in net.parameters():
            noise = torch.randn(p.shape, generator=rng, device=p.device)
            p.add_(0.5 * p.std(correction=0) * noise)
    trainer.load_state_dict(trainer.state_dict())


def build(job: Job, candidate: Candidate, **changes: Any) -> Trainer:
    """A trainer of the job's steps in the full regime, with other settings where given."""
    device = torch.device(job.device)
    candidate.apply(job.kernels, device)
    settings = mixed_precision.resolve_precision(
        dataclasses.replace(job.settings, **changes), device
    )
    if isinstance(settings, SiDASettings):  # the trial's few images hold a smaller group
        micro = settings.micro_batch or settings.batch_size
        group = math.gcd(group_size(settings), micro)
        settings = dataclasses.replace(settings, adversarial_group=group)
    method = data_free_method(network(job.network, device), settings, RandomFeed)
    trainer = Trainer(
        method, settings, sharding=fsdp.SINGLE_PROCESS, cuda_graph=candidate.cuda_graph,
        compile=candidate.compile, channels_last=candidate.channels_last,
    )  # fmt: skip
    if job.recompute:
        checkpoint_activations(*method.networks.values(), *method.frozen.values())
    trainer.images, trainer.steps = job.images, job.images // settings.batch_size
    perturb_trained_networks(trainer)
    return trainer


def eager(job: Job, candidate: Candidate) -> Candidate:
    """What a candidate is compared with."""
    return Candidate(dict.fromkeys(candidate.kernels, "eager"))


def gradients_of(trainer: Trainer, phase: Phase, inputs: Any) -> dict[str, list[torch.Tensor]]:
    """Compute a phase's losses and gradients; several terms one by one, as one may be small."""
    results = {}
    net = trainer.method.networks[phase.network]
    factors = trainer.factors[phase.name]
    for term in list(phase.terms) or ["loss"]:
        for name, factor in factors.items():
            factor.fill_(name == term)
        seen: list[Any] = []

        def loss(inputs: Any, seen=seen) -> Any:
            seen.append(phase.loss(inputs))
            return seen[0]

        recorded = dataclasses.replace(phase, loss=loss)
        trainer.backward(recorded, inputs, first=True, last=True)
        what = f"{phase.name} {'' if term == 'loss' else term}".strip()
        results[f"{what} losses".strip()] = [getattr(seen[0], term).detach()]
        grads = [p.grad.clone() for p in net.parameters() if p.grad is not None]
        results[f"{what} gradients".strip()] = grads
        trainer.clear()
    return results


def gradients_agree(job: Job, candidate: Candidate, precision: str | None = None) -> str:
    """Losses, and gradients of all networks, of the same draws without dropout."""
    device, plain = torch.device(job.device), eager(job, candidate)
    kind = mixed_precision.set_precision(precision or job.settings.precision, device)
    augment = {"augment_p": 1.0} if job.settings.augment_p else {}
    images = IMAGES
    if kind != "fp32":
        images = min(max(PIXELS // job.network.resolution**2, IMAGES), MAX_IMAGES)
    draws: dict[str, Any] = {}

    def outcome(candidate: Candidate, kind: str) -> dict[str, list[torch.Tensor]]:
        gc.collect()  # frees the last trainer
        trainer = build(
            job, dataclasses.replace(candidate, cuda_graph=False), precision=kind, dropout=0.0,
            batch_size=images, micro_batch=None, **augment,
        )  # fmt: skip
        drawn = trainer.sample_inputs()
        draws.update(draws or drawn)  # those of the first
        results: dict[str, list[torch.Tensor]] = {}
        for phase in trainer.method.phases:
            results |= gradients_of(trainer, phase, draws[phase.name][0])
        return results

    exact = outcome(plain, "fp32")
    usual = exact if kind == "fp32" else outcome(plain, kind)
    ours = outcome(candidate, kind)
    wrong = {name: disagreement(ours[name], usual[name], exact[name]) for name in exact}
    return ", ".join(f"{name} {what}" for name, what in wrong.items() if what)


def update_agrees(job: Job, candidate: Candidate) -> str:
    """Three optimizer updates from given gradients.

    Updates from a candidate's own gradients would hide errors: with β1 = 0 and a small ε they are
    signs.
    """

    def outcome(candidate: Candidate) -> dict[str, list[torch.Tensor]]:
        gc.collect()
        quiet = dataclasses.replace(candidate, cuda_graph=False, compile=False)
        trainer = build(job, quiet, batch_size=IMAGES, micro_batch=None)
        before = {name: t.detach().clone() for name, t in trainer.state_dict().items()}
        rng = torch.Generator(trainer.device).manual_seed(5)
        for beta in trainer.ema_betas:
            beta.fill_(0.5)
        for size in (1.0, 0.1, 10.0):
            for phase in trainer.method.phases:
                optimizer = trainer.optimizers[phase.network]
                trainer.lr[phase.network].fill_(1e-2)
                optimizer.totals.fill_(1)
                for p in optimizer.params:
                    assert p.grad is not None
                    noise = torch.randn(p.shape, generator=rng, device=p.device)
                    p.grad.copy_(noise.mul_(size))
                trainer.update(phase)
        kinds: dict[str, list[torch.Tensor]] = {}
        for name, t in trainer.state_dict().items():
            kind = ".".join(name.split(".")[:2])
            kinds.setdefault(kind, []).append(before[name].sub_(t.detach()))
        optimizers = trainer.optimizers.values()
        copies = [leaf.tensor.detach() for o in optimizers for leaf in o.net.compute_copies]
        return {kind: ts for kind, ts in (kinds | {"copies": copies}).items() if ts}

    expected, found = outcome(eager(job, candidate)), outcome(candidate)
    # A number between two of 16 bit may fall to either.
    limits = {kind: 1e-2 if kind == "copies" else ERROR for kind in expected}
    errors = {kind: relative(found[kind], expected[kind]) for kind in expected}
    wrong = [kind for kind, error in errors.items() if not error <= limits[kind]]
    return ", ".join(f"update of {kind} off by {errors[kind]:.1e}" for kind in wrong)


def dropout_agrees(job: Job, candidate: Candidate) -> str:
    """The share of zeros and the scale of the rest, after every norm with dropout."""
    if not (p := job.settings.dropout):
        return ""
    quiet = dataclasses.replace(candidate, cuda_graph=False, compile=False)
    trainer = build(job, quiet, batch_size=IMAGES, micro_batch=None)
    sums = torch.zeros(4, dtype=torch.float64, device=trainer.device)

    def look(module: GroupNorm, inputs: tuple, named: dict[str, Any], out: Any) -> None:
        if named.get("dropout"):
            with torch.no_grad():
                whole = module.forward(*inputs, **{**named, "dropout": 0.0}).y.double()
            y, there = out.y.detach().double(), whole != 0
            zeros = (y == 0) & there
            both = (y * whole).sum(), (whole * whole)[~zeros].sum()
            sums.add_(torch.stack([zeros.sum(), there.sum(), *both]))

    for net in trainer.method.networks.values():
        for module in net.modules():
            if isinstance(module, GroupNorm):
                module.register_forward_hook(look, with_kwargs=True)
    for phase in trainer.method.phases:
        trainer.backward(phase, first=True, last=True)
    zeros, count, product, square = sums.tolist()
    if not count:  # the family has no group norms
        return ""
    share, scale = zeros / max(count, 1), product / max(square, 1e-30) * (1 - p)
    # Five standard deviations, and p is rounded to 2⁻¹⁶.
    if not abs(share - p) <= 5 * math.sqrt(p * (1 - p) / max(count, 1)) + 2**-16:
        return f"dropout of {share:.3f}, not {p:g}"
    return "" if abs(scale - 1) <= SCALE else f"dropout leaves {scale - 1:+.1%} in scale"


def replays_agree(job: Job, candidate: Candidate) -> str:
    """Replayed steps against eager steps of the same backends; a replay must not synchronize."""
    if not candidate.cuda_graph:
        return ""
    device = torch.device(job.device)
    most = cuda_graphs.MAX_SINGLE_GRAPH_MICRO_BATCHES + 1
    rounds = min(grad_accum_steps(job.settings, job.ranks), most)
    # Large updates, proportional to the gradients: the check compares displacements.
    rates = {f.name: 1e-2 for f in dataclasses.fields(job.settings) if f.name.endswith("lr")}
    changes = rates | {"batch_size": IMAGES * rounds, "micro_batch": IMAGES, "eps": 1.0}

    def run(graph: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return the weights after some steps, and how far these moved them."""
        trainer = build(job, dataclasses.replace(candidate, cuda_graph=graph), **changes)
        start = [p.clone() for p in parameters(trainer)]
        for step in range(STEPS):
            waits_not = graph and step == STEPS - 1 and device.type == "cuda"
            if waits_not:
                torch.cuda.synchronize(device)
                torch.cuda.set_sync_debug_mode("error")
            trainer.step()
            if waits_not:
                torch.cuda.set_sync_debug_mode("default")
        end = parameters(trainer)
        return [p.clone() for p in end], distance(end, start)

    eager, moved = run(False)
    gc.collect()  # frees the trainer: a large network would not fit twice
    replayed, _ = run(True)
    apart = float(distance(replayed, eager) / moved)
    if apart <= BOUND:  # NaN is not
        return ""
    return (
        f"replayed and eager weights differ by {apart:.1e} of the distance that the steps moved "
        f"them; {BOUND:.0e} is allowed"
    )


PROOFS = (gradients_agree, update_agrees, dropout_agrees, replays_agree)


def manageable(job: Job) -> Job:
    """Reduce a large network to a block per level: proofs hold several times its weights."""
    with torch.device("meta"):
        size = sum(p.numel() for p in build_network(job.network).parameters())
    if size <= LARGE:
        return job
    return dataclasses.replace(job, network=dataclasses.replace(job.network, num_blocks=1))


def wrong(job: Job, candidate: Candidate) -> str:
    """Return why a whole step is wrong; "" if it is right."""
    job = manageable(job)
    return next(filter(None, (proof(job, candidate) for proof in PROOFS)), "")


def wrong_alone(job: Job, candidate: Candidate) -> str:
    """What is wrong with the candidate's operations in float32, where no rounding hides it."""
    job = manageable(job)
    changed = {op for op, backend in candidate.kernels.items() if backend != "eager"}
    if changed in ({"adam_ema"}, {"weight_norm"}):  # both act in updates
        return update_agrees(job, candidate)
    return gradients_agree(job, candidate, "fp32")
