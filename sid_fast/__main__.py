"""python -m sid_fast: what there is to run."""

print(
    """Distil a pretrained EDM diffusion model into a generator that needs one step.

  python -m sid_fast.train      distil a teacher
  python -m sid_fast.plan       estimate memory, time and cost of a run on a given cluster
  python -m sid_fast.generate   make images
  python -m sid_fast.evaluate   FID, IS, KID, precision and recall
  python -m sid_fast.pretrain   train a teacher on images of your own

--help after any of them lists its options; python -m sid_fast.train --preset digits shows it all
in a few minutes."""
)
