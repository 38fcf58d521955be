"""The door for untrusted bytes: sizes, kinds, JSON, shapes and what is shown of a file."""

import io
import os
import pickle

import pytest
import torch

from sid_fast.errors import UserError
from sid_fast.io import untrusted
from sid_fast.io.untrusted import (
    Refused,
    brief,
    checked_shape,
    naming,
    parse_json,
    read_json,
    read_limited,
    read_values,
    sniff,
    sniff_file,
)


@pytest.mark.parametrize(
    ("first", "kind"),
    [
        (b"", "empty"),
        (pickle.dumps({"ema": 1}, 2), "pickle"),
        (pickle.dumps({"ema": 1}, 5), "pickle"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02", "torch"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{}", "safetensors"),
        (b"\n\n<!DOCTYPE html>", "html"),
        (b"\xef\xbb\xbf<html>", "html"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "xml"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d5d", "lfs"),
        (b"\x1f\x8b\x08", "gzip"),
        (b'{"error": 404}', "json"),
        (b"\x89PNG\r\n\x1a\n", "png"),
        (b"PK\x03\x04" + bytes(22) + b"\x06\x00\x00\x00mu.npy", "npz"),
        (b"PK\x03\x04" + bytes(22) + b"\x05\x00\x00\x00a.png", "zip"),
        (b"hello", "unknown"),
    ],
)
def test_first_bytes_decide_what_a_file_is(first, kind):
    assert sniff(first) == kind


@pytest.mark.parametrize("old", [False, True])
def test_what_torch_writes_is_named(tmp_path, old):
    torch.save({"a": torch.ones(2)}, tmp_path / "a", _use_new_zipfile_serialization=not old)
    assert sniff_file(tmp_path / "a", 10**6) == "torch"
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "b"))
    assert sniff_file(tmp_path / "b", 10**6) == "torch"


def test_sizes_are_known_before_anything_is_read(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert read_limited(tmp_path / "a", 3) == b"abc"
    with pytest.raises(UserError, match=r"a has 3 bytes, more than the 2 "):
        read_limited(tmp_path / "a", 2)
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="more than"):
        read_limited(tmp_path / "sparse", 1 << 20)


def test_devices_pipes_and_links_to_them_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    (tmp_path / "link.png").symlink_to("/dev/zero")
    for name in ("pipe", "link.png"):
        with pytest.raises(UserError, match="is a device or a pipe"):
            read_limited(tmp_path / name, 100)
    with pytest.raises(UserError, match="is a folder"):
        read_limited(tmp_path, 100)


def test_permission_is_told_from_absence(tmp_path, monkeypatch):
    (tmp_path / "a").touch()
    with pytest.raises(UserError, match="none does not exist"):
        read_limited(tmp_path / "none", 1)
    with pytest.raises(UserError, match="none does not exist"):
        read_limited(tmp_path / "a" / "none", 1)

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(untrusted, "open", refuse, raising=False)  # root may read everything
    with pytest.raises(UserError, match=r"a cannot be read \(permission denied\)"):
        read_limited(tmp_path / "a", 1)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"[" * 900 + b"]" * 900, "nest deeper"),
        (b"[[[[1]]]]", "nest deeper than 3"),
        (b'{"a": {"a": {"a": {}}}}', "nest deeper than 3"),
        (b"[" + b"1," * 2000 + b"1]", "more than 1,000 values"),
        (b"1" * 5000, "integer of 5000 characters"),
        (b"\xff", "not UTF-8"),
        (b"[1,", "not JSON: .* in line 1"),
        (b"", "not JSON"),
    ],
)
def test_json_has_bounds(data, match):
    with pytest.raises(Refused, match=match):
        parse_json(data, 3, 1000)


def test_json_of_100_000_levels_does_not_end_the_process():
    with pytest.raises(Refused, match="nest deeper than 8"):
        parse_json(b"[" * 100_000 + b"]" * 100_000)


def test_json_within_its_bounds():
    data = b'\xef\xbb\xbf{"a": [1, -2.5, null, true, "x"], "b": [[]], "n": -9223372036854775808}'
    value = {"a": [1, -2.5, None, True, "x"], "b": [[]], "n": -(2**63)}
    assert parse_json(data, 3, 1000) == value
    assert parse_json(b"7", 0) == 7


def test_what_a_file_made_is_shown_in_few_characters():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    cycle = []
    cycle.append(cycle)
    shown = [brief(v) for v in (deep, cycle, 10**5000, "x" * 10**6, [1, "a"], [deep], None, 2.5)]
    assert shown == [
        "a list", "a list", "an integer of 16610 bits", f"'{'x' * 60}'…", "[1, 'a']", "a list",
        "None", "2.5",
    ]  # fmt: skip


def test_shapes_are_at_most_eight_bounded_sizes():
    assert checked_shape([2, 0, 3], 100, "s") == (2, 0, 3)
    for bad in ([1] * 9, [10**100], [2**62, 2**62, 2**62], [-1], [True], [1.0], "ab", [[1]], None):
        with pytest.raises(Refused, match=r"^s "):
            checked_shape(bad, 2**60, "s")


def test_any_exception_while_reading_names_the_file():
    for error in (ValueError("\x1b[31m" * 10**6), KeyError("a"), RecursionError()):
        expected = r"^net\.pkl is damaged or not a network \("
        with pytest.raises(UserError, match=expected) as caught, naming("net.pkl", "a network"):
            raise error
        assert "31m" not in str(caught.value)
        assert "delete it" in str(caught.value)


class Counted(io.BytesIO):
    """A file that says how much of it was read."""

    taken = 0

    def read(self, size):
        data = super().read(size)
        self.taken += len(data)
        return data


def test_values_are_counted_while_a_file_is_read():
    bomb = Counted(b"[" + b"0," * 10_000_000)
    with pytest.raises(Refused, match="holds more than 1,000 values"):
        read_values(bomb, 10**9, 1000)
    assert bomb.taken <= 1 << 20
    blank = Counted(bytes(10_000_000))
    with pytest.raises(Refused, match="more than the 5,000,000 bytes"):
        read_values(blank, 5_000_000, 1000)
    assert blank.taken == 5_000_001
    text = b"[1, 2]" + b" " * 3_000_000
    assert read_values(io.BytesIO(text), len(text), 3) == text


def test_a_json_file_has_bounds(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"a": [1]}')
    assert read_json(tmp_path / "a.json", 10) == {"a": [1]}
    for limits, match in (((9,), "has 10 bytes"), ((10, 1), "nest deeper"), ((10, 8, 1), "holds")):
        with pytest.raises(UserError, match=match):
            read_json(tmp_path / "a.json", *limits)
