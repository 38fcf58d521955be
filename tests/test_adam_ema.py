"""The update against float64, and what it does with values that are not finite."""

import pytest
import torch

from sid_fast import kernels


def tensors(dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    shapes = [(3,), (5, 7), (4, 3, 3, 3), ()]
    return [torch.randn(s, generator=rng).to(dtype) for s in shapes]


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_three_updates_match_adam_in_float64(beta1):
    params, ema = tensors(), tensors(seed=1)
    exp_avg = [torch.zeros_like(p) for p in params] if beta1 else []
    exp_avg_sq = [torch.zeros_like(p) for p in params]
    exact = [p.double().requires_grad_() for p in params]
    exact_ema = [e.double() for e in ema]
    adam = torch.optim.Adam(exact, lr=1e-2, betas=(beta1, 0.999), eps=1e-8)
    step = torch.zeros((), dtype=torch.float64)
    for i in range(3):
        grads = tensors(seed=2 + i)
        for p, g in zip(exact, grads, strict=True):
            p.grad = g.double()
        adam.step()
        for e, p in zip(exact_ema, exact, strict=True):
            e.copy_(p.detach() + 0.7 * (e - p.detach()))
        count = kernels.adam_ema(
            params, grads, exp_avg, exp_avg_sq, ema, step=step, apply=torch.tensor(True),
            lr=1e-2, beta1=beta1, beta2=0.999, eps=1e-8, ema_beta=0.7,
        )  # fmt: skip
        assert int(count) == 0
    assert float(step) == 3
    for found, expected in ((params, exact), (ema, exact_ema)):
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a.double(), b.detach(), rtol=1e-5, atol=1e-7)


def test_gradients_are_cleaned_and_counted():
    params = [torch.zeros(5)]
    grads = [torch.tensor([torch.nan, torch.inf, -torch.inf, 2.0, -3.0])]
    count = kernels.adam_ema(
        params, grads, [], [torch.zeros(5)], [], step=torch.zeros((), dtype=torch.float64),
        apply=torch.tensor(True), lr=1.0, beta1=0.0, beta2=0.999, eps=1e-8,
    )  # fmt: skip
    assert int(count) == 3
    assert grads[0].tolist() == [0.0, 1e5, -1e5, 2.0, -3.0]
    assert torch.allclose(params[0], torch.tensor([0.0, -1.0, 1.0, -1.0, 1.0]))


def test_nothing_but_the_gradients_changes_when_not_applied():
    params, ema, exp_avg = tensors(), tensors(seed=1), tensors(seed=2)
    exp_avg_sq = [t.square() for t in tensors(seed=3)]
    step = torch.tensor(7.0, dtype=torch.float64)
    state = [*params, *ema, *exp_avg, *exp_avg_sq, step]
    before = [t.clone() for t in state]
    kernels.adam_ema(
        params, tensors(seed=4), exp_avg, exp_avg_sq, ema, step=step, apply=torch.tensor(False),
        lr=1.0, beta1=0.9, beta2=0.999, eps=1e-8, ema_beta=0.5,
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))
