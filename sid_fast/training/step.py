"""A training step of any method: its phases, each over several micro-batches."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch

from sid_fast.config.types import check, grad_accum_steps, resume_fingerprint
from sid_fast.errors import OutOfMemory
from sid_fast.methods.base import Method, Phase, RandomStream, stream_number
from sid_fast.performance import fsdp, mixed_precision
from sid_fast.performance.compile import compile_blocks
from sid_fast.performance.cuda_graphs import FEW, GraphedStep
from sid_fast.training.optimizer import AdamWithEMA, ema_beta
from sid_fast.training.random_streams import counter_of

# What a state of another way of drawing would not go on with.
RANDOM_NUMBERS = "Philox, counted by sample"
Inputs = Mapping[str, Sequence[Any]]  # of every phase, one a micro-batch


class Trainer:
    """Trains the networks of a method, in place.

    settings: batch_size, micro_batch, precision, dropout, beta2, eps and the average's half-life,
    as in Settings. seed decides every random number. sharding says what each rank keeps of the
    networks; without it every process keeps whole ones. fingerprint: what must be equal for a
    training state to fit, besides settings and seed. cuda_graph replays the step's launches from
    CUDA graphs (what step returns is then overwritten by the next); "auto" goes on without them
    where the capture fails. compile runs every block through torch.compile.

    Every rank takes an equal part of the batch: rank r of w its samples from r·batch_size/w on.
    UserError for settings that cannot be used.
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
    ):
        check(settings)
        networks, frozen = method.networks.values(), method.frozen.values()
        if sorted(method.networks) != sorted(phase.network for phase in method.phases):
            raise ValueError(
                f"{type(method).__name__}: every network that learns takes one phase, and "
                f"networks are {list(method.networks)}"
            )
        self.device = next(next(iter(networks)).parameters()).device
        self.settings = s = mixed_precision.settle(settings, self.device)
        sharding = sharding or fsdp.replicated()
        self.rank, self.ranks = sharding.rank, sharding.ranks
        self.grad_accum_steps = grad_accum_steps(s, self.ranks)
        self.samples = s.batch_size // self.ranks  # of this rank
        self.method, self.seed = method, seed
        run = {"seed": seed, "random numbers": RANDOM_NUMBERS}
        self.resume_fingerprint = resume_fingerprint(s) | run | dict(fingerprint or {})
        self.steps = self.images = 0

        # What changes from step to step lies on the device, where a CUDA graph can read it.
        self.counter = counter_of(seed, self.device)
        self.host_counter = counter_of(seed, torch.device("cpu"))  # for what is read on the host
        scalar: dict[str, Any] = {"dtype": torch.float64, "device": self.device}
        self.ema_beta = torch.zeros((), **scalar)
        self.lr = {phase.network: torch.zeros((), **scalar) for phase in method.phases}
        self.enabled = torch.ones((), dtype=torch.bool, device=self.device)  # False: a rehearsal

        dtype = mixed_precision.TYPES[s.precision]
        if self.device.type == "cuda" and sharding.mesh is None:
            for net in (*networks, *frozen):
                net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # no stub
        # The seeds of a network's dropout, a row each block: a stream of its own, in which samples
        # are counted from step to step.
        self.dropout_seeds = {}
        for phase in method.phases:
            net = method.networks[phase.network]
            blocks = torch.arange(len(net.model.blocks()), device=self.device)
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
                ema=phase.network == method.averaged,
            )
            for phase in method.phases
        }  # fmt: skip
        ema = self.optimizers[method.averaged].ema
        assert ema is not None
        self.ema = ema
        self.graphs = None
        if cuda_graph:
            self.graphs = GraphedStep(
                self.parts(), self.rehearse, self.changing_nothing, self.clear, self.device,
                required=cuda_graph != "auto",
            )  # fmt: skip

    def step(self, inputs: Inputs | None = None) -> dict[str, torch.Tensor]:
        """Update every network once, in the order of the phases.

        inputs: of every phase by name, one a micro-batch; without them they are sampled. Returns
        what AdamWithEMA.step says of each phase, as PHASE/NAME.
        """
        self._count_step()
        for phase in self.method.phases:
            self.lr[phase.network].fill_(phase.lr(self.images))
        s = self.settings
        decay = ema_beta(self.images, s.batch_size, s.ema_halflife_kimg, s.ema_rampup_ratio)
        self.ema_beta.fill_(decay)
        metrics = self.graphs() if self.graphs and inputs is None else self.run(inputs)
        self.steps += 1
        self.images += s.batch_size
        return metrics

    def run(self, inputs: Inputs | None = None) -> dict[str, torch.Tensor]:
        """The launches of a step: a function of the inputs, or of self.counter."""
        metrics: dict[str, torch.Tensor] = {}
        last = self.grad_accum_steps - 1
        for phase in self.method.phases:
            for i in range(self.grad_accum_steps):
                name = f"{phase.name} step".strip()
                with annotate_oom(f"{name}, round {i + 1} of {self.grad_accum_steps}"):
                    given = inputs and inputs[phase.name][i]
                    self.backward(phase, given, first=i == 0, last=i == last)
            metrics |= self.update(phase)
        return metrics

    def parts(self) -> list[tuple[Callable[[], Any], int]]:
        """What run() calls, and how often: one callable, or with many micro-batches three a phase.

        Then: a phase's first micro-batch, those that follow, and the last with the update.
        """
        if self.grad_accum_steps <= FEW:
            return [(self.run, 1)]
        found: list[tuple[Callable[[], Any], int]] = []
        for phase in self.method.phases:
            each = partial(self.backward, phase)
            found += [
                (partial(each, first=True), 1),
                (each, self.grad_accum_steps - 2),
                (partial(self._last, phase), 1),
            ]
        return found

    def _last(self, phase: Phase) -> dict[str, torch.Tensor]:
        self.backward(phase, last=True)
        return self.update(phase)

    def backward(
        self, phase: Phase, inputs: Any = None, *, first: bool = False, last: bool = False
    ) -> None:
        """A micro-batch of a phase: sample, forward, backward; ranks exchange in the last one."""
        if first:
            self._enter(phase)
        optimizer, n = self.optimizers[phase.network], self.samples // self.grad_accum_steps
        if inputs is None:
            inputs = phase.sample_inputs(self._stream(phase, n))
        if self.settings.dropout:
            sample = self.dropout_seeds[phase.name][:, 2]
            start = self.counter[2].expand_as(sample)
            torch.add(start, self.counter[1], alpha=self.settings.batch_size, out=sample)
        losses = phase.loss(inputs)
        losses = losses._replace(loss=torch.where(losses.kept, losses.loss, 0.0))
        scale = phase.loss_scale / self.settings.batch_size
        optimizer.backward(losses, scale, last)
        self.counter[2].add_(n)
        self.host_counter[2].add_(n)

    def _enter(self, phase: Phase) -> None:
        """The phase's network learns, the others do not; the rank's first sample is the next."""
        for name, net in self.method.networks.items():
            net.requires_grad_(name == phase.network).train(name == phase.network)
        self._count_from(self.rank * self.samples)

    def _count_step(self) -> None:
        self.counter[1].fill_(self.steps)
        self.host_counter[1].fill_(self.steps)

    def _count_from(self, first: int) -> None:
        self.counter[2].fill_(first)
        self.host_counter[2].fill_(first)

    def _stream(self, phase: Phase, n: int) -> RandomStream:
        return RandomStream(self.counter, phase.name, n, self.host_counter)

    def update(self, phase: Phase) -> dict[str, torch.Tensor]:
        """The end of a phase: average over ranks, clean up, Adam, moving average."""
        optimizer = self.optimizers[phase.network]
        metrics = optimizer.step(self.lr[phase.network], self.ema_beta, self.enabled)
        if phase is self.method.phases[-1]:
            # A step ends as it began, as its graphs need it: all networks in shards again.
            for each in self.optimizers.values():
                each.gradients.updated()
        prefix = f"{phase.name}/" if phase.name else ""
        return {f"{prefix}{name}": value for name, value in metrics.items()}

    def sample_inputs(self) -> dict[str, list[Any]]:
        """The inputs of this rank's coming step: a function of seed and step alone."""
        n = self.samples // self.grad_accum_steps
        found: dict[str, list[Any]] = {}
        self._count_step()
        for phase in self.method.phases:
            found[phase.name] = []
            for i in range(self.grad_accum_steps):
                self._count_from(self.rank * self.samples + i * n)
                found[phase.name].append(phase.sample_inputs(self._stream(phase, n)))
        return found

    def rehearse(self) -> None:
        """Every phase's first and last micro-batch: all that a step needs has then been tried."""
        for _ in range(2 if self.grad_accum_steps == 1 else 1):
            for phase in self.method.phases:
                if self.grad_accum_steps > 1:
                    self.backward(phase, first=True)
                self.backward(phase, first=self.grad_accum_steps == 1, last=True)
                self.update(phase)

    @contextlib.contextmanager
    def changing_nothing(self) -> Iterator[None]:
        """Updates inside the block leave no trace."""
        self.enabled.fill_(False)
        try:
            yield
        finally:
            self.enabled.fill_(True)

    def clear(self) -> None:
        """Forget gradients and sums of micro-batches."""
        for optimizer in self.optimizers.values():
            optimizer.totals.zero_()
            optimizer.gradients.zero()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The live tensors of the training state, by name; sharded ones are DTensors.

        `steps` and `images` complete the state. Random numbers are functions of (seed, steps).
        """
        found: dict[str, torch.Tensor] = {}
        for name, optimizer in self.optimizers.items():
            found |= optimizer.state_dict(name)
        return found

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load tensors in place and rebuild the low-precision weight copies.

        Tensors of `state_dict()` itself, already loaded into, are taken as they are.
        """
        for name, tensor in self.state_dict().items():
            if state[name] is not tensor:
                tensor.copy_(state[name])
        for net in self.method.networks.values():
            net.update_compute_copies()


@contextlib.contextmanager
def annotate_oom(what: str) -> Iterator[None]:
    """Out of memory in the block becomes OutOfMemory, naming `what` and the size asked for."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        asked = ". ".join(str(error).split(". ")[:2])  # statistics follow
        raise OutOfMemory(f"{what}: {asked}") from error
