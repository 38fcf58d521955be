"""Damages files of every kind and reads them: `python -m tests.fuzz` is the long hunt.

Whatever its bytes, a file ends in a UserError of one line or in a valid object, in bounded time and
memory. tests/test_fuzz.py tries a few, the same each time.

python -m tests.fuzz                      every reader, some minutes each
python -m tests.fuzz pickle --seconds 60  one of them
"""

import argparse
import dataclasses
import functools
import gc
import gzip
import io
import json
import logging
import os
import pickle
import pickletools
import re
import resource
import struct
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase
from PIL import Image

from sid_fast import Distiller, Settings, cli
from sid_fast.config.types import check
from sid_fast.data.convert import Conversion, Converted, LeftOut, convert
from sid_fast.data.datasets import MAX_CLASSES, ImageDataset, write_dataset
from sid_fast.data.images import encode_png
from sid_fast.data.sources import Source, open_source
from sid_fast.errors import LINE, UserError
from sid_fast.evaluation.features import Pixels
from sid_fast.evaluation.references import read_reference
from sid_fast.evaluation.sample import FeatureStats
from sid_fast.io.lock import NAME as LOCK
from sid_fast.io.lock import RunLock
from sid_fast.io.untrusted import brief, parse_json, sniff
from sid_fast.models import EDMNetwork, NetworkConfig
from sid_fast.models.registry import load_network, save_network
from sid_fast.tools import autotune, verdicts
from sid_fast.tools.candidates import Candidate
from sid_fast.tools.proof import Job
from sid_fast.tools.run_report.page import page
from sid_fast.tools.run_report.runs import read_runs
from sid_fast.train import TrainConfig
from sid_fast.training import checkpoint
from sid_fast.training.checkpoint import (
    HEADER,
    States,
    find_restarted_run,
    load_state,
    read_header,
)
from sid_fast.training.logging import Log, read_log
from tests.helpers.networks import small_teacher
from tests.helpers.pickled import network_pickle
from tests.helpers.runs import OPTIONS, progress

SECONDS = 10.0  # of this process that reading a small file may take
MEMORY = 512 << 20  # bytes by which the process may grow


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader and what its files are made of.

    Attributes:
        read: Reads a file; what it returns is passed to `check`.
        samples: Makes valid files.
        pieces: Bytes that mean something in such a file.
        check: Asserts that a result is valid.
        name: Of the file that is read.
        boundaries: Where the parts of a file begin; half of the damages are there.
    """

    read: Callable[[Path], Any]
    samples: Callable[[], Sequence[bytes]]
    pieces: Sequence[bytes] = ()
    check: Callable[[Any], None] = lambda result: None
    name: str = "file"
    boundaries: Callable[[bytes], Sequence[int]] = lambda data: [0, len(data)]


TINY = NetworkConfig(
    "ddpmpp", resolution=2, channels=1, model_channels=4, channel_mult=(1,), num_blocks=1,
    attention_resolutions=(),
)  # fmt: skip


@functools.cache
def _network() -> EDMNetwork:
    torch.manual_seed(0)
    return EDMNetwork(TINY)


def _pickles() -> list[bytes]:
    return [network_pickle(_network(), sigma_min=0.002, label_dropout=0.1)]


@functools.cache
def _opcodes(data: bytes) -> list[int]:
    return [at for _, _, at in pickletools.genops(data)]


@functools.cache
def _json_tokens(data: bytes) -> list[int]:
    return [match.start() for match in re.finditer(rb"[][{},:]|(?<=[][{},:])[^][{},:]", data)]


def _snapshots() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        save_network(Path(folder) / "net.safetensors", _network())
        return [(Path(folder) / "net.safetensors").read_bytes()]


def _check_network(net: EDMNetwork) -> None:
    assert isinstance(net, EDMNetwork)
    assert all(v.isfinite().all() and v.dtype == torch.float32 for v in net.parameters())


def _page_of_run(path: Path) -> str:
    config = path.with_name("config.json")
    if path != config:
        config.write_text("{}")
    return page(read_runs([str(path.parent)]), [], [[]], "")


def _check_page(html: str) -> None:
    assert html.count("<script") == 1
    assert html.encode().endswith(b"</html>\n")


def _read_config(path: Path) -> tuple[dict, NetworkConfig]:
    values = parse_json(path.read_bytes())
    try:
        return values, NetworkConfig.from_dict(values)
    except UserError:
        if not isinstance(values, dict):
            raise
        kwargs = {"img_resolution": 8, "img_channels": 1} | values
        return values, NetworkConfig.from_published("EDMPrecond", kwargs)


def _check_config(result: tuple[dict, NetworkConfig]) -> None:
    config = result[1]
    assert NetworkConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with torch.device("meta"):
        EDMNetwork(config)


def _configs() -> list[bytes]:
    published = {
        "model_type": "SongUNet",
        "resample_filter": [1, 1],
        "sigma_max": 80,
        "label_dim": 0,
    }
    return [json.dumps(v).encode() for v in (TINY.to_dict(), published)]


def _pixels(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(n, 3, 4, 4), dtype=np.uint8)


def _zips() -> list[bytes]:
    """A data set as the tools write it, and one that is deflated and has a name twice."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.zip"
        write_dataset(path, _pixels(2), [0, 1])
        stored = path.read_bytes()
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the name
            for name, image in zip(["1.png", "2.png", "1.png"], _pixels(3), strict=True):
                archive.writestr(name, encode_png(image))
        return [stored, path.read_bytes()]


def _read_images(path: Path) -> tuple[ImageDataset, np.ndarray]:
    data = ImageDataset(path)
    return data, data.images()


def _check_images(result: tuple[ImageDataset, np.ndarray]) -> None:
    data, images = result
    assert images.shape == (len(data), data.channels, data.resolution, data.resolution)
    assert images.dtype == np.uint8
    assert data.note.isprintable()
    if data.labels is not None:
        assert data.labels.shape == (len(data),)
        assert 0 <= data.labels.min() <= data.labels.max() == data.label_dim - 1 < MAX_CLASSES


def _pngs() -> list[bytes]:
    palette = io.BytesIO()
    Image.fromarray(_pixels(1)[0].transpose(1, 2, 0)).quantize(3).save(palette, "PNG")
    return [encode_png(_pixels(1)[0]), encode_png(_pixels(1)[0, :1]), palette.getvalue()]


def _read_png(path: Path) -> tuple[ImageDataset, np.ndarray]:
    """Read a folder of the one PNG, whose checksums are made right so that more is read of it."""
    data, at = bytearray(path.read_bytes()), 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            break
        data[end : end + 4] = zlib.crc32(data[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    path.write_bytes(data)
    return _read_images(path.parent)


def _read_labels(path: Path) -> tuple[ImageDataset, np.ndarray]:
    for name in ("a.png", "b.png"):
        (path.parent / name).write_bytes(encode_png(_pixels(1)[0]))
    return _read_images(path.parent)


def _pictures() -> list[bytes]:
    """Images of all formats and colour models that `prepare` takes."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(256, size=(12, 16, 3), dtype=np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6
    files = []
    for picture, kind, options in (
        (image, "JPEG", {"exif": exif}),
        (image.convert("CMYK"), "JPEG", {}),
        (image.convert("RGBA"), "WEBP", {}),
        (image.quantize(4), "GIF", {}),
        (image.convert("1"), "TIFF", {}),
        (image.convert("LA"), "PNG", {}),
        (image, "BMP", {}),
    ):
        picture.save(buffer := io.BytesIO(), kind, **options)
        files.append(buffer.getvalue())
    return files


def _convert(path: Path) -> Converted:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's, of damaged metadata
            return convert(path.read_bytes(), Conversion(8))
    except LeftOut as reason:
        raise UserError(reason) from reason


def _check_converted(result: Converted) -> None:
    image = Image.open(io.BytesIO(result.png))
    assert image.size == (8, 8)
    assert image.mode == {1: "L", 3: "RGB"}[result.channels]


def _batches() -> list[bytes]:
    batch = {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]}
    return [pickle.dumps(batch, protocol) for protocol in (2, 4)]


def _idx_files() -> list[bytes]:
    idx = bytes([0, 0, 8, 3, *(0, 0, 0, 2) * 3, *range(8)])
    return [idx, gzip.compress(idx, mtime=0)]


def _read_source(path: Path) -> Source:
    """Read a folder of the file alone; idx files also get labels."""
    with tempfile.TemporaryDirectory() as folder:
        content, copy = path.read_bytes(), Path(folder) / path.name
        if "images" in path.name:
            labels = bytes([0, 0, 8, 1, 0, 0, 0, 2, 0, 1])
            (copy.parent / "train-labels-idx1-ubyte").write_bytes(labels)
            if content.startswith(b"\x1f\x8b"):
                copy = copy.with_suffix(".gz")
        copy.write_bytes(content)
        return open_source(Path(folder), None, True)


def _check_source(source: Source) -> None:
    assert source.labels is not None
    assert source.labels.shape == (source.count,)
    for index in range(min(source.count, 10)):
        image = source.read(index)
        assert isinstance(image, np.ndarray)
        assert image.dtype == np.uint8


def _references() -> list[bytes]:
    arrays = {"mu": np.zeros(3), "sigma": np.eye(3, dtype=np.float32), "images": np.array(5)}
    files = []
    for save in (np.savez, np.savez_compressed):
        save(buffer := io.BytesIO(), detector=np.array("pixels"), **arrays)
        files.append(buffer.getvalue())
    return files


def _array() -> list[bytes]:
    np.save(buffer := io.BytesIO(), np.eye(3))
    return [buffer.getvalue()]


def _read_array(path: Path) -> FeatureStats:
    """Read a reference whose sigma is the array; in an .npz a checksum would hide what it says."""
    np.savez(path.with_suffix(".npz"), mu=np.zeros(3))
    with zipfile.ZipFile(path.with_suffix(".npz"), "a") as archive:
        archive.writestr("sigma.npy", path.read_bytes())
    return _read_reference(path.with_suffix(".npz"))


def _read_reference(path: Path) -> FeatureStats:
    return read_reference(str(path), Pixels())


def _check_reference(stats: FeatureStats) -> None:
    mean, covariance = stats.moments(0)
    assert covariance.shape == (len(mean), len(mean))
    assert covariance.isfinite().all()
    assert mean.isfinite().all()
    assert stats.count is None or stats.count > 1


_CHUNKS = [b"IHDR", b"IDAT", b"IEND", b"PLTE", b"tRNS", b"acTL", b"iCCP", b"zTXt", b"iTXt", b"eXIf"]
_SIDES = [
    struct.pack(">I", n) for n in (0, 1, 5, 4096, 5000, 1 << 20, (1 << 31) - 1, (1 << 32) - 1)
]
_HEADERS = [
    b"'<f8'", b"'|O'", b"'<U99999999'", b"[('a','<f8',(9999,9999))]", b"(3, 3)", b"(99999, 99999)",
    b"(-1,)", b"()", b"True", b"((((((((", b"------", b"\x93NUMPY\x02\x00", b"nan", b"'<c16'",
]  # fmt: skip

_VALUES = [
    b"0", b"1", b"-1", b"2.5", b"1e999", b"NaN", b"null", b"true", b"[]", b"{}", b"[[1]]",
    b"9" * 19, b"9" * 30, b'""', b'"adm"', b"4096", b"[1,1,1,1,1,1,1,1,1,1,1,1]", b"64", b",",
    b":", b'"\\ud800"', b'"\\u001b[31m"', b"{", b"}", b'"num_blocks":64,', b'"resolution":4096,',
]  # fmt: skip
_SIZES = [struct.pack("<Q", n) for n in (0, 1, 2, 255, 1 << 24, 1 << 31, 1 << 62, (1 << 64) - 1)]
_OPCODES = [bytes([c]) for c in pickle._Unpickler.dispatch]  # type: ignore[attr-defined]
_GLOBALS = [
    b"cbuiltins\nset\n", b"ccollections\nOrderedDict\n", b"cnumpy\ndtype\n", b"cos\nsystem\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n", b"c_codecs\nencode\n",
    b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n",
]  # fmt: skip


@functools.cache
def _distiller() -> Distiller:
    return Distiller(_network(), Settings(batch_size=4))


@functools.cache
def _state() -> dict[str, bytes]:
    """The files of a training state without digests, by name."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(teacher="t.safetensors", batch_size=4, out=folder)
        states = States(Path(folder), _distiller(), config, 1, {"tuning": _TUNING})
        assert states.begin() is None
        assert states.finish() is None
        assert states.path
        return {path.name: path.read_bytes() for path in states.path.iterdir()}


_TUNING = {
    "candidate": {"kernels": {"adam_ema": "eager"}, "threads": 1}, "text": "", "machine": {},
    "rows": [{
        "name": "eager", "candidate": {"kernels": {}}, "wrong": "", "ms": 1.0, "low": 1.0,
        "high": 1.0, "images": 4, "gib": 1.0, "won": True,
    }],
}  # fmt: skip


def _read_header(path: Path) -> tuple[dict[str, Any], TrainConfig]:
    """Read a state's header as a command does that resumes it."""
    for name, data in _state().items():
        if name != HEADER:
            (path.parent / name).write_bytes(data)
    config = TrainConfig(resume=str(path.parent))
    try:
        cli.resume(config, set())
    finally:
        while checkpoint._held:
            os.close(checkpoint._held.pop())
    check(config)
    header = read_header(path.parent)
    job = Job(small_teacher().config, config.settings(), "cpu")
    autotune._of_state(header.get("tuning"), job, autotune.Tuning())
    return header, config


def _check_header(result: tuple[dict[str, Any], TrainConfig]) -> None:
    header, config = result
    assert 0 <= header["steps"] < 2**63
    assert isinstance(config.settings(), Settings)
    assert config.trust is False


def _shards() -> list[bytes]:
    return [_state()[min(set(_state()) - {HEADER})]]


def _header_tokens(data: bytes) -> list[int]:
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    return [0, *(8 + at for at in _json_tokens(header))]


def _read_shard(path: Path) -> dict[str, Any]:
    """Read a state, without digests, whose first shard is damaged."""
    damaged = path.read_bytes()
    path.unlink()
    header = json.loads(_state()[HEADER])
    del header["digests"]
    for name, data in _state().items():
        (path.parent / name).write_bytes(data)
    name = sorted(header["files"])[0]
    (path.parent / name).write_bytes(damaged)
    header["files"][name] = len(damaged)
    (path.parent / HEADER).write_text(json.dumps(header))
    return load_state(path.parent, _distiller())


def _read_log(path: Path) -> list[dict[str, Any]]:
    with Log(path.parent, 3) as log:
        log.write(4, {"loss": 1.0})
    return read_log(path)


def _check_log(records: list[dict[str, Any]]) -> None:
    assert records[-1] == {"images": 4, "loss": 1.0}
    assert all(type(r["images"]) is int and r["images"] <= 4 for r in records)


def _read_run(path: Path) -> Path | None:
    with mock.patch.dict(os.environ, {"TORCHELASTIC_RESTART_COUNT": "1"}):
        return find_restarted_run(str(path.parent))


def _read_lock(path: Path) -> RunLock:
    """Take the lock of a lease that says the inode of its own file: a copied one is free."""
    inode = str(json.loads(_lease()[0])["inode"]).encode()
    path.write_bytes(path.read_bytes().replace(inode, str(path.stat().st_ino).encode()))
    with RunLock(path.parent) as lock:
        return lock


@functools.cache
def _lease() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder, RunLock(Path(folder)):
        return [(Path(folder) / LOCK).read_bytes().strip()]


def _verdict() -> list[bytes]:
    return [json.dumps({"key": {"a": 1}, "rows": _TUNING["rows"]}).encode()]


def _read_verdict(path: Path) -> autotune.Tuning:
    tuning = autotune.Tuning()
    with mock.patch.object(verdicts, "place", return_value=path):
        autotune._kept({"a": 1}, tuning)
    return tuning


def _check_verdict(tuning: autotune.Tuning) -> None:
    assert all(isinstance(row.candidate, Candidate) for row in tuning.rows)
    assert all(note.isprintable() or len(note) < 1000 for note in tuning.notes)


TARGETS: dict[str, Target] = {
    "pickle": Target(
        load_network,
        _pickles,
        [*_OPCODES, *_GLOBALS, *_SIZES],
        _check_network,
        "net.pkl",
        _opcodes,
    ),
    "snapshot": Target(
        load_network,
        _snapshots,
        [*_SIZES, *_VALUES],
        _check_network,
        "net.safetensors",
        _json_tokens,
    ),
    "zip": Target(
        _read_images,
        _zips,
        [b"PK\x01\x02", b"PK\x05\x06", *_SIZES, *_SIDES],
        _check_images,
        "a.zip",
    ),
    "png": Target(_read_png, _pngs, [*_CHUNKS, *_SIDES], _check_images, "a.png"),
    "labels": Target(
        _read_labels,
        lambda: [b'{"labels": [["a.png", 1], ["b.png", 0.0]]}', b'{"labels": null}'],
        _VALUES,
        _check_images,
        "dataset.json",
    ),
    "reference": Target(
        _read_reference, _references, [b"mu.npy", *_HEADERS, *_SIZES], _check_reference, "a.npz"
    ),
    "array": Target(_read_array, _array, _HEADERS, _check_reference, "sigma.npy"),
    "config": Target(_read_config, _configs, _VALUES, _check_config, "config.json", _json_tokens),
    "state": Target(
        _read_header, lambda: [_state()[HEADER]], _VALUES, _check_header, HEADER, _json_tokens
    ),
    "shard": Target(_read_shard, _shards, [*_SIZES, *_VALUES], name="x", boundaries=_header_tokens),
    "log": Target(
        _read_log,
        lambda: [b'{"images": 1, "loss": 0.5}\n{"images": 2, "evaluation_s": null}\n'],
        [*_VALUES, b"\n", b'{"images": 3}\n'],
        _check_log,
        "log.jsonl",
    ),
    "run": Target(
        _read_run,
        lambda: [b'{"launch": "", "started_at": 1e9, "options": {"alpha": 1}}'],
        _VALUES,
        name="config.json",
    ),
    "lock": Target(_read_lock, _lease, _VALUES, name=LOCK, boundaries=_json_tokens),
    "verdict": Target(
        _read_verdict, _verdict, _VALUES, _check_verdict, "verdict.json", _json_tokens
    ),
    "report": Target(
        _page_of_run,
        lambda: [json.dumps(OPTIONS | {"changed": {"kimg": 1}, "tuning": {"rows": [{}]}}).encode()],
        [*_VALUES, b"<script>"],
        _check_page,
        "config.json",
        _json_tokens,
    ),
    "report log": Target(
        _page_of_run,
        lambda: [b"".join(json.dumps(progress(i, FID=1.0)).encode() + b"\n" for i in (0, 9, 99))],
        [*_VALUES, b"\n", b"<script>"],
        _check_page,
        "log.jsonl",
        _json_tokens,
    ),
    "json": Target(
        lambda path: parse_json(path.read_bytes(), 4, 1000),
        lambda: [b'{"labels": [["a.png", 1], ["b.png", null]], "x": [1e3, [[true]]]}'],
        _VALUES,
        lambda result: json.dumps(result) and None,
    ),
    "picture": Target(_convert, _pictures, [*_CHUNKS, *_SIDES], _check_converted),
    "batch": Target(
        _read_source,
        _batches,
        [*_OPCODES, *_GLOBALS, *_SIZES],
        _check_source,
        "data_batch_1",
        _opcodes,
    ),
    "idx": Target(
        _read_source, _idx_files, [*_SIDES, *_SIZES], _check_source, "train-images-idx3-ubyte"
    ),
    "first bytes": Target(
        lambda path: sniff(path.read_bytes()),
        lambda: [b"PK\x03\x04" + bytes(22) + b"\x10\x00\x00\x00archive/data.pkl", b"\x80\x02}."],
        [b"<html>", b"ustar", *_SIZES],
        lambda result: brief(result) and None,
    ),
}


@st.composite
def damaged(draw: st.DrawFn, target: Target, samples: Sequence[bytes]) -> bytes:
    """A valid file with a few damages, or a sequence of the format's pieces."""
    pieces = st.one_of(
        st.binary(min_size=1, max_size=8), *([st.sampled_from(target.pieces)] * bool(target.pieces))
    )
    if draw(st.integers(0, 9)) == 0:
        start = draw(st.sampled_from([b"", b"\x80\x04", samples[0][:16]]))
        return start + b"".join(draw(st.lists(pieces, max_size=60)))
    data = bytearray(draw(st.sampled_from(samples)))
    boundaries = st.sampled_from(target.boundaries(bytes(data)))
    position = st.one_of(boundaries, st.integers(0, len(data)))
    # From the end, so that the boundaries before a damage stay where they are.
    for at in sorted(draw(st.lists(position, min_size=1, max_size=4)), reverse=True):
        there, length = draw(position), draw(st.sampled_from([0, 1, 1, 2, 8, 40]))
        match draw(st.sampled_from(["replace", "replace", "insert", "copy", "repeat", "cut"])):
            case "replace":
                new = draw(pieces)
                data[at : at + len(new)] = new
            case "insert":
                data[at : at + length] = draw(pieces)
            case "copy":
                data[at:at] = data[there : max(there + length, draw(boundaries))]
            case "repeat":
                data[at:at] = draw(pieces) * draw(st.sampled_from([2, 100, 20_000]))
            case "cut":
                del data[at : draw(st.sampled_from([len(data), at + length, max(at, there)]))]
    return bytes(data)


def attempt(target: Target, data: bytes, folder: Path) -> bool:
    """Read the bytes as a file and assert what every reader promises; True if they are valid."""
    path = folder / target.name
    path.write_bytes(data)
    began, before = time.process_time(), _peak()
    try:
        result = target.read(path)
    except UserError as error:
        line, valid = str(error), False
        assert line.isprintable(), line
        assert 0 < len(line) <= LINE
    else:
        target.check(result)
        valid = True
    seconds, grown = time.process_time() - began, _peak() - before
    assert seconds < SECONDS, f"{seconds:.1f} s"
    assert grown < MEMORY, f"{grown >> 20} MiB"
    return valid


def _peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def hunt(name: str, folder: Path, **options: Any) -> dict[str, int]:
    """Try damaged files of a target; options are hypothesis's settings.

    Returns:
        How many were tried, and how many of them were valid.
    """
    target = TARGETS[name]
    samples = target.samples()
    counts = {"tried": 0, "valid": 0}
    for sample in samples:
        assert attempt(target, sample, folder), "a sample is not valid"

    @settings(
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        **options,
    )
    @given(damaged(target, samples))
    def attempt_one(data: bytes) -> None:
        counts["tried"] += 1
        counts["valid"] += attempt(target, data, folder)

    attempt_one()
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", nargs="*", help=f"any of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--seconds", type=float, default=300, help="of each target (default 300)")
    arguments = parser.parse_args()
    if logging.lastResort:  # as in a command
        logging.lastResort.addFilter(cli.without_traceback)
    database = DirectoryBasedExampleDatabase(".hypothesis")
    for name in arguments.target or TARGETS:
        until, tried, valid = time.monotonic() + arguments.seconds, 0, 0
        with tempfile.TemporaryDirectory() as folder:
            while time.monotonic() < until:
                counts = hunt(name, Path(folder), max_examples=200, database=database)
                tried, valid = tried + counts["tried"], valid + counts["valid"]
                gc.collect()
        print(f"{name}: {tried:,} files tried, {valid:,} valid, the others refused", flush=True)


if __name__ == "__main__":
    main()
