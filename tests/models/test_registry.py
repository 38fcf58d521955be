"""Loading networks: files that are something else, weights and settings that cannot be used."""

import gzip
import io
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from sid_fast.errors import UserError
from sid_fast.models import NetworkConfig
from sid_fast.models.registry import load_network, load_teacher, save_network
from tests.helpers.networks import SMALL, small_teacher
from tests.helpers.pickled import network_pickle
from tests.helpers.processes import python


def refusal(path) -> str:
    with pytest.raises(UserError) as caught:
        load_network(path)
    message = str(caught.value)
    assert message.count(str(path)) == 1
    return message


def saved(**options) -> bytes:
    buffer = io.BytesIO()
    torch.save({"ema": torch.ones(2)}, buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (saved(), "is a file of torch.save"),
        (saved(_use_new_zipfile_serialization=False), "is a file of torch.save"),
        (b"<!DOCTYPE html><title>Sign in</title>", "is an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer, .*git lfs pull"),
        (gzip.compress(b"\x80\x04}.", mtime=0), "is compressed with gzip .*gunzip"),
        (b"PK\x03\x04" + bytes(22) + b"\x05\x00\x00\x00a.png", "is a zip archive"),
        (b"", "is empty"),
        (b"hello", "is of an unknown kind"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path, data, what):
    path = tmp_path / "net.pkl"
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{what}.*: give a snapshot"):
        load_network(path)
    assert "download" not in refusal(path)


@pytest.mark.parametrize("name", ["X.SAFETENSORS", "net", "1234-download", "net.pkl"])
def test_names_do_not_decide(tmp_path, name):
    net = small_teacher()
    save_network(tmp_path / "net.safetensors", net)
    shutil.move(tmp_path / "net.safetensors", tmp_path / name)
    weight = net.model.map_layer0.weight
    assert torch.equal(load_network(tmp_path / name).model.map_layer0.weight, weight)
    (tmp_path / name).write_bytes(network_pickle(net))
    assert torch.equal(load_network(tmp_path / name).model.map_layer0.weight, weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["pickle", "snapshot"])
def test_weights_that_are_not_finite(tmp_path, kind, value):
    net, path = small_teacher(), tmp_path / "net"
    net.model.map_layer0.weight.data[3, 2] = value
    if kind == "pickle":
        path.write_bytes(network_pickle(net))
    else:
        save_network(path, net)
    assert "model.map_layer0.weight has values that are NaN or infinite" in refusal(path)


def test_weights_beyond_float32(tmp_path):
    """Finite in float64, infinite once they are converted."""
    net = small_teacher()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    state["model.map_layer0.weight"] = torch.full_like(
        state["model.map_layer0.weight"], 1e300, dtype=torch.float64
    )
    metadata = {"sid_fast": json.dumps({"version": 1, "config": net.config.to_dict()})}
    save_file(state, tmp_path / "net", metadata)
    assert "model.map_layer0.weight has values" in refusal(tmp_path / "net")


def test_arguments_of_training_alone_are_accepted(tmp_path):
    (tmp_path / "net.pkl").write_bytes(
        network_pickle(small_teacher(), label_dropout=0.1, sigma_min=0.002, sigma_max=80.0)
    )
    assert load_network(tmp_path / "net.pkl").config.label_dim == SMALL.label_dim
    (tmp_path / "net.pkl").write_bytes(network_pickle(small_teacher(), skip_scale=2.0))
    assert "skip_scale=2.0 is not supported" in refusal(tmp_path / "net.pkl")


def test_a_generator_is_no_teacher(tmp_path):
    net = small_teacher()
    save_network(tmp_path / "teacher", net)
    assert load_teacher(tmp_path / "teacher").config == SMALL
    net.config = NetworkConfig.from_dict(SMALL.to_dict() | {"init_sigma": 2.5})
    save_network(tmp_path / "generator", net)
    assert load_network(tmp_path / "generator").config.init_sigma == 2.5
    with pytest.raises(UserError, match=r"generator is a one-step generator \(init_sigma=2\.5\)"):
        load_teacher(tmp_path / "generator")


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_a_teacher_has_images_that_png_files_hold(golden, channels):
    path = golden.parent / "cases" / "07-channels-not-1-or-3" / f"tiny-ch{channels}.pkl"
    assert load_network(path).config.channels == channels
    with pytest.raises(UserError, match=f"images of {channels} channels, but PNG files have 1 or"):
        load_teacher(path)


BAD = {
    "num_blocks": [0, 64, 10**30, "1", True, 2.0, None, [1]],
    "channel_mult": [[], [1] * 13, [1] * 10**6, [10**30], "12", [[1]], [True]],
    "attention_resolutions": [[1] * 65, [-1], [None]],
    "resolution": [0, 3, 5000, 10**30],
    "sigma_data": [0, float("nan"), float("inf"), "0.5", True],
    "init_sigma": [0, -1, float("nan"), 1e9, 10**400, "2.5", True],
    "dropout": [1, -0.1, float("nan"), [0.1]],
    "architecture": ["x" * 10**6, ["adm"], 1, None, "\x1b[31m"],
    "absent_classes": [[10], [1, 0], [0, 0], [-1], ["a"], [[0]], [True], [*range(10)], 3, None],
    "no such field": [1],
}


@pytest.mark.parametrize("field", BAD)
def test_configurations_are_bounded_before_a_network_is_built(field):
    levels = {"channel_mult": [1, 1, 1, 1, 1], "resolution": 16}
    for value in BAD[field]:
        values = SMALL.to_dict() | levels | {field: value}
        with pytest.raises(UserError, match=r"^network: ") as caught:
            NetworkConfig.from_dict(values)
        assert field in str(caught.value)
        assert len(str(caught.value)) < 300


def test_few_weights_do_not_make_a_large_network(tmp_path, monkeypatch):
    def build(config):
        raise AssertionError("built")

    monkeypatch.setattr("sid_fast.models.registry.build_network", build)
    config = SMALL.to_dict() | {"num_blocks": 64, "resolution": 16, "channel_mult": [1] * 4}
    metadata = {"sid_fast": json.dumps({"version": 1, "config": config})}
    save_file({"a": torch.ones(1)}, tmp_path / "net", metadata)
    assert "fewer than the network's blocks" in refusal(tmp_path / "net")


def test_an_empty_name(tmp_path):
    with pytest.raises(UserError, match=r"name is empty.*shell variable"):
        load_network("")
    with pytest.raises(UserError, match=r"does not exist.*digits, digits-edm2, fashion, cifar"):
        load_network(tmp_path / "none")
    with pytest.raises(UserError, match="File name too long"):
        load_network("x" * 300)
    with pytest.raises(UserError, match="null byte"):
        load_network("a\0b")


def test_a_network_knows_the_classes_that_it_was_trained_on(tmp_path):
    net = small_teacher()
    assert "absent_classes" not in net.config.to_dict(), "older versions refuse the file"
    net.config = net.config.with_classes([])
    assert [*net.config.classes] == [*range(10)]
    net.config = net.config.with_classes([2, 5, 9, 70])
    save_network(tmp_path / "net.safetensors", net)
    config = load_network(tmp_path / "net.safetensors").config
    assert config == net.config
    assert config.classes == [2, 5, 9]


BUILD = """
import sys, torch
from sid_fast.models.registry import NetworkConfig, build_network
for architecture in ("ddpmpp", "ncsnpp", "adm"):
    config = NetworkConfig(architecture, 8, model_channels=64, channel_mult=(1, 2), num_blocks=1)
    with torch.device("meta"):
        build_network(config)
print("torch._dynamo" in sys.modules)
"""


@pytest.mark.slow
def test_building_a_network_to_load_imports_no_compiler():
    """Arithmetic on meta tensors does, and a command would start seconds later."""
    assert python("-c", BUILD).stdout == "False\n"
