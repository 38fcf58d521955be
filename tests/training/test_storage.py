"""Digests of a training state's shards."""

import hashlib
import threading

import pytest

from sid_fast.config.types import Settings
from sid_fast.distiller import Distiller
from sid_fast.training import storage
from sid_fast.training.checkpoint import States, read_header
from tests.helpers.networks import small_teacher
from tests.helpers.processes import TORCHRUN, python


def test_shards_are_hashed_in_the_thread_that_writes_them(tmp_path, monkeypatch):
    """Training goes on meanwhile."""
    threads, real = set(), storage.file_sha256

    def file_sha256(path):
        threads.add(threading.current_thread())
        return real(path)

    monkeypatch.setattr(storage, "file_sha256", file_sha256)
    settings = Settings(batch_size=4)
    states = States(tmp_path, Distiller(small_teacher(), settings), settings, 1)
    assert states.begin() is None
    assert states.finish() is None
    assert len(threads) == 1
    assert threading.main_thread() not in threads
    digests = read_header(states.path)["digests"]
    shards = {p.name: p.read_bytes() for p in states.path.glob("*.safetensors")}
    assert digests == {name: hashlib.sha256(data).hexdigest() for name, data in shards.items()}


PROGRAM = """
import os, sys
from pathlib import Path
import torch
from sid_fast.config.types import Settings
from sid_fast.distiller import Distiller
from sid_fast.performance import fsdp, process_group
from sid_fast.training import storage
from sid_fast.training.checkpoint import States, load_state
from tests.helpers.networks import small_teacher

real, mine = storage.file_sha256, []
storage.file_sha256 = lambda path: (mine.append(path.name), real(path))[1]
device = torch.device("cpu")
with process_group.joined(device, "ddp", 1):
    settings, plan = Settings(batch_size=4), fsdp.plan("ddp", device, lambda *a: 0, None)
    trainer = Distiller(small_teacher(), settings, sharding=plan)
    states = States(Path(sys.argv[1]), trainer, settings, 1)
    states.begin(), states.finish()
    process_group.barrier()
    load_state(states.path, trainer)
    everyone = process_group.gather_objects(sorted(mine))
    if process_group.rank() == 0:
        print(everyone)
"""


@pytest.mark.slow
def test_each_rank_hashes_its_own_shards(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    done = python(*TORCHRUN, 2, tmp_path / "program.py", tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = eval(done.stdout.splitlines()[-1])
    (state,) = tmp_path.glob("state-*")
    assert first
    assert second
    assert sorted(first + second) == sorted(p.name for p in state.glob("*.safetensors"))
    assert read_header(state)["digests"].keys() == {*first, *second}
