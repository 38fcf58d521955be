"""Generated images are the same with CUDA graphs and without."""

import pytest
import torch

from sid_fast.evaluation import sample
from sid_fast.performance import cuda_graphs
from sid_fast.sampling import group_size
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
