"""The export command: other programs make the same images with the file; bad input is refused."""

import dataclasses
import itertools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sid_fast import kernels
from sid_fast.errors import RunFailed, UserError
from sid_fast.models import EDMNetwork, NetworkConfig, exporters
from sid_fast.models.families import read_config
from sid_fast.models.registry import load_network, save_network
from sid_fast.sampling import one_step
from tests.helpers.networks import SMALL, small_edm2, small_teacher
from tests.helpers.processes import ENV, ROOT, python

BARE = ROOT / "tests" / "helpers" / "bare" / "generate.py"
BATCHES = (1, 3, 5)


@pytest.fixture
def generator(tmp_path):
    net = small_teacher()
    net.config = NetworkConfig.from_dict(SMALL.to_dict() | {"init_sigma": 2.5})
    save_network(tmp_path / "generator.safetensors", net)
    return tmp_path / "generator.safetensors"


@pytest.fixture
def tiny(tmp_path):
    """A one-step generator that is traced in a second."""
    config = NetworkConfig(
        "ddpmpp", resolution=8, channels=1, label_dim=10, model_channels=8, channel_mult=(1,),
        num_blocks=1, init_sigma=2.5,
    )  # fmt: skip
    torch.manual_seed(0)
    save_network(tmp_path / "tiny.safetensors", EDMNetwork(config))
    return tmp_path / "tiny.safetensors"


def pngs(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir())}


def pixels(folder) -> np.ndarray:
    return np.stack([np.array(Image.open(p)).astype(int) for p in sorted(folder.iterdir())])


def in_a_bare_process(path, out, steps) -> None:
    """Make 8 images with a pickle, where sid_fast cannot be imported."""
    env = ENV | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, BARE, path, out, "8", str(steps)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("steps", [1, pytest.param(18, marks=pytest.mark.slow)])
def test_a_pickle_makes_the_images_of_generate_without_sid_fast(
    run_command, tmp_path, generator, teacher, steps
):
    network, path = generator if steps == 1 else teacher, tmp_path / "net.pkl"
    assert run_command("export", "--network", network, "--out", path) == (0, "")
    in_a_bare_process(path, tmp_path / "bare", steps)
    options = ["--network", network, "--seeds", "0-7", "--steps", steps]
    with kernels.dispatch.forced("eager"):  # the operations of the pickle's source
        assert run_command("generate", *options, "--out", tmp_path / "eager")[0] == 0
    assert pngs(tmp_path / "bare") == pngs(tmp_path / "eager")
    assert len(set(pngs(tmp_path / "bare").values())) == 8
    # The kernels round otherwise.
    assert run_command("generate", *options, "--out", tmp_path / "kernels")[0] == 0
    difference = abs(pixels(tmp_path / "bare") - pixels(tmp_path / "kernels"))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


@pytest.mark.parametrize("absent", [(), (0, 2, 3, 7)])
def test_round_trips_keep_the_images_bit_for_bit(run_command, tmp_path, generator, absent):
    """The classes too: those without training images are not drawn."""
    net = load_network(generator)
    net.config = dataclasses.replace(net.config, absent_classes=absent)
    save_network(generator, net)
    files = [generator, *(tmp_path / name for name in ("1.pkl", "2.safetensors", "3.pkl"))]
    for source, target in itertools.pairwise(files):
        assert run_command("export", "--network", source, "--out", target) == (0, "")
        arguments = ["--network", target, "--seeds", "0-7", "--out", tmp_path / target.stem]
        assert run_command("generate", *arguments)[0] == 0
    arguments = ["--network", generator, "--seeds", "0-7", "--out", tmp_path / "generator"]
    assert run_command("generate", *arguments)[0] == 0
    assert pngs(tmp_path / "generator") == pngs(tmp_path / "1")
    assert pngs(tmp_path / "1") == pngs(tmp_path / "2") == pngs(tmp_path / "3")
    assert all(load_network(file).config == net.config for file in files)
    first, last = load_file(generator), load_file(tmp_path / "2.safetensors")
    assert first.keys() == last.keys()
    assert all(torch.equal(first[name], last[name]) for name in first)


def test_upstream_s_pickle_becomes_a_snapshot(run_command, golden, tmp_path):
    source, out = golden / "adm_cond.pkl", tmp_path / "net.safetensors"
    assert run_command("export", "--network", source, "--out", out, "--init-sigma", 2.5) == (0, "")
    net, expected = load_network(out), load_network(source)
    assert net.config.init_sigma == 2.5
    assert expected.config.init_sigma is None
    state = net.state_dict()
    assert all(torch.equal(state[name], v) for name, v in expected.state_dict().items())


@pytest.mark.parametrize(
    ("options", "fp16"), [([], False), (["--fp16"], True), (["--fp16", None], True),
    (["--fp16", "--no-fp16"], False)],
)  # fmt: skip
def test_upstream_runs_it_in_float16_if_asked(
    run_command, teacher, tmp_path, options, fp16, monkeypatch
):
    """A pickle of a pickle keeps what was asked for."""
    out = teacher
    for i, option in enumerate(options or [None]):
        source, out = out, tmp_path / f"{i}.pkl"
        more = [option] if option else []
        assert run_command("export", "--network", source, "--out", out, *more)[0] == 0
    monkeypatch.syspath_prepend(BARE.parent)
    import pickle

    with out.open("rb") as file:
        assert pickle.load(file)["ema"].use_fp16 == fp16


def program(path):
    """The function in a .pt2 or .onnx file, its metadata, and the names of its inputs."""
    if path.suffix == ".pt2":
        files = {"sid_fast.json": ""}
        loaded = torch.export.load(str(path), extra_files=files)
        return loaded.module(), json.loads(files["sid_fast.json"]), list(loaded.example_inputs[1])
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def call(**inputs):
        return torch.from_numpy(session.run(None, {k: v.numpy() for k, v in inputs.items()})[0])

    metadata = json.loads(session.get_modelmeta().custom_metadata_map["sid_fast"])
    assert session.get_modelmeta().description == metadata["interface"]
    for each in (*session.get_inputs(), *session.get_outputs()):
        assert each.shape[0] == "batch"
    return call, metadata, [each.name for each in session.get_inputs()]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_a_generator_as_a_program(run_command, tmp_path, tiny, suffix):
    if suffix == ".onnx":
        pytest.importorskip("onnxruntime")
    out = tmp_path / f"net{suffix}"
    status, error = run_command("export", "--network", tiny, "--out", out)
    assert (status, error) == (0, "")
    call, metadata, names = program(out)
    assert names == ["latents", "class_labels"]
    assert metadata["interface"].startswith("one-step generator: latents [N, 1, 8, 8], class_lab")
    net = load_network(tiny)
    assert NetworkConfig.from_dict(metadata["config"]) == net.config
    for count in BATCHES:
        latents, labels = torch.randn(count, 1, 8, 8), torch.eye(10)[:count]
        images = call(latents=latents, class_labels=labels)
        assert (images - one_step(net, latents, labels, 2.5)).abs().max() < 1e-5
    assert str(ROOT).encode() not in out.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "suffix"),
    [("ncsnpp_uncond", ".onnx"), ("adm_cond", ".onnx"), ("adm_cond", ".pt2")],
)  # generators, above, are of DDPM++
def test_a_teacher_as_a_program(run_command, golden, tmp_path, suffix, name):
    if suffix == ".onnx":
        pytest.importorskip("onnxruntime")
    out = tmp_path / f"net{suffix}"
    assert run_command("export", "--network", golden / f"{name}.pkl", "--out", out)[0] == 0
    call, metadata, names = program(out)
    net = load_network(golden / f"{name}.pkl")
    assert names == ["x", "sigma", *["class_labels"] * bool(net.config.label_dim)]
    assert metadata["interface"].startswith("denoiser: x [N, 3, 16, 16], sigma [N]")
    for count in BATCHES:
        sigma = torch.logspace(-2, 1.9, count)
        inputs = {"x": torch.randn(count, 3, 16, 16), "sigma": sigma}
        if net.config.label_dim:
            inputs["class_labels"] = torch.eye(10)[:count]
        assert (call(**inputs) - net(**inputs)).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_an_edm2_generator_as_a_program(run_command, tmp_path, capsys, suffix):
    if suffix == ".onnx":
        pytest.importorskip("onnxruntime")
    net = small_edm2(resolution=4, channels=4, logvar_channels=0, init_sigma=2.5)
    save_network(tmp_path / "edm2.safetensors", net)
    out = tmp_path / f"net{suffix}"
    with kernels.dispatch.forced("triton"):  # of which no program consists
        assert (
            run_command("export", "--network", tmp_path / "edm2.safetensors", "--out", out)[0] == 0
        )
    call, metadata, names = program(out)
    assert names == ["latents", "class_labels"]
    assert "-> normalised latents [N, 4, 4, 4]; it multiplies" in metadata["interface"]
    assert read_config(metadata["config"]) == net.config
    for count in BATCHES:
        latents, labels = torch.randn(count, 4, 4, 4), torch.eye(3)[torch.arange(count) % 3]
        expected = one_step(net, latents, labels, 2.5)
        assert (call(latents=latents, class_labels=labels) - expected).abs().max() < 1e-5


def test_a_pickle_of_an_edm2_network_is_refused(run_command, tmp_path):
    save_network(tmp_path / "edm2.safetensors", small_edm2())
    arguments = ["--network", tmp_path / "edm2.safetensors", "--out", tmp_path / "x.pkl"]
    assert run_command("export", *arguments) == (
        2,
        f"error: {tmp_path}/edm2.safetensors is an EDM2 network, which .pkl cannot hold yet: give "
        "NAME.safetensors, .onnx or .pt2, or an EDM network (DDPM++, NCSN++ or ADM)\n",
    )
    assert not (tmp_path / "x.pkl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pkl", ".onnx", ".pt2"])
def test_the_next_command_runs(tmp_path, generator, suffix):
    if suffix == ".onnx":
        pytest.importorskip("onnxruntime")
    out = tmp_path / f"a net{suffix}"
    done = python("-m", "sid_fast.export", "--network", generator, "--out", out)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.match(rf"wrote {re.escape(str(out))} \(\d\.\d MB\): one-step generator", lines[0])
    assert suffix == ".pkl" or re.search("pixel difference .* of 255", lines[1])
    words = shlex.split(lines[-1].removeprefix("next: "))
    assert Path(words[0]).name.startswith("python")
    done = python(*words[1:])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a net.png").exists() or "4, 1, 8, 8" in done.stdout


class Rounding(torch.nn.Module):
    def forward(self, latents, class_labels):
        return latents.round()


@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=pytest.mark.slow)])
def test_a_file_that_computes_something_else_is_not_written(
    tmp_path, generator, monkeypatch, suffix
):
    if suffix == ".onnx":
        pytest.importorskip("onnxruntime")
    net, out = load_network(generator), tmp_path / f"net{suffix}"
    out.write_text("old")
    trace = exporters._trace
    monkeypatch.setattr(exporters, "_trace", lambda function, inputs: trace(Rounding(), inputs))
    save = {".pt2": exporters.save_program, ".onnx": exporters.save_onnx}[suffix]
    with pytest.raises(RunFailed, match=r"is not written: its output for 1 images differs"):
        save(out, net)
    assert out.read_text() == "old"
    assert {p.name for p in tmp_path.iterdir()} == {out.name, generator.name}


def test_a_pickle_that_comes_back_otherwise_is_not_written(tmp_path, generator, monkeypatch):
    net, out, other = load_network(generator), tmp_path / "net.pkl", load_network(generator)
    other.model.map_layer0.weight[0, 0] += 1
    monkeypatch.setattr(exporters, "load_network", lambda path: other)
    with pytest.raises(RunFailed, match=r"net\.pkl is not written: model\.map_layer0\.weight"):
        exporters.save_pickle(out, net)
    assert not out.exists()


def test_images_that_are_not_finite_are_refused(run_command, tmp_path):
    net = small_teacher()
    for p in net.parameters():
        p.data.mul_(1e30)
    save_network(tmp_path / "large.safetensors", net)
    arguments = ["--network", tmp_path / "large.safetensors", "--out", tmp_path / "x.pt2"]
    status, error = run_command("export", *arguments)
    assert status == 2
    assert error.splitlines()[-1].startswith("error: ")
    assert "have NaN or infinite pixels" in error.splitlines()[-1]
    assert not (tmp_path / "x.pt2").exists()


def test_packages_that_are_not_installed_are_named(run_command, teacher, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    status, error = run_command("export", "--network", teacher, "--out", tmp_path / "x.onnx")
    assert (status, error.count("\n")) == (2, 1)
    assert re.search(r"needs onnx, onnxscript, onnxruntime: pip install .*onnxruntime$", error)


def test_weights_beyond_an_onnx_file_are_refused(teacher, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(exporters, "_ONNX_BYTES", 1000)
    with pytest.raises(UserError, match=r"an \.onnx file holds 2 GB: give NAME\.pt2"):
        exporters.save_onnx(tmp_path / "x.onnx", load_network(teacher))


def test_an_older_file_is_replaced_and_a_folder_made(run_command, teacher, tmp_path):
    out = tmp_path / "new" / "net.safetensors"
    for _ in range(2):
        assert run_command("export", "--network", teacher, "--out", out) == (0, "")
    assert [p.name for p in out.parent.iterdir()] == ["net.safetensors"]


@pytest.mark.parametrize("suffix", [".pkl", ".pt2"])
def test_a_damaged_network_is_named(run_command, teacher, tmp_path, suffix):
    teacher.write_bytes(teacher.read_bytes()[:-1000])
    status, error = run_command("export", "--network", teacher, "--out", tmp_path / f"x{suffix}")
    assert (status, error.count("\n")) == (2, 1)
    assert f"{teacher} is cut short" in error
    assert not (tmp_path / f"x{suffix}").exists()
