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


class Raising(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("only 299x299 images")


class Pair(torch.nn.Module):
    def forward(self, x: torch.Tensor):
        return x, x


class Fixed(torch.nn.Module):
    """Gives the same features whatever the images."""

    def __init__(self, features: torch.Tensor):
        super().__init__()
        self.register_buffer("features", features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.features


class TwoInputs(torch.nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Raising(), r"odd fails on uint8 images \[4, 3, 8, 8\] \(.*only 299x299 images\)"),
        (TwoInputs(), r"odd fails on uint8 images \[4, 3, 8, 8\] \(.*"),
        (Pair(), "odd gives a tuple for uint8 images"),
        (Fixed(torch.zeros(1, 7)), r"odd gives a tensor of shape \[1, 7\] .*features \[4, D\]"),
        (Fixed(torch.zeros(5, 7)), r"odd gives a tensor of shape \[5, 7\]"),
        (Fixed(torch.zeros(4)), r"odd gives a tensor of shape \[4\]"),
        (Fixed(torch.zeros(4, 0)), r"odd gives a tensor of shape \[4, 0\]"),
        (Fixed(torch.tensor(0.0)), r"odd gives a tensor of shape \[\]"),
        (Fixed(torch.zeros(4, 7, dtype=torch.complex64)), "odd gives a tensor of torch.complex64"),
    ],
)
def test_a_detector_that_gives_no_features_is_named(tmp_path, module, words):
    torch.jit.script(module).save(tmp_path / "odd.pt")
    detector = load_detector(str(tmp_path / "odd.pt"), CPU, trust=True, batch=4)
    with pytest.raises(UserError, match=f"detector {words}.*another --detector") as error:
        detector(torch.from_numpy(pictures(3, 3)))
    assert len(str(error.value)) < 500


def test_a_program_without_forward_is_no_detector(tmp_path):
    class Other(torch.nn.Module):
        @torch.jit.export
        def features(self, x: torch.Tensor) -> torch.Tensor:
            return x

    torch.jit.script(Other()).save(tmp_path / "odd.pt")
    with pytest.raises(UserError, match="damaged or not TorchScript"):
        load_detector(str(tmp_path / "odd.pt"), CPU, trust=True)
    for content, words in ((b"<html>", "an HTML page"), (b"", "empty and not TorchScript")):
        (tmp_path / "odd.pt").write_bytes(content)
        with pytest.raises(UserError, match=rf"odd\.pt is {words}"):
            load_detector(str(tmp_path / "odd.pt"), CPU, trust=True)
    with pytest.raises(UserError, match="/dev/zero is a device"):
        load_detector("/dev/zero", CPU, trust=True)


@pytest.mark.parametrize("output", [torch.nn.Linear(12, 5), torch.nn.Linear(3, 5), torch.nn.ReLU()])
def test_only_a_last_layer_of_as_many_inputs_has_classes(tmp_path, output):
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.output = output

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)[:, :12].float()

    torch.jit.script(Network()).save(tmp_path / "odd.pt")
    detector = load_detector(str(tmp_path / "odd.pt"), CPU, trust=True)
    found = detector.probabilities(detector(torch.from_numpy(pictures(3, 3))))
    assert (found is not None) == (getattr(output, "in_features", 0) == 12)


def test_class_probabilities_are_those_without_the_output_bias(script):
    images = torch.from_numpy(pictures(40, 3))
    detector = load_detector(str(script), CPU, trust=True)
    expected = torch.jit.load(script).eval()(images, no_output_bias=True)
    found = detector.probabilities(detector(images))
    assert torch.allclose(found.float(), expected, atol=1e-5)
    assert load_detector("pixels", CPU).probabilities(images) is None
