"""The evaluate command: detectors, references, protocols, and any number of processes."""

import json
import os

import numpy as np
import pytest
import scipy.linalg
import torch

from sid_fast.data.datasets import ImageDataset, write_dataset
from sid_fast.data.images import save_png
from sid_fast.errors import UserError
from sid_fast.evaluation import features, inception_score, moments, sample
from sid_fast.evaluation.features import load_detector
from sid_fast.evaluation.references import content_digest, measure, read_reference, reference_of
from sid_fast.evaluation.sample import StageTimer
from sid_fast.models.registry import load_network, save_network
from sid_fast.performance import cuda_graphs
from sid_fast.sampling import generate_images, group_size, seed_inputs
from tests.helpers.golden import SHARED
from tests.helpers.networks import small_teacher
from tests.helpers.processes import ENV, TORCHRUN, python

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SID_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Classifier(torch.nn.Module):
    """Called as the published Inception network is."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 12, 3, stride=2)
        self.output = torch.nn.Linear(12, 5)
        self.dropout = torch.nn.Dropout()  # not for evaluation

    def forward(
        self,
        img: torch.Tensor,
        return_features: bool = False,
        use_fp16: bool = False,
        no_output_bias: bool = False,
    ) -> torch.Tensor:
        x = self.conv(self.dropout(img.to(torch.float32) / 127.5 - 1)).relu().mean([2, 3])
        if return_features:
            return x
        bias = torch.zeros_like(self.output.bias) if no_output_bias else self.output.bias
        return torch.nn.functional.linear(x, self.output.weight, bias).softmax(1)


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("detector") / "toy.pt"
    net = Classifier()
    torch.nn.init.normal_(net.output.weight, std=3)
    torch.jit.script(net).save(path)
    return path


@pytest.fixture
def network(tmp_path):
    path = tmp_path / "net.safetensors"
    save_network(path, small_teacher())
    return path


@pytest.fixture
def real(tmp_path):
    write_dataset(tmp_path / "real.zip", pictures(23))
    return tmp_path / "real.zip"


def pictures(n: int, channels: int = 1) -> np.ndarray:
    return RNG.integers(256, size=(n, channels, 8, 8), dtype=np.uint8)


# --- detectors


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


def test_features_do_not_depend_on_the_company(script):
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


# --- references


def test_a_reference_has_the_published_layout(run_command, real, tmp_path):
    out = tmp_path / "new" / "stats.npz"
    arguments = ["reference", "--data", real, "--out", out, "--detector", "pixels"]
    assert run_command("evaluate", *arguments)[0] == 0
    expected = ImageDataset(real).images().reshape(23, 64) / 127.5 - 1
    with np.load(out) as found:
        assert found["mu"].dtype == found["sigma"].dtype == np.float64
        assert np.allclose(found["mu"], expected.mean(0))
        assert np.allclose(found["sigma"], np.cov(expected.T))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mu": np.zeros(64)}, "mu .D. and sigma"),
        ({"mu": np.zeros(64), "sigma": np.eye(63)}, "shapes"),
        ({"mu": np.full(64, np.nan), "sigma": np.eye(64)}, "NaN"),
        ({"mu": np.zeros(64), "sigma": np.eye(64), "detector": np.array("x")}, "another detector"),
        ({"mu": np.array([{}]), "sigma": np.eye(1)}, "not a reference"),
    ],
)
def test_what_is_no_reference_is_refused(tmp_path, values, words):
    np.savez(tmp_path / "stats.npz", **values)
    with pytest.raises(UserError, match=rf"stats\.npz.*{words}"):
        read_reference(str(tmp_path / "stats.npz"), load_detector("pixels", CPU))


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_reading_a_reference_runs_nothing_in_it(tmp_path):
    mu = np.array([Trap(tmp_path / "sprung")], dtype=object)
    np.savez(tmp_path / "stats.npz", mu=mu, sigma=np.eye(1))
    with pytest.raises(UserError, match="not a reference"):
        read_reference(str(tmp_path / "stats.npz"), load_detector("pixels", CPU))
    assert not (tmp_path / "sprung").exists()


def test_statistics_are_measured_once_and_again_when_the_zip_changes(real, script, monkeypatch):
    from sid_fast.evaluation import references

    measured = []
    monkeypatch.setattr(references, "measure", lambda *a: measured.append(a) or measure(*a))
    detector, clock = load_detector("pixels", CPU), StageTimer(CPU)

    def look() -> float:
        return float(reference_of(ImageDataset(real), detector, clock).mean.sum())

    first = look()
    assert look() == first
    assert len(measured) == 1
    # Copied elsewhere it is the same data set.
    before, content = real.stat(), real.read_bytes()
    real.rename(real.with_name("moved.zip"))
    real.write_bytes(content)
    assert look() == first
    assert len(measured) == 1
    # One of another content is not, though size and time of change are made to agree.
    write_dataset(real, 255 - ImageDataset(real).images())
    changed = real.read_bytes()
    if len(changed) == len(content):
        os.utime(real, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert look() != first
    assert len(measured) == 2
    # Nor are those of another detector.
    detector = load_detector(str(script), CPU, trust=True)
    assert look() != first
    assert len(measured) == 3


def test_a_byte_changed_in_place_gives_another_digest(real):
    first = content_digest(ImageDataset(real))
    before = real.stat()
    with real.open("r+b") as file:
        file.seek(60)
        file.write(b"x")
    os.utime(real, ns=(before.st_atime_ns, before.st_mtime_ns))
    data = ImageDataset.__new__(ImageDataset)
    data.path, data._zip = real, True
    assert content_digest(data) != first


def test_any_file_of_a_folder_changes_its_digest(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, image in zip("ab", pictures(2), strict=True):
        save_png(folder / f"{name}.png", torch.from_numpy(image))
    digests = [content_digest(ImageDataset(folder))]
    for name in "ab":
        save_png(folder / f"{name}.png", torch.from_numpy(pictures(1)[0]))
        digests.append(content_digest(ImageDataset(folder)))
    assert len(set(digests)) == 3


def test_features_of_a_large_set_are_spread_over_it(tmp_path, monkeypatch):
    from sid_fast.evaluation import references

    monkeypatch.setattr(references, "MAX_FEATURES", 100)
    monkeypatch.setattr(sample, "MAX_FEATURES", 100)
    write_dataset(tmp_path / "large.zip", pictures(150))  # several batches
    data = ImageDataset(tmp_path / "large.zip")
    found = measure(data, load_detector("pixels", CPU), StageTimer(CPU))
    pixels = data.images().reshape(150, 64) / 127.5 - 1
    spread = [3 * i // 2 for i in range(100)]
    assert found.features.shape == (100, 64)
    assert np.allclose(found.features, pixels[spread], atol=1e-6)
    assert found.count == 150
    assert np.allclose(found.mean, pixels.mean(0))


# --- generation


class Overwriting:
    """What a graph does, from the host: a replay writes into the result of the one before."""

    def __init__(self, function):
        self.function, self.result = function, None

    def __call__(self):
        found = self.function()
        self.result = found if self.result is None else self.result.copy_(found)
        return self.result


@pytest.mark.parametrize("steps", [1, 2])
def test_replayed_generation_makes_the_same_images(device, monkeypatch, steps):
    """The last group filled up, and over several batches; so too where the capture fails."""
    net = small_teacher().to(device).eval()
    size = group_size(device, 8)
    monkeypatch.setattr(sample, "GENERATION_BATCH", size + 3)

    def images(**options) -> torch.Tensor:
        return torch.cat(
            list(sample.generate_batches(net, range(2 * size + 1), 2.5, steps, **options))
        )

    expected = images()
    assert len(expected.unique(dim=0)) == len(expected)
    if device.type == "cpu":
        monkeypatch.setattr(cuda_graphs, "warm_up", lambda function: function())
        monkeypatch.setattr(cuda_graphs, "CapturedGraph", Overwriting)
    monkeypatch.setattr(cuda_graphs, "_failed", "")
    assert torch.equal(images(cuda_graph=True), expected)

    def fail(_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graphs, "CapturedGraph", fail)
    with pytest.warns(UserWarning, match=r"CUDA graphs are off: .*not permitted"):
        assert torch.equal(images(cuda_graph=True), expected)


# --- the command


def results(run_command, tmp_path, *arguments) -> dict:
    out = tmp_path / "results.json"
    status, error = run_command("evaluate", *arguments, "--out", out)
    assert status == 0, error
    return json.loads(out.read_text())


def test_the_figures_of_a_network_are_those_of_its_images(
    run_command, network, real, script, tmp_path, capsys
):
    base = ["--network", network, "--data", real, "--detector", script, "--trust", "--seeds"]
    found = results(run_command, tmp_path, *base, "0-29")
    net = load_network(network)
    latents, classes = seed_inputs(list(range(30)), net.config, None)
    images = generate_images(net, latents, classes, 2.5)
    detector = load_detector(str(script), CPU, trust=True)
    ours, theirs = detector(images), detector(torch.from_numpy(ImageDataset(real).images()))
    (m1, s1), (m2, s2) = moments(ours), moments(theirs)
    root = np.trace(scipy.linalg.sqrtm((s1 @ s2).numpy())).real
    expected = float((m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * root)
    figures = found["reported"]
    assert figures["frechet_distance"] == pytest.approx(expected, rel=1e-5)
    score = inception_score(detector.probabilities(ours))
    assert (figures["inception_score"], figures["inception_score_std"]) == pytest.approx(score)
    assert figures.keys() >= {"kernel_distance", "precision", "recall"}
    # Written to a file and read again they are the same images.
    from sid_fast import generate

    config = generate.GenerateConfig(
        network=str(network), seeds="0-29", out=str(tmp_path / "g.zip")
    )
    generate.run(config, set())
    base[0:2] = ["--images", tmp_path / "g.zip"]
    assert results(run_command, tmp_path, *base[:-1])["reported"] == pytest.approx(figures)


def test_three_processes_find_what_one_finds(
    run_command, network, script, real, tmp_path, monkeypatch
):
    base = ["--network", network, "--data", real, "-n", 10, "--device", "cpu"]
    base += ["--detector", script, "--trust", "--batch", 4, "--metrics", "fid,kid,pr"]
    expected = results(run_command, tmp_path, *base)["reported"]
    out = tmp_path / "three.json"
    monkeypatch.setitem(ENV, "SID_FAST_CACHE", str(tmp_path / "another"))  # measured anew
    done = python(*TORCHRUN, 3, "-m", "sid_fast.evaluate", *base, "--out", out)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["processes"] == 3
    assert found["reported"] == pytest.approx(expected, rel=1e-9)
    assert done.stdout.count("Fréchet distance (") == 1, "more than one process speaks"


def test_protocols(run_command, network, real, tmp_path, capsys):
    base = ["--network", network, "--data", real, "--detector", "pixels", "--num", 12]
    base += ["--metrics", "fid"]
    edm = results(run_command, tmp_path, *base, "--protocol", "edm")
    assert edm["seeds"] == [[0, 11], [12, 23], [24, 35]]
    assert edm["covariance_over"] == "N-1"
    distances = [d["frechet_distance"] for d in edm["draws"]]
    assert len(set(distances)) == 3
    assert edm["reported"]["frechet_distance"] == min(distances)
    sid = results(run_command, tmp_path, *base, "--protocol", "sid")
    draws = [d["frechet_distance"] for d in sid["draws"]]
    assert len(draws) == 10
    assert sid["covariance_over"] == "N"
    assert sid["reported"]["frechet_distance"] == pytest.approx(np.mean(draws))
    assert sid["reported"]["frechet_distance_std"] == pytest.approx(np.std(draws))
    # Over N on both sides: the covariance part shrinks, the means' does not.
    one = results(run_command, tmp_path, *base)
    assert one["draws"][0] == edm["draws"][0] != sid["draws"][0]


def test_a_file_of_statistics_gives_the_distance_alone(run_command, network, real, tmp_path):
    stats = tmp_path / "stats.npz"
    run_command("evaluate", "reference", "--data", real, "--out", stats, "--detector", "pixels")
    base = ["--network", network, "--detector", "pixels", "--num", 12]
    found = results(run_command, tmp_path, *base, "--ref", stats)["reported"]
    whole = results(run_command, tmp_path, *base, "--data", real)["reported"]
    assert found == pytest.approx({"frechet_distance": whole["frechet_distance"]})
    # Another one's beside the data: the distance is to the file's images, the rest to the data's.
    other = tmp_path / "other.npz"
    values = dict(np.load(stats))
    np.savez(other, **values | {"mu": values["mu"] + 0.1})
    far = results(run_command, tmp_path, *base, "--ref", other)["reported"]
    both = results(run_command, tmp_path, *base, "--ref", other, "--data", real)["reported"]
    assert far["frechet_distance"] > whole["frechet_distance"] + 1
    assert both == pytest.approx(whole | far)
    # The file knows how many images it is of, as covariances over N need it.
    base += ["--protocol", "sid", "--metrics", "fid"]
    found = results(run_command, tmp_path, *base, "--ref", stats)["reported"]
    assert found == pytest.approx(results(run_command, tmp_path, *base, "--data", real)["reported"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--network", "--images"]),
        (["--network", "digits", "--images", "x.zip"], ["--network", "--images"]),
        (["--network", "digits"], ["--data", "--ref"]),
        (["--network", "digits", "--ref", "none.npz"], ["none.npz"]),
        (["--network", "digits", "--data", "digits", "--metrics", "fid,lpips"], ["lpips", "kid"]),
        (["--network", "digits", "--data", "digits", "--protocol", "x"], ["'x'", "edm", "sid"]),
        (
            ["--network", "digits", "--data", "digits", "--protocol", "edm", "--metrics", "kid"],
            ["fid"],
        ),
        (["--network", "digits", "--data", "digits", "--num", "1"], ["num=1"]),
        (["--network", "digits", "--data", "digits", "--seeds", "0-9", "--num", "3"], ["--seeds"]),
        (["--network", "digits", "--data", "digits", "--reader", "fast"], ["fast", "dali"]),
        (["--network", "digits", "--data", "digits", "--out", "."], ["folder"]),
        (["--images", "digits", "--data", "digits", "--num", "5000"], ["5000", "1797"]),
        (["reference", "--data", "digits"], ["--out"]),
        (["reference", "--out", "x.npz"], ["--data"]),
    ],
)
def test_evaluate_refuses(run_command, monkeypatch, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    detector = [] if "--detector" in arguments else ["--detector", "pixels"]
    status, error = run_command("evaluate", *arguments, *detector)
    assert status == 2
    assert len([line for line in error.splitlines() if "without DALI" not in line]) == 1, error
    for word in words:
        assert word in error
    assert {p.name for p in tmp_path.iterdir()} <= {"cache"}


def test_a_reference_of_another_shape_is_refused(run_command, network, tmp_path):
    write_dataset(tmp_path / "a.zip", pictures(5, 3))
    base = ["--network", network, "--data", tmp_path / "a.zip", "--detector", "pixels"]
    status, error = run_command("evaluate", *base, "--num", 4)
    assert status == 2
    assert "192" in error
    assert "64" in error


# --- real images


def test_real_images_are_near_and_noise_and_blur_are_far(run_command, tmp_path):
    data = SHARED / "data" / "cifar10-32x32-20k.zip"
    detector = SHARED / "data" / "detector-cifar10-resnet56.pt"
    if not (data.exists() and detector.exists()):
        pytest.skip("no CIFAR-10 images or no classifier in $SID_FAST_SHARED/data")
    every = ImageDataset(data)
    images = np.stack([every[i] for i in range(200)])
    other = images[100:]

    def distance(images: np.ndarray, name: str) -> float:
        write_dataset(tmp_path / "other.zip", images.clip(0, 255).astype(np.uint8))
        arguments = ["--data", tmp_path / "half.zip", "--images", tmp_path / "other.zip"]
        arguments += ["--metrics", "fid", "--trust", "--detector", name]
        found = results(run_command, tmp_path, *arguments)
        return found["reported"]["frechet_distance"]

    noise = np.random.default_rng(0).normal(size=other.shape)
    steps = (0.1, 0.15, 0.2, 0.3, 0.5)
    for name, pixel in (("pixels", 4), (detector, 1)):  # every fourth pixel: 192 of them
        half, clean, dirt = (v[:, :, ::pixel, ::pixel] for v in (images[:100], other, noise))
        write_dataset(tmp_path / "half.zip", half)
        near = distance(clean, name)
        grades = [distance(clean + 255 * s * dirt, name) for s in steps]
        assert grades == sorted(grades)
        assert near < grades[0]
        assert grades[-1] > 3 * near
        assert distance(half, name) == pytest.approx(0, abs=1e-6)
