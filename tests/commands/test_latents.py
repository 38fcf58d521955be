"""Networks of latents on the command line: previews, images of a VAE, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

import sid_fast
from sid_fast.data import feed as feed_module
from sid_fast.data.datasets import ImageDataset
from sid_fast.data.digits import open_dataset
from sid_fast.evaluation import decoding
from sid_fast.methods.base import RandomStream, real_images
from sid_fast.models import EDM2Config, EDM2Network
from sid_fast.models.registry import save_network
from sid_fast.sampling import one_step
from sid_fast.train import check_data, label_weights
from sid_fast.training.random_streams import fixed_grid_inputs
from tests.helpers.images import latent_zip, posterior
from tests.helpers.networks import small_teacher
from tests.helpers.processes import tensors_of
from tests.helpers.vae import stand_in, write_vae

CPU = torch.device("cpu")
SMALL = EDM2Config(
    resolution=8, label_dim=3, model_channels=64, channel_mult=(1,), num_blocks=1,
    attention_resolutions=(), logvar_channels=16, init_sigma=2.5,
)  # fmt: skip
SAMPLE = ("--seeds", "0-2")


def initialized(config):
    torch.manual_seed(0)
    net = EDM2Network(config)
    for name, p in net.named_parameters():
        if name.endswith("_gain"):
            p.data.fill_(0.5)
    return net


@pytest.fixture
def network(tmp_path):
    save_network(tmp_path / "net.safetensors", initialized(SMALL))
    return tmp_path / "net.safetensors"


@pytest.fixture
def vae(tmp_path, monkeypatch):
    stand_in(monkeypatch)
    return write_vae(tmp_path / "vae")


@pytest.fixture
def data(tmp_path):
    return latent_zip(tmp_path / "latents.zip", posterior(12), [0] * 9 + [2] * 3)


@pytest.fixture
def made(run_command, network, tmp_path):
    """The latents of seeds 0 to 2."""
    out = tmp_path / "latents.npz"
    assert run_command("generate", "--network", network, *SAMPLE, "--out", out)[0] == 0
    with np.load(out) as file:
        return torch.from_numpy(file["latents"])


def first_tile(grid, side):
    """The first image of a grid of 2 columns, [3, side, side]."""
    scale = -(-500 // (2 * side))
    return np.asarray(Image.open(grid))[: side * scale : scale, : side * scale : scale].transpose(
        2, 0, 1
    )


def test_a_grid_without_a_vae_is_a_preview(run_command, network, made, tmp_path):
    grid, out = tmp_path / "grid.png", tmp_path / "again.npz"
    arguments = "generate", "--network", network, *SAMPLE, "--grid", grid, "--out", out
    status, error = run_command(*arguments)
    assert (status, error.count("\n")) == (0, 1)
    assert "grid.png is a preview of the latents: give --vae" in error
    assert np.array_equal(first_tile(grid, 64), decoding.preview(made[:1])[0])
    with np.load(out) as file:
        assert np.array_equal(file["latents"], made.numpy())
        assert "images" not in file


@pytest.mark.parametrize("kind", ["folder", "zip", "grid"])
def test_a_vae_decodes_what_is_written(run_command, network, vae, made, tmp_path, kind):
    out = tmp_path / {"folder": "folder", "zip": "out.zip", "grid": "out.png"}[kind]
    target = "--grid" if kind == "grid" else "--out"
    status, error = run_command(
        "generate", "--network", network, *SAMPLE, "--vae", vae, "--batch", 2, target, out
    )
    assert (status, error) == (0, "")
    expected = decoding.make_decoder(SMALL, str(vae), CPU, "")(made).numpy()
    if kind == "grid":
        assert np.array_equal(first_tile(out, 16), expected[0])
    else:
        assert np.array_equal(ImageDataset(out).images(), expected)


def test_evaluation_decodes(run_command, network, vae, made, tmp_path):
    """Of images that the VAE made of the same latents the distance is 0."""
    for name, seeds in (("real", "0-5"), ("others", "6-11")):
        out = tmp_path / f"{name}.zip"
        sample = "--network", network, "--seeds", seeds
        assert run_command("generate", *sample, "--vae", vae, "--out", out)[0] == 0
    distances = {}
    for name in "real", "others":
        out = tmp_path / f"{name}.json"
        status, error = run_command(
            "evaluate", "--network", network, "--vae", vae, "-n", 6, "--detector",
            "pixels", "--metrics", "kid", "--data", tmp_path / f"{name}.zip", "--out", out,
        )  # fmt: skip
        assert status == 0, error
        distances[name] = json.loads(out.read_text())["reported"]["kernel_distance"]
    assert distances["real"] < distances["others"]


REFUSED = {
    "generate --network NET --out x": "net.safetensors makes latents: give the VAE",
    "generate --network NET --out x.zip": "net.safetensors makes latents: give the VAE",
    "generate --network NET --out x.npz --vae VAE": "--vae has no effect without --grid",
    "generate --network PIXELS --grid x.png --vae VAE": "makes images, not latents",
    "generate --network NET --grid x.png --vae none": "none does not exist",
    "generate --network NET --grid x.png --vae WIDE": "latents of 8 channels, but those of",
    "evaluate --network NET --ref r.npz --detector pixels": "makes latents, and images are",
    "evaluate --network PIXELS --ref r.npz --detector pixels --vae VAE": "makes images, not latent",
    "evaluate --images DATA --ref r.npz --detector pixels --vae VAE": "no effect without --network",
    "evaluate --images DATA --ref r.npz --detector pixels": "latents.zip holds latents (.npy), and",
    "evaluate --network PIXELS --data DATA --detector pixels": "an evaluation needs images (PNG)",
    "evaluate reference --data DATA --detector pixels --out r.npz": "an evaluation needs images",
    "pretrain --data DATA": "a ddpmpp network needs images (PNG)",
    "pretrain --data DATA --eval-every 1": "images are compared: give the statistics",
    "train --teacher PIXELS --data DATA": "latents.zip holds latents (.npy), and the teacher needs",
    "train --teacher TEACHER --data digits": "and the teacher needs latents (.npy): give",
    "train --teacher TEACHER --data digits --method sida": "the teacher needs latents (.npy): give",
    "train --teacher TEACHER --ref r.npz --eval-every 1": "makes latents, and images are evaluated",
}


@pytest.mark.parametrize("typed", REFUSED)
def test_one_line_says_what_is_wrong(run_command, network, vae, data, tmp_path, monkeypatch, typed):
    monkeypatch.chdir(tmp_path)
    save_network(tmp_path / "pixels.safetensors", small_teacher())
    write_vae(tmp_path / "wide", latent_channels=8)
    teacher = teacher_network(tmp_path)
    words = {
        "NET": network, "PIXELS": "pixels.safetensors", "VAE": vae, "WIDE": "wide", "DATA": data,
        "TEACHER": teacher,
    }  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    status, error = run_command(*(words.get(word, word) for word in typed.split()))
    lines = [line for line in error.splitlines() if not line.startswith("note: ")]
    assert (status, len(lines)) == (2, 1)
    assert REFUSED[typed] in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


# --- runs


def teacher_network(tmp_path):
    net = initialized(dataclasses.replace(SMALL, init_sigma=None))
    save_network(tmp_path / "teacher.safetensors", net)
    return tmp_path / "teacher.safetensors"


def test_sid_takes_the_labels_of_latents_and_no_images(data):
    """Classes are as frequent as in the data; nothing is read of the latents."""
    opened = open_dataset(str(data))
    check_data(opened, SMALL)
    weights = label_weights(opened, SMALL)
    assert weights.tolist() == [9, 0, 3]
    net = initialized(dataclasses.replace(SMALL, init_sigma=None))
    distiller = sid_fast.Distiller(net, sid_fast.Settings(batch_size=256), 0, weights)
    assert distiller.method.feed is None
    labels = distiller.draw()["fake"][0].class_labels
    share = labels.mean(0)
    assert share[1] == 0
    assert share[0] == pytest.approx(3 / 4, abs=0.1)


def test_sida_trains_on_drawn_latents(data):
    """The fake score's real images are the feed's latents, with the stream's noise."""
    net = initialized(dataclasses.replace(SMALL, init_sigma=None))
    settings = sid_fast.SiDASettings(batch_size=4, adversarial_group=4)
    distiller = sid_fast.Distiller(net, settings, data=open_dataset(str(data)))
    (draw,) = distiller.draw()["fake"]
    feed = distiller.method.feed
    again = RandomStream(distiller.counter, "fake", 4)
    expected, labels = real_images(feed, again)
    assert torch.equal(draw.real, expected)
    assert torch.equal(draw.class_labels, labels)
    assert not torch.equal(draw.real, draw.noise)


@pytest.mark.slow
def test_a_run_on_latents_resumes_to_the_same_bits(run_command, data, tmp_path, monkeypatch):
    run = (
        "train", "--teacher", teacher_network(tmp_path), "--data", data, "--method", "sida",
        "--batch-size", 4, "--adversarial-group", 4, "--generator-start-kimg", 0, "--kimg", 0.02,
        "--state-every", 0.004, "--keep-states", 9, "--tune", "off",
    )  # fmt: skip
    assert run_command(*run, "--out", tmp_path / "a")[0] == 0
    state = tmp_path / "a" / "state-000000002"
    monkeypatch.setattr(feed_module, "fits", lambda *_: False)
    status, error = run_command("train", "--resume", state, "--out", tmp_path / "b")
    assert status == 0, error
    a, b = (tensors_of(tmp_path / name / "state-000000005") for name in ("a", "b"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    grids = [(tmp_path / name / "samples-0000000020.png").read_bytes() for name in ("a", "b")]
    assert grids[0] == grids[1]
    net = sid_fast.load_network(tmp_path / "a")
    assert [*net.config.classes] == [0, 2]
    z, labels = fixed_grid_inputs(net.config, 0, 100)
    made = one_step(net, z[:1], labels[:1], net.config.init_sigma)
    tile = first_tile(tmp_path / "a" / "samples-0000000020.png", 64)
    assert np.abs(tile.astype(int) - decoding.preview(made)[0].numpy()).max() <= 1
