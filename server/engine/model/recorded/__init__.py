"""Forwards that are recorded once and replayed: on a GPU as CUDA graphs, on a CPU without Python between kernels."""
