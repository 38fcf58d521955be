"""Score identity Distillation in 100 lines: digits in one step instead of 35 network calls.

    python examples/sid_in_100_lines.py     # half a minute; writes sid_digits.png

A plain PyTorch loop over sid_fast's losses, noise levels and samplers, without its speed.
"""

import argparse
import copy

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import sid_fast
from sid_fast import losses, noise, sampling
from sid_fast.evaluation.frechet import frechet_distance, moments

BATCH, FAKE_LR, GENERATOR_LR, ALPHA, SIGMA_INIT, TMAX = 128, 1e-3, 4e-4, 1.2, 2.5, 0.8

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--steps", type=int, default=64, help="steps of 128 images; 8, 16, 24, …")
parser.add_argument("--images", type=int, default=1000, help="images per measured distance")
parser.add_argument("--out", default="sid_digits.png", help="picture to write")
args = parser.parse_args()
torch.manual_seed(0)

teacher = sid_fast.load_network("digits")  # f_φ: 8×8 pixels, 10 classes; frozen
fake_score = copy.deepcopy(teacher).requires_grad_(True)  # f_ψ follows the generator's images
generator = copy.deepcopy(teacher).requires_grad_(True)  # G_θ
ema = copy.deepcopy(teacher)  # average of G_θ and the result; frozen
fake_adam = torch.optim.Adam(fake_score.parameters(), FAKE_LR, (0.0, 0.999))
generator_adam = torch.optim.Adam(generator.parameters(), GENERATOR_LR, (0.0, 0.999))


def inputs(n):
    """Draw latents z, noise ε and one-hot classes for n images."""
    shape = (n, teacher.config.channels, teacher.config.resolution, teacher.config.resolution)
    classes = torch.randint(teacher.config.label_dim, (n,))
    return torch.randn(shape), torch.randn(shape), torch.eye(teacher.config.label_dim)[classes]


def update(adam, loss, scale):
    """Minimise the mean of a per-sample loss [N]."""
    adam.zero_grad()
    (loss.sum() * scale / BATCH).backward()
    adam.step()


def train_step():
    """Update f_ψ on the denoising loss of generated images, then G_θ on equation 23."""
    z, eps, labels = inputs(BATCH)
    with torch.no_grad():
        y = sampling.one_step(generator, z, labels, SIGMA_INIT)
    sigma = noise.fake_score_sigma(torch.randn(BATCH, 1, 1, 1))
    update(fake_adam, losses.fake_score_loss(fake_score, y, sigma, eps, labels).loss, 1)

    z, eps, labels = inputs(BATCH)  # fresh ones
    y = sampling.one_step(generator, z, labels, SIGMA_INIT)
    sigma = noise.generator_sigma(torch.rand(BATCH, 1, 1, 1) * TMAX)
    fake_score.requires_grad_(False)  # gradients pass through both scores into y
    loss = losses.generator_loss(teacher, fake_score, y, sigma, eps, ALPHA, labels)
    update(generator_adam, loss.loss, 100)
    fake_score.requires_grad_(True)
    with torch.no_grad():
        for average, weight in zip(ema.parameters(), generator.parameters(), strict=True):
            average.lerp_(weight, 0.1)


real = moments(torch.from_numpy(load_digits().images).flatten(1) / 8 - 1)
latents, _, labels = inputs(args.images)


def measure(images):
    """Return the Fréchet distance to the real digits, in pixel space."""
    return frechet_distance(*real, *moments(images.flatten(1).clamp(-1, 1)))


points, pictures = [], []
for step in range(args.steps + 1):
    if step % max(args.steps // 8, 1) == 0:
        images = sampling.one_step(ema, latents, labels, SIGMA_INIT)
        points.append((step * BATCH, measure(images)))
        pictures.append(torch.nn.functional.pad(sampling.to_uint8(images[:64]), [1] * 4))
        print("{:6,} images  distance {:.3f}".format(*points[-1]), flush=True)
    if step < args.steps:
        train_step()
heun = measure(sampling.heun(teacher, latents, labels, 18))
print(f"teacher, 35 network calls: {heun:.3f}")

figure = Figure(figsize=(11, 4), layout="constrained")
axes = figure.subplots(1, 3)
axes[0].semilogy(*zip(*points, strict=True), "o-", label="one step")
axes[0].axhline(heun, color="black", linestyle="--", label="teacher, 35 calls")
axes[0].set(xlabel="images seen", ylabel="Fréchet distance, pixels")
axes[0].legend()
for place, title, picture in (axes[1], "before", pictures[0]), (axes[2], "after", pictures[-1]):
    place.imshow(picture.reshape(8, 8, 10, 10).transpose(1, 2).reshape(80, 80), cmap="gray")
    place.set(xlabel=title, xticks=[], yticks=[])
figure.savefig(args.out)
