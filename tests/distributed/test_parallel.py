"""Several processes produce the results of one, under every sharding plan."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from sid_fast.config.types import Settings, smaller_micro_batch
from sid_fast.distiller import Distiller
from sid_fast.errors import OutOfMemory, UserError
from sid_fast.methods.sid import SiD
from sid_fast.models.registry import save_network
from sid_fast.performance import ddp, failure, fsdp, process_group
from tests.helpers.networks import small_teacher
from tests.helpers.processes import ENV, TORCHRUN, python

# All that so many processes do: starting them takes longer than doing it. Four write a state in
# the middle of a trajectory; two and one go on from it to the end of the published one.
TRAJECTORIES = {
    4: ["ddp", "hsdp", "fsdp:save"],
    2: ["ddp", "hsdp", "fsdp:resume", "tight"],
    1: ["fsdp", "hsdp", "ddp:resume"],
}
SMALL = {
    4: ["graphs:hsdp:1"],
    2: ["graphs:ddp:5", "graphs:fsdp:5", "graphs:tight:1", "failed graphs",
        "graphs:ddp:1:sida", "graphs:ddp:5:edm2", "graphs:fsdp:5:sida", "graphs:tight:1:sida",
        *(f"{case}:{m}" for case in ("same draws", "faults of SiDA")
          for m in ("ddp", "fsdp", "tight")),
        *(f"faults:{m}" for m in ("ddp", "fsdp", "hsdp")), "cut:ddp", "cut:fsdp", "cut:tight"],
    1: ["graphs:fsdp:5"],
}  # fmt: skip


def lines_of(processes: int, *arguments: object) -> list[str]:
    script = __file__.replace("test_parallel", "parallel_trajectory")
    done = python(*TORCHRUN, processes, script, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_every_sharding_plan_matches_the_golden_trajectory(golden, tmp_path):
    for processes, modes in TRAJECTORIES.items():
        cases = [f"ddpmpp_uncond:{mode}" for mode in modes]
        cases += ["adm_cond:fsdp"] * (processes == 2)
        if processes < 4:  # four would cut SiDA's groups
            sida = (("ddpmpp_uncond", "ddp"), ("adm_cond", "fsdp"), ("ddpmpp_uncond", "tight"))
            cases += [f"sida_{name}:{mode}" for name, mode in sida[: processes + 1]]
        lines = lines_of(processes, golden, tmp_path, *cases)
        assert len(lines) == 3 * len(cases), lines


@pytest.mark.slow
@pytest.mark.parametrize("processes", SMALL)
def test_faults_graphs_and_cuts_of_a_small_network(processes, tmp_path):
    cases = SMALL[processes]
    lines = lines_of(processes, tmp_path, tmp_path, *cases)
    assert len(lines) == len(cases) + 4 * sum("cut" in case for case in cases), lines


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_network(folder / "teacher.safetensors", small_teacher())
    return [
        "-m", "sid_fast.train", "--teacher", folder / "teacher.safetensors", "--batch-size", 4,
        "--state-every", 0.008, "--log-every", 1, "--snapshot-every", 0.012,
    ]  # fmt: skip


@pytest.mark.slow
def test_a_run_on_two_processes_writes_the_files_of_one(command, tmp_path):
    done = python(
        *TORCHRUN, 2, *command, "--kimg", 0.02, "--out", tmp_path / "run", "--parallel", "fsdp"
    )
    assert done.returncode == 0, done.stderr
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names >= {"state-000000005", "snapshot-0000000020.safetensors", "log.jsonl"}
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 5
    assert done.stdout.count("kimg  100 %") == 1, "more than one process speaks"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_edm2_teachers_of_two_processes_have_the_emas_of_one(tmp_path, mode):
    command = [
        "-m", "sid_fast.pretrain", "--architecture", "edm2", "--data", "digits",
        "--model-channels", 64, "--channel-mult", 1, "--num-blocks", 1, "--batch-size", 8,
        "--attention-resolutions", "", "--kimg", 0.016, "--dropout", 0.1, "--sampler-steps", 1,
    ]  # fmt: skip
    done = python(*command, "--out", tmp_path / "one")
    assert done.returncode == 0, done.stderr
    done = python(*TORCHRUN, 2, *command, "--parallel", mode, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    for std in ("0.050", "0.100"):
        one, two = (
            load_file(tmp_path / run / f"snapshot-0000000016-{std}.safetensors")
            for run in ("one", "two")
        )
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert float((two[name] - value).norm()) <= 1e-4 * float(value.norm()), name


@pytest.mark.slow
def test_a_process_that_dies_is_named_and_the_restart_ends_the_run(command, tmp_path):
    out = tmp_path / "run"
    arguments = [
        *TORCHRUN, 2, "--max-restarts", 1, *command, "--batch-size", 8, "--kimg", 0.24,
        "--state-every", 0.016, "--out", out,
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)], env=ENV, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    while not list(out.glob("state-*[0-9]")):
        assert process.poll() is None
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    victim = next(
        int(pid) for pid in children.stdout.split()
        if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()
    )  # fmt: skip
    os.kill(victim, signal.SIGKILL)
    output, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    assert "(exitcode: -9) local_rank: 1" in error, error
    # Alone, at least by those that heard it from the connection; others may name survivors too.
    assert re.search(r": process 1 on \S+ was lost", error), error
    assert "resumed" in output
    assert "kimg  100 %" in output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buckets_are_sent_in_order_while_backward_goes_on(monkeypatch, dtype):
    monkeypatch.setattr(process_group, "world_size", lambda: 2)
    monkeypatch.setattr(ddp.DDPGradSync, "BUCKET", 2**13)
    net = small_teacher().requires_grad_(True)
    net.compute_in(dtype)
    gradients = ddp.DDPGradSync(net, ranks=2)
    count = len(gradients.buckets)
    sent = []

    def send(bucket, async_op):
        number = next(i for i, b in enumerate(gradients.buckets) if b is bucket)
        sent.append((number, sum(map(bool, gradients.missing)), bucket.clone()))
        return SimpleNamespace(wait=lambda: bucket.mul_(2))  # of two processes that agree

    monkeypatch.setattr(torch.distributed, "all_reduce", send)

    def a_round(sync_grads):
        loss = net(torch.ones(2, 1, 8, 8), torch.ones(2)).square().sum((1, 2, 3))
        gradients.backward(loss, 1.0, sync_grads)

    a_round(sync_grads=False)
    assert not sent
    a_round(sync_grads=True)
    assert [number for number, _, _ in sent] == list(range(count - 1))  # map_augment is in the last
    missing = [left for _, left, _ in sent]
    assert missing[0] >= count // 2
    assert missing == sorted(missing, reverse=True)
    gradients.wait()
    assert len(sent) == count
    for bucket, (_, _, at_sending) in zip(gradients.buckets, sent, strict=True):
        assert torch.equal(bucket, at_sending), "it changed behind its sending"


def test_synchronised_gradients_equal_those_of_autograd(monkeypatch):
    """Bit-exact with small buckets and three micro-batches, in a second step too."""
    plain, ours = (small_teacher().requires_grad_(True) for _ in range(2))
    monkeypatch.setattr(ddp.DDPGradSync, "BUCKET", 2**10)
    gradients = ddp.DDPGradSync(ours)
    grads = [p.grad for p in ours.parameters()]
    for step in range(2):
        for p in plain.parameters():
            p.grad = torch.zeros_like(p)
        for i in range(3):
            x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3 * step + i))
            loss, same = (n(x, torch.ones(2)).square().sum((1, 2, 3)) for n in (plain, ours))
            (loss.sum() * 0.7).backward()
            gradients.backward(same, 0.7, sync_grads=i == 2)
        for p, q, grad in zip(plain.parameters(), ours.parameters(), grads, strict=True):
            assert q.grad is grad
            assert torch.equal(p.grad, grad)
        ours.model.map_augment.weight.grad.fill_(1)  # what a step with augmentation leaves
        gradients.zero()


class Event:
    """A CUDA event that has completed once `ended` reaches its number."""

    made, ended = 0, 0

    def record(self):
        Event.made += 1
        self.number = Event.made

    def query(self):
        return self.number <= Event.ended


def test_the_host_runs_at_most_one_step_ahead_and_times_out(monkeypatch):
    monkeypatch.setattr(process_group, "world_size", lambda: 2)
    monkeypatch.setattr(process_group, "_group", SimpleNamespace(minutes=0.001))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    pace = process_group.host_throttle(torch.device("cuda", 0))
    pace.step()  # with nothing before it
    Event.ended = 1
    pace.step()
    with pytest.raises(torch.distributed.DistError, match="cuda:0 is still waiting"):
        pace.catch_up()
    with pytest.raises(torch.distributed.DistError):
        pace.step()
    Event.ended = 3
    pace.catch_up()


def test_after_a_failure_device_groups_are_not_destroyed(monkeypatch):
    closed = []
    group = SimpleNamespace(control="control", long_wait="long_wait", checkpoint="checkpoint")
    monkeypatch.setattr(process_group, "world_size", lambda: 2)
    monkeypatch.setattr(process_group, "_group", group)
    monkeypatch.setattr(failure, "unclean_exit", False)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", closed.append)
    process_group._leave(torch.device("cuda", 0), orderly=False)
    assert closed == ["control", "long_wait", "checkpoint"]
    assert failure.unclean_exit
    assert process_group._group is None


def test_running_out_of_memory_names_the_phase_and_the_next_micro_batch(
    command, tmp_path, monkeypatch, run_command
):
    def full(self, draw):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")

    monkeypatch.setattr(SiD, "generator_loss", full)
    status, error = run_command("train", *command[2:], "--kimg", 0.02, "--out", tmp_path / "run")
    assert status == 2
    assert error.strip().count("\n") == 0
    for words in ("generator step, micro-batch 1 of 1", "2.00 GiB", "--micro-batch 2"):
        assert words in error
    assert "GPU 0" not in error
    with pytest.raises(OutOfMemory):
        Distiller(small_teacher(), Settings(batch_size=4)).step()
    assert smaller_micro_batch(Settings(batch_size=24, micro_batch=4), ranks=2) == 3
    assert smaller_micro_batch(Settings(batch_size=2, micro_batch=1)) is None


def test_an_impossible_sharding_plan_is_refused():
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match="shard_group=3"):
        fsdp.plan("hsdp", cpu, lambda shards, reshard_after_forward: 0, shard_group=3)
    assert fsdp.plan("auto", cpu, lambda shards, reshard_after_forward: 0).mesh is None


@pytest.mark.parametrize(
    ("memory", "node", "mesh", "reshard_after_forward"),
    [
        (80.0, 8, None, False),  # half of it holds the whole state
        (79.9, 8, (8,), False),  # 16 + 24/8 MB
        (37.9, 8, (8,), True),
        (44.1, 4, (2, 4), False),  # two nodes; 16 + 24/4 MB
        (43.9, 4, (2, 4), True),
    ],
)
def test_auto_chooses_by_memory(monkeypatch, memory, node, mesh, reshard_after_forward):
    properties = SimpleNamespace(total_memory=memory * 1e6)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(process_group, "world_size", lambda: 8)
    monkeypatch.setattr(fsdp, "init_device_mesh", lambda kind, shape, **_: (kind, shape))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(node))
    whole = 16e6  # of 40 MB of state, what every rank needs while weights stay gathered

    def state_bytes(shards, reshard_after_forward):
        return int(40e6 / shards if reshard_after_forward else whole + (40e6 - whole) / shards)

    found = fsdp.plan("auto", torch.device("cuda"), state_bytes)
    assert found.mesh == (mesh and ("cuda", mesh))
    assert found.reshard_after_forward is reshard_after_forward
    if mesh:
        assert ("gathered block by block" in found.text) == reshard_after_forward
