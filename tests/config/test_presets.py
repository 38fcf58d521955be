"""Every preset is valid for its command."""

import pytest

from sid_fast import pretrain, train
from sid_fast.cli import presets
from sid_fast.config.types import check, grad_accum_steps
from sid_fast.models.teachers import TEACHERS

KINDS = {"train": train.TrainConfig, "pretrain": pretrain.PretrainConfig}


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k in KINDS for n in presets(k)])
def test_preset_is_valid(kind, name):
    config = KINDS[kind](**presets(kind)[name])
    check(config)
    for processes in (1, 8):
        grad_accum_steps(config, processes)


def test_the_published_presets_are_all_there_with_their_teachers():
    assert set(presets("train")) == {*TEACHERS, "digits"}
    assert all(presets("train")[name]["teacher"] == name for name in TEACHERS)


# As published: α, batch, learning rate, generator β1, dropout, p, half-life, Mimg.
TABLE = {
    "cifar10-uncond": (1.2, 256, 1e-5, 0, 0.13, 0.12, 0.5, 500),
    "cifar10-cond": (1.2, 256, 1e-5, 0, 0.13, 0.12, 0.5, 800),
    "imagenet64-cond": (1.2, 8192, 4e-6, 0, 0.10, 0, 2, 1000),
    "ffhq64": (1.2, 512, 1e-5, 0.9, 0.05, 0.15, 0.5, 500),
    "afhqv2-64": (1.0, 512, 5e-6, 0, 0.05, 0.15, 0.5, 500),
}


@pytest.mark.parametrize("name", TABLE)
def test_published_hyperparameters(name):
    c = train.TrainConfig(**presets("train")[name])
    assert c.fake_lr == c.generator_lr
    found = (
        c.alpha, c.batch_size, c.generator_lr, c.generator_beta1, c.dropout, c.augment_p,
        c.ema_halflife_kimg / 1000, c.kimg / 1000,
    )  # fmt: skip
    assert found == TABLE[name]
    assert (c.tmax, c.init_sigma, c.fake_loss_scale, c.generator_loss_scale) == (800, 2.5, 1, 100)
    assert (c.fake_beta1, c.beta2, c.eps) == (0, 0.999, None)  # 1e-8, and 1e-6 with fp16
