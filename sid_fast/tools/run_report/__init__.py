"""The page that `python -m sid_fast.report` writes: run folders in, one HTML file out."""
