"""CUDA graphs: when they are used, and that replayed steps equal eager ones.

Without a GPU, operations are recorded in place of launches: see tests/helpers/recorder.py.
"""

import contextlib
import gc
import weakref
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from sid_fast import Distiller, Settings, save_network, train
from sid_fast.errors import Fallback, OutOfMemory, RunFailed, UserError
from sid_fast.performance import cuda_graphs
from sid_fast.performance.activation_checkpoint import checkpoint_activations
from tests.helpers import recorder
from tests.helpers.networks import FAST, TINY, small_teacher, weights
from tests.helpers.processes import tensors_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_cuda_graph_option_on_each_device():
    assert cuda_graphs.resolve_cuda_graph("auto", CUDA) == (True, "")
    assert cuda_graphs.resolve_cuda_graph("on", CUDA) == (True, "")
    assert cuda_graphs.resolve_cuda_graph("off", CUDA) == (False, "")
    assert cuda_graphs.resolve_cuda_graph("auto", CPU) == (False, "")
    used, note = cuda_graphs.resolve_cuda_graph("auto", CUDA, sharded=True)
    assert not used
    assert "--cuda-graph on" in note
    assert cuda_graphs.resolve_cuda_graph("on", CUDA, sharded=True) == (True, "")
    with pytest.raises(UserError, match="needs a GPU, but the device is cpu"):
        cuda_graphs.resolve_cuda_graph("on", CPU)


@pytest.fixture
def stand_in(monkeypatch, device):
    if device.type == "cpu":
        recorder.stand_in(monkeypatch.setattr)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [4, 1])
def test_a_replayed_run_is_the_eager_one(stand_in, device, micro_batch):
    """With dropout, augmentation and a first moment; the two warm-ups leave no trace."""
    settings = Settings(
        **FAST | {"batch_size": 8},
        dropout=0.2,
        augment_p=0.5,
        generator_beta1=0.9,
        micro_batch=micro_batch,
    )
    found = []
    for replayed in (False, True):
        distiller = Distiller(small_teacher(TINY).to(device), settings, cuda_graph=replayed)
        for _ in range(3):
            metrics = distiller.step()
        found.append((weights(distiller), metrics["generator/loss"].clone()))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    expected = [1, 6, 1, 1, 6, 1] if micro_batch == 1 else [1]
    assert [times for _, times in distiller.graphs.segments] == expected


def test_recomputed_blocks_replay_too(stand_in, device):
    """Dropout is a function of its seed, so no random state has to be restored."""
    settings = Settings(**FAST, dropout=0.3, eps=1.0)
    found = []
    for replayed in (False, True):
        distiller = Distiller(small_teacher().to(device), settings, cuda_graph=replayed)
        checkpoint_activations(distiller.teacher, distiller.generator, distiller.fake_score)
        for _ in range(2):
            distiller.step()
        found.append(weights(distiller))
    assert torch.equal(*found)


def test_a_warm_up_runs_two_micro_batches_of_each_phase(stand_in, monkeypatch):
    """Of 8 micro-batches: more would cost minutes with a published preset, for nothing."""
    calls, backward = [], Distiller.backward

    def counted(self, phase, inputs=None, *, first=False, last=False):
        calls.append((phase.name, last))
        return backward(self, phase, inputs, first=first, last=last)

    monkeypatch.setattr(Distiller, "backward", counted)
    for rounds, times in ((8, 1), (1, 2)):
        calls.clear()
        settings = Settings(**FAST | {"batch_size": 8}, micro_batch=8 // rounds)
        monkeypatch.setattr(cuda_graphs, "CapturedGraph", lambda function, pool: dict)
        Distiller(small_teacher(), settings, cuda_graph=True).step()
        step = [(phase, i) for phase in ("fake", "generator") for i in ([False, True][-rounds:])]
        assert calls == step * times


def failing_graph(at, leaves):
    """A stand-in for Graph whose `at`-th capture fails behind its last operation.

    leaves() is what remains of it.
    """
    made = []

    class Failing(recorder.Recorded):
        def __init__(self, function, *more):
            made.append(self)

            def behind():
                result = function()
                if len(made) == at:
                    try:
                        raise RuntimeError("operation not permitted when stream is capturing\nmore")
                    finally:
                        raise RuntimeError("capture was invalidated")  # by ending it
                return result

            try:
                super().__init__(behind, *more)
            except RuntimeError:
                leaves()
                raise

    return Failing, made


@pytest.fixture
def failing(stand_in, monkeypatch, device):
    if device.type == "cuda":
        pytest.skip("the stand-in is for a CPU; tests/gpu plants a failure on a GPU")

    def plant(at, leaves=lambda: None):
        kind, made = failing_graph(at, leaves)
        monkeypatch.setattr(cuda_graphs, "CapturedGraph", kind)
        return made

    return plant


class Sender:
    """Of a message that the capture was to send."""

    def __init__(self):
        self.works = ["on its way"]


def state_of(distiller):
    yield from (weights(distiller), distiller.enabled, torch.get_rng_state())
    for optimizer in distiller.optimizers.values():
        yield optimizer.totals
        yield from (p.grad for p in optimizer.params)
        yield from (*optimizer.exp_avg, *optimizer.exp_avg_sq, optimizer.step_count)


@pytest.mark.slow
@pytest.mark.parametrize(("micro_batch", "at"), [(None, 1), (1, 3), (1, 6)])
def test_under_auto_a_failed_capture_leaves_the_eager_run(failing, micro_batch, at):
    """Bit-exact: weights, optimizer states, gradients, and random states, the caller's too."""
    settings = Settings(
        **FAST | {"batch_size": 8}, dropout=0.2, generator_beta1=0.9, micro_batch=micro_batch
    )
    expected = Distiller(small_teacher(TINY), settings)
    distiller = Distiller(small_teacher(TINY), settings, cuda_graph="auto")
    sender = Sender()
    cuda_graphs.failure.grad_syncs.add(sender)

    def leaves():
        torch.manual_seed(9)
        for optimizer in distiller.optimizers.values():
            for tensor in (optimizer.totals, *(p.grad for p in optimizer.params)):
                tensor.fill_(7)

    made = failing(at, leaves)
    torch.manual_seed(3)
    with pytest.warns(Fallback, match=r"off: .*failed \(operation .* capturing\)") as warned:
        found = distiller.step()
    assert len(warned) == 1
    assert "\n" not in str(warned[0].message)
    assert not sender.works
    torch.manual_seed(3)
    wanted = expected.step()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert all(map(torch.equal, state_of(distiller), state_of(expected)))
    for _ in range(2):
        metrics = distiller.step(), expected.step()
        assert torch.equal(*(m["generator/loss"] for m in metrics))
    assert all(map(torch.equal, state_of(distiller), state_of(expected)))
    assert len(made) == at, "no capture is tried after one that failed"
    assert not any(graph.operations for graph in made[: at - 1]), "those before it are let go"


def test_where_graphs_are_required_a_failed_capture_says_why_and_the_way_out(failing):
    failing(1)
    distiller = Distiller(small_teacher(), Settings(**FAST), cuda_graph=True)
    with pytest.raises(UserError, match=r"\(operation .* capturing\); use --cuda-graph off"):
        distiller.step()
    assert distiller.enabled


def test_a_capture_that_runs_out_of_memory_raises_out_of_memory(stand_in, monkeypatch):
    """So that a smaller micro-batch is tried, or a benchmark runs its variant alone."""

    def full(*_):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        finally:
            raise RuntimeError("capture was invalidated")

    monkeypatch.setattr(cuda_graphs, "CapturedGraph", full)
    distiller = Distiller(small_teacher(), Settings(**FAST), cuda_graph=True)
    with pytest.raises(OutOfMemory, match="graph capture: CUDA out of memory"):
        distiller.step()


def test_a_capture_that_failed_on_another_rank_is_not_used(stand_in, monkeypatch):
    """Ranks that replay and ranks that do not would issue collectives in different orders."""
    answers = iter([True, False])
    monkeypatch.setattr(cuda_graphs.process_group, "all_reduce_any", lambda failed: next(answers))
    monkeypatch.setattr(
        cuda_graphs.process_group, "first_text", lambda text: text or "process 1: it broke"
    )
    distiller = Distiller(small_teacher(), Settings(**FAST), cuda_graph="auto")
    with pytest.warns(Fallback, match=r"\(process 1: it broke\)"):
        distiller.step()
    assert not distiller.graphs.graphs


def test_a_capture_that_breaks_the_device_ends_the_run(failing, monkeypatch):
    made = failing(1)
    monkeypatch.setattr(cuda_graphs, "still_works", lambda *_: False)
    distiller = Distiller(small_teacher(), Settings(**FAST), cuda_graph="auto")
    with pytest.raises(UserError, match=r"no longer works; use --cuda-graph off"):
        distiller.step()
    replayed = cuda_graphs.GraphedFunction(lambda x: x + 1)
    assert replayed(torch.ones(1)) == 2
    assert len(made) == 1, "no capture after one that failed"
    monkeypatch.setattr(cuda_graphs, "_failed", "")
    failing(1)
    with pytest.raises(RunFailed, match=r"capturing.*no longer works"):
        cuda_graphs.GraphedFunction(lambda x: x + 1)(torch.ones(1))


@pytest.mark.parametrize("refused", ["", "a trial was ended by SIGABRT"])
def test_a_run_without_graphs_prints_one_line_and_continues(
    failing, refused, monkeypatch, tmp_path, run_command
):
    """After a failed trial or capture, bit-exact with --cuda-graph off."""
    monkeypatch.setattr(
        train.graph_trial, "resolve_cuda_graph", lambda choice, *_: (choice != "off", "")
    )
    monkeypatch.setattr(train.graph_trial, "failure_reason", lambda *_: refused)
    made = failing(1)
    save_network(tmp_path / "teacher.safetensors", small_teacher())
    arguments = ["--teacher", tmp_path / "teacher.safetensors", "--batch-size", 4, "--kimg", 0.008]
    states = []
    for choice in ("auto", "off"):
        out = tmp_path / choice
        status, error = run_command("train", *arguments, "--cuda-graph", choice, "--out", out)
        assert status == 0
        lines = [line for line in error.splitlines() if "CUDA graphs are off" in line]
        assert len(lines) == (choice == "auto" and not refused)
        states.append(tensors_of(max(out.glob("state-*"))))
    assert len(made) == (not refused)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_refused_trial_is_noted_in_the_headline(monkeypatch, tmp_path, run_command):
    monkeypatch.setattr(train.graph_trial, "resolve_cuda_graph", lambda *_: (True, ""))
    monkeypatch.setattr(train, "Loop", loop := Mock())
    save_network(tmp_path / "teacher.safetensors", small_teacher())
    for reason, required in (("a trial failed: x", None), ("", False)):
        monkeypatch.setattr(train.graph_trial, "failure_reason", lambda *_, reason=reason: reason)
        assert run_command("train", "--teacher", tmp_path / "teacher.safetensors")[0] == 0
        trainer, headline = (loop.call_args.args[i] for i in (0, 4))
        assert ("\nnote: CUDA graphs are off: a trial failed: x" in headline) == bool(reason)
        assert (trainer.graphs and trainer.graphs.required) == required


class Generator:
    """torch's, after a capture that CUDA did not end: it refuses to draw until it is replaced."""

    def __init__(self):
        self.capturing = True

    def clone_state(self):
        return SimpleNamespace(capturing=False)

    def graphsafe_set_state(self, state):
        self.capturing = state.capturing


def test_torchs_state_after_a_failed_capture_is_cleaned_up(monkeypatch):
    """Pool, generators, stream and the list of graphs, by name: no GPU is needed."""
    calls = []
    graph = SimpleNamespace(
        register_generator_state=lambda _: None, reset=lambda: calls.append("reset")
    )
    default = Generator()

    @contextlib.contextmanager
    def capture(graph, pool, capture_error_mode):
        yield

    for name, value in {
        "CUDAGraph": lambda: graph, "graph_pool_handle": lambda: (0, 7), "graph": capture,
        "current_stream": lambda: "mine", "current_device": lambda: 0,
        "set_stream": lambda stream: calls.append(stream), "default_generators": [default],
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *args, name=name: calls.append((name, *args)))

    def fail():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cuda_graphs.CapturedGraph(fail)
    ended = [(name, 0, (0, 7)) for name in ("_cuda_endAllocateToPool", "_cuda_releasePool")]
    assert calls == ["mine", *ended, "reset"]
    assert not default.capturing
    assert not cuda_graphs.failure.captured_graphs


def test_a_warm_up_leaves_no_garbage_for_the_capture(monkeypatch):
    """Autograd nodes in a cycle would bring the warm-up's stream into the capture."""

    class Node:
        pass

    def function():
        node = Node()
        node.self = node
        refs.append(weakref.ref(node))

    refs, stream = [], SimpleNamespace(wait_stream=lambda _: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    gc.disable()
    try:
        cuda_graphs.warm_up(function, 3)
    finally:
        gc.enable()
    assert len(refs) == 3
    assert not any(ref() for ref in refs)


def test_the_reason_is_the_message_of_our_own_error():
    def fail():
        try:
            raise RuntimeError("CUDA out of memory. 2.00 GiB. GPU 0 has a total …")
        except RuntimeError as error:
            raise OutOfMemory("fake step: 2.00 GiB") from error

    with pytest.raises(OutOfMemory) as caught:
        fail()
    assert cuda_graphs.reason_of(caught.value) == "fake step: 2.00 GiB"
    assert cuda_graphs.reason_of(AssertionError()) == "AssertionError"
