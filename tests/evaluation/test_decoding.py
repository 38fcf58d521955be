"""Outputs as images: previews and VAEs, and what is refused of the latter."""

import json
import pickle
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from sid_fast.data import latents
from sid_fast.errors import UserError
from sid_fast.evaluation import decoding
from sid_fast.models import EDM2Config
from sid_fast.sampling import to_uint8
from tests.helpers.networks import SMALL
from tests.helpers.vae import CONFIG, AutoencoderKL, stand_in, write_vae

CPU = torch.device("cpu")
LATENT = EDM2Config(resolution=8, label_dim=0)


@pytest.fixture
def outputs():
    return 0.5 * torch.randn([3, 4, 8, 8], generator=torch.Generator().manual_seed(0))


@pytest.fixture
def vae(tmp_path, monkeypatch):
    stand_in(monkeypatch)
    return write_vae(tmp_path / "vae")


def make(vae, network=LATENT):
    return decoding.make_decoder(network, vae and str(vae), CPU, "net.pkl")


# --- without a VAE


def test_pixels_are_only_rounded():
    x = torch.randn(2, SMALL.channels, 8, 8)
    decoder = make(None, SMALL)
    assert torch.equal(decoder(x), to_uint8(x))
    assert decoder.shape == (SMALL.channels, 8, 8)
    assert not decoder.is_preview


def test_the_preview_is_linear_and_enlarged(outputs):
    """Of one channel at a time: its colour, by hand."""
    decoder = make(None)
    assert decoder.is_preview
    image = decoder(outputs)
    assert image.dtype == torch.uint8
    assert image.shape == (3, *decoder.shape) == (3, 3, 64, 64)
    assert torch.equal(image, image[..., ::8, ::8].repeat_interleave(8, 2).repeat_interleave(8, 3))
    raw = torch.tensor([2.0, -1.0, 0.5, 3.0])  # latents
    x = latents.normalization(CPU)(raw.reshape(1, 4, 1, 1))
    colour = [
        0.298 * 2.0 - 0.187 - 0.158 * 0.5 - 0.184 * 3.0,
        0.207 * 2.0 - 0.286 + 0.189 * 0.5 - 0.271 * 3.0,
        0.208 * 2.0 - 0.173 + 0.264 * 0.5 - 0.473 * 3.0,
    ]
    expected = to_uint8(0.18215 * torch.tensor(colour))
    assert decoding.preview(x)[0, :, 0, 0].tolist() == expected.tolist()


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 8, 8, 8), (4, 8, 8)])
def test_a_preview_is_of_4_channels(shape):
    with pytest.raises(UserError, match="no preview, which needs 4 channels"):
        decoding.preview(torch.zeros(shape))


def test_a_preview_is_no_image_to_evaluate():
    with pytest.raises(UserError, match=r"^net\.pkl makes latents.*--vae FOLDER$"):
        decoding.require_images(make(None), "net.pkl")


# --- with a VAE


def test_latents_are_decoded_after_their_scale_is_undone(vae, outputs):
    decoder = make(vae)
    decoding.require_images(decoder, "net.pkl")
    assert decoder.shape == (3, 16, 16)
    torch.manual_seed(0)
    model = AutoencoderKL(4, [32, 32])
    scale = 0.5 / torch.tensor([4.17, 4.62, 3.71, 3.28]).reshape(4, 1, 1)
    bias = -torch.tensor([5.81, 3.25, 0.12, -2.15]).reshape(4, 1, 1) * scale
    expected = to_uint8(model.decode((outputs - bias) / scale, False)[0])
    found = decoder(outputs.double())
    assert found.shape == (3, 3, 16, 16)
    assert (found.int() - expected.int()).abs().max() <= 1
    assert torch.equal(decoder(outputs[1:2]), decoder(outputs)[1:2])


def test_a_last_group_is_filled_up(outputs):
    """An image does not depend on how many there are."""
    sizes = []

    def decode(x):
        sizes.append(len(x))
        return to_uint8(x[:, :3])

    decoder = decoding.Decoder((3, 8, 8), decode, group=2)
    assert torch.equal(decoder(outputs), to_uint8(outputs[:, :3]))
    assert sizes == [2, 2]


def test_files_pipelines_and_half_precision(vae, outputs, tmp_path):
    expected = make(vae)(outputs)
    file = vae / "diffusion_pytorch_model.safetensors"
    assert torch.equal(make(file)(outputs), expected)
    assert torch.equal(make(vae.parent)(outputs), expected)  # the VAE of a pipeline's folder
    half = {name: value.half() for name, value in load_file(file).items()}
    save_file(half, vae / "diffusion_pytorch_model.fp16.safetensors")
    file.unlink()
    assert (make(vae)(outputs).int() - expected.int()).abs().max() <= 1


CONFIGS = {
    "another class": (CONFIG | {"_class_name": "AutoencoderTiny"}, "'AutoencoderTiny', not of"),
    "no class": ({}, "of None, not of AutoencoderKL"),
    "a list": ([1], r"of \[1\], not of"),
    "huge": (CONFIG | {"block_out_channels": [10**9]}, "a width in block_out_channels is"),
    "no widths": (CONFIG | {"block_out_channels": []}, "not a list of 1 to 8 widths"),
    "deep": (CONFIG | {"layers_per_block": 10**6}, "layers_per_block is 1000000"),
    "text": (CONFIG | {"latent_channels": "4"}, "latent_channels is '4'"),
    "grey": (CONFIG | {"out_channels": 1}, "decodes to 1 channels, not 3"),
}


@pytest.mark.parametrize("fault", CONFIGS)
def test_a_configuration_that_cannot_work_is_refused(vae, fault):
    values, words = CONFIGS[fault]
    (vae / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=rf"config\.json cannot be used as .*{words}"):
        make(vae)


def test_a_vae_of_other_latents_is_refused(vae):
    write_vae(vae, latent_channels=16)
    with pytest.raises(UserError, match=r"latents of 16 channels, but those of net\.pkl have 4"):
        make(vae)


def test_a_vae_for_pixels_is_refused():
    with pytest.raises(UserError, match=r"net\.pkl makes images, not latents: leave out --vae"):
        make("vae", SMALL)


FILES = {
    "no folder": (lambda v: v.rename(v.parent / "other"), "does not exist"),
    "no configuration": (lambda v: (v / "config.json").unlink(), "holds no config.json"),
    "pickled weights": (
        lambda v: (v / "diffusion_pytorch_model.safetensors").rename(v / "pytorch_model.bin"),
        "pytorch_model.bin is a pickle, which is not read",
    ),
    "cut short": (
        lambda v: (v / "diffusion_pytorch_model.safetensors").write_bytes(
            (v / "diffusion_pytorch_model.safetensors").read_bytes()[:-9]
        ),
        "is cut short",
    ),
    "a weight is missing": (
        lambda v: save_file(
            {"decoder.bias": torch.zeros(3)}, v / "diffusion_pytorch_model.safetensors"
        ),
        r"weights do not fit: \S+ is missing",
    ),
    "NaN": (
        lambda v: save_file(
            {k: w * torch.nan for k, w in load_file(v / WEIGHTS).items()}, v / WEIGHTS
        ),
        "decodes to pixels that are NaN",
    ),
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("fault", FILES)
def test_files_that_cannot_be_used_are_refused_by_name(vae, outputs, fault):
    change, words = FILES[fault]
    change(vae)
    with pytest.raises(UserError, match=rf"vae.*{words}") as error:
        make(vae)(outputs)
    assert "\n" not in str(error.value)


def test_nothing_is_unpickled(vae):
    path = vae / "vae.bin"
    path.write_bytes(pickle.dumps(print))
    with pytest.raises(UserError, match=r"vae\.bin is a pickle: give a VAE"):
        make(path)


def test_without_diffusers_the_way_out_is_named(vae, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r'needs diffusers.*pip install "sid-fast\[vae\]"$'):
        make(vae)


def test_the_real_diffusers(tmp_path, outputs):
    """A tiny AutoencoderKL that diffusers itself wrote decodes to the same pixels."""
    diffusers = pytest.importorskip("diffusers", reason='needs pip install "sid-fast[vae]"')
    config = {k: v for k, v in CONFIG.items() if not k.startswith("_")}
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(**config).eval()
    model.save_pretrained(tmp_path / "real")
    decoder = make(tmp_path / "real")
    assert decoder.shape == (3, 16, 16)
    with torch.no_grad():
        raw = latents.normalization(CPU).inverse(outputs)
        expected = to_uint8(model.decode(raw, return_dict=False)[0])
    found = decoder(outputs)
    assert (found.int() - expected.int()).abs().max() <= 1
    assert found.float().std() > 1
