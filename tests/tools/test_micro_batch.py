"""Trying micro-batches until one fits in memory, and activation checkpointing."""

import dataclasses
import math

import pytest
import torch

from sid_fast import Distiller, Settings, SiDASettings, pretrain, train
from sid_fast.config.types import PretrainSettings, divisors, micro_batches, part
from sid_fast.data.digits import open_dataset
from sid_fast.errors import RunFailed, UserError
from sid_fast.kernels.dispatch import runs
from sid_fast.models.registry import save_network
from sid_fast.performance import fsdp
from sid_fast.performance.activation_checkpoint import checkpoint_activations
from sid_fast.tools import estimator, micro_batch
from sid_fast.tools.micro_batch import largest_micro_batch
from sid_fast.training.step import Trainer
from tests.helpers.networks import FAST, SMALL, TINY, small_edm2, small_teacher


class Device:
    """Runs out of memory beyond `room` images."""

    def __init__(self, room):
        self.room, self.tried, self.said = room, [], []

    def __call__(self, n):
        self.tried.append(n)
        if n > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def fit(self, batch, estimate):
        return largest_micro_batch(divisors(batch), estimate, self, self.said.append)


@pytest.mark.slow
def test_the_largest_estimated_to_fit_is_tried_first_then_smaller_ones():
    device = Device(room=20)
    assert device.fit(96, 50) == 16
    assert device.tried == [48, 32, 24, 16]
    assert "48" in device.said[0]
    assert device.said[-1].startswith("micro-batch: 16 of 96")
    device = Device(room=1000)
    assert device.fit(96, 50) == 48
    assert device.tried == [48]


def test_sizes_hold_whole_groups():
    """SiDA's groups are never cut, even where not one of them fits."""
    settings = SiDASettings(batch_size=96, adversarial_group=16)
    assert micro_batches(settings, ranks=2) == [48, 16]
    device = Device(room=100)
    assert largest_micro_batch([48, 16], 40, device, device.said.append) == 16
    assert largest_micro_batch([48, 16], 0, device, device.said.append) == 16
    assert device.tried == [16, 16]


@pytest.mark.slow
def test_every_rank_must_fit(monkeypatch):
    monkeypatch.setattr(
        "sid_fast.performance.process_group.all_reduce_any", lambda flag: len(device.tried) < 3
    )
    device = Device(room=1000)
    assert device.fit(64, 64) == 16


def test_not_even_one_image():
    device = Device(room=0)
    with pytest.raises(RunFailed, match="--checkpoint-activations"):
        device.fit(4, 0)
    assert device.tried == [1]


def test_other_errors_are_not_taken_for_out_of_memory():
    def broken(n):
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        largest_micro_batch([4, 2, 1], 4, broken, print)


@pytest.mark.parametrize(
    "message",
    [
        "Triton Error [CUDA]: out of memory",
        "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_memory_that_others_than_pytorch_take_counts(message):
    """A kernel's code, say, on a GPU that PyTorch's allocator has filled."""

    def full(n):
        if n > 1:
            raise RuntimeError(message)

    assert largest_micro_batch([4, 2, 1], 4, full, lambda line: None) == 1


def test_auto_takes_the_whole_batch_without_a_gpu(tmp_path, run_command):
    save_network(tmp_path / "teacher.safetensors", small_teacher())
    arguments = ["--teacher", tmp_path / "teacher.safetensors", "--device", "cpu", "--kimg", 0.004]
    arguments += ["--batch-size", 4, "--micro-batch", "auto", "--checkpoint-activations"]
    assert run_command("train", *arguments, "--out", tmp_path / "run")[0] == 0
    assert '"micro_batch": null' in (tmp_path / "run" / "config.json").read_text()


def test_auto_keeps_what_a_state_had(tmp_path, run_command):
    """torchrun restarts with the same command, and the resumed run must be bit-exact."""
    save_network(tmp_path / "teacher.safetensors", small_teacher())
    out = tmp_path / "run"
    arguments = ["--teacher", tmp_path / "teacher.safetensors", "--batch-size", 4, "--out", out]
    assert run_command("train", *arguments, "--micro-batch", 2, "--kimg", 0.004)[0] == 0
    status, error = run_command("train", "--resume", out, "--micro-batch", "auto", "--kimg", 0.008)
    assert status == 0, error
    assert '"micro_batch": 2' in (out / "config.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "method"),
    [("bf16", "sid"), ("fp32", "sida"), ("fp32", "edm")],
)
def test_auto_tries_a_whole_step_and_changes_nothing(monkeypatch, precision, method):
    """On a CPU in place of the GPU, with room for three images of eight."""
    teacher = small_teacher(TINY)
    before = [p.clone() for p in teacher.parameters()]
    common = dict(
        batch_size=8, micro_batch=None, dropout=0.2, augment_p=0.1, precision=precision
    )  # fmt: skip
    if method == "edm":
        config = pretrain.PretrainConfig(**common)
        settings = dataclasses.replace(part(config, PretrainSettings), lr_rampup_kimg=0)
    else:
        config = train.TrainConfig(**common, method=method, adversarial_group=2)
        settings = config.settings()
    counts = estimator.counts(teacher.config, settings, backends=runs(torch.device("cpu")))
    room = (counts.memory(3).total() + counts.memory(4).total()) // 2
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (room, room))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    steps = []
    dry_run = Trainer.dry_run
    monkeypatch.setattr(Trainer, "dry_run", lambda self: steps.append(self) or dry_run(self))
    one, cpu = fsdp.SINGLE_PROCESS, torch.device("cpu")
    upper = micro_batch.estimated(teacher.config, config, settings, cpu, one)
    assert micro_batch.that_fits(teacher, config, settings, upper, one) == 2
    assert len(steps) == 1
    assert steps[0].samples == 2
    assert all(map(torch.equal, before, teacher.parameters()))
    assert not any(o.exp_avg_sq[0].any() for o in steps[0].optimizers.values())


def test_a_float32_edm2_teacher_serves_again_after_a_trial():
    """The copies that F computes with stay in the trial: those in an EMA would never change."""
    teacher, settings = small_edm2(), Settings(batch_size=2, precision="fp32")
    config = train.TrainConfig(batch_size=2, micro_batch=None, precision="fp32")
    assert micro_batch.that_fits(teacher, config, settings, 2, fsdp.SINGLE_PROCESS) == 2
    assert not teacher.compute_copies
    for _ in range(2):
        distiller = Distiller(teacher, settings)
        distiller.step()
        assert not distiller.ema.compute_copies


def test_a_data_set_that_stays_on_the_device_takes_its_part(real, monkeypatch):
    data, config = open_dataset(str(real)), train.TrainConfig()
    size = len(data) * math.prod(data.sample_shape)
    for room, expected in ((8 * size, size), (8 * size - 8, 0)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, room=room: (room, room))
        assert micro_batch.reserved(TINY, config, torch.device("cuda"), data) == expected


@pytest.mark.slow
def test_what_cannot_fit_is_refused_before_anything_is_allocated(monkeypatch):
    """With the sizes and what would fit; an evaluation takes its part of the memory."""
    network, cpu = TINY, torch.device("cpu")
    config = train.TrainConfig(batch_size=8, micro_batch=None, precision="fp32")
    backends = runs(cpu)
    counts = estimator.counts(network, part(config, Settings), backends=backends)

    def estimate(room, **changes):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (room, room))
        monkeypatch.setattr(estimator, "counts", lambda *_: counts)
        changed, settings = dataclasses.replace(config, **changes), config.settings()
        return micro_batch.estimated(network, changed, settings, cpu, fsdp.SINGLE_PROCESS)

    enough = counts.memory(8).total()
    assert estimate(enough) == 8
    with pytest.raises(UserError, match=r"micro_batch=8 needs .* GiB free .*--micro-batch 4 fits"):
        estimate(enough - 1, micro_batch=8)
    with pytest.raises(UserError, match="--checkpoint-activations"):
        estimate(counts.memory(1).total() - 1)
    with pytest.raises(UserError, match="--checkpoint-activations"):
        estimate(enough, eval_every=1.0)
    beside = micro_batch.reserved(network, dataclasses.replace(config, eval_every=1.0), cpu)
    assert beside > micro_batch.DETECTOR
    assert estimate(enough + beside, eval_every=1.0) == 8
    with pytest.raises(UserError, match="--checkpoint-activations"):
        estimate(enough, vae="vae")


def networks(distiller):
    return distiller.teacher, distiller.generator, distiller.fake_score


def test_recomputed_blocks_give_the_same_step():
    """With dropout, whose mask backward computes again."""
    settings = Settings(dropout=0.3, eps=1.0, **FAST)
    plain, recomputing = (Distiller(small_teacher(), settings) for _ in range(2))
    checkpoint_activations(*networks(recomputing))
    for _ in range(2):
        draws = plain.draw()
        expected, found = plain.step(draws), recomputing.step(draws)
        assert torch.equal(found["generator/loss"], expected["generator/loss"])
    for a, b in zip(networks(plain), networks(recomputing), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.slow
def test_recomputed_blocks_keep_less():
    # In PyTorch's form, where frozen networks too keep all that their convolutions read.
    of = SMALL, Settings(), [64], "eager"
    (plain,) = estimator.steps(*of)
    (recomputing,) = estimator.steps(*of, prepare=checkpoint_activations)
    kinds = ("activations", "workspace")
    before, after = (sum(step.peak[k] for k in kinds) for step in (plain, recomputing))
    assert after < 0.55 * before
    flops = [sum(op.flops for op in step.ops) for step in (plain, recomputing)]
    assert 1.3 < flops[1] / flops[0] < 15.5 / 11
