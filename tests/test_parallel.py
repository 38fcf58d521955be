"""Several processes do what one does."""

import pytest
from processes import TORCHRUN, python
from test_distiller import TRAJECTORIES, small_teacher

from sid_fast.files.network import save_network


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_two_processes_with_half_the_batch_each_meet_the_golden_trajectory(golden, name):
    script = __file__.replace("test_parallel", "parallel_trajectory")
    done = python(*TORCHRUN, 2, script, golden, name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("of 2") == 6


def test_a_run_on_two_processes_leaves_what_one_leaves(tmp_path):
    save_network(tmp_path / "teacher.safetensors", small_teacher())
    command = [
        "-m", "sid_fast.train", "--teacher", tmp_path / "teacher.safetensors", "--batch-size", 4,
        "--kimg", 0.02, "--state-every", 0.008, "--out", tmp_path / "run", "--log-every", 1,
    ]  # fmt: skip
    done = python(*TORCHRUN, 2, *command)
    assert done.returncode == 0, done.stderr
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names >= {"state-000000005.safetensors", "snapshot-0000000020.safetensors", "log.jsonl"}
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 5
    assert done.stdout.count("kimg  100 %") == 1, "more than one process speaks"
