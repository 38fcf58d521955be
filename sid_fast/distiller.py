"""Distiller: SiD as an object that a program can step."""

import copy
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from sid_fast.config.types import Settings, check
from sid_fast.io.digest import digest
from sid_fast.methods.sid import Draw, SiD
from sid_fast.models import EDMNetwork
from sid_fast.performance import fsdp, mixed_precision
from sid_fast.training.step import Trainer


class Distiller(Trainer):
    """Distils a teacher f_φ into a one-step generator G_θ, with a fake score f_ψ between them.

    teacher: a network on the device to use; it is frozen, or copied where its type has to change.
    label_weights [label_dim]: in what proportion classes are drawn; uniform if None. The rest is
    Trainer's. generator, fake_score and ema are modules whose state_dict has upstream's names; all
    start from the teacher. UserError for settings that cannot be used.
    """

    def __init__(
        self,
        teacher: EDMNetwork,
        settings: Settings,
        seed: int = 0,
        label_weights: torch.Tensor | None = None,
        sharding: fsdp.ShardingPlan | None = None,
        *,
        cuda_graph: bool | Literal["auto"] = False,
        compile: bool = False,
    ):
        check(settings)
        device = next(teacher.parameters()).device
        settings = mixed_precision.resolve_precision(settings, device)
        fingerprint = {
            "teacher": digest(teacher.state_dict().values()),
            "label weights": None if label_weights is None else digest([label_weights]),
        }
        if mixed_precision.TYPES[settings.precision] != torch.float32:
            teacher = copy.deepcopy(teacher)
        weights = None if label_weights is None else label_weights.to(device)
        method = SiD(teacher, settings, weights)
        super().__init__(
            method, settings, seed, sharding, fingerprint, cuda_graph=cuda_graph, compile=compile
        )
        self.teacher = method.teacher
        self.generator, self.fake_score = method.generator, method.fake_score

    def step(self, draws: Mapping[str, Sequence[Draw]] | None = None) -> dict[str, torch.Tensor]:
        """Update the fake score, then the generator, then its average; once each.

        draws: for each phase one Draw a micro-batch, {"fake": […], "generator": […]}; without them
        they are sampled. Returns what Optimizer.update says of each, as fake/… and generator/….
        """
        return super().step(draws)

    def draw(self) -> dict[str, list[Draw]]:
        """The random inputs of the coming step: a function of seed, step and rank alone."""
        return self.sample_inputs()
