"""The benchmark commands in small: their rows and their rivals."""

import collections
import copy
import csv
import dataclasses
import importlib
from unittest.mock import Mock

import pytest
import torch
from click.testing import CliRunner

from benchmarks import baselines, breakdown, check, evaluation, kernels, roofline, summary, train
from benchmarks.record import Record, read
from sid_fast import Distiller, Settings
from sid_fast.data import readers
from sid_fast.data.feed import ImageFeed
from sid_fast.errors import RunFailed, UserError
from sid_fast.kernels.dispatch import choose, describe, runs
from sid_fast.models import EDMNetwork
from sid_fast.models.edm_unet import layers
from sid_fast.training.step import annotate_oom
from tests.helpers.golden import relative

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def settings_of_the_process():
    """What a benchmark chooses for the whole process does not outlive it."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    yield
    cudnn.benchmark, cudnn.deterministic = before


@pytest.fixture
def small(monkeypatch):
    """The digits preset on a network of a few thousand weights, on a device of known rates."""
    monkeypatch.setattr(train, "network_config", lambda teacher: check.TINY)
    ceilings = {"bf16": 0.5, "fp32": 1.0, "copy": 0.1}
    monkeypatch.setattr("benchmarks.measure.ceilings", lambda device: ceilings)


def one_step(preset="digits", **options):
    return train.Options(preset=preset, micro_batch=(2,), turns=1, share=0, device="cpu", **options)


def test_kernels_are_measured_beside_their_rivals(small, tmp_path):
    out = tmp_path / "kernels.json"
    options = kernels.Options(kernel="sid_loss", dtype="fp32", baselines="eager", out=str(out))
    kernels.run(options, set())
    rows = read(out)["rows"]
    assert {row["provider"] for row in rows} == {"triton", "eager"}
    assert len(rows) == 2 * 3
    for row in rows:
        assert row["status"] == "ok"
        assert 0 < row["ms"]["p20"] <= row["ms"]["p50"]
        seconds = row["ms"]["p50"] / 1e3
        assert row["floor_share"] == pytest.approx(row["gb_s"] * 1e9 * seconds / 1e11 / seconds)
    assert len(summary.kernels(rows)) == 3
    with open(out.with_suffix(".csv"), newline="") as file:
        assert [row["shape"] for row in csv.DictReader(file)] == [row["shape"] for row in rows]


@pytest.mark.parametrize("name", ["group_norm", "attention", "adam_ema", "augment"])
def test_ours_and_plain_compute_the_same_in_the_benchmark(name):
    """Of the smallest case of each kernel: what is timed is the operation, not something less."""
    cases = kernels.cases(kernels.Options(kernel=name, dtype="fp32"), CPU)
    cases = [case for case in cases if "norm1" not in case.shape]  # which drops at random
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
            case.forms[provider](*lists)()
            after[provider] = lists
        for part in (0, 3):  # weights and average
            start, eager, *others = (check.flat(lists[part]) for lists in (inputs, *after.values()))
            gone = (eager - start).norm()
            assert gone > 0
            for other in others:
                assert (other - eager).norm() <= 0.02 * gone  # a step of 1e-5 from 1, rounded
        return
    ours, plain = (case.forms[provider](*inputs) for provider in ("triton", "eager"))
    for a, b in zip(ours, plain, strict=True):
        assert relative(a, b.detach()) <= 1e-4


def test_sdpa_reads_qkv_as_our_attention_does():
    qkv = torch.randn(2, 3 * 32, 4, 4)
    expected = kernels.attention.attention_eager(qkv, 2)
    assert relative(kernels.sdpa(qkv, 2), expected) <= 1e-5


@pytest.fixture(params=["published", "skilled"])
def rival(request, monkeypatch):
    """rival(draws, settings) -> one whose steps take these draws; uncompiled."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *args, **kwargs: None)

    def make(draws, settings):
        for phase in ("fake", "generator"):
            name = f"sample_{phase}_inputs"
            monkeypatch.setattr(baselines.SiD, name, lambda *_, phase=phase: draws[phase][0])
        teacher = train.network(check.TINY, CPU)
        if request.param == "published":
            return baselines.Plain(teacher, settings, torch.float32)
        return baselines.Skilled(teacher, settings, torch.float32, "default")

    return make


def test_a_rival_takes_the_step_that_we_take(rival):
    """Weights and average after two steps of the same draws."""
    settings = Settings(
        batch_size=4, augment_p=0.5, eps=1.0, fake_lr=1e-2, generator_lr=1e-2, generator_beta1=0.9,
        ema_rampup_ratio=2.0,
    )  # fmt: skip
    ours = Distiller(train.network(check.TINY, CPU), settings)
    start, draws = check.weights(ours), {}
    theirs = rival(draws, settings)
    for _ in range(2):
        draws |= ours.draw()
        theirs.step()
        ours.step(draws)
    assert check.apart(theirs, ours, start) <= 1e-4


def test_a_rival_survives_a_spoiled_sample(rival):
    """As the published step does: its loss is left out, and gradients that it spoiled are 0."""
    settings = Settings(batch_size=2, fake_lr=1e-2, generator_lr=1e-2)
    draws = Distiller(train.network(check.TINY, CPU), settings).draw()
    for phase in draws:
        draws[phase][0].noise[0] = torch.nan
    theirs, losses = rival(draws, settings), []
    theirs.read = losses.append
    theirs.step()
    assert len(losses) == 2
    assert all(map(torch.isfinite, losses))
    assert losses[0] != 0
    assert torch.isfinite(check.weights(theirs)).all()


def test_variants_are_timed_side_by_side_and_one_that_fails_is_a_row(small, tmp_path):
    out = tmp_path / "train.json"
    train.run(one_step(variants="published,no graphs,ours", out=str(out)), set())
    result = read(out)
    rows = {row["variant"]: row for row in result["rows"]}
    assert rows["no graphs"]["ms"] == {"p20": None, "p50": None, "p80": None}
    assert rows["no graphs"]["status"] == "RuntimeError: needs a GPU"
    ours, published = rows["ours"], rows["published"]
    assert ours["to_ours"] == 1
    assert published["to_ours"] == pytest.approx(published["ms"]["p50"] / ours["ms"]["p50"])
    assert ours["img_s"] == pytest.approx(2 * ours["it_s"])
    flop = 11 * 2 * train.forward_flop(check.TINY)
    assert ours["mfu"] == pytest.approx(flop * ours["it_s"] / 1e12)
    assert len(summary.training(result["rows"])) == 4


def test_a_step_is_broken_down_to_the_operations_that_it_runs(small, monkeypatch, tmp_path):
    path = tmp_path / "breakdown.json"
    breakdown.run(breakdown.Options(micro_batch=2, device="cpu", out=str(path)), set())
    rows = read(path)["rows"]
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
    # Two networks' gradients read, weights and moments read and written, and so one average.
    weights = sum(p.numel() for p in EDMNetwork(check.TINY).parameters())
    least = (2 * (4 + 8 + 8) + 8) * weights / 0.1e9
    assert least <= kinds["update"]["floor_ms"] < 1.2 * least


def test_16_bit_has_the_floor_of_the_fastest_product(small, monkeypatch, tmp_path):
    """Which on a CPU is float32's: bfloat16's may be emulated, and half as fast as what it runs."""
    rates = []
    monkeypatch.setattr(
        breakdown, "floors", lambda ops, *found: rates.append(found) or collections.Counter()
    )
    monkeypatch.setattr(breakdown.estimator, "steps", lambda *_: [Mock()])
    monkeypatch.setattr(breakdown, "STEPS", 1)
    path = tmp_path / "breakdown.json"
    options = breakdown.Options(precision="fp16", micro_batch=1, device="cpu", out=str(path))
    breakdown.run(options, set())
    assert rates == [(1.0, 0.1)]  # TFLOP/s, TB/s
    assert {row["precision"] for row in read(path)["rows"]} == {"fp16"}


def test_what_has_no_floor_is_not_broken_down(tmp_path):
    with pytest.raises(UserError, match=r"precision='tf32' cannot be .*bf16, fp16, fp32"):
        breakdown.run(breakdown.Options(precision="tf32", out=str(tmp_path / "b.json")), set())


def test_the_flop_of_a_forward_are_those_of_the_published_network():
    assert train.forward_flop(check.CIFAR10) == pytest.approx(42.38e9, rel=1e-3)


class Crowded:
    """A machine with room for two variants; "large" needs it all, and "too large" more."""

    alive: int = 0

    def __init__(self, variant, *_):
        need = {"large": 2, "too large": 3}.get(variant.kernels, 1)
        if Crowded.alive + need > 2:
            with annotate_oom("fake step, micro-batch 1 of 1"):  # as a Distiller says it
                raise torch.OutOfMemoryError("no room")
        Crowded.alive += need
        self.need, self.peak = need, [0.0, 0.0]

    def __call__(self):
        pass

    def __del__(self):
        Crowded.alive -= getattr(self, "need", 0)


def test_what_does_not_fit_beside_the_others_has_its_turn_after_them(monkeypatch, small, tmp_path):
    sizes = {"ours": 1, "a": 1, "b": 1, "large": 2, "too large": 3, "c": 1}
    monkeypatch.setattr(train, "Running", Crowded)
    monkeypatch.setattr(
        train, "VARIANTS", {name: train.Variant(kernels=name, options={}) for name in sizes}
    )
    monkeypatch.setattr(train, "ON_CPU", tuple(sizes))
    out = tmp_path / "train.json"
    train.run(one_step(variants=",".join(sizes), out=str(out)), set())
    rows = {row["variant"]: row for row in read(out)["rows"]}
    assert {n: row["status"] for n, row in rows.items()} == dict.fromkeys(sizes, "ok") | {
        "too large": "out of memory"
    }
    assert {n for n, row in rows.items() if row["to_ours"] is not None} == {"ours", "a", "b"}


def test_one_that_runs_out_of_memory_in_its_turn_ends_no_other(monkeypatch, small, tmp_path):
    class Growing(Crowded):
        def __call__(self):
            with annotate_oom("fake step, micro-batch 1 of 1"):
                raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(train, "Running", Growing)
    monkeypatch.setattr(train, "VARIANTS", {"ours": train.Variant(kernels="a", options={})})
    out = tmp_path / "train.json"
    train.run(one_step(variants="ours", out=str(out)), set())
    assert [row["status"] for row in read(out)["rows"]] == ["out of memory beside the others"]


def test_the_eager_norm_has_a_rival_in_its_own_layout():
    options = kernels.Options(kernel="group_norm", dtype="fp32")
    case = min(kernels.cases(options, CPU), key=lambda case: sum(case.nbytes))
    seen = {}
    for provider in ("eager", kernels.NCHW):
        form = case.forms[provider]
        case.forms[provider] = lambda *inputs, p=provider, f=form: [
            seen.update({p: inputs}),
            *f(*inputs),
        ][1:]
        for make in kernels.prepared(case, provider, CPU).values():
            make()()
            images = [v for v in seen[provider] if v.dim() == 4 and min(v.shape[1:]) > 1]
            assert images
            assert all(v.is_contiguous() == (provider == kernels.NCHW) for v in images)
            assert all(v.requires_grad for v in images)


@pytest.mark.parametrize(
    ("name", "backend", "tuned", "deterministic"),
    [
        ("default", describe(runs(torch.device("cuda"))), False, True),
        ("ours", "triton", False, True),
        ("cuDNN benchmark", "triton", True, True),
        ("cuDNN not deterministic", "triton", False, False),
        ("published", "eager", True, False),
        ("skilled graphs", "eager", True, False),
    ],
)
def test_a_variant_differs_in_what_its_name_says(name, backend, tuned, deterministic):
    running = object.__new__(train.Running)
    running.variant, running.device = train.VARIANTS[name], torch.device("cuda")
    with train.kernels.dispatch.forced("triton"), running.around():
        assert (
            train.kernels.dispatch.describe(train.kernels.dispatch.runs(running.device)) == backend
        )
        cudnn = torch.backends.cudnn
        assert (cudnn.benchmark, cudnn.deterministic) == (tuned, deterministic)
    assert running.variant.graphed == (name != "published")


def test_an_unknown_variant_is_refused(small, tmp_path):
    with pytest.raises(UserError, match="variants='faster' is unknown"):
        train.run(one_step(variants="ours,faster", out=str(tmp_path / "t.json")), set())


@pytest.mark.parametrize(
    ("command", "field", "value"),
    [
        (train, "turns", 0),
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
def test_help_is_shown_in_place_of_a_run(name):
    module = importlib.import_module(f"benchmarks.{name}")
    shown = CliRunner().invoke(module.main, ["--help"])
    assert shown.exit_code == 0
    assert f"python -m benchmarks.{name}" in shown.output


def test_a_result_goes_on_where_it_is_of_the_same_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("SID_FAST_COMMIT", "abc")
    row = {"name": "x", "found": 1.0, "bound": 2.0, "seconds": 0.1, "note": "", "status": "pass"}
    path = tmp_path / "check.json"
    Record(path, "check").add(**row)
    record = Record(path, "check", append=True)
    record.add(**row | {"name": "y"})
    record.add(**row | {"found": 3.0})
    assert [(r["name"], r["found"]) for r in read(path)["rows"]] == [("y", 1.0), ("x", 3.0)]
    assert read(path)["commit"] == "abc"
    monkeypatch.setenv("SID_FAST_COMMIT", "abd")
    with pytest.raises(UserError, match="is of commit abc, not abd"):
        Record(path, "check", append=True)
    monkeypatch.setenv("SID_FAST_COMMIT", "abc")
    with pytest.raises(UserError, match=r"of device .*, not another one"):
        Record(path, "check", device="another one", append=True)


def test_checks_pass_fail_and_say_why_not(monkeypatch, tmp_path):
    def broken(here):
        raise ValueError("as it\nis")

    checks = {
        "resume": check.resumes,
        "worse": lambda here: (2.0, 1.0, "by far"),
        "nan": lambda here: (float("nan"), 1.0, ""),
        "gpu": check.replays_draws,
        "broken": broken,
    }
    monkeypatch.setattr(check, "CHECKS", checks)
    out = tmp_path / "check.json"
    with pytest.raises(RunFailed, match="3 of 5 checks failed: worse, nan, broken"):
        check.run(check.Options(steps=1, device="cpu", out=str(out)), set())
    rows = {row["name"]: row for row in read(out)["rows"]}
    assert {n: row["status"] for n, row in rows.items()} == {
        "resume": "pass", "worse": "fail", "nan": "fail", "gpu": "skip", "broken": "error"
    }  # fmt: skip
    assert rows["broken"]["note"] == "ValueError: as it is"
    assert summary.checks(list(rows.values()))[0] == "1 pass, 2 fail, 1 error, 1 skip"


def test_the_check_of_a_resumed_run_sees_what_was_not_restored(monkeypatch):
    state_dict = Distiller.state_dict

    def forgetful(self):
        found = state_dict(self).items()
        return {k: v for k, v in found if not k.startswith("fake_score.exp_avg_sq")}

    monkeypatch.setattr(Distiller, "state_dict", forgetful)
    found, bound, _ = check.resumes(check.Here(CPU, 1))
    assert found > bound


def test_nan_is_the_worst_of_errors():
    assert check.worst([0.1, 0.2]) == 0.2
    assert check.worst([0.1, float("nan")]) == check.worst([float("nan"), 0.1]) == float("inf")


@pytest.mark.parametrize("off", ["fake", "generator"])
def test_the_check_of_gradients_sees_both_networks(off, monkeypatch):
    backward = Distiller.backward

    def wrong(self, phase, inputs, **which):
        found = backward(self, phase, inputs, **which)
        if phase.name == off and self.settings.precision == "fp16":
            net = self.method.networks[phase.network]
            for p in net.parameters():
                p.grad *= 1.5
        return found

    monkeypatch.setattr(Distiller, "backward", wrong)
    found, bound, note = check.stays_close(check.Here(CPU, 1), "fp16")
    assert found == pytest.approx(0.5, abs=0.05)
    assert found > bound
    assert "nan" not in note


@pytest.fixture
def smaller(monkeypatch):
    """A network that the interpreter runs in seconds."""
    config = dataclasses.replace(check.TINY, resolution=4, channel_mult=(1,), dropout=0.13)
    monkeypatch.setattr(check, "TINY", config)
    return config


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("factors", [(1.0, 1.0), (1.1, 1.1), (1.05, 0.95)], ids=str)
def test_the_check_of_a_network_sees_norms_that_are_off(smaller, monkeypatch, kind, factors):
    """All channels or every other; with dropout, whose masks the two forms draw each for itself."""

    def off(*args, **more):
        out = original(*args, **more)
        by = torch.tensor(factors).repeat(out.y.shape[1] // 2)[:, None, None].to(out.y.dtype)
        return out._replace(y=out.y * by) if choose("group_norm", CPU) == "triton" else out

    original = layers.kernels.group_norm
    monkeypatch.setattr(layers.kernels, "group_norm", off)
    found, bound, note = check.network_agrees(check.Here(CPU, 1), smaller, kind)
    assert (found <= bound) == (factors == (1, 1)), note


def test_an_error_and_a_scale_are_each_seen_alone():
    """A scale may hide in the noise of 16 bit, and an error have none."""
    rng = torch.Generator().manual_seed(0)
    expected, noise, other = torch.randn(3, 10**5, generator=rng, dtype=torch.float64)
    eager = expected + 0.03 * noise
    usual, scaled, worse = (
        check.within(ours, eager, expected, "bf16")[:2]
        for ours in (expected + 0.03 * other, 1.015 * eager, expected + 0.06 * other)
    )
    assert max(usual) < 1
    assert scaled[0] < 1 < scaled[1]
    assert worse[1] < 1 < worse[0]
    # In float32 eager is what is expected: an error of its own excuses nothing.
    assert check.within(eager, eager, expected, "fp32")[0] > 1


def test_the_checks_are_made_for_what_a_user_gets_first(monkeypatch):
    """Each that takes steps with every backend; one that is a backend's default is not twice."""
    everything = ["default", "eager", "triton"]
    assert list(check.backends()) == everything
    with check.dispatch.forced("triton"):
        assert list(check.backends()) == everything, "whatever is forced just now"
    monkeypatch.setattr(check.dispatch, "runs", lambda device: {"block": "triton"})
    assert list(check.backends()) == ["default", "eager"]
    names = list(check.CHECKS)
    for name in ("trial", "graph fp32", "no waiting, graphs", "resume", "golden adm_cond"):
        assert names.index(f"default: {name}") < names.index(f"triton: {name}")
    assert all(name.startswith("default: ") for name in names[:11])
    seen = []
    monkeypatch.setattr(check, "BACKENDS", {"default": None, "triton": "triton"})
    for each in check.for_each({"x": lambda here: seen.append(here.backend)}).values():
        each(check.Here(CPU, 1))
    assert seen == ["default", "triton"]


def test_a_step_that_would_be_interpreted_is_left_out():
    with check.Here(CPU, 1).forced():
        pass
    with pytest.raises(check.Skipped, match="interpreter"), check.Here(CPU, 1, "triton").forced():
        pass


def test_an_evaluation_is_kept_stage_by_stage(monkeypatch, tmp_path):
    """The readers in turns, and whatever is done when it is cut off."""
    order = []

    def read_plainly(data, indices, device, kind):
        order.append(kind)
        return readers.read(data, indices, device)

    def feed_plainly(*arguments, resident, reader):
        return ImageFeed(*arguments, resident=resident, reader="plain")

    def cut_off(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "SMALL", check.TINY)
    monkeypatch.setattr(evaluation, "choose", lambda: "dali")
    monkeypatch.setattr(evaluation, "read", read_plainly)
    monkeypatch.setattr(evaluation.references, "read", read_plainly)
    monkeypatch.setattr(evaluation, "ImageFeed", feed_plainly)
    out = tmp_path / "evaluation.json"
    options = evaluation.Options(images=20, rounds=2, device="cpu", out=str(out))
    evaluation.run(options, set())
    assert order == ["dali", "plain"] * 2 + ["dali"] * 2
    rows = {(row["stage"], row["variant"]): row for row in read(out)["rows"]}
    parts = {"images", "detector", "moments"}
    assert set(rows) >= {(part, of) for part in parts for of in ("reference", "generated")}
    assert ("Fréchet distance", "comparison") in rows
    for way in ("resident", "dali", "plain"):
        assert rows["feed", way]["over_plain"] > 0
        assert 0 <= rows["fed step", way]["wait_share"] <= 1
    assert rows["fed step", "resident"]["wait_share"] == 0
    dali, plain = (rows["reading", kind] for kind in ("dali", "plain"))
    assert plain["over_plain"] == 1
    assert dali["over_plain"] > 0
    for row in rows.values():
        if row["variant"] == "comparison":
            assert row["images"] is None
            assert row["img_s"] is None
            continue
        assert row["images"] == 20
        assert row["img_s"] == pytest.approx(2e4 / row["ms"]["p50"])
    shown = summary.evaluated([dali, *(row for row in rows.values() if row["img_s"] is None)])
    assert shown[1].endswith(f"{dali['over_plain']:.2f}")
    shown_wait = summary.evaluated([rows["fed step", "resident"]])
    assert shown_wait[1].endswith(" 0%")
    assert shown[2].startswith("Fréchet")
    monkeypatch.setattr(evaluation, "compare", cut_off)
    with pytest.raises(KeyboardInterrupt):
        evaluation.run(options, set())
    assert len(read(out)["rows"]) == 2 + 3 + 3 + 3 + 3


def test_the_ratio_of_the_readers_is_of_the_same_turn(monkeypatch, tmp_path):
    """A machine that slows down from turn to turn has no part in it."""
    times = {"dali": [(1.0, 0), (10.0, 0), (100.0, 0)], "plain": [(3.0, 0), (10.0, 0), (200.0, 0)]}
    monkeypatch.setattr(evaluation.measure, "in_turns", lambda *_: times)
    bench = evaluation.Bench(Record(tmp_path / "e.json", "evaluation"), CPU, 3)
    bench.readers(range(100), "dali")
    dali, plain = read(tmp_path / "e.json")["rows"]
    assert (dali["over_plain"], plain["over_plain"]) == (2, 1)
    assert dali["img_s"] == pytest.approx(100 / 10e-3)
