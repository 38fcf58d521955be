"""Performance: parallelism, CUDA graphs, compilation and precision, one topic per file."""
