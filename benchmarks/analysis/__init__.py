"""Counted estimates and one-off studies: no GPU is timed here."""
