"""Data sets, the embedded digits, readers and pictures."""
