"""Parameters of the augmentation."""

import torch

from sid_fast.methods.base import RandomStream


def stream(n, seed=0):
    return RandomStream(torch.tensor([seed, 0, 0]), "fake", n)


def to_device(parameters, device):
    return {name: v.to(device) for name, v in parameters.items()}
