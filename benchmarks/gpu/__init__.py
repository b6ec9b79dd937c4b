"""The parts of `python -m benchmarks.gpu_suite`: each runs alone and leaves rows of results."""
