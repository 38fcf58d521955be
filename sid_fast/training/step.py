"""One training step of any method: its phases in order, each over several micro-batches."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch

from sid_fast.config.types import check, ema_stds, grad_accum_steps, resume_fingerprint
from sid_fast.errors import OutOfMemory, allocation_request, is_out_of_memory
from sid_fast.methods.base import Method, Phase, RandomStream, stream_number
from sid_fast.performance import fsdp, mixed_precision, process_group, ranges
from sid_fast.performance.compile import compile_blocks
from sid_fast.performance.cuda_graphs import MAX_SINGLE_GRAPH_MICRO_BATCHES, GraphedStep
from sid_fast.training import power_ema
from sid_fast.training.optimizer import AdamWithEMA, ema_beta
from sid_fast.training.random_streams import counter_of

# Part of the fingerprint: a checkpoint drawn with another generator cannot be resumed.
RANDOM_NUMBERS = "Philox, counted by sample"
Inputs = Mapping[str, Sequence[Any]]  # phase name -> inputs of each micro-batch


class Trainer:
    """Trains the networks of a method, in place.

    The batch is split evenly: rank r of w takes batch_size/w samples, starting at r·batch_size/w.

    Args:
        method: The networks, their phases and losses.
        settings: batch_size, micro_batch, precision, dropout, beta2, eps and the EMA half-life,
            as in Settings.
        seed: Determines every random number.
        sharding: How the networks are distributed; default: replicated on every rank.
        fingerprint: Values that must match for a checkpoint to be resumed, besides settings and
            seed.
        cuda_graph: Replay the step from CUDA graphs; each step then overwrites the metrics that the
            previous one returned. "auto" falls back to eager steps if the capture fails.
        compile: Run every block through torch.compile.
        channels_last: Memory format of weights and feature maps; default: on a GPU only.

    Raises:
        UserError: The settings cannot be used.
    """

    def __init__(
        self,
        method: Method,
        settings: Any,
        seed: int = 0,
        sharding: fsdp.ShardingPlan | None = None,
        fingerprint: Mapping[str, Any] | None = None,
        *,
        cuda_graph: bool | Literal["auto"] = False,
        compile: bool = False,
        channels_last: bool | None = None,
    ):
        check(settings)
        networks, frozen = method.networks.values(), method.frozen.values()
        if sorted(method.networks) != sorted(phase.network for phase in method.phases):
            raise ValueError(
                f"{type(method).__name__}: every trained network needs exactly one phase; "
                f"the networks are {list(method.networks)}"
            )
        self.device = next(next(iter(networks)).parameters()).device
        self.settings = s = mixed_precision.resolve_precision(settings, self.device)
        sharding = sharding or fsdp.replicated()
        self.rank, self.ranks = sharding.rank, sharding.ranks
        self.grad_accum_steps = grad_accum_steps(s, self.ranks)
        self.samples = s.batch_size // self.ranks  # per step on this rank
        self.method, self.seed = method, seed
        run = {"seed": seed, "random numbers": RANDOM_NUMBERS}
        self.resume_fingerprint = resume_fingerprint(s) | run | dict(fingerprint or {})
        if feed := method.feed:
            given = feed.batch_size, feed.rank, feed.world_size
            if given != (s.batch_size, self.rank, self.ranks):
                raise ValueError(f"the feed's batch_size, rank and world_size are {given}")
            with process_group.main_process_first():  # one process of a node reads the files
                self.resume_fingerprint |= feed.fingerprint()
        self.steps = self.images = 0

        # Values that change every step stay on the device, where a CUDA graph can read them.
        self.counter = counter_of(seed, self.device)
        scalar: dict[str, Any] = {"dtype": torch.float64, "device": self.device}
        gammas = power_ema.exponents(ema_stds(s))
        self.ema_gammas = sorted(gammas)  # the widest first
        self.ema_betas = [torch.zeros((), **scalar) for _ in gammas or (None,)]
        self.lr = {phase.network: torch.zeros((), **scalar) for phase in method.phases}
        self.factors = {
            phase.name: {name: torch.zeros((), **scalar) for name in phase.terms}
            for phase in method.phases
        }
        self.phases = self._active()  # of the next step
        self.enabled = torch.ones((), dtype=torch.bool, device=self.device)  # False: a dry run

        dtype = mixed_precision.TYPES[s.precision]
        if channels_last is None:
            channels_last = self.device.type == "cuda"
        if channels_last and sharding.mesh is None:
            for net in (*networks, *frozen):
                net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # no stub
        # Dropout seeds, one row (key, stream, sample) per block. Each block has its own stream, and
        # the sample number keeps counting from step to step.
        self.dropout_seeds = {}
        for phase in method.phases:
            net = method.networks[phase.network]
            blocks = torch.arange(len(net.backbone.blocks()), device=self.device)
            stream = (blocks + stream_number(phase.name, "dropout")) << 32
            seeds = torch.stack([self.counter[0].expand_as(stream), stream, 0 * stream], 1)
            net.set_dropout(s.dropout, seeds)
            self.dropout_seeds[phase.name] = seeds
        for net in frozen:
            net.requires_grad_(False).eval()
        if compile:  # before the blocks are sharded
            compile_blocks(*networks, *frozen)
        for net in frozen:
            if not sharding.reshard_after_forward:  # shards would only cost an all-gather
                net.compute_in(dtype, frozen=True)
            else:
                net.compute_dtype = dtype
                sharding.shard(net, dtype)
        self.optimizers = {
            phase.network: AdamWithEMA(
                method.networks[phase.network], phase.beta1, s.beta2, s.eps, dtype, sharding,
                emas=len(self.ema_betas) * (phase.network == method.averaged),
                metrics=phase.metrics, grad_clip=phase.grad_clip,
            )
            for phase in method.phases
        }  # fmt: skip
        self.emas = self.optimizers[method.averaged].emas
        self.ema = self.emas[0]
        self.graphs = None
        if cuda_graph:
            self.graphs = GraphedStep(
                self.graph_segments(), self.dry_run, self.updates_disabled, self.clear, self.device,
                required=cuda_graph != "auto",
            )  # fmt: skip

    def step(self, inputs: Inputs | None = None) -> dict[str, torch.Tensor]:
        """Update the network of every active phase once, in the order of the phases.

        Args:
            inputs: For each active phase, the inputs of every micro-batch; sampled if None.

        Returns:
            The metrics of AdamWithEMA.step for each active phase, named PHASE/METRIC.
        """
        self._count_step()
        if (active := self._active()) != self.phases:
            self.phases = active
            if self.graphs:
                self.graphs.restart(self.graph_segments())
        for phase in self.method.phases:
            self.lr[phase.network].fill_(phase.lr(self.images))
            for name, factor in phase.terms.items():
                self.factors[phase.name][name].fill_(factor(self.images))
        for beta, decay in zip(self.ema_betas, self._ema_decays(), strict=True):
            beta.fill_(decay)
        if inputs is None:
            self._load_images()
        metrics = self.graphs() if self.graphs and inputs is None else self.run(inputs)
        self.steps += 1
        self.images += self.settings.batch_size
        return metrics

    def _ema_decays(self) -> list[float]:
        """Return β of each EMA for the next step."""
        s = self.settings
        if self.ema_gammas:
            return [power_ema.decay(self.images, s.batch_size, g) for g in self.ema_gammas]
        return [ema_beta(self.images, s.batch_size, s.ema_halflife_kimg, s.ema_rampup_ratio)]

    def run(self, inputs: Inputs | None = None) -> dict[str, torch.Tensor]:
        """Run all phases on the device: a pure function of `inputs`, or of self.counter."""
        metrics: dict[str, torch.Tensor] = {}
        last = self.grad_accum_steps - 1
        for phase in self.phases:
            for i in range(self.grad_accum_steps):
                name = f"{phase.name} step".strip()
                batch = f"{name}, micro-batch {i + 1} of {self.grad_accum_steps}"
                with annotate_oom(batch), ranges.named(batch):
                    micro_batch = inputs and inputs[phase.name][i]
                    self.backward(phase, micro_batch, first=i == 0, last=i == last)
            metrics |= self.update(phase)
        return metrics

    def graph_segments(self) -> list[tuple[Callable[[], Any], int]]:
        """Split run() into (callable, repetitions) pairs to capture.

        A step of few micro-batches is one segment. Otherwise each phase has three: its first
        micro-batch, the middle ones, and the last one with the update.
        """
        if self.grad_accum_steps <= MAX_SINGLE_GRAPH_MICRO_BATCHES:
            return [(self.run, 1)]
        segments: list[tuple[Callable[[], Any], int]] = []
        for phase in self.phases:
            backward = partial(self.backward, phase)
            segments += [
                (partial(backward, first=True), 1),
                (backward, self.grad_accum_steps - 2),
                (partial(self._last, phase), 1),
            ]
        return segments

    def _active(self) -> tuple[Phase, ...]:
        return tuple(phase for phase in self.method.phases if phase.active(self.images))

    def _last(self, phase: Phase) -> dict[str, torch.Tensor]:
        self.backward(phase, last=True)
        return self.update(phase)

    def backward(
        self, phase: Phase, inputs: Any = None, *, first: bool = False, last: bool = False
    ) -> None:
        """Run one micro-batch of a phase forward and backward; the last one syncs gradients."""
        if first:
            self._enter(phase)
        optimizer, n = self.optimizers[phase.network], self.samples // self.grad_accum_steps
        if inputs is None:
            inputs = phase.sample_inputs(self._stream(phase, n))
        if self.settings.dropout:
            sample = self.dropout_seeds[phase.name][:, 2]
            start = self.counter[2].expand_as(sample)
            torch.add(start, self.counter[1], alpha=self.settings.batch_size, out=sample)
        with ranges.named(f"{phase.name} forward".strip()):
            losses = phase.loss(inputs)
        losses = losses._replace(loss=torch.where(losses.kept, losses.loss, 0.0))
        loss, factors = losses.loss, self.factors[phase.name]
        if factors:
            terms = [factor * getattr(losses, name) for name, factor in factors.items()]
            loss = torch.where(losses.kept, torch.stack(terms).sum(0), 0.0)
        scale = phase.loss_scale / self.settings.batch_size
        with ranges.named(f"{phase.name} backward".strip()):
            optimizer.backward(loss, losses, scale, last)
        self.counter[2].add_(n)

    def _load_images(self) -> None:
        """Stage the real images of the next step, if the method takes any."""
        if self.method.feed:
            with ranges.named("real images"):
                self.method.feed.load(self.steps)

    def _enter(self, phase: Phase) -> None:
        """Unfreeze this phase's network alone, and restart at the rank's first sample."""
        for name, net in self.method.networks.items():
            net.requires_grad_(name == phase.network).train(name == phase.network)
        self._count_from(self.rank * self.samples)

    def _count_step(self) -> None:
        self.counter[1].fill_(self.steps)

    def _count_from(self, first: int) -> None:
        self.counter[2].fill_(first)

    def _stream(self, phase: Phase, n: int) -> RandomStream:
        return RandomStream(self.counter, phase.name, n)

    def update(self, phase: Phase) -> dict[str, torch.Tensor]:
        """End a phase: average gradients over ranks, replace non-finite ones, Adam, EMA."""
        optimizer = self.optimizers[phase.network]
        with ranges.named(f"{phase.name} update".strip()):
            ema_betas = self.ema_betas if optimizer.emas else ()
            metrics = optimizer.step(self.lr[phase.network], ema_betas, self.enabled)
        if phase in (self.phases[-1], self.method.phases[-1]):
            # Captured steps must start and end in the same state: with all networks sharded.
            for each in self.optimizers.values():
                each.grad_sync.after_update()
        prefix = f"{phase.name}/" if phase.name else ""
        return {f"{prefix}{name}": value for name, value in metrics.items()}

    def before_sampling(self) -> None:
        """Prepare the EMAs for sample grids, evaluations and the state that goes with them."""
        for ema in self.emas:
            ema.before_sampling()

    def sample_inputs(self) -> dict[str, list[Any]]:
        """Sample this rank's inputs for the next step: a function of (seed, step, rank)."""
        n = self.samples // self.grad_accum_steps
        inputs: dict[str, list[Any]] = {}
        self._count_step()
        self._load_images()
        for phase in self.method.phases:
            inputs[phase.name] = []
            for i in range(self.grad_accum_steps):
                self._count_from(self.rank * self.samples + i * n)
                inputs[phase.name].append(phase.sample_inputs(self._stream(phase, n)))
        return inputs

    def dry_run(self) -> None:
        """Run each phase's first and last micro-batch: every kernel, allocation and collective."""
        for _ in range(2 if self.grad_accum_steps == 1 else 1):
            for phase in self.method.phases:
                if self.grad_accum_steps > 1:
                    self.backward(phase, first=True)
                self.backward(phase, first=self.grad_accum_steps == 1, last=True)
                self.update(phase)

    @contextlib.contextmanager
    def updates_disabled(self) -> Iterator[None]:
        """Discard the updates of steps inside the block."""
        self.enabled.fill_(False)
        try:
            yield
        finally:
            self.enabled.fill_(True)

    def clear(self) -> None:
        """Reset the accumulated gradients and metrics."""
        for optimizer in self.optimizers.values():
            optimizer.totals.zero_()
            optimizer.grad_sync.zero()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the live tensors of the training state, by name; sharded ones are DTensors.

        `steps` and `images` complete the state: random numbers are functions of (seed, steps).
        """
        state: dict[str, torch.Tensor] = {}
        for name, optimizer in self.optimizers.items():
            state |= optimizer.state_dict(name)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load tensors in place and rebuild the low-precision weight copies.

        Tensors that are already those of `state_dict()` are not copied.
        """
        for name, tensor in self.state_dict().items():
            if state[name] is not tensor:
                tensor.copy_(state[name])
        for net in self.method.networks.values():
            net.update_compute_copies()


@contextlib.contextmanager
def annotate_oom(what: str) -> Iterator[None]:
    """Turn an out-of-memory error into OutOfMemory, naming `what` and the requested size."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"{what}: {allocation_request(error)}") from error
