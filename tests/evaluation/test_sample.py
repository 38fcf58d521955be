"""Generated images, their statistics and metrics: what is drawn, and what is refused."""

import numpy as np
import pytest
import torch

from sid_fast.data.datasets import ImageDataset, write_dataset
from sid_fast.errors import UserError
from sid_fast.evaluation import sample
from sid_fast.io import progress
from sid_fast.performance import cuda_graphs
from sid_fast.sampling import group_size, seed_inputs
from tests.helpers.networks import small_teacher


class Overwriting:
    """What a graph does, from the host: a replay writes into the result of the one before."""

    def __init__(self, function):
        self.function, self.result = function, None

    def __call__(self):
        found = self.function()
        self.result = found if self.result is None else self.result.copy_(found)
        return self.result


@pytest.mark.parametrize("steps", [1, 2])
def test_replayed_generation_makes_the_same_images(device, monkeypatch, steps):
    """With a partial last group, over several batches, and after a failed capture."""
    net = small_teacher().to(device).eval()
    size = group_size(device, 8)
    monkeypatch.setattr(sample, "GENERATION_BATCH", size + 3)

    def images(**options) -> torch.Tensor:
        return torch.cat(
            list(sample.generate_batches(net, range(2 * size + 1), 2.5, steps, **options))
        )

    expected = images()
    assert len(expected.unique(dim=0)) == len(expected)
    if device.type == "cpu":
        monkeypatch.setattr(cuda_graphs, "warm_up", lambda function: function())
        monkeypatch.setattr(cuda_graphs, "CapturedGraph", Overwriting)
    monkeypatch.setattr(cuda_graphs, "_failed", "")
    assert torch.equal(images(cuda_graph=True), expected)

    def fail(_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graphs, "CapturedGraph", fail)
    with pytest.warns(UserWarning, match=r"CUDA graphs are off: .*not permitted"):
        assert torch.equal(images(cuda_graph=True), expected)


class Features:
    """A detector that gives these features."""

    name, key, batch = "given", "given", 4

    def __init__(self, value: float, size: int = 3):
        self.value, self.size = value, size

    def __call__(self, images):
        return torch.full((len(images), self.size), self.value, dtype=torch.float64)


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (Features(float("nan")), "given gives features that are NaN, infinite or too large"),
        (Features(float("inf")), "given gives features that are NaN, infinite or too large"),
        (Features(1e200), "given gives features that are NaN, infinite or too large"),
        (Features(0, 16_385), "given gives 16,385 features of an image, more than 16,384"),
    ],
)
def test_features_that_cannot_be_compared_are_refused(features, words):
    images = torch.zeros(5, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(UserError, match=words):
        sample.compute_stats([images], 5, features, sample.StageTimer(images.device), "real")


def test_the_progress_says_how_many_images_are_done():
    parts = []

    def batches():
        for n in (3, 2):
            parts.append(progress._display.phases[-1].parts())
            yield torch.zeros(n, 3, 8, 8, dtype=torch.uint8)

    device = torch.device("cpu")
    sample.compute_stats(batches(), 5, Features(0), sample.StageTimer(device), "evaluation")
    assert [(p[0], p[3]) for p in parts] == [
        ("evaluation", "0 of 5 images"),
        ("evaluation", "3 of 5 images"),
    ]
    assert not progress._display.phases


def test_every_rank_fails_if_one_does(monkeypatch):
    """Here on the rank that has no fault: it would wait in the sum."""
    images = torch.zeros(5, 3, 8, 8, dtype=torch.uint8)
    monkeypatch.setattr(sample.process_group, "all_reduce_any", lambda flag: True)
    with pytest.raises(UserError, match="another process failed"):
        sample.compute_stats([images], 5, Features(0), sample.StageTimer(images.device), "real")
    # And on the one that has it, with its own error.
    seen = []
    monkeypatch.setattr(
        sample.process_group, "all_reduce_any", lambda flag: seen.append(flag) or flag
    )
    with pytest.raises(ZeroDivisionError):
        sample.compute_stats(
            (1 // 0 for _ in "a"), 5, Features(0), sample.StageTimer(images.device), "real"
        )
    assert seen == [True]


@pytest.mark.parametrize("fails", [False, True])
def test_a_metric_that_is_no_number_is_an_error(monkeypatch, fails):
    def distance(*_):
        if fails:
            raise torch.linalg.LinAlgError("did not converge")
        return float("nan")

    monkeypatch.setattr(sample, "frechet_distance", distance)
    timer = sample.StageTimer(torch.device("cpu"))
    stats = sample.FeatureStats(torch.zeros(3), torch.eye(3), 5, torch.zeros(5, 3))
    words = r"cannot be computed \(did not converge\)" if fails else "frechet distance is nan"
    with pytest.raises(UserError, match=words):
        sample.compare(stats, stats, Features(0), timer, ["fid"])


def test_classes_without_real_images_are_not_generated(tmp_path):
    """Seeds draw from the others; with images of every class they draw as without real ones."""
    net = small_teacher().eval()
    classes = net.config.label_dim
    for labels, expected in (
        ([1, 2, 5], [1, 2, 5]),
        (range(classes), []),
        ([0, classes - 1, classes + 7], [0, classes - 1]),
        (None, []),
    ):
        size = len(labels or "a")
        write_dataset(tmp_path / "a.zip", np.zeros((size, 1, 8, 8), np.uint8), labels)
        data = ImageDataset(tmp_path / "a.zip")
        found = sample.classes_to_draw(data, net)
        assert found == expected
        drawn = seed_inputs(list(range(40)), net.config, None, found)[1]
        assert set(drawn.tolist()) == set(found or range(classes))
    assert sample.classes_to_draw(None, net) == []
    seen = []
    generate = sample.generate_images
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "generate_images", lambda *a: seen.append(a[2]) or generate(*a))
        list(sample.generate_batches(net, range(20), 2.5, classes=[3, 4]))
    assert set(torch.cat(seen).tolist()) == {3, 4}
