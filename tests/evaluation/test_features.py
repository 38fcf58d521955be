"""Detectors: which code is run, and features that depend on each image alone."""

import pytest
import torch

from sid_fast.errors import UserError
from sid_fast.evaluation import features
from sid_fast.evaluation.features import load_detector
from tests.helpers.images import pictures

pytestmark = pytest.mark.usefixtures("cache")
CPU = torch.device("cpu")


def test_only_known_or_trusted_code_is_run(script, monkeypatch, capsys):
    with pytest.raises(UserError, match=r"a program.*sha256 [0-9a-f]{64}.*--trust"):
        load_detector(str(script), CPU)
    with pytest.raises(UserError, match="damaged or not TorchScript"):
        load_detector(__file__, CPU, trust=True)
    with pytest.raises(UserError, match="does not exist"):
        load_detector("none.pt", CPU)
    trusted = load_detector(str(script), CPU, trust=True)
    name = features.label("frechet_distance", trusted)
    assert (trusted.name, name) == ("toy", "Fréchet distance (toy)")
    assert "code" in capsys.readouterr().err
    key = trusted.key
    monkeypatch.setattr(features, "INCEPTION_SHA256", key)
    published = load_detector(str(script), CPU)
    assert (published.name, features.label("frechet_distance", published)) == ("inception", "FID")


def test_inception_is_fetched_and_checked(script, monkeypatch):
    asked = []
    monkeypatch.setattr(features, "fetch", lambda source, others: asked.append(source) or script)
    with pytest.raises(UserError, match="not a known one"):
        load_detector("inception", CPU)
    assert asked == [f"{features.INCEPTION}#sha256={features.INCEPTION_SHA256}"]


def test_features_do_not_depend_on_the_rest_of_the_batch(script):
    images = torch.from_numpy(pictures(10, 3))
    detector = load_detector(str(script), CPU, trust=True, batch=4)
    with torch.autocast("cpu", torch.bfloat16):
        whole = detector(images)
    assert whole.dtype == torch.float32
    assert whole.shape == (10, 12)
    assert torch.equal(whole, torch.cat([detector(images[:3]), detector(images[3:])]))
    module = torch.jit.load(script).eval()
    assert torch.allclose(whole, module(images, return_features=True), atol=1e-5)
    # Grey is repeated.
    assert torch.equal(detector(images[:, :1]), detector(images[:, :1].repeat(1, 3, 1, 1)))


def test_float32_is_exact_whatever_the_caller_allows():
    cudnn, get = torch.backends.cudnn, torch.get_float32_matmul_precision
    before = cudnn.allow_tf32, get()
    try:
        cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("high")
        with features.exact_float32():
            assert (cudnn.allow_tf32, get()) == (False, "highest")
        assert (cudnn.allow_tf32, get()) == (True, "high")
    finally:
        cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


def test_class_probabilities_are_those_without_the_output_bias(script):
    images = torch.from_numpy(pictures(40, 3))
    detector = load_detector(str(script), CPU, trust=True)
    expected = torch.jit.load(script).eval()(images, no_output_bias=True)
    found = detector.probabilities(detector(images))
    assert torch.allclose(found.float(), expected, atol=1e-5)
    assert load_detector("pixels", CPU).probabilities(images) is None
