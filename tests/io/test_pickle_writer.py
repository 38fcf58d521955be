"""Exported pickles: what they name, and that our own reader gets the same network back."""

import pickletools

import pytest
import torch

from sid_fast.models import NetworkConfig
from sid_fast.models.exporters import save_pickle
from sid_fast.models.registry import load_network
from tests.helpers.golden import NETWORKS
from tests.helpers.networks import SMALL, small_teacher

NAMED = {
    "torch_utils.persistence _reconstruct_persistent_obj",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
    "torch.storage _load_from_bytes",
    "collections OrderedDict",
}


def named(data: bytes) -> set[str]:
    """The globals of a pickle: the two strings before each STACK_GLOBAL."""
    found, memo, texts = set(), {}, []
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "MEMOIZE":
            memo[len(memo)] = texts[-1] if texts else None
        elif opcode.name in ("BINGET", "LONG_BINGET"):
            texts.append(memo[argument])
        elif opcode.name == "STACK_GLOBAL":
            found.add(" ".join(texts[-2:]))
            texts.append(None)
        else:
            assert opcode.name not in ("GLOBAL", "INST")
            texts.append(argument)
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_a_published_network_comes_back(golden, tmp_path, name):
    net = load_network(golden / f"{name}.pkl")
    save_pickle(tmp_path / "net.pkl", net)
    back = load_network(tmp_path / "net.pkl")
    assert back.config == net.config
    assert all(torch.equal(back.state_dict()[k], v) for k, v in net.state_dict().items())
    size = sum(value.nbytes for value in net.state_dict().values())
    assert size < (tmp_path / "net.pkl").stat().st_size < size + 80_000


def test_a_generator_stays_one(tmp_path):
    net = small_teacher()
    net.config = NetworkConfig.from_dict(SMALL.to_dict() | {"init_sigma": 3.5})
    save_pickle(tmp_path / "net.pkl", net)
    assert load_network(tmp_path / "net.pkl").config == net.config


def test_it_names_what_upstream_s_pickles_name(tmp_path):
    save_pickle(tmp_path / "net.pkl", small_teacher())
    data = (tmp_path / "net.pkl").read_bytes()
    assert named(data) == NAMED
    assert data.count(b"class EDMPrecond") == 1  # one copy of the source for all modules
