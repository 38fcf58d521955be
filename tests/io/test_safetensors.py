"""Snapshots in safetensors files: read, written, refused."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from sid_fast.errors import UserError
from sid_fast.io.safetensors import read_snapshot, write_snapshot

CONFIG = {"kind": "adm", "channel_mult": [1, 2], "dropout": 0.1, "name": "σ", "filter": None}


def test_round_trip(tmp_path):
    state = {
        "a.weight": torch.randn(3, 4).t(),  # not contiguous
        "b": torch.randn(5, dtype=torch.float16),
        "c": torch.nn.Parameter(torch.tensor(2.5)),
    }
    write_snapshot(tmp_path / "net.safetensors", state, CONFIG)
    found, config = read_snapshot(tmp_path / "net.safetensors")
    assert config == CONFIG
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_the_same_network_gives_the_same_bytes(tmp_path):
    state = {f"layer{i}": torch.full([4], float(i)) for i in range(20)}
    for name in "ab":
        write_snapshot(tmp_path / name, state, CONFIG)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "net.safetensors"
    write_snapshot(path, {"a": torch.ones(2)}, CONFIG)
    shared = torch.ones(4)
    with pytest.raises(RuntimeError):  # safetensors does not store shared memory
        write_snapshot(path, {"a": shared, "b": shared[:2]}, CONFIG)
    assert torch.equal(read_snapshot(path)[0]["a"], torch.ones(2))
    assert os.listdir(tmp_path) == ["net.safetensors"]


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated(tmp_path, keep):
    path = tmp_path / "net.safetensors"
    write_snapshot(path, {"a": torch.ones(100)}, CONFIG)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"net\.safetensors is cut short"):
        read_snapshot(path)


def test_foreign_files(tmp_path):
    path = tmp_path / "net.safetensors"
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(UserError, match=r"net\.safetensors .* not written by sid_fast"):
        read_snapshot(path)
    save_file({"a": torch.ones(2)}, path, {"sid_fast": "{"})
    with pytest.raises(UserError, match="it is not JSON"):
        read_snapshot(path)
    save_file({"a": torch.ones(2)}, path, {"sid_fast": json.dumps({"version": 2, "config": {}})})
    with pytest.raises(UserError, match="snapshot version 2, this program reads 1"):
        read_snapshot(path)
    path.write_bytes(b"\x80\x04}.")
    with pytest.raises(UserError, match="cut short"):
        read_snapshot(path)


def test_missing(tmp_path):
    with pytest.raises(UserError, match=r"none\.safetensors does not exist"):
        read_snapshot(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match=str(tmp_path)):
        read_snapshot(tmp_path)


def test_headers_are_bounded(tmp_path):
    path = tmp_path / "net.safetensors"
    many = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_001)}
    one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    headers = {
        "length of its header is 90000000, not": None,
        "at most 100,000 tensors": many,
        "the shape of 'a'": {"a": one | {"shape": [2**63]}},
        "the shape of 'b'": {"b": one | {"shape": [1] * 9}},
        "the offsets of 'a'": {"a": one | {"data_offsets": [4]}},
        "an offset is -1, not": {"a": one | {"data_offsets": [-1, 4]}},
        "'xxxx": {"x" * 10**6: one},
        "which is no tensor": {"a": [1]},
        "nest deeper": {"a": one | {"shape": [[[[1]]]]}},
        "texts by name": {"__metadata__": {"sid_fast": {}}},
        "cut short": {"a": one | {"data_offsets": [0, 8]}},
    }
    for words, header in headers.items():
        data = json.dumps(header).encode()
        length = len(data) if header else 90_000_000
        path.write_bytes(length.to_bytes(8, "little") + data + bytes(4))
        if not header:
            os.truncate(path, 100_000_000)
        with pytest.raises(UserError, match=words) as caught:
            read_snapshot(path)
        assert str(path) in str(caught.value)
        assert len(str(caught.value)) < 400
