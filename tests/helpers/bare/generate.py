"""Load a pickle as upstream's tools do, in a process without sid_fast; write a PNG per seed.

python generate.py NET.pkl OUT COUNT STEPS, with torch_utils beside this file. Latents and classes
are drawn, and batches padded, as `python -m sid_fast.generate` does.
"""

import itertools
import math
import pickle
import sys
from pathlib import Path

import torch
from PIL import Image

sys.modules["sid_fast"] = None  # importing it fails from here on


def heun(net, latents, labels, steps):
    ramp = torch.arange(steps, dtype=torch.float64) / (steps - 1)
    sigmas = (80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    sigmas = torch.cat([sigmas, torch.zeros(1)])
    x = latents.double() * sigmas[0]
    for i, (now, then) in enumerate(itertools.pairwise(sigmas)):
        d = (x - net(x.float(), now.float(), labels).double()) / now
        euler = x + (then - now) * d
        if i < steps - 1:
            after = (euler - net(euler.float(), then.float(), labels).double()) / then
            euler = x + (then - now) * (d + after) / 2
        x = euler
    return x


@torch.no_grad()
def main(path, out, count, steps):
    with open(path, "rb") as file:
        net = pickle.load(file)["ema"].to("cpu")
    try:
        import sid_fast
    except ImportError:
        pass
    else:
        raise AssertionError(sid_fast)
    assert (net.sigma_min, net.sigma_max) == (0, math.inf)
    assert net.round_sigma(2.5) == 2.5
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())

    latents, labels = [], []
    for seed in range(count):
        rng = torch.Generator().manual_seed(seed)
        shape = net.img_channels, net.img_resolution, net.img_resolution
        latents.append(torch.randn(shape, generator=rng))
        labels.append(int(torch.randint(max(net.label_dim, 1), (), generator=rng)))
    rows = torch.arange(max(16, 64**2 // net.img_resolution**2)) % count
    z = torch.stack(latents)[rows]
    c = torch.eye(net.label_dim)[labels][rows] if net.label_dim else None
    if steps == 1:
        sigma = torch.full([len(z), 1, 1, 1], net.init_sigma)
        x = net(net.init_sigma * z, sigma, c, augment_labels=None, force_fp32=True, unknown=1)
    else:
        x = heun(net, z, c, steps)
    images = (x * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    Path(out).mkdir()
    for seed in range(count):
        image = Image.fromarray(images[seed].squeeze(-1) if net.img_channels == 1 else images[seed])
        image.save(Path(out) / f"seed{seed:06d}.png")


main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
