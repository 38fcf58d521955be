"""Fused operations of the networks and the training step, one module each.

The rest of sid_fast calls the functions exported here; `kernels.dispatch` picks their backend.
"""

from sid_fast.kernels.adam_ema import adam_ema
from sid_fast.kernels.attention import attention
from sid_fast.kernels.augment import augment
from sid_fast.kernels.group_norm import GroupNormOutput, group_norm
from sid_fast.kernels.mp import mp_cat_silu, mp_sum, pixel_norm, scaled_silu
from sid_fast.kernels.random import random
from sid_fast.kernels.sid_loss import Losses, fake_score_loss, generator_loss, noised
from sid_fast.kernels.sida_loss import adversarial_loss, discriminator_loss
from sid_fast.kernels.weight_norm import weight_norm, weight_norm_backward

__all__ = [
    "GroupNormOutput",
    "Losses",
    "adam_ema",
    "adversarial_loss",
    "attention",
    "augment",
    "discriminator_loss",
    "fake_score_loss",
    "generator_loss",
    "group_norm",
    "mp_cat_silu",
    "mp_sum",
    "noised",
    "pixel_norm",
    "random",
    "scaled_silu",
    "weight_norm",
    "weight_norm_backward",
]
