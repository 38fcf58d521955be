"""Every Triton kernel is launched on its tensors' device; Triton itself takes the current one.

In the interpreter, with launches that only note where they happen.
"""

import contextlib

import pytest
import torch

from sid_fast import kernels
from sid_fast.augment import draw
from sid_fast.kernels import dispatch
from sid_fast.kernels.dropout import dropout
from sid_fast.methods.base import RandomStream

interpreter = pytest.importorskip("triton.runtime.interpreter")


def image(channels=4):
    x = torch.ones(2, channels, 4, 4).contiguous(memory_format=torch.channels_last)
    return x.requires_grad_()


def counter():
    return torch.zeros(3, dtype=torch.int64)


def adam_ema():
    lists = [[torch.ones(3)] for _ in range(4)]
    step, enabled = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.bool)
    kernels.adam_ema(*lists[:2], [], lists[2], lists[3], step=step, enabled=enabled, lr=0.1,
        beta1=0.0, beta2=0.9, eps=1e-8)  # fmt: skip


def weight_norm():
    weights, others = [torch.ones(2, 3)], [torch.ones(2, 3)]
    kernels.weight_norm(weights, others)
    kernels.weight_norm_backward(weights, others)


def sid_loss():
    x, sigma = image().detach(), torch.ones(2)
    noised = kernels.noised(x, sigma, x)
    kernels.fake_score_loss(x, noised, x)
    kernels.generator_loss(x, x, noised, x, 1.2)


def sida_loss():
    logits, weight = torch.ones(2, 1, 2, 2), torch.ones(2)
    valid = torch.ones(2, dtype=torch.bool)
    kernels.discriminator_loss(logits, logits, weight, valid, 2)
    kernels.adversarial_loss(logits, weight, valid, 2)


def augment():
    kernels.augment(image(3).detach(), draw(RandomStream(counter(), "", 2), 1.0))


CALLS = {
    "adam_ema": adam_ema,
    "weight_norm": weight_norm,
    "attention": lambda: kernels.attention(image(12), 1).sum().backward(),
    "augment": augment,
    "dropout": lambda: dropout(image(), 0.5, counter()).sum().backward(),
    "group_norm": lambda: kernels.group_norm(
        image(), torch.ones(4), torch.ones(4), 2, 1e-5
    ).y.sum().backward(),
    "mp_cat_silu": lambda: kernels.mp_cat_silu(image(), image()).s.sum().backward(),
    "mp_sum": lambda: kernels.mp_sum(image(), image(), 0.3)[0].sum().backward(),
    "pixel_norm": lambda: kernels.pixel_norm(image()).n.sum().backward(),
    "random": lambda: kernels.random(counter(), 1, (2, 3), "normal"),
    "scaled_silu": lambda: kernels.scaled_silu(image(), torch.ones(2, 4)).sum().backward(),
    "sid_loss": sid_loss,
    "sida_loss": sida_loss,
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_launches_follow_their_tensors(name, monkeypatch, device):
    if device.type == "cuda":
        pytest.skip("launches are watched in the interpreter")
    inside, launches = [], []

    @contextlib.contextmanager
    def device_of(tensor):
        inside.append(tensor)
        yield
        inside.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(
        interpreter.GridExecutor, "__call__", lambda *_, **__: launches.append(bool(inside))
    )
    with dispatch.forced("triton"):
        CALLS[name]()
    assert launches
    assert all(launches)
