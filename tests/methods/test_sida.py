"""SiDA: its losses and trajectories against the published ones, groups, faults and the schedule."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import sid_fast
from sid_fast import Distiller, Draw, Settings, SiDASettings, losses, noise
from sid_fast.config.types import grad_accum_steps, smaller_micro_batch
from sid_fast.data.datasets import ImageDataset, write_dataset
from sid_fast.data.images import to_float
from sid_fast.errors import UserError
from sid_fast.kernels import dispatch
from sid_fast.models import EDMNetwork
from sid_fast.models.edm_unet.layers import channel_mean
from sid_fast.models.edm_unet.unet import Block
from sid_fast.performance.compile import compiled_graphs
from sid_fast.performance.cuda_graphs import MAX_SINGLE_GRAPH_MICRO_BATCHES
from sid_fast.training.checkpoint import States, load_state
from tests.helpers import recorder
from tests.helpers.golden import (
    TOLERANCE,
    TRAJECTORY_TOLERANCE,
    check_sida_losses,
    golden_draws,
    golden_settings,
    read,
    relative,
    trajectory_error,
)
from tests.helpers.networks import TINY, small_teacher, weights

NETWORKS = ["ddpmpp_uncond", "ddpmpp_cond", "adm_cond"]


def load(golden, name):
    teacher = sid_fast.load_network(golden / f"{name}.pkl")
    fake_score = sid_fast.load_network(golden / f"{name}.fake.pkl")
    data = read(golden / f"{name}.sida_loss.npz")
    data["g_sigma"] = noise.generator_sigma(data["g_rand_t"] * data["tmax"] / 1000)
    data["f_sigma"] = noise.fake_score_sigma(data["f_rnd_normal"])
    return teacher, fake_score, data


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_match_golden(golden, name):
    """In either form of the U-Net, with the decoder and without it."""
    _, fake_score, data = load(golden, name)
    arguments = data["enc_x"], data["enc_sigma"], data.get("class_labels")
    ran = []
    for layer in fake_score.model.dec.values():
        layer.register_forward_hook(lambda *_: ran.append(1))
    for form in (None, {"block": "triton"}):
        with dispatch.forced(form):
            images, logits = fake_score.denoise_and_logits(*arguments)
            assert relative(images, data["enc_D"]) <= TOLERANCE
            assert relative(logits, data["enc_logits"]) <= TOLERANCE
            assert logits.dtype == torch.float32
            ran.clear()
            assert relative(fake_score.logits(*arguments), data["enc_logits"]) <= TOLERANCE
            assert not ran, "the decoder runs for the logits"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backends"),
    [*((n, "eager") for n in NETWORKS), ("ddpmpp_uncond", {"sida_loss": "triton"})],
)
def test_losses_match_golden(golden, name, backends):
    """Networks with Triton kernels: tests/models/test_unet.py; their logits: above."""
    with dispatch.forced(backends):
        teacher, fake_score, data = load(golden, name)
        check_sida_losses(teacher, fake_score, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddpmpp_uncond", "adm_cond"])
def test_golden_trajectory(golden, name):
    data = read(golden / f"sida_trajectory_{name}.npz")
    teacher = sid_fast.load_network(golden / f"{name}.pkl")
    start = {k: v.clone() for k, v in teacher.state_dict().items()}
    distiller = Distiller(teacher, golden_settings(data))
    clipped = 0
    for step in range(int(data["steps"])):
        metrics = distiller.step(golden_draws(data, step))
        assert int(metrics["fake/dropped"]) == int(metrics["fake/nonfinite"]) == 0
        assert ("generator/loss" in metrics) == (step > 2)  # of 4 images each, after 8
        clipped += int(metrics["fake/clipped"])
    assert clipped > 0
    assert int(distiller.optimizers["generator"].step_count) == int(data["steps"]) - 3
    for net, key in (
        (distiller.fake_score, "fake_score"),
        (distiller.generator, "G"),
        (distiller.ema, "G_ema"),
    ):
        error = trajectory_error(data, start, net, key)
        print(f"{name} {key} {error:.1e}")
        assert error <= TRAJECTORY_TOLERANCE, key


# ---- a small network


FAST = dict(batch_size=4, fake_lr=1e-3, generator_lr=1e-3, eps=1.0, adversarial_group=2)
AT_ONCE = dict(generator_start_kimg=0.0, adversarial_start_kimg=0.0)  # from the second step on


def images(n=12, channels=1, resolution=8, label_dim=10, name="data.zip", folder=None):
    """An EDM data set of noise, each image of its own class in turn."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (n, channels, resolution, resolution), np.uint8)
    labels = np.arange(n) % label_dim if label_dim else None
    write_dataset(folder / name, pixels, labels)
    return ImageDataset(folder / name)


@pytest.fixture
def data(tmp_path):
    return images(folder=tmp_path)


def started(data=None, seed=0, teacher=None, compile=False, **settings):
    """A distiller whose generator learns with all terms from its first step on."""
    settings = SiDASettings(**FAST | AT_ONCE | settings)
    distiller = Distiller(teacher or small_teacher(), settings, seed, data=data, compile=compile)
    distiller.steps, distiller.images = 1, distiller.settings.batch_size
    return distiller


def split(draws, micro_batch):
    """The same draws in smaller micro-batches."""

    def part(draw, rows):
        def cut(v):
            return {k: t[..., rows] for k, t in v.items()} if isinstance(v, dict) else v[rows]

        values = (getattr(draw, field.name) for field in dataclasses.fields(draw))
        return Draw(*(None if v is None else cut(v) for v in values))

    return {
        phase: [
            part(draw, slice(i, i + micro_batch))
            for draw in rounds
            for i in range(0, len(draw.z), micro_batch)
        ]
        for phase, rounds in draws.items()
    }


def test_any_cut_that_keeps_groups_whole_gives_the_same_numbers(data):
    whole = started(data, augment_p=0.5)
    rounds = started(augment_p=0.5, micro_batch=2)
    other = started(augment_p=0.5, adversarial_group=4)
    start = weights(whole)
    for _ in range(2):
        draws = whole.draw()
        expected, found = whole.step(draws), rounds.step(split(draws, 2))
        other.step(draws)
    assert relative(weights(rounds), weights(whole)) <= 1e-6
    assert relative(weights(rounds) - start, weights(whole) - start) <= 1e-4
    assert relative(weights(other) - start, weights(whole) - start) > 1e-3
    for name in ("fake/discriminator", "generator/adversarial"):
        assert relative(found[name], expected[name]) <= 1e-5


def test_the_micro_batch_does_not_change_the_run(data):
    """Real images, dropout and augmentation included."""
    found = [started(data, 5, dropout=0.2, augment_p=0.5, micro_batch=micro) for micro in (4, 2)]
    start = weights(found[0])
    for distiller in found:
        for _ in range(3):
            distiller.step()
    moved = (weights(found[0]) - start).norm()
    assert (weights(found[1]) - weights(found[0])).norm() < 1e-4 * moved


@pytest.mark.parametrize(
    ("settings", "ranks", "words"),
    [
        ({"micro_batch": 2}, 1, ["micro_batch=2", "adversarial_group=8", "is 8"]),
        ({"micro_batch": 24, "batch_size": 48}, 1, None),
        ({"micro_batch": 12, "batch_size": 48}, 1, ["micro_batch=12", "is 8"]),
        ({"batch_size": 16}, 4, ["adversarial_group=8", "4 images a process", "at most 2", "is 4"]),
        ({"batch_size": 16}, 2, None),
        ({"batch_size": 12}, 1, ["adversarial_group=8", "12 images", "is 6"]),
        ({"batch_size": 256, "adversarial_group": 32}, 8, None),
        ({"batch_size": 256, "adversarial_group": 32}, 16, ["at most 8 processes"]),
    ],
)  # fmt: skip
def test_a_cut_group_is_refused_with_the_nearest_that_is_whole(settings, ranks, words):
    settings = SiDASettings(**{"batch_size": 16, "adversarial_group": 8} | settings)
    if words is None:
        assert grad_accum_steps(settings, ranks)
        return
    with pytest.raises(UserError) as caught:
        grad_accum_steps(settings, ranks)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)
    if ranks == 1:
        with pytest.raises(UserError, match="adversarial_group"):
            Distiller(small_teacher(), settings)


def test_a_smaller_micro_batch_keeps_groups_whole():
    assert smaller_micro_batch(SiDASettings(batch_size=64, adversarial_group=8), 2) == 16
    assert (
        smaller_micro_batch(SiDASettings(batch_size=32, micro_batch=8, adversarial_group=8)) is None
    )


def test_the_generator_rests_then_takes_one_term_and_then_both(data):
    """By images seen at the start of the step, with > as recorded."""
    settings = SiDASettings(
        **FAST | dict(generator_start_kimg=0.004, adversarial_start_kimg=0.012),
        generator_beta1=0.9,
    )
    distiller = Distiller(small_teacher(), settings, data=data)
    optimizer = distiller.optimizers["generator"]
    seen = []
    for _ in range(6):
        before = weights(distiller)
        state = [v.clone() for v in optimizer.state_dict("").values()]
        metrics = distiller.step()
        same = all(map(torch.equal, state, optimizer.state_dict("").values()))
        assert same == ("generator/loss" not in metrics)
        assert not torch.equal(weights(distiller), before)
        loss, adversarial = distiller.factors["generator"].values()
        seen.append((int(optimizer.step_count), float(loss), float(adversarial)))
    half = 0.5 * 0.01 * 64
    assert seen == [
        (0, 100, 0),
        (0, 100, 0),
        (1, 100, 0),
        (2, 100, 0),
        (3, 50, half),
        (4, 50, half),
    ]


def test_draws_of_a_resting_generator_are_passed_over(data):
    """They are drawn all the same; and they may be missing."""
    found = []
    for without in (False, True):
        distiller = Distiller(small_teacher(), SiDASettings(**FAST), data=data)
        draws = distiller.draw()
        assert len(draws["generator"]) == 1
        if without:
            del draws["generator"]
        else:
            draws["generator"][0].z.fill_(torch.nan)
        metrics = distiller.step(draws)
        assert not any("generator" in name for name in metrics)
        found.append(weights(distiller))
    assert torch.equal(*found)


def test_draws_hold_real_images_and_their_labels(data):
    distiller = started(data, augment_p=1.0)
    (draw,) = distiller.draw()["fake"]
    pixels = to_float(torch.from_numpy(data.images()))
    for image, label in zip(draw.real, draw.class_labels, strict=True):
        rows = [i for i, p in enumerate(pixels) if torch.equal(image, p)]
        assert len(rows) == 1
        assert int(label.argmax()) == data.labels[rows[0]]
    assert float(draw.real.min()) < -0.9 < 0.9 < float(draw.real.max())
    for name, values in draw.augment.items():
        if name not in ("xflip", "yflip"):
            assert not torch.equal(values, draw.real_augment[name]), name
    assert distiller.draw()["generator"][0].real is None


@pytest.mark.parametrize("field", ["z", "real", "noise", "sigma", "class_labels"])
@pytest.mark.parametrize("augment_p", [0.0, 0.5])
def test_a_spoiled_draw_is_dropped_and_the_rest_of_the_step_is_that_without_it(
    data, field, augment_p
):
    """In a group of three, against the same draws without the sample in a group of two."""
    settings = dict(adversarial_group=4, augment_p=augment_p)
    spoiled, without = started(data, **settings), started(**settings)
    draws, start = spoiled.draw(), weights(spoiled)
    keep = torch.tensor([0, 2, 3])
    parts = split(draws, 1)
    kept = {
        phase: [Draw(*(_joined([getattr(parts[phase][i], f.name) for i in keep]) for f in _FIELDS))]
        for phase in draws
    }
    without.step(kept)
    for rounds in draws.values():
        if getattr(rounds[0], field) is not None:
            getattr(rounds[0], field)[1] = torch.nan
    metrics = spoiled.step(draws)
    assert int(metrics["fake/dropped"]) == 1
    assert int(metrics["generator/dropped"]) == (field != "real")
    assert int(metrics["fake/nonfinite"]) == int(metrics["generator/nonfinite"]) == 0
    nets = (spoiled.fake_score, without.fake_score)
    if field != "real":
        nets = (spoiled.generator, without.generator)
    moved = (weights(without) - start).norm()
    found, expected = (torch.cat([p.detach().flatten() for p in n.parameters()]) for n in nets)
    assert (found - expected).norm() < 1e-4 * moved


_FIELDS = dataclasses.fields(Draw)


def _joined(values):
    if values[0] is None:
        return None
    if isinstance(values[0], dict):
        return {k: torch.cat([v[k] for v in values], -1) for k in values[0]}
    return torch.cat(values)


@pytest.mark.parametrize("method", ["raw_logits", "raw_and_logits"])
def test_a_logit_that_is_not_finite_drops_its_sample(data, method, monkeypatch):
    """Of either branch; the published code forgets it in the generator's phase."""
    distiller = started(data, adversarial_group=4)
    draws = distiller.draw()
    plain = getattr(distiller.fake_score, method)

    def spoiled(*arguments):
        found = plain(*arguments)
        logits = found if method == "raw_logits" else found[1]
        spoil = torch.zeros_like(logits)
        spoil[2, 0, 1, 1] = torch.inf
        logits = logits + spoil
        return logits if method == "raw_logits" else (found[0], logits)

    monkeypatch.setattr(distiller.fake_score, method, spoiled)
    metrics = distiller.step(draws)
    assert int(metrics["fake/dropped"]) == 1
    assert int(metrics["generator/dropped"]) == (method != "raw_logits")
    assert int(metrics["fake/nonfinite"]) == int(metrics["generator/nonfinite"]) == 0
    assert torch.isfinite(weights(distiller)).all()
    assert all(
        torch.isfinite(metrics[f"fake/{n}"]) for n in ("loss", "discriminator", "real_logit")
    )


def test_a_step_without_a_finite_sample_changes_nothing(data):
    distiller = started(data)
    distiller.step()
    before = {k: v.clone() for k, v in distiller.state_dict().items()}
    draws = distiller.draw()
    draws["fake"][0].real.fill_(torch.nan)
    draws["generator"][0].z.fill_(torch.nan)
    metrics = distiller.step(draws)
    assert bool(metrics["fake/skipped"])
    assert bool(metrics["generator/skipped"])
    assert all(torch.equal(v, before[k]) for k, v in distiller.state_dict().items())


@pytest.mark.parametrize("stop", [2, 4])
def test_it_resumes_to_the_same_bits(tmp_path, data, stop):
    """Over either start; real images, dropout and augmentation included."""
    settings = SiDASettings(
        **FAST | dict(generator_start_kimg=0.008, adversarial_start_kimg=0.012),
        dropout=0.2, augment_p=0.5,
    )  # fmt: skip

    def fresh():
        return Distiller(small_teacher(), settings, 3, data=data)

    whole, first, second = fresh(), fresh(), fresh()
    for _ in range(6):
        whole.step()
    for _ in range(stop):
        first.step()
    states = States(tmp_path, first, settings, keep=1)
    assert states.begin() is None
    assert states.finish() is None
    load_state(states.path, second)
    for _ in range(6 - stop):
        second.step()
    pairs = zip(second.state_dict().values(), whole.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_state_of_the_other_method_is_refused(tmp_path, data):
    common = dict(alpha=1.0, batch_size=4)
    sid = Distiller(small_teacher(), Settings(**common))
    sida = Distiller(small_teacher(), SiDASettings(adversarial_group=2, **common), data=data)
    for made, other in ((sid, sida), (sida, sid)):
        states = States(tmp_path / type(made.settings).__name__, made, made.settings, keep=1)
        assert states.begin() is None
        assert states.finish() is None
        with pytest.raises(UserError, match=r"discriminator_loss_scale=.*start a new run"):
            load_state(states.path, other)


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [1, MAX_SINGLE_GRAPH_MICRO_BATCHES + 1])
def test_replayed_steps_end_on_the_same_bits(monkeypatch, data, device, rounds, tmp_path):
    """Two sets of graphs serve the three regimes."""
    if device.type == "cuda":
        pytest.skip("benchmarks.check replays on a GPU")
    recorder.stand_in(monkeypatch.setattr)
    batch = 2 * rounds
    settings = SiDASettings(
        **FAST | dict(
            batch_size=batch, micro_batch=2, generator_start_kimg=batch / 1000,
            adversarial_start_kimg=3 * batch / 1000,
        ),
        dropout=0.2, augment_p=0.5,
    )  # fmt: skip
    found, captured = [], []
    for cuda_graph in (False, True):
        distiller = Distiller(small_teacher(TINY), settings, data=data, cuda_graph=cuda_graph)
        metrics = []
        for _ in range(6):
            metrics += [v.clone() for v in distiller.step().values()]
            if cuda_graph:
                captured.append(distiller.graphs.graphs)
        found.append([*distiller.state_dict().values(), *metrics])
    assert all(map(torch.equal, *found))
    assert len({id(graphs) for graphs in captured}) == 2
    each = 3 if rounds > MAX_SINGLE_GRAPH_MICRO_BATCHES else 1
    assert [len(graphs) for graphs in captured] == [each] * 2 + [
        max(2 * each * (rounds > 1), 1)
    ] * 4


@pytest.mark.slow
def test_a_compiled_step_is_the_eager_one(data, monkeypatch):
    """Its networks run in every mode that SiD's do. Inductor itself would take minutes."""
    monkeypatch.setattr("sid_fast.performance.compile.BACKEND", "aot_eager")
    start, *found = (
        started(data, teacher=small_teacher(TINY), compile=compile, dropout=0.2)
        for compile in (False, False, True)
    )
    torch._dynamo.utils.counters.clear()
    for distiller in found:
        distiller.step()
    eager, compiled = map(weights, found)
    assert (compiled - eager).norm() < 1e-4 * (eager - weights(start)).norm()
    assert compiled_graphs(), "no block was compiled"


@pytest.mark.slow
def test_a_step_meets_the_host_nowhere(data):
    distiller = started(data, augment_p=0.5, dropout=0.2, micro_batch=2)
    distiller.step()
    distiller._load_images()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        distiller.run()
    names = {event.key for event in found.key_averages()}
    assert "sid_fast::sida_discriminator_loss" in names
    for name in ("item", "_local_scalar_dense", "nonzero", "is_nonzero", "lift_fresh"):
        assert f"aten::{name}" not in names


def test_both_passes_of_the_fake_score_drop_other_elements():
    """Real and generated image see independent masks, in every block of the encoder."""
    distiller = started(dropout=0.5)
    net, seeds = distiller.fake_score, []
    net.train()
    for block in net.model.blocks():
        plain = block.active_dropout
        block.active_dropout = lambda seed=None, plain=plain: seeds.append(plain(seed)) or seeds[-1]
    x, c_noise = torch.randn(2, 1, 8, 8), torch.zeros(2)
    net.raw_logits(x, c_noise)
    net.raw_and_logits(x, c_noise)
    streams = [tuple(found["seed"].tolist()) for found in seeds]
    encoder = sum(isinstance(layer, Block) for layer in net.model.enc.values())
    assert len(set(streams)) == len(streams) == encoder + len(net.model.blocks())


def test_the_metrics_say_what_the_discriminator_sees(data):
    distiller = started(data)
    draws = distiller.draw()
    draw, teacher = draws["fake"][0], distiller.fake_score
    noisy = draw.real + draw.sigma * draw.noise
    logits = teacher.logits(noisy, draw.sigma, draw.class_labels)
    metrics = distiller.step(draws)
    assert float(metrics["fake/real_logit"]) == pytest.approx(
        float(logits.detach().mean()), rel=1e-4
    )
    share = float((logits > 0).float().mean())
    assert float(metrics["fake/real_share"]) == pytest.approx(share, rel=1e-5)
    logits = {"real_logit", "fake_logit", "real_share", "fake_share"}
    wanted = {"fake": {"discriminator", "clipped"} | logits,
              "generator": {"adversarial", "logit", "share"}}  # fmt: skip
    always = {"loss", "distance", "dropped", "nonfinite", "skipped", "failed"}
    assert set(metrics) == {f"{k}/{name}" for k, v in wanted.items() for name in v | always}


def test_gradients_are_clipped_only_where_the_settings_say_so(data):
    metrics = started(data, fake_grad_clip=1e-3).step()
    assert int(metrics["fake/clipped"]) > 0
    assert "generator/clipped" not in metrics
    assert "fake/clipped" not in started(data, fake_grad_clip=None).step()


def test_sida2_starts_from_a_generator():
    """Generator and average; teacher and fake score are the teacher's."""
    torch.manual_seed(1)
    generator = copy.deepcopy(small_teacher())
    generator.config = dataclasses.replace(generator.config, init_sigma=2.5)
    for p in generator.parameters():
        p.data.add_(torch.randn(p.shape) * 0.01)
    distiller = Distiller(small_teacher(), SiDASettings(**FAST), generator=generator)

    def same(net, other):
        return all(map(torch.equal, net.state_dict().values(), other.state_dict().values()))

    assert same(distiller.generator, generator)
    assert same(distiller.ema, generator)
    assert same(distiller.fake_score, small_teacher())
    assert not same(distiller.generator, distiller.fake_score)
    assert distiller.generator.config.init_sigma == 2.5


def test_what_cannot_be_is_refused(tmp_path, data):
    settings = SiDASettings(**FAST)
    teacher = small_teacher()

    def refused(words, **arguments):
        with pytest.raises(UserError, match=words) as caught:
            Distiller(teacher, **{"settings": settings} | arguments)
        assert "\n" not in str(caught.value)

    other = EDMNetwork(dataclasses.replace(teacher.config, num_blocks=2))
    refused("the generator has num_blocks=2, the teacher num_blocks=1", generator=other)
    sharp = EDMNetwork(dataclasses.replace(teacher.config, init_sigma=1.0))
    refused("init_sigma=1.0", generator=sharp)
    refused("give SiDASettings", settings=Settings(), generator=teacher)
    refused("give SiDASettings", settings=Settings(), data=data)
    small = images(resolution=4, name="small.zip", folder=tmp_path)
    refused(r"small.zip has resolution 4, the teacher makes images of resolution 8", data=small)
    colour = images(channels=3, name="colour.zip", folder=tmp_path)
    refused(r"colour.zip has channels 3", data=colour)
    refused("plain.zip has no labels", data=images(label_dim=0, name="plain.zip", folder=tmp_path))
    classes = images(label_dim=11, name="classes.zip", folder=tmp_path)
    refused("classes.zip has 11 classes, the teacher knows 10", data=classes)
    few = images(n=3, name="few.zip", folder=tmp_path)
    refused("few.zip has 3 images, fewer than batch_size=4", data=few)
    for field, value in {
        "adversarial_group": 0, "fake_grad_clip": 0.0, "generator_start_kimg": -1.0,
        "adversarial_start_kimg": math.nan, "discriminator_loss_scale": -0.1,
        "adversarial_loss_scale": math.inf, "alpha": 3.0,
    }.items():  # fmt: skip
        refused(f"{field}=", settings=SiDASettings(**FAST | {field: value}))


def test_a_step_without_data_or_draws_says_what_is_missing(data):
    distiller = Distiller(small_teacher(), SiDASettings(**FAST))
    for sample in (distiller.step, distiller.draw):
        with pytest.raises(UserError, match="give a data set"):
            sample()
    draws = Distiller(small_teacher(), SiDASettings(**FAST), data=data).draw()
    distiller.step(draws)
    draws["fake"][0] = dataclasses.replace(draws["fake"][0], real=None)
    with pytest.raises(UserError, match="needs real images"):
        distiller.step(draws)


def test_fewer_classes_in_the_data_than_the_teacher_knows(tmp_path):
    (draw,) = started(images(label_dim=4, folder=tmp_path)).draw()["fake"]
    assert draw.class_labels.shape == (4, 10)
    assert draw.class_labels.sum(1).eq(1).all()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("architecture", ["ddpmpp", "ncsnpp", "adm"])
def test_every_architecture_steps_in_16_bit(data, architecture, precision):
    width = 64 if architecture == "adm" else 16
    config = dataclasses.replace(
        small_teacher().config, architecture=architecture, model_channels=width
    )
    torch.manual_seed(0)
    for form in ("eager", {"block": "triton"}):
        with dispatch.forced(form):
            settings = SiDASettings(**FAST | AT_ONCE, precision=precision, dropout=0.1)
            distiller = Distiller(EDMNetwork(config), settings, data=data)
            distiller.step()
            metrics = distiller.step()
        assert all(torch.isfinite(v) for v in metrics.values())
        assert int(metrics["fake/nonfinite"]) == int(metrics["generator/nonfinite"]) == 0


@pytest.mark.parametrize("architecture", ["ddpmpp", "ncsnpp", "adm"])
def test_logits_are_channel_means_and_their_gradient_is_a_broadcast(architecture):
    """In every form, against a hook on what the decoder reads; all weights of the encoder learn."""
    width = 64 if architecture == "adm" else 16
    config = dataclasses.replace(
        small_teacher().config, architecture=architecture, model_channels=width
    )
    net = EDMNetwork(config)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, sigma, labels = torch.randn(2, 1, 8, 8), torch.ones(2), torch.eye(10)[:2]
    seen = []
    net.model.dec["4x4_in0"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    weight = torch.randn(2, 1, 4, 4)
    grads = []
    for form in ("eager", {"block": "triton"}):
        with dispatch.forced(form):
            _, logits = net.denoise_and_logits(x, sigma, labels, torch.ones(2, 9))
            if form == "eager":
                assert torch.allclose(logits, seen[0].mean(1, keepdim=True), atol=1e-6)
            for found in (logits, net.logits(x, sigma, labels, torch.ones(2, 9))):
                net.zero_grad()
                (found * weight).sum().backward()
                grads.append(
                    {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
                )
    for found in grads:
        for name, grad in grads[0].items():
            assert relative(found[name], grad) <= 1e-4, name
        reached = {name for name, grad in found.items() if grad.any()}
        parts = [
            name for name, _ in net.named_parameters() if "dec" not in name and "out_" not in name
        ]
        assert reached == set(parts)
    assert channel_mean(x.requires_grad_()).sum().backward() is None
    y = torch.randn(2, 5, 4, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(channel_mean(y), y, torch.ones(2, 1, 4, 4))
    assert grad.stride(1) == 0
    assert torch.allclose(grad, torch.full_like(grad, 0.2))


def test_each_image_is_read_with_its_own_augmentation_labels_and_the_same_noise():
    net = small_teacher()
    y, real, eps = torch.randn(3, 4, 1, 8, 8)
    sigma, classes = torch.tensor([0.1, 0.5, 1.0, 4.0]), torch.eye(10)[[1, 5, 7, 7]]
    warp, real_warp = torch.rand(2, 4, 9)
    found = losses.sida_fake_score_loss(net, y, real, sigma, eps, classes, warp, real_warp)
    for logit, image, labels in (
        (found.fake_logit, y, warp),
        (found.real_logit, real, real_warp),
    ):
        noisy = image + sigma.reshape(-1, 1, 1, 1) * eps
        expected = net.logits(noisy, sigma, classes, labels).mean((1, 2, 3))
        assert torch.allclose(logit, expected, atol=1e-5)
