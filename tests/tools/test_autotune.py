"""Tuning: planted candidates are named while the rest goes on; verdicts are kept, agreed, taken."""

import ctypes
import dataclasses
import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from sid_fast import Settings, SiDASettings, losses, tune
from sid_fast.config.types import PretrainSettings
from sid_fast.kernels import dispatch
from sid_fast.kernels.group_norm import op as group_norm
from sid_fast.methods.sid import SiD
from sid_fast.models import EDM2Config
from sid_fast.models.registry import save_network
from sid_fast.tools import autotune, candidates, proof, tournament, trial, verdicts
from sid_fast.tools.candidates import Candidate
from sid_fast.tools.isolation import Failed
from sid_fast.tools.proof import Job
from sid_fast.tools.tournament import Row, Tournament, Turn
from sid_fast.training.step import Trainer
from tests.helpers.networks import SMALL, TINY, small_teacher
from tests.helpers.processes import TORCHRUN, python

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SETTINGS = Settings(batch_size=4, dropout=0.2, augment_p=0.3)
JOB = Job(SMALL, SETTINGS, "cpu")
TINY_JOB = dataclasses.replace(JOB, network=TINY)
SIDA = dataclasses.replace(
    JOB, settings=SiDASettings(batch_size=8, adversarial_group=2, dropout=0.2, augment_p=0.3)
)
EDM = dataclasses.replace(JOB, settings=PretrainSettings(batch_size=4, dropout=0.2, augment_p=0.3))
LOST: list[torch.Tensor] = []


@dataclasses.dataclass(frozen=True)
class Planted(Candidate):
    """One with a fault, which shows wherever it is applied."""

    fault: str = ""

    def apply(self, kernels, device):
        super().apply(kernels, device)
        if self.fault:
            globals()[self.fault.split()[0]](*self.fault.split()[1:])


def crash():
    ctypes.string_at(0)


def hang():
    time.sleep(3600)


def scale():
    loss = SiD.generator_loss

    def scaled(self, draw):  # the loss is right, its gradient 2 % too large
        found = loss(self, draw)
        return found._replace(loss=found.loss + 0.02 * (found.loss - found.loss.detach()))

    SiD.generator_loss = scaled


def leak():
    if (run := Trainer.run).__name__ == "leaking":
        return

    def leaking(self, inputs=None):
        LOST.append(torch.ones(2**20))
        return run(self, inputs)

    Trainer.run = leaking


def full(folder):
    """No memory while another candidate holds some: the first time, here."""
    prepare = trial.Trial.prepare

    def once(self):
        if not (mark := Path(folder) / "seen").exists():
            mark.touch()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried …")
        return prepare(self)

    trial.Trial.prepare = once


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SID_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def planted(monkeypatch):
    """Run a tuner whose candidates have such faults, and one that is right at the end."""
    monkeypatch.setattr(tournament, "Candidate", Planted)
    monkeypatch.setattr(tournament, "COMPILE_LIMIT", 5)

    def run(**faults):
        said: list[str] = []
        # What compiles has a limit of its own: the one that hangs need not be waited for so long.
        changes = [
            (name, {"fault": fault, "compile": fault == "hang"}) for name, fault in faults.items()
        ]
        changes.append(("honest", {"channels_last": True, "fault": "", "compile": False}))
        rows = Tournament(TINY_JOB, 600, 0, said.append).run(lambda *_: changes)
        return {row.name: row for row in rows}, said

    return run


@pytest.mark.slow
def test_planted_candidates_are_named_and_the_rest_goes_on(planted):
    rows, said = planted(crash="crash", hang="hang", scale="scale", leak="leak")
    assert rows["crash"].wrong == "ended by SIGSEGV"
    assert rows["hang"].wrong == "did not end in 5 s"
    assert "generator gradients" in rows["scale"].wrong
    assert "+2.0% in scale" in rows["scale"].wrong
    assert rows["leak"].wrong.startswith("leaks 4.0 MiB")
    for name in ("eager", "honest"):
        assert rows[name].wrong == ""
        assert rows[name].img_s > 0
        assert rows[name].gib > 0
    assert tournament.best(list(rows.values())).name in ("eager", "honest")
    assert [line.split()[0] for line in said] == [row.split()[0] for row in rows]
    assert "img/s" in said[0]
    assert "right" in said[-1]


@pytest.mark.slow
def test_two_that_do_not_fit_together_run_one_after_the_other(planted, tmp_path):
    rows, _ = planted(large=f"full {tmp_path}")
    assert (tmp_path / "seen").exists()
    assert rows["large"].wrong == ""
    assert rows["large"].ms > 0
    assert rows["honest"].wrong == "", "the champion is there again"


class Fake:
    """A runner without a child."""

    def __init__(self, ms, images=4, reference_ms=1.0, in_use=()):
        self.row, self.images = Row("fake", Candidate({}), images=images), images
        used = [*in_use, *[0] * 9]
        self.all = [Turn(1, v, reference_ms, 2**30, u) for v, u in zip(ms, used, strict=False)]
        self.turns = []

    def turn(self):
        self.turns.append(self.all[len(self.turns)])

    times, note, leak = tournament.Runner.times, tournament.Runner.note, tournament.Runner.leak


@pytest.mark.parametrize(
    ("champion", "challenger", "wins"),
    [
        (Fake([10, 11, 10]), Fake([8, 9, 8]), True),
        (Fake([10, 14, 8]), Fake([9, 9, 9]), False),  # within what the one varies by
        (Fake([10, 10, 10]), Fake([8, 9, 12]), False),  # or the other
        (Fake([10, 10, 10]), Fake([19, 19, 19], images=8), True),  # a micro-batch of its own
        (Fake([10, 10, 10]), Fake([8, 8, 8], in_use=(0, 2**20, 2**21)), False),  # a leak
        (Fake([10, 10, 10]), Fake([8, 8, 8], in_use=(0, 2**20, 2**20)), True),
    ],
)
def test_a_challenger_wins_beyond_the_spread(champion, challenger, wins):
    tuner = Tournament(JOB, 600, 0, print)
    tuner.champion = champion
    tuner._turns([champion, challenger])
    assert tuner._wins(challenger, alone=False) == wins
    assert challenger.row.gib == 1
    tuner.memory = 1.1 * 2**30  # of which the step leaves no room
    again = Fake([8, 8, 8])
    tuner._turns([again])
    assert not tuner._wins(again, alone=False)
    assert "1.0 of 1.1 GiB" in again.row.wrong


def test_defaults_win_unless_they_are_slower_beyond_the_spread():
    usual = {"group_norm": "cuda", "adam_ema": "cuda"}
    eager = candidate()
    tuner = Tournament(JOB, 600, 0, print)

    def wins(ms, **changes):
        tuner.champion, challenger = Fake([10, 11, 12]), Fake(ms)
        tuner.champion.row.candidate, challenger.row.candidate = eager, eager.changed(**changes)
        tuner._turns([tuner.champion, challenger])
        return tuner._wins(challenger, alone=False)

    assert wins([10, 11, 12], kernels=usual)
    assert wins([11, 12, 13], kernels={"adam_ema": "cuda"})
    assert not wins([13, 14, 15], kernels=usual)
    assert not wins([10, 11, 12], kernels=usual, channels_last=True)
    assert not wins([10, 11, 12], kernels={"attention": "triton"})
    assert not wins([10, 11, 12])


def test_who_runs_alone_is_compared_by_the_reference_kernel():
    """On a machine that has become half as fast meanwhile."""
    tuner = Tournament(JOB, 600, 0, print)
    tuner.champion = Fake([10, 10, 10])
    challenger = Fake([16, 16, 16], reference_ms=2.0)
    for runner in (tuner.champion, challenger):
        tuner._turns([runner])
    assert tuner._wins(challenger, alone=True)
    assert not tuner._wins(challenger, alone=False)


def test_a_spent_budget_is_said_and_leaves_the_defaults(monkeypatch):
    base = Row("eager", Candidate({}), ms=1.0, images=4, gib=0.1, won=True)
    spent = Row("honest", Candidate({}, channels_last=True), tournament.NOT_TRIED)
    monkeypatch.setattr(Tournament, "run", lambda self: [base, spent])
    tuning = autotune.decide(JOB, "again", 1000, 0.01)
    assert tuning.candidate is None
    assert tuning.text == "not tuned: 0.01 min are too short for a verdict"
    assert not list(Path(os.environ["SID_FAST_CACHE"]).rglob("*.json"))


def test_an_operation_that_fails_alone_is_named_and_left_out(monkeypatch):
    found = [("group_norm", "cuda"), ("adam_ema", "cuda"), ("attention", "cuda")]
    monkeypatch.setattr(candidates, "operations", lambda job: found)

    class Alone:
        def __init__(self, make, job, one):
            self.kernels = one.kernels

        def ask(self, method, limit):
            assert method == "wrong_alone"

        def answer(self):
            if self.kernels["adam_ema"] == "cuda":
                raise Failed("ended by SIGSEGV")
            return "losses +2.0% in scale" if self.kernels["attention"] == "cuda" else ""

        def close(self):
            pass

    monkeypatch.setattr(tournament, "Child", Alone)
    said = []
    assert Tournament(JOB, 600, 0, said.append)._operations() == [("group_norm", "cuda")]
    assert [line.split() for line in said] == [
        ["C++", "adam_ema", "alone", "ended", "by", "SIGSEGV"],
        ["C++", "attention", "alone", "losses", "+2.0%", "in", "scale"],
    ]


def test_operations_are_proven_one_by_one_where_a_gpu_admits_one_process(monkeypatch):
    found = [("group_norm", "cuda"), ("adam_ema", "cuda")]
    monkeypatch.setattr(candidates, "operations", lambda job: found)
    monkeypatch.setattr(tournament.verdicts, "cores", lambda: 8)
    opened = []

    class Alone:
        def __init__(self, *_):
            opened.append(self)

        def ask(self, *_, limit):
            pass

        def answer(self):
            if len(opened) > 1:
                raise Failed("CUDA error: CUDA-capable device(s) is/are busy or unavailable")
            return ""

        def close(self):
            opened.remove(self)

    monkeypatch.setattr(tournament, "Child", Alone)
    assert Tournament(JOB, 600, 0, print)._operations() == found


# ---- proofs


def candidate(**changes):
    operations = (op for op in dispatch.OPERATIONS if op != "random")
    return Candidate(dict.fromkeys(operations, "eager")).changed(**changes)


def test_a_right_candidate_passes_all_proofs():
    assert proof.wrong(JOB, candidate(channels_last=True)) == ""


def bf16(job):
    return dataclasses.replace(job, settings=dataclasses.replace(job.settings, precision="bf16"))


@pytest.mark.slow
def test_a_right_candidate_passes_all_proofs_in_16_bit():
    cpp = {"adam_ema": "cuda"} if "cuda" in candidates.backends_of("adam_ema") else {}
    assert proof.wrong(bf16(JOB), candidate(kernels=cpp)) == ""


@pytest.mark.slow
@pytest.mark.parametrize("job", [JOB, SIDA])
def test_16_bit_proofs_take_a_more_exact_norm_and_no_wrong_scale(monkeypatch, job):
    """Its roundings are others than eager's; over too few pixels that looks like another scale."""
    norm, score = group_norm.group_norm_eager, losses.kernels.fake_score_loss
    ours = candidate(channels_last=True)

    def exact(x, *arguments, **named):
        out = norm(x.float(), *arguments, **named)
        values = {name: getattr(out, name) for name in ("y", "h", "h_for_skip", "resampled")}
        casts = {name: v if v is None else v.to(x.dtype) for name, v in values.items()}
        return out._replace(**casts)

    def planted(self, *arguments):
        function = exact if self.channels_last else norm
        monkeypatch.setattr(group_norm, "group_norm_eager", function)

    monkeypatch.setattr(Candidate, "apply", planted)
    assert proof.gradients_agree(bf16(job), ours) == ""

    def scaled(*arguments):  # its value is right, its gradient 2 % too large
        found = score(*arguments)
        return found._replace(loss=found.loss + 0.02 * (found.loss - found.loss.detach()))

    def wrong_scale(self, *arguments):
        planted(self, *arguments)
        function = scaled if self.channels_last else score
        monkeypatch.setattr(losses.kernels, "fake_score_loss", function)

    monkeypatch.setattr(Candidate, "apply", wrong_scale)
    assert re.match(r"fake gradients \+[12]\.\d% in scale", proof.gradients_agree(bf16(job), ours))


@pytest.mark.slow
@pytest.mark.parametrize("job", [SIDA, EDM])
def test_sida_and_teachers_are_proven_with_random_images_in_the_full_regime(job, monkeypatch):
    trainers, build = [], proof.build
    monkeypatch.setattr(
        proof, "build", lambda *a, **k: trainers.append(build(*a, **k)) or trainers[-1]
    )
    assert proof.wrong(job, candidate(channels_last=True)) == ""
    for trainer in trainers:
        assert all(phase.active(trainer.images) for phase in trainer.method.phases)
        images, labels = trainer.method.feed.take(trainer.counter, 4)
        assert images.float().std() > 50
        assert labels.sum(1).eq(1).all()


@pytest.mark.parametrize(
    ("function", "field", "words"),
    [
        ("sida_fake_score_loss", "discriminator", "fake discriminator gradients +2.0% in scale"),
        ("sida_fake_score_loss", "loss", "fake gradients +2.0% in scale"),
        ("sida_generator_loss", "adversarial", "generator adversarial gradients +2.0% in scale"),
        ("sida_generator_loss", "loss", "generator gradients +2.0% in scale"),
        ("fake_score_loss", "loss", "gradients +2.0% in scale"),
    ],
)
def test_each_term_is_proven_alone(monkeypatch, function, field, words):
    """In a sum, the larger term would hide an error in the other one."""
    right = getattr(losses, function)

    def scaled(*arguments):  # its value is right, its gradient 2 % too large
        found = right(*arguments)
        value = getattr(found, field)
        return found._replace(**{field: value + 0.02 * (value - value.detach())})

    def planted(self, *arguments):
        monkeypatch.setattr(losses, function, scaled if self.channels_last else right)

    monkeypatch.setattr(Candidate, "apply", planted)
    job = SIDA if "sida" in function else EDM
    assert proof.gradients_agree(job, candidate(channels_last=True)) == words


def test_an_optimizer_is_judged_by_given_gradients(monkeypatch):
    from sid_fast.training import optimizer

    adam_ema = optimizer.kernels.adam_ema

    def forgets(params, *lists, **named):  # the second moment's share of the step
        return adam_ema(params, *lists, **(named | {"beta2": 0.99}))

    ours = candidate(channels_last=True)

    def planted(self, *arguments):
        function = forgets if self.channels_last else adam_ema
        monkeypatch.setattr(optimizer.kernels, "adam_ema", function)

    monkeypatch.setattr(Candidate, "apply", planted)
    wrong = proof.update_agrees(JOB, ours)
    assert "update of fake_score.net" in wrong
    assert "update of generator.exp_avg_sq" in wrong


@pytest.mark.parametrize(("p", "scale", "words"), [(0.3, 1, "0.29"), (0.2, 1.1, "+10.0% in scale")])
def test_dropout_is_judged_by_its_share_and_scale(monkeypatch, p, scale, words):
    from sid_fast.kernels.group_norm import eager

    drop = eager.drop
    monkeypatch.setattr(eager, "drop", lambda y, _, seed: scale * drop(y, p, seed))
    wrong = proof.dropout_agrees(JOB, candidate())
    assert wrong.startswith("dropout")
    assert words in wrong


def test_a_noisy_type_is_measured_by_eager_of_that_type():
    exact = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(10_000, generator=torch.Generator().manual_seed(1))
    noise -= noise @ exact / (exact @ exact) * exact

    def disagreement(*values):
        return proof.disagreement(*(list(v.split(len(v) // 2)) for v in values))

    assert disagreement(exact + 0.014 * noise, exact + 0.01 * noise, exact) == ""
    assert "off by" in disagreement(exact + 0.016 * noise, exact + 0.01 * noise, exact)
    assert "off by" in disagreement(exact + 2e-4 * noise, exact, exact)
    assert disagreement(1.004 * exact + 0.01 * noise, exact + 0.01 * noise, exact) == ""
    assert "+0.6%" in disagreement(1.006 * exact + 0.01 * noise, exact + 0.01 * noise, exact)
    # The scale of eager's own gradients may be off by more: bfloat16 statistics of a norm, say.
    assert disagreement(exact + 0.01 * noise, 1.01 * exact + 0.01 * noise, exact) == ""
    few = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert "+2.0%" in disagreement(few * 1.02, few, few)
    assert disagreement(exact * torch.nan, exact, exact)


def test_a_large_network_is_proven_with_fewer_blocks():
    """Several copies of its weights would not fit, and every candidate count as wrong."""
    large = dataclasses.replace(JOB, network=EDM2Config.of_size("m"))
    assert proof.manageable(large).network == EDM2Config.of_size("m", num_blocks=1)
    small = dataclasses.replace(JOB, network=EDM2Config.of_size("s"))
    assert proof.manageable(small) is small


# ---- the short list


def test_the_short_list_of_a_gpu_begins_with_what_is_safest():
    job = Job(SMALL, dataclasses.replace(SETTINGS, batch_size=256), "cuda:0")
    proven = list(candidates.operations(unaugmented(job)))
    assert ("augment", "triton") not in proven, "there is nothing to augment"
    assert ("augment", "triton") in candidates.operations(job)
    assert {"random", "sida_loss"}.isdisjoint(op for op, _ in proven)
    assert ("group_norm", "cuda") not in proven, "the library has it for a CPU alone"
    sida = dataclasses.replace(SIDA, device="cuda:0")
    assert ("sida_loss", "triton") in candidates.operations(sida)
    base = candidate(channels_last=True, micro_batch=64)
    names = [name for name, _ in candidates.shortlist(job, base, proven)]
    assert names[:2] == ["CUDA graphs", "defaults"]
    assert names.index("group_norm triton") < names.index("fused block")
    assert names[-4:] == ["cuDNN search", "micro-batch 128", "micro-batch 256", "compiled blocks"]
    proven.remove(("attention", "triton"))
    assert "fused block" not in [name for name, _ in candidates.shortlist(job, base, proven)]
    pinned = dataclasses.replace(job, pinned=frozenset({"cuda_graph", "micro_batch", "compile"}))
    names = [name for name, _ in candidates.shortlist(pinned, base, [])]
    assert names == ["channels-first", "cuDNN search"]
    bits = dataclasses.replace(pinned, deterministic=True)  # cuDNN would choose by timing
    assert [name for name, _ in candidates.shortlist(bits, base, [])] == ["channels-first"]
    left = candidates.open_operations("group_norm=eager,adam_ema=triton", CUDA)
    assert {"group_norm", "adam_ema", "random"} == set(dispatch.OPERATIONS) - set(left)
    # Its filter fits no norm's write.
    ncsnpp = dataclasses.replace(job, network=dataclasses.replace(SMALL, architecture="ncsnpp"))
    assert "block" not in dict(candidates.operations(ncsnpp))


def unaugmented(job):
    return dataclasses.replace(job, settings=dataclasses.replace(job.settings, augment_p=0.0))


def test_micro_batches_of_sida_hold_whole_groups(monkeypatch):
    settings = SiDASettings(batch_size=768, adversarial_group=96)
    job = dataclasses.replace(SIDA, settings=settings, device="cuda:0")
    names = [n for n, _ in candidates.shortlist(job, candidate(micro_batch=96), [])]
    assert [n for n in names if "micro" in n] == ["micro-batch 192", "micro-batch 384",
                                                  "micro-batch 768"]  # fmt: skip
    tried = []

    def full(self):
        tried.append(self.row.candidate.micro_batch)
        raise Failed("out of memory")

    monkeypatch.setattr(tournament.Runner, "prepare", full)
    assert Tournament(job, 1, 0, print)._base() is None
    assert tried == [96], "the smallest, where a group is larger than 64 images"


def test_a_cpu_has_no_cuda_in_its_names(monkeypatch):
    """And its default operations are tried together, as each may gain less than steps vary by."""
    monkeypatch.setattr(candidates, "backends_of", lambda op: ["eager", "cuda"])
    monkeypatch.setattr(candidates, "open_operations", lambda *_: ["group_norm", "adam_ema"])
    proven = list(candidates.operations(JOB))
    assert proven == [("group_norm", "cuda"), ("adam_ema", "cuda")]
    names = [name for name, _ in candidates.shortlist(JOB, candidate(), proven)]
    assert names[:4] == ["defaults", "C++ group_norm", "C++ adam_ema", "channels-last"]
    _, change = candidates.shortlist(JOB, candidate(), proven)[0]
    both = candidate().changed(**change)
    assert both.text("cpu") == "C++ group_norm, C++ adam_ema"
    assert both.text("cuda:0") == "group_norm cuda, adam_ema cuda"
    names = [name for name, _ in candidates.shortlist(JOB, candidate(), proven[1:])]
    assert names[:2] == ["C++ adam_ema", "channels-last"]


def test_a_candidate_comes_back_from_its_words():
    given = candidate(cuda_graph=True, kernels={"group_norm": "triton"}, micro_batch=32)
    row = Row("a", given, ms=1.0, images=4, gib=0.1, won=True)
    assert Row.from_json(json.loads(json.dumps(row.to_json()))) == row
    for wrong in (
        {"kernels": {"group_norm": "magic"}},
        {"kernels": {}, "cuda_graph": "yes"},
        {},
        7,
    ):
        with pytest.raises(ValueError, match=r".+"):
            candidates.from_json(wrong)


# ---- verdicts


@pytest.fixture
def tuned(monkeypatch):
    """decide(...) with a tuner that takes no time and finds channels-last right and fast."""
    runs = []

    def run(self, *_):
        runs.append(self.left)
        base = Row("eager", candidate(), ms=2.0, images=4, gib=0.1, won=True)
        return [base, Row("channels-last", FAST_ONE, ms=1.0, images=4, gib=0.1, won=True)]

    monkeypatch.setattr(Tournament, "run", run)

    def decide(mode="auto", kimg=1e6, minutes=None, saved=None, **changes):
        return autotune.decide(dataclasses.replace(JOB, **changes), mode, kimg, minutes, saved)

    decide.runs = runs
    return decide


FAST_ONE = candidate(channels_last=True)


def test_a_verdict_is_kept_for_the_same_machine_and_job(tuned):
    assert tuned("auto").candidate is None, "on a CPU auto makes none"
    made = tuned("again")
    assert made.candidate == FAST_ONE
    assert made.text == "tuned: channels-last (2.00 times eager)".replace(
        "channels-last", FAST_ONE.text("cpu")
    )
    kept = tuned("auto")
    assert (kept.candidate, len(tuned.runs)) == (FAST_ONE, 1)
    assert kept.text.endswith(", kept)")
    assert kept.rows == made.rows
    other = dataclasses.replace(SETTINGS, dropout=0.1)
    assert tuned("auto", settings=other).candidate is None
    assert tuned("auto", deterministic=True).candidate is None
    assert tuned("auto", kernels="adam_ema=eager").candidate is None
    assert tuned("auto", settings=EDM.settings).candidate is None
    assert tuned("auto", pinned=frozenset({"compile"}), compile=True).candidate is None
    tuned("again")
    assert len(tuned.runs) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "damaged"),
        ('{"key": 1, "rows": []}', "another machine"),
        ("[]", "damaged"),
        (None, "damaged"),
    ],
)
def test_a_damaged_or_foreign_verdict_is_made_anew_with_a_note(tuned, text, words):
    tuned("again")
    (file,) = Path(os.environ["SID_FAST_CACHE"]).rglob("*.json")
    whole = file.read_text()
    file.write_text(whole.replace('"eager"', '"magic"') if text is None else text)
    found = tuned("auto")
    assert found.candidate is None
    (note,) = found.notes
    assert words in note
    assert str(file) in note
    tuned("again")
    assert file.read_text() == whole


def test_a_verdict_that_cannot_be_written_is_taken_all_the_same(tuned, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SID_FAST_CACHE", str(tmp_path / "file"))
    found = tuned("again")
    assert found.candidate == FAST_ONE
    (note,) = found.notes
    assert "not kept" in note
    assert "set SID_FAST_CACHE" in note
    assert str(tmp_path / "file") in note


def test_the_budget_goes_by_the_length_of_the_run(tuned, monkeypatch):
    gpu = {"device": "H100", "memory": 80 * 2**30, "tflops": 600.0, "capability": "9.0"}
    monkeypatch.setattr(autotune, "inspect", lambda job: gpu)
    seconds = autotune.run_seconds(JOB, 1.0, gpu)  # of a thousand images
    for minutes, expected in ((30, None), (60, 2), (500, 5), (5000, 10)):
        found = tuned("auto", kimg=60 * minutes / seconds, device="cuda:0")
        if expected is None:
            assert found.candidate is None
            assert found.text == "not tuned: the run is estimated at 30 min"
        else:
            assert tuned.runs[-1] == pytest.approx(60 * expected)
            verdicts.place(verdicts.key(dataclasses.replace(JOB, device="cuda:0"), gpu)).unlink()
    tuned("again", kimg=60 * 5000 / seconds, minutes=0.5, device="cuda:0")
    assert tuned.runs[-1] == 30


def test_a_resumed_run_takes_the_verdict_of_its_state(tuned):
    state = json.loads(json.dumps(tuned("again").to_json()))
    for path in Path(os.environ["SID_FAST_CACHE"]).rglob("*.json"):
        path.unlink()
    found = tuned("auto", saved=state)
    assert found.candidate == FAST_ONE
    assert found.text.endswith(", of the state)")
    first = state | {"candidate": state["rows"][0]["candidate"]}  # as several nodes had agreed
    assert tuned("auto", saved=first).candidate == candidate()
    # What the command line has decided since then.
    found = tuned("auto", saved=state, kernels="adam_ema=eager")
    assert found.candidate is None
    assert "another --kernels, not adam_ema=eager" in found.notes[0]
    large = candidate(micro_batch=2, cudnn_search=True, compile=True)
    rows = [*state["rows"], Row("large", large, ms=1.0, images=4, gib=0.1, won=True).to_json()]
    state["candidate"], state["rows"] = dataclasses.asdict(large), rows
    assert tuned("auto", saved=state).candidate == large
    pinned = frozenset({"micro_batch", "compile"})
    found = tuned("auto", saved=state, pinned=pinned, deterministic=True)
    assert found.candidate == candidate()
    found = tuned("auto", saved=state, ranks=4)
    assert found.candidate is None
    assert "micro-batch of 2 does not divide the 1 images" in found.notes[0]
    elsewhere = state | {"machine": state["machine"] | {"device": "Tesla T4"}}
    found = tuned("auto", saved=elsewhere)
    assert found.candidate is None
    assert "Tesla T4" in found.notes[0]
    tuned("again")
    assert tuned("auto", saved={"candidate": None}).candidate is None, "it was not tuned"


def test_a_gpu_that_cannot_be_used_well_is_said_with_the_figure(monkeypatch):
    gpu = {"free": 60 * 2**30, "memory": 80 * 2**30, "capability": "7.0", "precision": "fp32"}
    busy, type_ = autotune.notes_on(gpu, "auto")
    assert "20.0 of 80.0 GiB" in busy
    assert "7.0" in type_
    assert "--precision fp16" in type_
    assert autotune.notes_on(gpu | {"free": 79 * 2**30}, "fp16") == []

    def nothing_fits(self, method, *arguments, limit):
        raise Failed("out of memory")

    monkeypatch.setattr(autotune, "inspect", lambda job: gpu | {"device": "T4", "tflops": 1.0})
    monkeypatch.setattr(tournament.Child, "call", nothing_fits)
    monkeypatch.setattr(Tournament, "_operations", lambda self: [])
    small = dataclasses.replace(JOB, device="cuda:0")
    found = autotune.decide(small, "again", 1e6, 2, None, said := [].append)
    assert said
    assert found.candidate is None
    assert "out of memory, 80.0 GiB" in found.text
    assert [row.candidate.micro_batch for row in found.rows] == [4, 2, 1]


def test_one_verdict_of_several_nodes_is_right_on_all():
    def rows(*named):
        return [
            Row(name, candidate(**change), wrong, ms=None if wrong else 1.0, images=4, won=won)
            for name, change, wrong, won in named
        ]

    eager = ("eager", {}, "", True)
    norm = ("channels-last", {"channels_last": True}, "", True)
    both = ("both", {"channels_last": True, "cuda_graph": True}, "", True)
    broken = ("both", {"channels_last": True, "cuda_graph": True}, "ended by SIGSEGV", False)
    slower = ("channels-last", {"channels_last": True}, "", False)
    assert autotune.agreed([rows(eager, norm, both)] * 2).name == "both"
    assert autotune.agreed([rows(eager, norm, both), rows(eager, norm, broken)]).name == (
        "channels-last"
    )
    assert autotune.agreed([rows(eager, norm), rows(eager, slower)]).name == "channels-last"
    assert autotune.agreed([rows(eager, norm), []]) is None


def ranks(out):
    """A rank that is a node of its own; on the second one, a candidate is planted wrong."""
    from sid_fast.performance import process_group

    rank = int(os.environ["RANK"])
    os.environ["LOCAL_RANK"] = "0"
    tournament.Candidate = Planted
    tournament.Tournament._operations = lambda self: []
    changes = [("honest", {"channels_last": True}), ("bad", {"threads": 1})]
    run = Tournament.run

    def with_planted(self):
        rows = run(self, lambda *_: changes)
        for row in rows:
            row.won = not row.wrong  # whatever their times: what counts here is what is right
        return rows

    Tournament.run = with_planted
    if rank == 1:
        proof_of, wrong = trial.Trial.wrong, "planted"
        tournament.Runner.wrong = lambda self: (
            wrong if self.row.name == "bad" else self.child.call("wrong", limit=self.limit)
        )
        assert proof_of
    with process_group.joined(CPU, "ddp", 10, "tuning"):
        tuning = autotune.decide(TINY_JOB, "again", 1.0, 10)
    with process_group.joined(CPU, "ddp", 10):
        texts = process_group.gather_objects(tuning.to_json() | {"notes": tuning.notes})
    if rank == 0:
        Path(out).write_text(json.dumps(texts))


@pytest.mark.slow
def test_two_ranks_with_one_failing_candidate_end_on_one_verdict(tmp_path):
    done = python(*TORCHRUN, 2, __file__, tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    one, other = json.loads((tmp_path / "out.json").read_text())
    assert one["candidate"] == other["candidate"]
    assert one["candidate"]["channels_last"]
    assert one["candidate"]["threads"] is None
    assert "bad is not right on every node" in one["notes"][0]


# ---- the commands


NETWORK = ["--model-channels", 16, "--channel-mult", "1", "--num-blocks", 1]
COMMANDS = {  # command and its options; of tune, too
    "sid": ("train", ["--teacher", "teacher.safetensors"], []),
    "sida": (
        "train",
        ["--teacher", "teacher.safetensors", "--method", "sida", "--adversarial-group", 2],
        ["--data", "digits"],
    ),
    "edm": ("pretrain", ["--data", "digits", *NETWORK], []),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", COMMANDS)
def test_the_command_writes_its_table_and_a_run_takes_its_verdict(
    method, tmp_path, monkeypatch, run_command
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Tournament, "_wins", wins)
    save_network(tmp_path / "teacher.safetensors", small_teacher(TINY))
    command, arguments, more = COMMANDS[method]
    arguments = [*arguments, "--batch-size", 4, "--kernels", "adam_ema=eager,group_norm=eager"]
    tune = ["pretrain"] * (command == "pretrain") + arguments
    status, error = run_command("tune", *tune, "--json", "tune.json")
    assert (status, error) == (0, "")
    table = json.loads((tmp_path / "tune.json").read_text())
    assert [row["name"] for row in table["rows"]] == ["eager", "channels-last"]
    assert table["candidate"]["channels_last"]
    assert "adam_ema" not in table["candidate"]["kernels"]
    run = [*arguments, *more, "--kimg", 0.008, "--state-every", 0.004]
    assert run_command(command, *run, "--out", "kept", "--kimg", 0.004) == (0, "")
    config = json.loads((tmp_path / "kept" / "config.json").read_text())
    assert config["tuning"]["candidate"] == table["candidate"]
    assert config["tuning"]["text"].endswith(", kept)")
    if method != "sid":  # the rest is the same
        return
    assert run_command(command, *run, "--out", "run", "--tune", "again") == (0, "")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["tuning"]["text"].endswith(" times eager)")
    state = sorted((tmp_path / "run").glob("state-*"))[0]
    header = json.loads((state / "state.json").read_text())
    assert header["tuning"] == config["tuning"]
    for path in (tmp_path / "cache").rglob("*.json"):
        path.unlink()
    assert run_command(command, "--resume", "run", "--kimg", 0.012) == (0, "")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["tuning"]["text"].endswith(", of the state)")
    assert run_command(command, *run, "--out", "off", "--tune", "off") == (0, "")
    config = json.loads((tmp_path / "off" / "config.json").read_text())
    assert config["tuning"]["candidate"] is None


def wins(tournament, challenger, alone):
    challenger.note()
    return True


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--teacher"]),
        (["--teacher", "none.pkl"], ["none.pkl"]),
        (["--preset", "digits", "--tune-minutes", "0"], ["tune_minutes=0"]),
        (["--preset", "digits", "--json", "none/there/x.json/"], ["x.json"]),
        (["--preset", "digits", "--kernels", "magic"], ["magic", "eager"]),
        (["--preset", "digits", "--device", "cuda:7"], ["cuda:7"]),
        (["--preset", "digits", "--micro-batch", "7"], ["batch_size=128", "126"]),
        (["--preset", "digits-sida", "--micro-batch", "16"], ["adversarial_group=32", "32"]),
        (["--preset", "digits", "--adversarial-group", "8"], ["adversarial_group=8", "sida"]),
        (["pretrain"], ["--data"]),
        (["pretrain", "--data", "none.zip"], ["none.zip"]),
        (["pretrain", "--preset", "digits", "--batch-size", "0"], ["batch_size=0"]),
        (["pretrain", "--preset", "cifar10-uncond"], ["cifar10-uncond", "digits"]),
        (["pretrain", "--data", "digits", "--channel-mult", "1,2,2,2,2"], ["resolution=8"]),
        (["--tune-minutes", "1", "pretrain", "--preset", "digits"], ["--tune-minutes", "pretrain"]),
    ],
)
def test_tune_refuses(run_command, monkeypatch, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none").touch()
    status, error = run_command("tune", *arguments)
    assert status == 2
    assert error.strip().count("\n") == 0
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    ("command", "config"), [([], tune.TuneConfig), (["pretrain"], tune.TunePretrainConfig)]
)
def test_help_explains_every_option(command, config):
    text = CliRunner().invoke(tune.main, [*command, "--help"]).output
    for field in dataclasses.fields(config):
        assert f"--{field.name.replace('_', '-')} " in text


if __name__ == "__main__":
    ranks(sys.argv[1])


KERNELS = dict.fromkeys(candidates.open_operations("auto", torch.device("cpu")), "eager")
ROW = {
    "name": "eager", "candidate": {"kernels": KERNELS}, "wrong": "", "ms": 1.0, "low": 1.0,
    "high": 1.0, "images": 4, "gib": 0.1, "won": True,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 7}, {"rows": []}, {"rows": [{}]}, {"rows": [[]]}, {"machine": [1]},
        *({"rows": [ROW | change]} for change in (
            {"ms": "1"}, {"ms": None}, {"ms": -1.0}, {"ms": 1e999}, {"name": []}, {"won": 1},
            {"images": {}}, {"candidate": "x"}, {"candidate": {"kernels": {"a": []}}},
            {"candidate": {"kernels": KERNELS, "threads": 10**9}},
            {"candidate": {"kernels": KERNELS, "micro_batch": 0}},
        )),
        {"candidate": [1]}, {"candidate": {"kernels": {"x": "y"}}},
    ],
)  # fmt: skip
def test_a_verdict_of_wrong_values_is_noted_and_not_taken(changes):
    """Of a state; one in the cache has the same rows."""
    tuning = autotune.Tuning()
    state = {"candidate": {"kernels": KERNELS}, "rows": [ROW], "machine": {}}
    assert autotune._of_state(state, JOB, tuning)
    tuning = autotune.Tuning()
    taken = autotune._of_state(state | changes, JOB, tuning)
    assert bool(taken) == ("machine" in changes)
    assert len(tuning.notes) == ("machine" not in changes)
