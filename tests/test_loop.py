"""The loop: what a run leaves behind, and how it ends when nothing is finite any more."""

import json

import torch
from test_distiller import small_teacher

from sid_fast.files.network import load_network, save_network


def test_a_run_that_keeps_failing_stops_with_its_last_good_state(tmp_path, run_command):
    teacher = small_teacher()
    teacher.model.map_layer1.bias.data[0] = torch.nan
    save_network(tmp_path / "teacher.safetensors", teacher)
    out = tmp_path / "run"
    status, error = run_command(
        "train", "--teacher", tmp_path / "teacher.safetensors", "--out", out,
        "--batch-size", 4, "--kimg", 1, "--log-every", 10,
    )  # fmt: skip
    assert status == 1
    assert error.strip().count("\n") == 0
    assert "not one finite sample" in error and "state-000000020" in error
    assert (out / "state-000000020").exists()


def test_a_run_leaves_pictures_figures_and_a_network_that_knows_itself(tmp_path, run_command):
    save_network(tmp_path / "teacher.safetensors", small_teacher())
    out = tmp_path / "run"
    status, _ = run_command(
        "train", "--teacher", tmp_path / "teacher.safetensors", "--out", out, "--data", "digits",
        "--batch-size", 4, "--kimg", 0.012, "--snapshot-every", 0.008, "--log-every", 1,
        "--distance-images", 40, "--teacher-steps", 2,
    )  # fmt: skip
    assert status == 0
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    figures = [r for r in records if "pixel-space Fréchet distance" in r]
    assert [r["images"] for r in figures] == [0, 8, 12]
    assert ["teacher" in r for r in figures] == [True, False, False]
    steps = [r for r in records if "fake/loss" in r]
    assert [r["images"] for r in steps] == [4, 8, 12]
    assert steps[0].keys() >= {"generator/loss", "generator/distance", "img_per_s", "it_per_s"}
    for kind in ("samples-*.png", "snapshot-*.safetensors"):
        assert [int(p.stem.split("-")[1]) for p in sorted(out.glob(kind))] == [0, 8, 12]
    assert (out / "distance.png").stat().st_size > 10_000
    assert any((out / "tensorboard").iterdir())
    config = json.loads((out / "config.json").read_text())
    assert config["batch_size"] == 4 and config["alpha"] == 1.2
    # The newest snapshot of a run folder is found, and it says how to use it.
    net = load_network(out)
    assert net.config.init_sigma == 2.5 and net.config.label_dim == 10
