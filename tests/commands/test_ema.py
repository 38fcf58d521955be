"""The ema command: an EMA of any width from the snapshots of a run."""

import numpy as np
import pytest
import torch

from sid_fast.io.safetensors import read_snapshot
from sid_fast.models import EDMNetwork, NetworkConfig
from sid_fast.models.registry import load_network, save_network
from sid_fast.training import power_ema

TINY = NetworkConfig(
    "ncsnpp", resolution=4, channels=1, model_channels=8, channel_mult=(1,), num_blocks=1,
    attention_resolutions=(), label_dim=0,
)  # fmt: skip
STEPS, BATCH = 256, 4
STORED, WANTED = (0.05, 0.1), 0.135


def walk(folder, count: int) -> dict[str, torch.Tensor]:
    """Write `count` snapshots a width of a random walk; return the EMA tracked at WANTED."""
    folder.mkdir()
    net = EDMNetwork(TINY)
    rng = np.random.default_rng(0)
    values = rng.normal(size=sum(p.numel() for p in net.parameters()))
    emas = {std: values.copy() for std in (*STORED, WANTED)}

    def load(ema):
        torch.nn.utils.vector_to_parameters(torch.tensor(ema).float(), net.parameters())

    for step in range(STEPS):
        if step == 0:  # as a run does
            for std in STORED:
                load(emas[std])
                record = {"std": std, "images": 0, "run": "a"}
                save_network(folder / f"snapshot-{0:010d}-{std:.3f}.safetensors", net, record)
        values += rng.normal(size=len(values)) / STEPS**0.5
        for std, ema in emas.items():
            beta = power_ema.decay(step * BATCH, BATCH, power_ema.exponent(std))
            ema += (1 - beta) * (values - ema)
        if (step + 1) % (STEPS // count) == 0:
            images = (step + 1) * BATCH
            for std in STORED:
                load(emas[std])
                record = {"std": std, "images": images, "run": "a"}
                path = folder / f"snapshot-{images:010d}-{std:.3f}.safetensors"
                save_network(path, net, record)
    load(emas[WANTED])
    state = net.state_dict()
    return {name: state[name].clone() for name, _ in net.named_parameters()}


def flat(state, names) -> torch.Tensor:
    return torch.cat([state[name].flatten() for name in names])


def test_an_untracked_ema_is_reconstructed_and_more_snapshots_come_closer(tmp_path, run_command):
    errors = []
    for count in (4, 8):
        run, out = tmp_path / f"run{count}", tmp_path / f"{count}.safetensors"
        tracked = walk(run, count)
        assert run_command("ema", run, "--std", WANTED, "--out", out) == (0, "")
        found, expected = (flat(s, tracked) for s in (load_network(out).state_dict(), tracked))
        # In units of what tells the EMA from the nearest stored one.
        last = sorted(run.glob("*-0.100.safetensors"))[-1]
        apart = (flat(read_snapshot(last)[0], tracked) - expected).norm()
        errors.append(float((found - expected).norm() / apart))
    assert errors[0] < 0.15
    assert errors[1] < 0.25 * errors[0]
    assert not list(tmp_path.glob("*.tmp"))


@pytest.fixture
def folder(tmp_path):
    walk(tmp_path / "run", 2)
    return tmp_path / "run"


def test_a_stored_width_is_returned_and_constants_stay_the_same(tmp_path, folder, run_command):
    out = tmp_path / "out.safetensors"
    assert run_command("ema", folder, "--std", 0.1, "--out", out) == (0, "")
    (state, config), (expected, same) = map(
        read_snapshot, (out, sorted(folder.glob("*-0.100.safetensors"))[-1])
    )
    assert config == same
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-6)
    assert run_command("ema", folder, "--std", 0.2, "--out", out) == (0, "")
    state, _ = read_snapshot(out)
    buffers = {name for name, _ in EDMNetwork(TINY).named_buffers()}
    assert all(torch.equal(state[name], expected[name]) for name in buffers)


def refused(run_command, tmp_path, *arguments) -> str:
    status, error = run_command("ema", *arguments)
    assert (status, error.count("\n")) == (2, 1), error
    assert not (tmp_path / "out.safetensors").exists()
    return error


def test_bad_options_are_refused(tmp_path, folder, run_command):
    out = tmp_path / "out.safetensors"
    for arguments, words in (
        (["--std", 0.1, "--out", out], "no run is given"),
        ([folder, folder, "--std", 0.1, "--out", out], "2 run folders"),
        ([folder, "--out", out], "std is missing"),
        ([folder, "--std", 0.3, "--out", out], "std=0.3 is out of range: choose from 0.005 to"),
        ([folder, "--std", "nan", "--out", out], "std=nan is out of range"),
        ([folder, "--std", 0.1], "out is missing: give --out NAME.safetensors"),
        ([folder, "--std", 0.1, "--out", tmp_path / "out.pkl"], "out.pkl is not a snapshot"),
        ([tmp_path / "none", "--std", 0.1, "--out", out], "none is not a run folder"),
    ):
        assert words in refused(run_command, tmp_path, *arguments)
    own = next(p for p in folder.glob("*-0.100.safetensors") if int(p.stem.split("-")[1]))
    before = own.read_bytes()
    status, error = run_command("ema", folder, "--std", 0.1, "--out", own)
    assert (status, "is a snapshot of the run" in error) == (2, True)
    assert own.read_bytes() == before


def test_bad_snapshots_are_refused(tmp_path, folder, run_command):
    arguments = folder, "--std", 0.12, "--out", tmp_path / "out.safetensors"
    net, extra = EDMNetwork(TINY), folder / "snapshot-9999999999-0.100.safetensors"
    good = {"std": 0.1, "images": 9_999_999_999, "run": "a"}
    for record, words in (
        (good | {"run": "b"}, "are of different runs"),
        (good | {"std": 0.9}, "std=0.9 is out of range"),
        (good | {"std": "0.1"}, "its average is"),
        (good | {"images": -1}, "its images"),
        ({"std": 0.1}, "its average is"),
    ):
        save_network(extra, net, record)
        error = refused(run_command, tmp_path, *arguments)
        assert words in error
        assert extra.name in error
    net.model.map_layer0.bias.data[0] = float("nan")
    save_network(extra, net, good)
    assert "map_layer0.bias has values that are NaN" in refused(run_command, tmp_path, *arguments)
    wide = EDMNetwork(NetworkConfig(**vars(TINY) | {"model_channels": 16}))
    save_network(extra, wide, good)
    assert "are of different networks" in refused(run_command, tmp_path, *arguments)
    wide.config = TINY
    save_network(extra, wide, good)
    assert "not (" in refused(run_command, tmp_path, *arguments)
    extra.write_bytes(extra.read_bytes()[:100])
    assert "cut short" in refused(run_command, tmp_path, *arguments)


def test_a_run_with_another_ema_is_refused(tmp_path, run_command):
    (tmp_path / "run").mkdir()
    arguments = tmp_path / "run", "--std", 0.1, "--out", tmp_path / "out.safetensors"
    assert "no snapshots of power-function EMAs" in refused(run_command, tmp_path, *arguments)
    save_network(tmp_path / "run" / "snapshot-0000000004.safetensors", EDMNetwork(TINY))
    assert "--ema-std" in refused(run_command, tmp_path, *arguments)
