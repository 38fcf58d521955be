"""Data sets, PNG readers, the embedded digits and image files."""
