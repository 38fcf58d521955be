"""The feed: every image once an epoch, the same bits from any source, rank and start."""

import gc
import itertools
import json
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sid_fast.config.types import PretrainSettings
from sid_fast.data import feed as feed_module
from sid_fast.data.datasets import ImageDataset, write_dataset
from sid_fast.data.feed import EpochOrder, ImageFeed, fits
from sid_fast.errors import UserError
from sid_fast.io import streams
from sid_fast.methods.edm import EDM
from sid_fast.models import EDMNetwork
from sid_fast.training.step import Trainer
from tests.helpers import recorder
from tests.helpers.networks import SMALL
from tests.helpers.processes import tensors_of

CPU = torch.device("cpu")
IMAGES, BATCH, CLASSES = 23, 6, 5
SOURCES = {
    "resident": {"resident": True},
    "plain": {"resident": False, "reader": "plain"},
    "dali": {"resident": False, "reader": "dali"},
}


def write(path, channels: int = 1, labels: bool = True) -> ImageDataset:
    """Image i has the value i in its first corner and the label i % CLASSES."""
    size = (IMAGES, channels, 8, 8)
    images = np.random.default_rng(channels).integers(256, size=size, dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(IMAGES)
    write_dataset(path, images, np.arange(IMAGES) % CLASSES if labels else None)
    return ImageDataset(path)


@pytest.fixture
def data(tmp_path) -> ImageDataset:
    return write(tmp_path / "images.zip")


@pytest.fixture(params=list(SOURCES))
def source(request) -> dict:
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    return SOURCES[request.param]


@pytest.fixture
def opened():
    """ImageFeed on the CPU; all that it made are closed behind the test."""
    made: list[ImageFeed] = []

    def build(data, batch=BATCH, seed=0, rank=0, world_size=1, **source) -> ImageFeed:
        made.append(ImageFeed(data, batch, seed, CPU, rank, world_size, **source))
        return made[-1]

    yield build
    for feed in made:
        feed.close()


def take(feed: ImageFeed, step: int, rounds: int = 1):
    """All samples of a rank's step, in so many micro-batches."""
    feed.load(step)
    n = feed.batch_size // feed.world_size
    parts = [
        feed.take(torch.tensor([99, step, feed.rank * n + i]), n // rounds)
        for i in range(0, n, n // rounds)
    ]
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), None if labels[0] is None else torch.cat(labels)


def numbers(images: torch.Tensor) -> list[int]:
    return images[:, 0, 0, 0].tolist()


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(1e-3)


def feed_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "feed"]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_image_once_an_epoch(data, opened, source, ranks):
    """Six images a step of 23: most epochs begin inside a batch."""
    feeds = [opened(data, rank=r, world_size=ranks, **source) for r in range(ranks)]
    seen = [n for step in range(IMAGES) for feed in feeds for n in numbers(take(feed, step)[0])]
    epochs = [seen[i : i + IMAGES] for i in range(0, len(seen), IMAGES)]
    assert len(epochs) == BATCH
    assert all(sorted(epoch) == list(range(IMAGES)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == BATCH
    alone = opened(data, resident=True)
    assert seen == [n for step in range(IMAGES) for n in numbers(take(alone, step)[0])]


@pytest.mark.parametrize("channels", [1, 3])
def test_images_and_labels_are_those_of_the_data_set(tmp_path, opened, source, channels):
    data = write(tmp_path / "images.zip", channels)
    feed = opened(data, **source)
    for step in range(6):
        images, labels = take(feed, step)
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.float32)
        assert labels.shape == (BATCH, CLASSES)
        for image, label, n in zip(images, labels, numbers(images), strict=True):
            assert np.array_equal(image, data[n])
            assert label.tolist() == [float(k == n % CLASSES) for k in range(CLASSES)]


def test_without_labels_there_are_none(tmp_path, opened, source):
    feed = opened(write(tmp_path / "images.zip", labels=False), **source)
    assert take(feed, 0)[1] is None


@pytest.mark.parametrize("rank", [0, 1])
def test_micro_batches_are_parts_of_the_step(data, opened, source, rank):
    feed = opened(data, rank=rank, world_size=2, **source)
    for step in range(3):
        whole, parts = take(feed, step), take(feed, step, rounds=3)
        assert all(map(torch.equal, whole, parts))


def test_any_step_can_be_the_first(data, opened, source):
    """Forwards, backwards, and the same again."""
    straight = opened(data, **source)
    expected = [take(straight, step) for step in range(9)]
    jumping = opened(data, **source)
    for step in (7, 8, 2, 2, 3, 0):
        assert all(map(torch.equal, take(jumping, step), expected[step]))


def test_another_seed_is_another_order(data, opened):
    found = [numbers(take(opened(data, seed=seed), 0)[0]) for seed in (0, 1, 2**63 - 1)]
    assert len(set(map(tuple, found))) == 3


def test_a_seed_means_the_same_order_in_every_release():
    order = EpochOrder(7, 6, seed=3, rank=0, world_size=1)
    assert [order(step).tolist() for step in (0, 1)] == [[0, 4, 1, 5, 6, 3], [2, 0, 6, 2, 1, 3]]


def test_no_more_than_two_permutations_are_kept():
    order = EpochOrder(7, 6, seed=0, rank=0, world_size=1)
    for step in (*range(20), 3, 50):
        order(step)
        assert len(order._permutations) <= 2


def test_steps_far_away_do_not_overflow():
    step = 2**62
    found = EpochOrder(IMAGES, BATCH, 0, 0, 1)(step)
    assert sorted(found)[-1] < IMAGES
    assert not np.array_equal(found, EpochOrder(IMAGES, BATCH, 0, 0, 1)(step + IMAGES))


def test_fewer_images_than_a_batch_are_refused(data, opened):
    assert sorted(numbers(take(opened(data, batch=IMAGES), 5)[0])) == list(range(IMAGES))
    with pytest.raises(UserError, match=r"images\.zip has 23 images.*batch_size=24: .*23 at most"):
        opened(data, batch=24)
    with pytest.raises(ValueError, match="does not divide by 4 ranks"):
        opened(data, world_size=4)


def damage(path, number: int):
    """Another byte inside the pixels of an image of a folder."""
    file = path / f"{number:02d}.png"
    content = bytearray(file.read_bytes())
    content[content.index(b"IDAT") + 12] ^= 0xFF
    file.write_bytes(content)


@pytest.fixture
def folder(tmp_path, data):
    path = tmp_path / "folder"
    path.mkdir()
    for i in range(IMAGES):
        (path / f"{i:02d}.png").write_bytes(data.encoded(i).tobytes())
    return path


def test_the_fingerprint_knows_the_labels_of_a_folder(folder, opened):
    found = []
    for shift in (0, 0, 1):
        pairs = [[f"{i:02d}.png", (i + shift) % CLASSES] for i in range(IMAGES)]
        (folder / "dataset.json").write_text(json.dumps({"labels": pairs}))
        found.append(opened(ImageDataset(folder)).fingerprint())
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("step", [0, 2])
def test_a_damaged_image_is_named_whenever_its_step_is_loaded(folder, opened, source, step):
    broken = int(EpochOrder(IMAGES, BATCH, 0, 0, 1)(step)[3])
    damage(folder, broken)
    words = rf"folder: {broken:02d}\.png is damaged"
    if source["resident"]:
        with pytest.raises(UserError, match=words):
            opened(ImageDataset(folder), **source)
        return
    feed = opened(ImageDataset(folder), **source)
    for _ in range(2):
        for k in range(step):
            feed.load(k)
        with pytest.raises(UserError, match=words):
            feed.load(step)
        assert not feed_threads()


def test_a_damaged_image_ends_a_run_in_one_line(folder, tmp_path, run_command, monkeypatch):
    monkeypatch.setattr(feed_module, "fits", lambda *_: False)
    broken = int(EpochOrder(IMAGES, 4, 0, 0, 1)(1)[0])
    damage(folder, broken)
    status, error = run_command(
        "pretrain", *TINY, "--data", folder, "--out", tmp_path / "run", "--kimg", 0.04
    )
    assert status == 2
    line = [line for line in error.splitlines() if line.startswith("error:")]
    assert f"{broken:02d}.png is damaged" in line[0]
    assert "Traceback" not in error
    assert not feed_threads()


@pytest.mark.parametrize("source", ["plain", "dali"], indirect=True)
def test_close_ends_the_thread_whatever_it_does(data, opened, source):
    feed = opened(data, **source)
    for _ in range(3):
        feed.load(0)
        (thread,) = feed_threads()
        feed.close()
        assert not thread.is_alive()
    feed.load(0)
    until(feed._prefetch._queue.full)  # the thread is blocked, or about to be
    feed.close()
    assert not feed_threads()
    feed.close()


def test_a_feed_that_is_dropped_ends_its_thread(data):
    feed = ImageFeed(data, BATCH, 0, CPU, **SOURCES["plain"])
    feed.load(0)
    (thread,) = feed_threads()
    del feed
    gc.collect()
    assert not thread.is_alive()


def test_a_step_that_waits_is_counted(data, opened, monkeypatch):
    """Not the first one after a start or a jump, which nothing precedes."""
    ready = threading.Semaphore(0)
    decode = feed_module.read_batches

    def gated(*arguments):
        for images in decode(*arguments):
            ready.acquire()
            yield images

    monkeypatch.setattr(feed_module, "read_batches", gated)
    feed = opened(data, **SOURCES["plain"])

    def load(step: int, late: bool) -> int:
        if late:
            threading.Timer(0.05, ready.release).start()
        else:
            ready.release()
            until(feed._prefetch.ready)
        feed.load(step)
        return feed.waits

    try:
        assert load(0, late=True) == 0
        assert load(1, late=False) == 0
        assert load(2, late=True) == 1
        assert load(3, late=False) == 1
    finally:
        ready.release(50)  # for the threads, which could not end otherwise
    feed.load(9)
    assert feed.waits == 1


def test_a_host_ahead_of_its_device_does_not_count_as_waiting(data, opened, monkeypatch):
    """On a GPU a step waits if the device has ended all before it when the images come."""
    feed = opened(data, **SOURCES["plain"])
    feed.load(0)
    monkeypatch.setattr(feed_module._Prefetch, "ready", lambda self: False)
    for ended, waits in ((False, 0), (True, 1)):
        event = SimpleNamespace(record=lambda: None, query=lambda ended=ended: ended)
        monkeypatch.setattr(torch.cuda, "Event", lambda event=event: event)
        feed.device = torch.device("cuda")
        feed._next(feed._prefetch.step)
        assert feed.waits == waits


def test_what_fits_is_an_eighth_of_free_memory(data, monkeypatch):
    nbytes = IMAGES * 8 * 8
    for room, expected in ((8 * nbytes, True), (8 * nbytes - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, room=room: (room, 10**12))
        assert fits(data, torch.device("cuda", 0)) is expected
        monkeypatch.setattr(
            feed_module.os, "sysconf", {"SC_PHYS_PAGES": room, "SC_PAGE_SIZE": 1}.get
        )
        assert fits(data, CPU) is expected


def trainer(feed, cuda_graph=False, **settings) -> Trainer:
    torch.manual_seed(0)
    s = PretrainSettings(batch_size=BATCH, lr=1e-2, lr_rampup_kimg=0, augment_p=0.5, **settings)
    network = EDMNetwork(SMALL)
    assert network.config.label_dim == feed.dataset.label_dim
    return Trainer(EDM(network, s, feed), s, cuda_graph=cuda_graph)


@pytest.fixture
def ten_classes(tmp_path):
    images = np.random.default_rng(0).integers(256, size=(IMAGES, 1, 8, 8), dtype=np.uint8)
    write_dataset(tmp_path / "ten.zip", images, np.arange(IMAGES) % SMALL.label_dim)
    return ImageDataset(tmp_path / "ten.zip")


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [None, 3, 1])
def test_replayed_steps_take_the_images_of_eager_ones(
    ten_classes, opened, source, micro_batch, monkeypatch
):
    """And those are of the inputs that sample_inputs gives beforehand."""
    recorder.stand_in(monkeypatch.setattr)
    found = []
    for way in ("given", "eager", "replayed"):
        feed = opened(ten_classes, **source)
        made = trainer(feed, way == "replayed", micro_batch=micro_batch)
        losses = [
            float(made.step(made.sample_inputs() if way == "given" else None)["loss"])
            for _ in range(5)
        ]
        found.append((losses, torch.cat([p.detach().flatten() for p in made.ema.parameters()])))
    assert made.graphs.graphs
    assert found[0][0] == found[1][0] == found[2][0]
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][1], found[2][1])


def test_sampled_inputs_have_their_labels_after_a_dry_run(ten_classes, opened, source):
    made = trainer(opened(ten_classes, **source), micro_batch=2)
    with made.updates_disabled():
        made.dry_run()
    inputs = made.sample_inputs()
    expected = torch.cat([draw.class_labels for draw in inputs[""]])
    labels = take(made.method.feed, 0)[1]
    assert torch.equal(expected, labels)


def test_a_feed_of_other_ranks_is_refused(ten_classes, opened):
    with pytest.raises(
        ValueError, match=r"the feed's batch_size, rank and world_size are \(6, 1, 2"
    ):
        trainer(opened(ten_classes, rank=1, world_size=2))


TINY = (
    "--model-channels", 16, "--channel-mult", "1", "--num-blocks", 1, "--attention-resolutions",
    "", "--batch-size", 4, "--sampler-steps", 1, "--state-every", 0.004, "--keep-states", 9,
    "--log-every", 5,
)  # fmt: skip


@pytest.mark.parametrize("resident", [True, False])
def test_a_resumed_run_reads_on_to_the_same_bits(
    tmp_path, data, run_command, monkeypatch, resident
):
    monkeypatch.setattr(feed_module, "fits", lambda *_: resident)
    run = ("pretrain", *TINY, "--data", data.path, "--kimg", 0.04)
    assert run_command(*run, "--out", tmp_path / "a")[0] == 0
    state = tmp_path / "a" / "state-000000007"  # the second epoch begins inside its next step
    monkeypatch.setattr(feed_module, "fits", lambda *_: not resident)
    status, error = run_command("pretrain", "--resume", state, "--out", tmp_path / "b")
    assert status == 0, error
    a, b = (tensors_of(tmp_path / name / "state-000000010") for name in ("a", "b"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    shown = data.images()
    shown[0, 0, 5, 5] ^= 1
    write_dataset(tmp_path / "other.zip", shown, data.labels)
    write_dataset(tmp_path / "moved.zip", data.images(), np.roll(data.labels, 1))
    for source in (tmp_path / "other.zip", tmp_path / "moved.zip"):
        status, error = run_command("pretrain", "--resume", state, "--data", source)
        assert status == 2
        assert error.count("\n") == 1
        assert " data=" in error


def test_a_run_says_what_share_of_its_steps_waited(tmp_path, data, run_command, monkeypatch):
    monkeypatch.setattr(feed_module, "fits", lambda *_: False)
    late = itertools.cycle([True, False, False, True, False])  # of the steps after the first
    monkeypatch.setattr(feed_module._Prefetch, "ready", lambda self: not next(late))
    said = []
    monkeypatch.setattr(streams, "say", lambda text, file=None: said.append(text))
    run = ("pretrain", *TINY, "--data", data.path, "--kimg", 0.04, "--out", tmp_path / "run")
    assert run_command(*run)[0] == 0
    records = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    assert [r["input_waits"] for r in records if "loss" in r] == [1 / 3, 2 / 5]
    lines = [line for line in said if "it/s" in line]
    assert [line.partition("of steps")[0].split()[-1] for line in lines] == [
        "50.0%",
        "33.3%",
        "40.0%",
    ]
    monkeypatch.setattr(feed_module, "fits", lambda *_: True)
    said.clear()
    assert run_command(*run[:-1], tmp_path / "resident")[0] == 0
    assert not any("waited" in line for line in said)
