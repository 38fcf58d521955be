"""Every preset is valid for its command."""

import dataclasses

import pytest

from sid_fast import pretrain, train
from sid_fast.cli import presets
from sid_fast.config.types import SiDASettings, check, grad_accum_steps
from sid_fast.models.teachers import TEACHERS

KINDS = {"train": train.TrainConfig, "pretrain": pretrain.PretrainConfig}


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k in KINDS for n in presets(k)])
def test_preset_is_valid(kind, name):
    config = KINDS[kind](**presets(kind)[name])
    check(config)
    for processes in (1, 4 if name.startswith("digits") else 8):
        config.micro_batch = None  # auto, until a GPU is known
        grad_accum_steps(config.settings() if kind == "train" else config, processes)


def test_the_published_presets_are_all_there_with_their_teachers():
    sida = {f"{name}-{kind}" for name in TEACHERS for kind in ("sida", "sid2a")}
    ours = {"digits", "digits-sida", "digits-edm2", "digits-edm2-sida", "fashion"}
    assert set(presets("train")) == {*TEACHERS, *sida, *ours}
    for name, preset in presets("train").items():
        teacher, _, kind = name.rpartition("-")
        method = kind if kind in ("sida", "sid2a") else "sid"
        assert preset["teacher"] == (name if method == "sid" else teacher)
        assert preset.get("method", "sid") == method


# As published: α, batch, learning rate, generator β1, dropout, p, half-life, Mimg.
TABLE = {
    "cifar10-uncond": (1.2, 256, 1e-5, 0, 0.13, 0.12, 0.5, 500),
    "cifar10-cond": (1.2, 256, 1e-5, 0, 0.13, 0.12, 0.5, 800),
    "imagenet64-cond": (1.2, 8192, 4e-6, 0, 0.10, 0, 2, 1000),
    "ffhq64": (1.2, 512, 1e-5, 0.9, 0.05, 0.15, 0.5, 500),
    "afhqv2-64": (1.0, 512, 5e-6, 0, 0.05, 0.15, 0.5, 500),
    "edm2-img512-xs": (1.0, 2048, 5e-5, 0, 0, 0, 2, 200),
    "edm2-img512-s": (1.0, 2048, 5e-5, 0, 0, 0, 2, 200),
    "edm2-img512-m": (1.0, 2048, 5e-5, 0, 0.1, 0, 2, 200),
    "edm2-img512-l": (1.0, 2048, 5e-5, 0, 0.1, 0, 2, 200),
    "edm2-img512-xl": (1.0, 2048, 5e-5, 0, 0.1, 0, 2, 200),
    "edm2-img512-xxl": (1.0, 2048, 5e-5, 0, 0.1, 0, 2, 100),
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


# Of SiDA: group and length in Mimg, and that of SiD²A.
SIDA = {
    "cifar10-uncond": (32, 300, 100),
    "cifar10-cond": (32, 300, 100),
    "imagenet64-cond": (32, 300, 100),
    "ffhq64": (64, 200, 200),
    "afhqv2-64": (64, 200, 200),
    "edm2-img512-xs": (64, 200, 30),
    "edm2-img512-s": (64, 200, 80),
    "edm2-img512-m": (32, 200, 200),
    "edm2-img512-l": (32, 200, 55),
    "edm2-img512-xl": (16, 200, 50),
    "edm2-img512-xxl": (2, 100, 30),
}


@pytest.mark.parametrize("name", SIDA)
@pytest.mark.parametrize("kind", ["sida", "sid2a"])
def test_sida_differs_from_sid_as_published(name, kind):
    sid = train.TrainConfig(**presets("train")[name])
    config = train.TrainConfig(**presets("train")[f"{name}-{kind}"])
    assert isinstance(config.settings(), SiDASettings)
    group, sida, sid2a = SIDA[name]
    assert config.adversarial_group == group
    assert config.kimg / 1000 == (sida if kind == "sida" else sid2a)
    assert (config.alpha, config.fake_beta1, config.generator_beta1) == (1, 0, 0)
    latents = "img512" in name
    scales = config.discriminator_loss_scale, config.adversarial_loss_scale
    assert scales == (100 if latents else 1, 0.01)
    halved = (name, kind) == ("edm2-img512-m", "sid2a")
    assert config.generator_loss_scale == (50 if halved else 100)
    assert (config.generator_start_kimg, config.adversarial_start_kimg) == (100, 200)
    assert config.fake_grad_clip == 1
    ours = {"method", "adversarial_group", "kimg", "alpha", "generator_beta1"}
    ours |= {"discriminator_loss_scale", "generator_loss_scale"}
    for f in dataclasses.fields(config):
        if f.name not in ours:
            assert getattr(config, f.name) == getattr(sid, f.name), f.name


@pytest.mark.parametrize("name", [name for name in TEACHERS if name.startswith("edm2-")])
def test_edm2_presets_train_the_log_variance_head_but_that_of_s(name):
    for suffix in "", "-sida", "-sid2a":
        config = train.TrainConfig(**presets("train")[name + suffix])
        published = ("off", "none") if name == "edm2-img512-s" else ("on", "auto")
        assert (config.log_variance, config.forced_normalization) == published
        assert config.dropout == TEACHERS[name].network.dropout
