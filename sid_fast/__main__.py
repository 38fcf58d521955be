"""List the commands: python -m sid_fast."""

print(
    """sid_fast distils a pretrained EDM diffusion model into a one-step generator.

  python -m sid_fast.train      distil a teacher into a one-step generator
  python -m sid_fast.plan       estimate memory, time and cost of a run on a given cluster
  python -m sid_fast.tune       prove and time the ways to take a training step on this machine
  python -m sid_fast.generate   generate images
  python -m sid_fast.evaluate   compute FID, IS, KID, precision and recall
  python -m sid_fast.pretrain   train a teacher on your own images

Each command lists its options with --help. To try it on a CPU, in a few minutes:

  python -m sid_fast.train --preset digits"""
)
