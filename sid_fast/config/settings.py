"""The numbers of one distillation (SPEC §5)."""

import dataclasses
import math
from dataclasses import field

from sid_fast.errors import UserError


def option(default, help: str):
    """A dataclass field that explains itself on the command line."""
    return field(default=default, metadata={"help": help})


@dataclasses.dataclass
class Settings:
    """What one step of the distillation depends on, besides the teacher."""

    alpha: float = option(1.2, "α of the generator loss: weight of its second term, -0.5 to 2")
    tmax: int = option(800, "largest t of the generator step, in thousandths, 1 to 1000")
    init_sigma: float = option(2.5, "noise level at which the generator makes an image")
    fake_lr: float = option(1e-5, "learning rate of the fake score")
    generator_lr: float = option(1e-5, "learning rate of the generator")
    fake_beta1: float = option(0.0, "Adam β1 of the fake score; 0 keeps no first moment")
    generator_beta1: float = option(0.0, "Adam β1 of the generator; 0 keeps no first moment")
    beta2: float = option(0.999, "Adam β2 of both")
    eps: float = option(1e-8, "Adam ε of both")
    ema_halflife_kimg: float = option(
        500.0, "half-life of the generator's average, thousand images"
    )
    ema_rampup_ratio: float = option(
        0.05, "the half-life is at most this part of the images so far; 0 for no ramp-up"
    )
    fake_loss_scale: float = option(1.0, "factor of the fake score's loss")
    generator_loss_scale: float = option(100.0, "factor of the generator's loss")
    batch_size: int = option(256, "images a step, over all processes and rounds")
    micro_batch: int | None = option(None, "images a round on one process; default: one round")
    dropout: float = option(0.0, "dropout probability of fake score and generator in training")
    augment_p: float = option(0.0, "probability multiplier of the augmentation; 0 for none")

    def validate(self, processes: int = 1) -> None:
        """Raise UserError, naming the field, for values that no run can use."""
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{f.name}={value} is not a finite number")
        _within(self, "alpha", -0.5, 2)
        _within(self, "tmax", 1, 1000)
        _within(self, "dropout", 0, 0.999)
        _within(self, "augment_p", 0, 1)
        _within(self, "ema_rampup_ratio", 0, 1)
        for name in ("fake_beta1", "generator_beta1", "beta2"):
            _within(self, name, 0, 0.999999)
        for name in ("init_sigma", "fake_loss_scale", "generator_loss_scale"):
            _within(self, name, 1e-12, 1e12)
        for name in ("fake_lr", "generator_lr", "eps", "ema_halflife_kimg"):
            _within(self, name, 0, 1e12)
        _within(self, "batch_size", 1, 2**31)
        self.rounds(processes)

    def rounds(self, processes: int = 1) -> int:
        """Rounds of gradient accumulation a step: batch_size / micro_batch / processes."""
        if self.micro_batch is None:
            chunk, text = processes, f"{processes} processes"
        else:
            _within(self, "micro_batch", 1, 2**31)
            chunk = self.micro_batch * processes
            text = f"micro_batch {self.micro_batch} × {processes} processes"
        if self.batch_size % chunk:
            below = self.batch_size // chunk * chunk
            nearest = below if below and self.batch_size - below <= chunk / 2 else below + chunk
            raise UserError(
                f"batch_size={self.batch_size} does not divide by {text}; the nearest that does "
                f"is {nearest}"
            )
        return 1 if self.micro_batch is None else self.batch_size // chunk


def _within(settings: object, name: str, low: float, high: float) -> None:
    value = getattr(settings, name)
    if not low <= value <= high:
        raise UserError(f"{name}={value} is out of range: choose from {low} to {high}")
