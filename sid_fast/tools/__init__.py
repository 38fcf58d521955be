"""Estimates of training steps, GPU specifications, the micro-batch search, the graph test."""
