"""Embedding scale, SiLU and dropout against float64, forward and backward."""

import pytest
import torch

from sid_fast.kernels import scaled_silu
from sid_fast.kernels.dispatch import forced
from sid_fast.kernels.dropout import dropout
from sid_fast.kernels.mp import scale as module
from tests.helpers.twins import channels_last, check, check_compiles

SEED = (-(2**61) + 7, 5 | 2**40, 2**31 - 1)
# One tile, several, several programs an image, and images that fill no tile.
SHAPES = [(2, 128, 8, 8), (2, 64, 16, 16), (1, 64, 32, 20), (3, 24, 5, 3), (2, 20, 9, 11)]


def seed(device, first=SEED[2]):
    return torch.tensor([*SEED[:2], first], device=device)


def tensors(shape, dtype, device):
    return channels_last(shape, dtype, device), channels_last(shape[:2], dtype, device, seed=1)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_exact(device, shape, dtype, p):
    check(lambda y, s: [scaled_silu(y, s, p, seed(device))], tensors(shape, dtype, device))


@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize("shape", [(2, 64, 16, 16), (2, 20, 9, 11)])
def test_it_drops_the_elements_that_dropout_drops(device, shape, backend):
    y, scale = tensors(shape, torch.float32, device)
    with forced("triton"):
        whole = scaled_silu(y, scale)
        expected = dropout(whole, 0.3, seed(device))
    with forced(backend):
        found = scaled_silu(y, scale, 0.3, seed(device))
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_mask_depends_on_the_global_index_of_the_sample(device):
    y, scale = tensors((4, 8, 8, 8), torch.float32, device)
    with forced("triton"):
        full = scaled_silu(y, scale, 0.5, seed(device, 10))
        halves = [
            scaled_silu(y[i : i + 2], scale[i : i + 2], 0.5, seed(device, 10 + i)) for i in (0, 2)
        ]
    assert torch.equal(full, torch.cat(halves))


def test_without_a_seed_the_mask_is_torchs(device):
    y, scale = tensors((2, 64, 8, 8), torch.float32, device)
    with forced("triton"):
        torch.manual_seed(1)
        one, other = (scaled_silu(y, scale, 0.5) for _ in range(2))
        torch.manual_seed(1)
        assert torch.equal(scaled_silu(y, scale, 0.5), one)
    assert not torch.equal(one == 0, other == 0)
    assert float((one == 0).float().mean()) == pytest.approx(0.5, abs=0.03)


def test_a_scale_without_gradient_gets_none(device, monkeypatch):
    y, scale = tensors((2, 24, 4, 4), torch.float32, device)
    wanted, backward = [], module._backward
    monkeypatch.setattr(module, "_backward", lambda *a: wanted.append(a[-1]) or backward(*a))
    y.requires_grad_()
    with forced("triton"):
        scaled_silu(y, scale).sum().backward()
    assert wanted == [False]
    assert y.grad is not None
    assert scale.grad is None


def test_programs_share_an_image_evenly():
    for pixels in (16, 64, 99, 640, 1024, 4096):
        constants = module.launch(128, pixels, backward=True)
        assert constants["PARTS"] * constants["TILES"] == -(-pixels // module.BLOCK_HW)
    assert module.launch(128, 4096, backward=True)["PARTS"] == 16


@pytest.mark.parametrize(
    ("scale", "p", "message"),
    [((2, 23), 0.0, r"scale is \(2, 23\): must be \(2, 24\)"), ((2, 24), 1.0, "dropout=1.0: must")],
)
def test_bad_arguments_are_refused(scale, p, message):
    with pytest.raises(ValueError, match=message):
        scaled_silu(torch.ones(2, 24, 2, 2), torch.ones(scale), p)


def test_compiles_without_a_graph_break(device):
    call = lambda y, s: [scaled_silu(y, s, 0.3, seed(device))]  # noqa: E731
    check_compiles(call, tensors((2, 24, 20, 16), torch.float32, device))


@pytest.mark.parametrize("side", [4, 16])
def test_the_operators_pass_opcheck(device, side):
    y, scale = tensors((2, 24, side, side), torch.float32, device)
    utils = ("test_schema", "test_faketensor")
    forward = torch.ops.sid_fast.scaled_silu.default
    torch.library.opcheck(forward, (y, scale, seed(device), 7), test_utils=utils)
    for wanted in (False, True):
        arguments = (y, y, scale, None, 0, wanted)
        backward = torch.ops.sid_fast.scaled_silu_backward.default
        torch.library.opcheck(backward, arguments, test_utils=utils)
