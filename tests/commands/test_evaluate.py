"""The evaluate command: its metrics, protocols and refusals, with one process and several."""

import json
import signal

import numpy as np
import pytest
import scipy.linalg
import torch

from sid_fast.data.datasets import ImageDataset, write_dataset
from sid_fast.evaluation import inception_score, moments
from sid_fast.evaluation.features import load_detector
from sid_fast.models.registry import load_network
from sid_fast.sampling import generate_images, seed_inputs
from tests.helpers.golden import SHARED
from tests.helpers.images import pictures
from tests.helpers.processes import ENV, TORCHRUN, python, python_without_stdout

pytestmark = pytest.mark.usefixtures("cache")
CPU = torch.device("cpu")


def test_a_reference_has_the_published_layout(run_command, real, tmp_path):
    out = tmp_path / "new" / "stats.npz"
    arguments = ["reference", "--data", real, "--out", out, "--detector", "pixels"]
    assert run_command("evaluate", *arguments)[0] == 0
    expected = ImageDataset(real).images().reshape(23, 64) / 127.5 - 1
    with np.load(out) as found:
        assert found["mu"].dtype == found["sigma"].dtype == np.float64
        assert np.allclose(found["mu"], expected.mean(0))
        assert np.allclose(found["sigma"], np.cov(expected.T))


def results(run_command, tmp_path, *arguments) -> dict:
    out = tmp_path / "results.json"
    status, error = run_command("evaluate", *arguments, "--out", out)
    assert status == 0, error
    return json.loads(out.read_text())


def test_metrics_of_a_network_equal_those_of_its_images(
    run_command, teacher, real, script, tmp_path, capsys
):
    base = ["--network", teacher, "--data", real, "--detector", script, "--trust", "--seeds"]
    found = results(run_command, tmp_path, *base, "0-29")
    net = load_network(teacher)
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
        network=str(teacher), seeds="0-29", out=str(tmp_path / "g.zip")
    )
    generate.run(config, set())
    base[0:2] = ["--images", tmp_path / "g.zip"]
    assert results(run_command, tmp_path, *base[:-1])["reported"] == pytest.approx(figures)


@pytest.mark.slow
def test_three_processes_report_the_metrics_of_one(
    run_command, teacher, script, real, tmp_path, monkeypatch
):
    base = ["--network", teacher, "--data", real, "-n", 10, "--device", "cpu"]
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


def test_classes_without_real_images_are_not_generated(run_command, teacher, tmp_path, monkeypatch):
    write_dataset(tmp_path / "a.zip", pictures(6), [1, 2, 4, 1, 2, 4])
    base = ["--network", teacher, "--data", tmp_path / "a.zip", "--detector", "pixels", "-n", 30]
    status, error = run_command("evaluate", *base, "--metrics", "fid", "--reader", "plain")
    assert status == 0, error
    assert "a.zip: no images of class 0, 3:" in error
    assert "a.zip has images of 3 of the network's 10 classes: only those are generated" in error
    assert "does not say that it is a one-step generator: sampling it in one step" in error
    assert "one-step" not in run_command("evaluate", *base, "--init-sigma", 2.5)[1]
    found = results(run_command, tmp_path, *base, "--metrics", "fid")["reported"]
    latents, classes = seed_inputs(list(range(30)), load_network(teacher).config, None, [1, 2, 4])
    assert set(classes.tolist()) == {1, 2, 4}
    images = generate_images(load_network(teacher), latents, classes, 2.5)
    write_dataset(tmp_path / "g.zip", images)
    base[:2] = ["--images", tmp_path / "g.zip"]
    expected = results(run_command, tmp_path, *base, "--metrics", "fid")["reported"]
    assert found == pytest.approx(expected)


def test_features_that_are_not_finite_are_one_line(run_command, teacher, real, tmp_path):
    class Division(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.float().mean([2, 3]) / 0

    torch.jit.script(Division()).save(tmp_path / "division.pt")
    base = ["--network", teacher, "--data", real, "-n", 8, "--reader", "plain"]
    base += ["--detector", tmp_path / "division.pt", "--trust", "--out", tmp_path / "o.json"]
    status, error = run_command("evaluate", *base)
    assert status == 2
    assert error.splitlines()[-1] == (
        "error: reading real.zip: division gives features that are NaN, infinite or too large: "
        "give another --detector"
    )
    assert not (tmp_path / "o.json").exists()
    assert not list((tmp_path / "cache").glob("reference-*"))


def test_protocols(run_command, teacher, real, tmp_path, capsys):
    base = ["--network", teacher, "--data", real, "--detector", "pixels", "--num", 12]
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


def test_a_file_of_statistics_gives_the_distance_alone(run_command, teacher, real, tmp_path):
    stats = tmp_path / "stats.npz"
    run_command("evaluate", "reference", "--data", real, "--out", stats, "--detector", "pixels")
    base = ["--network", teacher, "--detector", "pixels", "--num", 12]
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
        (["reference", "--data", "digits"], ["out is missing", "--out NAME.npz"]),
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


def test_a_reference_of_another_shape_is_refused(run_command, teacher, tmp_path):
    write_dataset(tmp_path / "a.zip", pictures(5, 3))
    base = ["--network", teacher, "--data", tmp_path / "a.zip", "--detector", "pixels"]
    status, error = run_command("evaluate", *base, "--num", 4)
    assert status == 2
    assert "8x8 pixels (channels: 1)" in error
    assert "8x8 (3)" in error


# --- real images


@pytest.mark.slow
def test_real_images_are_close_and_noise_increases_the_distance(run_command, tmp_path):
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
        arguments += ["--metrics", "fid", "--detector", name]
        arguments += ["--trust"] if name != "pixels" else []
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


def test_results_are_written_before_they_are_printed(teacher, real, tmp_path):
    """The process is killed at the first line of its results."""
    out = tmp_path / "results.json"
    program = (
        "import os, signal, sys; from sid_fast import cli, evaluate\n"
        "evaluate.say = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "cli.main(evaluate.main, 'sid_fast.evaluate')"
    )
    arguments = ["--network", teacher, "--data", real, "-n", 12, "--detector", "pixels"]
    done = python("-c", program, *arguments, "--metrics", "fid", "--out", out)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert json.loads(out.read_text())["reported"]["frechet_distance"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("stdout", ["closed", "full", "reader gone"])
def test_results_are_kept_where_nothing_can_be_printed(teacher, real, tmp_path, stdout):
    out = tmp_path / "results.json"
    arguments = ["--network", teacher, "--data", real, "-n", 12, "--detector", "pixels"]
    arguments += ["--metrics", "fid", "--out", out]
    done = python_without_stdout(stdout, "-m", "sid_fast.evaluate", *arguments)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads(out.read_text())["reported"]["frechet_distance"] > 0
