"""Latents: what is read and refused, and that a draw is a function of seed, step and sample."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sid_fast.config.types import PretrainSettings
from sid_fast.data import feed as feed_module
from sid_fast.data import latents
from sid_fast.data.digits import open_dataset
from sid_fast.data.feed import ImageFeed
from sid_fast.errors import UserError
from sid_fast.methods.base import RandomStream, real_images
from sid_fast.methods.edm import EDM
from sid_fast.models import EDM2Config
from sid_fast.models.edm2.config import LATENT_CHANNELS
from tests.helpers.images import latent_zip, make_zip, npy, pictures, png, posterior

CPU = torch.device("cpu")
SCALE = 0.5 / np.array([4.17, 4.62, 3.71, 3.28])  # EDM2.md
BIAS = -np.array([5.81, 3.25, 0.12, -2.15]) * SCALE
N, BATCH = 7, 4


@pytest.fixture
def stored():
    return posterior(N)


@pytest.fixture
def data(tmp_path, stored):
    return open_dataset(str(latent_zip(tmp_path / "latents.zip", stored, [2, 0, 1, 2, 0, 0, 1])))


def normalized(raw):
    return raw * SCALE[:, None, None] + BIAS[:, None, None]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_means_and_deviations_are_read_as_they_are_stored(tmp_path, dtype):
    stored = posterior(3, dtype=dtype)
    data = open_dataset(str(latent_zip(tmp_path / "latents.zip", stored, [2, 0, 1])))
    assert data.is_latent
    assert (len(data), data.channels, data.resolution, data.label_dim) == (3, 4, 8, 3)
    assert data.labels.tolist() == [2, 0, 1]
    assert data.dtype == dtype
    assert np.array_equal(data.images(), stored)
    assert latents.CHANNELS == LATENT_CHANNELS


@pytest.mark.parametrize("order", ["C", "F", ">"])
def test_any_order_of_bytes_in_a_folder(tmp_path, order):
    array = posterior(1)[0]
    written = array.astype(">f4") if order == ">" else np.asarray(array, order=order)
    (tmp_path / "a.npy").write_bytes(npy(written))
    read = open_dataset(str(tmp_path))[0]
    assert np.array_equal(read, array)
    assert read.dtype == np.float32


FAULTS = {
    "pickled objects": (np.array([1, "x", None], object), "neither numbers nor text"),
    "text": (np.array(["x"]), "holds <U1: save latents as float32"),
    "integers": (np.zeros([4, 8, 8], np.uint8), "holds uint8"),
    "float64": (np.zeros([4, 8, 8]), "holds float64"),
    "complex": (np.zeros([4, 8, 8], np.complex64), "neither numbers nor text"),
    "6 channels": (np.zeros([6, 8, 8], np.float32), "has 6 channels"),
    "3 channels": (np.zeros([3, 8, 8], np.float32), "has 3 channels"),
    "a batch": (np.zeros([1, 8, 8, 8], np.float32), r"has the shape \[1, 8, 8, 8\]"),
    "no square": (np.zeros([8, 8, 4], np.float32), r"has the shape \[8, 8, 4\]"),
    "no values": (np.zeros([8, 0, 0], np.float32), r"has the shape \[8, 0, 0\]"),
    "huge": (b"\x93NUMPY\x01\x00" + b"\x76\x00" + (
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (8, 99999, 99999), }".ljust(117) + b"\n"
    ), "more than"),
    "cut short": (npy(np.zeros([8, 8, 8], np.float32))[:-40], "cut short"),
    "damaged header": (npy(np.zeros([8, 8, 8], np.float32)).replace(b"descr", b"d\x00scr"), "dama"),
    "a pickle": (pickle.dumps([1]), r"is not an \.npy file \(a pickle\)"),
    "a PNG": (png(np.zeros([8, 8, 3], np.uint8)), r"is not an \.npy file \(a PNG image\)"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_latent_is_refused_by_name(tmp_path, fault):
    content, words = FAULTS[fault]
    content = content if isinstance(content, bytes) else npy(content)
    make_zip(tmp_path / "x.zip", {"a.npy": content})
    with pytest.raises(UserError, match=rf"x\.zip: a\.npy .*{words}") as error:
        open_dataset(str(tmp_path / "x.zip"))
    assert "\n" not in str(error.value)


def test_any_damage_is_a_user_error(tmp_path):
    """Every byte of the header flipped, and the file cut off anywhere in it."""
    good, path = npy(posterior(1)[0]), tmp_path / "a.npy"
    changed = [good[:i] + bytes([good[i] ^ 0x15]) + good[i + 1 :] for i in range(128)]
    for data in changed + [good[:n] for n in range(0, 160, 3)]:
        path.write_bytes(data)
        refusal = "a.npy"
        try:
            assert open_dataset(str(tmp_path))[0].shape[0] in (4, 8)
        except UserError as error:
            refusal = str(error)
        assert "a.npy" in refusal
        assert "\n" not in refusal


LATER = {
    "another shape": (lambda a: a[:, :4, :4], r"\[8, 4, 4\], the first one float32 \[8, 8, 8\]"),
    "latents": (lambda a: a[:4], r"\[4, 8, 8\], the first"),
    "half precision": (lambda a: a.astype(np.float16), "holds float16"),
    "NaN": (lambda a: np.where(a == a.max(), np.nan, a), "NaN or infinite"),
    "logarithms of the variance": (lambda a: -np.abs(a), "negative values in its last 4 channels"),
}


@pytest.mark.parametrize("fault", LATER)
def test_a_later_fault_is_named_when_it_is_read(tmp_path, stored, fault):
    change, words = LATER[fault]
    data = open_dataset(str(latent_zip(tmp_path / "x.zip", [stored[0], change(stored[1])])))
    assert np.array_equal(data[0], stored[0])
    with pytest.raises(UserError, match=rf"img-mean-std-00000001\.npy .*{words}"):
        data[1]


def test_images_are_read_where_there_are_both(tmp_path):
    names = {"a.png": png(pictures(1)[0, 0]), "b.npy": npy(posterior(1)[0])}
    data = open_dataset(str(make_zip(tmp_path / "x.zip", names)))
    assert not data.is_latent
    assert "1 .npy file" in data.note


def test_data_have_mean_0_and_deviation_one_half():
    """Latents that are distributed as those of ImageNet-512 are, by EDM2's constants."""
    rng = np.random.default_rng(0)
    raw = np.array([5.81, 3.25, 0.12, -2.15])[:, None, None] + np.array([4.17, 4.62, 3.71, 3.28])[
        :, None, None
    ] * rng.standard_normal([2000, 4, 4, 4])
    normalize = latents.normalization(CPU)
    x = normalize(torch.tensor(raw, dtype=torch.float32))
    assert torch.allclose(x.mean([0, 2, 3]), torch.zeros(4), atol=0.02)
    assert torch.allclose(x.std([0, 2, 3]), torch.full([4], 0.5), atol=0.02)
    assert np.allclose(x, normalized(raw), atol=1e-6)
    assert np.allclose(normalize.inverse(x), raw, atol=1e-5)


# --- draws


def stream(step=0, first=0, n=BATCH, seed=99):
    return RandomStream(torch.tensor([seed, step, first]), "fake", n)


def drawn(feed, step=0, rounds=1, seed=99):
    """What a rank draws in a step, in so many micro-batches."""
    feed.load(step)
    share = feed.batch_size // feed.world_size
    n = share // rounds
    firsts = range(feed.rank * share, (feed.rank + 1) * share, n)
    return torch.cat([real_images(feed, stream(step, i, n, seed))[0] for i in firsts])


def test_a_read_is_mean_plus_deviation_times_noise(data, stored):
    feed = ImageFeed(data, BATCH, 0, CPU)
    feed.load(1)
    x, labels = real_images(feed, stream(1))
    noise = stream(1).normal("latents", 4, 8, 8).numpy()
    order = feed.order(1)
    expected = normalized(stored[order, :4] + stored[order, 4:] * noise)
    assert x.dtype == torch.float32
    assert np.allclose(x, expected, atol=1e-6)
    assert labels.argmax(1).tolist() == data.labels[order].tolist()


def test_latents_without_a_deviation_are_only_normalised(tmp_path, stored):
    path = latent_zip(tmp_path / "raw.zip", stored[:, :4])
    feed = ImageFeed(open_dataset(str(path)), BATCH, 0, CPU)
    feed.load(0)
    rng = stream()
    x, labels = real_images(feed, rng)
    assert np.allclose(x, normalized(stored[feed.order(0), :4]), atol=1e-6)
    assert labels is None
    assert not rng.drawn


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_draw_is_a_function_of_seed_step_and_sample(tmp_path, dtype):
    """The same bits from the device and from the file, on any ranks and in any micro-batches."""
    data = open_dataset(str(latent_zip(tmp_path / "x.zip", posterior(N, dtype=dtype))))
    whole = ImageFeed(data, BATCH, 0, CPU, resident=True)
    for step in 3, 0:
        expected = drawn(whole, step)
        assert torch.equal(drawn(whole, step, rounds=2), expected)
        ranks = [ImageFeed(data, BATCH, 0, CPU, r, 2, resident=False) for r in range(2)]
        assert torch.equal(torch.cat([drawn(feed, step) for feed in ranks]), expected)
        for feed in ranks:
            assert "read ahead" in feed.text
            feed.close()
    assert not torch.equal(drawn(whole, 0, seed=98), expected)


def test_every_read_draws_anew(tmp_path):
    data = open_dataset(str(latent_zip(tmp_path / "x.zip", posterior(1))))
    feed = ImageFeed(data, 1, 0, CPU)
    assert not torch.equal(drawn(feed, 0), drawn(feed, 1))


def test_what_fits_counts_the_bytes_of_latents(tmp_path, data, monkeypatch):
    half = open_dataset(str(latent_zip(tmp_path / "x.zip", posterior(N, dtype=np.float16))))
    monkeypatch.setattr(feed_module.os, "sysconf", lambda name: 1 if "PAGE_SIZE" in name else pages)
    pages = 8 * N * 8 * 8 * 8 * 2
    assert feed_module.fits(half, CPU)
    assert not feed_module.fits(data, CPU)


def test_a_teacher_learns_from_latents(data):
    """sample_inputs of EDM draws latents with noise of their own."""
    feed = ImageFeed(data, BATCH, 0, CPU)
    feed.load(0)
    net = SimpleNamespace(config=EDM2Config(resolution=8, label_dim=0))
    method = EDM(net, PretrainSettings(augment_p=0), feed)
    rng = stream()
    inputs = method.sample_inputs(rng)
    assert torch.equal(inputs.y, drawn(feed))
    assert not torch.equal(inputs.noise, stream().normal("latents", 4, 8, 8))


@pytest.mark.parametrize("latent", [True, False])
def test_the_other_kind_is_refused(data, tmp_path, latent):
    make_zip(tmp_path / "p.zip", {"a.png": png(pictures(1)[0, 0])})
    held, needed = data, open_dataset(str(tmp_path / "p.zip"))
    held, needed = (held, needed) if latent else (needed, held)
    latents.require_kind(held, latent, "the teacher", "give another")
    with pytest.raises(UserError, match=r"holds .* and the teacher needs .*: give another$"):
        latents.require_kind(needed, latent, "the teacher", "give another")
