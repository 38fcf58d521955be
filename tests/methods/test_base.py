"""A new method is one class: it trains, resumes, shards and replays."""

import dataclasses

import pytest
import torch

from sid_fast import Distiller, Settings
from sid_fast.methods.base import RandomStream
from sid_fast.training.checkpoint import States, load_state
from tests.helpers import recorder, toy
from tests.helpers.networks import FAST, small_teacher, weights


def values(trainer):
    return [v.clone() for v in trainer.state_dict().values()]


def test_a_new_method_trains():
    trainer = toy.trainer(settings=dataclasses.replace(toy.SETTINGS, dropout=0.0))
    losses = [float(trainer.step()["loss"]) for _ in range(30)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_a_new_method_resumes_bit_exactly(tmp_path):
    whole = toy.trainer()
    for _ in range(4):
        whole.step()
    first, second = toy.trainer(), toy.trainer()
    for _ in range(2):
        first.step()
    states = States(tmp_path, first, toy.SETTINGS, keep=1)
    assert states.begin() is None
    assert states.finish() is None
    load_state(states.path, second)
    for _ in range(2):
        second.step()
    assert all(map(torch.equal, values(second), values(whole)))


def test_a_new_method_replays(monkeypatch, device):
    if device.type == "cuda":
        pytest.skip("tests/gpu replays on a GPU")
    recorder.stand_in(monkeypatch.setattr)
    found = []
    for cuda_graph in (False, True):
        trainer = toy.trainer(cuda_graph=cuda_graph)
        for _ in range(3):
            trainer.step()
        found.append(values(trainer))
    assert all(map(torch.equal, *found))


def test_a_sample_that_is_not_finite_is_masked():
    trainer = toy.trainer()
    inputs = trainer.sample_inputs()
    inputs[""][1].noise[0] = torch.nan
    metrics = trainer.step(inputs)
    assert int(metrics["dropped"]) == 1
    assert not bool(metrics["failed"])
    assert all(torch.isfinite(v).all() for v in trainer.state_dict().values())


@pytest.mark.parametrize("augment_p", [0.0, 0.5])
def test_the_micro_batch_does_not_change_the_run(augment_p):
    """Dropout and augmentation included: every number is counted by the sample's global index."""
    found = {}
    for micro_batch in (4, 2, 1):
        settings = Settings(
            dropout=0.2, augment_p=augment_p, eps=1.0, micro_batch=micro_batch, **FAST
        )
        distiller = Distiller(small_teacher(), settings, seed=5)
        start = weights(distiller)
        for _ in range(3):
            distiller.step()
        found[micro_batch] = weights(distiller)
    moved = (found[4] - start).norm()
    for micro_batch in (2, 1):
        assert (found[micro_batch] - found[4]).norm() < 1e-4 * moved, micro_batch


def test_every_step_phase_and_block_drops_other_elements():
    """The masks are functions of dropout_seeds; two that differ in a stream are independent."""
    distiller = Distiller(small_teacher(), Settings(dropout=0.5, micro_batch=2, **FAST))
    seen = []
    for step in range(2):
        distiller.steps = step
        distiller._count_step()
        for phase in distiller.method.phases:
            for first in (True, False):
                distiller.backward(phase, first=first, last=not first)
                for row in distiller.dropout_seeds[phase.name].tolist():
                    key, stream, sample = row
                    seen += [(key, stream, sample + i) for i in range(2)]
    blocks = len(distiller.dropout_seeds["fake"])
    assert len(set(seen)) == len(seen) == 2 * 2 * 2 * blocks * 2


def test_a_name_is_drawn_once_a_phase():
    rng = RandomStream(torch.tensor([0, 0, 0]), "fake", 2)
    assert not torch.equal(rng.normal("z", 3), rng.normal("noise", 3))
    assert not torch.equal(rng.normal("sigma", 3), rng.uniform("sigma", 3))
    with pytest.raises(ValueError, match="z is drawn twice in phase 'fake'"):
        rng.normal("z", 3)


def test_every_network_takes_one_phase():
    class Twice(toy.FixedImage):
        def __init__(self, image):
            super().__init__(image)
            self.phases = (*self.phases, *self.phases)

    with pytest.raises(ValueError, match="Twice: every trained network needs exactly one phase"):
        toy.trainer(method=Twice)
