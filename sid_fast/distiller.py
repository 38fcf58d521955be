"""Score identity Distillation: one step of it (arXiv 2404.04057, algorithm 1)."""

import copy
import dataclasses
from typing import ClassVar, Literal

import torch

from sid_fast import augment, losses
from sid_fast.config.settings import Settings, check, identity_of, rounds_of
from sid_fast.draws import PHASES, Draw, draw_round, dropout_seed, seed_of
from sid_fast.engine import parallel, precision
from sid_fast.engine.checkpoint import digest
from sid_fast.engine.compile import compile_blocks
from sid_fast.engine.fit import naming
from sid_fast.engine.graphs import StepGraphs
from sid_fast.engine.optimizer import Optimizer, ema_beta
from sid_fast.errors import UserError
from sid_fast.kernels import Losses
from sid_fast.networks import EDMNetwork

Draws = dict[str, list[Draw]]


class Distiller:
    """Distils a teacher f_φ into a one-step generator G_θ, with a fake score f_ψ between them.

    teacher: a network on the device to use; it is frozen, or copied where its type has to change.
    settings: see Settings. seed decides the draws and the dropout of every step, with the step's
    number and the process's rank. label_weights [label_dim]: in what proportion classes are
    drawn; uniform if None. Processes of torch.distributed, if there are any, each take their part
    of the batch; layout says what of the networks each of them keeps. cuda_graph replays the
    step's launches from CUDA graphs (what step returns is then overwritten by the next); "auto"
    goes on without them where the capture fails. compile runs every block through torch.compile.

    generator, fake_score and ema are modules whose state_dict has the published names; all
    start from the teacher. Raises UserError for settings that cannot be used.
    """

    shown: ClassVar = {
        "fake/loss": "fake",
        "generator/loss": "generator",
        "generator/distance": "‖f_φ-f_ψ‖²",
    }

    def __init__(
        self,
        teacher: EDMNetwork,
        settings: Settings,
        seed: int = 0,
        label_weights: torch.Tensor | None = None,
        layout: parallel.Layout = parallel.WHOLE,
        *,
        cuda_graph: bool | Literal["auto"] = False,
        compile: bool = False,
    ):
        check(settings)
        self.device = next(teacher.parameters()).device
        settings = precision.settle(settings, self.device)
        self.rounds = rounds_of(settings, parallel.world())
        if settings.augment_p and not teacher.config.augment_dim:
            raise UserError(
                f"augment_p={settings.augment_p}: the teacher takes no augmentation labels, so "
                "warped images would leak into the generator; use augment_p 0"
            )
        self.settings, self.seed = settings, seed
        self.label_weights = None if label_weights is None else label_weights.to(self.device)
        self.identity = identity_of(settings) | {
            "seed": seed,
            "teacher": digest(teacher.state_dict().values()),
            "label weights": None if label_weights is None else digest([label_weights]),
        }
        self.rng = torch.Generator(self.device)
        self.steps = self.images = 0

        dtype = precision.TYPES[settings.precision]
        if self.device.type == "cuda" and layout.mesh is None:
            teacher.to(memory_format=torch.channels_last)
        self.generator, self.fake_score = copy.deepcopy(teacher), copy.deepcopy(teacher)
        for net in (self.generator, self.fake_score):
            net.set_dropout(settings.dropout)
        self.generator.config = dataclasses.replace(
            teacher.config, init_sigma=settings.init_sigma, dropout=settings.dropout
        )
        self.teacher = teacher if dtype == torch.float32 else copy.deepcopy(teacher)
        self.teacher.requires_grad_(False).eval()
        if compile:  # before the blocks are sharded
            compile_blocks(self.generator, self.fake_score, self.teacher)
        if layout.gathered:  # whole: in parts it would only cost a message
            self.teacher.compute_in(dtype, frozen=True)
        else:
            self.teacher.compute_dtype = dtype
            layout.shard(self.teacher, dtype)
        s, lies = settings, (dtype, layout)
        self.fake_optimizer = Optimizer(self.fake_score, s.fake_beta1, s.beta2, s.eps, *lies)
        self.generator_optimizer = Optimizer(
            self.generator, s.generator_beta1, s.beta2, s.eps, *lies, ema=True
        )
        self.ema = self.generator_optimizer.ema
        # What changes from step to step lies on the device, where a CUDA graph can read it.
        self.ema_beta = torch.zeros((), dtype=torch.float64, device=self.device)
        self.live = torch.ones((), dtype=torch.bool, device=self.device)  # False: a rehearsal
        self.graphs = StepGraphs(self, cuda_graph != "auto") if cuda_graph else None

    def step(self, draws: Draws | None = None) -> dict[str, torch.Tensor]:
        """Update the fake score, then the generator, then its average; once each.

        draws holds one Draw a round for each phase, {"fake": […], "generator": […]}; without it
        they are drawn. Returns what Optimizer.update says of each, as fake/… and generator/….
        """
        s = self.settings
        self.ema_beta.fill_(
            ema_beta(self.images, s.batch_size, s.ema_halflife_kimg, s.ema_rampup_ratio)
        )
        self.rng.manual_seed(seed_of(self.seed, "draws", self.steps, parallel.rank()))
        with dropout_seed(s.dropout, self.device, self.seed, self.steps, parallel.rank()):
            metrics = self.graphs() if self.graphs and draws is None else self.run(draws)
        self.steps += 1
        self.images += s.batch_size
        return metrics

    def run(self, draws: Draws | None = None, rounds: int = 0) -> dict[str, torch.Tensor]:
        """The launches of a step: a function of the draws, or of the state of self.rng.

        rounds: fewer than the step has, in a rehearsal.
        """
        metrics, rounds = {}, rounds or self.rounds
        for phase in PHASES:
            for i in range(rounds):
                with naming(f"{phase} step, round {i + 1} of {self.rounds}"):
                    draw = draws and draws[phase][i]
                    self.accumulate(phase, draw, last=i == rounds - 1)
            metrics |= self.update(phase)
        return metrics

    def accumulate(self, phase: str, draw: Draw | None = None, last: bool = False) -> None:
        """One round of a phase: draw, forward, backward; processes begin to meet in the last."""
        s = self.settings
        draw = draw or self.draw_round(phase)
        if phase == "fake":
            found = self.fake_score_round(draw)
            self.fake_optimizer.accumulate(found, s.fake_loss_scale / s.batch_size, last)
        else:
            found = self.generator_round(draw)
            self.generator_optimizer.accumulate(found, s.generator_loss_scale / s.batch_size, last)

    def update(self, phase: str) -> dict[str, torch.Tensor]:
        """The end of a phase: average over processes, clean up, Adam, moving average."""
        s = self.settings
        if phase == "fake":
            found = self.fake_optimizer.update(s.fake_lr, apply=self.live)
        else:
            found = self.generator_optimizer.update(s.generator_lr, self.ema_beta, self.live)
            # A step ends as it began, as its graphs need it: the fake score in parts again.
            self.fake_optimizer.gradients.updated()
        return {f"{phase}/{name}": value for name, value in found.items()}

    def fake_score_round(self, draw: Draw) -> Losses:
        """λ(σ)·(f_ψ(y + σε) − y)² on augmented y = G(σ_init·z); no gradient into y."""
        with torch.no_grad():
            y = self.generate(self.generator.eval(), draw)
            labels = None
            if draw.augment is not None:
                y, labels = augment.apply(y, draw.augment)
        self.fake_score.requires_grad_(True).train()
        return losses.fake_score_loss(
            self.fake_score, y, draw.sigma, draw.noise, draw.class_labels, labels
        )

    def generator_round(self, draw: Draw) -> Losses:
        """d·((r − y) − α·d)/w, through both frozen networks into y = G(σ_init·z)."""
        y = self.generate(self.generator.train(), draw)
        self.fake_score.requires_grad_(False).eval()
        alpha = self.settings.alpha
        return losses.generator_loss(
            self.teacher, self.fake_score, y, draw.sigma, draw.noise, alpha, draw.class_labels
        )

    def generate(self, net: EDMNetwork, draw: Draw) -> torch.Tensor:
        """G(z) = D_θ(σ_init·z; σ_init, c), NaN where the draw is not finite.

        The NaN is put behind the network, so that the losses drop the sample and no gradient
        inside the network ever meets it.
        """
        finite = losses.finite(draw.z, draw.class_labels)
        z, labels = (losses.keep(finite, v) for v in (draw.z, draw.class_labels))
        sigma = torch.full((len(z),), self.settings.init_sigma, device=z.device)
        y = net(self.settings.init_sigma * z, sigma, labels)
        return torch.where(finite.reshape(-1, 1, 1, 1), y, torch.nan)

    def draw(self) -> Draws:
        """The draws of the coming step: a function of seed, step and rank alone."""
        self.rng.manual_seed(seed_of(self.seed, "draws", self.steps, parallel.rank()))
        return {phase: [self.draw_round(phase) for _ in range(self.rounds)] for phase in PHASES}

    def draw_round(self, phase: str) -> Draw:
        n = self.settings.batch_size // self.rounds // parallel.world()
        config = self.teacher.config
        return draw_round(phase, n, config, self.settings, self.rng, self.label_weights)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that make up the state, by name. Copying into them restores it, together

        with steps and images; the random state is (seed, steps) and needs no keeping.
        """
        return self.fake_optimizer.tensors("fake_score") | self.generator_optimizer.tensors(
            "generator"
        )

    def refresh(self) -> None:
        """After a restore: what is made of the state's tensors is made of them anew."""
        for net in (self.generator, self.fake_score):
            net.refresh()
