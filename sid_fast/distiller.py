"""Score identity Distillation: one step of it (arXiv 2404.04057, algorithm 1)."""

import copy
import dataclasses
from typing import ClassVar

import torch

from sid_fast import augment, losses
from sid_fast.config.settings import Settings, check, identity_of, rounds_of
from sid_fast.draws import Draw, draw_round, dropout_seed, seed_of
from sid_fast.engine import parallel
from sid_fast.engine.checkpoint import digest
from sid_fast.engine.optimizer import Optimizer, ema_beta
from sid_fast.errors import UserError
from sid_fast.losses import Terms, fake_score_terms, generator_terms
from sid_fast.networks import EDMNetwork

Draws = dict[str, list[Draw]]


class Distiller:
    """Distils a teacher f_φ into a one-step generator G_θ, with a fake score f_ψ between them.

    teacher: a network on the device to use; it is frozen. settings: see Settings. seed decides
    the draws and the dropout of every step, with the step's number and the process's rank.
    label_weights [label_dim]: in what proportion classes are drawn; uniform if None.
    Processes of torch.distributed, if there are any, each take their part of the batch; layout
    says what of the networks each of them keeps.

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
    ):
        check(settings)
        self.rounds = rounds_of(settings, parallel.world())
        if settings.augment_p and not teacher.config.augment_dim:
            raise UserError(
                f"augment_p={settings.augment_p}: the teacher takes no augmentation labels, so "
                "warped images would leak into the generator; use augment_p 0"
            )
        self.settings, self.seed = settings, seed
        self.teacher = teacher.requires_grad_(False).eval()
        self.device = next(teacher.parameters()).device
        self.label_weights = None if label_weights is None else label_weights.to(self.device)
        self.identity = identity_of(settings) | {
            "seed": seed,
            "teacher": digest(teacher.state_dict().values()),
            "label weights": None if label_weights is None else digest([label_weights]),
        }
        self.rng = torch.Generator(self.device)
        self.steps = self.images = 0

        self.generator, self.fake_score = copy.deepcopy(teacher), copy.deepcopy(teacher)
        for net in (self.generator, self.fake_score):
            net.set_dropout(settings.dropout)
        self.generator.config = dataclasses.replace(
            teacher.config, init_sigma=settings.init_sigma, dropout=settings.dropout
        )
        s = settings
        self.fake_optimizer = Optimizer(
            self.fake_score, s.fake_beta1, s.beta2, s.eps, name="fake score", layout=layout
        )
        self.generator_optimizer = Optimizer(
            self.generator,
            s.generator_beta1,
            s.beta2,
            s.eps,
            ema=True,
            name="generator",
            layout=layout,
        )
        self.ema = self.generator_optimizer.ema
        if not layout.gathered:  # else it would be whole most of the time, and only cost a message
            layout.shard(self.teacher)

    def step(self, draws: Draws | None = None) -> dict[str, torch.Tensor]:
        """Update the fake score, then the generator, then its average; once each.

        draws holds one Draw a round for each phase, {"fake": […], "generator": […]}; without it
        they are drawn. Returns what Optimizer.descend says of each, as fake/… and generator/….
        """
        s = self.settings
        draws = draws or self.draw()
        with dropout_seed(s.dropout, self.device, self.seed, self.steps, parallel.rank()):
            fake = self.fake_optimizer.descend(
                self.fake_score_round,
                draws["fake"],
                s.fake_loss_scale / s.batch_size,
                s.fake_lr,
            )
            generator = self.generator_optimizer.descend(
                self.generator_round,
                draws["generator"],
                s.generator_loss_scale / s.batch_size,
                s.generator_lr,
                ema_beta(self.images, s.batch_size, s.ema_halflife_kimg, s.ema_rampup_ratio),
            )
        self.steps += 1
        self.images += s.batch_size
        return {f"fake/{k}": v for k, v in fake.items()} | {
            f"generator/{k}": v for k, v in generator.items()
        }

    def fake_score_round(self, draw: Draw) -> Terms:
        """λ(σ)·(f_ψ(y + σε) − y)² on augmented y = G(σ_init·z); no gradient into y."""
        with torch.no_grad():
            y = self.generate(self.generator.eval(), draw)
            labels = None
            if draw.augment is not None:
                y, labels = augment.apply(y, draw.augment)
        self.fake_score.requires_grad_(True).train()
        return fake_score_terms(
            self.fake_score, y, draw.sigma, draw.noise, draw.class_labels, labels
        )

    def generator_round(self, draw: Draw) -> Terms:
        """d·((r − y) − α·d)/w, through both frozen networks into y = G(σ_init·z)."""
        y = self.generate(self.generator.train(), draw)
        self.fake_score.requires_grad_(False).eval()
        alpha = self.settings.alpha
        return generator_terms(
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
        s = self.settings
        n = s.batch_size // self.rounds // parallel.world()
        self.rng.manual_seed(seed_of(self.seed, "draws", self.steps, parallel.rank()))
        return {
            phase: [
                draw_round(phase, n, self.teacher.config, s, self.rng, self.label_weights)
                for _ in range(self.rounds)
            ]
            for phase in ("fake", "generator")
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that make up the state, by name. Copying into them restores it, together

        with steps and images; the random state is (seed, steps) and needs no keeping.
        """
        return self.fake_optimizer.tensors("fake_score") | self.generator_optimizer.tensors(
            "generator"
        )
