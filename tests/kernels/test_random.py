"""Counter-based random numbers: known answers, statistics, independence of the batch's split."""

import itertools
import math

import numpy as np
import pytest
import torch

from sid_fast import kernels
from sid_fast.kernels import dispatch
from sid_fast.kernels.random import philox_eager

BACKENDS = ("eager", "triton")


def draw(backend, kind, shape, device, key=7, step=3, first=0, stream=1):
    counter = torch.tensor([key, step, first], device=device)
    with dispatch.forced(backend):
        return kernels.random(counter, stream, shape, kind)


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [  # the known answers that Random123 ships for philox4x32-10
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 2, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(key, counter, expected):
    key = np.array([key[0] | key[1] << 32], dtype=np.uint64).view(np.int64)
    words = philox_eager(torch.from_numpy(key)[0], *(torch.tensor(c) for c in counter))
    assert tuple(int(w) for w in words) == expected


@pytest.mark.parametrize("shape", [(3, 5), (2, 1), (5, 3, 8, 8), (1, 4099), (2,)])
@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_triton_and_eager_draw_the_same_numbers(device, kind, shape):
    values = {"key": -(2**62) + 12345, "step": 2**33 + 5, "first": 2**31 - 1, "stream": 2**32 - 2}
    eager, triton = (draw(backend, kind, shape, device, **values) for backend in BACKENDS)
    assert eager.shape == triton.shape == shape
    if kind == "uniform":
        assert torch.equal(eager, triton)
    else:  # log, sine and cosine differ in their last bits
        torch.testing.assert_close(eager, triton, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_samples_numbers_depend_on_its_global_index_only(device, backend):
    full = draw(backend, "normal", (6, 3, 4, 4), device)
    parts = [draw(backend, "normal", (2, 3, 4, 4), device, first=i) for i in (0, 2, 4)]
    assert torch.equal(full, torch.cat(parts))


def test_changing_any_counter_field_changes_every_number():
    base = {"key": 7, "step": 3, "first": 100, "stream": 1}
    draws = [draw("eager", "uniform", (2, 64), "cpu", **base)]
    for name, value in base.items():
        changed = base | {name: value + 2}
        draws.append(draw("eager", "uniform", (2, 64), "cpu", **changed))
    for a, b in itertools.combinations(draws, 2):
        assert not (a == b).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_normals_and_uniforms_have_their_distributions(device, backend):
    n = 400_000 if device.type == "cuda" or backend == "eager" else 40_000
    x = draw(backend, "normal", (4, n // 4), device).double().flatten()
    error = 5 / math.sqrt(n)
    assert abs(float(x.mean())) < error
    assert abs(float(x.var()) - 1) < error * math.sqrt(2)
    assert abs(float((x**4).mean()) - 3) < error * math.sqrt(96)
    for bound, share in ((1.0, 0.682689), (2.0, 0.954500), (3.0, 0.997300)):
        assert abs(float((x.abs() < bound).double().mean()) - share) < error
    u = draw(backend, "uniform", (4, n // 4), device).double().flatten()
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    histogram = torch.histc(u.float().cpu(), 16, 0, 1)
    assert float(((histogram - n / 16) ** 2 / (n / 16)).sum()) < 45  # χ² of 15, p < 1e-4


def test_neighbours_are_independent():
    """Adjacent elements, samples, steps and streams correlate no more than by chance."""
    n = 200_000
    x = draw("eager", "normal", (2, n), "cpu").double()
    pairs = {
        "elements": (x[0, :-1], x[0, 1:]),
        "samples": (x[0], x[1]),
        "steps": (x[0], draw("eager", "normal", (1, n), "cpu", step=4)[0].double()),
        "streams": (x[0], draw("eager", "normal", (1, n), "cpu", stream=2)[0].double()),
    }
    for name, (a, b) in pairs.items():
        assert abs(float((a * b).mean())) < 5 / math.sqrt(n), name


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind='cauchy'"):
        draw("eager", "cauchy", (1, 1), "cpu")
