"""A teacher learns from real images; its steps are a function of seed and step alone."""

import torch
from test_distiller import SMALL

from sid_fast.config.settings import PretrainSettings
from sid_fast.files.digits import open_dataset
from sid_fast.networks import EDMNetwork
from sid_fast.pretrainer import Pretrainer


def pretrainer(seed: int = 0, **settings) -> Pretrainer:
    data = open_dataset("digits")
    torch.manual_seed(0)
    values = {"batch_size": 32, "lr_rampup_kimg": 0.1, "lr": 3e-3, "augment_p": 0.2} | settings
    settings = PretrainSettings(**values)
    return Pretrainer(EDMNetwork(SMALL), settings, data.images(), data.labels, seed)


def weights(trainer: Pretrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.ema.parameters()])


def test_digits_are_an_edm_data_set():
    data = open_dataset("digits")
    assert (len(data), data.resolution, data.channels, data.label_dim) == (1797, 8, 1, 10)
    images = data.images()
    assert images.min() == 0 and images.max() == 255


def test_the_loss_falls():
    trainer = pretrainer(dropout=0.0, augment_p=0.0)
    losses = [float(trainer.step()["loss"]) for _ in range(60)]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_steps_are_a_function_of_seed_and_step_alone():
    runs = []
    for seed in (1, 1, 2):
        trainer = pretrainer(seed, dropout=0.2, micro_batch=16)
        for _ in range(2):
            torch.rand(3)
            trainer.step()
        runs.append(weights(trainer))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
