"""The benchmark commands on tiny networks: their rows and the baselines."""

import collections
import copy
import importlib
from unittest.mock import Mock

import pytest
import torch
from click.testing import CliRunner

from benchmarks import baselines, evaluation, kernels, train
from benchmarks.analysis import breakdown, roofline
from benchmarks.results import Results, read
from sid_fast import Distiller, Settings
from sid_fast.data import readers
from sid_fast.data.feed import ImageFeed
from sid_fast.errors import RunFailed, UserError
from sid_fast.kernels.dispatch import describe, runs
from sid_fast.models import EDMNetwork
from sid_fast.training.step import annotate_oom
from tests.gpu import checks
from tests.helpers.golden import relative

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def restore_cudnn_flags():
    """Benchmarks set them for the whole process."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    yield
    cudnn.benchmark, cudnn.deterministic = before


@pytest.fixture
def small(monkeypatch):
    """The digits preset with a tiny network, on a device with known rates."""
    monkeypatch.setattr(train, "network_config", lambda teacher: checks.TINY)
    rates = {"bf16": 0.5, "fp32": 1.0, "copy": 0.1}
    monkeypatch.setattr("benchmarks.timing.peak_rates", lambda device: rates)


def one_step(preset="digits", **options):
    return train.Options(
        preset=preset, micro_batch=(2,), max_steps=1, timed_seconds=0, device="cpu", **options
    )


def test_kernels_are_timed_next_to_the_baselines(small, tmp_path):
    out = tmp_path / "kernels.jsonl"
    options = kernels.Options(kernel="sid_loss", dtype="fp32", baselines="eager", out=str(out))
    kernels.run(options, set())
    rows = read(out)
    assert {row["provider"] for row in rows} == {"triton", "eager"}
    assert len(rows) == 2 * 3
    for row in rows:
        assert row["status"] == "ok"
        assert 0 < row["ms_p20"] <= row["ms_p50"]
        seconds = row["ms_p50"] / 1e3
        assert row["floor_share"] == pytest.approx(row["gb_s"] * 1e9 * seconds / 1e11 / seconds)


def test_compile_only_runs_its_part_of_the_triton_kernels(monkeypatch):
    seen = []
    monkeypatch.setattr(kernels, "make_calls", lambda case, *_: seen.append(case.shape) or {})
    for part in (0, 1):
        kernels.run(
            kernels.Options("sid_loss", "fp32", compile_only=True, part=part, parts=2), set()
        )
    options = kernels.Options("sid_loss", "fp32")
    assert sorted(seen) == sorted(case.shape for case in kernels.cases(options, CPU))
    assert len(seen) == kernels.CPU_CASES

    def fail(case, *_):
        raise ValueError("as it\nis")

    monkeypatch.setattr(kernels, "make_calls", fail)
    options.compile_only = True
    with pytest.raises(RunFailed, match=r"sid_loss .*fp32: ValueError: as it is; sid_loss"):
        kernels.run(options, set())


@pytest.mark.parametrize("name", ["group_norm", "attention", "adam_ema", "augment"])
def test_the_timed_backends_compute_the_same(name):
    """Checked for the smallest case of each kernel."""
    cases = kernels.cases(kernels.Options(kernel=name, dtype="fp32"), CPU)
    cases = [case for case in cases if "norm1" not in case.shape]  # has dropout
    case = min(cases, key=lambda case: sum(case.nbytes))
    inputs = case.inputs()
    if name == "adam_ema":
        for square in inputs[2]:
            square.zero_()  # as torch's optimisers start
        after = {}
        for provider in ("eager", "triton", "fused Adam"):
            lists = copy.deepcopy(inputs)
            for p, grad in zip(*lists[:2], strict=True):
                p.grad = grad
            case.providers[provider](*lists)()
            after[provider] = lists
        for part in (0, 3):  # weights and average
            start, eager, *others = (
                checks.flat(lists[part]) for lists in (inputs, *after.values())
            )
            moved = (eager - start).norm()
            assert moved > 0
            for other in others:
                assert (other - eager).norm() <= 0.02 * moved  # a step of 1e-5 from 1, rounded
        return
    triton, eager = (case.providers[name](*inputs) for name in ("triton", "eager"))
    for a, b in zip(triton, eager, strict=True):
        assert relative(a, b.detach()) <= 1e-4


def test_sdpa_reads_qkv_like_attention():
    qkv = torch.randn(2, 3 * 32, 4, 4)
    expected = kernels.attention.attention_eager(qkv, 2)
    assert relative(kernels.sdpa(qkv, 2), expected) <= 1e-5


@pytest.fixture(params=["published", "optimised"])
def make_baseline(request, monkeypatch):
    """make_baseline(draws, settings) -> an uncompiled baseline that uses these draws."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *args, **kwargs: None)

    def make(draws, settings):
        for phase in ("fake", "generator"):
            name = f"sample_{phase}_inputs"
            monkeypatch.setattr(baselines.SiD, name, lambda *_, phase=phase: draws[phase][0])
        teacher = train.network(checks.TINY, CPU)
        if request.param == "published":
            return baselines.PublishedBaseline(teacher, settings, torch.float32)
        return baselines.OptimisedBaseline(teacher, settings, torch.float32, "default")

    return make


def test_a_baseline_takes_the_same_step(make_baseline):
    """Weights and EMA agree after two steps with the same draws."""
    settings = Settings(
        batch_size=4, augment_p=0.5, eps=1.0, fake_lr=1e-2, generator_lr=1e-2, generator_beta1=0.9,
        ema_rampup_ratio=2.0,
    )  # fmt: skip
    distiller = Distiller(train.network(checks.TINY, CPU), settings)
    start, draws = checks.weights(distiller), {}
    baseline = make_baseline(draws, settings)
    for _ in range(2):
        draws |= distiller.draw()
        baseline.step()
        distiller.step(draws)
    assert checks.relative_distance(baseline, distiller, start) <= 1e-4


def test_a_baseline_masks_a_nan_sample(make_baseline):
    """Its loss is left out, and gradients that become NaN are zeroed."""
    settings = Settings(batch_size=2, fake_lr=1e-2, generator_lr=1e-2)
    draws = Distiller(train.network(checks.TINY, CPU), settings).draw()
    for phase in draws:
        draws[phase][0].noise[0] = torch.nan
    baseline, losses = make_baseline(draws, settings), []
    baseline.report = losses.append
    baseline.step()
    assert len(losses) == 2
    assert all(map(torch.isfinite, losses))
    assert losses[0] != 0
    assert torch.isfinite(checks.weights(baseline)).all()


@pytest.mark.slow
def test_variants_are_timed_together_and_a_failure_is_a_row(small, tmp_path):
    out = tmp_path / "train.jsonl"
    train.run(one_step(variants="published,no graphs,sid_fast", out=str(out)), set())
    rows = {row["variant"]: row for row in read(out)}
    assert "ms_p50" not in rows["no graphs"]
    assert rows["no graphs"]["status"] == "RuntimeError: needs a GPU"
    base, published = rows["sid_fast"], rows["published"]
    assert base["relative_time"] == 1
    assert published["relative_time"] == pytest.approx(published["ms_p50"] / base["ms_p50"])
    assert base["img_s"] == pytest.approx(2 * base["it_s"])
    assert base["rate_fp32_tflop_s"] == 1
    flop = 11 * 2 * train.forward_flop(checks.TINY)
    assert base["mfu"] == pytest.approx(flop * base["it_s"] / 1e12)


@pytest.mark.slow
def test_a_breakdown_sums_the_operations_of_a_step(small, monkeypatch, tmp_path):
    path = tmp_path / "breakdown.jsonl"
    breakdown.run(breakdown.Options(micro_batch=2, device="cpu", out=str(path)), set())
    rows = read(path)
    kinds = {row["kind"]: row for row in rows if row["name"] == "all"}
    whole = kinds.pop("all")
    assert kinds.keys() >= {"convolution", "group norm", "linear", "pointwise", "update"}
    for column in ("device_ms", "floor_ms"):
        assert sum(row[column] for row in kinds.values()) == pytest.approx(whole[column])
        assert all(row[column] > 0 for row in kinds.values())
    assert whole["share"] == 1
    (update,) = (row for row in rows if row["name"] == "sid_fast::adam_ema")
    assert update["kind"] == "update"
    assert update["calls"] == 2
    # Reads two networks' gradients; reads and writes their weights and moments, and one EMA.
    weights = sum(p.numel() for p in EDMNetwork(checks.TINY).parameters())
    least = (2 * (4 + 8 + 8) + 8) * weights / 0.1e9
    assert least <= kinds["update"]["floor_ms"] < 1.2 * least


@pytest.mark.slow
def test_16_bit_floors_use_the_fastest_product(small, monkeypatch, tmp_path):
    """On a CPU that is float32's; bfloat16 may be emulated."""
    rates = []
    monkeypatch.setattr(
        breakdown, "floors", lambda ops, *given: rates.append(given) or collections.Counter()
    )
    monkeypatch.setattr(breakdown.estimator, "steps", lambda *_: [Mock()])
    monkeypatch.setattr(breakdown, "STEPS", 1)
    path = tmp_path / "breakdown.jsonl"
    options = breakdown.Options(precision="fp16", micro_batch=1, device="cpu", out=str(path))
    breakdown.run(options, set())
    assert rates == [(1.0, 0.1)]  # TFLOP/s, TB/s
    assert {row["precision"] for row in read(path)} == {"fp16"}


def test_a_precision_without_a_measured_rate_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"precision='tf32' has no measured rate: .*bf16, fp16, fp32"
    ):
        breakdown.run(breakdown.Options(precision="tf32", out=str(tmp_path / "b.jsonl")), set())


def test_forward_flop_match_the_published_network():
    assert train.forward_flop(checks.CIFAR10) == pytest.approx(42.38e9, rel=1e-3)


class Crowded:
    """A machine with room for two variants; "large" needs all of it, "too large" more."""

    alive: int = 0

    def __init__(self, variant, *_):
        need = {"large": 2, "too large": 3}.get(variant.kernels, 1)
        if Crowded.alive + need > 2:
            with annotate_oom("fake step, micro-batch 1 of 1"):  # as in Distiller
                raise torch.OutOfMemoryError("no room")
        Crowded.alive += need
        self.need, self.peak = need, [0.0, 0.0]

    def __call__(self):
        pass

    def __del__(self):
        Crowded.alive -= getattr(self, "need", 0)


@pytest.mark.slow
def test_a_variant_that_does_not_fit_is_timed_after_the_others(monkeypatch, small, tmp_path):
    sizes = {"sid_fast": 1, "a": 1, "b": 1, "large": 2, "too large": 3, "c": 1}
    monkeypatch.setattr(train, "Running", Crowded)
    monkeypatch.setattr(
        train, "VARIANTS", {name: train.Variant(kernels=name, options={}) for name in sizes}
    )
    monkeypatch.setattr(train, "ON_CPU", tuple(sizes))
    out = tmp_path / "train.jsonl"
    train.run(one_step(variants=",".join(sizes), out=str(out)), set())
    rows = {row["variant"]: row for row in read(out)}
    assert {n: row["status"] for n, row in rows.items()} == dict.fromkeys(sizes, "ok") | {
        "too large": "out of memory"
    }
    assert {n for n, row in rows.items() if "relative_time" in row} == {"sid_fast", "a", "b"}


def test_running_out_of_memory_while_timed_is_a_row(monkeypatch, small, tmp_path):
    class Growing(Crowded):
        def __call__(self):
            with annotate_oom("fake step, micro-batch 1 of 1"):
                raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(train, "Running", Growing)
    monkeypatch.setattr(train, "VARIANTS", {"sid_fast": train.Variant(kernels="a", options={})})
    out = tmp_path / "train.jsonl"
    train.run(one_step(variants="sid_fast", out=str(out)), set())
    assert [row["status"] for row in read(out)] == ["out of memory beside the others"]


def test_eager_nchw_gets_contiguous_inputs():
    options = kernels.Options(kernel="group_norm", dtype="fp32")
    case = min(kernels.cases(options, CPU), key=lambda case: sum(case.nbytes))
    seen = {}
    for provider in ("eager", kernels.NCHW):
        function = case.providers[provider]
        case.providers[provider] = lambda *inputs, p=provider, f=function: [
            seen.update({p: inputs}),
            *f(*inputs),
        ][1:]
        for make in kernels.make_calls(case, provider, CPU).values():
            make()()
            images = [v for v in seen[provider] if v.dim() == 4 and min(v.shape[1:]) > 1]
            assert images
            assert all(v.is_contiguous() == (provider == kernels.NCHW) for v in images)
            assert all(v.requires_grad for v in images)


@pytest.mark.parametrize(
    ("name", "backend", "tuned", "deterministic"),
    [
        ("default", describe(runs(torch.device("cuda"))), False, True),
        ("sid_fast", "triton", False, True),
        ("cuDNN benchmark", "triton", True, True),
        ("cuDNN not deterministic", "triton", False, False),
        ("published", "eager", True, False),
        ("optimised graphs", "eager", True, False),
    ],
)
def test_a_variant_has_the_settings_of_its_name(name, backend, tuned, deterministic):
    running = object.__new__(train.Running)
    running.variant, running.device = train.VARIANTS[name], torch.device("cuda")
    with train.kernels.dispatch.forced("triton"), running.settings():
        assert describe(runs(running.device)) == backend
        cudnn = torch.backends.cudnn
        assert (cudnn.benchmark, cudnn.deterministic) == (tuned, deterministic)
    assert running.variant.uses_graphs == (name != "published")


def test_an_unknown_variant_is_refused(small, tmp_path):
    with pytest.raises(UserError, match="variants='faster' is unknown"):
        train.run(one_step(variants="sid_fast,faster", out=str(tmp_path / "t.jsonl")), set())


@pytest.mark.parametrize(
    ("command", "field", "value"),
    [
        (train, "max_steps", 0),
        (kernels, "seconds", -1),
        (evaluation, "rounds", 0),
        (breakdown, "micro_batch", -3),
        (roofline, "images", 0),
    ],
)
def test_a_number_out_of_range_is_refused_by_name(command, field, value):
    with pytest.raises(UserError, match=f"{field}={value} is out of range"):
        command.run(command.Options(**{field: value}), set())


@pytest.mark.parametrize("name", ["plan", "passes", "precision", "roofline", "breakdown"])
def test_help_shows_the_command(name):
    module = importlib.import_module(f"benchmarks.analysis.{name}")
    shown = CliRunner().invoke(module.main, ["--help"])
    assert shown.exit_code == 0
    assert f"python -m benchmarks.analysis.{name}" in shown.output


def test_an_evaluation_writes_every_stage(monkeypatch, tmp_path):
    """The readers interleaved; an interrupted run keeps the stages that it finished."""
    order = []

    def read_plainly(data, indices, device, kind):
        order.append(kind)
        return readers.read(data, indices, device)

    def feed_plainly(*arguments, resident, reader):
        return ImageFeed(*arguments, resident=resident, reader="plain")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "SMALL", checks.TINY)
    monkeypatch.setattr(evaluation, "choose", lambda: "dali")
    monkeypatch.setattr(evaluation, "read", read_plainly)
    monkeypatch.setattr(evaluation.references, "read", read_plainly)
    monkeypatch.setattr(evaluation, "ImageFeed", feed_plainly)
    out = tmp_path / "evaluation.jsonl"
    options = evaluation.Options(images=20, rounds=2, device="cpu", out=str(out))
    evaluation.run(options, set())
    assert order == ["dali", "plain"] * 2 + ["dali"] * 2
    rows = {(row["stage"], row["variant"]): row for row in read(out)}
    parts = {"images", "detector", "moments"}
    assert set(rows) >= {(part, of) for part in parts for of in ("reference", "generated")}
    assert ("Fréchet distance", "comparison") in rows
    for source in ("resident", "dali", "plain"):
        assert rows["feed", source]["speedup"] > 0
        assert 0 <= rows["fed step", source]["wait_share"] <= 1
    assert rows["fed step", "resident"]["wait_share"] == 0
    assert evaluation.line(rows["fed step", "resident"]).endswith(" 0%")
    dali, plain = (rows["reading", kind] for kind in ("dali", "plain"))
    assert plain["speedup"] == 1
    assert dali["speedup"] > 0
    for row in rows.values():
        if row["variant"] == "comparison":
            assert "images" not in row
            assert "img_s" not in row
            continue
        assert row["images"] == 20
        assert row["img_s"] == pytest.approx(2e4 / row["ms_p50"])
    assert evaluation.line(dali).endswith(f"{dali['speedup']:.2f}")
    out.unlink()
    monkeypatch.setattr(evaluation, "compare", interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluation.run(options, set())
    assert len(read(out)) == 2 + 3 + 3 + 3 + 3


def test_the_speedup_compares_readers_within_a_round(monkeypatch, tmp_path):
    """A machine that slows down from round to round does not affect it."""
    times = {"dali": [(1.0, 0), (10.0, 0), (100.0, 0)], "plain": [(3.0, 0), (10.0, 0), (200.0, 0)]}
    monkeypatch.setattr(evaluation.timing, "interleaved", lambda *_: times)
    bench = evaluation.Bench(Results(tmp_path / "e.jsonl", "evaluation"), CPU, 3)
    bench.readers(range(100), "dali")
    dali, plain = read(tmp_path / "e.jsonl")
    assert (dali["speedup"], plain["speedup"]) == (2, 1)
    assert dali["img_s"] == pytest.approx(100 / 10e-3)
